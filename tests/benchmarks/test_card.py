"""The card's benchmark runs anywhere with the packaged models, and its lines make its table."""

from __future__ import annotations

import json

import pytest

from benchmarks import card


@pytest.mark.slow
def test_every_section_runs_small(tmp_path, capsys) -> None:
    file = tmp_path / "card.jsonl"
    assert card.main(["--small", "--device", "cpu", "--out", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for section in card.SMALL:
        plans = [line for line in lines if line["section"] == section.name and line["what"] == "plan"]
        assert [line["budget"] for line in plans] == [1.0, *card.BUDGETS]
        assert [line["share"] for line in plans] == pytest.approx([1.0, 0.4, 0.6, 0.8])
        assert all(line["seconds"] > 0 for line in plans)
    assert lines[0]["what"] == "decoding" and 0 < lines[0]["evaluated"] < 0.5
    assert not [line for line in lines if line["what"] in ("failed", "left out")]
    assert any(line["what"] == "mix" for line in lines)
    capsys.readouterr()
    card.main(["--markdown", str(file)])
    assert capsys.readouterr().out.count("\n") == 2 + 4 * len(card.SMALL) + 2 * len(card.BUDGETS)


def test_without_a_card_it_says_how_to_run(capsys) -> None:
    with pytest.raises(SystemExit):
        card.main(["--device", "cpu"])
    assert "--small runs the packaged models" in capsys.readouterr().err
