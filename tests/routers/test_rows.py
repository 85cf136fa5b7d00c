"""What a derived description says of a call's rows, on a small transformer that has everything at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.rows import row_times
from routers.spec import BlockSpec, RowsAt, TransformerSpec
from routers.trace import FULL, REUSE, SKIP

DIM, TOKENS = 8, 5


class Store:
    """What a reference pass leaves for later calls."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None


class OddBlock(nn.Module):
    """Rows in axis 1 of its stream, two entries of each in a conditioning, and one list entry a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(
        self,
        x: Tensor,
        shifts: Tensor,
        each: list[Tensor],
        extra: Tensor | None = None,
        store: Store | None = None,
    ) -> Tensor:
        added = shifts.unflatten(0, (-1, 2)).sum(1) + torch.stack(each)
        if extra is not None:
            added = added + extra
        if store is not None:
            store.kept = x
        return x + torch.tanh(self.linear(x)) * added


class OddTransformer(nn.Module):
    """Takes its conditions out of the caller's list, one a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OddBlock() for _ in range(3))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        each: list[Tensor],
        residuals: list[Tensor],
        extra: Tensor | None = None,
        store: Store | None = None,
        mode: str = "",
    ) -> Tensor:
        x, shifts = hidden_states.transpose(0, 1), timestep.repeat_interleave(2)[:, None].expand(-1, DIM)
        for block in self.blocks:
            x = block(x + residuals.pop(0), shifts, each, extra, store if mode == "fill" else None)
        return x.transpose(0, 1)


SPEC = TransformerSpec(
    "OddTransformer",
    (
        BlockSpec(
            "block", "OddBlock", "blocks", ("x",), (),
            modulation=None,
            rows=(RowsAt("x", 1), RowsAt("shifts", 0, folded=True), RowsAt("each")),
            absent=("extra",),
            objects=("store",),
        ),
    ),
)  # fmt: skip


def call(rows: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Row i depends on seed + i only."""
    drawn = [torch.Generator().manual_seed(seed + i) for i in range(rows)]
    return {
        "hidden_states": torch.stack([torch.randn(TOKENS, DIM, generator=g) for g in drawn]),
        "timestep": torch.tensor([0.1 * (seed + i) + 0.5 for i in range(rows)]),
        "each": [torch.randn(DIM, generator=g) for g in drawn],
        "residuals": [torch.full((TOKENS, 1, DIM), 0.1 * i) for i in range(3)],
        **more,
    }


def later(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call at the next step."""
    return {**inputs, "timestep": inputs["timestep"] - 0.3}


@pytest.fixture
def elastic() -> Elastic:
    torch.manual_seed(0)
    return Elastic(OddTransformer().requires_grad_(False), SPEC)


def run(elastic: Elastic, plan: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    with elastic.scope(policy=FixedPolicy(np.asarray(plan, np.int8), order=0)):
        return [elastic.transformer(**inputs) for inputs in calls]


def test_rows_on_other_axes_in_lists_and_folded_are_picked(elastic: Elastic) -> None:
    plan = np.array([[[FULL] * 3] * 3, [[FULL, SKIP, REUSE], [REUSE, FULL, FULL], [SKIP, REUSE, FULL]]])
    together = run(elastic, plan, [call(3), later(call(3))])
    for row in range(3):
        alone = run(elastic, plan[:, row : row + 1], [call(1, row), later(call(1, row))])
        for one, every in zip(alone, together, strict=True):
            assert torch.allclose(one[0], every[row], atol=1e-6)


def test_a_forward_that_consumes_its_lists_runs(elastic: Elastic) -> None:
    opened = run(elastic, [FULL] * 3, [call(2)])
    elastic.detach()
    assert torch.equal(opened[0], elastic.transformer(**call(2)))


def test_an_argument_nobody_looked_at_makes_rows_decide_together(elastic: Elastic) -> None:
    plan = np.array([[[FULL] * 3] * 2, [[REUSE] * 3, [FULL] * 3]])
    extra = torch.ones(2, DIM)
    run(elastic, plan, [call(2, extra=extra), later(call(2, extra=extra))])
    assert elastic.trace is not None
    assert (elastic.trace.calls[1].actions == REUSE).all(), "the second row did as the first"
    assert any("extra was not in the call" in note for note in elastic.trace.notes)


def test_a_call_that_fills_an_object_runs_in_full(elastic: Elastic) -> None:
    store = Store()
    run(elastic, [SKIP] * 3, [call(1, store=store, mode="fill"), later(call(1, store=store, mode="read"))])
    assert elastic.trace is not None
    filling, reading = (record.actions for record in elastic.trace.calls)
    assert (filling == FULL).all()
    assert (reading == SKIP).all()
    assert store.kept is not None
    assert store.kept.device.type == "cpu", "counting on the meta device filled a copy"


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (torch.tensor([3.0]), [3.0]),
        (torch.tensor([3.0, 4.0]), [3.0, 4.0]),
        (torch.tensor([[0.0, 3.0, 3.0], [0.0, 4.0, 4.0]]), [3.0, 4.0]),
        (torch.tensor([0.0, 3.0, 3.0]), [3.0]),
        (7, [7.0]),
    ],
)
def test_times(time: Any, expected: list[float]) -> None:
    assert row_times(time, 2, torch.device("cpu")).tolist() == expected


def test_a_list_on_other_tokens_is_a_stretch_of_its_own() -> None:
    first, second = OddTransformer(), OddTransformer()
    both = nn.Module()
    both.a, both.b = first.blocks, second.blocks
    blocks = tuple(
        BlockSpec("block", "OddBlock", path, ("x",), (), None, fresh=fresh)
        for path, fresh in (("a", False), ("b", True))
    )
    assert Elastic(both, TransformerSpec("Module", blocks)).segments == ((0, 2), (3, 5))
