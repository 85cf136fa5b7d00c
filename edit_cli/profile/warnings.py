"""What to say of a profile in plain words, from its trace: warnings, and Amdahl's limit. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
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
    found = {"share": inside / total, "fastest": total / max(total - inside, 1e-9)}
    for run in trace["runs"][1:]:
        if run["budget"] is not None:
            found[f"at_{run['name']}"] = total / (total - inside * (1 - run["budget"]))
    return found


def warnings_of(trace: Mapping[str, Any], cache_limit: int) -> list[str]:
    """What a user should know of this profile, one line each. cache_limit: MiB."""
    dense, found = trace["runs"][0], []
    for run in trace["runs"][1:]:
        found += _run_warnings(run, dense, cache_limit)
    found += _fit_warnings(trace)
    stages = {name: seconds for name, seconds in dense["seconds"].items() if name != "load"}
    total, slowest = sum(stages.values()), max(stages, key=lambda name: stages[name])
    if slowest != "denoise":
        found.append(
            f"{slowest} takes {stages[slowest] / total:.0%} of the time after loading and denoising "
            f"{stages['denoise'] / total:.0%}: budgets act on denoising alone, look at {slowest} first"
        )
    timing = trace["timing"]
    if timing["overhead"] > LARGEST_OVERHEAD:
        found.append(
            f"profiling itself took {timing['overhead']:.1%} of the denoising time: the blocks are so small "
            "that the times shown are too long by about as much"
        )
    noise = max(spread_of(run["denoise_repeats"]) for run in trace["runs"])
    if noise > NOISY:
        found.append(
            f"repeats differ by up to {noise:.0%} of their median: the machine is busy; "
            "times and ratios are uncertain"
        )
    return found


def _run_warnings(run: Mapping[str, Any], dense: Mapping[str, Any], cache_limit: int) -> list[str]:
    name = "the routers" if run["budget"] is None else f"budget {run['name']}"
    found = []
    codes = {code for sample in run["actions"] for rows in sample.values() for row in rows for code in row}
    full = codes <= {CODES[-1]}
    if full and run["budget"] != 1.0:
        found.append(f"{name}: nothing was skipped, every block ran in full")
    elastic, plain_ = run["seconds"]["denoise"], dense["seconds"]["denoise"]
    if elastic > plain_ and not full:
        found.append(
            f"{name}: slower than dense ({elastic:.3g} s of denoising against {plain_:.3g} s): the model is "
            "too small or the batch too short for the saved FLOPs to show"
        )
    cache = run["cache_bytes"] / 2**20
    if cache > cache_limit:
        found.append(
            f"{name}: the feature cache took {cache:.0f} MiB, more than --cache-limit {cache_limit}; "
            "smaller batches keep less"
        )
    return found


def _fit_warnings(trace: Mapping[str, Any]) -> list[str]:
    bundle, request = trace["bundle"], trace["request"]
    if bundle is None:
        fixed = any(run["budget"] is None for run in trace["runs"])  # routers without a bundle
        alone = "no routers here, so every block ran in full; give --routers BUNDLE, or --dense for a map"
        return [] if fixed or trace["kind"] == "dense" else [alone]
    found = []
    if bundle["num_steps"] != request["steps"]:
        found.append(
            f"the bundle was fitted at {bundle['num_steps']} steps and this profile runs {request['steps']}: "
            "its plan is interpolated"
        )
    if abs(bundle["guidance"] - request["guidance"]) > 1e-6:
        found.append(
            f"the bundle was fitted at guidance {bundle['guidance']:g} and this profile uses "
            f"{request['guidance']:g}: what it learned of the CFG branches may not hold"
        )
    return found
