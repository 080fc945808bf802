"""The figures of single sentences, trainings and costs: what they draw is what they are given, and it can be read."""
import json

import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_no_overlaps

from carma_lib.report import explain_plots, style

TOKENS = ["a", " small", " w", "at", "er", " ", "b", " that", " un", "believ", "ably", "."]
WORDS = [0, 1, 2, 2, 2, -1, -1, 3, 4, 4, 4, -1]


def step_reports(folder, models=("small", "gpt2_small"), devices=("cpu", "cuda")):
    for device in devices:
        results = [{"model": model, "text": text, "batch": batch, "method": method, "ratio": ratio,
                    "ratio_low": ratio - 0.05, "ratio_high": ratio + 0.1, "rounds": 8, "seconds": 0.3}
                   for model in models for text in explain_plots.TEXTS for batch in (1, 4, 16, 64)
                   for method, ratio in (("fine_tuning", 1.0), ("carma", 1 + batch / 100))]
        report = {"device": device, "device_name": "NVIDIA H100 80GB HBM3", "threads": 2, "precision": "bf16 autocast"}
        (folder / f"step_{device}.json").write_text(json.dumps(report | {"results": results}))
    return explain_plots.read_step_costs(folder)


def losses(steps, scale=1.0):
    return pd.DataFrame({"step": range(1, steps + 1), **{
        name: scale * np.linspace(3, 1, steps) for name in ("task_loss", "mutual_information", "stability")}})


def drawn(folder):
    side = np.linspace(-1, 1, len(TOKENS) ** 2).reshape(len(TOKENS), -1)
    triangle = np.tril(np.ones((len(TOKENS), len(TOKENS)))) / 12
    curves = pd.DataFrame([{"level": level, "start_layer": layer, "protocol": protocol, "log_probability": -0.1 * layer}
                           for level in ("word", "phrase") for layer in range(4)
                           for protocol in explain_plots.PROTOCOL_LOOKS])
    yield "roles", explain_plots.token_roles(TOKENS, np.arange(len(TOKENS) ** 2).reshape(len(TOKENS), -1) % 4)
    yield "map", explain_plots.token_maps({"block 0": side}, TOKENS, WORDS, label="change of cosine similarity")
    yield "two maps", explain_plots.token_maps({"block 0": side, "block 1": side}, TOKENS, WORDS, label="change",
                                               bound=1e-4)
    yield "movement", explain_plots.token_movement(abs(side[:4]), abs(side[:5]), TOKENS)
    yield "attention", explain_plots.attention_maps({
        "not pooled": (triangle, TOKENS),
        "pooled": (triangle[:3, :3], ["a phrase of many words that goes on", "is", '"'])})
    yield "losses", explain_plots.losses_by_step({"plain fine-tuning, by hand": losses(1), "CARMA": losses(1)}, {})
    yield "losses again", explain_plots.losses_by_step(
        {"plain fine-tuning, by hand": losses(150, 100), "CARMA, by hand": losses(150)}, {"CarmaTrainer": losses(150)})
    yield "layers", explain_plots.answer_by_start_layer(curves, clean=-0.2)
    yield "far", explain_plots.answer_by_start_layer(curves.assign(log_probability=-1000.0), clean=-0.2)
    yield "costs", explain_plots.step_costs(step_reports(folder))
    one = step_reports(folder).query("device.str.startswith('CPU') and model == 'small'")
    yield "one machine", explain_plots.step_costs(one)


def test_every_figure_can_be_read(tmp_path):
    names = []
    for name, figure in drawn(tmp_path):
        names.append(name)
        assert figure.get_figwidth() in (style.COLUMN, style.PAGE), name
        assert_no_overlaps(figure)
        style.save_figure(figure, tmp_path, name, pd.DataFrame({"a": [1]}))
    assert len(names) == 11


def test_squares_enclose_words_of_several_tokens_only():
    axes = explain_plots.token_maps({"a": np.zeros((12, 12))}, TOKENS, WORDS, label="b").axes[0]
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(2, 3), (8, 3)]


def test_costs_are_those_of_the_files(tmp_path):
    costs = step_reports(tmp_path, models=("small",))
    assert len(costs) == 48 and set(costs["device"]) == {"CPU, 2 threads, bf16 autocast",
                                                         "NVIDIA H100 80GB HBM3, bf16 autocast"}
    axes = explain_plots.step_costs(costs).axes[0]
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx([1, 4, 16, 64])
    with pytest.raises(FileNotFoundError, match="step.py measures them"):
        explain_plots.read_step_costs(tmp_path / "nothing")


def test_long_costs_are_those_of_the_file(tmp_path):
    terms = [{"length": 20, "carma_seconds": 9, "carma_processor_seconds": 2, "dense_seconds": 9, "dense_processor_seconds": 6}]
    steps = [{"length": 20, "method": method, "ratio": ratio, "ratio_low": 0.9, "ratio_high": 1.2, "rounds": 5, "seconds": 3}
             for method, ratio in (("plain", 1), ("carma", 1.1), ("dense", 2))]
    memory = [{"length": 99, "gradient_checkpointing": again, "ratio": ratio} for again, ratio in ((True, 7), (False, 1.5))]
    (tmp_path / "long_cpu.json").write_text(json.dumps({"terms": terms, "steps": steps, "memory": memory}))
    found = explain_plots.read_long_costs(tmp_path)
    assert found.loc[20].drop("memory_ratio").to_dict() == {
        "ratio": 1.1, "ratio_low": 0.9, "ratio_high": 1.2, "rounds": 5, "carma": 2, "dense": 6}
    assert list(found.index) == [20, 99] and found.loc[99].dropna().to_dict() == {"memory_ratio": 1.5}
