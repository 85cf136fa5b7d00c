"""What of the hub's models is on this machine, read from the cache's folders alone. No torch, no hub client.

The cache: `models--OWNER--NAME/snapshots/REVISION/` holds links to `blobs/`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backbones.hunyuan3d.folders import WEIGHTS
from backbones.spec import DIFFUSERS, HUNYUAN3D, Backbone

State = Literal["packaged", "here", "partly", "hub"]


@dataclass(frozen=True)
class Local:
    """Where a model is. folder: its snapshot, None where there is none. size: bytes of it on this machine."""

    state: State
    folder: Path | None = None
    size: int = 0


def hub_cache() -> Path:
    """The folder that huggingface_hub keeps its downloads in."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def repository_of(source: str) -> tuple[str, str]:
    """Repository and folder inside it: "owner/name", "" or "subfolder"."""
    owner, _, rest = source.partition("/")
    name, _, folder = rest.partition("/")
    return f"{owner}/{name}", folder


def local(backbone: Backbone) -> Local:
    """What of a model is here."""
    if backbone.folder is not None:
        files = [file for file in backbone.folder.rglob("*") if file.is_file()]
        state: State = "packaged" if backbone.packaged else "here"
        return Local(state, backbone.folder, sum(file.stat().st_size for file in files))
    repository, inside = repository_of(backbone.source)
    published = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser() / backbone.source
    if backbone.family.layout == HUNYUAN3D and (published / HUNYUAN3D).is_file():
        return _state(published, backbone.family.layout)
    snapshot = _snapshot(hub_cache() / f"models--{repository.replace('/', '--')}")
    return Local("hub") if snapshot is None else _state(snapshot / inside, backbone.family.layout)


def _snapshot(repository: Path) -> Path | None:
    """The revision that `main` names, else the newest."""
    main, snapshots = repository / "refs" / "main", repository / "snapshots"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = [path for path in snapshots.glob("*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _state(folder: Path, layout: str) -> Local:
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if layout == HUNYUAN3D:
        whole = (folder / HUNYUAN3D).is_file() and any((folder / name).is_file() for name in WEIGHTS)
    else:
        index = _json(folder / DIFFUSERS)
        whole = index is not None and all(map(_whole, _components(folder, index)))
    if whole:
        return Local("here", folder, size)
    # a few configurations, read for a dry run, are no download that was stopped
    return Local("partly", folder, size) if size > 2**24 else Local("hub", folder, size)


def _components(folder: Path, index: dict[str, Any]) -> list[Path]:
    """Folders of the components that a pipeline has."""
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return [folder / name for name, (library, _) in named.items() if library]


def _whole(component: Path) -> bool:
    """Whether a component's configuration is here, with every weight file that it needs."""
    names = {file.name for file in component.glob("*") if file.is_file()}
    for index in component.glob("*.index.json"):
        weights = (_json(index) or {}).get("weight_map")
        return isinstance(weights, dict) and set(weights.values()) <= names
    if "config.json" not in names:  # schedulers, tokenizers and processors have no weights
        return bool(names)
    return any(name.endswith((".safetensors", ".bin")) for name in names)


def _json(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
