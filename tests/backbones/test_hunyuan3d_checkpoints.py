"""Reading checkpoints: the published layouts load whole, anything else is refused with a reason."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from backbones.hunyuan3d.checkpoints import load_pipeline, read_weights, save_checkpoint
from backbones.hunyuan3d.config import build, read_config
from backbones.hunyuan3d.schedulers import ConsistencyFlowMatchEulerScheduler
from backbones.model_files import ModelError
from backbones.tiny.recipes.shapes.point_encoder import EncodingShapeVAE
from tests.hunyuan3d_tiny import CONFIG, VAE_PARAMS, components


def write(folder: Path, name: str = "model.safetensors", config=CONFIG, **others) -> Path:
    """A small checkpoint in the published layout, in the format that the file name says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    states = {key: dict(module.state_dict()) for key, module in {**components(), **others}.items()}
    if name.endswith(".ckpt"):
        torch.save(states, folder / name)
    else:
        save_file({f"{c}.{k}": v for c, state in states.items() for k, v in state.items()}, folder / name)
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.fp16.safetensors", "model.ckpt", "model.fp16.ckpt"]
)
def test_both_formats_load_the_same_weights(tmp_path, name):
    pipe = load_pipeline(write(tmp_path, name))
    for key, module in components().items():
        for parameter, tensor in module.state_dict().items():
            assert torch.equal(pipe.components[key].state_dict()[parameter], tensor), f"{key}.{parameter}"
    assert not any(p.is_meta or p.requires_grad for m in pipe.components.values() for p in m.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_weights_stay_memory_mapped(tmp_path, name):
    folder = write(tmp_path, name)
    pipe = load_pipeline(folder)
    maps = Path("/proc/self/maps").read_text()
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in maps.splitlines()
        if str(folder / name) in line
    ]
    for module in pipe.components.values():
        for parameter in module.parameters():
            assert any(low <= parameter.data_ptr() < high for low, high in spans)


def test_dtype_is_cast_and_the_variant_is_preferred(tmp_path):
    write(tmp_path, "model.fp16.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    assert load_pipeline(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    folder = write(tmp_path / "model", "model.ckpt")
    torch.save({"model": {"weight": Evil()}}, folder / "model.ckpt")
    with pytest.raises(ModelError, match="refused"):
        load_pipeline(folder)
    (folder / "model.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError):
        load_pipeline(folder)
    assert not (tmp_path / "pwned").exists()


def test_a_broken_file_is_named(tmp_path):
    folder = write(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        load_pipeline(folder)


def test_of_a_whole_vae_the_decoder_is_read(tmp_path):
    whole = EncodingShapeVAE(**VAE_PARAMS)
    decoder = load_pipeline(write(tmp_path, vae=whole)).vae.state_dict()
    stored = whole.state_dict()
    assert set(stored) - set(decoder) == {key for key in stored if key.startswith(("encoder.", "pre_kl."))}
    assert all(torch.equal(stored[key], tensor) for key, tensor in decoder.items())


def test_missing_left_over_and_misshapen_weights(tmp_path):
    folder = write(tmp_path)
    tensors = {f"{c}.{k}": v for c, m in components().items() for k, v in m.state_dict().items()}

    def attempt(changed, message):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ModelError, match=message):
            load_pipeline(folder)

    attempt({k: v for k, v in tensors.items() if k != "model.cond_in.bias"}, r"1 missing: cond_in\.bias")
    attempt({**tensors, "vae.extra": torch.ones(1)}, "1 left over: extra")
    attempt(
        {**tensors, "model.cond_in.bias": torch.ones(3)},
        r"1 of another shape: cond_in\.bias \[3\] instead of \[32\]",
    )
    attempt({k: v for k, v in tensors.items() if not k.startswith("model.")}, r"weights lack \['model'\]")


def test_a_missing_conditioner_is_tolerated(tmp_path):
    folder = write(tmp_path)
    tensors = {
        f"{c}.{k}": v
        for c, m in components().items()
        for k, v in m.state_dict().items()
        if c != "conditioner"
    }
    save_file(tensors, folder / "model.safetensors")
    assert load_pipeline(folder).conditioner is None


def test_training_dump(tmp_path):
    state = components()["model"].state_dict()
    torch.save(
        {"state_dict": {f"_forward_module.model.{k}": v for k, v in state.items()}, "epoch": 3},
        tmp_path / "d.ckpt",
    )
    assert read_weights(tmp_path / "d.ckpt")["model"].keys() == state.keys()
    torch.save({"state_dict": {"first_stage.x": torch.ones(1)}}, tmp_path / "d.ckpt")
    with pytest.raises(ModelError, match="does not belong"):
        read_weights(tmp_path / "d.ckpt")


def test_yaml_anchors_and_both_module_paths(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model:\n  target: hy3dshape.models.denoisers.hunyuandit.HunYuanDiTPlain\n"
        "  params: {input_size: &num_latents 4096, hidden_size: 32, context_dim: 8, depth: 1, num_heads: 4,"
        " qk_norm: true, qkv_bias: false, text_len: 1370}\n"
        "vae:\n  target: hy3dshape.models.autoencoders.ShapeVAE\n"
        "  params: {num_latents: *num_latents, embed_dim: 8, width: 32, heads: 4, num_decoder_layers: 1}\n"
    )
    config = read_config(tmp_path / "config.yaml")
    assert build("vae", config["vae"]).latent_shape == (4096, 8)
    assert type(build("model", config["model"])).__name__ == "HunYuanDiTPlain"


@pytest.mark.parametrize(
    ("section", "spec", "message"),
    [
        (
            "model",
            {"target": "x.Hunyuan3DDiT", "params": {"hiden_size": 8}},
            r"the settings \['hiden_size'\]",
        ),
        ("model", {"target": "x.AnotherDiT"}, "unknown target 'AnotherDiT'"),
        ("model", {"target": "x.Hunyuan3DDiT", "parms": {}}, "'target' and 'params'"),
        ("scheduler", None, "'target' and 'params'"),
        ("vae", {"target": "ShapeVAE", "params": {"width": 8}}, "num_latents"),
        (
            "conditioner",
            {"target": "SingleImageEncoder", "params": {"main_image_encoder": {"type": "CLIPImageEncoder"}}},
            "CLIP",
        ),
    ],
)
def test_bad_sections_are_refused(section, spec, message):
    with pytest.raises(ModelError, match=message):
        build(section, spec)


def test_ignored_settings_and_schedulers():
    build(
        "model", {"target": "Hunyuan3DDiT", "params": {"use_pe": False, "depth": 0, "depth_single_blocks": 0}}
    )
    spec = {"target": "a.b.ConsistencyFlowMatchEulerDiscreteScheduler", "params": {"pcm_timesteps": 100}}
    assert isinstance(build("scheduler", spec), ConsistencyFlowMatchEulerScheduler)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "models: {}", "!!python/object/apply:os.getcwd []"])
def test_bad_yaml_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ModelError):
        read_config(tmp_path / "config.yaml")


def test_folders_without_a_checkpoint_say_what_is_there(tmp_path):
    write(tmp_path / "repo" / "dit")
    with pytest.raises(ModelError, match="subfolders that have one: dit"):
        load_pipeline(tmp_path / "repo")
    assert load_pipeline(tmp_path / "repo" / "dit").dtype == torch.float32
    (tmp_path / "repo" / "dit" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights are missing"):
        load_pipeline(tmp_path / "repo" / "dit")
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        load_pipeline("no-such-thing")


def test_the_published_tools_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HY3DGEN_MODELS", str(tmp_path))
    write(tmp_path / "tencent" / "Hunyuan3D-2" / "hunyuan3d-dit-v2-0")
    assert load_pipeline("tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0").dtype == torch.float32


def test_saved_checkpoints_load_again(tmp_path):
    pipe = load_pipeline(write(tmp_path / "a"))
    save_checkpoint(tmp_path / "b", read_config(tmp_path / "a" / "config.yaml"), pipe.components)
    again = load_pipeline(tmp_path / "b")
    for name, module in pipe.components.items():
        assert all(
            torch.equal(v, again.components[name].state_dict()[k]) for k, v in module.state_dict().items()
        )
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.yaml", "model.safetensors"]
