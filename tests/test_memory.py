"""The estimate against the measured peak of real trainings, and the refusal before a training that will not fit."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from carma_lib.lab import memory
from carma_lib.losses import CarmaConfig
from carma_lib.lab.memory import NotEnoughMemory, check_loading, check_memory, estimate_memory, memory_table
from carma_lib.lab.settings import Settings

SETTINGS = Settings(layers=12, carma=CarmaConfig(mi_layers=(0, 7), stability_layers=(0, 7)), precision="float32")
GPT2 = AutoConfig.for_model("gpt2")
GIB = 2**30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_estimate_is_near_the_measured_peak():
    names = ["gpt2", "llama", "gradient checkpointing", "lora"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), MALLOC_ARENA_MAX="1",
                       MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")  # freed memory goes back
    script = Path(__file__).with_name("measure_memory.py")
    done = subprocess.run([sys.executable, str(script), *names], env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (measured, estimated) in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0.75 < measured / estimated < 1.05, (name, measured / 2**20, estimated / 2**20)


def test_gpt2_small_by_hand():
    """124.4 million weights: 4 bytes each, as much again for gradients, twice for Adam."""
    estimate = estimate_memory(GPT2, SETTINGS, tokens=58)
    weights = 124_439_808
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    tokens = 32 * 58
    blocks = 12 * tokens * (6 * 768 * 4 + (6 * 768 + 5 * 3072) * 4)
    assert estimate.activations == blocks + 32 * 50257 * 12 + 8 * tokens * (12 * 768 + 12 * 58)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer + estimate.activations


def test_what_makes_it_smaller():
    plain = estimate_memory(GPT2, SETTINGS, tokens=58)
    cheaper = {name: estimate_memory(GPT2, replace(SETTINGS, **change), tokens=58) for name, change in {
        "accumulation": {"accumulation": 4}, "checkpointing": {"gradient_checkpointing": True},
        "lora": {"adapter": "lora"}, "bf16 lora": {"adapter": "lora", "precision": "bf16"},
        "qlora": {"adapter": "qlora", "precision": "bf16"}, "two": {"processes": 2}}.items()}
    assert all(each.total < plain.total for each in cheaper.values())
    assert cheaper["accumulation"].activations * 4 == pytest.approx(plain.activations)
    assert cheaper["checkpointing"].activations < plain.activations / 4
    linear = 12 * 12 * 768**2
    adapters = 12 * 16 * (768 + 3 * 768 + 2 * 768 + 2 * 5 * 768)
    assert cheaper["lora"].optimizer == 8 * adapters and cheaper["lora"].weights == plain.weights + 4 * adapters
    assert cheaper["bf16 lora"].weights == plain.weights / 2 + 4 * adapters
    assert cheaper["qlora"].weights == pytest.approx(0.52 * linear + 2 * (124_439_808 - linear) + 4 * adapters, abs=1)
    assert cheaper["two"].optimizer == plain.optimizer / 2


@pytest.mark.parametrize(("free", "workers", "way_out"), [
    (3.3, 1, "accumulation=8 does, with"), (2.2, 1, "accumulation=8 does"), (1.5, 1, "adapter='lora'"),
    (0.05, 1, "take a smaller model"), (5.0, 2, "workers=1 does")])
def test_refusal_names_the_first_way_that_fits(monkeypatch, free, workers, way_out):
    monkeypatch.setattr(memory, "available_memory", lambda: (int(free * GIB), "in memory"))
    said = rf"training takes about \d\.\d GiB .*are free in memory.*{way_out}"
    with pytest.raises(NotEnoughMemory, match=said) as error:
        check_memory(GPT2, SETTINGS, tokens=58, workers=workers)
    assert "\n" not in str(error.value)


def test_what_fits_passes_and_the_table_says_so():
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=300)
    settings = replace(SETTINGS, carma=CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1)))
    assert check_memory(config, settings, tokens=58, workers=2).total < GIB
    table = memory_table(config, settings, tokens=58)
    assert table.fits.all() and table.settings[0] == "as asked for"
    assert table.total[0] == pytest.approx(estimate_memory(config, settings, tokens=58).total / GIB)


def test_files_read_before_do_not_count_as_used(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 300\ninactive_file 600\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory.available_memory() == (700, "in memory")
    (tmp_path / "memory.stat").unlink()
    assert memory.available_memory() == (100, "in memory")


def test_a_start_that_main_memory_cannot_hold_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(memory, "_main_memory", lambda: 480_000_000)
    with pytest.raises(NotEnoughMemory, match="'a/model' takes 0.5 GiB of main memory to load, and 0.4 GiB are free"):
        check_loading("a/model", GPT2, SETTINGS)
    check_loading("a/model", GPT2, replace(SETTINGS, adapter="lora", precision="bf16"))


def test_a_family_without_a_causal_language_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="of the type 't5' is no causal language model") as error:
        check_loading("a/model", AutoConfig.for_model("t5"), SETTINGS)
    assert "\n" not in str(error.value)
