"""Parse and check single values from options, input lists and records: one message each. Torch-free.

`where` names the place for the message: an option ("--budget") or a line ("prompts.jsonl line 3: budget").
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backbones.spec import Lora
from edit_cli.errors import EditError

MAX_STEPS = 1000  # the training timesteps of every family here
MAX_SIDE = 16384
MAX_SEED = 2**63 - 1
MAX_COUNT = 100_000
POINTS = 8
"""Budgets that a bundle is measured at by default."""
PICTURE_NAMES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
RANDOM = "random"
"""A seed that is drawn anew."""
NONE = "none"
"""What takes out a recorded picture or LoRA."""

BUDGET_HINT = "it is the share of the dense model's compute to spend, 0 < budget <= 1, for example 0.6"
DURATION_HINT = "write a number with its unit, like 5s, 800ms or 2m; a day is the most"
MAX_SECONDS = 86_400.0
DEVICES = "auto, cuda, cuda:N, mps, cpu"


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


def whole(low: int, high: int, hint: str = "") -> Callable[[str, Any], int]:
    """A check for integers in [low, high]."""
    return lambda where, value: integer(where, value, low, high, hint)


def share(hint: str, low: float = 0.0, high: float = 1.0) -> Callable[[str, Any], float]:
    """A check for numbers in (low, high]; low itself is allowed where high is more than 1."""

    def check(where: str, value: Any) -> float:
        result = number(where, value, hint)
        if not low <= result <= high or (result == low and high <= 1):
            raise EditError(f"{where} {value!r} is out of range; {hint}")
        return result

    return check


def choice(*allowed: str) -> Callable[[str, Any], str]:
    """A check for one of these words, in lower case. It has them as `allowed`, for shells to complete."""

    def check(where: str, value: Any) -> str:
        return one_of(where, text(where, value).lower(), allowed)

    check.allowed = allowed  # type: ignore[attr-defined]
    return check


budget = share(BUDGET_HINT)
guidance = share("allowed are 0 to 100, usual is 1 (off) to 8", 0, 100)
strength = share("allowed are 0 < strength <= 1; 1 ignores the input picture")
rate = share("allowed are 0 < rate <= 1, usual is 0.003")
steps = whole(1, MAX_STEPS)
side = whole(1, MAX_SIDE)
count = whole(1, MAX_COUNT)
frames = whole(1, MAX_COUNT)
fps = share("allowed are 1 to 240, usual is 16 to 30", 1, 240)
seconds = share("allowed are 0.1 to 3600", 0.1, 3600)


def seed(where: str, value: Any) -> int:
    """A seed; "random" is a new one of 32 bits, which the report and the record tell."""
    if value == RANDOM:
        import secrets

        return secrets.randbelow(2**32)
    return integer(where, value, 0, MAX_SEED, f"or {RANDOM}")


def prompt(where: str, value: Any) -> str:
    """A prompt that is not blank."""
    if not text(where, value).strip():
        raise EditError(f'{where} is empty; say what to draw, for example "a cat"')
    if where == "PROMPT" and _is_number(value):
        raise EditError(
            f"PROMPT {value!r} is a number; write it after the option that it is for, or say what to draw: "
            f'"the number {value.strip()}"'
        )
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def text(where: str, value: Any) -> str:
    """Any text that can be written as UTF-8, without NUL."""
    if not isinstance(value, str):
        raise EditError(f"{where} {value!r} is not text")
    # bytes that are not UTF-8 reach us as lone surrogates; neither they nor NUL can be stored or named
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise EditError(f"{where} {value!r} holds characters that are not text; give it as UTF-8")
    return value


def one_of(where: str, value: Any, allowed: Sequence[str]) -> str:
    """A word from a list."""
    if value not in allowed:
        raise EditError(f"{where} {value!r} is unknown; allowed are {', '.join(allowed)}")
    return str(value)


def device(where: str, value: Any) -> str:
    """The name of a device; whether it is here is checked when the model is loaded."""
    kind, _, index = text(where, value).partition(":")
    if kind not in ("auto", "cuda", "mps", "cpu") or (index and not index.isdecimal()):
        raise EditError(f"{where} {value!r} is unknown; allowed are {DEVICES}")
    return str(value)


def readable_file(where: str, value: Any) -> str:
    """A path of an existing, readable file, as text."""
    path = Path(text(where, value)).expanduser()
    if not path.is_file():
        raise EditError(f"{where} {str(value)!r} is not a file; check the path")
    if not os.access(path, os.R_OK):
        raise EditError(f"{where} {str(value)!r} cannot be read; check its permissions")
    return str(path)


def picture_file(where: str, value: Any) -> str:
    """A path of a picture that can be read to its end, as text; "none" for no picture."""
    if value == NONE and not Path(NONE).is_file():
        return NONE
    from edit_cli.generation.cutout import open_picture  # numpy and Pillow, which most commands do without

    path = readable_file(where, value)
    open_picture(path, where)
    return path


def picture_name(where: str, value: Any) -> str:
    """A path that looks like a picture's."""
    if Path(text(where, value)).suffix.lower() not in PICTURE_NAMES:
        raise EditError(f"{where} {value!r} is not the name of a picture; give a PNG, JPEG or WebP file")
    return str(value)


def duration(where: str, value: Any) -> float:
    """Seconds of "5s", "800ms" or "2m", or of a number."""
    given = (
        str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else text(where, value)
    )
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(ms|s|m|)\s*", given.lower())
    result = 0.0 if found is None else float(found[1]) / {"ms": 1000, "m": 1 / 60}.get(found[2], 1)
    if not 0 < result <= MAX_SECONDS:
        raise EditError(f"{where} {value!r} is no time; {DURATION_HINT}")
    return result


def preview_file(where: str, value: Any) -> str:
    """A path of a picture that can be written again and again."""
    if Path(text(where, value)).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise EditError(f"{where} {value!r} is not the name of a .png or .jpg file")
    return str(value)


def budgets(where: str, value: Any) -> tuple[float, ...]:
    """One budget "0.5", or evenly spaced ones from "0.35:1.0" or, with how many, "0.35:1.0:8"."""
    parts, points = text(where, value).split(":"), POINTS
    if len(parts) == 1:
        return (budget(where, value),)
    try:
        low, high = (float(part) for part in parts[:2])
        if len(parts) == 3:
            points = int(parts[2])
        if len(parts) > 3 or not 0 < low < high <= 1 or not 2 <= points <= 100:
            raise ValueError
    except ValueError:
        raise EditError(
            f"{where} {value!r} is not a range of budgets; give LOW:HIGH or LOW:HIGH:COUNT, "
            "0 < LOW < HIGH <= 1 and 2 to 100 of them, like 0.35:1.0:8"
        ) from None
    return tuple(low + (high - low) * i / (points - 1) for i in range(points))


def size(where: str, value: Any) -> str:
    """A size of files with its unit."""
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", text(where, value)):
        raise EditError(f"{where} {value!r} is not a size; give a number with a unit, like 5GB")
    return str(value)


def lora(where: str, value: Any) -> Lora | None:
    """PATH or PATH:SCALE; a path that itself holds a colon is tried first. None for "none"."""
    if value == NONE:
        return None
    given = text(where, value)
    path, scale = Path(given).expanduser(), 1.0
    if not path.exists() and ":" in given:
        name, _, factor = given.rpartition(":")
        path = Path(name).expanduser()
        scale = number(f"{where} {given!r}: scale", factor, "write --lora FILE:0.8")
    if not path.exists():
        raise EditError(f"{where} {str(path)!r} does not exist; give a .safetensors file, or FILE:SCALE")
    if path.is_file() and path.suffix != ".safetensors":
        raise EditError(f"{where} {str(path)!r} is not a .safetensors file; other formats are not loaded")
    return Lora(path.resolve(), scale)
