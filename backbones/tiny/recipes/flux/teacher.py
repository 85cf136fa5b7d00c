"""The packaged qwen-image-tiny as the teacher of flux-tiny: its velocity under true guidance.

Both models see the same latents, those of qwen-image-tiny's picture VAE, so the velocity of one is a target
for the other. A guided target carries far more of the caption than the data do: the difference that words
make is multiplied by the scale, and there is no noise in it.

Shapes: B batch, N image tokens, L text tokens, C packed latent channels.
"""

from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from backbones.tiny.recipes.dit import TEXT_TOKENS, compiled, load_average
from backbones.tiny.recipes.fast_dit import GRID, block_forward, dit_forward, rope
from backbones.tiny.recipes.sampling import NEGATIVE
from backbones.tiny.recipes.text import PromptTokens, encode_text

FOLDER = Path(__file__).parents[2] / "qwen_image_tiny"


def guided_velocity(
    cond: Tensor, uncond: Tensor, scale: Tensor | float, keep_norm: float = 1.0, anchor: Tensor | None = None
) -> Tensor:
    """Classifier-free guidance of velocities (B, N, C) at scales (B,) or one number.

    keep_norm: 1 gives each token the length of its conditional velocity, as QwenImagePipeline does, which
    keeps high scales from oversaturating; 0 is plain guidance; between, a blend.
    anchor: stands in for the conditional velocity, scaled and guided as that would be. With the data's own
    velocity, noise - data, its mean over the data is the guided velocity of the data instead of the
    teacher's.
    """
    if isinstance(scale, Tensor):
        scale = scale[:, None, None]
    mixed = uncond + scale * (cond - uncond)
    length = mixed.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    ratio = cond.norm(dim=-1, keepdim=True) / length
    ratio = 1 + keep_norm * (ratio - 1)
    return ratio * (mixed if anchor is None else mixed + anchor - cond)


class Teacher:
    """A frozen qwen-image-tiny, in fp32.

    folder: of its pipeline, or the checkpoint of its training; then `tokenizer` is its tokenizer's folder.
    """

    def __init__(
        self, folder: Path = FOLDER, compile: bool = True, device: str = "cpu", tokenizer: Path | None = None
    ):
        words = Qwen2Tokenizer.from_pretrained(tokenizer or folder / "tokenizer")
        if folder.is_file() or list(folder.glob("part-*.safetensors")):
            model = load_average(folder, words)
            dit, text = model.dit, model.text
        else:
            dit = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").float()
            text = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").float()
        self.dit, self.text = (part.requires_grad_(False).eval().to(device) for part in (dit, text))
        self.tokens = PromptTokens(words)
        self.tokens.prefix = self.tokens.prefix.to(device)
        self.text_tokens = TEXT_TOKENS
        self.block_fn = compiled(compile)

    def fits(self, caption: str) -> bool:
        """Whether the caption is as short as those the teacher has learnt from."""
        return len(self.tokens.ids(caption)) <= TEXT_TOKENS

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, sigma: Tensor, captions: list[str], scales: Tensor, grid: tuple[int, int],
        data: Tensor | None = None, real: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Guided velocities (B, N, C), fp32, for noisy latents (B, N, C) at sigma (B,) and scales (B,).

        data: the data's own velocities (B, N, C), which anchor the rows where real (B,) is true.
        """
        size, device = len(captions), latents.device
        with torch.autocast(device.type, torch.bfloat16):
            ids, mask = (
                part.to(device) for part in self.tokens.batch([*captions, NEGATIVE], self.text_tokens)
            )
            states = encode_text(self.text, self.tokens.prefix, ids)
            rows = torch.cat([torch.arange(size), torch.full((size,), size)]).to(device)
            square = grid == (GRID, GRID)
            both = dit_forward(
                self.dit, latents.repeat(2, 1, 1), sigma.repeat(2), states[rows], mask[rows],
                rope(self.text_tokens, grid, device=device.type),
                self.block_fn if square or device.type != "cuda" else block_forward,
            )  # fmt: skip
        cond, uncond = both.float().chunk(2)
        anchor = None if data is None or real is None else torch.where(real[:, None, None], data, cond)
        return guided_velocity(cond, uncond, scales, anchor=anchor)
