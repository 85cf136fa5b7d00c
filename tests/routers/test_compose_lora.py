"""PEFT adapters under elastic execution: before and after the attach, fused or not, at every width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from routers.attachment import architecture
from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.trace import FULL, SKIP
from tests.block_kinds import BY_CLASS, Case

TIMES = (0.9, 0.7, 0.5)
RATIOS = (0.25, 0.5, 0.75)
TOLERANCE = 2e-5


pytestmark = [
    pytest.mark.usefixtures("counted_once"),
    pytest.mark.filterwarnings("ignore:Already found a", "ignore:Already following"),
]


@pytest.fixture(params=BY_CLASS)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def targets(case: Case, model: nn.Module) -> list[str]:
    """The MLP linears of every block that a width narrows, and one linear outside of the blocks."""
    found = [
        f"{kind.path}.{i}.{linear}"
        for kind in case.spec.blocks
        for i, block in enumerate(model.get_submodule(kind.path))
        if type(block).__name__ == kind.block_class
        for mlp in kind.mlps
        for linear in (mlp.in_linear, mlp.out_linear)
    ]
    outside = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found)
    return [*found, outside]


def lora(case: Case, model: nn.Module, **options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets(case, model), **options)


def randomise(model: nn.Module) -> None:
    """Adapters start as a no-op: give all of their numbers an effect, the same every time."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data = 0.2 * torch.randn(parameter.shape).to(parameter)
        parameter.requires_grad_(False)


def add(case: Case, model: nn.Module, config: peft.PeftConfig | None = None, name: str = "default") -> None:
    peft.inject_adapter_in_model(config or lora(case, model), model, adapter_name=name)
    randomise(model)
    model.eval()


def adapted_layers(model: nn.Module) -> list[peft.tuners.tuners_utils.BaseTunerLayer]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def trajectory(case: Case, model: nn.Module, rows: int = 2) -> Tensor:
    return torch.stack([case.run(model, rows, t) for t in TIMES])


@contextmanager
def zeroed(elastic: Elastic, codes: np.ndarray) -> Iterator[None]:
    """Zero the hidden units that `codes [N]` leave out, in a model that runs densely."""
    handles = []
    for block in elastic.blocks:
        for slicer in block.slicers:
            keep = slicer.column_offset + slicer.units((*RATIOS, 1.0)[codes[block.index]])

            def cut(_module: nn.Module, args: tuple, keep: int = keep) -> tuple:
                x = args[0].clone()
                x[..., keep:] = 0
                return (x, *args[1:])

            outer = block.module.get_submodule(slicer.spec.out_linear)
            handles.append(outer.register_forward_pre_hook(cut))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def widths_match(
    case: Case, model: nn.Module, elastic: Elastic, codes: np.ndarray, atol: float = 2e-5
) -> None:
    with zeroed(elastic, codes):
        expected = trajectory(case, model)
    full = trajectory(case, model)
    with elastic.scope(policy=FixedPolicy(codes)):
        narrow = trajectory(case, model)
    assert not torch.allclose(full, expected, atol=TOLERANCE), "the widths must have an effect"
    assert (narrow - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_open_gates_equal_the_dense_adapted_model(case: Case, when: str) -> None:
    plain = trajectory(case, case.transformer())
    reference = case.transformer()
    add(case, reference)
    dense = trajectory(case, reference)
    assert not torch.equal(plain, dense), "the adapter must have an effect"
    model = case.transformer()
    config = lora(case, model)
    if when == "before":
        add(case, model, config)
    elastic = Elastic(model, case.spec)
    if when == "after":
        add(case, model, config)
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(trajectory(case, model), dense)
    elastic.detach()
    assert torch.equal(trajectory(case, model), dense)


@pytest.mark.parametrize("when", ["before", "after", "after a run"])
def test_widths_cut_the_adapter_too(case: Case, when: str) -> None:
    model = case.transformer()
    config = lora(case, model)
    if when == "before":
        add(case, model, config)
    elastic = Elastic(model, case.spec)
    codes = np.arange(len(elastic.blocks)) % 3
    if when == "after a run":
        with elastic.scope(policy=FixedPolicy(codes)):
            case.run(model)
    if when != "before":
        add(case, model, config)
    widths_match(case, model, elastic, codes)


VARIANTS = {
    "rank-stabilised": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_lora_is_cut_rightly(case: Case, variant: str) -> None:
    model = case.transformer()
    add(case, model, lora(case, model, **VARIANTS[variant]))
    if variant == "bias":
        for layer in adapted_layers(model):
            for up in layer.lora_B.values():
                up.bias.data.normal_()
    elastic = Elastic(model, case.spec)
    widths_match(case, model, elastic, np.full(len(elastic.blocks), 1))


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig], ids=["loha", "lokr"])
def test_other_adapters_are_computed_whole_and_cut(case: Case, kind: type[peft.PeftConfig]) -> None:
    model = case.transformer()
    bare = architecture(model)
    add(case, model, kind(r=4, target_modules=targets(case, model)))
    assert architecture(model) == bare, "adapters do not make another architecture"
    elastic = Elastic(model, case.spec)
    widths_match(case, model, elastic, np.full(len(elastic.blocks), 1))


def test_several_adapters_scales_and_disabling(case: Case) -> None:
    model = case.transformer()
    config = lora(case, model)
    add(case, model, config, "one")
    peft.inject_adapter_in_model(config, model, adapter_name="two")
    randomise(model)
    elastic = Elastic(model, case.spec)
    codes = np.full(len(elastic.blocks), 1)
    seen = []
    for active in (["one"], ["one", "two"]):
        for layer in adapted_layers(model):
            layer.set_adapter(active)
            layer.scale_layer(0.5)
        widths_match(case, model, elastic, codes)
        seen.append(trajectory(case, model))
    for layer in adapted_layers(model):
        layer.enable_adapters(False)
    widths_match(case, model, elastic, codes)
    seen.append(trajectory(case, model))
    assert torch.equal(seen[2], trajectory(case, case.transformer()))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_adapters_and_back(case: Case, when: str) -> None:
    model = case.transformer()
    add(case, model)
    unfused = trajectory(case, model)
    if when == "before":
        for layer in adapted_layers(model):
            layer.merge()
    elastic = Elastic(model, case.spec)
    if when == "after":
        for layer in adapted_layers(model):
            layer.merge()
    with elastic.scope(policy=OpenPolicy()):
        assert (trajectory(case, model) - unfused).abs().max() <= 1e-4
    codes = np.full(len(elastic.blocks), 1)
    widths_match(case, model, elastic, codes)
    for layer in adapted_layers(model):
        layer.unmerge()
    widths_match(case, model, elastic, codes)


def test_disabling_merged_adapters_takes_them_out_of_narrow_mlps_too(case: Case) -> None:
    """PEFT takes a disabled adapter out of the weights it was merged into when its layer is called next."""
    plain, model = case.transformer(), case.transformer()
    codes = np.full(len(Elastic(plain, case.spec).blocks), 1)
    with plain.__dict__["_edit_elastic"].scope(policy=FixedPolicy(codes)):
        expected = trajectory(case, plain)
    add(case, model)
    for layer in adapted_layers(model):
        layer.merge()
    elastic = Elastic(model, case.spec)
    for layer in adapted_layers(model):
        layer.enable_adapters(False)
    with elastic.scope(policy=FixedPolicy(codes)):
        assert (trajectory(case, model) - expected).abs().max() <= 2e-5


def test_rows_of_one_batch_at_different_widths(case: Case) -> None:
    model = case.transformer()
    add(case, model)
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)
    plan = np.random.default_rng(0).integers(SKIP, FULL + 1, (len(TIMES), 3, blocks)).astype(np.int8)
    plan[plan < 0] = FULL
    with elastic.scope(policy=FixedPolicy(plan)):
        together = trajectory(case, model, rows=3)
    for row in range(3):
        with elastic.scope(policy=FixedPolicy(plan[:, row : row + 1])):
            alone = torch.stack([case.run(model, 1, t, seed=row) for t in TIMES])
        assert (alone[:, 0] - together[:, row]).abs().max() <= 2e-5


def test_an_adapter_loaded_while_attached_comes_off_again(case: Case) -> None:
    model = case.transformer()
    plain = trajectory(case, model)
    elastic = Elastic(model, case.spec)
    add(case, model)
    codes = np.full(len(elastic.blocks), 1)
    with elastic.scope(policy=FixedPolicy(codes)):
        trajectory(case, model)
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    widths_match(case, model, elastic, codes)
    elastic.detach()
    assert torch.equal(trajectory(case, model), plain)
    assert not any("forward" in vars(module) for module in model.modules())
