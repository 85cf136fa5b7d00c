"""The overhead benchmark runs at small size, and its measuring instruments measure."""

import json
import time

import numpy as np
import pytest
import torch

from benchmarks import memory, overhead, split
from benchmarks.mixes import FAMILIES, CostReader, forced_mix, mixed_rows, plan_cost
from benchmarks.reads import count_reads
from benchmarks.timing import interleaved, typical
from routers.elastic import Elastic
from routers.trace import FULL, REUSE, SKIP
from tests.block_kinds import CASES


@pytest.fixture(scope="module")
def call():
    case = CASES[0]
    model, reader = case.transformer(), CostReader()
    with Elastic(model, case.spec).scope(policy=reader):
        case.run(model)
    return reader.call


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("steps", [5, 40])
def test_forced_mix_spends_its_budget(call, family, budget, steps):
    plan = forced_mix(family, call, budget, steps)
    spent = plan_cost(plan, call)
    whole_blocks = family in ("skip", "reuse")
    nearest = (0.5 if whole_blocks else 0.15) / plan.size + 0.001
    assert spent == pytest.approx(budget, abs=nearest)
    codes = {code for codes in FAMILIES[family] for code in codes}
    assert set(np.unique(plan)) <= {FULL, *codes}
    if family == "width" and budget == 0.8:
        assert SKIP not in plan  # widths alone can save as much
    if family == "skip + width" and steps == 40:
        assert set(np.unique(plan)) == {FULL, *codes}
    if family == "reuse":
        assert (plan[0] == FULL).all()


@pytest.mark.parametrize("deviation", [0.2, 1.0])
def test_mixed_rows_differ_and_start_dense(call, deviation):
    plan = mixed_rows(call, 0.6, steps=20, rows=4, deviation=deviation)
    assert (plan[0] == FULL).all()
    assert (plan == REUSE).any()
    assert all((plan[:, 0] != plan[:, row]).any() for row in range(1, 4))
    agreeing = (plan[:, :1] == plan[:, 1:]).mean()
    assert (agreeing > 0.75) == (deviation == 0.2), agreeing
    for row in range(4):
        assert plan_cost(plan[:, row], call) == pytest.approx(0.6, abs=0.02)


def test_scalar_reads_are_counted():
    x = torch.ones(3)
    assert count_reads(lambda: x + 1) == 0
    assert count_reads(lambda: x.sum().item()) == 1
    assert count_reads(lambda: [float(v) for v in x]) == 3


def test_interleaved_variants_take_turns():
    order = []

    def variant(name, seconds):
        def run():
            for _ in range(2):
                order.append(name)
                time.sleep(seconds)
                yield

        return run

    seconds = interleaved({"a": variant("a", 0.02), "b": variant("b", 0.0)}, rounds=2)
    assert order == [*"abab", *"baba", *"abab"]
    assert seconds["a"].shape == (2, 2)
    assert seconds["a"].min() >= 0.02


def test_a_disturbed_slice_does_not_move_the_typical_time():
    calm = np.full((5, 4), 1.0)
    disturbed = calm.copy()
    disturbed[[0, 1, 2], [3, 0, 1]] = 9.0  # more rounds than not are disturbed, each in another slice
    assert typical(disturbed) == typical(calm) == 4.0


@pytest.mark.slow
def test_quick_run_prints_a_table_and_one_json_line(capsys):
    assert overhead.main(["--quick"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "overhead"
    sections = {row["section"].split(",")[0] for row in result["rows"]}
    assert sections == {"blocks", "random weights", "host reads per call", "host"}
    assert all(row["ratio"] > 0 for row in result["rows"])
    assert any("reuse 0.6" in line for line in table)


def test_a_split_run_adds_up(capsys):
    """Time is what is spent in blocks, around them and by elastic execution, whose block calls are fewer."""
    assert split.main(["--quick", "--markdown"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in first.splitlines()[2:]]
    assert [row[0] for row in rows] == ["dense", "forced mix", "independent mix"]
    for row in rows:
        time_, blocks, around, own = (float(cell) for cell in row[2:3] + row[4:])
        assert time_ == pytest.approx(blocks + around + own, abs=0.002)
    dense, mixed = rows[:2]
    assert dense[1] == "1.000" and dense[-1] == "0.000"
    assert int(mixed[3]) < int(dense[3]) and float(mixed[1]) < 0.65
    assert len(second.splitlines()) == 2 + split.BATCH


def test_at_most_one_host_read_per_call():
    """The bar itself, at small size: reads do not depend on size."""
    rows = overhead.measure_reads(overhead.QUICK)
    assert rows
    assert all(0 < row.ratio <= 1 for row in rows)


def test_peak_memory_is_that_of_the_command():
    """More than Python with the CLI needs; a command that fails gives no figure."""
    assert 20 < memory.peak(["generate", "--help"]) < 8000
    with pytest.raises(RuntimeError, match="exit code 2"):
        memory.peak(["generate", "a cat", "--budget", "7"])
