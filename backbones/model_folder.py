"""A model folder as files tell of it, read once and whole: layout, configurations, sizes, defaults. No torch.

A folder may hold `edit.json` ({"steps": 20, ...}: defaults for requests) and `routers/` (a bundle used by
default).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbones.hunyuan3d.folders import find_weights
from backbones.model_files import (
    DEFAULTS_FILE,
    ROUTERS_FOLDER,
    STATIC,
    ModelError,
    Stamp,
    read_files,
    read_yaml,
    stamp,
)
from backbones.spec import DEFAULT_FIELDS, DIFFUSERS, HUNYUAN3D, Config, Configs, Defaults, Makes

CONFIGURED = ("transformer", "vae")
"""Components whose configurations are read; the second may be missing."""

MESH_COMPONENTS = {"model": "transformer", "vae": "VAE", "conditioner": "conditioner"}
"""What the parts of a Hunyuan3D checkpoint are called in reports."""


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """layout: the file that says what the folder holds; index: what it says. configs: of its components.

    counts: parameters per component; a pickle's are not counted, since that would mean to load it.
    says: `edit.json`. bundle: what the folder brings along.
    """

    layout: str
    index: Config
    configs: Configs
    counts: dict[str, int]
    says: dict[str, Any]
    bundle: Path | None

    def defaults(self, makes: Makes, base: Defaults) -> Defaults:
        """Defaults for requests: `base`, changed by `edit.json`. Raises ModelError."""
        import routers.schema as schema

        given, allowed = {**self.says}, DEFAULT_FIELDS[makes]
        given.pop(STATIC, None)
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise ModelError(f"{DEFAULTS_FILE}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
        try:
            checked = schema.convert(given, schema.FolderDefaults, DEFAULTS_FILE)
        except ValueError as error:
            raise ModelError(str(error)) from None
        return replace(base, **{name: getattr(checked, name) for name in given})


def layout_of(folder: Path) -> str | None:
    """The file that says what a folder holds; None where it is not a model folder."""
    return next((index for index in (DIFFUSERS, HUNYUAN3D) if (folder / index).is_file()), None)


def read_model_folder(folder: Path) -> ModelFolder:
    """A model folder, read anew only when its files change. Raises ModelError."""
    return _read(folder, stamp(folder))


@functools.lru_cache(maxsize=64)
def _read(folder: Path, _stamp: Stamp) -> ModelFolder:
    import routers.schema as schema

    layout, said = layout_of(folder) or DIFFUSERS, folder / DEFAULTS_FILE
    if layout == HUNYUAN3D:
        weights = [file for file in [find_weights(folder)] if file.suffix == ".safetensors"]
    else:
        files = sorted(folder.glob("*/*.safetensors"))
        weights = [file for file in files if file.parent.name != ROUTERS_FOLDER]
    readers: dict[Path, schema.Reader] = dict.fromkeys(weights, schema.shapes)
    if said.is_file():
        readers[said] = schema.mapping
    configs = {part: folder / part / "config.json" for part in CONFIGURED}
    if layout == DIFFUSERS:
        readers[folder / layout] = schema.components
        readers |= dict.fromkeys(filter(Path.is_file, configs.values()), schema.mapping)
    read = read_files(readers)
    counts: dict[str, int] = {}
    for file in weights:
        for name, shape in read[file].items():
            part = file.parent.name if layout == DIFFUSERS else MESH_COMPONENTS.get(name.split(".", 1)[0], "")
            counts[part] = counts.get(part, 0) + math.prod(shape)
    counts.pop("", None)
    if layout == HUNYUAN3D:
        index = parts = read_yaml(folder / layout)
    else:
        index, parts = read[folder / layout], {}
        for part, file in configs.items():
            if index.get(part, [None])[0]:
                parts[part] = read[file] if file in read else read_files({file: schema.mapping})[file]
    bundle = folder / ROUTERS_FOLDER
    has_bundle = (bundle / "bundle.json").is_file()
    return ModelFolder(layout, index, parts, counts, read.get(said, {}), bundle if has_bundle else None)
