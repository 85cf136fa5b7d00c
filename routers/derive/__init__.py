"""A `TransformerSpec` from one traced call: any transformer whose blocks lie in lists, its name unknown.

1. `calls`: the transformer is called on the meta device (no weights, no arithmetic) or, where its forward
   needs values, for real. `provenance` marks every tensor with the arguments and block outputs it came from.
2. `streams`: a residual stream is an argument that the block before it returned.
3. `lists`: lists whose blocks are called once each, in order, and know of the timestep are controlled. Lists
   on other tokens, inside other modules, or that give hints run in full and are reported with the reason.
4. The modulation is the 2-D argument of a block that was computed from the time and not from the sample.
5. `rows`: the call is repeated with one row more; what grew with it carries rows.
6. `hidden`, `mlps`: an MLP is a linear whose outputs are, unit by unit, another linear's inputs.

What cannot be derived raises `DerivationError`, which says which list and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..meta import autocast_on_meta, meta_twin, to_meta
from ..rows import count_rows
from ..spec import TransformerSpec
from .calls import TracedCall, argument_names, outermost_lists, traced_call
from .describe import Description, reads_further_back
from .lists import choose_lists
from .rows import with_rows
from .stand_in import let_one_run_for_all
from .streams import Lineage

TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma")

WAYS = ((1, True), (1, False), (2, True), (2, False))
"""How rows are added to a call, until it runs: in how many leading axes they lie, and whether in lists."""


class DerivationError(ValueError):
    """A transformer that the derivation does not understand, in one line."""


@dataclass(frozen=True)
class Derived:
    """What a traced call showed.

    spec: the blocks to control. left_in_full: paths of the lists that always run in full, with the reason.
    notes: for people, one line each.
    """

    spec: TransformerSpec
    left_in_full: dict[str, str]
    notes: tuple[str, ...]


def derive(
    transformer: nn.Module, inputs: Mapping[str, Any], again: Mapping[str, Any] | None = None
) -> Derived:
    """Describe a transformer's blocks.

    inputs: the forward's keyword arguments in a typical call, tensors on any device. again: the same call
    with another number of rows; by default it is made from `inputs`. Raises DerivationError.
    """
    notes: list[str] = []
    time = _time_name(type(transformer).__name__, inputs)
    first, second, rows = _trace(transformer, inputs, again, notes)
    if not first.blocks:
        raise DerivationError(f"{type(transformer).__name__}: no list of blocks is called")
    lineage = Lineage(first.blocks)
    kept, left = choose_lists(transformer, first, lineage, time)
    if not kept:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left.items())
        raise DerivationError(
            f"{type(transformer).__name__}: no list of blocks can be controlled ({reasons})"
        )
    sample = _sample_name(transformer, first)
    description = Description(first, second, rows, lineage, time, sample, notes)
    blocks = [spec for blocks in kept for spec in description.specs(blocks)]
    spec = TransformerSpec(
        transformer_class=type(transformer).__name__,
        blocks=tuple(blocks),
        timestep=time,
        sample=sample,
        skips=reads_further_back([call for blocks in kept for call in blocks.calls]),
        listed_sample=not isinstance(first.inputs[sample], Tensor),
        per_row=second is not None and not description.rowless,
    )
    return Derived(spec, left, tuple(dict.fromkeys(notes)))


def spec_of(transformer: nn.Module, inputs: Mapping[str, Any]) -> TransformerSpec:
    """The description alone, of a transformer that is called with `inputs`. Raises as `derive`."""
    return derive(transformer, inputs).spec


def _trace(
    transformer: nn.Module, inputs: Mapping[str, Any], again: Mapping[str, Any] | None, notes: list[str]
) -> tuple[TracedCall, TracedCall | None, tuple[int, int]]:
    """The call, the same call with another number of rows (None if it cannot be made), and both numbers."""
    call, second = _given(inputs), None if again is None else _given(again)
    try:
        model = meta_twin(transformer)
        let_one_run_for_all(outermost_lists(model))
        with autocast_on_meta():
            first = traced_call(model, to_meta(call))
        call, second = to_meta(call), to_meta(second)
    except Exception as error:  # whatever a forward does with values that are not there
        if any(parameter.is_meta for parameter in transformer.parameters()):
            name = type(transformer).__name__
            raise DerivationError(f"{name} needs real values to run: {_line(error)}") from error
        notes.append(f"traced in a real call: {_line(error)}")
        model, first = transformer, _real_call(transformer, call, notes)
    sample = _sample_name(transformer, first)
    rows = count_rows(call[sample])
    others = [with_rows(call, rows, rows + 1, axes, lists) for axes, lists in WAYS]
    if second is not None:
        others = [second]
    traced, reason = _first_that_runs(model, others, first)
    if traced is None:
        notes.append(f"rows told by their number alone: {reason}")
        return first, None, (rows, rows)
    return first, traced, (rows, count_rows(traced.inputs[sample]))


def _real_call(transformer: nn.Module, call: dict[str, Any], notes: list[str]) -> TracedCall:
    try:
        return traced_call(transformer, call)
    except Exception as error:  # functions that compile themselves cannot be watched
        notes.append(f"MLPs not looked for: {_line(error)}")
    try:
        return traced_call(transformer, call, read_mlps=False)
    except Exception as error:
        raise DerivationError(f"{type(transformer).__name__}: the call fails: {_line(error)}") from error


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def _first_that_runs(
    model: nn.Module, calls: list[dict[str, Any]], like: TracedCall
) -> tuple[TracedCall | None, str]:
    """The first call that runs the same blocks, and else why none does."""
    reason = ""
    for inputs in calls:
        try:
            with autocast_on_meta():
                traced = traced_call(model, inputs, read_mlps=False)
        except Exception as error:  # with rows where there are none a forward may do anything
            reason = reason or _line(error)
            continue
        if [(c.path, c.index) for c in traced.blocks] == [(c.path, c.index) for c in like.blocks]:
            return traced, ""
        reason = "a call with more rows runs other blocks"
    return None, reason


def _line(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:100]


def _time_name(transformer: str, inputs: Mapping[str, Any]) -> str:
    """The argument that places a call in time."""
    named = [name for name in TIME_NAMES if inputs.get(name) is not None]
    named += [name for name, value in inputs.items() if "time" in name and value is not None]
    if not named:
        raise DerivationError(
            f"{transformer}: the call has no argument with the time, only {', '.join(inputs)}"
        )
    return named[0]


def _sample_name(transformer: nn.Module, traced: TracedCall) -> str:
    """The argument with the latents.

    It is the first that has an output's shape, channels aside, else the first floating-point one that is a
    tensor or a list of tensors.
    """
    order = [name for name in argument_names(transformer) if name in traced.inputs]
    order += [name for name in traced.inputs if name not in order]
    fitting = {
        name: x
        for name in order
        if (x := _first_tensor(traced.inputs[name])) is not None and x.is_floating_point() and x.dim() > 1
    }
    if not fitting:
        raise DerivationError(f"{type(transformer).__name__}: the call has no argument with latents")
    outputs = [value.shape for value in traced.output]
    alike = [name for name, x in fitting.items() if any(_is_like(x.shape, shape) for shape in outputs)]
    return next(iter(alike or fitting))


def _is_like(shape: tuple[int, ...], output: tuple[int, ...]) -> bool:
    return len(shape) == len(output) and sum(a != b for a, b in zip(shape, output, strict=True)) <= 1


def _first_tensor(value: Any) -> Tensor | None:
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


__all__ = ["DerivationError", "Derived", "derive", "spec_of"]
