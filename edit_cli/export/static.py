"""`edit export --format static`: a smaller model without routers that `edit generate` loads as any other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from backbones.model_files import STATIC
from edit_cli.console import readable_count, two_columns
from edit_cli.errors import RunError
from edit_cli.export.model import largest_weight_difference, load_again, save_model
from edit_cli.export.source import Frozen, Source, freeze, put_in
from edit_cli.export.write import Say
from edit_cli.generation.closeness import psnr, side_by_side
from edit_cli.request import Request
from routers.attachment import attach
from routers.calibrate.evaluate import latent_snr

ROUNDS = 3
"""Times every variant is run, in turn; medians are reported."""
SAME = 1e-5
"""Largest difference of a weight between the static model in memory and the one that was loaded again."""
PICTURE = "comparison.png"


def fill(source: Source, request: Request, folder: Path, say: Say) -> dict[str, Any]:
    """Write the frozen model. Raises EditError, ValueError, RunError if what was written is another."""
    budget = request["budget"]
    small = freeze(source, budget, say)
    say("writing")
    entries = {STATIC: small.choice.shape.to_dict()}
    save_model(source, small.transformer, folder, request.get("shard_size"), entries)
    say("loading it again")
    difference = largest_weight_difference(load_again(source, folder), small.transformer)
    if difference > SAME:
        raise RunError(f"the written model differs by {difference:g} when loaded; nothing was kept")
    choice = small.choice
    counts = [sum(p.numel() for p in m.parameters()) for m in (source.transformer, small.transformer)]
    return {
        "model": source.backbone.name,
        "budget": budget,
        "flops": round(choice.flops, 4),
        "parameters": {"dense": counts[0], "static": counts[1]},
        "dropped": sorted(choice.removal.dropped),
        "widths": {str(i): w for i, w in sorted(choice.removal.widths.items())},
        "output_error": round(choice.error, 6),
        "difference": difference,
        "measured": measure(source, small, budget, folder, say),
    }


def measure(source: Source, small: Frozen, budget: float, folder: Path, say: Say) -> list[dict[str, Any]]:
    """Dense, dynamic (with a bundle) and static at the same budget, on held-out requests, in turn.

    Per variant: `spent` (FLOPs over dense), `seconds` (median of a batch, text and sampling, no decoder),
    `time_ratio`, `snr` of the final latents against the dense ones in dB, and for pictures `psnr` in dB.
    Writes a picture of the first samples of all variants to `folder`.
    """
    names = ["dense", "static"]
    if source.bundle is not None and source.bundle.min_budget <= budget:
        names.insert(1, "dynamic")
    variants = {name: Variant(source, small, name, budget) for name in names}
    latents: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name, variant in variants.items():
            say(f"measuring, round {number + 1} of {ROUNDS}: {name}")
            start = time.perf_counter()
            latents[name] = variant.run().cpu()  # the copy waits for an accelerator
            seconds[name].append(time.perf_counter() - start)
    pictures = _pictures(variants, budget, folder) if source.backbone.makes == "picture" else {}
    dense = statistics.median(seconds["dense"])
    rows = []
    for name, variant in variants.items():
        taken = statistics.median(seconds[name])
        row: dict[str, Any] = {"variant": name, "spent": variant.spent}
        row |= {"seconds": taken, "time_ratio": taken / dense}
        if name != "dense":
            row["snr"] = statistics.median(latent_snr(latents[name], latents["dense"]))
            if pictures:
                pairs = zip(pictures[name], pictures["dense"], strict=True)
                row["psnr"] = statistics.median(psnr(a, b) for a, b in pairs)
        rows.append({k: v if isinstance(v, str) else round(v, 4) for k, v in row.items()})
    return rows


@dataclass
class Variant:
    """The source's pipeline as dense, dynamic or static model. spent: FLOPs over dense, of the last run."""

    source: Source
    small: Frozen
    name: str
    budget: float
    spent: float = 1.0

    def run(self, **arguments: Any) -> Any:
        """A batch of held-out requests; arguments as for the workload."""
        pipe, workload = self.source.pipe, self.source.judge
        if self.name == "dense":
            return workload.run(0, **arguments)
        if self.name == "static":
            self.spent = self.small.choice.flops
            with put_in(pipe, self.small.transformer):
                return workload.run(0, **arguments)
        # the bundle was checked when it was opened; since then hidden units were put in another order
        elastic = attach(pipe, self.source.bundle, budget=self.budget, force=True)
        try:
            with elastic.scope(samples=workload.rows) as trace:
                result = workload.run(0, **arguments)
        finally:
            elastic.detach()
        self.spent = statistics.mean(trace.spent)
        return result


def _pictures(variants: Mapping[str, Variant], budget: float, folder: Path) -> dict[str, list[Any]]:
    """Pictures of all variants; the first ones are written side by side."""
    pictures = {name: variant.run(output_type="pil") for name, variant in variants.items()}
    captions = {name: name if name == "dense" else f"{name} {budget:g}" for name in pictures}
    rows = [
        side_by_side({captions[name]: pictures[name][i] for name in pictures})
        for i in range(min(3, len(pictures["dense"])))
    ]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(r.height for r in rows[:i])))
    sheet.save(folder / PICTURE)
    return pictures


def as_table(facts: dict[str, Any]) -> Any:
    """What was written, for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sizes, measured = facts["parameters"], facts["measured"]
    narrowed = ", ".join(f"{i}: {w:g}" for i, w in facts["widths"].items())
    rows = {
        "written": f"{facts['output']} ({facts['model']} at budget {facts['budget']:g}, no routers)",
        "transformer": f"{facts['flops']:.1%} of the FLOPs, {sizes['static'] / sizes['dense']:.1%} of the "
        f"weights ({readable_count(sizes['static'])} of {readable_count(sizes['dense'])})",
        "blocks left out": ", ".join(map(str, facts["dropped"])) or "none",
        "MLP width by block": f"{narrowed} (all others 1)" if narrowed else "1 everywhere",
        "checked": f"loaded again, largest difference of a weight {facts['difference']:g}",
        "use": f"edit {_command(facts)} --model {facts['output']}",
    }
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "FLOPs", "s", "x dense time", "SNR dB", "PSNR dB"):
        table.add_column(name, justify="right" if name else "left")
    for row in measured:
        table.add_row(*_figures(row))
    parts: list[Any] = [two_columns(rows), Text(), table, Text(_lead(measured))]
    if measured[-1]["time_ratio"] > 1:
        parts.append(Text("The static model was slower than the dense one here.", style="yellow"))
    return Group(*parts)


def model_card(facts: dict[str, Any], source: Source, name: str) -> str:
    """README.md of the folder: what was removed, what it costs in quality, how to use it."""
    sizes = facts["parameters"]
    lines = [
        f"# {name}\n",
        f"`{facts['model']}` with a smaller transformer: {facts['flops']:.1%} of its FLOPs and "
        f"{sizes['static'] / sizes['dense']:.1%} of its weights. "
        f"{len(facts['dropped'])} blocks were left out and {len(facts['widths'])} have a narrower MLP, "
        "those whose loss changed the output least. There are no routers; the result is the same for "
        "every step and sample.\n",
        f"    edit {_command(facts)} --model {name}\n",
        "| variant | FLOPs | seconds | time over dense | SNR of latents, dB | PSNR, dB |",
        "|---|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join(_figures(row))} |" for row in facts["measured"]),
    ]
    return "\n".join([*lines, _lead(facts["measured"]), "", "The licence of the original model applies.", ""])


def _figures(row: Mapping[str, Any]) -> list[str]:
    """A variant's measurements as text."""
    quality = [f"{row[name]:.1f}" if name in row else "" for name in ("snr", "psnr")]
    return [
        row["variant"], f"{row['spent']:.3f}", f"{row['seconds']:.2f}", f"{row['time_ratio']:.2f}", *quality
    ]  # fmt: skip


def _lead(measured: list[dict[str, Any]]) -> str:
    """How much nearer the dynamic model is to the dense one; nothing without a bundle."""
    snr = {row["variant"]: row.get("snr", 0.0) for row in measured}
    if "dynamic" not in snr:
        return ""
    lead = snr["dynamic"] - snr["static"]
    where = "nearer to" if lead > 0 else "farther from"
    return f"\nThe dynamic model, with a bundle, is {abs(lead):.1f} dB {where} the dense one at this budget."


def _command(facts: dict[str, Any]) -> str:
    pictures = any("psnr" in row for row in facts["measured"])
    return 'generate "a cat"' if pictures else "generate-3d PICTURE"
