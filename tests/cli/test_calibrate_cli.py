"""`edit calibrate` as it is typed: options, bad input, table, plot."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import routers
from edit_cli.calibrate import plan
from edit_cli.checks import budgets as parse_budgets
from edit_cli.errors import EditError
from tests.cli.test_calibrate_mesh import picture

PICTURES, MESHES = "{pictures}", "{meshes}"  # stand for the random models' folders
SHORT = ["--samples", "2"]


@pytest.fixture(autouse=True, scope="module")
def few_samples() -> Iterator[None]:
    """Bundles are measured on two samples instead of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "HELD_OUT", 2)
        yield


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
    (["-o", "b", "--budgets", "0"], "--budgets '0' is out of range; it is the share"),
    (["-o", "b", "--budgets", "half"], "--budgets 'half' is not a number; it is the share"),
    (["-o", "b", "--budgets", "1"], "--budgets 1 is the run of all steps, which needs no plan"),
    (
        ["-o", "b", "--budgets", "1:0.5"],
        "--budgets '1:0.5' is not a range of budgets; give LOW:HIGH or LOW:HIGH:COUNT",
    ),
    (["-o", "b", "--budgets", "0:1"], "--budgets '0:1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1.1"], "--budgets '0.5:1.1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:1"], "--budgets '0.5:1:1' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:two"], "--budgets '0.5:1:two' is not a range"),
    (["-o", "b", "--budgets", "0.5:1:4:2"], "--budgets '0.5:1:4:2' is not a range"),
    (["-o", "b", "--budgets", "nan:1"], "--budgets 'nan:1' is not a range"),
    (["-o", "b", "--samples", "0"], "--samples '0' is out of range; allowed are whole numbers from 1"),
    (["-o", "b", "--tries", "x"], "--tries 'x' is not a whole number"),
    (["-o", "b", "--tries", "0"], "--tries '0' is out of range; allowed are whole numbers from 1 to 6"),
    (["-o", "b", "--tries", "7"], "--tries '7' is out of range; allowed are whole numbers from 1 to 6"),
    (["-o", "b", "--target", "near"], "--target 'near' is unknown; allowed are dense, exact, both"),
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
    (["-o", "/proc/b", "-m", PICTURES, *SHORT], "--output '/proc/b' cannot be written"),
    (["-o", "taken/b", "-m", PICTURES, *SHORT], "--output 'taken/b' cannot be written: file exists"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_LATER)
def test_bad_input(edit_here, desk, qwen_folder, mesh_folder, arguments, message) -> None:
    folders = {PICTURES: qwen_folder, MESHES: mesh_folder}
    before = sorted(desk.rglob("*"))
    ran = edit_here("calibrate", *(folders.get(a, a) for a in arguments), cwd=desk)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert message in ran.err and len(ran.said) == 1
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("0.35:1.0", (0.35, 8)),
        ("0.5:1:3", (0.5, 3)),
        ("0.2:0.9:2", (0.2, 2)),
        ("0.5", (0.5, 1)),
    ],
)
def test_budgets_are_evenly_spaced(text: str, budgets: tuple[float, int]) -> None:
    found = parse_budgets("--budgets", text)
    assert (found[0], len(found)) == budgets
    gaps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(gaps) == (len(found) > 1) and found[-1] == pytest.approx(float(text.split(":")[:2][-1]))


def test_budgets_that_are_none_raise() -> None:
    with pytest.raises(EditError, match="is not a number"):
        parse_budgets("--budgets", "")


@pytest.fixture(scope="module")
def made(edit_here, qwen_folder, tmp_path_factory):
    """A bundle of the random pipeline for all budgets that four steps have, made once."""
    folder = tmp_path_factory.mktemp("calibrated")
    ran = edit_here(
        "calibrate", "-m", qwen_folder, "-o", "b", "--budgets", "0.5:1:3", *SHORT, "--json", cwd=folder
    )
    assert ran.code == 0, ran.err
    return folder, ran


def test_table_and_json_tell_what_was_measured(made) -> None:
    folder, ran = made
    bundle = routers.load_bundle(folder / "b")
    assert {target: sorted(plans) for target, plans in bundle.plans.items()} == {"dense": [2, 3]}
    assert bundle.min_budget == 0 and len(bundle.times) == bundle.num_steps + 1 == 5
    quality = ran.json["quality"]
    assert [row["budget"] for row in quality] == [row["spent"] for row in quality] == [0.5, 0.75, 1.0]
    assert quality[0]["snr"] < quality[1]["snr"] < quality[2]["snr"] and quality[2]["snr"] > 100
    for word in ("budget", "latent SNR", "time / dense", "exact"):
        assert word in ran.err
    described = json.loads((folder / "b" / "bundle.json").read_text())
    assert (described["format"], described["metadata"]["quality"]) == (5, quality)
    assert described["metadata"]["settings"] == {
        "budgets": [0.5, 0.75, 1.0], "targets": ["dense"], "tries": None, "seed": 0, "rounds": 2,
    }  # fmt: skip


def test_one_budget_costs_two_generations_and_serves_the_others_too(
    edit_here, qwen_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_cli.calibrate import calibration

    fit, calls = calibration.fit, []

    def counted(transformer, *rest):
        hook = transformer.register_forward_hook(lambda *_: calls.append(1))
        try:
            return fit(transformer, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(calibration, "fit", counted)
    words = ["calibrate", "-m", qwen_folder, "-o", "b", "--samples", "1", "--budgets", "0.5", "--json"]
    ran = edit_here(*words, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert [row["budget"] for row in ran.json["quality"]] == [0.5]
    made = json.loads((tmp_path / "b" / "bundle.json").read_text())["metadata"]
    # a generation has four steps with two guidance branches
    assert len(calls) / (4 * 2) <= made["generations"] == 2
    pictures = {}
    for name, options in {
        "fitted": "--routers b -b 0.5", "universal": "--routers none -b 0.5", "other": "--routers b -b 0.75",
    }.items():  # fmt: skip
        drawn = edit_here(
            "generate", "a cat", "-m", qwen_folder, *options.split(), "-o", f"{name}.png", "--json",
            cwd=tmp_path,
        )  # fmt: skip
        assert drawn.code == 0, drawn.err
        assert drawn.json["spent"] == [float(options.split()[-1])]
        with Image.open(tmp_path / f"{name}.png") as opened:
            pictures[name] = opened.convert("RGB").tobytes()
    assert pictures["fitted"] != pictures["universal"], "the bundle's own plan was used"


def test_both_targets_and_a_number_of_tries(edit_here, qwen_folder, tmp_path) -> None:
    options = ["--samples", "1", "--budgets", "0.5", "--target", "both", "--tries", "2"]
    ran = edit_here("calibrate", "-m", qwen_folder, "-o", "b", *options, "-q", cwd=tmp_path)
    assert ran.code == 0, ran.err
    bundle = routers.load_bundle(tmp_path / "b")
    assert {target: [*plans] for target, plans in bundle.plans.items()} == {"dense": [2], "exact": [2]}
    assert bundle.metadata["settings"]["tries"] == 2
    drawn = edit_here(
        "generate", "a cat", "-m", qwen_folder, "--routers", "b", "-b", "0.5", "--target", "exact", "-q",
        cwd=tmp_path,
    )  # fmt: skip
    assert drawn.code == 0, drawn.err


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
    assert [row["spent"] for row in ran.json["quality"]] == [0.5, 0.75]
    assert {file: file.read_bytes() for file in (folder / "b").iterdir()} == before


def test_resume_without_anything_says_so(edit_here, qwen_folder, tmp_path) -> None:
    ran = edit_here(
        "calibrate", "-m", qwen_folder, "-o", "b", "--budgets", "0.5:1:2", *SHORT, "--resume", cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert "nothing to resume beside 'b': starting from the beginning" in ran.err


def test_damaged_weights_stop_with_the_place_and_keep_the_bundle(
    edit_here, qwen_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backbones.workloads import PipelineWorkload

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bundle.json").write_text("old")
    run = PipelineWorkload.run
    monkeypatch.setattr(
        PipelineWorkload, "run", lambda self, batch, **more: run(self, batch, **more) * float("nan")
    )
    ran = edit_here("calibrate", "-m", qwen_folder, "-o", "b", "--overwrite", *SHORT, cwd=tmp_path)
    assert ran.code == 1
    assert (
        "NaN or infinite values in the final latents of the calibration samples; nothing was written"
        in ran.err
    )
    assert [file.read_text() for file in (tmp_path / "b").iterdir()] == ["old"]
