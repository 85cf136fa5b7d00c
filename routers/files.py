"""Files and folders that appear whole or not at all, under names that no other run takes meanwhile.

What a run leaves when it is killed lies beside its target and begins with a dot:

    .NAME.claim          the name is taken, by the run whose file it names
    .XXXXXXXX.run        a run's file: locked while it lives, so a lock that is free is a left-over
    .NAME.XXXXXXXX.tmp   a file or folder that was being written
    .NAME.XXXXXXXX.old   a folder that was moved aside, where a file system cannot exchange two folders

`clear` finds them in the next run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

CLAIM, RUN, TEMPORARY, ASIDE = ".claim", ".run", ".tmp", ".old"
DEAD = re.compile(r"\.[a-z0-9_]{8}\.run")
LEFT_OVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<kind>\.tmp|\.old)", re.DOTALL)
AT_CWD, EXCHANGE = -100, 2  # of Linux's renameat2


_runs: dict[Path, tuple[Path, int, list[int]]] = {}
"""For each folder that this process holds names in: its file there, the locked handle, and how many."""


@dataclass(frozen=True)
class Claim:
    """A name that this run alone may write."""

    target: Path

    def release(self) -> None:
        """Give the name back."""
        with suppress(OSError):  # the folder may have become read-only or gone
            _beside(self.target, CLAIM).unlink()
        file, handle, held = _runs[self.target.parent]
        held[0] -= 1
        if not held[0]:
            del _runs[self.target.parent]
            with suppress(OSError):
                file.unlink()
            os.close(handle)


def claim(target: Path) -> Claim | None:
    """Take a name in an existing folder; None if a live run has it, this one too. Raises OSError.

    The mark names a file of the run, whose lock says that it lives: one open file for any number of names.
    """
    mark = _beside(target, CLAIM)
    while True:
        handle = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, wait=True)
            with suppress(FileNotFoundError):  # whoever had it removed it since it was opened
                if os.path.samestat(os.fstat(handle), mark.stat()):
                    holder = os.read(handle, 4096).decode(errors="replace")
                    if holder and _lives(target.parent / Path(holder).name):
                        return None
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _run_in(target.parent).encode(), 0)
                    return Claim(target)
        finally:
            os.close(handle)


def _run_in(folder: Path) -> str:
    """The name of this run's file in a folder, made and locked with its first claim there."""
    while folder not in _runs:
        handle, name = tempfile.mkstemp(RUN, ".", folder)
        _lock(handle)
        if os.path.exists(name):  # else it was taken for a left-over before it was locked
            _runs[folder] = Path(name), handle, [0]
        else:
            os.close(handle)
    file, _, held = _runs[folder]
    held[0] += 1
    return file.name


def _lives(file: Path) -> bool:
    """Whether the run that made this file still holds it."""
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Remove what killed runs left in a folder, and nothing of a run that lives."""
    with suppress(OSError):
        entries = list(folder.glob(".*"))
        for mark in (entry for entry in entries if entry.name.endswith(CLAIM)):
            name = mark.name[1 : -len(CLAIM)]
            held = claim(folder / name)
            if held is not None:
                _remove_left_overs(folder / name, entries)
                held.release()
        for file in (entry for entry in entries if DEAD.fullmatch(entry.name)):
            if not _lives(file):
                file.unlink(missing_ok=True)


def _remove_left_overs(target: Path, entries: list[Path]) -> None:
    for entry in entries:
        found = LEFT_OVER.fullmatch(entry.name)
        if found is None or found["name"] != target.name:
            continue
        if found["kind"] == ASIDE and not target.exists():
            entry.rename(target)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock a file as long as it is open; False if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows: a name is then only as safe as the time between two looks
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
    return True


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def write_whole(files: Mapping[Path, Callable[[str], object]]) -> None:
    """Write files beside their targets, then rename them all, so that a failure leaves the old ones.

    files: target -> writer, called with the path of a temporary file in the target's folder. Several files
    are renamed only once all of them are written: a full disk never mixes new ones with old ones.
    Raises OSError, also where safetensors has its own error for one.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for target, write in files.items():
            handle, name = tempfile.mkstemp(TEMPORARY, f".{target.name}.", target.parent)
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


@contextmanager
def new_folder(target: Path, ours: Container[str] = ()) -> Iterator[Path]:
    """A folder to fill; when the context ends well it takes the target's place in one step.

    ours: names in an earlier folder there that go with it. What else it holds is carried over.
    Raises OSError, also where safetensors has its own error for one.
    """
    building = Path(tempfile.mkdtemp(TEMPORARY, f".{target.name}.", target.parent))
    try:
        yield building
        building.chmod(ordinary_mode(0o777))
        for other in target.iterdir() if target.is_dir() else ():
            if other.name not in ours and not (building / other.name).exists():
                copy = shutil.copytree if other.is_dir() else _link
                copy(other, building / other.name)
        replace_folder(building, target)
    except SafetensorError as error:
        raise OSError(f"{error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def replace_folder(building: Path, target: Path) -> None:
    """Rename a folder to a name that another one may have, which then has the first one's."""
    try:
        building.rename(target)  # free, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if exchange(building, target):
        return
    aside = building.with_name(f"{building.name.removesuffix(TEMPORARY)}{ASIDE}")
    target.rename(aside)
    try:
        building.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    done = rename and rename(AT_CWD, os.fsencode(one), AT_CWD, os.fsencode(other), EXCHANGE) == 0
    return bool(done)


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy)


def ordinary_mode(mode: int) -> int:
    """The mode that a new file (0o666) or folder (0o777) gets here; temporary ones are private."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
