"""Dense against hierarchical decoding of the same latents: time, decoder evaluations, distance of the meshes.

    python -m benchmarks.decoding                    # the packaged model on its own pictures
    python -m benchmarks.decoding --images DIR -m MODEL
    python -m benchmarks.decoding --markdown         # the table of docs/hunyuan3d-tiny.md

Both ways take turns, resolution by resolution; seconds are medians over rounds and pictures. The distance is
the largest from a vertex of one mesh to the other, both ways round, as a share of the box's side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.spatial import cKDTree

from backbones import loading, registry
from backbones.spec import Placement
from backbones.workloads import embed
from edit_cli.generation.cutout import read_object
from edit_cli.generation.samples import OBJECTS, model_pictures, picture_files

BOX = 1.01
METHODS = ("dense", "hierarchical")
TIME_BAR, EVALUATIONS_BAR, DISTANCE_BAR, BAR_RESOLUTION = 1 / 8, 1 / 10, 1e-3, 256


@dataclass
class Row:
    """One resolution. evaluations: share of the grid that hierarchical decoding evaluated, per picture."""

    resolution: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {method: [] for method in METHODS})
    evaluations: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    @property
    def medians(self) -> dict[str, float]:
        """Seconds per method."""
        return {method: statistics.median(taken) for method, taken in self.seconds.items()}

    @property
    def met(self) -> bool:
        """Whether the distance, and at 256 also time and evaluations, are within their bars."""
        near = max(self.distances) <= DISTANCE_BAR
        if self.resolution != BAR_RESOLUTION:
            return near
        quick = self.medians["hierarchical"] <= TIME_BAR * self.medians["dense"]
        return near and quick and max(self.evaluations) <= EVALUATIONS_BAR


def mesh_distance(a: Any, b: Any) -> float:
    """Largest distance from a vertex of one mesh to the other's nearest, as a share of the box's side.

    Meshes of one grid have their vertices on its edges, so nearest vertices are near enough to surfaces.
    """
    one_way = [cKDTree(there.vertices).query(here.vertices)[0].max() for here, there in ((a, b), (b, a))]
    return float(max(one_way)) / (2 * BOX)


def measure(pipe: Any, latents: torch.Tensor, resolutions: Sequence[int], rounds: int) -> list[Row]:
    """Decode every row of latents [P, L, C] both ways, in turn."""
    rows = []
    for resolution in resolutions:
        row = Row(resolution)
        for turn in range(rounds):
            for latent in latents.split(1):
                meshes = []
                for method in METHODS if turn % 2 == 0 else reversed(METHODS):
                    start = time.perf_counter()
                    volume = pipe.decode(latent, resolution, BOX, method=method)[0]
                    row.seconds[method].append(time.perf_counter() - start)
                    if turn == 0:
                        meshes.append(pipe.extract(volume))
                        if method == "hierarchical":
                            row.evaluations.append(volume.evaluated_share)
                if turn == 0:
                    row.distances.append(mesh_distance(*meshes))
        rows.append(row)
    return rows


HEADERS = ("resolution", "dense s", "hierarchical s", "ratio", "evaluated", "largest distance", "met")


def cells(row: Row) -> list[str]:
    """A row as text."""
    dense, hierarchical = row.medians["dense"], row.medians["hierarchical"]
    return [
        str(row.resolution), f"{dense:.2f}", f"{hierarchical:.2f}", f"{hierarchical / dense:.3f}",
        f"{100 * statistics.fmean(row.evaluations):.1f} %", f"{max(row.distances):.1e}",
        "yes" if row.met else "no",
    ]  # fmt: skip


def print_table(rows: Sequence[Row], markdown: bool) -> None:
    """The table on stdout."""
    if markdown:
        print("| " + " | ".join(HEADERS) + " |\n|" + "---|" * len(HEADERS))
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADERS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=110, highlight=False).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Denoise the pictures, decode, print; 1 with --check if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", metavar="DIR", help="default: the model's own pictures")
    parser.add_argument("--count", type=int, default=4, help="pictures, the first by name")
    parser.add_argument("-m", "--model", default=registry.DEFAULT_MODELS["mesh"])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, BAR_RESOLUTION])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    args = parser.parse_args(arguments)
    backbone = registry.resolve(args.model, makes="mesh")
    pipe = loading.load(backbone, Placement())
    files = picture_files("--images", args.images, OBJECTS) if args.images else model_pictures(backbone)
    pictures = [read_object(file, "auto")[0] for file in files[: args.count]]
    contexts = embed(pipe, pictures)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(pictures))]
    noise = pipe.noise(len(pictures), generators)
    defaults = backbone.defaults
    latents = pipe.denoise(contexts, noise, args.steps or defaults.steps, defaults.guidance)
    rows = measure(pipe, latents, args.resolutions, args.rounds)
    print_table(rows, args.markdown)
    return int(args.check and not all(row.met for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
