"""What the study's notebooks ask of their tables, against the same by hand on small tables."""
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_results import made_results
from scipy import stats

from carma_lib.lab.study import read_study
from carma_lib.report import tables
from carma_lib.report.plots import forest_plot
from carma_lib.stats.claims import claims_for, comparisons_so_far, power_table, primary_comparisons
from carma_lib.stats.metrics import per_seed
from carma_lib.stats.study import (before_and_after, changed_settings, counted_claims, curve_table, forgetting,
                                   method_differences, predictors, seed_differences, setting_differences, speed_and_level,
                                   steps_reached)
from carma_lib.stats.table import select, task_label

PLANS = Path(__file__).parent.parent / "data"
CLAIMS = [{"name": "accuracy", "kind": "difference", "metric": "accuracy", "split": "test", "condition": "clean"},
          {"name": "synonyms 25 %", "kind": "difference", "metric": "consist_syn", "condition": "replaced", "rate": 0.25}]


def values(methods=("fine_tuning", "carma"), seeds=(1, 2, 3), **columns):
    generator = np.random.default_rng(0)
    rows = [dict(method=method, seed=seed, measured=generator.random(), **columns) for method in methods for seed in seeds]
    return pd.DataFrame(rows)


def interval(differences):
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return np.mean(differences), np.mean(differences) - half, np.mean(differences) + half


def test_rows_are_selected_by_value_by_list_and_up_to_rounding():
    table = pd.DataFrame(dict(rate=[0.1, 0.1 + 1e-12, 0.25, np.nan], split=["a", "b", "b", "c"], seed=[1, 2, 3, 4]))
    kept = pd.DataFrame({"rate": [0.3333], "depth_share": [0.1667], "strength": [0.3333]})
    assert len(select(kept, rate=1 / 3, depth_share=1 / 6)) == 1 and select(kept, strength=1 / 3).empty
    assert len(select(pd.DataFrame({"rate": [1 / 3]}), rate=1 / 3)) == len(select(pd.DataFrame({"rate": [1 / 3]}), rate=0.3333)) == 1
    assert list(select(table, rate=0.1).seed) == [1, 2] and list(select(table, split="b", seed=[3, 4]).seed) == [3]
    assert list(select(table, split={"a": 0, "c": 0}).seed) == [1, 4] and len(select(table, split=[])) == 0
    assert list(select(table.astype({"split": "category"}), split="c").seed) == [4] and len(select(table)) == 4
    with pytest.raises(KeyError):
        select(table, depth=1)
    assert task_label("controlled_inverse_dictionary") == "inverse dictionary" and task_label("sst3") == "SST sentiment"


def test_seed_differences_are_within_seeds():
    table = values(("fine_tuning", "carma", "r_drop"), task="a")
    found = seed_differences(table, "measured", by=["task"])
    assert set(found.method) == {"carma", "r_drop"} and len(found) == 6
    for row in found.itertuples():
        plain = table[(table.method == "fine_tuning") & (table.seed == row.seed)].measured.iloc[0]
        assert row.difference == row.measured - plain
    assert seed_differences(select(table, method="carma"), "measured", by=["task"]).empty


def test_two_values_of_one_seed_are_neither_averaged_nor_multiplied():
    table = values(("fine_tuning", "carma"), task="a", measure="perplexity_before")
    twice = pd.concat([table, table.assign(measured=9.0)])
    for asked in (lambda: seed_differences(twice, "measured", by=["task"]), lambda: forgetting(twice)):
        with pytest.raises(ValueError, match="several values of one method and seed"):
            asked()


def test_methods_are_compared_by_question():
    answers = made_results(seeds=4)
    found, dots = method_differences(answers, [{**claim, "split": "test"} for claim in CLAIMS])
    assert set(found.question) == {"accuracy", "synonyms 25 %"}
    kept = select(per_seed(answers, "consist_syn"), rate=0.25).pivot(index="seed", columns="method", values="value")[["carma", "fine_tuning"]].dropna()
    row = found[(found.question == "synonyms 25 %") & (found.method == "carma")].iloc[0]
    assert (row.estimate, row.low, row.high) == pytest.approx(interval(kept.carma - kept.fine_tuning))
    assert select(dots, question="synonyms 25 %", method="carma").difference.mean() == pytest.approx(row.estimate)


def test_forgetting_is_a_ratio_of_growths():
    parts = [values(task="a", measure=name) for name in ("perplexity_before", "perplexity_after", "drift")]
    parts[1]["measured"] = [20.0, 30.0, 50.0, 10.0, 12.0, 40.0]
    parts[0]["measured"] = 2.0
    row = forgetting(pd.concat(parts)).iloc[0]
    logarithms = np.log([10 / 20, 12 / 30, 40 / 50])
    assert (row.ratio, row["from"], row["to"]) == pytest.approx(np.exp(interval(logarithms)))
    assert row["perplexity, after over before"] == pytest.approx(np.exp(np.mean(np.log([5, 6, 20])))) and row.n_seeds == 3


def test_curves_tell_speed_from_level():
    common = dict(measure="accuracy", task="a", start="base", training_items=900, split="test", layer=-1)
    rows = [dict(common, method=method, seed=seed, budget=budget, measured=value + 0.01 * seed)
            for method, curve in {"fine_tuning": (0.1, 0.2, 0.4), "carma": (0.1, 0.3, 0.4)}.items()
            for budget, value in zip((10, 20, 40), curve) for seed in (1, 2, 3)]
    summary = curve_table(pd.DataFrame(rows), level=0.5)
    both = speed_and_level(summary).iloc[0]
    assert both.area == pytest.approx(5) and both.end == pytest.approx(0, abs=1e-12) and both.n_seeds == 3
    steps = steps_reached(summary).iloc[0]
    assert steps["reached", "carma"] == steps["seeds", "fine_tuning"] == 3
    # the middle seed: 0.12, 0.22 at 10 and 20 steps, the level 0.5 · 0.42 = 0.21
    assert steps["median_steps", "fine_tuning"] == pytest.approx(10 * 2**0.9) and steps["median_steps", "carma"] < 18
    never = steps_reached(curve_table(pd.DataFrame(rows), level=2.0)).iloc[0]
    assert never["reached", "carma"] == 0 and np.isnan(never["median_steps", "carma"])


def test_settings_are_compared_with_one_plain_training():
    plain = values(("fine_tuning",), task="a", change="", value="")
    carma = [values(("carma",), task="a", change=change, value=value) for change, value in (("temperature", "0.5"), ("", ""))]
    carma[0]["measured"] += 0.1
    measured = changed_settings(pd.concat([plain, *carma]), {"temperature": "temperature"})
    found, dots = setting_differences(measured)
    assert list(found.setting) == ["as tuned", "temperature 0.5"] and set(found.method) == {"carma"}
    assert found.estimate.iloc[1] - found.estimate.iloc[0] == pytest.approx(0.1)
    assert len(dots) == 6 and select(dots, setting="as tuned").difference.mean() == pytest.approx(found.estimate.iloc[0])


def test_states_before_are_the_untuned_model():
    table = pd.concat([values(measure=f"angle_{when}", layer=0) for when in ("before", "after")])
    table["measured"] = np.arange(len(table))
    found = before_and_after(table, "angle", ["carma"])
    assert dict(found.method.value_counts()) == {"untuned": 3, "carma": 3}
    assert set(select(found, method="untuned").measured) == set(select(table, measure="angle_before", method="fine_tuning").measured)


def test_predictors_are_slopes_per_standard_deviation():
    runs = values(seeds=range(6), task="a", start="base").rename(columns={"measured": "x"})
    runs["accuracy"] = 0.3 + 0.05 * (runs.x - runs.x.mean()) / runs.x.std() + 0.1 * (runs.method == "carma")
    row = predictors(runs, {"x": "the measure"}).iloc[0]
    assert row.slope == pytest.approx(5) and row.runs == 12 and row.seeds == 6 and row.measure == "the measure"
    assert row.spearman == pytest.approx(stats.spearmanr(runs.x, runs.accuracy).statistic)
    lacking = pd.concat([runs, runs.iloc[:1].assign(x=np.nan, seed=9)])
    assert predictors(lacking, {"x": "the measure"}).iloc[0].equals(row)


def test_claims_are_counted_by_question():
    lines = [("a: synonyms 10%", "difference", 0.1, 0.05, 0.2, np.nan, "shown"), ("b: synonyms 25 %", "difference", -0.1, -0.3, 0.1, np.nan, "open"),
             ("a: spread", "cv ratio", 0.5, 0.3, 0.9, np.nan, "open"), ("a: preserved", "non-inferiority", -0.01, -0.015, 0.0, 0.02, "open"),
             ("a: drop", "difference", 0.05, 0.01, 0.09, np.nan, "the opposite shown"), ("b: drop", "difference", -0.05, -0.1, 0.1, np.nan, "open")]
    family = pd.DataFrame(lines, columns=["name", "kind", "estimate", "low", "high", "margin", "outcome"]).assign(start="base")
    family["metric"] = np.where(family["name"].str.endswith("drop"), "pooling_drop", "accuracy")
    counted = counted_claims(family).loc["base"]
    assert counted.loc["synonyms"].tolist() == [2, 1, 1, 1] and counted.loc["spread"].tolist() == [1, 1, 1, 0]
    assert counted.loc["preserved"].tolist() == [1, 0, 1, 0] and counted.loc["drop"].tolist() == [2, 1, 1, 0]
    short = tables.claims_in_short(family)
    assert short["a: synonyms 10%"] == "+10.0 [5.0, 20.0] *" and short["a: spread"] == "0.50 [0.30, 0.90]"


def test_few_seeds_have_an_estimate_alone():
    table = pd.DataFrame({"estimate": [0.02, -0.01], "low": [0.01, -0.2], "high": [0.03, 0.1], "n_seeds": [3, 2]}, index=[7, 9])
    assert tables.with_interval(table).tolist() == ["+2.0 [1.0, 3.0]", "−1.0 [−20.0, 10.0]"]
    assert tables.with_interval(table, fewest_seeds=3).to_dict() == {7: "+2.0 [1.0, 3.0]", 9: "−1.0"}
    assert tables.with_interval(table[:0]).tolist() == [] and len(table[:0].assign(text=tables.with_interval(table[:0]))) == 0


def test_a_study_that_is_not_whole_says_what_is_not_measured():
    plan = claims_for(CLAIMS, ["made_task", "sst3"], start="random")
    assert [claim["name"] for claim in plan] == ["made task: accuracy", "made task: synonyms 25 %", "SST sentiment: accuracy", "SST sentiment: synonyms 25 %"]
    nothing = comparisons_so_far(None, plan)
    assert set(nothing.verdict) == {"not yet measured"} and list(nothing.name) == [claim["name"] for claim in plan]
    found = comparisons_so_far(made_results(seeds=4), plan)
    assert list(found.verdict[2:]) == ["not yet measured"] * 2 and not found.verdict[:2].isin(["not yet measured"]).any()
    pd.testing.assert_series_equal(found.estimate[:2], primary_comparisons(made_results(seeds=4), plan[:2]).estimate)
    rising = pd.DataFrame([{"task": "made_task", "method": method, "start": "random", "seed": seed, "step": step, "validation_accuracy": 0.1 + step / 1000
                            + seed * step / 1e5} for method in ("fine_tuning", "carma") for seed in range(1, 5) for step in (20, 40, 80)])
    curved = comparisons_so_far(made_results(seeds=4).assign(budget=80), plan, curves=rising)
    assert set(curved.curve[:2]) == {"still rises"} and set(curved.curve[2:]) == {""}
    for few in (made_results(seeds=2), made_results(seeds=1)):
        assert set(comparisons_so_far(few, plan).outcome) == {"not tested"}
    for method in ("fine_tuning", "carma"):
        one_method = comparisons_so_far(select(made_results(), method=method), plan)
        assert set(one_method.verdict) == {"not yet measured"}
    for table in (nothing, found):  # of one shape, for all that read them
        assert tables.claims_in_short(table).str.contains("nan").sum() == 0 and len(power_table(table)) == (0 if table is nothing else 58)
        headings, rows = tables.claim_rows(table)
        assert rows[-1] == [plan[-1]["name"], *[""] * 6, "0", "0", "0", "not yet measured"]
        assert "nan" not in str(rows) and ".0" not in rows[0][headings.index("items")]
        sentences = [text for text, _ in tables.answer(table)]
        assert any(text.endswith(": not yet measured.") for text in sentences) and "nan" not in str(sentences)
    assert forest_plot(found).axes
    with pytest.raises(ValueError, match="no claim of the table could be estimated"):
        forest_plot(nothing)
    one_condition = comparisons_so_far(select(made_results(), condition="clean"), plan)
    assert list(one_condition.verdict == "not yet measured") == [False, True, True, True]


@pytest.mark.parametrize("name", ["study", "pretrained"])
def test_committed_claims_can_be_asked(name):
    study = read_study(PLANS / name / "plan.yml")
    found = comparisons_so_far(None, claims_for(study.claims, study.tasks, start="base"))
    assert len(found) == len(study.claims) * len(study.tasks)


def test_a_pretrained_study_is_planned_without_its_models(monkeypatch, tmp_path):
    monkeypatch.setenv("CARMA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    study = read_study(PLANS / "pretrained" / "plan.yml")
    planned = study.cells(defaultdict(lambda: 1e-3), {})
    assert len(planned["primary"]) == 40 and not any(tmp_path.iterdir())
    carma = next(cell for cell in planned["published_settings"] if cell.method == "carma")
    assert carma.recipe.mi_layers == (0, 9), "30 blocks of SmolLM2"
