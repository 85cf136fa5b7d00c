"""A loaded pipeline with its routers: open once, generate many batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from backbones import loading, registry
from backbones.solvers import check_solver, solver
from backbones.spec import Backbone
from edit_cli.errors import EditError, bad_input, memory_errors
from edit_cli.generate import routers as choices
from edit_cli.generate.clock import StageClock
from edit_cli.generate.pictures import open_rgb
from edit_cli.generate.plan import Job, Plan
from routers.attachment import attach
from routers.bundle import load_bundle
from routers.elastic import Elastic
from routers.paper import checkpoint as release
from routers.paper import policy as release_policy


@dataclass
class Batch:
    """What one pipeline call gave: pictures in job order; trace None for a run with nothing attached."""

    jobs: tuple[Job, ...]
    pictures: list[Image.Image]
    trace: Any = None


@dataclass(frozen=True)
class RouterSource:
    """Routers as read from disk, before the model is. Both None: dense.

    bundle: a routers.Bundle. release: path of a checkpoint in the paper's layout.
    """

    bundle: Any = None
    release: Path | None = None

    @property
    def digest(self) -> str | None:
        """Hash of the routers' file; None: dense."""
        if self.release is not None:
            return loading.fingerprint(self.release)
        return None if self.bundle is None else str(self.bundle.digest)

    @classmethod
    def read(cls, path: Path | None) -> RouterSource:
        """Raises EditError for anything that is neither a bundle nor a released checkpoint."""
        if path is None:
            return cls()
        if path.is_file() and path.suffix not in (".safetensors", ".json"):
            raise EditError(
                f"--routers {str(path)!r} is no .safetensors file, and other formats are not loaded; "
                "give a bundle folder, a .safetensors file, or none"
            )
        with bad_input():
            if release.is_release_file(path):
                return cls(release=path)
            return cls(bundle=load_bundle(path))


@dataclass
class Session:
    """A pipeline on its device. elastic None: dense, nothing attached.

    force: accept a bundle that was fitted on other weights of the same architecture.
    """

    backbone: Backbone
    pipe: Any
    clock: StageClock
    source: RouterSource
    force: bool = False
    elastic: Any = None
    notes: list[str] = field(default_factory=list)
    _release_routers: Any = None
    _image_pipe: Any = None

    @classmethod
    def open(cls, plan: Plan, source: RouterSource, clock: StageClock) -> Session:
        """Load everything the plan names. Raises EditError for input that cannot be loaded."""
        release_routers, transformer, notes = None, None, []
        if source.release is not None and plan.backbone.file is not None:
            raise EditError(
                f"--routers {str(source.release)!r} brings its own transformer and so does --model "
                f"{str(plan.backbone.file.path)!r}; give the base model's folder as --model"
            )
        with bad_input(), memory_errors("while loading the model"):
            if source.release is not None:
                transformer, release_routers = _load_release(plan, source.release)
                notes.append(
                    "routers in the paper's released layout: exact mode with fixed compute; "
                    "the MLP activation was switched to x * sigmoid(1.702 x)"
                )
            pipe = loading.load(plan.backbone, plan.placement, transformer)
            for name in filter(None, {job.solver for job in plan.jobs}):
                check_solver(pipe, name)
            if source.release is not None:
                release.use_sigmoid_gelu(pipe.transformer, plan.backbone.family.transformer)
        return cls(
            plan.backbone, pipe, clock, source, plan.force, notes=notes, _release_routers=release_routers
        )

    def attach(self) -> None:
        """Put the blocks under control of the routers; without routers, open and only counted."""
        with bad_input():
            if self._release_routers is not None:
                transformer = self.pipe.transformer
                policy = functools.partial(release_policy.ReleasePolicy, dtype=transformer.dtype)
                spec = self.backbone.family.transformer
                self.elastic = Elastic(transformer, spec, policy, list(self._release_routers))
            else:
                self.elastic = attach(
                    self.pipe.transformer,
                    self.source.bundle,
                    spec=self.backbone.family.transformer,
                    force=self.force,
                )

    def detach(self) -> None:
        """Leave a clean model. Safe to call twice."""
        if self.elastic is not None:
            self.elastic.detach()
            self.elastic = None

    def run(self, jobs: Sequence[Job], on_step: Callable[[], None] | None = None) -> Batch:
        """One pipeline call for jobs of one group. Raises RunError when memory runs out."""
        first = jobs[0]
        pipe, arguments = self._pipe_for(first), self._arguments(jobs)
        steps = denoising_steps(first)

        def after_step(_pipe: Any, _step: int, _time: Any, _tensors: Any) -> dict[str, Any]:
            if on_step is not None:
                on_step()
            return {}

        if self.elastic is None:
            scope: Any = nullcontext()
        else:
            scope = self.elastic.scope(budget=None if self.source.release else first.budget, num_steps=steps)
        stepping = nullcontext() if first.solver is None else solver(pipe, first.solver)
        size = f"at {first.width}x{first.height}, batch {len(jobs)}"
        with (
            memory_errors(size), loading.quiet_libraries(), self.clock.pipeline_call(pipe), stepping,
            scope as trace,
        ):  # fmt: skip
            pictures = pipe(**arguments, callback_on_step_end=after_step).images
        return Batch(tuple(jobs), pictures, trace)

    def warm_up(self, job: Job) -> None:
        """One denoising step whose result and time are thrown away, so that comparisons start warm."""
        clock, self.clock = self.clock, StageClock()
        try:
            self.run([replace(job, steps=1, image=None, strength=None)])
        finally:
            self.clock = clock

    def _pipe_for(self, job: Job) -> Any:
        if job.image is None:
            return self.pipe
        if self._image_pipe is None:
            self._image_pipe = loading.image_to_image(self.pipe, self.backbone)
        return self._image_pipe

    def _arguments(self, jobs: Sequence[Job]) -> dict[str, Any]:
        family, first = self.backbone.family, jobs[0]
        arguments: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            family.guidance_argument: first.guidance,
            "num_inference_steps": first.steps,
            "width": first.width,
            "height": first.height,
            # one CPU generator per picture: the same noise in any batch and on any device
            "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        }
        if self.backbone.branches(first.guidance) > 1:
            arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
        if self.backbone.defaults.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.backbone.defaults.max_sequence_length
        if first.image is not None:
            arguments["image"] = [open_rgb(first.image)] * len(jobs)
            arguments["strength"] = first.strength
        return arguments


def denoising_steps(job: Job) -> int:
    """Steps the sampler really takes: image-to-image starts part of the way (as diffusers rounds it)."""
    if job.strength is None:
        return job.steps
    taken = job.steps - int(max(job.steps - min(job.steps * job.strength, job.steps), 0))
    if taken < 1:
        raise EditError(
            f"--strength {job.strength:g} of {job.steps} steps leaves no step to run; raise either"
        )
    return taken


def settle_budgets(plan: Plan, source: RouterSource) -> Plan:
    """Fill in the budget the routers recommend, and check asked ones against what they serve."""
    if source.release is not None:
        if any(job.budget is not None for job in plan.jobs):
            raise EditError(
                "--budget does not apply to a checkpoint in the paper's released layout: "
                "its compute is fixed; leave --budget out, or fit a bundle with: edit calibrate"
            )
        return plan
    return replace(plan, jobs=choices.settle_budgets(plan.jobs, source.bundle))


def fit_notes(plan: Plan, source: RouterSource) -> list[str]:
    """Plain words where a request is far from what the routers were fitted for."""
    if source.bundle is None or all(job.budget == 1.0 for job in plan.jobs):
        return []
    fitted = source.bundle.num_steps
    far = sorted({job.steps for job in plan.jobs if not fitted / 2 <= job.steps <= fitted * 2})
    if not far:
        return []
    return [f"these routers were fitted at {fitted} steps; {far[0]} is far from that, quality may be lower"]


def _load_release(plan: Plan, file: Path) -> tuple[Any, Any]:
    """The fine-tuned transformer of a released checkpoint, and its routers."""
    import diffusers

    spec = plan.backbone.family.transformer
    config = dict(registry.component_configs(plan.backbone)["transformer"])
    transformer_class = getattr(diffusers, spec.transformer_class)
    dtype = loading.pick_dtype(
        plan.placement.dtype, plan.backbone, loading.pick_device(plan.placement.device)
    )
    loaded: tuple[Any, Any] = release.load_release(
        file, lambda: transformer_class.from_config(config), spec, dtype=dtype
    )
    return loaded
