"""A loaded image-to-mesh pipeline with its routers, and one mesh made with it, stage by stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from PIL import Image

from backbones import loading
from backbones.hunyuan3d.mesh import NoSurfaceError
from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline
from backbones.spec import GIB, Backbone, Placement
from edit_cli.errors import RunError, bad_input, memory_errors
from edit_cli.generate.clock import StageClock
from edit_cli.generate.mesh_plan import MeshJob
from routers.attachment import attach
from routers.bundle import Bundle

STAGES = ("load", "condition", "denoise", "decode", "extract", "clean")
"""condition: pictures to embeddings. decode: latents to a sampled volume. extract: volume to triangles."""
DENSE_BYTES, SPARSE_BYTES = 24, 16
"""Peak bytes a grid point costs: node numbers, values and the copies marching cubes makes."""
SMALLER = "a smaller --octree-resolution, --dtype fp16, or on a GPU --offload model"
"""What to try when memory runs out."""

MESH_LIBRARIES = ("skimage.measure", "trimesh", "trimesh.graph", "fast_simplification")

OnStep = Callable[[int, int], None]


@dataclass
class Made:
    """A mesh (trimesh), its volume, and the trace of its denoising (None: nothing attached)."""

    mesh: Any
    volume: Any
    trace: Any = None


@dataclass
class MeshSession:
    """A pipeline on its device. elastic None: dense, nothing attached."""

    backbone: Backbone
    pipe: Hunyuan3DPipeline
    clock: StageClock
    bundle: Bundle | None = None
    force: bool = False
    elastic: Any = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        placement: Placement,
        bundle: Bundle | None,
        force: bool,
        clock: StageClock,
    ) -> MeshSession:
        """Load the model. Raises EditError for input that cannot be loaded."""
        with bad_input():
            for library in MESH_LIBRARIES:  # their import is not what extraction costs
                importlib.import_module(library)
            with memory_errors("while loading the model", SMALLER):
                pipe = loading.load(backbone, placement)
        return cls(backbone, pipe, clock, bundle, force)

    def attach(self) -> None:
        """Put the blocks under control of the routers; without a bundle, open and only counted."""
        with bad_input():
            spec = self.backbone.family.transformer
            self.elastic = attach(self.pipe.transformer, self.bundle, spec=spec, force=self.force)

    def detach(self) -> None:
        """Leave a clean model. Safe to call twice."""
        if self.elastic is not None:
            self.elastic.detach()
            self.elastic = None

    def condition(self, pictures: Sequence[Image.Image], views: Sequence[str]) -> dict[str, Any]:
        """Embeddings of one picture, or of the named views of one object."""
        request: Any = dict(zip(views, pictures, strict=True)) if views else pictures[0]
        with bad_input(), self.clock.stage("condition", self.pipe.device.type):
            return self.pipe.prepare(request)

    def make(self, job: MeshJob, contexts: dict[str, Any], on_step: OnStep | None = None) -> Made:
        """Denoise, decode, extract, clean. Raises RunError without a surface or memory."""
        latents, trace = self.denoise(job, contexts, job.steps, on_step)
        with self.clock.stage("decode", self.pipe.device.type):
            volume = self.decode(job, latents)
        with self.clock.stage("extract"):
            try:
                mesh = self.pipe.extract(volume)
            except NoSurfaceError as error:
                # the level is no option here: what helps is another seed, more steps or another picture
                reason = str(error).split(";")[0]
                raise RunError(
                    f"{job.images[0]}: {reason}; try another --seed, more --steps or another picture"
                ) from error
        with self.clock.stage("clean"):
            mesh = self.pipe.clean(mesh, job.faces)
        return Made(mesh, volume, trace)

    def denoise(
        self, job: MeshJob, contexts: dict[str, Any], steps: int, on_step: OnStep | None = None
    ) -> tuple[Any, Any]:
        """Latents of a job and the trace."""
        noise = self.pipe.noise(1, torch.Generator("cpu").manual_seed(job.seed))
        guidance = job.guidance
        if self.backbone.guided and guidance <= 1:
            guidance = -1.0  # the pipeline's word for no unconditional rows
        scope: Any = nullcontext()
        if self.elastic is not None:
            scope = self.elastic.scope(budget=job.budget, num_steps=steps, samples=1)

        def after_step(done: int, total: int, _latents: Any) -> None:
            if on_step is not None:
                on_step(done, total)

        with memory_errors("while denoising", SMALLER), self.clock.stage("denoise", self.pipe.device.type):  # noqa: SIM117
            with scope as trace:
                latents = self.pipe.denoise(contexts, noise, steps, guidance, after_step)
        return latents, trace

    def decode(self, job: MeshJob, latents: Any) -> Any:
        """The volume: hierarchical unless asked otherwise, or unless a dense grid does not fit in memory."""
        method = "hierarchical" if job.decode == "auto" else job.decode
        points, free = (job.octree_resolution + 1) ** 3, available_bytes()
        if method == "dense" and points * DENSE_BYTES > free:
            method = "hierarchical"
            self._note_no_room(job, points * DENSE_BYTES, free)
        if points * SPARSE_BYTES > free:
            fits = max(8, int((free / SPARSE_BYTES) ** (1 / 3)) - 1)
            needed = points * SPARSE_BYTES / GIB
            raise RunError(
                f"--octree-resolution {job.octree_resolution} needs about {needed:.1f} GiB of memory "
                f"and {free / GIB:.1f} GiB are free; at most {fits} fits"
            )
        try:
            return self._decode(job, latents, method)
        except RunError:
            if method != "dense":
                raise
            self._note_no_room(job, points * DENSE_BYTES, available_bytes())
            return self._decode(job, latents, "hierarchical")

    def _decode(self, job: MeshJob, latents: Any, method: str) -> Any:
        with memory_errors(f"at --octree-resolution {job.octree_resolution}", SMALLER):
            try:
                return self.pipe.decode(latents, job.octree_resolution, method=method)[0]
            except ValueError as error:  # NaN in the field
                raise RunError(str(error)) from error

    def _note_no_room(self, job: MeshJob, needed: int, free: int) -> None:
        note = (
            f"too little memory for a dense grid of {job.octree_resolution} cells per axis "
            f"({needed / GIB:.1f} GiB, {free / GIB:.1f} GiB free): decoded hierarchically"
        )
        if note not in self.notes:
            self.notes.append(note)


def available_bytes() -> int:
    """Main memory that can be used without swapping."""
    return int(psutil.virtual_memory().available)
