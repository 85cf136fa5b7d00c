"""Control nets, dtypes, compiled blocks and LoRA files: elastic execution beside what pipelines offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones import flux, qwen_image
from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.spec import TransformerSpec
from routers.trace import FULL, REUSE, SKIP
from tests.block_kinds import BY_CLASS, CASES, Case
from tests.routers.packaged import QWEN as TINY

pytestmark = pytest.mark.usefixtures("counted_once")

TIMES = (0.9, 0.7, 0.5)
CONTROL_KEYS = (
    "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "axes_dims_rope",
)  # fmt: skip


@pytest.fixture(params=BY_CLASS)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# -- control nets ----------------------------------------------------------------------------------


def randomise(model: nn.Module) -> nn.Module:
    """Control nets start as a no-op: their output layers are zero."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return model.eval().requires_grad_(False)


class Controlled:
    """A tiny pipeline with a control net: `run` gives latents."""

    def __init__(self, name: str, folder: Path) -> None:
        import diffusers

        self.pipe: Any
        if name == "qwen":
            self.spec: TransformerSpec = qwen_image.TRANSFORMER
            base = diffusers.QwenImagePipeline.from_pretrained(folder)
            config = {k: v for k, v in base.transformer.config.items() if not k.startswith("_")}
            config = {k: config[k] for k in CONTROL_KEYS} | {"num_layers": 2}
            control = diffusers.QwenImageControlNetModel(**config)
            kind: Any = diffusers.QwenImageControlNetPipeline
            self.guidance = {"true_cfg_scale": 4.0, "negative_prompt": " "}
        else:
            self.spec = flux.TRANSFORMER
            base = diffusers.FluxPipeline.from_pretrained(folder)
            control = diffusers.FluxControlNetModel.from_transformer(
                base.transformer,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=32,
                num_attention_heads=2,
            )
            kind = diffusers.FluxControlNetPipeline
            self.guidance = {"guidance_scale": 3.5, "max_sequence_length": 32}
        self.pipe = kind(**base.components, controlnet=randomise(control))
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer
        self.inner = self.transformer.transformer_blocks

    def run(self, scale: float = 1.0, rows: int = 1, steps: int = 4) -> Tensor:
        from PIL import Image

        ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
        result: Tensor = self.pipe(
            prompt=["a cat", "a red car"][:rows],
            control_image=Image.fromarray(ramp),
            controlnet_conditioning_scale=scale,
            width=64,
            height=64,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(row) for row in range(rows)],
            output_type="latent",
            **{k: [v] * rows if k == "negative_prompt" else v for k, v in self.guidance.items()},
        ).images
        return result


@pytest.fixture(params=["qwen", "flux"])
def controlled(request: pytest.FixtureRequest) -> Controlled:
    folder = request.getfixturevalue(f"{request.param}_folder")
    return Controlled(request.param, folder)


@pytest.mark.parametrize("rows", [1, 2])
def test_open_gates_equal_the_dense_model_with_a_control_net(controlled: Controlled, rows: int) -> None:
    dense = controlled.run(rows=rows)
    assert not torch.allclose(dense, controlled.run(0.0, rows), atol=1e-3), "the control net must count"
    elastic = Elastic(controlled.transformer, controlled.spec)
    with elastic.scope(policy=OpenPolicy(), num_steps=4):
        assert torch.equal(controlled.run(rows=rows), dense)
    elastic.detach()
    assert torch.equal(controlled.run(rows=rows), dense)


@pytest.mark.parametrize("code", [SKIP, REUSE])
def test_residuals_enter_where_blocks_do_not_run(controlled: Controlled, code: int) -> None:
    """What enters a closed block: what left the one before it, and that one's residual of this step."""
    elastic = Elastic(controlled.transformer, controlled.spec)
    blocks, double = len(elastic.blocks), len(controlled.inner)
    controlled.run()
    handed: list[list[Tensor]] = []
    forward = controlled.transformer.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        handed.append(kwargs["controlnet_block_samples"])
        return forward(*args, **kwargs)

    entered: list[Tensor] = []
    left: list[Tensor] = []
    handles = []
    for block in elastic.blocks[:double]:

        def before(_module: nn.Module, args: Any, kwargs: Any, block: Any = block) -> None:
            entered.append(block.streams(block.bind(args, kwargs))[0])

        def after(_module: nn.Module, _args: Any, output: Any, block: Any = block) -> None:
            left.append(block.unpack(output)[0])

        handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.module.register_forward_hook(after))
    plan = np.full((4, blocks), FULL)
    plan[1:] = code
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(controlled.transformer), "forward", watch)
        with elastic.scope(policy=FixedPolicy(plan), num_steps=4) as trace:
            controlled.run()
    for handle in handles:
        handle.remove()
    action = "skip" if code == SKIP else "reuse"
    assert trace.decisions[action] == trace.num_calls * blocks * 3 // 4
    assert len(entered) == trace.num_calls * double == len(handed) * double
    for call, samples in enumerate(handed):
        interval = -(-double // len(samples))
        for i in range(double - 1):
            at = call * double + i
            residual = samples[i // interval]
            assert residual.abs().max() > 1e-3
            assert (entered[at + 1] - left[at] - residual).abs().max() <= 1e-5


def test_a_reused_block_adds_its_own_delta_and_not_the_residual_again(controlled: Controlled) -> None:
    """With the control net off at the reused steps, a reuse equals one cached without any residual in it."""
    elastic = Elastic(controlled.transformer, controlled.spec)
    blocks = len(elastic.blocks)
    plan = np.full((2, blocks), FULL)
    plan[1] = REUSE
    deltas: list[list[Tensor]] = []
    with_steps: list[Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        with_steps.append(elastic.blocks[0].streams(elastic.blocks[0].bind(args, kwargs))[0])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        deltas.append([elastic.blocks[0].unpack(output)[0] - with_steps[-1]])

    controlled.run(steps=2)
    first = elastic.blocks[0].module
    handles = [
        first.register_forward_pre_hook(before, with_kwargs=True), first.register_forward_hook(after),
    ]  # fmt: skip
    with elastic.scope(policy=FixedPolicy(plan), num_steps=2):
        controlled.run(steps=2)
    for handle in handles:
        handle.remove()
    half = len(deltas) // 2
    for computed, reused in zip(deltas[:half], deltas[half:], strict=True):
        assert (computed[0] - reused[0]).abs().max() <= 1e-5


# -- dtypes ----------------------------------------------------------------------------------------


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one(key, inner) for key, inner in value.items()}
        floats = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_ids")
        return value.to(dtype) if floats else value

    return {name: one(name, value) for name, value in inputs.items()}


def half_trajectory(case: Case, model: nn.Module, dtype: torch.dtype, rows: int, seed: int = 0) -> Tensor:
    results = []
    for t in TIMES:
        with torch.no_grad():
            out = model(**cast(case.inputs(rows, t, seed), dtype))
        results.append(out[0] if isinstance(out, tuple) else getattr(out, "sample", out))
    return torch.stack(results)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(case: Case, dtype: torch.dtype, rows: int) -> None:
    """Dense bit for bit; mixed decisions in the model's dtype and near the fp32 run of the same decisions."""
    exact, model = case.transformer(), case.transformer().to(dtype)
    dense = half_trajectory(case, model, dtype, rows)
    elastic, reference = Elastic(model, case.spec), Elastic(exact, case.spec)
    blocks = len(elastic.blocks)
    plan = np.random.default_rng(0).integers(SKIP, FULL + 1, (len(TIMES), rows, blocks)).astype(np.int8)
    plan[0] = FULL
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(half_trajectory(case, model, dtype, rows), dense)
    with elastic.scope(policy=FixedPolicy(plan)) as trace:
        mixed = half_trajectory(case, model, dtype, rows)
    with reference.scope(policy=FixedPolicy(plan)) as exactly:
        expected = half_trajectory(case, exact, torch.float32, rows)
    assert mixed.dtype == dtype and torch.isfinite(mixed).all()
    assert not torch.equal(mixed, dense)
    far = (dense.float() - half_trajectory(case, case.transformer(), torch.float32, rows)).abs().max()
    assert (mixed.float() - expected).abs().max() <= 6 * far.clamp_min(1e-3)
    assert trace.flops["spent"] == pytest.approx(exactly.flops["spent"])


# -- torch.compile ---------------------------------------------------------------------------------


def compilable(case: Case, model: nn.Module) -> list[nn.Module]:
    """All blocks but Hunyuan3D 2.1's experts: torch.compile has their grouped product in bf16 only."""
    return [
        block
        for path in dict.fromkeys(kind.path for kind in case.spec.blocks)
        for block in model.get_submodule(path)
        if not hasattr(block, "moe")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_compile_once_per_kind_and_width(case: Case) -> None:
    """At most one graph for each block kind and width, none broken, and no more of them in later steps."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    count = CompileCounter()
    model = case.transformer()
    dense = torch.stack([case.run(model, 2, t) for t in TIMES])
    for block in compilable(case, model):
        block.compile(backend=count)
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)
    with elastic.scope(policy=OpenPolicy()):
        assert torch.equal(torch.stack([case.run(model, 2, t) for t in TIMES]), dense)
    codes = (SKIP, REUSE, 0, 1, 2, FULL)
    plan = np.array([[FULL] * blocks, *([codes[(b + s) % 6] for b in range(blocks)] for s in range(6))])
    frames = []
    for _ in range(2):
        with elastic.scope(policy=FixedPolicy(plan)):
            for step in range(len(plan)):
                case.run(model, 2, 0.9 - 0.1 * step)
        frames.append(count.frame_count)
    kinds = {block.spec.kind for block in elastic.blocks}
    assert count.frame_count <= 4 * len(kinds), f"{case.name}: {frames}"
    assert frames[0] == frames[1], f"{case.name}: recompiled in a second run"
    assert sum(counters["graph_break"].values()) == 0, f"{case.name}: {dict(counters['graph_break'])}"


# -- LoRA files on the packaged model --------------------------------------------------------------


def tiny() -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> np.ndarray:
    found = pipe(
        "a cat", negative_prompt=" ", width=64, height=64, num_inference_steps=3, output_type="np",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return np.asarray(found.images[0])


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for the MLPs of every block of the packaged model, as trainers save it."""
    import diffusers

    folder = tmp_path_factory.mktemp("lora")
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(TINY, subfolder="transformer")
    torch.manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".img_mlp.net." in name:
            tensors[f"transformer.{name}.lora_A.weight"] = 0.05 * torch.randn(4, module.in_features)
            tensors[f"transformer.{name}.lora_B.weight"] = 0.05 * torch.randn(module.out_features, 4)
    save_file(tensors, folder / "lora.safetensors")
    return folder


def load_lora(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="style")


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_lora_file_on_the_packaged_model(lora_folder: Path, when: str) -> None:
    pipe, reference = tiny(), tiny()
    plain = picture(reference)
    load_lora(reference, lora_folder)
    dense = picture(reference)
    if when == "before":
        load_lora(pipe, lora_folder)
    elastic = Elastic(pipe.transformer, qwen_image.TRANSFORMER)
    if when == "after":
        load_lora(pipe, lora_folder)
    with elastic.scope():
        opened = picture(pipe)
    with elastic.scope(policy=FixedPolicy(np.full(len(elastic.blocks), 1))):
        narrow = picture(pipe)
    pipe.fuse_lora()
    with elastic.scope():
        fused = picture(pipe)
    with elastic.scope(policy=FixedPolicy(np.full(len(elastic.blocks), 1))):
        narrow_fused = picture(pipe)
    pipe.unfuse_lora()
    elastic.detach()
    pipe.unload_lora_weights()
    assert np.array_equal(opened, dense) and not np.array_equal(dense, plain)
    assert abs(fused - dense).max() < 1e-3
    assert abs(narrow_fused - narrow).max() < 1e-3 < abs(narrow - dense).max()
    assert abs(picture(pipe) - plain).max() < 1e-3


# -- compiled where it cannot work -----------------------------------------------------------------


def test_a_transformer_compiled_as_a_whole_is_refused(case: Case) -> None:
    model = case.transformer()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compile its blocks"):
        Elastic(model, case.spec)
    model = torch.compile(case.transformer(), backend="eager")
    with pytest.raises(ValueError, match="compile its blocks"):
        Elastic(model, case.spec)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_compiled_while_attached_stay_compiled_after(case: Case) -> None:
    torch._dynamo.reset()
    model = case.transformer()
    plain = torch.stack([case.run(model, 2, t) for t in TIMES])
    elastic = Elastic(model, case.spec)
    codes = np.arange(len(elastic.blocks)) % 4
    with elastic.scope(policy=FixedPolicy(codes)):
        narrow = torch.stack([case.run(model, 2, t) for t in TIMES])
    for block in compilable(case, model):
        block.compile(backend="eager")
    with elastic.scope(policy=FixedPolicy(codes)):
        compiled = torch.stack([case.run(model, 2, t) for t in TIMES])
    assert (compiled - narrow).abs().max() <= 1e-5
    elastic.detach()
    assert all(block._compiled_call_impl is not None for block in compilable(case, model))
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(torch.stack([case.run(model, 2, t) for t in TIMES]), plain)
