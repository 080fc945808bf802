"""Studies read from their plans: which cells they mean, how strengths are chosen, and the tables they come back as."""
import inspect
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from lab_cells import SENTIMENT, cell_of

from carma_lib.files import RunError
from carma_lib.lab import study as studies
from carma_lib.lab.cell import FACTS, Cell
from carma_lib.lab.recipe import Recipe
from carma_lib.lab.run import run
from carma_lib.lab.study import best_trials, chosen, read_study
from carma_lib.lab.tables import cells_of, in_archive, pack, read_answers, read_cells, whole_seeds
from carma_lib.stats.table import RESULT_COLUMNS, ResultsError, check_results

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "data" / "study" / "plan.yml"


def values_of(study):
    """A learning rate for each task and start, a strength for each task and method: the first that was tried."""
    tried = study.trials.strengths
    rates = {(task, study.start_of(start)): 0.001 for task in study.tasks for start in study.starts}
    return rates, {(task, method): values[0] for task in study.tasks for method, values in tried.items() if method != "fine_tuning"}


@pytest.fixture(scope="module")
def study():
    return read_study(PLAN)


@pytest.fixture(scope="module")
def blocks(study):
    return study.cells(*values_of(study))


# -- the controlled study --------------------------------------------------------------------------

def test_the_cells_of_the_controlled_study_by_block(blocks):
    assert {name: len(cells) for name, cells in blocks.items()} == {
        "primary": 80, "training_set_sizes": 80, "alternatives": 70, "sensitivity": 130, "model_sizes": 60,
        "alternatives_from_other_starts": 70}
    assert Counter(cell.method for cell in blocks["primary"]) == {"fine_tuning": 40, "carma": 40}
    assert {cell.recipe.training_items for cell in blocks["training_set_sizes"]} == {300, 4500}
    assert {(cell.recipe.layers, cell.recipe.width, cell.recipe.start) for cell in blocks["model_sizes"]} == {
        (2, 64, "random"), (4, 32, "random"), (4, 128, "random")}
    assert all(not cell.trial for cells in blocks.values() for cell in cells)


def test_a_study_that_is_stopped_has_whole_seeds(blocks):
    seeds = [cell.seed for cell in blocks["primary"]]
    assert seeds == sorted(seeds) and len({(cell.task, cell.method) for cell in blocks["primary"][:seeds.count(1)]}) == 4


def test_every_cell_of_the_study_has_its_own_key_and_place(study, blocks):
    rates, _ = values_of(study)
    cells = {cell for block in blocks.values() for cell in block}
    cells |= {*study.learning_rate_trials(), *study.strength_trials(rates)}
    assert len({cell.key for cell in cells}) == len({cell.place for cell in cells}) == len(cells)


def test_the_committed_tables_are_those_of_the_plan(study):
    """490 cells and their trials, by the strengths that the committed trials chose."""
    archive = PLAN.parent
    rates, strengths = chosen(best_trials(read_cells(archive, trials=True)[1]))
    wanted = dict.fromkeys(cell for block in study.cells(rates, strengths).values() for cell in block)
    cells, measures = read_cells(archive)
    assert len({cell.key for cell in wanted}) == 490 == len(cells_of(cells, wanted)) == len(cells)
    trials = {cell.key for cell in (*study.learning_rate_trials(), *study.strength_trials(rates))}
    assert set(read_cells(archive, trials=True)[0]["cell"]) == trials
    assert set(measures["cell"]) == set(cells["cell"])


def test_every_method_gets_as_many_trials_and_their_seeds_are_used_nowhere_else(study, blocks):
    assert {len(values) for values in study.trials.strengths.values()} == {3}
    rates, _ = values_of(study)
    trials = [*study.learning_rate_trials(), *study.strength_trials(rates)]
    assert not {cell.seed for block in blocks.values() for cell in block} & {cell.seed for cell in trials}
    from_base = Counter((cell.task, cell.method) for cell in trials if cell.recipe.start == "base")
    assert set(from_base.values()) == {6} and len(from_base) == 2 * 9
    assert all(cell.trial for cell in trials)
    assert {cell.recipe.start for cell in trials if cell.method == "fine_tuning"} == {"base", "random"}, "starts with a rate of their own none"
    assert not any(cell.recipe.width != 64 for cell in trials)


def test_changes_reach_the_recipe(study, blocks):
    found = {}
    for cell in blocks["sensitivity"]:
        if cell.seed == 1 and cell.task == SENTIMENT:
            found[cell.change] = cell
    carma = {change: cell.recipe.carma for change, cell in found.items()}
    plain = next(cell for cell in blocks["primary"] if cell.method == "carma").recipe.carma
    assert carma["term_weights", "0.1-0.9"].mi_weight == 0.1 and carma["term_weights", "0.1-0.9"].stability_weight == 0.9
    assert carma["layer_range", "2-3"].mi_layers == carma["layer_range", "2-3"].stability_layers == (2, 3)
    assert carma["temperature", "0.5"].temperature == 0.5
    assert carma["num_negatives", "all"].num_negatives is None and carma["num_negatives", "1"].num_negatives == 1
    assert found["level", "phrase"].recipe.level == "phrase" and carma["level", "phrase"] == plain
    assert found["carma_weight", "0.9"].strength == 0.9 and found["temperature", "0.5"].strength == 0.1, "the trials' choice"
    assert len(found) == 13 == len({cell.key for cell in found.values()})
    depth = {cell.recipe.layers: cell.recipe.mi_layers for cell in blocks["model_sizes"]}
    assert depth == {2: (0, 1), 4: (0, 2)}


def test_strengths_and_learning_rates_reach_the_cells(study):
    rates, strengths = values_of(study)
    rates[SENTIMENT, "base"], strengths[SENTIMENT, "carma"] = 0.0007, 0.55
    blocks = study.cells(rates, strengths)
    mine = [cell for cell in blocks["primary"] if cell.task == SENTIMENT and cell.recipe.start == "base"]
    assert {cell.recipe.learning_rate for cell in mine} == {0.0007}
    assert {(cell.method, cell.strength) for cell in mine} == {("carma", 0.55), ("fine_tuning", None)}
    assert {cell.recipe.learning_rate for cell in blocks["model_sizes"]} == {0.001}, "the block's own"
    assert study.test_steps(SENTIMENT) == (60, 120, 240, 480)
    with pytest.raises(KeyError):
        study.cells({}, strengths)


def test_a_study_from_one_start_has_all_its_blocks(study):
    one = read_study(PLAN, {"blocks": {name: {"starts": ["base"]} for name in ("primary", "training_set_sizes")}})
    rates, strengths = values_of(one)
    blocks = one.cells({place: rate for place, rate in rates.items() if place[1] == "base"} | {
        (task, "random"): 0.001 for task in one.tasks}, strengths)
    assert {cell.recipe.start for cell in blocks["primary"]} == {"base"} and len(blocks["primary"]) == 40
    assert {cell.recipe.start for cell in blocks["model_sizes"]} == {"random"}
    alone = read_study(PLAN, {"blocks": {name: {"starts": ["base"]} for name in (
        "primary", "training_set_sizes", "alternatives_from_other_starts")}})
    assert {cell.recipe.start for cell in alone.learning_rate_trials()} == {"base"}, "other starts have rates of their own"


# -- the pretrained study --------------------------------------------------------------------------

def test_the_cells_of_the_pretrained_study_by_block(tmp_path):
    """Tiny models under the plan's names: which cells it means does not depend on their size."""
    from carma_lib.models import small_model, train_tokenizer

    tokenizer = train_tokenizer(["a small bird"] * 5, vocabulary_size=300)
    small_model("llama", tokenizer, layers=4, width=8, heads=1).save_pretrained(tmp_path / "one")
    small_model("llama", tokenizer, layers=6, width=8, heads=1).save_pretrained(tmp_path / "two")
    changes = {"starts": {"smollm2": {"start": str(tmp_path / "one")}, "gemma3": {"start": str(tmp_path / "two")},
                          "random": {"start": f"random:{tmp_path / 'one'}"}}}
    plan = read_study(ROOT / "data" / "pretrained" / "plan.yml", changes)
    rates, strengths = values_of(plan)
    blocks = plan.cells(rates, strengths)
    assert {name: len(cells) for name, cells in blocks.items()} == {
        "primary": 40, "published_settings": 30, "larger_model": 20, "alternatives": 30, "random_weights": 12}
    cells = {cell for block in blocks.values() for cell in block}
    assert len({cell.key for cell in cells}) == len(cells) == 132
    published = blocks["published_settings"]
    assert {cell.strength for cell in published} == {None} and {cell.change for cell in published} == {("settings", "published")}
    assert all(cell.recipe.carma_weight is not None for cell in published)
    assert {cell.recipe.levels for cell in cells if cell.task == "sst3"} == {("word", "phrase")}, "by kind of task"
    assert {cell.recipe.levels for cell in cells if cell.task != "sst3"} == {("word",)}
    assert len(plan.learning_rate_trials()) == 2 * 2 * 3 and len(plan.strength_trials(rates)) == 2 * 6 * 3
    assert plan.margin == 0.02 and len(plan.claims) == 6 and plan.test_steps("sst3") == (20, 40, 80, 160)


# -- plans that cannot be ---------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "named"), [
    ({"tasks": ["sst4"]}, "unknown task 'sst4'"), ({"sedes": [1]}, "unknown setting 'sedes'; there are blocks"),
    ({"settings": {"keep": "best"}}, "keep: last"), ({"margin": 0}, "'margin'"), ({"tasks": "sst3"}, "'tasks'"),
    ({"trials": {"seeds": ["a"]}}, "trials: 'seeds.0' must be a valid integer, not 'a'"), ({"trials": {"tries": 3}}, "trials: unknown setting 'tries'"),
    ({"trials": {"strengths": {"carma": [0.1]}}}, "every method needs the same number of trials"),
    ({"trials": {"strengths": {"cramming": [0.1, 0.2, 0.3]}}}, "unknown method 'cramming'"),
    ({"blocks": {"primary": {"starts": ["bass"]}}}, "block 'primary' names the start 'bass'"),
    ({"blocks": {"primary": {"methods": ["mixout"]}}}, "unknown method 'mixout'"),
    ({"blocks": {"primary": {"speed": 3}}}, "blocks.primary: unknown setting 'speed'"), ({"blocks": {"primary": {"tuned": "no"}}}, "blocks.primary: 'tuned' must be a valid boolean, not 'no'"),
    ({"blocks": {"primary": 3}}, "'blocks.primary'"), ({"starts": {"base": 3}}, "'starts.base'")], ids=str)
def test_wrong_plans_are_refused_in_one_line(changes, named):
    with pytest.raises(ValueError) as error:
        read_study(PLAN, changes)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "named"), [
    ({"settings": {"stepz": 3}}, "unknown setting 'stepz'"), ({"settings": {"test_at": [500]}}, "test_at names step 500"),
    ({"starts": {"base": {"layers": 1}}}, "layers"), ({"blocks": {"sensitivity": {"change": {"speed": [1]}}}}, "unknown setting 'speed'")], ids=str)
def test_wrong_settings_are_refused_when_cells_are_made(changes, named):
    plan = read_study(PLAN, changes)
    with pytest.raises(ValueError) as error:
        plan.cells(*values_of(plan))
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "named"), [
    ("tasks: [", "plan.yml"), ("", "plan.yml holds no plan"), ("[1, 2]", "plan.yml holds no plan"), ("tasks: [sst3]", "'settings' is missing"),
    (None, "plan.yml holds no plan of a study; give the path of one")])
def test_files_that_hold_no_plan(tmp_path, text, named):
    if text is not None:
        (tmp_path / "plan.yml").write_text(text)
    with pytest.raises((RunError, ValueError)) as error:
        read_study(tmp_path / "plan.yml")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_the_plan_of_the_docstring_is_one(tmp_path):
    (tmp_path / "plan.yml").write_text(inspect.getdoc(studies).partition("\n\n")[2])
    plan = read_study(tmp_path / "plan.yml")
    rates, strengths = values_of(plan)
    assert {name: len(cells) for name, cells in plan.cells(rates, strengths).items()} == {"primary": 6, "sizes": 6, "sensitivity": 4}


def test_changes_of_a_plan_are_merged_by_key(study):
    other = read_study(PLAN, {"settings": {"steps": 240, "test_at": [60]}, "blocks": {"primary": {"seeds": [1]}}})
    assert other.settings == {**study.settings, "steps": 240, "test_at": [60]}
    assert other.blocks["primary"].seeds == (1,) and other.blocks["primary"].methods == study.blocks["primary"].methods
    assert other.blocks["sensitivity"] == study.blocks["sensitivity"]


# -- trials and tables ------------------------------------------------------------------------------

def made_trials(accuracies):
    """accuracies: (method, value) → by seed 101 and 102 the accuracy at step 4; at step 2 the other way round."""
    lines = []
    for (method, value), found in accuracies.items():
        plain = method == "fine_tuning"
        for seed, accuracy in zip((101, 102), found):
            for budget, measured in ((2, 1 - accuracy), (4, accuracy)):
                lines.append(dict(cell=f"{method}-{value}-{seed}", task="t", start="base", method=method, seed=seed, measure="accuracy", split="validation", budget=budget,
                                  measured=measured, learning_rate=value if plain else 0.002, strength=np.nan if plain else value))
    return pd.DataFrame(lines)


def test_trials_are_judged_at_the_last_step():
    found = {("fine_tuning", 0.001): (0.5, 0.5), ("fine_tuning", 0.002): (0.6, 0.61), ("carma", 0.1): (0.5, 0.5), ("carma", 0.3): (0.6, 0.61)}
    best = best_trials(made_trials(found))
    assert chosen(best) == ({("t", "base"): 0.002}, {("t", "carma"): 0.3})
    assert best.trials.tolist() == [2, 2] and best.seeds.tolist() == [2, 2]
    assert best.accuracy.tolist() == pytest.approx([0.605, 0.605])


def test_of_equal_trials_the_smaller_value_wins_and_tasks_end_at_steps_of_their_own():
    equal = made_trials({("fine_tuning", 0.002): (0.5, 0.5), ("fine_tuning", 0.001): (0.5, 0.5), ("carma", 0.6): (0.5, 0.5), ("carma", 0.3): (0.4, 0.6)})
    assert chosen(best_trials(equal)) == ({("t", "base"): 0.001}, {("t", "carma"): 0.3})
    longer = equal.assign(task="u", budget=equal.budget * 10)
    assert best_trials(pd.concat([equal, longer])).groupby("task").size().to_dict() == {"t": 2, "u": 2}
    big = equal.assign(start="big", budget=equal.budget * 2)
    assert chosen(best_trials(pd.concat([equal, big])))[0] == {("t", "base"): 0.001, ("t", "big"): 0.001}
    other = equal.assign(split="test_seen", measured=1 - equal.measured)
    pd.testing.assert_frame_equal(best_trials(pd.concat([equal, other])), best_trials(equal))


@pytest.mark.parametrize("change", [{}, {"budget": 5}, {"budget": 5, "learning_rate": 0.004}])
def test_trials_of_two_plans_in_one_archive_are_refused(change):
    """The same value with another batch size, or trainings of another length: they would be averaged, or one would win."""
    trials = made_trials({("fine_tuning", 0.001): (0.5, 0.5), ("fine_tuning", 0.002): (0.6, 0.6)})
    other = trials[trials.budget == 4].assign(cell=lambda rows: rows.cell + "-other", **change)
    with pytest.raises(ValueError, match="trials of several plans: give each plan an archive of its own"):
        best_trials(pd.concat([trials, other]))


SETTINGS = dict(keep="last", schedule="constant", evaluations=1, test_at=(3,), test_splits=(), changed_splits=("test_seen",), adversary_rate=0.25,
                adversary_tries=2, depth_shares=(0.5, 1.0), protocols=("sum", "mean", "max"), layers=3, keep_model=False)


@pytest.fixture(scope="module")
def archive(data, tmp_path_factory, client):
    """Two tested cells and a trial, in an archive beside their run folder."""
    import shutil

    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(data, folder / "run")
    cells = [cell_of("carma", **SETTINGS), cell_of("fine_tuning", **SETTINGS), cell_of("carma", seed=101, trial=True, **SETTINGS)]
    assert run(cells, folder / "run", client, collect=lambda: pack(folder / "run", cells, folder / "archive")) == {}
    return folder


def test_answers_of_an_archive_are_a_result_table(archive):
    cells, _ = read_cells(archive / "archive")
    assert list(cells.method) == ["carma", "fine_tuning"] and set(FACTS) <= set(cells.columns), "trials do not count as cells"
    found = check_results(read_answers(archive / "archive", cells))
    assert set(RESULT_COLUMNS) <= set(found.columns) and {"training_items", "strength", "change", "value"} <= set(found.columns)
    splits = found[found.condition == "clean"].split.nunique()
    mine = found[found.method == "carma"]
    assert splits >= 3 and mine.groupby(["condition", "source", "budget"], observed=True).size().to_dict() == {
        ("clean", "", 3): 12 * splits, ("clean", "", 6): 12 * splits, ("replaced", "controlled", 6): 12, ("replaced", "adversary", 6): 6,
        ("pooled", "", 6): 6 * 2 * 3}
    assert read_answers(archive / "archive", cells, conditions=["clean"], budgets=[3]).budget.unique().tolist() == [3]
    assert read_answers(archive / "archive", cells[:1]).method.astype(str).unique().tolist() == ["carma"]


def test_answers_under_synonyms_are_of_one_version_of_the_rules(archive, capsys):
    """Other rules replace other words, so methods would be compared on other texts."""
    cells, _ = read_cells(archive / "archive")
    found = read_answers(archive / "archive", cells.assign(rules=["1.2", "1.4"]))
    assert found.groupby("condition", observed=True).method.agg(lambda of: sorted(set(map(str, of)))).to_dict() == {
        "clean": ["carma", "fine_tuning"], "pooled": ["carma", "fine_tuning"], "replaced": ["carma"]}
    assert capsys.readouterr().out.startswith("1 of 2 cells were tested under other rules")
    found = read_answers(archive / "archive", cells.assign(rules=["1.2", "1.4"]), conditions=["clean"])
    assert found.method.nunique() == 2 and capsys.readouterr().out == ""
    same = read_answers(archive / "archive", cells.assign(rules=["2.5", "3.6"]), conditions=["replaced"])
    assert same.method.nunique() == 2 and capsys.readouterr().out == "", "these replace the same words"


def test_cells_of_keeps_what_is_done_of_what_is_wanted(archive):
    cells, _ = read_cells(archive / "archive")
    assert len(cells_of(cells, [cell_of("carma", **SETTINGS), cell_of("carma", seed=9, **SETTINGS)])) == 1
    assert not len(cells_of(cells, [])) and len(cells_of(cells, [cell_of("carma", **{**SETTINGS, "test_items": 3})])) == 1


def test_a_seed_is_whole_once_every_method_of_it_is_done():
    made = pd.DataFrame([("a", "carma", 1), ("a", "fine_tuning", 1), ("a", "carma", 2), ("b", "carma", 2), ("b", "fine_tuning", 2),
                         ("b", "fine_tuning", 10)], columns=["task", "method", "seed"]).assign(start="base", change="")
    both = ["carma", "fine_tuning"]
    assert whole_seeds(made, both)[["task", "seed"]].to_records(index=False).tolist() == [("a", 1), ("a", 1), ("b", 2), ("b", 2)]
    plain = made[made["method"] == "fine_tuning"]
    assert whole_seeds(made[:0], both).empty and whole_seeds(plain, both).empty, "no seed is whole while a method has no cell"
    assert len(whole_seeds(plain, both[1:])) == len(plain)


def test_trials_measure_validation_accuracy_alone(archive):
    cells, measures = read_cells(archive / "archive", trials=True)
    assert len(cells) == 1 and set(measures.measure) == {"accuracy"} and set(measures.split) == {"validation"}
    assert sorted(measures.budget) == [3, 6] and measures.measured.between(0, 1).all()


def test_an_archive_knows_its_cells_by_settings_and_data(archive, tmp_path, capsys):
    held = in_archive(archive / "archive", archive / "run")
    assert held(cell_of("carma", **SETTINGS)) and held(cell_of("carma", seed=101, trial=True, **SETTINGS))
    for other in (dict(steps=7), dict(test_items=3), dict(rates=(0.4,)), dict(learning_rate=0.02)):
        assert not held(cell_of("carma", **{**SETTINGS, **other}))
    assert not held(cell_of("carma", seed=2, **SETTINGS)) and capsys.readouterr().out == ""
    facts = pd.read_parquet(archive / "archive" / "cells.parquet")
    facts.assign(rules="0.0").to_parquet(tmp_path / "cells.parquet")
    assert in_archive(tmp_path, archive / "run")(cell_of("carma", **SETTINGS))
    assert "3 of 3 cells" in (said := capsys.readouterr().out) and "earlier rules" in said and said.count("\n") == 1
    facts.assign(mark="other").to_parquet(tmp_path / "cells.parquet")
    assert not in_archive(tmp_path, archive / "run")(cell_of("carma", **SETTINGS)), "other data"
    assert not in_archive(tmp_path / "none", archive / "run")(cell_of("carma", **SETTINGS))


def test_no_cell_is_a_clear_error(tmp_path):
    with pytest.raises(ResultsError, match="no finished cell in .*run the notebook that trains them first"):
        read_cells(tmp_path)
    with pytest.raises(ResultsError, match="no finished cell"):
        read_cells(PLAN.parent.parent / "pretrained-none", trials=True)


def test_the_reader_of_a_study_makes_recipes_that_are_whole(study):
    recipe = study.recipe(SENTIMENT, "base", learning_rate=0.001)
    assert isinstance(recipe, Recipe) and recipe.steps == 480 and recipe.batch_size == 16 and recipe.keep == "last"
    assert math.isclose(recipe.carma_weight, 0.2) and Cell(SENTIMENT, "carma", 1, recipe, 0.3).place.parts[0] == SENTIMENT
