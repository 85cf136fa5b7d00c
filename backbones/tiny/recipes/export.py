"""Step `export`: write the complete diffusers pipeline folder, in half precision.

    python -m backbones.tiny.recipes.export [--checkpoint runs/elastic/last.pt] [--out FOLDER]

The folder loads with `QwenImagePipeline.from_pretrained` alone. Fails when a weight does not fit fp16, when
the unmodified classes disagree with the training forwards, or when the transformer reaches 30 MB or the
folder 40 MB.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes import fast_dit, picture_vae, text
from backbones.tiny.recipes.dit import load_average
from backbones.tiny.recipes.sampling import SHIFT

MAX_BYTES, MAX_TRANSFORMER_BYTES = 40_000_000, 30_000_000
DEFAULTS = {"width": 128, "height": 128, "steps": 20, "guidance": 4.0}
"""What `edit generate` uses when nothing is asked; the family's own are for 1024 px."""
PROMPTS = Path(__file__).parent.parent / "prompts"


def check_half(name: str, module: torch.nn.Module) -> None:
    """Raise ValueError when a parameter overflows fp16 or loses more than 1 % of its norm to underflow."""
    for key, p in module.named_parameters():
        half = p.detach().half().float()
        if not torch.isfinite(half).all() or (half - p).norm() > 0.01 * p.norm() + 1e-8:
            raise ValueError(f"{name}.{key} does not fit fp16: largest value {p.abs().max().item():.3g}")


def forget_origin(folder: Path) -> None:
    """Take the paths from which parts were loaded out of a pipeline folder's configurations."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def check_size(folder: Path) -> int:
    """The folder's size in bytes. Raises ValueError when it or its transformer is too large."""
    for part, limit in ((folder / "transformer", MAX_TRANSFORMER_BYTES), (folder, MAX_BYTES)):
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if size >= limit:
            raise ValueError(f"{part} is {size} bytes, the limit is {limit}")
    return size


def build_pipeline(
    checkpoint: Path, vae_folder: Path, tokenizer_folder: Path, shift: float
) -> QwenImagePipeline:
    """The pipeline in fp32 from a checkpoint's EMA weights."""
    tokenizer = Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    model = load_average(checkpoint, tokenizer)
    vae = AutoencoderKLQwenImage.from_pretrained(vae_folder)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        transformer=model.dit,
    )


def main() -> None:
    """Parse the command line, check and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/elastic/last.pt"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"))
    parser.add_argument("--shift", type=float, default=SHIFT)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "qwen_image_tiny")
    args = parser.parse_args()
    pipe = build_pipeline(args.checkpoint, args.vae, args.tokenizer, args.shift)
    differences = {
        "text": text.largest_difference(pipe, ["a cat", "a purple cat, flat style", " ", "zxqw blorp"]),
        "transformer": fast_dit.largest_difference(pipe.transformer),
        "transformer at 3:2": fast_dit.largest_difference(pipe.transformer, grid=(8, 12)),
        "vae": picture_vae.largest_difference(pipe.vae, torch.rand(2, 3, 128, 128) * 2 - 1),
    }
    print("export: training forwards differ from the unmodified classes by", differences)
    if max(differences.values()) > 1e-3:
        raise ValueError(f"the training forwards and the unmodified classes disagree: {differences}")
    for name in ("transformer", "text_encoder", "vae"):
        check_half(name, getattr(pipe, name))
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part)
    forget_origin(part)
    (part / "edit.json").write_text(json.dumps(DEFAULTS, indent=1) + "\n", "utf-8")
    shutil.copyfile(PROMPTS / "calibration.txt", part / "calibration.txt")
    size = check_size(part)
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)
    print(f"export: {size / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
