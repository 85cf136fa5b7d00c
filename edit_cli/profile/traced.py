"""The schema of a trace (docs/profile.md). Shapes, which depend on each other, are checked in `trace.py`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from routers.schema import Budget, Guidance, Name, Natural, Real, Share, Steps, Text

Count = Annotated[int, Meta(ge=0)]
Map = list[list[Real | None]]


class Made(msgspec.Struct):
    """By what it was made."""

    device: Name
    device_name: Name
    dtype: Name
    threads: Count


class Bundle(msgspec.Struct):
    """The routers' bundle."""

    num_steps: Steps
    guidance: Guidance
    min_budget: Share = 0.0
    recommended_budget: Budget = 1.0
    quality: list[dict[Name, Real | None]] = []


class Sample(msgspec.Struct):
    """One sample."""

    label: Text
    seed: Count


class Asked(msgspec.Struct):
    """The request."""

    steps: Steps
    guidance: Guidance
    size: Name
    samples: Annotated[list[Sample], Meta(min_length=1, max_length=100_000)]


class Block(msgspec.Struct):
    """A block."""

    kind: Name


class Timing(msgspec.Struct):
    """How it was timed."""

    method: Text
    repeats: Count
    warm_up: Text
    statistic: Text
    spans: Count
    span_seconds: Natural
    overhead: Real
    overhead_compared: Compared | None


class Compared(msgspec.Struct):
    """Timed runs to untimed ones."""

    median: Real
    low: Real
    high: Real


class Flops(msgspec.Struct):
    """Of a run."""

    dense: Natural
    spent: Natural


class Run(msgspec.Struct):
    """The dense run, or one at a budget."""

    name: Name
    budget: Budget | None
    spent: Annotated[list[Natural], Meta(min_length=1)]
    flops: Flops
    seconds: dict[Name, Natural]
    denoise_repeats: Annotated[list[Natural], Meta(min_length=1)]
    parts: dict[Name, Natural]
    flop_per_second: Natural
    calls: Count
    host_reads: Count
    host_reads_per_step: Natural
    cache_bytes: Natural
    peak_bytes: Natural
    actions: list[dict[Name, list[str]]]
    block_seconds: Map
    block_flops: list[Natural]
    drift: Map | None
    quality: dict[Name, list[Real]]
    pictures: list[Name]
    spans: list[tuple[Name, Count, Name, Annotated[int, Meta(ge=-1)], Natural, Natural]]


class Traced(msgspec.Struct):
    """A trace."""

    kind: Literal["elastic", "dense"]
    model: Name
    family: Name
    made: Made
    bundle: Bundle | None
    request: Asked
    blocks: Annotated[list[Block], Meta(min_length=1, max_length=100_000)]
    branches: list[Name]
    timing: Timing
    runs: Annotated[list[Run], Meta(min_length=1, max_length=1000)]
    maps: dict[Name, Map]
    probed_steps: list[int]
    limits: dict[Name, Real]
    warnings: list[Text]
