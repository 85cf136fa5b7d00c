"""The formats of `edit export`, and which options each takes. Torch-free."""

from __future__ import annotations

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
