"""From what was asked to which meshes will be made: model, routers, jobs, output paths. Torch-free.

A value comes from, in rising order: the model's defaults, a replayed mesh, the command line. Everything
that can be wrong with the input is found here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.model_files import ModelError
from backbones.spec import Backbone, Placement
from edit_cli import checks as values
from edit_cli.errors import EditError, bad_input
from edit_cli.generate import routers as choices
from edit_cli.generate.mesh_files import MESH_SUFFIXES, read_record
from edit_cli.generate.outputs import plan_outputs

BACKGROUNDS = ("auto", "yes", "no")
DECODES = ("auto", "dense", "hierarchical")
OFFLOADS = ("none", "model")
VIEWS = ("front", "left", "back", "right")
LOWEST_RESOLUTION, HIGHEST_RESOLUTION = 8, 1024
MAX_FACES = 50_000_000
PREVIEW_SUFFIXES = (".png",)


@dataclass(frozen=True)
class MeshAsked:
    """What was typed, before any check; None: not given. Names follow the options of `edit generate-3d`."""

    images: tuple[str, ...] = ()
    replay: str | None = None
    model: str | None = None
    routers: str | None = None
    budget: str | None = None
    steps: str | None = None
    guidance: str | None = None
    seeds: tuple[str, ...] = ()
    octree_resolution: str | None = None
    decode: str | None = None
    faces: str | None = None
    format: str | None = None
    remove_background: str | None = None
    views: tuple[str, ...] = ()
    output: str | None = None
    preview: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class MeshJob:
    """One mesh to make. images: one picture, or one per name in `views`. budget None: the routers' own."""

    path: Path
    images: tuple[str, ...]
    views: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    budget: float | None
    octree_resolution: int
    decode: str
    faces: int | None
    remove_background: str
    preview: Path | None = None


@dataclass(frozen=True)
class MeshPlan:
    """Everything a run needs. Fields as in `edit_cli.generate.plan.Plan`."""

    backbone: Backbone
    routers: Path | None
    placement: Placement
    jobs: tuple[MeshJob, ...]
    force: bool = False
    replayed: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def make_mesh_plan(asked: MeshAsked) -> MeshPlan:
    """Check everything that was asked. Raises EditError; reads files but writes none."""
    record = read_record(asked.replay) if asked.replay is not None else {}
    typed = _typed(asked)
    recorded = {name: record.get(name) for name in typed}
    fields = {**_checked(recorded, f"--from {asked.replay}: "), **_checked(typed, "--")}
    images = asked.images or tuple(record.get("images") or ())
    if not images:
        raise EditError("no picture given; try: edit generate-3d cat.png -o cat.glb")
    images = tuple(values.readable_file("IMAGE", image) for image in images)
    with bad_input(ModelError):
        backbone = registry.resolve(asked.model or record.get("model_source"), makes="mesh")
    views = _views(asked.views or tuple(record.get("views") or ()), images, backbone)
    routers = choices.find_routers(
        asked.routers or record.get("routers") or choices.DEFAULT_ROUTERS, backbone
    )
    warnings: tuple[str, ...] = ()
    if routers is None:
        warnings = choices.check_dense([fields.get("budget")], backbone, asked.dry_run)
    seeds = [values.seed("--seed", s) for s in asked.seeds] or [int(record.get("seed", 0))]
    choices.distinct_seeds(seeds)
    objects = [images] if views else [(image,) for image in images]
    requests = [(pictures, seed) for pictures in objects for seed in seeds]
    paths = _outputs(asked, requests, fields.get("budget"), backbone)
    previews = _previews(asked.preview, paths)
    base = _with_defaults(fields, backbone)
    jobs = tuple(
        MeshJob(path=path, images=pictures, views=views, seed=seed, preview=preview, **base)
        for (pictures, seed), path, preview in zip(requests, paths, previews, strict=True)
    )
    changed = (
        any(typed.values()) or asked.images or asked.model or asked.routers or asked.seeds or asked.views
    )
    return MeshPlan(
        backbone=backbone,
        routers=routers,
        placement=choices.placement(asked, record, OFFLOADS),
        jobs=jobs,
        force=asked.force or bool(record.get("force")),
        replayed=None if changed or not record else record,
        warnings=warnings,
    )


def _typed(asked: MeshAsked) -> dict[str, Any]:
    names = ("budget", "steps", "guidance", "octree_resolution", "decode", "faces", "remove_background")
    return {name: getattr(asked, name) for name in names}


def _checked(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    checks = {
        "budget": values.budget,
        "steps": values.steps,
        "guidance": values.guidance,
        "octree_resolution": resolution,
        "decode": lambda name, value: values.one_of(name, value, DECODES),
        "faces": lambda name, value: values.integer(name, value, 4, MAX_FACES),
        "remove_background": lambda name, value: values.one_of(name, value, BACKGROUNDS),
    }
    return {
        name: checks[name](where + name.replace("_", "-"), value)
        for name, value in fields.items()
        if value is not None
    }


def resolution(where: str, value: Any) -> int:
    """Grid cells per axis."""
    return values.integer(
        where, value, LOWEST_RESOLUTION, HIGHEST_RESOLUTION, "usual are 128 (draft), 256, 384 (fine)"
    )


def _with_defaults(fields: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    base = backbone.defaults
    return {
        "steps": fields.get("steps", base.steps),
        "guidance": fields.get("guidance", base.guidance),
        "budget": fields.get("budget"),
        "octree_resolution": fields.get("octree_resolution", base.octree_resolution),
        "decode": fields.get("decode", "auto"),
        "faces": fields.get("faces"),
        "remove_background": fields.get("remove_background", "auto"),
    }


def _views(asked: tuple[str, ...], images: Sequence[str], backbone: Backbone) -> tuple[str, ...]:
    for name in asked:
        values.one_of("--views", name, VIEWS)
    if asked and not backbone.views:
        raise EditError(
            f"--views needs a multi-view model and {backbone.name!r} takes one picture per mesh; "
            "use -m hunyuan3d-2mv, or leave --views out"
        )
    if asked and (len(asked) != len(images) or len(set(asked)) != len(asked)):
        raise EditError(
            f"--views {' '.join(asked)!r} must name each of the {len(images)} pictures once, in their order"
        )
    return asked


def _outputs(
    asked: MeshAsked, requests: Sequence[tuple[tuple[str, ...], int]], budget: float | None,
    backbone: Backbone,
) -> list[Path]:  # fmt: skip
    suffixes = list(MESH_SUFFIXES)
    if asked.format is not None:
        first = "." + values.one_of(
            "--format", asked.format.lstrip("."), [suffix[1:] for suffix in MESH_SUFFIXES]
        )
        suffixes = [first, *(suffix for suffix in suffixes if suffix != first)]
    names = [
        {
            "prompt": Path(pictures[0]).stem,
            "seed": seed,
            "index": i,
            "budget": "auto" if budget is None else f"{budget:g}",
            "model": backbone.name.replace("/", "-"),
        }
        for i, (pictures, seed) in enumerate(requests)
    ]
    paths = plan_outputs(asked.output, names, suffixes)
    for path in paths:
        if asked.format is not None and path.suffix.lower() != suffixes[0]:
            raise EditError(f"--output {str(path)!r} and --format {asked.format!r} disagree; leave one out")
    return paths


def _previews(asked: str | None, paths: Sequence[Path]) -> list[Path | None]:
    """One preview per mesh: the file named, numbered when there are several meshes."""
    if asked is None:
        return [None] * len(paths)
    fields = [
        {"prompt": path.stem, "seed": i, "index": i, "budget": "", "model": ""}
        for i, path in enumerate(paths)
    ]
    try:
        return [*plan_outputs(asked, fields, PREVIEW_SUFFIXES)]
    except EditError as error:
        raise EditError(str(error).replace("--output", "--preview")) from None
