"""Begin flux-tiny's training with the weights of a smaller flux-tiny: more blocks, other tokenizers' words.

    python -m backbones.tiny.recipes.flux.grow FOLDER --out runs/flux/start
    python -m backbones.tiny.recipes.flux.dit --start runs/flux/start ...

As recipes/grow.py does it for qwen-image-tiny. Writes a parcel (parcel.py).
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor

from backbones.tiny.recipes.flux.dit import TinyFlux
from backbones.tiny.recipes.flux.options import RUNS
from backbones.tiny.recipes.flux.text import Prompts
from backbones.tiny.recipes.grow import grown_blocks, grown_embedding
from backbones.tiny.recipes.parcel import compress, untied, write_parts


def shut(name: str, value: Tensor) -> Tensor:
    """A modulation's weight or bias with every gate zero: each third part of three or six."""
    if ".linear." not in name or "norm" not in name:
        return value.clone()
    parts = list(value.chunk(3 if name.startswith("norm.") else 6))
    for gate in range(2, len(parts), 3):
        parts[gate] = torch.zeros_like(parts[gate])
    return torch.cat(parts)


def grow(model: TinyFlux, prompts: Prompts, folder: Path) -> None:
    """Fill the model with the weights of a pipeline folder, grown."""
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    weights = pipe.transformer.state_dict()
    for prefix in ("transformer_blocks.", "single_transformer_blocks."):
        blocks = getattr(model.dit, prefix[:-1])
        weights = grown_blocks(weights, len(blocks), prefix, shut)
    model.dit.load_state_dict(weights)
    for new, old, words, old_words in (
        (model.clip, pipe.text_encoder, prompts.clip, pipe.tokenizer),
        (model.t5, pipe.text_encoder_2, prompts.t5, pipe.tokenizer_2),
    ):
        table = old.get_input_embeddings().weight.detach()
        grown = grown_embedding(table, old_words, words)
        state = old.state_dict()
        for name, value in new.state_dict().items():
            if state[name].shape == table.shape and torch.equal(state[name], table):
                state[name] = grown
            elif len(state[name]) < len(value):  # of CLIP's positions: the last one again
                more = state[name][-1:].expand(len(value) - len(state[name]), -1)
                state[name] = torch.cat([state[name], more])
        new.load_state_dict(state)


def main() -> None:
    """Parse the command line, grow and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the smaller model's pipeline")
    parser.add_argument("--tokenizer", type=Path, default=RUNS / "tokenizers")
    parser.add_argument("--out", type=Path, default=RUNS / "start")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    prompts = Prompts.load(args.tokenizer)
    model = TinyFlux(prompts)
    grow(model, prompts, args.folder)
    paths = write_parts(compress(untied(model.state_dict()), args.bits), args.out)
    print(f"grow: {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
