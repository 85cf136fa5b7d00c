"""`edit export --format reference`: the paper's own layout, one file or shards, in any dtype.

The layout holds a fine-tuned transformer and `gate_mlps.*`. Its routers read every token at the model's own
width, decide at fixed thresholds, and its MLPs use another activation, so only checkpoints of that kind can
be written in it: bundles of `edit` decide by other rules and would not mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from backbones.loading import DTYPES
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.write import Say
from edit_cli.request import Request
from routers.paper.checkpoint import build_routers, is_release_file, read_release, read_tensors, split_keys

FILE_PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
ONE_FILE = 10**15  # bytes; no limit


def open_source(request: Request, say: Say) -> Path:
    """A file, index or folder in the paper's layout. Raises EditError or ValueError for anything else."""
    path = Path(request["source"]).expanduser()
    if not (path.exists() and is_release_file(path)):
        raise EditError(
            f"{request['source']!r} is not a checkpoint in the paper's layout (gate_mlps.* beside a "
            "transformer), and its routers cannot be written as one: they decide by other rules; use "
            "--format bundle or diffusers"
        )
    build_routers(path, read_release(path).shapes)  # raises where the numbering has a gap
    return path


def fill(path: Path, request: Request, folder: Path, say: Say) -> dict[str, Any]:
    """Write the checkpoint. dtype "auto" keeps the file's. Raises RunError if it is another when loaded."""
    say("writing")
    tensors = read_tensors(read_release(path), DTYPES.get(request.get("dtype", "auto")))
    names = _write(tensors, folder, request.get("shard_size"))
    say("loading it again")
    difference = _difference(tensors, read_tensors(read_release(folder), None))
    if difference != 0:
        raise RunError(f"the written checkpoint differs by {difference:g} when loaded; nothing was kept")
    transformer, routers = split_keys(tensors)
    return {
        "source": path.name,
        "tensors": {"transformer": len(transformer), "routers": len(routers)},
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "weights": names,
        "difference": difference,
    }


def _write(tensors: dict[str, Tensor], folder: Path, shard_size: str | None) -> list[str]:
    """Write the weights, and an index where there are several files; returns the files of weights."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=FILE_PATTERN, max_shard_size=shard_size or ONE_FILE
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted(split.filename_to_tensors)


def _difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest absolute difference; infinite if names, shapes or dtypes differ."""
    kinds = [{n: (t.shape, t.dtype) for n, t in tensors.items()} for tensors in (left, right)]
    if kinds[0] != kinds[1]:
        return float("inf")
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def model_card(facts: Mapping[str, Any], source: Path, name: str) -> str:
    """README.md of the folder."""
    return f"""# {name}

An elastic diffusion transformer in the layout of E-DiT's release (arXiv 2602.13993): a fine-tuned
transformer and its routers under `gate_mlps.*`, {", ".join(facts["dtypes"])}.

    edit generate "a cat" --model Qwen/Qwen-Image --routers {name}

The licence of the original checkpoint applies.
"""


def as_table(facts: Mapping[str, Any]) -> Any:
    """What was written, for people."""
    counts, files = facts["tensors"], facts["weights"]
    where = files[0] if len(files) == 1 else f"{len(files)} shards"
    return two_columns(
        {
            "written": f"{facts['output']} ({where}, {facts['bytes'] / 2**20:.2f} MiB, "
            f"{', '.join(facts['dtypes'])})",
            "tensors": f"{counts['transformer']} of the transformer, {counts['routers']} of its routers",
            "checked": f"loaded again, largest difference {facts['difference']:g}",
            "use": f"edit generate PROMPT --model FOLDER --routers {facts['output']}",
        }
    )
