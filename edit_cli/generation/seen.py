"""What a run of a pipeline shows only while it is made: numbers that overflow, prompts that are cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

TAIL = 8
"""Tokens of what was cut that a note shows."""
SHOWN = 40
"""Characters of a prompt that a note shows."""


@dataclass
class Reading:
    """How much of a text a tokenizer passed on: `kept` of `total` tokens; what was cut begins with `tail`."""

    kept: int
    total: int
    tail: str


@dataclass
class Seen:
    """rows: results of the call. bad: rows in which numbers overflowed. texts: what tokenizers read, by text
    and tokenizer. encoded: tokens that the prompts' embeddings have, where that is known.
    """

    rows: int
    bad: set[int] = field(default_factory=set)
    texts: dict[tuple[str, int], Reading] = field(default_factory=dict)
    encoded: int | None = None

    def values(self, values: Any) -> None:
        """Look at numbers: a tensor or an array, its first axis the rows where there are as many."""
        for each in values if isinstance(values, (list, tuple)) else [values]:
            self._look(each)

    def _look(self, values: Any) -> None:
        import torch

        if not hasattr(values, "shape") or not len(values.shape):
            return
        tensor = torch.as_tensor(values)
        if not tensor.is_floating_point():
            return
        if len(tensor) == self.rows:
            finite = tensor.flatten(1).isfinite().all(dim=1).tolist()
            self.bad |= {row for row, good in enumerate(finite) if not good}
        elif not tensor.isfinite().all():
            self.bad |= set(range(self.rows))

    def notes(self, prompts: list[str]) -> list[str]:
        """A line for every prompt of which no encoder read all."""
        notes = []
        for prompt in dict.fromkeys(filter(None, prompts)):
            readings = [each for (text, _), each in self.texts.items() if prompt.strip() in text]
            if not readings or any(each.kept >= each.total for each in readings):
                continue
            most = max(readings, key=lambda each: each.kept / each.total)
            shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN].rstrip()}..."
            notes.append(
                f"the prompt {shown!r} is too long: of its {most.total} tokens the model reads {most.kept}, "
                f"what comes from {most.tail!r} on has no effect"
            )
        return notes


@contextmanager
def read_texts(pipe: Any, seen: Seen) -> Iterator[None]:
    """Inside, every text that a tokenizer of the pipeline is given is noted, and what of it is cut."""
    kinds = {
        type(part) for part in getattr(pipe, "components", {}).values() if hasattr(part, "model_max_length")
    }
    # the template's first tokens are dropped, then the embeddings are cut to their length
    dropped = int(getattr(pipe, "prompt_template_encode_start_idx", 0) or 0)
    with ExitStack() as undo:
        for kind in kinds:
            _watch(kind, seen, undo)
        yield
    if dropped and seen.encoded is not None:
        for each in seen.texts.values():
            each.kept, each.total = min(each.kept - dropped, seen.encoded), each.total - dropped


def _watch(kind: Any, seen: Seen, undo: ExitStack) -> None:
    usual, own = kind.__call__, "__call__" in kind.__dict__

    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = usual(self, text, *args, **kwargs)
        for each in [text] if isinstance(text, str) else text if isinstance(text, (list, tuple)) else ():
            if isinstance(each, str):
                ids = usual(self, each)["input_ids"]
                limit = kwargs.get("max_length") or self.model_max_length
                kept = min(len(ids), limit) if kwargs.get("truncation") else len(ids)
                tail = self.decode(ids[max(kept - 1, 0) :][:TAIL], skip_special_tokens=True)
                before = seen.texts.get((each, id(self)))
                if before is None or kept < before.kept:  # pipelines ask again for what they have cut
                    seen.texts[each, id(self)] = Reading(kept, len(ids), tail.strip())
        return made

    kind.__call__ = call
    undo.callback(lambda: setattr(kind, "__call__", usual) if own else delattr(kind, "__call__"))
