"""The closing report of `edit calibrate`: a JSON object, a table, and a plot beside the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import routers
from edit_cli.files import put
from routers.calibrate.evaluate import Quality, as_metadata, recommend

PLOT = "quality.png"
DRAWN_UP_TO = 100.0
"""dB; a budget of 1 is exact, which no axis can show."""


def as_json(bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "bundle": str(folder),
        "model": bundle.base_model,
        "recommended_budget": recommend(rows),
        "quality": as_metadata(rows),
    }


def as_table(bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> Table:
    """The closing table."""
    best = recommend(rows)
    table = Table(
        title=f"{folder}: {bundle.base_model}, recommended budget {best:g}", title_justify="left", box=None
    )
    for name in ("budget", "spent", "range over samples", "latent SNR", "time / dense"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.budget:g}" + (" *" if row.budget == best else ""),
            f"{row.spent:.3f}",
            f"{row.spent_low:.3f} to {row.spent_high:.3f}",
            "exact" if row.snr > DRAWN_UP_TO else f"{row.snr:.1f} dB",
            f"{row.time_ratio:.2f}",
        )
    return table


def plot(bundle: routers.Bundle, folder: Path) -> Path | None:
    """Draw what `bundle.json` says of each budget to quality.png; None where matplotlib is missing.

    Raises OSError if it cannot be written.
    """
    try:
        figure = _figure(bundle.base_model, bundle.recommended_budget, bundle.metadata["quality"])
    except ImportError:
        return None
    import io

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    target = folder / PLOT
    put(data.getvalue(), str(target))
    return target


def _figure(model: str, best: float, rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [row for row in rows if row["snr"] <= DRAWN_UP_TO]
    left.plot([r["budget"] for r in shown], [r["snr"] for r in shown], "o-", color="black", label="measured")
    left.set_ylabel("latent SNR to dense, dB")
    right.plot([0, 1], [0, 1], ":", color="grey", label="time = FLOPs")
    right.plot(
        [r["spent"] for r in rows], [r["time_ratio"] for r in rows], "o-", color="black", label="measured"
    )
    right.set_ylabel("measured time / dense")
    low = min(row["budget"] for row in rows)
    right.set_ylim(0, max(1.08, *(1.05 * row["time_ratio"] for row in rows)))
    for axis, label in ((left, "budget"), (right, "FLOPs spent / dense")):
        axis.set_xlabel(label)
        axis.set_xlim(low - 0.04, 1.04)
        axis.grid(alpha=0.25)
        if low <= best < 1 or best == 1:
            axis.axvline(best, color="tab:green", linewidth=1, label=f"recommended: {best:g}")
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{model}: what each budget gives and takes")
    return figure
