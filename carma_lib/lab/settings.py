"""How the cells of a study are trained, checked; what a notebook leaves open comes from the model table."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pandas as pd
import torch

from carma_lib.losses import CarmaConfig
from carma_lib.model_table import settings_for
from carma_lib.models import load_config

PRECISIONS = ("auto", "float32", "bf16")
ADAPTERS = ("none", "lora", "qlora")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every cell of a study is trained; the notebook's parameters, checked.

    start: "random" for small models made from `family`, `layers`, `width`, `heads` with a tokenizer trained
    on the task's own text, else a hub id or a folder. training_items: 0 for all. Learning rate with linear
    decay after `warmup_steps`; gradient norm 1.0. The checkpoint with the best validation accuracy of
    `evaluations` is kept. epochs: passes over the training rows; 0: `steps` counts. batch_size: rows a step,
    over `accumulation` micro-batches and `processes` (above 1: FSDP through torchrun). precision: "bf16" is
    mixed (float32 weights), "auto" is bf16 on a GPU that has it, else float32. adapter: "none" trains all
    weights, "lora" adapters of `lora_rank` on a frozen start, "qlora" the same on a start of 4 bits (CUDA).

    Raises `ValueError` for a value out of range, naming it.
    """

    carma: CarmaConfig
    start: str = "random"
    family: str = "gpt2"
    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary_size: int = 800
    steps: int = 1000
    epochs: int = 0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    evaluations: int = 8
    training_items: int = 0
    validation_items: int = 500
    precision: str = "auto"
    gradient_checkpointing: bool = False
    adapter: str = "none"
    lora_rank: int = 16
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "evaluations", "validation_items", "layers", "width",
                     "heads", "lora_rank", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0 or min(self.warmup_steps, self.training_items, self.epochs) < 0:
            raise ValueError("learning_rate must be above 0; warmup_steps, training_items and epochs at least 0")
        for name, known in (("precision", PRECISIONS), ("adapter", ADAPTERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be one of {', '.join(known)}")
        if self.batch_size % (self.accumulation * self.processes):
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation × processes = "
                             f"{self.accumulation * self.processes}")
        if self.adapter == "qlora" and self.processes > 1:
            raise ValueError("a start of 4 bits is not sharded: take adapter 'lora', or processes=1")
        if self.start == "random":
            self.carma.for_depth(self.layers)

    @property
    def rows_a_pass(self) -> int:
        """Rows of one forward pass of one process."""
        return self.batch_size // (self.accumulation * self.processes)

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16. Emulated bf16 (older GPUs) is slow and does not count."""
        if self.precision == "auto":
            return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.precision == "bf16"

    @property
    def start_dtype(self) -> torch.dtype:
        """Of the start's weights: bf16 only where they are frozen, since small updates are lost in it."""
        return torch.bfloat16 if self.bf16 and self.adapter != "none" else torch.float32

    def training_steps(self, rows: int) -> int:
        """Steps of a training on so many rows: `steps`, or `epochs` passes, the last batch of each not full."""
        return self.epochs * math.ceil(rows / self.batch_size) if self.epochs else self.steps


class Filled(NamedTuple):
    """Settings of a task, its seeds, and where each value that was left open came from.

    published: for this model and task; published default: the published code's, for every model; ours.
    """

    settings: Settings
    seeds: tuple[int, ...]
    filled: dict[str, str]

    def table(self) -> pd.DataFrame:
        """Value and source (given, published, published default, ours) of every setting of training."""
        carma, chosen = self.settings.carma, self.settings
        values = {"seeds": self.seeds, **{name: getattr(chosen, name) for name in (
            "epochs", "steps", "batch_size", "learning_rate", "warmup_steps")}, **{
            name: getattr(carma, name) for name in _CARMA if name in _OPEN}}
        values.pop("steps" if chosen.epochs else "epochs")
        return pd.DataFrame([{"setting": name, "value": str(value).strip("()"),
                              "source": self.filled.get(name, "given")} for name, value in values.items()])


_CARMA = tuple(field.name for field in fields(CarmaConfig))
_OPEN = ("seeds", "batch_size", "learning_rate", "warmup_steps", "carma_weight", "mi_weight", "stability_weight",
         "mi_layers", "stability_layers")


def fill(kind: str, parameters: dict[str, Any]) -> Filled:
    """Settings for a kind of task from a notebook's parameters, gaps filled from the model table.

    parameters: by the names of `Settings` and `CarmaConfig`, and `seeds`; `steps` is a dict by kind of task. A
    value is left open by a negative number or an empty list; so is the length of the training where `steps`
    has no number for the kind and `epochs` is 0. Only a pretrained start can fill gaps.

    Raises `ValueError` for an unknown name, or a gap with a random start; `ModelNotFound` where the start is
    not to be had.
    """
    known = {"seeds", *_CARMA, *(field.name for field in fields(Settings))} - {"carma"}
    if unknown := sorted(set(parameters) - known):
        raise ValueError(f"unknown setting '{unknown[0]}'; there are {', '.join(sorted(known))}")
    given = {**parameters, "steps": parameters.get("steps", {}).get(kind, 0)}
    gaps = [name for name in _OPEN if name in given and (
        not given[name] if isinstance(given[name], (list, tuple)) else given[name] < 0)]
    if not given["steps"] and not given.get("epochs"):
        gaps.append("epochs")
    filled = {}
    if gaps:
        if given.get("start", "random") == "random":
            raise ValueError(f"no value for {', '.join(gaps)} ({kind}): give one, or a pretrained start, for which "
                             "the model table has it")
        config = load_config(given["start"]).get_text_config()
        chosen = settings_for(given["start"], kind, num_layers=config.num_hidden_layers)
        values = {**vars(chosen), "mi_layers": (0, chosen.last_layer), "stability_layers": (0, chosen.last_layer)}
        for name in gaps:
            given[name] = values[name]
            source = "last_layer" if name.endswith("_layers") else name
            filled[name] = ("published" if source in chosen.published else
                            "published default" if source in chosen.defaults else "ours")
    if given["steps"] and given.get("epochs"):
        raise ValueError(f"steps and epochs are both given for {kind}; leave one of them out")
    if not given["steps"]:
        del given["steps"]
    seeds = tuple(given.pop("seeds", ()))
    carma = CarmaConfig(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in given.items() if name in _CARMA})
    return Filled(Settings(carma=carma, **{name: value for name, value in given.items() if name not in _CARMA}),
                  seeds, filled)
