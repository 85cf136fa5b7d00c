"""What a released file contains, from headers alone: nothing is read but names, types and shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import schema

ROUTER_PREFIX = "gate_mlps."
"""Key prefix of the routers in a released file; every other key belongs to the transformer."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header the safetensors format allows."""

DTYPES = ("F32", "F16", "BF16")
"""Tensor types, as the format names them, that can be run as they are."""


@dataclass(frozen=True)
class ReleaseFile:
    """What a released checkpoint contains, from headers alone.

    shards: file -> names in it. shapes: tensor name -> shape.
    """

    shards: dict[Path, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]


def is_release_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a checkpoint in the paper's released layout; reads headers only.

    path: a safetensors file, an index json of a sharded one, or the folder of either. A bundle of
    `edit` or a pipeline folder is False. Raises ValueError for a damaged safetensors file.
    """
    located = _locate(Path(path))
    if located is None:
        return False
    if located.suffix == ".json":
        return any(name.startswith(ROUTER_PREFIX) for name in _weight_map(located))
    return any(name.startswith(ROUTER_PREFIX) for name in _read_header(located))


def read_release(path: str | os.PathLike[str]) -> ReleaseFile:
    """Names, shapes and dtypes of a released checkpoint, without reading a tensor.

    Raises ValueError naming the file if it is missing, damaged, or has no routers.
    """
    path = Path(path)
    located = _locate(path)
    if located is None:
        raise ValueError(
            f"{path} is not a router checkpoint: give a .safetensors file, its index .json or a folder"
        )
    if located.suffix == ".json":
        names_by_shard: dict[Path, list[str]] = {}
        for name, file in _weight_map(located).items():
            names_by_shard.setdefault(located.parent / file, []).append(name)
    else:
        names_by_shard = {located: []}
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[Path, tuple[str, ...]] = {}
    for shard, promised in names_by_shard.items():
        header = _read_header(shard)
        absent = sorted(set(promised) - set(header))
        if absent:
            raise ValueError(f"{shard} lacks {some(absent)}, which {located.name} promises; fetch both again")
        shards[shard] = tuple(promised or header)
        for name in shards[shard]:
            if header[name].dtype not in DTYPES:
                raise ValueError(
                    f"{name} in {shard} is {header[name].dtype}; weights are {', '.join(DTYPES)}"
                )
            shapes[name] = tuple(header[name].shape)
    if not any(name.startswith(ROUTER_PREFIX) for name in shapes):
        raise ValueError(f"{path} has no {ROUTER_PREFIX}* keys: it holds weights, but no released routers")
    return ReleaseFile(shards, shapes)


def split_keys(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(transformer keys, router keys) of a released checkpoint, each in the given order."""
    transformer: list[str] = []
    routers: list[str] = []
    for name in names:
        (routers if name.startswith(ROUTER_PREFIX) else transformer).append(name)
    return transformer, routers


def _locate(path: Path) -> Path | None:
    """The safetensors file or index json that `path` means, or None if it means neither."""
    if path.is_dir():
        if (path / "bundle.json").exists() or (path / "model_index.json").exists():
            return None
        inside = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        return inside[0] if len(inside) == 1 else None
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") else None


class Index(msgspec.Struct):
    """Of sharded weights."""

    weight_map: dict[str, schema.Name]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index json. Raises ValueError unless it is one."""
    try:
        shards = schema.decode(index.read_bytes(), Index, str(index)).weight_map
    except ValueError as error:
        raise ValueError(f"{index} is not an index of sharded safetensors: {error}") from error
    for shard in set(shards.values()):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(f"{index} refers to {shard!r}, which is not beside it; fetch every shard")
    return shards


def _read_header(path: Path) -> dict[str, schema.Entry]:
    """Header of a safetensors file: tensor name -> {dtype, shape, data_offsets}.

    Raises ValueError if the file is something else or shorter than its header promises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} ({size} bytes) is not a safetensors file; pickled checkpoints are not loaded"
            )
        if 8 + length > size:
            raise ValueError(
                f"{path} is truncated: it has {size} bytes, its header alone {8 + length}; fetch it again"
            )
        try:
            header = schema.header(file.read(length), "header")
        except ValueError as error:
            raise ValueError(f"{path} ({size} bytes) is not a safetensors file: {error}") from error
    end = max((entry.data_offsets[1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise ValueError(f"{path} is truncated: it has {size} bytes of {8 + length + end}; fetch it again")
    return header


def misfits(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with stored names and shapes, up to three keys of each kind."""
    differing = [
        f"{name} {list(stored[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and tuple(stored[name]) != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in stored],
        "left over": [name for name in stored if name not in wanted],
        "of another shape": differing,
    }
    return [f"{len(names)} {what}: {some(names)}" for what, names in kinds.items() if names]


def some(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
