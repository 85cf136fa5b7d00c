"""Published `config.yaml` files: sections `{target, params}`, built strictly."""

# mypy: no-warn-return-any
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backbones.model_files import ModelError, read_yaml

from . import dit_v2, dit_v21, shape_vae
from .conditioner import SingleImageEncoder
from .image_processor import ImageProcessor, MultiViewImageProcessor
from .pipeline import Hunyuan3DPipeline
from .schedulers import ConsistencyFlowMatchEulerScheduler, FlowMatchEulerScheduler

COMPONENTS = ("model", "vae", "conditioner")
SECTIONS = (*COMPONENTS, "scheduler", "image_processor", "pipeline")


class Target(NamedTuple):
    """What a config's `target` builds, and the settings it may carry without effect."""

    build: Callable[..., Any]
    ignored: frozenset[str] = frozenset()


TARGETS: dict[str, Target] = {
    "Hunyuan3DDiT": Target(dit_v2.Hunyuan3DDiT, dit_v2.IGNORED_PARAMS),
    "HunYuanDiTPlain": Target(dit_v21.HunYuanDiTPlain, dit_v21.IGNORED_PARAMS),
    "ShapeVAE": Target(shape_vae.ShapeVAE, shape_vae.IGNORED_PARAMS),
    "SingleImageEncoder": Target(SingleImageEncoder),
    "FlowMatchEulerDiscreteScheduler": Target(FlowMatchEulerScheduler),
    "ConsistencyFlowMatchEulerDiscreteScheduler": Target(ConsistencyFlowMatchEulerScheduler),
    "ImageProcessorV2": Target(ImageProcessor),
    "MVImageProcessorV2": Target(MultiViewImageProcessor),
    "Hunyuan3DDiTFlowMatchingPipeline": Target(Hunyuan3DPipeline),
}
"""By the last component of the dotted path; 2.0 and 2.1 keep the same classes in different modules."""


def read_config(path: Path) -> dict[str, Any]:
    """Parse `config.yaml`: SECTIONS as keys."""
    config = read_yaml(path)
    unknown = set(config) - set(SECTIONS)
    if unknown:
        raise ModelError(f"{path}: unknown sections {sorted(unknown)}; known are {', '.join(SECTIONS)}")
    return config


def build(section: str, spec: Mapping[str, Any], **parts: Any) -> Any:
    """Construct what a section `{target, params}` names. Raises ModelError on anything unknown.

    parts: other components, for the pipeline.
    """
    if not isinstance(spec, Mapping) or "target" not in spec or set(spec) - {"target", "params"}:
        raise ModelError(
            f"section {section!r} must have the keys 'target' and 'params', not {sorted(spec or ())}"
        )
    name = str(spec["target"]).rsplit(".", 1)[-1]
    if name not in TARGETS:
        raise ModelError(f"section {section!r}: unknown target {name!r}; known are {', '.join(TARGETS)}")
    target = TARGETS[name]
    params = dict(spec.get("params") or {})
    allowed = set(inspect.signature(target.build).parameters)
    unknown = set(params) - allowed - target.ignored
    if unknown:
        raise ModelError(
            f"section {section!r}: {name} does not have the settings {sorted(unknown)}; "
            f"it has {', '.join(sorted(allowed))}"
        )
    kept = {key: value for key, value in params.items() if key not in target.ignored}
    try:
        return target.build(**kept, **parts)
    except (TypeError, ValueError) as error:
        raise ModelError(f"section {section!r}: {error}") from error
