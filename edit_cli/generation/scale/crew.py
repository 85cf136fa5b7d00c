"""Processes that a launcher started side by side and that share one plan, batch by batch.

    torchrun --nproc-per-node 2 -m edit_cli generate --prompts many.jsonl -o out/
    accelerate launch -m edit_cli generate --prompts many.jsonl -o out/

Both tell every process its rank, how many there are and where the first one listens. The first one settles
names and tells the others; then each takes the next batch that nobody has, and makes it as a single process
would, in the batches of a single process, so that files are the same bit for bit. At the end the first one
reports for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from backbones.spec import Placement
from edit_cli.generation.plan import Plan
from edit_cli.generation.result import Result
from edit_cli.generation.scale.places import check_shared, placed, places
from edit_cli.request import Request

TOLD_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=7)
"""How long a process waits for another one: as long as a run may take. A launcher ends all when one dies."""
T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """store: torch's key-value store that all processes see. rank: from 0."""

    store: Any
    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process settles names and reports."""
        return self.rank == 0

    def share(self, plan: Plan) -> Plan:
        """The leader's plan, told to the others. plan: the leader's after names were settled; the others' as
        they made it. Raises RunError for processes whose plans differ.
        """
        if self.leads:
            self.store.set("plan", json.dumps(places(plan)))
            return plan
        return placed(plan, json.loads(self.store.get("plan")))

    def own_device(self, placement: Placement) -> Placement:
        """A card of its own for every process of a machine, where there are cards and none was named."""
        import torch

        if placement.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return placement
        card = int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count()
        return replace(placement, device=f"cuda:{card}")

    def taken(self, batches: Sequence[T], name: str = "batches") -> Iterator[T]:
        """Batches that this process makes: each time the next one that nobody has. name: of this list."""
        while (number := int(self.store.add(name, 1)) - 1) < len(batches):
            yield batches[number]

    @property
    def is_main_process(self) -> bool:
        """As accelerate says it."""
        return self.leads

    def wait_for_everyone(self) -> None:
        """Go on when every process has come here."""
        number = int(self.store.add("arrived", 1))
        turn = (number - 1) // self.size
        if number % self.size == 0:
            self.store.set(f"all here {turn}", "")
        self.store.get(f"all here {turn}")

    def step(self) -> int:
        """Count a step; returns the steps of all processes so far."""
        return int(self.store.add("steps", 1))

    def gather(self, result: Result) -> None:
        """Hand over what this process made; the leader's result becomes that of all."""
        if not self.leads:
            self.store.set(f"part {self.rank}", json.dumps(result.part()))
            self.store.get("the end")  # the store may go with the leader
            return
        for rank in range(1, self.size):
            result.join(json.loads(self.store.get(f"part {rank}")))
        self.store.set("the end", "")


def crew_of(request: Request) -> Crew | None:
    """The crew that a launcher's environment tells of; None for a process alone. Raises EditError."""
    if not all(name in os.environ for name in TOLD_BY_LAUNCHERS) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    from torch.distributed.rendezvous import rendezvous

    check_shared(request)
    return Crew(*next(iter(rendezvous("env://", timeout=PATIENCE))))
