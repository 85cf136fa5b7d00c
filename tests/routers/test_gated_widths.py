"""Widths of every kind of MLP that a description can name: the other hidden units zeroed, and counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import routers
from routers.derive import DerivationError, derive
from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.spec import WIDTHS
from routers.static.frozen import frozen, shape_of
from routers.static.units import order_units
from routers.trace import FULL, REUSE
from tests.routers.test_derive import DIM, Fused, FusedWithAttention, Gated, Toy, ToyBlock


class Experts(ToyBlock):
    """Two gated experts, each for the tokens whose first value has its sign, and a shared one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: Any) -> Tensor:
        x = x + self.time(temb)[:, None]
        flat = x.flatten(0, 1)
        routed = torch.zeros_like(flat)
        for sign, expert in zip((-1, 1), self.experts, strict=True):
            chosen = torch.nonzero(torch.sign(flat[:, 0]) == sign)[:, 0]
            part = flat[chosen]
            routed[chosen] = expert.down(F.silu(expert.gate(part)) * expert.up(part))
        return x + routed.view_as(x) + self.down(F.gelu(self.up(x)))


KINDS = [ToyBlock, Gated, Fused, FusedWithAttention, Experts]


def inputs(rows: int = 3, t: float = 0.7) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(rows, 4, DIM, generator=drawn), "timestep": torch.full((rows,), t)}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def elastic(request: pytest.FixtureRequest) -> Elastic:
    torch.manual_seed(0)
    model = Toy(request.param).requires_grad_(False)
    return Elastic(model, derive(model, inputs()).spec)


def run(elastic: Elastic, plan: Any) -> Tensor:
    with elastic.scope(policy=FixedPolicy(np.asarray(plan, np.int8))):
        output: Tensor = elastic.transformer(**inputs())
    return output


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_width_equals_zeroing_the_other_units(elastic: Elastic, code: int) -> None:
    narrow = run(elastic, [code, code])
    assert all(block.slicers for block in elastic.blocks)
    for block in elastic.blocks:
        for slicer in block.slicers:
            weight: Any = slicer.linears[1].weight
            weight[:, slicer.column_offset + slicer.units(WIDTHS[code]) :] = 0
    assert torch.allclose(narrow, run(elastic, [FULL, FULL]), atol=1e-6)


def test_rows_of_one_call_have_widths_of_their_own(elastic: Elastic) -> None:
    codes = [[0, 2], [FULL, 1], [1, 1]]
    mixed = run(elastic, [codes])
    for row, code in enumerate(codes):
        assert torch.allclose(mixed[row], run(elastic, code)[row], atol=1e-6)


@pytest.mark.parametrize("code", [0, 2, FULL])
def test_flops_are_those_that_run(elastic: Elastic, code: int) -> None:
    run(elastic, [code, code])  # counts what the shapes cost
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run(elastic, [code, code])
    assert elastic.trace is not None
    assert elastic.trace.flops["spent"] == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_attach_without_a_spec_derives_it_from_the_first_call() -> None:
    torch.manual_seed(0)
    model = Toy(Gated).requires_grad_(False)
    dense = [model(**inputs(t=t)) for t in (0.9, 0.7)]
    elastic = routers.attach(model, None)
    with elastic.scope(policy=FixedPolicy(np.array([[FULL, FULL], [REUSE, REUSE]]), 0)) as trace:
        outputs = [model(**inputs(t=t)) for t in (0.9, 0.7)]
    assert torch.equal(outputs[0], dense[0])
    assert not torch.equal(outputs[1], dense[1])
    assert elastic.spec == derive(Toy(Gated), inputs()).spec
    assert len(trace.kinds) == trace.decisions["reuse"] // 3 == 2  # type: ignore[operator]
    elastic.detach()
    assert torch.equal(model(**inputs(t=0.9)), dense[0])
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_cannot_be_derived_is_refused_in_the_first_call() -> None:
    class Sequence(nn.Module):
        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            return latents * timestep[:, None, None]

    model = Sequence()
    elastic = routers.attach(model, None)
    with pytest.raises(DerivationError, match=r"Sequence: no list of blocks is called"):
        model(**inputs())
    elastic.detach()
    assert model(**inputs()).shape == (3, 4, DIM)


def test_hidden_units_are_ordered_and_cut_for_good(elastic: Elastic) -> None:
    model, spec = elastic.transformer, elastic.spec
    slicers = [slicer for block in elastic.blocks for slicer in block.slicers]
    dense = run(elastic, [FULL, FULL])
    elastic.detach()
    undo = order_units(model, spec, [inputs()])
    assert torch.allclose(model(**inputs()), dense, atol=1e-6)
    attached = Elastic(model, spec)
    narrow = run(attached, [0, 0])
    attached.detach()
    shape = shape_of(model, spec, set(), {0: WIDTHS[0], 1: WIDTHS[0]})
    if any(slicer.spec.padded for slicer in slicers):
        with pytest.raises(ValueError, match="only plain linears can be cut"):
            frozen(model, spec, shape)
    else:
        assert torch.allclose(frozen(model, spec, shape)(**inputs()), narrow, atol=1e-6)
    undo()
    assert torch.equal(model(**inputs()), dense)
