"""What blocks under control cost beside the model: counting, compiling, the clock."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from routers import cost
from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.run import Call
from routers.trace import FULL, REUSE, SKIP, CallRecord, Trace
from tests.block_kinds import CASES

CASE = next(case for case in CASES if case.name == "flux")
BLOCKS = 5


def with_text(tokens: int) -> dict[str, Any]:
    inputs = dict(CASE.inputs(1, 0.5, 0))
    dim = inputs["encoder_hidden_states"].shape[-1]
    inputs["encoder_hidden_states"] = torch.randn(1, tokens, dim)
    inputs["txt_ids"] = torch.zeros(tokens, 3)
    return inputs


def test_new_lengths_of_a_prompt_are_counted_by_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASE.transformer()
    elastic, lengths, counted, made = Elastic(model, CASE.spec), (3, 4, 7, 9, 12, 31), [], {}
    own = cost.Costs._count
    monkeypatch.setattr(cost.Costs, "_count", lambda *args: counted.append(1) or own(*args))
    with torch.no_grad(), elastic.scope(policy=OpenPolicy(), num_steps=len(lengths)) as trace:
        for tokens in lengths:
            model(**with_text(tokens))
            made[tokens] = trace.calls[-1].dense_flops
    elastic.detach()
    assert len(counted) == 4
    for tokens in lengths[-2:]:
        anew = Elastic(model, CASE.spec)
        with torch.no_grad(), anew.scope(policy=OpenPolicy(), num_steps=1) as trace:
            model(**with_text(tokens))
        anew.detach()
        assert math.isclose(trace.calls[0].dense_flops, made[tokens], rel_tol=1e-9)
        assert made[tokens] > 1.2 * made[3], "the text makes no difference: the test shows nothing"


def test_what_is_no_parabola_is_counted() -> None:
    """Of a transformer that pads to windows each length is counted for itself."""
    known = {
        (("x", (1, n)),): np.array([math.ceil(n / 8) * 8.0, 1.0]) for n in (3, 9, 17, 20, 33)
    }  # fmt: skip
    from routers.lengths import length_told

    assert length_told((("x", (1, 40)),), known) is None
    assert length_told((("y", (1, 40)),), {k: np.ones(1) for k in known}) is None
    straight = {shapes: np.array([2.0 * shapes[0][1][1]]) for shapes in known}
    told = length_told((("x", (1, 40)),), straight)
    assert told is not None and told[1] == pytest.approx([80.0])


@pytest.mark.slow
def test_compiled_blocks_stay_compiled_in_mixed_batches() -> None:
    model, rows, steps = CASE.transformer(), 3, 8
    drawn = np.random.default_rng(0).choice([REUSE, SKIP, 0, 1, 2, 3], size=(steps, rows, BLOCKS))
    plan = drawn.astype(np.int8)
    plan[:2] = FULL
    torch._dynamo.reset()
    before = torch._dynamo.config.recompile_limit
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="eager")
    elastic = Elastic(model, CASE.spec)
    inputs = [CASE.inputs(rows, 1 - step / steps, 0) for step in range(steps)]
    failing = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with failing, torch.no_grad(), elastic.scope(policy=FixedPolicy(plan, order=1), num_steps=steps):
        for each in inputs:
            model(**each)
    elastic.detach()
    assert torch._dynamo.config.recompile_limit == before
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [1, 2])
def test_calls_that_compute_everything_take_a_short_way_to_the_same(rows: int) -> None:
    """Somebody who looks on makes every block go the long way."""
    model, steps, found = CASE.transformer(), 5, []
    plan = np.full((steps, rows, BLOCKS), FULL, np.int8)
    plan[3] = REUSE
    plan[4, 0] = [REUSE, SKIP, FULL, FULL, REUSE]
    for watched in (False, True):
        elastic, seen = Elastic(model, CASE.spec), []
        elastic.observer = seen.append if watched else None
        with torch.no_grad(), elastic.scope(policy=FixedPolicy(plan, order=1), num_steps=steps) as trace:
            made = [CASE.run(model, rows, 1 - step / 6, step) for step in range(steps)]
        elastic.detach()
        assert bool(seen) == watched
        found.append((made, [call.flops.tolist() for call in trace.calls], trace.cache_bytes))
    (short, flops, held), (long, flops_long, held_long) = found
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert flops == flops_long and held == held_long > 0


def test_seconds_are_told_where_a_call_ends_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASE.transformer()
    elastic = Elastic(model, CASE.spec)
    with torch.no_grad(), elastic.scope(policy=OpenPolicy(), num_steps=1) as trace:
        model(**CASE.inputs(1, 0.5, 0))
    assert 0 < trace.seconds < time.process_time()
    assert f" calls, {trace.seconds:.2f} s\n" in trace.summary()

    def elsewhere(self: Call, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.time = self.time.to("meta")  # a device that works on when the call returns

    own = Call.__init__
    monkeypatch.setattr(Call, "__init__", elsewhere)
    with torch.no_grad(), elastic.scope(policy=OpenPolicy(), num_steps=1) as trace:
        model(**CASE.inputs(1, 0.5, 0))
    elastic.detach()
    assert trace.seconds == 0
    assert " calls\n" in trace.summary()
    record = CallRecord(0, "main", np.zeros((1, 1), np.int8), np.ones(1), 1.0)
    assert " s\n" not in Trace(samples=1, calls=[record]).summary()
