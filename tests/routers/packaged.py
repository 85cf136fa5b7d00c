"""The packaged models' pipelines, one of each for all tests of a process, and what is asked of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import backbones

TINY = Path(backbones.__file__).parent / "tiny"
QWEN, FLUX, MESH = (TINY / name for name in ("qwen_image_tiny", "flux_tiny", "hunyuan3d_tiny"))
PICTURES, ALL = (QWEN, FLUX), (QWEN, FLUX, MESH)
SIZE = {"width": 64, "height": 64, "output_type": "latent"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def load_whole(folder: Path) -> Any:
    """A packaged model's pipeline, shared by the tests: what one run leaves behind meets the next."""
    if folder == MESH:
        from backbones.hunyuan3d.checkpoints import load_pipeline

        return load_pipeline(folder, dtype=torch.float32, device=torch.device("cpu"))
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def load(folder: Path) -> Any:
    """A packaged model's pipeline with two blocks of each kind, shared by the tests: where it is asked when
    and how often is as of the whole model, and a run takes a quarter of the time.
    """
    pipe = load_whole.__wrapped__(folder)
    transformer = pipe.transformer
    for name, part in [*transformer.named_children()]:
        if isinstance(part, torch.nn.ModuleList) and len(part) > 2:
            setattr(transformer, name, part[:2])
    return pipe


def make(pipe: Any, steps: int = 8, **changes: Any) -> torch.Tensor:
    """Final latents of a picture or a mesh, by the pipeline's own call."""
    if hasattr(pipe, "vae") and hasattr(pipe, "conditioner"):
        return pipe.denoise(contexts(pipe), pipe.noise(1, seeded()), steps, **changes)
    if "Qwen" in type(pipe).__name__:
        changes = {"negative_prompt": " ", **changes}
    arguments = {"prompt": "a cat", "num_inference_steps": steps, "generator": seeded(), **SIZE, **changes}
    return pipe(**arguments).images


def contexts(pipe: Any, rows: int = 1) -> dict[str, torch.Tensor]:
    """What the mesh model sees of a picture."""
    return {"main": torch.randn(rows, 20, pipe.transformer.cond_in.in_features, generator=seeded(1))}


def sketch() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def image_to_image(pipe: Any, **components: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline"))
    again = kind.from_pipe(pipe, **components)
    again.set_progress_bar_config(disable=True)
    return again


class StopError(Exception):
    """A user's callback ends a run."""


def stop_at(step: int, how: str) -> Any:
    """A callback that ends a diffusers run after a step."""

    def callback(pipe: Any, index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
        if index == step and how == "exception":
            raise StopError
        pipe._interrupt = index >= step
        return {}

    return callback
