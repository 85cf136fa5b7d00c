"""The most memory that a call's tensors take, without running it: traced on the meta device.

Every storage that an operator makes is counted until nothing refers to it, as an allocator would. What an
operator needs inside is not seen, beside convolutions on a CPU; fused attention needs next to nothing there,
so attention counts as fused, as it is on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Inside, tensors that are made are counted. peak: most bytes at once; held: bytes now.

    workspace_on: type of the device whose convolutions' own memory is added.
    """

    def __init__(self, workspace_on: str = "") -> None:
        super().__init__()
        self.workspace_on = workspace_on
        self.peak = self.held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        for given in tree_leaves((args, kwargs)):  # what was there before is not this call's
            if isinstance(given, Tensor):
                self._count(given, 0)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor, tensor.untyped_storage().nbytes())
        if func is torch.ops.aten.convolution.default and self.workspace_on == "cpu":
            self.peak = max(self.peak, self.held + _workspace(args[0], args[1], made))
        return made

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _workspace(x: Tensor, weight: Tensor, made: Tensor) -> int:
    """Bytes that PyTorch's CPU convolutions take inside: of 3 dimensions, a sample's patches as
    columns; of 2, input and weights once more in another order.
    """
    if x.dim() == 5:
        return weight[0].numel() * made[0, 0].numel() * x.element_size()
    return x.nbytes + weight.nbytes


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention inside makes its result and nothing else."""
    own = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


def peak_bytes(function: Callable[..., Any], *args: Any, workspace_on: str = "", **kwargs: Any) -> int:
    """Most bytes at once of what a call on meta tensors makes, its result included."""
    counted = PeakBytes(workspace_on)
    with torch.no_grad(), fused_attention(), counted:
        function(*args, **kwargs)
    return counted.peak
