"""Elastic execution of diffusion transformers: routers, feature cache, MLP widths, budgets.

    elastic = routers.attach(pipe, "bundle-folder", budget=0.6)
    image = pipe("a cat").images[0]
    print(elastic.summary()); elastic.detach()

Importing this package imports no torch; its names load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .spec import WIDTHS, BlockSpec, MlpSpec, TransformerSpec

if TYPE_CHECKING:
    from .attachment import attach as attach
    from .bundle import Bundle as Bundle
    from .bundle import load_bundle as load_bundle
    from .elastic import Elastic as Elastic
    from .policy import FixedPolicy as FixedPolicy
    from .policy import OpenPolicy as OpenPolicy
    from .router import Router as Router
    from .trace import Trace as Trace

_HOME = {
    "attach": "attachment",
    "load_bundle": "bundle",
    "Bundle": "bundle",
    "Elastic": "elastic",
    "FixedPolicy": "policy",
    "OpenPolicy": "policy",
    "Router": "router",
    "Trace": "trace",
}

__all__ = ["WIDTHS", "BlockSpec", "MlpSpec", "TransformerSpec", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        raise
