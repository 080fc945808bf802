"""Metrics, intervals, tests against hand computation, scipy, statsmodels and studies of known truth."""
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from made_results import made_results
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from carma_lib.stats import inference
from carma_lib.stats import metrics as statistics
from carma_lib.stats.claims import check_plan, default_claims, power_table, primary_comparisons
from carma_lib.stats.curves import clustered_slope, paired_differences, still_rising
from carma_lib.stats.inference import NotComparable
from carma_lib.stats.intervals import critical_value, crossed_interval, cv_interval, tail_probability
from carma_lib.stats.metrics import METRICS
from carma_lib.stats.study import counted_claims
from carma_lib.stats.table import ResultsError, at_the_end, check_results, read_results, select

def accuracy(table):
    return statistics.summarise(table, "accuracy")


def consist_syn(table):
    return statistics.summarise(table, "consist_syn")


PAIR = {"method": "carma", "baseline": "fine_tuning"}
CLEAN = {"condition": "clean"}


@pytest.fixture(scope="module")
def evidence():
    """The benchmark's simulations, here with fewer studies."""
    path = Path(__file__).parents[1] / "benchmarks" / "evidence.py"
    spec = importlib.util.spec_from_file_location("evidence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return made_results(seeds=6, items=80)


def row_of(table, **where):
    chosen = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    assert len(chosen) == 1, f"{len(chosen)} rows for {where}"
    return chosen.iloc[0]


# -- the table on disk -----------------------------------------------------------------------------

def test_table_survives_the_disk(results, tmp_path):
    results.to_parquet(tmp_path / "results.parquet", index=False)
    read = read_results(tmp_path / "results.parquet")
    order = list(statistics.CELL_COLUMNS) + ["seed", "item_id"]
    as_text = [frame.astype({name: str for name in frame.select_dtypes(["category", "object", "string"])})
               .sort_values(order, ignore_index=True) for frame in (read, results)]
    pd.testing.assert_frame_equal(*as_text)
    assert isinstance(read["prediction"].dtype, pd.CategoricalDtype) and read["correct"].dtype == bool


@pytest.mark.parametrize("spoil, message", [
    (lambda frame: frame.drop(columns="rank"), "lacks the columns"),
    (lambda frame: frame.iloc[:0], "no rows"),
    (lambda frame: pd.concat([frame, frame.iloc[[3]]]), "1 duplicate rows"),
    (lambda frame: frame.assign(log_probability=np.nan), "missing values in 'log_probability'"),
    (lambda frame: frame.assign(condition="cleaned"), "unknown conditions"),
    (lambda frame: frame.assign(seed=0.5), "'seed'"),
    (lambda frame: frame.assign(rank=0), "rank below 1"),
    (lambda frame: frame.assign(depth_share=np.nan), "missing values in 'depth_share'"),
])
def test_bad_tables_are_refused_in_one_line(results, spoil, message):
    with pytest.raises(ResultsError, match=message) as error:
        check_results(spoil(results))
    assert "\n" not in str(error.value)


def test_absent_and_other_files_are_errors(results, tmp_path):
    with pytest.raises(ResultsError, match="no result table"):
        read_results(str(tmp_path / "results.parquet"))
    with pytest.raises(ResultsError, match="no result table"):
        read_results(tmp_path)
    pd.concat([results, results]).to_parquet(tmp_path / "results_twice.parquet", index=False)
    with pytest.raises(ResultsError, match="duplicate rows"):
        read_results(tmp_path / "results_twice.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "results_c.parquet")
    with pytest.raises(ResultsError, match="is no result table"):
        read_results(tmp_path / "results_c.parquet")


# -- metrics ---------------------------------------------------------------------------------------

def by_hand(results, method, seed, metric, **condition):
    """One seed's value, with plain loops over items."""
    rows = results[(results["method"] == method) & (results["seed"] == seed)]
    clean = {row.item_id: row for row in rows[rows["condition"] == "clean"].itertuples()}

    def after(row):
        """An item that nothing was changed in keeps its answer."""
        return row if row.changed else clean[row.item_id]

    for name, value in condition.items():
        rows = rows[rows[name] == value]
    changed = list(rows.itertuples())
    right = [row for row in changed if clean[row.item_id].correct]
    return {
        "accuracy": lambda: sum(row.correct for row in changed) / len(changed),
        "top_5": lambda: sum(row.rank <= 5 for row in changed) / len(changed),
        "mean_reciprocal_rank": lambda: sum(1 / row.rank for row in changed) / len(changed),
        "mean_log_probability": lambda: sum(row.log_probability for row in changed) / len(changed),
        "consist_syn": lambda: sum(after(row).correct for row in right) / len(right),
        "accuracy_kept": lambda: sum(after(row).correct for row in right) / len(right),
        "agreement": lambda: sum(after(row).prediction == clean[row.item_id].prediction for row in changed)
        / len(changed),
        "pooling_drop": lambda: (sum(clean[row.item_id].correct for row in changed)
                                 - sum(after(row).correct for row in changed)) / len(changed),
    }[metric]()


@pytest.mark.parametrize("metric", statistics.METRICS)
def test_metric_is_the_mean_of_the_seeds_values(results, metric):
    condition = {"condition": statistics.METRICS[metric].conditions[-1]}
    pooled = condition["condition"] == "pooled"
    condition |= {"start_layer": 2, "protocol": "mean"} if pooled else {"rate": 0.4}
    untouched = results["item_id"].str.endswith(("1", "4", "7"))
    results = results.assign(changed=results["changed"].where(~untouched, 0))
    shuffled = results.sample(frac=1, random_state=0)
    for frame in (shuffled, check_results(shuffled)):
        values = [by_hand(results, "carma", seed, metric, **condition) for seed in range(6)]
        line = row_of(statistics.summarise(frame, metric), method="carma", **condition)
        assert line["estimate"] == pytest.approx(np.mean(values))
        assert line["low"] < np.mean(values) < line["high"]
        seeds = statistics.per_seed(frame, metric)
        seeds = seeds[np.logical_and.reduce([seeds[name] == value for name, value in condition.items()])]
        seeds = seeds[seeds["method"] == "carma"].sort_values("seed")
        assert seeds["value"].to_numpy() == pytest.approx(np.array(values))
        line = row_of(statistics.coefficient_of_variation(frame, metric), method="carma", **condition)
        if np.mean(values) > 0:
            assert line["estimate"] == pytest.approx(stats.variation(values, ddof=1))


def test_macro_f1_by_hand(results):
    rows = results[(results["method"] == "carma") & (results["condition"] == "clean")]
    rows = rows[rows["target"] != "word07"]   # still predicted now and then, but no item's target
    scores = []
    for _, part in rows.groupby("seed"):
        of_class = []
        for name in part["target"].unique():
            hits = ((part["target"] == name) & (part["prediction"] == name)).sum()
            precision = hits / max((part["prediction"] == name).sum(), 1)
            recall = hits / (part["target"] == name).sum()
            of_class.append(2 * precision * recall / (precision + recall) if hits else 0.0)
        scores.append(np.mean(of_class))
    assert (rows["prediction"] == "word07").any()
    line = statistics.macro_f1(rows).iloc[0]
    assert line["estimate"] == pytest.approx(np.mean(scores))
    interval = stats.t.interval(0.95, len(scores) - 1, np.mean(scores), stats.sem(scores))
    assert (line["low"], line["high"]) == pytest.approx(interval)


@pytest.mark.parametrize("metric", [statistics.macro_f1, lambda rows: statistics.summarise(rows, "consist_syn")])
def test_an_item_twice_for_one_seed_is_refused(results, metric):
    rows = results[(results["method"] == "carma") & results["condition"].isin(["clean", "replaced"])]
    again = rows[rows["condition"] == "clean"].iloc[:1]
    with pytest.raises(ValueError, match="an item twice for one seed"):
        metric(pd.concat([rows, again.assign(correct=~again["correct"])]))


def test_scores_are_of_the_items_that_every_seed_answered(results):
    rows = results[(results["method"] == "carma") & (results["condition"] == "clean")]
    some = rows["item_id"].unique()[:2]
    fewer = statistics.macro_f1(rows.drop(rows.index[rows["item_id"].isin(some) & (rows["seed"] == rows["seed"].min())])).iloc[0]
    common = statistics.macro_f1(rows[~rows["item_id"].isin(some)]).iloc[0]
    assert (fewer["estimate"], fewer["n_items"]) == (common["estimate"], common["n_items"])
    assert "2 items not answered by every seed left out" in fewer["note"] and "left out" not in common["note"]


def test_calibration_error_by_hand():
    rows = made_results(methods={"carma": 0.0}, seeds=2, items=4, rates=(), layers=())
    rows["correct"] = [True, False, True, True] * 2
    rows["prediction_probability"] = [0.95, 0.85, 0.85, 1.0] * 2
    # Bin .8–.9: one of two right at .85, off by .35; bin .9–1: two of two right at .975, off by .025.
    line = statistics.expected_calibration_error(rows).iloc[0]
    assert line["estimate"] == pytest.approx((2 * 0.35 + 2 * 0.025) / 4)
    with pytest.raises(ValueError, match="must lie in"):
        statistics.expected_calibration_error(rows.assign(prediction_probability=2.0))


def test_cells_that_cannot_be_filled_say_why(results):
    carma = results[results["method"] == "carma"]
    one_seed = statistics.coefficient_of_variation(carma[carma["seed"] == 0])
    assert one_seed["estimate"].isna().all() and one_seed["note"].str.contains("one seed").all()
    assert accuracy(carma[carma["seed"] == 0])["note"].str.contains("items only").all()

    never = consist_syn(carma.assign(correct=False))
    assert never["estimate"].isna().all() and never["note"].str.contains("no item answered right").all()
    wrong = carma["correct"] & ~((carma["seed"] == 2) & (carma["condition"] == "clean"))
    some = consist_syn(carma.assign(correct=wrong))
    assert (some["n_seeds"] == 5).all() and some["note"].str.contains("seeds 2 without").all()

    gap = carma.drop(carma.index[(carma["seed"] == 1) & carma["item_id"].str.endswith("00007")])
    lines = accuracy(gap)
    assert (lines["n_items"] == 79).all() and lines["note"].str.contains("1 items not answered").all()
    for frame in (one_seed, never, some):
        assert frame["note"][frame["estimate"].isna()].str.len().gt(0).all()


def test_bad_input_of_metrics(results):
    with pytest.raises(ValueError, match="duplicate rows"):
        accuracy(pd.concat([results, results.iloc[[0]]]))
    with pytest.raises(ValueError, match=r"missing values in the columns \['correct'\]"):
        accuracy(results.assign(correct=np.where(results.index == 3, np.nan, 1.0)))
    with pytest.raises(ValueError, match="no row with condition replaced"):
        consist_syn(results[results["condition"] == "clean"])
    with pytest.raises(ValueError, match="no changed item has its clean answer"):
        consist_syn(results[results["condition"] == "replaced"])
    with pytest.raises(ValueError, match="no rows"):
        accuracy(results.iloc[:0])
    with pytest.raises(ValueError, match="unknown metric"):
        statistics.summarise(results, "acuracy")


def test_tasks_never_mix(results):
    other = made_results(task="other_task", seeds=6, items=80, seed=5)
    alone = pd.concat([accuracy(results), accuracy(other)], ignore_index=True)
    pd.testing.assert_frame_equal(accuracy(pd.concat([results, other])), alone)


# -- intervals -------------------------------------------------------------------------------------

def test_crossed_interval_against_two_way_analysis_of_variance():
    values = np.random.default_rng(0).normal(size=(4, 9)) + np.arange(9) + np.arange(4)[:, None]
    long = pd.DataFrame(values).stack().rename_axis(["seed", "item"]).reset_index(name="value")
    table = sm.stats.anova_lm(sm.OLS.from_formula("value ~ C(seed) + C(item)", long).fit())
    seeds, items, rest = table["mean_sq"]
    variance = (seeds + items - rest) / 36       # expected mean squares of the crossed random model
    share = seeds / (seeds + items - rest)
    found = crossed_interval(values)
    assert (found.standard_error**2, found.seed_share) == pytest.approx((variance, share))
    half = (share * stats.t.ppf(0.975, 3) + (1 - share) * stats.t.ppf(0.975, 8)) * variance**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    for statistic in (-1.0, 0.0, 2.5, 40.0):
        tail = tail_probability(statistic, 0.3, 5, 100)
        assert 0 < tail < 1 and critical_value(tail, 0.3, 5, 100) == pytest.approx(statistic, rel=1e-4)


def test_crossed_interval_alone_and_at_the_edge():
    values = np.random.default_rng(0).random((5, 1))
    expected = stats.t.interval(0.95, 4, values.mean(), stats.sem(values[:, 0]))
    assert crossed_interval(values)[1:3] == pytest.approx(expected)
    assert crossed_interval(values.T)[1:3] == pytest.approx(expected)
    perfect = crossed_interval(np.ones((3, 50)), bounds=(0, 1))
    assert (perfect.low, perfect.high) == pytest.approx(tuple(stats.binomtest(50, 50).proportion_ci()))
    assert crossed_interval(np.zeros((3, 50)), bounds=(0, 1)).high == pytest.approx(1 - perfect.low)
    for bad in (np.zeros((0, 3)), np.full((2, 2), np.nan), np.zeros(3)):
        with pytest.raises(ValueError, match="seeds × items"):
            crossed_interval(bad)


def test_cv_interval_on_the_edge():
    assert np.isnan(cv_interval([0.5]).estimate) and "one seed" in cv_interval([0.5]).note
    assert np.isnan(cv_interval([0.0, 0.0]).estimate) and "mean" in cv_interval([0.0, 0.0]).note
    assert cv_interval([0.0, 0.0, 0.0, 0.0, 2.0]).high == np.inf
    alike = cv_interval([0.5, 0.5])  # as seeds may be by chance: no certainty
    assert alike.estimate == 0 and np.isnan([alike.low, alike.high]).all() and alike.note == "seeds do not differ: no interval"
    # For a small CV the interval is that of the standard deviation of a normal sample, over the mean.
    values = 100 + np.random.default_rng(0).normal(size=8)
    edges = np.sqrt(7 * values.var(ddof=1) / stats.chi2.ppf([0.975, 0.025], 7)) / values.mean()
    assert cv_interval(values)[1:3] == pytest.approx(tuple(edges), rel=1e-3)


# -- tests -----------------------------------------------------------------------------------------

def test_paired_test_over_seeds_alone_is_the_paired_t_test():
    first, second = np.random.default_rng(0).random((2, 6, 1))
    ones = np.ones((6, 1))
    cells = [statistics.Crossed(np.arange(6), np.arange(1), values, ones) for values in (first, second)]
    found = inference.paired_test(*cells)
    expected = stats.ttest_rel(first[:, 0], second[:, 0])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    shifted = stats.ttest_rel(first[:, 0] + 0.1, second[:, 0], alternative="greater").pvalue
    assert inference.paired_test(*cells, margin=0.1).p == pytest.approx(min(2 * shifted, 1))


def test_hierarchical_bootstrap_against_plain_loops(results, evidence):
    first, second, _ = inference.pair(results, "consist_syn", **PAIR, where={"rate": 0.4})
    draws = evidence.hierarchical_bootstrap(first, second, draws=4000)
    generator, plain = np.random.default_rng(1), []
    for _ in range(1500):
        seeds, items = generator.integers(6, size=6), generator.integers(80, size=80)
        values = [np.mean([cell.numerator[seed, items].sum() / cell.denominator[seed, items].sum()
                           for seed in seeds]) for cell in (first, second)]
        plain.append(values[0] - values[1])
    assert draws.mean() == pytest.approx(np.mean(plain), abs=4 * np.std(plain) / np.sqrt(1500))
    assert draws.std() == pytest.approx(np.std(plain), rel=0.08)
    low, high = evidence.bootstrap_interval(first, second, draws=4000)
    centre = (first.values - second.values).mean()
    expected = centre + (np.quantile(draws, [0.025, 0.975]) - centre) * np.sqrt(6 / 5)
    assert (low, high) == pytest.approx(tuple(expected))


def test_cv_ratio_against_scipy_permutation():
    first, second = 0.6 + 0.02 * np.random.default_rng(0).normal(size=(2, 8)) * [[0.3], [1]]
    found = inference.cv_ratio_test(first, second)
    expected = stats.permutation_test(
        (first / first.mean(), second / second.mean()),
        lambda one, two: abs(np.log(stats.variation(one, ddof=1) / stats.variation(two, ddof=1))),
        permutation_type="samples", alternative="greater", n_resamples=np.inf)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.estimate == pytest.approx(stats.variation(first, ddof=1) / stats.variation(second, ddof=1))
    # The interval ends where the Pitman–Morgan test of a variance ratio has p = 0.05.
    one, two = first / first.mean(), second / second.mean()
    for limit in (found.low, found.high):
        assert stats.pearsonr(one + limit * two, one - limit * two).pvalue == pytest.approx(0.05)
    first, second = 0.6 + 0.02 * np.random.default_rng(0).normal(size=(2, 20)) * [[0.3], [1]]
    assert inference.cv_ratio_test(first, second).p < 0.01
    assert inference.cv_ratio_test(first, second, draws=20).p >= 1 / 20   # the observed order is among them


@pytest.mark.parametrize("second", [[0.50, 0.51, 0.52], [0.52, 0.51, 0.50]])
def test_cv_ratio_of_values_that_move_in_step_is_not_certain(second):
    found = inference.cv_ratio_test(np.array([0.50, 0.52, 0.54]), np.array(second))
    assert found.estimate > 1.9 and np.isnan([found.low, found.high]).all() and "move in step: no interval" in found.note


def test_cv_ratio_says_what_few_seeds_can_show():
    values = np.array([0.5, 0.51, 0.52, 0.53, 0.58])
    assert "no p below 0.0625" in inference.cv_ratio_test(values, values[::-1] ** 3).note
    for first, second in (([0.5, 0.6], [0.5, 0.7]), ([0.5] * 4, [0.1, 0.2, 0.3, 0.4])):
        with pytest.raises(NotComparable):
            inference.cv_ratio_test(np.array(first), np.array(second))


def test_effect_size_by_hand():
    # Hedges' exact factor for four degrees of freedom is 0.7979; two seeds have none.
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert inference.effect_size(values) == pytest.approx(3 / np.sqrt(2.5) * 0.7979, rel=1e-4)
    assert np.isnan(inference.effect_size(values[:2])) and np.isnan(inference.effect_size(np.ones(5)))
    many = np.tile(values, 100)
    assert inference.effect_size(many) == pytest.approx(3 / many.std(ddof=1), rel=2e-3)


def test_holm_against_statsmodels():
    p = np.random.default_rng(0).random(12) ** 3
    assert inference.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    by_hand = np.array([0.03, 0.06, 0.06, np.nan])
    assert inference.holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx(by_hand, nan_ok=True)


def test_power_against_statsmodels():
    for seeds in (3, 10, 40):
        for level in (0.05, 0.05 / 12):
            expected = TTestPower().power(0.02 / 0.03, seeds, level)
            assert inference.power(0.02, seeds, 0.03, level=level) == pytest.approx(expected, abs=1e-6)
        assert inference.power(0.02, seeds, 0.03) > inference.power(0.02, seeds, 0.03, level=0.01)
    needed = int(np.ceil(TTestPower().solve_power(0.02 / 0.03, alpha=0.05, power=0.8)))
    assert inference.power(0.02, needed - 1, 0.03) < 0.8 <= inference.power(0.02, needed, 0.03)
    assert inference.power(0.02, 1000, 0.03, item_error=0.02) < 0.8
    assert inference.power(0.03, 30, 0.0109, items=377) == pytest.approx(1), "scipy's other tail is NaN there"


# -- the plan --------------------------------------------------------------------------------------

PLAN = [
    {"name": "accuracy", "kind": "difference", "metric": "accuracy", **CLEAN, **PAIR},
    {"name": "no worse", "kind": "non-inferiority", "metric": "accuracy", "margin": 0.02, **CLEAN, **PAIR},
    {"name": "ConsistSyn", "kind": "difference", "metric": "consist_syn", "rate": 0.4, **PAIR},
    {"name": "loss", "kind": "difference", "metric": "pooling_drop", "start_layer": 0, "protocol": "sum",
     **PAIR},
    {"name": "CV", "kind": "cv ratio", "metric": "accuracy", **CLEAN, **PAIR},
    {"name": "tuning", "kind": "difference", "metric": "accuracy", **CLEAN, "method": "carma",
     "baseline": "untuned"},
]


def test_primary_comparisons_find_a_known_effect():
    strong = made_results(methods={"untuned": -2.0, "fine_tuning": 0.0, "carma": 2.0}, seeds=8, items=300)
    table = primary_comparisons(strong, PLAN).set_index("name")
    assert table.loc["accuracy", "verdict"] == "CARMA is better than fine-tuning"
    assert table.loc["no worse", "verdict"] == "CARMA is at most 2 points worse than fine-tuning"
    assert table.loc["tuning", "verdict"] == "CARMA is better than untuned"
    means = strong[strong["condition"] == "clean"].groupby("method")["correct"].mean()
    assert table.loc["accuracy", "estimate"] == pytest.approx(means["carma"] - means["fine_tuning"])
    assert table.loc["tuning", "estimate"] == pytest.approx(means["carma"] - means["untuned"])
    assert table["holm_p"].to_numpy() == pytest.approx(inference.holm(table["p"]))
    turned = primary_comparisons(strong, [{**claim, "method": claim["baseline"], "baseline": claim["method"]}
                                          for claim in PLAN]).set_index("name")
    assert turned.loc["accuracy", "verdict"] == "fine-tuning is worse than CARMA"
    assert turned.loc["no worse", "verdict"].startswith("not shown that fine-tuning is at most")
    assert turned.loc["CV", "estimate"] == pytest.approx(1 / table.loc["CV", "estimate"])
    powers = power_table(table.reset_index(), difference=0.02)
    assert set(powers["name"]) == {"accuracy", "no worse", "ConsistSyn", "loss", "tuning"}
    assert powers.groupby("name")["power"].is_monotonic_increasing.all()


def test_methods_missing_in_some_seeds_or_altogether_are_told(results):
    partial = results[~((results["method"] == "carma") & results["seed"].isin([1, 4]))]
    table = primary_comparisons(partial, PLAN).set_index("name")
    assert table.loc["accuracy", "n_seeds"] == 4
    assert table.loc["accuracy", "note"] == "seeds 1, 4 of fine_tuning left out: not in both methods"
    nothing = primary_comparisons(results[results["method"] != "carma"], PLAN)
    assert (nothing["verdict"] == "not tested").all()
    assert nothing["note"].str.startswith("no rows of carma").all()
    never = primary_comparisons(results.assign(correct=False), PLAN).set_index("name")
    assert "no item answered right" in never.loc["ConsistSyn", "note"]
    assert never.loc["accuracy", "verdict"] == "no difference shown"


def test_only_common_items_are_compared(results):
    clean = results[results["condition"] == "clean"]
    gone = (clean["method"] == "carma") & clean["item_id"].str[-1].isin(["3", "7"])
    partial = clean[~gone].sample(frac=1, random_state=0)
    line = primary_comparisons(partial, PLAN[:1]).iloc[0]
    shares = clean[~clean["item_id"].str[-1].isin(["3", "7"])].groupby("method")["correct"].mean()
    assert line["n_items"] == 64 and "16 items of fine_tuning left out" in line["note"]
    assert line["estimate"] == pytest.approx(shares["carma"] - shares["fine_tuning"])
    # Two methods' items are paired by name, not by place: the difference's error is that of the sorted table.
    ordered = primary_comparisons(partial.sort_values("item_id"), PLAN[:1]).iloc[0]
    assert line["standard_error"] == pytest.approx(ordered["standard_error"])


@pytest.mark.parametrize("claim, message", [
    ({"kind": "superiority"}, "kind is one of"),
    ({"kind": "non-inferiority"}, "margin"),
    ({"margin": 0.02}, "margin"),
    ({"rates": 0.4}, "unknown keys"),
    ({"method": None}, "lacks"),
    ({"metric": "pooling_drop", "kind": "cv ratio"}, "lower pooling_drop is better"),
])
def test_unclear_plans_are_refused(results, claim, message):
    with pytest.raises(ValueError, match=message):
        primary_comparisons(results, [{**PLAN[0], **claim}])


def test_a_claim_must_name_one_cell(results):
    with pytest.raises(ValueError, match=r"several \['rate'\]"):
        primary_comparisons(results, [{name: value for name, value in PLAN[2].items() if name != "rate"}])
    with pytest.raises(ValueError, match=r"several \['task'\]"):
        primary_comparisons(pd.concat([results, made_results(task="b")]), PLAN)
    with pytest.raises(ValueError, match="same name"):
        primary_comparisons(results, [PLAN[0], PLAN[0]])


# -- few seeds, few items --------------------------------------------------------------------------

def crossed(values):
    values = np.asarray(values, float)
    return statistics.Crossed(np.arange(len(values)), np.arange(values.shape[1]), values, np.ones_like(values))


def few(seeds, items, first, second=0.0):
    """Paired cells: the methods' answers as given, or so many seeds and items of one value."""
    return [crossed(np.full((seeds, items), value) if np.isscalar(value) else value) for value in (first, second)]


OPPOSITE = [[1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("rows", [OPPOSITE, OPPOSITE[:1], [[1, 1, 1, 1], [1, 1, 1, 1]], [[1], [1]]])
def test_fewer_than_three_seeds_claim_nothing(rows):
    """Two seeds whose means agree, one seed, no spread at all, one item: estimates, no p, no verdict."""
    found = inference.paired_test(*few(len(rows), len(rows[0]), rows))
    assert np.isnan(found.p) and found.estimate == np.mean(rows)
    frame = made_results(methods={"fine_tuning": 0.0, "carma": 0.0}, seeds=len(rows), items=len(rows[0]), rates=(), layers=())
    frame["correct"] = [False] * np.size(rows) + np.ravel(rows).astype(bool).tolist()
    line = primary_comparisons(frame, PLAN[:2])
    seeds = f"{len(rows)} seed{'s' * (len(rows) > 1)}"
    assert line["estimate"].tolist() == [np.mean(rows)] * 2 and line["holm_p"].isna().all()
    assert (line["outcome"] == "not tested").all()
    assert line["verdict"].tolist() == [f"not tested: {seeds}, a claim needs 3"] * 2


@pytest.mark.parametrize("rows", [
    [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[1, 0] * 5, [0, 1] * 5, [1, 0] * 5, [0, 1] * 5], [[0, -1, 0, 0, 0], [0, 0, -1, 0, 0], [-1, 0, 0, 0, 0]]])
def test_seed_means_that_happen_to_agree_are_no_certainty(rows):
    """All seeds win as much, on other items: the spread within them bounds the seeds' part from below."""
    values = np.array(rows, float)
    found = crossed_interval(values)
    seeds, items = values.shape
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    mean_square = (residual**2).sum() / ((seeds - 1) * (items - 1))
    least = stats.f.ppf(0.05, seeds - 1, (seeds - 1) * (items - 1)) * mean_square / values.size
    assert found.standard_error**2 >= least * (1 - 1e-9) > 0 and found.low < found.estimate < found.high
    positive, negative = crossed(values.clip(0)), crossed((-values).clip(0))
    assert inference.paired_test(positive, negative).p > 1e-4


def test_no_spread_at_all_is_an_exact_binomial_matter():
    always = inference.paired_test(*few(3, 8, 1.0))
    assert always.p == pytest.approx(stats.binomtest(8, 8).pvalue) and always.high == 1
    assert always.low == pytest.approx(2 * stats.binomtest(8, 8).proportion_ci().low - 1)
    assert inference.paired_test(*few(3, 2, 1.0)).p == pytest.approx(0.5), "two items are no evidence"
    same = inference.paired_test(*few(3, 8, 1.0, 1.0))
    assert same.p == 1 and -same.low == same.high == pytest.approx(stats.binomtest(0, 8).proportion_ci().high)
    logs = inference.paired_test(*few(3, 8, -1.0, -2.0))
    assert np.isnan(logs.p) and np.isnan(logs.low) and "no spread" in logs.note
    # Of a ratio only items in its denominator count: 4 kept of 4 right ones among 50 are not 50 of 50.
    cell = statistics.Crossed(np.arange(3), np.arange(50), *[np.tile(np.arange(50) < 4, (3, 1)).astype(float)] * 2)
    assert statistics.counted_items(cell) == 4
    limit = crossed_interval(cell.values, counted=statistics.counted_items(cell), bounds=(0, 1)).low
    assert limit == pytest.approx(stats.binomtest(4, 4).proportion_ci().low)


@pytest.mark.parametrize("where", [{"split": "test_sen"}, {"task": "sst"}, {"model": "gpt2"}, {"start": "bases"}])
def test_a_filter_that_no_row_fits_is_refused_and_named(results, where):
    with pytest.raises(ValueError, match=f"no {next(iter(where))} '{next(iter(where.values()))}'; it has"):
        primary_comparisons(results, [{**PLAN[0], **where}])


def test_tokens_that_read_alike_are_two_answers():
    """' good' beside 'good': the text is the target's, the token is another, and no metric calls it right."""
    frame = made_results(methods={"carma": 0.0}, seeds=3, items=6, layers=(), rates=(0.4,))
    frame = frame.assign(prediction=frame["target"], correct=frame["condition"] == "clean")
    assert (statistics.macro_f1(frame[frame["condition"] == "replaced"])["estimate"] == 0).all()
    assert (statistics.macro_f1(frame[frame["condition"] == "clean"])["estimate"] == 1).all()
    assert (statistics.summarise(frame, "agreement")["estimate"] == 0).all()
    categories = frame.astype({"prediction": "category", "target": "category"})
    assert (statistics.macro_f1(categories)["estimate"] == statistics.macro_f1(frame)["estimate"]).all()


# -- curves ----------------------------------------------------------------------------------------

def curves_of(late, seeds=4, noise=0.001, method="carma", task="t"):
    """Validation accuracy every 100 of 900 steps: rises to 600, then by `late` a hundred steps."""
    generator = np.random.default_rng(0)
    return pd.DataFrame([dict(task=task, method=method, seed=seed, step=step, validation_accuracy=0.05 * min(step, 600) / 100
                              + late * max(step - 600, 0) / 100 + generator.normal(0, noise))
                         for seed in range(seeds) for step in range(100, 1000, 100)])


@pytest.mark.parametrize("late, seeds, noise, verdict", [
    (0.02, 4, 0.001, "still rises"), (0.0, 4, 0.0005, "has levelled"), (-0.02, 4, 0.001, "falls"),
    (0.0, 4, 0.05, "cannot be told (the interval is too wide)"), (0.02, 2, 0.001, "cannot be told (fewer than three seeds)")])
def test_a_curve_still_rises_or_has_levelled(late, seeds, noise, verdict):
    curves = curves_of(late, seeds, noise)
    line = still_rising(curves).iloc[0]
    assert (line["verdict"], line["last_step"], line["n_seeds"]) == (verdict, 900, seeds)
    slopes = [stats.linregress(rows["step"], rows["validation_accuracy"]).slope
              for _, rows in curves[curves["step"] >= 600].groupby("seed")]
    low, high = stats.t.interval(0.95, seeds - 1, np.mean(slopes), stats.sem(slopes))
    assert line[["slope", "low", "high"]].tolist() == pytest.approx([1000 * np.mean(slopes), 1000 * low, 1000 * high])


def test_curves_with_gaps_one_step_or_missing_columns():
    two = pd.concat([curves_of(0.02), curves_of(0.0, method="fine_tuning")])
    gaps = pd.concat([two, two.assign(validation_accuracy=np.nan, step=1000)])
    pd.testing.assert_frame_equal(still_rising(gaps), still_rising(two))
    one = still_rising(two[two["step"] == 900])
    assert one["slope"].isna().all() and one["verdict"].str.startswith("cannot be told").all()
    last_two = still_rising(two[two["step"].isin([100, 900])]).set_index("method")
    assert last_two.loc["carma", "verdict"] == "still rises"
    assert len(still_rising(pd.concat([two.assign(start="base"), two.assign(start="random")]))) == 4
    with pytest.raises(ValueError, match="lack the columns"):
        still_rising(two.drop(columns="step"))


def test_an_answer_carries_its_training_length_and_its_curve(results):
    curves = pd.concat([curves_of(0.02, task="made_task"), curves_of(0.0, noise=0.0005, task="made_task", method="fine_tuning")])
    line = primary_comparisons(results.assign(budget=results["budget"] * 9), PLAN[:1], curves=curves).iloc[0]
    assert line["steps"] == 900 and line["curve"] == "CARMA: still rises; fine-tuning: has levelled"
    early = primary_comparisons(results.assign(budget=results["budget"] * 6), PLAN[:1], curves=curves).iloc[0]
    assert early["steps"] == 600 and early["curve"] == "still rises", "curves are read up to the budget"
    none = primary_comparisons(results, PLAN[:1]).iloc[0]
    assert none["steps"] == 100 and none["curve"] == ""
    assert line["p"] == none["p"], "curves change no test"


def test_a_slope_by_clusters_is_a_jackknife_over_them():
    generator = np.random.default_rng(0)
    runs = pd.DataFrame([dict(seed=seed, method=method, x=generator.normal()) for seed in range(6) for method in ("a", "b")])
    runs["y"] = 2 * runs["x"] + generator.normal(size=6)[runs["seed"]] + (runs["method"] == "b")
    found = clustered_slope(runs, "x", "y", control="method")
    formula = "y ~ x + C(method)"
    whole = sm.OLS.from_formula(formula, runs).fit().params["x"]
    left = [sm.OLS.from_formula(formula, runs[runs["seed"] != seed]).fit().params["x"] for seed in range(6)]
    error = np.sqrt(5 / 6 * sum((each - whole) ** 2 for each in left))
    low, high = whole + np.array([-1, 1]) * stats.t.ppf(0.975, 5) * error
    assert (found.slope, found.low, found.high) == pytest.approx((whole, low, high))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(whole) / error, 5)) and found[4:] == (6, 12)
    few_seeds = clustered_slope(runs[runs["seed"] < 2], "x", "y", control="method")
    assert np.isnan(few_seeds.p) and np.isfinite(few_seeds.slope)
    alone = clustered_slope(runs.assign(x=(runs["seed"] == 0) * np.tile([0.0, 1.0], 6)), "x", "y", control="method")
    assert np.isnan(alone.p) and np.isnan(alone.low), "one seed alone carries the slope"


@pytest.mark.parametrize("seeds", [5, 10])
def test_clustered_slopes_are_honest_for_few_seeds(seeds):
    """x and y share the seed's luck by chance only: plain least squares rejects far too often, the jackknife does not."""
    generator, wrong = np.random.default_rng(seeds), []
    for _ in range(800):
        luck = generator.normal(size=(2, seeds)).repeat(2, axis=1)
        x, y = luck + 0.3 * generator.normal(size=(2, 2 * seeds))
        runs = pd.DataFrame(dict(seed=np.arange(seeds).repeat(2), method=["a", "b"] * seeds, x=x, y=y))
        plain = sm.OLS(y, sm.add_constant(np.column_stack([x, np.tile([0, 1], seeds)]))).fit().pvalues[1]
        wrong.append((clustered_slope(runs, "x", "y", control="method").p < 0.05, plain < 0.05))
    ours, plain = np.mean(wrong, axis=0)
    assert ours <= 0.08 < 0.13 < plain  # 5,000 studies: 5 to 7 % and 16 to 18 %


# -- the default claims ----------------------------------------------------------------------------

def test_default_claims_are_those_of_the_statistics_notebook():
    sizes = dict(seeds=2, items=4, layers=(0, 1, 2), task="controlled_made")
    three = pd.concat([made_results(split=f"test_{split}", **sizes) for split in ("seen", "held_out", "longer")])
    plan = default_claims(pd.concat([three, made_results(**sizes | {"task": "one_split"})]))
    asked = [(claim["name"], claim["kind"], claim["metric"], claim["split"]) for claim in plan]
    assert asked == [
        ("made: new combinations", "difference", "accuracy", "test_held_out"),
        ("made: longer texts", "difference", "accuracy", "test_longer"),
        ("made: synonyms", "difference", "consist_syn", "test_seen"),
        ("made: pooling", "difference", "accuracy_kept", "test_seen"),
        ("made: spread across seeds", "cv ratio", "accuracy", "test_held_out"),
        ("made: performance preserved", "non-inferiority", "accuracy", "test_seen"),
        ("one split: accuracy", "difference", "accuracy", "test"),
        ("one split: synonyms", "difference", "consist_syn", "test"),
        ("one split: pooling", "difference", "accuracy_kept", "test"),
        ("one split: spread across seeds", "cv ratio", "accuracy", "test"),
        ("one split: performance preserved", "non-inferiority", "accuracy", "test")]
    assert plan[2]["rate"] == 0.25 and plan[3]["depth_share"] == 0.5 and plan[5]["margin"] == 0.02
    assert all(claim["method"] == "carma" and claim["baseline"] == "fine_tuning" for claim in plan)
    assert len(primary_comparisons(three, plan[:6])) == 6


@pytest.mark.parametrize("methods, baseline, pairs", [
    ({"fine_tuning": 0, "mine": 1}, "fine_tuning", [("mine", "fine_tuning")]),
    ({"r_drop": 0, "neftune": 1}, "fine_tuning", [("neftune", "r_drop")]),
    ({"carma": 0}, "carma", []), ({"untuned": 0}, None, []),
    ({"untuned": 0, "zeta": 0, "alpha": 0, "l2_sp": 1}, "l2_sp", [("alpha", "l2_sp"), ("zeta", "l2_sp")])])
def test_default_claims_take_any_methods(methods, baseline, pairs):
    results = made_results(methods=methods, seeds=3, items=6)
    plan = default_claims(results)
    assert list(dict.fromkeys((claim["method"], claim["baseline"]) for claim in plan)) == pairs
    if pairs:
        assert len(primary_comparisons(results, plan)) == len(plan) == 5 * len(pairs)
    else:
        with pytest.raises(ValueError, match="two trained methods"):
            primary_comparisons(results, plan)


def test_default_claims_name_models_and_methods_where_there_are_several():
    parts = [made_results(methods={"fine_tuning": 0, "carma": 0, "r_drop": 0}, seeds=1, items=3, rates=(), layers=(), model=name)
             for name in ("org/small", "org/large")]
    names = [claim["name"] for claim in default_claims(pd.concat(parts), questions=["new combinations"])]
    assert names == [f"{model}, made task: {method}, accuracy" for model in ("small", "large") for method in ("CARMA", "R-Drop")]
    parts[1]["model"] = "other/small"
    assert len({claim["name"] for claim in default_claims(pd.concat(parts))}) == 12
    with pytest.raises(ValueError, match="unknown questions"):
        default_claims(parts[0], questions=["speed"])


# -- studies whose truth is known ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["5 seeds", "5 seeds, seeds hardly differ", "5 seeds, seeds differ much"])
def test_intervals_cover(evidence, name):
    covered = evidence.coverage(evidence.DESIGNS[name], 1000, seed=1)
    assert covered.between(0.93, 0.97).all(), covered


def test_cv_intervals_cover_and_the_permutation_test_is_honest(evidence):
    null, different = (evidence.cv_coverage(8, 600, ratio=ratio, seed=3) for ratio in (1.0, 0.5))
    for covered in (null, different):
        assert covered[["CV", "CV ratio"]].between(0.925, 0.975).all(), covered
    # 600 studies: a test at 5 % rejects at most 7.3 % of them but once in a hundred times.
    assert null["permutation test rejects"] <= 0.073


def test_family_of_null_claims_is_rarely_let_through(evidence):
    assert evidence.family_error(evidence.DESIGNS["5 seeds"], 600, seed=2) <= 0.073


@pytest.mark.parametrize("name", ["3 seeds, 10 items, 60 % right", "3 seeds, 20 items, 9 % right",
                                  "3 seeds, 40 items, 95 % right"])
def test_small_studies_are_let_through_no_more_often(evidence, name):
    found = evidence.small_studies(evidence.SMALL_DESIGNS[name], 800, seed=4)
    assert found["wrong at 5 %"] <= 0.07 and found["wrong at 0.5 %"] <= 0.011 and found["difference covered"] >= 0.93, found


def test_power_rises_with_seeds_as_the_formula_says(evidence):
    curve = evidence.power_curve(evidence.Design(effect=0.3), 300, (3, 10))
    assert curve["simulated"].is_monotonic_increasing and curve["simulated"].iloc[-1] > 0.6
    assert (curve["simulated"] - curve["formula"]).abs().max() < 0.1


def test_large_table_is_summarised_fast(evidence, capsys):
    evidence.time_summaries(200_000)
    seconds = float(capsys.readouterr().out.split(":")[-1].split(" s")[0])
    assert seconds < 15


def test_p_of_no_difference_at_all_is_one_half_a_side():
    """scipy before 1.17 puts the median of Student's t a hair above 0, which left no root to find."""
    for seeds, items in ((2, 1), (5, 60), (10, 600)):
        assert tail_probability(0.0, 0.3, seeds, items) == pytest.approx(0.5)
        assert critical_value(1e-12, 1.0, seeds, items) == pytest.approx(stats.t.isf(1e-12, seeds - 1), rel=1e-6)


@pytest.mark.parametrize("items", [40, 250])
def test_a_margin_where_no_answer_differs(items):
    """All right: as sure as the items allow, and as the interval says. All wrong: there is nothing to preserve."""
    frame = made_results(seeds=3, items=items).query("condition == 'clean'")
    claim = {"name": "no worse", "kind": "non-inferiority", "metric": "accuracy", "margin": 0.02, **CLEAN, **PAIR}
    right = primary_comparisons(frame.assign(correct=True), [claim]).iloc[0]
    assert right.p == pytest.approx(min(1, 2 * 0.98**items))
    assert (right.outcome == "shown") == (right.low > -0.02) == (items == 250)
    wrong = primary_comparisons(frame.assign(correct=False), [claim]).iloc[0]
    assert wrong.outcome == "not tested" and "no answer differs, and none is right" in wrong.note


# -- few items, several models, margins ------------------------------------------------------------------

def test_the_spread_over_counted_items_is_theirs_alone():
    """Items outside a ratio's denominator hold still: the interval is that of the counted items by themselves."""
    answers = np.random.default_rng(1).random((4, 7)) < 0.6
    inside = np.pad(np.ones((4, 7)), ((0, 0), (0, 53)))
    among = statistics.Crossed(np.arange(4), np.arange(60), np.pad(answers.astype(float), ((0, 0), (0, 53))), inside)
    alone = crossed(answers.astype(float))
    assert crossed_interval(among.values, counted=7) == pytest.approx(crossed_interval(alone.values), nan_ok=True)
    other = np.random.default_rng(2).random((4, 7)) < 0.4
    shifted = statistics.Crossed(among.seeds, among.items, np.pad(other.astype(float), ((0, 0), (0, 53))), inside)
    assert inference.paired_test(among, shifted)[:5] == pytest.approx(inference.paired_test(alone, crossed(other.astype(float)))[:5])


@pytest.mark.parametrize(("items", "outcome"), [(1, "not tested"), (4, "not tested"), (5, "shown")])
def test_a_handful_of_items_is_no_claim(items, outcome):
    table = made_results(seeds=5, items=items)
    table["rank"] = np.where(table["method"] == "carma", 1, 2 + table["seed"] % 2)
    row = primary_comparisons(table, [{"name": "a", "kind": "difference", "metric": "mean_reciprocal_rank", "split": "test", "condition": "clean",
                                       "method": "carma", "baseline": "fine_tuning"}]).iloc[0]
    assert (row.outcome, row.n_items) == (outcome, items) and np.isfinite(row.estimate)
    assert outcome == "shown" or row.verdict == f"not tested: {items} item{'s' * (items > 1)} counted, a claim needs 5"


@pytest.mark.parametrize("margin", [2, 1, float("inf"), float("nan"), True, "0.02", 0, -0.1])
def test_margins_are_shares(margin):
    with pytest.raises(ValueError, match="only non-inferiority has a margin, a share above 0 and below 1"):
        check_plan([{"name": "a", "kind": "non-inferiority", "metric": "accuracy", "method": "carma", "baseline": "fine_tuning", "margin": margin}])


def test_each_model_ends_where_its_own_training_ends():
    short, long = (made_results().assign(model=model, budget=lambda table: np.where(table["budget"] > 0, budget, 0))
                   for model, budget in (("a", 300), ("b", 600)))
    early = long[long["budget"] > 0].assign(budget=300)
    ended = at_the_end(pd.concat([short, long, early]))
    assert set(map(tuple, ended.loc[ended["budget"] > 0, ["model", "budget"]].to_numpy())) == {("a", 300), ("b", 600)}


def test_a_claim_compares_shares_alone():
    """Every reader of claims tells differences in percentage points."""
    for metric in METRICS:
        claim = {"name": "one", "kind": "difference", "metric": metric, **CLEAN, **PAIR}
        with pytest.raises(ValueError, match="mean_log_probability is none") if metric == "mean_log_probability" else nullcontext():
            check_plan([claim])


def test_a_seed_of_one_method_alone_takes_no_items_away(results):
    """Seed 4 of CARMA answered a few items only, and plain fine-tuning has no seed 4."""
    whole = primary_comparisons(results[results["seed"] != 4], PLAN[:1]).iloc[0]
    few = (results["method"] == "carma") & ~results["item_id"].isin(results["item_id"].unique()[:10])
    cut = primary_comparisons(results[(results["seed"] != 4) | (results["method"] == "carma") & ~few], PLAN[:1]).iloc[0]
    assert cut["note"] == "seeds 4 of carma left out: not in both methods"
    assert (cut["n_items"], cut["low"], cut["high"]) == (whole["n_items"], whole["low"], whole["high"])
    other = results["seed"].ne(4) | results["method"].eq("carma")
    elsewhere = results[other].assign(item_id=results["item_id"].astype(str).where(results["seed"] != 4, "other-" + results["item_id"].astype(str)))
    away = primary_comparisons(elsewhere, PLAN[:1]).iloc[0]
    assert (away["n_items"], away["low"], away["high"]) == (whole["n_items"], whole["low"], whole["high"])


def test_an_adversary_beside_drawn_synonyms_stays_out_of_the_synonyms_claim():
    """It may have their rate, or one below it."""
    drawn = made_results(rates=(0.25,))
    for rate in (0.25, 0.1):
        worst = drawn[drawn.condition == "replaced"].assign(source="adversary", rate=rate, correct=False, rank=2)
        both = check_results(pd.concat([drawn, worst], ignore_index=True))
        claims = [default_claims(results, questions=["synonyms"]) for results in (drawn, both)]
        found = [primary_comparisons(*of) for of in zip((drawn, both), claims)]
        assert found[0].estimate[0] == found[1].estimate[0] and (found[1].source == "controlled").all()


def test_what_was_changed_in_one_split_is_asked_there():
    seen, held_out = (made_results(rates=(0.25,)).assign(split=name) for name in ("test_seen", "test_held_out"))
    some = pd.concat([seen[seen["condition"] == "clean"], held_out], ignore_index=True)
    found = primary_comparisons(some, default_claims(some, questions=["synonyms", "pooling"]))
    assert (found["split"] == "test_held_out").all() and found["estimate"].notna().all() and len(found) == 2


def test_differences_of_several_values_a_seed_are_refused():
    table = pd.DataFrame([{"task": "t", "method": method, "seed": seed, "budget": budget, "value": seed + budget}
                          for method in ("carma", "fine_tuning") for seed in (1, 2) for budget in (10, 20)])
    assert len(paired_differences(table, "value", by=["task", "budget"])) == 2
    with pytest.raises(ValueError, match="several values of one method and seed, told apart by none of \\['task'\\]"):
        paired_differences(table, "value", by=["task"])


def test_a_claim_without_an_estimate_is_in_nobodys_favour():
    families = pd.DataFrame({"start": "base", "name": "t: spread", "kind": ["cv ratio"] * 4 + ["difference"] * 2, "margin": np.nan, "metric": "accuracy",
                             "estimate": [0.9, 1.0, 1.1, np.nan, 0.1, np.nan], "low": np.nan, "high": np.nan, "outcome": "open"})
    counted = counted_claims(families)
    assert counted["tests"].item() == 6 and counted["in favour"].item() == 2


def test_any_of_several_floats_is_taken_up_to_rounding():
    table = pd.DataFrame({"rate": [0.1 + 0.2, 0.25, 0.4], "seed": [1, 2, 3]})
    assert list(select(table, rate=[0.3, 0.4]).seed) == [1, 3] and list(select(table, rate=0.3, seed=(1, 2)).seed) == [1]
