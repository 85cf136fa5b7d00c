"""Counting FLOPs: fused attention on the CPU, and blocks that need real values to run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routers.cost import block_cost
from routers.elastic import Elastic
from routers.meta import count_flops, meta_twin
from routers.spec import BlockSpec, MlpSpec, TransformerSpec

DIM, TOKENS, ROWS = 12, 6, 3
MLP = MlpSpec(in_linear="up", activation="act", out_linear="down")
SPEC = TransformerSpec(
    transformer_class="Model",
    blocks=(
        BlockSpec(
            kind="block",
            block_class="Block",
            path="blocks",
            streams=("hidden_states",),
            returns=(0,),
            modulation="temb",
            mlps=(MLP,),
        ),
    ),
)


class Block(nn.Module):
    """Attention and an MLP. `needs`: what the forward does beside, to be impossible without values."""

    def __init__(self, needs: str = "") -> None:
        super().__init__()
        self.needs = needs
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.act, self.down = nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor]:
        if self.needs == "item":
            float(hidden_states.abs().max())
        if self.needs == "nonzero":
            torch.nonzero(hidden_states)
        if self.needs == "numpy":
            hidden_states.numpy()
        if self.needs == "shape":
            hidden_states @ hidden_states
        qkv = self.qkv(hidden_states + temb[:, None]).unflatten(-1, (3, 2, -1))
        q, k, v = qkv.movedim(2, 0).movedim(-2, 2)
        hidden_states = hidden_states + self.out(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return (hidden_states + self.down(self.act(self.up(hidden_states))),)


class Model(nn.Module):
    """Two blocks; timestep embedding without weights."""

    def __init__(self, needs: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(needs), Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb = timestep[:, None].expand(-1, DIM)
        for block in self.blocks:
            (hidden_states,) = block(hidden_states, temb)
        return hidden_states


def by_hand() -> tuple[float, float]:
    """FLOPs of a row in one block: linears, attention's two products; and the MLP's share."""
    mlp = 2 * TOKENS * DIM * 4 * DIM * 2
    linears = 2 * TOKENS * DIM * (3 * DIM + DIM) + mlp
    return linears + 2 * 2 * TOKENS * TOKENS * DIM, mlp


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, TOKENS, DIM), torch.randn(ROWS, DIM)


@pytest.mark.parametrize("needs", ["", "item", "nonzero", "numpy"])
def test_cost_equals_the_formula_by_hand(needs):
    block = Block(needs).requires_grad_(False)
    cost = block_cost(block, [MLP], inputs(), {}, ROWS, TOKENS)
    assert (cost.dense, cost.mlp) == by_hand()
    assert bool(cost.note) == bool(needs)
    if needs:
        assert cost.note.startswith("Block needs real values to run, so its FLOPs were counted in a run")
    assert not any(module._forward_hooks for module in block.modules())


def test_fused_attention_on_the_cpu_is_counted():
    x = torch.randn(2, 2, TOKENS, DIM)
    assert count_flops(F.scaled_dot_product_attention, x, x, x) == 2 * 2 * 2 * 2 * TOKENS * TOKENS * DIM


def test_a_blocks_own_error_is_raised():
    block = Block("shape").requires_grad_(False)
    with pytest.raises(RuntimeError, match="batch2"):
        block_cost(block, [], inputs(), {}, ROWS, TOKENS)


def test_every_run_says_how_it_was_counted():
    model = Model("item").requires_grad_(False)
    elastic = Elastic(model, SPEC)
    notes = []
    for _ in range(2):
        with torch.no_grad(), elastic.scope() as trace:
            model(hidden_states=inputs()[0], timestep=torch.full((ROWS,), 0.5))
        notes.append([note for note in trace.notes if "real values" in note])
    assert len(notes[0]) == 1
    assert notes[0] == notes[1]
    assert trace.flops["dense"] == pytest.approx(ROWS * 2 * by_hand()[0], rel=1e-3)
    assert notes[0][0] in elastic.summary()


def test_a_twin_attends_as_its_class_does_whatever_was_set() -> None:
    """AnyFlow's causal blocks work with one backend alone, which their processor's class names."""

    class Processor:
        _attention_backend: str | None = "flex"

    module = torch.nn.Linear(2, 2)
    module.processor = Processor()  # type: ignore[assignment]
    module.processor._attention_backend = "native"
    assert meta_twin(module).processor._attention_backend == "flex"  # type: ignore[union-attr]
    assert module.processor._attention_backend == "native"
