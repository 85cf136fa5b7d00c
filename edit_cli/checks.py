"""Parse and check single values from options, prompt files and metadata: one message each. Torch-free.

`where` names the place for the message: an option ("--budget") or a line ("prompts.jsonl line 3: budget").
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.spec import SOLVERS
from edit_cli.errors import EditError

MAX_STEPS = 1000  # the training timesteps of every family here
MAX_SIDE = 16384
MAX_SEED = 2**63 - 1
DEFAULT_STRENGTH = 0.6  # diffusers' own default for image-to-image

BUDGET_HINT = "it is the share of the dense model's compute to spend, 0 < budget <= 1, for example 0.6"


def number(where: str, value: Any, hint: str) -> float:
    """A finite float from text or JSON. Raises EditError."""
    try:
        if isinstance(value, bool):
            raise ValueError
        result = float(value)
    except (TypeError, ValueError):
        raise EditError(f"{where} {value!r} is not a number; {hint}") from None
    if not math.isfinite(result):
        raise EditError(f"{where} {value!r} is not a finite number; {hint}")
    return result


def integer(where: str, value: Any, low: int, high: int, hint: str = "") -> int:
    """An integer in [low, high] from text or JSON. Raises EditError."""
    allowed = f"allowed are whole numbers from {low} to {high}" + (f"; {hint}" if hint else "")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        result = int(value)
    except (TypeError, ValueError):
        raise EditError(f"{where} {value!r} is not a whole number; {allowed}") from None
    if not low <= result <= high:
        raise EditError(f"{where} {value!r} is out of range; {allowed}")
    return result


def budget(where: str, value: Any) -> float:
    """A budget in (0, 1], ratio of dense FLOPs."""
    result = number(where, value, BUDGET_HINT)
    if not 0 < result <= 1:
        raise EditError(f"{where} {value!r} is out of range; {BUDGET_HINT}")
    return result


def guidance(where: str, value: Any) -> float:
    """A guidance scale >= 0; 1 or less turns classifier-free guidance off."""
    hint = "allowed are 0 to 100, usual is 1 (off) to 8"
    result = number(where, value, hint)
    if not 0 <= result <= 100:
        raise EditError(f"{where} {value!r} is out of range; {hint}")
    return result


def strength(where: str, value: Any) -> float:
    """Image-to-image strength in (0, 1]: the share of the denoising steps that is run."""
    hint = "allowed are 0 < strength <= 1; 1 ignores the input picture"
    result = number(where, value, hint)
    if not 0 < result <= 1:
        raise EditError(f"{where} {value!r} is out of range; {hint}")
    return result


def seed(where: str, value: Any) -> int:
    """A seed >= 0."""
    return integer(where, value, 0, MAX_SEED)


def steps(where: str, value: Any) -> int:
    """Denoising steps."""
    return integer(where, value, 1, MAX_STEPS)


def side(where: str, value: Any) -> int:
    """Width or height in px; divisibility is checked when the model is known."""
    return integer(where, value, 1, MAX_SIDE)


def divisible(where: str, value: int, multiple: int) -> None:
    """Raises EditError unless a side in px is a multiple of what the model needs."""
    if value % multiple:
        low = value - value % multiple
        near = " and ".join(str(n) for n in (low, low + multiple) if n)
        raise EditError(
            f"{where} {value} is not a multiple of {multiple}, which this model needs; nearest: {near}"
        )


def prompt(where: str, value: Any) -> str:
    """A prompt that is not blank."""
    if not text(where, value).strip():
        raise EditError(f'{where} is empty; say what to draw, for example "a cat"')
    return str(value)


def text(where: str, value: Any) -> str:
    """Any text that can be written as UTF-8, without NUL."""
    if not isinstance(value, str):
        raise EditError(f"{where} {value!r} is not text")
    # bytes that are no UTF-8 reach us as lone surrogates; neither they nor NUL can be stored or named
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise EditError(f"{where} {value!r} holds characters that are no text; give it as UTF-8")
    return value


def one_of(where: str, value: Any, allowed: Sequence[str]) -> str:
    """A word from a list."""
    if value not in allowed:
        raise EditError(f"{where} {value!r} is unknown; allowed are {', '.join(allowed)}")
    return str(value)


def solver(where: str, value: Any) -> str:
    """A solver's name, in lower case."""
    return one_of(where, text(where, value).lower(), SOLVERS)


def readable_file(where: str, value: Any) -> str:
    """A path of an existing, readable file, as text."""
    path = Path(text(where, value)).expanduser()
    if not path.is_file():
        raise EditError(f"{where} {str(value)!r} is no file; check the path")
    if not os.access(path, os.R_OK):
        raise EditError(f"{where} {str(value)!r} cannot be read; check its permissions")
    return str(path)


def picture_file(where: str, value: Any) -> str:
    """A path of a picture that Pillow can open, as text."""
    from PIL import Image

    path = readable_file(where, value)
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # Pillow plugins raise anything on damaged files
        raise EditError(
            f"{where} {str(value)!r} is no readable picture; give a PNG, JPEG or WebP file"
        ) from error
    return path


FIELDS = {
    "prompt": prompt,
    "negative_prompt": text,
    "seed": seed,
    "width": side,
    "height": side,
    "steps": steps,
    "guidance": guidance,
    "budget": budget,
    "image": picture_file,
    "strength": strength,
    "solver": solver,
    "output": text,
}
"""What one picture's request consists of, and how each value is checked."""


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check every field of a request given as a dict. where: a format with {} for the field's name."""
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise EditError(f"{where.format(sorted(unknown)[0])} is unknown; allowed are {', '.join(FIELDS)}")
    return {
        name: FIELDS[name](where.format(name), value) for name, value in values.items() if value is not None
    }
