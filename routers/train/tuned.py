"""Which weights of the backbone are trained: none, a LoRA's or all, while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..spec import TransformerSpec
from ..trained.backbone import BackboneWeights, add_lora, lora_targets
from .settings import TrainSettings


@dataclass
class Tuned:
    """Parameters that train, by name, in float32. before: their values in the dense model, which teaches."""

    parameters: dict[str, nn.Parameter]
    before: dict[str, Tensor]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, the transformer is what it was before the training."""
        now = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.before[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = now[name]


@contextmanager
def tuned(transformer: nn.Module, spec: TransformerSpec, settings: TrainSettings) -> Iterator[Tuned]:
    """What trains; the transformer is left as it was."""
    with ExitStack() as undo:
        for parameter in transformer.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        transformer.requires_grad_(False)
        parameters: dict[str, nn.Parameter] = {}
        if settings.train == "lora":
            torch.manual_seed(settings.seed)
            undo.callback(add_lora(transformer, lora_targets(transformer, spec), settings.rank))
            parameters = {n: p for n, p in transformer.named_parameters() if ".lora_" in n}
        elif settings.train == "full":
            parameters = dict(transformer.named_parameters())
        before = {}
        for name, parameter in parameters.items():
            undo.callback(setattr, parameter, "data", parameter.data)
            before[name] = parameter.data.float()
            parameter.data = before[name].clone()
            parameter.requires_grad_(True)
        yield Tuned(parameters, before)


def tuned_weights(
    transformer: nn.Module, spec: TransformerSpec, settings: TrainSettings, tensors: Mapping[str, Tensor]
) -> BackboneWeights | None:
    """What a bundle keeps of trained tensors, for a transformer that is as it was; None for routers alone."""
    if settings.train == "routers":
        return None
    if settings.train == "full":
        dtype = next(transformer.parameters()).dtype
        return BackboneWeights("full", {name: t.to(dtype) for name, t in tensors.items()})
    return BackboneWeights("lora", dict(tensors), settings.rank, lora_targets(transformer, spec))
