"""The table of models, and `resolve`: registry name, folder, file or hub id -> Backbone. No torch here.

Rows are data: `models.json`, and for some models of the hub `configs/<name>.json`, so that dry runs need no
download; a row that names a pipeline's class needs no code. Packaged models are folders like any other
(`model_folder.py`).
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones import flux, qwen_image
from backbones.hunyuan3d import family as hunyuan3d
from backbones.hunyuan3d.folders import cached_folder, resolve_folder
from backbones.model_files import (
    STATIC,
    ModelError,
    hub_file,
    near_names,
    read_files,
    read_json,
)
from backbones.model_folder import CONFIGURED, ModelFolder, find_model_folder, read_model_folder
from backbones.pipelines import generic_family, pipeline_family, sibling
from backbones.single_file import check_fits, denoiser_shapes, read_single_file, stored_shapes
from backbones.spec import (
    COMMANDS,
    DIFFUSERS,
    PACKAGE_FOLDER,
    SMALL_MODEL,
    Backbone,
    Config,
    Configs,
    Defaults,
    Family,
    Makes,
)

FAMILIES: tuple[Family, ...] = (qwen_image.FAMILY, flux.FAMILY, hunyuan3d.FAMILY_2, hunyuan3d.FAMILY_21)
DEFAULT_MODELS: dict[Makes, str] = {"picture": "qwen-image-tiny", "mesh": "hunyuan3d-tiny"}

USUAL = (None, "diffusers", "transformers")
"""Libraries that the components of a described pipeline are of."""

TRANSFORMERS = ("transformer", "transformer_2")
"""What pipelines call the transformer, and where another makes the second half of the steps, that one."""


def rows(makes: Makes | None = None) -> dict[str, Backbone]:
    """The registry, by name, in the order `edit models` shows it. makes: only models of this kind."""
    named = ((row["name"], _row(row["name"])) for row in _table())
    return {name: row for name, row in named if row is not None and makes in (None, row.makes)}


def names() -> list[str]:
    """The names of `rows`, without reading what the packaged ones hold."""
    return [row["name"] for row in _table() if (PACKAGE_FOLDER / row.get("folder", "")).is_dir()]


def resolve(model: str | None, base: str | None = None, makes: Makes | None = None) -> Backbone:
    """A registry name, a model folder, a single-file checkpoint or a hub id -> its Backbone.

    model None: the default one. base: for a single file, what its text encoders and VAE come from; default:
    the published model. makes: what the model must make. A folder is read anew only when its files change.
    Only a hub id outside the registry may touch the network. Raises ModelError.
    """
    model = model or DEFAULT_MODELS[makes or "picture"]
    is_file = os.path.isfile(os.path.expanduser(model))
    if base is not None and not is_file:
        raise ModelError(
            f"--base {base!r} is for a single-file --model and {model!r} is not one; leave it out"
        )
    backbone = _from_file(Path(model).expanduser().resolve(), base) if is_file else _find(model, makes)
    things, command = COMMANDS[backbone.makes]
    if makes is not None and command != COMMANDS[makes][1]:
        raise ModelError(f"{model!r} makes {things}: use `{command} -m {model}`")
    return backbone


def component_configs(backbone: Backbone) -> Configs:
    """Configurations by component, without loading weights. Raises ModelError.

    Those of a registry row are shipped; Hunyuan3D's are extracts that suffice to count FLOPs.
    """
    if backbone.folder is not None:
        configs = read_model_folder(backbone.folder).configs
    else:
        row = next((row for row in rows().values() if row.source == backbone.source), None)
        shipped = None if row is None else _shipped_configs(row.name)
        configs = _hub_configs(backbone.source) if shipped is None else shipped
    return configs if backbone.file is None else {**configs, "transformer": backbone.file.config}


def component_parameters(backbone: Backbone) -> dict[str, int]:
    """Parameters per component: from the weight files of a folder, else the registry's totals."""
    if backbone.folder is None:
        rest = "conditioner and VAE" if backbone.makes == "mesh" else "text encoder and VAE"
        counts = dict.fromkeys(TRANSFORMERS[: backbone.transformers], backbone.transformer_parameters)
        return {**counts, rest: max(backbone.parameters - sum(counts.values()), 0)}
    counts = read_model_folder(backbone.folder).counts
    return counts if backbone.file is None else {**counts, "transformer": backbone.transformer_parameters}


@functools.cache
def _table() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((PACKAGE_FOLDER / "models.json").read_text()))


def _row(name: str) -> Backbone | None:
    """A row of the table; None for a packaged model in a source checkout before its weights were trained."""
    data = next((dict(row) for row in _table() if row["name"] == name), None)
    if data is None:
        return None
    if "folder" in data:
        folder = PACKAGE_FOLDER / data.pop("folder")
        held = find_model_folder(folder)
        return None if held is None else replace(_of_folder(folder, held), packaged=True, **data)
    data.pop("configs", None)
    defaults, family = Defaults(**data.pop("defaults")), data.pop("family")
    of_row = {key: data.pop(key, None) for key in ("pipeline", "transformer", "makes")}
    return Backbone(family=_row_family(family, **of_row), defaults=defaults, **data)


def _row_family(name: str, pipeline: str | None, transformer: str | None, makes: Makes | None) -> Family:
    """By name; with a pipeline class another of that family, with a transformer's too one of its own."""
    if pipeline is not None and transformer is not None:
        return generic_family(pipeline, transformer, name, makes or "picture")
    family = next(family for family in FAMILIES if family.name == name)
    return family if pipeline is None else sibling(family, pipeline)


def _shipped_configs(name: str) -> Configs | None:
    data = next(row for row in _table() if row["name"] == name)
    file = PACKAGE_FOLDER / "configs" / f"{data.get('configs', name)}.json"
    return read_json(file) if file.is_file() else None


def _find(model: str, makes: Makes | None) -> Backbone:
    """By name, folder or hub id."""
    row = _row(model)
    if row is not None:
        return row
    path = Path(model).expanduser()
    if path.exists():
        folder = path.resolve()
        return next((row for row in rows().values() if row.folder == folder), None) or _from_folder(folder)
    # a published repository without its subfolder means its first model
    published = (row for row in rows().values() if f"{row.source}/".startswith(f"{model}/"))
    row = next(published, None)
    if row is not None:
        return row
    if model.startswith((".", "/", "~")) or model.count("/") > 2:
        raise ModelError(f"model folder {model!r} does not exist; give one, or see `edit models`")
    if "/" in model:
        return _from_hub(model)
    raise ModelError(
        f"unknown model {model!r}; {near_names(model, rows(makes))} A model folder or a hub id works too"
    )


def _from_folder(folder: Path) -> Backbone:
    return _of_folder(folder, read_model_folder(folder))


@functools.lru_cache(maxsize=64)
def _of_folder(folder: Path, held: ModelFolder) -> Backbone:
    family = _family(held.layout, held.index, str(folder))
    try:
        traits = family.traits(held.configs)
    except Exception as error:  # configurations of others hold anything
        raise ModelError(
            f"{str(folder)!r}: its components' config.json are not those of a {family.name}: {error!r:.200}"
        ) from error
    parameters = sum(held.counts.values())
    return Backbone(
        name=folder.name,
        family=family,
        source=str(folder),
        parameters=parameters,
        transformer_parameters=held.counts.get(TRANSFORMERS[0], 0),
        transformers=2 if TRANSFORMERS[1] in held.counts else 1,
        bundle=held.bundle,
        static=held.says.get(STATIC),
        batch_size=8 if 0 < parameters < SMALL_MODEL and family in FAMILIES else 1,
        **{**vars(traits), "defaults": held.defaults(family.makes, traits.defaults)},
    )


def _family(layout: str, index: Config, where: str) -> Family:
    """By the pipeline's class, or by the transformer's in Hunyuan3D's layout. Raises ModelError."""
    families = {
        family.transformer.transformer_class: family for family in FAMILIES if family.layout == layout
    }
    if layout == DIFFUSERS:
        family = families.get(index.get("transformer", [""])[-1] or "")
        usual = all(entry[0] in USUAL for entry in index.values() if isinstance(entry, list))
        if family is not None and usual and family.pipeline_class == index.get("_class_name"):
            return family  # no source need be read
        return pipeline_family(index, families.values(), where)
    name = hunyuan3d.transformer_class(index)
    if name not in families:
        what = f"holds {name}" if name else "does not say what it holds"
        raise ModelError(f"{where!r} {what}, which `edit` cannot run; it knows {', '.join(families)}")
    return families[name]


def _from_hub(model: str) -> Backbone:
    """A hub id outside the registry. Hunyuan3D's are fetched whole and then read like any other folder."""
    index = hub_file(model, DIFFUSERS) if model.count("/") == 1 and cached_folder(model) is None else None
    if index is None:
        return replace(_from_folder(resolve_folder(model).resolve()), name=model)
    import routers.schema as schema

    named = read_files({index: schema.components})[index]
    family = _family(DIFFUSERS, named, model)
    return Backbone(name=model, family=family, source=model, **vars(family.traits(_hub_configs(model))))


def _hub_configs(repository: str) -> Configs:
    """Of a diffusers repository."""
    configs = {}
    for part in CONFIGURED:
        file = hub_file(repository, f"{part}/config.json")
        if file is None and part != CONFIGURED[0]:
            continue
        if file is None:
            raise ModelError(f"{repository!r} is incomplete: {part}/config.json is missing")
        configs[part] = read_json(file)
    return configs


def _from_file(path: Path, base: str | None) -> Backbone:
    """A denoiser from a single file, everything else from `base`."""
    file = read_single_file(path, FAMILIES, base)
    source = resolve(file.base)
    configs = component_configs(source)
    config = {**configs["transformer"], **file.config}
    check_fits(file, config, configs["transformer"], source.family)
    count = sum(math.prod(shape) for shape in denoiser_shapes(stored_shapes(path), file.prefix).values())
    traits, defaults = source.family.traits({**configs, "transformer": config}), source.defaults
    if traits.takes_guidance != source.takes_guidance:  # a dev file on schnell's folder
        defaults = replace(traits.defaults, width=defaults.width, height=defaults.height)
    return Backbone(
        name=path.stem,
        family=source.family,
        source=source.source,
        parameters=source.parameters - source.transformer_parameters + count,
        transformer_parameters=count,
        batch_size=source.batch_size,
        file=replace(file, config=config, base=source.address),
        **{**vars(traits), "defaults": defaults},
    )  # no bundle: the base's was fitted on other weights
