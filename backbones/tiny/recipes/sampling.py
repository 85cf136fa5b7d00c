"""Sampling as QwenImagePipeline does it, in batches and from a training checkpoint, and contact sheets.

Shapes: B batch, N image tokens, C packed latent channels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image, ImageDraw
from torch import Tensor

from backbones.tiny.recipes.fast_dit import GRID, dit_forward, rope, unpack
from backbones.tiny.recipes.picture_vae import decode
from backbones.tiny.recipes.text import PromptTokens, encode_text

STEPS, GUIDANCE, SHIFT = 20, 4.0, 1.0  # the packaged pipeline's defaults
NEGATIVE = " "


@dataclass
class Sampler:
    """Everything that turns prompts into pictures: a TinyModel, its prompt tokens and the VAE."""

    model: torch.nn.Module
    tokens: PromptTokens
    vae: AutoencoderKLQwenImage

    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encoder states (B, L, D) and mask (B, L)."""
        ids, mask = self.tokens.batch(prompts)
        return encode_text(self.model.text, self.tokens.prefix, ids), mask

    @torch.no_grad()
    def latents(self, prompts: list[str], seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE,
                shift: float = SHIFT, velocity=None) -> Tensor:  # fmt: skip
        """Packed latents (B, N, C) after flow-matching Euler with true, norm-preserving guidance.

        velocity: replaces the dense model: (latents, sigma (B,), states, mask, step) -> velocity.
        """
        size = len(prompts)
        velocity = velocity or self.dense
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, GRID * GRID, self.model.dit.config.in_channels, generator=generator)
        states, mask = self.text([*prompts, *[NEGATIVE] * size])
        sigmas = torch.linspace(1.0, 1 / steps, steps)
        sigmas = torch.cat([shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)])
        for step in range(steps):
            both = velocity(torch.cat([x, x]), sigmas[step].expand(2 * size), states, mask, step)
            cond, uncond = both.float().chunk(2)
            mixed = uncond + guidance * (cond - uncond)
            mixed = mixed * (cond.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
            x = x + (sigmas[step + 1] - sigmas[step]) * mixed
        return x

    def dense(self, x: Tensor, sigma: Tensor, states: Tensor, mask: Tensor, step: int) -> Tensor:
        """The whole model's velocity."""
        return dit_forward(self.model.dit, x, sigma, states, mask, rope(states.shape[1]))

    @torch.no_grad()
    def decode(self, packed: Tensor) -> np.ndarray:
        """Pictures (B, 128, 128, 3) uint8 from packed latents."""
        config = self.vae.config
        z = unpack(packed) * torch.tensor(config.latents_std).view(1, -1, 1, 1)
        pictures = decode(self.vae, z + torch.tensor(config.latents_mean).view(1, -1, 1, 1)).clamp(-1, 1)
        return ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()

    def pictures(self, prompts: list[str], seed: int = 0, batch: int = 25, **options) -> np.ndarray:
        """Pictures for any number of prompts."""
        starts = range(0, len(prompts), batch)
        return np.concatenate(
            [self.decode(self.latents(prompts[s : s + batch], seed + s, **options)) for s in starts]
        )


def contact_sheet(
    pictures: np.ndarray, labels: list[str], path: Path, columns: int = 10, side: int = 96
) -> None:
    """Write pictures in a grid with a label under each."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + 12)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=False)):
        left, top = index % columns * side, index // columns * (side + 12)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + 2, top + side), label[: side // 6], fill="black")
    sheet.save(path)
