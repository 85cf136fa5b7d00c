"""What `profile`, `calibrate` and `export` try a model on: a plan whose results are not kept. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backbones import registry
from backbones.spec import Backbone
from edit_cli.checks import PICTURE_NAMES, readable_file
from edit_cli.errors import EditError, bad_input
from edit_cli.files import reason
from edit_cli.generate.medium import Job, Medium
from edit_cli.generate.mesh import MESH
from edit_cli.generate.picture import PICTURE
from edit_cli.generate.plan import Plan, make_plan
from edit_cli.generate.prompts import default_prompts
from edit_cli.request import Request

PICTURES_FOLDER = "calibration"
"""Folder of calibration pictures inside the folder of a model that makes meshes."""
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
    if pictures and prompts:
        raise EditError(f"--images is for models that make meshes and {prompts} for others; give one of them")
    if "model" not in request:
        medium: Medium = MESH if pictures else PICTURE
    else:
        with bad_input():
            medium = MESH if registry.resolve(request["model"]).makes == "mesh" else PICTURE
    model = repr(request.get("model"))
    if medium is MESH and prompts:
        raise EditError(
            f"{prompts} is for models that make pictures and {model} makes meshes; give --images instead"
        )
    if medium is PICTURE and pictures:
        raise EditError(
            f"--images is for models that make meshes and {model} makes pictures; give prompts instead"
        )
    other = PICTURE if medium is MESH else MESH
    for name in other.options:
        if name in request and name not in medium.options and name not in (*PROMPTS, "output"):
            label = name.replace("_", "-")
            raise EditError(f"--{label} is for models that make {other.things}; leave it out")
    return medium


def sample_plan(request: Request, medium: Medium) -> Plan:
    """A job for each prompt or picture that is given, else for each of the model's own. Raises EditError."""
    names = {*SHARED, *medium.options} - {"output", "seed"}
    part = Request({name: value for name, value in request.items() if name in names})
    with bad_input():
        backbone = registry.resolve(part.get("model"), makes=medium.makes)
    if medium is MESH:
        files = request.get("images") or model_pictures(backbone)
        part["image"] = [readable_file("IMAGE", file) for file in files]
    elif not part.keys() & PROMPTS.keys():
        part["prompts_file"] = str(default_prompts(backbone))
    return make_plan(part, medium, kept=False)


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
    return request.but(images=picture_files("--images", request["images"], OBJECTS))


def model_pictures(backbone: Backbone) -> list[str]:
    """The calibration pictures in the folder of a model that makes meshes. Raises EditError."""
    folder = None if backbone.folder is None else backbone.folder / PICTURES_FOLDER
    if folder is None or not folder.is_dir():
        raise EditError(
            f"{backbone.name!r} makes meshes from pictures and none were given; add --images with pictures "
            "of one object each"
        )
    return picture_files("--images", str(folder), OBJECTS)
