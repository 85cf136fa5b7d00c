"""Processes that share one command: identical files, each made once, one report; and a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = ["a cat", "a dog", "a red car", "a house", "two apples", "a tree"]
WITNESS = """
import os, runpy
from routers.calibrate.state import State

own = State.keep

def keep(state, name, tensors):
    with open("made.txt", "a") as file:
        file.write(f"{os.environ['RANK']} {name}\\n")
    own(state, name, tensors)

State.keep = keep
runpy.run_module("edit_cli", run_name="__main__", alter_sys=True)
"""
"""The command, noting which process makes which part of a calibration."""
COMMAND = ("generate", "--prompts", "prompts.txt", "--budget", "0.3", "--batch-size", "2")


def start(
    folder: Path, processes: int, *arguments: str, command: tuple[str, ...] = COMMAND,
    program: tuple[str, ...] = ("-m", "edit_cli"),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    launcher = [sys.executable, *program]
    if processes > 1:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *program,
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command, *arguments], cwd=folder, env=environment, text=True, capture_output=True
    )


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


@pytest.mark.slow
def test_two_processes_make_what_one_makes_and_a_restart_makes_the_rest(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    alone = start(tmp_path, 1, "-o", "one/")
    assert alone.returncode == 0, alone.stderr
    shared = start(tmp_path, 2, "-o", "two/", "--json")
    assert shared.returncode == 0, shared.stderr
    (line,) = shared.stdout.splitlines()  # one report for both
    report = json.loads(line)
    assert len(report["outputs"]) == len(report["spent"]) == len(PROMPTS)
    assert files(tmp_path / "two") == files(tmp_path / "one") and len(files(tmp_path / "one")) == len(PROMPTS)

    lost = sorted((tmp_path / "two").glob("*.png"))[:3]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "two").glob("*.png") if file not in lost}
    for file in lost:
        file.unlink()
    again = start(tmp_path, 2, "-o", "two/", "--json", "--resume", "--batch-size", "1")
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["outputs"]) == len(lost)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert set(files(tmp_path / "two")) == set(files(tmp_path / "one"))
    nothing = start(tmp_path, 2, "-o", "two/", "--json", "--resume", "--batch-size", "1")
    assert nothing.returncode == 0, nothing.stderr


@pytest.mark.slow
def test_two_processes_fit_the_bundle_that_one_fits(tmp_path: Path) -> None:
    command = ("calibrate", "-m", "flux-tiny", "--steps", "6", "--samples", "1", "--json")
    made = {}
    (tmp_path / "witness.py").write_text(WITNESS)
    for name, processes, program in (("one", 1, ("-m", "edit_cli")), ("two", 2, ("witness.py",))):
        ran = start(tmp_path, processes, "-o", name, command=command, program=program)
        assert ran.returncode == 0, ran.stderr
        (line,) = ran.stdout.splitlines()  # one report for both
        told = json.loads((tmp_path / name / "bundle.json").read_text())
        made[name] = json.loads(line)["recommended_budget"], told["sha256"], told["times"]
    assert made["one"] == made["two"]
    assert not list(tmp_path.glob(".*calibrate-state"))
    parts = [line.split() for line in (tmp_path / "made.txt").read_text().splitlines()]
    assert len({part for _, part in parts}) == len(parts), "a part was made twice"
    plans = {
        rank: {part for by, part in parts if by == rank and part.startswith("plan-dense-")} for rank in "01"
    }
    assert plans["0"] and plans["1"], plans
    assert {part for by, part in parts if by == "1"} == plans["1"], "the rest is the first process's alone"
