"""Folders with a static transformer: fewer blocks and narrower MLPs than its class builds.

The number of blocks is part of the model's own configuration. Widths are not, for diffusers' and the
published classes have one width for all blocks, so `edit.json` holds them under "static"
(`StaticShape`): the transformer is built as its configuration says, narrowed before it has
weights, and then loaded strictly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.model_files import ModelError, read_json
from backbones.spec import Backbone

if TYPE_CHECKING:
    from routers.static.frozen import StaticShape

DEFAULTS_FILE, ENTRY = "edit.json", "static"
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


def read_shape(folder: Path | None) -> StaticShape | None:
    """The static shape of a folder's transformer; None if it is an ordinary one.

    Raises ModelError, one line, if it cannot be understood.
    """
    if folder is None or not (folder / DEFAULTS_FILE).is_file():
        return None
    data = read_json(folder / DEFAULTS_FILE)
    if ENTRY not in data:
        return None
    from routers.static.frozen import StaticShape

    try:
        return StaticShape.from_dict(data[ENTRY])
    except ValueError as error:
        raise ModelError(f"{folder / DEFAULTS_FILE}: {error}") from error


def narrow_like(transformer: Any, spec: Any, folder: Path | None) -> None:
    """Narrow a transformer that was built from a folder's configuration. Raises ModelError."""
    shape = read_shape(folder)
    if shape is None:
        return
    from routers.static.frozen import narrow

    try:
        narrow(transformer, spec, shape)
    except ValueError as error:
        assert folder is not None
        raise ModelError(f"{folder / DEFAULTS_FILE}: {error}") from error


def load_transformer(backbone: Backbone, dtype: Any) -> Any:
    """The static transformer of a pipeline folder, in `dtype`, on the CPU; None if it is an ordinary one.

    Raises ModelError, one line, if weights and shape do not fit.
    """
    if read_shape(backbone.folder) is None:
        return None
    import diffusers
    from accelerate import init_empty_weights

    assert backbone.folder is not None
    folder = backbone.folder / "transformer"
    transformer_class = getattr(diffusers, backbone.family.transformer.transformer_class)
    # parameters only: tables that a constructor computes and no file holds stay real
    with init_empty_weights(include_buffers=False):
        transformer = transformer_class.from_config(transformer_class.load_config(folder))
    narrow_like(transformer, backbone.family.transformer, backbone.folder)
    weights = _read_weights(folder, dtype)
    try:
        transformer.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(f"{str(folder)!r} cannot be loaded: {' '.join(lines[:2])[:300]}") from error
    return transformer.eval()


def _read_weights(folder: Path, dtype: Any) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(folder)!r} cannot be read: {error}") from error
    return weights


def block_counts(transformer: Any, spec: Any) -> dict[str, int]:
    """The settings that tell a configuration how many blocks this transformer has."""
    counts = {COUNTS[block.path]: len(transformer.get_submodule(block.path)) for block in spec.blocks}
    for block in spec.blocks:
        if block.kind == EXPERT_KIND:
            modules = transformer.get_submodule(block.path)
            counts[EXPERT_COUNT] = sum(type(m).__name__ == block.block_class for m in modules)
    return counts
