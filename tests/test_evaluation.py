"""The long table against one row at a time, without padding, and what is refused."""
import json
import math
import shutil

import pytest
import torch

from carma_lib.lab import evaluate as evaluation
from carma_lib.collate import encode
from carma_lib.lab.evaluate import (Conditions, drift_of_cells, evaluate_cell, evaluate_cells, evaluation_rows, replaced_rows,
                                  trained_cells)
from carma_lib.lab.experiment import Cell, Settings, make_start
from carma_lib.losses import CarmaConfig
from carma_lib.models import load_model, prompt_for
from carma_lib.pooling import constituent_aware_pooling
from carma_lib.stats.table import read_results
from carma_lib.tasks import build_task, task_named

TASK = "controlled_inverse_dictionary"
CARMA = CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1))
SETTINGS = Settings(carma=CARMA, layers=3, width=16, heads=2, vocabulary_size=400)
CONDITIONS = Conditions(rates=(0.25, 0.4), depth_shares=(0.5, 1.0), protocols=("sum", "max"), test_items=12, pooled_items=7,
                        splits=("test_held_out", "test_longer"), batch_size=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_task(TASK, folder / "data" / TASK)
    for seed in (1, 2):
        cell = Cell(TASK, "untuned", seed)
        make_start(folder, cell, SETTINGS)
        trained = folder / "models" / Cell(TASK, "carma", seed).place  # as good as trained, for this table
        shutil.copytree(folder / "models" / cell.place, trained)
        facts = json.loads((trained / "cell.json").read_text())
        (trained / "cell.json").write_text(json.dumps({**facts, "method": "carma", "budget": 9}))
    return folder


@pytest.fixture(scope="module")
def results(run):
    return read_results(evaluate_cells(run, trained_cells(run), CONDITIONS, workers=1))


def test_a_row_for_every_item_and_condition(results):
    counts = results.groupby(["method", "seed", "split", "condition"], observed=True).size()
    assert counts.xs("clean", level="condition").eq(12).all() and len(counts) == 2 * 2 * (3 + 1)
    assert counts["carma"].xs("replaced", level="condition").eq(2 * 12).all()
    assert counts["carma"].xs("pooled", level="condition").eq(2 * 2 * 2 * 7).all(), "layers × protocols × levels × items"
    assert set(results.budget) == {0, 9} and set(results.start.astype(str)) == {"random"}
    assert set(results[results.condition == "replaced"].source.astype(str)) == {"controlled"}


@torch.no_grad()
def test_clean_and_pooled_answers_equal_one_row_at_a_time(run, results):
    model, tokenizer = load_model(str(run / "models" / Cell(TASK, "carma", 2).place))
    model.eval()
    prompt = prompt_for("inverse_dictionary")
    table = results[(results.method == "carma") & (results.seed == 2) & (results.split == "test_longer")].set_index("item_id")
    rows = evaluation_rows(run, TASK, CONDITIONS)["test_longer"].select(range(7))
    for level in ("word", "phrase"):
        for row in encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, level=level):
            ids = torch.tensor([row["input_ids"]])
            runs = {(-1, ""): model(input_ids=ids).logits[0, -1]}
            for layer in (1, 2):
                for protocol in ("sum", "max"):
                    runs[layer, protocol] = constituent_aware_pooling(
                        model, ids, torch.ones_like(ids), torch.tensor([row["constituent_ids"]]),
                        start_layer=layer, protocol=protocol)[0]
            answers = table.loc[[row["item_id"]]]
            for (layer, protocol), logits in runs.items():
                answer = answers[(answers.start_layer == layer) & (answers.protocol == protocol)
                                 & answers.level.isin([level] if layer >= 0 else [""])
                                 & (answers.condition != "replaced")].iloc[0]
                of_target = logits.log_softmax(-1)[row["target_id"]].item()
                assert answer.log_probability == pytest.approx(of_target, abs=1e-4)
                assert answer["rank"] == 1 + sum(value > logits[row["target_id"]] + 1e-7 for value in logits)
                assert answer.prediction == tokenizer.decode([logits.argmax()]).strip()
                assert answer.correct == (logits.argmax() == row["target_id"])


def test_replaced_texts_count_their_changes_and_leave_the_target_out(run, results):
    for split, rows in evaluation_rows(run, TASK, CONDITIONS).items():
        changed, made = replaced_rows(rows, rate=0.4, seed=0, cache_dir=run / "cache", **task_named(TASK).replacement(rows))
        table = results[(results.method == "carma") & (results.seed == 1) & (results.split == split) & (results.rate == 0.4)].set_index("item_id")
        assert [table.loc[item].changed for item in rows["item_id"]] == made and sum(made) > 0
        for before, after, target, number in zip(rows["text"], changed["text"], rows["target"], made):
            assert (before != after) == (number > 0) and target not in after.lower().split()


def test_evaluation_is_kept_and_other_conditions_are_not_taken_for_it(run, results):
    cell = Cell(TASK, "carma", 1)
    path = evaluate_cell(run, cell, CONDITIONS)
    stamp = path.stat().st_mtime_ns
    assert evaluate_cell(run, cell, CONDITIONS).stat().st_mtime_ns == stamp
    other = evaluate_cell(run, cell, Conditions(rates=(), depth_shares=(), test_items=3, splits=("test_seen",)))
    assert other != path and len(read_results(other)) == 3


def test_score_by_hand():
    frame = evaluation._score(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]), torch.tensor([2, 2]))
    assert frame.prediction.tolist() == [1, 2] and frame.correct.tolist() == [False, True]
    assert frame["rank"].tolist() == [2, 1]
    expected = 2 - math.log(sum(math.exp(value) for value in (1, 3, 2)))
    assert frame.prediction_probability[0] == pytest.approx(math.exp(expected + 1), abs=1e-6)
    assert frame.log_probability[0] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        evaluation._score(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]))


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(rates=(0.0,)), "rates must lie in"), (dict(rates=(1.5,)), "rates must lie in"),
    (dict(depth_shares=(2,)), "depth_shares must lie in"), (dict(protocols=("median",)), "unknown protocols"),
    (dict(levels=("letter",)), "unknown levels"), (dict(batch_size=0), "batch_size must be")])
def test_conditions_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Conditions(**wrong)


def test_unknown_split_and_missing_models(run, tmp_path):
    with pytest.raises(ValueError, match="has no split 'test_longest'; it has train"):
        evaluation_rows(run, TASK, Conditions(splits=("test_longest",)))
    with pytest.raises(FileNotFoundError, match="run notebook 02 first"):
        trained_cells(tmp_path)


def test_drift_of_trained_cells_is_written(run):
    cells = [Cell(TASK, method, seed) for method in ("untuned", "carma") for seed in (1, 2)]
    table = drift_of_cells(run, cells, items=5)
    assert set(table.method) == {"carma"} and set(table.layer) == {-1, 0, 1, 2} and len(table) == 8
    assert table.drift.eq(0).all(), "the carma cells here are copies of their starts"
    assert (table.perplexity == table.start_perplexity).all() and (run / "drift.csv").is_file()
