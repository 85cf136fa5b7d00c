"""Every pipeline of diffusers that its own tests can build: as it is, with open gates, and at a budget.

    python -m benchmarks.zoo                      the tiny pipelines of this repository
    python -m benchmarks.zoo --tests DIFFUSERS    those of a checkout of diffusers, which is not part of it

Open gates must not change a bit. The table shows what a budget spent, and which lists of blocks run in full.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.describe import described
from backbones.loading import quiet_libraries
from backbones.pipelines import generic_family
from routers.elastic import Elastic
from tests.tiny_zoo import MAKE

SECONDS = 400
"""Of the processor; a pipeline that takes longer is given up."""


NEAR = 0.02
"""How far from a budget may be spent in a run of at least `LONG` evaluations."""
LONG = 10


@dataclass(frozen=True)
class Case:
    """A pipeline that can be built. inputs: a new set of a call's arguments."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]


@dataclass
class Row:
    """What came out. opened: "equal" or why not. spent: of the budget's run, None if there was none; planned
    of the evaluations that its dense run makes: fewer than its steps where it begins with a picture.
    """

    name: str
    steps: int = 0
    opened: str = ""
    spent: float | None = None
    planned: int = 0
    of: int = 0
    budgeted: str = ""
    in_full: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether open gates change nothing and a budget can be set."""
        return self.opened == "equal" and self.spent is not None

    def near(self, budget: float) -> bool:
        """Whether what was spent is within 0.02 of the budget."""
        return self.spent is not None and abs(self.spent - budget) <= NEAR

    def most(self, budget: float) -> bool:
        """Whether one evaluation more would have been over the budget."""
        return self.spent is not None and self.planned == max(1, int(budget * self.of + 1e-6))


def main() -> None:
    """Run the cases and print the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tests", type=Path, metavar="DIFFUSERS", help="a checkout of diffusers")
    parser.add_argument("--only", default="", metavar="TEXT", help="classes with this in their name")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        cases = own_cases(Path(folder)) if arguments.tests is None else diffusers_cases(arguments.tests)
        rows = []
        for case in cases:
            if arguments.only.lower() not in case.name.lower():
                continue
            rows.append(run_case(case, arguments.budget, arguments.steps))
            print(as_line(rows[-1]), file=sys.stderr, flush=True)
    print(f"\n| pipeline | steps | open | spent at {arguments.budget:g} | evaluations | always in full |")
    print("|---|---|---|---|---|---|")
    print("\n".join(as_line(row) for row in rows))
    counts = summary(rows, arguments.budget)
    print(
        f"\n{counts['passed']} of {counts['of']} pass. Of the {counts['long']} whose dense run makes "
        f"at least {LONG} evaluations, {counts['near']} spend within {NEAR:g} of {arguments.budget:g}; "
        f"{counts['grain']} more spend the most whole evaluations that it buys."
    )
    print(json.dumps({**counts, "rows": [asdict(row) for row in rows]}))


def summary(rows: Sequence[Row], budget: float) -> dict[str, int]:
    """How many pass, how many of those are long, near to the budget, and as near as whole evaluations are."""
    passed = [row for row in rows if row.passed]
    long = [row for row in passed if row.of >= LONG]
    grain = [row for row in long if not row.near(budget) and row.most(budget)]
    near = sum(row.near(budget) for row in long)
    return {
        "passed": len(passed), "of": len(rows), "long": len(long), "near": near, "grain": len(grain),
    }  # fmt: skip


def as_line(row: Row) -> str:
    """A line of the table."""
    spent = row.budgeted if row.spent is None else f"{row.spent:.3f}"
    evaluations = f"{row.planned} of {row.of}" if row.of else ""
    in_full = ", ".join(f"`{path}`" for path in row.in_full)
    return f"| `{row.name}` | {row.steps} | {row.opened} | {spent} | {evaluations} | {in_full} |"


def run_case(case: Case, budget: float, steps: int) -> Row:
    """A pipeline as it is, with open gates, and at a budget."""
    row = Row(case.name)
    try:
        with at_most(SECONDS):
            pipe = case.build()
            pipe.set_progress_bar_config(disable=True)
            call, dense = _with_steps(pipe, case, steps, row)
            transformer = pipe.transformer
            family = generic_family(type(pipe).__name__, type(transformer).__name__, "", "picture")
            family, found = described(family, transformer, lambda: pipe(**call()))
            row.in_full = tuple(found.left_in_full)
            elastic = Elastic(transformer, family.transformer, pipe=pipe)
            try:
                with elastic.scope():
                    row.opened = "equal" if equal(values(pipe(**call())), dense) else "differs"
            finally:
                elastic.detach()
            if row.opened == "differs" and not equal(values(pipe(**call())), dense):
                row.opened = "differs from itself"
    except Exception as error:
        row.opened = row.opened or _reason(error)
        return row
    try:
        with at_most(SECONDS):
            trace = trace_at(pipe, call, budget, finite(dense))
        row.spent, row.planned, row.of = float(np.mean(trace.spent)), trace.planned, trace.steps
    except Exception as error:
        row.budgeted = _reason(error)
    return row


def trace_at(pipe: Any, call: Callable[[], dict[str, Any]], budget: float, dense_finite: bool) -> Any:
    """The trace of a run at a budget. Raises ValueError if its result is not finite and the dense one is."""
    import routers

    handle = routers.attach(pipe, budget=budget)
    try:
        made = values(pipe(**call()))
        trace = handle.trace
    finally:
        handle.detach()
    if dense_finite and not finite(made):
        raise ValueError("the result is not finite")
    return trace


def _with_steps(
    pipe: Any, case: Case, steps: int, row: Row
) -> tuple[Callable[[], dict[str, Any]], list[Any]]:
    """A maker of arguments with so many steps, or with as many as the tests say where others are refused; and
    the result of the pipeline as it is.
    """
    for wanted in (steps, None):
        row.steps = wanted or case.inputs(pipe).get("num_inference_steps", 0)

        def call(wanted: int | None = wanted) -> dict[str, Any]:
            torch.manual_seed(0)  # not all noise comes from a generator
            given = case.inputs(pipe)
            return given if wanted is None else {**given, "num_inference_steps": wanted}

        try:
            return call, values(pipe(**call()))
        except Exception:
            if wanted is None:
                raise
    raise AssertionError("returned or raised")


def values(output: Any) -> list[Any]:
    """The arrays of a pipeline's result."""
    made = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    if isinstance(made, torch.Tensor):
        return [made.float().cpu().numpy()]
    if isinstance(made, (list, tuple)):
        return [array for each in made for array in values((each,))]
    return [np.asarray(made)]


def finite(arrays: list[Any]) -> bool:
    """Whether all are numbers."""
    return all(bool(np.isfinite(array).all()) for array in arrays)


def equal(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit; what was not a number must not be one either."""
    return len(a) == len(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes more of the processor's time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:120].replace("|", "/")


def own_cases(folder: Path) -> Iterator[Case]:
    """The tiny pipelines of this repository's tests."""
    from PIL import Image

    from backbones.pipeline_call import known_call
    from backbones.registry import resolve

    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    pictures = {"image": picture, "mask_image": picture.convert("L"), "control_image": picture}

    def inputs(pipe: Any) -> dict[str, Any]:
        call = known_call(type(pipe).__name__)
        given = {"prompt": "a cat", "generator": torch.Generator().manual_seed(0)}
        given |= {name: value for name, value in pictures.items() if name in call.defaults}
        sizes = {"width": 64, "height": 64, "num_frames": 5, "audio_end_in_s": 2.0, "max_area": 64 * 64}
        return given | {name: value for name, value in sizes.items() if name in call.defaults}

    for name, make in MAKE.items():

        def build(name: str = name, make: Callable[[Path], Path] = make) -> Any:
            from backbones.loading import load
            from backbones.spec import Placement

            return load(resolve(str(make(folder / name))), Placement(device="cpu"))

        yield Case(name, build, inputs)


def diffusers_cases(checkout: Path) -> Iterator[Case]:
    """The pipelines with a transformer that the tests in a checkout of diffusers build."""
    from benchmarks.zoo_tests import test_classes

    for made in test_classes(checkout):
        yield Case(made.name, made.build, made.inputs)


if __name__ == "__main__":
    main()
