"""Terminal output: results on stdout, progress and notes on stderr. The only maker of rich consoles."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


LOG_SECONDS = 30
"""Between two lines on a phase that goes on."""
CONTROLS = dict.fromkeys([*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
"""Characters that move a terminal's cursor, change its state or turn the direction of writing."""
del CONTROLS[ord("\n")], CONTROLS[ord("\t")]


command_began: float | None = None
"""By time.perf_counter, set around a command; None where nobody started one: a caller in Python."""


def began() -> float:
    """When the command began that runs now, by time.perf_counter; now, if none does."""
    return time.perf_counter() if command_began is None else command_began


def printable(text: str) -> str:
    """A text that a terminal only shows: prompts and records come from others' files."""
    return text.translate(CONTROLS)


@functools.cache
def stdout() -> Console:
    """Console for results."""
    return _console()


def _console(**options: Any) -> Console:
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        """Prints no control characters but its own."""

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            """As of any console, cleaned."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return Plain(highlight=False, **options)


@functools.cache
def stderr() -> Console:
    """Console for progress, warnings and errors."""
    return _console(stderr=True)


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
    if not _is_terminal():  # without rich, whose import takes longer than all that came before
        sys.stderr.write(printable(" ".join(message.split())) + "\n")
        sys.stderr.flush()
        return
    stderr().print(f"[dim]{_escape(' '.join(message.split()))}[/]", soft_wrap=True)


def print_warnings(messages: Iterable[str], request: Container[str]) -> None:
    """One line each on stderr; nothing with --quiet."""
    for message in () if "quiet" in request else messages:
        print_warning(message)


def print_result(report: Mapping[str, Any], table: RenderableType, request: Container[str]) -> None:
    """A command's result: a table for people, with --json on stderr, and the object alone on stdout.

    With --quiet the paths that were written, one a line, and nothing else.
    """
    if "json" in request:
        print_json(report)
    elif "quiet" in request:
        written = report.get("outputs") or filter(None, [report.get("output") or report.get("bundle")])
        sys.stdout.writelines(f"{path}\n" for path in ([] if "dry_run" in report else written))
    if "quiet" not in request:
        (stderr() if "json" in request else stdout()).print(table)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object as one line of stdout."""
    text = json.dumps(result, ensure_ascii=False)
    controls = {code: f"\\u{code:04x}" for code in CONTROLS if code >= 32}  # json escapes the others itself
    sys.stdout.write(text.translate(controls) + "\n")
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


class Log:
    """Progress as lines, where stderr is a file: one when a phase begins, one every half minute and at its
    end, each with the time since the command began. Does what is asked of rich's `Progress` here.
    """

    def __init__(self) -> None:
        self.phases: list[dict[str, Any]] = []

    def add_task(self, name: str, total: float) -> int:
        """A phase of so many steps, which begins with its first."""
        self.phases.append({"name": name, "total": total, "done": 0, "began": 0.0, "told": 0.0})
        return len(self.phases) - 1

    def advance(self, task: int) -> None:
        """One step more."""
        self.update(task, completed=self.phases[task]["done"] + 1)

    def update(
        self, task: int, completed: float = 0, total: float | None = None, description: str = ""
    ) -> None:
        """So many steps are done."""
        phase, now = self.phases[task], time.perf_counter()
        phase["total"] = phase["total"] if total is None else total
        phase["name"] = description or phase["name"]
        if not phase["began"]:
            phase["began"] = phase["told"] = now
            print_note(f"[{_minutes(now - began())}] {phase['name']}: {phase['total']} steps")
        before, phase["done"] = phase["done"], completed
        last = completed >= phase["total"] > before
        if last or now - phase["told"] >= LOG_SECONDS:
            phase["told"] = now
            print_note(f"[{_minutes(now - began())}] {phase['name']}: {_so_far(phase, now)}")


def _so_far(phase: Mapping[str, Any], now: float) -> str:
    """How much of a phase is done, how fast, and how long the rest takes."""
    done, total, taken = phase["done"], phase["total"], max(now - phase["began"], 1e-9)
    left = f", {_minutes(taken * (total - done) / done)} left" if 0 < done < total else ""
    return f"{done} of {total} steps, {done / taken:.2g} a second{left}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def working(text: str, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something of unknown length runs; a line where stderr is not a terminal.

    Gives a function that changes the text.
    """
    if not enabled:
        yield lambda text: None
        return
    if not _is_terminal():

        def say(text: str) -> None:
            print_note(f"[{_minutes(time.perf_counter() - began())}] {text}")

        say(text)
        yield say
        return
    with stderr().status(_escape(text)) as status:
        yield lambda text: status.update(_escape(text))


@contextmanager
def progress(enabled: bool) -> Iterator[Any]:
    """Progress bars on stderr, lines where it is not a terminal; None when disabled."""
    if not enabled:
        yield None
        return
    if not _is_terminal():
        yield Log()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bars:
        yield bars


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def phases(bars: Any) -> Callable[..., None]:
    """A function (phase, done, total, beside="") that shows a bar per phase, with a text beside its name."""
    tasks: dict[str, Any] = {}

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
