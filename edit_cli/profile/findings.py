"""From measurements to the trace."""

from __future__ import annotations

import platform
import statistics
from typing import Any

import numpy as np
import torch

from edit_cli import __version__
from edit_cli.profile.measure import Measured, Timed, Variant
from edit_cli.profile.plan import file_stem
from edit_cli.profile.subject import Subject
from edit_cli.profile.trace import CODES, FORMAT, VERSION, plain
from edit_cli.profile.warnings import limits, warnings_of
from routers.trace import SKIP, Trace
from routers.watch.timing import PARTS


def build_trace(measured: Measured) -> dict[str, Any]:
    """The trace of what was measured (schema: docs/profile.md)."""
    subject, profile = measured.subject, measured.plan
    plan, first = profile.generation, measured.dense.traces[0]
    trace: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "request_hash": profile.asked,
        "kind": "dense" if profile.dense else "elastic",
        "made": _made(subject),
        "model": plan.backbone.name,
        "family": plan.backbone.family.name,
        "bundle": _bundle(subject.session.source.bundle),
        "request": {
            "steps": subject.steps,
            "guidance": plan.jobs[0].guidance,
            "size": plan.medium.size(plan.jobs[:1]),
            "samples": [{"label": plan.medium.title(vars(job)), "seed": job.seed} for job in plan.jobs],
        },
        "blocks": [{"kind": kind} for kind in first.kinds],
        "branches": list(_actions(first, 0, subject.steps)),
        "timing": _timing(measured),
        "runs": [_run(variant, measured) for variant in [measured.dense, *measured.variants]],
        "maps": {name: plain(values) for name, values in measured.maps.items()},
        "probed_steps": measured.probed,
    }
    trace["limits"] = limits(trace)
    trace["warnings"] = warnings_of(trace, profile.cache_limit)
    return trace


def _made(subject: Subject) -> dict[str, Any]:
    device = subject.session.device
    return {
        "edit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "dtype": str(next(subject.session.pipe.transformer.parameters()).dtype).removeprefix("torch."),
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


def _timing(measured: Measured) -> dict[str, Any]:
    """How times were taken, and what taking them cost."""
    first = (measured.variants or [measured.dense])[0]
    spans = sum(map(len, first.middle.spans))
    denoise, compared = [each.seconds["denoise"] for each in first.plain], None
    if measured.variants:
        ratios = [timed.denoise / plain - 1 for timed, plain in zip(first.timed, denoise, strict=True)]
        compared = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        denoise = [timed.denoise for timed in first.timed]
    return {
        "method": measured.clock.method,
        "repeats": measured.plan.repeats,
        "warm_up": "one whole run of every variant, not timed",
        "statistic": "median over repeats; the variants take turns",
        "spans": spans,
        "span_seconds": measured.span_seconds,
        "overhead": spans * measured.span_seconds / statistics.median(denoise),
        "overhead_compared": compared,
    }


def _run(variant: Variant, measured: Measured) -> dict[str, Any]:
    subject, plan = measured.subject, measured.plan.generation
    steps, blocks = subject.steps, len(variant.traces[0].kinds)
    middle, dense = variant.middle, variant is measured.dense
    rounds = variant.plain if dense else [timed.round for timed in variant.timed]
    stages = [name for name in rounds[0].seconds if name != "load"]
    flops = {name: sum(trace.flops[name] for trace in variant.traces) for name in ("dense", "spent")}
    reads = sum(trace.host_syncs for trace in variant.traces)
    parts = {part: statistics.median(timed.seconds_in(part) for timed in variant.timed) for part in PARTS}
    stems = [f"pictures/{file_stem(plan.medium, i, job)}" for i, job in enumerate(plan.jobs)]
    return {
        "name": variant.name,
        "budget": variant.budget,
        "spent": [round(spent, 5) for trace in variant.traces for spent in trace.spent],
        "flops": flops,
        "seconds": {
            "load": subject.load_seconds,  # once
            **{name: statistics.median(each.seconds[name] for each in rounds) for name in stages},
        },
        "denoise_repeats": [each.seconds["denoise"] for each in rounds],
        "parts": parts,
        "flop_per_second": flops["spent"] / parts["call"],
        "calls": sum(trace.num_calls for trace in variant.traces),
        "host_reads": reads,
        "host_reads_per_step": reads / (steps * len(variant.traces)),
        "cache_bytes": max(trace.cache_bytes for trace in variant.traces),
        "peak_bytes": variant.peak_bytes,
        "actions": [
            _actions(trace, sample, steps) for trace in variant.traces for sample in range(trace.samples)
        ],
        "block_seconds": plain(np.median([t.block_seconds(steps, blocks) for t in variant.timed], axis=0)),
        "block_flops": middle.block_flops(variant.traces, blocks).tolist(),
        "drift": None if variant.drift is None else plain(variant.drift),
        "quality": {} if dense else subject.quality(variant.look.results, measured.dense.look.results),
        "pictures": [f"{stem}-{variant.name}.png" for stem in stems],
        "spans": _spans(middle),
    }  # fmt: skip


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
