"""Made result tables with a known effect, for the tests and benchmarks of statistics, figures and report."""
import numpy as np
import pandas as pd
from scipy.special import expit

from carma_lib.stats.table import RESULT_COLUMNS

WORDS = np.array([f"word{number:02d}" for number in range(20)])


def made_results(*, methods=None, seeds=5, items=60, rates=(0.25, 0.4), layers=(0, 2),
                 protocols=("sum", "mean"), task="made_task", split="test", model="made_model",
                 seed=0) -> pd.DataFrame:
    """A full long table; `methods` gives the log-odds of a right answer, before item and seed effects."""
    methods = {"untuned": -2.0, "fine_tuning": 1.0, "carma": 1.5} if methods is None else methods
    generator = np.random.default_rng(seed)
    difficulty, target = generator.normal(0, 1.5, items), np.arange(items) % len(WORDS)
    conditions = [("clean", "", 0.0, -1, np.nan, "", "", 0, 0.0)]
    conditions += [("replaced", "controlled", rate, -1, np.nan, "", "", 2, 2 * rate) for rate in rates]
    deepest = max(*layers, 1) if layers else 1
    conditions += [("pooled", "", 0.0, layer, layer / deepest, protocol, "word", 3, 1.5 - layer / 2)
                   for layer in layers for protocol in protocols]
    parts = []
    for method, level in methods.items():
        for number in range(1 if method == "untuned" else seeds):
            luck = level + difficulty + generator.normal(0, 0.2)
            for condition, source, rate, layer, share, protocol, unit, changed, harm in conditions:
                right = generator.random(items) < expit(luck - harm)
                rank = np.where(right, 1, generator.integers(2, 12, items))
                parts.append(pd.DataFrame({
                    "task": task, "split": split,
                    "item_id": [f"{task}/{split}/{item:05d}" for item in range(items)],
                    "target": WORDS[target], "model": model, "method": method, "seed": number,
                    "budget": 0 if method == "untuned" else 100, "start": "random", "condition": condition,
                    "source": source, "rate": rate, "start_layer": layer, "depth_share": share,
                    "protocol": protocol, "level": unit, "changed": changed,
                    "prediction": WORDS[(target + rank - 1) % len(WORDS)], "correct": right, "rank": rank,
                    "log_probability": -rank / 2.0}))
    return pd.concat(parts, ignore_index=True)[list(RESULT_COLUMNS)]


def made_history(methods=("fine_tuning", "carma"), seeds=3, steps=200) -> pd.DataFrame:
    """Training history: a row of losses every 20 steps and a row of validation accuracy every 50."""
    generator, rows = np.random.default_rng(0), []
    for method in methods:
        for number in range(seeds):
            for step in range(10, steps + 1, 10):
                row = {"task": "made_task", "method": method, "seed": number, "step": step,
                       "epoch": step / 50}
                if step % 20 == 0:
                    row |= {name: start * np.exp(-step / 80) + generator.normal(0, 0.02) for name, start in
                            (("task_loss", 3), ("mutual_information", 2), ("stability", 0.8), ("loss", 3.2))}
                    row["learning_rate"] = 1e-3
                if step % 50 == 0:
                    row["validation_accuracy"] = 0.6 + step / 1000 + generator.normal(0, 0.02)
                rows.append(row)
    return pd.DataFrame(rows)
