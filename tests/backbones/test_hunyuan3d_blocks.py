"""What routers rely on: named streams, sliceable MLPs, skips that flow around blocks, separate rows."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from backbones.hunyuan3d.dinov2 import build_dinov2
from backbones.hunyuan3d.dit_v2 import Hunyuan3DDiT
from backbones.hunyuan3d.dit_v21 import HunYuanDiTPlain, MixtureOfExperts, MoEDiTBlock
from routers.spec import MlpSpec
from routers.width import MlpSlicer


def dit_v2(**options) -> Hunyuan3DDiT:
    torch.manual_seed(0)
    return Hunyuan3DDiT(
        8, 12, 32, num_heads=4, depth=2, depth_single_blocks=2, axes_dim=(8,), **options
    ).eval()


def dit_v21(depth: int = 5, moe: int = 2) -> HunYuanDiTPlain:
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "hidden_size": 32, "context_dim": 12, "depth": depth, "num_heads": 4}
    options = {"qk_norm": True, "qkv_bias": False, "num_moe_layers": moe, "num_experts": 4, "moe_top_k": 2}
    return HunYuanDiTPlain(**sizes, **options).eval()


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 8, generator=generator)
    context = torch.randn(batch, 5, 12, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), {"main": context}


BOTH = pytest.mark.parametrize("make", [dit_v2, dit_v21])


@BOTH
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_same_request_alone(make):
    model = make()
    x, t, contexts = inputs()
    together = model(x, t, contexts)
    for i in range(len(x)):
        alone = model(x[i : i + 1], t[i : i + 1], {"main": contexts["main"][i : i + 1]})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@BOTH
@torch.no_grad()
def test_every_input_matters(make):
    model = make()
    x, t, contexts = inputs()
    reference = model(x, t, contexts)
    for changed in (
        model(x + 0.1, t, contexts),
        model(x, t + 0.05, contexts),
        model(x, t, {"main": contexts["main"] + 0.1}),
    ):
        assert (changed - reference).abs().amax(dim=(1, 2)).min() > 1e-5


@torch.no_grad()
def test_blocks_are_called_with_named_streams_and_return_them():
    model = dit_v2()
    seen = []
    for name in ("double_blocks", "single_blocks"):
        for block in getattr(model, name):
            block.register_forward_hook(
                lambda m, args, kwargs, out: seen.append((args, sorted(kwargs), out)), with_kwargs=True
            )
    model(*inputs())
    assert [(args, names) for args, names, _ in seen] == [((), ["img", "txt", "vec"])] * 2 + [
        ((), ["vec", "x"])
    ] * 2
    img, txt = seen[0][2]
    assert img.shape == (3, 6, 32)
    assert txt.shape == (3, 5, 32)
    assert seen[2][2].shape == (3, 11, 32)


@torch.no_grad()
def test_guidance_is_an_input_of_distilled_models_only():
    x, t, contexts = inputs()
    model = dit_v2(guidance_embed=True)
    low, high = (model(x, t, contexts, guidance=torch.full((3,), g)) for g in (1.0, 7.5))
    assert (low - high).abs().max() > 1e-4
    with pytest.raises(ValueError, match="pass guidance"):
        model(x, t, contexts)


MLPS = [
    (lambda: dit_v2().double_blocks[0], MlpSpec("img_mlp.0", "img_mlp.2")),
    (lambda: dit_v2().single_blocks[0], MlpSpec("linear1", "linear2", in_offset=3, out_offset=1)),
    (lambda: dit_v21().blocks[0], MlpSpec("mlp.fc1", "mlp.fc2")),
    (lambda: dit_v21().blocks[4], MlpSpec("moe.shared_experts.net.0.proj", "moe.shared_experts.net.2")),
    (lambda: dit_v21().blocks[4], MlpSpec("moe.experts.1.net.0.proj", "moe.experts.1.net.2")),
]


@pytest.mark.parametrize(("make", "spec"), MLPS, ids=["double", "single", "mlp", "shared expert", "expert"])
@torch.no_grad()
def test_a_narrowed_mlp_equals_one_with_the_other_units_zeroed(make, spec):
    block = make()
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(2, 7, 32, generator=generator), torch.randn(2, 32, generator=generator)
    if hasattr(block, "img_mlp"):
        call = {"img": x, "txt": x[:, :3], "vec": c}
    elif hasattr(block, "linear1"):
        call = {"x": x, "vec": c}
    else:
        skip = x if hasattr(block, "skip_linear") else None
        call = {"x": x, "c": c, "cond": torch.randn(2, 5, 12, generator=generator), "skip": skip}
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    full = first(block(**call))
    slicer = MlpSlicer(block, spec)
    with slicer.narrowed(0.25):
        narrow = first(block(**call))
    outer = block.get_submodule(spec.out_linear)
    outer.weight[:, slicer.column_offset + slicer.units(0.25) :] = 0
    torch.testing.assert_close(narrow, first(block(**call)), atol=1e-5, rtol=0)
    assert (narrow - full).abs().max() > 1e-4


@pytest.mark.parametrize("depth", [4, 5])
@torch.no_grad()
def test_skips_flow_around_blocks_that_are_not_run(depth):
    model = dit_v21(depth, moe=1)
    received = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: received.__setitem__(i, (kwargs["x"], kwargs["skip"])),
            with_kwargs=True,
        )
    skipped = depth - 2
    model.blocks[skipped].forward = lambda x, c, cond, skip=None: x
    model.blocks[0].forward = lambda x, c, cond, skip=None: x
    model(*inputs())
    middle = depth // 2
    assert [i for i in range(depth) if received[i][1] is not None] == list(range(middle + 1, depth))
    # The stack is last in, first out: block i merges the output of block 2 * middle - i (5: 3 <- 1, 4 <- 0).
    for i in range(middle + 1, depth):
        partner = 2 * middle - i
        assert torch.equal(received[i][1], received[partner + 1][0])
    assert torch.equal(received[skipped + 1][0], received[skipped][0])


@torch.no_grad()
def test_experts_equal_a_plain_loop_over_tokens():
    torch.manual_seed(3)
    moe = MixtureOfExperts(16, 4, 2).eval()
    x = torch.randn(2, 5, 16)
    indices, weights = moe.gate(x.flatten(0, 1))
    assert (weights.sum(dim=-1) < 0.999).all()  # raw softmax values, not renormalised
    expected = moe.shared_experts(x).flatten(0, 1)
    for token, (chosen, weight) in enumerate(zip(indices, weights, strict=True)):
        for e, w in zip(chosen.tolist(), weight, strict=True):
            expected[token] += w * moe.experts[e](x.flatten(0, 1)[token])
    torch.testing.assert_close(moe(x).flatten(0, 1), expected, atol=1e-6, rtol=1e-5)


def test_expert_flops_on_the_meta_device_equal_those_of_a_real_run():
    def flops(device: str) -> int:
        moe, x = MixtureOfExperts(16, 4, 2).to(device), torch.randn(2, 5, 16, device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert moe(x).shape == x.shape
        return counter.get_total_flops()

    # Gate, and 2 routed experts + 1 shared expert per token with 2 matrices of 16 x 64 each.
    assert flops("meta") == flops("cpu") == 2 * 10 * (16 * 4 + 3 * 2 * 16 * 64)


def test_the_whole_model_runs_on_the_meta_device():
    x, t, contexts = inputs()
    model = dit_v21().to("meta")
    assert isinstance(model.blocks[-1], MoEDiTBlock)
    assert model(x.to("meta"), t.to("meta"), {"main": contexts["main"].to("meta")}).shape == x.shape


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="sum"):
        Hunyuan3DDiT(hidden_size=64, num_heads=4)
    with pytest.raises(ValueError, match="multiple of 8"):
        HunYuanDiTPlain(hidden_size=40, context_dim=8, depth=1, num_heads=4, qk_norm=True, qkv_bias=False)
    with pytest.raises(ValueError, match="use_attention_pooling"):
        HunYuanDiTPlain(
            hidden_size=32,
            context_dim=8,
            depth=1,
            num_heads=4,
            qk_norm=True,
            qkv_bias=False,
            use_attention_pooling=True,
        )


@pytest.mark.parametrize("swiglu", [False, True])
@torch.no_grad()
def test_dinov2_loads_and_writes_the_published_names(swiglu, tmp_path):
    """What transformers renames in from_pretrained comes out equal, from views of stored tensors."""
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    torch.manual_seed(4)
    first = build_dinov2(fields).eval()
    for parameter in first.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    published = first.state_dict()
    assert "encoder.layer.1.attention.attention.query.weight" in published
    save_file(published, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "dinov2"}))
    reference, report = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())

    with torch.device("meta"):
        ours = build_dinov2(fields).eval()
    ours.load_state_dict(published, assign=True)
    stored = {tensor.untyped_storage().data_ptr() for tensor in published.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()} <= stored
    assert all(torch.equal(tensor, published[name]) for name, tensor in ours.state_dict().items())
    for size in (56, 84):
        pixels = torch.randn(2, 3, size, size)
        assert torch.equal(ours(pixels)[0], reference.eval()(pixels)[0])


def test_dinov2_refuses_settings_that_it_does_not_have():
    with pytest.raises(ValueError, match="unknown Dinov2Config keys \\['registers'\\]"):
        build_dinov2({"hidden_size": 24, "registers": 4})
    with pytest.raises(ValueError, match="hidden_size"):
        build_dinov2({"hidden_size": "wide"})


def test_a_longer_condition_is_counted_anew():
    """Conditions come in a mapping; the cost of a call depends on their length too."""
    from backbones.hunyuan3d.family import TRANSFORMER_2
    from routers.elastic import Elastic
    from tests.block_kinds import CASES

    case = next(case for case in CASES if case.spec is TRANSFORMER_2)
    elastic, dense = Elastic(case.transformer(), case.spec), []
    for tokens in (5, 9):
        inputs = case.inputs(1, 0.5, 0)
        inputs["contexts"] = {"main": torch.zeros(1, tokens, 24)}
        with torch.no_grad(), elastic.scope() as trace:
            elastic.transformer(**inputs)
        dense.append(trace.flops["dense"])
    assert dense[1] > 1.1 * dense[0]


def test_each_spec_of_a_shared_list_takes_the_blocks_of_its_class():
    from backbones.hunyuan3d.family import TRANSFORMER_21
    from routers.elastic import Elastic
    from tests.block_kinds import CASES

    case = next(case for case in CASES if case.spec is TRANSFORMER_21)
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    assert [block.spec.kind for block in elastic.blocks] == ["plain"] * 4 + ["experts"]
    assert [block.module for block in elastic.blocks] == list(model.blocks)
