"""A trace as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: Trace Event Format, "Complete" events (ph X) with times in microseconds, "Metadata" events (ph M)
for names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edit_cli.profile.trace import CODES

LANES = {"call": 1, "block": 2, "decide": 3, "router": 3, "cache": 4}
LANE_NAMES = {1: "transformer calls", 2: "blocks", 3: "policy and routers", 4: "feature cache"}
DID = {"-": "skip", "=": "reuse", **{str(n): f"compute {n}/4" for n in range(1, 5)}}


def chrome_trace(trace: Mapping[str, Any]) -> bytes:
    """The file's bytes: one process per run, one lane per part."""
    events: list[dict[str, Any]] = []
    for process, run in enumerate(trace["runs"], 1):  # 0 is the idle process to viewers
        title = run["name"] if run["budget"] is None or run["name"] == "dense" else f"budget {run['name']}"
        events.append(_named("process_name", process, 0, title))
        events += [_named("thread_name", process, lane, name) for lane, name in LANE_NAMES.items()]
        for part, step, branch, block, start, seconds in run["spans"]:
            event = {
                "name": _label(trace, part, step, branch, block), "cat": part, "ph": "X", "pid": process,
                "tid": LANES[part], "ts": round(1e6 * start, 3), "dur": round(1e6 * seconds, 3),
                "args": {"step": step, "branch": branch},
            }  # fmt: skip
            if part == "block":
                event["args"] |= {"block": block, "decisions": _decisions(run, step, branch, block)}
            events.append(event)
    return (json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n").encode()


def _named(what: str, process: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}


def _label(trace: Mapping[str, Any], part: str, step: int, branch: str, block: int) -> str:
    if part == "call":
        return f"step {step} {branch}"
    if block < 0:
        return part
    kind = trace["blocks"][block]["kind"]
    return f"{kind} {block}" if part == "block" else f"{part} {block}"


def _decisions(run: Mapping[str, Any], step: int, branch: str, block: int) -> dict[str, int]:
    """How many rows did what. The rows of a batched-CFG call are listed under their own branches."""
    counts = dict.fromkeys((DID[code] for code in CODES), 0)
    for sample in run["actions"]:
        for rows in [sample[branch]] if branch in sample else sample.values():
            counts[DID[rows[step][block]]] += 1
    return {name: count for name, count in counts.items() if count}
