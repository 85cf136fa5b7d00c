"""A description from one traced call: agreement with the hand-written ones, and each rule on a toy."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routers.derive import DerivationError, derive
from routers.spec import BlockSpec, RowsAt, TransformerSpec
from tests.block_kinds import CASES, Case

DIM = 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_hand_written_description(case: Case) -> None:
    derived = derive(case.transformer(), case.inputs(2, 0.7, 0))
    assert not derived.left_in_full
    assert plain(derived.spec, case) == plain(case.spec, case)


def plain(spec: TransformerSpec, case: Case) -> TransformerSpec:
    """What a call can show: not the names of kinds, nor arguments that this call leaves out, nor experts."""
    derived = derive(case.transformer(), case.inputs(2, 0.7, 0)).spec
    blocks = []
    for block, shown in zip(spec.blocks, derived.blocks, strict=True):
        given = tuple(name for name in block.batched if name not in shown.absent)
        mlps = tuple(mlp for mlp in block.mlps if mlp.per_row)
        mask = block.mask if block.mask not in shown.absent else None
        blocks.append(replace(block, kind="", batched=given, mlps=mlps, mask=mask, absent=()))
    return replace(spec, blocks=tuple(blocks))


def test_a_mask_that_is_given_is_found() -> None:
    case = CASES[0]
    inputs = {**case.inputs(2, 0.7, 0), "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long)}
    block = derive(case.transformer(), inputs).spec.blocks[0]
    assert block.mask == "encoder_hidden_states_mask"
    assert block.batched == ("encoder_hidden_states_mask",)


class ToyBlock(nn.Module):
    """A block with a plain MLP, which reads its time and a table that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.time(temb)[:, None] + table + pair[0] * pair[1]
        return x + self.down(F.gelu(self.up(x)))


class Toy(nn.Module):
    """Two such blocks; `control` is added to the stream between them."""

    def __init__(self, block: type[nn.Module] = ToyBlock, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, latents: Tensor, timestep: Tensor, control: Tensor | None = None) -> Tensor:
        temb = timestep[:, None] * torch.ones(DIM, device=latents.device)
        table = torch.ones(latents.shape[1], DIM, device=latents.device)
        x = latents
        for block in self.blocks:
            x = block(x, temb, table, (x * 0, table))
            x = x if control is None else x + control
        return x


def toy_inputs(rows: int = 3, tokens: int = 3) -> dict[str, Any]:
    return {"latents": torch.randn(rows, tokens, DIM), "timestep": torch.rand(rows)}


def only_block(transformer: nn.Module, **more: Any) -> BlockSpec:
    spec = derive(transformer, {**toy_inputs(), **more}).spec
    assert spec.per_row
    return spec.blocks[0]


def test_rows_are_told_from_as_many_tokens() -> None:
    block = only_block(Toy())
    assert (block.streams, block.modulation, block.batched) == (("x",), "temb", ())
    assert block.rows == (RowsAt("pair.0"),)


def test_a_stream_is_followed_through_what_is_added_between_blocks() -> None:
    block = only_block(Toy(), control=torch.randn(3, 3, DIM))
    assert (block.streams, block.returns) == (("x",), ())


def test_a_list_of_one_block_has_the_stream_of_its_shape() -> None:
    assert only_block(Toy(count=1)).streams == ("x",)


class Gated(ToyBlock):
    """SwiGLU of three linears."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 4 * DIM)

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: Any) -> Tensor:
        return x + temb[:, None] * self.down(self.up(x) * F.silu(self.gate(x)))


class Fused(ToyBlock):
    """SwiGLU whose in-linear yields both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 8 * DIM)

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: Any) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return x + temb[:, None] * self.down(value * F.silu(gate))


class FusedWithAttention(ToyBlock):
    """One in-linear for queries and MLP, one out-linear for attention and MLP, split at given sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 5 * DIM), nn.Linear(5 * DIM, DIM)

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: Any) -> Tensor:
        query, hidden = self.up(x).split([DIM, 4 * DIM], dim=-1)
        attended = query.softmax(1) * x
        return x + temb[:, None] * self.down(torch.cat([attended, F.gelu(hidden)], dim=-1))


class AttentionGate(ToyBlock):
    """A sigmoid gate on what was attended is not a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, temb: Tensor, table: Tensor, pair: Any) -> Tensor:
        return x + temb[:, None] * self.down(torch.sigmoid(self.up(x)) * x.softmax(1))


def test_a_gate_of_three_linears_is_an_mlp() -> None:
    (mlp,) = only_block(Toy(Gated)).mlps
    assert (mlp.in_linear, mlp.gate, mlp.out_linear, mlp.fused_gate) == ("up", "gate", "down", False)


def test_a_fused_gate_is_an_mlp() -> None:
    (mlp,) = only_block(Toy(Fused)).mlps
    assert (mlp.in_linear, mlp.gate, mlp.fused_gate, mlp.padded) == ("up", "", True, False)


def test_an_mlp_fused_with_attention_has_offsets_and_needs_padding() -> None:
    (mlp,) = only_block(Toy(FusedWithAttention)).mlps
    assert (mlp.in_offset, mlp.out_offset, mlp.padded) == (1, 1, True)


def test_a_gate_on_attention_is_not_an_mlp() -> None:
    assert only_block(Toy(AttentionGate)).mlps == ()


class EndsEarly(ToyBlock):
    """Two streams, of which the last block gives back one."""

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, last: bool) -> tuple[Tensor | None, Tensor]:
        y = x + temb[:, None] * self.down(F.gelu(self.up(x + text.mean(1, keepdim=True))))
        return (None if last else text + 1), y


class TwoStreams(Toy):
    def __init__(self) -> None:
        super().__init__(EndsEarly)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        temb = timestep[:, None] * torch.ones(DIM, device=latents.device)
        for i, block in enumerate(self.blocks):
            text, latents = block(latents, text, temb, i == len(self.blocks) - 1)
        return latents


def test_a_stream_may_end_as_none() -> None:
    inputs = {**toy_inputs(2, 6), "text": torch.randn(2, 4, DIM)}
    block = derive(TwoStreams(), inputs).spec.blocks[0]
    assert (block.streams, block.returns, block.ends) == (("x", "text"), (1, 0), ("text",))


def test_the_real_model_is_not_run() -> None:
    toy = Toy()
    ran: list[str] = []
    toy.register_forward_hook(lambda *_: ran.append("transformer"))
    toy.blocks[0].register_forward_hook(lambda *_: ran.append("block"))
    state = {path: dict(vars(module)) for path, module in toy.named_modules()}
    derive(toy, toy_inputs())
    assert not ran
    assert {path: dict(vars(module)) for path, module in toy.named_modules()} == state


class NeedsValues(Toy):
    def forward(self, latents: Tensor, timestep: Tensor, control: Tensor | None = None) -> Tensor:
        return super().forward(latents * float(latents.abs().max()), timestep, control)


def test_a_forward_that_needs_values_is_traced_for_real() -> None:
    derived = derive(NeedsValues(), toy_inputs())
    assert derived.spec.blocks[0].streams == ("x",)
    assert any("real call" in note for note in derived.notes)
    with pytest.raises(DerivationError, match="NeedsValues needs real values to run"):
        derive(NeedsValues().to("meta"), toy_inputs())


class Backwards(Toy):
    def forward(self, latents: Tensor, timestep: Tensor, control: Tensor | None = None) -> Tensor:
        self.blocks = nn.ModuleList(reversed(self.blocks))
        return super().forward(latents, timestep, control)


class NoLists(nn.Module):
    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize(
    ("transformer", "inputs", "message"),
    [
        (NoLists(), toy_inputs(), "no list of blocks is called"),
        (Backwards(), toy_inputs(), "blocks: not called once each in order"),
        (Toy(), {"latents": torch.ones(2, 3, DIM), "timestep": None}, "no argument with the time"),
    ],
    ids=["no list", "out of order", "no time"],
)
def test_a_refusal_is_one_line_with_the_reason(
    transformer: nn.Module, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(DerivationError, match=message) as refusal:
        derive(transformer, inputs)
    assert "\n" not in str(refusal.value)


def test_a_description_survives_json() -> None:
    spec = derive(Toy(Fused), toy_inputs()).spec
    assert TransformerSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.bench
def test_a_real_size_model_takes_under_two_seconds() -> None:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
        inputs = {
            "hidden_states": torch.empty(2, 83 * 83, 64),
            "encoder_hidden_states": torch.empty(2, 100, 3584),
            "timestep": torch.empty(2),
            "img_shapes": [[(1, 83, 83)]] * 2,
            "return_dict": False,
        }
    derive(transformer, inputs)
    started = time.process_time()
    derived = derive(transformer, inputs)
    assert time.process_time() - started < 2
    assert len(transformer.transformer_blocks) == 60
    assert derived.spec.blocks[0].streams == ("hidden_states", "encoder_hidden_states")
