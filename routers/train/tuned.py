"""Which weights of the backbone are trained: none, a LoRA's or all, while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..spec import TransformerSpec
from ..trained.backbone import BackboneWeights, add_lora, lora_targets
from .settings import TrainSettings


@contextmanager
def tuned(
    transformer: nn.Module, spec: TransformerSpec, settings: TrainSettings
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that train, by name, in float32; the transformer is left as it was."""
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
        for parameter in parameters.values():
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)
        yield parameters


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
