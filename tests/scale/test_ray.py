"""`edit generate --engine ray` on a local Ray: the files of a single process, also when an actor is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPTS = ["a cat", "a dog", "a red car", "a house", "two apples", "a tree"]
COMMAND = ("generate", "--prompts", "prompts.txt", "--budget", "0.3", "--batch-size", "1", "-q")
ON_RAY = ("-o", "ray/", "--engine", "ray", "--workers", "2")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "edit_cli", *COMMAND, *arguments],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and in `one/` what a single process draws of them."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "one").mkdir()
    alone = start(folder, "-o", "one/")
    assert alone.wait() == 0, alone.communicate()[1]
    return folder


def title(process: Path) -> str:
    """What a process calls itself, "" once it has ended."""
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def artists() -> set[int]:
    """Process ids of Ray's actors that hold a session."""
    processes = Path("/proc").glob("[0-9]*")
    return {int(process.name) for process in processes if "MapWorker" in title(process)}


def check_same(folder: Path) -> None:
    expected = {file.name: file.read_bytes() for file in (folder / "one").iterdir()}
    assert len(expected) == len(PROMPTS)
    assert {file.name: file.read_bytes() for file in (folder / "ray").iterdir()} == expected


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds actors by /proc")
def test_an_actor_that_is_killed_loses_nothing(folder: Path) -> None:
    (folder / "ray").mkdir()
    run = start(folder, *ON_RAY)
    while run.poll() is None and not list((folder / "ray").glob("*.png")):
        time.sleep(0.05)
    victims = artists()
    assert run.poll() is None and victims
    os.kill(min(victims), signal.SIGKILL)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    check_same(folder)


def test_what_ray_cannot_do_is_refused(edit_here, tmp_path: Path) -> None:
    ran = edit_here("generate", "a cat", "--engine", "ray", "--compare", cwd=tmp_path)
    assert ran.code == 2 and ran.said[0].startswith("error: --engine ray neither compares nor replays")
    ran = edit_here("generate", "--prompts", "-", "--engine", "ray", cwd=tmp_path, stdin="a cat\n")
    assert ran.code == 2 and ran.said[0].startswith("error: --prompts - is read by one process only")
    assert not list(tmp_path.iterdir())
