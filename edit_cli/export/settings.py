"""What an export is to be: its settings, and which of them each format takes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edit_cli.errors import EditError

FORMATS = {
    "bundle": "bundle",
    "reference": "reference",
    "diffusers": "diffusers_folder",
    "static": "static",
    "torch-export": "program",
}
"""Formats, each with the module of this package that writes it."""
FREEZING, MODELS = ("static", "torch-export"), ("diffusers", "static", "torch-export")
APPLIES = {
    "--budget": FREEZING,
    "--prompts": MODELS,
    "--images": MODELS,
    "--batch-size": ("torch-export",),
    "--text-tokens": ("torch-export",),
    "--dtype": ("reference", *MODELS),
    "--shard-size": ("reference", "diffusers", "static"),
}
"""Formats that an option is for; it is refused with the others."""


@dataclass(frozen=True)
class Settings:
    """An export. source: a bundle, a model, or a checkpoint in the paper's layout.

    budget: share of the dense FLOPs in (0, 1] that a frozen format keeps; 1 freezes nothing.
    prompts, images: as for `edit calibrate`; None: the model's own. batch_size, text_tokens: of an exported
    call. dtype: one of DTYPES; what the model is loaded, measured and written in. shard_size: most of a
    weight file, like "5GB".
    """

    source: str
    output: str
    format: str = "bundle"
    force: bool = False
    budget: float = 1.0
    prompts: str | None = None
    images: str | None = None
    batch_size: int = 1
    text_tokens: int | None = None
    dtype: str = "auto"
    shard_size: str | None = None


def check_format(format: str, given: Mapping[str, Any]) -> None:
    """Refuse options that are not for a format. given: option -> value or None. Raises EditError."""
    for name, value in given.items():
        if value is not None and format not in APPLIES[name]:
            raise EditError(
                f"{name} does not apply to --format {format}, only to {', '.join(APPLIES[name])}; "
                "leave it out"
            )


def budget_for(format: str, text: str | None) -> float:
    """The share of the dense FLOPs that a format keeps; 1 for those that freeze none. Raises EditError."""
    if format not in FREEZING:
        return 1.0
    highest = "below 1" if format == "static" else "at most 1"
    if text is None:
        raise EditError("this format freezes one budget; give --budget B, like --budget 0.7")
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < 1 and not (budget == 1 and format != "static"):
        raise EditError(f"--budget {text!r} must be a number above 0 and {highest}, like 0.7")
    return budget
