"""Random-weight pipelines of the real classes, small enough to build in seconds: what fixtures share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "a cat dog red car house tree star fish sun heart robot apple with the and of in on photo style"


def make_tokenizer(text: str):
    """A byte-level BPE Qwen2 tokenizer whose merges cover `text`, so that its words are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer(vocab={"a": 0}, merges=[])._tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def qwen_vl_config(tokenizer: Any, **tokens: int) -> Any:
    """Of a tiny Qwen2.5-VL. tokens: numbers of special ones, where pictures are shown to it."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 8, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48,
        },
        **tokens,
    )  # fmt: skip


def make_qwen_image(folder: Path, *, blocks: int = 4, seed: int = 0) -> Path:
    """Save a random QwenImagePipeline: 4 blocks of dim 64, 8x VAE, 64 px by default."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
        "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokenizer = make_tokenizer(f"{template} {WORDS}")
    config = qwen_vl_config(tokenizer)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=blocks, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    write_defaults(folder, width=64, height=64, steps=4, guidance=4.0)
    return folder


def make_flux(folder: Path, *, guided: bool = True, seed: int = 0) -> Path:
    """Save a random FluxPipeline: 2 double and 3 single blocks of dim 64."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.model_max_length = 77
    vocab = len(tokenizer) + 8
    clip = CLIPTextConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=32, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    t5 = T5Config(vocab_size=vocab, d_model=48, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=guided,
            axes_dims_rope=(8, 12, 12),
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder, safe_serialization=True)
    write_defaults(
        folder, width=64, height=64, steps=2, guidance=3.5 if guided else 0.0, max_sequence_length=32
    )
    return folder


def write_defaults(folder: Path, **defaults: float) -> None:
    """`edit.json`: what a request for this folder uses when the user says nothing."""
    (folder / "edit.json").write_text(json.dumps(defaults))


def plans_for(steps: int):
    """Times of a run of so many steps whose scheduler shifts nothing, and a plan for each budget on them."""
    import numpy as np

    from routers.planned.universal import universal_plan

    grid = np.linspace(1, 0, steps + 1)
    return grid.tolist(), {"dense": {n: universal_plan(grid, n, "dense") for n in range(1, steps)}}


def make_bundle(folder: Path, pipeline: Path, spec, *, steps: int = 4) -> Path:
    """Save a bundle with made-up plans for a pipeline folder's transformer."""
    import diffusers

    from routers.attachment import architecture, fingerprint
    from routers.bundle import Bundle

    transformer_class = getattr(diffusers, spec.transformer_class)
    transformer = transformer_class.from_pretrained(pipeline, subfolder="transformer")
    times, plans = plans_for(steps)
    Bundle(
        spec=spec,
        base_model=folder.name,
        architecture=architecture(transformer),
        fingerprint=fingerprint(transformer),
        num_steps=steps,
        guidance=4.0,
        times=times,
        plans=plans,
        recommended_budget=0.8,
    ).save(folder)
    return folder
