"""What `profile`, `calibrate` and `export` try a model on: a plan whose results are not kept. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from backbones import registry
from backbones.pipeline_call import known_call
from backbones.spec import Backbone
from edit_cli.checks import PICTURE_NAMES, readable_file
from edit_cli.errors import EditError, bad_input
from edit_cli.files import reason
from edit_cli.generation.medium import Job, Medium
from edit_cli.generation.mesh import MESH
from edit_cli.generation.picture import PICTURE, PictureJob
from edit_cli.generation.plan import Plan, make_plan
from edit_cli.generation.prompts import default_prompts
from edit_cli.request import Request

PICTURES_FOLDER = "calibration"
"""Folder of calibration pictures inside the folder of a model that makes meshes."""
SHOWN = "a folder of pictures to edit, or of one object each for models that make meshes"
OBJECTS = "a folder of pictures of one object each"
PROMPTS = {"prompt": "PROMPT", "prompts_file": "--prompts", "data": "--data"}
SHARED = (
    "prompt", "prompts_file", "model", "base", "routers", "budget", "force", "lora", "steps", "guidance",
    "solver", "batch_size", "device", "dtype", "offload", "compile", "quantize",
)  # fmt: skip
"""Options that mean the same as for a generation, whatever it makes."""
APART = 10_000
"""How far the seeds of held-out samples lie from the others."""
J = TypeVar("J", bound=Job)


def medium_of(request: Request) -> Medium:
    """The model's; without a model, that of what is given. Raises EditError for what does not suit it."""
    prompts = next((label for name, label in PROMPTS.items() if name in request), None)
    pictures = "images" in request
    if "model" not in request:
        medium: Medium = MESH if pictures else PICTURE
        edits = False
    else:
        with bad_input():
            backbone = registry.resolve(request["model"])
            medium = MESH if backbone.makes == "mesh" else PICTURE
            edits = medium is PICTURE and _takes_pictures(backbone)
    if pictures and prompts and not edits:
        raise EditError(f"--images is for models that make meshes and {prompts} for others; give one of them")
    model = repr(request.get("model"))
    if medium is MESH and prompts:
        raise EditError(
            f"{prompts} is for models that make pictures and {model} makes meshes; give --images instead"
        )
    if medium is PICTURE and pictures and not edits:
        raise EditError(
            f"--images is for models that make meshes and {model} makes pictures; give prompts instead"
        )
    other = PICTURE if medium is MESH else MESH
    for name in other.options:
        if name in request and name not in medium.options and name not in (*PROMPTS, "output"):
            label = name.replace("_", "-")
            raise EditError(f"--{label} is for models that make {other.things}; leave it out")
    return medium


def _takes_pictures(backbone: Backbone) -> bool:
    """Whether its own pipeline edits pictures, or begins with one."""
    return known_call(backbone.family.pipeline_class).argument("image") is not None


def shows_pictures(jobs: Sequence[Job]) -> bool:
    """Whether any of them begins with pictures; then each makes a batch of its own."""
    return any(isinstance(job, PictureJob) and bool(job.image or job.control_image) for job in jobs)


def alike(plan: Plan) -> bool:
    """Whether all jobs share size, steps, guidance and budget, whatever pictures they begin with."""
    none: dict[str, Any] = {"image": (), "mask": None, "control_image": None, "alone": None}
    jobs = [replace(job, **none) if isinstance(job, PictureJob) else job for job in plan.jobs]
    return len({plan.group(job) for job in jobs}) <= 1


def sample_plan(request: Request, medium: Medium) -> Plan:
    """A job for each prompt or picture that is given, else for each of the model's own; with prompts and
    pictures for each of both, in turn. Raises EditError.
    """
    names = {*SHARED, *medium.options} - {"output", "seed"}
    part = Request({name: value for name, value in request.items() if name in names})
    with bad_input():
        backbone = registry.resolve(part.get("model"), makes=medium.makes)
    if medium is MESH:
        files = request.get("images") or model_pictures(backbone)
        part["image"] = [readable_file("IMAGE", file) for file in files]
    elif not part.keys() & PROMPTS.keys():
        part["prompts_file"] = str(default_prompts(backbone))
    if medium is MESH or "images" not in request:
        return make_plan(part, medium, kept=False)
    files = [readable_file("--images", file) for file in request["images"]]
    plan = make_plan(part.but(image=files[:1]), medium, kept=False)
    jobs: list[Any] = [plan.jobs[i % len(plan.jobs)] for i in range(max(len(plan.jobs), len(files)))]
    shown = [replace(job, image=(files[i % len(files)],), index=i) for i, job in enumerate(jobs)]
    return replace(plan, jobs=tuple(shown))


def take(jobs: Sequence[J], count: int, seed: int) -> tuple[J, ...]:
    """So many of the jobs in turn; the noise of the i-th starts from seed + i."""
    return tuple(replace(jobs[i % len(jobs)], index=i, seed=seed + i) for i in range(count))


def held_out(jobs: Sequence[J], count: int, seed: int) -> tuple[J, ...]:
    """Samples that only measure: the jobs from the end, with other noise."""
    return take(jobs[::-1], count, seed + APART)


def picture_files(option: str, folder: str, wanted: str) -> list[str]:
    """Pictures of a folder in the order of their names. wanted: what to give instead. Raises EditError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise EditError(f"{option} {folder!r} {what}; give {wanted}")
    try:
        names = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files = [file for file in names if file.suffix.lower() in PICTURE_NAMES]
    except OSError as error:
        raise EditError(
            f"{option} {folder!r} cannot be read: {reason(error)}; check its permissions"
        ) from error
    if not files:
        raise EditError(
            f"{option} {folder!r} does not hold pictures; put {', '.join(PICTURE_NAMES)} files there"
        )
    return [str(file) for file in files]


def in_folder(request: Request) -> Request:
    """With the pictures of the folder `images` in its place. Raises EditError."""
    if "images" not in request:
        return request
    return request.but(images=picture_files("--images", request["images"], SHOWN))


def model_pictures(backbone: Backbone) -> list[str]:
    """The calibration pictures in the folder of a model that makes meshes. Raises EditError."""
    folder = None if backbone.folder is None else backbone.folder / PICTURES_FOLDER
    if folder is None or not folder.is_dir():
        raise EditError(
            f"{backbone.name!r} makes meshes from pictures and none were given; add --images with pictures "
            "of one object each"
        )
    return picture_files("--images", str(folder), OBJECTS)
