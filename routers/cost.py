"""What a decision costs, in FLOPs, for any block class: counted on the meta device, not written by hand.

A block is run once per input shape as a *twin* whose parameters and inputs are on the meta device,
under torch.utils.flop_counter (a multiply-add is 2 FLOPs; elementwise work counts 0). The twin shares
no storage with the model and carries none of its hooks, so offloaded weights stay where they are.

Shapes: B batch, L tokens, D dim, F hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .width import MlpSlicer, in_features, out_features

_HOOK_ATTRIBUTES = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook", "_compiled_call_impl")


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block for one row: `dense` at full width, of which `mlp` scales with the width."""

    dense: float
    mlp: float

    def at(self, width: float) -> float:
        """FLOPs with the image MLP at `width` in (0, 1]."""
        return self.dense - (1.0 - width) * self.mlp


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are on the meta device, without hooks or patches."""
    twin = copy.copy(module)
    state = dict(module.__dict__)
    for name in _HOOK_ATTRIBUTES:
        state.pop(name, None)
    state["_parameters"] = {k: _meta_parameter(p) for k, p in module._parameters.items()}
    state["_buffers"] = {k: None if b is None else b.to("meta") for k, b in module._buffers.items()}
    state["_modules"] = {k: None if m is None else meta_twin(m) for k, m in module._modules.items()}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        state[name] = type(state[name])()
    twin.__dict__ = state
    return twin


def _meta_parameter(parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def to_meta(value: Any) -> Any:
    """Every tensor in a nested value, on the meta device."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, value)


def count_flops(function: Any, *args: Any, **kwargs: Any) -> float:
    """FLOPs of one call by torch.utils.flop_counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return float(counter.get_total_flops())


def block_cost(
    block: nn.Module,
    slicers: Sequence[MlpSlicer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rows: int,
    tokens: int,
) -> BlockCost:
    """Cost per row of a block called with `(*args, **kwargs)` for `rows` rows of `tokens` image tokens.

    Blocks that cannot run on the meta device (data-dependent shapes) are counted from their linears
    alone, without attention's two products.
    """
    twin = meta_twin(block)
    seen = [_record_tokens(twin.get_submodule(slicer.spec.in_linear)) for slicer in slicers]
    try:
        total = count_flops(twin, *to_meta(args), **to_meta(dict(kwargs)))
    except (NotImplementedError, RuntimeError):
        linears = (m for m in block.modules() if hasattr(m, "in_features") and hasattr(m, "out_features"))
        total = float(sum(2 * rows * tokens * in_features(m) * out_features(m) for m in linears))
    mlp = 0.0
    for slicer, counts in zip(slicers, seen, strict=True):
        inner = in_features(block.get_submodule(slicer.spec.in_linear))
        outer = out_features(block.get_submodule(slicer.spec.out_linear))
        mlp += 2.0 * (sum(counts) or rows * tokens) * slicer.hidden * (inner + outer)
    return BlockCost(dense=total / rows, mlp=mlp / rows)


def _record_tokens(linear: nn.Module) -> list[int]:
    counts: list[int] = []
    linear.register_forward_hook(lambda _m, _x, y: counts.append(y.numel() // y.shape[-1]))
    return counts


def router_flops(router: nn.Module | None, tokens: int) -> float:
    """FLOPs of a router for one row of `tokens` tokens, all streams together.

    A router that pools its tokens first costs 2 per weight of its matrices; any other says it in `flops`.
    """
    if router is None:
        return 0.0
    flops = getattr(router, "flops", None)
    if flops is not None:
        return float(flops(tokens))
    return float(sum(2 * p.numel() for p in router.parameters() if p.dim() == 2))


@contextmanager
def count_linears(root: nn.Module, exclude: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Collect the FLOPs of every linear and convolution of `root` outside `exclude` inside the context.

    Used once per input shape for what surrounds the blocks: patch embedding, time embedding, output
    projection. Yields a list with one entry per call.
    """
    inside = {id(m) for block in exclude for m in block.modules()}
    flops: list[float] = []

    def record(module: Any, _inputs: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(output, Tensor) and weight is not None:
            flops.append(2.0 * output.numel() * weight[0].numel())

    handles = [
        m.register_forward_hook(record)
        for m in root.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and id(m) not in inside
    ]
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()


def transformer_flops(transformer: nn.Module, inputs: Mapping[str, Any]) -> float:
    """FLOPs of one dense call of a transformer, counted on the meta device.

    inputs: the forward's keyword arguments; tensors on any device.
    """
    return count_flops(meta_twin(transformer), **to_meta(dict(inputs)))
