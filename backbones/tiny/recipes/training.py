"""The training loop of every step: bounded by wall time, resumable, with an EMA and progress lines.

Nothing here knows what is trained.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.tiny.recipes.muon import Muon

SAVE_SECONDS = 120.0
COLLECT_EVERY = 200  # steps; without it a long CPU run's memory creeps up
ADAM_FACTOR = 0.6  # AdamW's learning rate relative to Muon's
MAX_NORM = 1.0  # of the gradients of a step
ADAM_OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}

Schedule = Callable[[float, int], float]  # (progress in [0, 1], steps taken) -> factor of the peak rate


def cosine(progress: float, step: int, warm_up: int = 50, floor: float = 0.02) -> float:
    """Warm-up over `warm_up` steps, and a cosine to `floor` at the end of the wall time."""
    return min(1.0, (step + 1) / warm_up) * _falling(progress, floor)


def constant(progress: float, step: int, decay_from: float = 0.55) -> float:
    """Warm-up over 150 steps, constant, then a cosine to 2 % from `decay_from` of the wall time on (WSD)."""
    if progress < decay_from:
        return min(1.0, (step + 1) / 150)
    return _falling((progress - decay_from) / (1 - decay_from), 0.02)


def _falling(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Step:
    """What one step measured: the loss to descend, how many samples it saw, and numbers for the log."""

    loss: Tensor
    samples: int
    shown: dict[str, float] = field(default_factory=dict)


@dataclass
class Loop:
    """Optimises `model` until `minutes` of training time, summed over all resumed runs, are used up.

    name: first word of progress lines. optimizers: Muon, then AdamW (see `optimizers_for`), or one alone.
    checkpoint: the file to write and to resume from. lr: peak learning rate of the first optimiser.
    ema: decay in [0, 1), which starts as (ema_start + step) / (20 + step); 0: no averaging.
    adam_factor: learning rate of the second optimiser relative to the first. max_norm: gradients are scaled
    down to it. max_steps: stop after so many steps in all; 0: no limit.
    """

    name: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    checkpoint: Path
    minutes: float
    lr: float
    ema: float = 0.999
    schedule: Schedule = cosine
    seed: int = 0
    max_steps: int = 0
    log_every: int = 50
    ema_start: int = 0
    adam_factor: float = ADAM_FACTOR
    max_norm: float = MAX_NORM

    def __post_init__(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.params.items()}
        self.step, self.used = 0, 0.0
        if self.checkpoint.exists():
            self._resume()
        self.generator = torch.Generator().manual_seed(self.seed + 1 + self.step)

    @classmethod
    def from_args(
        cls, name: str, model: nn.Module, is_matrix: Callable[[str, Tensor], bool], args: argparse.Namespace,
        folder: str = "", adam: dict[str, Any] | None = None, **options: Any,
    ) -> "Loop":  # fmt: skip
        """A loop with the options of `arguments`, that keeps its checkpoint in `args.out`/`folder`.

        is_matrix, adam: see `optimizers_for`.
        """
        return cls(
            name, model, optimizers_for(model, args.lr, is_matrix, adam), args.out / folder / "last.pt",
            args.minutes, args.lr, args.ema, seed=args.seed, max_steps=args.max_steps, **options,
        )  # fmt: skip

    @property
    def progress(self) -> float:
        """Share of the training time used, in [0, 1]; with `max_steps`, the larger of both shares."""
        steps = self.step / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(self.used / max(self.minutes * 60, 1e-9), steps))

    def run(self, take: Callable[[float], Step], check: Callable[[], None] | None = None,
            check_minutes: float = math.inf) -> None:  # fmt: skip
        """Train. take: computes one step's loss, given the progress in [0, 1].

        check: called every `check_minutes`; the time it takes does not count as training.
        Exits with an error when a loss or its gradients are not finite; the last checkpoint stays.
        """
        now = time.time()
        started, saved, logged, checked = now - self.used, now, now, now
        window: list[Step] = []
        while self.progress < 1.0:
            taken = take(self.progress)
            norm, rate = self._descend(taken.loss)
            taken.shown = {"loss": taken.loss.item(), **taken.shown}
            taken.loss = taken.loss.detach()
            window.append(taken)
            self.used = time.time() - started
            if self.step % self.log_every == 0 or self.progress >= 1.0:
                self._log(window, norm, rate, time.time() - logged)
                logged, window = time.time(), []
            if self.step % COLLECT_EVERY == 0:
                gc.collect()
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            if check and time.time() - checked > 60 * check_minutes:
                paused = time.time()
                check()
                checked = time.time()
                started, logged = started + checked - paused, logged + checked - paused
        self.save()

    def save(self) -> None:
        """Write the checkpoint whole."""
        state = {
            "model": self.model.state_dict(), "optimizers": [part.state_dict() for part in self.optimizers],
            "ema": self.average, "step": self.step, "used": self.used,
        }  # fmt: skip
        save(self.checkpoint, **state)

    def load_average(self) -> nn.Module:
        """The model with its EMA weights in place, in eval mode."""
        self.model.load_state_dict(self.average, strict=False)
        return self.model.eval()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its EMA weights in place, in eval mode, for the length of a `with` block."""
        self._exchange()
        try:
            yield self.model.eval()
        finally:
            self._exchange()
            self.model.train()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.params.items():
            kept = p.clone()
            p.copy_(self.average[name])
            self.average[name] = kept

    def _resume(self) -> None:
        device = next(iter(self.params.values())).device
        state = torch.load(self.checkpoint, weights_only=True, map_location=device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = {name: state["ema"][name] for name in self.params}
        self.step, self.used = state["step"], state["used"]
        # A resumed run draws other noise than the run it continues, but always the same.
        torch.manual_seed(self.seed + 1 + self.step)
        print(f"{self.name}: resumed at step {self.step}, {self.used / 60:.1f} min used", flush=True)

    def _descend(self, loss: Tensor) -> tuple[float, float]:
        """Backward pass, clipped step of the optimisers, EMA; returns gradient norm and learning rate."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.max_norm).item()
        if not math.isfinite(loss.item()) or not math.isfinite(norm):
            raise SystemExit(
                f"{self.name}: step {self.step + 1} has loss {loss.item()}, gradient norm {norm}; both must "
                f"be finite: go on from {self.checkpoint} with an --lr below {self.lr:g}"
            )
        rate = self.lr * self.schedule(self.progress, self.step)
        for optimizer, factor in zip(self.optimizers, (1.0, self.adam_factor), strict=False):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        self.step += 1
        self._average()
        return norm, rate

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema, (self.ema_start + self.step) / (20 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.params.values()), 1 - decay)

    def _log(self, window: list[Step], norm: float, rate: float, seconds: float) -> None:
        keys = dict.fromkeys(key for step in window for key in step.shown)
        columns = {key: [step.shown[key] for step in window if key in step.shown] for key in keys}
        shown = " ".join(f"{key} {sum(values) / len(values):.4g}" for key, values in columns.items())
        speed = sum(step.samples for step in window) / max(seconds, 1e-9)
        print(f"{self.name}: step {self.step} {100 * self.progress:.1f}% {shown} grad {norm:.2f} "
              f"lr {rate:.1e} {speed:.0f}/s", flush=True)  # fmt: skip


def optimizers_for(model: nn.Module, lr: float, is_matrix: Callable[[str, Tensor], bool],
                   adam: dict[str, Any] | None = None) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Muon for the trainable weights that `is_matrix(name, weight)` picks, AdamW for the others.

    adam: options of AdamW other than ADAM_OPTIONS.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if is_matrix(name, p) else others).append(p)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, **{**ADAM_OPTIONS, **(adam or {})})]


def save(path: Path, **state: Any) -> None:
    """Write a checkpoint whole."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def arguments(
    description: str | None, out: Path, minutes: float, lr: float, ema: float = 0.999, batch: int = 64
) -> argparse.ArgumentParser:
    """The options that every training step shares."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time, over all resumed runs")
    parser.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; 0: no limit")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate; AdamW beside Muon takes a "
                        "fixed share of it")  # fmt: skip
    parser.add_argument("--ema", type=float, default=ema, help="decay of the averaged weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="'cuda' trains on a GPU")
    return parser
