"""Held-out pairs scored by reward models: the figures, the files, and the command for pairs of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from actors.models.base.loading import load_tokenizer
from actors.models.spec import ModelSpec, Quantization
from actors.trainer.model_host import ModelHost
from pipeline.cli.app import main
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import TokenizedData, tokenize
from pipeline.evaluation import pairs
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.pairs import evaluate_pairs, pair_figures, score_pairs
from tests.actors.trainer.host_cases import host_spec

ROWS = [{"prompt": f"{n}+1=?", "chosen": f"{n + 1}", "rejected": f"{n + 2}, I think"} for n in range(7)]


@pytest.fixture(scope="module")
def reward_model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that was never trained."""
    return write_reward_model(tiny_base, tmp_path_factory.mktemp("reward") / "adapter")


def write_reward_model(base: Path, path: Path, quantization: Quantization | None = None) -> Path:
    host = ModelHost(host_spec(base, quantization=quantization))
    host.add_adapter("reward")
    host.add_head("reward", "normal")
    host.saving.save_adapter("reward", path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def tokens(data: Path, base: Path) -> TokenizedData:
    records = load_records([DataSpec(source=str(data))], "preference", seed=0)
    return tokenize(records, load_tokenizer(ModelSpec(base=str(base))), scored=True)


def test_a_tie_is_no_success_and_the_interval_is_wilsons() -> None:
    figures = pair_figures(np.array([[2.0, 1.0], [0.5, 0.5], [-1.0, 1.0], [3.0, 0.0]]))
    assert (figures["accuracy"], figures["n"]) == (0.5, 4)
    assert figures["ci95"] == list(wilson(2, 4))
    assert figures["margin"] == pytest.approx(0.5)
    assert figures["metric"] == "pair_accuracy"


def test_scores_are_the_same_in_calls_of_any_size(
    data: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tokens(data, tiny_base)

    def lengths(batch: object) -> np.ndarray:
        return batch.lengths.astype(float)  # type: ignore[attr-defined]

    expected = found.lengths.reshape(-1, 2)
    assert np.array_equal(score_pairs(lengths, found), expected)
    monkeypatch.setattr(pairs, "ROWS_PER_CALL", 3)
    assert np.array_equal(score_pairs(lengths, found), expected)


def test_an_evaluation_writes_its_figures_and_every_pair_with_its_texts(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(ModelSpec(base=str(tiny_base)))
    found = tokens(data, tiny_base)
    result = evaluate_pairs(
        "reward", lambda batch: -batch.lengths.astype(float), found, tokenizer, tmp_path / "eval", "key"
    )
    assert result["accuracy"] == 1.0
    assert json.loads((tmp_path / "eval" / "reward.json").read_text()) == result
    lines = [json.loads(line) for line in (tmp_path / "eval" / "reward.jsonl").read_text().splitlines()]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS, strict=True):
        assert row["prompt"] in line["prompt"]
        assert line["chosen"].startswith(row["chosen"])
        assert line["rejected"].startswith(row["rejected"])
        assert line["score"] == float(line["chosen_score"] > line["rejected_score"])


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_eval_scores_pairs_of_ones_own_with_a_reward_model(
    quantization: Quantization | None,
    data: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward_model = write_reward_model(tiny_base, tmp_path / "adapter", quantization)
    out = tmp_path / "scores.jsonl"
    assert main(["eval", str(reward_model), "--pairs", str(data), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    host = ModelHost(host_spec(tiny_base, quantization=quantization))
    host.add_adapter("reward", reward_model)
    expected = host.scores.scores(tokens(data, tiny_base).sequences, "reward").reshape(-1, 2)
    found = [[line["chosen_score"], line["rejected_score"]] for line in lines]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    said = capsys.readouterr().out
    assert f"in {np.mean(expected[:, 0] > expected[:, 1]):.1%} of 7 pairs" in said


def test_eval_refuses_what_is_no_reward_model(
    reward_model: Path, data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_base), "--pairs", str(data)]) == 2
    policy = ModelHost(host_spec(tiny_base))
    policy.add_adapter("policy")
    policy.saving.save_adapter("policy", tmp_path / "policy")
    assert main(["eval", str(tmp_path / "policy"), "--pairs", str(data)]) == 2
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "adapter_config.json").write_text((reward_model / "adapter_config.json").read_text())
    tensors = load_file(reward_model / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = tensors["base_model.model.score.weight"].repeat(2, 1)
    save_file(tensors, wide / "adapter_model.safetensors")
    assert main(["eval", str(wide), "--pairs", str(data)]) == 2
    said = capsys.readouterr().err
    assert "adapter_config.json is missing" in said
    assert "has no score head" in said
    assert "head of shape (2, 128)" in said
