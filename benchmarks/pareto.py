"""Elastic against every rival, on the same model, prompts and noise, at equal measured time.

    python -m benchmarks.pareto qwen-image-tiny -o results           # everything; continues a killed run
    python -m benchmarks.pareto FOLDER --routers BUNDLE --equal      # also batch-mean decisions
    python -m benchmarks.pareto qwen-image-tiny --list               # rivals, settings, and what cannot run
    python -m benchmarks.pareto qwen-image-tiny -o results --report  # tables and plot of what is there

For each rival and setting: pictures of all prompts (PSNR and SSIM to the dense pictures and to those of many
steps, top-1 and top-5 of the packaged classifier), FLOPs by torch.utils.flop_counter (elastic plans by the
engine's own counter, which is tested against it), and denoising time over rounds in which all settings take
turns, each beside dense runs of the same prompts. See docs/comparison.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import routers
from backbones import loading, registry
from backbones.spec import Placement
from benchmarks import pareto_report as report
from benchmarks import scores
from benchmarks.bench import Attached, Bench, run_quality, run_timed
from benchmarks.pareto_store import Point, Store, point_key, write_whole
from benchmarks.rivals import Rival, Setting, all_rivals

GROUP = 4
"""Settings timed between two dense runs."""
QUICK = {"count": 2, "rows": 2, "rounds": 1, "batch_sizes": [1, 2], "reference_steps": 8}
"""What --quick puts in place of the options' defaults."""
CALIBRATION_PROMPTS = 8

console = Console(highlight=False)


def open_bench(args: argparse.Namespace) -> Bench:
    """Load what the command line names. Raises ValueError, one line, for anything that cannot be loaded."""
    backbone = registry.resolve(args.model)
    path = args.routers or backbone.bundle
    prompts = (
        scores.default_prompts(args.count) if args.prompts is None else read_prompts(args.prompts, args.count)
    )
    bundle = routers.load_bundle(path) if path is not None else None
    pipe = loading.load_pipeline(backbone, Placement())
    if bundle is not None:
        routers.attach(
            pipe.transformer, bundle, force=args.force
        ).detach()  # refuses a bundle of another model
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
    every = all_rivals(bench, equal=args.equal, release_file=args.release)
    unknown = sorted(set(args.rivals or ()) - {rival.name for rival in every})
    if unknown:
        raise ValueError(
            f"unknown rival {unknown[0]!r}; known are {', '.join(rival.name for rival in every)}"
        )
    asked = [rival for rival in every if not args.rivals or rival.name in args.rivals]
    reasons = {rival.name: reason for rival in asked if (reason := rival.why_not(bench)) is not None}
    able = [rival for rival in asked if rival.name not in reasons]
    if args.quick:
        able = [
            Rival(r.name, r.settings[len(r.settings) // 2 :][:1], r.apply, r.why_not, r.note) for r in able
        ]
    return able, reasons


def references(
    bench: Bench, store: Store, args: argparse.Namespace
) -> tuple[dict[str, list[Image.Image]], float]:
    """Dense pictures, pictures of many steps, and dense FLOPs; kept in the store."""
    kept = store.load_references()
    if kept is None:
        dense, flops = run_quality(bench, Attached(bench.num_steps, nullcontext), args.rows)
        truth = bench.pictures(args.rows, args.reference_steps)
        store.save_references({"dense": dense, "truth": truth}, flops)
        kept = store.load_references()
        assert kept is not None, "just saved"
    return kept


def judge(
    bench: Bench, pictures: list[Image.Image], known: dict[str, list[Image.Image]]
) -> dict[str, list[float]]:
    """Scores of every prompt's picture."""
    found: dict[str, Any] = {}
    for suffix, name in (("", "dense"), ("_truth", "truth")):
        found[f"psnr{suffix}"], found[f"ssim{suffix}"] = scores.likeness(pictures, known[name])
    hits = scores.accuracy(pictures, bench.prompts)
    if hits is not None:
        found["top1"], found["top5"] = hits
    return {name: [round(float(v), 5) for v in values] for name, values in found.items()}


def measure_quality(bench: Bench, store: Store, rivals: Sequence[Rival], args: argparse.Namespace) -> None:
    """Pictures, FLOPs and scores of every setting that the store lacks."""
    known, dense_flops = references(bench, store, args)
    done = set(store.load())
    if point_key("dense", {}) not in done:
        store.add_point(Point("dense", {}, 1.0, judge(bench, known["dense"], known)))
    todo = [
        (rival, setting)
        for rival, setting in settings_of(rivals)
        if point_key(rival.name, setting) not in done
    ]
    for number, (rival, setting) in enumerate(todo, 1):
        with rival.attached(bench, setting) as attached:
            pictures, flops = run_quality(bench, attached, args.rows, dense_flops)
        point = Point(rival.name, dict(setting), flops, judge(bench, pictures, known))
        store.add_point(point)
        mean = statistics.mean(point.scores["psnr"])
        console.print(f"quality {number}/{len(todo)}  {point.key}: FLOPs {flops:.3f}, {mean:.2f} dB")


def measure_times(bench: Bench, store: Store, rivals: Sequence[Rival], args: argparse.Namespace) -> None:
    """Seconds of every setting, batch size and round that the store lacks."""
    every, done = list(settings_of(rivals)), store.timed()
    workloads = {rows: bench.workload(rows) for rows in args.batch_sizes}
    for turn in range(args.rounds):
        for rows in args.batch_sizes:
            shift = turn * len(every) // args.rounds  # each round starts elsewhere
            order = every[shift:] + every[:shift]
            todo = [(r, s) for r, s in order if (point_key(r.name, s), rows, turn) not in done]
            for start in range(0, len(todo), GROUP):
                time_group(bench, store, todo[start : start + GROUP], workloads[rows], turn)
            if todo:
                console.print(f"time, round {turn + 1}/{args.rounds}, batch {rows}: {len(todo)} settings")


def time_group(
    bench: Bench, store: Store, group: Sequence[tuple[Rival, Setting]], workload: Any, turn: int
) -> None:
    """A few settings between two dense runs, all on the same prompts; nothing is kept of half a group."""
    batch, dense = turn % workload.num_batches, Attached(bench.num_steps, nullcontext)
    before, seconds = run_timed(bench, dense, workload, batch), []
    for rival, setting in group:
        with rival.attached(bench, setting) as attached:
            seconds.append(run_timed(bench, attached, workload, batch))
    reference = (before + run_timed(bench, dense, workload, batch)) / 2
    for (rival, setting), taken in zip(group, seconds, strict=True):
        store.add_time(point_key(rival.name, setting), workload.rows, turn, taken, reference)


def settings_of(rivals: Sequence[Rival]) -> Iterator[tuple[Rival, Setting]]:
    """Every rival with every one of its settings."""
    for rival in rivals:
        for setting in rival.settings:
            yield rival, setting


def show(store: Store, about: dict[str, Any], reasons: dict[str, str], as_markdown: bool) -> None:
    """Print the tables; write pareto.json, pareto.md and pareto.png beside the measurements."""
    points = list(store.load().values())
    if not points:
        raise ValueError(f"{store.folder} holds no measured point yet; run without --report")
    rivals, everything = [p for p in points if p.rival != "dense"], report.point_rows(points)
    equal = report.equal_time(rivals)
    tables = {"All points": everything}
    for score, digits in (("psnr", 2), ("psnr_truth", 2), ("top5", 3)):
        if score in points[0].scores and equal:
            tables[f"At equal time: {report.LABELS[score]}"] = report.equal_rows(
                report.equal_time(rivals, score), digits
            )
    lines = report.verdicts(equal)
    missing = [f"{name} was not run: {reason}" for name, reason in reasons.items()]
    text = "\n\n".join(
        [*(f"### {title}\n\n{report.markdown(*table)}" for title, table in tables.items()), *lines, *missing]
    )
    write_whole(store.folder / "pareto.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    data = report.as_json(rivals, {**about, "not_run": reasons})
    write_whole(store.folder / "pareto.json", lambda path: path.write_text(json.dumps(data) + "\n"))
    if as_markdown:
        print(text)
    else:
        for title, (head, rows) in tables.items():
            table = Table(*head, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(*lines, *missing, sep="\n")
    if report.batch_sizes(rivals):
        report.plot(rivals, store.folder / "pareto.png", f"{about['model']}, {about['count']} prompts")
    console.print(f"{store.folder}/pareto.json, pareto.md, pareto.png")


def describe(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What a results folder is a comparison of: it continues no other one."""
    return {
        "model": bench.backbone.name,
        "parameters": bench.backbone.parameters,
        "bundle": bench.bundle.digest if bench.bundle is not None else None,
        "count": len(bench.prompts),
        "prompts": bench.prompts,
        "seed": args.seed,
        "steps": bench.num_steps,
        "guidance": bench.guidance,
        "width": bench.width,
        "height": bench.height,
        "reference_steps": args.reference_steps,
        "rows": args.rows,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pareto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=registry.DEFAULT_MODEL, help="registry name or pipeline folder"
    )
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
    parser.add_argument("--count", type=int, default=128, help="prompts (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="noise of the first prompt (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps, default the model's")
    parser.add_argument("--reference-steps", type=int, default=200, help="steps of the truth (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="batch size of the quality runs (%(default)s)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], help="batch sizes that are timed"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; 0 for none (%(default)s)")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="these alone; see --list")
    parser.add_argument(
        "--equal", action="store_true", help="also the bundle with batch-mean decisions and plan alone"
    )
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
    for name, least in (("count", 1), ("rows", 1), ("rounds", 0), ("reference_steps", 1), ("steps", 4)):
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
        store = Store(args.output, about)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if not args.report:
            with torch.no_grad():
                measure_quality(bench, store, rivals, args)
                measure_times(bench, store, rivals, args)
        show(store, about, reasons, args.markdown)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
