"""What a training leaves while it runs: its state, and a log of its loss terms.

The state is one file, which appears whole or not at all: weights, moments of AdamW, step. Nothing else has a
state: what is drawn at a step follows from the seed and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_whole

Log = Callable[[int, dict[str, float]], None]
"""Takes a step and its loss terms."""
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


def log_to(folder: Path, start_anew: bool) -> tuple[Log, Callable[[], None]]:
    """A log that TensorBoard reads, and how to close it. Raises ImportError without tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writers: list[Any] = []

    def log(step: int, terms: dict[str, float]) -> None:
        if not writers:  # what an attempt wrote after the state it left is overwritten
            writers.append(SummaryWriter(str(folder), purge_step=None if start_anew else step))
        for name, value in terms.items():
            writers[0].add_scalar(name if name in ("rate", "gradient") else f"loss/{name}", value, step)

    def close() -> None:
        for writer in writers:
            writer.close()

    return log, close
