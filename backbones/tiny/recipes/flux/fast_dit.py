"""FluxTransformer2DModel for training: the same numbers as the unmodified class, compiled block by block.

Adds what the class has no argument for: grids at half resolution whose rope positions lie at the centres of
the full grid's 2x2 groups, per-sample block skips, and nested MLP widths.

Shapes: B batch, N image tokens, L text tokens, D dim, H heads, K head dim, F MLP width, C packed channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from backbones.tiny.recipes.fast_dit import GRID, THETA, _mlp, _rms, _rotate
from backbones.tiny.recipes.flux.picture_vae import LATENTS
from backbones.tiny.recipes.flux.text import CLIP_WIDTH, T5_TOKENS, T5_WIDTH

DIT_CONFIG = {
    "patch_size": 1, "in_channels": 4 * LATENTS, "num_layers": 5, "num_single_layers": 12,
    "attention_head_dim": 32, "num_attention_heads": 6, "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
OPEN_GATE = 0.1  # start of the gates; at zero the first hundreds of steps are lost


def build_dit() -> FluxTransformer2DModel:
    """The tiny DiT with adaLN-zero starts (Peebles & Xie 2023) and a silent guidance embedding."""
    dit = FluxTransformer2DModel(**DIT_CONFIG)
    double = [norm for block in dit.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    single = [block.norm for block in dit.single_transformer_blocks]
    last = [dit.norm_out.linear, dit.proj_out, dit.time_text_embed.guidance_embedder.linear_2]
    for layer in [*(norm.linear for norm in double + single), *last]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    dim = dit.inner_dim
    for norm in double + single:
        norm.linear.bias.data[2 * dim : 3 * dim] = OPEN_GATE
        norm.linear.bias.data[5 * dim :] = OPEN_GATE  # nothing in single blocks: they have one gate
    return dit


@dataclass
class Rope:
    """Cosines and sines (tokens, K/2) of the joint [text, image] sequence."""

    cos: Tensor
    sin: Tensor


def rope(
    dit: FluxTransformer2DModel, text_tokens: int = T5_TOKENS, grid: tuple[int, int] = (GRID, GRID), step:
    int = 1, device: str = "cpu",
) -> Rope:  # fmt: skip
    """Rotary angles for FluxPipeline's ids: text at the origin, image tokens at (0, row, column) from 0 on.

    grid: image tokens, (rows, columns). step: with 2, the tokens of a picture of half the size, which sit
    at the centres of the full grid's groups.
    """
    axes = [torch.arange(side) * step + (step - 1) / 2 for side in grid]
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    image = torch.stack([torch.zeros(rows.numel()), rows.flatten(), cols.flatten()], dim=1)
    positions = torch.cat([torch.zeros(text_tokens, 3), image])
    angles = []
    for axis, width in enumerate(dit.config.axes_dims_rope):
        frequencies = 1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles.append(positions[:, axis : axis + 1] * frequencies)
    angle = torch.cat(angles, dim=1).to(device)
    return Rope(angle.cos(), angle.sin())


def _modulation(linear, silu_temb: Tensor) -> tuple[Tensor, ...]:
    """Parts (B, 1, D) of one adaLN projection: shift, scale, gate, and the same for the MLP if it has one."""
    parts = F.linear(silu_temb, linear.weight, linear.bias).unsqueeze(1)
    return parts.chunk(linear.out_features // silu_temb.shape[-1], dim=-1)


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


def _heads(attn, x: Tensor, linear, norm=None) -> Tensor:
    """(B, L, H, K) projection, RMS-normalised per head where a norm is given."""
    y = F.linear(x, linear.weight, linear.bias).unflatten(-1, (attn.heads, -1))
    return y if norm is None else _rms(y, norm.weight, norm.eps)


def _attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Softmax attention over (B, L, H, K), to (B, L, D).

    Plain on a CPU, where the fused kernel's backward pass is far slower.
    """
    q, k = (_rotate(x, cos, sin).to(v.dtype).transpose(1, 2) for x in (q, k))
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.float().softmax(-1).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def double_forward(
    block, img: Tensor, txt: Tensor, silu_temb: Tensor, cos: Tensor, sin: Tensor,
    keep: Tensor | None = None, width_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One FluxTransformerBlock: (img, txt) after it.

    silu_temb (B, D); keep (B, 1, 1) bool is false where a sample skips the block; width_mask (B, 1, F) bool
    is false on the image MLP's hidden units that a sample does without.
    """
    attn, length = block.attn, txt.shape[1]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(block.norm1.linear, silu_temb)
    c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = _modulation(
        block.norm1_context.linear, silu_temb
    )
    x, c = _norm(img, shift, scale), _norm(txt, c_shift, c_scale)
    q = torch.cat(
        [_heads(attn, c, attn.add_q_proj, attn.norm_added_q), _heads(attn, x, attn.to_q, attn.norm_q)], 1
    )
    k = torch.cat(
        [_heads(attn, c, attn.add_k_proj, attn.norm_added_k), _heads(attn, x, attn.to_k, attn.norm_k)], 1
    )
    v = torch.cat([_heads(attn, c, attn.add_v_proj), _heads(attn, x, attn.to_v)], 1)
    out = _attention(q, k, v, cos, sin)
    img_new = img + gate * F.linear(out[:, length:], attn.to_out[0].weight, attn.to_out[0].bias)
    txt_new = txt + c_gate * F.linear(out[:, :length], attn.to_add_out.weight, attn.to_add_out.bias)
    img_new = img_new + mlp_gate * _mlp(block.ff, _norm(img_new, mlp_shift, mlp_scale), width_mask)
    txt_new = txt_new + c_mlp_gate * _mlp(block.ff_context, _norm(txt_new, c_mlp_shift, c_mlp_scale))
    if keep is not None:
        img_new, txt_new = img + keep * (img_new - img), txt + keep * (txt_new - txt)
    return img_new, txt_new


def single_forward(
    block, x: Tensor, silu_temb: Tensor, cos: Tensor, sin: Tensor,
    keep: Tensor | None = None, width_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One FluxSingleTransformerBlock on the joint [text, image] stream x (B, L+N, D).

    keep, width_mask: see `double_forward`.
    """
    attn, dim = block.attn, x.shape[-1]
    shift, scale, gate = _modulation(block.norm.linear, silu_temb)
    h = _norm(x, shift, scale)
    q, k = _heads(attn, h, attn.to_q, attn.norm_q), _heads(attn, h, attn.to_k, attn.norm_k)
    out = _attention(q, k, _heads(attn, h, attn.to_v), cos, sin)
    hidden = F.gelu(F.linear(h, block.proj_mlp.weight, block.proj_mlp.bias), approximate="tanh")
    if width_mask is not None:
        hidden = hidden * width_mask
    weight = block.proj_out.weight
    y = F.linear(out, weight[:, :dim], block.proj_out.bias) + F.linear(hidden, weight[:, dim:])
    y = gate * y
    return x + y if keep is None else x + keep * y


@dataclass(frozen=True)
class BlockFns:
    """How blocks run: as written, or compiled."""

    double: object = double_forward
    single: object = single_forward

    @classmethod
    def compiled(cls) -> "BlockFns":
        """Both through torch.compile, one graph per input shape."""
        return cls(*(torch.compile(fn, dynamic=False) for fn in (double_forward, single_forward)))


def time_text(dit: FluxTransformer2DModel, sigma: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
    """Modulation input temb (B, D) from sigma (B,) in [0, 1], pooled text and any guidance scales (B,)."""
    embed = dit.time_text_embed
    temb = embed.timestep_embedder(embed.time_proj(sigma * 1000).to(pooled.dtype))
    if guidance is not None:
        temb = temb + embed.guidance_embedder(embed.time_proj(guidance * 1000).to(pooled.dtype))
    return temb + embed.text_embedder(pooled)


def dit_forward(
    dit: FluxTransformer2DModel, latents: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], angles: Rope,
    guidance: Tensor | None = None, fns: BlockFns | None = None, keep: Tensor | None = None,
    width_masks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Predicted velocity (B, N, C) for packed latents (B, N, C) at sigma (B,) in [0, 1].

    text: pooled CLIP state (B, D_clip) and T5 states (B, L, D_t5). guidance (B,) scales; None leaves the
    guidance embedding out. keep (blocks, B, 1, 1), width_masks (blocks, B, 1, F): see `double_forward`;
    double blocks come first.
    """
    fns = fns or BlockFns()
    pooled, states = text
    silu_temb = F.silu(time_text(dit, sigma, pooled, guidance))
    img, txt = dit.x_embedder(latents), dit.context_embedder(states)

    def choices(index: int) -> dict[str, Tensor]:
        return {} if keep is None else {"keep": keep[index], "width_mask": width_masks[index]}

    for index, block in enumerate(dit.transformer_blocks):
        img, txt = fns.double(block, img, txt, silu_temb, angles.cos, angles.sin, **choices(index))
    joint = torch.cat([txt, img], dim=1)
    for index, block in enumerate(dit.single_transformer_blocks, len(dit.transformer_blocks)):
        joint = fns.single(block, joint, silu_temb, angles.cos, angles.sin, **choices(index))
    scale, shift = dit.norm_out.linear(silu_temb).unsqueeze(1).chunk(2, dim=-1)
    return dit.proj_out(_norm(joint[:, txt.shape[1] :], shift, scale))


def class_forward(
    dit: FluxTransformer2DModel, latents: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor],
    guidance: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `dit_forward` computes on the full grid, through the unmodified class with FluxPipeline's ids."""
    rows, cols = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    pooled, states = text
    return dit(
        hidden_states=latents, encoder_hidden_states=states, pooled_projections=pooled, timestep=sigma,
        img_ids=torch.stack([torch.zeros(GRID, GRID), rows, cols], dim=-1).reshape(-1, 3),
        txt_ids=torch.zeros(states.shape[1], 3), guidance=guidance, return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def largest_difference(dit: FluxTransformer2DModel) -> float:
    """Largest difference between `dit_forward` and the unmodified class on random input, in fp32."""
    config, generator = dit.config, torch.Generator().manual_seed(0)
    latents = torch.randn(3, GRID * GRID, config.in_channels, generator=generator)
    states = torch.randn(3, T5_TOKENS, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(3, config.pooled_projection_dim, generator=generator)
    sigma, guidance = torch.tensor([0.1, 0.5, 0.95]), torch.tensor([1.0, 3.5, 6.0])
    mine = dit_forward(dit, latents, sigma, (pooled, states), rope(dit), guidance)
    theirs = class_forward(dit, latents, sigma, (pooled, states), guidance)
    return (mine - theirs).abs().max().item()
