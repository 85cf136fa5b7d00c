"""Single-file checkpoints (`flux1-dev.safetensors`): recognise them by their header, read the denoiser.

Text encoders, tokenizers and VAE come from a pipeline folder or hub id, the file's *base*. Tensors are
mapped into memory and cut there, so a file of 24 GB is never held twice. Torch is imported only to load.

Of fp8 weights with scales (ComfyUI's "scaled fp8") each is multiplied by its scale as it is read. Scales of
inputs are for arithmetic in fp8, and are left out. GGUF files stay packed (`gguf_file.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones import gguf_file
from backbones.model_files import ModelError
from backbones.model_folder import read_header, stamp
from backbones.spec import Config, Family, FileLayout, Part, Shapes, SingleFile

SUFFIXES = (".safetensors", ".sft", gguf_file.SUFFIX)
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
"""What stands beside an fp8 weight: its scale under one of two names, its input's, and how it is packed."""
MARK = "scaled_fp8"
"""An empty tensor in files with scales."""
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
            f"{str(path)!r} is not a .safetensors or .gguf file, and other formats are not loaded; "
            "give a model folder or one of these"
        )
    shapes = stored_shapes(path)
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


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors, without what stands beside fp8 weights. Raises ModelError."""
    if is_gguf(path):
        return gguf_file.gguf_shapes(path, stamp(path))
    shapes = read_header(path)
    return {name: shape for name, shape in shapes.items() if not _is_beside(name, shapes)}


def is_gguf(path: Path) -> bool:
    """Whether a file's name says so."""
    return path.suffix.lower() == gguf_file.SUFFIX


def is_scaled(path: Path) -> bool:
    """Whether a safetensors file has scales beside its weights."""
    return any(name.endswith(SCALES) for name in read_header(path))


def _is_beside(name: str, shapes: Shapes) -> bool:
    stem, _, kind = name.rpartition(".")
    return (f".{kind}" in BESIDE and f"{stem}.weight" in shapes) or kind == MARK


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

    Those of a GGUF file are as they are there. names: of all its tensors. Raises ModelError, and what
    safetensors raises.
    """
    import torch
    from safetensors import safe_open

    find_parts = file.layout.parts
    parts = {name: Part(name) for name in names} if find_parts is None else find_parts(file.config)
    _check_names(file, {part.key for part in parts.values()})
    weights = {}
    if is_gguf(file.path):
        packed = gguf_file.gguf_tensors(file.path)
        cut = ((name, packed[file.prefix + part.key], part) for name, part in parts.items())
        return {name: gguf_file.rows(found, part.start, part.stop, part.swap) for name, found, part in cut}
    with safe_open(file.path, framework="pt") as stored:
        scales = {name for name in stored.keys() if f".{name.rpartition('.')[2]}" in BESIDE}  # noqa: SIM118
        for name, part in parts.items():
            tensor = _unscaled(file.path, stored, file.prefix + part.key, scales)[part.start : part.stop]
            if part.swap:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            weights[name] = tensor.to(dtype)
    return weights


def _unscaled(path: Path, stored: Any, key: str, beside: set[str]) -> Any:
    """A tensor times the scale that stands beside it: one for all, or one for each row."""
    tensor, stem = stored.get_tensor(key), key.removesuffix(".weight")
    if f"{stem}.comfy_quant" in beside:
        how = json.loads(bytes(stored.get_tensor(f"{stem}.comfy_quant").tolist())).get("format")
        if not str(how).startswith("float8"):
            raise ModelError(f"{str(path)!r} has weights in {how}; scaled fp8 and GGUF are read, others not")
    found = next((stem + suffix for suffix in SCALES if stem + suffix in beside), None)
    if found is None:
        return tensor
    scale = stored.get_tensor(found).float().flatten()
    if len(scale) not in (1, len(tensor)):
        raise ModelError(
            f"{str(path)!r}: {found!r} is neither one scale nor one for each of {len(tensor)} rows"
        )
    return tensor.float() * scale.reshape(-1, *(1 for _ in tensor.shape[1:]))


def _check_names(file: SingleFile, expected: set[str]) -> None:
    """Neither missing nor left over: other quantised files carry tensors that would be dropped silently."""
    stored = set(denoiser_shapes(stored_shapes(file.path), file.prefix))
    missing, unknown = sorted(expected - stored), sorted(stored - expected)
    if missing or unknown:
        what = f"{len(missing)} tensors are missing" if missing else f"{len(unknown)} tensors are unknown"
        raise ModelError(
            f"{str(file.path)!r} cannot be loaded: {what}, for example {(missing or unknown)[0]!r}; "
            "give one in fp32, fp16, bf16, fp8 (plain or scaled) or GGUF"
        )
