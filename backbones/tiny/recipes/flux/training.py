"""One training loop for every step: bounded by wall time, resumable, with an EMA and progress lines."""

import argparse
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.tiny.recipes.dit import apply_gradients, save
from backbones.tiny.recipes.dit import arguments as common_arguments
from backbones.tiny.recipes.dit import schedule as warm_constant_cosine
from backbones.tiny.recipes.muon import Muon

RUNS = Path("runs/flux")
SAVE_EVERY = 120.0  # s
COLLECT_EVERY = 200  # steps; without it a long CPU run's memory creeps up


@dataclass
class Step:
    """What one step measured: the loss to descend, numbers for the log, and how many samples it saw."""

    loss: Tensor
    samples: int
    shown: dict[str, float] = field(default_factory=dict)


def cosine(progress: float, step: int) -> float:
    """Warm-up over 50 steps, then a cosine to 2 % at the end of the wall time; a factor of the peak rate."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


SCHEDULES: dict[str, Callable[[float, int], float]] = {"cosine": cosine, "constant": warm_constant_cosine}


@dataclass
class Loop:
    """Optimises `model` until `minutes` of training time, summed over all resumed runs, are used up.

    name: first word of progress lines. optimizers: Muon, then AdamW (see `optimizers_for`).
    checkpoint: the file to write and to resume from. lr: peak learning rate of Muon. ema: decay in [0, 1).
    schedule: a key of SCHEDULES. max_steps: stop after so many steps in all; 0: no limit.
    """

    name: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    checkpoint: Path
    minutes: float
    lr: float
    ema: float = 0.999
    schedule: str = "cosine"
    seed: int = 0
    max_steps: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.params.items()}
        self.step, self.used = 0, 0.0
        if self.checkpoint.exists():
            self._resume()
        # A resumed run draws other noise than the run it continues, but always the same.
        self.generator = torch.Generator().manual_seed(self.seed + 1 + self.step)
        torch.manual_seed(self.seed + 1 + self.step)

    @classmethod
    def from_args(
        cls, name: str, model: nn.Module, is_matrix: Callable[[str, Tensor], bool], folder: str,
        args: argparse.Namespace, **options,
    ) -> "Loop":  # fmt: skip
        """A loop with the options of `arguments`, that keeps its checkpoint in `args.out`/`folder`.

        is_matrix: (name, weight) -> whether Muon takes it; AdamW takes the other trainable weights.
        """
        return cls(
            name, model, optimizers_for(model, args.lr, is_matrix), args.out / folder / "last.pt",
            args.minutes, args.lr, args.ema, seed=args.seed, max_steps=args.max_steps, **options,
        )  # fmt: skip

    @property
    def progress(self) -> float:
        """Share of the training time used, in [0, 1]; with `max_steps`, the larger of both shares."""
        steps = self.step / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(self.used / max(self.minutes * 60, 1e-9), steps))

    def run(self, take: Callable[[float], Step]) -> None:
        """Train. take: computes one step's loss, given the progress in [0, 1]."""
        started, base, saved, logged = time.time(), self.used, time.time(), time.time()
        window: list[Step] = []
        while self.progress < 1.0:
            taken = take(self.progress)
            self.model.zero_grad(set_to_none=True)
            taken.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
            rate = self.lr * SCHEDULES[self.schedule](self.progress, self.step)
            apply_gradients(self.optimizers, rate)
            self.step += 1
            self._average()
            taken.shown = {"loss": taken.loss.item(), **taken.shown}
            taken.loss = taken.loss.detach()
            window.append(taken)
            self.used = base + time.time() - started
            if self.step % self.log_every == 0 or self.progress >= 1.0:
                self._log(window, norm.item(), rate, time.time() - logged)
                logged, window = time.time(), []
            if self.step % COLLECT_EVERY == 0:
                gc.collect()
            if time.time() - saved > SAVE_EVERY:
                self.save()
                saved = time.time()
        self.save()

    def save(self) -> None:
        """Write the checkpoint whole."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        save(self.checkpoint, model=self.model.state_dict(), optimizers=states, ema=self.average,
             step=self.step, used=self.used)  # fmt: skip

    def load_average(self) -> nn.Module:
        """The model with its EMA weights in place, in eval mode."""
        self.model.load_state_dict(self.average, strict=False)
        return self.model.eval()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step, self.used = state["ema"], state["step"], state["used"]
        print(f"{self.name}: resumed at step {self.step}, {self.used / 60:.1f} min used", flush=True)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema, self.step / (20 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.params.values()), 1 - decay)

    def _log(self, window: list[Step], norm: float, rate: float, seconds: float) -> None:
        keys = dict.fromkeys(key for step in window for key in step.shown)
        columns = {key: [step.shown[key] for step in window if key in step.shown] for key in keys}
        shown = " ".join(f"{key} {sum(values) / len(values):.4g}" for key, values in columns.items())
        speed = sum(step.samples for step in window) / max(seconds, 1e-9)
        print(f"{self.name}: step {self.step} {100 * self.progress:.1f}% {shown} grad {norm:.2f} "
              f"lr {rate:.1e} {speed:.0f}/s", flush=True)  # fmt: skip


def optimizers_for(
    model: nn.Module, lr: float, is_matrix: Callable[[str, Tensor], bool]
) -> list[torch.optim.Optimizer]:
    """Muon for the trainable weights that `is_matrix(name, weight)` picks, AdamW for the others."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if is_matrix(name, p) else others).append(p)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=lr), adam]


def arguments(description: str, minutes: float, lr: float, ema: float) -> argparse.ArgumentParser:
    """The options that every training step shares."""
    parser = common_arguments(description, str(RUNS), minutes)
    parser.set_defaults(tokenizer=RUNS / "tokenizers")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate of Muon")
    parser.add_argument("--ema", type=float, default=ema)
    parser.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; 0: no limit")
    return parser


def result_arguments(description: str) -> argparse.ArgumentParser:
    """The options of every step that looks at a trained model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "dit" / "last.pt")
    parser.add_argument("--vae", type=Path, default=RUNS / "vae" / "model")
    parser.add_argument("--tokenizer", type=Path, default=RUNS / "tokenizers")
    return parser
