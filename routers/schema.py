"""What is read from files, checked once by msgspec: types with limits, and one line for what is wrong.

A schema is a `msgspec.Struct`, a dataclass or a plain type with `Annotated` limits. Numbers are finite:
msgspec reads no others. Imported where something is read: `edit --help` does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
MAX_BYTES = 64 * 2**20
"""No description, record or trace is larger."""
PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
"""Of a pipeline: not values of its configuration."""
PRINTABLE = r"\A[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*\Z"
"""Text without escape codes; a terminal would obey them."""

Text = Annotated[str, Meta(max_length=100_000, pattern=PRINTABLE)]
Name = Annotated[str, Meta(max_length=4096, pattern=PRINTABLE)]
"""Of a model, a file, a block."""
Positive = Annotated[float, Meta(gt=0)]
Natural = Annotated[float, Meta(ge=0, le=1e30)]
Real = Annotated[float, Meta(ge=-1e30, le=1e30)]
"""Numbers that may be added up."""
Share = Annotated[float, Meta(ge=0, le=1)]
Budget = Annotated[float, Meta(gt=0, le=1)]
Steps = Annotated[int, Meta(ge=1, le=1000)]
Guidance = Annotated[float, Meta(ge=-100, le=1000)]


class Entry(msgspec.Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, Meta(ge=0)]]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


class FolderDefaults(msgspec.Struct):
    """What a model folder says of requests."""

    steps: Steps = 1
    guidance: Guidance = 1.0
    width: Annotated[int, Meta(ge=1, le=16384)] | None = None
    height: Annotated[int, Meta(ge=1, le=16384)] | None = None
    max_sequence_length: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    octree_resolution: Annotated[int, Meta(ge=8, le=1024)] | None = None
    frames: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    fps: Annotated[float, Meta(ge=1, le=240)] | None = None
    seconds: Annotated[float, Meta(ge=0.1, le=3600)] | None = None


Reader = Callable[[bytes, str], Any]
"""(what a file holds, its name for messages) -> the checked value. Raises ValueError, one line."""


def read_each(given: Iterable[tuple[Reader, bytes, str]]) -> list[Any]:
    """What each reader makes of its file, in order."""
    return [reader(data, where) for reader, data, where in given]


def mapping(data: bytes, where: str) -> dict[str, Any]:
    """Reader of a JSON object."""
    return decode(data, dict[str, Any], where)


def components(data: bytes, where: str) -> dict[str, Any]:
    """Reader of a `model_index.json`, whose components are pairs of a library and a class."""
    index = mapping(data, where)
    parts = {name: entry for name, entry in index.items() if name in PARTS or isinstance(entry, list)}
    convert(parts, dict[Name, tuple[str | None, str | None]], where)
    return index


def shapes(data: bytes, where: str) -> dict[str, tuple[int, ...]]:
    """Reader of the header of a safetensors file: its tensors' shapes."""
    return {name: tuple(entry.shape) for name, entry in header(data, where).items()}


def folder_defaults(data: bytes, where: str) -> tuple[dict[str, Any], FolderDefaults]:
    """Reader of what a model folder says of requests: as it is, and checked."""
    return mapping(data, where), decode(data, FolderDefaults, where)


def header(text: bytes, where: str) -> dict[str, Entry]:
    """The tensors that the header of a safetensors file names. Raises ValueError, one line."""
    entries = decode(text, dict[str, msgspec.Raw], where)
    return {name: decode(raw, Entry, where) for name, raw in entries.items() if name != "__metadata__"}


def decode(data: bytes | str | msgspec.Raw, kind: type[T], where: str) -> T:
    """A value from JSON. where: for messages, the file. Raises ValueError, one line."""
    if len(data) > MAX_BYTES:  # type: ignore[arg-type]
        raise ValueError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    try:
        value: T = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {told(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not complete JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    return value


def convert(data: Any, kind: type[T], where: str) -> T:
    """A value from plain data. Raises ValueError, one line."""
    try:
        value: T = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {told(error)}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    return value


def told(error: msgspec.ValidationError) -> str:
    """The field, then what is wrong with it."""
    what, _, place = str(error).replace("`", "").partition(" - at ")
    what = what.removeprefix("Object ")
    if "matching regex" in what:
        what = "holds characters that are not text"
    field = place.removeprefix("key in ").removeprefix("$").lstrip(".")
    return f"{field}: {what[0].lower()}{what[1:]}" if field else what[0].lower() + what[1:]


def unknown_keys(given: Any, kept: Any) -> list[str]:
    """Keys of plain data that are missing in the value that was made of it, as plain data again."""
    if isinstance(given, dict) and isinstance(kept, dict):
        inside = [key for name, value in given.items() for key in unknown_keys(value, kept.get(name))]
        return [*(key for key in given if key not in kept), *inside]
    if isinstance(given, list) and isinstance(kept, (list, tuple)):
        pairs = zip(given, kept, strict=False)
        return [key for one, other in pairs for key in unknown_keys(one, other)]
    return []
