"""Recorded runs of the dense model: what training distils from.

Kept are the routers' inputs and every transformer call: its arguments, so that it can be made again, and what
the dense model answered.

Shapes: R rows, L tokens, C channels, D dim, E time embedding dim, N blocks, S steps, G CFG branches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..block import by_name
from ..calibrate.state import State
from ..calibrate.workload import Workload, run_patched
from ..calls import first_tensor, flatten, unflatten
from ..elastic import Computed, Elastic
from ..patching import Patches
from ..policy import OpenPolicy
from ..spec import TransformerSpec

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Costs:
    """FLOPs of a call per row: dense [N] and mlp [N] as `cost.BlockCost`, outside the blocks."""

    dense: Tensor
    mlp: Tensor
    outside: float

    def at(self, gate: Tensor, width: Tensor) -> Tensor:
        """Share of dense FLOPs [...] at gates [..., N] and widths [..., N] in [0, 1]."""
        spent = (gate * (self.dense - (1 - width) * self.mlp)).sum(-1) + self.outside
        return spent / (self.dense.sum() + self.outside)


@dataclass
class RecordedCall:
    """One dense call. inputs: its arguments. output [R, L, C]. branches: of its rows [R], numbered."""

    inputs: dict[str, Any]
    output: Tensor
    costs: Costs
    branches: Tensor


class CallRecorder:
    """Keeps the arguments and answers of the transformer in one batch, and the inputs of its blocks."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.times = workload, [0.0] * workload.num_steps
        self.tensors: dict[str, Tensor] = {}
        self.plain: dict[str, Any] = {}
        self._seen: Computed | None = None
        self._first: dict[str, dict[str, Tensor]] = {}

    def observe(self, seen: Computed) -> None:
        """A block was computed."""
        self._seen, info, block = seen, seen.call.info, seen.block
        if block.index == 0:
            self.times[info.step] = float(seen.call.time.flatten()[0])
        # of rows of several branches those of the first come first, as many as there are samples
        rows = slice(self.workload.rows)
        if info.branch in ("main", self.workload.branches[0]):  # decides for all
            pooled = seen.before[0].mean(dim=1)[rows]
            self.tensors[f"pooled.{info.step}.{block.index}"] = pooled.float().cpu()
            if block.index == 0 and block.spec.modulation:
                modulation = seen.inputs[block.spec.modulation][: info.rows][rows]
                self.tensors[f"modulation.{info.step}"] = modulation.float().cpu()

    def forward(self, names: Sequence[str], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces the transformer's forward."""
        output = original(*args, **kwargs)
        assert self._seen is not None
        info = self._seen.call.info
        key = f"{info.branch}.{info.step}"
        tensors, constants = flatten(by_name(names, args, kwargs))
        if info.branch not in self._first:
            self._first[info.branch] = {}
            self.plain[info.branch] = {
                "constants": {key: as_json(key, value) for key, value in constants.items()},
                "tensors": list(tensors),
                "dense": [cost.dense for cost in info.costs],
                "mlp": [cost.mlp for cost in info.costs],
                "outside": info.outside,
                "rows": info.rows,
            }
        first = self._first[info.branch]
        for name, tensor in tensors.items():
            # what is the same in all steps, embeddings of prompts above all, is kept once
            if name in first and _same(first[name], tensor):
                continue
            first.setdefault(name, tensor)
            self.tensors[f"in.{key}.{name}"] = tensor.detach().cpu().clone()
        self.tensors[f"out.{key}"] = first_tensor(output).detach().cpu()
        return output

    def kept(self) -> dict[str, Tensor]:
        """All tensors of the batch, the plain values among them as JSON in bytes."""
        text = json.dumps(self.plain).encode()
        plain = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        times = torch.tensor(self.times, dtype=torch.float64)
        return {**self.tensors, "times": times, "plain": plain}


def batch_name(batch: int) -> str:
    """Name of a batch in a calibration's state."""
    return f"record-{batch:04d}"


def record_batch(elastic: Elastic, workload: Workload, batch: int) -> dict[str, Tensor]:
    """Run one batch densely; what `Trajectories` reads. Raises NotFiniteError, ValueError."""
    watcher = CallRecorder(workload)
    elastic.observer = watcher.observe
    try:
        with Patches() as patches:
            patches.add(elastic.transformer, partial(watcher.forward, elastic.names))
            run_patched(elastic, workload, batch, OpenPolicy(), "record")
    finally:
        elastic.observer = None
    return watcher.kept()


class Trajectories:
    """The recorded batches of a workload, read from files as they are needed or held in memory."""

    def __init__(self, workload: Workload, spec: TransformerSpec, blocks: int) -> None:
        self.branches, self.num_steps, self.rows = workload.branches, workload.num_steps, workload.rows
        self.num_batches, self.spec, self.blocks = workload.num_batches, spec, blocks
        self._held: dict[int, Mapping[str, Tensor] | Any] = {}
        self._plain: dict[int, Any] = {}

    def hold(self, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a batch in memory."""
        self._held[batch] = tensors

    def open(self, state: State) -> None:
        """Read batches from a calibration's state, memory-mapped."""
        for batch in range(self.num_batches):
            self._held[batch] = safe_open(state.file(batch_name(batch)), framework="pt")

    def tensor(self, batch: int, name: str) -> Tensor:
        """One tensor of a batch."""
        held = self._held[batch]
        tensor: Tensor = held[name] if isinstance(held, Mapping) else held.get_tensor(name)
        return tensor

    def has(self, batch: int, name: str) -> bool:
        """Whether a batch has a tensor."""
        return name in self._held[batch].keys()  # noqa: SIM118 - a file is not a mapping

    def plain(self, batch: int) -> Any:
        """Arguments that are not tensors, and costs, by the name of the call's branch."""
        if batch not in self._plain:
            self._plain[batch] = json.loads(bytes(self.tensor(batch, "plain").tolist()))
        return self._plain[batch]

    def calls(self, batch: int) -> list[str]:
        """Names of the branches that are called for themselves; rows of several may share a call."""
        return list(self.plain(batch))

    def call(self, batch: int, branch: str, step: int, device: torch.device) -> RecordedCall:
        """A call of a step, its tensors on a device."""
        plain, tensors = self.plain(batch)[branch], {}
        for name in plain["tensors"]:
            key = f"in.{branch}.{step}.{name}"
            key = key if self.has(batch, key) else f"in.{branch}.0.{name}"
            tensors[name] = self.tensor(batch, key).to(device)
        rows = plain["rows"]
        numbers = self._numbers(branch, rows)
        return RecordedCall(
            inputs=unflatten(tensors, plain["constants"]),
            output=self.tensor(batch, f"out.{branch}.{step}").to(device),
            costs=self.costs(batch, branch, device),
            branches=torch.tensor(numbers).repeat_interleave(rows // len(numbers)),
        )

    def costs(self, batch: int, branch: str, device: torch.device) -> Costs:
        """FLOPs of a branch's calls."""
        plain = self.plain(batch)[branch]
        dense, mlp = (torch.tensor(plain[name], device=device).double() for name in ("dense", "mlp"))
        return Costs(dense, mlp, plain["outside"])

    def features(self, batch: int, step: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The routers' inputs in the first branch of a step: pooled [N, R, D], modulation [R, E] or None."""
        pooled = torch.stack([self.tensor(batch, f"pooled.{step}.{n}") for n in range(self.blocks)])
        if not self.has(batch, f"modulation.{step}"):
            return pooled.float().to(device), None
        modulation = self.tensor(batch, f"modulation.{step}")
        return pooled.float().to(device), modulation.float().to(device)

    def _numbers(self, branch: str, rows: int) -> list[int]:
        if branch in self.branches:
            return [self.branches.index(branch)]
        return list(range(len(self.branches)))


def as_json(name: str, value: Any) -> Any:
    """An argument that is not a tensor as it comes back from a file; transformers take lists for tuples.

    Raises ValueError for one that cannot be kept.
    """
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"the transformer's argument {name} is a {type(value).__name__}, which cannot be recorded"
        ) from error


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
