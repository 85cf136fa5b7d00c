"""What was lost, changed or not used is said: prompts, pictures, LoRAs, schedulers, numbers that overflow."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backbones.noise import seeded
from backbones.spec import PACKAGE_FOLDER
from backbones.vocabulary import vocabulary
from edit_cli import console
from edit_cli.console import printable
from edit_cli.generation.samples import picture_files
from edit_cli.generation.seen import Seen

SMALL = ("--steps", "2", "--width", "32", "--height", "32")
LAYER = "transformer_blocks.{}.attn.to_q"


def lora(file: Path, *names: str) -> None:
    made = {f"{name}.lora_A.weight": torch.randn(4, 64) for name in names}
    save_file({**made, **{f"{name}.lora_B.weight": torch.randn(64, 4) for name in names}}, file)


def variant(folder: Path, model: Path, scheduler: str, **changes: object) -> Path:
    """A model's folder with another scheduler."""
    (folder / "scheduler").mkdir(parents=True)
    for part in model.iterdir():
        if part.name not in ("scheduler", "model_index.json", "routers"):
            (folder / part.name).symlink_to(part)
    index = json.loads((model / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    config |= {"_class_name": scheduler, **changes}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_a_stretched_start_picture_and_a_cut_prompt_are_said(edit_here, qwen_folder, tmp_path):
    Image.new("RGB", (90, 30), "red").save(tmp_path / "wide.png")
    long = "a cat " + "soft warm light " * 600
    (tmp_path / "long.txt").write_text(long)
    ran = edit_here(
        "generate", "--prompts", "long.txt", "-m", qwen_folder, *SMALL, "--image", "wide.png", "-o", "a.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "--image 'wide.png' has 90x30 px and is stretched to 32x32; crop it" in ran.err
    assert "the prompt 'a cat soft warm light" in ran.err and "is too long: of its" in ran.err


def test_what_a_lora_holds_for_nothing_is_said(edit_here, qwen_folder, tmp_path):
    lora(tmp_path / "half.safetensors", *(f"transformer.{LAYER.format(i)}" for i in (0, 77)))
    ran = edit_here(
        "generate", "a cat", "-m", qwen_folder, *SMALL, "--lora", "half.safetensors", "-o", "a.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0 and "'half.safetensors': 1 of its 2 layers match nothing in this model" in ran.err
    for name, prefix in (("bare", ""), ("peft", "base_model.model.")):
        lora(tmp_path / f"{name}.safetensors", f"{prefix}{LAYER.format(0)}")
        ran = edit_here(
            "generate", "a cat", "-m", qwen_folder, *SMALL, "--lora", f"{name}.safetensors", "-o",
            f"{name}.png", "--json", cwd=tmp_path,
        )  # fmt: skip
        assert ran.code == 0 and "match nothing" not in ran.err, ran.err
    save_file({f"diffusion_model.{LAYER.format(0)}.oft_blocks": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    ran = edit_here("generate", "a cat", "-m", qwen_folder, "--lora", "k.safetensors", cwd=tmp_path)
    assert ran.code == 2 and "is of the kind OFT, which is not read" in ran.err


def test_a_lora_too_strong_for_numbers_is_a_failed_run(edit_here, qwen_folder, tmp_path):
    lora(tmp_path / "l.safetensors", f"transformer.{LAYER.format(0)}")
    ran = edit_here(
        "generate", "a cat", "-m", qwen_folder, *SMALL, "--lora", "l.safetensors:1e30", "-o", "a.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert (ran.code, (tmp_path / "a.png").exists()) == (1, False)
    assert "the numbers overflowed at scale 1e+30" in ran.err


def test_numbers_that_overflow_fail_their_row_wherever_they_show():
    seen = Seen(2)
    seen.values(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    assert seen.bad == {1}
    seen.values([torch.ones(3, 4), None, "picture"])
    assert seen.bad == {1}
    seen.values(torch.full((5, 2), float("inf")))  # not rows: it is not known whose they are
    assert seen.bad == {0, 1}


def test_noise_of_the_scheduler_follows_the_seed_of_its_row():
    class Scheduler:
        def step(self, sample: torch.Tensor) -> torch.Tensor:
            return sample + torch.randn_like(sample) + torch.randn(sample.shape, dtype=sample.dtype)

    def noise(*seeds: int) -> torch.Tensor:
        scheduler = Scheduler()
        with seeded(scheduler, seeds):
            made = scheduler.step(torch.zeros(len(seeds), 3))
        assert "step" not in vars(scheduler)
        return made

    assert torch.equal(noise(5, 7)[1], noise(7)[0]) and not torch.equal(noise(5), noise(7))


def test_a_stochastic_sampler_draws_the_same_alone_and_in_company(edit_here, qwen_folder, tmp_path):
    model = variant(tmp_path / "m", qwen_folder, "FlowMatchEulerDiscreteScheduler", stochastic_sampling=True)
    for prompts, output, batch in ((("c",), "z.png", "1"), (("d", "c"), "{index}.png", "1")):
        ran = edit_here(
            "generate", *prompts, "-m", model, *SMALL, "-s", "5", "--batch-size", batch, "-o", output,
            cwd=tmp_path,
        )  # fmt: skip
        assert ran.code == 0, ran.err
    pixels = [list(Image.open(file).getdata()) for file in sorted(tmp_path.glob("*.png"))]
    assert pixels[2] in pixels[:2] and pixels[0] != pixels[1]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_scheduler_that_does_not_fit_is_bad_input(name, edit_here, qwen_folder, tmp_path):
    model = variant(tmp_path / "m", qwen_folder, name)
    ran = edit_here("generate", "a cat", "-m", model, *SMALL, "-o", "a.png", cwd=tmp_path)
    assert ran.code == 2 and f"the scheduler {name} does not fit QwenImagePipeline" in ran.err
    assert ran.err.strip().splitlines()[-1].startswith("error: ")


def test_a_git_lfs_pointer_is_named_for_what_it_is(edit_here, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 238\n"
    for name in ("model.safetensors", "cat.png"):
        (tmp_path / name).write_text(pointer)
    for arguments in (["-m", "model.safetensors"], ["--image", "cat.png"]):
        ran = edit_here("generate", "a cat", *arguments, cwd=tmp_path)
        assert ran.code == 2 and "git-lfs pointer" in ran.err and "git lfs pull" in ran.err


def test_hidden_files_are_no_pictures(tmp_path):
    for name in ("a.png", "b.jfif", "._a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [Path(file).name for file in picture_files("--images", str(tmp_path), "x")] == ["a.png", "b.jfif"]


def test_nothing_that_a_terminal_obeys_is_printed(edit_here, qwen_folder, tmp_path):
    line = json.dumps({"prompt": "a cat \x1b]0;TITLE\x07\x9b31m\u202etac", "output": "a.png"})
    (tmp_path / "p.jsonl").write_text(line)
    ran = edit_here("generate", "--prompts", "p.jsonl", "-m", qwen_folder, *SMALL, cwd=tmp_path)
    assert ran.code == 0 and "a cat" in ran.out
    assert ran.out == printable(ran.out) and "\x1b" not in ran.out


def test_several_budgets_are_drawn_side_by_side(edit_here, qwen_folder, tmp_path):
    ran = edit_here(
        "generate", "a cat", "-m", qwen_folder, *SMALL, "--steps", "5", "--budget", "0.6", "0.7", "1",
        "--json", "--compare", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    names = [f"a-cat-budget-{share}.png" for share in (60, 70, 100)]
    assert ran.json["outputs"] == names and ran.json["budget"] == [0.6, 0.7, 1.0]
    assert ran.json["strips"] == ["a-cat-budgets.png"]
    assert Image.open(tmp_path / "a-cat-budgets.png").width > 3 * 32
    assert len(ran.json["compare"]["outputs"]) == 3
    assert "budgets 0.6 and 0.7 come to the same at 5 steps: 0.60 of the dense FLOPs" in ran.err
    ran = edit_here("generate", "7", "-m", qwen_folder, cwd=tmp_path)
    assert ran.code == 2 and ran.err.startswith("error: PROMPT '7' is a number; write it after the option")


def test_what_a_small_model_does_not_know_is_said(edit_bare, edit_here, tmp_path):
    ran = edit_here("generate", "an elephnt", "--width", "64", "--dry-run", cwd=tmp_path)
    assert "qwen-image-tiny does not know 'elephnt' and draws something else; near are elephant" in ran.err
    assert "qwen-image-tiny was not trained for 64x128 px" in ran.err
    ran = edit_bare("models", "flux-tiny", "--words", cwd=tmp_path)
    assert ran.code == 0 and "elephant" in ran.out and not ran.imported
    ran = edit_bare("models", "flux-dev", "--words", cwd=tmp_path)
    assert ran.code == 2 and "--words: 'flux-dev' was trained on too many words" in ran.err


@pytest.mark.parametrize("model", ["qwen_image_tiny", "flux_tiny"])
def test_the_words_of_a_packaged_model_are_those_it_was_judged_by(model):
    tiny = PACKAGE_FOLDER / "tiny"
    known = vocabulary(str(tiny / model))
    assert known is not None
    prompts = (tiny / "prompts" / "common100.txt").read_text().splitlines()
    assert [prompt for prompt in prompts if known.unknown(prompt)] == []
    assert known.unknown("two red Cats, flat style, and a hippogriff") == ["hippogriff"]


def test_quiet_prints_the_paths_and_nothing_else(edit_here, qwen_folder, tmp_path):
    ran = edit_here("generate", "a cat", "a dog", "-m", qwen_folder, *SMALL, "-q", cwd=tmp_path)
    assert (ran.code, ran.out, ran.err) == (0, "a-cat.png\na-dog.png\n", "")


def test_a_log_has_a_line_for_every_phase_and_half_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(console, "began", lambda: 90.0)
    with console.progress(True) as bars, console.working("loading", True):
        task = bars.add_task("denoising", total=10)
        for _ in range(10):
            bars.advance(task)
            now[0] += 12.0
    assert capsys.readouterr().err.splitlines() == [
        "[0:10] loading",
        "[0:10] denoising: 10 steps",
        "[0:46] denoising: 4 of 10 steps, 0.11 a second, 0:54 left",
        "[1:22] denoising: 7 of 10 steps, 0.097 a second, 0:30 left",
        "[1:58] denoising: 10 of 10 steps, 0.093 a second",
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_that_end_a_program_end_it_as_ctrl_c_does(name):
    wait = f"signal.raise_signal(signal.{name})\ntime.sleep(20)"
    # what started the tests may have told its children to ignore some
    usual = "default_int_handler" if name == "SIGINT" else "SIG_DFL"
    code = f"import signal, time\nsignal.signal(signal.{name}, signal.{usual})\n"
    code += f"import edit_cli.main as m\ndef wait(_):\n exec({wait!r})\nm._run = wait\nm.main([])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (130, "error: interrupted; nothing was written\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_closed_and_full_streams_are_one_line(tmp_path):
    edit = shlex.quote(sys.executable) + " -m edit_cli.main"
    for command, code, message in (
        (f"{edit} generate --prompts - <&-", 2, "error: --prompts 'stdin' is empty"),
        (f"{edit} models > /dev/full", 1, "error: no space left on device while writing output"),
        (f"{edit} models >&-", 0, ""),
    ):
        ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == code and ran.stderr.startswith(message), ran.stderr
        assert len(ran.stderr.splitlines()) == (1 if message else 0)
