"""`routers.attach(pipe, budget=[0.4, 0.8])`: rows spend what each was given, and are as if alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import routers
from routers.planned.apart import picked
from routers.planned.sampled import Sampled
from routers.planned.spent import evaluations_for
from tests.routers.packaged import FLUX, MESH, QWEN, contexts, image_to_image, load, make, seeded, sketch

BUDGETS = [0.3, 0.8, 0.3]
NAMES = ["flux", "qwen", "mesh"]


def batch(pipe: Any, rows: list[int], steps: int = 10, **changes: Any) -> torch.Tensor:
    """Final latents of some rows of the batch, each from its own seed."""
    if hasattr(pipe, "conditioner"):
        context = {name: value[rows] for name, value in contexts(pipe, len(BUDGETS)).items()}
        noise = pipe.noise(len(rows), [seeded(i) for i in rows])
        return pipe.denoise(context, noise, steps, **changes)
    changes = {"generator": [seeded(i) for i in rows], **changes}
    prompts = [["a cat", "a red car", "two blue stars on a hill"][i] for i in rows]
    if "Qwen" in type(pipe).__name__:
        changes["negative_prompt"] = [" "] * len(rows)
    return make(pipe, steps, **{"prompt": prompts, **changes})


@contextmanager
def attached(folder: Path, budget: Any, **options: Any) -> Iterator[tuple[Any, Sampled]]:
    pipe = load(folder)
    sampled = routers.attach(pipe, budget=budget, **options)
    assert isinstance(sampled, Sampled)
    try:
        yield pipe, sampled
    finally:
        sampled.detach()
        assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


class Rows:
    """Counts the rows that a transformer's first block really computes, of all branches."""

    def __init__(self, pipe: Any) -> None:
        self.made = 0
        kind = type(next(iter(self.lists(pipe.transformer)))[0])
        self.block = next(module for module in pipe.transformer.modules() if type(module) is kind)
        self.handle = self.block.register_forward_pre_hook(self.count, with_kwargs=True)

    @staticmethod
    def lists(transformer: Any) -> list[torch.nn.ModuleList]:
        return [each for each in transformer.children() if isinstance(each, torch.nn.ModuleList)]

    def count(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.made += len(next(iter((*args, *kwargs.values()))))


@contextmanager
def counted_rows(pipe: Any) -> Iterator[Rows]:
    rows = Rows(pipe)
    try:
        yield rows
    finally:
        rows.handle.remove()


@pytest.mark.parametrize("target", ["dense", "exact"])
@pytest.mark.parametrize("folder", [pytest.param(FLUX, marks=pytest.mark.slow), QWEN, MESH], ids=NAMES)
def test_rows_spend_what_each_was_given_and_are_as_if_alone(folder: Path, target: str) -> None:
    with attached(folder, BUDGETS, target=target) as (pipe, sampled):
        with counted_rows(pipe) as rows:
            made = batch(pipe, [0, 1, 2])
        trace = sampled.trace
    assert trace is not None
    evaluations = [evaluations_for(budget, 10) for budget in BUDGETS]
    assert trace.spent == [count / 10 for count in evaluations]
    assert trace.share == pytest.approx(sum(evaluations) / 30)
    branches = 1 if "flux" in folder.name else 2
    assert rows.made == branches * sum(evaluations), "rows that wait are left out of the call"
    assert max(evaluations) <= trace.made == trace.planned <= sampled.evaluations(10, target=target)
    with attached(folder, 0.4, target=target) as (pipe, sampled):
        for row, budget in enumerate(BUDGETS[1:], 1):
            with sampled.scope(budget=budget):
                alone = batch(pipe, [row])[0]
            assert (made[row] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_budget_one_is_the_dense_run_beside_others() -> None:
    dense = batch(load(QWEN), [0, 1], 6)
    with attached(QWEN, [1.0, 0.5]) as (pipe, sampled):
        made = batch(pipe, [0, 1], 6)
        assert sampled.trace is not None and sampled.trace.spent == [1.0, 0.5]
        assert "0.5 (spent 0.500)" in sampled.summary()
    assert (made[0] - dense[0]).abs().max() <= 1e-5 * dense[0].abs().max()
    assert (made[1] - dense[1]).abs().max() > 1e-3 * dense[1].abs().max()


def test_rows_that_begin_at_a_picture() -> None:
    asked = {"image": [sketch()] * 2, "strength": 0.6}
    with attached(QWEN, [0.34, 0.67]) as (pipe, sampled):
        made = batch(image_to_image(pipe), [0, 1], **asked)
        assert sampled.trace is not None and sampled.trace.spent == [2 / 6, 4 / 6]
        with sampled.scope(budget=0.67):
            alone = batch(image_to_image(pipe), [1], image=[sketch()], strength=0.6)
    assert (made[1] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


def test_a_scope_has_budgets_of_its_own_and_leaves_none_behind() -> None:
    with attached(MESH, 0.5) as (pipe, sampled):
        before = batch(pipe, [0, 1])
        with sampled.scope(budget=[0.3, 0.7], samples=2) as trace:
            apart = batch(pipe, [0, 1])
        assert trace.spent == [0.3, 0.7] and not torch.equal(apart, before)
        assert torch.equal(batch(pipe, [0, 1]), before)


def test_a_batch_of_another_size_is_refused_and_the_next_run_is_whole() -> None:
    with attached(QWEN, [0.4, 0.8]) as (pipe, sampled):
        with pytest.raises(ValueError, match="2 budgets for a batch of 3: give one for each"):
            batch(pipe, [0, 1, 2])
        with sampled.scope(budget=1.0):
            made = batch(pipe, [0, 1, 2], 3)
    assert torch.equal(made, batch(load(QWEN), [0, 1, 2], 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": []}, "no budget for any row"),
        ({"budget": [0.5, 1.5]}, r"budget 1.5 is not a share"),
        ({"budget": [0.5, 0.6], "seconds": 3}, "seconds are of a whole batch"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routers.attach(load(QWEN), **options)


def test_a_transformer_compiled_in_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(QWEN, [0.4, 0.8]) as (pipe, sampled):
        monkeypatch.setitem(vars(pipe.transformer), "_compiled_call_impl", pipe.transformer._call_impl)
        with pytest.raises(ValueError, match="rows of its batch cannot be left out; give one budget"):
            batch(pipe, [0, 1])
        monkeypatch.undo()
        with sampled.scope(budget=0.4, samples=2):
            batch(pipe, [0, 1], 5)
        assert sampled.trace is not None and sampled.trace.spent == [0.4, 0.4]


def test_a_transformer_alone_has_one_budget() -> None:
    with pytest.raises(ValueError, match="budgets of rows need a plan in the sampler's place"):
        routers.attach(load(QWEN).transformer, budget=[0.4, 0.8])


def test_what_belongs_to_rows_is_told_from_what_is_as_long_by_chance() -> None:
    four = torch.arange(4.0)
    inputs = {
        "hidden_states": four[:, None], "img_ids": torch.zeros(4, 3), "input_ids": torch.zeros(4, 7),
        "image_rotary_emb": (torch.zeros(4, 8), torch.zeros(4, 8)), "txt_seq_lens": [1, 2, 3, 4],
        "residuals": [torch.zeros(4, 2)] * 4, "scale": torch.tensor(2.0), "more": {"embeds": four},
    }  # fmt: skip
    found = {name: picked(value, [1, 3], 4, name) for name, value in inputs.items()}
    assert found["hidden_states"].flatten().tolist() == found["more"]["embeds"].tolist() == [1, 3]
    assert found["img_ids"].shape == (4, 3) and found["input_ids"].shape == (2, 7)
    assert [each.shape for each in found["image_rotary_emb"]] == [(4, 8), (4, 8)]
    assert found["txt_seq_lens"] == [2, 4] and [len(each) for each in found["residuals"]] == [2] * 4
    listed = [torch.full((4, 3), float(i)) for i in range(4)]
    assert [each[0, 0] for each in picked(listed, [1, 3], 4, "x", listed=True)] == [1, 3]
