"""Terminal output: results on stdout, progress and notes on stderr. The only maker of rich consoles."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID
    from rich.table import Table


@functools.cache
def stdout() -> Console:
    """Console for results."""
    from rich.console import Console

    return Console(highlight=False)


@functools.cache
def stderr() -> Console:
    """Console for progress, warnings and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One line on stderr, however long: scripts read it, so it is never wrapped."""
    line = " ".join(message.split())
    stderr().print(f"[bold red]error:[/] {_escape(line)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    stderr().print(f"[yellow]warning:[/] {_escape(line)}", soft_wrap=True)


def print_note(message: str) -> None:
    """One dim line on stderr."""
    stderr().print(f"[dim]{_escape(' '.join(message.split()))}[/]", soft_wrap=True)


def print_warnings(messages: Iterable[str], request: Container[str]) -> None:
    """One line each on stderr; nothing with --quiet."""
    for message in () if "quiet" in request else messages:
        print_warning(message)


def print_result(report: Mapping[str, Any], table: RenderableType, request: Container[str]) -> None:
    """A command's result: a table for people, with --json on stderr, and the object alone on stdout."""
    if "quiet" not in request:
        (stderr() if "json" in request else stdout()).print(table)
    if "json" in request:
        print_json(report)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object as one line of stdout."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def show_file(path: Path) -> None:
    """Open a file with the system's viewer; says so where there is none."""
    import shutil

    import typer

    if sys.platform.startswith("linux") and shutil.which("xdg-open") is None:
        print_warning("--open needs xdg-open, which is not installed; the file is there all the same")
    else:
        typer.launch(str(path))


def two_columns(rows: Mapping[str, str], title: str = "") -> Table:
    """A borderless table of names and values, as reports use."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False, title=title or None, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


@contextmanager
def working(text: str, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something of unknown length runs; nothing if stderr is not a terminal.

    Gives a function that changes the text.
    """
    if not enabled or not stderr().is_terminal:
        yield lambda text: None
        return
    with stderr().status(_escape(text)) as status:
        yield lambda text: status.update(_escape(text))


@contextmanager
def progress(enabled: bool) -> Iterator[Progress | None]:
    """Progress bars on stderr; None when disabled or when stderr is not a terminal."""
    if not enabled or not stderr().is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bars:
        yield bars


def phases(bars: Progress | None) -> Callable[..., None]:
    """A function (phase, done, total, beside="") that shows a bar per phase, with a text beside its name."""
    tasks: dict[str, TaskID] = {}

    def report(phase: str, done: int, total: int, beside: str = "") -> None:
        if bars is not None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total, description=f"{phase} {beside}".strip())

    return report


def readable_count(n: int) -> str:
    """20430401088 -> "20.4 B"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def readable_bytes(size: int) -> str:
    """57705779159 -> "53.7 GiB"."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} B"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
