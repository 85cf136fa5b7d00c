"""The README's picture: the same prompts and seeds at falling budgets, one row per prompt.

python -m benchmarks.strip                 # writes docs/images/budget-strip.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from backbones import registry
from backbones.loading import load
from backbones.spec import Backbone, Placement
from backbones.workloads import PipelineWorkload
from routers.attachment import attach

BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.35)
PROMPTS = ("a cat", "a rocket", "a pizza")
TARGET = Path(__file__).parents[1] / "docs" / "images" / "budget-strip.png"
MARGIN, LABEL = 8, 22  # px


def draw(backbone: Backbone, prompts: list[str], seed: int) -> dict[float, list[Image.Image]]:
    """Pictures of all prompts at every budget."""
    pipe = load(backbone, Placement())
    base = backbone.defaults
    workload = PipelineWorkload(
        pipe, backbone, len(prompts), base.steps, base.guidance, prompts, base.width, base.height, seed=seed
    )
    pictures = {}
    for budget in BUDGETS:
        elastic = attach(pipe, backbone.bundle, budget=budget)
        with elastic.scope(samples=len(prompts)) as trace:
            pictures[budget] = workload.run(0, output_type="pil")
        elastic.detach()
        print(f"budget {budget:g}: spent {', '.join(f'{spent:.3f}' for spent in trace.spent)}")
    return pictures


def sheet(pictures: dict[float, list[Any]]) -> Image.Image:
    """Columns of budgets, labelled, over rows of prompts."""
    columns = list(pictures.values())
    width, height = columns[0][0].size
    whole = Image.new(
        "RGB",
        (MARGIN + len(columns) * (width + MARGIN), LABEL + len(columns[0]) * (height + MARGIN)),
        "white",
    )
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for x, (budget, column) in enumerate(pictures.items()):
        left = MARGIN + x * (width + MARGIN)
        pen.text((left + width / 2, LABEL / 2), f"{budget:g}", "black", font, anchor="mm")
        for y, picture in enumerate(column):
            whole.paste(picture, (left, LABEL + y * (height + MARGIN)))
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Draw and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strip")
    parser.add_argument("--model", help="registry name or model folder, default qwen-image-tiny")
    parser.add_argument("--prompt", action="append", help="a row of the picture (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    pictures = draw(registry.resolve(options.model), options.prompt or list(PROMPTS), options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(options.output, optimize=True)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
