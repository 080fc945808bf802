"""The estimate against the measured peak of real trainings, and the refusal before a training that will not fit."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from carma_lib.lab import memory
from carma_lib.lab.memory import NotEnoughMemory, check_loading, check_memory, estimate_memory, memory_table
from carma_lib.lab.recipe import Recipe

RECIPE = Recipe(start="gpt2", batch_size=32, steps=2, mi_layers=(0, 7), stability_layers=(0, 7), precision="float32")
GPT2 = AutoConfig.for_model("gpt2")
GIB = 2**30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_estimate_is_near_the_measured_peak():
    names = ["gpt2", "all layers", "activation checkpointing", "lora"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), MALLOC_ARENA_MAX="1",
                       MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")  # freed memory goes back
    script = Path(__file__).with_name("measure_memory.py")
    done = subprocess.run([sys.executable, str(script), *names], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (measured, estimated) in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0.75 < measured / estimated < 1.05, (name, measured / 2**20, estimated / 2**20)


def test_gpt2_small_by_hand():
    """124.4 million weights: 4 bytes each, as much again for gradients, twice for Adam."""
    estimate = estimate_memory(GPT2, RECIPE, tokens=58)
    weights = 124_439_808
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    tokens = 32 * 58
    blocks = 12 * tokens * (6 * 768 * 4 + (6 * 768 + 5 * 3072) * 4)
    assert estimate.activations == blocks + 32 * 50257 * 12 + 8 * tokens * 768 * 4
    texts = estimate_memory(GPT2, RECIPE, tokens=58, predicted=58)  # whose logits are those of every token
    assert texts.activations - estimate.activations == 57 * 32 * 50257 * 12
    start = estimate_memory(GPT2, RECIPE, tokens=58, l2_sp=True)  # and the distance of each weight from it
    assert start.total - estimate.total == 8 * weights and memory_table(GPT2, RECIPE, tokens=58, l2_sp=True).total[0] == start.total / GIB
    assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer + estimate.activations


def test_the_terms_need_memory_in_proportion_to_tokens_rows_and_layers():
    def terms(layers=(0, 7), tokens=100, **more):
        found = [estimate_memory(GPT2, RECIPE.but(mi_layers=both, stability_layers=both, **more), tokens=tokens).activations
                 for both in (layers, (0, 1))]
        return found[0] - found[1]

    one = terms()
    assert one == 6 * 32 * 100 * 768 * 4 and terms(tokens=10_000) == 100 * one, "not with the tokens' square"
    assert terms(batch_size=64) == 2 * one and terms(layers=(0, 4)) * 2 == one


def test_what_makes_it_smaller():
    plain = estimate_memory(GPT2, RECIPE, tokens=58)
    cheaper = {name: estimate_memory(GPT2, RECIPE.but(**change), tokens=58) for name, change in {
        "accumulation": {"accumulation": 4}, "checkpointing": {"activation_checkpointing": True},
        "lora": {"adapter": "lora"}, "bf16 lora": {"adapter": "lora", "precision": "bf16"},
        "qlora": {"adapter": "qlora", "precision": "bf16"}, "two": {"processes": 2}}.items()}
    assert all(each.total < plain.total for each in cheaper.values())
    assert cheaper["accumulation"].activations * 4 == pytest.approx(plain.activations)
    assert cheaper["checkpointing"].activations < plain.activations / 4
    linear = 12 * 12 * 768**2
    adapters = 12 * 16 * (768 + 3 * 768 + 2 * 768 + 2 * 5 * 768)
    assert cheaper["lora"].optimizer == 8 * adapters and cheaper["lora"].weights == plain.weights + 4 * adapters
    assert cheaper["bf16 lora"].weights == plain.weights / 2 + 4 * adapters
    assert cheaper["qlora"].weights == pytest.approx(0.52 * linear + 4 * (124_439_808 - linear) + 4 * adapters, abs=1)
    assert cheaper["two"].optimizer == plain.optimizer / 2
    mixed = estimate_memory(GPT2, RECIPE.but(precision="bf16"), tokens=58)
    assert mixed.weights == plain.weights + 2 * linear and mixed.activations < plain.activations


@pytest.mark.parametrize(("free", "workers", "way_out"), [
    (3.3, 1, "accumulation=8 does, with"), (2.2, 1, "accumulation=8 does"), (1.5, 1, "adapter='lora'"),
    (0.05, 1, "take a smaller model"), (5.0, 2, "workers=1 does"), (8.0, 4, "workers=2 does"), (3.0, 2, "adapter='lora', activation_checkpointing=True does"),
    (0.05, 2, "take a smaller model")])
def test_refusal_names_the_first_way_that_fits(monkeypatch, free, workers, way_out):
    monkeypatch.setattr(memory, "available_memory", lambda: (int(free * GIB), "in memory"))
    said = rf"training takes about \d+\.\d GiB .*are free in memory.*{way_out}"
    with pytest.raises(NotEnoughMemory, match=said) as error:
        check_memory(GPT2, RECIPE, tokens=58, workers=workers)
    assert "\n" not in str(error.value) and (f"for {workers} at a time" in str(error.value)) == (workers > 1)


def test_processes_of_one_training_share_the_memory_of_a_cpu(monkeypatch):
    """Sharding divides all but the activations, whose rows it divides too."""
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    one, two = (memory_table(GPT2, RECIPE.but(processes=processes), tokens=58).iloc[0] for processes in (1, 2))
    assert two["weights"] == one["weights"] and two["activations"] == pytest.approx(one["activations"])
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "available_memory", lambda: (4 * GIB, "on the GPU"))
    table = memory_table(GPT2, RECIPE.but(processes=2), tokens=58)
    assert table["weights"][0] == one["weights"] / 2 and not table.settings.str.contains("qlora").any()
    assert memory_table(GPT2, RECIPE, tokens=58).settings.iloc[-1] == "adapter='qlora', accumulation=8, activation_checkpointing=True"


def test_what_fits_passes_and_the_table_says_so():
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=300)
    recipe = RECIPE.but(mi_layers=(0, 1), stability_layers=(0, 1))
    assert check_memory(config, recipe, tokens=58, workers=2) is None
    table = memory_table(config, recipe, tokens=58)
    assert table.fits.all() and table.settings[0] == "as asked for"
    assert table.total[0] == pytest.approx(estimate_memory(config, recipe, tokens=58).total / GIB)
    assert list(table.columns) == ["settings", "weights", "gradients", "optimizer", "activations", "total", "fits"]
    assert memory_table(config, recipe, tokens=58, workers=3).total[0] == pytest.approx(3 * table.total[0])


def test_files_read_before_do_not_count_as_used(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available_memory()[0]
    assert machine > 2**20, "no container: the machine's"
    for name, text in {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 300\ninactive_file 600\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory.available_memory() == (700, "in memory")
    (tmp_path / "memory.stat").write_text("anon 300\n")
    assert memory.available_memory() == (100, "in memory")
    (tmp_path / "memory.stat").unlink()
    assert memory.available_memory() == (100, "in memory")
    (tmp_path / "memory.current").write_text("1200")
    assert memory.available_memory() == (0, "in memory")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory()[0] > 2**20, "no limit"


def test_a_start_that_main_memory_cannot_hold_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(memory, "_main_memory", lambda: 480_000_000)
    with pytest.raises(NotEnoughMemory, match="'a/model' takes 0.5 GiB of main memory to load, and 0.4 GiB are free"):
        check_loading("a/model", GPT2, RECIPE)
    check_loading("a/model", GPT2, RECIPE.but(adapter="lora", precision="bf16"))
    check_loading("a/model", GPT2, RECIPE.but(adapter="qlora"))


def test_a_family_without_a_causal_language_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="of the type 't5' is no causal language model") as error:
        check_loading("a/model", AutoConfig.for_model("t5"), RECIPE)
    assert "\n" not in str(error.value)
