"""The torch-free parts of the command line: names, templates, metadata, prompts, values, comparisons."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edit_cli import checks
from edit_cli.commands.app import COMMANDS, spread
from edit_cli.console import readable_count
from edit_cli.errors import EditError, RunError
from edit_cli.files import write_files
from edit_cli.generation import closeness, outputs, prompts, record
from edit_cli.generation.cutout import open_rgb
from edit_cli.generation.picture import PICTURE, timed_parts
from edit_cli.generation.report import flops
from edit_cli.generation.result import StageClock
from edit_cli.generation.seen import Seen
from routers.files import ordinary_mode

RECORD = {
    "prompt": 'a "cat" <at> night & fürs Café, 猫', "negative_prompt": "dog", "seed": 3, "width": 64,
    "height": 32,
    "steps": 4, "guidance": 4.0, "budget": 0.6, "spent": 0.601, "model": "tiny", "model_hash": "abc",
    "versions": {"edit": "0.1.0"},
}  # fmt: skip


def fields(*prompts_and_seeds):
    return [
        {"prompt": p, "seed": s, "index": i, "budget": "0.6", "model": "m"}
        for i, (p, s) in enumerate(prompts_and_seeds)
    ]


def test_the_command_line_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'PIL', 'scipy', 'rich', 'diffusers', 'yaml'}"
    code = f"import sys, edit_cli.main; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_slug():
    assert outputs.slug("A cat, at night!") == "a-cat-at-night"
    assert outputs.slug("猫 und Müsli") == "猫-und-müsli"
    assert outputs.slug("../../etc/passwd") == "etc-passwd"
    assert outputs.slug("🐈") == "picture"
    assert len(outputs.slug("word " * 100)) <= outputs.MAX_NAME


def paths(output, *entries):
    return [place.path for place in outputs.plan_outputs(output, fields(*entries))]


def test_file_names_and_templates(tmp_path):
    assert [str(path) for path in paths(None, ("a cat", 0))] == ["a-cat.png"]
    names = paths(f"{tmp_path}/new/folder/", ("a cat", 0), ("a cat", 1), ("a dog", 0))
    assert [path.name for path in names] == ["a-cat-0.png", "a-cat-1.png", "a-dog.png"]
    assert not (tmp_path / "new").exists(), "folders are made when the run starts"
    target = str(tmp_path / "x.jpg")
    assert paths(target, ("a cat", 0)) == [tmp_path / "x.jpg"]
    assert [path.name for path in paths(target, ("a cat", 0), ("a dog", 0))] == ["x-0.jpg", "x-1.jpg"]
    template = str(tmp_path / "{model}-{budget}-{prompt}-{seed:04d}-{index}.webp")
    assert paths(template, ("a cat", 7))[0].name == "m-0.6-a-cat-0007-0.webp"
    own = [{**fields(("a cat", 0))[0], "output": str(tmp_path / "own.png")}]
    assert outputs.plan_outputs(target, own) == [outputs.Output(tmp_path / "own.png", False)]


def test_writes_are_whole_or_nothing(tmp_path):
    target = tmp_path / "x.png"
    write_files({target: b"old"})
    write_files({target: b"new"})
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == ordinary_mode(0o666)
    with pytest.raises(RunError, match="cannot be written"):
        write_files({tmp_path / "gone" / "x.png": b"data"})
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RunError):
        write_files({tmp_path / "folder.png": b"data"})
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "x.png"]


def test_prompt_lines_end_with_newlines_only(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "one\u2028two"}\r\n\r\n{"prompt": "three"}'.encode())
    assert [entry["prompt"] for entry in prompts.read_prompts(str(file))] == ["one\u2028two", "three"]


def test_stages_wait_for_the_device_that_computes(monkeypatch):
    """With offloading a pipeline's `device` is the CPU while its work is queued on the GPU."""
    import torch

    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    pipe = SimpleNamespace(
        device=torch.device("cpu"),
        _execution_device=torch.device("cuda"),
        encode_prompt=lambda: "embeddings",
        vae=SimpleNamespace(encode=lambda: "latents", decode=lambda: "pixels"),
        image_processor=SimpleNamespace(postprocess=lambda: "picture"),
    )
    clock = StageClock(PICTURE.stages)
    with timed_parts(pipe, clock, "cuda", Seen(1)):
        assert pipe.encode_prompt() == "embeddings"
        assert pipe.vae.decode() == "pixels"
    assert len(waits) >= 4  # before and after each
    assert clock.seconds["text"] > 0 < clock.seconds["decode"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_survives_in_every_format(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(record.encode_picture(Image.new("RGB", (32, 32), "red"), suffix, RECORD))
    assert record.read_picture(path) == RECORD
    text = record.parameters_text(RECORD)
    with Image.open(path) as picture:
        if suffix == ".png":
            assert picture.info["parameters"] == text
        else:
            comment = picture.getexif().get_ifd(record.EXIF_IFD)[record.USER_COMMENT]
            assert comment.removeprefix(record.UNICODE_COMMENT).decode("utf-16-be") == text
    assert text.splitlines()[1] == "Negative prompt: dog"
    assert text.splitlines()[2].startswith(
        "Steps: 4, Sampler: Euler, CFG scale: 4.0, Seed: 3, Size: 64x32, Model"
    )


def test_a_comment_too_long_for_a_jpeg_is_cut(tmp_path):
    long = {**RECORD, "prompt": "a cat " * 6000}
    (tmp_path / "x.jpg").write_bytes(record.encode_picture(Image.new("RGB", (64, 32)), ".jpg", long))
    assert record.read_picture(tmp_path / "x.jpg") == long


def test_pictures_without_metadata_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(EditError, match="has no `edit` metadata"):
        record.read_picture(tmp_path / "x.png")


def test_prompt_files(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  a dog  \n# a note\n", encoding="utf-8")
    assert [e["prompt"] for e in prompts.read_prompts(str(tmp_path / "p.txt"))] == ["a cat", "a dog"]
    line = {"prompt": "a cat", "seed": 5, "budget": 0.5, "width": 64, "negative_prompt": ""}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    assert prompts.read_prompts(str(tmp_path / "p.jsonl")) == [line]


SPREAD = [
    ('generate "a cat" --seed 1 2 3', 'generate "a cat" --seed 1 --seed 2 --seed 3'),
    ('generate --seed 1 2 3 "a cat"', 'generate --seed 1 --seed 2 --seed 3 "a cat"'),
    ('generate -s 1 2 --prompts p.txt', 'generate -s 1 -s 2 --prompts p.txt'),
    ('generate --seed=1 2 --from a.png', 'generate --seed=1 --seed 2 --from a.png'),
    ('generate --seed 1 2001', 'generate --seed 1 --seed 2001'),
    ('generate --steps 4 --seed 1 2001 -q', 'generate --steps 4 --seed 1 --seed 2001 -q'),
    ('generate 7 --steps 4 5', 'generate 7 --steps 4 5'),
    ('generate --seed -1', 'generate --seed -1'),
    ('generate --seed 1 "a cat" 2', 'generate --seed 1 "a cat" 2'),
    ('generate -- --seed 1 2', 'generate -- --seed 1 2'),
    ('generate "a cat" --lora a.safetensors none', 'generate "a cat" --lora a.safetensors none'),
    ('profile --budget 0.4 0.6 -q', 'profile --budget 0.4 --budget 0.6 -q'),
    ('generate "a cat" --budget 0.4 1984', 'generate "a cat" --budget 0.4 1984'),
    ('profile --images a.png b.JPG -q', 'profile --images a.png --images b.JPG -q'),
    ('profile --images a.png b.jpg "a cat"', 'profile --images a.png --images b.jpg "a cat"'),
    ('generate-3d a.png b.png --views front left', 'generate-3d a.png b.png --views front --views left'),
    ('generate-3d --seed 1 2', 'generate-3d --seed 1 --seed 2'),
    ('generate --budget 0.4 0.6 1 "a cat"', 'generate --budget 0.4 --budget 0.6 --budget 1 "a cat"'),
    ('generate-3d --seed 1 2 --images-file p.txt', 'generate-3d --seed 1 --seed 2 --images-file p.txt'),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), SPREAD)
def test_several_values_may_follow_one_option(typed, meant):
    name, *words = shlex.split(typed)
    assert [name, *spread(words, COMMANDS[name])] == shlex.split(meant)


@given(st.one_of(st.text(), st.floats(), st.integers(), st.none(), st.booleans(), st.lists(st.integers())))
def test_a_budget_is_in_range_or_refused(value):
    try:
        budget = checks.budget("--budget", value)
    except EditError:
        return
    assert 0 < budget <= 1


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))
    b = Image.fromarray(np.clip(np.asarray(a, dtype=int) + 16, 0, 255).astype(np.uint8))
    assert math.isinf(closeness.psnr(a, a))
    assert closeness.ssim(a, a) == pytest.approx(1)
    flat = Image.new("RGB", (64, 64), (100, 100, 100))
    assert closeness.psnr(flat, Image.new("RGB", (64, 64), (110, 110, 110))) == pytest.approx(28.13, abs=0.01)
    noise = Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert closeness.ssim(a, b) > 0.9 > 0.1 > closeness.ssim(a, noise)


def test_ssim_is_scikit_image_s():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(1)
    a = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    theirs = metrics.structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert closeness.ssim(Image.fromarray(a), Image.fromarray(b)) == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("name", ["g16.png", "g32.tif", "f.tif"])
def test_grey_pictures_of_any_depth_open_alike(tmp_path, name):
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()
    kinds = {"g16.png": grey.astype(np.uint16) * 257, "g32.tif": grey.astype(np.int32) * 257}
    Image.fromarray(kinds.get(name, (grey / 255).astype(np.float32))).save(tmp_path / name)
    assert np.abs(np.asarray(open_rgb(str(tmp_path / name)), float)[..., 0] - grey).max() <= 1


def test_transparent_and_rotated_pictures_are_opened_upright(tmp_path):
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_rgb(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(str(tmp_path / "turned.jpg")).size == (2, 4)


def test_side_by_side_holds_both_pictures():
    row = closeness.side_by_side(
        {"dense": Image.new("RGB", (64, 64), "red"), "0.6": Image.new("RGB", (64, 64), "blue")}
    )
    colours = {colour for _, colour in row.getcolors(100_000)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert row.width > 2 * row.height * 0.8


def test_readable_numbers():
    assert readable_count(20_430_401_088) == "20.4 B"
    assert readable_count(808_903) == "808.9 k"
    assert flops(6.0e10) == "60 GFLOP"
    assert flops(6.82e15) == "6.82 PFLOP"
