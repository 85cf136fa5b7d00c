"""An export's folder: built beside its target, with a manifest of hashes, and renamed once it is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edit_cli.errors import EditError, RunError
from edit_cli.files import reason
from routers.files import ordinary_mode

MANIFEST = "edit-export.json"


@contextmanager
def new_folder(output: str, force: bool) -> Iterator[Path]:
    """A folder to fill; it becomes `output` when the context ends well, and is removed otherwise.

    force: replace an earlier export, and nothing else. Raises EditError for a target that is in the way,
    RunError if it cannot be written.
    """
    target = check_target(output, force)
    try:
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise EditError(
            f"--output {output!r} cannot be written: {reason(error)}; choose another place"
        ) from error
    try:
        yield building
        building.chmod(ordinary_mode(0o777))
        _swap(building, target)
    except OSError as error:
        raise RunError(f"{output!r} cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_target(output: str, force: bool) -> Path:
    """The target's path. Raises EditError unless it is free, or an earlier export that may be replaced."""
    target = Path(os.path.abspath(os.path.expanduser(output)))
    if not target.parent.is_dir():
        raise EditError(
            f"--output folder {str(target.parent)!r} does not exist; create it with: mkdir -p {target.parent}"
        )
    if os.path.lexists(target) and not (target / MANIFEST).is_file():
        raise EditError(f"--output {output!r} exists and is not an export of edit; choose another name")
    if os.path.lexists(target) and not force:
        raise EditError(f"--output {output!r} exists; choose another name, or replace it with --force")
    return target


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write what was exported, with the size and sha256 of every file; returns those by name."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({**facts, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return files


def sha256(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _swap(building: Path, target: Path) -> None:
    """Put a finished folder in place; an old one is moved aside first and comes back if that fails."""
    if not target.exists():
        building.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    target.rename(aside / "old")
    try:
        building.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
