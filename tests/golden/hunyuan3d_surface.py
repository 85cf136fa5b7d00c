"""Golden cases of volume decoding and mesh extraction."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from backbones.hunyuan3d import checkpoints
from backbones.hunyuan3d.mesh import Surface, extract_surface
from backbones.hunyuan3d.surface import Volume, box_array, decode_dense

from .runner import Case, Outcome, Tolerance


def run_volume_decode(case: Case) -> Outcome:
    """Dense grid logits. The FlashVDM grid comes from an approximation that this project replaces."""
    params = {"target": "ShapeVAE", "params": case.config["params"]}
    vae = checkpoints.build_component("vae", params, case.weights)
    settings = case.config["vanilla"]
    decoded = vae(vae.unscale(case.inputs["latents"]))
    grids = [
        decode_dense(
            vae.field(row), settings["bounds"], settings["octree_resolution"], settings["num_chunks"]
        ).logits
        for row in decoded
    ]
    flash = [name for name in case.outputs if name.startswith("flash_")]
    return Outcome(
        {"decoded_latents": decoded, "grid_logits": torch.from_numpy(np.stack(grids))},
        not_compared=dict.fromkeys(
            flash, "optional: adaptive choice of keys, replaced by hierarchical decoding"
        ),
    )


def run_mesh_extraction(case: Case) -> Outcome:
    """Marching cubes: counts exactly, box and volume to 1e-4, vertices and faces up to their order."""
    actual: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    tolerances: dict[str, Tolerance] = {}
    for prefix, grid in (("", "grid_logits"), ("with_nan.", "with_nan_grid")):
        if grid not in case.inputs:
            continue
        recorded = {k.removeprefix(prefix): v for k, v in case.outputs.items() if k.startswith(prefix)}
        surface = _extract(case, case.inputs[grid][0])
        mesh = surface.to_trimesh()
        order = _match(surface.vertices, recorded["vertices"].numpy())
        ours = {
            "counts": torch.tensor([len(surface.vertices), len(surface.faces)]),
            "bbox": torch.tensor(mesh.bounds.tolist()),
            "volume": torch.tensor([mesh.volume]),
            "vertices": torch.from_numpy(surface.vertices[order]),
        }
        position = np.full(len(surface.vertices), -1)
        position[order] = np.arange(len(order))
        faces = position[surface.faces]
        ours["faces"] = _sorted_faces(faces)
        ours["raw_faces"] = _sorted_faces(faces[:, ::-1])
        for name in ("faces", "raw_faces"):
            expected[prefix + name] = _sorted_faces(recorded[name].numpy())
        actual.update({prefix + name: value for name, value in ours.items()})
        tolerances.update({prefix + name: Tolerance(0.0, 0.0) for name in ("counts", "faces", "raw_faces")})
        tolerances.update({prefix + name: Tolerance(1e-4, 0.0) for name in ("bbox", "volume")})
    return Outcome(actual, expected, tolerances)


def _extract(case: Case, grid: Tensor) -> Surface:
    params = case.config["params"]
    volume = Volume(grid.numpy(), box_array(params["bounds"]), evaluations=grid.numel())
    return extract_surface(volume, params["mc_level"])


def _match(found: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """For each recorded vertex the nearest found one."""
    return np.asarray(KDTree(found).query(recorded)[1])


def _sorted_faces(faces: np.ndarray) -> Tensor:
    """Faces with their smallest vertex first (same winding), in lexical order."""
    first = faces.argmin(axis=1)[:, None]
    rolled = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return torch.from_numpy(rolled[np.lexsort(rolled.T[::-1])].astype(np.int64))
