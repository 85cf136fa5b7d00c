"""Hunyuan3D shape generation: image in, mesh out. Both DiTs, shape VAE, conditioner, pipeline, surfaces.

Written independently from a description of the published checkpoints; contains none of Tencent's code.
Names resolve on first use, so importing this package imports no torch.
"""

import importlib
from typing import Any

_HOME = {
    "Hunyuan3DDiT": "dit_v2",
    "HunYuanDiTPlain": "dit_v21",
    "ShapeVAE": "shape_vae",
    "SingleImageEncoder": "conditioner",
    "ImageProcessor": "image_processor",
    "MultiViewImageProcessor": "image_processor",
    "FlowMatchEulerScheduler": "schedulers",
    "ConsistencyFlowMatchEulerScheduler": "schedulers",
    "Hunyuan3DPipeline": "pipeline",
    "ShapeOutput": "pipeline",
    "NoSurfaceError": "mesh",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
