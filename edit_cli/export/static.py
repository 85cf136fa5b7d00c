"""`edit export --format static`: a smaller model without routers that `edit generate` loads as any other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones import static_folder as static
from edit_cli import __version__
from edit_cli.commands.models import readable_count
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.folder import new_folder, write_manifest
from edit_cli.export.model import load_again, save_model
from edit_cli.export.source import Frozen, Request, Source, freeze, largest_difference, open_source
from edit_cli.generate.pictures import psnr, side_by_side
from routers.attachment import attach
from routers.calibrate.evaluate import latent_snr

ROUNDS = 3
"""Times every variant is run, in turn; medians are reported."""
SAME = 1e-5
"""Largest difference between the static model in memory and the one that was written and loaded again."""
PICTURE = "comparison.png"

Progress = Callable[[str], None]


def export_static(
    request: Request, output: str, force: bool, report: Progress = lambda text: None
) -> dict[str, Any]:
    """Write `output`, a model folder with a static transformer. Returns what was done, as JSON data.

    Raises EditError or ValueError for bad input, RunError if what was written is not what was made.
    """
    if request.budget >= 1:
        raise EditError("--budget 1 removes nothing; give a --budget below 1")
    with new_folder(output, force) as building:
        source = open_source(request)
        report("choosing what to leave out")
        small = freeze(source, lambda spent, error: report(f"{spent:.0%} of the FLOPs left"))
        dtype = next(small.transformer.parameters()).dtype
        save_model(source, small.transformer, building, {static.ENTRY: small.choice.shape.to_dict()})
        report("loading it again")
        again = load_again(source, building, dtype)
        difference = largest_difference(again, small.transformer, small.calls[:2])
        del again
        if difference > SAME:
            raise RunError(f"the written model differs by {difference:g} when loaded; nothing was kept")
        report("measuring")
        rows = measure(source, small, building)
        facts = describe(source, small, difference, rows)
        (building / "README.md").write_text(model_card(facts, Path(output).name), encoding="utf-8")
        manifest = write_manifest(building, facts)
    return {"output": output, **{k: v for k, v in manifest.items() if k != "files"}}


def measure(source: Source, small: Frozen, folder: Path) -> list[dict[str, Any]]:
    """Dense, dynamic (with a bundle) and static at the same budget, on held-out requests, in turn.

    Per variant: `spent` (FLOPs over dense), `seconds` (median of a batch, text and sampling, no decoder),
    `time_ratio`, `snr` of the final latents against the dense ones in dB, and for pictures `psnr` in dB.
    Writes a picture of the first samples of all variants to `folder`.
    """
    workload, bundle, budget = source.calibration.judge, source.bundle, source.request.budget
    names = ["dense", "static"]
    if bundle is not None and bundle.min_budget <= budget:
        names.insert(1, "dynamic")
    latents: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    spent = {"dense": 1.0, "static": small.choice.flops}
    for _ in range(ROUNDS):
        for name in names:
            with Variant(source, small, name) as variant:
                start = time.perf_counter()
                latents[name] = workload.run(0).cpu()  # the copy waits for an accelerator
                seconds[name].append(time.perf_counter() - start)
            if variant.trace is not None:
                spent[name] = statistics.mean(variant.trace.spent)
    pictures = {} if source.meshes else _pictures(source, small, names, folder)
    dense = statistics.median(seconds["dense"])
    rows = []
    for name in names:
        taken = statistics.median(seconds[name])
        row: dict[str, Any] = {"variant": name, "spent": spent[name]}
        row |= {"seconds": taken, "time_ratio": taken / dense}
        if name != "dense":
            row["snr"] = statistics.median(latent_snr(latents[name], latents["dense"]))
            if pictures:
                row["psnr"] = statistics.median(
                    psnr(a, b) for a, b in zip(pictures[name], pictures["dense"], strict=True)
                )
        rows.append({k: v if isinstance(v, str) else round(v, 4) for k, v in row.items()})
    return rows


class Variant(ExitStack):
    """The source's pipeline as dense, dynamic or static model, inside the context."""

    trace: Any = None

    def __init__(self, source: Source, small: Frozen, name: str) -> None:
        super().__init__()
        self.source, self.small, self.name = source, small, name

    def __enter__(self) -> Variant:
        """Put the variant in place."""
        super().__enter__()
        pipe, workload = self.source.pipe, self.source.calibration.judge
        if self.name == "static":
            self.callback(_set_transformer, pipe, pipe.transformer)
            _set_transformer(pipe, self.small.transformer)
        elif self.name == "dynamic":
            # it was checked when it was opened; since then hidden units were put in another order
            budget = self.source.request.budget
            elastic = attach(pipe.transformer, self.source.bundle, budget=budget, force=True)
            self.callback(elastic.detach)
            scope = elastic.scope(num_steps=workload.num_steps, samples=workload.rows)
            self.trace = self.enter_context(scope)
        return self


def _set_transformer(pipe: Any, transformer: Any) -> None:
    if hasattr(pipe, "register_modules"):
        pipe.register_modules(transformer=transformer)
    else:
        pipe.transformer = transformer


def _pictures(source: Source, small: Frozen, names: list[str], folder: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    workload: Any = source.calibration.judge
    for name in names:
        with Variant(source, small, name):
            found[name] = workload.run(0, output_type="pil")
    budget = source.request.budget
    rows = [
        side_by_side({n if n == "dense" else f"{n} {budget:g}": found[n][i] for n in names})
        for i in range(min(3, len(found["dense"])))
    ]
    from PIL import Image

    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(r.height for r in rows[:i])))
    sheet.save(folder / PICTURE)
    return found


def as_table(found: dict[str, Any]) -> Any:
    """What was made, for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sizes = found["parameters"]
    dropped, widths = found["dropped"], found["widths"]
    narrowed = ", ".join(f"{i}: {w:g}" for i, w in widths.items())
    rows = {
        "written": f"{found['output']} ({found['model']} at budget {found['budget']:g}, no routers)",
        "transformer": f"{found['flops']:.1%} of the FLOPs, {sizes['static'] / sizes['dense']:.1%} of the "
        f"weights ({readable_count(sizes['static'])} of {readable_count(sizes['dense'])})",
        "blocks left out": ", ".join(map(str, dropped)) or "none",
        "MLP width by block": f"{narrowed} (all others 1)" if narrowed else "1 everywhere",
        "checked": f"loaded again, largest difference {found['difference']:g}",
        "use": f"edit {_command(found)} --model {found['output']}",
    }
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "FLOPs", "s", "x dense time", "SNR dB", "PSNR dB"):
        table.add_column(name, justify="right" if name else "left")
    for row in found["measured"]:
        quality = [f"{row[k]:.1f}" if k in row else "" for k in ("snr", "psnr")]
        figures = (f"{row['spent']:.3f}", f"{row['seconds']:.2f}", f"{row['time_ratio']:.2f}")
        table.add_row(row["variant"], *figures, *quality)
    parts: list[Any] = [two_columns(rows), Text(), table]
    by_name = {row["variant"]: row for row in found["measured"]}
    if "dynamic" in by_name and by_name["dynamic"]["snr"] > by_name["static"]["snr"]:
        lead = by_name["dynamic"]["snr"] - by_name["static"]["snr"]
        parts += [Text(f"\nThe dynamic model is {lead:.1f} dB nearer to the dense one at this budget.")]
    if by_name["static"]["time_ratio"] > 1:
        parts += [Text("The static model was slower than the dense one here.", style="yellow")]
    return Group(*parts)


def describe(source: Source, small: Frozen, difference: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was made: the manifest's facts."""
    choice, dense = small.choice, source.transformer
    counts = [sum(p.numel() for p in m.parameters()) for m in (dense, small.transformer)]
    return {
        "format": "static",
        "edit": __version__,
        "model": source.backbone.name,
        "budget": source.request.budget,
        "flops": round(choice.flops, 4),
        "parameters": {"dense": counts[0], "static": counts[1]},
        "dropped": sorted(choice.removal.dropped),
        "widths": {str(i): w for i, w in sorted(choice.removal.widths.items())},
        "output_error": round(choice.error, 6),
        "difference": difference,
        "measured": rows,
    }


def _command(facts: dict[str, Any]) -> str:
    pictures = any("psnr" in row for row in facts["measured"])
    return 'generate "a cat"' if pictures else "generate-3d PICTURE"


def model_card(facts: dict[str, Any], name: str) -> str:
    """README.md of the folder: what was removed, what it costs in quality, how to use it."""
    lines = [
        f"# {name}\n",
        f"`{facts['model']}` with a smaller transformer: {facts['flops']:.1%} of its FLOPs and "
        f"{facts['parameters']['static'] / facts['parameters']['dense']:.1%} of its weights. "
        f"{len(facts['dropped'])} blocks were left out and {len(facts['widths'])} have a narrower MLP, "
        "those whose loss changed the output least. There are no routers; the result is the same for "
        "every step and sample.\n",
        f"    edit {_command(facts)} --model {name}\n",
        "| variant | FLOPs | seconds | time over dense | SNR of latents, dB | PSNR, dB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in facts["measured"]:
        quality = [f"{row[k]:.1f}" if k in row else "" for k in ("snr", "psnr")]
        lines.append(
            f"| {row['variant']} | {row['spent']:.3f} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | "
            f"{quality[0]} | {quality[1]} |"
        )
    by_name = {row["variant"]: row for row in facts["measured"]}
    if "dynamic" in by_name:
        lead = by_name["dynamic"]["snr"] - by_name["static"]["snr"]
        where = "nearer to" if lead > 0 else "farther from"
        lines += [
            "",
            f"The dynamic model, with routers, is {abs(lead):.1f} dB {where} the dense one at this budget.",
        ]
    return "\n".join([*lines, "", "The licence of the original model applies.", ""])
