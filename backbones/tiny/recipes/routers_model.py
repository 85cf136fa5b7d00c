"""What step `routers` needs of a tiny model: its blocks one by one, under soft decisions, with a memory.

A closed block adds what its last two passes say that it would add (`routers.train.student.Memory`), here for
rows that are each at an evaluation of their own.

Shapes: S samples, R rows (branches x S, one branch after the other), N blocks, L tokens, D dim, F hidden
units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.tiny.recipes.dit import TEXT_TOKENS, TinyModel
from backbones.tiny.recipes.fast_dit import GRID, block_forward, rope
from backbones.tiny.recipes.flux import fast_dit as flux_dit
from backbones.tiny.recipes.flux.text import T5_TOKENS
from backbones.tiny.recipes.sampling import GUIDANCE, NEGATIVE
from backbones.tiny.recipes.text import PromptTokens, encode_text
from routers.spec import WIDTHS
from routers.train.student import Decision, per_row, per_stream
from routers.train.trajectory import Costs

Streams = tuple[Tensor, ...]
HALF = torch.bfloat16  # what blocks compute in


@dataclass
class Qwen:
    """qwen-image-tiny: two branches, of prompts and of NEGATIVE. `text` gives states (R, L, D) and mask."""

    dit: nn.Module
    encoder: nn.Module
    tokens: PromptTokens
    branches: int = 2
    guidance: float = GUIDANCE

    @classmethod
    def of(cls, model: TinyModel, tokens: PromptTokens) -> "Qwen":
        """A training's model."""
        return cls(model.dit, model.text, tokens)

    @property
    def blocks(self) -> list[nn.Module]:
        """In order."""
        return list(self.dit.transformer_blocks)

    @property
    def hidden(self) -> int:
        """Units of an image MLP."""
        return int(self.blocks[0].img_mlp.net[2].in_features)

    @torch.no_grad()
    def text(self, captions: list[str], device: Any) -> Streams:
        """Of all rows."""
        rows = [*captions, *[NEGATIVE] * len(captions)]
        ids, mask = (part.to(device) for part in self.tokens.batch(rows, TEXT_TOKENS))
        return encode_text(self.encoder, self.tokens.prefix, ids).float(), mask

    def open(self, x: Tensor, sigma: Tensor, text: Streams) -> tuple[Streams, SimpleNamespace]:
        """Streams before the first block, and what all blocks are told; its `temb` (R, D) modulates them."""
        dit, (states, mask) = self.dit, text
        img, txt = dit.img_in(x), dit.txt_in(dit.txt_norm(states))
        embed = dit.time_text_embed
        temb = embed.timestep_embedder(embed.time_proj(sigma).to(img.dtype))
        angles = rope(TEXT_TOKENS, device=x.device.type)
        seen = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)[:, None, None]
        return (img, txt), SimpleNamespace(temb=temb, silu=F.silu(temb), angles=angles, mask=seen)

    def block(self, index: int, streams: Streams, told: SimpleNamespace, width: Tensor | None) -> Streams:
        """Streams after a block. width (R, 1, F): mask of the image MLP."""
        cos, sin = told.angles.cos, told.angles.sin
        return block_forward(
            self.dit.transformer_blocks[index], *streams, told.silu, cos, sin, told.mask, None, width
        )

    def close(self, streams: Streams, told: SimpleNamespace) -> Tensor:
        """Velocities (R, N, C)."""
        scale, shift = self.dit.norm_out.linear(told.silu).chunk(2, dim=-1)
        img = F.layer_norm(streams[0], (streams[0].shape[-1],), eps=1e-6) * (1 + scale[:, None])
        return self.dit.proj_out(img + shift[:, None])


@dataclass
class Turbo:
    """flux-tiny-turbo: one branch. `text` gives the pooled CLIP state and the T5 states."""

    dit: nn.Module
    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    tokens: Any
    branches: int = 1
    guidance: float = 1.0

    @property
    def blocks(self) -> list[nn.Module]:
        """In order, double ones first."""
        return [*self.dit.transformer_blocks, *self.dit.single_transformer_blocks]

    @property
    def hidden(self) -> int:
        """Units of an image MLP."""
        return int(self.dit.single_transformer_blocks[0].mlp_hidden_dim)

    @torch.no_grad()
    def text(self, captions: list[str], device: Any) -> Streams:
        """Of all rows."""
        ids = (part.to(device) for part in self.tokens.batch(captions))
        return tuple(part.float() for part in self.encode(*ids))

    def open(self, x: Tensor, sigma: Tensor, text: Streams) -> tuple[Streams, SimpleNamespace]:
        """See `Qwen.open`."""
        pooled, states = text
        temb = flux_dit.time_text(self.dit, sigma, pooled, None)
        angles = flux_dit.rope(self.dit, T5_TOKENS, (GRID, GRID), device=x.device.type)
        streams = self.dit.x_embedder(x), self.dit.context_embedder(states)
        return streams, SimpleNamespace(temb=temb, silu=F.silu(temb), angles=angles)

    def block(self, index: int, streams: Streams, told: SimpleNamespace, width: Tensor | None) -> Streams:
        """See `Qwen.block`."""
        (img, txt), (cos, sin), double = (
            streams,
            (told.angles.cos, told.angles.sin),
            self.dit.transformer_blocks,
        )
        if index < len(double):
            return flux_dit.double_forward(double[index], img, txt, told.silu, cos, sin, None, width)
        single = self.dit.single_transformer_blocks[index - len(double)]
        joint = flux_dit.single_forward(single, torch.cat([txt, img], 1), told.silu, cos, sin, None, width)
        return joint[:, txt.shape[1] :], joint[:, : txt.shape[1]]

    def close(self, streams: Streams, told: SimpleNamespace) -> Tensor:
        """See `Qwen.close`."""
        scale, shift = self.dit.norm_out.linear(told.silu).unsqueeze(1).chunk(2, dim=-1)
        return self.dit.proj_out(flux_dit._norm(streams[0], shift, scale))


class Passes:
    """What blocks added in their last two passes, newest first: streams (R, L, D), and when (N, R)."""

    def __init__(self, blocks: int) -> None:
        self.deltas: list[tuple[Streams, Streams] | None] = [None] * blocks
        self.last: list[Tensor | None] = [None] * blocks
        self.before: list[Tensor | None] = [None] * blocks

    def fallback(self, block: int, trend: Tensor, now: Tensor) -> Streams | None:
        """What a closed block adds at evaluations (R,); nothing where it was never computed."""
        if self.deltas[block] is None:
            return None
        newest, older = self.deltas[block]
        last, before = self.last[block], self.before[block]
        share = trend * (now - last) / (last - before).clamp_min(1)
        return tuple(n + per_stream(share, n) * (n - o) for n, o in zip(newest, older, strict=True))

    def keep(self, block: int, deltas: Streams, computed: Tensor, now: Tensor) -> None:
        """Remember a pass of the rows that computed it (R,) bool."""
        deltas = tuple(delta.detach() for delta in deltas)
        if self.deltas[block] is None:
            nothing = tuple(torch.zeros_like(delta) for delta in deltas)
            self.deltas[block] = nothing, nothing
            self.last[block] = self.before[block] = torch.full_like(now, -1)
        newest, older = self.deltas[block]
        last, before = self.last[block], self.before[block]
        again = computed & (last >= 0)

        def chosen(rows: Tensor, new: Streams, old: Streams) -> Streams:
            return tuple(torch.where(per_stream(rows, n), n, o) for n, o in zip(new, old, strict=True))

        # the first pass of a row stands for both
        older = chosen(again, newest, chosen(computed & ~again, deltas, older))
        self.deltas[block] = chosen(computed, deltas, newest), older
        self.before[block] = torch.where(again, last, before)
        self.last[block] = torch.where(computed, now, last)

    def forget(self, rows: Tensor) -> None:
        """New runs begin in these rows (R,) bool."""
        for block, deltas in enumerate(self.deltas):
            if deltas is not None:
                keep = ~rows
                self.deltas[block] = tuple(
                    tuple(d * per_stream(keep.to(d.dtype), d) for d in p) for p in deltas
                )
                self.last[block] = torch.where(rows, -1, self.last[block])
                self.before[block] = torch.where(rows, -1, self.before[block])


@dataclass
class Seen:
    """What routers see of a call: pooled inputs (N, S, D) of the blocks, and modulation (S, E)."""

    pooled: Tensor
    modulation: Tensor


def width_mask(width: Tensor, hidden: int) -> Tensor:
    """Which hidden units (S, F) belong to width shares (S, W): all up to the chosen width's last.

    As `routers.train.student.unit_mask` for widths evenly apart, without waiting for the device.
    """
    wide_enough = width.flip(-1).cumsum(-1).flip(-1)
    return wide_enough.repeat_interleave(hidden // len(WIDTHS), dim=-1)


def forward(
    model: Qwen | Turbo, x: Tensor, sigma: Tensor, text: Streams, decision: Decision | None = None,
    passes: Passes | None = None, now: Tensor | None = None,
) -> tuple[Tensor, Seen]:  # fmt: skip
    """Velocities (R, N, C), fp32, of samples x (S, N, C) at sigma (S,) under a decision; None: whole.

    passes: read and filled. now (S,): number of each sample's evaluation.
    """
    samples = len(x)
    rows = samples * model.branches
    x, sigma = x.repeat(model.branches, 1, 1), sigma.repeat(model.branches)
    pooled = []
    with torch.autocast(x.device.type, HALF):
        streams, told = model.open(x, sigma, text)
        for index in range(len(model.blocks)):
            pooled.append(streams[0][:samples].detach().float().mean(1))
            if decision is None:
                streams = model.block(index, streams, told, None)
                continue
            width = width_mask(decision.width[:, index], model.hidden)
            width = per_row(width, rows)[:, None].to(streams[0].dtype)
            gate = per_row(decision.gate[:, index], rows)
            after = model.block(index, streams, told, width)
            deltas = tuple(new - old for old, new in zip(streams, after, strict=True))
            at = None if now is None else per_row(now, rows)
            instead = None if passes is None else passes.fallback(index, decision.trend[index], at)
            if passes is not None:
                passes.keep(index, deltas, gate.detach() > 0.5, at)
            if instead is None:
                instead = tuple(torch.zeros_like(delta) for delta in deltas)
            streams = tuple(
                old + f.to(d.dtype) + per_stream(gate, d) * (d - f.to(d.dtype))
                for old, d, f in zip(streams, deltas, instead, strict=True)
            )
        velocity = model.close(streams, told).float()
    return velocity, Seen(torch.stack(pooled), told.temb[:samples].detach().float())


@torch.no_grad()
def costs(model: Qwen | Turbo, x: Tensor, text: Streams) -> Costs:
    """FLOPs of one row of a call. x (1, N, C); text of its rows."""
    x, sigma = x.repeat(model.branches, 1, 1), torch.ones(model.branches, device=x.device)
    with torch.autocast(x.device.type, HALF), FlopCounterMode(display=False) as whole:
        streams, told = model.open(x, sigma, text)
        dense, mlp = [], []
        for index in range(len(model.blocks)):
            with FlopCounterMode(display=False) as counter:
                after = model.block(index, streams, told, None)
            dense.append(counter.get_total_flops())
            joint = isinstance(model, Turbo) and index >= len(model.dit.transformer_blocks)
            tokens = streams[0].shape[1] + (streams[1].shape[1] if joint else 0)
            mlp.append(4 * len(x) * tokens * streams[0].shape[-1] * model.hidden)
            streams = after
        model.close(streams, told)
    tensors = (torch.tensor(part, device=x.device).double() for part in (dense, mlp))
    return Costs(*tensors, float(whole.get_total_flops() - sum(dense)))
