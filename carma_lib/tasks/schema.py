"""One row schema for every task, and a folder per task that is whole or absent.

A row is `item_id`, `text` (what varies and may be perturbed; never the prompt around it), `target` (the
answer), `phrases` (character spans of `text`, not overlapping) and `group` (what a split keeps apart).
Beside the Arrow files lie `card.json` (counts, splits, seed, versions, source and its licence) and `checksums.json`.
"""
from __future__ import annotations

import platform
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from carma_lib.files import (DataNotFound, RunError, check_folder, fingerprint, read_json, reading, user_path, whole_folder,
                             write_checksums, write_json)

FEATURES = datasets.Features({
    "item_id": datasets.Value("string"),
    "text": datasets.Value("string"),
    "target": datasets.Value("string"),
    "phrases": [[datasets.Value("int32")]],
    "group": datasets.Value("string"),
})


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


def save_rows(folder: Path, rows: TaskRows, *, task: str, parameters: dict[str, Any], rules: str) -> None:
    """Write `rows` as Arrow with a card. `ValueError` for an empty split or a repeated `item_id`.

    rules: the fingerprint of the code that made the rows.
    """
    for split, items in rows.splits.items():
        if not items:
            raise ValueError(f"{task}: the split '{split}' is empty with these parameters: {parameters}")
    identifiers = Counter(item["item_id"] for items in rows.splits.values() for item in items)
    repeated = [name for name, count in identifiers.items() if count > 1]
    if repeated:
        raise ValueError(f"{task}: {len(repeated)} item ids occur twice, the first is {repeated[0]}")
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
        "rules": rules,
    }
    datasets.disable_progress_bars()  # written in a second; a bar for each split would only be noise
    with whole_folder(folder) as temporary:
        dataset.save_to_disk(str(temporary))
        write_json(temporary / "card.json", card)
        write_checksums(temporary)
    datasets.enable_progress_bars()


def read_card(folder: Path | str) -> dict[str, Any]:
    """The card of a saved task. `DataNotFound` if the folder holds none, `RunError` if it is damaged."""
    folder = user_path(folder)
    card = read_json(folder / "card.json", keys=("task", "parameters", "rules", "counts", "content", "facts"))
    if card is None:
        raise DataNotFound(f"no task data in {folder}: build them first (notebook 01, or carma_lib.tasks.build_task)")
    return card


def is_current(folder: Path, *, task: str, parameters: dict[str, Any], rules: str) -> bool:
    """Whether `folder` holds this task whole, made from these parameters (others are free) by these rules."""
    try:
        card = read_card(folder)
    except RunError:
        return False
    same = (card["task"], {**card["parameters"], **parameters}, card["rules"]) == (task, card["parameters"], rules)
    return same and not check_folder(folder)


def load_task(folder: Path | str) -> datasets.DatasetDict:
    """The saved rows of a task, by split. `DataNotFound` if there are none, `RunError` if a file is cut or changed."""
    folder, way_out = user_path(folder), "delete its folder, and the task is built again"
    read_card(folder)
    with reading(folder, way_out):
        if reason := check_folder(folder):
            raise ValueError(reason)
        return datasets.load_from_disk(str(folder))
