"""`edit export --format diffusers`: a model folder for stock libraries, with the bundle beside it.

The hidden units of every MLP are put in order of importance where that makes narrow MLPs better, so that
taking the first of them is all that slicing needs. Dense results stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit_cli import __version__
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.folder import new_folder, write_manifest
from edit_cli.export.model import load_again, save_model
from edit_cli.export.source import Request, Source, calibration_calls, is_static, open_source
from routers.attachment import attach
from routers.bundle import Bundle, load_bundle
from routers.identity import fingerprint
from routers.static.choose import Inputs, narrow_error, order_units
from routers.watch.redundancy import first_tensor

SAME, SAME_HALF = 1e-5, 3e-2
"""Largest difference of the dense outputs, relative to the largest output, in fp32 and in half precision."""
HALF_WIDTH = 0.5
ROUTERS = "routers"


def export_diffusers(
    request: Request, output: str, force: bool, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write `output`, a model folder with its bundle in `routers/`. Returns what was done, as JSON data.

    Raises EditError or ValueError for bad input, RunError if what was written is not what was made.
    """
    with new_folder(output, force) as building:
        source = open_source(request)
        if is_static(source):
            raise EditError(f"{request.source!r} is a static model: it is in this layout already")
        trained = _merge_trained(source)
        calls = calibration_calls(source)
        wanted = _outputs(source.transformer, calls)
        report("ordering hidden units")
        units = "as trained" if trained else _order(source, calls)
        save_model(source, source.transformer, building)
        if source.bundle is not None:
            moved = _bundle_for(source.bundle, source.transformer, Path(output).name)
            moved.save(building / ROUTERS)
        report("loading it again")
        dtype = next(source.transformer.parameters()).dtype
        again = load_stock(source, building, dtype)
        difference = relative_difference(_outputs(again, calls), wanted)
        if not difference <= (SAME if dtype == torch.float32 else SAME_HALF):
            raise RunError(f"the written model differs by {difference:g} when loaded; nothing was kept")
        if source.bundle is not None:
            attach(again, load_bundle(building / ROUTERS), budget=1.0).detach()  # raises if it does not fit
        facts = {
            "format": "diffusers",
            "edit": __version__,
            "model": source.backbone.name,
            "dtype": str(dtype).removeprefix("torch."),
            "units": units,
            "bundle": None if source.bundle is None else ROUTERS,
            "difference": difference,
        }
        card = model_card(facts, source, Path(output).name)
        (building / "README.md").write_text(card, encoding="utf-8")
        manifest = write_manifest(building, facts)
    size = sum(file["bytes"] for file in manifest["files"].values())
    return {"output": output, "bytes": size, **{k: v for k, v in manifest.items() if k != "files"}}


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


def _bundle_for(bundle: Bundle, transformer: Any, name: str) -> Bundle:
    """The bundle for the model as it is now."""
    return replace(bundle, base_model=name, fingerprint=fingerprint(transformer), planners={})


def load_stock(source: Source, folder: Path, dtype: torch.dtype) -> Any:
    """The written transformer: pictures through diffusers alone, meshes as their own reader finds it."""
    if source.meshes:
        return load_again(source, folder, dtype)
    from diffusers import DiffusionPipeline

    found: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return found.transformer.to(source.transformer.device).eval()


@torch.no_grad()
def _outputs(transformer: Any, calls: list[Inputs]) -> list[Tensor]:
    return [first_tensor(transformer(**call)).float() for call in calls]


def relative_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest absolute difference over the largest output."""
    largest = max(float(output.abs().max()) for output in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return worst / max(largest, 1e-12)


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
    if source.meshes:
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
            f"`{ROUTERS}/` holds a bundle for budgets from {bundle.min_budget:g} to 1 "
            f"(recommended: {bundle.recommended_budget:g}), which `edit` finds by itself.\n"
        )
    return "\n".join([*lines, "The licence of the original model applies.", ""])


def as_table(found: Mapping[str, Any]) -> Any:
    """What was made, for people."""
    bundle = f"in {found['output']}/{ROUTERS}" if found["bundle"] else "none: the model has no bundle"
    return two_columns(
        {
            "written": f"{found['output']} ({found['model']}, {found['dtype']}, "
            f"{found['bytes'] / 2**20:.1f} MiB)",
            "hidden units": _units_line(found["units"]),
            "bundle": bundle,
            "checked": f"loaded again, largest relative difference {found['difference']:.1e}",
        }
    )
