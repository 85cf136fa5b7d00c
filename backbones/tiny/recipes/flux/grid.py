"""Step `grid`: pictures of a checkpoint, to look at.

python -m backbones.tiny.recipes.flux.grid [--checkpoint runs/flux/dit/last.pt] ["a cat" ...] --out g.png
"""

from pathlib import Path

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.flux.options import RUNS, result_arguments
from backbones.tiny.recipes.flux.sampling import GUIDANCE, SHIFT, STEPS, FluxSampler
from backbones.tiny.recipes.grid import WORDS
from backbones.tiny.recipes.sampling import contact_sheet


def main() -> None:
    """Parse the command line and write a contact sheet."""
    parser = result_arguments(__doc__)
    parser.add_argument("prompts", nargs="*", help="default: the 100 common prompts and the trial words")
    parser.add_argument("--out", type=Path, default=RUNS / "grid.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--shift", type=float, default=SHIFT)
    args = parser.parse_args()
    prompts = args.prompts or [prompt for prompt, _ in common_prompts()] + WORDS
    sampler = FluxSampler.load(args.checkpoint, args.vae, args.tokenizer)
    options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
    pictures = sampler.pictures(prompts, args.seed, **options)
    contact_sheet(pictures, prompts, args.out, columns=min(len(prompts), 13))
    print(f"grid: {len(prompts)} pictures -> {args.out}")


if __name__ == "__main__":
    main()
