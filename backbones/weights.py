"""Weights into modules that were built empty: strictly, and without copying what is mapped into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import dtype

from backbones.gguf_file import load_gguf
from backbones.model_files import ModelError, load_weights
from backbones.registry import component_configs
from backbones.single_file import is_gguf, read_denoiser
from backbones.spec import HUNYUAN3D, Backbone


def build_transformer(backbone: Backbone) -> Any:
    """The transformer that a model's configuration describes; a static one is narrowed. Raises ModelError."""
    spec, configs = backbone.family.transformer, component_configs(backbone)
    if backbone.family.layout == HUNYUAN3D:
        from backbones.hunyuan3d.config import build

        transformer = build("model", configs["model"])
    else:
        import diffusers

        transformer = getattr(diffusers, spec.transformer_class).from_config(dict(configs["transformer"]))
    if backbone.static is not None and backbone.folder is not None:
        from backbones.static_folder import narrow_like

        narrow_like(transformer, spec, backbone.folder)
    return transformer


def load_transformer(backbone: Backbone, dtype: dtype) -> Any:
    """The transformer of a single file or of a folder, in `dtype`, on the CPU. Raises ModelError."""
    if backbone.family.layout == HUNYUAN3D:
        from backbones.hunyuan3d.checkpoints import load_component

        return load_component("model", Path(backbone.source)).to(dtype)
    from accelerate import init_empty_weights

    # parameters only: tables that a constructor computes and no file holds stay real
    with init_empty_weights(include_buffers=False):
        transformer = build_transformer(backbone)
    path = Path(backbone.source, "transformer") if backbone.file is None else backbone.file.path
    try:
        if backbone.file is None:
            stored = (load_file(file) for file in sorted(path.glob("*.safetensors")))
            weights = {name: tensor.to(dtype) for tensors in stored for name, tensor in tensors.items()}
        else:
            weights = read_denoiser(backbone.file, transformer.state_dict().keys(), dtype)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error}") from error
    if backbone.file is not None and is_gguf(path):
        config = backbone.file.config
        return load_gguf(weights, repr(str(path)), type(transformer).__name__, config, dtype)
    load_weights(transformer, weights, repr(str(path)))
    return transformer.eval()
