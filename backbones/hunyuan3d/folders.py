"""Where checkpoints lie: local folders, the cache of the published tools, the hub. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from backbones.model_files import ModelError, cached_file, hub_file
from backbones.spec import HUNYUAN3D

WEIGHTS = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")
"""Names of the weight file, the first one that exists is read."""


def resolve_folder(model: str | Path) -> Path:
    """The local folder with `config.yaml`: a path, the cache of the published tools, or a hub id's download.

    A hub id may carry a subfolder: "tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0". Raises ModelError.
    """
    local = Path(model).expanduser()
    if (local / HUNYUAN3D).is_file():
        return local
    if local.exists():
        raise ModelError(f"{HUNYUAN3D} is missing in {str(local)!r}; {folders_inside(local)}")
    if str(model).count("/") not in (1, 2):
        raise ModelError(f"{model} is neither a folder nor a hub id (owner/name or owner/name/subfolder)")
    folder = cached_folder(str(model))
    has_weights = folder is not None and any((folder / name).is_file() for name in WEIGHTS)
    return folder if folder is not None and has_weights else _download(str(model))


def folders_inside(folder: Path) -> str:
    """A hint for a folder that is not a checkpoint itself."""
    inside = sorted(file.parent.name for file in folder.glob(f"*/{HUNYUAN3D}"))
    return f"subfolders that have one: {', '.join(inside)}" if inside else "see `edit models`"


def cached_folder(model: str) -> Path | None:
    """The folder of a hub id if its config is on this machine: in the published tools' cache or the hub's."""
    published = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser() / model
    if (published / HUNYUAN3D).is_file():
        return published
    repository, prefix = _split(model)
    config = cached_file(repository, prefix + HUNYUAN3D)
    return None if config is None else config.parent


def _split(model: str) -> tuple[str, str]:
    """Repository, and what stands before file names there: "owner/name", "subfolder/"."""
    owner, name, *subfolder = model.split("/")
    return f"{owner}/{name}", "".join(f"{part}/" for part in subfolder)


def _download(model: str) -> Path:
    """Fetch `config.yaml` and the first weight file there is."""
    repository, prefix = _split(model)
    config = hub_file(repository, prefix + HUNYUAN3D)
    if config is None:
        raise ModelError(
            f"{repository!r} does not have {prefix}{HUNYUAN3D}; "
            "name the subfolder too, like tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0"
        )
    if not any(hub_file(repository, prefix + name) for name in WEIGHTS):
        raise ModelError(f"{repository!r} has none of {', '.join(prefix + name for name in WEIGHTS)}")
    return config.parent


def find_weights(folder: Path) -> Path:
    """The weight file of a folder. Raises ModelError."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"weights are missing in {folder}: expected one of {', '.join(WEIGHTS)}")
