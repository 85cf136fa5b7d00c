"""Step `export`: write the complete diffusers pipeline folder, in half precision.

    python -m backbones.tiny.recipes.flux.export [--checkpoint runs/flux/dit/last.pt] [--out FOLDER]

The folder loads with `FluxPipeline.from_pretrained` alone; `edit.json` holds its defaults for `edit`.
Fails when a weight does not fit fp16, when the unmodified classes disagree with the training forwards, or
when the folder reaches 30 MB.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from backbones.tiny.recipes.export import PROMPTS, check_half, check_size, forget_origin
from backbones.tiny.recipes.fast_dit import pack
from backbones.tiny.recipes.flux.dit import TinyFlux, load_model
from backbones.tiny.recipes.flux.fast_dit import largest_difference
from backbones.tiny.recipes.flux.options import result_arguments
from backbones.tiny.recipes.flux.sampling import GUIDANCE, SHIFT, SIDE, STEPS, FluxSampler
from backbones.tiny.recipes.flux.text import T5_TOKENS, Prompts

CHECK_PROMPTS = ["a cat", "A Purple Cat, flat style", " ", "zxqw blorp", "a very long prompt " * 5]
TOLERANCE = 1e-3  # of transformer outputs, text states and latents of order 1, in fp32


def build_pipeline(model: TinyFlux, prompts: Prompts, vae: AutoencoderKL, shift: float) -> FluxPipeline:
    """The pipeline in fp32."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=model.clip,
        tokenizer=prompts.clip,
        text_encoder_2=model.t5,
        tokenizer_2=prompts.t5,
        transformer=model.dit,
    )


@torch.no_grad()
def differences(pipe: FluxPipeline, sampler: FluxSampler, steps: int = 3) -> dict[str, float]:
    """Largest differences between the pipeline and the recipe: text, transformer, and final latents."""
    states, pooled, _ = pipe.encode_prompt(CHECK_PROMPTS, max_sequence_length=T5_TOKENS)
    mine = sampler.text(CHECK_PROMPTS)
    latents = torch.randn(len(CHECK_PROMPTS), pipe.vae.config.latent_channels, SIDE // 8, SIDE // 8,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    goal = sampler.latents(CHECK_PROMPTS, steps=steps, guidance=GUIDANCE, noise=pack(latents))
    found = pipe(
        CHECK_PROMPTS, height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=GUIDANCE,
        max_sequence_length=T5_TOKENS, latents=pack(latents), output_type="latent",
    ).images  # fmt: skip
    return {
        "clip": (pooled - mine[0]).abs().max().item(),
        "t5": (states - mine[1]).abs().max().item(),
        "transformer": largest_difference(pipe.transformer),
        "latents": (found - goal).abs().max().item(),
    }


def write(pipe: FluxPipeline, out: Path) -> int:
    """Write the folder whole, in fp16, with edit.json; returns its size in bytes."""
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        check_half(name, getattr(pipe, name))
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part, safe_serialization=True)
    forget_origin(part)
    defaults = {"width": SIDE, "height": SIDE, "steps": STEPS, "guidance": GUIDANCE,
                "max_sequence_length": T5_TOKENS}  # fmt: skip
    (part / "edit.json").write_text(json.dumps(defaults, indent=2) + "\n")
    shutil.copyfile(PROMPTS / "calibration.txt", part / "calibration.txt")
    size = check_size(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return size


def main() -> None:
    """Parse the command line, check and write."""
    parser = result_arguments(__doc__)
    parser.add_argument("--shift", type=float, default=SHIFT)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "flux_tiny")
    args = parser.parse_args()
    prompts = Prompts.load(args.tokenizer)
    model = load_model(args.checkpoint, prompts)
    vae = AutoencoderKL.from_pretrained(args.vae)
    pipe = build_pipeline(model, prompts, vae, args.shift)
    pipe.set_progress_bar_config(disable=True)
    found = differences(pipe, FluxSampler(model, prompts, vae))
    print("export: the pipeline differs from the recipe by", found)
    if not max(found.values()) < TOLERANCE:
        raise ValueError(f"the training forwards and the unmodified classes disagree: {found}")
    size = write(pipe, args.out)
    print(f"export: {size / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
