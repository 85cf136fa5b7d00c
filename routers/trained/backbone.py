"""Weights of the backbone that were trained with the routers: LoRA or all of them, on and off again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import schema
from ..spec import TransformerSpec

FILE = "backbone.safetensors"
"""Beside `bundle.json`."""


class BackboneFile(msgspec.Struct):
    """What `bundle.json` says of FILE."""

    kind: Literal["lora", "full"]
    rank: Annotated[int, Meta(ge=0, le=4096)]
    targets: Annotated[list[schema.Name], Meta(max_length=100_000)]
    sha256: str


@dataclass
class BackboneWeights:
    """kind: "lora" or "full". tensors: by parameter name; for LoRA those of the adapters alone.

    rank: of the LoRA; its scale is 1. targets: full names of the linears that have an adapter.
    """

    kind: str
    tensors: dict[str, Tensor]
    rank: int = 0
    targets: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """JSON data for `bundle.json`; the tensors go into FILE."""
        return {
            "kind": self.kind, "rank": self.rank, "targets": list(self.targets), "sha256": self.digest(),
        }  # fmt: skip

    def digest(self) -> str:
        """sha256 over names and values, so that `bundle.json`, whose hash replays carry, stands for both."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    @classmethod
    def read(cls, folder: Path, description: BackboneFile) -> BackboneWeights:
        """Raises ValueError, one line, where the file is missing or damaged."""
        file = folder / FILE
        if not file.is_file():
            raise ValueError(f"{file.name} is missing, which holds the backbone's trained weights")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged: {error}") from error
        weights = cls(description.kind, tensors, description.rank, tuple(description.targets))
        if weights.digest() != description.sha256:
            raise ValueError(f"{file.name} is not the file that this bundle was written with")
        return weights

    def apply(self, transformer: nn.Module) -> Callable[[], None]:
        """Put the weights into a transformer; the returned function takes them out again.

        What was there before stays in memory, so that it comes back bit by bit. Raises ValueError if the
        weights do not fit.
        """
        with torch.no_grad():
            return self._apply_lora(transformer) if self.kind == "lora" else self._apply_full(transformer)

    @torch.no_grad()
    def merge(self, transformer: nn.Module) -> None:
        """Make the weights the transformer's own, for good; a LoRA is added to the linears it adapts.

        Raises ValueError if the weights do not fit.
        """
        undo = self.apply(transformer)
        if self.kind != "lora":
            return
        adapted: Any = {name: transformer.get_submodule(name) for name in self.targets}
        added = {name: module.get_delta_weight("elastic") for name, module in adapted.items()}
        undo()
        for name, delta in added.items():
            weight: Any = transformer.get_submodule(name).weight
            weight.add_(delta.to(weight))

    def _apply_lora(self, transformer: nn.Module) -> Callable[[], None]:
        undo = add_lora(transformer, self.targets, self.rank)
        parameters = dict(transformer.named_parameters())
        for name, tensor in self.tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                undo()
                raise ValueError(f"the bundle's LoRA has {name} {list(tensor.shape)}, which does not fit")
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(False)
        return undo

    def _apply_full(self, transformer: nn.Module) -> Callable[[], None]:
        parameters = dict(transformer.named_parameters())
        wrong = [n for n, t in self.tensors.items() if n not in parameters or parameters[n].shape != t.shape]
        if wrong or len(self.tensors) != len(parameters):
            raise ValueError(
                f"the bundle's weights do not fit this model ({wrong[0] if wrong else 'number'})"
            )
        before = {name: parameter.data for name, parameter in parameters.items()}
        for name, tensor in self.tensors.items():
            parameter = parameters[name]
            parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)

        def undo() -> None:
            for name, data in before.items():
                parameters[name].data = data.to(parameters[name].device)

        return undo


def lora_targets(transformer: nn.Module, spec: TransformerSpec) -> tuple[str, ...]:
    """Full names of every linear inside the blocks, in order. A fused linear is one of them."""
    return tuple(
        f"{path}.{i}.{name}"
        for path in dict.fromkeys(block.path for block in spec.blocks)
        for i, block in enumerate(attrgetter(path)(transformer))
        for name, module in block.named_modules()
        if type(module) is nn.Linear
    )


def add_lora(transformer: nn.Module, targets: tuple[str, ...], rank: int) -> Callable[[], None]:
    """Give linears an adapter each (peft; B starts at 0, scale 1); the returned function removes them."""
    from peft import LoraConfig, inject_adapter_in_model

    missing = [name for name in targets if not _has(transformer, name)]
    if missing:
        raise ValueError(f"the bundle's LoRA is for {missing[0]}, which this transformer does not have")
    flags = {name: p.requires_grad for name, p in transformer.named_parameters()}
    originals = {name: transformer.get_submodule(name) for name in targets}
    attributes = set(transformer.__dict__)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), transformer, adapter_name="elastic"
    )

    def undo() -> None:
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, module)
        for name in set(transformer.__dict__) - attributes:
            del transformer.__dict__[name]
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(flags[name])

    return undo


def _has(transformer: nn.Module, name: str) -> bool:
    try:
        return isinstance(transformer.get_submodule(name), nn.Linear)
    except AttributeError:
        return False
