"""The blocks of a loaded transformer that nothing was written for, from the first call of its pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from backbones.inspect import InspectError, on_meta
from backbones.model_files import ModelError
from backbones.spec import CallSize, Config, Configs, Family
from backbones.typical_call import Sizes, typical_calls
from routers.derive import DerivationError, Derived, derive
from routers.derive.rows import with_rows
from routers.meta import autocast_on_meta, to_meta

TEXT = 256
"""Text tokens of a call where nothing says how many."""


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
    rows = len(inputs[found.spec.sample])  # of a tensor, or of a list with one tensor a row
    row = with_rows(to_meta({name: value for name, value in inputs.items() if value is not None}), rows, 1)
    spec = family.transformer if family.transformer.blocks else found.spec
    return replace(family, transformer=spec, call_inputs=lambda _configs, _size: row), found


def guessed_call(configs: Configs, size: CallSize) -> dict[str, Any]:
    """Arguments of a transformer call of this size as meta tensors, guessed from configurations alone.

    Raises ModelError for a class whose arguments cannot be guessed.
    """
    config = configs["transformer"]
    try:
        transformer: Any = on_meta(dict(config))
    except InspectError as error:
        raise ModelError(str(error)) from error
    for call in typical_calls(transformer, dict(transformer.config), _sizes(configs.get("vae", {}), size)):
        try:
            with autocast_on_meta():
                transformer(**call)
        except Exception:  # whatever a forward does with a wrong guess
            continue
        return call
    raise ModelError(f"the arguments of {config.get('_class_name')} are known once the model is loaded")


def _sizes(vae: Config, size: CallSize) -> Sizes:
    """Latent sizes behind a VAE, whose configuration has one of several names for its scale."""
    halved = len(vae.get("block_out_channels") or ()) - 1 or len(vae.get("temperal_downsample") or ())
    space = (
        vae.get("scale_factor_spatial")
        or vae.get("spatial_compression_ratio")
        or 2 ** (halved if halved > 0 else 3)
    )
    time = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
    frames = (size.frames - 1) // time + 1
    return Sizes(size.rows, frames, size.height // space, size.width // space, size.text or TEXT, own=False)
