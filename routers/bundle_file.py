"""A bundle as one safetensors file: for the hub, for an attachment, for `--routers FILE`.

The tensors are those of the folder's `routers.safetensors`; the text of `bundle.json` is the metadata
entry `edit_bundle` of the file's header. Nothing else is known of the bundle here, so that a change of
what a bundle holds changes nothing in this file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from .bundle import Bundle

DESCRIPTION, WEIGHTS = "bundle.json", "routers.safetensors"
ENTRY = "edit_bundle"
"""Metadata entry with the description."""


def find(path: str | Path) -> Path | None:
    """The bundle file that a path means: itself, or the only safetensors file of an exported folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir() or (path / DESCRIPTION).exists():
        return None
    inside = [file for file in path.glob("*.safetensors") if file.name != WEIGHTS]
    return inside[0] if len(inside) == 1 else None


def pack(folder: str | Path, target: str | Path) -> None:
    """Write a bundle folder as one file, which appears whole or not at all. Raises ValueError, OSError."""
    folder, target = Path(folder), Path(target)
    if (folder / "backbone.safetensors").exists():
        raise ValueError(
            f"{folder} holds trained weights of the backbone, which do not go into one file; "
            "pass the folder on as it is"
        )
    description = (folder / DESCRIPTION).read_text(encoding="utf-8")
    tensors, _ = _read(folder / WEIGHTS)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(
            tensors, temporary, metadata={ENTRY: description}
        )  # one entry: with more, their order varies
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def unpack(file: str | Path, folder: str | Path) -> None:
    """The inverse of `pack`, byte for byte. Raises ValueError, one line, if the file is no bundle."""
    file, folder = Path(file), Path(folder)
    tensors, metadata = _read(file)
    if ENTRY not in metadata:
        raise ValueError(
            f"{file} is no bundle file: its header has no {ENTRY!r}; "
            "make one with: edit export BUNDLE --format bundle"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(metadata[ENTRY], encoding="utf-8")


def load(file: str | Path) -> Bundle:
    """The bundle in a file. Raises ValueError, one line, if it is none or is damaged."""
    from .bundle import load_bundle

    with tempfile.TemporaryDirectory(prefix="edit-bundle-") as folder:
        unpack(file, folder)
        try:
            bundle = load_bundle(folder)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(file))) from error
    bundle.path = str(file)
    return bundle


def _read(file: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Tensors, in memory, and header metadata."""
    try:
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            # cloned: the file may go away before the tensors do
            return {name: stored.get_tensor(name).clone() for name in names}, stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no readable bundle: {type(error).__name__}: {error}") from error
