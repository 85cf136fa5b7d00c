"""FLUX.1: 19 dual-stream blocks, then 38 single-stream ones; CLIP and T5; distilled guidance."""

from __future__ import annotations

from typing import Any

from backbones.flux_checkpoint import DIFFUSERS, ORIGINAL
from backbones.spec import Config, Defaults, Family
from routers.spec import BlockSpec, MlpSpec, TransformerSpec

TRANSFORMER = TransformerSpec(
    transformer_class="FluxTransformer2DModel",
    blocks=(
        BlockSpec(
            kind="double",
            block_class="FluxTransformerBlock",
            path="transformer_blocks",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=(1, 0),
            modulation="temb",
            mlps=(MlpSpec(in_linear="ff.net.0.proj", activation="ff.net.0", out_linear="ff.net.2"),),
        ),
        BlockSpec(
            kind="single",
            block_class="FluxSingleTransformerBlock",
            path="single_transformer_blocks",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=(1, 0),
            modulation="temb",
            # proj_out takes [attention output (dim) | MLP hidden (4 dim)]: only the MLP's columns are cut
            mlps=(MlpSpec(in_linear="proj_mlp", activation="act_mlp", out_linear="proj_out", out_offset=1),),
        ),
    ),
)

PATCH = 2  # the transformer sees 2x2 latent patches
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # model cards: T5 prompts are padded to this length


def size_multiple(vae: Config) -> int:
    """Both sides in px must be divisible by VAE scale x patch, or the pipeline would silently resize."""
    return int(PATCH * 2 ** (len(vae.get("block_out_channels", (0, 0, 0, 0))) - 1))


def defaults(transformer: Config) -> Defaults:
    """With a guidance embedding it is a dev model (28 steps, 3.5), without one a schnell model (4 steps)."""
    if takes_guidance(transformer):
        return Defaults(steps=28, guidance=3.5, max_sequence_length=DEV_TOKENS)
    return Defaults(steps=4, guidance=0.0, max_sequence_length=SCHNELL_TOKENS)


def takes_guidance(transformer: Config) -> bool:
    """Only models with a guidance embedding look at the guidance scale."""
    return bool(transformer.get("guidance_embeds", False))


def text_tokens(prompt: str, max_sequence_length: int | None) -> int:
    """T5 prompts are padded to the full length, whatever the prompt."""
    return max_sequence_length or DEV_TOKENS


def transformer_inputs(
    transformer: Config, vae: Config, width: int, height: int, text: int, batch: int
) -> dict[str, Any]:
    """Arguments of one transformer call, on the meta device. Sizes in px, `text` in tokens."""
    import torch

    tokens = (height // size_multiple(vae)) * (width // size_multiple(vae))
    guided = takes_guidance(transformer)
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(batch, tokens, transformer.get("in_channels", 64)),
            "encoder_hidden_states": torch.empty(batch, text, transformer.get("joint_attention_dim", 4096)),
            "pooled_projections": torch.empty(batch, transformer.get("pooled_projection_dim", 768)),
            "timestep": torch.empty(batch),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(text, 3),
            "guidance": torch.empty(batch) if guided else None,
            "return_dict": False,
        }


FAMILY = Family(
    name="FLUX.1",
    pipeline_class="FluxPipeline",
    transformer=TRANSFORMER,
    guidance_argument="guidance_scale",
    negative_prompt=None,  # guidance is distilled into the model: there is no unconditional branch
    image_to_image_class="FluxImg2ImgPipeline",
    size_multiple=size_multiple,
    defaults=defaults,
    transformer_inputs=transformer_inputs,
    text_tokens=text_tokens,
    takes_guidance=takes_guidance,
    single_files=(ORIGINAL, DIFFUSERS),
)
