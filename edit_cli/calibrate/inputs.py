"""What `edit calibrate` is asked for: checked options, and the pictures for mesh models. Torch-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backbones import registry
from backbones.spec import Backbone
from edit_cli import checks
from edit_cli.errors import EditError, bad_input
from edit_cli.files import reason
from edit_cli.generate.outputs import PICTURE_SUFFIXES
from routers.train.settings import TrainSettings

if TYPE_CHECKING:
    from PIL import Image

OBJECTS = "a folder of pictures of one object each"
OWN_PICTURES = "calibration"
"""Folder of calibration pictures inside a mesh model's folder."""


@dataclass(frozen=True)
class Asked:
    """Checked options; None where the model's default holds. budgets: to measure, ascending.

    images: a folder. background: see `mesh_pictures.cut_out`. training: None for
    --method fit. data: a folder. plan_samples: see `FitSettings.tried`.
    """

    model: str | None
    prompts: str | None
    images: str | None
    background: str
    budgets: tuple[float, ...]
    samples: int
    probes: int
    steps: int | None
    guidance: float | None
    seed: int
    batch_size: int | None
    device: str
    dtype: str
    resume: bool
    training: TrainSettings | None = None
    data: str | None = None
    plan_samples: int | None = None

    @property
    def meshes(self) -> bool:
        """Whether the model makes meshes. Raises EditError if prompts or pictures do not suit it."""
        if self.images is not None and self.prompts is not None:
            raise EditError(
                "--images is for models that make meshes and --prompts for others; give one of them"
            )
        if self.data is not None and self.prompts is not None:
            raise EditError("--data brings its own prompts; leave --prompts out")
        found = self.model is not None and _makes(self.model) == "mesh"
        if self.data is not None and (found or self.images is not None):
            raise EditError("--data is for models that make pictures; for meshes leave it out")
        if found and self.prompts is not None:
            raise EditError(
                f"--prompts is for models that make pictures and {self.model!r} makes meshes; "
                "give --images DIR"
            )
        if not found and self.images is not None and self.model is not None:
            raise EditError(
                f"--images is for models that make meshes and {self.model!r} makes pictures; "
                "give --prompts FILE"
            )
        return found or self.images is not None


def _makes(model: str) -> str:
    with bad_input():
        return registry.resolve(model).makes


def picture_files(option: str, folder: str, wanted: str) -> list[Path]:
    """Pictures of a folder in the order of their names. wanted: what to give instead. Raises EditError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise EditError(f"{option} {folder!r} {what}; give {wanted}")
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    except OSError as error:
        raise EditError(
            f"{option} {folder!r} cannot be read: {reason(error)}; check its permissions"
        ) from error
    if not files:
        raise EditError(
            f"{option} {folder!r} does not hold pictures; put {', '.join(PICTURE_SUFFIXES)} files there"
        )
    return files


def read_images(backbone: Backbone, folder: str | None, background: str) -> dict[str, Image.Image]:
    """Pictures without background by a hash of their files, in the order of their names. Raises EditError.

    folder None: those in the model's own folder.
    """
    if folder is None:
        beside = None if backbone.folder is None else backbone.folder / OWN_PICTURES
        if beside is None or not beside.is_dir():
            raise EditError(
                f"{backbone.name!r} makes meshes from pictures and none were given; "
                "add --images DIR, a folder of pictures of one object each"
            )
        folder = str(beside)
    files = picture_files("--images", folder, OBJECTS)
    from edit_cli.generate.cutout import read_object  # numpy and Pillow, which `edit --help` can do without

    pictures: dict[str, Image.Image] = {}
    for file in files:
        name = checks.readable_file("IMAGE", str(file))
        picture, _ = read_object(name, background)
        pictures[hashlib.sha256(file.read_bytes()).hexdigest()] = picture
    return pictures
