"""What a newcomer reads to understand one picture: the project's files that `edit generate` enters, in order.

    python -m benchmarks.reading                # the walk, as a table
    python -m benchmarks.reading --markdown     # for docs/architecture.md
    python -m benchmarks.reading -- generate-3d cat.png -b 0.6

A call tracer (`sys.setprofile`) notes every function call into the project; importing a module does not
count, calling something in it does. Counted are the files, their lines, and how often the reader has to
change the file until everything is decided (the plan is made) and in all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("edit_cli", "backbones", "routers")
PLAN = ("edit_cli/generation/plan.py", "make_plan")
"""Where everything is decided: file and function."""
COMMAND = ("generate", "a cat", "--budget", "0.6")


@dataclass
class Walk:
    """Files in the order in which they were first entered, with the functions called there in order."""

    files: dict[str, list[str]] = field(default_factory=dict)
    changes_to_plan: int = 0
    changes: int = 0
    planned: bool = False
    _last: str = ""
    _importing: int = 0

    def trace(self, frame: FrameType, event: str, _argument: Any) -> None:
        """The profile function."""
        code = frame.f_code
        if code.co_name == "<module>":
            self._importing += {"call": 1, "return": -1}.get(event, 0)
        if self._importing or not code.co_flags & CO_OPTIMIZED:  # bodies of modules and classes are not
            return
        file = _project_file(code.co_filename)
        if file is None:
            return
        if event == "return" and (file, code.co_name) == PLAN:
            self.planned = True
        if event != "call":
            return
        names = self.files.setdefault(file, [])
        if code.co_name not in names:
            names.append(code.co_name)
        if file != self._last:
            self.changes += 1
            self.changes_to_plan += not self.planned
            self._last = file

    def as_json(self) -> dict[str, Any]:
        """Files with their lines, and the totals."""
        lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in self.files}
        return {
            "files": len(lines),
            "lines": sum(lines.values()),
            "changes_to_plan": self.changes_to_plan,
            "walk": [
                {"file": file, "lines": lines[file], "enters": names[0], "functions": len(names)}
                for file, names in self.files.items()
            ],
        }


_known: dict[str, str | None] = {}


def _project_file(name: str) -> str | None:
    if name not in _known:
        path = Path(name)
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
        _known[name] = path.relative_to(ROOT).as_posix() if inside else None
    return _known[name]


def walk(arguments: Sequence[str]) -> Walk:
    """Run one command in an empty folder under the tracer. Raises RuntimeError if it fails."""
    from edit_cli.main import main

    seen, before = Walk(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.setprofile(seen.trace)
        try:
            main([*arguments, "--quiet"])
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"{' '.join(arguments)}: exit code {done.code}") from None
        finally:
            sys.setprofile(None)
            os.chdir(before)
    return seen


def as_table(result: dict[str, Any], markdown: bool) -> str:
    """The walk for people."""
    rows = [(row["file"], str(row["lines"]), row["enters"]) for row in result["walk"]]
    rows = [("file", "lines", "entered through"), *rows]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---|---|---|")
    else:
        lines = [f"{file:44} {count:>6}  {name}" for file, count, name in rows]
    total = (
        f"{result['files']} files, {result['lines']} lines; "
        f"{result['changes_to_plan']} changes of file until the plan is made"
    )
    return "\n".join([*lines, "", total])


def main() -> None:
    """Print the walk, then the same as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("command", nargs="*", default=COMMAND, help="what to trace (after --)")
    arguments = parser.parse_args()
    result = walk(arguments.command).as_json()
    print(as_table(result, arguments.markdown))
    if not arguments.markdown:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
