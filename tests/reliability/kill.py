"""Runs that are killed: no half file, no lost picture, and a resumed run ends as one in one go.

python -m tests.reliability.kill --count 50

`generate`, `calibrate`, `export` and `profile` on a tiny random model, killed by SIGKILL at random moments,
and between any two renames: a fork of the command kills itself before its k-th rename. Afterwards every file
that is not hidden has to be whole, and the same command, resumed, has to leave what an uninterrupted run
leaves, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from routers.bundle import load_bundle
from tests.conftest import edit_environment
from tests.fresh import TORCH, Server

COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "a cat", "-n", "8", "--batch-size", "1", "--steps", "6", "-o", "out/", "-q"),
    "calibrate": ("calibrate", "-o", "out", "--budgets", "0.5:1:2", "--samples", "1", "--steps", "4", "-q"),
    "export": ("export", "bundle", "-o", "out", "-q"),
    "profile": ("profile", "a cat", "-b", "0.5", "--repeats", "1", "--steps", "2", "-o", "out", "-q"),
}
AGAIN = {"generate": ("--resume",), "calibrate": ("--resume",), "export": (), "profile": ()}
RENAMES = {"generate": 8, "calibrate": 8, "export": 1, "profile": 1}
"""At most so many renames are tried."""


def content(folder: Path) -> dict[str, object]:
    """What is in a folder, without what differs from run to run: times, and what is made of them."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if path.suffix == ".png" and not path.name.startswith((".", "heatmap", "quality")):
            with Image.open(path) as picture:
                found[name] = picture.tobytes()
        elif path.name == "routers.safetensors":
            found[name] = path.read_bytes()
        else:
            found[name] = path.stat().st_size > 0
    return found


def whole(folder: Path) -> list[str]:
    """What is wrong with the files that are not hidden."""
    wrong = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_dir() or any(part.startswith(".") for part in parts):
            continue
        try:
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "routers.safetensors":
                load_bundle(path.parent)
        except Exception as error:  # whatever a half file raises
            wrong.append(f"{'/'.join(parts)}: {error}")
    return wrong


def run(
    command: str, model: Path, server: Server, after: float, at_rename: int, expected: dict[str, object]
) -> list[str]:
    """Kill a command after so many seconds or before that rename, look, go on, and compare; what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        desk = prepare(Path(name), model)
        words = (*COMMANDS[command], *(() if command == "export" else ("-m", str(model))))
        running = server.start(*words, cwd=desk, **({"KILL_AT": str(at_rename)} if at_rename else {}))
        if not at_rename:
            time.sleep(after)
            if running.poll() is None:
                running.send_signal(signal.SIGKILL)
        ended = running.wait().code == -signal.SIGKILL
        wrong = whole(desk)
        kept = {p: p.stat().st_mtime_ns for p in desk.glob("out/*.png")} if command == "generate" else {}
        again = AGAIN[command] if ended else ("--overwrite",) if command != "generate" else ("--resume",)
        ran = server(*words, *again, cwd=desk)
        if ran.code:
            return [*wrong, f"resumed: {ran.err.strip()}"]
        wrong += [f"{p.name} was made again" for p, when in kept.items() if p.stat().st_mtime_ns != when]
        left = content(desk)
        wrong += [f"{n} is left over" for n in left.keys() - expected.keys()]
        wrong += [f"{n} is missing" for n in expected.keys() - left.keys()]
        return wrong + [f"{n} differs" for n in left.keys() & expected.keys() if left[n] != expected[n]]


def prepare(desk: Path, model: Path) -> Path:
    """A working folder with a bundle to export."""
    shutil.copytree(model / "routers", desk / "bundle")
    return desk


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failures = attempts(given.count, given.seed)
    print(*failures, sep="\n", file=sys.stderr)
    print(json.dumps({"kills": given.count, "failures": len(failures)}))
    sys.exit(bool(failures))


def attempts(count: int, seed: int) -> list[str]:
    """So many kills over all commands, every other one before a rename; what went wrong."""
    from backbones import qwen_image
    from tests.tiny_pipelines import make_bundle, make_qwen_image

    rng, failures = random.Random(seed), []
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        model = make_qwen_image(Path(name) / "model")
        make_bundle(model / "routers", model, qwen_image.TRANSFORMER)
        server = Server(edit_environment(), (*TORCH, "tests.reliability.renames"))
        references: dict[str, tuple[dict[str, object], float]] = {}
        for i in range(count):
            command = list(COMMANDS)[i // 2 % len(COMMANDS)]
            if command not in references:
                desk = prepare(Path(name) / command, model)
                words = (*COMMANDS[command], *(() if command == "export" else ("-m", str(model))))
                begun = time.monotonic()
                ran = server(*words, cwd=desk)
                assert ran.code == 0, ran.err
                references[command] = content(desk), time.monotonic() - begun
            expected, took = references[command]
            at_rename = rng.randint(1, RENAMES[command]) if i % 2 else 0
            wrong = run(command, model, server, rng.uniform(0, took), at_rename, expected)
            how = f"before rename {at_rename}" if at_rename else "at random"
            failures += [f"{command} killed {how}: {each}" for each in wrong]
        server.close()
    return failures


if __name__ == "__main__":
    main()
