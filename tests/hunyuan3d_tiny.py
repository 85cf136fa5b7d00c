"""A Hunyuan3D checkpoint small enough for tests: random weights, published layout."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.hunyuan3d.checkpoints import save_checkpoint
from backbones.hunyuan3d.config import build
from backbones.hunyuan3d.family import TRANSFORMER_2
from routers.attachment import architecture, fingerprint
from routers.bundle import Bundle
from tests.tiny_pipelines import plans_for

VAE_PARAMS: dict[str, Any] = {
    "num_latents": 12,
    "embed_dim": 8,
    "width": 32,
    "heads": 4,
    "num_decoder_layers": 1,
    "num_encoder_layers": 1,
    "pc_size": 40,
    "pc_sharpedge_size": 20,
    "point_feats": 4,
    "downsample_ratio": 2,
    "num_freqs": 2,
    "include_pi": False,
    "qkv_bias": False,
    "qk_norm": True,
    "scale_factor": 0.9,
}
DIT_PARAMS: dict[str, Any] = {
    "in_channels": 8,
    "context_in_dim": 24,
    "hidden_size": 32,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8],
}
DINO: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
ENCODER: dict[str, Any] = {"type": "DinoImageEncoder", "kwargs": {"config": DINO, "image_size": 28}}
CONFIG: dict[str, Any] = {
    "model": {"target": "hy3dgen.shapegen.models.Hunyuan3DDiT", "params": DIT_PARAMS},
    "vae": {"target": "hy3dgen.shapegen.models.ShapeVAE", "params": VAE_PARAMS},
    "conditioner": {
        "target": "hy3dgen.shapegen.models.SingleImageEncoder",
        "params": {"main_image_encoder": ENCODER},
    },
    "scheduler": {
        "target": "hy3dgen.shapegen.schedulers.FlowMatchEulerDiscreteScheduler",
        "params": {"num_train_timesteps": 1000},
    },
    "image_processor": {
        "target": "hy3dgen.shapegen.preprocessors.ImageProcessorV2",
        "params": {"size": 32},
    },
    "pipeline": {"target": "hy3dgen.shapegen.pipelines.Hunyuan3DDiTFlowMatchingPipeline"},
}


def components() -> dict[str, nn.Module]:
    """The modules of CONFIG, the same weights every time."""
    torch.manual_seed(0)
    return {
        "model": build("model", CONFIG["model"]),
        "vae": build("vae", CONFIG["vae"]),
        "conditioner": build("conditioner", CONFIG["conditioner"]),
    }


def save_folder(folder: Path, **changes: Any) -> Path:
    """The checkpoint as a folder with a bundle in `routers/` (recommends 0.8).

    changes: sections of CONFIG to replace.
    """
    parts = components()
    save_checkpoint(folder, {**CONFIG, **changes}, parts)
    (folder / "edit.json").write_text('{"steps": 4, "octree_resolution": 24}')
    times, plans = plans_for(3)
    Bundle(
        spec=TRANSFORMER_2,
        base_model=folder.name,
        architecture=architecture(parts["model"]),
        fingerprint=fingerprint(parts["model"]),
        num_steps=4,
        guidance=5.0,
        times=[*times, times[-1]],  # the last step of its sampler goes nowhere
        plans=plans,
        recommended_budget=0.8,
    ).save(folder / "routers")
    return folder
