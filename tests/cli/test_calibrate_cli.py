"""`edit calibrate` as it is typed: options, bad input, table, plot."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

import routers
from edit_cli.checks import budgets as parse_budgets
from edit_cli.errors import EditError
from tests.cli.test_calibrate_mesh import picture

PICTURES, MESHES = "{pictures}", "{meshes}"  # stand for the random models' folders
SHORT = ["--samples", "4", "--probes", "8", "--batch-size", "2", "--plan-samples", "0"]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    picture("red").save(tmp_path / "good" / "red.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no picture")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear" / "a.png")
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "a.png").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "taken").write_text("a file")
    return tmp_path


BAD = [
    (
        ["-o", "b", "--budgets", "0.5"],
        "--budgets '0.5' is not a range of budgets; give LOW:HIGH or LOW:HIGH:COUNT",
    ),
    (["-o", "b", "--budgets", "1:0.5"], "--budgets '1:0.5' is not a range"),
    (["-o", "b", "--budgets", "0:1"], "--budgets '0:1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1.1"], "--budgets '0.5:1.1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:1"], "--budgets '0.5:1:1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:two"], "--budgets '0.5:1:two' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:4:2"], "--budgets '0.5:1:4:2' is not a range"),
    (["-o", "b", "--budgets", "nan:1"], "--budgets 'nan:1' is not a range"),
    (["-o", "b", "--samples", "3"], "--samples '3' is out of range; allowed are whole numbers from 4"),
    (["-o", "b", "--probes", "x"], "--probes 'x' is not a whole number"),
    (
        ["-o", "b", "--plan-samples", "-1"],
        "--plan-samples '-1' is out of range; allowed are whole numbers from 0",
    ),
    (["-o", "b", "--steps", "1"], "--steps '1' is out of range; allowed are whole numbers from 2"),
    ([], "give either --output FOLDER for a new bundle or --evaluate BUNDLE"),
    (["-o", "b", "--evaluate", "c"], "give either --output FOLDER"),
    (["--evaluate", "b", "--resume"], "--resume continues a calibration and --evaluate makes none"),
    (["-o", "taken"], "--output 'taken' is a file; give a folder for the bundle"),
    (["-o", "b", "--remove-background", "maybe"], "--remove-background 'maybe' is unknown; allowed are auto"),
    (["-o", "b", "-m", PICTURES, "--images", "good"], "--images is for models that make meshes and"),
    (["-o", "b", "-m", MESHES, "--prompts", "empty.txt"], "--prompts is for models that make pictures and"),
    (
        ["-o", "b", "--images", "good", "--prompts", "empty.txt"],
        "--images is for models that make meshes and",
    ),
    (["-o", "b", "-m", MESHES, "--images", "none"], "--images 'none' does not exist; give a folder"),
    (["-o", "b", "-m", MESHES, "--images", "taken"], "--images 'taken' is not a folder; give a folder"),
]
"""Found before torch is imported."""

BAD_LATER = [
    (["-o", "b", "-m", MESHES], "makes meshes from pictures and none were given; add --images"),
    (["-o", "b", "-m", MESHES, "--images", "empty"], "--images 'empty' does not hold pictures; put .png"),
    (["-o", "b", "-m", MESHES, "--images", "notes"], "--images 'notes' does not hold pictures"),
    (["-o", "b", "-m", MESHES, "--images", "damaged"], "a.png' is not a readable picture"),
    (["-o", "b", "-m", MESHES, "--images", "clear"], "a.png' is fully transparent"),
    (["-o", "b", "-m", MESHES, "--images", "folders"], "a.png' is not a file"),
    (["-o", "b", "-m", PICTURES, "--prompts", "empty.txt"], "--prompts 'empty.txt' is empty"),
    (["-o", "b", "-m", PICTURES, "--prompts", "gone.txt"], "--prompts 'gone.txt' cannot be read"),
    (["--evaluate", "nowhere", "-m", PICTURES], "nowhere is not a bundle folder"),
    (["-o", "/proc/b", "-m", PICTURES, *SHORT], "bundle folder '/proc/b' cannot be written"),
    (["-o", "taken/b", "-m", PICTURES, *SHORT], "bundle folder 'taken/b' cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_LATER)
def test_bad_input(edit_here, desk, qwen_folder, mesh_folder, arguments, message) -> None:
    folders = {PICTURES: qwen_folder, MESHES: mesh_folder}
    before = sorted(desk.rglob("*"))
    ran = edit_here("calibrate", *(folders.get(a, a) for a in arguments), cwd=desk)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert message in ran.err and ran.err.count("\n") == 1
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("0.35:1.0", (0.35, 8)),
        ("0.5:1:3", (0.5, 3)),
        ("0.2:0.9:2", (0.2, 2)),
    ],
)
def test_budgets_are_evenly_spaced(text: str, budgets: tuple[float, int]) -> None:
    found = parse_budgets("--budgets", text)
    assert (found[0], len(found)) == budgets
    gaps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(gaps) == 1 and found[-1] == pytest.approx(float(text.split(":")[1]))


def test_budgets_that_are_none_raise() -> None:
    with pytest.raises(EditError, match="is not a range of budgets"):
        parse_budgets("--budgets", "")


@pytest.fixture(scope="module")
def made(edit_here, qwen_folder, tmp_path_factory):
    """A bundle of the random pipeline, made once."""
    folder = tmp_path_factory.mktemp("calibrated")
    ran = edit_here(
        "calibrate",
        "-m",
        qwen_folder,
        "-o",
        "b",
        "--budgets",
        "0.5:1:3",
        *SHORT[:-1],
        "2",
        "--json",
        cwd=folder,
    )
    assert ran.code == 0, ran.err
    return folder, ran


def test_table_and_json_tell_prediction_and_measurement(made) -> None:
    folder, ran = made
    assert routers.load_bundle(folder / "b").moments.plans is not None
    quality = ran.json["quality"]
    assert [row["budget"] for row in quality] == [0.5, 0.75, 1.0]
    assert quality[0]["predicted"] < quality[1]["predicted"] and quality[2]["predicted"] is None
    # a random model's errors are the same kind of errors: the forecast is no guess
    assert abs(quality[1]["predicted"] - quality[1]["snr"]) < 10
    for word in ("budget", "predicted SNR", "latent SNR", "time / dense", "exact"):
        assert word in ran.err
    described = json.loads((folder / "b" / "bundle.json").read_text())
    assert described["metadata"]["quality"] == quality and described["metadata"]["latent_energy"] > 0
    assert described["metadata"]["settings"]["tried"] == 2, "what --plan-samples asked for"


def test_the_plot_lies_beside_the_bundle(made) -> None:
    folder, ran = made
    if importlib.util.find_spec("matplotlib") is None:
        assert "no plot was drawn: it needs matplotlib" in ran.err
        return
    with Image.open(folder / "b" / "quality.png") as image:
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert "matplotlib" not in ran.err


def test_no_state_is_left(made) -> None:
    assert [file.name for file in made[0].iterdir()] == ["b"]


def test_evaluate_measures_and_writes_nothing(made, edit_here, qwen_folder) -> None:
    folder, _ = made
    before = {file: file.read_bytes() for file in (folder / "b").iterdir()}
    ran = edit_here(
        "calibrate",
        "--evaluate",
        "b",
        "-m",
        qwen_folder,
        "--budgets",
        "0.6:0.8:2",
        *SHORT,
        "--json",
        cwd=folder,
    )
    assert ran.code == 0, ran.err
    assert [row["budget"] for row in ran.json["quality"]] == [0.6, 0.8]
    assert {file: file.read_bytes() for file in (folder / "b").iterdir()} == before


def test_resume_without_anything_says_so(edit_here, qwen_folder, tmp_path) -> None:
    ran = edit_here(
        "calibrate", "-m", qwen_folder, "-o", "b", "--budgets", "0.5:1:2", "--steps", "2", *SHORT, "--resume",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "nothing to resume beside 'b': starting from the beginning" in ran.err


def test_damaged_weights_stop_with_the_place_and_keep_the_bundle(
    edit_here, qwen_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backbones.workloads import PipelineWorkload

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bundle.json").write_text("old")
    run = PipelineWorkload.run
    monkeypatch.setattr(PipelineWorkload, "run", lambda self, batch: run(self, batch) * float("nan"))
    ran = edit_here("calibrate", "-m", qwen_folder, "-o", "b", *SHORT, cwd=tmp_path)
    assert ran.code == 1
    assert (
        "NaN or infinite values in the final latents of batch 1 of 2 (record); nothing was written" in ran.err
    )
    assert [file.read_text() for file in (tmp_path / "b").iterdir()] == ["old"]
