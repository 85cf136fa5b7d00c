"""Parity with recorded runs of the published Hunyuan3D code, and that the runner notices what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.__main__ import main
from tests.golden.key_tables import TABLES, build_on_meta, check_table, read_table
from tests.golden.runner import run_case

DATA = Path(__file__).parents[1] / "golden" / "data"
CASES = sorted(p.parent.name for p in DATA.glob("*/config.json") if not p.parent.name.startswith("edit_"))
SUMMARY = json.loads((DATA / "keys" / "summary.json").read_text())["summary"]


def test_every_family_is_there():
    assert len(CASES) == 18


@pytest.mark.parametrize("name", CASES)
def test_matches_the_recorded_run(name):
    report = run_case(DATA / name)
    assert report.ok, report.details()


@pytest.mark.parametrize("name", TABLES)
def test_full_size_keys_fit_exactly(name):
    assert check_table(DATA / "keys" / f"{name}.json") == SUMMARY[name]["tensors"]
    parameters = sum(p.numel() for p in build_on_meta(name).state_dict().values())
    assert parameters == SUMMARY[name]["params"]


def test_a_table_with_one_key_more_or_less_is_refused(tmp_path):
    from backbones.model_files import ModelError, check_keys

    table = read_table(DATA / "keys" / "model.v2_mini.json")
    module = build_on_meta("model.v2_mini")
    with pytest.raises(ModelError, match="1 left over: extra"):
        check_keys(module, {**table, "extra": (1,)}, "model")
    del table["cond_in.bias"]
    with pytest.raises(ModelError, match=r"1 missing: cond_in\.bias"):
        check_keys(module, table, "model")


def _copy(name: str, target: Path) -> Path:
    return Path(shutil.copytree(DATA / name, target / name))


def _edit(path: Path, key: str, change) -> None:
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("hunyuan3d_dit_v2", "single_blocks.1.linear2.bias"),
        ("hunyuan3d_dit_v2_guidance", "single_blocks.1.linear2.bias"),
        ("sampling_loop_turbo", "final_layer.linear.bias"),
        ("hunyuan3d_dit_v21", "blocks.4.moe.shared_experts.net.2.bias"),
        ("shapevae_decode", "geo_decoder.ln_post.weight"),
    ],
)
def test_a_changed_weight_fails(tmp_path, case, key):
    folder = _copy(case, tmp_path)
    _edit(folder / "weights.safetensors", key, lambda w: w + 1e-2)
    assert not run_case(folder).ok


def test_a_changed_intermediate_fails(tmp_path):
    folder = _copy("hunyuan3d_dit_v2", tmp_path)
    _edit(folder / "outputs.safetensors", "mid.double_0.cond", lambda x: x + 1e-3)
    report = run_case(folder)
    assert [c.name for c in report.comparisons if not c.ok] == ["mid.double_0.cond"]


def test_an_unknown_recorded_output_fails(tmp_path):
    folder = _copy("fourier_embedder", tmp_path)
    tensors = load_file(folder / "outputs.safetensors")
    save_file({**tensors, "mid.surprise": torch.zeros(2)}, folder / "outputs.safetensors")
    assert not run_case(folder).ok


def test_exit_status_and_lines(tmp_path, capsys):
    good = DATA / "flow_match_scheduler"
    assert main([str(good)]) == 0
    name, difference, _tolerance, verdict = capsys.readouterr().out.split()
    assert (name, verdict) == ("flow_match_scheduler", "ok")
    assert float(difference) <= 2e-5

    unknown = _copy("flow_match_scheduler", tmp_path)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "case": "another_model"}))
    assert main([str(good), str(unknown), str(tmp_path / "nowhere")]) == 1
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["ok", "FAIL", "FAIL"]
