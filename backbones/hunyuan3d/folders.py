"""Where checkpoints lie: local folders, the cache of the published tools, the hub. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from backbones.model_files import ModelError, cached_file, hub_file
from backbones.spec import HUNYUAN3D


def resolve_folder(model: str | Path, subfolder: str | None = None, variant: str | None = "fp16") -> Path:
    """The local folder with `config.yaml`: a path, the cache of the published tools, or a hub id's download.

    A hub id may carry the subfolder: "tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0".
    """
    local = Path(model).expanduser() / (subfolder or "")
    if (local / HUNYUAN3D).is_file():
        return local
    if Path(model).expanduser().exists():
        inside = sorted(p.parent.name for p in Path(model).expanduser().glob(f"*/{HUNYUAN3D}"))
        hint = f"subfolders that have one: {', '.join(inside)}" if inside else "expected a Hunyuan3D folder"
        raise ModelError(f"no config.yaml in {local}; {hint}")
    parts = str(model).split("/")
    if len(parts) not in (2, 3):
        raise ModelError(f"{model} is neither a folder nor a hub id (owner/name or owner/name/subfolder)")
    repo, subfolder = "/".join(parts[:2]), subfolder or (parts[2] if len(parts) == 3 else None)
    cache = _published_cache(repo) / (subfolder or "")
    return cache if (cache / HUNYUAN3D).is_file() else _download(repo, subfolder, variant)


def cached_folder(model: str) -> Path | None:
    """The folder of a hub id `owner/name/subfolder` if its config is on this machine; never downloads."""
    owner, name, *rest = model.split("/")
    cache = _published_cache(model)
    if (cache / HUNYUAN3D).is_file():
        return cache
    config = cached_file(f"{owner}/{name}", "/".join([*rest, HUNYUAN3D]))
    return None if config is None else config.parent


def _published_cache(model: str) -> Path:
    """Where the published tools keep a model."""
    return Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser() / model


def _download(repo: str, subfolder: str | None, variant: str | None) -> Path:
    """Fetch `config.yaml` and the first weight file there is; offline, what the hub's cache holds."""
    prefix = f"{subfolder}/" if subfolder else ""
    config = hub_file(repo, prefix + HUNYUAN3D)
    if config is None:
        raise ModelError(
            f"{repo!r} has no {prefix}{HUNYUAN3D}; "
            "name the subfolder too, like tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0"
        )
    names = [prefix + name for name in _weight_names(variant)]
    if not any(cached_file(repo, name) for name in names) and not any(hub_file(repo, name) for name in names):
        raise ModelError(f"{repo!r} has none of {', '.join(names)}")
    return config.parent


def _weight_names(variant: str | None) -> list[str]:
    stems = [f"model.{variant}", "model"] if variant else ["model"]
    return [f"{stem}{suffix}" for suffix in (".safetensors", ".ckpt") for stem in stems]


def find_weights(folder: Path, variant: str | None = "fp16") -> Path:
    """The weight file of a folder: safetensors before ckpt, the variant before the plain name."""
    for name in _weight_names(variant):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"no weights in {folder}: expected one of {', '.join(_weight_names(variant))}")
