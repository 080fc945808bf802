"""The tasks: rows of one schema from three sources, kept as Arrow with a card.

| task | source | text → target |
|---|---|---|
| `controlled_inverse_dictionary` | the embedded lexicon | definition → term |
| `controlled_sentiment` | the embedded lexicon | opinion → positive, neutral or negative |
| `wordnet_inverse_dictionary` | WordNet 3.0 | definition → headword |
| `sst3`, `sst5` | Stanford Sentiment Treebank | sentence → one of 3 or 5 classes |
"""
from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from carma_lib.files import fingerprint
from carma_lib.tasks import sst, wordnet
from carma_lib.tasks.controlled.lexicon import controlled_synonyms, load_lexicon
from carma_lib.tasks.controlled.definitions import inverse_dictionary_rows
from carma_lib.tasks.controlled.opinions import sentiment_rows
from carma_lib.tasks.schema import FEATURES, DataNotFound, TaskRows, is_current, read_card, save_rows

__all__ = ["FEATURES", "TASKS", "DataNotFound", "Task", "TaskRows", "build_task", "load_task", "read_card",
           "task_named"]


@dataclass(frozen=True)
class Task:
    """What later steps need to know of a task: its kind (for the prompt) and its source of synonyms."""

    kind: str  # "inverse_dictionary" or "sentiment"
    synonyms: str  # "controlled" or "wordnet"

    def replacement(self, rows: datasets.Dataset) -> dict[str, Any]:
        """`source` and `forbidden` of `replaced_rows` for rows of this task: a definition never receives its target."""
        return {"source": controlled_synonyms() if self.synonyms == "controlled" else "wordnet",
                "forbidden": rows["target"] if self.kind == "inverse_dictionary" else None}


TASKS = {
    "controlled_inverse_dictionary": Task("inverse_dictionary", "controlled"),
    "controlled_sentiment": Task("sentiment", "controlled"),
    "wordnet_inverse_dictionary": Task("inverse_dictionary", "wordnet"),
    "sst3": Task("sentiment", "wordnet"),
    "sst5": Task("sentiment", "wordnet"),
}


def task_named(name: str) -> Task:
    """The task of that name. `ValueError` naming the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}'; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def build_task(name: str, folder: Path | str, *, seed: int = 42, split_by: str = "synset",
               train_phrases: bool = True) -> datasets.DatasetDict:
    """Build a task into `folder`, or load it from there if it was made from the same parameters.

    Parameters
    ----------
    seed: of the grammar (controlled lexicon) or of the split (WordNet; published: 42).
    split_by: WordNet only: "synset" (no definition on both sides), "row" (published) or "headword".
    train_phrases: SST only: every distinct phrase of the training trees is a training item too.

    Raises `ValueError` for an unknown task or split, `DataNotFound` where a source is missing.
    """
    task_named(name)
    folder = Path(folder)
    parameters: dict[str, Any]
    if name.startswith("sst"):
        parameters = {"classes": int(name[3:]), "train_phrases": train_phrases}
        build = sst.build_rows
    elif name == "wordnet_inverse_dictionary":
        parameters = {"seed": seed, "split_by": split_by}
        build = wordnet.build_rows
    else:
        parameters = {"seed": seed, "lexicon": fingerprint(asdict(load_lexicon()))}
        build = partial(_controlled_rows, name)
    if not is_current(folder, task=name, parameters=parameters):
        save_rows(folder, build(**parameters), task=name, parameters=parameters)
    return load_task(folder)


def load_task(folder: Path | str) -> datasets.DatasetDict:
    """The saved rows of a task, by split. `DataNotFound` where there are none."""
    read_card(Path(folder))
    return datasets.load_from_disk(str(folder))


def _controlled_rows(name: str, *, seed: int, lexicon: str) -> TaskRows:
    make = inverse_dictionary_rows if name == "controlled_inverse_dictionary" else sentiment_rows
    content = load_lexicon()
    return TaskRows(make(content, seed=seed), source="the project's own lexicon and grammar",
                    licence="MIT, as the project", facts={"terms": len(content.terms), "lexicon": lexicon})
