"""Small workloads for calibration and training: random models whose blocks matter, a few samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from backbones.workloads import MeshWorkload, PipelineWorkload

STEPS, ROWS = 6, 2


def picture(colour: str) -> Image.Image:
    """A spot of a colour on nothing."""
    image = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(image).ellipse((6, 9, 33, 30), fill=colour)
    return image


def make_blocks_matter(model: nn.Module) -> None:
    """Random modulations are near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))


def picture_workload(folder: Path, steps: int = STEPS) -> PipelineWorkload:
    """Two batches of two prompts on a random QwenImagePipeline, which is saved to a folder."""
    from diffusers import QwenImagePipeline

    from backbones import registry
    from tests.tiny_pipelines import make_qwen_image

    pipe = QwenImagePipeline.from_pretrained(make_qwen_image(folder))
    pipe.set_progress_bar_config(disable=True)
    make_blocks_matter(pipe.transformer)
    prompts = ["a cat", "a red car", "a tree", "the sun"]
    return PipelineWorkload(pipe, registry.resolve(str(folder)), ROWS, steps, 4.0, prompts, 64, 64)


def mesh_workload(version: str = "2.0", guidance: float = 5.0) -> MeshWorkload:
    """Two batches of two shapes on a random Hunyuan3D 2 or 2.1."""
    from backbones import registry
    from backbones.hunyuan3d.dit_v21 import HunYuanDiTPlain
    from backbones.hunyuan3d.image_processor import ImageProcessor
    from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline
    from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
    from backbones.workloads import embed
    from tests.hunyuan3d_tiny import components

    parts: dict[str, Any] = components()
    if version == "2.1":
        torch.manual_seed(0)
        parts["model"] = HunYuanDiTPlain(
            in_channels=8, hidden_size=32, context_dim=24, depth=5, num_heads=4, num_moe_layers=1,
            num_experts=4, qk_norm=True, qkv_bias=False,
        )  # fmt: skip
    make_blocks_matter(parts["model"])
    pipe = Hunyuan3DPipeline(
        parts["model"], parts["vae"], parts["conditioner"], FlowMatchEulerScheduler(), ImageProcessor(32)
    )
    contexts = embed(pipe, [picture("red"), picture("blue"), picture("lime")])
    row = registry.rows()["hunyuan3d-tiny"]
    return MeshWorkload(pipe, row, ROWS, STEPS, guidance, contexts, 4, seed=3)
