"""The findings of `benchmarks.card`: each takes a Bench and yields lines."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import routers
from backbones import registry
from backbones.hunyuan3d.config import build as build_part
from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.hunyuan3d.surface import decode_hierarchical
from backbones.spec import GIB, Backbone, CallSize
from backbones.weights import build_transformer
from benchmarks.mixes import CostReader, mixed_rows
from benchmarks.overhead_models import twin
from routers.elastic import Elastic
from routers.memory import peak_bytes
from routers.meta import meta_twin
from routers.policy import CallInfo, FixedPolicy

BUDGETS = (0.4, 0.6, 0.8)
PLAN_SLACK, MIX_SLACK, OPEN_BAR = 0.02, 0.08, 1.01
DEVIATIONS = {"mix": 0.2, "independent mix": 1.0}
"""How far samples of a batch stray from a common plan."""
SHAPE_VAE: dict[str, Any] = {
    "num_latents": 4096, "embed_dim": 64, "width": 1024, "heads": 16, "num_decoder_layers": 16,
    "include_pi": False, "qkv_bias": False, "qk_norm": True,
}  # fmt: skip
"""Of Hunyuan3D 2.1, whose row names only what the transformer's calls need."""
CHUNKS = (8_000, 64_000, 256_000)
"""Points of one call of the shape decoder."""

Finding = dict[str, Any]


class Loop:
    """The least that a pipeline is: a transformer, a scheduler, and a loop over its times."""

    def __init__(self, transformer: Any, inputs: dict[str, Any], spec: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.inputs, self.spec = transformer, inputs, spec
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @torch.no_grad()
    def __call__(self, steps: int, waits: list[str] | None = None) -> torch.Tensor:
        """From noise to latents. waits: gets the source lines that wait for the device within the steps."""
        x = self.inputs[self.spec.sample]
        self.scheduler.set_timesteps(steps, device=x.device)
        self.scheduler.set_begin_index(0)  # as pipelines do
        with counted_waits(x.device) if waits is not None else nullcontext([]) as lines:
            for t in self.scheduler.timesteps:
                now = t.expand(len(x)).to(x.dtype) / 1000
                out = self.transformer(**{**self.inputs, self.spec.sample: x, self.spec.timestep: now})
                x = self.scheduler.step(out if isinstance(out, torch.Tensor) else out[0], t, x).prev_sample
        if waits is not None:
            waits += lines
        return x


@dataclass(frozen=True)
class Model:
    """A transformer of random weights and what it is a backbone of."""

    backbone: Backbone
    transformer: Any

    @property
    def weights_gib(self) -> float:
        """Of the parameters."""
        return sum(p.nbytes for p in self.transformer.parameters()) / GIB


def build(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """A model of random weights on the device, at its published size."""
    backbone = registry.resolve(name)
    torch.manual_seed(0)
    transformer = on_device(lambda: build_transformer(backbone), device, dtype)
    return Model(backbone, transformer)


def on_device(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A module that `make` builds, made where it will be and in its dtype."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return module.eval().requires_grad_(False).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Bench:
    """A model, the size of its calls and the length of a run. rounds: runs of a median."""

    model: Model
    size: CallSize
    steps: int
    device: torch.device
    dtype: torch.dtype
    rounds: int

    @property
    def label(self) -> str:
        """The size, to read."""
        sides = f"{self.size.width} x {self.size.height} px, " if self.size.width else ""
        return f"{sides}batch {self.size.rows}"

    def inputs(self) -> dict[str, Any]:
        """Arguments of one transformer call, random."""
        family, configs = self.model.backbone.family, registry.component_configs(self.model.backbone)
        given = family.call_inputs(configs, self.size)
        return {name: self._real(value) for name, value in given.items()}

    def _real(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._real(each) for name, each in value.items()}
        if isinstance(value, torch.Tensor):
            return torch.randn(value.shape, device=self.device, dtype=self.dtype)
        return value

    def loop(self) -> Loop:
        """A loop of its own on the transformer."""
        return Loop(self.model.transformer, self.inputs(), self.model.backbone.family.transformer)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """For all that is queued."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)

    def compare(self, dense: Callable[[], Any], other: Callable[[], Any]) -> Finding:
        """Medians of both, taking turns."""
        pairs = [(self.seconds(dense), self.seconds(other)) for _ in range(self.rounds)]
        base, taken = (statistics.median(column) for column in zip(*pairs, strict=True))
        return {"size": self.label, "dense": base, "seconds": taken, "ratio": taken / base}


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Source lines that waited for the device inside, as CUDA's debug mode tells; none elsewhere."""
    lines: list[str] = []
    if device.type != "cuda":
        yield lines
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines += [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]


def plans(bench: Bench) -> Iterator[Finding]:
    """Time of plans against the share of evaluations they make, and of a run that leaves nothing out."""
    dense, loop, steps = bench.loop(), bench.loop(), bench.steps
    first = bench.seconds(lambda: dense(1))
    dense(1)
    if bench.device.type == "cuda":
        yield {"what": "clock", "size": bench.label, "first_call": first, **events_and_wall(bench, dense)}
    common: list[str] = []
    dense(steps, common)
    for budget in (1.0, *BUDGETS):
        waits: list[str] = []
        elastic = routers.attach(loop, budget=budget)
        try:
            loop(steps, waits)
            found = bench.compare(lambda: dense(steps), lambda: loop(steps))
            share = elastic.trace.made / elastic.trace.of
        finally:
            elastic.detach()
        bar = OPEN_BAR if budget == 1 else share + PLAN_SLACK
        yield {
            "what": "plan", "name": f"plan {budget:g}", "budget": budget, "share": share, **found, "bar": bar,
            "waits": sorted(set(waits) - set(common)), "waits_of_dense": sorted(set(common)),
        }  # fmt: skip


def events_and_wall(bench: Bench, loop: Loop) -> Finding:
    """Seconds of a run by the device's events and by the wall clock, and until the host was done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    bench.wait()
    before = time.perf_counter()
    start.record()
    loop(bench.steps)
    end.record()
    host = time.perf_counter() - before
    bench.wait()
    wall = time.perf_counter() - before
    return {"steps": bench.steps, "events": start.elapsed_time(end) / 1000, "wall": wall, "host": host}


def memory(bench: Bench) -> Iterator[Finding]:
    """Peak of a dense and of an elastic run against the forecast."""
    if bench.device.type != "cuda":
        return
    loop = bench.loop()
    inputs = bench.model.backbone.family.call_inputs(
        registry.component_configs(bench.model.backbone), bench.size
    )
    twin_on_meta = meta_twin(bench.model.transformer).to(bench.dtype)
    forecast = peak_bytes(twin_on_meta, **in_dtype(inputs, bench.dtype))
    peaks = []
    for budget in (None, 0.6):
        elastic = None if budget is None else routers.attach(loop, budget=budget)
        torch.cuda.reset_peak_memory_stats(bench.device)
        loop(bench.steps)
        peaks.append(torch.cuda.max_memory_allocated(bench.device) / GIB)
        if elastic is not None:
            elastic.detach()
    yield {
        "what": "memory", "size": bench.label, "dense_gib": peaks[0], "elastic_gib": peaks[1],
        "forecast_gib": forecast / GIB + bench.model.weights_gib,
    }  # fmt: skip


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Tensors in dicts, cast."""
    if isinstance(value, dict):
        return {name: in_dtype(each, dtype) for name, each in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def mixes(bench: Bench) -> Iterator[Finding]:
    """A batch whose samples decide for themselves over blocks: skips, widths and reuses."""
    spec, steps, inputs = bench.model.backbone.family.transformer, bench.steps, bench.inputs()
    dense = bench.model.transformer
    elastic = Elastic(twin(dense), spec)

    def run(transformer: Any) -> None:
        for step in range(steps):
            now = torch.full_like(inputs[spec.timestep], 1 - step / steps)
            transformer(**{**inputs, spec.timestep: now})

    reader = CostReader()
    with elastic.scope(policy=reader, num_steps=1):
        elastic.transformer(**inputs)
    assert isinstance(reader.call, CallInfo)
    for name, deviation in DEVIATIONS.items():
        for budget in BUDGETS:
            plan = mixed_rows(reader.call, budget, steps, bench.size.rows, deviation)
            policy = FixedPolicy(plan)

            def decided(policy: FixedPolicy = policy) -> None:
                with elastic.scope(policy=policy, num_steps=steps):
                    run(elastic.transformer)

            with counted_waits(bench.device) as waits:
                decided()
            found = bench.compare(lambda: run(dense), decided)
            share = statistics.mean(elastic.trace.spent)
            yield {
                "what": "mix", "name": f"{name} {budget:g}", "budget": budget, "share": share, **found,
                "bar": share + MIX_SLACK if deviation < 1 else None, "waits": sorted(set(waits)),
            }  # fmt: skip


def compiled(bench: Bench) -> Iterator[Finding]:
    """Blocks compiled: against themselves in eager mode, and a plan against the compiled dense run."""
    loop, dense, steps = bench.loop(), bench.loop(), bench.steps
    eager = min(bench.seconds(lambda: dense(steps)) for _ in range(bench.rounds))
    bench.model.transformer.compile_repeated_blocks()
    first = bench.seconds(lambda: dense(1))
    dense(1)
    elastic = routers.attach(loop, budget=0.6)
    try:
        loop(steps)
        found = bench.compare(lambda: dense(steps), lambda: loop(steps))
        share = elastic.trace.made / elastic.trace.of
    finally:
        elastic.detach()
    yield {
        "what": "compile", "name": "plan 0.6, compiled", "share": share, **found, "bar": share + PLAN_SLACK,
        "eager": eager, "compiling": first,
    }  # fmt: skip


def offloaded(bench: Bench) -> Iterator[Finding]:
    """Blocks that wait in the host's memory: what is left out is not transferred either."""
    steps = min(bench.steps, 4)
    dense, loop = bench.loop(), bench.loop()
    resident = min(bench.seconds(lambda: dense(steps)) for _ in range(2))
    start = time.perf_counter()
    bench.model.transformer.enable_group_offload(
        onload_device=bench.device, offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1, use_stream=True, record_stream=True, non_blocking=True,
    )  # fmt: skip
    moved = time.perf_counter() - start
    dense(2)
    elastic = routers.attach(loop, budget=0.5)
    try:
        loop(steps)
        found = bench.compare(lambda: dense(steps), lambda: loop(steps))
        share = elastic.trace.made / elastic.trace.of
    finally:
        elastic.detach()
    yield {
        "what": "offload", "name": "plan 0.5, group offload", "share": share, **found,
        "bar": share + PLAN_SLACK, "resident": resident, "moved": moved,
    }  # fmt: skip


@torch.no_grad()
def field_queries(bench: Bench) -> Iterator[Finding]:
    """Points a second of the shape decoder, by points of a call."""
    configs = registry.component_configs(bench.model.backbone)
    section = configs["vae"]
    make = partial(build_part, "vae", section) if "target" in section else partial(ShapeVAE, **SHAPE_VAE)
    vae = on_device(make, bench.device, bench.dtype)
    latents = torch.randn(1, *vae.latent_shape, device=bench.device, dtype=bench.dtype)
    field = vae.field(vae(latents)[0])
    for chunk in CHUNKS if bench.device.type == "cuda" else CHUNKS[:1]:
        points = torch.rand(chunk, 3, device=bench.device) * 2 - 1
        field(points)
        taken = statistics.median(bench.seconds(lambda points=points: field(points)) for _ in range(3))  # type: ignore[misc]
        yield {"what": "field", "points": chunk, "seconds": taken, "points_per_second": chunk / taken}


def decoding(device: torch.device, resolution: int) -> Finding:
    """The grid's own time of a field that costs next to nothing."""

    def field(points: torch.Tensor) -> torch.Tensor:
        x, y, z = points.unbind(1)
        ring = 0.18 - (((x * x + y * y).sqrt() - 0.55) ** 2 + z * z).sqrt()
        ball = 0.45 - ((x - 0.3) ** 2 + (y + 0.2) ** 2 + (z - 0.1) ** 2).sqrt()
        return 8 * torch.maximum(ring, ball)

    def run() -> Any:
        return decode_hierarchical(
            field, 1.01, resolution, 8000 if device.type == "cpu" else 262144, device=device
        )

    volume, taken = run(), []
    for _ in range(3):
        start = time.perf_counter()
        run()  # ends on the host
        taken.append(time.perf_counter() - start)
    return {
        "what": "decoding", "resolution": resolution, "seconds": statistics.median(taken),
        "evaluated": volume.evaluated_share,
    }  # fmt: skip
