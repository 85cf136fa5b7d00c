"""Elastic against every rival, on the same model, prompts and noise, at equal measured time.

    python -m benchmarks.pareto qwen-image-tiny -o results            # likeness; continues a killed run
    python -m benchmarks.pareto qwen-image-tiny -o results --timing   # then seconds, on an idle machine
    python -m benchmarks.pareto qwen-image-tiny -o results --report   # tables and plots of what is there
    python -m benchmarks.pareto qwen-image-tiny -o results-8 --steps 8
    python -m benchmarks.pareto FOLDER --routers BUNDLE
    python -m benchmarks.pareto qwen-image-tiny --list                # rivals, settings, and what cannot run
    python -m benchmarks.pareto hunyuan3d-tiny --images -o meshes     # meshes of pictures

For each rival and setting: pictures of all prompts (PSNR and SSIM to the dense pictures and to the exact
ones, Fréchet distance, top-1 and top-5 of the packaged classifier; for meshes IoU and Chamfer distance),
FLOPs (evaluations left out are counted; where blocks are, by torch.utils.flop_counter or the engine's own
counter, which is tested against it), and denoising time over rounds in which all settings take turns, each
beside dense runs of the same prompts. See docs/comparison.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import routers
from backbones import loading, registry
from backbones.spec import Placement
from benchmarks import pareto_bars as bars
from benchmarks import pareto_report as report
from benchmarks import scores
from benchmarks.bench import Bench
from benchmarks.mesh_bench import open_mesh_bench
from benchmarks.pareto_plot import plot
from benchmarks.pareto_run import (
    announce,
    console,
    measure_quality,
    measure_times,
    thinned,
    with_quality,
)
from benchmarks.pareto_store import Store, write_text
from benchmarks.rivals import Rival, all_rivals
from routers.attachment import fingerprint

QUICK = {"count": 2, "rows": 2, "rounds": 1, "batch_sizes": [1, 2], "reference_steps": 8}
"""What --quick puts in place of the options' defaults."""
CALIBRATION_PROMPTS = 8


def open_bench(args: argparse.Namespace) -> Bench:
    """Load what the command line names. Raises ValueError, one line, for anything that cannot be loaded."""
    if args.images is not None:
        return open_mesh_bench(args)
    backbone = registry.resolve(args.model)
    path = args.routers or backbone.bundle
    prompts = (
        scores.default_prompts(args.count) if args.prompts is None else read_prompts(args.prompts, args.count)
    )
    bundle = routers.load_bundle(path) if path is not None else None
    pipe = loading.load(backbone, Placement())
    pipe.set_progress_bar_config(disable=True)
    if bundle is not None:
        routers.attach(pipe, bundle, force=args.force).detach()  # refuses a bundle of another model
    defaults = backbone.defaults
    calibration = [p for p in scores.read_prompts(scores.CALIBRATION) if p not in prompts]
    return Bench(
        backbone,
        pipe,
        prompts,
        calibration[: 2 if args.quick else CALIBRATION_PROMPTS],
        args.steps or defaults.steps,
        defaults.guidance,
        defaults.width,
        defaults.height,
        args.seed,
        bundle,
    )


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` prompts of a file. Raises ValueError if it cannot be read or holds fewer."""
    try:
        prompts = scores.read_prompts(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {str(path)!r} cannot be read: {error}") from error
    if len(prompts) < count:
        raise ValueError(
            f"--prompts {str(path)!r} holds {len(prompts)} prompts, --count asks for {count}; lower it"
        )
    return prompts[:count]


def choose(bench: Bench, args: argparse.Namespace) -> tuple[list[Rival], dict[str, str]]:
    """The asked rivals that can run, and name -> reason for those that cannot. Raises ValueError."""
    every = all_rivals(bench, release_file=args.release)
    unknown = sorted(set(args.rivals or ()) - {rival.name for rival in every})
    if unknown:
        raise ValueError(
            f"unknown rival {unknown[0]!r}; known are {', '.join(rival.name for rival in every)}"
        )
    asked = [rival for rival in every if not args.rivals or rival.name in args.rivals]
    reasons = {rival.name: reason for rival in asked if (reason := rival.why_not(bench)) is not None}
    able = [at_budgets(rival, args.budgets) for rival in asked if rival.name not in reasons]
    able = [rival for rival in able if rival.settings]
    return [thinned(rival, 1 if args.quick else args.settings) for rival in able], reasons


def at_budgets(rival: Rival, budgets: Sequence[float] | None) -> Rival:
    """The rival at these budgets alone, if it has any."""
    if budgets is None:
        return rival
    return replace(rival, settings=tuple(s for s in rival.settings if s.get("budget", budgets[0]) in budgets))


def show(store: Store, about: dict[str, Any], reasons: dict[str, str], as_markdown: bool) -> None:
    """Print the tables; write pareto.json, pareto.md and pareto.png beside the measurements."""
    points = list(store.load().values())
    if not points:
        raise ValueError(f"{store.folder} holds no likeness yet; run without --timing and --report")
    rivals, main_score = [p for p in points if p.rival != "dense"], report.main_score(points)
    tables = {}
    for score in report.EQUAL_SCORES:
        if score in points[0].scores or score in points[0].whole:
            for size in (*report.batch_sizes(points), None):
                title = f"{report.LABELS[score]}, at {bars.what(size)}"
                tables[title] = report.ratio_rows(rivals, points[0], size, score)
    lines = []
    for score in (main_score, f"{main_score}_truth"):
        found = bars.all_bars(rivals, score)
        if found:
            tables[f"Lead: {report.LABELS[score]}"] = bars.bar_rows(found, score)
        lines += bars.verdicts(found, score)
    lines += report.enough_lines(rivals, points[0], f"{main_score}_truth")
    tables["All points"] = report.point_rows(points)
    missing = [f"{name} was not run: {reason}" for name, reason in reasons.items()]
    text = "\n\n".join(
        [*(f"### {title}\n\n{report.markdown(*table)}" for title, table in tables.items()), *lines, *missing]
    )
    write_text(store.folder / "pareto.md", text + "\n")
    data = report.as_json(rivals, {**about, "bundle": store.bundle, "not_run": reasons})
    write_text(store.folder / "pareto.json", json.dumps(data) + "\n")
    if as_markdown:
        print(text)
    else:
        for title, (head, rows) in tables.items():
            table = Table(*head, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(*lines, *missing, sep="\n")
    title, truth = f"{about['model']}, {about['count']} {about['things']}", f"{main_score}_truth"
    plot(rivals, store.folder / "pareto.png", title)
    plot(rivals, store.folder / "pareto-truth.png", title, truth)
    console.print(f"{store.folder}/pareto.json, pareto.md, pareto.png, pareto-truth.png")


def describe(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What a results folder is a comparison of: it continues no other one."""
    return {
        "model": bench.backbone.name,
        "fingerprint": fingerprint(bench.transformer),
        "parameters": bench.backbone.parameters,
        "count": len(bench.prompts),
        "things": bench.things,
        "prompts": bench.prompts,
        "seed": args.seed,
        "steps": bench.num_steps,
        "guidance": bench.guidance,
        "width": bench.width,
        "height": bench.height,
        "reference_steps": args.reference_steps,
        "rows": args.rows,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pareto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="registry name or model folder, default qwen-image-tiny")
    parser.add_argument("--routers", type=Path, help="bundle folder, default the model's own")
    parser.add_argument(
        "--release", type=Path, help="checkpoint in the paper's layout, for its fixed thresholds"
    )
    parser.add_argument(
        "--force", action="store_true", help="accept a bundle of other weights, same architecture"
    )
    parser.add_argument(
        "--prompts", type=Path, help="a file, one a line; default the packaged evaluation prompts"
    )
    parser.add_argument("--count", type=int, default=24, help="prompts (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="noise of the first prompt (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps, default the model's")
    parser.add_argument(
        "--reference-steps", type=int, default=100, help="evaluations of the exact solution (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=8, help="batch size of the quality runs (%(default)s)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], help="batch sizes that are timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing; 0 for none (%(default)s)")
    parser.add_argument("--timing", action="store_true", help="measure seconds of the points that are there")
    parser.add_argument("--budgets", type=float, nargs="+", help="of rivals that have budgets, these alone")
    parser.add_argument("--settings", type=int, help="at most so many settings per rival, evenly chosen")
    parser.add_argument("--redo", nargs="+", metavar="NAME", help="measure these rivals anew")
    parser.add_argument(
        "--images", nargs="?", const="", metavar="DIR",
        help="a mesh model, and its pictures; without DIR those in the model's folder",
    )  # fmt: skip
    parser.add_argument("--grid", type=int, default=64, help="cells per side of a mesh's field (%(default)s)")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="these alone; see --list")
    parser.add_argument(
        "--quick", action="store_true", help="one setting each, two prompts: to see that all runs"
    )
    parser.add_argument("--list", action="store_true", help="print rivals and settings, and stop")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: tables and plot of what is there"
    )
    parser.add_argument("--markdown", action="store_true", help="print markdown instead of tables")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pareto"), help="results folder (%(default)s)"
    )
    quick = parser.parse_known_args(arguments)[0].quick
    if quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(arguments)
    for name, least in (
        ("count", 1),
        ("rows", 1),
        ("rounds", 0),
        ("reference_steps", 1),
        ("steps", 4),
        ("settings", 1),
        ("grid", 8),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed is {least} or more")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch-sizes holds {min(args.batch_sizes)}; allowed is 1 or more")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit code 2 for bad input, 1 for a failed run."""
    args = parse(arguments)
    try:
        bench = open_bench(args)
        rivals, reasons = choose(bench, args)
        if args.list:
            for rival in rivals:
                console.print(
                    f"{rival.name}: {len(rival.settings)} settings{'; ' * bool(rival.note)}{rival.note}"
                )
            console.print(*(f"{name} cannot run: {reason}" for name, reason in reasons.items()), sep="\n")
            return 0
        about = describe(bench, args)
        store = Store(args.output, about, bench.bundle.digest if bench.bundle is not None else None)
        if args.redo:
            store.forget(args.redo)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if not args.report:
            rivals = with_quality(store, rivals) if args.timing else rivals
            with torch.no_grad():
                announce(bench, store, rivals, args)
                (measure_times if args.timing else measure_quality)(bench, store, rivals, args)
        show(store, about, reasons, args.markdown)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
