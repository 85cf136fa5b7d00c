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

from backbones.hunyuan3d.folders import find_weights, folders_inside
from backbones.model_files import (
    DEFAULTS_FILE,
    ROUTERS_FOLDER,
    STATIC,
    ModelError,
    read_files,
    read_yaml,
)
from backbones.spec import DEFAULT_FIELDS, DIFFUSERS, HUNYUAN3D, Config, Configs, Defaults, Makes

Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of files: what was read from them holds while it stays the same."""

CONFIGURED = ("transformer", "vae")
"""Components whose configurations are read; the second may be missing."""

MESH_COMPONENTS = {"model": "transformer", "vae": "VAE", "conditioner": "conditioner"}
"""What the parts of a Hunyuan3D checkpoint are called in reports."""


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """layout: the file that says what the folder holds; index: what it says. configs: of its components.

    counts: parameters per component; a pickle's are not counted, since that would mean to load it.
    says: `edit.json`; checked: a `FolderDefaults` of it. bundle: what the folder brings along.
    """

    layout: str
    index: Config
    configs: Configs
    counts: dict[str, int]
    says: dict[str, Any]
    checked: Any
    bundle: Path | None

    def defaults(self, makes: Makes, base: Defaults) -> Defaults:
        """Defaults for requests: `base`, changed by `edit.json`. Raises ModelError."""
        given, allowed = self.says.keys() - {STATIC}, DEFAULT_FIELDS[makes]
        unknown = sorted(given - set(allowed))
        if unknown:
            raise ModelError(f"{DEFAULTS_FILE}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
        return replace(base, **{name: getattr(self.checked, name) for name in given})


def find_model_folder(folder: Path) -> ModelFolder | None:
    """A model folder, read anew only when its files change; None for another one. Raises ModelError."""
    return _read(folder, stamp(folder))


def read_model_folder(folder: Path) -> ModelFolder:
    """A model folder. Raises ModelError, also for another folder."""
    held = find_model_folder(folder)
    if held is None:
        raise ModelError(
            f"{str(folder)!r} is not a model folder: it has neither {DIFFUSERS} nor {HUNYUAN3D}; "
            + folders_inside(folder)
        )
    return held


def stamp(path: Path) -> Stamp:
    """The state of a file, or of the files in a folder and its subfolders, without reading them."""
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    states = ((str(file), file.stat()) for file in files if file.is_file())
    return tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in states))


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header alone. Raises ModelError."""
    return dict(_read_header(file, stamp(file)))


@functools.lru_cache(maxsize=64)
def _read_header(file: Path, _stamp: Stamp) -> dict[str, tuple[int, ...]]:
    import routers.schema as schema

    shapes: dict[str, tuple[int, ...]] = read_files({file: schema.shapes})[file]
    return shapes


@functools.lru_cache(maxsize=64)
def _read(folder: Path, _stamp: Stamp) -> ModelFolder | None:
    import routers.schema as schema

    layout = next((index for index in (DIFFUSERS, HUNYUAN3D) if (folder / index).is_file()), None)
    said = folder / DEFAULTS_FILE
    if layout is None:
        return None
    if layout == HUNYUAN3D:
        weights = [file for file in [find_weights(folder)] if file.suffix == ".safetensors"]
    else:
        files = sorted(folder.glob("*/*.safetensors"))
        weights = [file for file in files if file.parent.name != ROUTERS_FOLDER]
    readers: dict[Path, schema.Reader] = dict.fromkeys(weights, schema.shapes)
    if said.is_file():
        readers[said] = schema.folder_defaults
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
    says, checked = read.get(said, ({}, None))
    return ModelFolder(layout, index, parts, counts, says, checked, bundle if has_bundle else None)
