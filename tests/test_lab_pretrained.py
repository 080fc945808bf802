"""Pretrained starts, tiny ones from local folders, on real WordNet: epochs, adapters, bf16, checkpointing, FSDP, tests."""
import shutil

import pandas as pd
import pytest
import torch
from lab_cells import SENTIMENT, states
from safetensors.torch import load_file
from small_pretrained import save_small_pretrained, training_texts

from carma_lib.files import read_json
from carma_lib.lab import memory
from carma_lib.lab.cell import Cell, cell_folder, is_trained
from carma_lib.lab.recipe import recipe_for
from carma_lib.lab.run import CellFailed, run
from carma_lib.lab.start import start_model, training_rows
from carma_lib.lab.tables import curves
from carma_lib.lab.train import trained
from carma_lib.lab.worker import run_cell
from carma_lib.report.tables import beside_published, paper_table
from carma_lib.stats.table import read_results
from carma_lib.tasks import build_task, load_task

TASK = "wordnet_inverse_dictionary"
OPEN = dict(steps=2, batch_size=8, warmup_steps=1, training_items=200, validation_items=40, evaluations=1, rates=(0.25,), depth_shares=(0.5,),
            protocols=("mean",), levels=("word",), test_items=20, pooled_items=10, measures=())


@pytest.fixture(scope="module")
def rows(tmp_path_factory, wordnet_database):
    folder = tmp_path_factory.mktemp("data")
    build_task(TASK, folder / "data" / TASK, split_by="row")
    build_task(SENTIMENT, folder / "data" / SENTIMENT)
    return folder


@pytest.fixture
def folder(rows, tmp_path):
    return shutil.copytree(rows, tmp_path / "run")


@pytest.fixture(scope="module")
def starts(tmp_path_factory, rows):
    folder, train = tmp_path_factory.mktemp("starts"), load_task(rows / "data" / TASK)["train"]
    texts = training_texts(train["text"][:], train["target"][:], definitions_read=1000, words=1500)
    return {family: str(save_small_pretrained(family, folder / f"tiny-{family}", texts=texts, vocabulary=3500))
            for family in ("gpt2", "llama")}


def cell_of(start, method="carma", seed=1, task=TASK, **more):
    kind = "sentiment" if task == SENTIMENT else "inverse_dictionary"
    return Cell(task, method, seed, recipe_for(kind, {**OPEN, "start": start, **more}, seeds=(seed,)).recipe)


def results_of(folder, cells):
    return pd.concat([read_results(cell_folder(folder, cell) / "answers.parquet") for cell in cells], ignore_index=True)


DATA = {TASK: {"split_by": "row"}}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_a_folder_to_the_table_beside_the_published(folder, starts, family):
    methods = ("untuned", "fine_tuning", "carma") if family == "gpt2" else ("carma", "mutual_information_only", "stability_only")
    more = dict(steps=None, epochs=1, training_items=60) if family == "gpt2" else {}
    cells = [cell_of(starts[family], method, rates=(0.25, 0.4), depth_shares=(0.01, 0.5, 1.0), measures=("drift",), measured_items=10, **more)
             for method in methods]
    for cell in cells:
        run_cell(folder, cell, "tested")
    used = training_rows(folder, cells[-1])
    texts = load_task(folder / "data" / TASK)["train"]
    assert 5 < len(used) <= cells[-1].recipe.training_items and isinstance(used[0]["target_id"], int), "many answers are one token, not all"
    facts = [read_json(cell_folder(folder, cell) / "tested.json") for cell in cells]
    assert {each["budget"] for each in facts if each["method"] != "untuned"} == {-(-len(used) // 8) if family == "gpt2" else 2}
    results = results_of(folder, cells)
    assert set(results.condition.unique()) == {"clean", "replaced", "pooled"}, "a pretrained start is tested whole without training"
    assert set(results.model.unique()) == {f"tiny-{family}"} and set(results.method.unique()) == set(methods)
    clean = results[results.condition == "clean"]
    assert clean.groupby("method", observed=True).size().eq(20).all(), "so many that can be answered, of more rows"
    assert set(clean.item_id.astype(str)) < set(load_task(folder / "data" / TASK)["test"]["item_id"]) and len(texts) > 200
    history = curves(folder, [cell for cell in cells if not cell.untuned])
    if "mutual_information_only" in methods:
        alone = history[history.method == "mutual_information_only"]
        assert alone.mutual_information.notna().any() and ("stability" not in alone or alone.stability.isna().all())
    measures = pd.read_parquet(cell_folder(folder, cells[-1]) / "measures.parquet")
    assert measures[measures.measure == "drift"].value.gt(0).any()
    assert beside_published(paper_table(results)).published_note.str.contains("no published figure").all()


def test_two_processes_train_like_one(folder, starts, monkeypatch):
    """FSDP over two processes on the CPU, through torchrun, against one process; every step reads all 16 rows. About 60 s.

    Half of the rows have other means of the terms than all of them, so the weights are only nearly the same.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = []
    for processes in (1, 2):
        cell = cell_of(starts["llama"], task=SENTIMENT, processes=processes, precision="float32", batch_size=16, training_items=16,
                       learning_rate=1e-3, num_negatives=None, adapter="lora")
        run_cell(folder, cell, "trained")
        assert is_trained(folder, cell) and states(folder, cell) == ["begun", "done"]
        run_cell(folder, cell, "trained")
        assert states(folder, cell) == ["begun", "done"], "what is done is not begun again"
        own = cell_folder(folder, cell)
        assert not (own / "work").exists()
        found.append((load_file(own / "model" / "adapter_model.safetensors"), curves(folder, [cell])))
    (one, first), (two, second) = found
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    grown = [name for name in one if ".lora_B." in name]  # from zero
    moved = torch.cat([(one[name] * two[name]).flatten() for name in grown])
    assert grown and (moved[moved != 0] > 0).float().mean() > 0.95, "in the same direction, nearly all of them"
    for name in ("task_loss", "mutual_information", "stability"):
        assert second[name].dropna().iloc[-1] == pytest.approx(first[name].dropna().iloc[-1], rel=0.05)


def test_an_error_in_a_process_is_told_in_one_line(folder, starts, tmp_path):
    start = shutil.copytree(starts["llama"], tmp_path / "broken")
    cell = cell_of(str(start), processes=2)
    (start / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="in 2 processes failed: ModelNotFound: .*") as error:
        trained(folder, cell)
    assert "\n" not in str(error.value) and cell.name in str(error.value)


def test_too_little_memory_is_refused_before_a_step(folder, starts, client, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: (10_000, "in memory"))
    cell = cell_of(starts["gpt2"])
    with pytest.raises(CellFailed, match="0.0 GiB are free in memory, so it does not fit; no other settings do"):
        run([cell], folder, client, data=DATA)
    assert not (cell_folder(folder, cell) / "work").exists() and states(folder, cell) == []


def test_a_start_without_any_answer_is_refused(folder, tmp_path, client):
    start = save_small_pretrained("gpt2", tmp_path / "letters", texts=["abc"], vocabulary=260)
    with pytest.raises(CellFailed, match="none of 200 rows is left, no target is one token of this tokenizer") as error:
        run([cell_of(str(start))], folder, client, data=DATA)
    assert "\n" not in str(error.value)


def test_random_weights_in_the_shape_of_a_pretrained_start(folder, starts, client):
    """The same tokenizer, prompt and rows; weights of the cell's seed; told apart in folders and tables."""
    whole, first, again, other = (cell_of(start, "fine_tuning", seed=seed, measures=("perplexity",)) for start, seed in (
        (starts["llama"], 1), (f"random:{starts['llama']}", 1), (f"random:{starts['llama']}", 1), (f"random:{starts['llama']}", 2)))
    models = [start_model(folder, cell) for cell in (whole, first, again, other)]
    assert len({model.config.to_json_string() for model in models}) == 1
    kept, weights, same, others = ({name: value for name, value in model.named_parameters() if "norm" not in name} for model in models)
    for name in kept:
        assert torch.equal(weights[name], same[name]) and not torch.equal(weights[name], others[name])
        assert not torch.equal(weights[name], kept[name])
    assert training_rows(folder, whole) == training_rows(folder, first)
    assert run([whole, first, other], folder, client) == {}
    found = results_of(folder, [whole, first, other])
    assert set(found.model.unique()) == {"tiny-llama", "tiny-llama, random weights"} and len({cell.place.parent for cell in (whole, first)}) == 2
    before = pd.concat([pd.read_parquet(cell_folder(folder, cell) / "measures.parquet") for cell in (whole, first, other)])
    assert before[before.measure == "perplexity_before"].value.nunique() == 3
    with pytest.raises(ValueError, match="needs pretrained weights"):
        cell_of(f"random:{starts['llama']}", adapter="lora")
