"""MLP width by prefix slicing: compute only the first hidden units of an MLP (E-DiT, section on widths).

Slicing a prefix of the in-linear's rows and of the out-linear's columns equals the full MLP with the
other hidden units' outputs set to zero. Nothing is copied: both slices are views of the weights. The
linears are patched while a narrowed block runs, and as they are then: a LoRA may have replaced them.

A gated MLP has two rows a hidden unit: of a gate linear beside the in-linear, or of both halves of a fused
in-linear. Where the block's code holds the sizes of the hidden layer, zeros stand in for what is left out.

Shapes: B batch, L tokens, D dim, F hidden units of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cost import hidden_units
from .packed import base_layer, in_features, out_features
from .patching import Patches
from .spec import MlpSpec

HOOKED = "_diffusers_hook"
"""Set by diffusers on a module with hooks of its own: group offloading, layerwise casting."""


class MlpSlicer:
    """Narrows one MLP of one block inside of its contexts; outside of them the MLP is untouched."""

    def __init__(self, block: nn.Module, spec: MlpSpec) -> None:
        self.spec, self._block = spec, block
        self.hidden = hidden_units(block, spec)
        dim = out_features(attrgetter(spec.out_linear)(block))
        self.row_offset, self.column_offset = spec.in_offset * dim, spec.out_offset * dim

    def units(self, ratio: float) -> int:
        """Hidden units kept at a width ratio in (0, 1]."""
        return max(1, int(self.hidden * ratio))

    @property
    def linears(self) -> tuple[nn.Module, nn.Module]:
        """The in-linear and the out-linear, or what lies around them now."""
        return attrgetter(self.spec.in_linear)(self._block), attrgetter(self.spec.out_linear)(self._block)

    @property
    def readers(self) -> list[nn.Module]:
        """The linears that read the MLP's input: the in-linear, and the gate where that is another one."""
        gate = [attrgetter(self.spec.gate)(self._block)] if self.spec.gate else []
        return [self.linears[0], *gate]

    @property
    def halves(self) -> list[slice]:
        """Rows of the readers that the hidden units come from: one stretch, two in a fused in-linear."""
        starts = [self.row_offset + half * self.hidden for half in range(1 + self.spec.fused_gate)]
        return [slice(start, start + self.hidden) for start in starts]

    def rows(self, units: int) -> list[slice]:
        """Rows of the readers that are needed for the first hidden units."""
        first, *second = self.halves
        return [slice(0, first.start + units), *(slice(half.start, half.start + units) for half in second)]

    @contextmanager
    def narrowed(self, ratio: float) -> Iterator[None]:
        """Run the MLP on its first `ratio * F` hidden units inside the context."""
        units, outer = self.units(ratio), self.linears[1]
        with Patches() as patches:
            for reader in self.readers:
                patches.add(
                    reader, partial(linear_rows, reader, kept=self.rows(units), padded=self.spec.padded)
                )
            patches.add(outer, partial(linear_columns, outer, kept=self.column_offset + units))
            yield

    @contextmanager
    def narrowed_rows(self, parts: Sequence[tuple[float, int]]) -> Iterator[None]:
        """Run consecutive rows at different widths. parts: (ratio, number of rows), together the batch.

        Between the two linears the hidden units of all rows lie in one flat tensor: the activation works
        element by element, so it need not know whose they are.
        """
        inner, outer = self.linears
        sizes = [(self.units(ratio), rows) for ratio, rows in parts]
        lead: tuple[int, ...] = ()

        def widen(original: Callable[..., Tensor], x: Tensor) -> Tensor:
            nonlocal lead
            lead = tuple(x.shape[1:-1])
            pieces = zip(x.split([rows for _, rows in sizes]), sizes, strict=True)
            narrow = (linear_rows(inner, original, p, self.rows(units)) for p, (units, _) in pieces)
            return torch.cat([y.flatten() for y in narrow])

        def join(original: Callable[..., Tensor], x: Tensor) -> Tensor:
            shapes = [(rows, *lead, units) for units, rows in sizes]
            pieces = zip(x.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
            return torch.cat([linear_columns(outer, original, p.view(shape)) for p, shape in pieces])

        with Patches() as patches:
            patches.add(inner, widen)
            patches.add(outer, join)
            yield

    @property
    def can_lend(self) -> bool:
        """Whether `lent` can narrow the linears as they are."""
        whole = not (self.spec.gate or self.spec.fused_gate or self.spec.padded)
        return (
            whole
            and not torch.is_grad_enabled()
            and all(type(linear) is nn.Linear and not hasattr(linear, HOOKED) for linear in self.linears)
        )

    @contextmanager
    def lent(self, ratio: float) -> Iterator[None]:
        """As `narrowed`, for a compiled call: the linears get views of their weights and no patch.

        What is compiled then depends on the width alone, and blocks of a kind share its graph.
        """
        inner, outer = self.linears
        saved = [(linear, dict(linear._parameters)) for linear in (inner, outer)]
        rows, columns = self.row_offset + self.units(ratio), self.column_offset + self.units(ratio)
        weight = outer._parameters["weight"]
        inner._parameters.update({k: _view(p, p[:rows]) for k, p in saved[0][1].items() if p is not None})
        outer._parameters["weight"] = _view(weight, weight[:, :columns])  # type: ignore[index]
        try:
            yield
        finally:
            for linear, parameters in saved:
                linear._parameters.update(parameters)


def _view(parameter: Any, view: Tensor) -> nn.Parameter:
    return nn.Parameter(view, requires_grad=parameter.requires_grad)


def linear_rows(
    module: nn.Module, original: Callable[..., Tensor], x: Tensor, kept: Sequence[slice], padded: bool = False
) -> Tensor:
    """Some output features of a linear: `x [..., D] -> [..., kept]`, with zeros for the others if `padded`.

    Plain and LoRA linears compute only those rows. Any other linear (weights offloaded per leaf) is computed
    whole by `original` and cut: right, but without the saving.
    """
    parts = _lora_parts(module, original, x)
    if parts is None:
        whole = original(x)
        pieces = [whole[..., rows] for rows in kept]
    else:
        base, adapters = parts
        inner = [(down(x.to(down.weight.dtype)), up, scaling) for down, up, scaling in adapters]
        pieces = [_rows(base, x, inner, rows) for rows in kept]
    if padded:
        ends = [rows.start for rows in kept[1:]] + [out_features(module)]
        pieces = [F.pad(y, (0, end - rows.stop)) for y, rows, end in zip(pieces, kept, ends, strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _rows(base: Any, x: Tensor, adapters: list[tuple[Tensor, Any, float]], rows: slice) -> Tensor:
    y = F.linear(x, base.weight[rows].to(x.dtype), None if base.bias is None else base.bias[rows].to(x.dtype))
    for inner, up, scaling in adapters:
        bias = None if up.bias is None else up.bias[rows]
        y = y + scaling * F.linear(inner, up.weight[rows], bias).to(y.dtype)
    return y


def linear_columns(
    module: nn.Module, original: Callable[..., Tensor], x: Tensor, kept: int | None = None
) -> Tensor:
    """A linear fed with only its first input features: `x [..., n <= in_features] -> [..., out]`.

    kept: how many of those that x holds.
    """
    n = x.shape[-1] if kept is None else kept
    x = x if n == x.shape[-1] else x[..., :n]
    parts = _lora_parts(module, original, x)
    if parts is None:
        return original(F.pad(x, (0, in_features(module) - n)))
    base, adapters = parts
    y = F.linear(x, base.weight[:, :n].to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
    for down, up, scaling in adapters:
        y = y + scaling * up(F.linear(x.to(down.weight.dtype), down.weight[:, :n])).to(y.dtype)
    return y


def _lora_parts(
    module: Any, original: Callable[..., Tensor], x: Tensor
) -> tuple[Any, list[tuple[Any, Any, float]]] | None:
    """(plain linear, [(down, up, scaling)]) of a plain or PEFT LoRA linear that can take x as it lies.

    None for others, and where a hook brings the weights only when the linear is called: such a hook lies
    between us and the linear (or on a part of it), and what the weights hold until then means nothing.
    """
    base = base_layer(module)
    cast = _is_cast(base, x)
    if type(base) is not nn.Linear or not (cast or _is_ready(base, x)):
        return None
    hooked = hasattr(base, HOOKED) and not cast
    if base is module:
        return None if hooked and original != type(base).forward.__get__(base) else (base, [])
    if not hasattr(module, "lora_A") or (module.disable_adapters and module.merged):
        return None  # another kind of adapter; or one that PEFT takes out of the weights when it is called
    if hooked:
        return None
    if module.disable_adapters or module.merged:
        return base, []
    names = [name for name in module.active_adapters if name in module.lora_A]
    if any(_is_more_than_two_matrices(module, name) for name in names):
        return None
    adapters = [(module.lora_A[name], module.lora_B[name], module.scaling[name]) for name in names]
    if any(up.weight.device != x.device or hasattr(up, HOOKED) for _, up, _ in adapters):
        return None
    return base, adapters


def _is_ready(linear: nn.Linear, x: Tensor) -> bool:
    """Whether the weights lie where x does, in x's dtype (under autocast in any)."""
    same = linear.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return same and linear.weight.device == x.device


def _is_cast(linear: nn.Module, x: Tensor) -> bool:
    """Whether diffusers' layerwise casting alone is around a linear, so that a slice can be cast as well."""
    hooks = getattr(getattr(linear, HOOKED, None), "hooks", {})
    casting = hooks.get("layerwise_casting") if len(hooks) == 1 else None
    return casting is not None and casting.compute_dtype == x.dtype and linear.weight.device == x.device


def _is_more_than_two_matrices(module: Any, name: str) -> bool:
    """Whether an adapter of a PEFT LoRA layer adds anything but up(down(x)): DoRA and the like, dropout."""
    special = getattr(module, "lora_variant", {}), getattr(module, "use_dora", {})
    drops = module.training and type(module.lora_dropout[name]) is not nn.Identity
    return drops or any(known.get(name) for known in special)
