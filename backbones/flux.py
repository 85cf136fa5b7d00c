"""FLUX.1: 19 dual-stream blocks, then 38 single-stream ones; CLIP and T5; distilled guidance."""

from __future__ import annotations

from typing import Any

from backbones.flux_checkpoint import DIFFUSERS, ORIGINAL
from backbones.spec import CallSize, Config, Configs, Defaults, Family, Traits
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


def traits(configs: Configs) -> Traits:
    """With a guidance embedding it is a dev model (28 steps, 3.5), without one a schnell model (4 steps).

    Guidance is distilled into the model: there is no unconditional branch.
    """
    dev = bool(configs["transformer"].get("guidance_embeds", False))
    steps, guidance, tokens = (28, 3.5, DEV_TOKENS) if dev else (4, 0.0, SCHNELL_TOKENS)
    return Traits(
        Defaults(steps, guidance, 1024, 1024, tokens),
        size_multiple(configs["vae"]),
        guided=False,
        takes_guidance=dev,
    )


def text_tokens(prompt: str, max_sequence_length: int | None) -> int:
    """T5 prompts are padded to the full length, whatever the prompt."""
    return max_sequence_length or DEV_TOKENS


def call_inputs(configs: Configs, size: CallSize) -> dict[str, Any]:
    """Arguments of one transformer call, on the meta device."""
    import torch

    config, multiple = configs["transformer"], size_multiple(configs["vae"])
    tokens = (size.height // multiple) * (size.width // multiple)
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(size.rows, tokens, config.get("in_channels", 64)),
            "encoder_hidden_states": torch.empty(
                size.rows, size.text, config.get("joint_attention_dim", 4096)
            ),
            "pooled_projections": torch.empty(size.rows, config.get("pooled_projection_dim", 768)),
            "timestep": torch.empty(size.rows),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(size.text, 3),
            "guidance": torch.empty(size.rows) if config.get("guidance_embeds") else None,
            "return_dict": False,
        }


FAMILY = Family(
    name="FLUX.1",
    makes="picture",
    transformer=TRANSFORMER,
    traits=traits,
    call_inputs=call_inputs,
    pipeline_class="FluxPipeline",
    text_tokens=text_tokens,
    single_files=(ORIGINAL, DIFFUSERS),
)
