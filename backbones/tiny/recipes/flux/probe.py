"""Step `probe`: how well sub-networks keep the dense pictures, each applied to every step, without routers.

python -m backbones.tiny.recipes.flux.probe [--checkpoint runs/flux/dit/last.pt] [--prompts 20]
"""

import numpy as np

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.elastic import fixed_subnetwork
from backbones.tiny.recipes.flux.fast_dit import dit_forward, rope
from backbones.tiny.recipes.flux.options import result_arguments
from backbones.tiny.recipes.flux.sampling import FluxSampler

PROBES = (
    "width 0.75", "width 0.5", "width 0.25", "skip 0", "skip 2", "skip 5", "skip 8", "skip 11", "skip 3,7",
    "skip 2,6,9",
)  # blocks 0-3 are double, 4-11 single  # fmt: skip


def probe(sampler: FluxSampler, prompts: list[str]) -> dict[str, float]:
    """PSNR (dB) of each fixed sub-network's pictures to the same model's dense ones."""
    model = sampler.model
    goal = sampler.pictures(prompts, seed=1).astype(np.float32)
    result = {}
    for name in PROBES:
        keep, masks = fixed_subnetwork(name, model.blocks, model.hidden)

        def velocity(x, sigma, text, scales, keep=keep, masks=masks):
            return dit_forward(
                model.dit, x, sigma, text, rope(model.dit), scales, keep=keep, width_masks=masks
            )

        pictures = sampler.pictures(prompts, seed=1, velocity=velocity).astype(np.float32)
        errors = ((pictures - goal) ** 2).mean((1, 2, 3))
        result[name] = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-2))))
    return result


def main() -> None:
    """Parse the command line and print one line."""
    parser = result_arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=20, help="how many of the 100 common prompts")
    args = parser.parse_args()
    prompts = [prompt for prompt, _ in common_prompts()][:: max(1, 100 // max(1, args.prompts))]
    found = probe(FluxSampler.load(args.checkpoint, args.vae, args.tokenizer), prompts)
    print("probe: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()) + " dB")


if __name__ == "__main__":
    main()
