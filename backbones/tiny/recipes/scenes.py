"""Step `scenes`: pictures of several things, and single things at other sizes, composed by code.

    python -m backbones.tiny.recipes.scenes [--data runs/data]

Two things side by side or above each other, two to five of one thing, coloured pairs, and things whose parts
have colours ("a blue house with a red roof"), all from the pictures of step `data`, each thing drawn at its
own size so that it stays sharp. Writes DATA/scenes/WxH.npy (N, H, W, 3) uint8 for each size and
DATA/scenes.json: per size one list of captions per picture.
"""

import argparse
import json
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.tiny.recipes.art import Art, check_versions, render
from backbones.tiny.recipes.concepts import COLOURS, STYLES, load_concepts
from backbones.tiny.recipes.data import dominant_mask, recolour
from backbones.tiny.recipes.drawings import LOOKS, drawing_svg
from backbones.tiny.recipes.scene_plan import Planner, Scene


class Composer:
    """Renders scenes; one per process."""

    def __init__(self, packages: Path):
        self.art, self.concepts = Art(packages), load_concepts()
        self.svgs = cache(lambda concept: self.art.pictures(self.concepts[concept]))

    def icon(self, concept: int, style: int, colour: str | None, side: int) -> np.ndarray | None:
        """RGBA picture, or None when the style lacks it or the colour cannot be applied."""
        svg = self.svgs(concept).get(style)
        if svg is None:
            return None
        icon = render(svg, side)
        if colour is None:
            return icon
        mask = dominant_mask(icon)
        return None if mask is None else recolour(icon, mask, COLOURS[colour])

    def picture(self, scene: Scene) -> np.ndarray | None:
        """(H, W, 3) uint8 on white, or None when one of the things cannot be drawn."""
        canvas = Image.new("RGBA", scene.size, (255, 255, 255, 255))
        if scene.parts:
            name, colours = scene.parts
            svg = drawing_svg(name, LOOKS[scene.style], dict(colours))
            canvas.alpha_composite(Image.fromarray(render(svg, 116)), (6, 6))
        for thing in scene.things:
            left, top, side = thing.box
            icon = self.icon(thing.concept, scene.style, thing.colour, side)
            if icon is None:
                return None
            height, width = icon.shape[:2]
            canvas.alpha_composite(
                Image.fromarray(icon), (left + (side - width) // 2, top + (side - height) // 2)
            )
        return np.asarray(canvas.convert("RGB"))


def compose(job: tuple[Path, list[Scene]]) -> list[tuple[Scene, np.ndarray]]:
    """Render some scenes, in a worker process; those that cannot be drawn are left out."""
    packages, scenes = job
    composer = _composer(packages)
    pictures = [(scene, composer.picture(scene)) for scene in scenes]
    return [(scene, picture) for scene, picture in pictures if picture is not None]


@cache
def _composer(packages: Path) -> Composer:
    return Composer(packages)


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, help="a node_modules folder; default: the one under --data")
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the scenes to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    packages, started = args.packages or args.data / "node_modules", time.time()
    check_versions(packages)
    scenes = list(Planner(load_concepts(), args.seed).plan(args.scale))
    jobs = [(packages, scenes[start : start + 100]) for start in range(0, len(scenes), 100)]
    pictures, texts = defaultdict(list), defaultdict(list)
    with ProcessPoolExecutor(args.workers) as pool:
        for done, batch in enumerate(pool.map(compose, jobs), 1):
            for scene, picture in batch:
                key = f"{scene.size[0]}x{scene.size[1]}"
                pictures[key].append(picture)
                texts[key].append(list(scene.texts))
            if done % 20 == 0:
                print(f"scenes: {done}/{len(jobs)} batches, {time.time() - started:.0f} s", flush=True)
    (args.data / "scenes").mkdir(parents=True, exist_ok=True)
    for key, some in pictures.items():
        np.save(args.data / "scenes" / f"{key}.npy", np.stack(some))
    (args.data / "scenes.json").write_text(json.dumps({"styles": list(STYLES), "captions": texts}))
    counts = ", ".join(f"{len(some)} of {key}" for key, some in sorted(pictures.items()))
    print(f"scenes: {counts} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
