"""What a calibration will take is said before it starts: without weights, and once they are there."""

from __future__ import annotations

import json
import re

import pytest
import torch

from edit_cli.calibrate.calibration import Calibration
from edit_cli.calibrate.forecast import Work
from edit_cli.calibrate.plan import make_calibration_plan
from edit_cli.request import Request
from routers.calibrate.fit import fit


@pytest.mark.parametrize("options", [{}, {"budgets": (0.5,)}, {"target": "both"}, {"budgets": (0.1, 0.5)}])
def test_a_fit_makes_no_more_evaluations_than_are_forecast(options, qwen_folder, tmp_path):
    request = Request({"model": str(qwen_folder), "output": str(tmp_path / "b"), "method": "fit", **options})
    plan = make_calibration_plan(request.but(samples=1, steps=6))
    calibration, made = Calibration.open(plan), []
    backbone, pipe = plan.generation.backbone, calibration.session.pipe
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: made.append(1))
    fit(pipe.transformer, backbone.family.transformer, calibration.train, "tiny", 4.0, plan.fitted)
    handle.remove()
    planned = sum(Work.of(plan).fit)
    assert 0.6 * planned <= len(made) / 2 <= planned, "two branches of guidance"


@pytest.mark.slow
def test_a_published_model_is_forecast_without_its_weights(edit_here, tmp_path):
    ran = edit_here("calibrate", "-m", "qwen-image", "-o", "bundle", "--dry-run", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    needed = ran.json["memory_gib"]
    assert needed["device"] > 40 and needed["cache"] > 0.05 and needed["dtype"] in ("bf16", "fp32")
    assert ran.json["generations"]["fit"] <= 20 and ran.json["generations"]["measure"] < 10
    assert ran.json["seconds"]["at_least"] > 10


def test_a_dry_run_counts_and_writes_nothing(edit_here, qwen_folder, tmp_path):
    asked = ["calibrate", "-m", qwen_folder, "-o", "bundle", "--dry-run", "--samples", "2"]
    ran = edit_here(*asked, cwd=tmp_path)
    assert ran.code == 0, ran.err
    told = " ".join((ran.out + ran.err).split())
    assert "dense generations of 2 to fit plans" in told and "GiB in fp32" in told
    every, one = (
        edit_here(*asked, *more, "--json", "-q", cwd=tmp_path).json for more in ((), ("--budgets", "0.5"))
    )
    assert one["generations"] == {"fit": 2.0, "measure": 7.0}, "8 held out, in pairs, and one to warm up"
    assert one["flops"] < every["flops"] and one["evaluations"] < every["evaluations"]
    assert list(tmp_path.iterdir()) == []


def test_the_time_is_told_before_it_begins(edit_here, qwen_folder, tmp_path):
    asked = ["calibrate", "-m", qwen_folder, "-o", "bundle", "--budgets", "0.5", "--samples", "1"]
    ran = edit_here(*asked, "--steps", "4", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    line = next(line for line in ran.err.splitlines() if line.startswith("about "))
    found = re.match(
        r"about (\d+) s: 2 dense generations of 1 to fit plans, 13 to measure them; at most", line
    )
    assert found, line
    seconds = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["metadata"]["seconds"]
    assert int(found[1]) <= 3 * sum(seconds.values()) + 2 * torch.get_num_threads()


def test_a_training_is_not_forecast(edit_here, tmp_path):
    words = ["calibrate", "-o", "bundle", "--dry-run", "--method", "train", "--budgets", "0.5:1"]
    ran = edit_here(*words, cwd=tmp_path)
    assert ran.code == 2 and "--dry-run forecasts --method fit" in ran.err
