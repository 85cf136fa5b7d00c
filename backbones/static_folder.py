"""Static transformers in model folders: fewer blocks and narrower MLPs than their class builds.

The number of blocks is part of the model's own configuration. Widths are not, for diffusers' and the
published classes have one width for all blocks, so `edit.json` holds them under "static"
(`StaticShape`): the transformer is built as its configuration says, narrowed before it has
weights, and then loaded strictly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backbones.model_files import DEFAULTS_FILE, STATIC, ModelError
from backbones.model_folder import read_model_folder
from routers.static.frozen import StaticShape, narrow

COUNTS = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
    "double_blocks": "depth",
    "single_blocks": "depth_single_blocks",
    "blocks": "depth",
}
"""Settings that hold the number of blocks, by the path of their list."""
EXPERT_KIND, EXPERT_COUNT = "experts", "num_moe_layers"
"""The last blocks of Hunyuan3D 2.1 have experts, and how many is a setting of its own."""


def narrow_like(transformer: Any, spec: Any, folder: Path) -> None:
    """Narrow a transformer that was built from a static folder's configuration. Raises ModelError."""
    entry = read_model_folder(folder).says.get(STATIC)
    try:
        narrow(transformer, spec, StaticShape.from_dict(entry))
    except ValueError as error:
        raise ModelError(f"{folder / DEFAULTS_FILE}: {error}") from error


def block_counts(transformer: Any, spec: Any) -> dict[str, int]:
    """The settings that tell a configuration how many blocks this transformer has."""
    counts = {COUNTS[block.path]: len(transformer.get_submodule(block.path)) for block in spec.blocks}
    for block in spec.blocks:
        if block.kind == EXPERT_KIND:
            modules = transformer.get_submodule(block.path)
            counts[EXPERT_COUNT] = sum(type(m).__name__ == block.block_class for m in modules)
    return counts
