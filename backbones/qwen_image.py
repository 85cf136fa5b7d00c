"""Qwen-Image (arXiv 2508.02324): a dual-stream DiT of 60 blocks, Qwen2.5-VL as the text encoder, true CFG."""

from __future__ import annotations

from typing import Any

from backbones.spec import CallSize, Config, Configs, Defaults, Family, FileLayout, Shapes, Traits
from routers.spec import BlockSpec, MlpSpec, TransformerSpec

TRANSFORMER = TransformerSpec(
    transformer_class="QwenImageTransformer2DModel",
    blocks=(
        BlockSpec(
            kind="double",
            block_class="QwenImageTransformerBlock",
            path="transformer_blocks",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=(1, 0),
            modulation="temb",
            # image_rotary_emb is shared by the rows; modulate_index [B, L] exists only with zero_cond_t
            batched=("encoder_hidden_states_mask", "modulate_index"),
            mlps=(
                MlpSpec(
                    in_linear="img_mlp.net.0.proj", activation="img_mlp.net.0", out_linear="img_mlp.net.2"
                ),
            ),
            mask="encoder_hidden_states_mask",
        ),
    ),
)

PATCH = 2  # the transformer sees 2x2 latent patches
SUFFIX_TOKENS = 5  # "<|im_end|>\n<|im_start|>assistant\n" stays after the 34 template tokens are dropped


def size_multiple(vae: Config) -> int:
    """Both sides in px must be divisible by VAE scale x patch, or the pipeline would silently resize."""
    return int(PATCH * 2 ** len(vae.get("temperal_downsample", (0, 0, 0))))


def traits(configs: Configs) -> Traits:
    """The pipeline's own: 1024 px, 50 steps, true CFG 4."""
    return Traits(Defaults(50, 4.0, 1024, 1024), size_multiple(configs["vae"]))


def text_tokens(prompt: str, max_sequence_length: int | None) -> int:
    """About 4 characters to a BPE token, plus the template's suffix."""
    tokens = max(1, round(len(prompt) / 4)) + SUFFIX_TOKENS
    return min(tokens, max_sequence_length or tokens)


def call_inputs(configs: Configs, size: CallSize) -> dict[str, Any]:
    """Arguments of one transformer call, on the meta device."""
    import torch

    config, multiple = configs["transformer"], size_multiple(configs["vae"])
    rows, columns = size.height // multiple, size.width // multiple
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(size.rows, rows * columns, config.get("in_channels", 64)),
            "encoder_hidden_states": torch.empty(
                size.rows, size.text, config.get("joint_attention_dim", 3584)
            ),
            "encoder_hidden_states_mask": None,
            "timestep": torch.empty(size.rows),
            "img_shapes": [[(1, rows, columns)]] * size.rows,
            "return_dict": False,
        }


def file_config(shapes: Shapes) -> Config:
    """Single files use diffusers' own names, so only the number of blocks is read from them."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    return {"num_layers": len(blocks)}


SINGLE_FILE = FileLayout(
    marker="transformer_blocks.0.img_mod.1.weight",
    config=file_config,
    parts=None,
    row=lambda transformer: "qwen-image",
)

FAMILY = Family(
    name="Qwen-Image",
    makes="picture",
    transformer=TRANSFORMER,
    traits=traits,
    call_inputs=call_inputs,
    pipeline_class="QwenImagePipeline",
    # without a negative prompt the pipeline turns guidance off; the model card uses one space
    negative_prompt=" ",
    text_tokens=text_tokens,
    single_files=(SINGLE_FILE,),
)
