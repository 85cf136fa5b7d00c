"""Lines of a list with budgets of their own share a batch; each spends its own, and is replayed as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edit_cli.generation.record import read_picture
from tests.cli.test_any_pipeline import INPUTS
from tests.cli.test_budget import pixels, zoo  # noqa: F401 - a fixture
from tests.tiny_zoo import MAKE

LINES = [
    {"prompt": "a cat", "budget": 0.3},
    {"prompt": "a dog", "budget": 0.7},
    {"prompt": "a car", "budget": 1.0},
    {"prompt": "a red star", "budget": 0.5, "seed": 4},
]


@pytest.fixture(scope="module")
def drawn(edit_here, qwen_folder, tmp_path_factory):
    """The list drawn in one command: its folder, its options, what was said."""
    folder = tmp_path_factory.mktemp("rows")
    asked = [
        "generate",
        "-m",
        qwen_folder,
        "--routers",
        "none",
        "--steps",
        "10",
        "--json",
        "-q",
        "--prompts",
        "-",
    ]
    ran = edit_here(*asked, "--batch-size", "4", cwd=folder, stdin="\n".join(map(json.dumps, LINES)))
    assert ran.code == 0, ran.err
    return folder, asked, ran.json


def test_lines_with_budgets_of_their_own_share_a_batch(drawn):
    folder, _, report = drawn
    assert report["budget"] == report["spent"] == [0.3, 0.7, 1.0, 0.5]
    assert "notes" not in report
    assert report["flops"]["spent"] == pytest.approx(report["flops"]["dense"] * 0.625, rel=0.02)
    calls = report["evaluations"]["made"] - 10
    assert 7 <= calls < 3 + 7 + 5, "rows are evaluated together where their plans meet"
    assert report["evaluations"]["dense"] == 20
    star, car = read_picture(folder / "a-red-star.png"), read_picture(folder / "a-car.png")
    assert (star["budget"], star["spent"]) == (0.5, 0.5)
    assert [peer["budget"] for peer in star["batch"]] == [0.3, 0.7, 0.5]
    assert "batch" not in car, "the whole budget is the pipeline's own run, bit for bit"


def test_a_row_is_what_it_is_alone_and_its_record_makes_it_again(drawn, edit_here, qwen_folder, tmp_path):
    folder, asked, _ = drawn
    alone = edit_here(*asked, "--batch-size", "1", cwd=tmp_path, stdin="\n".join(map(json.dumps, LINES)))
    assert alone.code == 0, alone.err
    for name in ("a-cat", "a-dog", "a-red-star"):
        near = np.abs(pixels(folder / f"{name}.png") - pixels(tmp_path / f"{name}.png"))
        assert near.max() <= 1
    again = edit_here("generate", "--from", folder / "a-dog.png", "-o", "again.png", "--json", cwd=tmp_path)
    assert again.code == 0, again.err
    assert again.json["spent"] == [0.7]
    np.testing.assert_array_equal(pixels(folder / "a-dog.png"), pixels(tmp_path / "again.png"))
    changed = edit_here(
        "generate", "--from", folder / "a-dog.png", "-b", "0.3", "-o", "c.png", "--json", "-q", cwd=tmp_path
    )
    assert changed.json["spent"] == [0.3]


def test_a_dry_run_counts_the_calls_that_rows_share(drawn, edit_here, tmp_path):
    _, asked, report = drawn
    ran = edit_here(
        *asked, "--batch-size", "4", "--dry-run", cwd=tmp_path, stdin="\n".join(map(json.dumps, LINES))
    )
    assert ran.code == 0, ran.err
    branches = 2  # of guidance
    assert ran.json["transformer_calls"] == branches * report["evaluations"]["made"]


def test_python_draws_budgets_in_one_batch(qwen_folder):
    import edit_cli

    made = edit_cli.generate(
        "a cat", model=qwen_folder, routers="none", steps=10, budget=[0.3, 0.7], batch_size=2
    )
    assert [each.record["spent"] for each in made] == [0.3, 0.7]
    assert [peer["budget"] for peer in made[0].record["batch"]] == [0.3, 0.7]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAKE if name not in INPUTS])
def test_rows_of_any_pipeline_are_told_apart(name, zoo, edit_here, tmp_path):  # noqa: F811
    """Models that nothing was written for: each result is what it is alone, and spends its own."""
    lines = [{"prompt": "a cat", "budget": 0.34, "seed": 1}, {"prompt": "a dog", "budget": 0.67, "seed": 2}]
    more = ["--frames", "5"] if name.startswith("wan") else []
    spent, files = {}, {}
    for rows in ("2", "1"):
        out = tmp_path / rows
        ran = edit_here(
            "generate", "--prompts", "-", "-m", zoo(name), "--steps", "6", "--batch-size", rows, "--json",
            "-q", "-o", f"{out}/", *more, cwd=tmp_path, stdin="\n".join(map(json.dumps, lines)),
        )  # fmt: skip
        assert ran.code == 0, ran.err
        spent[rows], files[rows] = ran.json["spent"], [tmp_path / file for file in ran.json["outputs"]]
        assert rows == "1" or ran.json["evaluations"]["dense"] in (6, 12)
    assert spent["2"] == spent["1"]
    for together, alone in zip(files["2"], files["1"], strict=True):
        if together.suffix == ".png":
            assert np.abs(pixels(together) - pixels(alone)).max() <= 1
