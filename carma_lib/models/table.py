"""The table of pretrained models: published prompts and settings as data (`models/table.yml`), ours for the rest.

What arXiv 2502.11066 and its repository publish for a model and kind of task stands in the file and is taken as
it is. Anything else, and every model that the file does not name, is scaled from the model's depth.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml


class Prompt(NamedTuple):
    """What stands before and after the text of a row; neither is perturbed or pooled."""

    prefix: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a pretrained model is fine-tuned on a kind of task; both terms read blocks 0 to `last_layer`.

    `published` names the values that are published for this model and task, `defaults` those that the published code
    has for every model; the others are ours.
    """

    carma_weight: float
    last_layer: int
    batch_size: int
    epochs: int
    seeds: tuple[int, ...]
    learning_rate: float
    warmup_steps: int
    mi_weight: float
    stability_weight: float
    published: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()


@cache
def read_table() -> dict[str, Any]:
    """`models/table.yml` as it is: `common`, `scaled`, `prompts`, `models`."""
    text = (resources.files("carma_lib.models") / "table.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def find_model(name: str) -> dict[str, Any] | None:
    """The table's entry for a name, hub id or folder: the whole of it, else its last part, in lower case."""
    models, wanted = read_table()["models"], PurePath(name).name.lower()
    return next((model for model in models if model["id"] == name), None) or next(
        (model for model in models if PurePath(model["id"]).name.lower() == wanted), None)


def prompt_for(kind: str, family: str = "default", *, pretrained: bool = False) -> Prompt:
    """The prompt of a kind of task. The family's wording for pretrained models, GPT-2's otherwise.

    family: the configuration's `model_type`. Raises `ValueError` for an unknown kind.
    """
    if kind not in read_table()["prompts"]:
        raise ValueError(f"unknown kind of task '{kind}'; the kinds are {', '.join(read_table()['prompts'])}")
    by_family = read_table()["prompts"][kind]
    entry = by_family.get(family if pretrained else "default", by_family["default"])
    return Prompt(entry["prefix"], entry["suffix"])


def settings_for(name: str, kind: str, *, num_layers: int) -> ModelSettings:
    """The settings of a model (hub id or folder) and kind of task: published where they are, else scaled from its depth.

    Ours, for what is not published: λ, batch and epochs are the medians of the published settings, seeds the four used
    most, and both terms read blocks 0 to round(0.3 × num_layers), at least 1 (the median published share of the depth
    is 0.28). A name that the table knows with another number of blocks is another model.

    Raises `ValueError` for an unknown kind or fewer than two blocks, which leave no layers to compare.
    """
    if kind not in read_table()["prompts"]:
        raise ValueError(f"unknown kind of task '{kind}'; the kinds are {', '.join(read_table()['prompts'])}")
    if num_layers < 2:
        raise ValueError(f"'{name}' has {num_layers} decoder block; CARMA compares layers and needs at least two")
    table, model = read_table(), find_model(name)
    published = model.get(kind, {}) if model and model["blocks"] == num_layers else {}
    scaled = {key: value for key, value in table["scaled"].items() if key != "last_layer_share"}
    scaled["last_layer"] = max(1, round(table["scaled"]["last_layer_share"] * num_layers))
    values = {**scaled, **table["common"], **published}
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    own = {*published, "learning_rate", "warmup_steps"} if published else set()  # the ablation runs' own too
    return ModelSettings(**{**values, **lists}, published=tuple(sorted(own)),
                         defaults=tuple(sorted({*table["common"]} - own)))
