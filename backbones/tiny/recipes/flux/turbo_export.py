"""Step `turbo_export`: the pipeline folder of flux-tiny-turbo, in half precision.

    python -m backbones.tiny.recipes.flux.turbo_export runs/flux/turbo/parcel
    python -m backbones.tiny.recipes.flux.turbo_export runs/flux/routers/parcel     # trained with routers

Text encoders, tokenizers and VAE are those of the packaged flux-tiny (`--base`), whose transformer was the
teacher. The folder loads with `FluxPipeline.from_pretrained` alone. Fails when a weight does not fit fp16,
when the unmodified class disagrees with the training forward, or when the folder reaches 40 MB.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from backbones.tiny.recipes.export import PROMPTS, check_half, check_size, forget_origin
from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.fast_dit import class_forward, dit_forward, rope
from backbones.tiny.recipes.flux.turbo import STEPS
from backbones.tiny.recipes.parcel import average, read_parts

TINY = Path(__file__).parents[2]
TOLERANCE = 1e-3  # of outputs of order 1, in fp32


def transformer_weights(source: Path) -> dict[str, Tensor]:
    """Of step `turbo`, or what step `routers` made of them ("dit."), from a parcel or a checkpoint."""
    weights = read_parts(source) if source.is_dir() else average(source)
    inner = {name.removeprefix("dit."): value for name, value in weights.items() if name.startswith("dit.")}
    return inner or weights


def build(source: Path, base: Path) -> FluxPipeline:
    """The pipeline in fp32. Raises RuntimeError for weights of another model."""
    pipe = FluxPipeline.from_pretrained(base, torch_dtype=torch.float32)
    config = {**pipe.transformer.config, "guidance_embeds": False}
    turbo = FluxTransformer2DModel.from_config(config)
    turbo.load_state_dict(transformer_weights(source))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return FluxPipeline(
        scheduler, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.text_encoder_2, pipe.tokenizer_2,
        turbo.eval(),
    )  # fmt: skip


@torch.no_grad()
def difference(dit: FluxTransformer2DModel, text_tokens: int) -> float:
    """Largest difference between the training forward and the unmodified class on random input."""
    generator, config = torch.Generator().manual_seed(0), dit.config
    latents = torch.randn(2, GRID * GRID, config.in_channels, generator=generator)
    states = torch.randn(2, text_tokens, config.joint_attention_dim, generator=generator)
    text = torch.randn(2, config.pooled_projection_dim, generator=generator), states
    sigma = torch.tensor([0.25, 1.0])
    mine = dit_forward(dit, latents, sigma, text, rope(dit, text_tokens))
    return (mine - class_forward(dit, latents, sigma, text)).abs().max().item()


def main() -> None:
    """Parse the command line, check and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="parcel or checkpoint of step turbo, or parcel of step routers"
    )
    parser.add_argument("--base", type=Path, default=TINY / "flux_tiny", help="the teacher's pipeline folder")
    parser.add_argument("--out", type=Path, default=TINY / "flux_tiny_turbo")
    args = parser.parse_args()
    pipe = build(args.source, args.base)
    usual = json.loads((args.base / "edit.json").read_text("utf-8"))
    found = difference(pipe.transformer, usual["max_sequence_length"])
    if not found < TOLERANCE:
        raise ValueError(f"the training forward and the unmodified class differ by {found:g}")
    check_half("transformer", pipe.transformer)
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part, safe_serialization=True)
    forget_origin(part)
    defaults = {**usual, "steps": STEPS, "guidance": 0.0}
    (part / "edit.json").write_text(json.dumps(defaults, indent=2) + "\n", "utf-8")
    shutil.copyfile(PROMPTS / "calibration.txt", part / "calibration.txt")
    known = args.base / "vocabulary.json"
    if known.is_file():
        shutil.copyfile(known, part / known.name)
    size = check_size(part)
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)
    print(
        f"turbo_export: differs from the training forward by {found:.2g}; {size / 1e6:.1f} MB -> {args.out}"
    )


if __name__ == "__main__":
    main()
