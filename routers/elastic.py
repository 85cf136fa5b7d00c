"""Attach routers to a transformer's blocks, and take them off again.

One patch per block and one on the transformer itself. The transformer's patch counts steps and CFG
branches and lets the policy decide; a block's patch carries its decisions out: rows that skip pass
through, rows that reuse get their cached delta, rows that compute are gathered and run at their width.

Shapes: B batch rows, L tokens, D dim, E time embedding dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from .block import COMPILED_WHOLE, Block, call_shapes, find_blocks, patch_blocks, segments
from .cost import BlockCost, block_cost, count_linears, router_flops
from .groups import Group
from .patching import Patches, learns_order
from .policy import OpenPolicy, Policy
from .router import Router, RouterStack
from .run import ATTACH_AGAIN, Call, Run
from .spec import WIDTHS, TransformerSpec
from .trace import REUSE, SKIP, Trace
from .watch.timing import Timeline

_UNTIMED = nullcontext()


class Computed(NamedTuple):
    """A computed pass of a block, as an observer (calibration, profiling) sees it."""

    block: Block
    call: Call
    forward: Callable[..., Any]
    inputs: dict[str, Any]
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


class Elastic:
    """A transformer with its blocks under control. Made by `routers.attach`."""

    def __init__(
        self,
        transformer: nn.Module,
        spec: TransformerSpec,
        policy: Callable[[], Policy] = OpenPolicy,
        routers: Sequence[nn.Module] | None = None,
        *,
        budget: float | None = None,
        num_steps: int = 20,
        times: Sequence[float] | None = None,
    ) -> None:
        """times: the sampler's times in a run of known steps, to tell the steps of runs without a scope."""
        if "_edit_elastic" in transformer.__dict__:
            raise ValueError("routers are already attached to this transformer: detach them first")
        if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
            raise ValueError(COMPILED_WHOLE)
        self.transformer, self.spec = transformer, spec
        self.budget, self.num_steps, self.times = budget, num_steps, times
        self.trace: Trace | None = None
        self.make_policy = policy
        self.observer: Callable[[Computed], None] | None = None
        self.timer: Timeline | None = None
        self.on_detach: Callable[[], None] | None = None
        self.blocks = find_blocks(transformer, spec, routers)
        self.segments = segments(self.blocks)
        self._stackable = RouterStack.fits([block.router for block in self.blocks])
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._costs: dict[Any, tuple[list[BlockCost], float, float]] = {}
        self._cost_notes: list[str] = []
        self._run: Run | None = None
        self._implicit: Run | None = None
        self._context: str | None = None
        self._call: Call | None = None
        self._dense = False
        self._probing: list[tuple[Block, tuple[Any, ...], dict[str, Any]]] | None = None
        self._attach()

    # -- a run ---------------------------------------------------------------------------------

    @contextmanager
    def scope(
        self,
        *,
        budget: float | None = None,
        num_steps: int | None = None,
        policy: Policy | None = None,
        samples: int | None = None,
    ) -> Iterator[Trace]:
        """One run of a pipeline: counts its steps and branches, keeps its caches, and drops them at the end.

        budget: ratio of dense FLOPs, default what `attach` was given. num_steps: denoising steps.
        policy: overrides the bundle's. samples: pictures per call when CFG branches share a batch
        (rows are branch-major), default one per row. Raises RuntimeError if a scope is open.
        """
        if self._run is not None:
            raise RuntimeError("a scope is already open on this transformer; scopes do not nest")
        budget = self.budget if budget is None else budget
        self._implicit = None
        self._run = self._new_run(policy or self.make_policy(), budget, num_steps or self.num_steps, samples)
        try:
            yield self._run.trace
        finally:
            run, self._run, self._call = self._run, None, None
            run.trace.finish()
            self.trace = run.trace

    def _new_run(self, policy: Policy, budget: float | None, num_steps: int, samples: int | None) -> Run:
        kinds, ragged = [b.spec.kind for b in self.blocks], [b.ragged for b in self.blocks]
        run = Run(policy, budget, num_steps, kinds, samples, ragged, self.segments, self.spec.skips)
        run.trace.notes += self._cost_notes
        return run

    def summary(self) -> str:
        """One paragraph on the last run: budget asked and spent, decisions, cache, notes."""
        trace = self.trace
        if trace is None or not trace.calls:
            return "no run yet"
        spent = trace.spent
        mean = sum(spent) / len(spent)
        asked = "none" if trace.requested is None else f"{trace.requested:g}"
        decisions = trace.decisions
        widths = ", ".join(f"{w}: {n}" for w, n in decisions["compute"].items() if n)  # type: ignore[attr-defined]
        lines = [
            f"budget asked {asked}, spent {mean:.3f} of dense FLOPs ({trace.flops['spent']:.3g} of "
            f"{trace.flops['dense']:.3g}) in {trace.num_calls} calls, {trace.seconds:.2f} s",
            f"blocks skipped {decisions['skip']}, reused {decisions['reuse']}, computed at width "
            f"{{{widths}}}; cache {trace.cache_bytes / 2**20:.1f} MiB",
            *trace.notes,
        ]
        return "\n".join(lines)

    # -- for observers -------------------------------------------------------------------------

    @property
    def call(self) -> Call | None:
        """The transformer call that is being made, None outside of one."""
        return self._call

    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's own forward between two calls of a run: every block in full, nothing booked."""
        assert self._call is None, "a call is being made"
        with self._densely():
            return self._own.original(*args, **kwargs)

    @contextmanager
    def _densely(self) -> Iterator[None]:
        """Blocks may run without a call around them: on purpose, where otherwise a patch was lost."""
        self._dense = True
        try:
            yield
        finally:
            self._dense = False

    def _timed(self, part: str, block: int = -1) -> AbstractContextManager[Any]:
        """A span of the timer, if there is one."""
        return _UNTIMED if self.timer is None else self.timer.span(part, block)

    # -- patches -------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._patches = patches = Patches()
        self._own = patches.add(self.transformer, self._transformer_forward)
        if hasattr(self.transformer, "cache_context"):
            patches.add(self.transformer, self._cache_context, "cache_context")
        patch_blocks(patches, self.blocks, self._block_forward, widths=True)
        self.transformer.__dict__["_edit_elastic"] = self

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice."""
        self._patches.close()
        for block in self.blocks:
            block.return_compiled()
        self._run = self._implicit = self._call = None
        self.transformer.__dict__.pop("_edit_elastic", None)
        undo, self.on_detach = self.on_detach, None
        if undo is not None:
            undo()

    def _patch_again(self, args: Any, kwargs: Any) -> Callable[..., Any]:
        """Let group offloading learn its order in a dense call, after which it forgets what patched it.

        It removes the hooks it learnt with, and puts back the forwards that it found when it was applied.
        Returns what the transformer's new patch calls.
        """
        self.dense_forward(*args, **kwargs)
        self._patches.close()
        self._attach()
        original: Callable[..., Any] = self._own.original
        return original

    @contextmanager
    def _cache_context(
        self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        self._context = name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self._context = None

    def _transformer_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for block in self.blocks:
            block.adopt_compiled()
        if learns_order(self.transformer) and vars(self.transformer)["forward"] is self._own:
            original = self._patch_again(args, kwargs)
        sample: Tensor = inputs[self.spec.sample]
        time = torch.as_tensor(inputs[self.spec.timestep], device=sample.device).float().flatten()
        key = call_shapes(inputs)
        cost = self._costs.get(key) or self._probe(key, original, args, kwargs, sample.shape[0])
        run, name = self._run, self._context or "main"
        if run is None:
            run, name = self._follow(time, name)
        branch = run.branch(name, tuple(sample.shape))
        with self._timed("call"):
            with self._timed("decide"):
                self._call = run.begin(branch, time.expand(sample.shape[0]), *cost, key)
            try:
                output = original(*args, **kwargs)
                if self._call.pooled:
                    with self._timed("router"):
                        run.read_routers(self._call, self._stack(run, sample.device))
                self._call.require_all_entered()
                run.end(self._call)
                info = self._call.info
            finally:
                self._call = None
        if self.timer is not None:
            self.timer.calls.append(info)
        return output

    def _probe(
        self, key: Any, original: Callable[..., Any], args: Any, kwargs: Any, rows: int
    ) -> tuple[list[BlockCost], float, float]:
        """Cost of a call of this shape: a pass with blocks closed shows what each would be called with."""
        probing: list[tuple[Block, tuple[Any, ...], dict[str, Any]]] = []
        self._probing = probing
        known: dict[Any, BlockCost] = {}
        try:
            with torch.no_grad(), count_linears(self.transformer, [b.module for b in self.blocks]) as outside:
                original(*args, **kwargs)
        finally:
            self._probing = None
        costs, routers = [], []
        for block, block_args, block_kwargs in probing:
            signature = block.signature()
            if signature not in known:
                tokens = [stream.shape[1] for stream in block.streams(block.bind(block_args, block_kwargs))]
                with self._densely():  # where shapes do not tell, the block runs for real
                    known[signature] = block_cost(
                        block.module, block.slicers, block_args, block_kwargs, rows, tokens[0]
                    )
                routers.append(router_flops(block.router, sum(tokens)))
                self._note_cost(known[signature].note)
            costs.append(known[signature])
        if [block.index for block, _, _ in probing] != list(range(len(self.blocks))):
            raise ValueError("the transformer does not call its blocks once each, in the order of the spec")
        self._costs[key] = costs, sum(outside) / rows, max(routers, default=0.0)
        return self._costs[key]

    def _note_cost(self, note: str) -> None:
        """Costs are counted once and hold for every run, so every run's trace says how."""
        if note and note not in self._cost_notes:
            self._cost_notes.append(note)
            run = self._run or self._implicit
            if run is not None:
                run.trace.notes.append(note)

    # -- a block -------------------------------------------------------------------------------

    def _block_forward(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            if self._probing is None:
                if self._run is not None and not self._dense and not torch.is_grad_enabled():
                    raise RuntimeError(f"the transformer's patch was bypassed; {ATTACH_AGAIN}")
                return block.run(original, block.bind(args, kwargs))
            self._probing.append((block, args, kwargs))
            return block.pack(block.streams(block.bind(args, kwargs)))
        with self._timed("block", block.index):
            return self._decided(block, call, original, block.bind(args, kwargs))

    def _decided(self, block: Block, call: Call, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """A block in a call: every group of rows does what was decided for it."""
        before = block.streams(inputs)
        call.enter(block.index, before)
        groups = call.groups[block.index]
        if groups is None:
            with self._timed("router", block.index):
                gate, widths = self._route(block, inputs, before)
            groups = self._require_run().decide_block(call, block.index, gate, widths)
        elif self._reads_stack() and (
            self._require_run().policy.reads_skipped or any(group.code >= 0 for group in groups)
        ):
            modulation = inputs.get(block.spec.modulation) if block.spec.modulation else None
            with self._timed("router", block.index):
                call.pooled[block.index] = before[0].mean(dim=1), modulation
        if groups[0].index is None:
            call.left = self._act(block, call, groups[0], original, inputs, before)
            return block.pack(call.left)
        call.left = total = tuple(stream.clone() for stream in before)
        for group in groups:
            if group.code == SKIP:
                continue
            index = group.index
            assert index is not None, "rows are in one group without an index or in several with one"
            part = inputs
            if group.code == REUSE:
                rows = tuple(stream.index_select(0, index) for stream in before)
            else:
                part = block.gather(inputs, index, call.branch.rows)
                rows = block.streams(part)
            after = self._act(block, call, group, original, part, rows)
            for stream, rows_after in zip(total, after, strict=True):
                stream.index_copy_(0, index, rows_after)
        return block.pack(total)

    def _act(
        self,
        block: Block,
        call: Call,
        group: Group,
        original: Callable[..., Any],
        inputs: dict[str, Any],
        before: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """One group of rows through a block: `before` streams -> streams after it."""
        if group.code == SKIP or group.last < 0:
            return before
        index = group.index
        time = call.time if index is None else call.time.index_select(0, index)
        policy = self._require_run().policy
        if group.code == REUSE:
            with self._timed("cache", block.index):
                delta = group.cache.delta(
                    group.unit, group.last, group.rows, time, policy.order, index, group.weights
                )
                after = tuple(x + d for x, d in zip(before, delta, strict=True))
                if group.peer is not None and group.peer_weights is not None:
                    more = group.peer.delta(
                        group.unit, group.last, group.rows, time, policy.order, index, group.peer_weights
                    )
                    after = after[0] + more[0], *after[1:]
                return after
        if policy.reads_routers and block.router is not None and not self._stackable:
            with self._timed("router", block.index):
                self._remember_logits(block, call, index, inputs, before)
        with block.narrowed(WIDTHS[group.code], group.parts):
            after = block.unpack(block.run(original, inputs))
        if self.observer is not None:
            self.observer(Computed(block, call, original, inputs, before, after))
        with self._timed("cache", block.index):
            call.remember(block.index, group, time, before, after)
        return after

    def _reads_stack(self) -> bool:
        return self._stackable and self._require_run().policy.reads_routers

    def _stack(self, run: Run, device: torch.device) -> RouterStack:
        """All routers as one, told the budget; made anew in every run, because training changes them."""
        if run.routers is None:
            budget = 1.0 if run.trace.requested is None else run.trace.requested
            routers = [cast(Router, block.router).at(budget) for block in self.blocks]
            run.routers = RouterStack(routers, device)
        return run.routers

    def _route(
        self, block: Block, inputs: Mapping[str, Any], before: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if block.router is None:
            raise RuntimeError(f"block {block.index} has no router, but the policy asks for one")
        image = before[0]
        if next(block.router.parameters()).device != image.device:
            block.router.to(image.device)
        modulation = inputs.get(block.spec.modulation) if block.spec.modulation else None
        if getattr(block.router, "all_streams", False):
            stream, mask = block.tokens(inputs)
            gate, widths = block.router(stream, modulation, mask)
        else:
            gate, widths = block.router(image, modulation)
        return gate, widths

    def _remember_logits(
        self,
        block: Block,
        call: Call,
        index: Tensor | None,
        inputs: Mapping[str, Any],
        before: tuple[Tensor, ...],
    ) -> None:
        gate, widths = self._route(block, inputs, before)
        logits = torch.cat([gate[:, None], widths], dim=1)
        old = call.branch.logits[block.index]
        if index is not None:
            base = old if old is not None else logits.new_zeros(call.branch.rows, logits.shape[1])
            logits = base.index_copy(0, index, logits)
        call.branch.logits[block.index] = logits

    def _require_run(self) -> Run:
        run = self._run or self._implicit
        assert run is not None, "a call is being made outside of any run"
        return run

    # -- without a scope -----------------------------------------------------------------------

    def _follow(self, time: Tensor, name: str) -> tuple[Run, str]:
        """The run of a pipeline that was called without a scope, told from the order of its timesteps.

        A run ends when a branch's time stops moving the way it has moved. The time is read in one copy
        with the routers' logits. An unnamed second call at the same time is another CFG branch of the step.
        """
        run, first = self._implicit, name
        now = float(time[0]) if run is None else run.read_time(time, name)
        if run is not None and name == "main":
            twin = 1
            while run.clocks[name].last == now:
                twin += 1
                name = f"{first} {twin}"
        if run is None or not run.clocks[name].tick(now):
            name = first
            self._implicit = run = self._new_run(self.make_policy(), self.budget, self.num_steps, None)
            self.trace = run.trace
            run.clocks[name].tick(now)
            run.trace.host_syncs = 1
        branch = run.branches.get(name)
        if branch is not None and branch.step == 1 and self.times is not None:
            run.set_num_steps(steps_from_time(self.times, now))
        return run, name


def steps_from_time(times: Sequence[float], second: float) -> int:
    """Steps of a run whose second call is at time `second`, from the times of a run of known steps.

    A sampler's times depend on the share of the run that is over, not on the number of steps, so the
    second time tells how far one step goes.
    """
    known = np.asarray(times, np.float64)
    rising = known[-1] > known[0]
    at = np.interp(second if rising else -second, known if rising else -known, np.arange(len(known)))
    return max(2, 1 + round((len(known) - 1) / max(float(at), 1e-6))) if at > 0 else len(known)
