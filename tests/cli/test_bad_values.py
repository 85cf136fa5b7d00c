"""Values that no option takes, over all commands: one line that begins with the option and the value."""

from __future__ import annotations

from pathlib import Path

import pytest

from edit_cli.commands.app import COMMANDS

WORDS = {
    "generate": ("a cat",),
    "generate-3d": (),
    "profile": ("a cat",),
    "calibrate": ("-o", "b"),
    "export": ("bundle", "-o", "out"),
}
"""What stands before the option."""
COUNT = ("0", "-1", "2.5", "many", "nan", "1e3", "")
BAD = {
    "--steps": ("0", "-1", "1001", "2.5", "many", "inf", ""),
    "--guidance": ("-1", "101", "nan", "inf", "strong", ""),
    "--budget": ("0", "-0.5", "1.5", "nan", "inf", "half", ""),
    "--seed": ("-1", "1.5", "nan", "x", str(2**63)),
    "--width": (*COUNT, "100000"),
    "--height": (*COUNT, "100000"),
    "--strength": ("0", "1.5", "nan", "x", ""),
    "--frames": COUNT,
    "--fps": ("0", "241", "nan", "x"),
    "--seconds": ("0", "3601", "nan", "x"),
    "--num-images": COUNT,
    "--num-meshes": COUNT,
    "--batch-size": COUNT,
    "--samples": COUNT,
    "--repeats": COUNT,
    "--cache-limit": COUNT,
    "--tries": ("0", "7", "x"),
    "--octree-resolution": ("7", "1025", "x", "12.5"),
    "--faces": ("3", "x", "1e6"),
    "--train-steps": ("0", "x", "1.5"),
    "--learning-rate": ("0", "2", "nan", "x"),
    "--lora-rank": ("0", "1025", "x"),
    "--text-tokens": COUNT,
    "--shard-size": ("0GB", "5", "big", "5gb", ""),
    "--budgets": ("0", "nan", "0.8:0.2", "0.2:0.8:1", "a:b", ""),
    "--dtype": ("int8", "float", ""),
    "--device": ("tpu", "cuda:x", ""),
    "--offload": ("disk", ""),
    "--solver": ("heun", ""),
    "--target": ("near", ""),
    "--format": ("bmp", ""),
    "--method": ("guess", ""),
    "--train": ("all", ""),
    "--mixed-precision": ("fp8", ""),
    "--decode": ("sparse", ""),
    "--remove-background": ("maybe", ""),
    "--views": ("top", ""),
    "--image": ("nowhere.png",),
    "--mask": ("nowhere.png",),
    "--lora": ("nowhere.safetensors",),
}
ROWS = [
    (command, option, value)
    for command, words in WORDS.items()
    for option, values in BAD.items()
    if option in COMMANDS[command].spelled
    for value in values
]


def test_there_are_many() -> None:
    assert len(ROWS) >= 250


@pytest.mark.parametrize("command", WORDS)
def test_bad_values_are_one_line(command: str, edit_here, tmp_path: Path) -> None:
    wrong = []
    for _, option, value in (row for row in ROWS if row[0] == command):
        ran = edit_here(command, *WORDS[command], f"{option}={value}", cwd=tmp_path)
        one_line = len(ran.err.splitlines()) == 1 and ran.err.startswith(f"error: {option} {value!r} ")
        if ran.code != 2 or ran.out or not one_line:
            wrong.append((option, value, ran.code, ran.err))
    assert wrong == []
    assert list(tmp_path.iterdir()) == [], "nothing is written"
