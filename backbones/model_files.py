"""What the registry reads: JSON, YAML and headers of model folders, files of the hub. No torch here."""

from __future__ import annotations

import difflib
import functools
import math
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones.spec import DEFAULT_FIELDS, Defaults, Makes

ROUTERS_FOLDER = "routers"
DEFAULTS_FILE, STATIC = "edit.json", "static"
"""What a model folder says of itself: defaults for requests, and a static transformer's shape."""

PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
"""Of a pipeline: not values of its configuration."""
POINTER = b"version https://git-lfs"
LFS = "it is a git-lfs pointer and not the file itself; fetch that with: git lfs pull"

Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of files: what was read from them holds while it stays the same."""


class ModelError(ValueError):
    """No such model, or one that cannot be used as it is; the message is one line for the user."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    from routers import schema  # `edit --help` reads nothing

    try:
        return schema.decode(file.read_bytes(), dict[str, Any], repr(str(file)))
    except FileNotFoundError:
        raise ModelError(f"the model folder is incomplete: {str(file)!r} is missing") from None
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {first_line(error)}") from error
    except ValueError as error:
        raise ModelError(f"{str(file)!r}: {LFS}" if is_pointer(file) else str(error)) from None


def read_index(file: Path) -> dict[str, Any]:
    """A model_index.json: its components are pairs of a library and a class. Raises ModelError."""
    from routers import schema

    index = read_json(file)
    parts = {name: entry for name, entry in index.items() if name in PARTS or isinstance(entry, list)}
    try:
        schema.convert(parts, dict[schema.Name, tuple[str | None, str | None]], repr(str(file)))
    except ValueError as error:
        raise ModelError(str(error)) from None
    return index


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ModelError."""
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{str(file)!r} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{str(file)!r} must hold a mapping, not {type(data).__name__}")
    return data


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header alone.

    The header is 8 bytes of little-endian length, then JSON. Raises ModelError.
    """
    return dict(_read_header(file, stamp(file)))


@functools.lru_cache(maxsize=64)
def _read_header(file: Path, _stamp: Stamp) -> dict[str, tuple[int, ...]]:
    from routers import schema

    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            text = stream.read(min(length, schema.MAX_BYTES + 1))
        entries = schema.header(text, "its header")
        return {name: tuple(entry.shape) for name, entry in entries.items()}
    except (OSError, ValueError, struct.error) as error:
        reason = LFS if is_pointer(file) else first_line(error)
        raise ModelError(f"{str(file)!r} is not a complete safetensors file: {reason}") from error


def is_pointer(file: Path) -> bool:
    """Whether a file only says where git-lfs has it."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def count_by_prefix(file: Path) -> dict[str, int]:
    """Elements in a safetensors file by the first part of their names. Raises ModelError."""
    counts: dict[str, int] = {}
    for name, shape in read_header(file).items():
        prefix = name.split(".", 1)[0]
        counts[prefix] = counts.get(prefix, 0) + math.prod(shape)
    return counts


def stamp(path: Path) -> Stamp:
    """The state of a file, or of the files in a folder and its subfolders, without reading them."""
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    states = ((str(file), file.stat()) for file in files if file.is_file())
    return tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in states))


def folder_defaults(folder: Path, base: Defaults, makes: Makes) -> Defaults:
    """Defaults for requests: `base`, changed by the folder's `edit.json`. Raises ModelError."""
    file, allowed = folder / DEFAULTS_FILE, DEFAULT_FIELDS[makes]
    if not file.is_file():
        return base
    data = read_json(file)
    data.pop(STATIC, None)
    unknown = sorted(set(data) - set(allowed))
    if unknown:
        raise ModelError(f"{file}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
    from routers import schema

    given = schema.convert(data, schema.FolderDefaults, str(file))
    return replace(base, **{name: getattr(given, name) for name in data})


def static_entry(folder: Path) -> Any:
    """What `edit.json` says of a static transformer; None if it is an ordinary one. Raises ModelError."""
    file = folder / DEFAULTS_FILE
    return read_json(file).get(STATIC) if file.is_file() else None


def folder_bundle(folder: Path) -> Path | None:
    """The bundle that a model folder brings along, in `routers/`."""
    bundle = folder / ROUTERS_FOLDER
    return bundle if (bundle / "bundle.json").is_file() else None


def near_names(name: str, names: Iterable[str]) -> str:
    """The hint after "unknown model": what was perhaps meant, else all that is known."""
    names = list(names)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)};"


def cached_file(repository: str, file: str) -> Path | None:
    """A file of a hub repository if it is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def hub_file(repository: str, file: str) -> Path | None:
    """A file of a hub repository, from the local cache if it is there; None if the repository lacks it.

    Raises ModelError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = cached_file(repository, file)
    if cached is not None:
        return cached
    try:
        require_hub()
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client has a dozen error types; the user needs one line
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ModelError(hub_message(repository, error)) from error


def require_hub() -> None:
    """Raise OSError at once when the hub cannot be reached; its client would retry for half a minute."""
    from urllib.request import getproxies  # brings an HTTP client, which --help can do without

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("offline mode")
    if getproxies():
        return  # behind a proxy the host need not resolve here
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    with socket.create_connection((host.hostname or "", host.port or 443), timeout=10):
        pass


DOWNLOAD_FIRST = "download it first (edit download), or give a model folder"


def hub_message(repository: str, error: BaseException, next_step: str = DOWNLOAD_FIRST) -> str:
    """Why a hub model could not be read, in one line with the next step."""
    kind = type(error).__name__
    if "Gated" in kind or "401" in str(error) or "403" in str(error):
        return f"{repository!r} is gated: accept its licence on the hub and run `hf auth login`"
    if "RepositoryNotFound" in kind or "404" in str(error):
        return f"{repository!r} was not found, neither as a folder nor on the hub; see `edit models`"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return f"{repository!r} is not in the local cache and the hub cannot be reached{offline}; {next_step}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
