"""A transformer with its blocks under control of routers. A call of it, read top down:

    Elastic._transformer_forward    runs.py: which run, which branch; cost.py: what blocks cost
        Run.begin (run.py)          the policy decides for all rows and blocks; forward.py: who acts together
        Elastic._block_forward      forward.py carries it out; cache.py, width.py
        Run.end                     trace.py: the books

One patch per block and one on the transformer itself, all removed by `detach`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .block import Block, argument_names, by_name, call_shapes, find_blocks, segments
from .cost import Costs
from .forward import Computed as Computed
from .forward import Watch, carry_out, straight
from .patching import COMPILED_WHOLE, Patches, check_call, check_run, learns_order, more_graphs
from .policy import OpenPolicy, Policy, RunInfo
from .router import RouterStack
from .rows import copied, count_rows, row_times, tensors_in
from .run import ATTACH_AGAIN, Call, Run
from .runs import Runs
from .spec import TransformerSpec
from .trace import Trace


class Elastic(Watch):
    """Made by `routers.attach`.

    spec: of the transformer, None to derive it from its first call, which then may raise DerivationError.
    budget: ratio of dense FLOPs. num_steps: of runs whose sampler is not known. pipe: see `Runs`; its
    `transformer_2`, which makes the second half of each run, is put under control too. leader: what decides
    for both halves, where this is the second.
    """

    def __init__(
        self,
        transformer: nn.Module,
        spec: TransformerSpec | None,
        policy: Callable[[], Policy] = OpenPolicy,
        routers: Sequence[nn.Module] | None = None,
        *,
        budget: float | None = None,
        num_steps: int = 20,
        pipe: Any = None,
        leader: Elastic | None = None,
    ) -> None:
        super().__init__()
        _check_attachable(transformer)
        self.transformer = transformer
        self.budget, self.num_steps, self.make_policy = budget, num_steps, policy
        self.trace: Trace | None = None
        self.on_detach: Callable[[], None] | None = None
        self.blocks: list[Block] = []
        if spec is not None:
            self._describe(spec, routers)
        self.names = argument_names(transformer)
        self._runs: Runs = Runs(transformer, self._start_run, pipe) if leader is None else leader._runs
        self._scope: _Scope | None = None
        self._call: Call | None = None
        self._dense = False
        self.step_of: Callable[[int], int] = lambda call: call
        """For a sampler that leaves out steps: from the number of a branch's call to its step."""
        self._attach()
        self._halves = [self] if leader is None else [leader, self]
        second = getattr(pipe, "transformer_2", None)
        if isinstance(second, nn.Module):
            self._halves.append(Elastic(second, spec, policy, routers, leader=self))
            self._runs.transformers.append(second)

    def _describe(self, spec: TransformerSpec, routers: Sequence[nn.Module] | None = None) -> None:
        """The blocks are those of a description."""
        self.spec = spec
        self.blocks = find_blocks(getattr(self.transformer, "_orig_mod", self.transformer), spec, routers)
        self.segments = segments(self.blocks)
        self._costs = Costs(self.transformer, self.blocks, spec.per_row)

    # -- runs ----------------------------------------------------------------------------------

    @contextmanager
    def scope(
        self,
        *,
        budget: float | None = None,
        num_steps: int | None = None,
        policy: Policy | None = None,
        samples: int | None = None,
    ) -> Iterator[Trace]:
        """A run of a pipeline with wishes of its own: its trace, and nothing kept once it ends.

        budget: ratio of dense FLOPs, default what `attach` was given. num_steps: denoising steps, where no
        pipeline's scheduler tells them. policy: overrides the bundle's. samples: pictures per call when CFG
        branches share a batch (rows are branch-major), default one per row. Raises RuntimeError if a scope is
        open.
        """
        if self._scope is not None:
            raise RuntimeError("a scope is already open on this transformer; scopes do not nest")
        scope = _Scope(self, budget, num_steps, policy, samples)
        self._scope = scope
        self._runs.forget(in_scope=True)
        try:
            yield scope.trace
        finally:
            self._scope = self._call = None
            self._runs.forget()
            self.trace = scope.trace

    def _start_run(self, num_steps: int | None) -> Run:
        """num_steps: as the sampler makes them, None if that is not known."""
        for half in self._halves:
            check_run(half.transformer)
        scope = self._scope or _Scope(self)
        told, trace = scope.num_steps, scope.trace
        if num_steps is not None and told not in (None, num_steps):
            trace.note(f"{told} steps were told, the sampler makes {num_steps}: planned for those")
        info = RunInfo(
            num_steps or told or self.num_steps,
            1.0 if trace.requested is None else trace.requested,
            self.segments,
            self.spec.skips,
        )
        make: Callable[..., Run] = getattr(scope.policy, "run_class", Run)
        self.trace = trace
        run = make(scope.policy, info, trace, [block.ragged for block in self.blocks], scope.samples)
        run.step_of = self.step_of
        return run

    def summary(self) -> str:
        """One paragraph on the last run: budget asked and spent, decisions, cache, notes."""
        return "no run yet" if self.trace is None else self.trace.summary()

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

    # -- patches -------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the transformer under control again after `detach`, with what is known of its costs.

        Raises ValueError, as when it was made, for what has been done to the transformer since.
        """
        for half in self._halves:
            _check_attachable(half.transformer)
        for half in self._halves:
            half._attach()

    def _attach(self) -> None:
        self._patches = patches = Patches()
        self._many_graphs = False
        # not to be traced where the transformer is compiled from outside: it then says that this cannot be
        forward = torch.compiler.disable(self._transformer_forward)
        self._own = patches.add(self.transformer, forward)
        patches.add(self.transformer, _refuse_compile, "compile")
        if hasattr(self.transformer, "cache_context"):
            patches.add(self.transformer, self._runs.cache_context, "cache_context")
        self._patch_blocks()
        self.transformer.__dict__["_edit_elastic"] = self

    def _patch_blocks(self) -> None:
        for block in self.blocks:
            self._patches.add(block.module, partial(self._block_forward, block))

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice."""
        for half in self._halves[1:]:
            if half is not self:
                half.detach()
        self._patches.close()
        for block in self.blocks:
            block.return_compiled()
        self._scope = self._call = None
        self._runs.forget()
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

    def _transformer_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check_call(self.transformer, [block.module for block in self.blocks])
        inputs = by_name(self.names, args, kwargs)
        if not self.blocks:
            self._derive(inputs)
        if sum([block.adopt_compiled() for block in self.blocks]) and not self._many_graphs:
            self._patches.enter_context(more_graphs())
            self._many_graphs = True
        if learns_order(self.transformer) and vars(self.transformer)["forward"] is self._own:
            original = self._patch_again(args, kwargs)
        sample = inputs[self.spec.sample]
        rows, shapes, device = count_rows(sample), call_shapes(inputs), tensors_in(sample)[0].device
        if self is not self._halves[0]:  # a branch goes on, with caches of its own
            shapes = (("second half", ()), *shapes)
        time = row_times(inputs[self.spec.timestep], rows, device)
        run, name = self._runs.of_call(time)
        cost = self._costs.of_call(
            shapes, rows, lambda: original(*copied(args), **copied(kwargs)), self._densely
        )
        for note in self._costs.notes:
            run.trace.note(note)
        with self.timed("call"):
            with self.timed("decide"):
                call = run.begin(run.branch(name, shapes, rows), time.expand(rows), cost)
            self._call = call
            try:
                output = original(*args, **kwargs)
                if call.pooled:
                    with self.timed("router"):
                        if run.routers is None:  # anew in every run, because training changes them
                            stacked = [block.router for block in self.blocks]
                            told = getattr(run.policy, "told", run.info.budget)
                            run.routers = RouterStack.at(stacked, told, device)
                        run.routers.read(call)
                run.end(call)
            finally:
                self._call = None
        if self.timer is not None:
            self.timer.calls.append(call.info)
        return output

    def _derive(self, inputs: dict[str, Any]) -> None:
        """Describe the transformer by its first call, and put its blocks under control from now on."""
        from .derive import spec_of  # where a spec is at hand nothing is derived

        with self._own.set_aside():
            spec = spec_of(self.transformer, inputs)
        for half in self._halves:
            half._describe(spec)
            half._patch_blocks()
        scope = self._halves[0]._scope
        if scope is not None:
            scope.trace.kinds[:] = [block.spec.kind for block in self.blocks]

    def _block_forward(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is not None and call.whole and block.plain and self.observer is None and self.timer is None:
            return straight(block, call, original, args, kwargs)
        if self._call is not None:
            with self.timed("block", block.index):
                inputs = block.bind(args, kwargs)
                return carry_out(block, self._call, original, inputs, self)
        if self._costs.seen is not None:
            return self._costs.show(block, args, kwargs)
        if not self._dense and not torch.is_grad_enabled():
            raise RuntimeError(f"the transformer's patch was bypassed; {ATTACH_AGAIN}")
        return block.run(original, block.bind(args, kwargs))


class _Scope:
    """What is wished of the runs that begin while it is open, and the trace they fill."""

    def __init__(
        self,
        elastic: Elastic,
        budget: float | None = None,
        num_steps: int | None = None,
        policy: Policy | None = None,
        samples: int | None = None,
    ) -> None:
        budget = elastic.budget if budget is None else budget
        self.policy, self.num_steps, self.samples = policy or elastic.make_policy(), num_steps, samples
        kinds = [block.spec.kind for block in elastic.blocks]
        self.trace = Trace(requested=budget, num_steps=num_steps or elastic.num_steps, kinds=kinds)


def _check_attachable(transformer: nn.Module) -> None:
    if "_edit_elastic" in transformer.__dict__:
        raise ValueError("routers are already attached to this transformer: detach them first")
    check_run(transformer)


def _refuse_compile(_original: Callable[..., Any], *_args: Any, **_kwargs: Any) -> None:
    raise ValueError(COMPILED_WHOLE)
