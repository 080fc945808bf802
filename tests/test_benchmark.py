"""The benchmark runs, its batches are as long as they claim, its naive version computes the same terms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from lengths import batches, read_lengths
from naive import naive_loss, pad_to_published_length

from carma_lib.losses import CarmaConfig, CarmaLoss


def test_a_small_run(tmp_path):
    options = "--device cpu --threads 1 --models small --texts wordnet --batches 1 --rounds 2 --no-memory"
    methods = ["--methods", "carma", "naive", "--out", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "step.py"), *options.split(), *methods]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    report = json.loads((tmp_path / "step_cpu.json").read_text())
    assert [record["method"] for record in report["results"]] == ["fine_tuning", "carma", "naive"]
    assert all(record["ratio_low"] <= record["ratio"] <= record["ratio_high"] for record in report["results"])
    assert (tmp_path / "step_cpu.png").is_file() and (tmp_path / "step_cpu.svg").is_file()


@pytest.mark.parametrize("text", ["wordnet", "sst", "many_pieces"])
def test_batches_have_the_lengths_of_the_texts(text):
    table = read_lengths(BENCHMARKS / "lengths.json")[text]
    made = batches(table, 16, 32, 300)
    real = sum(int(batch["attention_mask"].sum()) for batch in made) / (16 * 32)
    assert real == pytest.approx(table["mean_tokens"], rel=1e-9)
    lengths = [batch["input_ids"].shape[1] for batch in made]
    assert lengths == sorted(lengths) and all(len(batch["target_ids"]) == 16 for batch in made)


def test_naive_version_computes_the_same_terms():
    """Where a draw leaves no choice: one negative in the row, one drawn; and rows without padding."""
    model = tiny_model("gpt2")
    carma = CarmaConfig(carma_weight=0.5, mi_layers=(0, 1), stability_layers=(0, 1), num_negatives=1)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]),
        "attention_mask": torch.ones(2, 3).long(),
        "position_ids": torch.arange(3).repeat(2, 1),
        "constituent_ids": torch.tensor([[0, 0, 1], [0, 0, -1]]),
        "target_ids": torch.tensor([3, 4]),
    }
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    outputs = model(**inputs, output_hidden_states=True)
    task_loss = torch.nn.functional.cross_entropy(outputs.logits[:, -1], batch["target_ids"])
    terms = CarmaLoss(carma)(outputs.hidden_states, batch["constituent_ids"], batch["attention_mask"])
    for every_row in (False, True):  # both rows have the same spans, so it makes no difference here
        torch.testing.assert_close(
            naive_loss(model, batch, carma, every_row), 0.5 * task_loss + 0.5 * terms.total
        )
    padded = pad_to_published_length(batch, 5)
    assert padded["input_ids"].shape == (2, 5) and padded["constituent_ids"][:, :2].eq(-1).all()
    assert padded["attention_mask"].sum() == 6 and padded["target_ids"] is batch["target_ids"]
