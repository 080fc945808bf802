"""Trainings of a study: one start a seed, done once, gone on with after a break, and never half there."""
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from carma_lib.lab.experiment import (Cell, Settings, encode_task, fine_tune, is_done, make_start, one_gpu,
                                  read_histories, run_parallel, tidy_history, train_cells)
from carma_lib.losses import CarmaConfig
from carma_lib.tasks import DataNotFound, build_task

TASK = "controlled_sentiment"
CARMA = CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1))
SETTINGS = Settings(carma=CARMA, layers=2, width=16, heads=2, vocabulary_size=400, steps=6, batch_size=8,
                    warmup_steps=1, evaluations=2, training_items=64, validation_items=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_task(TASK, folder / "data" / TASK)
    make_start(folder, Cell(TASK, "untuned", 1), SETTINGS)
    return folder


def weights(run, method, seed=1):
    return load_file(run / "models" / TASK / method / f"seed-{seed}" / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_training_starts_from_the_untuned_model_and_is_done_once(run):
    cell = Cell(TASK, "carma", 1)
    folder = fine_tune(run, cell, SETTINGS)
    assert is_done(run, cell, SETTINGS) and not (run / "work" / cell.place).exists()
    assert not same(weights(run, "untuned"), weights(run, "carma"))
    before = (folder / "cell.json").stat().st_mtime_ns
    fine_tune(run, cell, SETTINGS)
    assert (folder / "cell.json").stat().st_mtime_ns == before
    history = read_histories(run)
    assert set(history.step) == {3, 6} and history.validation_accuracy.notna().all()
    assert history[["task_loss", "mutual_information", "stability"]].notna().all().all()
    fine_tune(run, Cell(TASK, "fine_tuning", 1), SETTINGS)
    plain = read_histories(run).query("method == 'fine_tuning'")
    assert (plain.task_loss == plain.loss).all() and (plain.weighted_task_loss == plain.loss).all()


def test_other_settings_or_data_are_not_taken_for_done(run):
    from dataclasses import replace

    cell = Cell(TASK, "carma", 1)
    fine_tune(run, cell, SETTINGS)
    assert not is_done(run, cell, replace(SETTINGS, steps=7))
    assert not is_done(run, Cell(TASK, "carma", 2), SETTINGS)


def test_weight_zero_gives_the_weights_of_fine_tuning(run, tmp_path):
    from dataclasses import replace

    shutil.copytree(run / "data", tmp_path / "data")
    zero = replace(SETTINGS, carma=replace(CARMA, carma_weight=0.0))
    for method in ("fine_tuning", "carma"):
        make_start(tmp_path, Cell(TASK, "untuned", 1), zero)
        fine_tune(tmp_path, Cell(TASK, method, 1), zero)
    assert same(weights(tmp_path, "fine_tuning"), weights(tmp_path, "carma"))


def test_a_training_broken_off_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    from carma_lib import trainer as training

    cell = Cell(TASK, "carma", 1)
    fine_tune(run, cell, SETTINGS)
    shutil.copytree(run / "data", tmp_path / "data")
    make_start(tmp_path, Cell(TASK, "untuned", 1), SETTINGS)
    whole, count = training.CarmaTrainer.training_step, 0

    def breaks(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return whole(self, *arguments, **named)

    monkeypatch.setattr(training.CarmaTrainer, "training_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path, cell, SETTINGS)
    assert not is_done(tmp_path, cell, SETTINGS) and not (tmp_path / "models" / cell.place).exists()
    assert list((tmp_path / "work" / cell.place).glob("checkpoint-3"))
    torn = tmp_path / "work" / cell.place / "checkpoint-4"  # killed while it was written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(training.CarmaTrainer, "training_step", whole)
    fine_tune(tmp_path, cell, SETTINGS)
    assert same(weights(run, "carma"), weights(tmp_path, "carma"))
    columns = ["step", "task_loss", "mutual_information", "stability", "validation_accuracy"]
    first, second = (read_histories(folder).query("method == 'carma' and seed == 1") for folder in (run, tmp_path))
    pd.testing.assert_frame_equal(first[columns].reset_index(drop=True), second[columns].reset_index(drop=True))


def test_parallel_trainings_equal_one_by_one(run, tmp_path):
    fine_tune(run, Cell(TASK, "carma", 1), SETTINGS)
    shutil.copytree(run / "data", tmp_path / "data")
    cells = [Cell(TASK, method, 1) for method in ("fine_tuning", "carma")]
    folders = train_cells(tmp_path, cells, SETTINGS, workers=2)
    assert [json.loads((folder / "cell.json").read_text())["method"] for folder in folders] == ["fine_tuning", "carma"]
    assert same(weights(run, "carma"), weights(tmp_path, "carma"))


def test_synonym_augmentation_trains_on_both_wordings(run):
    plain = encode_task(run, TASK, "gpt2", SETTINGS)["train"]
    both = encode_task(run, TASK, "gpt2", SETTINGS, augmented=True)["train"]
    assert len(both) == 2 * len(plain) and both["text"][:len(plain)] == plain["text"]
    copies = both["text"][len(plain):]
    assert both["target"][len(plain):] == plain["target"] and 0 < sum(a != b for a, b in zip(plain["text"], copies))
    fine_tune(run, Cell(TASK, "synonym_augmentation", 1), SETTINGS)
    assert json.loads((run / "models" / TASK / "synonym_augmentation" / "seed-1" / "cell.json").read_text())[
        "training_rows"] == len(both)


def test_history_joins_what_one_step_logged():
    log = [{"step": 2, "loss": 1.0}, {"step": 2, "eval_accuracy": 0.5, "eval_runtime": 3.0}, {"step": 4, "loss": 0.5},
           {"step": 4, "train_loss": 9.0, "train_runtime": 1.0}]
    history = tidy_history(log)
    assert history.to_dict("list")["step"] == [2, 4] and "validation_runtime" not in history
    assert history.validation_accuracy[0] == 0.5 and "train_loss" not in history


def fails(number):
    if number == 1:
        raise ValueError("the second one")
    return number


def test_parallel_gives_results_in_order_and_the_first_error():
    assert run_parallel(abs, [(-1,), (-2,), (-3,)], workers=2, description="abs") == [1, 2, 3]
    with pytest.raises(ValueError, match="the second one"):
        run_parallel(fails, [(0,), (1,), (2,)], workers=1, description="fails")


def test_unknown_names_and_missing_data(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'x'; the tasks are controlled"):
        Cell("x", "carma", 1)
    with pytest.raises(ValueError, match="unknown method 'x'; the methods are untuned"):
        Cell(TASK, "x", 1)
    with pytest.raises(DataNotFound, match="build them first"):
        make_start(tmp_path, Cell(TASK, "untuned", 1), SETTINGS)
    with pytest.raises(ValueError, match="workers is 0"):
        run_parallel(abs, [(1,)], workers=0, description="x")
    with pytest.raises(FileNotFoundError, match="run notebook 02 first"):
        read_histories(tmp_path)


def test_a_pretrained_folder_is_a_start_and_rows_of_several_token_answers_are_left_out(run, tmp_path):
    from dataclasses import replace

    from carma_lib.lab.evaluate import Conditions, drift_of_cells, evaluate_cells
    from carma_lib.models import small_model, train_tokenizer
    from carma_lib.stats.table import read_results
    from carma_lib.tasks import load_task

    task = "controlled_inverse_dictionary"
    rows = build_task(task, tmp_path / "data" / task)
    known = sorted(rows["train"].unique("target"))[:150]
    tokenizer = train_tokenizer(rows["train"]["text"], vocabulary_size=400, whole_tokens=known)
    for part in (small_model("llama", tokenizer, layers=2, width=16, heads=2), tokenizer):
        part.save_pretrained(tmp_path / "pretrained")
    settings = replace(SETTINGS, start=str(tmp_path / "pretrained"), training_items=0)
    cell = Cell(task, "carma", 1)
    train_cells(tmp_path, [cell], settings)
    facts = json.loads((tmp_path / "models" / cell.place / "cell.json").read_text())
    expected = sum(target in known for target in rows["train"]["target"])
    assert 0 < facts["training_rows"] == expected < len(rows["train"])
    conditions = Conditions(rates=(0.25,), depth_shares=(1.0,), protocols=("mean",), levels=("word",),
                            splits=("test_seen",), test_items=30)
    results = read_results(evaluate_cells(tmp_path, [cell], conditions))
    asked = [target for target in load_task(tmp_path / "data" / task)["test_seen"]["target"][:30] if target in known]
    assert results[results.condition == "replaced"].target.astype(str).tolist() == asked
    cells = [Cell(task, "untuned", 1), cell]
    assert drift_of_cells(tmp_path, cells, items=20).drift.gt(0).any()


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path):
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=8)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2  # as where two are seen
    assert arguments.train_batch_size == 16 and one_gpu(arguments).train_batch_size == 8
