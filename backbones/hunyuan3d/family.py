"""Hunyuan3D for the registry and the routers: block maps of both DiTs, and what checkpoints share. No torch.

Every row of a batch decides for itself, and under guidance the unconditional rows follow the conditional
ones in the same batch: open a run with `elastic.scope(samples=B)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.spec import MeshDefaults, MeshFamily
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


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Whether the guidance scale is an input of the model, so that there is no unconditional branch."""
    return bool((config["model"].get("params") or {}).get("guidance_embed", False))


def takes_views(config: Mapping[str, Any]) -> bool:
    """Whether the model is conditioned on several named views of one object."""
    return _target(config, "image_processor") == "MVImageProcessorV2"


def defaults(config: Mapping[str, Any]) -> MeshDefaults:
    """The published demo's settings: 5 steps for turbo, 30 for the rest, resolution 256."""
    turbo = _target(config, "scheduler").startswith("Consistency")
    return MeshDefaults(steps=5 if turbo else 30)


def _target(config: Mapping[str, Any], section: str) -> str:
    return str((config.get(section) or {}).get("target", "")).rsplit(".", 1)[-1]


def _family(name: str, transformer: TransformerSpec) -> MeshFamily:
    return MeshFamily(
        name=name,
        transformer=transformer,
        is_distilled=is_distilled,
        takes_views=takes_views,
        defaults=defaults,
    )


FAMILY_2 = _family("Hunyuan3D 2", TRANSFORMER_2)
FAMILY_21 = _family("Hunyuan3D 2.1", TRANSFORMER_21)
