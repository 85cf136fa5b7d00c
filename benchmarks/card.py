"""What a card shows: time against FLOPs, waits for the device, memory against the forecast, volume decoding.

    python -m benchmarks.card --out card.jsonl         # on a card: real sizes, about 5 minutes
    python -m benchmarks.card --small                  # anywhere: packaged models, to see that it runs
    python -m benchmarks.card --markdown card.jsonl    # tables for docs/speed.md

Each section builds its model on the device, with random weights at the published size, and has a limit of
its own in seconds: what does not fit into it is left out and named. One JSON line per finding. Bars, at
1024 px and above: time at a budget at most the share of evaluations + 0.02, and no wait for the device
inside a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import routers
from backbones import loading, registry
from backbones.hunyuan3d.surface import decode_hierarchical
from backbones.spec import GIB, CallSize
from backbones.weights import build_transformer
from routers.memory import peak_bytes
from routers.meta import meta_twin

BUDGETS = (0.4, 0.6, 0.8)
BAR = 0.02


@dataclass(frozen=True)
class Section:
    """A model at a size. seconds: the limit of the section."""

    name: str
    model: str
    size: CallSize
    steps: int
    seconds: float


REAL = (
    Section("qwen-1328", "qwen-image", CallSize(1, 1328, 1328, 64), 20, 110),
    Section("qwen-1024-batch-4", "qwen-image", CallSize(4, 1024, 1024, 64), 10, 90),
    Section("flux-1024", "flux-dev", CallSize(1, 1024, 1024, 512), 20, 60),
    Section("flux-512", "flux-dev", CallSize(1, 512, 512, 512), 20, 40),
    Section("hunyuan3d-2.1", "hunyuan3d-2.1", CallSize(2), 20, 60),
)
SMALL = (
    Section("qwen", "qwen-image-tiny", CallSize(1, 64, 64, 8), 5, 600),
    Section("flux", "flux-tiny", CallSize(1, 64, 64, 8), 5, 600),
    Section("hunyuan3d", "hunyuan3d-tiny", CallSize(2), 5, 600),
)


class Loop:
    """The least that a pipeline is: a transformer, a scheduler, and a loop over its times."""

    def __init__(self, transformer: Any, inputs: dict[str, Any], spec: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.inputs, self.spec = transformer, inputs, spec
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @torch.no_grad()
    def __call__(self, steps: int) -> torch.Tensor:
        """From noise to latents."""
        x = self.inputs[self.spec.sample]
        self.scheduler.set_timesteps(steps, device=x.device)
        for t in self.scheduler.timesteps:
            now = t.expand(len(x)).to(x.dtype) / 1000
            out = self.transformer(**{**self.inputs, self.spec.sample: x, self.spec.timestep: now})
            x = self.scheduler.step(out if isinstance(out, torch.Tensor) else out[0], t, x).prev_sample
        return x


def build(section: Section, device: torch.device, dtype: torch.dtype) -> Loop:
    """A model of random weights on the device, with inputs of the section's size."""
    backbone = registry.resolve(section.model)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = build_transformer(backbone).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    given = backbone.family.call_inputs(registry.component_configs(backbone), section.size)
    return Loop(transformer.to(device, dtype), _real(given, device, dtype), backbone.family.transformer)


def _real(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _real(each, device, dtype) for name, each in value.items()}
    if isinstance(value, torch.Tensor):
        return torch.randn(value.shape, device=device, dtype=dtype)
    return value


def wait(device: torch.device) -> None:
    """For all that is queued."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of so many runs."""
    taken = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


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


def measure(
    section: Section, device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[dict[str, Any]]:
    """Findings of one section, as they come."""
    end = time.perf_counter() + section.seconds
    loop = build(section, device, dtype)
    weights = sum(p.nbytes for p in loop.transformer.parameters())
    loop(2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dense = seconds(lambda: loop(section.steps), device, rounds)
    yield {"what": "dense", "seconds": dense, "per_call": dense / section.steps, "weights_gib": weights / GIB}
    for budget in (1.0, *BUDGETS):
        if time.perf_counter() > end:
            yield {"what": "left out", "budget": budget, "why": f"{section.seconds:.0f} s are over"}
            continue
        elastic = routers.attach(loop, budget=budget)
        try:
            loop(section.steps)
            with counted_waits(device) as waits:
                loop(section.steps)
            taken = seconds(lambda: loop(section.steps), device, rounds)
            share = elastic.trace.made / elastic.trace.of
        finally:
            elastic.detach()
        yield {
            "what": "plan", "budget": budget, "share": share, "seconds": taken, "ratio": taken / dense,
            "waits": sorted(set(waits)), "met": taken / dense <= share + BAR,
        }  # fmt: skip
    if device.type == "cuda":
        twin = meta_twin(loop.transformer).to(dtype)
        inputs = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in loop.inputs.items()}
        forecast = weights + peak_bytes(twin, **inputs)
        peak = torch.cuda.max_memory_allocated(device)
        yield {"what": "memory", "gib": peak / GIB, "forecast_gib": forecast / GIB}


def decoding(device: torch.device, resolution: int) -> dict[str, Any]:
    """The grid's own time of a field that costs next to nothing."""

    def field(points: torch.Tensor) -> torch.Tensor:
        x, y, z = points.unbind(1)
        ring = 0.18 - (((x * x + y * y).sqrt() - 0.55) ** 2 + z * z).sqrt()
        ball = 0.45 - ((x - 0.3) ** 2 + (y + 0.2) ** 2 + (z - 0.1) ** 2).sqrt()
        return 8 * torch.maximum(ring, ball)

    chunk = 8000 if device.type == "cpu" else 262144
    volume = decode_hierarchical(field, 1.01, resolution, chunk, device=device)
    taken = seconds(lambda: decode_hierarchical(field, 1.01, resolution, chunk, device=device), device, 3)
    return {
        "what": "decoding", "resolution": resolution, "seconds": taken, "evaluated": volume.evaluated_share,
    }  # fmt: skip


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table of docs/speed.md."""
    rows = ["| section | budget | evaluations | time | bar | met | waits |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        if line["what"] == "plan":
            met, waits = "yes" if line["met"] else "no", ", ".join(line["waits"]) or "none"
            rows.append(
                f"| {line['section']} | {line['budget']:g} | {line['share']:.3f} | {line['ratio']:.3f} | "
                f"<= {line['share'] + BAR:.3f} | {met} | {waits} |"
            )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print a JSON line per finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="the packaged models, on any device")
    parser.add_argument("--only", help="names of sections, with commas between")
    parser.add_argument("--out", type=Path, help="also write the lines here")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print the table of lines written before"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--octree", type=int, help="of the decoding; default 384, small 64")
    args = parser.parse_args(arguments)
    if args.markdown:
        print(markdown([json.loads(line) for line in args.markdown.read_text().splitlines()]))
        return 0
    device = loading.pick_device(args.device)
    if device.type == "cpu" and not args.small:
        parser.error("there is no card here; --small runs the packaged models on a CPU")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    names = args.only.split(",") if args.only else None
    out = args.out.open("w") if args.out else None

    def tell(section: str, found: dict[str, Any]) -> None:
        line = json.dumps({"section": section, "card": card, **found})
        print(line, flush=True)
        if out is not None:
            out.write(line + "\n")
            out.flush()

    for section in SMALL if args.small else REAL:
        if names is None or section.name in names:
            for found in measure(section, device, dtype, 1 if args.small else 3):
                tell(section.name, found)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if names is None or "decoding" in names:
        tell("decoding", decoding(device, args.octree or (64 if args.small else 384)))
    if out is not None:
        out.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
