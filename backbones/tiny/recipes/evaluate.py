"""Step `evaluate`: judge a packaged pipeline folder on the 100 common prompts.

    python -m backbones.tiny.recipes.evaluate [--seeds 0 1] [--out docs/images/tiny-qwen-grid.png]
    python -m backbones.tiny.recipes.evaluate --folder backbones/tiny/flux_tiny
    python -m backbones.tiny.recipes.evaluate --prompts FILE --seeds 0 1 --out runs/look.png

Runs the plain diffusers pipeline, without elasticity, at the folder's defaults (`edit.json`), prints the
classifier's top-1 and top-5 accuracy and the concepts it missed, and writes the first seed's pictures as a
grid. With --prompts, one prompt a line, it only draws: one sheet for each seed, to judge by eye.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.concepts import load_concepts
from backbones.tiny.recipes.grid import WORDS
from backbones.tiny.recipes.sampling import NEGATIVE, contact_sheet
from benchmarks.classifier import load_classifier

PACKAGED = Path(__file__).parent.parent / "qwen_image_tiny"


def concept_of() -> dict[str, str]:
    """Every name and synonym -> the concept's name, which is the classifier's label."""
    return {word: c.name for c in load_concepts() for word in (c.name, *c.synonyms)}


def call_options(pipe: DiffusionPipeline, folder: Path, steps: int | None, guidance: float | None) -> dict:
    """The pipeline's call arguments: the folder's own defaults, unless steps or guidance are given."""
    defaults = json.loads((folder / "edit.json").read_text())
    scale = defaults["guidance"] if guidance is None else guidance
    options = {key: defaults[key] for key in ("width", "height", "max_sequence_length") if key in defaults}
    options["num_inference_steps"] = steps or defaults["steps"]
    if isinstance(pipe, QwenImagePipeline):
        return {**options, "true_cfg_scale": scale, "negative_prompt": NEGATIVE}
    return {**options, "guidance_scale": scale}


def generate(
    pipe: DiffusionPipeline, prompts: list[str], seed: int, batch: int, **options
) -> list[np.ndarray]:
    """Pictures (128, 128, 3) uint8, each from its own generator, so that the batch size does not matter."""
    pictures = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 1000 + start + row) for row in range(len(some))]
        if "negative_prompt" in options:
            options["negative_prompt"] = [NEGATIVE] * len(some)
        images = pipe(some, generator=generators, **options).images
        pictures += [np.asarray(image) for image in images]
    return pictures


def main() -> None:
    """Parse the command line, generate, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=PACKAGED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="default: the folder's")
    parser.add_argument("--guidance", type=float, help="default: the folder's")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.png"))
    parser.add_argument(
        "--words", type=Path, help="also draw the colour, style and synonym prompts to this file"
    )
    parser.add_argument("--prompts", type=Path, help="draw these prompts, one a line, and do nothing else")
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = call_options(pipe, args.folder, args.steps, args.guidance)
    if args.prompts:
        lines = [line for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
        for seed in args.seeds:
            path = args.out.with_stem(f"{args.out.stem}-{seed}")
            pictures = np.stack(generate(pipe, lines, seed, args.batch, **options))
            contact_sheet(pictures, lines, path, columns=min(10, len(lines)), side=128)
            print(f"evaluate: {len(lines)} pictures -> {path}", flush=True)
        return
    names, classifier = concept_of(), load_classifier()
    prompts = [prompt for prompt, _ in common_prompts()]
    labels = [names[noun.removeprefix("ear of ")] for _, noun in common_prompts()]
    for seed in args.seeds:
        pictures = generate(pipe, prompts, seed, args.batch, **options)
        guesses = classifier.top_k(pictures, 5)
        hits = [
            guess.index(label) if label in guess else 5 for label, guess in zip(labels, guesses, strict=True)
        ]
        top1, top5 = np.mean([hit == 0 for hit in hits]), np.mean([hit < 5 for hit in hits])
        missed = ", ".join(label for label, hit in zip(labels, hits, strict=True) if hit == 5)
        print(
            f"evaluate: seed {seed} top-1 {top1:.2f} top-5 {top5:.2f}; not in the first five: {missed}",
            flush=True,
        )
        if seed == args.seeds[0]:
            contact_sheet(np.stack(pictures), prompts, args.out, columns=10)
    if args.words:
        contact_sheet(
            np.stack(generate(pipe, WORDS, 0, args.batch, **options)), WORDS, args.words, columns=10
        )


if __name__ == "__main__":
    main()
