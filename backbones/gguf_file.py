"""GGUF files: names and shapes by the gguf package, weights by diffusers, packed as they are in the file."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backbones.model_files import ModelError, first_line
from backbones.model_folder import Stamp
from backbones.spec import Config

SUFFIX = ".gguf"


@functools.lru_cache(maxsize=8)
def gguf_shapes(file: Path, _stamp: Stamp) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as PyTorch has them. Raises ModelError, also without the package."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            f'{str(file)!r} needs gguf, which is not installed: pip install "elastic-dit[quantised]"'
        ) from None
    try:
        tensors = GGUFReader(file).tensors
        return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(file)!r} is not a complete GGUF file: {first_line(error)}") from error


def gguf_tensors(file: Path) -> dict[str, Any]:
    """Tensors by name: packed ones as diffusers' GGUFParameter. Raises ModelError."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    try:
        return dict(load_gguf_checkpoint(str(file)))
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(file)!r} cannot be loaded: {first_line(error)}") from error


def rows(tensor: Any, start: int | None, stop: int | None, swap: bool) -> Any:
    """Some rows of a tensor, packed or not: a packed row is whole blocks of bytes. swap: their halves."""
    import torch

    kind = getattr(tensor, "quant_type", None)
    cut = (tensor if kind is None else tensor.as_tensor())[start:stop]
    cut = torch.cat(cut.chunk(2)[::-1]) if swap else cut
    return cut if kind is None else type(tensor)(cut, quant_type=kind)


def load_gguf(tensors: dict[str, Any], name: str, transformer_class: str, config: Config, dtype: Any) -> Any:
    """The transformer on the CPU; a linear's weights become `dtype` when it is called.

    tensors: by the transformer's own names. name: of the file. Raises ModelError.
    """
    import diffusers

    kind = getattr(diffusers, transformer_class)
    how = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**config, "_class_name": transformer_class}))
        try:
            transformer = kind.from_single_file(
                tensors, config=folder, quantization_config=how, torch_dtype=dtype
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{name} cannot be loaded: {first_line(error)}") from error
    return transformer.eval()
