"""What bfloat16 costs a plan, beside what it costs the dense run: `python -m benchmarks.rounding`.

    python -m benchmarks.rounding                          # the packaged models at budget 0.6
    python -m benchmarks.rounding flux-tiny --budget 0.85 --rows 2

Latent SNR in dB, median over held-out samples: of the plan to the dense run, both in float32 and both in
bfloat16; of the dense run in bfloat16 to itself in float32; and of the dense run, and of the plan, to the
same run in bfloat16 with every state nudged at random by as much as rounding has moved it. A run repeats
itself no better than that, so it is what rounding alone puts between two runs that do not round alike.
`expected` adds the plan's error in float32 and the rounding of both runs (half of each nudged run's
distance, which is that of two runs). Where the plan in bfloat16 is as near as that, it is rounding that
keeps it from the dense run, and not its weights. The last line of each model is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import routers
from edit_cli.generation.result import StageClock
from edit_cli.generation.routers import settle
from edit_cli.generation.samples import held_out, medium_of, sample_plan
from edit_cli.generation.session import Session
from edit_cli.request import Request
from routers.calibrate.evaluate import latent_snr

MODELS = ("qwen-image-tiny", "flux-tiny", "hunyuan3d-tiny")
HALF = torch.bfloat16


@contextmanager
def nudged(scheduler: Any, seed: int) -> Iterator[None]:
    """Inside, what a scheduler's steps give is moved by up to half a bfloat16's spacing, either way."""
    step, drawn = scheduler.step, torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        share = torch.rand(x.shape, generator=drawn).to(x.device) - 0.5
        return (x.float() * (1 + torch.finfo(HALF).eps * share)).to(x.dtype)

    def nudge(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        if isinstance(out, Tensor):
            return moved(out)
        if isinstance(out, tuple):
            return (moved(out[0]), *out[1:])
        out.prev_sample = moved(out.prev_sample)
        return out

    scheduler.step = nudge
    try:
        yield
    finally:
        del scheduler.step


def runs(model: str, dtype: str, budget: float, rows: int, nudges: bool) -> dict[str, Tensor]:
    """Latents [rows, ...] of the dense run and of the plan, and of both nudged."""
    request = Request({"model": model, "dtype": dtype})
    planned = sample_plan(request, medium_of(request))
    planned = replace(planned, jobs=held_out(planned.jobs, rows, seed=0), batch_size=rows)
    plan, source = settle(replace(planned, jobs=tuple(replace(job, budget=1.0) for job in planned.jobs)))
    session = Session.open(plan, source, StageClock(plan.medium.stages))
    workload = plan.medium.workload(session, plan.jobs, rows)
    made: dict[str, Tensor] = {}
    for name in ("dense", "plan"):
        elastic = None
        if name == "plan":
            elastic = routers.attach(session.pipe, source.bundle, budget=budget, num_steps=workload.num_steps)
        for moving in (False, True) if nudges else (False,):
            scheduler = session.pipe.scheduler
            with torch.no_grad(), nudged(scheduler, 1) if moving else nullcontext():
                made[name + " nudged" * moving] = workload.run(0)
        if elastic is not None:
            elastic.detach()
    return made


def db(latents: Tensor, to: Tensor) -> float:
    """Median over rows."""
    return statistics.median(latent_snr(latents, to))


def measure(model: str, budget: float, rows: int) -> dict[str, Any]:
    """All figures of one model."""
    whole, half = (runs(model, dtype, budget, rows, dtype == "bf16") for dtype in ("fp32", "bf16"))
    found = {
        "plan, fp32": db(whole["plan"], whole["dense"]),
        "plan, bf16": db(half["plan"], half["dense"]),
        "dense bf16 to fp32": db(half["dense"], whole["dense"]),
        "dense nudged": db(half["dense nudged"], half["dense"]),
        "plan nudged": db(half["plan nudged"], half["plan"]),
    }
    error, *rounding = (10 ** (-found[name] / 10) for name in ("plan, fp32", "dense nudged", "plan nudged"))
    return {
        "model": model,
        "budget": budget,
        **found,
        "expected": -10 * math.log10(error + sum(rounding) / 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table row and a JSON object for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=4, help="held-out samples, in one batch")
    args = parser.parse_args(arguments)
    for model in args.models:
        found = measure(model, args.budget, args.rows)
        values = [f"{name} {value:.1f}" for name, value in found.items() if name not in ("model", "budget")]
        print(f"{model}: {', '.join(values)} dB")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
