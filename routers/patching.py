"""Change a module from outside, and refuse what others change where the two would not go together.

One layer for everything `routers` patches, so that hooks of accelerate, diffusers and PEFT, set
before or after, keep working: a patch calls whatever forward it found, and a patch that was itself
wrapped in the meantime becomes a plain pass-through when it is removed.

Other caches, a compiled whole and foreign hooks would make a wrong picture or a wrong count of what was spent
if they worked under the routers unseen. Each is refused in one line that names it and the way out: when
routers are attached, and in every later call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

COMPILED_WHOLE = (
    "the transformer is compiled as a whole, and nothing can be decided inside of a graph; "
    "compile its blocks: transformer.compile_repeated_blocks()"
)
PARALLEL = (
    "this transformer is split over several devices, whose processes would decide apart over its blocks; "
    "a plan in time leaves the blocks alone: attach the pipeline without routers"
)
HARMLESS_HOOKS = (
    "group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting",
    "peft_autocast_disable",
)  # fmt: skip
"""diffusers' hooks that only move weights or change their dtype."""
SPLIT_HOOKS = ("cp_input---", "cp_output---")
"""Beginnings of the names of those that share tokens out over devices and put them together again."""


GRAPHS = 64
"""Of a compiled block: four widths, for one row and for several, at a few lengths of the text. Beyond torch's
own limit of 8 a block would run uncompiled, without a word."""


def more_graphs() -> AbstractContextManager[Any]:
    """Inside, compiled blocks may have as many graphs as mixed batches need."""
    from torch._dynamo import config

    return config.patch(recompile_limit=max(config.recompile_limit, GRAPHS))  # type: ignore[no-any-return]


class Patch:
    """A replaced forward: calls `replacement(original, *args, **kwargs)` until it is removed."""

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any], was_instance: bool):
        self.original = original
        self.replacement: Callable[..., Any] | None = replacement
        self.was_instance = was_instance
        # inspect.signature follows __wrapped__ to the real arguments (diffusers and PEFT look at them).
        # A patch under this one keeps its attributes to itself.
        functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replaced forward."""
        if self.replacement is None:
            return self.original(*args, **kwargs)
        return self.replacement(self.original, *args, **kwargs)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let the replaced forward be called as if it had not been."""
        replacement, self.replacement = self.replacement, None
        try:
            yield
        finally:
            self.replacement = replacement


def patch_forward(module: nn.Module, replacement: Callable[..., Any], name: str = "forward") -> Patch:
    """Put `replacement(original, *args, **kwargs)` before `module.<name>`; returns the patch to restore."""
    patch = Patch(getattr(module, name), replacement, name in module.__dict__)
    module.__dict__[name] = patch
    return patch


def restore_forward(module: nn.Module, patch: Patch, name: str = "forward") -> None:
    """Undo `patch_forward`. If something wrapped the patch meanwhile it stays there as a pass-through."""
    patch.replacement = None
    if module.__dict__.get(name) is not patch:
        return
    if patch.was_instance:
        module.__dict__[name] = patch.original
    else:
        del module.__dict__[name]


class Patches(ExitStack):
    """Forwards that are replaced together, and put back in reverse order: by `close`, or as a context.

    `callback` registers whatever else is to be undone with them.
    """

    def add(self, module: nn.Module, replacement: Callable[..., Any], name: str = "forward") -> Patch:
        """As `patch_forward`, until the context ends."""
        patch = patch_forward(module, replacement, name)
        self.callback(restore_forward, module, patch, name)
        return patch


def learns_order(module: nn.Module) -> bool:
    """Whether diffusers' group offloading will take its order of prefetching from the module's next call.

    That call must then run every block, or the blocks it left out are never fetched ahead.
    """
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("lazy_prefetch_group_offloading") is not None


def check_call(transformer: Any, blocks: Iterable[nn.Module] = ()) -> None:
    """What can be told of the transformer and its blocks at a glance, in every call. Raises ValueError."""
    if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
        raise ValueError(COMPILED_WHOLE)
    check_cache(transformer)
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(PARALLEL)
    for module in (transformer, *blocks):
        if "_diffusers_hook" in module.__dict__:
            _check_hooks(module)


def check_whole(transformer: nn.Module) -> None:
    """That every call of a transformer is a whole evaluation. Raises ValueError for a cache, also one that
    hooks on its blocks are; a transformer may be compiled, its projections fused.
    """
    check_cache(transformer)
    for module in transformer.modules():
        if "_diffusers_hook" in module.__dict__:
            _check_hooks(module)


def check_cache(transformer: Any) -> None:
    """Raises ValueError for a cache of the transformer's own, beside which no count of FLOPs would hold."""
    if getattr(transformer, "is_cache_enabled", False):
        name = type(getattr(transformer, "_cache_config", None)).__name__
        raise ValueError(_refusal(f"a cache of its own ({name})", "transformer.disable_cache()"))
    if getattr(transformer, "_is_cached", False):
        raise ValueError(_refusal("another library's cache (_is_cached)", "that library's own call"))


def check_run(transformer: Any) -> None:
    """As `check_call`, and every module inside of it: when routers are attached and when a run begins."""
    check_call(transformer)
    for module in transformer.modules():
        if "_diffusers_hook" in module.__dict__:
            _check_hooks(module)


def _check_hooks(module: nn.Module) -> None:
    registry: Any = module.__dict__["_diffusers_hook"]
    for name in registry.hooks:
        if name not in HARMLESS_HOOKS and not name.startswith(SPLIT_HOOKS):
            where = f"the hook {name!r} on a {type(module).__name__}"
            raise ValueError(_refusal(where, "disable_cache() or remove_hook()"))


def _refusal(what: str, way_out: str) -> str:
    return (
        f"this transformer has {what}, which would decide over its blocks beside the routers; "
        f"take it off with {way_out}, before routers.attach or the next call"
    )
