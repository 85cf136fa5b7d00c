"""Scores of generated pictures: PSNR and SSIM to reference pictures, prompt accuracy, bootstrap intervals.

Shapes: P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbones import tiny
from edit_cli.generation.closeness import psnr, ssim

CAP_DB = 60.0
"""PSNR of a picture that equals its reference; keeps means finite."""
DRAWS = 1000
"""Bootstrap samples."""
PROMPTS = Path(tiny.__file__).parent / "prompts"
COMMON, CALIBRATION = PROMPTS / "common100.txt", PROMPTS / "calibration.txt"

Values = NDArray[np.float64]
"""One score per prompt [P]."""


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, empty lines left out."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def default_prompts(count: int) -> list[str]:
    """The packaged common prompts, then other concepts the classifier knows; none used for calibration.

    Raises ValueError if there are not `count` of them.
    """
    from backbones.tiny.recipes.captions import strip_article, with_article
    from benchmarks.classifier import load_classifier

    prompts = read_prompts(COMMON)
    names = concepts()
    known = {names.get(strip_article(prompt).removeprefix("ear of ")) for prompt in prompts}
    seen = set(read_prompts(CALIBRATION))
    more = (with_article(label, label) for label in load_classifier().labels if label not in known)
    prompts += [prompt for prompt in more if prompt not in seen]
    if count > len(prompts):
        raise ValueError(
            f"--count {count} exceeds the {len(prompts)} packaged prompts; give a file with --prompts"
        )
    return prompts[:count]


@lru_cache(maxsize=1)
def concepts() -> dict[str, str]:
    """Every name and synonym -> the classifier's label."""
    from backbones.tiny.recipes.evaluate import concept_of

    return concept_of()


def mean_interval(values: Values) -> tuple[float, float, float]:
    """Mean and bootstrap 95 % interval of the mean over prompts."""
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def likeness(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> tuple[Values, Values]:
    """PSNR in dB (at most CAP_DB) and SSIM of each picture to its reference."""
    pairs = list(zip(pictures, references, strict=True))
    return np.array([min(psnr(a, b), CAP_DB) for a, b in pairs]), np.array([ssim(a, b) for a, b in pairs])


def accuracy(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[Values, Values] | None:
    """Whether the packaged classifier names the asked concept first, and in its first five (0 or 1 each).

    None if there is no classifier, or a prompt asks for something that it does not know.
    """
    from backbones.tiny.recipes.captions import strip_article
    from benchmarks.classifier import load_classifier

    names = concepts()
    labels = [names.get(strip_article(prompt).removeprefix("ear of ")) for prompt in prompts]
    try:
        classifier = load_classifier()
    except FileNotFoundError:
        return None
    if not set(labels) <= set(classifier.labels):
        return None
    guesses = classifier.top_k(pictures, 5)
    first = [guess[0] == label for guess, label in zip(guesses, labels, strict=True)]
    five = [label in guess for guess, label in zip(guesses, labels, strict=True)]
    return np.array(first, np.float64), np.array(five, np.float64)


def frechet(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Fréchet distance of the packaged classifier's features, of pictures to their references. The fewer
    there are, the less it tells of what other prompts would give. NaN without a classifier.
    """
    from backbones.tiny.recipes.frechet import features, frechet_distance
    from benchmarks.classifier import load_classifier

    try:
        classifier = load_classifier()
    except FileNotFoundError:
        return float("nan")
    both = (features(classifier, np.stack([np.asarray(p.convert("RGB")) for p in some]))
            for some in (pictures, references))  # fmt: skip
    return frechet_distance(*both)
