"""AutoencoderKL, unmodified and small: 8x, 8 latent channels.

FluxPipeline knows one scaling and one shift factor for all channels. This VAE speaks qwen-image-tiny's
latents after their normalisation per channel, so the factors are 1 and 0.

Shapes: x (B, 3, H, W) in [-1, 1]; z (B, LATENTS, H/8, W/8).
"""

from diffusers import AutoencoderKL
from torch import Tensor

LATENTS = 8
VAE_CONFIG = {
    "block_out_channels": (16, 32, 64, 96), "layers_per_block": 1, "latent_channels": LATENTS,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8, "sample_size": 128, "scaling_factor": 1.0, "shift_factor": 0.0,
    "force_upcast": False,
}  # fmt: skip


def build_vae() -> AutoencoderKL:
    """The tiny VAE with random weights."""
    return AutoencoderKL(**VAE_CONFIG)


def encode_moments(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance, both (B, LATENTS, H/8, W/8)."""
    return vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Pictures (B, 3, 8h, 8w) from latents, not clamped."""
    return vae.decoder(vae.post_quant_conv(z))
