"""Two processes that draw under one name, again and again; and many pictures in one process.

python -m tests.reliability.many --times 20 --pictures 300
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import psutil

from tests.conftest import edit_environment
from tests.fresh import TORCH, Server

SETTLED = 20
"""Pictures after which memory has to be flat."""
GROWTH = 0.02
"""Of resident memory after that, at most: allocators breathe."""


def shared_name(model: Path, folder: Path, times: int) -> int:
    """Files that two processes at a time leave, both drawing "a cat" into one folder."""
    servers = [Server(edit_environment(), TORCH) for _ in range(2)]
    words = ("generate", "a cat", "--steps", "1", "-o", "out/", "-q", "-m", str(model))
    for _ in range(times):
        running = [server.start(*words, cwd=folder) for server in servers]
        for each in running:
            ran = each.wait()
            assert ran.code == 0, ran.err
    for server in servers:
        server.close()
    return len(list((folder / "out").iterdir()))


def memory(model: Path, pictures: int) -> list[int]:
    """Resident bytes after each of so many pictures made in this process."""
    import edit_cli

    process, sizes = psutil.Process(), []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(pictures):
            edit_cli.generate("a cat", model=str(model), steps=1, seed=seed).save(f"{name}/{seed}.png")
            sizes.append(process.memory_info().rss)
    return sizes


def main() -> None:
    """The command."""
    from tests.tiny_pipelines import make_qwen_image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=300)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        model = make_qwen_image(Path(name) / "model")
        files = shared_name(model, Path(name), given.times)
        sizes = memory(model, given.pictures)
    settled, last = sizes[min(SETTLED, len(sizes) - 1)], sizes[-1]
    found = {"files": files, "expected": 2 * given.times, "mib": [settled >> 20, last >> 20]}
    print(json.dumps(found))
    assert files == 2 * given.times and last <= settled * (1 + GROWTH)


if __name__ == "__main__":
    main()
