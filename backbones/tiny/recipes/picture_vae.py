"""AutoencoderKLQwenImage on single pictures, as 2-D convolutions.

The unmodified class treats a picture as a one-frame video: its causal 3-D convolutions pad two empty frames
before it, so only the last temporal slice of each kernel ever sees data. Walking the same modules with
`weight[:, :, -1]` gives the same numbers in a third of the time; `tests` and step `export` compare the two.

Shapes: x (B, 3, H, W) in [-1, 1]; z (B, z_dim, H/8, W/8).
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


def build_vae(
    latents_mean: list[float] | None = None, latents_std: list[float] | None = None
) -> AutoencoderKLQwenImage:
    """The tiny VAE; statistics default to 0 and 1 until step `vae` has measured them."""
    z_dim = VAE_CONFIG["z_dim"]
    return AutoencoderKLQwenImage(
        **VAE_CONFIG, latents_mean=latents_mean or [0.0] * z_dim, latents_std=latents_std or [1.0] * z_dim
    )


def zero_unused_slices(vae: AutoencoderKLQwenImage) -> int:
    """Zero the weights a single picture never reaches; returns how many there were."""
    count = 0
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):
            with torch.no_grad():
                unused = module.weight if name.endswith("time_conv") else module.weight[:, :, :-1]
                unused.zero_()
                count += unused.numel()
    return count


def _conv(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.weight
    if weight.dim() == 5:
        weight = weight[:, :, -1]
    return F.conv2d(x, weight, module.bias, padding=weight.shape[-1] // 2)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    gamma = module.gamma.view(1, -1, 1, 1)
    length = x.float().square().sum(1, keepdim=True).add(1e-12).rsqrt()
    return x * (length * module.scale).to(x.dtype) * gamma.to(x.dtype)


def _resnet(block: nn.Module, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    return shortcut + _conv(block.conv2, F.silu(_norm(block.norm2, h)))


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    qkv = F.conv2d(_norm(block.norm, x), block.to_qkv.weight, block.to_qkv.bias)
    q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
    out = (
        F.scaled_dot_product_attention(q, k, v)
        .squeeze(1)
        .transpose(1, 2)
        .reshape(batch, channels, height, width)
    )
    return x + F.conv2d(out, block.proj.weight, block.proj.bias)


def _mid(block: nn.Module, x: Tensor) -> Tensor:
    x = _resnet(block.resnets[0], x)
    return _resnet(block.resnets[1], _attention(block.attentions[0], x))


def _downsample(block: nn.Module, x: Tensor) -> Tensor:
    conv = block.resample[1]
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)


def _upsample(block: nn.Module, x: Tensor) -> Tensor:
    return _conv(block.resample[1], F.interpolate(x, scale_factor=2.0, mode="nearest"))


def encode_moments(vae: AutoencoderKLQwenImage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance of pictures, both (B, z_dim, H/8, W/8)."""
    encoder = vae.encoder
    h = _conv(encoder.conv_in, x)
    for block in encoder.down_blocks:
        h = _downsample(block, h) if hasattr(block, "resample") else _resnet(block, h)
    h = _mid(encoder.mid_block, h)
    h = _conv(encoder.conv_out, F.silu(_norm(encoder.norm_out, h)))
    return _conv(vae.quant_conv, h).chunk(2, dim=1)


def decode(vae: AutoencoderKLQwenImage, z: Tensor) -> Tensor:
    """Pictures (B, 3, 8h, 8w) from unnormalised latents, not clamped."""
    decoder = vae.decoder
    h = _conv(decoder.conv_in, _conv(vae.post_quant_conv, z))
    h = _mid(decoder.mid_block, h)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = _resnet(resnet, h)
        if block.upsamplers is not None:
            h = _upsample(block.upsamplers[0], h)
    return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, h)))


@torch.no_grad()
def largest_difference(vae: AutoencoderKLQwenImage, x: Tensor) -> float:
    """Largest absolute difference between this file and the unmodified class, over latents and pictures."""
    mean, _ = encode_moments(vae, x)
    reference = vae.encode(x.unsqueeze(2)).latent_dist.mode().squeeze(2)
    picture = decode(vae, reference).clamp(-1, 1)
    expected = vae.decode(reference.unsqueeze(2)).sample.squeeze(2)
    return max((mean - reference).abs().max().item(), (picture - expected).abs().max().item())
