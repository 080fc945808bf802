"""What a training will need of memory, before it starts; a refusal with advice if it will not fit.

Bytes a process, from the configuration alone (weights are counted on the meta device, nothing is loaded):

    weights      4 a parameter; with bf16 2 more for the copy that matrix products read. Frozen starts of
                 adapters: 2 (bf16), 4 (float32), or for "qlora" 0.52 in the blocks' linear maps and 4 elsewhere,
                 and 4 for each weight of an adapter
    gradients    4 a trained weight
    optimizer    8 a trained weight: Adam's two moments; with L2-SP 16: also the start and the distance from it
    activations  blocks × tokens × (6 d · 4 + (6 d + 5 f) · b) + rows × p × vocabulary × 12
                 + layers read by CARMA × tokens × 4 d bytes

with d the width, f the width of the feed-forward part, b = 4 or 2 (bf16), t the tokens of the longest row, tokens =
rows of a forward pass × t, and p the tokens of a row that have logits: the last one, or all where answers are texts.
With activation checkpointing only 4 d per block and token stay, and one block whole. Eager attention adds blocks ×
heads × tokens × t × 3 b. These are the tensors that the backward pass reads (the residual stream and its norms in
float32, the rest in b; compare arXiv 2205.05198, section 4, whose 34 bytes per token, block and unit of width in 16
bits are 17 numbers) and CARMA's gradient of each layer that it reads, in float32. Sharding over processes (FSDP)
divides all but the activations. Not counted: the CUDA context (about half a GiB), what other programs hold, and freed
memory that a local worker keeps for its next training, up to 4 GiB (`lab.cluster.WORKER_ENVIRONMENT`). The
peaks of eight trainings of GPT-2 and Llama models of 4 blocks, width 256, on a CPU were 86 to 102 % of this.
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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


class MemoryEstimate(NamedTuple):
    """Bytes of one training in one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(config: PretrainedConfig, recipe: Recipe, *, tokens: int, predicted: int = 1, l2_sp: bool = False) -> MemoryEstimate:
    """The estimate of the module's formula. tokens: of the longest row with its prompt; predicted: so many of them have logits."""
    everything, linear, widths = _count(type(config), config.to_json_string(use_diff=False))
    adapter, shards = recipe.lora_rank * widths, recipe.processes
    trained = everything if recipe.adapter == "none" else adapter
    weights = {"none": everything * 4 + recipe.bf16 * linear * 2, "qlora": 0.52 * linear + 4 * (everything - linear) + 4 * adapter,
               "lora": everything * (2 if recipe.bf16 else 4) + 4 * adapter}[recipe.adapter]
    return MemoryEstimate(int(weights / shards), 4 * trained // shards, (16 if l2_sp else 8) * trained // shards,
                          _activations(config, recipe, tokens, predicted))


def _activations(config: PretrainedConfig, recipe: Recipe, tokens: int, predicted: int) -> int:
    text, number = config.get_text_config(), 2 if recipe.bf16 else 4
    width, rows = text.hidden_size, recipe.rows_a_pass
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    block = rows * tokens * (6 * width * 4 + (6 * width + 5 * inner) * number)
    if getattr(text, "_attn_implementation", None) == "eager":
        block += rows * text.num_attention_heads * tokens**2 * 3 * number
    blocks = text.num_hidden_layers * block
    if recipe.activation_checkpointing:
        blocks = text.num_hidden_layers * rows * tokens * width * 4 + block
    read = len(recipe.carma.for_depth(text.num_hidden_layers).layers)
    return blocks + rows * predicted * text.vocab_size * 12 + read * rows * tokens * width * 4


@lru_cache(maxsize=8)
def _count(kind: type[PretrainedConfig], configuration: str) -> tuple[int, int, int]:
    """All parameters, those of the blocks' linear maps, and the sum of in and out widths of these maps.

    Of a model of this configuration (JSON), built without memory for its weights.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(configuration)))
    except ValueError as error:
        raise ValueError(f"a model of the type '{kind.model_type}' is no causal language model of the transformers "
                         "library; take another start") from error
    head = model.get_output_embeddings()
    maps = [each.weight for each in model.modules() if isinstance(each, (nn.Linear, Conv1D)) and each is not head]
    return (sum(weight.numel() for weight in model.parameters()), sum(weight.numel() for weight in maps),
            sum(sum(weight.shape) for weight in maps))


def available_memory() -> tuple[int, str]:
    """Free bytes and where: on the first GPU, else of this machine or of the container that it is."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "on the GPU"
    return _main_memory(), "in memory"


def _main_memory() -> int:
    """Free bytes; in a container also below its limit. Files read before do not count as used: they are given back."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    with contextlib.suppress(OSError, ValueError, KeyError):
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(statistics["inactive_file"])
    return max(0, min(free, limit - used))


def check_loading(name: str, config: PretrainedConfig, recipe: Recipe) -> None:
    """`NotEnoughMemory` if main memory cannot hold a start, on its way to a GPU or not; quantised ones go in parts."""
    if recipe.adapter == "qlora":
        return
    size = 2 if recipe.bf16 and recipe.adapter != "none" else 4
    needed = size * _count(type(config), config.to_json_string(use_diff=False))[0]
    if needed > (free := _main_memory()):
        raise NotEnoughMemory(f"'{name}' takes {needed / GIB:.1f} GiB of main memory to load, and {free / GIB:.1f} GiB "
                              "are free; take a smaller model or a machine with more memory")


def _cheaper(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What to try if a training will not fit, the least change of method first."""
    rows = recipe.rows_a_pass
    parts = next((each for each in (8, 4, 2) if rows % each == 0), 1) * recipe.accumulation
    saving = {"activation_checkpointing": True}
    ways = [{"accumulation": parts}, saving, {"accumulation": parts, **saving}]
    if recipe.adapter == "none" and recipe.has_pretrained_weights:
        ways += [{"adapter": "lora"}, {"adapter": "lora", **saving}]
    if recipe.adapter != "qlora" and recipe.processes == 1 and recipe.has_pretrained_weights and torch.cuda.is_available():
        ways.append({"adapter": "qlora", "accumulation": parts, **saving})
    for way in ways:
        yield ", ".join(f"{name}={value!r}" for name, value in way.items()), recipe.but(**way)


def memory_table(config: PretrainedConfig, recipe: Recipe, *, workers: int = 1, **rest: Any) -> pd.DataFrame:
    """The recipe as asked for, then cheaper ones: GiB of each part for all `workers`, total, and whether it fits.

    rest: `tokens`, `predicted` and `l2_sp` of `estimate_memory`.
    """
    free, rows = available_memory()[0], []
    for name, each in (("as asked for", recipe), *_cheaper(recipe)):
        estimate = estimate_memory(config, each, **rest)
        times = workers * (1 if torch.cuda.is_available() else each.processes)  # processes have a GPU each
        parts = {**estimate._asdict(), "total": estimate.total}
        rows.append({"settings": name, **{part: times * size / GIB for part, size in parts.items()},
                     "fits": times * estimate.total < free})
    return pd.DataFrame(rows)


def check_memory(config: PretrainedConfig, recipe: Recipe, *, workers: int = 1, **rest: Any) -> None:
    """`NotEnoughMemory` if `workers` trainings at a time do not fit, naming the first cheaper way that does; see `memory_table`."""
    free, where = available_memory()
    table = memory_table(config, recipe, workers=workers, **rest)
    asked, fitting = table.iloc[0], table[table["fits"]]
    if asked["fits"]:
        return
    if workers > 1 and (fit := int(workers * free / GIB / asked["total"])):
        way_out = f"workers={fit} does"
    elif len(fitting):
        way_out = f"{fitting['settings'].iloc[0]} does, with {fitting['total'].iloc[0]:.1f} GiB"
    else:
        way_out = "no other settings do either: take a smaller model, or several GPUs (processes=…)"
    parts = ", ".join(f"{name} {asked[name]:.1f}" for name in MemoryEstimate._fields)
    raise NotEnoughMemory(f"training takes about {asked['total']:.1f} GiB{f' for {workers} at a time' if workers > 1 else ''} "
                          f"({parts}), and {free / GIB:.1f} GiB are free {where}, so it does not fit; {way_out}")
