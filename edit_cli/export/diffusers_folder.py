"""`edit export --format diffusers`: a model folder for stock libraries, with the bundle beside it.

The hidden units of every MLP are put in order of importance where that makes narrow MLPs better, so that
taking the first of them is all that slicing needs. Dense results stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.spec import DIFFUSERS
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.bundle import served
from edit_cli.export.model import load_again, save_model
from edit_cli.export.source import Source, calibration_calls, largest_difference, outputs
from edit_cli.export.write import Say
from edit_cli.request import Request
from routers.attachment import attach, fingerprint
from routers.bundle import load_bundle
from routers.static.choose import Inputs, narrow_error
from routers.static.units import order_units

SAME, SAME_HALF = 1e-5, 3e-2
"""Largest difference of the dense outputs, relative to the largest output, in fp32 and in half precision."""
HALF_WIDTH = 0.5
ROUTERS = "routers"


def fill(source: Source, request: Request, folder: Path, say: Say) -> dict[str, Any]:
    """Write the model, with its bundle in `routers/`. Raises EditError, ValueError, RunError."""
    if source.is_static:
        raise EditError(f"{request['source']!r} is a static model: it is in this layout already")
    trained = _merge_trained(source)
    say("recording calls of dense runs")
    calls = calibration_calls(source)
    wanted = outputs(source.transformer, calls)
    say("ordering hidden units")
    units = "as trained" if trained else _order(source, calls)
    say("writing")
    save_model(source, source.transformer, folder, request.get("shard_size"))
    if source.bundle is not None:
        name, prints = Path(request["output"]).name, fingerprint(source.transformer)  # as they are now
        replace(source.bundle, base_model=name, fingerprint=prints).save(folder / ROUTERS)
    say("loading it again")
    again = load_stock(source, folder)
    largest = max(float(output.abs().max()) for output in wanted)
    difference = largest_difference(outputs(again, calls), wanted) / max(largest, 1e-12)
    if not difference <= (SAME if source.dtype == torch.float32 else SAME_HALF):
        raise RunError(f"the written model differs by {difference:g} when loaded; nothing was kept")
    if source.bundle is not None:
        attach(again, load_bundle(folder / ROUTERS), budget=1.0).detach()  # raises if it does not fit
    return {
        "model": source.backbone.name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "units": units,
        "bundle": None if source.bundle is None else ROUTERS,
        "difference": difference,
    }


def _merge_trained(source: Source) -> bool:
    """Make weights that were trained with the routers the model's own; whether routers were trained at all.

    Trained routers chose widths with the units as they lie, so those stay.
    """
    trained = None if source.bundle is None else source.bundle.trained
    if trained is None:
        return False
    if trained.backbone is not None:
        trained.backbone.merge(source.transformer)
        trained.backbone = None
    return True


def _order(source: Source, calls: list[Inputs]) -> dict[str, float | bool]:
    """Put units in order if that helps narrow MLPs. Errors: relative squared, every MLP at half width."""
    spec, transformer = source.backbone.family.transformer, source.transformer
    before = narrow_error(transformer, spec, calls, HALF_WIDTH)
    undo = order_units(transformer, spec, calls)
    after = narrow_error(transformer, spec, calls, HALF_WIDTH)
    if after >= before:
        undo()
    return {"reordered": after < before, "error_before": round(before, 6), "error_after": round(after, 6)}


def load_stock(source: Source, folder: Path) -> Any:
    """The written transformer: pictures through diffusers alone, meshes as their own reader finds it."""
    device = next(source.transformer.parameters()).device
    if source.backbone.family.layout != DIFFUSERS:
        return load_again(source, folder).to(device)
    import diffusers

    kind: Any = getattr(diffusers, source.backbone.family.transformer.transformer_class)
    again = kind.from_pretrained(
        folder, subfolder="transformer", torch_dtype=source.dtype, local_files_only=True
    )
    return again.to(device).eval()


def _units_line(units: Any) -> str:
    if isinstance(units, str):
        return f"{units}: the routers were trained with this order"
    gain = f"error with every MLP at half width {units['error_before']:.3g}"
    if units["reordered"]:
        return f"most important first; {gain} before, {units['error_after']:.3g} now"
    return f"as they were; {gain}, by importance {units['error_after']:.3g}"


def model_card(facts: Mapping[str, Any], source: Source, name: str) -> str:
    """README.md of the folder: what it is, and how stock libraries and `edit` use it."""
    lines = [
        f"# {name}\n",
        f"`{facts['model']}` in {facts['dtype']}. Hidden units of the MLPs: {_units_line(facts['units'])}. "
        f"Dense outputs are those of the original within {facts['difference']:.1e} of the largest.\n",
    ]
    if source.backbone.makes == "mesh":
        lines.append(f"    edit generate-3d PICTURE --model {name} -o mesh.glb\n")
    else:
        lines += [
            "```python",
            "import diffusers\n",
            f'pipe = diffusers.DiffusionPipeline.from_pretrained("{name}")',
            "```\n",
            f'    edit generate "a cat" --model {name}\n',
        ]
    if facts["bundle"]:
        bundle = source.bundle
        assert bundle is not None
        lines.append(
            f"`{ROUTERS}/` holds a bundle for budgets {served(bundle)} "
            f"(recommended: {bundle.recommended_budget:g}), which `edit` finds by itself.\n"
        )
    return "\n".join([*lines, "The licence of the original model applies.", ""])


def as_table(facts: Mapping[str, Any]) -> Any:
    """What was written, for people."""
    bundle = f"in {facts['output']}/{ROUTERS}" if facts["bundle"] else "none: the model has no bundle"
    return two_columns(
        {
            "written": f"{facts['output']} ({facts['model']}, {facts['dtype']}, "
            f"{facts['bytes'] / 2**20:.1f} MiB)",
            "hidden units": _units_line(facts["units"]),
            "bundle": bundle,
            "checked": f"loaded again, largest relative difference {facts['difference']:.1e}",
        }
    )
