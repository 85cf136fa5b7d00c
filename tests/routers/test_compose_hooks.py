"""Offloading, layerwise casting and attention processors under elastic execution, set before or after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import accelerate
import numpy as np
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook
from torch import Tensor, nn

from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.trace import FULL, SKIP
from tests.block_kinds import BY_CLASS, CASES, Case

pytestmark = pytest.mark.usefixtures("counted_once")

TIMES = (0.9, 0.7, 0.5)
CPU = torch.device("cpu")
Apply = Callable[[nn.Module, Path], object]


def _group(kind: str, disk: bool) -> Apply:
    def apply(model: nn.Module, folder: Path) -> None:
        blocks = 1 if kind == "block_level" else None
        apply_group_offloading(
            model, onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=blocks,
            offload_to_disk_path=str(folder) if disk else None,
        )  # fmt: skip

    return apply


OFFLOADS: dict[str, Apply] = {
    "accelerate, leaf by leaf": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "accelerate, whole model": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU),
    "accelerate, to disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "groups of blocks": _group("block_level", disk=False),
    "groups of leaves": _group("leaf_level", disk=False),
    # what is offloaded to disk leaves garbage in the weights until a hook reads it back
    "groups of blocks on disk": _group("block_level", disk=True),
    "groups of leaves on disk": _group("leaf_level", disk=True),
}
QUICK = {("before", "qwen"), ("before", "hunyuan3d-2.1"), ("after", "flux")}
ORDERS = [
    pytest.param(
        case, when, id=f"{case.name}-{when}", marks=() if (when, case.name) in QUICK else pytest.mark.slow
    )
    for case in CASES
    for when in ("before", "after")
]
"""Hooks set before and after the routers are attached; without `slow`, some models stand for all."""
CASTS: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


@pytest.fixture(params=BY_CLASS)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def trajectory(case: Case, model: nn.Module, rows: int = 2) -> Tensor:
    return torch.stack([case.run(model, rows, t) for t in TIMES])


def mixed_plan(blocks: int, rows: int = 2) -> np.ndarray:
    """Skips, reuses and all widths; the first step computes so that a reuse has something."""
    plan = np.random.default_rng(0).integers(SKIP, FULL + 1, (len(TIMES), rows, blocks)).astype(np.int8)
    plan[0] = FULL
    return plan


def elastic_run(case: Case, model: nn.Module, elastic: Elastic) -> Tensor:
    with elastic.scope(policy=FixedPolicy(mixed_plan(len(elastic.blocks)))) as trace:
        result = trajectory(case, model)
    assert not trace.notes, "costs must be counted without running blocks"
    return result


@functools.cache
def without_hooks(case: Case) -> tuple[Tensor, Tensor]:
    """What the model gives, dense and elastic."""
    model = case.transformer()
    return trajectory(case, model), elastic_run(case, model, Elastic(model, case.spec))


@pytest.mark.parametrize(("case", "when"), ORDERS)
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_weights_give_the_same(case: Case, how: str, when: str, tmp_path: Path) -> None:
    dense, expected = without_hooks(case)
    model = case.transformer()
    if when == "before":
        OFFLOADS[how](model, tmp_path)
    elastic = Elastic(model, case.spec)
    if when == "after":
        OFFLOADS[how](model, tmp_path)
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(trajectory(case, model), dense)
    assert (elastic_run(case, model, elastic) - expected).abs().max() <= 1e-5
    elastic.detach()
    assert torch.equal(trajectory(case, model), dense)


@pytest.mark.parametrize("how", ["groups of leaves", "groups of leaves on disk", "accelerate, leaf by leaf"])
def test_offloaded_adapters_give_the_same(case: Case, how: str, tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        model = case.transformer()
        names = {linear for kind in case.spec.blocks for mlp in kind.mlps for linear in vars(mlp).values()}
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        targets = [n for n in linears if any(isinstance(x, str) and x and n.endswith(x) for x in names)]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape)
        return model.eval().requires_grad_(False)

    plain = adapted()
    expected = elastic_run(case, plain, Elastic(plain, case.spec))
    model = adapted()
    OFFLOADS[how](model, tmp_path)
    assert (elastic_run(case, model, Elastic(model, case.spec)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("case", "when"), ORDERS)
@pytest.mark.parametrize("storage", CASTS)
def test_weights_stored_in_fewer_bits_give_the_same(case: Case, storage: str, when: str) -> None:
    """diffusers' layerwise casting: weights are stored in one dtype and computed with in another."""
    if case.name == "hunyuan3d-2.1":
        pytest.skip("the dense model takes its dtype from stored weights, so diffusers' casting fails on it")
    model = case.transformer()
    apply_layerwise_casting(model, storage_dtype=CASTS[storage], compute_dtype=torch.float32)
    dense = trajectory(case, model)
    assert not torch.equal(dense, trajectory(case, case.transformer()))
    # the same numbers without hooks: stored values are rounded, biases and norms as diffusers left them
    rounded = case.transformer()
    for target, source in zip(rounded.parameters(), model.parameters(), strict=True):
        target.data = source.data.float()
    expected = elastic_run(case, rounded, Elastic(rounded, case.spec))
    model = case.transformer()
    if when == "before":
        apply_layerwise_casting(model, storage_dtype=CASTS[storage], compute_dtype=torch.float32)
    elastic = Elastic(model, case.spec)
    if when == "after":
        apply_layerwise_casting(model, storage_dtype=CASTS[storage], compute_dtype=torch.float32)
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(trajectory(case, model), dense)
    assert (elastic_run(case, model, elastic) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offloading_that_learns_its_order(case: Case, when: str) -> None:
    """With CUDA streams the first call tells diffusers what to fetch ahead, and removes hooks as it ends.

    No block may be missing in that call, and no patch may be lost after it.
    """
    plain = case.transformer()
    expected = elastic_run(case, plain, Elastic(plain, case.spec))
    model = case.transformer()

    def offload() -> None:
        _group("block_level", disk=False)(model, Path())
        # what use_stream=True adds; that itself refuses to be set without CUDA
        hook = LazyPrefetchGroupOffloadingHook()
        model._diffusers_hook.register_hook(hook, "lazy_prefetch_group_offloading")

    if when == "before":
        offload()
    elastic = Elastic(model, case.spec)
    if when == "after":
        offload()
    for _ in range(2):
        assert (elastic_run(case, model, elastic) - expected).abs().max() <= 1e-5
    hooks = [block.module._diffusers_hook.get_hook("group_offloading") for block in elastic.blocks]
    followers = [hook.next_group.modules[0] for hook in hooks[:-1]]
    assert all(a is b.module for a, b in zip(followers, elastic.blocks[1:], strict=True))
    elastic.detach()
    assert torch.equal(trajectory(case, model), trajectory(case, case.transformer()))


@pytest.mark.parametrize("where", ["transformer", "block"])
def test_a_patch_that_was_lost_is_an_error(case: Case, where: str) -> None:
    """Removing an older hook puts back a forward without the patch: refused, not a dense run in disguise."""
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    elastic_run(case, model, elastic)
    module = model if where == "transformer" else elastic.blocks[-1].module
    del module.forward
    with pytest.raises(RuntimeError, match="attach them again"), elastic.scope():
        case.run(model)
    elastic.detach()
    assert torch.equal(trajectory(case, model), trajectory(case, case.transformer()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["qwen", "flux"])
def test_attention_processors_are_kept(name: str, when: str) -> None:
    """A processor that counts its calls runs where a block is computed, and only there."""
    case = next(case for case in CASES if case.name == name)
    model = case.transformer()
    dense = trajectory(case, model)
    calls = []

    def counting(inner: Callable) -> object:
        class Counting(type(inner)):  # type: ignore[misc]
            @functools.wraps(type(inner).__call__)  # diffusers passes on only what the signature names
            def __call__(self, attention: nn.Module, *args: object, **kwargs: object) -> object:
                calls.append(attention)
                return super().__call__(attention, *args, **kwargs)

        return Counting()

    def replace() -> None:
        model.set_attn_processor({key: counting(inner) for key, inner in model.attn_processors.items()})

    if when == "before":
        replace()
    elastic = Elastic(model, case.spec)
    if when == "after":
        replace()
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(trajectory(case, model), dense)
    blocks = len(elastic.blocks)
    case.run(model)
    calls.clear()
    plan = np.full(blocks, FULL)
    plan[::2] = SKIP
    with elastic.scope(policy=FixedPolicy(plan)):
        case.run(model)
    assert len(calls) == blocks // 2
