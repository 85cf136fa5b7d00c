"""`edit models --inspect FOLDER`: what can be controlled in a folder's transformers, without their weights.

Classes are taken from diffusers by name, never from the folder, and parameters are made on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.typical_call import typical_calls
from routers.derive import DerivationError, Derived, derive
from routers.derive.table import Row, rows


class InspectError(ValueError):
    """A folder that cannot be inspected, in one line for the user."""


@dataclass(frozen=True)
class Inspection:
    """One transformer of a folder.

    component: its name in the pipeline. rows: the blocks under control; counts: how many of each.
    left_in_full: lists that always run in full, with the reason. notes: for people.
    """

    component: str
    transformer: str
    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    left_in_full: dict[str, str]
    notes: tuple[str, ...]


def inspect_folder(folder: Path) -> list[Inspection]:
    """Describe every transformer of a pipeline folder. Raises InspectError."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise InspectError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
    entries = json.loads(index.read_text()).items()
    components = [name for name, of in entries if name.startswith("transformer") and of != [None, None]]
    if not components:
        raise InspectError(f"{folder} has no transformer: {index.name} names none")
    return [_inspect(name, folder / name / "config.json") for name in components]


def _inspect(component: str, path: Path) -> Inspection:
    if not path.is_file():
        raise InspectError(f"{path} is missing")
    transformer: Any = on_meta(json.loads(path.read_text()))
    found = _derive(transformer, dict(transformer.config))
    described = tuple(rows(found))
    counts = (
        sum(type(block).__name__ == row.block for block in transformer.get_submodule(row.path))
        for row in described
    )
    return Inspection(
        component, type(transformer).__name__, described, tuple(counts), found.left_in_full, found.notes
    )


def on_meta(config: dict[str, Any]) -> nn.Module:
    """The transformer of a config, without weights. Raises InspectError."""
    import diffusers

    name = str(config.get("_class_name"))
    made = getattr(diffusers, name, None)
    if not (isinstance(made, type) and issubclass(made, diffusers.ModelMixin)):
        raise InspectError(f"{name} is not a model of the installed diffusers {diffusers.__version__}")
    with torch.device("meta"):
        transformer: nn.Module = made.from_config(config)  # type: ignore[attr-defined]
    return transformer.eval()


def _derive(transformer: nn.Module, config: dict[str, Any]) -> Derived:
    """The description from the first typical call that runs."""
    reason = "its arguments cannot be guessed"
    for call in typical_calls(transformer, config):
        found = _try(transformer, call)
        if isinstance(found, Derived):
            return found
        reason = found
    raise InspectError(f"{type(transformer).__name__} cannot be described without a call: {reason}")


def _try(transformer: nn.Module, call: dict[str, Any]) -> Derived | str:
    """The description, or why the call does not give one."""
    try:
        return derive(transformer, call)
    except DerivationError as error:
        return str(error)
