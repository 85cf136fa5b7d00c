"""How far two meshes are from each other: Chamfer distance, F-score, volumetric IoU."""

from __future__ import annotations

from typing import Any

import numpy as np

POINTS = 20_000
"""Points drawn on each surface."""
F_SCORE_DISTANCE = 0.01
"""A point counts as found within this share of the box's side."""


def compare_meshes(mesh: Any, reference: Any, volume: Any, reference_volume: Any) -> dict[str, float]:
    """Distances of a mesh to a reference, both with the volume they were cut from (equal grids).

    chamfer: mean distance to the other's nearest point, mean of both ways, as a share of the box's side.
    f_score: harmonic mean of the shares of points within 1 % of the box's side. iou: of the inside, 0 to 1.
    """
    from scipy.spatial import cKDTree
    from trimesh.sample import sample_surface

    side = float((volume.box[1] - volume.box[0]).max())
    a, b = (np.asarray(sample_surface(m, POINTS, seed=0)[0]) / side for m in (mesh, reference))
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    precision, recall = ((d <= F_SCORE_DISTANCE).mean() for d in (there, back))
    inside, truly = volume.logits > 0, reference_volume.logits > 0
    union = int((inside | truly).sum())
    return {
        "chamfer": round(float(there.mean() + back.mean()) / 2, 5),
        "f_score": round(float(2 * precision * recall / max(precision + recall, 1e-9)), 4),
        "iou": round(float((inside & truly).sum()) / union, 4) if union else 1.0,
    }
