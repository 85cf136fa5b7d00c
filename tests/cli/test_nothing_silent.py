"""What was lost, changed or not used is said: prompts, pictures, LoRAs, schedulers, numbers that overflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backbones.noise import seeded
from edit_cli.console import printable
from edit_cli.generate.samples import picture_files
from edit_cli.generate.seen import Seen

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
    save_file({f"diffusion_model.{LAYER.format(0)}.lokr_w1": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    ran = edit_here("generate", "a cat", "-m", qwen_folder, "--lora", "k.safetensors", cwd=tmp_path)
    assert ran.code == 2 and "is a LoKr file, which is not read" in ran.err


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
