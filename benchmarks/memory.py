"""Peak memory of calibrating against that of generating, each in a fresh process, at the same batch size.

    python -m benchmarks.memory                          # every packaged model; a table
    python -m benchmarks.memory -m flux-tiny --markdown  # as in docs/calibrate.md

The peak is the process's largest resident set: weights, activations, and Python with its libraries, which
are most of it for models as small as the packaged ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from backbones import registry

BAR = 1.3
ROWS = 4
"""Samples of a batch: what `edit calibrate` takes for small models."""
MODELS = ("qwen-image-tiny", "flux-tiny", "hunyuan3d-tiny")
SHORTER = ("--budgets", "0.5")
"""One plan: what peaks alike for all of them."""
UNIT = 2**20 if sys.platform == "darwin" else 2**10
"""`ru_maxrss` in a MiB: bytes on macOS, KiB elsewhere."""


def commands(model: str) -> tuple[list[str], list[str]]:
    """Arguments of `edit`: a dense generation of ROWS samples, and a calibration in batches of ROWS."""
    calibrate = ["calibrate", "-m", model, "-o", "bundle", "--samples", str(ROWS), *SHORTER]
    dense = ["-m", model, "--budget", "1", "-o", "."]
    if registry.resolve(model).makes == "mesh":
        pictures = sorted((Path(str(registry.resolve(model).source)) / "calibration").glob("*.png"))
        return ["generate-3d", *(str(picture) for picture in pictures[:ROWS]), *dense], calibrate
    return ["generate", "a cat", "a dog", "a tree", "a house", "--batch-size", str(ROWS), *dense], calibrate


def peak(arguments: list[str]) -> float:
    """Largest resident set, in MiB, of `edit` in an empty folder. Raises RuntimeError if it fails."""
    program = str(Path(sys.executable).with_name("edit"))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            [program, *arguments, "--quiet"], cwd=folder, stdin=subprocess.DEVNULL, stdout=nowhere
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"edit {' '.join(arguments)} ended with exit code {process.returncode}")
    return usage.ru_maxrss / UNIT


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; with --check return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-m", "--model", choices=MODELS, action="append", help="this one (repeatable)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    parser.add_argument("--markdown", action="store_true", help="print the docs table")
    options = parser.parse_args(arguments)
    print(f"{platform.machine()}, batch {ROWS}\n")
    head = ["model", "generating, MiB", "calibrating, MiB", "ratio", "bar"]
    mark = (
        "| {} |".format(" | ".join("{}" for _ in head)) if options.markdown else "{:18}{:>17}{:>18}{:>8}{:>8}"
    )
    print(mark.format(*head))
    if options.markdown:
        print(mark.format(*["---"] * len(head)))
    worst = 0.0
    for model in options.model or MODELS:
        generating, calibrating = (peak(command) for command in commands(model))
        worst = max(worst, calibrating / generating)
        ratio = f"{calibrating / generating:.2f}"
        print(mark.format(model, f"{generating:.0f}", f"{calibrating:.0f}", ratio, f"< {BAR:g}"), flush=True)
    return int(options.check and worst >= BAR)


if __name__ == "__main__":
    sys.exit(main())
