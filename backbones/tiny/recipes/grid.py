"""Step `grid`: pictures of a checkpoint or of the packaged pipeline, to look at.

python -m backbones.tiny.recipes.grid [--checkpoint runs/dit/last.pt] ["a cat" ...] --out grid.png
"""

import argparse
from pathlib import Path

from diffusers import AutoencoderKLQwenImage
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.dit import load_average
from backbones.tiny.recipes.sampling import GUIDANCE, SHIFT, STEPS, Sampler, contact_sheet
from backbones.tiny.recipes.text import PromptTokens

WORDS = [
    "a red car", "blue car", "a purple cat", "a green dog", "a pink elephant", "a black horse",
    "a blue apple", "a yellow house", "an orange fish", "purple guitar", "a dog, flat style",
    "cat, noto style", "a car, twemoji style", "a tree, flat style", "a red bird, flat style", "kitty",
    "puppy", "bunny", "feline", "automobile", "aeroplane", "spaceship", "a purse", "spectacles", "bike",
    "locomotive", "zxqw blorp", "a cat and a dog", "", "a picture of a pizza",
]  # fmt: skip


def load_sampler(checkpoint: Path, vae: Path, tokenizer: Path) -> Sampler:
    """The EMA weights of a checkpoint, ready to sample."""
    words = Qwen2Tokenizer.from_pretrained(tokenizer)
    model = load_average(checkpoint, words)
    return Sampler(model, PromptTokens(words), AutoencoderKLQwenImage.from_pretrained(vae))


def main() -> None:
    """Parse the command line and write a contact sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prompts", nargs="*", help="default: the 100 common prompts and the words of this file"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/dit/last.pt"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/grid.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--shift", type=float, default=SHIFT)
    args = parser.parse_args()
    prompts = args.prompts or [prompt for prompt, _ in common_prompts()] + WORDS
    sampler = load_sampler(args.checkpoint, args.vae, args.tokenizer)
    options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
    pictures = sampler.pictures(prompts, args.seed, **options)
    contact_sheet(pictures, prompts, args.out, columns=min(len(prompts), 13))
    print(f"grid: {len(prompts)} pictures -> {args.out}")


if __name__ == "__main__":
    main()
