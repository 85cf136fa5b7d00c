"""Replace a module's forward from outside, and put it back exactly as it was.

One layer for everything `routers` patches, so that hooks of accelerate, diffusers and PEFT, set
before or after, keep working: a patch calls whatever forward it found, and a patch that was itself
wrapped in the meantime becomes a plain pass-through when it is removed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


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
