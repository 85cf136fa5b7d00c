"""The table of image-to-mesh models, and `resolve`: name, folder or hub id -> MeshBackbone. No torch here.

Folders and hub ids are recognised by the transformer class in their `config.yaml`. A folder may hold
`edit.json` ({"steps": 20, ...}: defaults for requests) and `routers/` (a bundle used by default).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones.hunyuan3d.errors import CheckpointError
from backbones.hunyuan3d.family import FAMILY_2, FAMILY_21
from backbones.hunyuan3d.folders import find_weights, resolve_folder
from backbones.model_files import (
    GIB,
    ModelNotFoundError,
    count_by_prefix,
    folder_bundle,
    folder_defaults,
    hub_message,
    memory_gib,
    near_names,
    read_json,
    require_hub,
)
from backbones.registry import rows as picture_models
from backbones.spec import PACKAGE_FOLDER, MeshBackbone, MeshDefaults, MeshFamily

FAMILIES: tuple[MeshFamily, ...] = (FAMILY_2, FAMILY_21)
DEFAULT_MESH_MODEL = "hunyuan3d-tiny"
LICENCE = "Tencent Hunyuan Community"

DINO_GIANT, DINO_LARGE = 1_136_480_768, 304_368_640
DECODER, FULL_VAE, TURBO_DECODER = 214_212_865, 327_746_177, 203_690_497
DIT_2, DIT_MINI, DIT_21, GUIDANCE_IN = 1_113_274_432, 559_196_224, 3_050_758_720, 1_312_768
"""Parameters of the published parts."""


def _hub(name: str, repository: str, transformer: int, rest: int, summary: str, **row: Any) -> MeshBackbone:
    parameters = transformer + rest
    return MeshBackbone(
        name=name,
        family=row.pop("family", FAMILY_2),
        source=f"tencent/{repository}",
        licence=LICENCE,
        parameters=parameters,
        transformer_parameters=transformer,
        memory_gib=round(2 * parameters / GIB, 1),
        defaults=row.pop("defaults", MeshDefaults()),
        summary=summary,
        **row,
    )


def _packaged() -> MeshBackbone | None:
    path = PACKAGE_FOLDER / "tiny" / "hunyuan3d_tiny"
    if not (path / "config.yaml").is_file():
        return None  # a source checkout before the weights were trained
    return replace(
        _from_folder(path),
        name="hunyuan3d-tiny",
        licence="Apache-2.0; trained on shapes made by code and on Apache-2.0, MIT and CC-BY-4.0 art",
        packaged=True,
        summary="trained from scratch; runs on any CPU",
    )


def rows() -> dict[str, MeshBackbone]:
    """Image-to-mesh models by name, in the order `edit models` shows them."""
    giant = DECODER + DINO_GIANT
    turbo = MeshDefaults(steps=5)
    table: list[MeshBackbone | None] = [_packaged()]
    for name, repository, size, views, text in (
        ("hunyuan3d-2", "Hunyuan3D-2/hunyuan3d-dit-v2-0", DIT_2, False, "1.1 B double + single stream DiT"),
        ("hunyuan3d-2mini", "Hunyuan3D-2mini/hunyuan3d-dit-v2-mini", DIT_MINI, False, "half of the blocks"),
        ("hunyuan3d-2mv", "Hunyuan3D-2mv/hunyuan3d-dit-v2-mv", DIT_2, True, "several views of one object"),
    ):
        guided = size + GUIDANCE_IN
        table += [
            _hub(name, repository, size, giant, text, views=views),
            _hub(
                f"{name}-fast", f"{repository}-fast", guided, giant, f"{text}; guidance distilled",
                views=views, guided=False,
            ),
            _hub(
                f"{name}-turbo", f"{repository}-turbo", guided, giant, f"{text}; distilled to 5 steps",
                views=views, guided=False, defaults=turbo,
            ),
        ]  # fmt: skip
    table.append(
        _hub(
            "hunyuan3d-2.1", "Hunyuan3D-2.1/hunyuan3d-dit-v2-1", DIT_21, FULL_VAE + DINO_LARGE,
            "3 B DiT with skips and experts", family=FAMILY_21,
        )
    )  # fmt: skip
    return {row.name: row for row in table if row is not None}


def resolve(name_or_path: str) -> MeshBackbone:
    """A registry name, a checkpoint folder or a hub id (`owner/name[/subfolder]`) -> its MeshBackbone.

    Only a hub id outside the registry may touch the network. Raises ModelNotFoundError.
    """
    table = rows()
    if name_or_path in table:
        return table[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.exists():
        same = (row for row in table.values() if row.folder is not None and row.folder == path.resolve())
        return next(same, None) or _from_folder(path.resolve())
    # the published repositories without a subfolder mean their first model
    by_source = (row for row in table.values() if f"{row.source}/".startswith(f"{name_or_path}/"))
    found = next(by_source, None)
    if found is not None:
        return found
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 2:
        raise ModelNotFoundError(
            f"model folder {name_or_path!r} does not exist; give one with config.yaml, or see `edit models`"
        )
    if "/" in name_or_path:
        return _from_hub(name_or_path)
    if name_or_path in picture_models():
        raise ModelNotFoundError(f"{name_or_path!r} makes pictures: use `edit generate -m {name_or_path}`")
    raise ModelNotFoundError(
        f"unknown image-to-mesh model {name_or_path!r}; {near_names(name_or_path, table)} "
        "A checkpoint folder or a hub id (owner/name/subfolder) works too"
    )


def model_config(backbone: MeshBackbone) -> dict[str, Any]:
    """Sections of `config.yaml`; for registry rows a shipped extract that suffices to count FLOPs.

    A hub id outside the registry was fetched when it was resolved, so it is a folder here.
    """
    if backbone.folder is not None:
        return _read_yaml(backbone.folder / "config.yaml")
    table: dict[str, Any] = read_json(PACKAGE_FOLDER / "configs" / "hunyuan3d.json")
    config: dict[str, Any] = table[backbone.name]
    return config


def component_parameters(backbone: MeshBackbone) -> dict[str, int]:
    """Parameters of transformer, VAE and conditioner: from a folder's file, else the registry's totals."""
    if backbone.folder is not None:
        return _folder_parameters(backbone.folder)
    rest = backbone.parameters - backbone.transformer_parameters
    return {"transformer": backbone.transformer_parameters, "conditioner and VAE": rest}


def _from_folder(folder: Path) -> MeshBackbone:
    if not (folder / "config.yaml").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
        hint = f"subfolders that have one: {', '.join(inside)}" if inside else "see `edit models`"
        raise ModelNotFoundError(f"{str(folder)!r} is no image-to-mesh folder: it has no config.yaml; {hint}")
    config = _read_yaml(folder / "config.yaml")
    try:
        find_weights(folder)
    except CheckpointError as error:
        raise ModelNotFoundError(str(error)) from error
    family, counts = _family(config, str(folder)), _folder_parameters(folder)
    parameters = sum(counts.values())
    return MeshBackbone(
        name=folder.name,
        family=family,
        source=str(folder),
        licence="see the model's own card",
        parameters=parameters,
        transformer_parameters=counts.get("transformer", 0),
        memory_gib=memory_gib(parameters),
        defaults=folder_defaults(folder, family.defaults(config)),
        guided=not family.is_distilled(config),
        views=family.takes_views(config),
        bundle=folder_bundle(folder),
    )


def _from_hub(repository: str) -> MeshBackbone:
    """Hub ids outside the registry: the folder is fetched, then read like any other."""
    try:
        require_hub()
        folder = resolve_folder(repository)
    except CheckpointError as error:
        raise ModelNotFoundError(str(error)) from error
    except OSError as error:
        raise ModelNotFoundError(hub_message(repository, error)) from error
    return replace(_from_folder(folder.resolve()), name=repository)


def _family(config: Mapping[str, Any], where: str) -> MeshFamily:
    model = config.get("model")
    target = str(model.get("target", "")).rsplit(".", 1)[-1] if isinstance(model, dict) else ""
    for family in FAMILIES:
        if target == family.transformer.transformer_class:
            return family
    known = ", ".join(family.transformer.transformer_class for family in FAMILIES)
    raise ModelNotFoundError(
        f"{where!r} holds {target or 'no model'}, which `edit generate-3d` cannot run; it knows {known}"
    )


def _folder_parameters(folder: Path) -> dict[str, int]:
    """Parameters by component; a pickle's are not counted, for that would mean to load it."""
    weights = find_weights(folder)
    if weights.suffix != ".safetensors":
        return {}
    counts = count_by_prefix(weights)
    names = {"model": "transformer", "vae": "VAE", "conditioner": "conditioner"}
    return {names[prefix]: count for prefix, count in counts.items() if prefix in names}


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ModelNotFoundError(f"{str(file)!r} cannot be read as YAML: {first}") from error
    if not isinstance(data, dict):
        raise ModelNotFoundError(f"{str(file)!r} holds no sections")
    return data
