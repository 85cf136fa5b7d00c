"""Tiny transformers with random weights, one row per family: what the invariant tests run on.

A new block class is one more entry of CASES: how to build the transformer, its spec, and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routers.spec import TransformerSpec

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """inputs(rows, t, seed): forward arguments for `rows` rows at time t in [0, 1], rows drawn one by one."""

    name: str
    spec: TransformerSpec
    build: Callable[[], nn.Module]
    inputs: Callable[[int, float, int], Inputs]

    def transformer(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval().requires_grad_(False)
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # gates and modulations start near zero: make every block count
                if parameter.dim() == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def run(self, model: nn.Module, rows: int = 2, t: float = 0.7, seed: int = 0) -> Tensor:
        with torch.no_grad():
            out = model(**self.inputs(rows, t, seed))
        return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


def _rows(rows: int, seed: int, *shape: int) -> Tensor:
    """Row i depends on seed + i only, so that a batch can be compared with its rows alone."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(rows)]
    )


def _qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_inputs(rows: int, t: float, seed: int) -> Inputs:
    return {
        "hidden_states": _rows(rows, seed, 16, 16),
        "encoder_hidden_states": _rows(rows, seed + 100, 5, 24),
        "encoder_hidden_states_mask": None,
        "timestep": torch.full((rows,), t),
        "img_shapes": [[(1, 4, 4)]] * rows,
        "return_dict": False,
    }


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(rows: int, t: float, seed: int) -> Inputs:
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return {
        "hidden_states": _rows(rows, seed, 16, 16),
        "encoder_hidden_states": _rows(rows, seed + 100, 5, 24),
        "pooled_projections": _rows(rows, seed + 200, 20),
        "timestep": torch.full((rows,), t),
        "guidance": torch.full((rows,), 3.5),
        "img_ids": ids.reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def _hunyuan_2(guided: bool) -> nn.Module:
    from backbones.hunyuan3d.dit_v2 import Hunyuan3DDiT

    return Hunyuan3DDiT(
        in_channels=8, context_in_dim=24, hidden_size=48, num_heads=3, depth=2, depth_single_blocks=3,
        axes_dim=[16], guidance_embed=guided,
    )  # fmt: skip


def _hunyuan_inputs(rows: int, t: float, seed: int) -> Inputs:
    return {
        "x": _rows(rows, seed, 16, 8),
        "t": torch.full((rows,), t),
        "contexts": {"main": _rows(rows, seed + 100, 5, 24)},
        "guidance": torch.full((rows,), 5.0),
    }


def _hunyuan_21() -> nn.Module:
    """Three plain blocks, then a plain and an expert block with skips."""
    from backbones.hunyuan3d.dit_v21 import HunYuanDiTPlain

    return HunYuanDiTPlain(
        in_channels=8, hidden_size=48, context_dim=24, depth=5, num_heads=3, qk_norm=True, qkv_bias=False,
        num_moe_layers=1, num_experts=4,
    )  # fmt: skip


def _cases() -> list[Case]:
    from backbones import flux, qwen_image
    from backbones.hunyuan3d import family as hunyuan3d

    return [
        Case("qwen", qwen_image.TRANSFORMER, _qwen, _qwen_inputs),
        Case("flux", flux.TRANSFORMER, _flux, _flux_inputs),
        Case("hunyuan3d-2", hunyuan3d.TRANSFORMER_2, partial(_hunyuan_2, False), _hunyuan_inputs),
        Case("hunyuan3d-2-guided", hunyuan3d.TRANSFORMER_2, partial(_hunyuan_2, True), _hunyuan_inputs),
        Case("hunyuan3d-2.1", hunyuan3d.TRANSFORMER_21, _hunyuan_21, _hunyuan_inputs),
    ]


CASES = _cases()
BY_CLASS = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name == "hunyuan3d-2-guided" else ())
    for case in CASES
]
"""For what depends on block classes alone: the guided transformer has those of the unguided one."""
