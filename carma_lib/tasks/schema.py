"""One row schema for every task, and a folder per task that is whole or absent.

A row is `item_id`, `text` (what varies and may be perturbed; never the prompt around it), `target` (the
answer), `phrases` (character spans of `text`, not overlapping) and `group` (what a split keeps apart).
Beside the Arrow files lies `card.json`: counts, splits, seed, versions, source and its licence.
"""
from __future__ import annotations

import platform
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from carma_lib.files import fingerprint, read_json, whole_folder, write_json

FEATURES = datasets.Features({
    "item_id": datasets.Value("string"),
    "text": datasets.Value("string"),
    "target": datasets.Value("string"),
    "phrases": [[datasets.Value("int32")]],
    "group": datasets.Value("string"),
})
RULES_VERSION = 2  # raise when a builder makes other rows from the same parameters


class DataNotFound(FileNotFoundError):
    """A source of data is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class TaskRows:
    """What a builder returns: rows by split, and the facts that the card holds beside the counts."""

    splits: dict[str, list[dict[str, Any]]]
    source: str
    licence: str
    facts: dict[str, Any]


def shuffle_held_out(splits: dict[str, list[dict[str, Any]]]) -> None:
    """Shuffle all splits but train in place, so that the first items of a source in some order are like all."""
    for name, rows in splits.items():
        if name != "train":
            random.Random(0).shuffle(rows)


def save_rows(folder: Path, rows: TaskRows, *, task: str, parameters: dict[str, Any]) -> None:
    """Write `rows` as Arrow with a card. `ValueError` for an empty split or a repeated `item_id`."""
    for split, items in rows.splits.items():
        if not items:
            raise ValueError(f"{task}: the split '{split}' is empty with these parameters: {parameters}")
    identifiers = Counter(item["item_id"] for items in rows.splits.values() for item in items)
    repeated = [name for name, count in identifiers.items() if count > 1]
    if repeated:
        raise ValueError(f"{task}: {len(repeated)} item ids stand twice, the first is {repeated[0]}")
    dataset = datasets.DatasetDict({
        split: datasets.Dataset.from_list(items, features=FEATURES) for split, items in rows.splits.items()
    })
    card = {
        "task": task,
        "source": rows.source,
        "licence": rows.licence,
        "parameters": parameters,
        "counts": {split: len(items) for split, items in rows.splits.items()},
        "targets": {split: len({item["target"] for item in items}) for split, items in rows.splits.items()},
        "facts": rows.facts,
        "content": fingerprint({split: items for split, items in rows.splits.items()}),
        "made_with": {"python": platform.python_version(), "datasets": datasets.__version__},
        "rules_version": RULES_VERSION,
    }
    datasets.disable_progress_bars()  # written in a second; a bar for each split would only be noise
    with whole_folder(folder) as temporary:
        dataset.save_to_disk(str(temporary))
        write_json(temporary / "card.json", card)
    datasets.enable_progress_bars()


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a saved task. `DataNotFound` where the folder holds none."""
    card = read_json(Path(folder) / "card.json")
    if card is None:
        raise DataNotFound(f"no task data in {folder}: build them first (notebook 01, or carma_lib.tasks.build_task)")
    return card


def is_current(folder: Path, *, task: str, parameters: dict[str, Any]) -> bool:
    """Whether `folder` already holds this task made from these parameters by these rules."""
    card = read_json(Path(folder) / "card.json")
    return card is not None and (card["task"], card["parameters"], card["rules_version"]) == (
        task, parameters, RULES_VERSION)
