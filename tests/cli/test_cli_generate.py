"""`edit generate` and `edit models` through the real entry point, on random-weight pipelines, offline."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edit_cli.generation.picture import PICTURE
from edit_cli.generation.record import read_picture

STAGES = list(PICTURE.stages)
KEYS = ["outputs", "model", "seeds", "budget", "spent", "flops", "seconds", "evaluations"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


@pytest.fixture(scope="module")
def made(edit_here, qwen_folder, tmp_path_factory):
    """One generation that several tests look at: two prompts, two seeds, one batch, compared with dense."""
    folder = tmp_path_factory.mktemp("made")
    ran = edit_here(
        "generate", "a cat", "a red dog", "--seed", "1", "2", "-b", "0.6", "--steps", "10", "--compare",
        "--json", "-m", qwen_folder, "-o", "{prompt}-{seed}.png", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return folder, ran


def test_the_json_object(made, qwen_folder):
    folder, ran = made
    assert len(ran.out.splitlines()) == 1
    found = ran.json
    assert list(found)[: len(KEYS)] == KEYS
    assert found["outputs"] == ["a-cat-1.png", "a-cat-2.png", "a-red-dog-1.png", "a-red-dog-2.png"]
    assert all((folder / name).is_file() for name in found["outputs"])
    assert found["model"] == qwen_folder.name
    assert found["seeds"] == [1, 2, 1, 2]
    assert found["budget"] == 0.6
    assert len(found["spent"]) == 4
    assert found["flops"]["spent"] / found["flops"]["dense"] == pytest.approx(
        np.mean(found["spent"]), abs=1e-3
    )
    assert list(found["seconds"]) == [*STAGES, "total"]
    assert sum(found["seconds"][stage] for stage in STAGES) <= found["seconds"]["total"]
    assert found["evaluations"] == {"made": 6, "dense": 10}  # of one batch
    assert found["spent"] == [0.6] * 4


def test_the_table_for_people(made):
    _, ran = made
    for words in (
        "0.6 asked, 0.600 spent",
        "a-red-dog-2.png",
        "seed 2",
        "s in all, ",
        "s of them denoising",
        "time ratio",
    ):
        assert words in ran.err
    for words in ("evaluations in the place of", "FLOP", "stages"):  # -v tells these
        assert words not in ran.err
    assert "speed-up" not in ran.err.lower()


def test_comparing_with_dense(made):
    folder, ran = made
    compare = ran.json["compare"]
    assert compare["outputs"][0] == "a-cat-1-compare.png"
    assert all((folder / p).is_file() for p in compare["outputs"])
    assert len(compare["psnr"]) == len(compare["ssim"]) == 4
    assert all(20 < value <= 99 for value in compare["psnr"])
    # both numbers of the quotient are rounded to 0.1 ms
    expected = compare["elastic_seconds"] / compare["dense_seconds"]
    assert compare["time_ratio"] == pytest.approx(expected, rel=1e-2)


def test_the_record_in_a_picture(made, qwen_folder):
    folder, _ = made
    record = read_picture(folder / "a-cat-1.png")
    assert record["prompt"] == "a cat"
    assert (record["seed"], record["budget"], record["target"], record["steps"]) == (1, 0.6, None, 10)
    assert record["negative_prompt"] == " "
    assert len(record["model_hash"]) == 16
    assert len(record["routers_hash"]) == 64
    assert record["routers"] == "default"
    assert set(record["versions"]) == {"edit", "python", "torch", "diffusers", "transformers"}
    assert [peer["seed"] for peer in record["batch"]] == [1, 2, 1, 2]
    assert (record["solver"], record["sampler"]) == (None, "FlowMatchEuler")
    assert (record["device"], record["compile"], record["force"]) == ("cpu", False, False)
    assert (record["lora_hashes"], record["image_hash"], record["model_base"]) == ([], None, None)


def test_prompt_lines_override_options(edit_here, tmp_path, qwen_folder):
    lines = [
        {"prompt": "a cat", "seed": 7, "budget": 0.5, "output": "own.jpg"},
        {"prompt": "a dog", "width": 96, "steps": 6},
        {"prompt": "a car", "guidance": 1.0},
        {"prompt": "a cat", "seed": 8, "budget": 0.5, "output": "last.png"},
    ]
    ran = edit_here(
        "generate", "--prompts", "-", "--seed", "3", "--steps", "8", "--json", "--quiet", "-m", qwen_folder,
        "-o", "./", "--compare", cwd=tmp_path, stdin="\n".join(json.dumps(line) for line in lines),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["outputs"] == ["own.jpg", "a-dog.png", "a-car.png", "last.png"]
    assert found["seeds"] == [7, 3, 3, 8]
    assert found["budget"] == [0.5, 0.8, 0.8, 0.5]  # the bundle recommends 0.8
    # the first and the last run together, and are told in their order all the same
    assert found["compare"]["outputs"] == [
        "own-compare.png", "a-dog-compare.png", "a-car-compare.png", "last-compare.png",
    ]  # fmt: skip
    assert pixels(tmp_path / "a-dog.png").shape == (64, 96, 3)
    assert read_picture(tmp_path / "own.jpg")["steps"] == 8
    assert read_picture(tmp_path / "a-dog.png")["steps"] == 6
    assert read_picture(tmp_path / "a-car.png")["negative_prompt"] is None


def test_without_routers_it_is_dense(edit_here, tmp_path, qwen_folder):
    ran = edit_here("generate", "a cat", "--routers", "none", "--json", "-q", "-m", qwen_folder, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (ran.json["budget"], ran.json["spent"]) == (1.0, [1.0])
    assert ran.json["evaluations"] == {"made": 4, "dense": 4}
    again = edit_here(
        "generate", "a cat", "--routers", "none", "--json", "-q", "-m", qwen_folder, cwd=tmp_path
    )
    assert again.json["outputs"] == ["a-cat-2.png"]
    assert (pixels(tmp_path / "a-cat.png") == pixels(tmp_path / "a-cat-2.png")).all()


def test_image_to_image(edit_here, made, qwen_folder):
    folder, _ = made
    ran = edit_here(
        "generate", "a cat", "--image", "a-cat-1.png", "--strength", "0.5", "--steps", "8", "-b", "0.5",
        "--json", "-q", "-m", qwen_folder, "-o", "varied.png", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["evaluations"] == {"made": 2, "dense": 4}  # half of the half that is left of 8 steps
    assert read_picture(folder / "varied.png")["strength"] == 0.5


def test_flux(edit_here, tmp_path, flux_folder):
    ran = edit_here(
        "generate", "a cat", "-b", "0.7", "--steps", "6", "--json", "-m", flux_folder, cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert ran.json["evaluations"] == {"made": 4, "dense": 6}
    notes = ["a budget of 0.7 buys 4 of 6 evaluations, which is 0.67 of the dense FLOPs"]
    assert ran.json["notes"][-1:] == notes
    refused = edit_here("generate", "a cat", "--negative-prompt", "dog", "-m", flux_folder, cwd=tmp_path)
    assert refused.code == 2
    assert "FLUX.1 takes no --negative-prompt" in refused.err


def test_a_replay_on_another_card_says_so(edit_here, qwen_folder, tmp_path, monkeypatch):
    first = ["a cat", "--steps", "2", "--routers", "none", "-m", qwen_folder, "-q"]
    for name, card, typed in (("one.png", "Card A", first), ("two.png", "Card B", ["--from", "one.png"])):
        monkeypatch.setattr("backbones.loading.card", lambda kind, card=card: card)
        ran = edit_here("generate", *typed, "-o", name, cwd=tmp_path)
        assert ran.code == 0, ran.err
        assert read_picture(tmp_path / name)["card"] == card
    assert "not what the original was made with: card; the picture may differ" in ran.err


def test_lora_changes_the_picture_and_scale_zero_does_not(edit_here, made, qwen_folder):
    import torch
    from safetensors.torch import save_file

    folder, _ = made
    torch.manual_seed(0)
    prefix = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{prefix}.lora_A.weight": torch.randn(4, 64), f"{prefix}.lora_B.weight": torch.randn(64, 4)}
    save_file(lora, folder / "lora.safetensors")
    save_file({"unrelated.weight": torch.zeros(1)}, folder / "foreign.safetensors")

    def run(name: str, *options: str):
        return edit_here(
            "generate", "a cat", "-q", "--steps", "4", *options, "-m", qwen_folder, "-o", name, cwd=folder
        )

    for name, options in (
        ("plain.png", []),
        ("on.png", ["--lora", "lora.safetensors"]),
        ("off.png", ["--lora", "lora.safetensors:0"]),
    ):
        ran = run(name, *options)
        assert ran.code == 0, ran.err
    assert abs(pixels(folder / "on.png") - pixels(folder / "plain.png")).max() > 1
    assert abs(pixels(folder / "off.png") - pixels(folder / "plain.png")).max() <= 1
    assert read_picture(folder / "on.png")["loras"][0].endswith("lora.safetensors:1")
    save_file({name: 2 * tensor for name, tensor in lora.items()}, folder / "lora.safetensors")
    replayed = edit_here("generate", "--from", "on.png", "-o", "other.png", cwd=folder)
    assert replayed.code == 0, replayed.err
    assert "not what the original was made with: lora_hashes; the picture may differ" in replayed.err
    overflowed = run("x.png", "--lora", "lora.safetensors:1e38")
    assert overflowed.code == 1
    assert "the numbers overflowed at scale 1e+38; give a smaller one" in overflowed.err
    refused = run("x.png", "--lora", "foreign.safetensors")
    assert refused.code == 2
    assert "foreign.safetensors" in refused.err
    assert not (folder / "x.png").exists()


def test_the_papers_release_runs_in_exact_mode(edit_here, tmp_path, qwen_folder):
    import torch
    from diffusers import QwenImageTransformer2DModel
    from safetensors.torch import save_file

    from routers.paper.checkpoint import ReleaseRouter

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel.from_pretrained(qwen_folder, subfolder="transformer")
    tensors = dict(transformer.state_dict())
    for i in range(4):
        router = ReleaseRouter(64, 8)
        # every second block is closed by its bias
        torch.nn.init.constant_(router.out[2].bias, 3.0 if i % 2 else -3.0)
        tensors |= {f"gate_mlps.{i}.{name}": value for name, value in router.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    ran = edit_here(
        "generate",
        "a cat",
        "--routers",
        "model.safetensors",
        "--json",
        "-m",
        qwen_folder,
        "-o",
        "cat.png",
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.err
    assert "the MLP activation was switched to x * sigmoid(1.702 x)" in ran.err
    assert ran.json["budget"] is None
    assert ran.json["decisions"]["skip"] == 2 * 4 * 2  # two blocks, four steps, two branches
    refused = edit_here(
        "generate", "a cat", "--routers", "model.safetensors", "-b", "0.6", "-m", qwen_folder, cwd=tmp_path
    )
    assert refused.code == 2
    assert "--budget does not apply" in refused.err


@pytest.mark.parametrize(
    ("model", "dense", "share"),
    [
        pytest.param("qwen-image", 6.82e15, 30 / 50, marks=pytest.mark.slow),
        pytest.param("flux-dev", 2.08e15, 16 / 28, marks=pytest.mark.slow),
    ],
)
def test_dry_run_of_a_model_that_is_not_here(edit_here, tmp_path, model, dense, share):
    ran = edit_here("generate", "a cat", "--dry-run", "-b", "0.6", "--json", "-m", model, cwd=tmp_path)
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["flops"]["dense"] == pytest.approx(dense, rel=0.02)
    assert found["flops"]["spent"] == pytest.approx(share * found["flops"]["dense"])  # whole evaluations
    assert found["memory_gib"]["weights"]["transformer"] > 20
    assert found["outputs"] == ["a-cat.png"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_flops_are_those_of_the_run(edit_here, tmp_path, qwen_folder):
    arguments = ["generate", "a cat", "-b", "0.5", "--json", "-q", "-m", qwen_folder]
    planned = edit_here(*arguments, "--dry-run", cwd=tmp_path).json
    assert list(tmp_path.iterdir()) == []
    ran = edit_here(*arguments, cwd=tmp_path).json
    assert planned["outputs"] == ran["outputs"]
    assert planned["flops"] == pytest.approx(ran["flops"])
    assert planned["transformer_calls"] == 2 * ran["evaluations"]["made"]  # a call for each guidance branch


def test_dry_run_forecasts_what_a_plan_keeps(edit_here, tmp_path, qwen_folder):
    """Four outputs of 256 x 256 tokens with 16 channels in float32 for each picture of a batch."""
    arguments = ["generate", "a cat", "a dog", "--dry-run", "--width", "4096", "--height", "4096"]
    arguments += ["--routers", "none", "-m", qwen_folder]
    kept = {}
    for options in ("-b 1", "-b 1 --target exact", "-b 0.5 --batch-size 1", "-b 0.5 --batch-size 2"):
        ran = edit_here(*arguments, *options.split(), "--json", cwd=tmp_path)
        kept[options] = ran.json["memory_gib"]["cache"]
    one = 4 * 256**2 * 16 * 4 / 2**30
    assert [*kept.values()] == [0, *(pytest.approx(n * one, abs=5e-4) for n in (2, 1, 2))]
    words = " ".join(edit_here(*arguments, "-b", "0.5", "--batch-size", "1", cwd=tmp_path).out.split())
    assert "at most 16 MiB of earlier steps' outputs" in words and "routers none" in words


def test_models_lists_the_registry(edit_here, tmp_path):
    ran = edit_here("models", cwd=tmp_path)
    assert ran.code == 0
    for words in ("qwen-image", "flux-dev", "flux-schnell", "28.8 B", "GiB", "FLUX.1 [dev]"):
        assert words in ran.out
    rows = edit_here("models", "--json", cwd=tmp_path).json["models"]
    assert {"name", "family", "parameters", "licence", "memory_gib", "packaged"} <= set(rows[0])


def test_the_python_api(qwen_folder):
    import diffusers

    import routers

    pipe = diffusers.QwenImagePipeline.from_pretrained(qwen_folder)
    dense = pipe("a cat", num_inference_steps=6, width=64, height=64, generator=_generator()).images[0]
    elastic = routers.attach(pipe, qwen_folder / "routers", budget=0.5)
    image = pipe("a cat", num_inference_steps=6, width=64, height=64, generator=_generator()).images[0]
    assert "budget asked 0.5, spent 0.500 of dense FLOPs: 3 evaluations of 6" in elastic.summary()
    elastic.detach()
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(dense, dtype=int)).max() > 0
    again = pipe("a cat", num_inference_steps=6, width=64, height=64, generator=_generator()).images[0]
    assert (np.asarray(again) == np.asarray(dense)).all()


def _generator():
    import torch

    return torch.Generator().manual_seed(0)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_picture(edit, made, qwen_folder):
    folder, _ = made
    ran = edit(
        "generate", "a red dog", "-s", "2", "-b", "0.6", "--steps", "10", "--compile", "-m", qwen_folder,
        "-o", "compiled.png", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert abs(pixels(folder / "compiled.png") - pixels(folder / "a-red-dog-2.png")).max() <= 2


@pytest.mark.bench
@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["generate", "--help"]])
def test_help_is_quick(edit, tmp_path, arguments):
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert edit(*arguments, cwd=tmp_path).code == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.4, f"{times} s at load {os.getloadavg()[0]}"
