"""The pretrained path on real WordNet: epochs, adapters, bf16, checkpointing, FSDP, evaluation, from a local folder."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_pretrained import save_small_pretrained, training_texts

from carma_lib.lab import experiment
from carma_lib.lab.evaluate import Conditions, drift_of_cell, evaluate_cell
from carma_lib.lab.experiment import Cell, fine_tune, fine_tune_in_processes, make_starts, read_histories, train_cells
from carma_lib.files import read_json
from carma_lib.lab.memory import NotEnoughMemory
from carma_lib.stats.table import read_results
from carma_lib.lab.settings import fill
from carma_lib.report.tables import beside_published, paper_table
from carma_lib.tasks import build_task, load_task

TASK, KIND, SMALL_TASK = "wordnet_inverse_dictionary", "inverse_dictionary", "controlled_sentiment"
OPEN = dict(seeds=[], steps={KIND: 2}, batch_size=8, learning_rate=-1, warmup_steps=1, carma_weight=-1, mi_weight=-1,
            stability_weight=-1, mi_layers=[], stability_layers=[], training_items=200, validation_items=100,
            evaluations=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory, wordnet_database):
    folder = tmp_path_factory.mktemp("data")
    build_task(TASK, folder / TASK, split_by="row")
    build_task(SMALL_TASK, folder / SMALL_TASK)
    return folder


@pytest.fixture
def run(data, tmp_path):
    shutil.copytree(data, tmp_path / "run" / "data")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def starts(tmp_path_factory, data):
    folder, rows = tmp_path_factory.mktemp("starts"), load_task(data / TASK)["train"]
    texts = training_texts(rows["text"][:], rows["target"][:], definitions_read=1500, words=1500)
    return {family: str(save_small_pretrained(family, folder / f"tiny-{family}", texts=texts, vocabulary=4000))
            for family in ("gpt2", "llama")}


def settings_of(start, kind=KIND, **more):
    return fill(kind, {**OPEN, "steps": {kind: 2}, "start": start, **more}).settings


def train(run, cells, settings):
    """`train_cells` within this process: a start a seed, then every cell."""
    make_starts(run, sorted({Cell(cell.task, "untuned", cell.seed) for cell in cells}), settings)
    return [fine_tune(run, cell, settings) for cell in cells]


def evaluate(run, cells, conditions):
    return read_results([evaluate_cell(run, cell, conditions) for cell in cells])


def facts_of(run, cell):
    return read_json(run / "models" / cell.place / "cell.json")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_a_folder_to_the_table_beside_the_published(run, starts, family):
    filled = fill(KIND, {**OPEN, "start": starts[family], "steps": {}, "epochs": 1})
    methods = ("fine_tuning", "carma", "mutual_information_only", "stability_only")
    cells = [Cell(TASK, method, filled.seeds[0]) for method in methods]
    train(run, cells, filled.settings)
    facts = [facts_of(run, cell) for cell in cells]
    rows = {each["training_rows"] for each in facts}
    assert len(rows) == 1 and 20 < rows.pop() <= 200, "many answers are one token"
    assert {each["budget"] for each in facts} == {-(-facts[0]["training_rows"] // 8)}
    history = read_histories(run)
    assert history.query("method == 'mutual_information_only'").mutual_information.notna().any()
    assert "stability" not in history or history.query("method == 'mutual_information_only'").stability.isna().all()
    conditions = Conditions(rates=(0.25, 0.4), depth_shares=(0.01, 0.25, 0.5, 0.75, 1.0), levels=("word",),
                            test_items=60, pooled_items=10)
    results = evaluate(run, [Cell(TASK, "untuned", filled.seeds[0]), *cells], conditions)
    assert set(results.condition.unique()) == {"clean", "replaced", "pooled"}
    assert set(results.model.unique()) == {f"tiny-{family}"} and set(results.method.unique()) == {"untuned", *methods}
    assert drift_of_cell(run, cells[0], items=20).drift.gt(0).any()
    assert beside_published(paper_table(results)).published_note.str.contains("no published figure").all()


def test_seeds_of_one_start_share_its_files(run, starts):
    settings = settings_of(starts["llama"])
    one, two = make_starts(run, [Cell(TASK, "untuned", seed) for seed in (1, 2)], settings)
    assert os.path.samefile(one / "model.safetensors", two / "model.safetensors")
    assert (read_json(one / "cell.json")["seed"], read_json(two / "cell.json")["seed"]) == (1, 2)


@pytest.mark.parametrize("more", [
    dict(adapter="lora"), dict(adapter="lora", precision="bf16", gradient_checkpointing=True),
    dict(precision="bf16"), dict(accumulation=4, gradient_checkpointing=True)], ids=str)
def test_cheaper_ways_train_and_are_evaluated(run, starts, more):
    cell, settings = Cell(TASK, "carma", 1), settings_of(starts["llama"], **more)
    folder = train(run, [cell], settings)[0]
    assert (folder / "adapter_model.safetensors").is_file() == ("adapter" in more)
    history = read_histories(run)
    assert history[["task_loss", "mutual_information", "stability"]].notna().all().all()
    conditions = Conditions(rates=(0.25,), depth_shares=(0.5,), protocols=("mean",), levels=("word",), test_items=20)
    results = evaluate(run, [Cell(TASK, "untuned", 1), cell], conditions)
    values = results.pivot_table(index=["item_id", "condition"], columns="method", values="log_probability",
                                 observed=True)
    assert (values.carma != values.untuned).any(), "training moved the model"
    if more.get("precision") == "bf16" and "adapter" in more:
        start = load_file(run / "models" / Cell(TASK, "untuned", 1).place / "model.safetensors")
        assert all(weight.dtype == torch.bfloat16 for weight in start.values())


def test_micro_batches_and_checkpointing_train_to_the_same_weights(run, starts, tmp_path):
    cell = Cell(TASK, "fine_tuning", 1)
    found = []
    for name, more in (("plain", {}), ("saving", dict(accumulation=2, gradient_checkpointing=True))):
        shutil.copytree(run / "data", tmp_path / name / "data")
        train(tmp_path / name, [cell], settings_of(starts["llama"], precision="float32", **more))
        found.append(load_file(tmp_path / name / "models" / cell.place / "model.safetensors"))
    apart = torch.cat([(found[0][name] - found[1][name]).abs().flatten() for name in found[0]])
    assert (apart > 1e-5).float().mean() < 1e-3, "Adam's first steps are as long for a gradient of almost nothing"


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_two_processes_train_like_one(run, starts, tmp_path, monkeypatch, adapter):
    """FSDP over two processes on the CPU, through torchrun, against one process; every step reads all 16 rows.

    Half of the rows have other means of the terms than all of them, so the weights are only nearly the same.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cell, start, found = Cell(SMALL_TASK, "carma", 1), Cell(SMALL_TASK, "untuned", 1), []
    saved = "model.safetensors" if adapter == "none" else "adapter_model.safetensors"
    for name, processes in (("one", 1), ("two", 2)):
        shutil.copytree(run / "data", tmp_path / name / "data")
        settings = settings_of(starts["llama"], kind="sentiment", processes=processes, precision="float32", batch_size=16,
                               training_items=16, learning_rate=1e-3, num_negatives=None, adapter=adapter)
        make_starts(tmp_path / name, [start], settings)
        function = fine_tune_in_processes if processes > 1 else fine_tune
        folder = function(tmp_path / name, cell, settings)
        assert function(tmp_path / name, cell, settings) == folder, "what is done is not begun again"
        found.append((load_file(folder / saved), read_histories(tmp_path / name)))
        assert not (tmp_path / name / "work" / cell.place).exists()
    (one, first), (two, second) = found
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    if adapter == "none":
        before = load_file(tmp_path / "one" / "models" / start.place / "model.safetensors")
    else:
        before = {name: torch.zeros_like(weight) for name, weight in one.items() if ".lora_B." in name}
        assert before
    moved = torch.cat([((one[name] - before[name]) * (two[name] - before[name])).flatten() for name in before])
    assert (moved[moved != 0] > 0).float().mean() > 0.95, "in the same direction, nearly all of them"
    for name in ("task_loss", "mutual_information", "stability"):
        assert second[name].iloc[-1] == pytest.approx(first[name].iloc[-1], rel=0.05)


def test_an_error_in_a_process_is_told_in_one_line(run, starts, monkeypatch):
    settings, cell = settings_of(starts["llama"], processes=2), Cell(TASK, "carma", 1)
    make_starts(run, [Cell(TASK, "untuned", 1)], settings)
    (run / "models" / Cell(TASK, "untuned", 1).place / "model.safetensors").unlink()
    said = "in 2 processes failed: ModelNotFound: cannot load a causal language model"
    with pytest.raises(RuntimeError, match=said) as error:
        fine_tune_in_processes(run, cell, settings)
    assert "\n" not in str(error.value)


def test_too_little_memory_is_refused_before_a_step(run, starts, monkeypatch):
    from carma_lib.lab import memory

    monkeypatch.setattr(memory, "available_memory", lambda: (10_000, "in memory"))
    with pytest.raises(NotEnoughMemory, match="0.0 GiB are free in memory, so it does not fit; no other settings do"):
        train_cells(run, [Cell(TASK, "carma", 1)], settings_of(starts["gpt2"]))
    assert not (run / "work").exists()


def test_a_folder_with_a_known_name_and_other_depth_is_not_that_model(run, tmp_path, starts):
    shutil.copytree(starts["gpt2"], tmp_path / "gpt2")
    settings, cell = settings_of(str(tmp_path / "gpt2")), Cell(TASK, "fine_tuning", 1)
    folder = train(run, [cell], settings)[0]
    assert read_json(folder / "cell.json")["model"] == "gpt2 with 4 blocks"


def test_a_start_without_any_answer_is_refused(run, tmp_path):
    start = save_small_pretrained("gpt2", tmp_path / "letters", texts=["abc"], vocabulary=260)
    with pytest.raises(ValueError, match="no training row's answer is one token of this tokenizer"):
        train_cells(run, [Cell(TASK, "carma", 1)], settings_of(str(start)))


def test_unfinished_facts_do_not_reach_the_models_folder(run, starts, monkeypatch):
    """A disk that fills while a model is saved leaves no half cell behind."""
    cell, settings = Cell(TASK, "fine_tuning", 1), settings_of(starts["llama"])
    make_starts(run, [Cell(TASK, "untuned", 1)], settings)

    def full(*unused, **also):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment, "_write_facts", full)
    with pytest.raises(OSError, match="No space left"):
        fine_tune(run, cell, settings)
    assert not (run / "models" / cell.place).exists()
    assert json.loads((run / "work" / cell.place / "mark.json").read_text())
