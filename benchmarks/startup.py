"""How long a user waits for the command itself, each in a fresh process.

python -m benchmarks.startup              # a table, then one JSON line
python -m benchmarks.startup --markdown   # the table of docs/speed.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Startup:
    """A command and its time. seconds: median wall time; cpu_seconds: median user + system time."""

    command: str
    seconds: float
    cpu_seconds: float
    bar: float

    @property
    def met(self) -> bool:
        """Whether it is as fast as promised."""
        return self.seconds <= self.bar


COMMANDS = ((("--help",), 0.4, 7), (("models",), 0.4, 7), (("generate", "a cat", "-o", "cat.png"), 12.0, 3))
"""Arguments of `edit`, bar in s, and how often to run."""


def measure(arguments: tuple[str, ...], bar: float, times: int) -> Startup:
    """Run `edit` in an empty folder; raises CalledProcessError if it fails."""
    program = Path(sys.executable).with_name("edit")
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            start, before = time.perf_counter(), os.times()
            subprocess.run(
                [program, *arguments], cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL
            )
            wall.append(time.perf_counter() - start)
            after = os.times()
            cpu.append(
                after.children_user - before.children_user + after.children_system - before.children_system
            )
    shown = " ".join(f'"{a}"' if " " in a else a for a in arguments)
    return Startup(f"edit {shown}", statistics.median(wall), statistics.median(cpu), bar)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; with --check return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument(
        "--markdown", action="store_true", help="print the docs table instead of table and JSON"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--no-generate", action="store_true", help="leave the picture out")
    options = parser.parse_args(arguments)
    rows = [measure(*c) for c in COMMANDS if not (options.no_generate and c[0][0] == "generate")]
    lines = [[f"`{r.command}`", f"{r.seconds:.2f}", f"{r.cpu_seconds:.2f}", f"<= {r.bar:g}"] for r in rows]
    headers = ["command", "seconds", "CPU seconds", "bar"]
    if options.markdown:
        print("| " + " | ".join(headers) + " |\n|---|---|---|---|")
        for line in lines:
            print("| " + " | ".join(line) + " |")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(*headers, box=None, header_style="bold")
        for line in lines:
            table.add_row(*line)
        Console(highlight=False).print(table)
        print(json.dumps({"benchmark": "startup", "rows": [{**asdict(r), "met": r.met} for r in rows]}))
    return int(options.check and not all(r.met for r in rows))


if __name__ == "__main__":
    sys.exit(main())
