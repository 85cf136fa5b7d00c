"""Twelve commands whose pictures, meshes and records must not change when the code is rearranged.

`python -m tests.cli.same_pictures` makes the reference file anew; do that only where a result is meant to
change, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image

REFERENCE = Path(__file__).with_name("same_pictures.json")
LINES = '{"prompt": "a fish", "seed": 4, "budget": 0.5}\n{"prompt": "a tree", "steps": 8}\n'
COMMANDS = (
    'generate|a cat|--budget|0.6|-o|cat.png',
    'generate|a cat|a red car|-n|2|--budget|0.5|--batch-size|4|-o|{prompt}-{seed}.png',
    'generate|a dog|-b|0.45|--solver|ab2|--seed|3|-o|dog.png',
    'generate|a house|--steps|12|--guidance|1|-b|0.7|-o|house.webp',
    'generate|a red car|-m|flux-tiny|-b|0.4|-o|car.png',
    'generate|a cup|--image|cat.png|--strength|0.6|-b|0.6|-o|cup.png',
    'generate|--from|cat.png|-b|0.8|-o|more.png',
    'generate|--prompts|lines.jsonl|-o|{prompt}.jpg',
    'generate|an apple|-m|flux-tiny|--steps|8|-b|0.5|--compare|-o|apple.png',
    'generate|a moon|--routers|none|--width|96|-o|moon.png',
    'generate-3d|cat.png|-b|0.5|--octree-resolution|48|-o|cat.glb',
    'generate-3d|--from|cat.glb|--seed|2|--faces|400|--steps|12|-o|second.glb',
)  # fmt: skip
VOLATILE = (
    "versions", "image", "images", "image_hash", "image_hashes", "threads", "routers_hash", "seconds",
)  # fmt: skip
"""Record entries that say where and with which versions a file was made, as a start picture's own does, which
is part of the file that is hashed."""
SUMS = ("spent", "flops", "evaluations")
"""Entries of --json that say what was computed."""
THUMBNAIL = 12


def run_all(folder: Path) -> dict[str, Any]:
    """Run the commands in a folder, with one thread. Returns what each wrote, by file name."""
    from edit_cli.main import main

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with chdir(folder):
        Path("lines.jsonl").write_text(LINES)
        for line in COMMANDS:
            before, out = set(Path().iterdir()), StringIO()
            try:
                with redirect_stdout(out):
                    main([*line.split("|"), "--json", "--quiet"])
            except SystemExit as done:
                if done.code != 0:
                    raise RuntimeError(f"{line}: exit code {done.code}") from done
            report = json.loads(out.getvalue().splitlines()[-1])
            files = sorted(set(Path().iterdir()) - before)
            results[line] = {
                "report": {name: report[name] for name in SUMS},
                "files": {file.name: describe(file) for file in files},
            }
    return results


def describe(file: Path) -> dict[str, Any]:
    """A result's hash, its record, and a coarse view that survives the last bits of another processor."""
    if file.suffix == ".glb":
        mesh = trimesh.load(file, force="mesh", process=False)
        data = np.ascontiguousarray(mesh.vertices).tobytes() + np.ascontiguousarray(mesh.faces).tobytes()
        coarse = (np.asarray(mesh.bounds) * 100).round().ravel().tolist()  # percent of the box
        header = file.read_bytes()
        (length,) = struct.unpack("<I", header[12:16])
        record = json.loads(header[20 : 20 + length])["asset"]["extras"]["edit"]
    else:
        from edit_cli.generation.record import read_picture

        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        data = picture.tobytes()
        coarse = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).ravel().tolist()
        record = {} if "compare" in file.name else read_picture(file)
    kept = {name: value for name, value in record.items() if name not in VOLATILE}
    return {"sha256": hashlib.sha256(data).hexdigest(), "coarse": coarse, "record": kept}


def machine() -> str:
    """What decides the last bits of a result."""
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    """Write the reference file."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(Path(folder))
    REFERENCE.write_text(json.dumps({"machine": machine(), "results": results}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    sys.exit(main())
