"""Single-file checkpoints (`flux1-dev.safetensors`): recognise them by their header, read the denoiser.

Text encoders, tokenizers and VAE come from a pipeline folder or hub id, the file's *base*. Tensors are
mapped into memory and cut there, so a file of 24 GB is never held twice. Torch is imported only to load.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones.model_files import ModelError
from backbones.model_folder import read_header
from backbones.spec import Config, Family, FileLayout, Part, Shapes, SingleFile

SUFFIXES = (".safetensors", ".sft")
PREFIXES = ("", "model.diffusion_model.", "transformer.")
"""What may stand before the denoiser's names; the second also where files hold encoders and VAE too."""

MUST_FIT = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "attention_head_dim")
"""Config entries that the other components, or the rotary embedding, decide."""


def read_single_file(path: Path, families: Iterable[Family], base: str | None) -> SingleFile:
    """What a checkpoint file holds, from its header alone.

    base: what encoders and VAE come from; None: the published model of its kind, if it is on this machine.
    Raises ModelError for files of other formats or models.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(
            f"{str(path)!r} is not a .safetensors file, and other formats are not loaded; "
            "give a model folder or a .safetensors file"
        )
    shapes = read_header(path)
    families = tuple(families)
    for family in families:
        for layout in family.single_files:
            for prefix in PREFIXES:
                if prefix + layout.marker in shapes:
                    return _recognised(path, layout, prefix, shapes, base)
    readable = " or ".join(family.name for family in families if family.single_files)
    raise ModelError(
        f"{str(path)!r} does not hold a {readable} transformer under names that `edit` knows;"
        " give a model folder"
    )


def _recognised(path: Path, layout: FileLayout, prefix: str, shapes: Shapes, base: str | None) -> SingleFile:
    try:
        config = layout.config(denoiser_shapes(shapes, prefix))
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is incomplete: tensor {error} is missing") from error
    return SingleFile(path, layout, prefix, config, base or layout.row(config), base is not None)


def denoiser_shapes(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes without the prefix; of a file with a prefix, only what has it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def check_fits(file: SingleFile, config: Config, base: Config, family: Family) -> None:
    """Raise ModelError unless the base's components can work with the file's denoiser."""
    if file.layout not in family.single_files:
        raise ModelError(
            f"--base {file.base!r} is a {family.name} model and {str(file.path)!r} is not; "
            "give the folder or hub id of a model of the file's kind"
        )
    different = [name for name in MUST_FIT if name in file.config and config[name] != base.get(name)]
    if different:
        name = different[0]
        raise ModelError(
            f"{str(file.path)!r} has {name} {config[name]} and the base {file.base!r} has {base.get(name)}: "
            f"it is not a plain text-to-image {family.name} model of that kind; give another --base"
        )
    if file.layout.parts is not None:
        parts = {part.key for part in file.layout.parts(config).values()}
        _check_names(file, parts)


def read_denoiser(file: SingleFile, names: Iterable[str], dtype: Any) -> dict[str, Any]:
    """Tensors by the transformer's own names: views of the mapped file, copied only where the dtype changes.

    names: of all its tensors. Raises ModelError, and what safetensors raises.
    """
    import torch
    from safetensors import safe_open

    find_parts = file.layout.parts
    parts = {name: Part(name) for name in names} if find_parts is None else find_parts(file.config)
    _check_names(file, {part.key for part in parts.values()})
    weights = {}
    with safe_open(file.path, framework="pt") as stored:
        for name, part in parts.items():
            tensor = stored.get_tensor(file.prefix + part.key)[part.start : part.stop]
            if part.swap:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            weights[name] = tensor.to(dtype)
    return weights


def _check_names(file: SingleFile, expected: set[str]) -> None:
    """Neither missing nor left over: quantised files carry scales that would be dropped silently."""
    stored = set(denoiser_shapes(read_header(file.path), file.prefix))
    missing, unknown = sorted(expected - stored), sorted(stored - expected)
    if missing or unknown:
        what = f"{len(missing)} tensors are missing" if missing else f"{len(unknown)} tensors are unknown"
        raise ModelError(
            f"{str(file.path)!r} cannot be loaded: {what}, for example {(missing or unknown)[0]!r}; "
            "quantised files are not read, give one in fp32, fp16, bf16 or plain fp8"
        )
