"""`edit calibrate --method train` as it is typed: bad input, a bundle that works, a kill, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import EDIT, edit_environment
from tests.fresh import TIMEOUT

PICTURES, MESHES = "{pictures}", "{meshes}"  # stand for the random models' folders
TRAIN = ["-o", "b", "--method", "train"]
SHORT = [*TRAIN, "--samples", "4", "--batch-size", "2", "--budgets", "0.6:1:2"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Tests share a process, trainings do not."""
    AcceleratorState._reset_state(True)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    for name in ("silent", "empty", "blank", "damaged", "good"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "silent" / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "blank" / "a.png")
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    (tmp_path / "damaged" / "a.txt").write_text("a cat")
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (80, 64), colour).save(tmp_path / "good" / f"{name}.png")
        (tmp_path / "good" / f"{name}.txt").write_text(f"a {colour} car\n")
    (tmp_path / "p.txt").write_text("a cat\n")
    return tmp_path


BAD = [
    (["-o", "b", "--method", "learn"], "--method 'learn' is unknown; allowed are fit, train"),
    (["-o", "b", "--train", "lora"], "--train is for --method train; add that, or leave --train out"),
    (["-o", "b", "--train-steps", "5"], "--train-steps is for --method train"),
    (["-o", "b", "--gradient-checkpointing"], "--gradient-checkpointing is for --method train"),
    (["-o", "b", "--data", "good"], "--data is for --method train"),
    ([*TRAIN, "--train", "all"], "--train 'all' is unknown; allowed are routers, lora, full"),
    ([*TRAIN, "--train-steps", "0"], "--train-steps '0' is out of range; allowed are whole numbers from 1"),
    ([*TRAIN, "--train-steps", "many"], "--train-steps 'many' is not a whole number"),
    ([*TRAIN, "--learning-rate", "0"], "--learning-rate '0' is out of range; allowed are 0 < rate <= 1"),
    ([*TRAIN, "--learning-rate", "nan"], "--learning-rate 'nan' is not a finite number"),
    ([*TRAIN, "--lora-rank", "4"], "--lora-rank is for --train lora; add that, or leave --lora-rank out"),
    ([*TRAIN, "--train", "lora", "--lora-rank", "0"], "--lora-rank '0' is out of range"),
    ([*TRAIN, "--mixed-precision", "fp16"], "--mixed-precision 'fp16' is unknown; allowed are no, bf16"),
    ([*TRAIN, "--data", "good", "--prompts", "p.txt"], "--data brings its own prompts; leave --prompts and"),
    ([*TRAIN, "-m", MESHES, "--data", "good"], "--data is for models that make pictures and"),
    ([*TRAIN, "-m", PICTURES, "--data", "gone"], "--data 'gone' does not exist; give a folder of pictures"),
    ([*TRAIN, "-m", PICTURES, "--data", "p.txt"], "--data 'p.txt' is not a folder"),
    ([*TRAIN, "-m", PICTURES, "--data", "empty"], "--data 'empty' does not hold pictures; put .png"),
    (
        [*TRAIN, "-m", PICTURES, "--data", "silent"],
        "a.png' has no readable a.txt beside it; write its prompt",
    ),
    ([*TRAIN, "-m", PICTURES, "--data", "blank"], "a.txt' is empty; write the picture's prompt there"),
    ([*TRAIN, "-m", PICTURES, "--data", "damaged"], "a.png' is not a readable picture"),
    ([*TRAIN, "--budgets", "1"], "--budgets must start below 1 for --method train"),
    (["--evaluate", "b", "--method", "train"], "--method train makes a bundle and --evaluate makes none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(edit_here, desk, qwen_folder, mesh_folder, arguments, message) -> None:
    folders = {PICTURES: qwen_folder, MESHES: mesh_folder}
    before = sorted(desk.rglob("*"))
    ran = edit_here("calibrate", *(folders.get(a, a) for a in arguments), cwd=desk)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert message in ran.err and ran.err.count("\n") == 1
    assert sorted(desk.rglob("*")) == before


@pytest.mark.slow
def test_train_then_generate(edit_here, desk, qwen_folder) -> None:
    """On pictures, with a LoRA: everything that can be switched on."""
    ran = edit_here(
        "calibrate", "-m", qwen_folder, *SHORT, "--train-steps", "3", "--train", "lora", "--lora-rank", "2",
        "--mixed-precision", "bf16", "--gradient-checkpointing", "--data", "good", "--json", cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert [row["budget"] for row in ran.json["quality"]] == [0.6, 1.0]
    assert sorted(file.name for file in (desk / "b").iterdir() if file.suffix != ".png") == [
        "backbone.safetensors", "bundle.json", "routers.safetensors",
    ]  # fmt: skip
    described = json.loads((desk / "b" / "bundle.json").read_text())
    made = described["metadata"]
    assert (made["method"], made["data"], made["processes"]) == ("train", 4, 1)
    assert made["training"]["train"] == "lora" and made["training"]["precision"] == "bf16"
    assert made["loss"]["denoising"] > 0 and described["backbone"]["rank"] == 2
    assert not list(desk.glob(".b.*")), "no state is left"
    assert logged(desk / "b.logs", "loss/denoising") == [1, 2, 3]
    ran = edit_here(
        "generate", "a cat", "-m", qwen_folder, "--routers", "b", "--budget", "0.8", "-o", "c.png", "--json",
        cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert (desk / "c.png").is_file()


def logged(folder: Path, name: str) -> list[int]:
    """Steps of a scalar, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(edit_here, desk, qwen_folder) -> None:
    ran = edit_here("calibrate", "-m", qwen_folder, *SHORT[2:], "-o", "/proc/b", cwd=desk)
    assert ran.code == 2 and "--output '/proc/b' cannot be written" in ran.err


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_in_one_go(edit, desk, qwen_folder) -> None:
    steps = ["--train-steps", "120"]
    whole = edit("calibrate", "-m", qwen_folder, *SHORT, *steps, "--quiet", cwd=desk)
    assert whole.code == 0, whole.err
    kept = desk / ".c.calibrate-state" / "train.safetensors"
    command = [*SHORT, *steps, "-o", "c", "--quiet"]
    running = edit.start("calibrate", "-m", qwen_folder, *command, cwd=desk)
    end = time.monotonic() + TIMEOUT
    while not kept.exists():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL and not (desk / "c").exists()
    ran = edit("calibrate", "-m", qwen_folder, *command, "--resume", cwd=desk)
    assert ran.code == 0, ran.err
    one, two = (load_file(desk / name / "routers.safetensors") for name in ("b", "c"))
    assert one.keys() == two.keys() and all(bool((one[key] == two[key]).all()) for key in one)
    again = edit(
        "calibrate", "-m", qwen_folder, *command, "--train", "lora", "--resume", "--overwrite", cwd=desk
    )
    assert again.code == 0 and "nothing to resume" in again.err


@pytest.mark.slow
def test_two_processes_share_the_work(desk, qwen_folder) -> None:
    """`--multi_gpu` starts the processes, `--device cpu` makes them talk through gloo."""
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(EDIT),
    ]  # fmt: skip
    arguments = ["calibrate", "-m", str(qwen_folder), *SHORT, "--train-steps", "3", "--json"]
    arguments += ["--device", "cpu"]
    done = subprocess.run(
        [*launch, *arguments], cwd=desk, env=edit_environment(PYTHONPATH=os.getcwd()),
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1, (
        "one of them reports"
    )
    described = json.loads((desk / "b" / "bundle.json").read_text())
    assert described["metadata"]["processes"] == 2
