"""Mesh models in the comparison: requests are pictures, results are fields and their surfaces.

IoU and Chamfer distance to the dense mesh are those of `edit generate-3d --compare`. Rivals that know only
the blocks of diffusers say so; solvers, whole-step reuse and random skipping apply as they are.

Shapes: P pictures, L tokens, C latent channels, S and D context tokens and width.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import routers
from backbones import loading, registry
from backbones.hunyuan3d.mesh import NoSurfaceError
from backbones.spec import Placement
from backbones.workloads import MeshWorkload, embed
from benchmarks.bench import Bench
from edit_cli.errors import EditError
from edit_cli.export.folder import sha256
from edit_cli.generation.closeness import compare_meshes
from edit_cli.generation.cutout import read_object
from edit_cli.generation.samples import OBJECTS, model_pictures, picture_files

CALIBRATION_PICTURES = 4
"""Pictures on which a rival may fit itself."""
NOTHING = 1.0
"""Chamfer distance, as a share of the box, where only one of two fields has a surface."""


@dataclass
class Shape:
    """A result. latents: [L, C]. volume: its sampled field. mesh: its surface, None where there is none."""

    latents: Tensor
    volume: Any
    mesh: Any


@dataclass
class MeshBench(Bench):
    """A mesh pipeline and its pictures. prompts: names of the pictures. contexts: name -> [P, S, D].

    grid: cells per side of the decoded fields.
    """

    contexts: dict[str, Tensor] = field(default_factory=dict)
    grid: int = 64
    score = "iou"
    things = "pictures"

    def workload(self, rows: int, prompts: list[str] | None = None) -> MeshWorkload:
        """The requests in batches of `rows`. prompts: the first of them, with noise of their own."""
        samples, seed = len(self.prompts), self.seed
        if prompts is not None:
            samples, seed = len(prompts), seed + samples
        return MeshWorkload(
            self.pipe, self.backbone, rows, self.num_steps, self.guidance, self.contexts, samples, seed=seed
        )

    def make(self, workload: Any, batch: int, num_steps: int) -> list[Shape]:
        """The shapes of one batch; decoding is no part of what is compared."""
        return [self.shape(row) for row in workload.run(batch, num_steps=num_steps)]

    def shape(self, latents: Tensor) -> Shape:
        """Decode one row [L, C]."""
        volume = self.pipe.decode(latents[None], self.grid)[0]
        try:
            mesh = self.pipe.extract(volume)
        except NoSurfaceError:
            mesh = None
        return Shape(latents, volume, mesh)

    def pack(self, results: list[Any]) -> NDArray[Any]:
        """Latents [P, L, C] float32: decoding them again gives the same shapes."""
        return np.stack([shape.latents.float().cpu().numpy() for shape in results])

    def unpack(self, array: NDArray[Any]) -> list[Shape]:
        """What `pack` packed."""
        return [self.shape(torch.from_numpy(row)) for row in array]

    def judge(self, results: list[Any], known: dict[str, list[Any]]) -> dict[str, list[float]]:
        """IoU and Chamfer distance of every shape to the `known` "dense" and "truth"."""
        found: dict[str, list[float]] = {}
        for suffix, name in (("", "dense"), ("_truth", "truth")):
            rows = [distances(shape, other) for shape, other in zip(results, known[name], strict=True)]
            for score in ("iou", "chamfer"):
                found[score + suffix] = [row[score] for row in rows]
        return found

    def judge_all(self, results: list[Any], known: dict[str, list[Any]]) -> dict[str, float]:
        """Nothing: there is no classifier of shapes."""
        return {}


def distances(shape: Shape, other: Shape) -> dict[str, float]:
    """IoU and Chamfer distance; two fields without a surface are equal, one without is as far as can be."""
    if shape.mesh is None or other.mesh is None:
        inside, truly = shape.volume.logits > 0, other.volume.logits > 0
        union = int((inside | truly).sum())
        alike = shape.mesh is None and other.mesh is None
        return {
            "iou": float((inside & truly).sum()) / union if union else 1.0,
            "chamfer": 0.0 if alike else NOTHING,
        }
    return compare_meshes(shape.mesh, other.mesh, shape.volume, other.volume)


def open_mesh_bench(args: argparse.Namespace) -> MeshBench:
    """Load what the command line names. Raises ValueError, one line, for anything that cannot be loaded."""
    backbone = registry.resolve(args.model, makes="mesh")
    try:
        files = picture_files("--images", args.images, OBJECTS) if args.images else model_pictures(backbone)
        pictures = {sha256(Path(file)): read_object(file, "auto")[0] for file in files}
        pipe = loading.load(backbone, Placement())
    except EditError as error:
        raise ValueError(str(error)) from error
    path = args.routers or backbone.bundle
    bundle = routers.load_bundle(path) if path is not None else None
    if bundle is not None:
        routers.attach(pipe, bundle, force=args.force).detach()
    names, contexts = list(pictures), embed(pipe, list(pictures.values()))
    prompts = [names[i % len(names)] for i in range(args.count)]  # pictures come round with other noise
    defaults = backbone.defaults
    return MeshBench(
        backbone, pipe, prompts, names[:CALIBRATION_PICTURES], args.steps or defaults.steps,
        defaults.guidance, 0, 0, args.seed, bundle, contexts=contexts, grid=args.grid,
    )  # fmt: skip
