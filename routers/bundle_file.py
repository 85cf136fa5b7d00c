"""How a bundle lies on disk: as a folder, or as one safetensors file for a hub or an attachment.

    folder     routers.safetensors with the tensors, bundle.json with the description
    one file   the same tensors; the text of the description is the entry `edit_bundle` of the file's header

What a description and the tensors mean is bundle.py's matter, so that a change of what a bundle holds changes
nothing here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from .files import write_whole

DESCRIPTION, WEIGHTS = "bundle.json", "routers.safetensors"
ENTRY = "edit_bundle"
"""Metadata entry with the description."""


@dataclass(frozen=True)
class Stored:
    """description: text of the JSON. digest: sha256 over the folder's two files, the same for one file."""

    description: str
    tensors: dict[str, Tensor]
    digest: str


def read(path: str | Path) -> Stored:
    """Read either layout. Raises ValueError, one line, where it is damaged or something else."""
    file = find(path)
    try:
        return _read_folder(Path(path)) if file is None else _read_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable bundle: {type(error).__name__}: {error}") from error


def _read_folder(folder: Path) -> Stored:
    for file in (folder / DESCRIPTION, folder / WEIGHTS):
        if not file.is_file():
            raise ValueError(f"{folder} is not a bundle folder: {file.name} is missing")
    description, weights = (folder / DESCRIPTION).read_bytes(), (folder / WEIGHTS).read_bytes()
    return Stored(description.decode(), load(weights), hashlib.sha256(description + weights).hexdigest())


def _read_file(file: Path) -> Stored:
    with safe_open(file, framework="pt") as stored:
        description = (stored.metadata() or {}).get(ENTRY)
        if description is None:
            raise ValueError(
                f"{file} is not a bundle file: its header has no {ENTRY!r}; "
                "make one with: edit export BUNDLE --format bundle"
            )
        # cloned: the file may go away before the tensors do
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - no mapping
    digest = hashlib.sha256(description.encode() + save(tensors)).hexdigest()
    return Stored(description, tensors, digest)


def find(path: str | Path) -> Path | None:
    """The bundle file that a path means: itself, or the only safetensors file of an exported folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir() or (path / DESCRIPTION).exists():
        return None
    inside = [file for file in path.glob("*.safetensors") if file.name != WEIGHTS]
    return inside[0] if len(inside) == 1 else None


def write_folder(
    folder: Path,
    description: str,
    tensors: dict[str, Tensor],
    beside: Mapping[Path, Callable[[str], object]],
) -> None:
    """Write a folder's files and what lies beside them; all appear together, the description last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        {
            **beside,
            folder / WEIGHTS: partial(save_file, tensors),
            folder / DESCRIPTION: lambda path: Path(path).write_text(description, encoding="utf-8"),
        }
    )


def pack(folder: str | Path, target: str | Path) -> None:
    """Write a bundle folder as one file, which appears whole or not at all. Raises ValueError, OSError."""
    folder = Path(folder)
    if (folder / "backbone.safetensors").exists():
        raise ValueError(
            f"{folder} holds trained weights of the backbone, which do not go into one file; "
            "pass the folder on as it is"
        )
    stored = read(folder)
    # one entry: with more, their order varies
    metadata = {ENTRY: stored.description}
    write_whole({Path(target): lambda path: save_file(stored.tensors, path, metadata=metadata)})
