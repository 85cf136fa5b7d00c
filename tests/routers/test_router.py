"""The router's size at a real backbone's block, and what an untrained router says."""

from __future__ import annotations

import torch

from routers.router import Router, router_flops

DIM, HEADS, TOKENS = 3072, 24, 1024


def test_router_is_under_a_fifth_of_a_percent_of_a_real_block() -> None:
    """Parameters and FLOPs, against a Qwen-Image block of real size on the meta device."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    with torch.device("meta"):
        block, router = QwenImageTransformerBlock(DIM, HEADS, DIM // HEADS), Router(DIM, DIM)
    size = {m: sum(p.numel() for p in m.parameters()) for m in (block, router)}
    assert size[router] < 0.002 * size[block]
    image_mlp = 2 * TOKENS * 2 * 4 * DIM * DIM  # a lower bound of the block's FLOPs
    assert router_flops(router, TOKENS) < 0.002 * image_mlp


def test_untrained_router_keeps_its_block_open_and_wide() -> None:
    gate, widths = Router(32, 16, 8)(torch.randn(3, 5, 32), torch.randn(3, 16))
    assert (gate > 0).all()
    assert (widths.argmax(dim=1) == 3).all()
