"""The state of a training in one file, which appears whole or not at all: weights, moments of AdamW, step.

Nothing else has a state: what is drawn at a step follows from the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_whole

NAME = "train.safetensors"


def keep(
    folder: Path, step: int, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Remember the state after `step` steps. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    write_whole({folder / NAME: lambda path: save_file(tensors, path, metadata={"step": str(step)})})


def restore(folder: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Put a kept state back; the number of steps that were done, 0 if nothing was kept. Raises ValueError."""
    file = folder / NAME
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as kept, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept.get_tensor(f"weight.{name}"))
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = kept.get_tensor(f"{key}.{name}")
                    state[key] = value if key == "step" else value.to(parameter.device)
                optimiser.state[parameter] = state
            return int(kept.metadata()["step"])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{str(file)!r} is damaged; leave out --resume to start anew") from error
