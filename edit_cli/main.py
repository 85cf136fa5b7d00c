"""Entry point `edit`: registers the commands and turns every error into one line. Imports no torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from edit_cli import __version__
from edit_cli.commands.help import Commands, EditGroup
from edit_cli.console import begin, print_error
from edit_cli.errors import BAD_INPUT, FAILED_RUN, EditError, Interrupted, is_out_of_memory, out_of_memory

if TYPE_CHECKING:
    from edit_cli.request import Command, Option

COMMANDS = Commands(
    {
        "generate": "Pictures from prompts, at a share of the model's compute.",
        "generate-3d": "Meshes from pictures, at a share of the model's compute.",
        "models": "What can be generated with, and what of it is on this machine.",
        "download": "Fetch a model from the hub, or the rest of it.",
        "config": "What your edit.toml files say.",
        "calibrate": "Fit a bundle to a model, so that a budget costs less likeness.",
        "profile": "Where the compute goes: blocks, steps, stages.",
        "export": "Take routers or a model elsewhere, checked by loading it again.",
    }
)
"""The commands with what `edit --help` says of them, in its order."""
EXAMPLES = """edit generate "a cat" --budget 0.6 -o cat.png
edit generate "a cat" --budget 0.5 --compare   # beside the dense picture
edit generate-3d cat.png -o cat.glb            # a mesh of it
edit generate "a cat" --preset fast            # options saved in edit.toml
edit models qwen-image-tiny                    # what a model makes and needs"""


class Edit(EditGroup):
    """The group of these commands."""

    all_commands, examples = COMMANDS, EXAMPLES


STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
ENDING = ("SIGTERM", "SIGHUP")

app = typer.Typer(
    name="edit",
    cls=Edit,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(show: bool) -> None:
    """Callback of `--version`."""
    if show:
        print(f"edit {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    show_version: bool = typer.Option(
        False, "--version", metavar="", callback=version, is_eager=True, help="Print the version."
    ),
) -> None:
    """One diffusion transformer, any compute budget."""


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
    begin(_age() if as_program else 0.0)
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
        begin(None)


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
    group = typer.main.get_command(app)
    called = COMMANDS.get(next(iter(arguments), ""))
    if called is not None:
        arguments = [arguments[0], *spread(arguments[1:], called)]
    try:
        result = group.main(arguments or ["--help"], prog_name="edit", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:  # unknown option, missing value...
        path = getattr(getattr(error, "ctx", None), "command_path", "edit")
        print_error(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        return BAD_INPUT
    if result == Interrupted.exit_code:  # typer turns KeyboardInterrupt into this
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def spread(words: Sequence[str], command: Command) -> list[str]:
    """`--seed 1 2 3` -> `--seed 1 --seed 2 --seed 3`: option parsers take one value for each name.

    A further word belongs to the option if it could be a value of it: a number is never a prompt.
    """
    result: list[str] = []
    current, rest = "", list(words)
    while rest:
        word = rest.pop(0)
        typed, inline, _ = word.partition("=")
        if word == "--":
            result += [word, *rest]
            rest.clear()
        elif typed in command.spelled:
            _, option = command.spelled[typed]
            takes_next = option.check is not None and not inline
            if takes_next and option.bare and not (rest and _accepts(option, rest[0])):
                rest.insert(0, option.bare)
            result += [word, *([rest.pop(0)] if takes_next and rest else [])]
            current = typed if option.many and option.metavar.endswith("...") else ""
        elif current and not word.startswith("-") and _accepts(command.spelled[current][1], word):
            result += [current, word]
        else:
            current = ""
            result.append(word)
    return result


def _accepts(option: Option, word: str) -> bool:
    try:
        option.value(option.label, word)
    except EditError:
        return False
    return True


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
