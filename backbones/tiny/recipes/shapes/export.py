"""Step `export`: write the package folder in the published layout, in half precision.

    python -m backbones.tiny.recipes.shapes.export [--packages node_modules] [--out FOLDER]

`config.yaml` and `model.fp16.safetensors` with the components' prefixes, read by
`backbones.hunyuan3d.checkpoints.load_pipeline` like any published folder. The statistics of the latents are
folded into the decoder's first layer, so the DiT's latents are the decoder's and `scale_factor` is 1. The
encoder is left out, as in the published 2.0 checkpoints. `edit.json` holds the defaults for requests, and
`calibration/` the pictures that `edit calibrate` uses when it is given none. Fails when a weight does not
fit fp16, when the reloaded pipeline disagrees with the training model, or when the folder reaches 30 MB.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbones.hunyuan3d.checkpoints import load_pipeline, save_checkpoint
from backbones.hunyuan3d.config import build
from backbones.hunyuan3d.shape_vae import ENCODER_KEYS, ShapeVAE
from backbones.tiny.recipes.art import check_versions
from backbones.tiny.recipes.export import MAX_BYTES, check_half
from backbones.tiny.recipes.shapes.dataset import (
    ELEVATIONS,
    IMAGE_SIDE,
    PROCESSOR_SIDE,
    emoji_picture,
    list_jobs,
)
from backbones.tiny.recipes.shapes.inflate import BORDER, inflate
from backbones.tiny.recipes.shapes.model import DIT_PARAMS, ENCODER, GUIDANCE, STEPS, ShapeModel, load_model
from backbones.tiny.recipes.shapes.render import render_solid
from backbones.tiny.recipes.shapes.solids import make_solid
from backbones.tiny.recipes.shapes.store import KINDS
from backbones.tiny.recipes.shapes.vae import Stats, load_vae

OWN_PICTURES = "calibration"  # the folder that `edit calibrate` looks into
CALIBRATION_PICTURES = 32
RESOLUTION = 128  # grid cells per axis: twice what the training shapes resolve
MAX_DIFFERENCE = 2e-2  # of fp16 weights computed in fp32, on outputs of order one


def package_config(vae_params: dict[str, Any]) -> dict[str, Any]:
    """The sections of config.yaml, with the published class names."""
    return {
        "model": {"target": "Hunyuan3DDiT", "params": dict(DIT_PARAMS)},
        "vae": {"target": "ShapeVAE", "params": {**vae_params, "scale_factor": 1.0}},
        "conditioner": {"target": "SingleImageEncoder", "params": {"main_image_encoder": ENCODER}},
        "scheduler": {
            "target": "FlowMatchEulerDiscreteScheduler",
            "params": {"num_train_timesteps": 1000},
        },
        "image_processor": {
            "target": "ImageProcessorV2",
            "params": {"size": PROCESSOR_SIDE, "border_ratio": BORDER},
        },
        # the grid as it was trained on, not as the published code shrinks it
        "pipeline": {"target": "Hunyuan3DDiTFlowMatchingPipeline", "params": {"published_scale": False}},
    }


def decoder_of_normalised(vae: ShapeVAE, stats: Stats, params: dict[str, Any]) -> ShapeVAE:
    """The decoder half for latents x with z = x * std + mean: W z + b = (W std) x + (W mean + b)."""
    mean, std = stats
    decoder: ShapeVAE = build("vae", {"target": "ShapeVAE", "params": params})
    state = {
        key: tensor.clone() for key, tensor in vae.state_dict().items() if not key.startswith(ENCODER_KEYS)
    }
    state["post_kl.bias"] += state["post_kl.weight"] @ mean
    state["post_kl.weight"] *= std
    decoder.load_state_dict(state)
    return decoder.requires_grad_(False).eval()


@torch.no_grad()
def largest_difference(folder: Path, model: ShapeModel, vae: ShapeVAE, stats: Stats) -> dict[str, float]:
    """Largest absolute difference of the reloaded folder's outputs to the training model's, in fp32."""
    pipe = load_pipeline(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *pipe.vae.latent_shape, generator=generator)
    image = torch.rand(2, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator) * 2 - 1
    t, points = torch.tensor([0.2, 0.7]), torch.rand(500, 3, generator=generator) * 2 - 1

    def gap(a: Tensor, b: Tensor) -> float:
        return (a - b).abs().max().item()

    context = model.conditioner(image)
    return {
        "conditioner": gap(pipe.conditioner(image)["main"], context["main"]),
        "model": gap(pipe.transformer(x, t, context), model.dit(x, t, context)),
        "vae": gap(
            pipe.vae.field(pipe.vae(pipe.vae.unscale(x))[0])(points),
            vae.field(vae(x * stats[1] + stats[0])[0])(points),
        ),
    }


def calibration_pictures(packages: Path, count: int) -> dict[str, np.ndarray]:
    """RGBA pictures (S, S, 4) uint8 by file name, of shapes that were trained on: solids and art in turn."""
    jobs = [job for job in list_jobs(packages, seed=0, solids=1, warps=0) if job.split == "train"]
    pictures: dict[str, np.ndarray] = {}
    for kind in KINDS:
        some: dict[str, np.ndarray] = {}
        for job in (job for job in jobs if job.kind == kind):
            if len(some) == count // len(KINDS):
                break
            name = f"{kind}-{job.name.replace('/', '-')}.png"
            if kind == "solid":
                elevation = sum(ELEVATIONS) / 2
                some[name] = render_solid(make_solid(job.name, job.variant), elevation=elevation)
            elif (art := emoji_picture(packages, job.name)) is not None and inflate(art) is not None:
                some[name] = art
        pictures |= some
    return pictures


def write_folder(
    folder: Path,
    model: ShapeModel,
    vae: ShapeVAE,
    stats: Stats,
    params: dict[str, Any],
    pictures: Mapping[str, np.ndarray],
) -> int:
    """Write the folder whole, in fp16; returns its bytes. Raises ValueError when a weight does not fit."""
    parts = {
        "model": model.dit,
        "vae": decoder_of_normalised(vae, stats, params),
        "conditioner": model.conditioner,
    }
    for name, part in parts.items():
        check_half(name, part)
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    halves = {name: copy.deepcopy(part).half() for name, part in parts.items()}
    save_checkpoint(partial, package_config(params), halves)
    (partial / "model.safetensors").rename(partial / "model.fp16.safetensors")
    defaults = {"steps": STEPS, "guidance": GUIDANCE, "octree_resolution": RESOLUTION}
    (partial / "edit.json").write_text(json.dumps(defaults, indent=1) + "\n")
    (partial / OWN_PICTURES).mkdir()
    for name, picture in pictures.items():
        Image.fromarray(picture).save(partial / OWN_PICTURES / name, optimize=True)
    size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if size >= MAX_BYTES:
        raise ValueError(f"{partial} is {size} bytes, the limit is {MAX_BYTES}: make the model smaller")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return size


def main() -> None:
    """Parse the command line, write, check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, default=Path("runs/shapes/vae/model.pt"))
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/shapes/dit/last.pt"))
    default = Path(__file__).parents[2] / "hunyuan3d_tiny"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument(
        "--packages", type=Path, help="a node_modules folder; default: what step dataset installed"
    )
    args = parser.parse_args()
    vae, stats, _ = load_vae(args.vae)
    params = torch.load(args.vae, weights_only=True)["params"]
    model = load_model(args.checkpoint)
    packages = args.packages or Path("runs/shapes/data/node_modules")
    check_versions(packages)
    pictures = calibration_pictures(packages, CALIBRATION_PICTURES)
    size = write_folder(args.out, model, vae, stats, params, pictures)
    differences = largest_difference(args.out, model, vae, stats)
    print("export: half precision differs from the training model by", differences)
    if max(differences.values()) > MAX_DIFFERENCE:
        raise ValueError(f"the package in {args.out} and the training model disagree: {differences}")
    print(f"export: {size / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
