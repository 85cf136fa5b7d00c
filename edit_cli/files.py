"""Results as files, which appear whole or not at all. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from edit_cli.errors import RunError


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files together; a failure leaves none of the new ones. Raises RunError."""
    from routers.files import write_whole  # not needed by `edit --help`

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
