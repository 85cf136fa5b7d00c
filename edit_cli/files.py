"""Results as files and folders: claimed when a run starts, whole or not there at all. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edit_cli.errors import EditError, RunError

if TYPE_CHECKING:
    from routers.files import Claim

TAKEN = "is being written by another run; wait for that"
ANY = "any"
"""Stands for every request that a folder can have been made by."""


class Claims:
    """Names that this run alone writes, until the context ends."""

    def __init__(self) -> None:
        self._held: dict[Path, Claim] = {}
        self._made: list[Path] = []
        self._cleared: set[Path] = set()

    def take(self, path: Path, shown: str | Path = "") -> bool:
        """Claim a name, in a folder that is made where it is missing; False if another run has it.

        shown: what messages call it. Raises EditError where it cannot be written.
        """
        from routers.files import claim, clear  # not needed by `edit --help`

        try:
            if path.parent not in self._cleared:
                self._make(path.parent)
                clear(path.parent)
                self._cleared.add(path.parent)
            held = claim(path)
        except OSError as error:
            raise EditError(
                f"--output {str(shown or path)!r} cannot be written: {reason(error)}; choose another place"
            ) from error
        if held is not None:
            self._held[path] = held
        return held is not None

    def give_back(self, paths: Iterable[Path]) -> None:
        """Release those that are held."""
        for path in paths:
            if path in self._held:
                self._held.pop(path).release()

    def _make(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(list(self._held))
        for folder in self._made:
            with suppress(OSError):  # unless something was written
                folder.rmdir()


@contextmanager
def claimed_folder(
    output: str | Path, kind: str, mark: str, may_replace: Container[str], option: str = "--output"
) -> Iterator[Path]:
    """The name of a folder to be written, claimed. option: that named it.

    An earlier folder of this kind holds the JSON file `mark`. It may be replaced if the request that made it
    is one of `may_replace`, or any if `ANY` is. Raises EditError for what is in the way.
    """
    target = Path(output).expanduser()
    target = target if target.name not in ("", "..") else target.resolve()
    with Claims() as claims:
        if not claims.take(target, output):
            raise EditError(f"{option} {str(output)!r} {TAKEN}, or choose another name")
        if target.exists() and not target.is_dir():
            raise EditError(f"{option} {str(output)!r} is a file; give a folder for the {kind}")
        if target.is_dir() and any(target.iterdir()):
            if not (target / mark).is_file():
                raise EditError(f"{option} {str(output)!r} exists and holds no {kind}; choose another name")
            if ANY not in may_replace and request_in(target / mark) not in may_replace:
                raise EditError(
                    f"{option} {str(output)!r} exists; choose another name, or replace it with --overwrite"
                )
        yield target


@contextmanager
def whole_folder(target: Path, ours: Container[str]) -> Iterator[Path]:
    """A folder to fill, which takes its target's place in one step. ours: see `routers.files.new_folder`.

    Raises RunError if it cannot be written.
    """
    from routers.files import new_folder

    try:
        with new_folder(target, ours) as folder:
            yield folder
    except OSError as error:
        raise RunError(f"{str(target)!r} cannot be written: {reason(error)}") from error


def request_hash(request: Mapping[str, object]) -> str:
    """Of what was asked for, wherever it goes and however it is told."""
    told = ("output", "overwrite", "resume", "json", "quiet", "metric")
    asked = {name: value for name, value in request.items() if name not in told}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def request_in(file: Path) -> str:
    """The hash that a folder's JSON file has of the request which made it, "" if there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    parts = (data, data.get("metadata")) if isinstance(data, dict) else ()
    found = [part["request_hash"] for part in parts if isinstance(part, dict) and "request_hash" in part]
    return str(found[0]) if found else ""


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files together; a failure leaves none of the new ones. Raises RunError."""
    from routers.files import write_whole

    try:
        write_whole({path: functools.partial(put, data) for path, data in files.items()})
    except OSError as error:
        target = next(iter(files))
        name = target if len(files) == 1 else target.parent
        raise RunError(f"{str(name)!r} cannot be written: {reason(error)}") from error


def put(data: bytes, path: str) -> None:
    """Write one file."""
    Path(path).write_bytes(data)


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in a few words."""
    return (error.strerror or str(error)).lower()
