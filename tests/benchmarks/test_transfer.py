"""What a bundle is worth elsewhere: the command runs, and changes nothing for good."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import transfer


@pytest.mark.slow
def test_changes_of_a_packaged_mesh_model_are_measured(capsys) -> None:
    words = ["hunyuan3d-tiny", "--budgets", "0.5", "--count", "2", "--steps", "4"]
    transfer.main([*words, "--changes", "same", "half of the steps"])
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    rows = json.loads(line)["changes"]
    assert list(rows) == ["same", "half of the steps"]
    assert table.count("\n") == 3 and "| half of the steps | 0.5 |" in table
    same = rows["same"]["snr"]
    assert same["bundle"] == same["made here"] != same["nothing"]
    assert rows["same"]["unfitted"] == "" and "holds: 0.0 dB behind one made there" in table
    assert "calibrated at 4 steps; at 2" in rows["half of the steps"]["unfitted"]
    assert "not used; calibrating again gains" in table


def test_a_lora_is_taken_off_again() -> None:
    place = transfer.Place.open("hunyuan3d-tiny", 2)
    before = {name: value.clone() for name, value in place.pipe.transformer.state_dict().items()}
    with transfer.with_lora(place):
        after = place.pipe.transformer.state_dict()
        other = [name for name in before if not torch.equal(after[name], before[name])]
        assert other and all("attn" in name for name in other)
    after = place.pipe.transformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_change_that_a_model_does_not_know_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        transfer.main(["hunyuan3d-tiny", "--budgets", "0.5", "--steps", "4", "--changes", "other size"])
    assert "no change 'other size' of hunyuan3d-tiny" in capsys.readouterr().err
