"""Any pipeline of diffusers with a transformer, through `edit generate`: pictures, videos, sounds."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import wave
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import _once
from tests.tiny_zoo import MAKE, rename

README = Path(__file__).parents[2] / "README.md"
PICTURE, MASK = "photo.png", "mask.png"
INPUTS = {
    "flux-img2img": ["--image", PICTURE, "--strength", "0.6"],
    "flux-fill": ["--image", PICTURE, "--mask", MASK],
    "flux-kontext": ["--image", PICTURE],
    "qwen-edit": ["--image", PICTURE],
    "qwen-edit-plus": ["--image", PICTURE, PICTURE],
}
QUICK = ("flux-img2img", "sd3", "wan")
"""Run by default; reference pictures of a megapixel take the others a minute."""
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MAKE]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """`zoo(name)` -> a folder of MAKE, built once."""
    return lambda name: _once(tmp_path_factory, f"zoo-{name}", MAKE[name])


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A working folder with pictures."""
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / PICTURE)
    Image.new("L", (64, 64), 255).save(tmp_path / MASK)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_generates_and_repeats(edit_here, desk, zoo, name):
    ran = edit_here(
        "generate", "a cat", "-m", zoo(name), "--budget", 1, "--steps", 2, *INPUTS.get(name, ()),
        "-o", "out/", "--json", cwd=_with_folder(desk),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (made,) = ran.json["outputs"]
    assert ran.json["spent"] == [1.0]
    assert ran.json["flops"]["dense"] > 0
    first = (desk / made).read_bytes()
    again = edit_here("generate", "--from", made, "-o", f"again{Path(made).suffix}", cwd=desk)
    assert again.code == 0, again.err
    assert (desk / f"again{Path(made).suffix}").read_bytes() == first


def _with_folder(desk: Path) -> Path:
    (desk / "out").mkdir()
    return desk


def test_a_folder_of_text_to_image_takes_pictures_by_the_class_that_diffusers_has_for_them(
    edit_here, desk, zoo
):
    ran = edit_here(
        "generate", "a cat", "-m", zoo("sd3"), "--image", PICTURE, "--strength", 0.5, "-o", "cat.png",
        cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert json.loads(Image.open(desk / "cat.png").info["edit"])["strength"] == 0.5


@pytest.mark.parametrize("name", ["night.gif", "night.webp", "{frame}.png"])
def test_a_video_as_a_file_or_a_picture_for_each_frame(edit_here, desk, zoo, name):
    ran = edit_here("generate", "a cat", "-m", zoo("wan"), "--frames", 5, "--fps", 8, "-o", name, cwd=desk)
    assert ran.code == 0, ran.err
    if name.endswith(".png"):
        assert sorted(path.name for path in desk.glob("0*.png")) == [f"{i:04d}.png" for i in range(1, 6)]
        name = "0001.png"
    else:
        assert Image.open(desk / name).n_frames == 5
    again = edit_here("generate", "--from", name, "-o", "again.gif", cwd=desk)
    assert again.code == 0, again.err
    assert Image.open(desk / "again.gif").n_frames == 5
    assert Image.open(desk / "again.gif").info["duration"] == 120  # ms; a GIF counts in hundredths


@pytest.mark.parametrize("name", ["sd3", "wan", pytest.param("flux2-klein", marks=pytest.mark.slow)])
def test_a_dry_run_counts_what_the_run_does(edit_here, desk, zoo, name):
    """Up to the number of text tokens, which is guessed."""
    asked = ("generate", "a cat", "-m", zoo(name), "--budget", 1, "--json")
    planned = edit_here(*asked, "--dry-run", cwd=desk)
    assert planned.code == 0, planned.err
    ran = edit_here(*asked, "-o", "out/", cwd=_with_folder(desk))
    assert ran.code == 0, ran.err
    assert 0.5 < planned.json["flops"]["dense"] / ran.json["flops"]["dense"] < 2


@pytest.mark.slow
def test_a_sound_has_its_length_and_is_compared(edit_here, desk, zoo):
    ran = edit_here(
        "generate", "a cat", "-m", zoo("stable-audio"), "--seconds", 2, "-o", "cat.wav", "--compare",
        "--json", cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["duration"] == [2.0]
    with wave.open(str(desk / "cat.wav")) as file:
        assert file.getnframes() / file.getframerate() == 2
    assert ran.json["compare"]["snr"] == [99.0]
    assert (desk / "cat-dense.wav").is_file()


@pytest.mark.slow
def test_a_video_is_compared(edit_here, desk, zoo):
    ran = edit_here(
        "generate", "a cat", "-m", zoo("wan"), "-o", "{frame}.png", "--compare", "--json", cwd=desk
    )
    assert ran.code == 0, ran.err
    assert ran.json["compare"]["psnr"] == [99.0]
    assert Image.open(desk / "frames-compare.gif").n_frames == ran.json["frames"][0]


@pytest.mark.slow
def test_a_video_keeps_its_sound(edit_here, desk, zoo):
    """In the file where it can hold one, else beside it."""
    formats = ["cat.gif", *(["cat.mp4"] if importlib.util.find_spec("av") else [])]
    for name in formats:
        ran = edit_here("generate", "a cat", "-m", zoo("ltx2"), "--budget", 1, "-o", name, cwd=desk)
        assert ran.code == 0, ran.err
    with wave.open(str(desk / "cat.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (16000, 2)
        length = file.getnframes() / file.getframerate()
    if len(formats) > 1:
        import av

        with av.open(str(desk / "cat.mp4")) as file:
            (heard,) = file.streams.audio
            assert float(heard.duration * heard.time_base) == pytest.approx(length, abs=0.1)
    again = edit_here("generate", "--from", "cat.gif", "-o", "again.gif", cwd=desk)
    assert again.code == 0, again.err
    assert (desk / "again.gif").read_bytes() == (desk / "cat.gif").read_bytes()


def test_of_two_transformers_both_are_counted(edit_here, desk, zoo):
    """Wan 2.2: each makes a part of the steps, and both lie in memory."""
    asked = ("generate", "a cat", "-m", zoo("wan-2.2"), "--steps", 8, "--budget", 0.5, "--json")
    planned = edit_here(*asked, "--dry-run", cwd=desk)
    assert {"transformer", "transformer_2"} <= planned.json["memory_gib"]["weights"].keys()
    ran = edit_here(*asked, "-o", "cat.gif", cwd=desk)
    assert ran.json["evaluations"] == {"made": 4, "dense": 8}
    assert ran.json["flops"]["spent"] == ran.json["flops"]["dense"] / 2


EDITS = [
    pytest.param("flux-fill", ["--prompts", "edits.jsonl"], id="lines"),
    pytest.param("qwen-edit", ["--images", "."], id="folder", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "given"), EDITS)
def test_models_that_edit_are_calibrated_on_pictures(edit_here, desk, zoo, name, given):
    line = {"image": PICTURE, "mask": MASK, "width": 64, "height": 64}
    lines = [json.dumps({"prompt": prompt, **line}) for prompt in ("a cat", "a dog")]
    (desk / "edits.jsonl").write_text("\n".join(lines))
    asked = ("calibrate", "-m", zoo(name), *given, "--steps", 4, "--budgets", 0.5)
    made = edit_here(*asked, "-o", "bundle", "--json", "--quiet", cwd=desk)
    assert made.code == 0, made.err
    (quality,) = made.json["quality"]
    assert quality["spent"] == 0.5 and quality["snr"] > 0
    picture = [*INPUTS[name], "--steps", 4, "--budget", 0.5, "-o", "out.png"]
    ran = edit_here("generate", "a cat", "-m", zoo(name), "--routers", "bundle", *picture, cwd=desk)
    assert ran.code == 0, ran.err
    several = edit_here(*asked, "--samples", 2, "-o", "other", cwd=desk)
    assert several.code == 2 and "--samples 2 are made in one batch" in several.err


def test_a_model_that_edits_asks_for_its_pictures(edit_here, desk, zoo):
    ran = edit_here("calibrate", "-m", zoo("flux-fill"), "-o", "bundle", cwd=desk)
    assert ran.code == 2 and "needs --image" in ran.err


REFUSED = [
    ("sd3", ["--control-image", PICTURE], "(StableDiffusion3Pipeline) takes no --control-image"),
    ("sd3", ["--image", PICTURE, PICTURE], "takes one --image and 2 were given"),
    ("sd3", ["--frames", "5"], "(StableDiffusion3Pipeline) takes no --frames"),
    ("sd3", ["--fps", "5"], "(StableDiffusion3Pipeline) takes no --fps"),
    ("sd3", ["--seconds", "5"], "(StableDiffusion3Pipeline) takes no --seconds"),
    ("sd3", ["--strength", "0.5"], "--strength is for image-to-image; give --image"),
    ("sd3", ["--frames", "none"], "--frames 'none' is not a whole number"),
    ("sd3", ["--mask", "missing.png"], "--mask 'missing.png' is not a file"),
    ("wan", ["--image", PICTURE], "(WanPipeline) takes no --image"),
    ("wan", ["--mask", MASK], "(WanPipeline) takes no --mask"),
    ("wan", ["-o", "cat.png"], "is one picture of many; write {frame} where the frame's number goes"),
    ("wan", ["-o", "cat.wav"], "has suffix '.wav'; allowed are"),
    ("wan", ["--fps", "0"], "--fps '0' is out of range; allowed are 1 to 240"),
    ("flux-img2img", ["--negative-prompt", "a dog"], "takes no --negative-prompt"),
    ("flux-img2img", [], "(FluxImg2ImgPipeline) needs --image"),
    ("flux-fill", ["--image", PICTURE], "(FluxFillPipeline) needs --mask"),
    ("flux-img2img", ["--image", PICTURE, "-o", "{frame}.png"], "--output field {frame} is unknown"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_what_a_pipeline_does_not_take_is_refused_by_name(edit_here, desk, zoo, name, arguments, message):
    before = set(desk.rglob("*"))
    ran = edit_here("generate", "a cat", "-m", zoo(name), *arguments, cwd=desk)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert set(desk.rglob("*")) == before


def test_what_only_the_pipeline_knows_is_refused_in_its_words(edit_here, desk, zoo):
    ran = edit_here("generate", "a cat", "-m", zoo("wan"), "--width", 33, cwd=desk)
    said = ran.said
    assert (ran.code, len(said)) == (2, 1)
    assert "divisible by 16" in ran.err


FOLDERS = [
    ({"_class_name": "NoSuchPipeline"}, "it is not a pipeline of the installed diffusers"),
    ({"_class_name": ["pipeline", "Mine"]}, "it is not a pipeline of the installed diffusers"),
    ({"_class_name": "StableDiffusion3Pipeline", "transformer": [None, None]}, "no diffusion transformer"),
    (
        {"_class_name": "StableDiffusion3Pipeline", "vae": ["my_code", "Vae"]},
        "vae is of 'my_code': classes are taken from diffusers and transformers only",
    ),
    ({"_class_name": "DiTPipeline"}, "(DiTPipeline) takes no prompt"),
]


@pytest.mark.parametrize(("entries", "message"), FOLDERS)
def test_folders_that_cannot_be_run_are_refused_and_nothing_in_them_is(
    edit_here, desk, zoo, entries, message
):
    import shutil

    folder = desk / "folder"
    shutil.copytree(zoo("sd3"), folder)
    for name in ("pipeline.py", "my_code.py"):
        (folder / name).write_text(f"open({str(desk / 'ran')!r}, 'w')")
    rename(
        folder, **{"pipeline": entries["_class_name"]}, **{k: v for k, v in entries.items() if k[0] != "_"}
    )
    ran = edit_here("generate", "a cat", "-m", folder, cwd=desk)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert not (desk / "ran").exists()


def test_inspect_prints_the_derived_description(edit_here, desk, zoo):
    ran = edit_here("models", "--inspect", zoo("wan"), cwd=desk)
    assert ran.code == 0, ran.err
    assert "blocks: 2 WanTransformerBlock" in ran.out and "ffn.net.0.proj > ffn.net.2" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    (found,) = edit_here("models", "--inspect", zoo("wan"), "--json", cwd=desk).json["transformers"]
    assert found["rows"][0]["path"] == "blocks"
    assert edit_here("models", "--inspect", desk, cwd=desk).code == 2


@pytest.mark.slow
def test_the_example_of_an_editing_model_in_the_readme(edit_here, desk):
    (line,) = re.findall(r"^edit (generate .*--image photo.*)$", README.read_text(), re.MULTILINE)
    made = MAKE["qwen-edit-plus"](desk / "Qwen-Image-Edit-2511")
    ran = edit_here(*shlex.split(line), "-o", "night.png", cwd=desk)
    assert ran.code == 0, ran.err
    assert json.loads(Image.open(desk / "night.png").info["edit"])["image"] == str(desk / PICTURE)
    assert (made / "model_index.json").is_file()
