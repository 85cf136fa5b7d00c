"""Full-size key tables of the public checkpoints: each must fit a module exactly, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.hunyuan3d.config import build
from backbones.model_files import ModelError, check_keys
from backbones.tiny.recipes.shapes.point_encoder import EncodingShapeVAE

from .runner import Comparison

DIT_V2 = {"target": "Hunyuan3DDiT"}
DIT_V21_PARAMS = {
    "hidden_size": 2048,
    "context_dim": 1024,
    "depth": 21,
    "num_heads": 16,
    "qk_norm": True,
    "qkv_bias": False,
}
VAE_PARAMS = {
    "num_latents": 3072,
    "embed_dim": 64,
    "width": 1024,
    "heads": 16,
    "num_decoder_layers": 16,
    "include_pi": False,
    "qkv_bias": False,
    "qk_norm": True,
    "point_feats": 4,
}
TURBO_PARAMS = {
    **VAE_PARAMS,
    "geo_decoder_downsample_ratio": 2,
    "geo_decoder_mlp_expand_ratio": 1,
    "geo_decoder_ln_post": False,
}
GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "image_size": 518,
    "use_swiglu_ffn": True,
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}


def _dino(config: dict[str, Any]) -> dict[str, Any]:
    kwargs = {"config": config, "image_size": 518, "use_cls_token": True}
    encoder = {"type": "DinoImageEncoder", "kwargs": kwargs}
    return {"target": "SingleImageEncoder", "params": {"main_image_encoder": encoder}}


SPECS: dict[str, dict[str, Any]] = {
    "model.v2_0": DIT_V2,
    "model.v2_0_turbo": {**DIT_V2, "params": {"guidance_embed": True}},
    "model.v2_mini": {**DIT_V2, "params": {"depth": 8, "depth_single_blocks": 16}},
    "model.v2_mini_turbo": {
        **DIT_V2,
        "params": {"depth": 8, "depth_single_blocks": 16, "guidance_embed": True},
    },
    "model.v2_1": {"target": "HunYuanDiTPlain", "params": DIT_V21_PARAMS},
    "vae.decoder_only": {"target": "ShapeVAE", "params": VAE_PARAMS},
    "vae.turbo_decoder_only": {"target": "ShapeVAE", "params": TURBO_PARAMS},
    "conditioner.dinov2_giant": _dino(GIANT),
    "conditioner.dinov2_large": _dino(LARGE),
}
"""Table name -> config section with the published sizes."""
WITH_ENCODER = "vae.full_point_feats4"
TABLES = sorted({*SPECS, WITH_ENCODER})


def read_table(path: Path) -> dict[str, tuple[int, ...]]:
    """Expand a table's rows: the first `{i}` is the block, [first, last, count]; a second one, the expert."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    experts = next((row["shape"][0] for row in rows if row["key"].endswith("moe.gate.weight")), 0)
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        names = [row["key"]]
        if row["block_indices"] is not None:
            first, last, _ = row["block_indices"]
            names = [row["key"].replace("{i}", str(i), 1) for i in range(first, last + 1)]
        if "{i}" in names[0]:
            names = [name.replace("{i}", str(i)) for name in names for i in range(experts)]
        shapes.update(dict.fromkeys(names, tuple(row["shape"])))
    return shapes


def build_on_meta(name: str) -> nn.Module:
    """The module of a table at full size, without memory."""
    with torch.device("meta"):
        if name == WITH_ENCODER:
            return EncodingShapeVAE(**VAE_PARAMS)
        module: nn.Module = build(name, SPECS[name])
    return module


def check_table(path: Path) -> int:
    """Number of tensors of a table that fits its module; raises ModelError if it does not."""
    table = read_table(path)
    check_keys(build_on_meta(path.stem), table, path.stem)
    return len(table)


def check_tables(folder: Path) -> list[Comparison]:
    """One comparison per table of a `keys/` folder; tables of other families are not compared."""
    comparisons = []
    for path in sorted(folder.glob("*.json")):
        if path.stem not in TABLES:
            comparisons.append(Comparison(path.stem, 0.0, True, note="not compared"))
            continue
        try:
            note = f"{check_table(path)} tensors"
            comparisons.append(Comparison(path.stem, 0.0, True, "exact", note))
        except ModelError as error:
            comparisons.append(Comparison(path.stem, float("inf"), False, "exact", str(error)))
    return comparisons
