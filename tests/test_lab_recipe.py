"""Recipes and cells: what they refuse in one line, how gaps are filled, and what their marks and keys depend on."""
import importlib
import math
import shutil

import pytest
from lab_cells import RECIPE, SENTIMENT, SMALL, cell_of

from carma_lib.files import code_fingerprint
from carma_lib.lab import cell as cells
from carma_lib.lab.cell import Cell, training_mark, testing_mark as mark_of_tests
from carma_lib.lab.recipe import Recipe, recipe_for
from carma_lib.lab.worker import prepare
from carma_lib.models import ModelNotFound, small_model, train_tokenizer
from carma_lib.tasks import DataNotFound, build_task


def refused(call, *named):
    """The one line of a refusal, which must say each of the names."""
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(name in said for name in named), said
    return said


@pytest.mark.parametrize(("wrong", "named"), [
    (dict(start="random:"), "start 'random:' needs"), (dict(start="random:base"), "start 'random:base' needs"),
    (dict(stepps=3), "unknown setting 'stepps'"), (dict(steps=0), "'steps'"), (dict(steps=-5), "'steps'"),
    (dict(steps="6"), "'steps'"), (dict(steps=6.0), "'steps'"), (dict(steps=True), "'steps'"), (dict(epochs=0, steps=None), "'epochs'"),
    (dict(epochs=2), "steps and epochs"), (dict(batch_size=0), "'batch_size'"), (dict(accumulation=3), "accumulation × processes = 3"),
    (dict(processes=0), "'processes'"), (dict(learning_rate=math.nan), "'learning_rate'"),
    (dict(learning_rate=math.inf), "'learning_rate'"), (dict(learning_rate=0), "'learning_rate'"),
    (dict(learning_rate=-1e-3), "'learning_rate'"), (dict(learning_rate=1e6), "'learning_rate'"),
    (dict(learning_rate="1e-3"), "'learning_rate'"), (dict(warmup_steps=7), "warmup_steps is 7"), (dict(warmup_steps=-1), "'warmup_steps'"),
    (dict(schedule="cosine"), "'schedule'"), (dict(keep="none"), "'keep'"), (dict(evaluations=0), "'evaluations'"),
    (dict(test_at=(7,)), "test_at names step 7"), (dict(test_at=(0,)), "'test_at.0'"), (dict(test_at=(3, 3)), "test_at names something twice"),
    (dict(test_at=3), "'test_at'"), (dict(training_items=-1), "'training_items'"), (dict(validation_items=0), "'validation_items'"),
    (dict(level="letter"), "'level'"), (dict(precision="fp8"), "'precision'"), (dict(adapter="ia3"), "'adapter'"),
    (dict(adapter="qlora"), "adapter 'qlora'"), (dict(lora_rank=0), "'lora_rank'"), (dict(threads=0), "'threads'"),
    (dict(activation_checkpointing="yes"), "'activation_checkpointing'"), (dict(family="gpt9"), "'family'"), (dict(start=""), "'start'"),
    (dict(start=3), "'start'"), (dict(layers=0), "'layers'"), (dict(layers=1), "mi_layers"), (dict(width=15), "width 15"),
    (dict(heads=0), "'heads'"), (dict(vocabulary_size=257), "'vocabulary_size'"), (dict(base_steps=0), "'base_steps'"),
    (dict(base_learning_rate=math.nan), "'base_learning_rate'"), (dict(carma_weight=1.5), "'carma_weight'"),
    (dict(mi_weight=-0.1), "'mi_weight'"), (dict(stability_weight=math.nan), "'stability_weight'"), (dict(temperature=0.0), "'temperature'"),
    (dict(temperature=1e-30), "temperature"), (dict(temperature=math.inf), "'temperature'"), (dict(num_negatives=0), "'num_negatives'"),
    (dict(similarity="euclid"), "'similarity'"), (dict(mi_layers=(1, 0)), "mi_layers"), (dict(mi_layers=(0, 2)), "mi_layers"),
    (dict(mi_layers=3), "'mi_layers'"), (dict(stability_layers=(0, 1, 2)), "'stability_layers'"), (dict(stability_layers=(-1, 1)), "stability_layers"),
    (dict(test_splits=("train",)), "'train' is no test split"), (dict(changed_splits=("validation",)), "'validation' is no test split"),
    (dict(test_splits=("test",), changed_splits=("test_seen",)), "changed_splits names 'test_seen', which test_splits leaves out"),
    (dict(test_splits=("test_seen", "test_seen")), "test_splits names something twice"), (dict(rates=(0.0,)), "'rates.0'"),
    (dict(rates=(1.5,)), "'rates.0'"), (dict(rates=("a",)), "'rates.0'"), (dict(rates=(0.1, 0.1)), "rates names something twice"),
    (dict(rates=(math.nan,)), "'rates.0'"), (dict(depth_shares=(2.0,)), "'depth_shares.0'"), (dict(protocols=("median",)), "'protocols.0'"),
    (dict(protocols=()), "pooling needs protocols"), (dict(levels=("letter",)), "'levels.0'"), (dict(adversary_rate=1.5), "'adversary_rate'"),
    (dict(adversary_tries=0), "'adversary_tries'"), (dict(replacement_seed=-1), "'replacement_seed'"), (dict(test_items=-1), "'test_items'"),
    (dict(measures=("loss",)), "'measures.0'"), (dict(evaluation_batch=0), "'evaluation_batch'"), (dict(keep_model=1), "'keep_model'")],
    ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_recipe_refuses_what_cannot_be_done(wrong, named):
    refused(lambda: Recipe(**{**SMALL, **wrong}), named)
    refused(lambda: RECIPE.but(**wrong), named)


@pytest.mark.parametrize(("wrong", "named"), [
    (dict(task="sst4"), "unknown task 'sst4'"), (dict(task=""), "unknown task ''"), (dict(method="cramming"), "unknown method 'cramming'"),
    (dict(seed=-1), "seed"), (dict(seed=2**32), "seed"), (dict(seed=1.0), "seed"), (dict(seed=True), "seed"), (dict(seed="1"), "seed"),
    (dict(strength=0.0), "strength of carma"), (dict(strength=-1.0), "strength of carma"), (dict(strength=math.nan), "strength of carma"),
    (dict(strength=math.inf), "strength of carma"), (dict(strength=True), "strength of carma"), (dict(strength="0.1"), "strength of carma"),
    (dict(strength=1.5), "strength of carma"),
    (dict(method="l2_sp", recipe=RECIPE.but(processes=2)), "l2_sp needs whole weights"), (dict(method="fine_tuning", strength=0.1), "fine_tuning"), (dict(method="untuned", strength=0.1), "untuned"),
    (dict(method="label_smoothing", strength=1.5), "label_smoothing"), (dict(method="synonym_augmentation", strength=1.5), "synonym_augmentation")],
    ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_cell_refuses_what_cannot_be_done(wrong, named):
    refused(lambda: Cell(**{**dict(task=SENTIMENT, method="carma", seed=1, recipe=RECIPE), **wrong}), named)


def test_lists_are_taken_as_tuples_and_nothing_changes_afterwards():
    recipe = Recipe(**{**SMALL, "rates": [0.25], "mi_layers": [0, 1], "test_splits": ["test_seen"]})
    assert recipe == RECIPE and hash(recipe) == hash(RECIPE)
    with pytest.raises(ValueError):
        recipe.steps = 7
    assert RECIPE.but(num_negatives=None).carma.num_negatives is None, "all negatives"


# -- gaps ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tokenizer = train_tokenizer(["a small bird"] * 5, vocabulary_size=300)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    small_model("gpt2", tokenizer, layers=12, width=8, heads=1).save_pretrained(folder)
    return str(folder)


def test_gaps_are_filled_and_their_source_is_told(start):
    filled = recipe_for("sentiment", {"start": start})
    recipe = filled.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_steps, recipe.learning_rate) == (2, 16, 500, 6e-5)
    assert filled.seeds == (32,) and recipe.carma.mi_layers == (0, 3) and recipe.carma.carma_weight == 0.4
    defaults = {name for name, source in filled.sources.items() if source == "published default"}
    assert defaults == {"mi_weight", "stability_weight"} and set(filled.sources.values()) == {"published", "published default"}
    assert recipe_for("inverse_dictionary", {"start": start}).sources["batch_size"] == "ours"
    table = filled.table().set_index("setting")
    assert table.value["seeds"] == "32," and "steps" not in table.index and table.source["epochs"] == "published"


def test_what_is_given_wins(start):
    filled = recipe_for("sentiment", {"start": start, "steps": {"sentiment": 4, "inverse_dictionary": 9}, "batch_size": 8,
                                      "warmup_steps": 0, "carma_weight": 0.0}, seeds=(7,))
    assert (filled.recipe.steps, filled.recipe.epochs, filled.recipe.batch_size) == (4, None, 8)
    assert filled.seeds == (7,) and filled.recipe.carma.carma_weight == 0
    assert not {"seeds", "batch_size", "epochs", "carma_weight"} & set(filled.sources)
    assert filled.table().set_index("setting").source["batch_size"] == "given"


def test_a_small_start_has_defaults_but_needs_a_length_and_seeds():
    filled = recipe_for("sentiment", {"steps": 200}, seeds=(1, 2))
    assert (filled.recipe.batch_size, filled.recipe.learning_rate, filled.recipe.warmup_steps) == (32, 1e-3, 100)
    assert filled.recipe.mi_layers is not None and filled.recipe.carma_weight == 0.2
    assert filled.sources["learning_rate"] == "ours" and filled.sources["mi_weight"] == "published default"
    assert recipe_for("sentiment", {"steps": 200, "num_negatives": None}, seeds=(1,)).recipe.num_negatives is None


@pytest.mark.parametrize(("wrong", "seeds", "named"), [
    ({}, (1,), "no steps or epochs for sentiment"), ({"steps": {"inverse_dictionary": 3}}, (1,), "no steps or epochs for sentiment"),
    ({"steps": 3}, (), "no seeds"), ({"stepps": 3}, (1,), "unknown setting 'stepps'; did you mean 'steps'?"),
    ({"lorem": 3}, (1,), "unknown setting 'lorem'; there are accumulation"),
    ({"stepps": {"sentiment": 3}}, (1,), "unknown setting 'stepps'"), ({"steps": {"sentiment": "3"}}, (1,), "'steps'"),
    ({"steps": 3, "epochs": 1}, (1,), "steps and epochs are both given"), ({"steps": 3, "layers": 1, "mi_layers": (0, 1), "warmup_steps": 1}, (1,), "stability_layers"),
    ({"steps": 50}, (1,), "warmup_steps")], ids=str)
def test_gaps_that_nothing_fills(wrong, seeds, named):
    refused(lambda: recipe_for("sentiment", wrong, seeds=seeds), named)


def test_no_model_no_recipe(tmp_path, start):
    with pytest.raises(ModelNotFound, match="the folder holds none"):
        recipe_for("sentiment", {"start": str(tmp_path)}, seeds=(1,))
    refused(lambda: recipe_for("sentiment", {"start": start, "mi_layers": (0, 12)}), "mi_layers")


def test_steps_of_epochs_and_rows_of_a_pass():
    recipe = RECIPE.but(steps=None, epochs=3, batch_size=8, accumulation=2, processes=2)
    assert recipe.training_steps(17) == 9 and recipe.rows_a_pass == 2
    assert RECIPE.training_steps(17) == 6


# -- keys and marks --------------------------------------------------------------------------------

def other_of(name, value):
    """Another value of a setting that a recipe takes."""
    special = {"family": "gpt2", "heads": 4, "start": "base", "tokenizer_tasks": (SENTIMENT,), "steps": 7, "warmup_steps": 2, "schedule": "constant",
               "keep": "last", "test_at": (3,), "level": "phrase", "precision": "bf16", "adapter": "lora", "similarity": "dot",
               "batch_size": 16, "width": 32, "mi_layers": (0, 0), "stability_layers": (0, 2), "num_negatives": None,
               "test_splits": (), "changed_splits": ("test_seen",), "rates": (0.4,), "depth_shares": (1.0,), "protocols": ("max",),
               "levels": ("phrase",), "epochs": 1, "processes": 2, "adversary_rate": 0.25, "measures": ("drift",), "synonyms": "ranked", "plain_texts": ("wordnet_examples",)}
    if name in special:
        return special[name]
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2


@pytest.mark.parametrize("name", list(Recipe.model_fields))
def test_every_setting_changes_its_mark_and_no_other(name):
    from carma_lib.lab.recipe import Training

    one = RECIPE.but(layers=3) if name == "stability_layers" else RECIPE.but(start="a/model") if name == "adapter" else RECIPE
    changed = one.but(**{name: other_of(name, getattr(RECIPE, name))}, **({"steps": None} if name == "epochs" else {}))
    training, tests = changed.training_mark() != one.training_mark(), changed.testing_mark() != one.testing_mark()
    if name in ("evaluation_batch", "keep_model"):
        assert not training and not tests
    else:
        assert (training, tests) == ((True, False) if name in Training.model_fields else (False, True))


def test_how_often_the_last_checkpoint_is_looked_at_changes_no_weights():
    last = RECIPE.but(keep="last")
    assert last.but(evaluations=1).training_mark() == last.training_mark()


def test_keys_differ_between_any_two_trainings():
    found = [cell_of(), cell_of("fine_tuning"), cell_of(seed=2), cell_of(task="controlled_inverse_dictionary"), cell_of(strength=0.3),
             cell_of(trial=True), cell_of(steps=7), Cell(SENTIMENT, "carma", 1, RECIPE, change=("level", "word"))]
    assert len({cell.key for cell in found}) == len(found) == len({cell.place for cell in found})
    assert cell_of(test_items=13).key == cell_of().key, "other tests of one training"


def test_marks_know_data_rules_and_settings(folder, tmp_path, monkeypatch):
    cell = cell_of()
    before = training_mark(folder, cell), mark_of_tests(folder, cell)
    assert training_mark(folder, cell_of(steps=7)) != before[0]
    assert training_mark(folder, cell_of(rates=(0.4,))) == before[0] and mark_of_tests(folder, cell_of(rates=(0.4,))) != before[1]
    shutil.rmtree(folder / "data" / SENTIMENT)
    build_task(SENTIMENT, folder / "data" / SENTIMENT, seed=7)
    assert training_mark(folder, cell) != before[0] and mark_of_tests(folder, cell) != before[1]
    with pytest.raises(DataNotFound, match="build them first"):
        training_mark(tmp_path / "none", cell)


def test_a_docstring_or_comment_changes_no_mark(folder, tmp_path, monkeypatch):
    """Every module that a cell goes through, read again with other docstrings: its marks stay."""
    import ast
    import sys

    cell = cell_of()
    before = cell.key, training_mark(folder, cell), mark_of_tests(folder, cell)
    for name in ("recipe", "cell"):
        module = importlib.import_module(f"carma_lib.lab.{name}")
        tree = ast.parse(open(module.__file__, encoding="utf-8").read())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body[0].value = ast.Constant("Other words.")
        edited = type(sys)(f"edited_{name}")
        monkeypatch.setitem(sys.modules, edited.__name__, edited)
        source = ast.unparse(tree)
        if name == "cell":
            source = source.replace("carma_lib.lab.recipe", "edited_recipe")
        exec(compile(source, edited.__name__, "exec"), edited.__dict__)
    edited_recipe, edited = sys.modules["edited_recipe"], sys.modules["edited_cell"]
    again = edited.Cell(SENTIMENT, "carma", 1, edited_recipe.Recipe(**SMALL))
    assert (again.key, edited.training_mark(folder, again), edited.testing_mark(folder, again)) == before
    for name in ("worker", "train", "cell", "start", "evaluate"):
        assert "code_fingerprint" not in vars(importlib.import_module(f"carma_lib.lab.{name}")), "rules have versions, not code"
    assert code_fingerprint("carma_lib.lab.cell")


def test_names_and_places_are_for_people():
    cell = cell_of(strength=0.3)
    assert cell.model == "llama-2x16" and cell.name == "llama-2x16/controlled_sentiment/carma carma_weight=0.3/seed-1"
    assert cell.place.parts[:3] == (SENTIMENT, "llama-2x16", "carma") and cell.place.name == f"seed-1-{cell.key}"
    changed = Cell(SENTIMENT, "carma", 1, RECIPE, change=("temperature", "0.5"))
    assert changed.name.endswith("carma temperature=0.5/seed-1") and list(changed.facts()) == list(cells.FACTS)


def test_a_value_for_a_kind_of_task_that_there_is_not_is_refused(start):
    refused(lambda: recipe_for("sentiment", {"start": start, "learning_rate": {"sentimant": 1e-4}}),
            "learning_rate has a value for 'sentimant', which is no kind of task; there are inverse_dictionary, own, sentiment")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(warmup_steps=9), "warmup_steps is 9, longer than the training of 8 steps: 64 training rows, epochs=1"),
    (dict(test_at=(4, 9)), "test_at names step 9, the training ends at 8: 64 training rows")])
def test_epochs_too_short_for_what_is_asked_are_told_before_the_training(folder, changes, message):
    cell = cell_of(steps=None, epochs=1, **changes)
    refused(lambda: prepare(folder, [cell], 1, "trained"), message)


@pytest.mark.parametrize("changes", [dict(start="base"), dict(width=32), dict(vocabulary_size=300), dict(base_steps=7),
                                     dict(tokenizer_tasks=("controlled_inverse_dictionary",)), dict(precision="float32")])
def test_starts_that_differ_are_told_apart(changes):
    assert RECIPE.but(**changes).start_mark() != RECIPE.start_mark() == RECIPE.but(learning_rate=0.5, test_items=3).start_mark()
