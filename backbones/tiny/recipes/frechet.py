"""How far the generated pictures as a whole are from the real ones: the Fréchet distance of the
classifier's features.

    python -m backbones.tiny.recipes.frechet [--folder FOLDER] [--count 1000]

Both sides show the same concepts, drawn at random: the real original art of step `data`, and what the
pipeline makes of "a cat" at its defaults. Half of the real pictures against the other half is printed too: no
model can do better.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.linalg import sqrtm

from backbones.tiny.recipes.captions import with_article
from backbones.tiny.recipes.evaluate import PACKAGED, call_options, generate
from backbones.tiny.recipes.vae import load_pictures
from benchmarks.classifier import Classifier, load_classifier, to_input


@torch.no_grad()
def features(classifier: Classifier, pictures: np.ndarray, batch: int = 100) -> np.ndarray:
    """What the classifier's last layer sees (N, D) of pictures (N, H, W, 3) uint8."""
    parts = []
    for start in range(0, len(pictures), batch):
        maps = classifier.blocks(to_input(list(pictures[start : start + batch])))
        parts.append((maps.amax((2, 3)) + maps.mean((2, 3))).numpy())
    return np.concatenate(parts).astype(np.float64)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017)."""
    means = first.mean(0) - second.mean(0)
    covariances = [np.cov(part, rowvar=False) for part in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(means @ means + np.trace(covariances[0] + covariances[1] - 2 * root))


def main() -> None:
    """Parse the command line, generate, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=PACKAGED)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="default: the folder's")
    parser.add_argument("--guidance", type=float, help="default: the folder's")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures, index = load_pictures(args.data)
    plain = [number for number, row in enumerate(index["rows"]) if row[2] is None]
    chosen = random.Random(args.seed).choices(plain, k=args.count)
    nouns = [index["concepts"][index["rows"][number][0]]["name"] for number in chosen]
    pipe = DiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = call_options(pipe, args.folder, args.steps, args.guidance)
    made = np.stack(generate(pipe, [with_article(n, n) for n in nouns], args.seed, args.batch, **options))
    classifier = load_classifier()
    real = features(classifier, pictures[chosen])
    distance = frechet_distance(real, features(classifier, made))
    halves = frechet_distance(real[::2], real[1::2])
    print(f"frechet: {distance:.2f} of {args.count} pictures; real ones, half against half, {halves:.2f}")


if __name__ == "__main__":
    main()
