"""Errors a user sees: one line each, and the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BAD_INPUT, FAILED_RUN, INTERRUPTED = 2, 1, 130


class EditError(Exception):
    """Bad input: says the value, what is allowed, and the next step. Exit code 2."""

    exit_code = BAD_INPUT


class RunError(EditError):
    """The input was fine and the run failed. Exit code 1."""

    exit_code = FAILED_RUN


class Interrupted(EditError):  # noqa: N818 - not an error
    """Ctrl-C. Names the files that were finished before it. Exit code 130."""

    exit_code = INTERRUPTED

    def __init__(self, finished: Sequence[Path] = ()) -> None:
        kept = f"; kept {', '.join(map(str, finished))}" if finished else "; nothing was written"
        super().__init__("interrupted" + kept)


@contextmanager
def bad_input(*kinds: type[Exception]) -> Iterator[None]:
    """Turn one-line errors of `backbones` and `routers` into EditError. kinds: default ValueError."""
    try:
        yield
    except kinds or (ValueError,) as error:  # noqa: B030 - a tuple of classes
        raise EditError(str(error)) from error


SMALLER = "smaller results or a smaller --batch-size, --dtype bf16, or on a GPU --offload model"


def out_of_memory(where: str = "", smaller: str = SMALLER) -> str:
    """The message. where: at what it happened. smaller: what to try."""
    return f"out of memory{' ' if where else ''}{where}; try {smaller}"


@contextmanager
def memory_errors(where: str, smaller: str = SMALLER) -> Iterator[None]:
    """Turn any library's out-of-memory error into a RunError with the next step."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(out_of_memory(where, smaller)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in text
        for phrase in ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    )
