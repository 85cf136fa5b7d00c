"""Damaged files through the readers of `edit`: each is refused in one line with its name, or read right.

python -m tests.reliability.mutate --count 5000

Files: bundles (folders and single files), traces, records in PNG, JPEG, WebP and GLB, prompt lists, model
folders, states of calibrations. Damage: null, wrong types, NaN, infinity, huge and negative numbers, missing
and unknown fields, escape codes, cut files, flipped bytes, nesting 10,000 deep; tensors of other shapes,
types and values. A failure is any other exception, a second line, a control character, or over 10 s.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from backbones import registry
from backbones.model_files import ModelError
from backbones.spec import PACKAGE_FOLDER
from edit_cli.console import stderr, stdout
from edit_cli.errors import EditError
from edit_cli.generation.mesh import MESH
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.plan import make_plan
from edit_cli.generation.record import encode_mesh, encode_picture
from edit_cli.profile import report
from edit_cli.request import Request
from routers.bundle import load_bundle, pack
from routers.calibrate.state import State

LIMIT = 10  # s
TINY = PACKAGE_FOLDER / "tiny"
RAW = {"@nan": "NaN", "@inf": "1e999", "@minus": "-1e999", "@deep": '{"a":' * 10_000 + "1" + "}" * 10_000}
"""What JSON writers do not write, by what stands for it."""
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 1e300, -1e300, 10**30, 16384, 100_000, "", "x", "\x1b[31mred", "/" * 5000,
    "\ud800", [], {}, [None], {"a": None}, [0] * 10_000, "../" * 20 + "etc/passwd", *RAW,
)  # fmt: skip


@dataclass
class Kind:
    """Files of one kind. make: into an empty folder, returns the file to damage. read: it, as `edit` does."""

    make: Callable[[Path], Path]
    read: Callable[[Path], None]
    damage: Callable[[Path, random.Random], str]


def damage_json(text: str, rng: random.Random) -> tuple[str, str]:
    """A text with one node replaced, removed or renamed; and what was done."""
    data = json.loads(text)
    places = list(_places(data))
    owner, key = rng.choice(places)
    what = rng.choice(("replace", "replace", "replace", "remove", "rename"))
    if what == "replace":
        owner[key] = value = rng.choice(VALUES)
        what = f"{key} = {value!r:.40}"
    elif what == "remove" or isinstance(owner, list):
        del owner[key]
        what = f"without {key}"
    else:
        owner[f"{key}x"] = owner.pop(key)
        what = f"{key}x for {key}"
    made = json.dumps(data)
    for name, literal in RAW.items():
        made = made.replace(json.dumps(name), literal)
    return made, what


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items)[:40]:
        yield node, key
        yield from _places(value)


def damage_bytes(file: Path, rng: random.Random) -> str:
    """Cut a file, or flip some of its bytes."""
    data = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        file.write_bytes(data[:at])
        return f"cut at {at}"
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return "flipped bytes"


def damage_text(file: Path, rng: random.Random) -> str:
    """Damage a file of JSON, or its bytes."""
    if rng.random() < 0.15:
        return damage_bytes(file, rng)
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    at = rng.randrange(len(lines))
    lines[at], what = damage_json(lines[at], rng)
    file.write_text("\n".join(lines), encoding="utf-8")
    return what


def damage_bundle(folder: Path, rng: random.Random) -> str:
    """Damage one half of a bundle, or both alike."""
    if rng.random() < 0.6:
        return damage_text(folder / "bundle.json", rng)
    weights = folder / "routers.safetensors"
    if rng.random() < 0.2:
        return damage_bytes(weights, rng)
    tensors = load_file(weights)
    name = rng.choice(sorted(tensors))
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda t: t * float("nan"), "inf": lambda t: t / 0, "huge": lambda t: t * 1e30,
        "longer": lambda t: torch.cat([t, t]), "empty": lambda t: t[:0], "bool": lambda t: t > 0,
        "flat": lambda t: t.reshape(-1), "negative": lambda t: -t, "scalar": lambda t: t.sum(),
    }  # fmt: skip
    what = rng.choice([*changes, "gone", "unknown"])
    if what == "gone":
        tensors.pop(name)
    elif what == "unknown":
        tensors["plans.x"] = torch.zeros(1)
    else:
        tensors[name] = changes[what](tensors[name]).contiguous()
    save_file(tensors, weights)
    return f"{name} {what}"


def damage_record(file: Path, rng: random.Random) -> str:
    """Write a file of a picture or mesh anew with a damaged record, or damage its bytes."""
    if rng.random() < 0.25:
        return damage_bytes(file, rng)
    mesh = file.suffix == ".glb"
    text, what = damage_json(json.dumps(RECORD | (MESH_RECORD if mesh else {})), rng)
    write_record(file, text)
    return what


def write_record(file: Path, text: str) -> None:
    """A small picture or box with the text as its record."""
    if file.suffix == ".glb":
        import trimesh

        data = encode_mesh(trimesh.creation.box(), ".glb", {"images": ["@"]})
        tree = text.encode("utf-8", "surrogatepass")
        start = data.index(b'{"edit":') + len(b'{"edit":')
        length = int.from_bytes(data[12:16], "little")
        end = data.index(b"}", start) + 1
        chunk = data[20:start] + tree + data[end : 20 + length]
        chunk += b" " * (-len(chunk) % 4)
        rest = data[20 + length :]
        head = b"glTF" + (2).to_bytes(4, "little") + (20 + len(chunk) + len(rest)).to_bytes(4, "little")
        file.write_bytes(head + len(chunk).to_bytes(4, "little") + b"JSON" + chunk + rest)
        return
    marked = encode_picture(Image.new("RGB", (64, 64)), file.suffix, RECORD)
    picture = Image.new("RGB", (64, 64))
    if file.suffix == ".png":
        from PIL import PngImagePlugin

        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("edit", text.encode("utf-8", "replace").decode())
        picture.save(file, pnginfo=chunks)
        return
    import html

    from edit_cli.generation.record import XMP

    packet = XMP.format(html.escape(text, quote=True)).encode("utf-8", "replace")
    if file.suffix == ".jpg" and len(packet) > 60_000:
        file.write_bytes(marked)
        return
    picture.save(file, xmp=packet)


RECORD = {
    "prompt": "a cat", "negative_prompt": None, "seed": 3, "width": 64, "height": 64, "steps": 4,
    "guidance": 4.0, "budget": 0.6, "target": None, "spent": 0.6, "model": "qwen-image-tiny",
    "model_source": "qwen-image-tiny", "model_base": None, "model_hash": "0", "routers": "none",
    "routers_hash": "0", "force": False, "loras": [], "lora_hashes": [], "image": None, "mask": None,
    "strength": None, "solver": None, "sampler": "Euler",
    "device": "cpu", "dtype": "fp32", "compile": False, "threads": 2, "versions": {"edit": "1", "torch": "2"},
    "batch": [{"prompt": "a cat", "negative_prompt": None, "seed": 3}, {"prompt": "b", "seed": 4}], "row": 0,
}  # fmt: skip
MESH_RECORD = {
    "images": [str(next((TINY / "hunyuan3d_tiny" / "calibration").glob("*.png")))], "views": [],
    "octree_resolution": 32, "decode": "auto", "faces": None, "remove_background": "auto",
    "model": "hunyuan3d-tiny", "model_source": "hunyuan3d-tiny", "batch": [], "guidance": 5.0,
}  # fmt: skip


def make_record(suffix: str) -> Callable[[Path], Path]:
    """A file with an undamaged record."""

    def make(folder: Path) -> Path:
        file = folder / f"x{suffix}"
        write_record(file, json.dumps(RECORD | (MESH_RECORD if suffix == ".glb" else {})))
        return file

    return make


def read_record(file: Path) -> None:
    """As `--from` does, up to the model."""
    plan = make_plan(Request(replay=str(file)), MESH if file.suffix == ".glb" else PICTURE, kept=False)
    for job in plan.jobs:
        assert 1 <= job.steps <= 1000 and 0 <= job.seed < 2**63
        assert (getattr(job, "width", 64) or 64) * (getattr(job, "height", 64) or 64) <= 4 * 64 * 64
    assert int((plan.replayed or {}).get("threads") or 1) <= 1024
    assert all(job.seed < 2**63 for job in plan.peers)


def read_bundle(path: Path) -> None:
    """As `attach` does; a budget's plan has to be finite."""
    bundle = load_bundle(path)
    assert bundle.num_steps >= 1 and np.isfinite(bundle.fingerprint).all() and len(bundle.fingerprint)
    assert 0 < bundle.recommended_budget <= 1 and 0 <= bundle.min_budget <= 1
    for target in ("dense", "exact"):
        plan = bundle.planner(0.4, target)(np.asarray(bundle.times)) if len(bundle.times) > 1 else None
        assert plan is None or (np.isfinite(plan.weights).all() and abs(plan.weights).max() <= 1e4)


def make_bundle(folder: Path) -> Path:
    """A packaged bundle, written by this version."""
    load_bundle(TINY / "qwen_image_tiny" / "routers").save(folder / "b")
    return folder / "b"


def make_single_bundle(folder: Path) -> Path:
    """The same in one file."""
    pack(make_bundle(folder), folder / "one.safetensors")
    return folder / "one.safetensors"


def make_trace(folder: Path) -> Path:
    """A small trace."""
    from tests.cli.test_profile_views import make_trace as small

    (folder / "trace.json").write_text(json.dumps(small()))
    return folder / "trace.json"


def read_trace(file: Path) -> None:
    """As `edit profile --from` does, with a report."""
    trace, pictures = report.reopen(str(file))
    report.as_json(trace, [])
    stdout().print(report.view(trace, None, stdout(), []))
    report.write(file.parent / "report", trace, pictures, None)


def make_prompts(folder: Path) -> Path:
    """A list of prompts with fields."""
    lines = (
        {"prompt": f"p{i}", "seed": i, "budget": 0.5, "steps": 4, "output": f"{i}.png"} for i in range(3)
    )
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "p.jsonl"


def read_prompts(file: Path) -> None:
    """As `--prompts` does."""
    make_plan(Request(prompts_file=str(file), model="qwen-image-tiny"), PICTURE, kept=False)


def make_model(folder: Path) -> Path:
    """A model folder's files of JSON; weights are links."""
    shutil.copytree(TINY / "qwen_image_tiny", folder / "m", copy_function=_linked)
    return folder / "m"


def _linked(source: str, copy: str) -> None:
    (shutil.copy if source.endswith(".json") else lambda a, b: Path(b).symlink_to(a))(source, copy)


def damage_model(folder: Path, rng: random.Random) -> str:
    """One of the files that say what the model is."""
    files = ("model_index.json", "edit.json", "transformer/config.json", "vae/config.json")
    name = rng.choice(files)
    return f"{name}: {damage_text(folder / name, rng)}"


def read_model(folder: Path) -> None:
    """As plans do."""
    backbone = registry.resolve(str(folder))
    assert 1 <= backbone.defaults.steps <= 1000
    make_plan(Request(prompt=["a cat"], model=str(folder)), PICTURE, kept=False)


ASKED = {"model": "m", "steps": 6, "weights": [1.0, 2.0], "fit": {"seed": 1}}


def make_state(folder: Path) -> Path:
    """A state with a finished part."""
    state = State(folder / "s")
    state.begin(ASKED, False)
    state.keep("part", {"x": torch.ones(3), "y": torch.zeros(2, 2)})
    return folder / "s"


def damage_state(folder: Path, rng: random.Random) -> str:
    """Its request, or its part."""
    if rng.random() < 0.5:
        return damage_text(folder / "request.json", rng)
    return damage_bytes(folder / "part.safetensors", rng)


def read_state(folder: Path) -> None:
    """As `--resume` does; what is read is what was kept."""
    state = State(folder)
    state.begin(ASKED, True)
    part = state.get("part")
    assert part is not None and part["x"].tolist() == [1, 1, 1] and part["y"].tolist() == [[0, 0], [0, 0]]


SUFFIXES = (".png", ".jpg", ".webp", ".glb")
KINDS = {
    "bundle": Kind(make_bundle, read_bundle, damage_bundle),
    "bundle in one file": Kind(make_single_bundle, read_bundle, damage_bytes),
    "trace": Kind(make_trace, read_trace, damage_text),
    **{
        f"record {s}": Kind(make_record(s), read_record, damage_record)
        for s in (".png", ".jpg", ".webp", ".glb")
    },
    "prompts": Kind(make_prompts, read_prompts, damage_text),
    "model folder": Kind(make_model, read_model, damage_model),
    "state": Kind(make_state, read_state, damage_state),
}


def too_long(*_: object) -> None:
    """Of the alarm."""
    raise TimeoutError(f"over {LIMIT} s")


def attempt(kind: Kind, seed: int) -> tuple[str, str]:
    """One damaged file: "read", "refused" or what failed; and what was done to it."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        file = kind.make(Path(name))
        what = kind.damage(file, rng)
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT)
        try:
            kind.read(file)
        except (EditError, ModelError, ValueError) as error:
            text = str(error)
            wrong = [] if isinstance(error, (EditError, ModelError)) or file.name in text else ["no file"]
            wrong += ["two lines"] * ("\n" in text)
            wrong += ["a raw error"] * (type(error).__name__ not in ("EditError", "ModelError", "ValueError"))
            return (", ".join(wrong) + f": {text}" if wrong else "refused"), what
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})", what
        finally:
            signal.alarm(0)
        return "read", what


def run(count: int, seed: int = 0) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """So many damaged files over all kinds: outcomes by kind, and failures in words."""
    outcomes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in KINDS}
    failures = []
    names = list(KINDS)
    for i in range(count):
        name = names[i % len(names)]
        outcome, what = attempt(KINDS[name], seed + i)
        outcomes[name][outcome if outcome in ("read", "refused") else "failed"] += 1
        if outcome not in ("read", "refused"):
            failures.append(f"{name} {seed + i}, {what}: {outcome}"[:400])
    return outcomes, failures


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    outcomes, failures = run(given.count, given.seed)
    for name, counts in outcomes.items():
        print(f"{name:20} {dict(counts)}")
    print(*failures, sep="\n", file=sys.stderr)
    total = sum(outcomes.values(), collections.Counter())
    print(json.dumps({"count": given.count, **total}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    stderr()
    main()
