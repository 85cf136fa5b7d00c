"""`calibrate --method train`: the paper's own training (arXiv 2602.13993), for all budgets at once.

1. record: the dense model's calls, their arguments and answers;
2. train: routers, told a random budget per sample, alone or with the backbone, along the student's own runs
   of plans with more and fewer evaluations (`rollout.py`);
3. profile: what the routers spend at each step of a run, by which a run lands on its budget.

Shapes: R rows, L tokens, C channels, K budgets, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attachment import architecture, fingerprint
from ..bundle import Bundle
from ..calibrate.state import State
from ..calibrate.workload import Workload
from ..elastic import Elastic
from ..spec import TransformerSpec
from ..trained.bundle import Trained
from ..trained.policy import Profile
from . import progress
from .objective import Draw, Draws, Routers, all_open_at_full, decide, expected_spend, relative_error
from .rollout import Rollout, guided, paces
from .settings import TrainSettings, noise_at, rate_at
from .student import Student
from .trajectory import RecordedCall, Trajectories, batch_name, record_batch
from .tuned import Tuned, tuned, tuned_weights

Report = Callable[[str, int, int, str], None]
"""(phase, done, of, what to say beside it)."""
PROFILE_BUDGETS = 9


class LossNotFiniteError(ArithmeticError):
    """A loss term or the gradient became NaN or infinite."""

    def __init__(self, term: str, value: float, step: int, steps: int, kept: int) -> None:
        after = f"the state after step {kept} is kept" if kept else "no state was kept yet"
        super().__init__(
            f"{term} is {value:g} at step {step} of {steps}; {after}: "
            "continue with --resume and a lower --learning-rate, or another --dtype"
        )


@dataclass
class Training:
    """Everything a training works on. processes: an accelerate.Accelerator. data [samples, L, C]: latents of
    pictures that the prompts describe, or None. Their time must be the share of noise in them.
    """

    transformer: nn.Module
    spec: TransformerSpec
    workload: Workload
    settings: TrainSettings
    processes: Any
    state: State | None = None
    data: Tensor | None = None
    report: Report = lambda phase, done, total, beside: None
    log: progress.Log = lambda step, terms: None
    _paces: dict[int, Tensor] = field(default_factory=dict)

    def run(self, base_model: str, guidance: float) -> Bundle:
        """Train and return the bundle, the same in every process; the transformer is left as it was.

        Raises LossNotFiniteError, NotFiniteError, ValueError, OSError.
        """
        prints = architecture(self.transformer), fingerprint(self.transformer)
        recorded = self._record()
        student, self._paces = Student(self.transformer, self.spec, self.settings.save_memory), {}
        pooled, modulation = recorded.features(0, 0, self.device)
        time_dim = 0 if modulation is None else modulation.shape[-1]
        with tuned(self.transformer, self.spec, self.settings) as backbone:
            torch.manual_seed(self.settings.seed)
            routers = Routers(len(pooled), pooled.shape[-1], time_dim, self.settings.hidden).to(self.device)
            with student.attached():
                last = self._optimise(student, routers, backbone, recorded, guidance)
            weights = {name: p.detach().cpu().clone() for name, p in backbone.parameters.items()}
        return Bundle(
            spec=self.spec,
            base_model=base_model,
            architecture=prints[0],
            fingerprint=prints[1],
            num_steps=self.workload.num_steps,
            guidance=guidance,
            times=recorded.tensor(0, "times").tolist(),
            min_budget=self.settings.low,
            trained=Trained(
                [{k: v.cpu() for k, v in router.state_dict().items()} for router in routers.blocks],
                self._profile(routers, recorded),
                routers.trend.detach().cpu().double().numpy(),
                tuned_weights(self.transformer, self.spec, self.settings, weights),
            ),
            metadata={
                "method": "train",
                "training": asdict(self.settings),
                "processes": self.processes.num_processes,
                "rows": self.workload.rows * self.workload.num_batches,
                "data": None if self.data is None else len(self.data),
                "loss": {name: round(value, 6) for name, value in last.items()},
            },
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    # -- before --------------------------------------------------------------------------------

    def _record(self) -> Trajectories:
        """Run the dense model, batches shared out among the processes."""
        elastic, total = Elastic(self.transformer, self.spec), self.workload.num_batches
        recorded = Trajectories(self.workload, self.spec, len(elastic.blocks))
        processes = self.processes
        try:
            for batch in range(total):
                shared = self.state is not None
                if shared and batch % processes.num_processes != processes.process_index:
                    continue
                if self.state is not None and self.state.file(batch_name(batch)).is_file():
                    continue
                tensors = record_batch(elastic, self.workload, batch)
                if self.state is None:
                    recorded.hold(batch, tensors)
                else:
                    self.state.keep(batch_name(batch), tensors)
                self.report("record", batch + 1, total, "")
            processes.wait_for_everyone()
            self.report("record", total, total, "")
            if self.state is not None:
                recorded.open(self.state)
        finally:
            elastic.detach()
        return recorded

    # -- training ------------------------------------------------------------------------------

    def _optimise(
        self,
        student: Student,
        routers: Routers,
        backbone: Tuned,
        recorded: Trajectories,
        guidance: float,
    ) -> dict[str, float]:
        """Train; the last step's loss terms."""
        settings = self.settings
        named = {f"router.{n}": p for n, p in routers.named_parameters()}
        named |= {f"backbone.{n}": p for n, p in backbone.parameters.items()}
        rates = settings.rate, settings.backbone_rate
        groups = [p for p in (list(routers.parameters()), list(backbone.parameters.values())) if p]
        optimiser = torch.optim.AdamW([{"params": p} for p in groups], weight_decay=0.0)
        start = 0 if self.state is None else progress.restore(self.state.folder, named, optimiser)
        draws = Draws(recorded, self.workload, settings)
        # classifier-free guidance gives uncond + g (cond - uncond)
        two = len(self.workload.branches) == 2
        mixing = torch.tensor([guidance, 1 - guidance] if two else [1.0], device=self.device)
        terms: dict[str, float] = {}
        kept = start
        for step in range(start, settings.steps):
            for group, rate in zip(optimiser.param_groups, rates, strict=False):
                group["lr"] = rate * rate_at(step, settings.steps)
            optimiser.zero_grad(set_to_none=True)
            drawn = draws.draw(step, self.processes.process_index, self.processes.num_processes)
            terms = self._backward(student, routers, backbone, recorded, mixing, *drawn, step)
            terms["gradient"] = self._average(list(named.values()))
            for term, value in terms.items():
                if not math.isfinite(value):
                    what = term if term == "gradient" else f"the {term} loss"
                    raise LossNotFiniteError(what, value, step + 1, settings.steps, kept)
            optimiser.step()
            done = step + 1
            if self.state is not None and (done % settings.every == 0 or done == settings.steps):
                if self.processes.is_main_process:
                    progress.keep(self.state.folder, done, named, optimiser)
                self.processes.wait_for_everyone()
                kept = done
            self.log(done, {**terms, "rate": optimiser.param_groups[0]["lr"]})
            self.report("train", done, settings.steps, f"loss {terms['total']:.4f}")
        return terms

    def _backward(
        self,
        student: Student,
        routers: Routers,
        backbone: Tuned,
        recorded: Trajectories,
        mixing: Tensor,
        draw: Draw,
        generator: torch.Generator,
        step: int,
    ) -> dict[str, float]:
        """Gradients of one draw; its loss terms, averaged over the processes."""
        settings, budget, own = self.settings, draw.budget.to(self.device), draw.steps[1:]
        if draw.batch not in self._paces:
            self._paces[draw.batch] = paces(recorded, draw.batch, mixing)
        rollout = Rollout(student, recorded, draw.batch, draw.steps[0], mixing, self._paces[draw.batch])
        errors = []
        for later in own:
            rollout.go_to(later)
            calls = rollout.calls()
            with torch.no_grad(), backbone.undone(), student.deciding(None), self.processes.autocast():
                target = torch.cat([student(call).float() for call in calls])
            gate, width = routers(*rollout.seen, budget)
            decided = decide(gate, width, noise_at(step, settings), generator)
            decision = all_open_at_full(replace(decided, trend=routers.trend), budget)
            with student.deciding(decision):
                with self.processes.autocast():
                    answers = rollout.answers(calls)
                error = relative_error(guided(answers, mixing), guided(target, mixing))
                error = (error + relative_error(answers, target)) / 2
                self.processes.backward(error / len(own))
            rollout.move_on(answers)
            errors.append(error.detach())
        parts = {"distillation": torch.stack(errors).mean()}
        spend = expected_spend(routers, recorded, draw.batch, budget).mean(dim=0)
        rest = {"cost": settings.cost * (spend - budget).square().mean()}
        if self.data is not None and settings.denoise and backbone.parameters:
            rest["denoising"] = settings.denoise * self._denoise(student, calls[0], draw, generator)
        self.processes.backward(torch.stack(list(rest.values())).sum())
        parts |= {name: value.detach() for name, value in rest.items()}
        parts["total"] = torch.stack(list(parts.values())).sum()  # last: what broke is named before the sum
        means = self.processes.reduce(torch.stack(list(parts.values())), "mean")
        return dict(zip(parts, means.tolist(), strict=True))

    def _denoise(
        self, student: Student, call: RecordedCall, draw: Draw, generator: torch.Generator
    ) -> Tensor:
        """Rectified flow on data, all blocks open: at time t the latents are (1 - t) data + t noise, the
        velocity is noise - data.
        """
        assert self.data is not None
        first, name = draw.batch * self.workload.rows, self.spec.sample
        rows = [i % len(self.data) for i in range(first, first + self.workload.rows)]
        data = self.data[rows].to(self.device)
        noise = torch.randn(data.shape, generator=generator).to(self.device)
        time = call.inputs[self.spec.timestep].float().view(-1, *([1] * (data.dim() - 1)))
        noised = ((1 - time) * data + time * noise).to(call.inputs[name].dtype)
        with self.processes.autocast():
            answered = student(replace(call, inputs={**call.inputs, name: noised}))
        return relative_error(answered, noise - data)

    def _average(self, parameters: list[nn.Parameter]) -> float:
        """Average the gradients over the processes, and clip them: their norm before."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.processes.num_processes > 1:
            flat = self.processes.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip))

    # -- after ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _profile(self, routers: Routers, recorded: Trajectories) -> Profile:
        """Mean expected spend at PROFILE_BUDGETS budgets, over all recorded rows."""
        budgets = np.linspace(self.settings.low, 1.0, PROFILE_BUDGETS)
        spend = []
        for budget in budgets:
            rows = torch.full((self.workload.rows,), float(budget), device=self.device)
            batches = range(recorded.num_batches)
            steps = [expected_spend(routers, recorded, batch, rows).mean(1) for batch in batches]
            spend.append(torch.stack(steps).mean(0).cpu().double().numpy())
        return Profile(budgets, np.stack(spend))
