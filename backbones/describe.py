"""The blocks of a loaded transformer that nothing was written for, from the first call of its pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from backbones.model_files import ModelError
from backbones.spec import Family
from routers.cost import to_meta
from routers.derive import DerivationError, Derived, derive
from routers.derive.rows import with_rows
from routers.rows import count_rows


class _CalledError(BaseException):
    """Ends a run where the transformer is called; not an Exception, so that no pipeline catches it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


def described(family: Family, transformer: nn.Module, run: Callable[[], object]) -> tuple[Family, Derived]:
    """A family with the blocks and a typical call of the transformer that `run` calls, and what was derived.

    The call itself is not carried out. Raises ModelError where the blocks cannot be described.
    """
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _CalledError({**dict(zip(names, args, strict=False)), **kwargs})

    hook = transformer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _CalledError as call:
        inputs = call.inputs
    else:
        raise ModelError(f"{type(transformer).__name__} was never called by its pipeline")
    finally:
        hook.remove()
    try:
        found = derive(transformer, inputs)
    except DerivationError as error:
        raise ModelError(str(error)) from error
    rows = count_rows(inputs[found.spec.sample])
    row = with_rows(to_meta({name: value for name, value in inputs.items() if value is not None}), rows, 1)
    return replace(family, transformer=found.spec, call_inputs=lambda _configs, _size: row), found
