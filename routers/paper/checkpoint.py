"""The paper's released checkpoint: one safetensors file with a fine-tuned DiT and its routers.

`load_release` maps the file (or a sharded set) into memory and hands its tensors to a transformer
without a second copy. `ReleaseRouter` is the released router under its own key names; how its output
becomes decisions is in `release_policy.py`. See docs/release.md.

Shapes: B batch, L tokens of all streams, D dim, H hidden units of the router, W number of widths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching import Patch, patch_forward, restore_forward
from ..spec import WIDTHS, TransformerSpec

ROUTER_PREFIX = "gate_mlps."
"""Key prefix of the routers in a released file; every other key belongs to the transformer."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header the safetensors format allows."""

DTYPES = ("F32", "F16", "BF16")
"""Tensor types, as the format names them, that can be run as they are."""


class ReleaseRouter(nn.Module):
    """Router of one block as released: modulated input, shared trunk, mean over tokens, two heads.

    `h = relu(out.0(layer_norm(x) * (1 + scale) + shift))`, shift and scale being the first two thirds
    of `img_mod`(timestep embedding); the gate logit is the token mean of `out.2(h)`, the width logits
    the token mean of `width_head(h)`. The last third of `img_mod` is in the file and has no effect.

    dim: D. hidden: H, 128 in the release.
    """

    all_streams = True
    """Reads text and image tokens, where `routers.router.Router` reads the image alone."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.out = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.width_head = nn.Linear(hidden, len(WIDTHS))

    def forward(
        self, stream: Tensor, modulation: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate logit `[B]` and width logits `[B, W]`, in the weights' dtype.

        stream: the block's input, text tokens then image tokens, `[B, L, D]`.
        modulation: timestep embedding `[B, D]`.
        mask: which tokens count, `[B, L]` bool; None for all. A padded prompt needs it to decide as it
            would alone; the release only ever runs one prompt at a time.
        """
        # Under zero_cond_t the modulation has 2B rows, the real timestep's first.
        shift_BD, scale_BD, _ = self.img_mod(modulation[: len(stream)]).chunk(3, dim=-1)
        x_BLD = F.layer_norm(stream, stream.shape[-1:], eps=1e-6)
        x_BLD = x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]
        h_BLH = self.out[1](self.out[0](x_BLD))
        # Heads before the mean, as released: the other order is cheaper but rounds differently in bf16.
        return _token_mean(self.out[2](h_BLH), mask)[:, 0], _token_mean(self.width_head(h_BLH), mask)

    def flops(self, tokens: int) -> float:
        """FLOPs for one row of `tokens` tokens: `img_mod` once, trunk and heads per token."""
        trunk = self.out[0].weight
        assert isinstance(trunk, Tensor)
        hidden, dim = trunk.shape
        return 2.0 * dim * 3 * dim + 2.0 * tokens * hidden * (dim + 1 + len(WIDTHS))


def _token_mean(x_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
    if mask_BL is None:
        return x_BLC.mean(dim=1)
    weight_BL1 = mask_BL[..., None].float()  # bf16 cannot count beyond 256
    return ((x_BLC * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)).to(x_BLC.dtype)


@dataclass(frozen=True)
class ReleaseFile:
    """What a released checkpoint contains, from headers alone.

    shards: file -> names in it. shapes: tensor name -> shape.
    """

    shards: dict[Path, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]


def is_release_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a checkpoint in the paper's released layout; reads headers only.

    path: a safetensors file, an index json of a sharded one, or the folder of either. A bundle of
    `edit` or a pipeline folder is False. Raises ValueError for a damaged safetensors file.
    """
    located = _locate(Path(path))
    if located is None:
        return False
    if located.suffix == ".json":
        return any(name.startswith(ROUTER_PREFIX) for name in _weight_map(located))
    return any(name.startswith(ROUTER_PREFIX) for name in _read_header(located))


def read_release(path: str | os.PathLike[str]) -> ReleaseFile:
    """Names, shapes and dtypes of a released checkpoint, without reading a tensor.

    Raises ValueError naming the file if it is missing, damaged, or has no routers.
    """
    path = Path(path)
    located = _locate(path)
    if located is None:
        raise ValueError(
            f"{path} is no router checkpoint: give a .safetensors file, its index .json or a folder"
        )
    if located.suffix == ".json":
        names_by_shard: dict[Path, list[str]] = {}
        for name, file in _weight_map(located).items():
            names_by_shard.setdefault(located.parent / file, []).append(name)
    else:
        names_by_shard = {located: []}
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[Path, tuple[str, ...]] = {}
    for shard, promised in names_by_shard.items():
        header = _read_header(shard)
        absent = sorted(set(promised) - set(header))
        if absent:
            raise ValueError(
                f"{shard} lacks {_some(absent)}, which {located.name} promises; fetch both again"
            )
        shards[shard] = tuple(promised or header)
        for name in shards[shard]:
            if header[name]["dtype"] not in DTYPES:
                raise ValueError(
                    f"{name} in {shard} is {header[name]['dtype']}; weights are {', '.join(DTYPES)}"
                )
            shapes[name] = tuple(header[name]["shape"])
    if not any(name.startswith(ROUTER_PREFIX) for name in shapes):
        raise ValueError(f"{path} has no {ROUTER_PREFIX}* keys: it holds weights, but no released routers")
    return ReleaseFile(shards, shapes)


def split_keys(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(transformer keys, router keys) of a released checkpoint, each in the given order."""
    transformer: list[str] = []
    routers: list[str] = []
    for name in names:
        (routers if name.startswith(ROUTER_PREFIX) else transformer).append(name)
    return transformer, routers


def build_routers(path: object, shapes: Mapping[str, tuple[int, ...]]) -> nn.ModuleList:
    """The routers that a key table describes, one for each `gate_mlps.<i>`, on the meta device.

    path: for messages. shapes: tensor name -> shape; names without the router prefix are ignored.
    Raises ValueError if the numbering has a gap or the first router's trunk is missing.
    """
    numbers = {name.removeprefix(ROUTER_PREFIX).split(".")[0] for name in split_keys(shapes)[1]}
    expected = {str(i) for i in range(len(numbers))}
    if numbers != expected:
        raise ValueError(
            f"routers in {path} are not numbered 0..{len(numbers) - 1}: "
            f"{_some(sorted(expected - numbers))} is missing"
        )
    trunk = shapes.get(f"{ROUTER_PREFIX}0.out.0.weight")
    if trunk is None or len(trunk) != 2:
        raise ValueError(f"{path} lacks the matrix {ROUTER_PREFIX}0.out.0.weight: not the released router")
    hidden, dim = trunk
    with torch.device("meta"):
        return nn.ModuleList(ReleaseRouter(dim, hidden) for _ in numbers)


def check_keys(path: object, shapes: Mapping[str, tuple[int, ...]], *modules: tuple[str, nn.Module]) -> None:
    """Raise ValueError unless `shapes` holds exactly the parameters and buffers of `modules`.

    path: for messages. modules: (key prefix, module). Works on the meta device. The message names up to
    three keys of each kind: missing, left over, of another shape.
    """
    wanted = {
        prefix + name: tuple(t.shape) for prefix, module in modules for name, t in module.state_dict().items()
    }
    missing = [name for name in wanted if name not in shapes]
    left_over = [name for name in shapes if name not in wanted]
    differing = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", differing))
        if names
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(modules[0][1]).__name__} ({'; '.join(problems)}); "
            "use it with the model it was trained for"
        )


def load_release(
    path: str | os.PathLike[str],
    build: Callable[[], nn.Module],
    spec: TransformerSpec,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, nn.ModuleList]:
    """The fine-tuned transformer and its routers, on the CPU, in evaluation mode.

    Tensors stay memory-mapped: nothing is read before it is used, and no second copy is made unless
    `dtype` differs from the file's, in which case each tensor is converted on its own.

    path: see `is_release_file`. build: makes the dense transformer, e.g. from its config; its
        parameters are never allocated. spec: names its blocks. dtype: None keeps the file's.
    Raises ValueError, with the offending keys, unless file and transformer match completely.
    """
    from accelerate import init_empty_weights

    file = read_release(path)
    routers = build_routers(path, file.shapes)
    # Parameters only: tables that a constructor computes and no file holds (rotary frequencies) stay real.
    with init_empty_weights(include_buffers=False):
        transformer = build()
    count = sum(len(attrgetter(block.path)(transformer)) for block in spec.blocks)
    if count != len(routers):
        raise ValueError(
            f"{path} has {len(routers)} routers, but {type(transformer).__name__} has {count} blocks"
        )
    check_keys(path, file.shapes, ("", transformer), (ROUTER_PREFIX, routers))
    weights, router_weights = _map_tensors(file, dtype)
    transformer.load_state_dict(weights, assign=True)
    routers.load_state_dict(router_weights, assign=True)
    for module in (transformer, routers):
        module.requires_grad_(False).eval()
    return transformer, routers


def _map_tensors(file: ReleaseFile, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Memory-mapped tensors of the transformer and, with their prefix taken off, of the routers."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    router_weights: dict[str, Tensor] = {}
    for shard, names in file.shards.items():
        with safe_open(shard, framework="pt") as tensors:
            for name in names:
                tensor = tensors.get_tensor(name)
                if dtype is not None and tensor.dtype != dtype:
                    tensor = tensor.to(dtype)
                if name.startswith(ROUTER_PREFIX):
                    router_weights[name.removeprefix(ROUTER_PREFIX)] = tensor
                else:
                    weights[name] = tensor
    return weights, router_weights


def sigmoid_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the activation the release was trained with (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


class SigmoidGelu:
    """Undo handle of `use_sigmoid_gelu`: the switched activations."""

    def __init__(self, patches: list[tuple[nn.Module, Patch, str]]) -> None:
        self._patches = patches

    def __len__(self) -> int:
        return len(self._patches)

    def undo(self) -> None:
        """Put the model's own activations back."""
        for module, patch, name in reversed(self._patches):
            restore_forward(module, patch, name)
        self._patches = []


def use_sigmoid_gelu(transformer: nn.Module, spec: TransformerSpec) -> SigmoidGelu:
    """Switch every tanh-GELU in the transformer's blocks, text and image MLPs alike, to `sigmoid_gelu`.

    Raises ValueError if a block has none. Returns the handle that undoes it.
    """
    patches: list[tuple[nn.Module, Patch, str]] = []
    for block_spec in spec.blocks:
        for i, block in enumerate(attrgetter(block_spec.path)(transformer)):
            before = len(patches)
            for module in block.modules():
                if getattr(module, "approximate", None) == "tanh":
                    # diffusers' GELU holds its input projection too; torch's nn.GELU is the activation alone.
                    name = "gelu" if hasattr(module, "gelu") else "forward"
                    patches.append((module, patch_forward(module, _replace, name), name))
            if len(patches) == before:
                SigmoidGelu(patches).undo()
                raise ValueError(f"{block_spec.path}.{i} ({type(block).__name__}) has no tanh-GELU to switch")
    return SigmoidGelu(patches)


def _replace(original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return sigmoid_gelu(x)


def _locate(path: Path) -> Path | None:
    """The safetensors file or index json that `path` means, or None if it means neither."""
    if path.is_dir():
        if (path / "bundle.json").exists() or (path / "model_index.json").exists():
            return None
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        return found[0] if len(found) == 1 else None
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") else None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index json. Raises ValueError unless it is one."""
    try:
        shards = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of sharded safetensors: it has no weight_map") from error
    for shard in set(shards.values()):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(f"{index} refers to {shard!r}, which is not beside it; fetch every shard")
    return dict(shards)


def _read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file: tensor name -> {dtype, shape, data_offsets}.

    Raises ValueError if the file is something else or shorter than its header promises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} ({size} bytes) is no safetensors file; pickled checkpoints are not loaded"
            )
        if 8 + length > size:
            raise ValueError(
                f"{path} is truncated: it has {size} bytes, its header alone {8 + length}; fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} ({size} bytes) is no safetensors file: its header is no table"
            ) from error
    if 8 + length + end > size:
        raise ValueError(f"{path} is truncated: it has {size} bytes of {8 + length + end}; fetch it again")
    return dict(header)


def _some(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
