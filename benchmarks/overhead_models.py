"""What the overhead benchmark runs: a transformer at Qwen-Image's block size, and whole denoising loops."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from backbones import qwen_image, registry
from routers.router import Router


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    blocks: int = 4
    heads: int = 24
    head_dim: int = 128
    text_dim: int = 3584
    rope: tuple[int, int, int] = (16, 56, 56)
    side: int = 32  # latent patches: 32 x 32 = 1024 image tokens
    text: int = 64
    steps: int = 5
    rounds: int = 5
    pipeline_steps: int = 20
    pipeline_rounds: int = 7


FULL_SIZE = Size()
QUICK = Size(2, 2, 16, 24, (4, 6, 6), 4, 5, 5, 1, 4, 1)


def fast_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies in it, else fp32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def qwen_transformer(size: Size, dtype: torch.dtype) -> Any:
    """A QwenImageTransformer2DModel of `size` with random weights."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = QwenImageTransformer2DModel(
            num_layers=1, num_attention_heads=size.heads, attention_head_dim=size.head_dim,
            joint_attention_dim=size.text_dim, axes_dims_rope=size.rope,
        )  # fmt: skip
    # the rope tables are plain attributes: build them for real, once
    model = QwenImageTransformer2DModel(
        num_layers=0, num_attention_heads=size.heads, attention_head_dim=size.head_dim,
        joint_attention_dim=size.text_dim, axes_dims_rope=size.rope,
    )  # fmt: skip
    torch.nn.Module.to(
        model, dtype
    )  # diffusers' own `to` warns of layers that want fp32; there are none here
    for _ in range(size.blocks):
        block = copy.deepcopy(shapes.transformer_blocks[0]).to(dtype).to_empty(device="cpu")
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.transformer_blocks.append(block)
    return model.eval().requires_grad_(False)


def twin(transformer: Any) -> Any:
    """A second module on the same weights, so that dense and elastic can take turns."""
    return copy.deepcopy(transformer, {id(p): p for p in transformer.parameters()})


def routers_for(transformer: Any) -> list[Router]:
    """One untrained router per block: open gates."""
    dim = transformer.inner_dim
    routers = [Router(dim, dim) for _ in transformer.transformer_blocks]
    return [router.eval().requires_grad_(False) for router in routers]


def block_inputs(size: Size, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Transformer arguments of a short trajectory, batch 1."""
    for step in range(size.steps):
        yield {
            "hidden_states": torch.randn(1, size.side**2, 64, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, size.text, size.text_dim, dtype=dtype),
            "encoder_hidden_states_mask": None,
            "timestep": torch.full((1,), 1 - step / size.steps),
            "img_shapes": [[(1, size.side, size.side)]],
            "return_dict": False,
        }


@dataclass(frozen=True)
class Denoising:
    """The denoising loop of a pipeline without text encoding and decoding."""

    pipe: Any
    arguments: dict[str, Any]

    def __call__(self, transformer: Any) -> None:
        """Run it with this transformer in place of the pipeline's."""
        self.pipe.transformer = transformer
        self.pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **self.arguments)


PROMPTS = ("a cat", "a dog", "an apple", "a house", "a tree", "a pizza", "a rocket", "a fish")


def packaged_denoising(size: Size, batch: int) -> tuple[Denoising, str]:
    """The packaged pipeline with real prompts, classifier-free guidance on."""
    from backbones.loading import load
    from backbones.spec import Placement

    backbone = registry.resolve(registry.DEFAULT_MODELS["picture"])
    pipe = load(backbone, Placement(device="cpu"))
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(list(PROMPTS[:batch]))
        negative, negative_mask = pipe.encode_prompt([qwen_image.FAMILY.negative_prompt] * batch)
    arguments = {
        "prompt_embeds": embeds, "prompt_embeds_mask": mask,
        "negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask,
        "true_cfg_scale": backbone.defaults.guidance, "num_inference_steps": size.pipeline_steps,
        "width": backbone.defaults.width, "height": backbone.defaults.height,
    }  # fmt: skip
    return Denoising(pipe, arguments), backbone.name


def random_denoising(size: Size, batch: int) -> tuple[Denoising, str]:
    """The same loop around a small transformer with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    transformer = qwen_transformer(size, torch.float32)
    pipe = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": torch.randn(batch, size.text, size.text_dim),
        "prompt_embeds_mask": torch.ones(batch, size.text, dtype=torch.long),
        "negative_prompt_embeds": torch.randn(batch, 2, size.text_dim),
        "negative_prompt_embeds_mask": torch.ones(batch, 2, dtype=torch.long),
        "true_cfg_scale": 4.0, "num_inference_steps": size.pipeline_steps,
        "width": 16 * size.side, "height": 16 * size.side,
    }  # fmt: skip
    return Denoising(pipe, arguments), "random weights"
