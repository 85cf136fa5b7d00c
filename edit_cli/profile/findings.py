"""From measurements to the trace."""

from __future__ import annotations

import platform
import statistics
from typing import Any

import numpy as np
import torch

from edit_cli import __version__
from edit_cli.profile.measure import (
    Measured,
    Timed,
    Variant,
    block_seconds,
    flops_per_block,
    median_stages,
    median_timed,
    part_seconds,
)
from edit_cli.profile.plan import file_stem, label_of
from edit_cli.profile.trace import CODES, FORMAT, VERSION, plain
from edit_cli.profile.warnings import limits, warnings_of
from routers.trace import SKIP, Trace
from routers.watch.timing import PARTS


def build_trace(measured: Measured) -> dict[str, Any]:
    """The trace of what was measured (schema: docs/profile.md)."""
    subject, plan = measured.subject, measured.plan
    elastic_kinds = measured.dense.trace[0].kinds
    variants = [measured.dense, *measured.variants]
    trace: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "dense" if plan.dense else "elastic",
        "made": _made(subject),
        "model": plan.request.backbone.name,
        "family": plan.request.backbone.family.name,
        "bundle": _bundle(subject.bundle),
        "request": {
            "steps": subject.steps,
            "guidance": subject.guidance,
            "size": _size(plan.request.jobs[0]),
            "samples": [{"label": label_of(job), "seed": job.seed} for job in plan.request.jobs],
        },
        "blocks": [{"kind": kind} for kind in elastic_kinds],
        "branches": list(_actions(measured.dense.trace[0], 0, subject.steps)),
        "timing": _timing(measured),
        "runs": [_run(variant, measured) for variant in variants],
        "maps": {name: plain(values) for name, values in measured.maps.items()},
        "probed_steps": measured.probed,
    }
    trace["limits"] = limits(trace)
    trace["warnings"] = warnings_of(trace, plan.cache_limit)
    return trace


def _made(subject: Any) -> dict[str, Any]:
    transformer, device = subject.pipe.transformer, subject.device
    return {
        "edit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(next(transformer.parameters()).dtype).split(".")[-1],
        "threads": torch.get_num_threads(),
    }


def _bundle(bundle: Any) -> dict[str, Any] | None:
    if bundle is None:
        return None
    names = ("base_model", "digest", "num_steps", "guidance", "min_budget", "recommended_budget")
    return {
        **{name: getattr(bundle, name) for name in names},
        "quality": [*bundle.metadata.get("quality", ())],
    }


def _size(job: Any) -> str:
    if hasattr(job, "octree_resolution"):
        return f"resolution {job.octree_resolution}"
    return f"{job.width}x{job.height}"


def _timing(measured: Measured) -> dict[str, Any]:
    """How times were taken, and what taking them cost."""
    first = (measured.variants or [measured.dense])[0]
    spans = sum(map(len, median_timed(first).spans))
    rounds = [timed.round for timed in first.timed] if measured.variants else first.plain
    denoise = statistics.median(each.seconds["denoise"] for each in rounds)
    compared = None
    if measured.variants:
        ratios = [
            timed.round.seconds["denoise"] / plain.seconds["denoise"] - 1
            for timed, plain in zip(first.timed, first.plain, strict=True)
        ]
        compared = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {
        "method": measured.clock.method,
        "repeats": measured.plan.repeats,
        "warm_up": "one whole run of every variant, not timed",
        "statistic": "median over repeats; the variants take turns",
        "spans": spans,
        "span_seconds": measured.span_seconds,
        "overhead": spans * measured.span_seconds / denoise,
        "overhead_compared": compared,
    }


def _run(variant: Variant, measured: Measured) -> dict[str, Any]:
    steps, blocks = measured.subject.steps, len(variant.trace[0].kinds)
    middle, dense = median_timed(variant), variant is measured.dense
    grids = [block_seconds(timed, steps, blocks) for timed in variant.timed]
    rounds = variant.plain if dense else [timed.round for timed in variant.timed]
    stages = median_stages(rounds, measured.subject.load_seconds)
    calls = sum(trace.num_calls for trace in variant.trace)
    in_calls = statistics.median(part_seconds(timed, "call") for timed in variant.timed)
    flops = {name: sum(trace.flops[name] for trace in variant.trace) for name in ("dense", "spent")}
    reads = sum(trace.host_syncs for trace in variant.trace)
    return {
        "name": variant.name,
        "budget": variant.budget,
        "spent": [round(spent, 5) for trace in variant.trace for spent in trace.spent],
        "flops": flops,
        "seconds": stages,
        "denoise_repeats": [each.seconds["denoise"] for each in rounds],
        "parts": {
            part: statistics.median(part_seconds(timed, part) for timed in variant.timed) for part in PARTS
        },
        "flop_per_second": flops["spent"] / in_calls,
        "calls": calls,
        "host_reads": reads,
        "host_reads_per_step": reads / (steps * len(variant.trace)),
        "cache_bytes": max(trace.cache_bytes for trace in variant.trace),
        "peak_bytes": variant.peak_bytes,
        "actions": [
            _actions(trace, sample, steps) for trace in variant.trace for sample in range(trace.samples)
        ],
        "block_seconds": plain(np.median(grids, axis=0)),
        "block_flops": flops_per_block(middle.calls, variant.trace, blocks).tolist(),
        "drift": None if variant.drift is None else plain(variant.drift),
        "quality": {} if dense else _quality(variant, measured),
        "pictures": [
            f"pictures/{file_stem(i, job)}-{variant.name}.png"
            for i, job in enumerate(measured.plan.request.jobs)
        ],
        "spans": _spans(middle),
    }  # fmt: skip


def _quality(variant: Variant, measured: Measured) -> dict[str, list[float]]:
    return measured.subject.quality(variant.look.results, measured.dense.look.results)


def _actions(trace: Trace, sample: int, steps: int) -> dict[str, list[str]]:
    """One sample's decisions: per CFG branch and step one code per block."""
    rows: dict[str, list[str]] = {}
    for call in trace.calls:
        parts = len(call.actions) // trace.samples
        for part in range(parts):
            # rows of a batched-CFG call are branch-major
            name = call.branch if parts == 1 else ("cond", "uncond")[part] if parts == 2 else str(part)
            codes = call.actions[part * trace.samples + sample]
            rows.setdefault(name, [""] * steps)[call.step] = "".join(CODES[code - SKIP] for code in codes)
    return rows


def _spans(timed: Timed) -> list[list[Any]]:
    """[part, step, branch, block, start in s, seconds] of one round, its pipeline calls one after another."""
    rows: list[list[Any]] = []
    offset = 0.0
    for spans, calls in zip(timed.spans, timed.calls, strict=True):
        for span in sorted(spans, key=lambda span: span.start):
            info = calls[span.call]
            start, seconds = round(offset + span.start, 7), round(span.seconds, 7)
            rows.append([span.part, info.step, info.branch, span.block, start, seconds])
        offset += max((span.start + span.seconds for span in spans), default=0.0)
    return rows
