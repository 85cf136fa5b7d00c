"""`edit export --format bundle`: a bundle as one file, with a model card, ready for a hub repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones import registry
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.write import Say
from edit_cli.request import Request
from routers.bundle import Bundle, find_file, load_bundle, pack

FILE = "edit-routers.safetensors"


def open_source(request: Request, say: Say) -> Bundle:
    """The bundle that the source is or brings along. Raises EditError, ValueError."""
    return load_bundle(find_bundle(request["source"]))


def fill(bundle: Bundle, request: Request, folder: Path, say: Say) -> dict[str, Any]:
    """Write the bundle in one file. Raises RunError if it is another when loaded."""
    pack(bundle.path, folder / FILE)
    again = load_bundle(folder / FILE)
    if again.digest != bundle.digest:
        raise RunError("the written file differs from the bundle; nothing was kept")
    return {"model": bundle.base_model, "routers": bundle.digest}


def find_bundle(source: str) -> Path:
    """The bundle folder that `source` is or brings along. Raises EditError, ModelError."""
    path = Path(source).expanduser()
    if (path / "bundle.json").is_file():
        return path
    if path.is_file() or find_file(path) is not None:
        raise EditError(f"{source!r} is one file already, or not a bundle; give a bundle folder or a model")
    backbone = registry.resolve(source)
    if backbone.bundle is None:
        raise EditError(f"{source!r} has no bundle; make one with: edit calibrate -m {source} -o bundle")
    return backbone.bundle


def model_card(facts: Mapping[str, Any], bundle: Bundle, name: str) -> str:
    """README.md for a hub repository: what it is for, its measured figures, how to use it."""
    card = f"""---
library_name: edit
tags: [elastic-inference, diffusion]
---

# {name}

A bundle that runs the transformer of `{bundle.base_model}` at a compute budget {served(bundle)}
(recommended: {bundle.recommended_budget:g}). It holds no weights of the model and fits only the weights
it was made for: architecture `{bundle.architecture[:12]}`, {bundle.num_steps} steps, guidance
{bundle.guidance:g}.

    edit generate "a cat" --model {bundle.base_model} --routers {name} --budget {bundle.recommended_budget:g}

The licence of the model applies to what is made with it; say here which licence you give to the bundle.
"""
    rows = bundle.metadata.get("quality")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        names = [k for k, v in rows[0].items() if isinstance(v, int | float)]
        card += "\n## Measured by `edit calibrate`\n\n" + _markdown(names, rows)
    return card


def served(bundle: Bundle) -> str:
    """Which budgets a bundle serves, for people."""
    return f"from {bundle.min_budget:g} to 1" if bundle.min_budget else "up to 1"


def _markdown(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Figures as a Markdown table; a figure that a row does not have is a dash."""
    lines = [f"| {' | '.join(names)} |", "|" + "---:|" * len(names)]
    for row in rows:
        shown = ("-" if row.get(name) is None else f"{row[name]:.4g}" for name in names)
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def as_table(facts: Mapping[str, Any]) -> Any:
    """What was written, for people."""
    return two_columns(
        {
            "written": f"{facts['output']} ({FILE}, {facts['bytes'] / 2**20:.2f} MiB)",
            "checked": f"loaded again, the same to the last bit (sha256 {facts['routers'][:12]})",
            "use": f"edit generate PROMPT --routers {facts['output']}",
        }
    )
