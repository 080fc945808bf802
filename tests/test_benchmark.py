"""The benchmark runs, its batches are as long as they claim, its naive version computes the same terms."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import long
import step
from dense import DenseLoss
from lengths import batches, read_lengths
from naive import naive_loss, pad_to_published_length

from carma_lib.losses import CarmaConfig, CarmaLoss


def test_a_small_run(tmp_path, monkeypatch):
    options = "--device cpu --threads 1 --models small --texts wordnet --batches 1 --rounds 2 --no-memory"
    methods = ["--methods", "carma", "naive", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *options.split(), *methods])
    step.main()
    report = json.loads((tmp_path / "step_cpu.json").read_text())
    assert [record["method"] for record in report["results"]] == ["fine_tuning", "carma", "naive"]
    assert all(record["ratio_low"] <= record["ratio"] <= record["ratio_high"] for record in report["results"])


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


def test_long_rows_run_and_the_dense_terms_are_the_same(tmp_path, monkeypatch):
    small = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
                 num_key_value_heads=2)
    monkeypatch.setattr(long, "SHAPE", long.SHAPE | small)
    monkeypatch.setattr(long, "TOKENS", 16)
    options = ["--lengths", "8", "40", "--rounds", "2", "--threads", "1", "--memory-lengths", "--out", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", ["long.py", *options])
    long.main()
    report = json.loads((tmp_path / "a").read_text())
    assert [(each["length"], each["method"]) for each in report["steps"]] == [
        (length, method) for length in (8, 40) for method in long.METHODS
    ]
    assert all(each["ratio_low"] <= each["ratio"] <= each["ratio_high"] for each in report["steps"])
    assert [each["length"] for each in report["terms"]] == [8, 40]
    batch = long.batch_of(40)
    states = [torch.randn(*batch["input_ids"].shape, 6, requires_grad=True) for _ in range(4)]
    config = CarmaConfig(num_negatives=40, mi_layers=(0, 2), stability_layers=(0, 2))
    fast, dense = (make(config)(states, batch["constituent_ids"], batch["attention_mask"], read=(torch.zeros(()),))
                   for make in (CarmaLoss, DenseLoss))
    torch.testing.assert_close(fast, dense)
    for ours, theirs in zip(*(torch.autograd.grad(terms.total, states[1:]) for terms in (fast, dense))):
        torch.testing.assert_close(ours, theirs)
