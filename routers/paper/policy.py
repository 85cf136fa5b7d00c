"""How the paper's released Qwen-Image checkpoint decides, block by block: logits in, decisions out.

A block is *skipped* when its gate probability is below the threshold. Late in the run a block whose
probability lies barely above it is *reused*: the residual delta of its last computed pass is added
again, a limited number of times. Every other block is *computed*, its image MLP at the width with
the highest probability (E-DiT, arXiv 2602.13993; constants of the released inference code, commit
ce39f1d).

What the released code does and a reader would not guess, kept because exact mode must match it:

- A block counts only the steps in which it is open, so "from step 15" means from the sixteenth step
  in which *this block* was open.
- Its two feature stores are filled by order of open calls within a step, the first open call using
  the first store. Where the conditional call skips a block, the unconditional one uses its store.
- Probabilities are rounded to the model's dtype before they are compared. In bfloat16 the reuse zone
  holds exactly four values: 0.5, 0.50390625, 0.5078125 and 0.51171875.
- A batch shares one gate decision, taken on the mean of its probabilities. Here every sample decides
  for itself unless `batch_mean` is set.

Shapes: R rows of a transformer call.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..policy import CallInfo, Decision, RunInfo
from ..trace import REUSE, SKIP, Actions
from .blockwise import BlockwiseRun, Stores

STORES = 2
"""Feature stores of a block: one for each call of a classifier-free-guidance pair."""


@dataclass(frozen=True)
class ReleaseSettings:
    """Constants of the release's decisions. Probabilities in [0, 1]; steps and uses are counts.

    threshold: a block with a smaller gate probability is skipped.
    reuse_low, reuse_high: the reuse zone, both ends included.
    start_step: open steps of a block before its results are stored and reused.
    max_uses: reuses of one stored result before the block is computed again.
    batch_mean: one gate decision for the whole batch, as the released code takes it.
    """

    threshold: float = 0.5
    reuse_low: float = 0.5
    reuse_high: float = 0.515
    start_step: int = 15
    max_uses: int = 10
    batch_mean: bool = False

    def __post_init__(self) -> None:
        for name in ("threshold", "reuse_low", "reuse_high"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a probability in [0, 1]")
        for name in ("start_step", "max_uses"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass
class _Store:
    """One feature store of a block: shapes of the call that filled it, and how often it was reused."""

    signature: Hashable
    uses: int = 0


@dataclass
class _History:
    """What one block has done for one row since the run began."""

    open_steps: int = 0
    step: int | None = None
    calls: int = 0  # open calls in `step` so far
    stores: list[_Store | None] = field(default_factory=lambda: [None] * STORES)


class ReleasePolicy:
    """Decides as the release does, one block at a time. Remembers counts; the deltas live in the cache.

    settings: the release's constants. dtype: the dtype the released code would run the model in;
    probabilities are rounded to it before they are compared.

    `start` forgets everything. The released code never does: its counts and stores live in the model
    and carry over into the next picture.
    """

    run_class = BlockwiseRun
    cache_depth = 1
    reads_routers = True

    def __init__(self, settings: ReleaseSettings | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.settings = settings or ReleaseSettings()
        self.dtype = dtype
        self._histories: dict[tuple[int, int], _History] = {}

    def start(self, run: RunInfo) -> None:
        """A new run begins: forget every block's history."""
        self._histories.clear()

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Not used: every block asks with its own logits."""
        raise AssertionError("ReleasePolicy decides while the blocks run")

    def decide_block(
        self, call: CallInfo, block: int, gate: NDArray[np.float32], widths: NDArray[np.float32]
    ) -> tuple[Actions, Stores]:
        """Action codes int8 [R] of one block, from its gate logits [R] and width logits [R, 4]; and which
        feature store int8 [R], 0 or 1, each row reads or fills.
        """
        gate_R, widths_RW = torch.from_numpy(gate).to(self.dtype), torch.from_numpy(widths).to(self.dtype)
        probability_R = torch.sigmoid(gate_R)
        # Compared after the softmax: rounding makes close logits equal probabilities, and the first one wins.
        width_R = torch.softmax(widths_RW, dim=-1).argmax(dim=-1).tolist()
        if self.settings.batch_mean:
            acts = [self._act(call, block, 0, float(probability_R.mean()))] * len(gate)
        else:
            acts = [self._act(call, block, row, p) for row, p in enumerate(probability_R.tolist())]
        codes = [w if code is None else code for (code, _), w in zip(acts, width_R, strict=True)]
        return np.array(codes, np.int8), np.array([store for _, store in acts], np.int8)

    def _act(self, call: CallInfo, block: int, row: int, p: float) -> tuple[int | None, int]:
        """(SKIP, REUSE or None for compute; store) of a row, or of a whole batch, with gate probability p."""
        settings = self.settings
        if p < settings.threshold:
            return SKIP, 0
        history = self._histories.setdefault((block, row), _History())
        if history.step != call.step:
            history.step, history.calls = call.step, 0
            history.open_steps += 1
        index = history.calls % STORES
        history.calls += 1
        if history.open_steps <= settings.start_step:
            return None, index
        store = history.stores[index]
        # Prompts of another length leave deltas of another shape: those are never reused.
        fits = store is not None and store.signature == call.signature and store.uses < settings.max_uses
        if store is not None and fits and settings.reuse_low <= p <= settings.reuse_high:
            store.uses += 1
            return REUSE, index
        history.stores[index] = _Store(call.signature)
        return None, index
