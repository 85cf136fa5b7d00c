"""Single files with packed weights: fp8 with scales beside it, and GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from backbones import registry
from backbones.loading import load
from backbones.model_files import ModelError
from backbones.spec import Placement
from backbones.weights import load_transformer
from routers.packed import is_packed
from tests.backbones.test_single_file import stored, to_original
from tests.cli.test_cli_generate import pixels

FP8 = torch.float8_e4m3fn


def in_fp8(weights: dict[str, torch.Tensor], name: str, by_row: bool = False) -> dict[str, torch.Tensor]:
    """A file's tensors with fp8 matrices. name: of the scales."""
    file: dict[str, torch.Tensor] = {"scaled_fp8": torch.empty(0, dtype=FP8)}
    for key, tensor in weights.items():
        if tensor.dim() != 2:
            file[key] = tensor.contiguous()
            continue
        most = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().max()
        scale = most / torch.finfo(FP8).max
        file[key] = (tensor / scale).to(FP8)
        file[f"{key.removesuffix('.weight')}{name}"] = scale
        file[f"{key.removesuffix('.weight')}.scale_input"] = torch.ones(())
    return file


def read(file: dict[str, torch.Tensor], path: Path, base: Path) -> dict[str, torch.Tensor]:
    save_file(file, path)
    backbone = registry.resolve(str(path), str(base))
    assert backbone.transformer_parameters == registry.resolve(str(base)).transformer_parameters
    transformer = load_transformer(backbone, torch.float32)
    return dict(transformer.state_dict())


@pytest.mark.parametrize(("name", "by_row"), [(".scale_weight", False), (".weight_scale", True)])
def test_scaled_fp8_is_read_with_its_scales(name, by_row, flux_folder, tmp_path):
    weights = stored(flux_folder)
    found = read(in_fp8(to_original(weights), name, by_row), tmp_path / "file.safetensors", flux_folder)
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert (found[key] - tensor).abs().max() <= 0.07 * tensor.abs().max(), key
    assert any(not torch.equal(found[key], weights[key]) for key in found)


def test_other_packings_are_refused(flux_folder, tmp_path):
    file = in_fp8(to_original(stored(flux_folder)), ".weight_scale")
    told = torch.tensor(list(json.dumps({"format": "mxfp8"}).encode()), dtype=torch.uint8)
    with pytest.raises(ModelError, match="has weights in mxfp8; scaled fp8 and GGUF are read, others not"):
        read({**file, "img_in.comfy_quant": told}, tmp_path / "a.safetensors", flux_folder)
    with pytest.raises(ModelError, match=r"'img_in\.weight_scale' is neither one scale nor one for each of"):
        read({**file, "img_in.weight_scale": torch.ones(3)}, tmp_path / "b.safetensors", flux_folder)


@pytest.mark.slow
def test_a_plain_fp8_file_stays_in_fp8_and_draws_the_same(flux_folder, edit_here, tmp_path):
    plain = {key: tensor.to(FP8) for key, tensor in to_original(stored(flux_folder)).items()}
    file = tmp_path / "plain.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in plain.items()}, file)
    typed = ["generate", "a cat", "-m", file, "--base", flux_folder, "--steps", "4", "--budget", "0.5"]
    typed += ["--routers", "none", "--dtype", "fp32", "-q", "--json"]
    for name, more in (("wide", ()), ("narrow", ("--quantize", "fp8"))):
        ran = edit_here(*typed, *more, "-o", f"{name}.png", cwd=tmp_path)
        assert ran.code == 0, ran.err
    assert (pixels(tmp_path / "wide.png") == pixels(tmp_path / "narrow.png")).all()

    backbone = registry.resolve(str(file), str(flux_folder))
    transformer = load(backbone, Placement("cpu", "fp32", quantize="fp8")).transformer
    held = sum(parameter.nbytes for parameter in transformer.parameters())
    assert held < 0.6 * 4 * backbone.transformer_parameters
    forecasts = {}
    for more in ((), ("--quantize", "fp8")):
        forecasts[more] = edit_here(*typed, *more, "--dry-run", cwd=tmp_path).json["memory_gib"]
    saved = forecasts[()]["device"] - forecasts["--quantize", "fp8"]["device"]
    assert saved * 2**30 == pytest.approx(4 * backbone.transformer_parameters - held, rel=0.05)


def test_single_files_that_casting_would_harm_are_refused_fp8(flux_folder, edit_here, tmp_path):
    save_file(in_fp8(to_original(stored(flux_folder)), ".weight_scale"), tmp_path / "a.safetensors")
    typed = ["generate", "a cat", "-m", tmp_path / "a.safetensors", "--base", flux_folder]
    for how, told in (
        ("fp8", "its fp8 weights have scales"),
        ("int8", "of single files the only way is fp8"),
    ):
        ran = edit_here(*typed, "--quantize", how, cwd=tmp_path)
        assert ran.code == 2 and told in ran.err and len(ran.err.splitlines()) == 1


def write_gguf(weights: dict[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Matrices whose rows can be cut into blocks of 32 as Q8_0, the rest in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in weights.items():
        data = tensor.float().numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_a_gguf_file_generates_nearly_what_its_folder_does(kind, request, edit_here, tmp_path):
    folder = request.getfixturevalue(f"{kind}_folder")
    weights, file = stored(folder), tmp_path / "model.gguf"
    write_gguf(to_original(weights) if kind == "flux" else weights, file, kind)
    backbone = registry.resolve(str(file), str(folder))
    assert backbone.transformer_parameters == registry.resolve(str(folder)).transformer_parameters
    transformer = load_transformer(backbone, torch.float32)
    assert any(map(is_packed, transformer.modules()))
    assert not any(parameter.is_meta for parameter in transformer.parameters())
    typed = ["generate", "a cat", "--routers", "none", "--budget", "0.5", "--steps", "4", "-q", "--json"]
    for name, model in (("file", [file, "--base", folder]), ("folder", [folder])):
        ran = edit_here(*typed, "-m", *model, "-o", f"{name}.png", cwd=tmp_path)
        assert ran.code == 0, ran.err
        assert ran.json["spent"] == [0.5]
    apart = pixels(tmp_path / "file.png").astype(float) - pixels(tmp_path / "folder.png").astype(float)
    assert abs(apart).mean() < 4
    ran = edit_here(*typed, "-m", file, "--base", folder, "--dry-run", cwd=tmp_path)
    assert ran.code == 0, ran.err


def test_a_damaged_gguf_file_is_refused_in_one_line(edit_here, flux_folder, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(40))
    ran = edit_here("generate", "a cat", "-m", file, "--base", flux_folder, cwd=tmp_path)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert "is not a complete GGUF file" in ran.err
    whole = to_original(stored(flux_folder))
    del whole["double_blocks.0.img_attn.qkv.bias"]
    write_gguf(whole, file, "flux")
    ran = edit_here("generate", "a cat", "-m", file, "--base", flux_folder, cwd=tmp_path)
    assert ran.code == 2
    assert "1 tensors are missing, for example 'double_blocks.0.img_attn.qkv.bias'" in ran.err
