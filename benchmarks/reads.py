"""Count device-to-host reads: the points where the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SCALAR_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)
"""Operators whose result, or its shape, the host must know before it can go on."""


class ReadCounter(TorchDispatchMode):
    """Counts scalar reads, data-dependent shapes, and copies from another device to the CPU.

    On a CPU a copy to the host is no operator at all; such reads are counted by `Trace.host_syncs`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        to_host = isinstance(output, Tensor) and output.device.type == "cpu"
        # copy_(target, source) and _to_copy(source): the last tensor is where the data comes from
        source = next((a for a in reversed(args) if isinstance(a, Tensor)), None)
        if func in _SCALAR_READS or (
            copied and to_host and source is not None and source.device.type != "cpu"
        ):
            self.count += 1
        return output


def count_reads(function: Callable[..., Any], *args: Any) -> int:
    """Reads during one call of `function`."""
    with ReadCounter() as counter:
        function(*args)
    count: int = counter.count
    return count
