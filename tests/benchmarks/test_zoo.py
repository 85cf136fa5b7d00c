"""The zoo's benchmark: what it calls equal is equal, what differs is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import zoo


def test_values_are_those_of_any_result() -> None:
    picture = Image.new("RGB", (2, 2), "red")
    assert zoo.equal(zoo.values(([picture],)), [np.asarray(picture)])
    assert zoo.equal(zoo.values({"frames": torch.ones(1, 2)}), [np.ones((1, 2), np.float32)])
    assert not zoo.equal([np.zeros(2)], [np.ones(2)])
    assert zoo.equal([np.full(2, np.nan)], [np.full(2, np.nan)])
    assert not zoo.equal([np.zeros(2)], [np.full(2, np.nan)])


@pytest.mark.slow
def test_open_gates_are_told_from_noise(tmp_path: Path) -> None:
    case = next(case for case in zoo.own_cases(tmp_path) if case.name == "sd3")
    with torch.no_grad():
        assert zoo.run_case(case, 0.6, 3).opened == "equal"

        def unseeded(pipe: object) -> dict[str, object]:
            drawn = torch.Generator()
            drawn.seed()
            return {**case.inputs(pipe), "generator": drawn}

        assert zoo.run_case(replace(case, inputs=unseeded), 0.6, 3).opened == "differs from itself"
