"""What to say of a profile in plain words, from its trace: warnings, and Amdahl's limit. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edit_cli.profile.trace import CODES, spread_of

LARGEST_OVERHEAD = 0.02
"""Profiling that costs more than this share of the generation is said to disturb it."""
NOISY = 0.25
"""Range of the repeats over their median from which on times are called uncertain."""


def limits(trace: Mapping[str, Any]) -> dict[str, float]:
    """Amdahl's law on the dense run: what is left when its blocks cost nothing, or only a budget's share.

    share: of the time after loading that is spent inside blocks. fastest: whole time over what is left
    without them. at_<budget>: the same with the blocks' time scaled by the budget.
    """
    dense = trace["runs"][0]
    total = sum(seconds for name, seconds in dense["seconds"].items() if name != "load")
    inside = min(dense["parts"]["block"], dense["seconds"]["denoise"])
    at_budgets = {
        f"at_{run['name']}": total / (total - inside * (1 - run["budget"]))
        for run in trace["runs"][1:]
        if run["budget"] is not None
    }
    return {"share": inside / total, "fastest": total / max(total - inside, 1e-9), **at_budgets}


def warnings_of(trace: Mapping[str, Any], cache_limit: int) -> list[str]:
    """What a user should know of this profile, one line each. cache_limit: MiB."""
    dense, *rest = trace["runs"]
    of_runs = [line for run in rest for line in _run_warnings(run, dense, cache_limit)]
    return [*of_runs, *_fit_warnings(trace), *_time_warnings(trace)]


def _run_warnings(run: Mapping[str, Any], dense: Mapping[str, Any], cache_limit: int) -> Iterator[str]:
    name = "the routers" if run["budget"] is None else f"budget {run['name']}"
    codes = {code for sample in run["actions"] for rows in sample.values() for row in rows for code in row}
    full = codes <= {CODES[-1]}
    if full and run["budget"] != 1.0:
        yield f"{name}: nothing was skipped, every block ran in full"
    elastic_s, dense_s = run["seconds"]["denoise"], dense["seconds"]["denoise"]
    if elastic_s > dense_s and not full:
        yield (
            f"{name}: slower than dense ({elastic_s:.3g} s of denoising against {dense_s:.3g} s): the model "
            "is too small or the batch too short for the saved FLOPs to show"
        )
    cache = run["cache_bytes"] / 2**20
    if cache > cache_limit:
        yield (
            f"{name}: the feature cache took {cache:.0f} MiB, more than --cache-limit {cache_limit}; "
            "smaller batches keep less"
        )


def _fit_warnings(trace: Mapping[str, Any]) -> Iterator[str]:
    bundle, request = trace["bundle"], trace["request"]
    if bundle is None:
        if trace["kind"] != "dense" and all(run["budget"] == 1 for run in trace["runs"]):
            yield "budget 1 leaves nothing out: give a --budget below it, or --dense for a map"
        return
    if bundle["num_steps"] != request["steps"]:
        yield (
            f"the bundle was fitted at {bundle['num_steps']} steps and this profile runs {request['steps']}: "
            "what was fitted is for its own number of steps"
        )
    if abs(bundle["guidance"] - request["guidance"]) > 1e-6:
        yield (
            f"the bundle was fitted at guidance {bundle['guidance']:g} and this profile uses "
            f"{request['guidance']:g}: what was fitted may not hold"
        )


def _time_warnings(trace: Mapping[str, Any]) -> Iterator[str]:
    stages = {name: s for name, s in trace["runs"][0]["seconds"].items() if name != "load"}
    total, slowest = sum(stages.values()), max(stages, key=lambda name: stages[name])
    if slowest != "denoise":
        yield (
            f"{slowest} takes {stages[slowest] / total:.0%} of the time after loading and denoising "
            f"{stages['denoise'] / total:.0%}: budgets act on denoising alone, look at {slowest} first"
        )
    overhead = trace["timing"]["overhead"]
    if overhead > LARGEST_OVERHEAD:
        yield (
            f"profiling itself took {overhead:.1%} of the denoising time: the blocks are so small that the "
            "times shown are too long by about as much"
        )
    noise = max(spread_of(run["denoise_repeats"]) for run in trace["runs"])
    if noise > NOISY:
        yield (
            f"repeats differ by up to {noise:.0%} of their median: the machine is busy; times and ratios are "
            "uncertain"
        )
