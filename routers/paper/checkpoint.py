"""The paper's released checkpoint: one safetensors file with a fine-tuned DiT and its routers.

`load_release` maps the file (or a sharded set) into memory and hands its tensors to a transformer
without a second copy. `ReleaseRouter` is the released router under its own key names; how its output
becomes decisions is in `policy.py`. See docs/paper-checkpoints.md.

Shapes: B batch, L tokens of all streams, D dim, H hidden units of the router, W number of widths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching import Patches
from ..spec import WIDTHS, TransformerSpec
from .headers import ROUTER_PREFIX, ReleaseFile, misfits, some
from .headers import is_release_file as is_release_file
from .headers import read_release as read_release
from .headers import split_keys as split_keys


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
            f"{some(sorted(expected - numbers))} is missing"
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
    problems = misfits(shapes, wanted)
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
    tensors = read_tensors(file, dtype)
    transformer_names, router_names = split_keys(tensors)
    transformer.load_state_dict({name: tensors[name] for name in transformer_names}, assign=True)
    weights = {name.removeprefix(ROUTER_PREFIX): tensors[name] for name in router_names}
    routers.load_state_dict(weights, assign=True)
    for module in (transformer, routers):
        module.requires_grad_(False).eval()
    return transformer, routers


def read_tensors(file: ReleaseFile, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors by name, memory-mapped where the dtype is the file's. dtype: None keeps the file's."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for shard, names in file.shards.items():
        with safe_open(shard, framework="pt") as stored:
            for name in names:
                tensor = stored.get_tensor(name)
                tensors[name] = tensor if dtype is None else tensor.to(dtype)
    return tensors


def sigmoid_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the activation the release was trained with (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def use_sigmoid_gelu(transformer: nn.Module, spec: TransformerSpec) -> Patches:
    """Switch every tanh-GELU in the transformer's blocks, text and image MLPs alike, to `sigmoid_gelu`.

    Raises ValueError if a block has none. Closing what is returned puts the model's own activations back.
    """
    with Patches() as patches:  # undone where one is refused
        for block_spec in spec.blocks:
            for i, block in enumerate(attrgetter(block_spec.path)(transformer)):
                tanh = [module for module in block.modules() if getattr(module, "approximate", "") == "tanh"]
                if not tanh:
                    raise ValueError(
                        f"{block_spec.path}.{i} ({type(block).__name__}) has no tanh-GELU to switch"
                    )
                for module in tanh:
                    # diffusers' GELU holds its input projection too; torch's nn.GELU is the activation alone.
                    patches.add(module, _replace, "gelu" if hasattr(module, "gelu") else "forward")
        return patches.pop_all()


def _replace(original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return sigmoid_gelu(x)
