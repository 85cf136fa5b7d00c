"""Quantised weights: steps and skips work on all of them, widths are fixed, FLOPs are the dense twin's.

Kinds from libraries that are not installed are skipped; `pip install -e ".[quantised]"` brings them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from routers.elastic import Elastic
from routers.identity import architecture, fingerprint, is_same_model
from routers.packed import is_packed
from routers.policy import FixedPolicy, OpenPolicy
from routers.trace import FULL, REUSE, SKIP
from tests.zoo.images import IMAGES

MODEL = next(model for model in IMAGES if model.name == "FluxTransformer2DModel")
BLOCKS = 5


def plain(seed: int = 0) -> nn.Module:
    """A model whose blocks have linears of 32 inputs and more, as packed formats want them."""
    torch.manual_seed(seed)
    model = MODEL.build()
    if seed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    return model


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every linear of its blocks replaced."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "blocks." in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))
    return model


class BytesLinear(nn.Linear):
    """A linear in the form that bitsandbytes and GGUF keep: rows of bytes with a scale each."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None)
        scale = dense.weight.abs().amax(1, keepdim=True) / 7
        halves = (dense.weight / scale).round().to(torch.int8).add(8).to(torch.uint8).unflatten(1, (-1, 2))
        self.scale = scale
        self.weight = nn.Parameter(halves[..., 0] * 16 + halves[..., 1], requires_grad=False)
        self.bias = dense.bias

    def forward(self, input: Tensor) -> Tensor:
        halves = torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1)
        return nn.functional.linear(input, (halves.float() - 8) * self.scale, self.bias)


def bytes_linears(model: nn.Module) -> nn.Module:
    return replaced(model, BytesLinear)


def layerwise_casting(model: Any) -> nn.Module:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model  # type: ignore[no-any-return]


def torchao_int8(model: nn.Module) -> nn.Module:
    quantised = pytest.importorskip("torchao.quantization")
    quantised.quantize_(model, quantised.Int8WeightOnlyConfig(), _in_blocks)
    return model


def torchao_fp8(model: nn.Module) -> nn.Module:
    quantised = pytest.importorskip("torchao.quantization")
    quantised.quantize_(model, quantised.Float8WeightOnlyConfig(), _in_blocks)
    return model


def _in_blocks(module: nn.Module, path: str) -> bool:
    return type(module) is nn.Linear and "blocks." in path


def quanto_int8(model: nn.Module) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include="*blocks.*")
    quanto.freeze(model)
    return model


def gguf_q8(model: nn.Module) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def make(dense: nn.Linear) -> nn.Module:
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = torch.from_numpy(gguf.quantize(dense.weight.numpy(), kind))
        linear = GGUFLinear(dense.in_features, dense.out_features, dense.bias is not None, torch.float32)
        linear.weight = GGUFParameter(packed, quant_type=kind)
        linear.bias = dense.bias
        return linear.requires_grad_(False)

    return replaced(model, make)


def bnb_nf4(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(dense: nn.Linear) -> nn.Module:
        linear = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, torch.float32, quant_type="nf4"
        )
        linear.load_state_dict(dense.state_dict())
        return linear.to("cpu").requires_grad_(False)  # type: ignore[no-any-return]

    return replaced(model, make)


def bnb_int8(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(dense: nn.Linear) -> nn.Module:
        linear = bnb.nn.Linear8bitLt(
            dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False
        )
        linear.load_state_dict(dense.state_dict())
        return linear.to("cpu").requires_grad_(False)  # type: ignore[no-any-return]

    return replaced(model, make)


PACKED = [bytes_linears, torchao_int8, torchao_fp8, quanto_int8, gguf_q8, bnb_nf4, bnb_int8]
KINDS = [*PACKED, layerwise_casting]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def quantised(request: pytest.FixtureRequest) -> nn.Module:
    model: nn.Module = request.param(plain())
    assert any(is_packed(module) for module in model.modules()) == (request.param in PACKED)
    return model


def run(model: nn.Module, plan: Any = None) -> list[Tensor]:
    with torch.no_grad():
        return [model(**MODEL.call(2, t))[0] for t in (0.9, 0.7)]


def spec() -> Any:
    from backbones.flux import TRANSFORMER

    return TRANSFORMER


def follow(elastic: Elastic, plan: Any) -> list[Tensor]:
    policy = OpenPolicy() if plan is None else FixedPolicy(np.asarray(plan, np.int8), 0)
    with elastic.scope(policy=policy):
        return run(elastic.transformer)


def test_open_gates_equal_dense_and_closed_ones_save(quantised: nn.Module) -> None:
    dense = run(quantised)
    elastic = Elastic(quantised, spec())
    assert all(torch.equal(a, b) for a, b in zip(follow(elastic, None), dense, strict=True))
    mixed = follow(elastic, [[FULL] * BLOCKS, [REUSE, FULL, SKIP, REUSE, FULL]])
    assert torch.equal(mixed[0], dense[0])
    assert bool(torch.isfinite(mixed[1]).all())
    assert not torch.equal(mixed[1], dense[1])
    assert elastic.trace is not None
    assert 0.5 < elastic.trace.spent[0] < 0.9
    elastic.detach()
    assert all(torch.equal(a, b) for a, b in zip(run(quantised), dense, strict=True))


def test_packed_widths_are_fixed_and_flops_are_those_of_the_dense_twin(quantised: nn.Module) -> None:
    counted = []
    for model in (plain(), quantised):
        elastic = Elastic(model, spec())
        narrow, dense = follow(elastic, [0] * BLOCKS), follow(elastic, None)
        assert elastic.trace is not None
        counted.append(elastic.trace.flops["dense"])
        follow(elastic, [0] * BLOCKS)
        same = all(torch.equal(a, b) for a, b in zip(narrow, dense, strict=True))
        fixed = any(is_packed(module) for module in model.modules())
        assert same == fixed
        assert (elastic.trace.spent[0] == 1.0) == fixed
        elastic.detach()
    assert counted[0] == counted[1]


def test_architecture_and_fingerprint_are_those_of_the_plain_model(quantised: nn.Module) -> None:
    assert architecture(quantised) == architecture(plain())
    assert is_same_model(quantised, fingerprint(plain()))
    assert not is_same_model(quantised, fingerprint(plain(seed=1)))


def test_fused_projections_are_seen_through() -> None:
    fused: Any = plain()
    fused.fuse_qkv_projections()
    assert sum(1 for _ in fused.parameters()) > sum(1 for _ in plain().parameters())
    assert architecture(fused) == architecture(plain())
    assert fingerprint(fused) == fingerprint(plain())
    dense = run(fused)
    opened = follow(Elastic(fused, spec()), None)
    assert all(torch.equal(a, b) for a, b in zip(opened, dense, strict=True))
