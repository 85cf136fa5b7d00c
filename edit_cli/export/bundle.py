"""`edit export --format bundle`: a bundle as one file, with a model card, ready for a hub repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones import mesh_registry, registry
from backbones.model_files import ModelNotFoundError
from edit_cli import __version__
from edit_cli.errors import EditError, RunError
from edit_cli.export.folder import new_folder, write_manifest
from routers import bundle_file
from routers.bundle import Bundle, load_bundle

FILE = "edit-routers.safetensors"


def export_bundle(source: str, output: str, force: bool) -> dict[str, Any]:
    """Write `output`: the bundle in one file, README.md and a manifest. Returns what was done, as JSON data.

    source: a bundle folder, or a model that brings its bundle. Raises EditError, ValueError, RunError.
    """
    folder = find_bundle(source)
    bundle = load_bundle(folder)
    with new_folder(output, force) as building:
        bundle_file.pack(folder, building / FILE)
        (building / "README.md").write_text(model_card(bundle, Path(output).name), encoding="utf-8")
        again = load_bundle(building / FILE)
        worst = difference(bundle.routers, again.routers)
        if worst != 0 or again.digest != bundle.digest:
            raise RunError(f"the written file differs from the bundle (by {worst:g}); nothing was kept")
        facts = {
            "format": "bundle",
            "edit": __version__,
            "model": bundle.base_model,
            "routers": bundle.digest,
            "difference": worst,
        }
        manifest = write_manifest(building, facts)
    return {
        "output": output,
        "format": "bundle",
        "model": bundle.base_model,
        "files": [FILE, *(name for name in manifest["files"] if name != FILE)],
        "bytes": manifest["files"][FILE]["bytes"],
        "difference": worst,
    }


def find_bundle(source: str) -> Path:
    """The bundle folder that `source` is or brings along. Raises EditError, ModelNotFoundError."""
    path = Path(source).expanduser()
    if (path / "bundle.json").is_file():
        return path
    if path.is_file() or bundle_file.find(path) is not None:
        raise EditError(f"{source!r} is one file already, or no bundle; give a bundle folder or a model")
    try:
        backbone: Any = registry.resolve(source)
    except ModelNotFoundError as error:
        if "generate-3d" not in str(error) and not (path / "config.yaml").is_file():
            raise
        backbone = mesh_registry.resolve(source)
    if backbone.bundle is None:
        raise EditError(f"{source!r} has no bundle; make one with: edit calibrate -m {source} -o bundle")
    found: Path = backbone.bundle
    return found


def difference(left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> float:
    """Largest absolute difference of router weights; infinite if their names or shapes differ."""
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
            return float("inf")
        worst = max([worst, *(float((one[k] - other[k]).abs().max()) for k in one)])
    return worst


def model_card(bundle: Bundle, name: str) -> str:
    """README.md for a hub repository: what it is for, its measured figures, how to use it."""
    card = f"""---
library_name: edit
tags: [elastic-inference, diffusion]
---

# {name}

Routers that run the transformer of `{bundle.base_model}` at a compute budget from {bundle.min_budget:g} to 1
(recommended: {bundle.recommended_budget:g}). They hold no weights of the model and fit only the weights they
were made for: architecture `{bundle.architecture[:12]}`, {bundle.num_steps} steps, guidance
{bundle.guidance:g}.

    edit generate "a cat" --model {bundle.base_model} --routers {name} --budget {bundle.recommended_budget:g}

The licence of the model applies to what is made with it; say here which licence you give to the routers.
"""
    rows = bundle.metadata.get("quality")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        names = [k for k, v in rows[0].items() if isinstance(v, int | float)]
        card += "\n## Measured by `edit calibrate`\n\n" + table(names, rows)
    return card


def table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Figures as a Markdown table; a figure that a row does not have is a dash."""
    lines = [f"| {' | '.join(names)} |", "|" + "---:|" * len(names)]
    for row in rows:
        shown = ("-" if row.get(name) is None else f"{row[name]:.4g}" for name in names)
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
