"""The tiny shape model: conditioner and DiT of `backbones.hunyuan3d` at small sizes, and its sampling.

Shapes: B batch, L latents, C latent channels, S condition tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.hunyuan3d.conditioner import SingleImageEncoder
from backbones.hunyuan3d.dit_v2 import Hunyuan3DDiT
from backbones.hunyuan3d.pipeline import denoise
from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.tiny.recipes.shapes.dataset import IMAGE_SIDE
from backbones.tiny.recipes.shapes.store import KINDS, ShapeSet
from backbones.tiny.recipes.shapes.vae import VAE_PARAMS, Stats, iou, occupied

WIDTH = 192
DIT_PARAMS: dict[str, Any] = {
    "in_channels": VAE_PARAMS["embed_dim"], "context_in_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 4.0,
    "num_heads": 6, "depth": 2, "depth_single_blocks": 6, "axes_dim": [32], "qkv_bias": True,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "type": "DinoImageEncoder",
    "kwargs": {
        "config": {
            "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 6, "mlp_ratio": 4,
            "image_size": IMAGE_SIDE, "patch_size": 14, "layerscale_value": 1.0,
        },
        "image_size": IMAGE_SIDE,
        "use_cls_token": True,
    },
}  # fmt: skip
STEPS, GUIDANCE = 20, 2.0


class ShapeModel(nn.Module):
    """Conditioner and DiT as one module, so that optimiser, EMA and checkpoints see one state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioner = SingleImageEncoder(ENCODER)
        self.dit = Hunyuan3DDiT(**DIT_PARAMS)
        start_near_identity(self.dit)

    def forward(self, x: Tensor, t: Tensor, image: Tensor, keep: Tensor) -> Tensor:
        """Velocity (B, L, C) of x at t (B,), given pictures (B, 3, S, S); keep (B,) bool: which are shown."""
        context = self.conditioner(image)["main"] * keep[:, None, None]
        return self.dit(x, t, {"main": context})


def start_near_identity(dit: Hunyuan3DDiT) -> None:
    """adaLN-zero starts (Peebles & Xie 2023): modulations and output at zero, gates a little open."""
    for block in dit.double_blocks:
        for modulation in (block.img_mod.lin, block.txt_mod.lin):
            _open_gates(modulation, 2)
    for block in dit.single_blocks:
        _open_gates(block.modulation.lin, 1)
    for layer in (dit.final_layer.linear, dit.final_layer.adaLN_modulation[1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _open_gates(modulation: nn.Linear, count: int, gate: float = 0.1) -> None:
    nn.init.zeros_(modulation.weight)
    nn.init.zeros_(modulation.bias)
    with torch.no_grad():
        # Per triple (shift, scale, gate); with all gates shut the first hundreds of steps are lost.
        modulation.bias.view(count, 3, -1)[:, 2] = gate


def load_model(checkpoint: Path) -> ShapeModel:
    """The EMA weights of a training checkpoint."""
    model = ShapeModel()
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"], strict=False)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def sample(model: ShapeModel, image: Tensor, latents: int, seed: int = 0, steps: int = STEPS,
           guidance: float = GUIDANCE) -> Tensor:  # fmt: skip
    """Normalised latents (B, L, C) of pictures, by the published loop; one generator per row."""
    shape = (latents, DIT_PARAMS["in_channels"])
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(image))]
    contexts = model.conditioner(image)
    return denoise(model.dit, FlowMatchEulerScheduler(), torch.stack(noise), contexts, steps, guidance)


def chain_iou(model: ShapeModel, vae: ShapeVAE, stats: Stats, data: ShapeSet, count: int, every: int = 1,
              **options: Any) -> dict[str, np.ndarray]:  # fmt: skip
    """IoU of picture -> latents -> field with the true shape, (count,) per kind, at every n-th grid point."""
    result = {}
    for kind in KINDS:
        rows = data.rows[kind][:count]
        if len(rows):
            batch = data.batch(rows, 1, 1, augment=False)
            latents = sample(model, batch.image, vae.latent_shape[0], **options) * stats[1] + stats[0]
            result[kind] = iou(occupied(vae, latents, every), data.occupancy(rows)[:, ::every])
    return result
