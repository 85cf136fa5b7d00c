"""Trained routers beside other decisions of the same network, and beside plans:
`python -m benchmarks.trained [BUNDLE] [--pictures 256]`.

Held-out requests of `edit calibrate` (the model's calibration prompts backwards, other noise), one batch for
the dense model and everything else. Prints a table of the latent SNR to the original dense latents in dB,
mean over samples with the range, and what was spent; then one JSON line. With --pictures also what pictures
of common prompts are like as a whole: Fréchet distance of the classifier's features to the original dense
model's pictures of other seeds, and top-1, with the dense model's own beside it; and for each other way how
much farther than the trained routers it is, with an interval of 90 % over the same prompts drawn again.

All decisions of the trained network cost the same: each tells the trained policy other logits, and it opens
blocks and widths by them until the budget is spent.

Shapes: R rows, S steps, N blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import routers
from backbones import loading, registry
from backbones.spec import Placement
from backbones.workloads import PipelineWorkload
from benchmarks.mixes import CostReader, forced_mix
from edit_cli.generation.prompts import default_prompts, read_prompts
from routers.bundle import Bundle
from routers.calibrate.evaluate import latent_snr
from routers.elastic import Elastic
from routers.policy import CallInfo, Decision, FixedPolicy, Policy
from routers.spec import WIDTHS
from routers.trained.policy import TrainedPolicy

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
SAME_NETWORK = ("trained", "batch mean", "time only", "static", "random")
"""Decisions for each sample; for the batch's mean; for the step, whatever the sample; the same in all steps;
any."""
MIXES = {
    "random skip, untrained": "skip",
    "even widths, untrained": "width",
    "even reuse, untrained": "reuse",
}
"""Decisions without routers, spread over the run; what each saves by (`mixes.py`)."""
METHODS = (*SAME_NETWORK, *MIXES, "packaged bundle", "whole evaluations", "no bundle")
DRAWS, TAIL = 100, 5  # of the prompts, for an interval; percent left out at each end
DENSE = "dense"

Logits = NDArray[np.float32]


class Reader(TrainedPolicy):
    """The trained policy, which keeps what the routers said. seen: by step, of all rows [R, N, 5]."""

    def start(self, run: Any) -> None:
        """A new run begins."""
        super().start(run)
        self.seen: dict[int, list[Logits]] = getattr(self, "seen", {})

    def decide(self, call: CallInfo, logits: Logits | None) -> Decision:
        """As the trained policy."""
        if logits is not None:
            self.seen.setdefault(call.step, []).append(logits)
        return super().decide(call, logits)


class Told(TrainedPolicy):
    """The trained policy on other logits than the routers'. by_step: [N, 5] for all rows; None: random. The
    first call of a run has none, unless the profile says how it begins.
    """

    def tell(self, by_step: dict[int, Logits] | None) -> Told:
        """What to say from now on."""
        self.by_step, self.random = by_step, np.random.default_rng(0)
        return self

    def decide(self, call: CallInfo, logits: Logits | None) -> Decision:
        """As the trained policy, on what it was told."""
        shape = call.rows, len(call.costs), 1 + len(WIDTHS)
        decides = logits is not None or self.profile.first is not None
        if decides and self.by_step is None:
            logits = self.random.normal(size=shape).astype(np.float32)
        elif decides and call.step in self.by_step:
            logits = np.broadcast_to(self.by_step[call.step], shape)
        return super().decide(call, logits)


def policies(workload: PipelineWorkload, bundle: Bundle, budget: float) -> dict[str, Policy | None]:
    """Decisions of the same network; time-only and static ones are averages over this workload."""
    assert bundle.trained is not None
    made = bundle.trained.profile, bundle.trained.trend
    reader = Reader(*made)
    with attached(workload, bundle, budget, reader):
        workload.run(0)
    means = {step: np.concatenate(seen).mean(axis=0) for step, seen in reader.seen.items()}
    always = dict.fromkeys([0, *means], np.mean(list(means.values()), axis=0))
    return {
        "trained": None,
        "batch mean": bundle.policy(batch_mean=True),
        "time only": Told(*made).tell(means),
        "static": Told(*made).tell(always),
        "random": Told(*made).tell(None),
    }


def make_workload(model: str, rows: int, seed: int, prompts: Sequence[str] | None = None) -> PipelineWorkload:
    """One batch of held-out requests at the model's defaults, or as many as there are prompts."""
    backbone = registry.resolve(model)
    pipe = loading.load(backbone, Placement(device="cpu", dtype="auto"))
    pipe.set_progress_bar_config(disable=True)
    lines = [entry["prompt"] for entry in read_prompts(str(default_prompts(backbone)))][::-1]
    chosen, defaults = prompts or [lines[i % len(lines)] for i in range(rows)], backbone.defaults
    return PipelineWorkload(
        pipe, backbone, rows, defaults.steps, defaults.guidance, chosen, defaults.width, defaults.height,
        seed=seed,
    )  # fmt: skip


@contextmanager
def attached(
    workload: PipelineWorkload, bundle: Bundle | None, budget: float, policy: Policy | None = None
) -> Iterator[Any]:
    """The pipeline at a budget, by a bundle or without one: yields the trace."""
    elastic = routers.attach(workload.pipe, bundle, budget=budget, num_steps=workload.num_steps)
    try:
        wishes = {} if policy is None else {"policy": policy}
        with elastic.scope(samples=workload.rows, **wishes) as trace:
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


class Judge:
    """What pictures of the common prompts are like as a whole, beside the original dense model's."""

    def __init__(self, model: str, pictures: int, rows: int) -> None:
        from backbones.tiny.recipes.captions import common_prompts
        from backbones.tiny.recipes.evaluate import concept_of
        from benchmarks.classifier import load_classifier

        prompts = [common_prompts()[i % 100] for i in range(pictures)]
        names, self.classifier = concept_of(), load_classifier()
        self.labels = [names[noun.removeprefix("ear of ")] for _, noun in prompts]
        self.workload = make_workload(model, rows, 20_000, [prompt for prompt, _ in prompts])
        self.real = self._features(make_workload(model, rows, 30_000, [p for p, _ in prompts]))
        self.seen: dict[str, Any] = {}

    def _features(self, workload: PipelineWorkload) -> Any:
        from backbones.tiny.recipes.frechet import features

        made = [
            np.asarray(x) for b in range(workload.num_batches) for x in workload.run(b, output_type="pil")
        ]
        self.made = np.stack(made)[: len(self.labels)]
        return features(self.classifier, self.made)

    def scores(self, name: str) -> dict[str, float]:
        """Of the pipeline as it is now."""
        from backbones.tiny.recipes.frechet import frechet_distance

        self.seen[name] = self._features(self.workload)
        distance = frechet_distance(self.seen[name], self.real)
        guesses = self.classifier.top_k(list(self.made), 1)
        hits = [guess[0] == label for guess, label in zip(guesses, self.labels, strict=True)]
        return {"frechet": round(distance, 2), "top1": round(float(np.mean(hits)), 3)}

    def farther(self, name: str, than: str) -> dict[str, list[float]]:
        """How much farther from the dense model's pictures one way's are than another's: an interval."""
        from backbones.tiny.recipes.frechet import frechet_distance

        random, differences = np.random.default_rng(0), []
        for _ in range(DRAWS):
            rows = random.integers(len(self.labels), size=len(self.labels))
            one, other = (frechet_distance(self.seen[way][rows], self.real) for way in (name, than))
            differences.append(one - other)
        ends = np.percentile(differences, [TAIL, 100 - TAIL])
        return {"farther": [round(float(end), 2) for end in ends]}


class Ways:
    """All that is compared at one budget. mixes: decisions without routers."""

    def __init__(self, trained: Bundle | None, fitted: Bundle | None, budget: float) -> None:
        self.budget = budget
        self.bundles = dict.fromkeys(SAME_NETWORK, trained)
        if fitted is not None:  # "whole evaluations": without its narrow ones
            self.bundles |= {"packaged bundle": fitted, "whole evaluations": replace(fitted, narrow={})}
        self.mixes: dict[str, Policy] = {}
        self.same: dict[str, Policy | None] = {}

    def read(self, told: PipelineWorkload) -> Ways:
        """What blocks cost and what routers say, on requests that nothing is judged by."""
        reader = CostReader()
        with forced(told, reader):
            told.run(0)
        assert reader.call is not None
        self.mixes = {
            name: FixedPolicy(forced_mix(family, reader.call, self.budget, told.num_steps))
            for name, family in MIXES.items()
        }
        trained = self.bundles[SAME_NETWORK[0]]
        if trained is not None:
            self.same = policies(told, trained, self.budget)
        return self

    def run(self, name: str, workload: PipelineWorkload) -> AbstractContextManager[Any]:
        """The pipeline under one of `METHODS`: yields the trace."""
        if name in MIXES:
            return forced(workload, self.mixes[name])
        return attached(workload, self.bundles.get(name), self.budget, self.same.get(name))


def compare(
    ways: Ways, name: str, workload: PipelineWorkload, dense: torch.Tensor, judge: Judge | None
) -> dict[str, Any]:
    """A row of the table. dense: latents of the original model."""
    with ways.run(name, workload) as trace:
        snr = latent_snr(workload.run(0), dense)
    row = {
        "budget": ways.budget,
        "method": name,
        "spent": round(float(np.mean(trace.spent)), 4),
        "worst_spent": round(max(abs(s - ways.budget) for s in trace.spent), 4),
        "snr": round(float(np.mean(snr)), 2),
        "low": round(min(snr), 2),
        "high": round(max(snr), 2),
    }
    if judge is not None:
        with ways.run(name, judge.workload):
            row |= judge.scores(name)
        if name != SAME_NETWORK[0] and SAME_NETWORK[0] in judge.seen:
            row |= judge.farther(name, SAME_NETWORK[0])
    whole = f"  Fréchet {row['frechet']:.1f}, top-1 {row['top1']:.2f}" if judge else ""
    whole += " ({:+.1f} to {:+.1f})".format(*row["farther"]) if "farther" in row else ""
    spread = f"{row['snr']:5.1f} dB ({row['low']:.1f} to {row['high']:.1f})"
    print(f"{ways.budget:.2f}  {name:23s} spent {row['spent']:.3f}  {spread}{whole}", flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", help="made by edit calibrate --method train; none: plans alone")
    parser.add_argument("--model", default="qwen-image-tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--pictures", type=int, default=0, help="of common prompts; 0: none are judged")
    asked = parser.parse_args(arguments)
    backbone = registry.resolve(asked.model)
    workload = make_workload(asked.model, asked.rows, asked.seed)
    trained = None if asked.bundle is None else routers.load_bundle(asked.bundle)
    told = make_workload(asked.model, asked.rows, 0)
    fitted = None if backbone.bundle is None else routers.load_bundle(backbone.bundle)
    missing = {*(SAME_NETWORK if trained is None else ())}
    missing |= {*(("packaged bundle", "whole evaluations") if fitted is None else ())}
    methods = [name for name in asked.methods if name not in missing]
    table: list[dict[str, Any]] = []
    with torch.no_grad():
        dense = workload.run(0)
        judge = Judge(asked.model, asked.pictures, asked.rows) if asked.pictures else None
        if judge is not None:
            table.append({"budget": 1.0, "method": DENSE, **judge.scores(DENSE)})
            print(table[0], flush=True)
        for budget in asked.budgets:
            ways = Ways(trained, fitted, budget).read(told)
            table += [compare(ways, name, workload, dense, judge) for name in methods]
    training = None if trained is None else trained.metadata.get("training")
    print(json.dumps({"rows": asked.rows, "bundle": training, "table": table}))


if __name__ == "__main__":
    main()
