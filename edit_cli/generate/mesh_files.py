"""Meshes as files: glb, obj, ply, stl; and the record inside a GLB that replays it. Torch-free."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.errors import EditError

MESH_SUFFIXES = (".glb", ".obj", ".ply", ".stl")
GLB_MAGIC, JSON_CHUNK = b"glTF", b"JSON"


def encode_mesh(mesh: Any, suffix: str, record: Mapping[str, Any]) -> bytes:
    """A trimesh as a file's bytes. suffix: one of MESH_SUFFIXES; a GLB carries the record in its asset."""
    suffix = suffix.lower()
    if suffix == ".glb":
        from trimesh.exchange.gltf import export_glb

        def add_record(tree: dict[str, Any]) -> None:
            tree["asset"]["extras"] = {"edit": dict(record)}

        return bytes(export_glb(mesh.scene(), include_normals=True, tree_postprocessor=add_record))
    data = mesh.export(file_type=suffix[1:])
    return data.encode() if isinstance(data, str) else bytes(data)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a GLB made by `edit`, from its JSON chunk (glTF 2.0). Raises EditError."""
    try:
        with Path(path).expanduser().open("rb") as file:
            header = file.read(20)
            magic, _, _, length, kind = struct.unpack("<4sIII4s", header)
            tree = json.loads(file.read(length)) if (magic, kind) == (GLB_MAGIC, JSON_CHUNK) else None
    except FileNotFoundError:
        raise EditError(
            f"--from {str(path)!r} does not exist; give a .glb made by `edit generate-3d`"
        ) from None
    except (OSError, ValueError, struct.error, MemoryError):
        tree = None
    if not isinstance(tree, dict):
        raise EditError(f"--from {str(path)!r} is no readable GLB; give one made by `edit generate-3d`")
    extras = (tree.get("asset") or {}).get("extras")
    record = extras.get("edit") if isinstance(extras, dict) else None
    if not isinstance(record, dict) or "images" not in record:
        raise EditError(
            f"--from {str(path)!r} holds no `edit` metadata; it was not made by `edit generate-3d`"
        )
    return record
