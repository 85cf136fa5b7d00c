"""What is there stays: names are claimed, folders appear whole, stopped batches go on, left-overs go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edit_cli.files import request_hash
from edit_cli.generation.record import read_picture
from routers import files

SHORT = ("--steps", "2", "-q")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def draw(edit_here, qwen_folder, tmp_path):
    """`draw("a cat", ...)` with the tiny model, in an empty folder."""
    return lambda *words: edit_here("generate", *words, "-m", qwen_folder, *SHORT, cwd=tmp_path)


def other_run(target: Path) -> subprocess.Popen:
    """Another process that has a name, and leaves half a file beside it if it is killed."""
    program = (
        "import sys, pathlib, routers.files as f; t = pathlib.Path(sys.argv[1]); c = f.claim(t);"
        "t.with_name(f'.{t.name}.abcd1234.tmp').write_text('half'); print('ok', flush=True); sys.stdin.read()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert run.stdout is not None and run.stdout.readline() == b"ok\n"
    return run


def test_another_request_replaces_nothing(draw, tmp_path):
    """The same request does, and --overwrite does."""
    assert draw("a cat", "-o", "new/x.png").code == 0, "folders are made"
    first = (tmp_path / "new/x.png").read_bytes()
    refused = draw("a dog", "-o", "new/x.png")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "--output 'new/x.png' was made by another request; replace it with --overwrite" in refused.err
    assert draw("a cat", "-o", "new/x.png", "-b", "0.5").code == 2, "another budget is another request"
    assert (tmp_path / "new/x.png").read_bytes() == first
    assert draw("a cat", "-o", "new/x.png").code == 0
    assert draw("a dog", "-o", "new/x.png", "--overwrite").code == 0
    assert (tmp_path / "new/x.png").read_bytes() != first
    assert draw("a dog", "-o", "new/").code == draw("a dog", "-o", "new/").code == 0
    assert names(tmp_path) == ["new/a-dog-2.png", "new/a-dog.png", "new/x.png"]
    (tmp_path / "y.png").write_text("somebody's")
    assert draw("a cat", "-o", "y.png").code == 2 and (tmp_path / "y.png").read_text() == "somebody's"
    assert draw("a cat", "-o", "z/", "--device", "cuda:99").code == 2
    assert not (tmp_path / "z").exists(), "nothing is left of a run that was refused"


def test_a_comparison_is_kept_as_its_picture_is(draw, tmp_path):
    (tmp_path / "x-compare.png").write_text("mine")
    refused = draw("a cat", "-o", "x.png", "--compare")
    assert refused.code == 2 and "'x-compare.png' was made by another request" in refused.err
    (tmp_path / "a-cat-compare.png").write_text("mine")
    assert draw("a cat", "--compare").code == 0
    assert names(tmp_path) == ["a-cat-2-compare.png", "a-cat-2.png", "a-cat-compare.png", "x-compare.png"]


@pytest.mark.parametrize("output", ["out/", "out/x-{seed}.png"])
def test_a_stopped_batch_goes_on(draw, tmp_path, output):
    batch = ("a cat", "-n", "3", "-o", output)
    assert draw(*batch).code == 0
    made = sorted((tmp_path / "out").iterdir())
    whole = [path.read_bytes() for path in made]
    times = [path.stat().st_mtime_ns for path in made]
    made[1].unlink()
    ran = draw(*batch, "--resume")
    assert ran.code == 0, ran.err
    assert sorted((tmp_path / "out").iterdir()) == made
    pixels = [list(Image.open(path).getdata()) for path in made]
    made[1].write_bytes(whole[1])
    assert list(Image.open(made[1]).getdata()) == pixels[1], "as in one go"
    assert [made[i].stat().st_mtime_ns for i in (0, 2)] == [times[i] for i in (0, 2)]
    assert draw(*batch, "--resume").code == 0 and len(names(tmp_path)) == 3
    other = draw("a dog", "-n", "3", "-o", output, "--resume")
    assert other.code == (0 if output == "out/" else 2), "what another request made is not what was asked"


def test_a_name_is_one_runs_while_it_lives(draw, tmp_path):
    other = other_run(tmp_path / "a-cat.png")
    taken = draw("a cat", "-o", "a-cat.png")
    assert taken.code == 2 and "'a-cat.png' is being written by another run" in taken.err
    assert draw("a cat").code == 0
    assert sorted(p for p in names(tmp_path) if p[0] != ".") == ["a-cat-2.png"]
    left = sorted(Path(p).suffix for p in names(tmp_path) if p[0] == ".")
    assert left == [".claim", ".run", ".tmp"], "what a live run has is left to it"
    other.kill()
    other.wait()
    assert draw("a cat").code == 0
    assert names(tmp_path) == ["a-cat-2.png", "a-cat.png"], "what a killed run left is gone"


def fill(folder: Path, **contents: str) -> None:
    for name, text in contents.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_changes_in_one_step(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    target = tmp_path / "b"
    for text in ("old", "new"):
        with files.new_folder(target, ("a", "gone")) as building:
            fill(building, a=text)
            if text == "old":
                fill(building, gone=text, mine=text)
    assert names(target) == ["a", "mine"] and (target / "a").read_text() == "new"
    with pytest.raises(FileNotFoundError), files.new_folder(target, ("a",)) as building:
        fill(building, **{"a": "half", "no/where": ""})
    assert names(tmp_path) == ["b/a", "b/mine"] and (target / "a").read_text() == "new"


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """Killed between two renames, where a file system cannot exchange folders."""
    (tmp_path / ".b.abcd1234.old").mkdir()
    fill(tmp_path / ".b.abcd1234.old", a="old")
    (tmp_path / ".b.abcd1234.tmp").mkdir()
    (tmp_path / ".b.claim").touch()
    files.clear(tmp_path)
    assert names(tmp_path) == ["b/a"]


def test_requests_are_the_same_wherever_they_go():
    assert request_hash({"source": "m", "output": "a", "quiet": True}) == request_hash({"source": "m"})
    assert request_hash({"source": "m"}) != request_hash({"source": "n"})


def test_an_unfinished_calibration_is_not_thrown_away(edit_here, qwen_folder, tmp_path):
    state = tmp_path / ".b.calibrate-state"
    state.mkdir()
    (state / "request.json").write_text(json.dumps({"model": "another"}))
    words = ("calibrate", "-m", qwen_folder, "-o", "b", "--steps", "2", "--samples", "1")
    refused = edit_here(*words, cwd=tmp_path)
    assert refused.code == 2 and "an unfinished calibration lies beside" in refused.err
    resumed = edit_here(*words, "--resume", cwd=tmp_path)
    assert resumed.code == 2 and "has another" in resumed.err and os.listdir(tmp_path) == [state.name]


def test_a_picture_that_its_format_cannot_hold_is_kept_as_another(draw, tmp_path):
    """A JPEG's segment holds 64 KiB, and so much of a record: the picture is there all the same."""
    (tmp_path / "long.txt").write_text("a cat " + "very fluffy " * 6000)
    (tmp_path / "x.png").write_text("somebody's")
    for _ in range(2):  # the same request replaces its own
        ran = draw("--prompts", "long.txt", "-o", "x.jpg", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["outputs"] == ["x-2.png"]
        assert any("'x.jpg' cannot be encoded" in note for note in ran.json["notes"])
        assert names(tmp_path) == ["long.txt", "x-2.png", "x.png"]
    assert (tmp_path / "x.png").read_text() == "somebody's"
    assert read_picture(tmp_path / "x-2.png")["prompt"].endswith("very fluffy")
