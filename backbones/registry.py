"""The table of known models, and `resolve`: registry name, folder or hub id -> Backbone. No torch here.

Folders and hub ids are recognised by the pipeline class in their `model_index.json`; packaged models are
folders like any other. A folder may hold `edit.json` ({"width": 128, "steps": 20, ...}: defaults for
requests) and `routers/` (a bundle used by default).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones import flux, qwen_image
from backbones.model_files import (
    GIB,
    ROUTERS_FOLDER,
    count_by_prefix,
    folder_bundle,
    folder_defaults,
    hub_file,
    is_small,
    memory_gib,
    near_names,
    read_header,
    read_json,
)
from backbones.model_files import ModelNotFoundError as ModelNotFoundError
from backbones.single_file import check_fits, denoiser_shapes, read_single_file
from backbones.spec import PACKAGE_FOLDER, Backbone, Config, Family

FAMILIES: tuple[Family, ...] = (qwen_image.FAMILY, flux.FAMILY)


def _hub(name: str, family: Family, source: str, **row: Any) -> Backbone:
    config = read_packaged_config(name)
    return Backbone(
        name=name,
        family=family,
        source=source,
        defaults=row.pop("defaults", family.defaults(config["transformer"])),
        size_multiple=family.size_multiple(config["vae"]),
        memory_gib=round(2 * row["parameters"] / GIB, 1),
        **row,
    )


def _packaged(name: str, family: Family, folder: str, licence: str, summary: str) -> Backbone | None:
    path = PACKAGE_FOLDER / folder
    if not (path / "model_index.json").is_file():
        return None  # a source checkout before the weights were trained
    return replace(
        _from_folder(path), name=name, family=family, licence=licence, packaged=True, summary=summary
    )


def read_packaged_config(name: str) -> dict[str, Config]:
    """Component configs of a hub row ("transformer", "vae"), shipped so that dry runs need no download."""
    data: dict[str, Config] = json.loads((PACKAGE_FOLDER / "configs" / f"{name}.json").read_text())
    return data


DEFAULT_MODEL = "qwen-image-tiny"


def rows() -> dict[str, Backbone]:
    """The registry, by name, in the order `edit models` shows it."""
    table = (
        _packaged(
            "qwen-image-tiny",
            qwen_image.FAMILY,
            "tiny/qwen_image_tiny",
            licence="Apache-2.0; trained on Apache-2.0, MIT and CC-BY-4.0 art",
            summary="trained from scratch on emoji art; runs on any CPU",
        ),
        _packaged(
            "flux-tiny",
            flux.FAMILY,
            "tiny/flux_tiny",
            licence="Apache-2.0; trained on Apache-2.0, MIT and CC-BY-4.0 art",
            summary="trained from scratch on emoji art; runs on any CPU",
        ),
        _hub(
            "qwen-image",
            qwen_image.FAMILY,
            "Qwen/Qwen-Image",
            licence="Apache-2.0",
            parameters=28_849_000_000,
            transformer_parameters=20_430_401_088,
            summary="20 B dual-stream DiT, Qwen2.5-VL 7B text encoder",
        ),
        _hub(
            "flux-dev",
            flux.FAMILY,
            "black-forest-labs/FLUX.1-dev",
            licence="FLUX.1 [dev] Non-Commercial",
            parameters=16_870_000_000,
            transformer_parameters=11_901_408_320,
            summary="12 B double + single stream DiT, T5-XXL and CLIP; gated on the hub",
        ),
        _hub(
            "flux-schnell",
            flux.FAMILY,
            "black-forest-labs/FLUX.1-schnell",
            licence="Apache-2.0",
            parameters=16_860_000_000,
            transformer_parameters=11_891_178_560,
            summary="FLUX.1 distilled to 1-4 steps",
        ),
    )
    return {row.name: row for row in table if row is not None}


def resolve(name_or_path: str, base: str | None = None) -> Backbone:
    """A registry name, a pipeline folder, a single-file checkpoint or a hub id -> its Backbone.

    base: for a single file, what its text encoders and VAE come from; default: the published model.
    Only a hub id outside the registry may touch the network. Raises ModelNotFoundError.
    """
    table = rows()
    if os.path.isfile(os.path.expanduser(name_or_path)):
        return _from_file(Path(name_or_path).expanduser().resolve(), base)
    if base is not None:
        raise ModelNotFoundError(
            f"--base {base!r} is for a single-file --model and {name_or_path!r} is none; leave it out"
        )
    if name_or_path in table:
        return table[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.exists():
        same = (row for row in table.values() if row.folder is not None and row.folder == path.resolve())
        return next(same, None) or _from_folder(path.resolve())
    by_source = next((row for row in table.values() if row.source == name_or_path), None)
    if by_source is not None:
        return by_source
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelNotFoundError(
            f"model folder {name_or_path!r} does not exist; give a pipeline folder, or see `edit models`"
        )
    if "/" in name_or_path:
        return _from_hub(name_or_path)
    from backbones import mesh_registry  # it imports this module

    if name_or_path in mesh_registry.rows():
        raise ModelNotFoundError(f"{name_or_path!r} makes meshes: use `edit generate-3d -m {name_or_path}`")
    raise ModelNotFoundError(
        f"unknown model {name_or_path!r}; {near_names(name_or_path, table)} "
        "A pipeline folder or a hub id (owner/name) works too"
    )


def component_config(backbone: Backbone, component: str) -> Config:
    """`config.json` of a component ("transformer", "vae"), without loading weights."""
    if backbone.file is not None and component == "transformer":
        return backbone.file.config
    if backbone.folder is not None:
        return read_json(backbone.folder / component / "config.json")
    row = next((row for row in rows().values() if row.source == backbone.source), None)
    if row is not None:
        return read_packaged_config(row.name)[component]
    return read_json(hub_file(backbone.source, f"{component}/config.json"))


def component_parameters(backbone: Backbone) -> dict[str, int]:
    """Parameters per component: from the weight files of a folder, else the registry's totals."""
    if backbone.folder is not None and backbone.file is not None:
        return {**_folder_parameters(backbone.folder), "transformer": backbone.transformer_parameters}
    if backbone.folder is None:
        rest = backbone.parameters - backbone.transformer_parameters
        return {"transformer": backbone.transformer_parameters, "text encoder and VAE": rest}
    return _folder_parameters(backbone.folder)


def _from_file(path: Path, base: str | None) -> Backbone:
    """A denoiser from a single file, everything else from `base`."""
    file = read_single_file(path, FAMILIES, base)
    source = resolve(file.base)
    family, base_config = source.family, component_config(source, "transformer")
    config = {**base_config, **file.config}
    check_fits(file, config, base_config, family)
    count = sum(math.prod(shape) for shape in denoiser_shapes(read_header(path), file.prefix).values())
    parameters = source.parameters - source.transformer_parameters + count
    defaults = source.defaults
    # a dev file on schnell's folder
    if family.takes_guidance(config) != family.takes_guidance(base_config):
        defaults = replace(family.defaults(config), width=defaults.width, height=defaults.height)
    return replace(
        source,
        name=path.stem,
        licence="see the model's own card",
        parameters=parameters,
        transformer_parameters=count,
        memory_gib=memory_gib(parameters),
        defaults=defaults,
        packaged=False,
        bundle=None,  # it was fitted on other weights
        summary="",
        file=replace(file, config=config, base=source.asked),
    )


def _from_folder(folder: Path) -> Backbone:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelNotFoundError(
            f"{str(folder)!r} is no pipeline folder: it has no model_index.json; see `edit models`"
        )
    family = _family(read_json(index), str(folder))
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    counts = _folder_parameters(folder)
    parameters = sum(counts.values())
    return Backbone(
        name=folder.name,
        family=family,
        source=str(folder),
        licence="see the model's own card",
        parameters=parameters,
        transformer_parameters=counts.get("transformer", 0),
        memory_gib=memory_gib(parameters),
        defaults=folder_defaults(folder, family.defaults(transformer)),
        size_multiple=family.size_multiple(vae),
        bundle=folder_bundle(folder),
        batch_size=8 if is_small(parameters) else 1,
    )


def _from_hub(repository: str) -> Backbone:
    family = _family(read_json(hub_file(repository, "model_index.json")), repository)
    transformer, vae = (
        read_json(hub_file(repository, f"{part}/config.json")) for part in ("transformer", "vae")
    )
    return Backbone(
        name=repository,
        family=family,
        source=repository,
        licence="see the model's own card",
        parameters=0,
        transformer_parameters=0,
        memory_gib=0.0,
        defaults=family.defaults(transformer),
        size_multiple=family.size_multiple(vae),
    )


def _family(index: Config, where: str) -> Family:
    name = index.get("_class_name")
    for family in FAMILIES:
        if name == family.pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES)
    raise ModelNotFoundError(f"{where!r} holds a {name}, which `edit` cannot run; it knows {known}")


def _folder_parameters(folder: Path) -> dict[str, int]:
    """Parameters per component of a pipeline folder."""
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        if file.parent.name != ROUTERS_FOLDER:
            counts[file.parent.name] = counts.get(file.parent.name, 0) + sum(count_by_prefix(file).values())
    return counts
