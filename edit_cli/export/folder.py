"""What an export's folder says of itself: a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "edit-export.json"


def written(folder: Path) -> set[str]:
    """First parts of the paths that an earlier export in this folder wrote."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {MANIFEST, *(Path(name).parts[0] for name in files)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {MANIFEST}


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
