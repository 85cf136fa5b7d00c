"""A stretch of a run along the student's own way: what a training step is made of.

It begins at a recorded state of the dense run with an evaluation that computes everything, as every run does.
From there on each evaluation is the student's, at the state to which its own answers have led, with what its
blocks remember of the evaluations before; and it is held against what the dense model says at that state. So
errors add up in training as they will in a run, and the student learns to answer for them.

Shapes: S samples, R rows, L tokens, C channels, G CFG branches, T steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .student import Memory, Student
from .trajectory import RecordedCall, Trajectories

Features = tuple[Tensor, Tensor | None]
"""What routers see: pooled inputs [N, S, D] of the blocks, and modulation [S, E] or None."""


class Rollout:
    """step: of the dense run, where the student is now. seen: what routers see of the evaluation before.

    paces [T - 1]: see `paces`. mixing [G]: see `guided`.
    """

    def __init__(
        self, student: Student, recorded: Trajectories, batch: int, step: int, mixing: Tensor, paces: Tensor
    ) -> None:
        self.student, self.recorded, self.batch, self.step = student, recorded, batch, step
        self.mixing, self.paces, self.names = mixing, paces, recorded.calls(batch)
        self._memories = {name: Memory() for name in self.names}
        self._state: Tensor | None = None
        self.seen: Features
        with torch.no_grad(), student.deciding(None):
            self.move_on(self.answers(self.calls()))

    def calls(self) -> list[RecordedCall]:
        """The calls of this step, one for each branch that has its own, at the student's state."""
        device, sample = self.mixing.device, self.student.spec.sample
        calls = [self.recorded.call(self.batch, name, self.step, device) for name in self.names]
        if self._state is None:
            first = calls[0].inputs[sample]
            moves = isinstance(first, Tensor) and first.shape == calls[0].output.shape
            # where the sample holds more than what moves, states are the recorded ones
            self._state = first[: self.recorded.rows].float() if moves else None
            return calls
        rows = [len(call.output) // len(self._state) for call in calls]
        moved = [self._state.repeat(k, *[1] * (self._state.dim() - 1)) for k in rows]
        return [
            replace(call, inputs={**call.inputs, sample: x.to(call.inputs[sample].dtype)})
            for call, x in zip(calls, moved, strict=True)
        ]

    def answers(self, calls: list[RecordedCall]) -> Tensor:
        """The student's answers [G * S, L, C], remembered block by block."""
        made = []
        for name, call in zip(self.names, calls, strict=True):
            made.append(self.student(call, self._memories[name]).float())
            if name == self.names[0]:
                self.seen = self.student.seen(self.recorded.rows)
        return torch.cat(made)

    def move_on(self, answers: Tensor) -> None:
        """Keep the way that the answers point; `go_to` takes it."""
        self._way = guided(answers.detach(), self.mixing)

    def go_to(self, step: int) -> None:
        """Along that way to a later step of the dense run."""
        if self._state is not None:
            self._state = self._state + float(self.paces[self.step : step].sum()) * self._way
        self.step = step
        for memory in self._memories.values():
            memory.evaluation += 1


def guided(answers: Tensor, mixing: Tensor) -> Tensor:
    """Answers [G * S, L, C] of all CFG branches, one after the other -> [S, L, C], mixed as guidance does."""
    return torch.einsum("g,gr...->r...", mixing, answers.unflatten(0, (len(mixing), -1)))


def paces(recorded: Trajectories, batch: int, mixing: Tensor) -> Tensor:
    """[T - 1]: how far each step of a recorded run went along its guided answer, whatever its sampler."""
    sample, names = recorded.spec.sample, recorded.calls(batch)
    sizes, before = torch.zeros(recorded.num_steps - 1), None
    for step in range(recorded.num_steps):
        calls = [recorded.call(batch, name, step, mixing.device) for name in names]
        x = calls[0].inputs[sample]
        if not isinstance(x, Tensor) or x.shape != calls[0].output.shape:
            return sizes
        x = x[: recorded.rows].float()
        if before is not None:
            state, way = before
            sizes[step - 1] = float(((x - state) * way).sum() / way.square().sum().clamp_min(1e-12))
        before = x, guided(torch.cat([call.output.float() for call in calls]), mixing)
    return sizes
