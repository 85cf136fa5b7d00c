"""What the registries read: JSON and headers of model folders, single files of the hub. No torch here."""

from __future__ import annotations

import difflib
import json
import math
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from backbones.spec import Defaults, MeshDefaults

AnyDefaults = TypeVar("AnyDefaults", Defaults, MeshDefaults)

GIB = 2**30
ROUTERS_FOLDER = "routers"
SMALL_MODEL = 10**9
"""Below this many parameters a model runs in fp32 by default and may generate several images at once."""


class ModelNotFoundError(ValueError):
    """No such model, or a folder that is none; the message is one line for the user."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelNotFoundError."""
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelNotFoundError(f"the model folder is incomplete: {str(file)!r} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelNotFoundError(f"{str(file)!r} holds no JSON object")
    return data


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header alone.

    The header is 8 bytes of little-endian length, then JSON. Raises ModelNotFoundError.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (
        OSError, ValueError, struct.error, MemoryError, OverflowError, AttributeError, TypeError, KeyError,
    ) as error:  # fmt: skip
        raise ModelNotFoundError(f"{str(file)!r} is no complete safetensors file: {error}") from error


def count_by_prefix(file: Path) -> dict[str, int]:
    """Elements in a safetensors file by the first part of their names. Raises ModelNotFoundError."""
    counts: dict[str, int] = {}
    for name, shape in read_header(file).items():
        prefix = name.split(".", 1)[0]
        counts[prefix] = counts.get(prefix, 0) + math.prod(shape)
    return counts


def folder_defaults(folder: Path, base: AnyDefaults) -> AnyDefaults:
    """Defaults for requests: `base`, changed by the folder's `edit.json`. Raises ModelNotFoundError."""
    file = folder / "edit.json"
    if not file.is_file():
        return base
    data, allowed = read_json(file), [f.name for f in fields(base)]
    data.pop("static", None)  # what `backbones.static_folder` reads
    unknown = sorted(set(data) - set(allowed))
    if unknown:
        raise ModelNotFoundError(f"{file}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
    return replace(base, **data)


def folder_bundle(folder: Path) -> Path | None:
    """The bundle that a model folder brings along, in `routers/`."""
    bundle = folder / ROUTERS_FOLDER
    return bundle if (bundle / "bundle.json").is_file() else None


def is_small(parameters: int) -> bool:
    """Whether a model of this many parameters (0: unknown) runs in fp32 by default."""
    return 0 < parameters < SMALL_MODEL


def memory_gib(parameters: int) -> float:
    """GiB of all weights: fp32 for small models, bf16 for the rest."""
    return round((4 if is_small(parameters) else 2) * parameters / GIB, 2)


def near_names(name: str, known: Iterable[str]) -> str:
    """The hint after "unknown model": what was perhaps meant, else all that is known."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)};"


def hub_file(repository: str, file: str) -> Path:
    """A file of a hub repository, from the local cache if it is there. Raises ModelNotFoundError."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        require_hub()
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client has a dozen error types; the user needs one line
        raise ModelNotFoundError(hub_message(repository, error)) from error


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


def hub_message(repository: str, error: BaseException) -> str:
    """Why a hub model could not be read, in one line with the next step."""
    kind = type(error).__name__
    if "Gated" in kind or "401" in str(error) or "403" in str(error):
        return f"{repository!r} is gated: accept its licence on the hub and run `hf auth login`"
    if "RepositoryNotFound" in kind or "404" in str(error):
        return f"{repository!r} was not found, neither as a folder nor on the hub; see `edit models`"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return (
        f"{repository!r} is not in the local cache and the hub cannot be reached{offline}; "
        "download it first, or give a pipeline folder"
    )
