"""The controlled study: a cell is whole or absent, budgets are what shorter trainings give, tables say what was asked."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from carma_lib.losses import CarmaConfig
from carma_lib.stats.table import RESULT_COLUMNS, ResultsError, check_results
from carma_lib.lab.study import is_done, prepare, run_cell, run_cells
from carma_lib.lab.study_plan import (ALTERNATIVES, TRIALS, Design, Recipe, StudyCell, carma_of, design_from, read_plan,
                                  recipe_from, strength_of, write_plan)
from carma_lib.lab.study_tables import (best_trials, cells_of, chosen_rates, chosen_strengths, read_answers, read_cells)
from carma_lib.stats.curves import curve_summary, paired_differences

RECIPE = Recipe(budgets=(3, 5), batch_size=8, warmup_steps=1, base_steps=3, validation_items=30, test_items=24,
                pooled_items=12, adversary_tries=2, heads=2, rates=(0.25,), depth_shares=(0.5, 1.0),
                carma=CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1)))
CELL = StudyCell(task="controlled_sentiment", start="base", training_items=60, method="carma", seed=1,
                 learning_rate=0.01, strength=0.3, layers=2, width=16)
RATES = {(task, start): 0.001 for task in Design().tasks for start in Design().starts}
STRENGTHS = {(task, method): TRIALS[method][0] for task in Design().tasks for method in ("carma", *ALTERNATIVES)}


def table(folder, cell):
    return pd.read_parquet(folder / f"{cell.place}.parquet")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory, work):
    folder = tmp_path_factory.mktemp("study")
    for cell in (CELL, replace(CELL, method="fine_tuning", strength=None), replace(CELL, start="random"),
                 replace(CELL, task="controlled_inverse_dictionary"), replace(CELL, tuning=True)):
        run_cell(folder, work, cell, RECIPE)
    return folder


def test_every_cell_of_the_study_has_its_own_place():
    design = Design()
    cells = {cell for block in design.blocks(RATES, STRENGTHS).values() for cell in block}
    cells |= {*design.learning_rate_trials(), *design.strength_trials(RATES)}
    assert len({cell.place for cell in cells}) == len(cells) > 450


def test_every_method_gets_as_many_trials():
    assert len({len(values) for values in TRIALS.values()}) == 1
    trials = [*Design().learning_rate_trials(), *Design().strength_trials(RATES)]
    seeds = {(cell.seed) for block in Design().blocks(RATES, STRENGTHS).values() for cell in block}
    assert not seeds & {cell.seed for cell in trials}, "seeds of the trials are used nowhere else"
    from_base = pd.Series([(cell.task, cell.method) for cell in trials if cell.start == "base"]).value_counts()
    assert from_base.nunique() == 1


def test_changes_reach_the_settings():
    change = lambda name, value: carma_of(replace(CELL, layers=4, change=(name, value)), Recipe())  # noqa: E731
    assert change("term_weights", (0.1, 0.9)).mi_weight == 0.1 and change("term_weights", (0.1, 0.9)).stability_weight == 0.9
    assert change("layer_range", (2, 3)).layers == (2, 3)
    assert change("temperature", 0.5).temperature == 0.5
    assert change("num_negatives", "all").num_negatives is None and change("num_negatives", 1).num_negatives == 1
    assert change("level", "phrase") == Recipe().carma
    assert strength_of(replace(CELL, change=("carma_weight", 0.9))) == 0.9 and strength_of(CELL) == 0.3
    assert [carma_of(replace(CELL, layers=depth), Recipe()).mi_layers for depth in (2, 4, 8)] == [(0, 1), (0, 2), (0, 5)]


def test_plan_comes_back_as_it_was(tmp_path):
    design = design_from({"seeds": [1, 2], "model_sizes": [[2, 32]], "sensitivity": {"layer_range": [[0, 1]]}})
    recipe = recipe_from({"budgets": [5, 10], "carma": {"mi_layers": [0, 1], "stability_layers": [0, 1]}})
    write_plan(tmp_path, design, recipe)
    assert read_plan(tmp_path) == (design, recipe)
    with pytest.raises(ValueError, match="Design has no field 'sedes'; it has tasks"):
        design_from({"sedes": [1]})
    with pytest.raises(ValueError, match="budgets must be steps in ascending order"):
        recipe_from({"budgets": [10, 5]})
    with pytest.raises(FileNotFoundError, match="run notebook 07 first"):
        read_plan(tmp_path / "none")


def test_a_second_run_gives_the_same_table(study, work, tmp_path):
    for cell in (CELL, replace(CELL, start="random")):
        run_cell(tmp_path, work, cell, RECIPE)
        pd.testing.assert_frame_equal(table(tmp_path, cell), table(study, cell))
    own, again = read_cells(study)[1], read_cells(tmp_path)[1]
    own = own[(own.method == "carma") & (own.task == CELL.task)].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, again)


def test_a_budget_is_what_a_training_of_that_length_gives(study, work, tmp_path):
    """The learning rate does not know how long the run will be, and testing does not disturb it."""
    long = table(study, CELL)
    for budget in RECIPE.budgets:
        run_cell(tmp_path / str(budget), work, CELL, replace(RECIPE, budgets=(budget,)))
        short = table(tmp_path / str(budget), CELL)
        same = long[(long.budget == budget) & (long.condition == "clean")].reset_index(drop=True)
        pd.testing.assert_frame_equal(same, short[short.condition == "clean"].reset_index(drop=True))


def test_a_finished_cell_is_not_made_again_and_half_a_cell_is(study, work, tmp_path):
    before = (study / f"{CELL.place}.json").stat().st_mtime_ns
    run_cell(study, work, CELL, RECIPE)
    assert (study / f"{CELL.place}.json").stat().st_mtime_ns == before
    half = tmp_path / f"{CELL.place}.parquet"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"cut short")
    assert not is_done(tmp_path, CELL)
    run_cells(tmp_path, work, [CELL, CELL], RECIPE, workers=1)
    pd.testing.assert_frame_equal(table(tmp_path, CELL), table(study, CELL))


def test_cells_of_another_recipe_are_not_mixed_in(study, work):
    with pytest.raises(ValueError, match="made by another recipe, such as cells/controlled_sentiment"):
        run_cells(study, work, [CELL], replace(RECIPE, batch_size=4))
    run_cells(study, work, [CELL], RECIPE)


def test_answers_are_a_result_table(study):
    cells, _ = read_cells(study)
    assert len(cells) == 4, "trials do not count as cells"
    answers = check_results(read_answers(cells))
    assert set(RESULT_COLUMNS) <= set(answers.columns)
    mine = answers[(answers.task == CELL.task) & (answers.start == "base") & (answers.method == "carma")]
    assert mine.groupby(["condition", "source", "budget"], observed=True).size().to_dict() == {
        ("clean", "", 3): 72, ("clean", "", 5): 72, ("replaced", "controlled", 5): 24, ("replaced", "adversary", 5): 12,
        ("pooled", "", 5): 12 * 2 * 3}
    assert read_answers(cells, conditions=["clean"], budgets=[3]).budget.unique().tolist() == [3]
    assert len(cells_of(cells, [CELL, replace(CELL, seed=9)])) == 1 and not len(cells_of(cells, []))


def test_a_study_from_one_start_has_all_its_blocks():
    rates = {place: rate for place, rate in RATES.items() if place[1] == "base"}
    blocks = Design(starts=("base",)).blocks(rates, STRENGTHS)
    assert {cell.start for cell in blocks["model_sizes"]} == {"random"} and not blocks["alternatives_from_other_starts"]


def test_the_adversary_is_no_kinder_than_one_replacement(study, work):
    """Of its tries the one with the highest loss: never below what each try alone gives."""
    from carma_lib.lab.evaluate import answers
    from carma_lib.models import load_model
    from carma_lib.synonyms.replacement import replace_all
    from carma_lib.lab.study import _rows, _text_prompts, _tokenizer, make_base
    from carma_lib.tasks.controlled.lexicon import controlled_synonyms
    import carma_lib.lab.study as module

    model, _ = load_model(str(make_base(work, 1, 2, 16, RECIPE)))
    changed = module._changed_answers(work, CELL, RECIPE, model)
    worst = changed[changed.source == "adversary"].log_probability.to_numpy()
    rows = _rows(work, CELL.task, "test_seen", RECIPE).select(range(12))
    for seed in (1, 2):
        texts = replace_all(rows["text"], rate=0.25, seed=seed, item_ids=rows["item_id"], source=controlled_synonyms())
        one = answers(model, _tokenizer(work), _text_prompts(work, CELL.task, RECIPE, tuple(each.text for each in texts)))
        assert (worst <= one.log_probability.to_numpy() + 1e-6).all()


def test_measures_are_complete(study):
    measures = read_cells(study)[1]
    counts = measures[measures.start == "base"].groupby("measure").size()
    for name in ("variance_explained", "angle", "read_out_seen", "read_out_held_out"):
        assert counts[f"{name}_before"] == counts[f"{name}_after"] == 3 * 2
    assert counts["token_mutual_information_after"] == counts["drift"] == 3 * 3
    assert measures.measured.notna().all() and set(read_cells(study, tuning=True)[1].measure) == {"accuracy"}


def test_no_cell_is_a_clear_error(tmp_path):
    with pytest.raises(ResultsError, match="no finished cell of the study"):
        read_cells(tmp_path)


def made_trials():
    lines = []
    for method, values in (("fine_tuning", (0.001, 0.002)), ("carma", (0.1, 0.3))):
        for value in values:
            for seed in (101, 102):
                better = value == values[1]
                for budget, accuracy in ((2, 0.9 - better), (4, 0.5 + 0.1 * better + 0.01 * (seed == 102))):
                    lines.append(dict(task="t", start="base", method=method, seed=seed, measure="accuracy", split="validation",
                                      budget=budget, measured=accuracy, learning_rate=value if method == "fine_tuning" else 0.002,
                                      strength=np.nan if method == "fine_tuning" else value))
    return pd.DataFrame(lines)


def test_trials_are_judged_at_the_last_budget():
    best = best_trials(made_trials())
    assert chosen_rates(best) == {("t", "base"): 0.002} and chosen_strengths(best) == {("t", "carma"): 0.3}
    assert best.trials.tolist() == [2, 2] and best.seeds.tolist() == [2, 2]
    assert best.accuracy.tolist() == pytest.approx([0.605, 0.605])


def test_curves():
    facts = dict(task="t", start="base", training_items=9, method="carma", seed=1, learning_rate=0.1, strength=np.nan, change="",
                 value="", layers=2, width=16, measure="accuracy", split="test_seen")
    curve = pd.DataFrame([facts | dict(budget=step, measured=value) for step, value in ((100, 0.2), (200, 0.4), (400, 0.8))])
    found = curve_summary(curve, level=0.5).iloc[0]
    assert found.converged == 0.8 and found.area == pytest.approx((0.3 + 0.6) / 2)
    assert found.steps_to_level == pytest.approx(200 * 2 ** 0.25)
    assert np.isnan(curve_summary(curve, level=0.9).steps_to_level[0]) and curve_summary(curve, level=0.1).steps_to_level[0] == pytest.approx(100)


def test_paired_differences_are_a_paired_t_test():
    numbers = np.random.default_rng(0).normal(size=(2, 6))
    lines = [dict(task="t", method=method, seed=seed, value=numbers[row, seed]) for row, method in enumerate(("carma", "fine_tuning"))
             for seed in range(6)] + [dict(task="t", method="carma", seed=9, value=100.0)]
    found = paired_differences(pd.DataFrame(lines), "value", by=["task"]).iloc[0]
    expected = stats.ttest_rel(numbers[0], numbers[1])
    low, high = expected.confidence_interval()
    assert found.n_seeds == 6 and (found.estimate, found.low, found.high) == pytest.approx(((numbers[0] - numbers[1]).mean(), low, high))
    assert paired_differences(pd.DataFrame(lines), "value", by=["task"], method="").method.tolist() == ["carma"]


def test_bad_cells_are_refused():
    with pytest.raises(ValueError, match="unknown start 'pretrained'; the starts are base, random"):
        replace(CELL, start="pretrained")
    with pytest.raises(ValueError, match="unknown method 'mixout'"):
        replace(CELL, method="mixout")
    assert Path(CELL.place).parts[0] == "cells"
