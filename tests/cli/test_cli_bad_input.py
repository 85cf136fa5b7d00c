"""Bad input: one line with the value, what is allowed, the next step; exit code 2; nothing written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from edit_cli import errors
from tests.conftest import EDIT, edit_environment
from tests.fresh import Ran

FOLDER = "{folder}"  # stands for the random pipeline's folder


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A working folder with the files that the cases name."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": "a dog", "seed": }\n')
    (tmp_path / "range.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "budget": 2}\n')
    (tmp_path / "unknown.jsonl").write_text('{"prompt": "a cat", "sede": 2}\n')
    (tmp_path / "target.jsonl").write_text('{"prompt": "a cat", "target": "near"}\n')
    (tmp_path / "list.jsonl").write_text('["a cat"]\n')
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "no-pipeline").mkdir()
    (tmp_path / "other-pipeline").mkdir()
    (tmp_path / "other-pipeline" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline"}'
    )
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x04pickle")
    (tmp_path / "cut.safetensors").write_bytes((500).to_bytes(8, "little") + b'{"a": {"dtype"')
    (tmp_path / "nul.jsonl").write_text('{"prompt": "a\\u0000"}\n')
    (tmp_path / "list.json").write_text('[{"prompt": "a cat"}]')
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "foreign.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "garbage.safetensors").write_bytes(b"this is not a safetensors file at all")
    (tmp_path / "plain.png").write_bytes(b"no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "cat.png").mkdir()
    return tmp_path


QUICK = [
    (["a cat", "-b", "0"], "--budget '0' is out of range; it is the share"),
    (["a cat", "-b", "1.5"], "--budget '1.5' is out of range"),
    (["a cat", "-b", "-0.2"], "--budget '-0.2' is out of range"),
    (["a cat", "--budget", "nan"], "--budget 'nan' is not a finite number"),
    (["a cat", "--budget", "lots"], "--budget 'lots' is not a number; it is the share"),
    ([""], "PROMPT is empty; say what to draw"),
    (["   "], "PROMPT is empty"),
    ([], "no prompt given; try: edit generate"),
    (["a cat", "-m", "qwen-imag"], "unknown model 'qwen-imag'; did you mean qwen-image"),
    (["a cat", "-m", "./nowhere"], "model folder './nowhere' does not exist"),
    (
        ["a cat", "-m", "no-pipeline"],
        "it has neither model_index.json nor config.yaml",
    ),
    (["a cat", "-m", "other-pipeline"], "holds StableDiffusionPipeline, which `edit` cannot run"),
    (["a cat", "-m", "someone/unknown"], "'someone/unknown' is not in the local cache and the hub cannot be"),
    (["a cat", "--routers", "nowhere"], "--routers 'nowhere' does not exist; give a bundle folder"),
    (
        ["a cat", "--width", "100"],
        "--width 100 is not a multiple of 16, which this model needs; nearest: 96 and 112",
    ),
    (["a cat", "--height", "7"], "--height 7 is not a multiple of 16, which this model needs; nearest: 16"),
    (["a cat", "--width", "0"], "--width '0' is out of range; allowed are whole numbers from 1"),
    (["a cat", "--width", "wide"], "--width 'wide' is not a whole number"),
    (["a cat", "--steps", "0"], "--steps '0' is out of range; allowed are whole numbers from 1 to 1000"),
    (["a cat", "--steps", "2.5"], "--steps '2.5' is not a whole number"),
    (["a cat", "--guidance", "inf"], "--guidance 'inf' is not a finite number; allowed are 0 to 100"),
    (["a cat", "--seed", "-1"], "--seed '-1' is out of range; allowed are whole numbers from 0"),
    (["a cat", "--seed", "x"], "--seed 'x' is not a whole number"),
    (
        ["a cat", "--seed", "1", "2", "-n", "2"],
        "--seed 2 would be used twice; give distinct seeds, at least -n apart",
    ),
    (["a cat", "--seed=1", "1"], "--seed 1 would be used twice"),
    (["a \udce9 cat"], "holds characters that are not text; give it as UTF-8"),
    (["--prompts", "nul.jsonl"], "nul.jsonl line 1: prompt 'a\\x00' holds characters that are not text"),
    (["--prompts", "list.json"], "--prompts 'list.json' is a .json file; give one prompt a line (.txt)"),
    (["a cat", "-o", "x" * 260 + ".png"], "has 264 bytes; allowed are 240, shorten it"),
    (["a cat", "a cat compare", "--compare"], "--compare would write 'a-cat-compare.png' over another"),
    (["a cat", "-m", "garbage.safetensors"], "is not a complete safetensors file"),
    (["a cat", "-m", "old.ckpt"], "is not a .safetensors or .gguf file, and other formats are not loaded"),
    (["a cat", "-m", "foreign.safetensors"], "does not hold a Qwen-Image or FLUX.1 transformer"),
    (["a cat", "--base", "qwen-image"], "is for a single-file --model"),
    (["a cat", "-n", "0"], "--num-images '0' is out of range"),
    (["a cat", "--batch-size", "many"], "--batch-size 'many' is not a whole number"),
    (["a cat", "-o", "taken/cat.png"], "--output folder 'taken' is not a folder"),
    (["a cat", "-o", "/proc/cat.png"], "--output folder '/proc' is not writable"),
    (["a cat", "-o", "cat.bmp"], "has suffix '.bmp'; allowed are .png, .jpg, .jpeg, .webp"),
    (["a cat", "-o", "cat"], "has no suffix; allowed are .png"),
    (["a cat", "-o", "{prompt}-{size}.png"], "--output field {size} is unknown; allowed are {prompt} {seed}"),
    (["a cat", "-o", "{prompt.png"], "is not a valid template"),
    (
        ["a cat", "a cat", "-o", "{prompt}.png"],
        "would write two results to 'a-cat.png'; add {index} or {seed}",
    ),
    (["--prompts", "bad.jsonl"], "bad.jsonl line 3 is not complete JSON"),
    (["--prompts", "range.jsonl"], "range.jsonl line 2: budget 2 is out of range"),
    (["--prompts", "unknown.jsonl"], "unknown.jsonl line 1: sede is unknown; allowed are prompt"),
    (["--prompts", "list.jsonl"], "list.jsonl line 1: expected object, got array"),
    (["--prompts", "empty.txt"], "--prompts 'empty.txt' is empty; write one prompt a line"),
    (["--prompts", "latin.txt"], "--prompts 'latin.txt' is not UTF-8 text (byte 3); save it as UTF-8"),
    (["--prompts", "missing.txt"], "--prompts 'missing.txt' cannot be read: no such file"),
    (["--from", "missing.png"], "--from 'missing.png' does not exist"),
    (["--from", "plain.png"], "--from 'plain.png' is not a readable picture"),
    (["a cat", "--image", "missing.png"], "--image 'missing.png' is not a file"),
    (["a cat", "--image", "cut.jpg"], "--image 'cut.jpg' is not a readable picture"),
    (["a cat", "--image", "plain.png"], "--image 'plain.png' is not a readable picture"),
    (["a cat", "--strength", "0.5"], "--strength is for image-to-image; give --image"),
    (["a cat", "--solver", "heun"], "--solver 'heun' is unknown; allowed are euler, ab2, dpm++2m"),
    (["a cat", "--target", "near"], "--target 'near' is unknown; allowed are dense, exact"),
    (["--prompts", "target.jsonl"], "target.jsonl line 1: target 'near' is unknown; allowed are dense"),
    (["a cat", "--compare=near"], "--compare 'near' is unknown; allowed are dense, exact"),
    (["a cat", "--dtype", "int8"], "--dtype 'int8' is unknown; allowed are auto, fp32, bf16, fp16"),
    (
        ["a cat", "--offload", "disk"],
        "--offload 'disk' is unknown; allowed are none, model, sequential, group",
    ),
    (["a cat", "--device", "tpu"], "--device 'tpu' is unknown; allowed are auto, cuda"),
    (["a cat", "--lora", "missing.safetensors"], "--lora 'missing.safetensors' does not exist"),
    (["a cat", "--lora", "old.ckpt"], "--lora 'old.ckpt' is not a .safetensors file"),
    (["a cat", "--lora", "old.ckpt:much"], "scale 'much' is not a number"),
    (["a cat", "--sed", "1"], "--sed"),
    (["a cat", "--steps"], "--steps"),
]
"""Found before torch is imported. Cases that name no model use the random pipeline."""

NEEDS_TORCH = [
    (["a cat", "--device", "cuda"], "--device cuda is not available here; this machine has cpu"),
    (["a cat", "--routers", "old.ckpt"], "is not a .safetensors file, and other formats are not loaded"),
    (["a cat", "--routers", "cut.safetensors"], "cut.safetensors is truncated"),
    (["a cat", "--routers", "garbage.safetensors"], "is not a safetensors file"),
    (["a cat", "--routers", "no-pipeline"], "is not a bundle folder: bundle.json is missing"),
    (["a cat", "-m", "qwen-image", "-b", "0.6"], "'Qwen/Qwen-Image' is not in the local cache"),
    (["a cat", "--offload", "model"], "--offload model needs a GPU"),
]
"""Found before the model is loaded."""


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check_refused(edit, desk: Path, qwen_folder: Path, arguments: list[str], message: str) -> Ran:
    before = snapshot(desk)
    if "-m" not in arguments:
        arguments = [*arguments, "-m", str(qwen_folder)]
    ran = edit("generate", *arguments, cwd=desk)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert ran.said[0].startswith("error: ")
    assert len(ran.said) == 1, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert snapshot(desk) == before
    return ran


@pytest.mark.parametrize(("arguments", "message"), QUICK, ids=lambda case: " ".join(case)[:50])
def test_refused_before_importing_torch(edit_bare, desk, qwen_folder, arguments, message):
    assert not check_refused(edit_bare, desk, qwen_folder, arguments, message).imported


@pytest.mark.parametrize(("arguments", "message"), NEEDS_TORCH, ids=lambda case: " ".join(case)[:50])
def test_refused_before_loading_the_model(edit_here, desk, qwen_folder, arguments, message):
    check_refused(edit_here, desk, qwen_folder, arguments, message)


def test_routers_of_another_model_are_refused(edit_here, desk, qwen_folder, flux_folder):
    check_refused(
        edit_here,
        desk,
        qwen_folder,
        ["a cat", "--routers", str(flux_folder / "routers")],
        "this bundle was made for",
    )


def test_truncated_weights_are_refused(edit_here, desk, qwen_folder):
    broken = desk / "broken"
    shutil.copytree(qwen_folder, broken)
    weights = next((broken / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:20])
    check_refused(edit_here, desk, broken, ["a cat"], "is not a complete safetensors file")


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_traceback_only_on_request(desk, debug):
    """Through the console script, as it is installed."""
    command = [EDIT, "generate", "a cat", "-b", "2"]
    environment = edit_environment(EDIT_DEBUG=debug)
    ran = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == (1 if debug else 2)
    assert ("Traceback" in ran.stderr) == bool(debug)


@pytest.mark.slow
def test_out_of_memory_suggests_what_to_do(tmp_path, qwen_folder):
    import resource

    arguments = [
        "generate",
        "a cat",
        "-n",
        "60000",
        "--batch-size",
        "60000",
        "-m",
        str(qwen_folder),
        "-o",
        "x-{seed}.png",
    ]
    limit = 6 * 2**30

    done = subprocess.run(
        [str(EDIT), *arguments],
        cwd=tmp_path, env=edit_environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: out of memory at 64x64, batch 60000; try a smaller"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        type("OutOfMemoryError", (RuntimeError,), {})("x"),
    ],
)
def test_out_of_memory_is_recognised(error):
    assert errors.is_out_of_memory(error)
    assert not errors.is_out_of_memory(ValueError("out of memory"))
