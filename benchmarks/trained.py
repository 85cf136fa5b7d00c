"""Trained routers beside plans and random skipping: `python -m benchmarks.trained BUNDLE`.

Held-out requests of `edit calibrate` (the model's calibration prompts backwards, other noise), one batch for
the dense model and everything else. Prints a table of the latent SNR to the dense latents in dB,
mean over samples with the range, and what was spent; then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import routers
from backbones import loading, registry
from backbones.spec import Placement
from backbones.workloads import PipelineWorkload
from benchmarks.mixes import CostReader, forced_mix
from edit_cli.generate.prompts import default_prompts, read_prompts
from routers.bundle import Bundle
from routers.calibrate.evaluate import latent_snr
from routers.elastic import Elastic
from routers.policy import FixedPolicy, Policy

BUDGETS = (0.9, 0.8, 0.7, 0.6)
METHODS = ("trained", "random skip", "packaged bundle", "no bundle")


def make_workload(model: str, rows: int, seed: int) -> PipelineWorkload:
    """One batch of held-out requests at the model's defaults."""
    backbone = registry.resolve(model)
    pipe = loading.load(backbone, Placement(device="cpu", dtype="auto"))
    pipe.set_progress_bar_config(disable=True)
    lines = [entry["prompt"] for entry in read_prompts(str(default_prompts(backbone)))][::-1]
    chosen, defaults = [lines[i % len(lines)] for i in range(rows)], backbone.defaults
    return PipelineWorkload(
        pipe, backbone, rows, defaults.steps, defaults.guidance, chosen, defaults.width, defaults.height,
        seed=seed,
    )  # fmt: skip


@contextmanager
def attached(workload: PipelineWorkload, bundle: Bundle | None, budget: float) -> Iterator[Any]:
    """The pipeline at a budget, by a bundle or without one: yields the trace."""
    elastic = routers.attach(workload.pipe, bundle, budget=budget, num_steps=workload.num_steps)
    try:
        with elastic.scope(samples=workload.rows) as trace:
            yield trace
    finally:
        elastic.detach()


@contextmanager
def forced(workload: PipelineWorkload, policy: Policy) -> Iterator[Any]:
    """The transformer under a policy: yields the trace."""
    elastic = Elastic(workload.pipe.transformer, workload.backbone.family.transformer)
    try:
        with elastic.scope(num_steps=workload.num_steps, samples=workload.rows, policy=policy) as trace:
            yield trace
    finally:
        elastic.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="made by edit calibrate --method train")
    parser.add_argument("--model", default="qwen-image-tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    asked = parser.parse_args(arguments)
    backbone = registry.resolve(asked.model)
    workload, trained = make_workload(asked.model, asked.rows, asked.seed), routers.load_bundle(asked.bundle)
    fitted = None if backbone.bundle is None else routers.load_bundle(backbone.bundle)
    methods = [name for name in asked.methods if name != "packaged bundle" or fitted is not None]
    with torch.no_grad():
        dense, reader = workload.run(0), CostReader()
        with forced(workload, reader):
            workload.run(0)
        assert reader.call is not None
        table = []
        for budget in BUDGETS:
            skips = FixedPolicy(forced_mix("skip", reader.call, budget, workload.num_steps))
            for name in methods:
                bundle = {"trained": trained, "packaged bundle": fitted}.get(name)
                skipping = name == "random skip"
                run = forced(workload, skips) if skipping else attached(workload, bundle, budget)
                with run as trace:
                    snr = latent_snr(workload.run(0), dense)
                row = {"budget": budget, "method": name, "spent": round(float(np.mean(trace.spent)), 4)}
                row |= {
                    "snr": round(float(np.mean(snr)), 2),
                    "low": round(min(snr), 2),
                    "high": round(max(snr), 2),
                }
                table.append(row | {"worst_spent": round(max(abs(s - budget) for s in trace.spent), 4)})
                spread = f"{row['snr']:5.1f} dB ({row['low']:.1f} to {row['high']:.1f})"
                print(f"{budget:.1f}  {name:15s} spent {row['spent']:.3f}  {spread}", flush=True)
    print(json.dumps({"rows": asked.rows, "bundle": trained.metadata["training"], "table": table}))


if __name__ == "__main__":
    main()
