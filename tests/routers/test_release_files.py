"""Released checkpoints as files: the full-size key table, whole and sharded loading, bad input, memory."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones.qwen_image import TRANSFORMER
from routers.paper.checkpoint import (
    ROUTER_PREFIX,
    ReleaseRouter,
    build_routers,
    check_keys,
    is_release_file,
    load_release,
    read_release,
    split_keys,
)

KEYS = Path(__file__).parents[1] / "golden" / "data" / "keys" / "elastic_dit_checkpoint_keys.json"
LAYERS = 2


def build(layers: int = LAYERS) -> Any:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    routers = nn.ModuleList(ReleaseRouter(48, 128) for _ in range(LAYERS))
    return {**build().state_dict(), **{ROUTER_PREFIX + k: v for k, v in routers.state_dict().items()}}


@pytest.fixture
def file(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    return path


def shard(folder: Path, weights: dict[str, Tensor], parts: int = 3) -> Path:
    """A sharded checkpoint in `folder`; returns its index."""
    names = {key: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, key in enumerate(weights)}
    for name in set(names.values()):
        save_file({key: weights[key] for key in weights if names[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


# -- the full-size key table -------------------------------------------------------------------


def test_full_size_key_table_fits_completely() -> None:
    """All 2413 keys of the published file, on the meta device: nothing missing, nothing left over."""
    shapes = {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}
    transformer_keys, router_keys = split_keys(shapes)
    assert (len(shapes), len(router_keys)) == (2413, 60 * 8)
    routers = build_routers("the table", shapes)
    with init_empty_weights(include_buffers=False):
        transformer = QwenImageTransformer2DModel()
    check_keys("the table", shapes, ("", transformer), (ROUTER_PREFIX, routers))
    assert all(p.is_meta for module in (transformer, routers) for p in module.parameters())
    assert sum(p.numel() for p in routers.parameters()) == 1_722_885_420
    for name in (transformer_keys[0], router_keys[0]):
        rest = {k: v for k, v in shapes.items() if k != name}
        with pytest.raises(ValueError, match=f"1 missing: {name}"):
            check_keys("the table", rest, ("", transformer), (ROUTER_PREFIX, routers))
    with pytest.raises(ValueError, match="1 left over: extra"):
        check_keys("the table", {**shapes, "extra": (1,)}, ("", transformer), (ROUTER_PREFIX, routers))


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["file", "index", "folder of shards", "folder of one file"])
def test_round_trip(layout: str, tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    if layout in ("file", "folder of one file"):
        save_file(weights, path)
    else:
        path = shard(tmp_path, weights)
    path = tmp_path if layout.startswith("folder") else path
    assert is_release_file(path)
    transformer, routers = load_release(path, build, TRANSFORMER)
    loaded = {**transformer.state_dict(), **{ROUTER_PREFIX + k: v for k, v in routers.state_dict().items()}}
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    for module in (transformer, routers):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_loaded_transformer_runs_like_an_ordinary_one(file: Path, weights: dict[str, Tensor]) -> None:
    """Tables outside the state dict (rotary frequencies) must be real, not left on the meta device."""
    ordinary = build().eval()
    ordinary.load_state_dict({k: v for k, v in weights.items() if not k.startswith(ROUTER_PREFIX)})
    transformer, _ = load_release(file, build, TRANSFORMER)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs), ordinary(**inputs))


def test_dtype_is_kept_or_converted(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        for module in load_release(path, build, TRANSFORMER, dtype=dtype):
            assert {p.dtype for p in module.parameters()} == {expected}


def test_router_follows_the_reference_in_half_precision(file: Path) -> None:
    _, routers = load_release(file, build, TRANSFORMER, dtype=torch.bfloat16)
    gate, widths = routers[0](torch.randn(2, 7, 48).bfloat16(), torch.randn(2, 48).bfloat16())
    assert (gate.dtype, widths.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (tuple(gate.shape), tuple(widths.shape)) == ((2,), (2, 4))


# -- bad input ---------------------------------------------------------------------------------


def test_other_folders_and_files_are_no_release(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"img_in.weight": weights["img_in.weight"]}, plain)
    assert not is_release_file(plain)
    (tmp_path / "bundle.json").write_text("{}")
    assert not is_release_file(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert not is_release_file(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="does not exist"):
        is_release_file(tmp_path / "model.safetensors")


Damage = Callable[[Path, dict[str, Tensor]], Path]


def truncated(path: Path, weights: dict[str, Tensor]) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def truncated_header(path: Path, weights: dict[str, Tensor]) -> Path:
    path.write_bytes(path.read_bytes()[:500])
    return path


def pickled(path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, path)
    return path


def empty(path: Path, weights: dict[str, Tensor]) -> Path:
    path.write_bytes(b"")
    return path


def header_of_another_kind(path: Path, weights: dict[str, Tensor]) -> Path:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    return path


def without_routers(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({k: v for k, v in weights.items() if not k.startswith(ROUTER_PREFIX)}, path)
    return path


def without_a_key(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({k: v for k, v in weights.items() if k != "img_in.weight"}, path)
    return path


def with_a_key_too_many(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({**weights, "transformer_blocks.2.img_mod.1.bias": torch.zeros(4)}, path)
    return path


def with_a_gap_in_the_routers(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({k.replace("gate_mlps.1.", "gate_mlps.7."): v for k, v in weights.items()}, path)
    return path


def of_another_width(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({**weights, "img_in.weight": torch.zeros(48, 64)}, path)
    return path


def of_another_depth(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({k: v for k, v in weights.items() if "_blocks.1." not in k and "mlps.1." not in k}, path)
    return path


def quantised(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({**weights, "img_in.weight": torch.zeros(48, 16, dtype=torch.int8)}, path)
    return path


def shard_missing(path: Path, weights: dict[str, Tensor]) -> Path:
    path.unlink()
    index = shard(path.parent, weights)
    (path.parent / "model-00002-of-00003.safetensors").unlink()
    return index


def shard_of_another_model(path: Path, weights: dict[str, Tensor]) -> Path:
    path.unlink()
    index = shard(path.parent, weights)
    save_file({"other": torch.zeros(1)}, path.parent / "model-00002-of-00003.safetensors")
    return index


def index_pointing_elsewhere(path: Path, weights: dict[str, Tensor]) -> Path:
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"gate_mlps.0.out.0.bias": "../model.safetensors"}}))
    return index


def index_of_another_kind(path: Path, weights: dict[str, Tensor]) -> Path:
    index = path.parent / "model.safetensors.index.json"
    index.write_text("[1, 2")
    return index


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated: it has .* bytes of .*; fetch it again"),
        (truncated_header, "is truncated: it has 500 bytes, its header alone"),
        (pickled, "is not a safetensors file; pickled checkpoints are not loaded"),
        (empty, r"\(0 bytes\) is not a safetensors file"),
        (header_of_another_kind, "header: expected object"),
        (without_routers, r"has no gate_mlps\.\* keys"),
        (without_a_key, "does not fit QwenImageTransformer2DModel .1 missing: img_in.weight.; use it with"),
        (with_a_key_too_many, r"1 left over: transformer_blocks\.2\.img_mod\.1\.bias"),
        (with_a_gap_in_the_routers, r"not numbered 0\.\.1: 1 is missing"),
        (of_another_width, r"1 of another shape: img_in\.weight \[48, 64\] instead of \[48, 16\]"),
        (of_another_depth, "has 1 routers, but QwenImageTransformer2DModel has 2 blocks"),
        (quantised, "img_in.weight in .* is I8; weights are F32, F16, BF16"),
        (shard_missing, "refers to 'model-00002-of-00003.safetensors', which is not beside it"),
        (shard_of_another_model, "lacks .* and .* more, which model.safetensors.index.json promises"),
        (index_pointing_elsewhere, "refers to '../model.safetensors', which is not beside it"),
        (index_of_another_kind, "is not an index of sharded safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_checkpoint_says_what_is_wrong(
    damage: Damage, message: str, file: Path, weights: dict[str, Tensor]
) -> None:
    path = damage(file, weights)
    with pytest.raises(ValueError, match=message) as caught:
        load_release(path, build, TRANSFORMER)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_is_all_that_is_read(file: Path, weights: dict[str, Tensor]) -> None:
    assert read_release(file).shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert load_file(file).keys() == weights.keys()


# -- memory ------------------------------------------------------------------------------------


def resident() -> np.ndarray:
    """MiB of this process in memory: all, and what is its own and not a file's."""
    status = Path("/proc/self/status").read_text()
    return np.array(
        [int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) / 1024 for kind in ("VmRSS", "RssAnon")]
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_checkpoint_is_mapped_and_never_copied(tmp_path: Path) -> None:
    """Loading costs next to nothing; using every weight costs the file once, in pages that can be dropped."""

    def build_large() -> Any:
        return QwenImageTransformer2DModel(
            num_layers=4, attention_head_dim=64, num_attention_heads=8, joint_attention_dim=256,
            axes_dims_rope=(16, 24, 24),
        )  # fmt: skip

    with init_empty_weights(include_buffers=False):
        transformer, routers = build_large(), nn.ModuleList(ReleaseRouter(512) for _ in range(4))
    shapes = {**transformer.state_dict(), **{ROUTER_PREFIX + k: v for k, v in routers.state_dict().items()}}
    path = tmp_path / "model.safetensors"
    size = sparse_file(path, {name: list(tensor.shape) for name, tensor in shapes.items()}) / 2**20
    gc.collect()
    before = resident()
    modules = load_release(path, build_large, TRANSFORMER)
    loaded, _ = resident() - before
    total = sum(p.sum().item() for module in modules for p in module.parameters())
    read, anonymous = resident() - before
    assert size > 100
    assert total == 0.0
    assert loaded < 0.2 * size, f"loading took {loaded:.0f} MiB of {size:.0f}"
    assert 0.9 * size < read < 1.2 * size, f"all weights read take {read:.0f} MiB of {size:.0f}"
    assert anonymous < 0.2 * size, f"{anonymous:.0f} MiB were copied"


def sparse_file(path: Path, shapes: dict[str, list[int]]) -> int:
    """A safetensors file of fp32 zeros that takes no disk space; returns its size in bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end
