"""Hunyuan3D for the registry and the routers: block maps of both DiTs, and what checkpoints share. No torch.

Every row of a batch decides for itself, and under guidance the unconditional rows follow the conditional
ones in the same batch: open a run with `elastic.scope(samples=B)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.spec import HUNYUAN3D, CallSize, Configs, Defaults, Family, Traits
from routers.spec import BlockSpec, MlpSpec, TransformerSpec

TRANSFORMER_2 = TransformerSpec(
    transformer_class="Hunyuan3DDiT",
    blocks=(
        BlockSpec(
            kind="double",
            block_class="DoubleStreamBlock",
            path="double_blocks",
            streams=("img", "txt"),
            returns=(0, 1),
            modulation="vec",
            mlps=(MlpSpec(in_linear="img_mlp.0", activation="img_mlp.1", out_linear="img_mlp.2"),),
        ),
        BlockSpec(
            kind="single",
            block_class="SingleStreamBlock",
            path="single_blocks",
            streams=("x",),
            returns=(),
            modulation="vec",
            # linear1 yields [q, k, v (3 dim) | MLP], linear2 reads [attention (dim) | MLP]
            mlps=(
                MlpSpec(
                    in_linear="linear1", activation="mlp_act", out_linear="linear2", in_offset=3, out_offset=1
                ),
            ),
        ),
    ),
    timestep="t",
    sample="x",
)
"""2.0, 2mini, 2mv and their -fast and -turbo versions."""

# `skip` comes from a stack that the model keeps, so the U-shaped skips flow around blocks that do not run.
_PLAIN: dict[str, Any] = {
    "path": "blocks",
    "streams": ("x",),
    "returns": (),
    "modulation": "c",
    "batched": ("cond", "skip"),
}

TRANSFORMER_21 = TransformerSpec(
    transformer_class="HunYuanDiTPlain",
    blocks=(
        BlockSpec(
            kind="plain",
            block_class="DiTBlock",
            mlps=(MlpSpec(in_linear="mlp.fc1", activation="mlp.act", out_linear="mlp.fc2"),),
            **_PLAIN,
        ),
        BlockSpec(
            kind="experts",
            block_class="MoEDiTBlock",
            # Only the shared expert is narrowed. The routed ones are not: the gate already gives a token 2 of
            # 8, and each sees tokens of all rows mixed, so a width per row has no place there.
            mlps=(
                MlpSpec(
                    in_linear="moe.shared_experts.net.0.proj",
                    activation="moe.shared_experts.net.0.act",
                    out_linear="moe.shared_experts.net.2",
                ),
            ),
            **_PLAIN,
        ),
    ),
    timestep="t",
    sample="x",
    skips=True,
)
"""2.1: blocks with a plain MLP, then blocks with experts, in one list."""


PATCH, CONDITION_SIZE = 14, 518
"""The published conditioner's: px per token and side of the picture it sees."""


def traits(configs: Configs) -> Traits:
    """The published demo's settings: 5 steps for turbo, 30 for the rest, guidance 5, resolution 256.

    Where the guidance scale is an input of the model, there is no unconditional branch.
    """
    turbo = _target(configs, "scheduler").startswith("Consistency")
    return Traits(
        Defaults(steps=5 if turbo else 30, guidance=5.0, octree_resolution=256),
        guided=not _params(configs, "model").get("guidance_embed", False),
        views=_target(configs, "image_processor") == "MVImageProcessorV2",
    )


def call_inputs(configs: Configs, size: CallSize) -> dict[str, Any]:
    """Arguments of one transformer call, on the meta device."""
    import torch

    model, vae = _params(configs, "model"), _params(configs, "vae")
    encoder = _params(configs, "conditioner")["main_image_encoder"].get("kwargs", {})
    patch = encoder.get("config", {}).get("patch_size", PATCH)
    tokens = (encoder.get("image_size", CONDITION_SIZE) // patch) ** 2 + encoder.get("use_cls_token", True)
    context = model["context_in_dim" if "context_in_dim" in model else "context_dim"]
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "x": torch.empty(size.rows, vae["num_latents"], vae["embed_dim"]),
            "t": torch.empty(size.rows),
            "contexts": {"main": torch.empty(size.rows, tokens * size.views, context)},
        }
        if model.get("guidance_embed"):
            inputs["guidance"] = torch.empty(size.rows)
    return inputs


def transformer_class(configs: Configs) -> str:
    """Name of the transformer's class; it recognises a checkpoint."""
    return _target(configs, "model")


def _target(configs: Configs, section: str) -> str:
    return str((configs.get(section) or {}).get("target", "")).rsplit(".", 1)[-1]


def _params(configs: Configs, section: str) -> Mapping[str, Any]:
    return configs[section].get("params") or {}


def _family(name: str, transformer: TransformerSpec) -> Family:
    return Family(
        name=name,
        makes="mesh",
        transformer=transformer,
        traits=traits,
        call_inputs=call_inputs,
        pipeline_class="Hunyuan3DPipeline",
        layout=HUNYUAN3D,
        dtype="fp16",  # as the checkpoints were published
        offloads=("none", "model"),
    )


FAMILY_2 = _family("Hunyuan3D 2", TRANSFORMER_2)
FAMILY_21 = _family("Hunyuan3D 2.1", TRANSFORMER_21)
