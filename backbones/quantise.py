"""Weights in fewer bits, by diffusers' own quantisation: of the transformer and of text encoders.

fp8 and int8 are torchao's (of weights only: sums stay in `--dtype`), nf4 is bitsandbytes'. Steps and
budgets work on all of them; widths are fixed (routers/packed.py). Of a single file fp8 is the transformer's
alone, by diffusers' layerwise casting: each layer is cast to `--dtype` while it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backbones.model_files import ModelError
from backbones.single_file import is_gguf, is_scaled
from backbones.spec import DIFFUSERS, Backbone, Placement

PACKAGES = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
BYTES_PER_WEIGHT = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of a linear's weight; nf4 keeps a float32 scale for every 64 of them. torchao's scales are one a row."""
ENCODER, TRANSFORMER = "text_encoder", "transformer"
"""How names of components begin that are quantised."""


def check_quantise(how: str, backbone: Backbone, device: str = "cuda") -> None:
    """Raises ModelError, one line, where a model or a machine cannot do it. device: its type. Torch-free."""
    option = f"--quantize {how}"
    if backbone.family.layout != DIFFUSERS or backbone.static is not None:
        raise ModelError(f"{option} is for folders and hub ids of diffusers' pipelines; leave it out")
    if backbone.file is not None:
        _check_file(backbone.file.path, how)
    package = PACKAGES[how]
    if backbone.file is None and find_spec(package) is None:
        raise ModelError(
            f'{option} needs {package}, which is not installed: pip install "elastic-dit[quantised]"'
        )
    if device not in ("cuda", "cpu"):
        raise ModelError(f"{option} runs on cuda and cpu, not on {device}; leave it out")


def _check_file(path: Path, how: str) -> None:
    """Raises ModelError for a single file whose weights cannot be kept in fp8 as they are."""
    reason = ""
    if is_gguf(path):
        reason = "it is a GGUF file, which stays packed as it is"
    elif how != "fp8":
        reason = "of single files the only way is fp8"
    elif is_scaled(path):
        reason = "its fp8 weights have scales, which casting does not know; a plain fp8 file stays as it is"
    if reason:
        raise ModelError(f"--quantize {how} is not for {path.name!r}: {reason}; leave it out")


def quantised(name: str) -> bool:
    """Whether a component's weights are packed."""
    return name.replace(" ", "_").startswith((ENCODER, TRANSFORMER))


def quantisation(placement: Placement, index: Mapping[str, Any], dtype: Any) -> Any:
    """What `from_pretrained` is given. index: the pipeline's `model_index.json`. dtype: to compute in."""
    import diffusers
    import transformers

    parts = {name: entry for name, entry in index.items() if quantised(name) and isinstance(entry, list)}
    libraries = {"diffusers": diffusers, "transformers": transformers}
    mapping = {
        name: _config(libraries[library], placement.quantize, dtype)
        for name, (library, _) in parts.items()
        if library in libraries
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _config(library: Any, how: str, dtype: Any) -> Any:
    if how == "nf4":
        return library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return library.TorchAoConfig(Float8WeightOnlyConfig() if how == "fp8" else Int8WeightOnlyConfig())
