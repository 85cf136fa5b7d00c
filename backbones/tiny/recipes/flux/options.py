"""The command-line options of the steps, and where they keep their results."""

import argparse
from pathlib import Path

from backbones.tiny.recipes.dit import arguments as dit_arguments

RUNS = Path("runs/flux")


def arguments(description: str | None, minutes: float, ema: float) -> argparse.ArgumentParser:
    """The options that every training step shares."""
    parser = dit_arguments(description, RUNS, minutes, 2e-3, ema)
    parser.set_defaults(tokenizer=RUNS / "tokenizers")
    return parser


def result_arguments(description: str) -> argparse.ArgumentParser:
    """The options of every step that looks at a trained model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "dit" / "last.pt")
    parser.add_argument("--vae", type=Path, default=RUNS / "vae" / "model")
    parser.add_argument("--tokenizer", type=Path, default=RUNS / "tokenizers")
    return parser
