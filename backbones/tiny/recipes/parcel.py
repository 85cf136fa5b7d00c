"""Weights of a training checkpoint in small files, to take them to another machine and back.

    python -m backbones.tiny.recipes.parcel runs/dit/last.pt --out parcel              # half precision
    python -m backbones.tiny.recipes.parcel runs/dit/last.pt --out parcel --bits 8     # half as large again
    python -m backbones.tiny.recipes.dit --start parcel ...                            # train on from it

Writes part-0.safetensors, part-1 ... of at most 15 MB each, with the averaged (EMA) weights. With 8 bits
every row of a matrix has its own scale; good enough to train on from, not to keep.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MAX_BYTES = 15_000_000
SCALE = ".scale"  # suffix of a quantised weight's scales


def compress(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Half precision; with 8 bits, matrices as int8 with a scale for each row."""
    packed = {}
    for name, value in weights.items():
        if bits == 8 and value.is_floating_point() and value.dim() >= 2:
            rows = value.float().flatten(1)
            scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            packed[name] = (rows / scale).round().to(torch.int8).view(value.shape)
            packed[name + SCALE] = scale
        else:
            packed[name] = value.half() if value.is_floating_point() else value
    return packed


def expand(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in single precision."""
    weights = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        scale = packed.get(name + SCALE)
        weights[name] = value.float() if scale is None else (value.flatten(1) * scale).view(value.shape)
    return weights


def write_parts(weights: dict[str, Tensor], out: Path, limit: int = MAX_BYTES) -> list[Path]:
    """Write part-N.safetensors files below `limit` bytes. ValueError names a weight that is larger."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        grown = value.numel() * value.element_size() + 512  # and its entry in the header
        if grown > limit:
            raise ValueError(f"{name} alone is {grown} bytes, the limit of a part is {limit}")
        if size + grown > limit:
            parts.append({})
            size = 0
        parts[-1][name] = value.contiguous()
        size += grown
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part-*.safetensors"):
        old.unlink()
    paths = [out / f"part-{number}.safetensors" for number in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        save_file(part, path)
    return paths


def read_parts(folder: Path) -> dict[str, Tensor]:
    """The weights of a parcel, in single precision."""
    packed: dict[str, Tensor] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        packed.update(load_file(path))
    return expand(packed)


TIED = ("lm_head", "t5.encoder.embed_tokens")
"""Weights that another name holds too: loading that one fills them."""


def untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those of TIED."""
    return {name: value for name, value in weights.items() if not any(tied in name for tied in TIED)}


def fill(model: nn.Module, source: Path) -> None:
    """Fill a model with a parcel's weights, or a checkpoint's averaged ones. ValueError: another model's."""
    weights = read_parts(source) if source.is_dir() else average(source)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not any(tied in name for tied in TIED)]
    if unexpected or missing:
        raise ValueError(f"{source} is not of this model: missing {missing}, unexpected {unexpected}")


def average(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's EMA weights, and the others as they are."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    return {**state["model"], **state["ema"]}


def main() -> None:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/parcel"))
    parser.add_argument("--bits", type=int, choices=(8, 16), default=16)
    args = parser.parse_args()
    paths = write_parts(compress(untied(average(args.checkpoint)), args.bits), args.out)
    size = sum(path.stat().st_size for path in paths)
    print(f"parcel: {size / 1e6:.1f} MB in {len(paths)} files -> {args.out}")


if __name__ == "__main__":
    main()
