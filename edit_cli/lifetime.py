"""When this process began, and how it ends: closed streams, SIGTERM and SIGHUP. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_began: float | None = None
"""By time.perf_counter; None where nobody started a command: a caller in Python."""
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
ENDING = ("SIGTERM", "SIGHUP")


def began() -> float:
    """When the command began that runs now, by time.perf_counter; now, if none does."""
    return time.perf_counter() if _began is None else _began


@contextmanager
def command(as_program: bool) -> Iterator[None]:
    """Around one command. as_program: its time counts from the process's start, not from now."""
    global _began
    _began = time.perf_counter() - (_age() if as_program else 0.0)
    _open_streams()
    usual = {}
    for name in ENDING:
        number = getattr(signal, name, None)
        # what is ignored (nohup) stays so; other threads than the first may not ask for signals
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            try:
                usual[number] = signal.signal(number, _interrupt)
            except ValueError:
                break
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        _began = None


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", "rb") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(0.0, float(uptime.read().split()[0]) - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def _open_streams() -> None:
    """Standard streams that a service manager closed become the null device, or files opened later would."""
    for number, (name, mode) in enumerate(STREAMS):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
        if null != number:
            os.close(null)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def discard_output() -> None:
    """Nobody takes our output any more: what is left of it is not written again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
