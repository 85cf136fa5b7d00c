"""What else may decide over a transformer's blocks: other caches, a compiled whole, fused projections, hooks.

Each would make a wrong picture or a wrong count of what was spent if it worked under the routers unseen, so
each is refused in one line that names it and the way out: when routers are attached, and in every later call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .block import COMPILED_WHOLE, Block

HARMLESS_HOOKS = (
    "group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting",
    "peft_autocast_disable",
)  # fmt: skip
"""diffusers' hooks that only move weights or change their dtype."""


def check_call(transformer: Any, blocks: Sequence[Block] = ()) -> None:
    """What can be told of the transformer and its blocks at a glance, in every call. Raises ValueError."""
    if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
        raise ValueError(COMPILED_WHOLE)
    if getattr(transformer, "is_cache_enabled", False):
        name = type(getattr(transformer, "_cache_config", None)).__name__
        raise ValueError(_refusal(f"a cache of its own ({name})", "transformer.disable_cache()"))
    if getattr(transformer, "_is_cached", False):
        raise ValueError(_refusal("another library's cache (_is_cached)", "that library's own call"))
    for module in (transformer, *(block.module for block in blocks)):
        if "_diffusers_hook" in module.__dict__:
            _check_hooks(module)


def check_run(transformer: Any) -> None:
    """As `check_call`, and every module inside of it: when routers are attached and when a run begins."""
    check_call(transformer)
    for module in transformer.modules():
        if getattr(module, "fused_projections", False):
            raise ValueError(_refusal("fused projections", "transformer.unfuse_qkv_projections()"))
        if "_diffusers_hook" in module.__dict__:
            _check_hooks(module)


def _check_hooks(module: nn.Module) -> None:
    registry: Any = module.__dict__["_diffusers_hook"]
    for name in registry.hooks:
        if name not in HARMLESS_HOOKS:
            where = f"the hook {name!r} on a {type(module).__name__}"
            raise ValueError(_refusal(where, "disable_cache() or remove_hook()"))


def _refusal(what: str, way_out: str) -> str:
    return (
        f"this transformer has {what}, which would decide over its blocks beside the routers; "
        f"take it off with {way_out}, before routers.attach or the next call"
    )
