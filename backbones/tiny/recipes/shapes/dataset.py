"""Step `dataset`: make every shape, its picture, surface points, distances and occupancy.

    python -m backbones.tiny.recipes.shapes.dataset [--packages node_modules] [--out runs/shapes/data]

Solids get a shaded 3/4 view; inflated silhouettes are conditioned on the picture they come from, which is
what makes prompt -> picture -> mesh work. Held out: new draws of every solid, and whole emoji (all styles).
Work is kept in shards, so an interrupted run goes on where it stopped.

Writes for N shapes: images.npy (N, S, S, 3) uint8, surface.npy (N, P, 6) float16 (xyz, unit normal),
volume.npy (N, Q, 4) float16 (xyz, signed distance, negative inside), occupancy.npy (N, G^3 / 8) uint8, and
index.json with one row {kind, name, variant, split} per shape.
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from backbones.hunyuan3d.image_processor import ImageProcessor, resize_cubic
from backbones.tiny.recipes.art import IconSet, check_versions, install_packages, render
from backbones.tiny.recipes.drawings import LOOKS
from backbones.tiny.recipes.shapes.inflate import BORDER, Puff, inflate, warp
from backbones.tiny.recipes.shapes.render import normals, render_solid
from backbones.tiny.recipes.shapes.solids import Solid, kinds, make_solid

IMAGE_SIDE = 70  # px, 5 x 5 patches of 14
PROCESSOR_SIDE = 280  # px, of the packaged image processor; the conditioner then shrinks it to IMAGE_SIDE
SURFACE_POINTS, VOLUME_POINTS = 1024, 2048
BOX = 1.01  # half side of the published box
GRID = 48  # occupancy samples per axis
NEAR_SHARE, NEAR_SPREADS = 0.6, (0.025, 0.09)  # volume points near the surface, and how near, box units
THIN = 0.12  # box units; parts about as thick count as thin
MAX_DISTANCE = 0.25
ELEVATIONS = (17.0, 27.0)  # degrees from which solids are seen
SHARD = 100  # shapes per file of finished work
HELD_OUT_SEED = 1_000_000  # solids drawn from this seed on are held out
HELD_OUT_EMOJI = 0.07  # share of emoji held out, in all styles
# Buttons and flags are hundreds of near copies of one square.
LEFT_OUT_GROUPS = {"Flags", "Component"}
LEFT_OUT_SUBGROUPS = {"keycap", "alphanum", "av-symbol", "zodiac", "transport-sign", "religion", "geometric"}
Distance = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Job:
    """One shape to make. kind: solid or puff. name: a solid's kind or style/code. variant: seed or warp."""

    kind: str
    name: str
    variant: int
    split: str


def condition_image(rgba: np.ndarray) -> np.ndarray:
    """The picture (S, S, 3) uint8 that the packaged processor and conditioner make of an RGBA picture."""
    rgb, _ = ImageProcessor(PROCESSOR_SIDE, BORDER).recenter(rgba)
    x = torch.from_numpy(resize_cubic(rgb, PROCESSOR_SIDE)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", antialias=True, align_corners=False)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def grid_points(side: int = GRID) -> np.ndarray:
    """Points (side^3, 3) of the box's grid, x slowest, as `backbones.hunyuan3d.surface` orders them."""
    axis = np.linspace(-BOX, BOX, side)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


def _sample(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Area-uniform points (count, 3) and face normals of a mesh."""
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    points, index = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return np.asarray(points), np.asarray(mesh.face_normals[index])


def solid_samples(solid: Solid, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Distance]:
    """Occupancy (G^3,) bool, surface points (P, 3), normals (P, 3), and the exact distance."""
    values = solid.distance(grid_points())
    spacing = 2 * BOX / (GRID - 1)
    vertices, faces, _, _ = marching_cubes(values.reshape(GRID, GRID, GRID), 0.0, spacing=(spacing,) * 3)
    points, _ = _sample(vertices - BOX, faces[:, ::-1], SURFACE_POINTS, seed)
    for _ in range(2):  # from the grid's surface to the true one
        points = points - solid.distance(points)[:, None] * normals(solid, points)
    return values < 0, points, normals(solid, points), solid.distance


def puff_samples(puff: Puff, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Distance]:
    """The same for an inflated silhouette; distances to 12,000 surface points' tangent planes."""
    vertices, faces = puff.mesh()
    dense, dense_normals = _sample(vertices, faces, 12_000, seed)
    tree = cKDTree(dense)

    def distance(points: np.ndarray) -> np.ndarray:
        far, index = tree.query(points)
        plane = np.abs(((points - dense[index]) * dense_normals[index]).sum(-1))
        # Close by, the tangent plane is better than the nearest sample, which is never quite below the point.
        size = np.where(far < 0.05, np.minimum(plane, far), far)
        return np.where(puff.sign_field(points) > 0, -size, size)

    points, normal = dense[:SURFACE_POINTS], dense_normals[:SURFACE_POINTS]
    return puff.sign_field(grid_points()) > 0, points, normal, distance


def thin_places(surface: np.ndarray, normal: np.ndarray, distance: Distance) -> np.ndarray:
    """Which surface points (P,) lie on a thin part: THIN below them, the shape has ended or is about to."""
    return distance(surface - THIN * normal) > -0.5 * THIN


def volume_samples(
    surface: np.ndarray, normal: np.ndarray, distance: Distance, rng: np.random.Generator
) -> np.ndarray:
    """Points near the surface and all over the box, with distances: (Q, 4) float16, shuffled.

    Half of those near the surface are near its thin parts, if there are any: a rod is a hundredth of the
    surface, and without it the shape falls apart.
    """
    near = int(NEAR_SHARE * VOLUME_POINTS)
    thin = np.flatnonzero(thin_places(surface, normal, distance))
    picked = rng.integers(0, len(surface), near)
    if len(thin):
        picked[: near // 2] = rng.choice(thin, near // 2)
    spread = rng.choice(NEAR_SPREADS, (near, 1))
    close = surface[picked] + spread * rng.standard_normal((near, 3))
    points = np.concatenate([close, rng.uniform(-BOX, BOX, (VOLUME_POINTS - near, 3))])
    points = np.clip(points, -BOX, BOX).astype(np.float16).astype(np.float64)
    value = np.clip(distance(points), -MAX_DISTANCE, MAX_DISTANCE)
    return rng.permutation(np.concatenate([points, value[:, None]], axis=1)).astype(np.float16)


@cache
def _icons(packages: Path, style: str) -> IconSet:
    return IconSet(packages, style)


def emoji_picture(packages: Path, name: str) -> np.ndarray | None:
    """RGBA art of "style/code" at 128 px, or None when the set lacks it."""
    style, code = name.split("/")
    svg = _icons(packages, style).svg(code)
    return None if svg is None else render(svg, 128)


def make(job: Job, packages: Path) -> dict[str, np.ndarray] | None:
    """The arrays of one shape, or None when the art has no usable silhouette."""
    rng = np.random.default_rng([job.variant, *job.name.encode()])
    if job.kind == "solid":
        solid = make_solid(job.name, job.variant)
        picture = render_solid(solid, elevation=float(rng.uniform(*ELEVATIONS)))
        occupancy, points, normal, distance = solid_samples(solid, job.variant)
    else:
        art = emoji_picture(packages, job.name)
        if art is None:
            return None
        picture = warp(art, rng) if job.variant else art
        puff = inflate(picture)
        if puff is None:
            return None
        occupancy, points, normal, distance = puff_samples(puff, job.variant)
    return {
        "images": condition_image(picture),
        "surface": np.concatenate([points, normal], axis=1).astype(np.float16),
        "volume": volume_samples(points, normal, distance, rng),
        "occupancy": np.packbits(occupancy),
    }


def list_jobs(packages: Path, seed: int, solids: int, warps: int) -> list[Job]:
    """Every shape to make, shuffled. solids: draws per kind. warps: warped copies per picture."""
    rows = json.loads((packages / "emoji-datasource/emoji.json").read_text("utf-8"))
    codes = [
        row["unified"].lower().replace("-fe0f", "")
        for row in rows
        if row["category"] not in LEFT_OUT_GROUPS and row["subcategory"] not in LEFT_OUT_SUBGROUPS
    ]
    rng = random.Random(seed)
    held_out = set(rng.sample(sorted(codes), int(HELD_OUT_EMOJI * len(codes))))
    jobs = []
    for name in kinds():
        jobs += [Job("solid", name, i, "train") for i in range(solids)]
        jobs += [Job("solid", name, HELD_OUT_SEED + i, "held-out") for i in range(3)]
    for code in codes:
        for style in LOOKS:
            split, copies = ("held-out", 1) if code in held_out else ("train", 1 + warps)
            jobs += [Job("puff", f"{style}/{code}", i, split) for i in range(copies)]
    rng.shuffle(jobs)
    return jobs


def run_shard(task: tuple[list[Job], Path, Path]) -> int:
    """Make the shapes of one shard and write it whole; returns how many there are."""
    jobs, packages, path = task
    torch.set_num_threads(1)
    done = [(job, arrays) for job in jobs if (arrays := make(job, packages)) is not None]
    columns = {key: np.stack([arrays[key] for _, arrays in done]) for key in done[0][1]}
    rows = json.dumps([asdict(job) for job, _ in done])
    part = path.with_suffix(".part.npz")
    np.savez(part, rows=np.array(rows), **columns)
    part.rename(path)
    return len(done)


def merge(shards: list[Path], out: Path) -> int:
    """Join the shards into the final arrays; returns the number of shapes."""
    rows: list[dict] = []
    for path in shards:
        with np.load(path) as shard:
            rows += json.loads(str(shard["rows"]))
    for key in ("images", "surface", "volume", "occupancy"):
        start, array = 0, None
        for path in shards:
            with np.load(path) as shard:
                block = shard[key]
            if array is None:
                shape = (len(rows), *block.shape[1:])
                array = np.lib.format.open_memmap(out / f"{key}.npy", "w+", block.dtype, shape)
            array[start : start + len(block)] = block
            start += len(block)
        array.flush()
    (out / "index.json").write_text(json.dumps({"rows": rows}))
    return len(rows)


def build(packages: Path, out: Path, jobs: list[Job], workers: int) -> None:
    """Make all shards that are not there yet, then merge."""
    folder, started = out / "shards", time.time()
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(jobs), SHARD)
    paths = [folder / f"{start // SHARD:04d}.npz" for start in starts]
    tasks: Iterator = (
        (jobs[start : start + SHARD], packages, path)
        for start, path in zip(starts, paths, strict=True)
        if not path.exists()
    )
    made, missing = 0, sum(not path.exists() for path in paths)
    # Forked workers would inherit PyTorch's thread pool and hang in it.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for number, count in enumerate(pool.map(run_shard, list(tasks)), 1):
            made += count
            rate = made / (time.time() - started)
            left = (missing - number) * SHARD / max(rate, 1e-9) / 60
            print(
                f"dataset: shard {number}/{missing}, {made} shapes, {rate:.1f}/s, {left:.0f} min left",
                flush=True,
            )
    total = merge(paths, out)
    print(f"dataset: {total} shapes in {time.time() - started:.0f} s -> {out}")


def contact_sheet(out: Path, columns: int = 24, rows: int = 12) -> Path:
    """A sheet of random conditioning pictures, to look at."""
    images = np.load(out / "images.npy", mmap_mode="r")
    chosen = np.sort(
        np.random.default_rng(0).choice(len(images), min(len(images), columns * rows), replace=False)
    )
    tiles = list(images[chosen])
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    lines = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    path = out / "sheet.png"
    Image.fromarray(np.concatenate(lines)).save(path)
    return path


def main() -> None:
    """Parse the command line and build the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, help="a node_modules folder; default: npm install under --out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shapes/data"))
    parser.add_argument("--solids", type=int, default=170, help="training draws of each kind of solid")
    parser.add_argument("--warps", type=int, default=2, help="warped copies of each picture")
    parser.add_argument("--limit", type=int, help="only the first so many shapes, to try it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    packages = args.packages or install_packages(args.out)
    check_versions(packages)
    jobs = list_jobs(packages, args.seed, args.solids, args.warps)
    build(packages, args.out, jobs[: args.limit], args.workers)
    print(f"dataset: look at {contact_sheet(args.out)}")


if __name__ == "__main__":
    main()
