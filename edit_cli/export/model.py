"""A model folder as an export: written in its source's own layout, and loaded again as users would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from backbones import loading, registry
from backbones import static_folder as static
from backbones.model_files import DEFAULTS_FILE
from backbones.spec import DIFFUSERS
from backbones.weights import load_transformer
from edit_cli.errors import EditError
from edit_cli.export.source import Source, put_in
from edit_cli.generation.samples import PICTURES_FOLDER

PROMPTS_FILE = "calibration.txt"


def save_model(
    source: Source,
    transformer: nn.Module,
    folder: Path,
    shard_size: str | None,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """The source's pipeline with this transformer; `edit.json` with its defaults and more `entries`.

    Raises EditError for shards of a layout that has one file.
    """
    if source.backbone.family.layout != DIFFUSERS:
        if shard_size is not None:
            raise EditError(
                "--shard-size is for pipelines of diffusers; mesh models are one file: leave it out"
            )
        _save_mesh_model(source, transformer, folder)
    else:
        with put_in(source.pipe, transformer), loading.quiet_libraries():
            source.pipe.save_pretrained(folder, safe_serialization=True, max_shard_size=shard_size)
        _forget_origin(folder)
    defaults = {name: value for name, value in asdict(source.backbone.defaults).items() if value is not None}
    text = json.dumps({**defaults, **(entries or {})}, indent=1)
    (folder / DEFAULTS_FILE).write_text(text + "\n", encoding="utf-8")
    origin = source.backbone.folder
    if origin is not None and (origin / PROMPTS_FILE).is_file():
        shutil.copy(origin / PROMPTS_FILE, folder)
    if origin is not None and (origin / PICTURES_FOLDER).is_dir():
        shutil.copytree(origin / PICTURES_FOLDER, folder / PICTURES_FOLDER)


def _save_mesh_model(source: Source, transformer: nn.Module, folder: Path) -> None:
    from backbones.hunyuan3d.checkpoints import save_checkpoint
    from backbones.hunyuan3d.config import read_config
    from backbones.hunyuan3d.folders import resolve_folder

    config = read_config(resolve_folder(source.backbone.source) / "config.yaml")
    counts = static.block_counts(transformer, source.backbone.family.transformer)
    params = {**(config["model"].get("params") or {}), **counts}
    config["model"] = {**config["model"], "params": params}
    save_checkpoint(folder, config, {**source.pipe.components, "model": transformer})


def _forget_origin(folder: Path) -> None:
    """Diffusers notes where the original lay; that is a path of this machine."""
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load_again(source: Source, folder: Path) -> Any:
    """The transformer alone, as `edit generate --model FOLDER` finds it, on the CPU: there need be no room
    for it beside the one that it is compared with.
    """
    return load_transformer(registry.resolve(str(folder)), source.dtype)


def largest_weight_difference(one: nn.Module, other: nn.Module) -> float:
    """Of all weights and buffers, one at a time, on the CPU; infinite where the modules are not alike."""
    left, right = dict(one.state_dict()), dict(other.state_dict())
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (left, right)]
    if shapes[0] != shapes[1] or _settings(one) != _settings(other):
        return float("inf")
    pairs = ((tensor.cpu().double(), right[name].cpu().double()) for name, tensor in left.items())
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The configuration of a class of diffusers, without what says where it came from."""
    told: Any = getattr(module, "config", None) or {}
    return {name: value for name, value in dict(told).items() if not name.startswith("_")}
