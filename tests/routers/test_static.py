"""Static transformers: smaller weights, the same function as the narrowed and skipped dense model."""

from __future__ import annotations

import pytest
import torch

from routers.meta import transformer_flops
from routers.static.choose import Removal, Trial, choose, record_calls
from routers.static.frozen import StaticShape, drop_groups, frozen, narrow, shape_of
from routers.static.units import order_units
from tests.block_kinds import CASES, Case

IDS = [case.name for case in CASES]


def a_removal(case: Case, model) -> Removal:
    """One droppable group, and quarter and half widths of two other blocks."""
    group = drop_groups(model, case.spec)[0]
    blocks = Trial(model, case.spec, []).blocks
    first, second = [b.index for b in blocks if b.index not in group][:2]
    return Removal(frozenset(group), {first: 0.25, second: 0.5})


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_frozen_model_equals_the_tried_one(case: Case) -> None:
    """The weights are gone, and the outputs are those of the whole model with these decisions."""
    model = case.transformer()
    dense = case.run(model)
    removal = a_removal(case, model)
    shape = shape_of(model, case.spec, set(removal.dropped), removal.widths)
    small = frozen(model, case.spec, shape)
    call = case.inputs(2, 0.7, 0)
    trial = Trial(model, case.spec, [call])
    with trial.attached():
        error, share = trial.error(removal), trial.flops(removal)
        (tried,) = trial.outputs(removal)
    assert torch.allclose(case.run(small), tried, atol=1e-6)
    found = float((case.run(small) - dense).square().sum() / dense.square().sum())
    assert error == pytest.approx(found, rel=1e-3) and error > 0
    assert transformer_flops(small, call) / transformer_flops(model, call) == pytest.approx(share, rel=0.01)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert counts[1] < counts[0]
    assert torch.equal(case.run(model), dense), "the original is as it was"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_narrowed_skeleton_takes_the_saved_weights(case: Case) -> None:
    """How a folder is loaded: build with fewer blocks, narrow on the meta device, assign the weights."""
    model = case.transformer()
    removal = a_removal(case, model)
    shape = shape_of(model, case.spec, set(removal.dropped), removal.widths)
    small = frozen(model, case.spec, shape)
    only_dropped = frozen(model, case.spec, shape_of(model, case.spec, set(removal.dropped), {}))
    again = StaticShape.from_dict(shape.to_dict())
    assert again == shape
    narrow(only_dropped, case.spec, again)
    assert {k: v.shape for k, v in only_dropped.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"the static shape (describes|asks for)"):
        narrow(frozen(model, case.spec, shape_of(model, case.spec, set(), {0: 0.25})), case.spec, again)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_choice_meets_the_budget(case: Case) -> None:
    model = case.transformer()
    dense = case.run(model)
    with record_calls(model, (0, 1)) as calls:
        case.run(model, t=0.9)
        case.run(model, t=0.3)
        case.run(model, t=0.1)
    assert len(calls) == 2
    order_units(model, case.spec, calls)
    assert torch.allclose(case.run(model), dense, atol=1e-5)
    budget = 0.7
    chosen = choose(model, case.spec, calls, budget)
    assert budget - 0.25 < chosen.flops <= budget + 1e-6
    assert chosen.error > 0
    small = frozen(model, case.spec, chosen.shape)
    with torch.no_grad():
        errors = [
            float((small(**c)[0] - model(**c)[0]).square().sum() / model(**c)[0].square().sum())
            if case.name in ("qwen", "flux")
            else float((small(**c) - model(**c)).square().sum() / model(**c).square().sum())
            for c in calls
        ]
    assert sum(errors) / 2 == pytest.approx(chosen.error, rel=1e-3)


def test_a_unit_order_puts_the_heavy_units_first() -> None:
    case = CASES[0]
    model = case.transformer()
    block = model.transformer_blocks[0]
    with torch.no_grad():
        block.img_mlp.net[2].weight[:, 100] *= 50
    before = block.img_mlp.net[2].weight[:, 100].clone()
    with record_calls(model, (0,)) as calls:
        case.run(model)
    order_units(model, case.spec, calls)
    assert torch.equal(block.img_mlp.net[2].weight[:, 0], before)


def test_mirrored_blocks_go_together() -> None:
    case = next(c for c in CASES if c.name == "hunyuan3d-2.1")
    assert drop_groups(case.transformer(), case.spec) == [(0, 4), (1, 3)]
    model = case.transformer()
    del model.blocks[4]
    assert drop_groups(model, case.spec) == []


def test_impossible_budget() -> None:
    case = CASES[0]
    model = case.transformer()
    with pytest.raises(ValueError, match=r"a static model of budget 0\.01 is not possible here"):
        choose(model, case.spec, [case.inputs(1, 0.5, 0)], 0.01)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a static shape"),
        ({"a": {}}, "not a static shape: .*missing required field kept"),
        ({"a": {"kept": [1], "units": []}}, "keeps 1 blocks and describes others"),
        ({"a": {"kept": [-1], "units": [[1]]}}, "kept.*expected int >= 0"),
        ({"a": {"kept": [1, 0], "units": [[1], [1]]}}, "describes others"),
        ({"a": {"kept": [0], "units": [["x"]]}}, "units.*expected int, got str"),
        ({"a": {"kept": [0], "units": [[1]], "z": 1}}, "unknown field z"),
    ],
)
def test_other_shapes_are_refused(data, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticShape.from_dict(data)


COMPILED = [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_as_one_graph(case: Case) -> None:
    model = case.transformer()
    removal = a_removal(case, model)
    small = frozen(model, case.spec, shape_of(model, case.spec, set(removal.dropped), removal.widths))
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert torch.allclose(case.run(compiled), case.run(small), atol=1e-5)


@pytest.mark.parametrize("case", [case for case in COMPILED if case.id != "hunyuan3d-2-guided"])
def test_exports_as_a_program(case: Case, tmp_path) -> None:
    """Saved and loaded again; experts take a path of their own when they are traced."""
    from edit_cli.export.program import Call
    from routers.calls import flatten

    model = case.transformer()
    removal = a_removal(case, model)
    small = frozen(model, case.spec, shape_of(model, case.spec, set(removal.dropped), removal.widths))
    arguments = case.inputs(2, 0.7, 0)
    if case.name.startswith("hunyuan"):
        arguments.pop("guidance")
    call, tensors = Call(small, arguments), list(flatten(arguments)[0].values())
    with torch.no_grad():
        torch.export.save(torch.export.export(call, tuple(tensors), strict=False), tmp_path / "a.pt2")
        found = torch.export.load(tmp_path / "a.pt2").module()(*tensors)
        assert torch.allclose(found, call(*tensors), atol=1e-5)
