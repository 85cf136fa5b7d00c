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

from backbones.tiny.recipes.dit import TEXT_TOKENS
from backbones.tiny.recipes.fast_dit import block_forward, dit_forward, rope
from backbones.tiny.recipes.sampling import NEGATIVE
from backbones.tiny.recipes.text import PromptTokens, encode_text

FOLDER = Path(__file__).parents[2] / "qwen_image_tiny"


def guided_velocity(cond: Tensor, uncond: Tensor, scale: Tensor | float, keep_norm: float = 1.0) -> Tensor:
    """Classifier-free guidance of velocities (B, N, C) at scales (B,) or one number.

    keep_norm: 1 gives each token the length of its conditional velocity, as QwenImagePipeline does, which
    keeps high scales from oversaturating; 0 is plain guidance; between, a blend.
    """
    if isinstance(scale, Tensor):
        scale = scale[:, None, None]
    mixed = uncond + scale * (cond - uncond)
    length = mixed.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    kept = mixed * (cond.norm(dim=-1, keepdim=True) / length)
    return torch.lerp(mixed, kept, keep_norm)


class Teacher:
    """A frozen qwen-image-tiny pipeline folder, in fp32."""

    def __init__(self, folder: Path = FOLDER, compile: bool = True):
        self.dit = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").float()
        self.text = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").float()
        self.dit.requires_grad_(False).eval()
        self.text.requires_grad_(False).eval()
        self.tokens = PromptTokens(Qwen2Tokenizer.from_pretrained(folder / "tokenizer"))
        self.block_fn = torch.compile(block_forward, dynamic=False) if compile else block_forward

    def fits(self, caption: str) -> bool:
        """Whether the caption is as short as those the teacher has learnt from."""
        return len(self.tokens.ids(caption)) <= TEXT_TOKENS

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, captions: list[str], scales: Tensor) -> Tensor:
        """Guided velocities (B, N, C), fp32, for noisy latents (B, N, C) at sigma (B,) and scales (B,)."""
        size = len(captions)
        with torch.autocast("cpu", torch.bfloat16):
            ids, mask = self.tokens.batch([*captions, NEGATIVE], TEXT_TOKENS)
            states = encode_text(self.text, self.tokens.prefix, ids)
            rows = torch.cat([torch.arange(size), torch.full((size,), size)])
            both = dit_forward(
                self.dit, latents.repeat(2, 1, 1), sigma.repeat(2), states[rows], mask[rows],
                rope(TEXT_TOKENS), self.block_fn,
            )  # fmt: skip
        cond, uncond = both.float().chunk(2)
        return guided_velocity(cond, uncond, scales)
