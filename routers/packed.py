"""Linears: behind wrappers, and with weights in another form than `[out, in]` of floats, packed or scaled.

torchao and optimum-quanto keep tensors of classes of their own, bitsandbytes and GGUF packed bytes. Such a
linear computes what a dense one would, at the same FLOPs, but its rows and columns cannot be cut by slicing:
its width is fixed. Floats of 8 bits that diffusers' layerwise casting casts when a layer is called are not
packed, a slice of them can be cast too (`width.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def base_layer(module: nn.Module) -> Any:
    """A linear itself, or the one that an adapter's layer is around."""
    get_base = getattr(module, "get_base_layer", None)
    return get_base() if get_base is not None else module


def out_features(module: nn.Module) -> int:
    """Output features of a linear or of a wrapper around one."""
    return int(base_layer(module).out_features)


def in_features(module: nn.Module) -> int:
    """Input features of a linear or of a wrapper around one."""
    return int(base_layer(module).in_features)


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear in all but the form of its weights."""
    weight = module._parameters.get("weight")
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if weight is None or module._modules or not all(isinstance(size, int) for size in sizes):
        return False
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    return not plain or tuple(weight.shape) != sizes


def dense_like(module: Any) -> nn.Linear:
    """The linear that a packed one stands for, on the meta device."""
    bias = module._parameters.get("bias") is not None
    return nn.Linear(module.in_features, module.out_features, bias, device="meta").requires_grad_(False)


def dense_shapes(root: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, as it is before weights are packed."""
    shapes = {name: tuple(parameter.shape) for name, parameter in root.named_parameters()}
    for path, module in root.named_modules():
        if is_packed(module):
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)  # type: ignore[assignment]
    return shapes


def first_weights(linear: Any, count: int) -> Tensor:
    """The first weights `[count]` of a packed linear's first row: what it makes of unit vectors."""
    weight: Tensor = linear.weight
    bias = linear._parameters.get("bias")
    dtypes = [getattr(linear, "compute_dtype", None), weight.dtype, None if bias is None else bias.dtype]
    dtype = next((d for d in dtypes if d is not None and d.is_floating_point), torch.float32)
    units = torch.eye(count, linear.in_features, dtype=dtype, device=weight.device)
    with torch.no_grad():
        outputs: Tensor = linear(units)[:, 0].float()
    return outputs if bias is None else outputs - bias[0].float()
