"""Sampling as FluxPipeline does it, in batches and from a training checkpoint.

Shapes: B batch, N image tokens, C packed latent channels.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from backbones.tiny.recipes.fast_dit import GRID, unpack
from backbones.tiny.recipes.flux.dit import load_model
from backbones.tiny.recipes.flux.fast_dit import dit_forward, rope
from backbones.tiny.recipes.flux.picture_vae import decode
from backbones.tiny.recipes.flux.text import T5_TOKENS, Prompts
from backbones.tiny.recipes.sampling import Sampler

SIDE, STEPS, GUIDANCE, SHIFT = 128, 20, 3.5, 1.0  # the packaged pipeline's defaults; px, steps, scale, shift


class FluxSampler(Sampler):
    """Turns prompts into pictures with a TinyFlux (`model`), its Prompts (`tokens`) and the VAE.

    Guidance is distilled: one call a step, told the scale.
    """

    @classmethod
    def load(cls, checkpoint: Path, vae: Path, tokenizer: Path) -> "FluxSampler":
        """The EMA weights of a checkpoint, ready to sample."""
        prompts = Prompts.load(tokenizer)
        return cls(load_model(checkpoint, prompts), prompts, AutoencoderKL.from_pretrained(vae).eval())

    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Pooled CLIP state (B, D_clip) and T5 states (B, L, D_t5)."""
        return self.model.encode(*self.tokens.batch(prompts))

    @torch.no_grad()
    def latents(self, prompts: list[str], seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE,
                shift: float = SHIFT, velocity=None, noise: Tensor | None = None) -> Tensor:  # fmt: skip
        """Packed latents (B, N, C) after flow-matching Euler.

        velocity: replaces the dense model: (latents, sigma (B,), text, scales (B,)) -> velocity.
        noise: packed start (B, N, C); default: drawn from `seed`.
        """
        velocity, size = velocity or self.dense, len(prompts)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, GRID * GRID, self.model.dit.config.in_channels, generator=generator)
        x = x if noise is None else noise
        text, scales = self.text(prompts), torch.full((size,), float(guidance))
        sigmas = torch.linspace(1.0, 1 / steps, steps)
        sigmas = torch.cat([shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)])
        for now, then in itertools.pairwise(sigmas):
            x = x + (then - now) * velocity(x, now.expand(size), text, scales).float()
        return x

    def dense(self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], scales: Tensor) -> Tensor:
        """The whole model's velocity."""
        return dit_forward(self.model.dit, x, sigma, text, rope(self.model.dit, T5_TOKENS), scales)

    @torch.no_grad()
    def decode(self, packed: Tensor) -> np.ndarray:
        """Pictures (B, 128, 128, 3) uint8 from packed latents."""
        config = self.vae.config
        z = unpack(packed) / config.scaling_factor + config.shift_factor
        pictures = decode(self.vae, z).clamp(-1, 1)
        return ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
