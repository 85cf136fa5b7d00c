"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError


def write_whole(files: Mapping[Path, Callable[[str], object]]) -> None:
    """Write files beside their targets, then rename them all, so that a failure leaves the old ones.

    files: target -> writer, called with the path of a temporary file in the target's folder. Several files
    are renamed only once all of them are written: a full disk never mixes new ones with old ones.
    Raises OSError, also where safetensors has its own error for one.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for target, write in files.items():
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            os.close(handle)
            written.append((Path(name), target))
            write(name)
            os.chmod(name, ordinary_mode(0o666))
        for temporary, target in written:
            os.replace(temporary, target)
    except SafetensorError as error:
        raise OSError(f"{error}") from error
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def ordinary_mode(mode: int) -> int:
    """The mode that a new file (0o666) or folder (0o777) gets here; temporary ones are private."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
