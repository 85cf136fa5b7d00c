"""QwenImageTransformer2DModel for training: the same numbers as the unmodified class, without complex rope.

Adds what the class has no argument for: grids at half resolution whose rope positions lie at the centres of
the full grid's 2x2 groups, per-sample block skips, and nested MLP widths.

Shapes: B batch, N image tokens, L text tokens, D dim, H heads, K head dim, C packed latent channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from backbones.tiny.recipes.picture_vae import VAE_CONFIG
from backbones.tiny.recipes.text import WIDTH

GRID = 8  # image tokens per side at 128 px: 8x VAE, 2x2 packing
AXES = (8, 12, 12)
DIT_CONFIG = {
    "patch_size": 2, "in_channels": 4 * VAE_CONFIG["z_dim"], "out_channels": VAE_CONFIG["z_dim"],
    "num_layers": 15,
    "attention_head_dim": 32, "num_attention_heads": 5, "joint_attention_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": AXES,
}  # fmt: skip
THETA = 10000.0  # QwenEmbedRope's default


def build_dit() -> QwenImageTransformer2DModel:
    """The tiny DiT with adaLN-zero starts: modulations and output begin at zero (Peebles & Xie 2023)."""
    dit = QwenImageTransformer2DModel(**DIT_CONFIG)
    for block in dit.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
            # Open the gates a little: with all of them at zero the first hundreds of steps are lost.
            dim = modulation.bias.shape[0] // 6
            modulation.bias.data[2 * dim : 3 * dim] = 0.1
            modulation.bias.data[5 * dim :] = 0.1
    for layer in (dit.norm_out.linear, dit.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return dit


@dataclass
class Rope:
    """Cosines and sines (tokens, K/2) of the joint [text, image] sequence."""

    cos: Tensor
    sin: Tensor


def rope(text_tokens: int, grid: tuple[int, int] = (GRID, GRID), step: int = 1, device: str = "cpu") -> Rope:
    """Rotary angles as QwenEmbedRope(scale_rope=True) gives them for a picture of `grid` tokens, (rows,
    columns).

    step: with 2, the tokens of a picture of half the size, which sit at the centres of the full grid's
    groups.
    """
    sides = [side * step for side in grid]
    axes = [
        torch.arange(side) * step + (step - 1) / 2 - (full - full // 2)
        for side, full in zip(grid, sides, strict=True)
    ]
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    image = torch.stack([torch.zeros(rows.numel()), rows.flatten(), cols.flatten()], dim=1)
    first = max(side // 2 for side in sides)
    text = (first + torch.arange(text_tokens, dtype=torch.float32))[:, None].expand(-1, 3)
    positions = torch.cat([text, image])
    angles = []
    for axis, width in enumerate(AXES):
        frequencies = 1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles.append(positions[:, axis : axis + 1] * frequencies)
    angle = torch.cat(angles, dim=1).to(device)
    return Rope(angle.cos(), angle.sin())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, L, H, K)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention (B, H, L, K), plain on a CPU, where the fused kernel's backward pass is far
    slower.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.float().masked_fill(~mask, -1e9).softmax(-1).to(v.dtype) @ v


def _mlp(mlp, x: Tensor, width_mask: Tensor | None = None) -> Tensor:
    hidden = F.gelu(F.linear(x, mlp.net[0].proj.weight, mlp.net[0].proj.bias), approximate="tanh")
    if width_mask is not None:
        hidden = hidden * width_mask
    return F.linear(hidden, mlp.net[2].weight, mlp.net[2].bias)


def block_forward(
    block, img: Tensor, txt: Tensor, silu_temb: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
    keep: Tensor | None = None, width_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One QwenImageTransformerBlock: (img, txt) after it.

    silu_temb (B, D); mask (B, 1, 1, L+N) bool; keep (B, 1, 1) bool is false where a sample skips the block;
    width_mask (B, 1, F) bool is false on the image MLP's hidden units that a sample does without.
    """
    attn, dim, length = block.attn, img.shape[-1], txt.shape[1]
    img_mod = (
        F.linear(silu_temb, block.img_mod[1].weight, block.img_mod[1].bias).unsqueeze(1).chunk(6, dim=-1)
    )
    txt_mod = (
        F.linear(silu_temb, block.txt_mod[1].weight, block.txt_mod[1].bias).unsqueeze(1).chunk(6, dim=-1)
    )
    x = F.layer_norm(img, (dim,), eps=1e-6) * (1 + img_mod[1]) + img_mod[0]
    c = F.layer_norm(txt, (dim,), eps=1e-6) * (1 + txt_mod[1]) + txt_mod[0]

    def heads(tokens: Tensor, linear) -> Tensor:
        return F.linear(tokens, linear.weight, linear.bias).unflatten(-1, (attn.heads, -1))

    q = torch.cat(
        [
            _rms(heads(c, attn.add_q_proj), attn.norm_added_q.weight, 1e-6),
            _rms(heads(x, attn.to_q), attn.norm_q.weight, 1e-6),
        ],
        1,
    )
    k = torch.cat(
        [
            _rms(heads(c, attn.add_k_proj), attn.norm_added_k.weight, 1e-6),
            _rms(heads(x, attn.to_k), attn.norm_k.weight, 1e-6),
        ],
        1,
    )
    v = torch.cat([heads(c, attn.add_v_proj), heads(x, attn.to_v)], 1)
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    out = _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2).flatten(2)
    img_new = img + img_mod[2] * F.linear(out[:, length:], attn.to_out[0].weight, attn.to_out[0].bias)
    txt_new = txt + txt_mod[2] * F.linear(out[:, :length], attn.to_add_out.weight, attn.to_add_out.bias)
    x = F.layer_norm(img_new, (dim,), eps=1e-6) * (1 + img_mod[4]) + img_mod[3]
    c = F.layer_norm(txt_new, (dim,), eps=1e-6) * (1 + txt_mod[4]) + txt_mod[3]
    img_new = img_new + img_mod[5] * _mlp(block.img_mlp, x, width_mask)
    txt_new = txt_new + txt_mod[5] * _mlp(block.txt_mlp, c)
    if keep is not None:
        img_new, txt_new = img + keep * (img_new - img), txt + keep * (txt_new - txt)
    return img_new, txt_new


def dit_forward(
    dit: QwenImageTransformer2DModel, latents: Tensor, sigma: Tensor, text: Tensor, text_mask: Tensor,
    angles: Rope,    block_fn=block_forward, keep: Tensor | None = None, width_masks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Predicted velocity (B, N, C) for packed latents (B, N, C) at sigma (B,) in [0, 1].

    text (B, L, D) encoder states with text_mask (B, L) bool. keep (blocks, B, 1, 1), width_masks
    (blocks, B, 1, F): see block_forward.
    """
    img = dit.img_in(latents)
    txt = dit.txt_in(dit.txt_norm(text))
    temb = dit.time_text_embed.timestep_embedder(dit.time_text_embed.time_proj(sigma).to(img.dtype))
    silu_temb = F.silu(temb)
    mask = torch.cat([text_mask, text_mask.new_ones(latents.shape[:2])], dim=1)[:, None, None]
    for index, block in enumerate(dit.transformer_blocks):
        extra = {} if keep is None else {"keep": keep[index], "width_mask": width_masks[index]}
        img, txt = block_fn(block, img, txt, silu_temb, angles.cos, angles.sin, mask, **extra)
    scale, shift = dit.norm_out.linear(silu_temb).chunk(2, dim=-1)
    img = F.layer_norm(img, (img.shape[-1],), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return dit.proj_out(img)


def pack(latents: Tensor) -> Tensor:
    """(B, Z, h, w) -> (B, h/2 * w/2, 4 Z), as QwenImagePipeline._pack_latents."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of `pack`. grid: token rows and columns; default: a square."""
    batch, count, channels = tokens.shape
    rows, cols = grid or (int(count**0.5), int(count**0.5))
    x = tokens.reshape(batch, rows, cols, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, rows * 2, cols * 2)


@torch.no_grad()
def largest_difference(
    dit: QwenImageTransformer2DModel, text_tokens: int = 9, grid: tuple[int, int] = (GRID, GRID)
) -> float:
    """Largest difference between `dit_forward` and the unmodified class on random input, in fp32."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, grid[0] * grid[1], DIT_CONFIG["in_channels"], generator=generator)
    text = torch.randn(3, text_tokens, WIDTH, generator=generator)
    mask = torch.arange(text_tokens)[None] < torch.tensor([text_tokens, 5, 7])[:, None]
    sigma = torch.tensor([0.1, 0.5, 0.95])
    mine = dit_forward(dit, latents, sigma, text, mask, rope(text_tokens, grid))
    theirs = dit(latents, text, mask, sigma, img_shapes=[[(1, *grid)]] * 3, return_dict=False)[0]
    return (mine - theirs).abs().max().item()
