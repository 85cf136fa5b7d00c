"""The benchmark of `--time` runs through, and counts what was late."""

from __future__ import annotations

import json

import pytest

from benchmarks import seconds


@pytest.mark.bench
def test_a_run_of_a_packaged_model_is_measured(capsys):
    seconds.main(["hunyuan3d-tiny", "--runs", "2", "--share", "0.7"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["hunyuan3d-tiny"]
    assert len(row["spent"]) == 2 and 0 < row["budget"] <= 1 and 0 < row["evaluation"] < 1
    assert row["late"] == sum(ratio > 1 for ratio in row["spent"])
