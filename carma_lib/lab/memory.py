"""What a training will need of memory, before it starts; a refusal with advice where it will not fit.

Bytes a process, from the configuration alone (weights are counted on the meta device, nothing is loaded):

    weights      4 a parameter; with bf16 2 more for the copy that matrix products read. Frozen starts of
                 adapters: 2 (bf16), 4 (float32), or for "qlora" 0.52 in the blocks' linear maps and 2 elsewhere,
                 and 4 for each weight of an adapter
    gradients    4 a trained weight
    optimizer    8 a trained weight: Adam's two moments
    activations  blocks × tokens × (6 d · 4 + (6 d + 5 f) · b) + rows × vocabulary × 12
                 + layers read by CARMA × tokens × (12 d + 12 t) bytes

with d the width, f the width of the feed-forward part, b = 4 or 2 (bf16), t the tokens of the longest row, and
tokens = rows of a forward pass × t. With gradient checkpointing only 4 d a block and token stays, and one block
whole. Eager attention adds blocks × heads × tokens × t × 3 b. Counted are the tensors that the backward pass reads
(the residual stream and its norms in float32, the rest in b); compare arXiv 2205.05198, section 4, whose 34 bytes
a token, block and unit of width in 16 bits are 17 numbers. Sharding over processes (FSDP) divides all but the
activations. Not counted: the CUDA context (about half a GiB) and what other programs hold. On the CPU, the peak
of small GPT-2 and Llama models was 84 to 100 % of the estimate (`tests/measure_memory.py`).
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from carma_lib.lab.recipe import Recipe

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


class NotEnoughMemory(MemoryError):
    """A training will not fit; the message names what would."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a process of one training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(config: PretrainedConfig, recipe: Recipe, *, tokens: int) -> MemoryEstimate:
    """The estimate of the module's formula. tokens: of the longest row with its prompt."""
    everything, linear, widths = _count(type(config), config.to_json_string(use_diff=False))
    adapter = recipe.lora_rank * widths
    if recipe.adapter == "none":
        weights, trained = everything * 4 + (linear * 2 if recipe.bf16 else 0), everything
    elif recipe.adapter == "qlora":
        weights, trained = 0.52 * linear + 2 * (everything - linear) + 4 * adapter, adapter
    else:
        weights, trained = everything * (2 if recipe.bf16 else 4) + 4 * adapter, adapter
    shards = recipe.processes
    return MemoryEstimate(int(weights / shards), 4 * trained // shards, 8 * trained // shards,
                          _activations(config, recipe, tokens))


def _activations(config: PretrainedConfig, recipe: Recipe, tokens: int) -> int:
    text, number = config.get_text_config(), 2 if recipe.bf16 else 4
    width, rows = text.hidden_size, recipe.rows_a_pass
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    block = rows * tokens * (6 * width * 4 + (6 * width + 5 * inner) * number)
    if getattr(text, "_attn_implementation", None) == "eager":
        block += rows * text.num_attention_heads * tokens**2 * 3 * number
    blocks = text.num_hidden_layers * block
    if recipe.activation_checkpointing:
        blocks = text.num_hidden_layers * rows * tokens * width * 4 + block
    terms = len(recipe.carma.for_depth(text.num_hidden_layers).layers) * rows * tokens * (12 * width + 12 * tokens)
    return blocks + rows * text.vocab_size * 12 + terms


class _Counts(NamedTuple):
    """All parameters, those of the blocks' linear maps, and the sum of in and out widths of these maps."""

    everything: int
    linear: int
    widths: int


@lru_cache(maxsize=8)
def _count(kind: type[PretrainedConfig], configuration: str) -> _Counts:
    """Of a model of this configuration (JSON), built without memory for its weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(configuration)))
    except ValueError as error:
        raise ValueError(f"a model of the type '{kind.model_type}' is no causal language model of the transformers "
                         "library; take another start") from error
    head = model.get_output_embeddings()
    maps = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    return _Counts(sum(weight.numel() for weight in model.parameters()), sum(each.weight.numel() for each in maps),
                   sum(sum(each.weight.shape) for each in maps))


def available_memory() -> tuple[int, str]:
    """Free bytes and where: on the first GPU, else of this machine or of the container that it is."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "on the GPU"
    return _main_memory(), "in memory"


def _main_memory() -> int:
    free = psutil.virtual_memory().available
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = max(0, min(free, limit - used + _file_cache()))
    return free


def _file_cache() -> int:
    """Bytes of this container's memory that hold files read before, and are given back when asked for."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit
        return None


def check_loading(name: str, config: PretrainedConfig, recipe: Recipe) -> None:
    """Whether a start can be read into main memory, on its way to a GPU or not; quantised ones go in parts.

    Raises `NotEnoughMemory`.
    """
    if recipe.adapter == "qlora":
        return
    size = 2 if recipe.bf16 and recipe.adapter != "none" else 4
    needed = size * _count(type(config), config.to_json_string(use_diff=False)).everything
    if needed > (free := _main_memory()):
        raise NotEnoughMemory(f"'{name}' takes {needed / GIB:.1f} GiB of main memory to load, and {free / GIB:.1f} GiB "
                              "are free; take a smaller model or a machine with more memory")


def _cheaper(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What to try where a training will not fit, the least change of method first."""
    rows = recipe.rows_a_pass
    parts = next((each for each in (8, 4, 2) if rows % each == 0), 1) * recipe.accumulation
    smaller = recipe.but(accumulation=parts, activation_checkpointing=True)
    yield f"accumulation={parts}", recipe.but(accumulation=parts)
    yield "activation_checkpointing=True", recipe.but(activation_checkpointing=True)
    yield f"accumulation={parts} and activation_checkpointing=True", smaller
    if recipe.adapter == "none":
        yield "adapter='lora'", recipe.but(adapter="lora")
        yield "adapter='lora', activation_checkpointing=True", smaller.but(adapter="lora", accumulation=recipe.accumulation)
    if recipe.adapter != "qlora" and recipe.processes == 1 and not recipe.small and torch.cuda.is_available():
        name = f"adapter='qlora', accumulation={parts} and activation_checkpointing=True"
        yield name, smaller.but(adapter="qlora")


def _sharing(recipe: Recipe) -> int:
    """Processes of one training that share a memory: each has a GPU of its own, or all are on the CPU."""
    return 1 if torch.cuda.is_available() else recipe.processes


def memory_table(config: PretrainedConfig, recipe: Recipe, *, tokens: int, workers: int = 1) -> pd.DataFrame:
    """The recipe as asked for, then cheaper ones: GiB of each part for all `workers`, total, and whether it fits."""
    free, _ = available_memory()
    rows = []
    for name, each in (("as asked for", recipe), *_cheaper(recipe)):
        estimate, times = estimate_memory(config, each, tokens=tokens), workers * _sharing(each)
        rows.append({"settings": name, **{part: times * getattr(estimate, part) / GIB for part in (
            "weights", "gradients", "optimizer", "activations", "total")}, "fits": times * estimate.total < free})
    return pd.DataFrame(rows)


def check_memory(config: PretrainedConfig, recipe: Recipe, *, tokens: int, workers: int = 1) -> MemoryEstimate:
    """The estimate of one training, where `workers` of them fit at a time.

    Raises `NotEnoughMemory` otherwise, naming the first cheaper settings that fit.
    """
    free, where = available_memory()
    estimate, processes = estimate_memory(config, recipe, tokens=tokens), _sharing(recipe)
    if workers * processes * estimate.total < free:
        return estimate
    table = memory_table(config, recipe, tokens=tokens, workers=workers)
    fitting = table[table.fits]
    if workers > 1 and processes * estimate.total < free:
        way_out = f"workers={max(1, free // (processes * estimate.total))} does"
    elif len(fitting):
        way_out = f"{fitting.settings.iloc[0]} does, with {fitting.total.iloc[0]:.1f} GiB"
    else:
        way_out = "no other settings do either: take a smaller model, or several GPUs (processes=…)"
    parts = ", ".join(f"{name} {getattr(estimate, name) / GIB:.1f}" for name in (
        "weights", "gradients", "optimizer", "activations"))
    times = workers * processes
    raise NotEnoughMemory(f"training takes about {times * estimate.total / GIB:.1f} GiB "
                          f"({f'{times} processes, each ' if times > 1 else ''}{parts}), and "
                          f"{free / GIB:.1f} GiB are free {where}, so it does not fit; {way_out}")
