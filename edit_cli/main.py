"""Entry point `edit`: runs one command, from its first signal handler to its exit code. Imports no torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from edit_cli import console
from edit_cli.commands.app import call
from edit_cli.console import print_error
from edit_cli.errors import BAD_INPUT, FAILED_RUN, EditError, Interrupted, is_out_of_memory, out_of_memory

if TYPE_CHECKING:
    pass

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
ENDING = ("SIGTERM", "SIGHUP")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 bad input, 1 failed run, 130 interrupted."""
    with lifetime(as_program=arguments is None):
        code = _ended(sys.argv[1:] if arguments is None else list(arguments))
    sys.exit(code)


@contextmanager
def lifetime(as_program: bool) -> Iterator[None]:
    """Around one command: its clock, streams that were closed, SIGTERM and SIGHUP as Ctrl-C.

    as_program: its time counts from the process's start, not from now.
    """
    console.command_began = time.perf_counter() - (_age() if as_program else 0.0)
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
        console.command_began = None


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


def _discard_output() -> None:
    """Nobody takes our output any more: what is left of it is not written again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ended(arguments: list[str]) -> int:
    """The exit code of one command, whatever happens in it."""
    debug = bool(os.environ.get("EDIT_DEBUG"))
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except EditError as error:
        if debug:
            raise
        print_error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        print_error(str(Interrupted()))
        code = Interrupted.exit_code
    except BrokenPipeError:
        # the reader of our output left (`edit models | head`): nothing to tell anyone
        _discard_output()
        code = FAILED_RUN
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is None:  # it may have been our own output
            _discard_output()
        from backbones.model_files import ModelError  # not needed by `edit --help`

        known = isinstance(error, ModelError)
        print_error(str(error) if known else _describe(error))
        code = BAD_INPUT if known else FAILED_RUN
    return code


def _run(arguments: list[str]) -> int:
    try:
        result = call(arguments)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:  # unknown option, missing value...
        path = getattr(getattr(error, "ctx", None), "command_path", "edit")
        print_error(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        return BAD_INPUT
    if result == Interrupted.exit_code:  # typer turns KeyboardInterrupt into this
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _describe(error: Exception) -> str:
    if is_out_of_memory(error):
        return out_of_memory()
    if isinstance(error, OSError) and error.strerror:
        where = "output" if error.filename is None else repr(str(error.filename))
        if error.errno == errno.ENOSPC:
            return f"no space left on device while writing {where}; free some, or write elsewhere"
        return f"{where}: {error.strerror.lower()}; set EDIT_DEBUG=1 for the traceback"
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first.strip()}; set EDIT_DEBUG=1 for the traceback"


if __name__ == "__main__":
    main()
