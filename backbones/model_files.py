"""How files of models are read: JSON, YAML, headers of weights, files of the hub. No torch here."""

from __future__ import annotations

import difflib
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from routers.schema import Reader

ROUTERS_FOLDER = "routers"
DEFAULTS_FILE, STATIC = "edit.json", "static"
"""What a model folder says of itself: defaults for requests, and a static transformer's shape."""

POINTER = b"version https://git-lfs"
LFS = "it is a git-lfs pointer and not the file itself; fetch that with: git lfs pull"


class ModelError(ValueError):
    """No such model, or one that cannot be used as it is; the message is one line for the user."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    import routers.schema as schema  # `edit --help` reads nothing

    data: dict[str, Any] = read_files({file: schema.mapping})[file]
    return data


def read_files(files: Mapping[Path, Reader]) -> dict[Path, Any]:
    """What the readers of `routers.schema` make of files of a model folder, of safetensors of their headers.

    A header is 8 bytes of little-endian length, then JSON. Raises ModelError.
    """
    import routers.schema as schema

    given = []
    for file, reader in files.items():
        what = f"{str(file)!r} is not a complete safetensors file: "
        is_header = reader is schema.shapes
        try:
            with file.open("rb") as stream:
                data = stream.read(8)
                most = min(*struct.unpack("<Q", data), schema.MAX_BYTES + 1) if is_header else -1
                rest = stream.read(most)
        except FileNotFoundError:
            raise ModelError(f"the model folder is incomplete: {str(file)!r} is missing") from None
        except (OSError, struct.error) as error:
            reason = what if is_header else f"{str(file)!r} cannot be read: "
            raise ModelError(f"{reason}{first_line(error)}") from error
        if (data + rest[: len(POINTER)]).startswith(POINTER):
            raise ModelError(f"{what if is_header else f'{str(file)!r}: '}{LFS}")
        where = f"{what}its header" if is_header else repr(str(file))
        given.append((reader, rest if is_header else data + rest, where))
    try:
        return dict(zip(files, schema.read_each(given), strict=True))
    except ValueError as error:
        raise ModelError(str(error)) from None


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


def load_weights(module: Any, state: Mapping[str, Any], name: str) -> None:
    """Give a module (on the meta device or not) exactly these tensors. Raises ModelError."""
    check_keys(module, {key: tuple(tensor.shape) for key, tensor in state.items()}, name)
    module.load_state_dict(state, assign=True)


def check_keys(module: Any, stored: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Compare names and shapes with the module's own. Raises ModelError with the first offenders."""
    from routers.paper.headers import misfits  # brings torch

    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    problems = misfits(stored, expected)
    if problems:
        raise ModelError(f"{name} weights do not fit the config: {'; '.join(problems)}")


def is_pointer(file: Path) -> bool:
    """Whether a file only says where git-lfs has it."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


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
