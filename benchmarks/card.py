"""What a card shows: time against FLOPs, waits for the device, memory against the forecast, volume decoding.

    python -m benchmarks.card --out card.jsonl         # on a card: real sizes, about 6 minutes
    python -m benchmarks.card --small                  # anywhere: packaged models, to see that it runs
    python -m benchmarks.card --markdown card.jsonl    # tables for docs/speed.md

Each section builds its model on the device, with random weights at the published size, and has a limit of
its own in seconds: what does not fit into it is left out and named; what fails is a line too. Dense and
elastic runs take turns, and a ratio is that of their medians. One JSON line per finding. Bars, at 1024 px
and above: time at a budget at most the share of evaluations + 0.02; everything open 1.01; batches whose
samples decide for themselves the FLOPs + 0.08; no wait for the device inside a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from backbones import loading
from backbones.spec import CallSize
from benchmarks.card_findings import (
    BUDGETS,
    Bench,
    Finding,
    build,
    compiled,
    decoding,
    field_queries,
    memory,
    mixes,
    offloaded,
    plans,
)


@dataclass(frozen=True)
class Section:
    """A model and what is shown of it. seconds: the limit of the section; extras: names of EXTRAS.

    mixes: size of the batch whose samples decide for themselves, None: not shown.
    """

    name: str
    model: str
    sizes: tuple[CallSize, ...]
    seconds: float
    extras: tuple[str, ...] = ()
    mixes: CallSize | None = None
    steps: int = 10


EXTRAS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "compile": compiled, "offload": offloaded, "vae": field_queries,
}  # fmt: skip

QWEN = CallSize(1, 1328, 1328, 64)
FLUX = CallSize(1, 1024, 1024, 512)
REAL = (
    Section("qwen", "qwen-image", (QWEN,), 160, mixes=CallSize(4, 1024, 1024, 64)),
    Section("flux", "flux-dev", (FLUX, replace(FLUX, width=512, height=512)), 90, ("compile",)),
    Section("hunyuan3d", "hunyuan3d-2.1", (CallSize(2),), 60, ("vae",)),
    Section("flux offloaded", "flux-dev", (), 80, ("offload",)),
)
TINY = CallSize(1, 64, 64, 8)
SMALL = (
    Section("qwen", "qwen-image-tiny", (TINY,), 600, mixes=replace(TINY, rows=2), steps=5),
    Section("flux", "flux-tiny", (TINY,), 600, steps=5),
    Section("hunyuan3d", "hunyuan3d-tiny", (CallSize(2),), 600, ("vae",), steps=5),
)


def measure(section: Section, device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[Finding]:
    """Findings of one section, as they come."""
    end = time.perf_counter() + section.seconds
    start = time.perf_counter()
    model = build(section.model, device, dtype)
    yield {"what": "build", "seconds": time.perf_counter() - start, "weights_gib": model.weights_gib}
    size, shown = section.sizes[0] if section.sizes else FLUX, []
    bench = Bench(model, size, section.steps, device, dtype, rounds)
    for each in section.sizes:
        shown.append((f"plans at {each.width} px", plans, replace(bench, size=each)))
    if section.sizes:
        shown.append(("memory", memory, bench))
    if section.mixes is not None:
        shown.append(("mixes", mixes, replace(bench, size=section.mixes, steps=min(section.steps, 4))))
    shown += [(name, EXTRAS[name], bench) for name in section.extras]
    for what, show, of in shown:
        if time.perf_counter() > end:
            yield {"what": "left out", "of": what, "why": f"{section.seconds:.0f} s are over"}
            continue
        try:
            yield from show(of)
        except Exception as error:  # the next finding does not depend on it, and a card's time is short
            yield {"what": "failed", "of": what, "why": f"{type(error).__name__}: {error}"[:400]}


def markdown(lines: list[Finding]) -> str:
    """The tables of docs/speed.md."""
    rows = [
        "| model | size | decisions | FLOPs | dense s | time | bar | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if line["what"] in ("plan", "mix", "compile", "offload"):
            met = "" if line["bar"] is None else "yes" if line["ratio"] <= line["bar"] else "no"
            bar = "" if line["bar"] is None else f"<= {line['bar']:.3f}"
            rows.append(
                f"| {line['section']} | {line['size']} | {line['name']} | {line['share']:.3f} | "
                f"{line['dense']:.3f} | {line['ratio']:.3f} | {bar} | {met} |"
            )
    return "\n".join(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="the packaged models, on any device")
    parser.add_argument("--only", help="names of sections, with commas between")
    parser.add_argument("--out", type=Path, help="also write the lines here")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print the table of lines written before"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--octree", type=int, help="of the decoding; default 384, small 64")
    args = parser.parse_args(arguments)
    args.device = loading.pick_device(args.device)
    if args.device.type == "cpu" and not args.small and not args.markdown:
        parser.error("there is no card here; --small runs the packaged models on a CPU")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print a JSON line per finding."""
    args = parse(arguments)
    if args.markdown:
        print(markdown([json.loads(line) for line in args.markdown.read_text().splitlines()]))
        return 0
    device = args.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    names = args.only.split(",") if args.only else None
    out = args.out.open("w") if args.out else None

    def tell(section: str, found: dict[str, Any]) -> None:
        line = json.dumps({"section": section, "card": card, **found})
        print(line, flush=True)
        if out is not None:
            out.write(line + "\n")
            out.flush()

    if names is None or "decoding" in names:
        tell("decoding", decoding(device, args.octree or (64 if args.small else 384)))
    for section in SMALL if args.small else REAL:
        if names is None or section.name in names:
            for found in measure(section, device, dtype, 1 if args.small else 3):
                tell(section.name, found)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if out is not None:
        out.close()
    return 0


__all__ = ["BUDGETS", "REAL", "SMALL", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
