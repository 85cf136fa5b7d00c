"""What both training steps share: optimisers, learning rate, EMA, a wall-time clock that resumes.

Nothing here knows what is trained.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbones.tiny.recipes.dit import ADAM_FACTOR, save, schedule
from backbones.tiny.recipes.muon import Muon

SAVE_SECONDS = 120.0


def plain_attention():
    """Context: attention as two products; the fused CPU kernel's backward pass is far slower here."""
    return sdpa_kernel([SDPBackend.MATH])


def compile_blocks(modules: list[nn.Module], enabled: bool) -> None:
    """Compile modules in place; their parameters keep their names."""
    if enabled:
        for module in modules:
            module.compile(dynamic=False)


@dataclass
class Trainer:
    """Muon for the matrices of blocks, AdamW for the rest, EMA, and checkpoints every two minutes.

    model: what is trained; a parameter with two dimensions goes to Muon when `is_matrix` says so.
    minutes: training time over all resumed runs. lr: Muon's; AdamW takes ADAM_FACTOR of it.
    """

    model: nn.Module
    out: Path
    minutes: float
    lr: float
    is_matrix: Callable[[str], bool]
    ema_decay: float = 0.999
    decay_from: float = 0.5
    step: int = 0
    used: float = 0.0
    ema: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in self.params.items() if p.dim() == 2 and self.is_matrix(name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.params.values() if id(p) not in chosen]
        adam = torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = [Muon(matrices, lr=self.lr), adam]
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()
        self._base, self._started, self._saved = self.used, time.time(), time.time()

    @property
    def checkpoint(self) -> Path:
        """Where the state lies."""
        return self.out / "last.pt"

    @property
    def progress(self) -> float:
        """Share of the training time used, in [0, 1]."""
        return min(1.0, self.used / (self.minutes * 60))

    def running(self) -> bool:
        """Advance the clock; False when the time is up, after a last save."""
        self.used = self._base + time.time() - self._started
        over = self.used >= self.minutes * 60
        if over or time.time() - self._saved > SAVE_SECONDS:
            self.save()
        return not over

    def pause(self, seconds: float) -> None:
        """Do not count time spent on a check."""
        self._started += seconds

    def update(self, loss: Tensor) -> tuple[float, float]:
        """Backward pass, clipped step of both optimisers, EMA; returns gradient norm and learning rate."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        lr = self.lr * schedule(self.progress, self.step, self.decay_from)
        for optimizer, factor in zip(self.optimizers, (1.0, ADAM_FACTOR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.params.values()], 1 - decay)
        return float(norm), lr

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        model = self.model.state_dict()
        save(self.checkpoint, model=model, optimizers=states, ema=self.ema, step=self.step, used=self.used)
        self._saved = time.time()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema, self.step, self.used = state["ema"], state["step"], state["used"]

    def swap_ema(self) -> None:
        """Exchange the model's weights with the EMA's; a second call undoes it."""
        with torch.no_grad():
            for name, p in self.params.items():
                kept = p.detach().clone()
                p.copy_(self.ema[name])
                self.ema[name] = kept


def arguments(description: str, out: str, minutes: float, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options that the training steps share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/shapes/data"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--minutes", type=float, default=minutes, help="training time, over all resumed runs")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr, help="Muon's; AdamW takes a fixed share of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--puff-share", type=float, default=0.55, help="share of inflated silhouettes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check-minutes", type=float, default=8.0, help="between held-out checks")
    return parser
