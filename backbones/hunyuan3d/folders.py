"""Where checkpoints lie: local folders, the cache of the published tools, the hub. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CheckpointError


def resolve_folder(model: str | Path, subfolder: str | None = None, variant: str | None = "fp16") -> Path:
    """The local folder with `config.yaml`: a path, the cache of the published tools, or a hub id's download.

    A hub id may carry the subfolder: "tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0".
    """
    local = Path(model).expanduser() / (subfolder or "")
    if (local / "config.yaml").is_file():
        return local
    if Path(model).expanduser().exists():
        inside = sorted(p.parent.name for p in Path(model).expanduser().glob("*/config.yaml"))
        hint = f"subfolders that have one: {', '.join(inside)}" if inside else "expected a Hunyuan3D folder"
        raise CheckpointError(f"no config.yaml in {local}; {hint}")
    parts = str(model).split("/")
    if len(parts) not in (2, 3):
        raise CheckpointError(
            f"{model} is neither a folder nor a hub id (owner/name or owner/name/subfolder)"
        )
    repo, subfolder = "/".join(parts[:2]), subfolder or (parts[2] if len(parts) == 3 else None)
    cache = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser() / repo / (subfolder or "")
    return cache if (cache / "config.yaml").is_file() else _download(repo, subfolder, variant)


def cached_folder(model: str) -> Path | None:
    """The folder of a hub id `owner/name/subfolder` if its config is on this machine; never downloads."""
    from huggingface_hub import try_to_load_from_cache

    owner, name, *rest = model.split("/")
    cache = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser() / model
    if (cache / "config.yaml").is_file():
        return cache
    found = try_to_load_from_cache(f"{owner}/{name}", "/".join([*rest, "config.yaml"]))
    return Path(found).parent if isinstance(found, str) else None


def _download(repo: str, subfolder: str | None, variant: str | None) -> Path:
    """Fetch `config.yaml` and the first weight file there is; offline, what the hub's cache holds."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    prefix = f"{subfolder}/" if subfolder else ""

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, prefix + name))
        except EntryNotFoundError:
            return None

    try:
        config = fetch("config.yaml")
        if config is None:
            raise CheckpointError(
                f"{repo} has no {prefix}config.yaml, or the hub cannot be reached; "
                "name the subfolder too, like tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0"
            )
        names = _weight_names(variant)
        if all(fetch(name) is None for name in names):
            raise CheckpointError(f"{repo} has none of {', '.join(prefix + name for name in names)}")
        return config.parent
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"cannot fetch {repo} from the hub: {str(error).splitlines()[0]}") from error


def _weight_names(variant: str | None) -> list[str]:
    stems = [f"model.{variant}", "model"] if variant else ["model"]
    return [f"{stem}{suffix}" for suffix in (".safetensors", ".ckpt") for stem in stems]


def find_weights(folder: Path, variant: str | None = "fp16") -> Path:
    """The weight file of a folder: safetensors before ckpt, the variant before the plain name."""
    for name in _weight_names(variant):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"no weights in {folder}: expected one of {', '.join(_weight_names(variant))}")
