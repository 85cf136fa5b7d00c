"""Modules and inputs without values, and the FLOPs of a call made with them.

A *twin* of a module has its parameters and buffers on the meta device and shares neither storage nor hooks
with it, so offloaded weights stay where they are. What a call costs is counted by torch.utils.flop_counter: a
multiply-add is 2 FLOPs; elementwise work counts 0.

Shapes: B batch, H heads, L tokens, K head dim.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import isroutine
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .packed import dense_like, is_packed

_HOOK_ATTRIBUTES = (
    "forward",
    "_edit_elastic",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
    "_compiled_call_impl",
)

_PER_DEVICE = ("_attention_backend", "_parallel_config")
"""How diffusers' processors attend, and over which devices: not on meta, and not counted."""


def transformer_flops(transformer: nn.Module, inputs: Mapping[str, Any]) -> float:
    """FLOPs of one dense call of a transformer, counted on the meta device.

    inputs: the forward's keyword arguments; tensors on any device.
    """
    return count_flops(meta_twin(transformer), **to_meta(dict(inputs)))


def count_flops(function: Any, *args: Any, **kwargs: Any) -> float:
    """FLOPs of one call by torch.utils.flop_counter, fused attention included on every device."""
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), flex_as_dense(), _plain_attention(), counter:
        function(*args, **kwargs)
    return float(counter.get_total_flops())


@contextmanager
def _plain_attention() -> Iterator[None]:
    """PyTorch's own attention inside the context, whatever backend diffusers was told to use: kernels of
    other packages have no formula, and some ask which card they are on.
    """
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        yield
        return
    with dispatch.attention_backend("native"):
        yield


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """The CPU's fused attention, for which the counter has no formula; given shapes, each `(B, H, L, K)`."""
    scores = math.prod(query[:-1]) * key[-2]
    return int(2 * scores * (query[-1] + value[-1]))


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are on the meta device, without hooks or patches.

    In float32, because weights may be stored in another dtype than they compute in; a linear with packed
    weights becomes the plain one that it stands for.
    """
    if is_packed(module):
        return dense_like(module)
    twin = copy.copy(module)
    # its own lists: PEFT's layers, for one, note in a list which adapters a call has taken out of the weights
    # and a rotary embedding that is no module keeps its tables
    state = {name: unshared(value) for name, value in module.__dict__.items()}
    for name in _HOOK_ATTRIBUTES:
        state.pop(name, None)
    state["_parameters"] = {k: _meta_parameter(p) for k, p in module._parameters.items()}
    state["_buffers"] = {k: None if b is None else to_meta(b) for k, b in module._buffers.items()}
    state["_modules"] = {k: None if m is None else meta_twin(m) for k, m in module._modules.items()}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        state[name] = type(state[name])()
    twin.__dict__ = state
    for owner in (twin, getattr(twin, "processor", None)):
        for name in _PER_DEVICE:  # what was set; a class that works with one backend alone says so itself
            getattr(owner, "__dict__", {}).pop(name, None)
    return twin


def unshared(value: Any) -> Any:
    """A copy of what a call may fill: containers, and objects with a state that are not modules."""
    if type(value) in (list, tuple):
        return type(value)(unshared(inner) for inner in value)
    if type(value) is dict:
        return {name: unshared(inner) for name, inner in value.items()}
    if type(value) is set:
        return copy.copy(value)
    shared = isinstance(value, (Tensor, nn.Module, ModuleType, Mapping, type)) or isroutine(value)
    if shared or not isinstance(getattr(value, "__dict__", None), dict):
        return value
    twin = copy.copy(value)
    twin.__dict__.update({name: unshared(inner) for name, inner in vars(value).items()})
    return twin


def _meta_parameter(parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    if parameter.is_floating_point() and type(parameter) in (Tensor, nn.Parameter):
        # not by empty_like, which takes a second for the parameters of a large transformer
        meta = torch.empty(parameter.shape, device="meta", dtype=torch.float32)
        return nn.Parameter(meta, requires_grad=False)
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def to_meta(value: Any) -> Any:
    """Every tensor in a nested value, on the meta device, floats in the dtype of a twin's parameters."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to("meta", torch.float32) if x.is_floating_point() else x.to("meta")

    return tree_map(moved, value)


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Let `torch.autocast("meta")` do nothing inside the context, where PyTorch refuses it.

    Forwards write `torch.autocast(x.device.type, enabled=False)` around rotary embeddings.
    """
    begin = torch.autocast.__init__

    def begin_anywhere(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            device_type, args, kwargs = "cpu", (), {"enabled": False}
        begin(self, device_type, *args, **kwargs)

    torch.autocast.__init__ = begin_anywhere  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = begin  # type: ignore[method-assign]


@contextmanager
def flex_as_dense() -> Iterator[None]:
    """Let FlexAttention be dense attention inside the context, as the counter counts it: for calls whose
    values do not matter. It runs neither on the meta device nor, uncompiled, while functions are followed.
    """
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is None:
        yield
        return

    def dense(
        query: Tensor, key: Tensor, value: Tensor, *_args: Any, enable_gqa: bool = False, **_: Any
    ) -> Any:
        return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa)

    original, flex.flex_attention = flex.flex_attention, dense
    try:
        yield
    finally:
        flex.flex_attention = original
