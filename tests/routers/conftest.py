"""What tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from routers import cost

PLAIN = (int, float, str, list, tuple, dict, set, type(None))


def _looks(block: nn.Module) -> Any:
    """Classes, settings, hooks and parameters of a block and of what is inside it."""
    settings = []
    for name, part in block.named_modules():
        plain = {k: v for k, v in vars(part).items() if k[0] != "_" and isinstance(v, PLAIN)}
        settings.append((name, type(part), sorted(vars(part)), plain))
    parameters = [(name, type(p), p.dtype, p.device, p.shape) for name, p in block.named_parameters()]
    return repr((settings, parameters))


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)


@pytest.fixture(scope="module")
def counted_once() -> Iterator[None]:
    """Blocks that look alike, called alike, are counted once a module: where costs are not what is tested."""
    count, known = cost.block_cost, {}

    def block_cost(block: nn.Module, mlps: Any, args: Any, kwargs: Any, rows: int, tokens: int) -> Any:
        values, layout = tree_flatten((args, dict(kwargs)))
        key = (_looks(block), tuple(mlps), repr(layout), tuple(map(_shape, values)), rows, tokens)
        if key not in known:
            known[key] = count(block, mlps, args, kwargs, rows, tokens)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "block_cost", block_cost)
        yield
