"""Names of FLUX.1's tensors in single-file checkpoints: the original layout, and diffusers' own.

In the original, q, k and v of a stream are one linear, in single blocks together with the MLP's first
half; the last modulation gives shift before scale, where diffusers has scale first. Names: the published
flux1-dev.safetensors. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from backbones.spec import Config, FileLayout, Part, Shapes

EMBEDDERS = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def original_parts(transformer: Config) -> dict[str, Part]:
    """Diffusers' name of each tensor -> where it lies in a file of the original layout."""
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    embedders = {**EMBEDDERS, **(GUIDANCE if transformer.get("guidance_embeds") else {})}
    parts = dict(_linears("", "", embedders))
    for kind in ("weight", "bias"):
        parts[f"norm_out.linear.{kind}"] = Part(f"final_layer.adaLN_modulation.1.{kind}", swap=True)
    for i in range(transformer["num_layers"]):
        old, new = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        parts |= dict(_linears(old, new, DOUBLE))
        parts |= {new + name: Part(old + key) for key, name in DOUBLE_NORMS.items()}
        parts |= dict(_rows(f"{old}img_attn.qkv", new, IMAGE_QKV, dim))
        parts |= dict(_rows(f"{old}txt_attn.qkv", new, TEXT_QKV, dim))
    for i in range(transformer["num_single_layers"]):
        old, new = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        parts |= dict(_linears(old, new, SINGLE))
        parts |= {new + name: Part(old + key) for key, name in SINGLE_NORMS.items()}
        parts |= dict(_rows(f"{old}linear1", new, (*IMAGE_QKV, "proj_mlp"), dim))
    return parts


def _linears(old: str, new: str, names: Mapping[str, str]) -> Iterator[tuple[str, Part]]:
    for key, name in names.items():
        for kind in ("weight", "bias"):
            yield f"{new}{name}.{kind}", Part(f"{old}{key}.{kind}")


def _rows(key: str, new: str, names: tuple[str, ...], dim: int) -> Iterator[tuple[str, Part]]:
    """Several linears stacked in one: `dim` rows each, the last one takes the rest."""
    for i, name in enumerate(names):
        stop = None if i == len(names) - 1 else (i + 1) * dim
        for kind in ("weight", "bias"):
            yield f"{new}{name}.{kind}", Part(f"{key}.{kind}", i * dim, stop)


def original_config(shapes: Shapes) -> dict[str, Any]:
    """What a file of the original layout says of its sizes; the rotary axes are not in it."""
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    return _config(shapes, "double_blocks", "single_blocks", norm, lambda name: name)


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """The same for a file with diffusers' names."""
    blocks, names = "transformer_blocks", {**EMBEDDERS, **GUIDANCE}
    return _config(shapes, blocks, f"single_{blocks}", f"{blocks}.0.attn.norm_q.weight", names.__getitem__)


def _config(
    shapes: Shapes, double: str, single: str, norm: str, named: Callable[[str], str]
) -> dict[str, Any]:
    """Sizes, from the names of both lists of blocks and of a query norm. named: of the original embedders."""
    dim, channels = shapes[f"{named('img_in')}.weight"]
    (head_dim,) = shapes[norm]
    return {
        "num_layers": _count(shapes, double),
        "num_single_layers": _count(shapes, single),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "joint_attention_dim": shapes[f"{named('txt_in')}.weight"][1],
        "pooled_projection_dim": shapes[f"{named('vector_in.in_layer')}.weight"][1],
        "guidance_embeds": f"{named('guidance_in.in_layer')}.weight" in shapes,
    }


def _count(shapes: Shapes, blocks: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})


def row(transformer: Config) -> str:
    """Only the dev models have a guidance embedding."""
    return "flux-dev" if transformer["guidance_embeds"] else "flux-schnell"


ORIGINAL = FileLayout("double_blocks.0.img_attn.qkv.weight", original_config, original_parts, row)
DIFFUSERS = FileLayout("single_transformer_blocks.0.proj_mlp.weight", diffusers_config, None, row)
