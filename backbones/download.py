"""Fetch models from the hub, and take them out of its cache again. No torch."""

from __future__ import annotations

from pathlib import Path

from backbones.hunyuan3d.folders import WEIGHTS
from backbones.local import hub_cache, repository_of
from backbones.model_files import ModelError, hub_file, hub_message, read_json, require_hub
from backbones.spec import DIFFUSERS, HUNYUAN3D, Backbone

UNUSED = ("*.msgpack", "*.onnx", "*.onnx_data", "*.pb", "*.h5", "*.ot", "*.fp16.*", "*.bf16.*", "*non_ema*")
"""Weights in forms that are not loaded."""


def download(backbone: Backbone, progress: bool) -> Path:
    """Fetch the files that are loaded, as far as they are missing.

    progress: whether the hub client shows its bars on stderr. Returns the model's folder. Raises ModelError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    repository, inside = repository_of(backbone.source)
    logging.set_verbosity_error()  # its retries are warnings, of a dozen lines
    (enable_progress_bars if progress else disable_progress_bars)()
    try:
        require_hub()
        files = HfApi().list_repo_files(repository)
        patterns = wanted(backbone, files)
        snapshot = snapshot_download(repository, allow_patterns=patterns, ignore_patterns=list(UNUSED))
    except ModelError:
        raise
    except Exception as error:  # the hub client has a dozen error types; the user needs one line
        again = "run it again when it can be: finished files are kept"
        raise ModelError(hub_message(repository, error, again)) from error
    return Path(snapshot) / inside


def wanted(backbone: Backbone, files: list[str]) -> list[str]:
    """Patterns of the files that a pipeline loads, among those that its repository has. Raises ModelError."""
    repository, inside = repository_of(backbone.source)
    if backbone.family.layout == HUNYUAN3D:
        prefix = f"{inside}/" if inside else ""
        weights = next((name for name in WEIGHTS if prefix + name in files), None)
        if weights is None:
            raise ModelError(f"{repository!r} has none of {', '.join(prefix + name for name in WEIGHTS)}")
        return [prefix + HUNYUAN3D, prefix + weights]
    index = hub_file(repository, DIFFUSERS)
    if index is None:
        raise ModelError(f"{repository!r} has no {DIFFUSERS}: it is not a diffusers pipeline")
    parts = [name for name, entry in read_json(index).items() if isinstance(entry, list) and entry[0]]
    patterns = [DIFFUSERS]
    for part in parts:
        safe = any(file.startswith(f"{part}/") and file.endswith(".safetensors") for file in files)
        patterns += [file for file in files if file.startswith(f"{part}/") and not (safe and _pickle(file))]
    return patterns


def _pickle(file: str) -> bool:
    """Weights that a safetensors file of the same component holds too, or their index."""
    return file.endswith((".bin", ".bin.index.json", ".pt", ".ckpt"))


def cached_revisions(backbone: Backbone) -> list[str]:
    """Other models of the registry may share a repository: this is what would go with it."""
    repository, _ = repository_of(backbone.source)
    folder = hub_cache() / f"models--{repository.replace('/', '--')}" / "snapshots"
    return [path.name for path in folder.glob("*") if path.is_dir()]


def remove(backbone: Backbone) -> int:
    """Delete a repository's revisions from the hub's cache. Returns the bytes that are free again."""
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir(hub_cache()).delete_revisions(*cached_revisions(backbone))
    strategy.execute()
    return int(strategy.expected_freed_size)
