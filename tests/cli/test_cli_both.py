"""What `edit generate` and `edit generate-3d` promise alike, through the commands, on random models."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image, ImageDraw

from edit_cli.errors import RunError
from edit_cli.generation.record import read_mesh, read_picture
from edit_cli.generation.session import Session
from tests.fresh import TIMEOUT


@dataclass
class Maker:
    """One of the two commands. subjects: two things to make results of, and the names of their files."""

    command: str
    folder: Path
    subjects: tuple[str, str]
    stems: tuple[str, str]
    field: str
    list_option: str
    suffix: str
    beside: str
    quick: tuple[str, ...]

    def data(self, path: Path) -> np.ndarray:
        """Pixels, or vertices."""
        if self.suffix == ".glb":
            return np.asarray(trimesh.load(path, force="mesh", process=False).vertices)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), dtype=int)

    def record(self, path: Path) -> dict:
        return read_mesh(path) if self.suffix == ".glb" else read_picture(path)

    def line(self, *words: object) -> list[object]:
        return [self.command, *words, "-m", self.folder, *self.quick]


@pytest.fixture(scope="module", params=["pictures", "meshes"])
def maker(request, qwen_folder, mesh_folder) -> Maker:
    if request.param == "pictures":
        return Maker(
            "generate", qwen_folder, ("a cat", "a red dog"), ("a-cat", "a-red-dog"), "prompt", "--prompts",
            ".png", "-compare.png", ("--steps", "6"),
        )  # fmt: skip
    return Maker(
        "generate-3d", mesh_folder, ("cat.png", "dog.png"), ("cat", "dog"), "image", "--images-file", ".glb",
        "-dense.glb", ("--steps", "6", "--octree-resolution", "24"),
    )  # fmt: skip


def draw_objects(folder: Path) -> None:
    """cat.png and dog.png: an object each, without background."""
    for name, box in (("cat", (10, 8, 38, 40)), ("dog", (6, 14, 42, 34))):
        picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse(box, fill="red")
        picture.save(folder / f"{name}.png")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    draw_objects(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(edit_here, maker, tmp_path_factory):
    """Two results of one batch, compared with dense."""
    folder = tmp_path_factory.mktemp("made")
    draw_objects(folder)
    ran = edit_here(
        *maker.line(*maker.subjects, "-b", "0.6", "--batch-size", "2", "--compare", "--json"),
        "-o", "{prompt}-{seed}" + maker.suffix, "--seed", "3", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return folder, ran


def first(maker: Maker, folder: Path, number: int = 0) -> Path:
    return folder / f"{maker.stems[number]}-3{maker.suffix}"


def test_a_comparison_names_its_files_and_measures(made, maker):
    folder, ran = made
    compare = ran.json["compare"]
    assert compare["outputs"] == [f"{stem}-3{maker.beside}" for stem in maker.stems]
    assert all((folder / name).is_file() for name in compare["outputs"])
    assert compare["time_ratio"] > 0
    assert "measured time ratio" in " ".join(ran.err.split())


@pytest.mark.parametrize("second", ["result", "folder"])
def test_a_comparison_never_replaces_a_result_or_a_folder(maker, desk, edit_here, second):
    name = f"x{maker.beside}"
    if second == "folder":
        (desk / name).mkdir()
        lines = [{maker.field: maker.subjects[0], "output": f"x{maker.suffix}"}]
    else:
        names = (f"x{maker.suffix}", f"x{maker.beside}")
        lines = [
            {maker.field: subject, "output": output}
            for subject, output in zip(maker.subjects, names, strict=True)
        ]
    (desk / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = sorted(desk.rglob("*"))
    ran = edit_here(*maker.line(maker.list_option, "list.jsonl", "--compare"), cwd=desk)
    assert ran.code == 2, ran.err
    assert f"--compare would write {name!r} over another file" in ran.err
    assert sorted(desk.rglob("*")) == before


def test_a_result_of_a_batch_is_the_one_made_alone(made, maker, edit_here):
    folder, _ = made
    ran = edit_here(
        *maker.line(maker.subjects[1], "-b", "0.6", "--seed", "3", "-q"), "-o", f"alone{maker.suffix}",
        cwd=folder,
    )  # fmt: skip
    assert (ran.code, ran.out, ran.err) == (0, f"alone{maker.suffix}\n", "")
    alone, batched = maker.data(folder / f"alone{maker.suffix}"), maker.data(first(maker, folder, 1))
    tolerance = 1 if maker.suffix == ".png" else 1e-3  # rounding may tip a pixel to the next of 256 levels
    assert alone.shape == batched.shape
    assert np.abs(alone - batched).max() <= tolerance
    other = maker.data(first(maker, folder, 0))
    assert other.shape != alone.shape or np.abs(alone - other).max() > tolerance


def test_a_replay_is_identical_and_says_what_differs(made, maker, edit, edit_here):
    """In a fresh process. The one of a batch is made in its batch again, for rounding depends on its size."""
    folder, _ = made
    name = first(maker, folder, 1).name
    ran = edit(maker.command, "--from", name, "-o", f"again{maker.suffix}", "--json", cwd=folder)
    assert ran.code == 0, ran.err
    assert any("replayed in its batch of 2" in note for note in ran.json["notes"])
    assert "may differ" not in ran.err
    np.testing.assert_array_equal(maker.data(folder / f"again{maker.suffix}"), maker.data(folder / name))
    assert maker.record(folder / f"again{maker.suffix}") == maker.record(folder / name)
    ran = edit_here(maker.command, "--from", name, "--dtype", "bf16", "-o", f"half{maker.suffix}", cwd=folder)
    assert ran.code == 0, ran.err
    assert "not what the original was made with: dtype" in ran.err


def test_a_replay_with_a_change(made, maker, edit_here):
    folder, _ = made
    ran = edit_here(
        maker.command, "--from", first(maker, folder).name, "-b", "1", "-s", "4", "-o", f"b{maker.suffix}",
        "--json", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert (ran.json["budget"], ran.json["seeds"], ran.json["spent"]) == (1.0, [4], [1.0])
    assert "may differ" not in ran.err


def test_what_is_typed_wins_before_a_record_is_checked(made, maker, edit_here, monkeypatch):
    """A record may name files of another machine, and values that this version does not allow."""
    folder, _ = made
    record = {**maker.record(first(maker, folder)), "steps": -3, "budget": 7, maker.field: "/no/such.png"}
    record |= {"images": ["/no/such.png"], "batch": [], "solver": "unheard-of"}
    reader = "mesh.read_mesh" if maker.suffix == ".glb" else "picture.read_record"
    monkeypatch.setattr(f"edit_cli.generation.{reader}", lambda path: record)
    words = [maker.command, maker.subjects[0], "-b", "0.6", "--solver", "euler", *maker.quick[2:]]
    replay = ["--from", "other", "-o", f"mine{maker.suffix}"]
    ran = edit_here(*words, *maker.quick[:2], *replay, cwd=folder)
    assert ran.code == 0, ran.err
    ran = edit_here(*words, *replay, cwd=folder)
    assert (ran.code, ran.err[:30]) == (2, "error: --from other: steps -3 ")


def test_other_steps_than_were_calibrated_are_noted(maker, desk, edit_here):
    name = f"x{maker.suffix}"
    words = [*maker.line(maker.subjects[0], "-b", "0.5"), "-o", name, "--json", "-q", "--overwrite"]
    ran = edit_here(*words, cwd=desk)
    assert ran.code == 0, ran.err
    assert ran.json["notes"] == ["calibrated at 4 steps; at 6 the plan is the one that needs no calibration"]
    words[words.index("--steps") + 1] = "4"
    assert "notes" not in edit_here(*words, cwd=desk).json
    assert "notes" not in edit_here(*maker.line(maker.subjects[0], "-b", "1", "--json"), cwd=desk).json


def test_a_number_after_numbers_is_never_a_subject(maker, desk, edit_here):
    for name in ("--seed", "--budget"):
        ran = edit_here(maker.command, "-m", maker.folder, *maker.quick, name, "1", "1", cwd=desk)
        assert ran.code == 2 and "given; try: edit" in ran.err


def test_lists_override_options(maker, desk, edit_here):
    one, two = maker.subjects
    lines = [
        {maker.field: one, "seed": 7, "budget": 0.5, "output": "own-{seed}" + maker.suffix},
        {maker.field: two, "steps": 2, "guidance": None},
    ]
    ran = edit_here(
        *maker.line(maker.list_option, "-", "--seed", "3", "-n", "2", "--json", "-q"), "-o", "./", cwd=desk,
        stdin="\n".join(map(json.dumps, lines)),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    stem = maker.stems[1]
    outputs = [
        f"own-7{maker.suffix}",
        f"own-8{maker.suffix}",
        f"{stem}-3{maker.suffix}",
        f"{stem}-4{maker.suffix}",
    ]
    assert ran.json["outputs"] == outputs
    assert ran.json["seeds"] == [7, 8, 3, 4]
    assert ran.json["budget"] == [0.5, 0.5, 0.8, 0.8]  # the bundles recommend 0.8
    assert [maker.record(desk / name)["steps"] for name in outputs] == [6, 6, 2, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"FIELD": null, "seed": 3}', 'stdin line 1: "FIELD" is null; write {"FIELD": '),
        ('{"seed": 3}', 'stdin line 1: "FIELD" is missing'),
        ('{"FIELD": "SUBJECT", "sede": 3}', "stdin line 1: sede is unknown; allowed are "),
        ('{"FIELD": "SUBJECT", "seed": [1]}', "stdin line 1: seed [1] is a list"),
        ('{"FIELD": "SUBJECT", "steps": 0}', "stdin line 1: steps 0 is out of range"),
        ('{"FIELD": ' + "[" * 100_000, "stdin line 1 is nested too deeply"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(maker, desk, edit_here, line, message):
    line, message = (
        text.replace("FIELD", maker.field).replace("SUBJECT", maker.subjects[0]) for text in (line, message)
    )
    ran = edit_here(*maker.line(maker.list_option, "-"), cwd=desk, stdin=line)
    assert ran.code == 2
    assert message in ran.err and len(ran.said) == 1


def test_a_failed_run_names_what_it_kept(maker, desk, edit_here, monkeypatch):
    run, calls = Session.run, []

    def fails_at_the_second(self, jobs, *rest):
        calls.append(jobs)
        if len(calls) > 1:
            raise RunError("out of memory")
        return run(self, jobs, *rest)

    monkeypatch.setattr(Session, "run", fails_at_the_second)
    ran = edit_here(
        *maker.line(maker.subjects[0], "-n", "2", "--batch-size", "1", "--routers", "none"),
        "-o", "x-{seed}" + maker.suffix, cwd=desk,
    )  # fmt: skip
    assert (ran.code, ran.err.splitlines()[-1]) == (1, f"error: out of memory; kept x-0{maker.suffix}")
    assert {path.name for path in desk.iterdir()} == {"cat.png", "dog.png", f"x-0{maker.suffix}"}


def test_an_interrupt_keeps_finished_results(maker, desk, edit):
    words = maker.line(maker.subjects[0], "-n", "40", "--batch-size", "1", "-o", "x-{seed}" + maker.suffix)
    running, first_file = edit.start(*words, cwd=desk), desk / f"x-0{maker.suffix}"
    deadline = time.monotonic() + TIMEOUT
    while not first_file.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    ran = running.wait()
    assert ran.code == 130, ran.err
    kept = {path.name for path in desk.iterdir()}
    assert first_file.name in kept and f"x-39{maker.suffix}" not in kept
    assert not any(name.startswith(".") for name in kept)
    (line,) = ran.said
    assert line.startswith(f"error: interrupted; kept {first_file.name}")
    assert set(line.split("kept ")[1].split(", ")) == kept - {"cat.png", "dog.png"}


def test_a_solver_steps_otherwise_at_the_same_price(maker, desk, edit_here):
    spent = []
    for solver in ("euler", "ab2"):
        ran = edit_here(
            *maker.line(maker.subjects[0], "-b", "0.5", "--solver", solver.upper(), "--json", "-q"),
            "-o", f"{solver}{maker.suffix}", cwd=desk,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        spent.append(ran.json["spent"])
    euler, second = (maker.data(desk / f"{solver}{maker.suffix}") for solver in ("euler", "ab2"))
    assert euler.shape != second.shape or (euler != second).any()
    assert spent == [[0.5], [0.5]]
    assert maker.record(desk / f"ab2{maker.suffix}")["solver"] == "ab2"
