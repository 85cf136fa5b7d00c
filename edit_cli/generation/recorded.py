"""What a record may hold. It is somebody else's file: everything in it has limits. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edit_cli import checks
from edit_cli.errors import EditError
from routers import schema
from routers.schema import Name, Text

Seed = Annotated[int, Meta(ge=0, le=checks.MAX_SEED)]
Side = Annotated[int, Meta(ge=1, le=checks.MAX_SIDE)]
Files = Annotated[list[Name], Meta(max_length=64)]
ENLARGED = 4
"""A picture may have been made smaller since, but not to less than this part of the recorded area."""


class PictureRow(msgspec.Struct):
    """Another picture of the same batch."""

    prompt: Text
    seed: Seed
    negative_prompt: Text | None = None
    budget: schema.Budget | None = None


class MeshRow(msgspec.Struct):
    """Another mesh of the same batch."""

    images: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    seed: Seed
    remove_background: Literal["auto", "yes", "no"]
    budget: schema.Budget | None = None


class Record(msgspec.Struct, kw_only=True):
    """What all results remember, as far as it is read."""

    seed: Seed = 0
    steps: schema.Steps | None = None
    guidance: Annotated[float, Meta(ge=0, le=100)] | None = None
    budget: schema.Budget | None = None
    target: Name | None = None
    solver: Name | None = None
    model: Name | None = None
    model_source: Name | None = None
    model_base: Name | None = None
    routers: Name | None = None
    device: Name | None = None
    dtype: Name | None = None
    force: bool = False
    compile: bool = False
    loras: Files | None = None
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    versions: dict[Name, Name] = {}
    row: Annotated[int, Meta(ge=0)] = 0


class PictureRecord(Record, kw_only=True):
    """Of pictures, videos and sounds."""

    prompt: Text
    negative_prompt: Text | None = None
    width: Side | None = None
    height: Side | None = None
    strength: schema.Budget | None = None
    image: Name | Files | None = None
    mask: Name | None = None
    control_image: Name | None = None
    frames: Annotated[int, Meta(ge=1, le=2000)] | None = None
    fps: Annotated[float, Meta(ge=1, le=240)] | None = None
    seconds: Annotated[float, Meta(ge=0.1, le=3600)] | None = None
    batch: Annotated[list[PictureRow], Meta(max_length=4096)] = []


class MeshRecord(Record, kw_only=True):
    """Of meshes."""

    images: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    views: Files = []
    octree_resolution: Annotated[int, Meta(ge=8, le=1024)] | None = None
    decode: Name | None = None
    faces: Annotated[int, Meta(ge=4, le=50_000_000)] | None = None
    remove_background: Literal["auto", "yes", "no"] = "auto"
    batch: Annotated[list[MeshRow], Meta(max_length=4096)] = []


def checked(
    data: Any, kind: type[PictureRecord | MeshRecord], path: object, none: str, size: tuple[int, int] | None
) -> dict[str, Any]:
    """A record as it was read: JSON text or plain data. Raises EditError, which names the file and the field.

    none: the message where it is no record. size: of the picture that it is in, px.
    """
    where, marker = f"--from {str(path)!r}", "prompt" if kind is PictureRecord else "images"
    try:
        if isinstance(data, (str, bytes)):  # Pillow has a kind of str of its own
            data = schema.decode(bytes(data) if isinstance(data, bytes) else str(data), dict[str, Any], where)
    except ValueError:
        data = None
    if not isinstance(data, dict) or marker not in data:
        raise EditError(f"{where} {none}")
    try:
        record: Any = schema.convert(data, kind, where)
        if record.batch and record.row >= len(record.batch):
            raise ValueError(f"{where}: row: {record.row} of a batch of {len(record.batch)}")
        area = (getattr(record, "width", 0) or 0) * (getattr(record, "height", 0) or 0)
        if size is not None and area > ENLARGED * size[0] * size[1]:
            of = f"{record.width}x{record.height} px in a picture of {size[0]}x{size[1]}"
            raise ValueError(f"{where}: width, height: {of}")
    except ValueError as error:
        raise EditError(f"{error}; edit did not write this record into this file") from None
    return data
