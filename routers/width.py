"""MLP width by prefix slicing: compute only the first hidden units of an MLP (E-DiT, section on widths).

Slicing a prefix of the in-linear's rows and of the out-linear's columns equals the full MLP with the
other hidden units' outputs set to zero. Nothing is copied: both slices are views of the weights.

Shapes: B batch, L tokens, D dim, F hidden units of the MLP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patching import Patch, patch_forward, restore_forward, restore_instance
from .spec import MlpSpec

HOOKED = "_diffusers_hook"
"""Set by diffusers on a module with hooks of its own: group offloading, layerwise casting."""


class MlpSlicer:
    """Narrows one MLP of one block while `narrowed(ratio)` is active; otherwise the MLP is untouched.

    The two linears are looked up again whenever a width is set, so a LoRA that replaces them after
    the attach is still found.
    """

    def __init__(self, block: nn.Module, spec: MlpSpec) -> None:
        self.spec = spec
        self._block = block
        self._units: int | None = None
        self._parts: list[tuple[int, int]] = []
        self._lead: tuple[int, ...] = ()
        self._linears: tuple[nn.Module, nn.Module] | None = None
        self._patches: list[tuple[nn.Module, Patch]] = []
        inner, outer = self._resolve()
        rows, columns, dim = out_features(inner), in_features(outer), out_features(outer)
        self.row_offset = spec.in_offset * dim
        self.column_offset = spec.out_offset * dim
        self.hidden = columns - self.column_offset
        if self.hidden <= 0 or rows - self.row_offset != self.hidden:
            raise ValueError(
                f"{spec.in_linear} has {rows} rows and {spec.out_linear} {columns} columns: "
                f"they share no hidden layer at offsets {self.row_offset} and {self.column_offset}"
            )

    def units(self, ratio: float) -> int:
        """Hidden units kept at a width ratio in (0, 1]."""
        return max(1, int(self.hidden * ratio))

    @contextmanager
    def narrowed(self, ratio: float) -> Any:
        """Run the MLP on its first `ratio * F` hidden units inside the context; ratio 1 changes nothing."""
        if ratio >= 1.0:
            yield
            return
        self._follow_replaced_modules()
        self._units = self.units(ratio)
        try:
            yield
        finally:
            self._units = None

    @property
    def ragged(self) -> bool:
        """Whether rows of one call may have different widths: the hidden layer is not fused with anything."""
        return self.row_offset == 0 and self.column_offset == 0

    @contextmanager
    def narrowed_rows(self, parts: Sequence[tuple[float, int]]) -> Any:
        """Run consecutive rows at different widths. parts: (ratio, number of rows), together the batch.

        Between the two linears the hidden units of all rows lie in one flat tensor: the activation works
        element by element, so it need not know whose they are.
        """
        self._follow_replaced_modules()
        self._parts = [(self.units(ratio), rows) for ratio, rows in parts]
        try:
            yield
        finally:
            self._parts, self._lead = [], ()

    @property
    def can_lend(self) -> bool:
        """Whether `lent` can set the width that is active now."""
        return self._units is None or (
            not torch.is_grad_enabled()
            and all(type(linear) is nn.Linear and not hasattr(linear, HOOKED) for linear in self._resolve())
        )

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Take the patches off for a compiled call, and give the linears views of their weights instead.

        What is compiled then depends on the width alone, and blocks of a kind share its graph.
        """
        saved: list[tuple[nn.Module, Patch, dict[str, Any]]] = [
            (module, patch, dict(module._parameters)) for module, patch in self._patches
        ]
        for module, patch, _ in saved:
            current: Any = vars(module).get("forward")
            if current is patch:
                restore_instance(module, patch)
        if self._units is not None:
            (inner, _, rows), (outer, _, columns) = saved
            count = self.row_offset + self._units
            inner._parameters.update({k: _view(p, p[:count]) for k, p in rows.items() if p is not None})
            weight = columns["weight"]
            outer._parameters["weight"] = _view(weight, weight[:, : self.column_offset + self._units])
        try:
            yield
        finally:
            for module, patch, parameters in saved:
                module._parameters.update(parameters)
                vars(module)["forward"] = patch

    def attach(self) -> None:
        """Patch the forward of both linears. Without an active width they call the original."""
        inner, outer = self._linears = self._resolve()
        self._patches = [
            (inner, patch_forward(inner, functools.partial(self._in_forward, inner))),
            (outer, patch_forward(outer, functools.partial(self._out_forward, outer))),
        ]

    def detach(self) -> None:
        """Restore both linears."""
        for module, token in self._patches:
            restore_forward(module, token)
        self._patches, self._linears = [], None

    def _resolve(self) -> tuple[nn.Module, nn.Module]:
        return attrgetter(self.spec.in_linear)(self._block), attrgetter(self.spec.out_linear)(self._block)

    def _follow_replaced_modules(self) -> None:
        inner, outer = self._resolve()
        if self._linears is None or inner is not self._linears[0] or outer is not self._linears[1]:
            self.detach()
            self.attach()

    def _in_forward(self, module: nn.Module, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self._parts:
            self._lead = tuple(x.shape[1:-1])
            pieces = zip(x.split([rows for _, rows in self._parts]), self._parts, strict=True)
            return torch.cat([linear_rows(module, original, p, units).flatten() for p, (units, _) in pieces])
        if self._units is None:
            return original(x)
        return linear_rows(module, original, x, self.row_offset + self._units)

    def _out_forward(self, module: nn.Module, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self._parts:
            shapes = [(rows, *self._lead, units) for units, rows in self._parts]
            pieces = zip(x.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
            return torch.cat([linear_columns(module, original, p.view(shape)) for p, shape in pieces])
        if self._units is None:
            return original(x)
        return linear_columns(module, original, x)


def _view(parameter: Any, view: Tensor) -> nn.Parameter:
    return nn.Parameter(view, requires_grad=parameter.requires_grad)


def linear_rows(module: nn.Module, original: Callable[..., Tensor], x: Tensor, rows: int) -> Tensor:
    """First `rows` output features of a linear: `x [..., D] -> [..., rows]`.

    Plain and LoRA linears compute only those rows. Any other linear (quantised, weights offloaded or
    cast per leaf) is computed whole by `original` and cut: right, but without the saving.
    """
    parts = _lora_parts(module, original, x)
    if parts is None:
        return original(x)[..., :rows]
    base, adapters = parts
    y = F.linear(x, base.weight[:rows], None if base.bias is None else base.bias[:rows])
    for down, up, scaling in adapters:
        bias = None if up.bias is None else up.bias[:rows]
        y = y + scaling * F.linear(down(x.to(down.weight.dtype)), up.weight[:rows], bias).to(y.dtype)
    return y


def linear_columns(module: nn.Module, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A linear fed with only its first input features: `x [..., n <= in_features] -> [..., out]`."""
    parts = _lora_parts(module, original, x)
    n = x.shape[-1]
    if parts is None:
        return original(F.pad(x, (0, in_features(module) - n)))
    base, adapters = parts
    y = F.linear(x, base.weight[:, :n], base.bias)
    for down, up, scaling in adapters:
        y = y + scaling * up(F.linear(x.to(down.weight.dtype), down.weight[:, :n])).to(y.dtype)
    return y


def out_features(module: nn.Module) -> int:
    """Output features of a linear or of a wrapper around one."""
    return int(_base(module).out_features)


def in_features(module: nn.Module) -> int:
    """Input features of a linear or of a wrapper around one."""
    return int(_base(module).in_features)


def _base(module: nn.Module) -> Any:
    get_base = getattr(module, "get_base_layer", None)
    return get_base() if get_base is not None else module


def _lora_parts(
    module: Any, original: Callable[..., Tensor], x: Tensor
) -> tuple[Any, list[tuple[Any, Any, float]]] | None:
    """(plain linear, [(down, up, scaling)]) of a plain or PEFT LoRA linear that can take x as it lies.

    None for others, and where a hook brings the weights only when the linear is called: such a hook lies
    between us and the linear (or on a part of it), and what the weights hold until then means nothing.
    """
    base = _base(module)
    if type(base) is not nn.Linear or not _is_ready(base, x):
        return None
    if base is module:
        return None if hasattr(base, HOOKED) and original != type(base).forward.__get__(base) else (base, [])
    if not hasattr(module, "lora_A") or (module.disable_adapters and module.merged):
        return None  # another kind of adapter; or one that PEFT takes out of the weights when it is called
    if hasattr(base, HOOKED):
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


def _is_more_than_two_matrices(module: Any, name: str) -> bool:
    """Whether an adapter of a PEFT LoRA layer adds anything but up(down(x)): DoRA and the like, dropout."""
    special = getattr(module, "lora_variant", {}), getattr(module, "use_dora", {})
    drops = module.training and type(module.lora_dropout[name]) is not nn.Identity
    return drops or any(known.get(name) for known in special)


def importance_order(in_activations: Tensor, out_weight: Tensor) -> Tensor:
    """Hidden units, most important first: mean |activation| x norm of the unit's column in the out-linear.

    in_activations: mean absolute activation per unit [F]. out_weight: [D, F]. Returns a permutation [F].
    """
    score = in_activations.float() * torch.linalg.vector_norm(out_weight.float(), dim=0)
    order: Tensor = score.argsort(descending=True, stable=True)
    return order


@torch.no_grad()
def reorder_units(block: nn.Module, spec: MlpSpec, order: Tensor) -> None:
    """Permute an MLP's hidden units in place; the full-width result stays the same up to summation order.

    order: permutation [F], the new unit i is the old unit order[i].
    """
    inner, outer = attrgetter(spec.in_linear)(block), attrgetter(spec.out_linear)(block)
    dim = out_features(outer)
    rows = slice(spec.in_offset * dim, None)
    columns = slice(spec.out_offset * dim, None)
    order = order.to(inner.weight.device)
    inner.weight[rows] = inner.weight[rows][order]
    if inner.bias is not None:
        inner.bias[rows] = inner.bias[rows][order]
    outer.weight[:, columns] = outer.weight[:, columns][:, order]
