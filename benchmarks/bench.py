"""A loaded model with its requests: what every rival runs on, how its FLOPs and seconds are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import routers
from backbones.spec import Backbone
from backbones.workloads import PipelineWorkload
from benchmarks import scores
from benchmarks.mixes import CostReader
from routers.elastic import Elastic
from routers.patching import patch_forward, restore_forward
from routers.policy import CallInfo, Policy


@dataclass
class Bench:
    """A pipeline and its requests. calibration: other prompts, for rivals to fit themselves."""

    backbone: Backbone
    pipe: Any
    prompts: list[str]
    calibration: list[str]
    num_steps: int
    guidance: float
    width: int
    height: int
    seed: int = 1000
    bundle: routers.Bundle | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    """What rivals measured on the dense model, kept for their other settings."""
    chosen: dict[str, float] = field(default_factory=dict)
    """What rivals chose for themselves on calibration prompts; a results folder keeps it."""

    def workload(self, rows: int, prompts: list[str] | None = None) -> Any:
        """The requests in batches of `rows`."""
        return PipelineWorkload(
            self.pipe,
            self.backbone,
            rows,
            self.num_steps,
            self.guidance,
            prompts or self.prompts,
            self.width,
            self.height,
            seed=self.seed,
        )

    @property
    def transformer(self) -> Any:
        """The denoiser."""
        return self.pipe.transformer

    @contextmanager
    def elastic(self, policy: Callable[[], Policy]) -> Iterator[Elastic]:
        """The elastic engine in place with a given policy and no routers."""
        elastic = Elastic(
            self.transformer, self.backbone.family.transformer, policy, num_steps=self.num_steps
        )
        try:
            yield elastic
        finally:
            elastic.detach()

    @cached_property
    def call(self) -> CallInfo:
        """What a transformer call of these requests costs."""
        reader = CostReader()
        with self.elastic(lambda: reader) as elastic, elastic.scope(num_steps=self.num_steps):
            self.workload(1).run(0, num_steps=1)
        assert reader.call is not None, "the pipeline called its transformer"
        return reader.call

    score = "psnr"
    """The score that rivals are compared by."""
    things = "prompts"
    """What the requests are."""

    def make(self, workload: Any, batch: int, num_steps: int) -> list[Any]:
        """The results of one batch: decoded pictures."""
        return list(workload.run(batch, num_steps=num_steps, output_type="pil"))

    def results(self, rows: int, num_steps: int) -> list[Any]:
        """Every request's result, with whatever is attached at the moment."""
        workload = self.workload(rows)
        found = [r for b in range(workload.num_batches) for r in self.make(workload, b, num_steps)]
        return found[: len(self.prompts)]

    def pack(self, results: list[Any]) -> NDArray[Any]:
        """Results as one array, to keep as references: [P, H, W, 3] uint8."""
        return np.stack([np.asarray(picture.convert("RGB")) for picture in results])

    def unpack(self, array: NDArray[Any]) -> list[Any]:
        """What `pack` packed."""
        return [Image.fromarray(picture) for picture in array]

    def judge(self, results: list[Any], known: dict[str, list[Any]]) -> dict[str, list[float]]:
        """Scores of every prompt's picture against the `known` "dense" and "truth"."""
        found: dict[str, Any] = {}
        for suffix, name in (("", "dense"), ("_truth", "truth")):
            found[f"psnr{suffix}"], found[f"ssim{suffix}"] = scores.likeness(results, known[name])
        hits = scores.accuracy(results, self.prompts)
        if hits is not None:
            found["top1"], found["top5"] = hits
        return {name: [round(float(v), 5) for v in values] for name, values in found.items()}

    def judge_all(self, results: list[Any], known: dict[str, list[Any]]) -> dict[str, float]:
        """Scores of all pictures together: Fréchet distance of the classifier's features to the `known`."""
        return {
            f"frechet{suffix}": round(scores.frechet(results, known[name]), 5)
            for suffix, name in (("", "dense"), ("_truth", "truth"))
        }


class DenoisingClock:
    """Seconds from the start of the first transformer call to the end of the last, all between included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first, self.last, self.calls = device, 0.0, 0.0, 0

    @property
    def seconds(self) -> float:
        """Time of the denoising loop."""
        return self.last - self.first

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A transformer call."""
        if not self.calls:
            self.first = self._now()
        output = original(*args, **kwargs)
        self.last, self.calls = self._now(), self.calls + 1
        return output

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _OneModule:
    """Stands in for the counter's module tracker, which never comes to an end in cache-dit's cycles."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _OneModule:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FlopClock:
    """FLOPs of all transformer calls by torch.utils.flop_counter."""

    def __init__(self) -> None:
        self.flops, self.calls = 0, 0

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A transformer call."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _OneModule()  # type: ignore[assignment]
        with counter:
            output = original(*args, **kwargs)
        self.flops, self.calls = self.flops + counter.get_total_flops(), self.calls + 1
        return output


@contextmanager
def watched(transformer: Any, clock: Callable[..., Any]) -> Iterator[None]:
    """Every call of the transformer goes through `clock(forward, ...)`, outside of what a rival attached."""
    patch = patch_forward(transformer, clock)
    try:
        yield
    finally:
        restore_forward(transformer, patch)


@dataclass
class Attached:
    """A rival in place. generation: entered around every pipeline call."""

    num_steps: int
    generation: Callable[[], Any]
    traced: bool = False
    """Whether `generation` gives a `Trace`, which knows the FLOPs."""
    spent: Callable[[], float] | None = None
    """After a run, its share of the dense run's FLOPs, where whole evaluations are all that is left out."""


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Put every module, the pipeline and its class back as they were, whatever a library left behind."""
    owners = [pipe, *(part for part in pipe.transformer.modules())]
    before = [dict(vars(owner)) for owner in owners]
    children = [dict(part._modules) for part in owners[1:]]
    kind = type(pipe)
    class_before = dict(vars(kind))
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            now = vars(owner)
            for name in set(now) - set(attributes):
                del now[name]
            now.update(attributes)
        for part, own in zip(owners[1:], children, strict=True):  # replaced for a while, they change order
            part._modules.clear()
            part._modules.update(own)
        for name in set(vars(kind)) - set(class_before):
            delattr(kind, name)
        for name, value in class_before.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)


def run_quality(
    bench: Bench, attached: Attached, rows: int, dense_flops: float | None = None
) -> tuple[list[Any], float]:
    """All results of an attached rival, and its FLOPs: as a ratio to `dense_flops`, without these in total.

    Engines of this package count their own (`Trace`, held to the counter by a test): the first call of a
    shape measures costs on the side, which the counter would book as well.
    """
    workload, pictures, spent, dense = bench.workload(rows), [], 0.0, 0.0
    for batch in range(workload.num_batches):
        clock = FlopClock()
        known = attached.traced or attached.spent is not None
        watch = nullcontext() if known else watched(bench.transformer, clock)
        with attached.generation() as trace, watch:
            pictures += bench.make(workload, batch, attached.num_steps)
        if attached.traced:
            spent, dense = spent + trace.flops["spent"], dense + trace.flops["dense"]
        elif not known and not clock.calls:
            raise RuntimeError("no transformer call was seen: something replaced its forward during the run")
        spent += clock.flops
    ratio = attached.spent() if attached.spent is not None else spent / (dense or dense_flops or 1.0)
    return pictures[: len(bench.prompts)], ratio


def run_timed(bench: Bench, attached: Attached, workload: Any, batch: int) -> float:
    """Denoising seconds of one batch, after a single step to warm up."""
    with attached.generation():
        workload.run(batch, num_steps=1)
    clock = DenoisingClock(torch.device(bench.pipe.device))
    with attached.generation(), watched(bench.transformer, clock):
        workload.run(batch, num_steps=attached.num_steps)
    return clock.seconds
