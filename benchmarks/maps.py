"""The heatmaps of docs/profile.md: what the blocks of a model add, and where its budgets save.

python -m benchmarks.maps qwen-image-tiny                       # docs/images/maps-qwen-image-tiny-*.png
python -m benchmarks.maps hunyuan3d-tiny --images cat.png       # models that start from pictures
python -m benchmarks.maps --from FOLDER qwen-image-tiny         # draw again from an earlier run's --keep

Runs `edit profile --dense` and `edit profile --budget 0.5 0.7` on each model, and prints what profiling cost.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from edit_cli.files import write_files
from edit_cli.profile.heatmap import draw_heatmaps
from edit_cli.profile.terminal import limit_line, overhead_line
from edit_cli.profile.trace import read_trace

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BUDGETS = ("0.5", "0.7")
MAPS = {"redundancy": ("adds", "similarity", "cost"), "budgets": ("reuse",)}
"""Pictures per model, and the metrics drawn in each, one under the other."""


def profile(model: str, what: list[str], folder: Path) -> dict[str, Any]:
    """The trace of one `edit profile` run."""
    command = [sys.executable, "-m", "edit_cli.main", "profile", "-m", model, *what, "-o", str(folder), "-q"]
    subprocess.run(command, check=True)
    return read_trace(str(folder / "trace.json"))


def stacked(trace: Mapping[str, Any], metrics: tuple[str, ...]) -> bytes:
    """Maps under each other as one PNG."""
    drawn = [Image.open(io.BytesIO(draw_heatmaps(trace, metric).png())) for metric in metrics]
    size = max(picture.width for picture in drawn), sum(picture.height for picture in drawn)
    whole, y = Image.new("RGB", size, "white"), 0
    for picture in drawn:
        whole.paste(picture, (0, y))
        y += picture.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="for image-to-mesh models")
    parser.add_argument("--target", type=Path, default=IMAGES, help="folder of the PNGs")
    parser.add_argument("--keep", type=Path, help="folder for the reports, else they are dropped")
    parser.add_argument("--from", dest="source", type=Path, help="draw from reports kept earlier")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for model in asked.models:
            pictures = ["--images", *asked.images] if asked.images else []
            options = {
                "redundancy": ["--dense", *pictures],
                "budgets": [*(pictures or ["a cat"]), "--budget", *BUDGETS],
            }
            for name, metrics in MAPS.items():
                folder = (asked.source or asked.keep or Path(scratch)) / f"{model}-{name}"
                if asked.source:
                    trace = read_trace(str(folder / "trace.json"))
                else:
                    trace = profile(model, options[name], folder)
                target = asked.target / f"maps-{model}-{name}.png"
                data = stacked(trace, metrics)
                write_files({target: data})
                print(f"{target.name}: {len(data) / 1000:.0f} kB; {limit_line(trace)}")
                print(f"  profiling: {overhead_line(trace)}")


if __name__ == "__main__":
    main()
