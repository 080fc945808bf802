"""The tasks: rows of one schema from four sources, kept as Arrow with a card.

| task | source | text → target |
|---|---|---|
| `controlled_inverse_dictionary` | the embedded lexicon | definition → term |
| `controlled_sentiment` | the embedded lexicon | opinion → positive, neutral or negative |
| `wordnet_inverse_dictionary` | WordNet 3.0 | definition → headword |
| `sst3`, `sst5` | Stanford Sentiment Treebank | sentence → one of 3 or 5 classes |
| the path of a file | one's own CSV, TSV, JSON lines or Parquet file | `text` → `target`, of any number of tokens |
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from carma_lib.files import RunError, code_fingerprint, fingerprint, sha256_of, user_path
from carma_lib.tasks import sst, wordnet
from carma_lib.tasks.controlled.lexicon import controlled_synonyms, load_lexicon
from carma_lib.tasks.controlled.definitions import inverse_dictionary_rows
from carma_lib.tasks.controlled.opinions import sentiment_rows
from carma_lib.tasks import file as own
from carma_lib.tasks.file import task_names
from carma_lib.tasks.schema import FEATURES, DataNotFound, TaskRows, is_current, load_task, read_card, save_rows

__all__ = ["FEATURES", "TASKS", "DataNotFound", "Task", "TaskRows", "build_task", "is_built", "load_task", "read_card",
           "task_named", "task_names"]


@dataclass(frozen=True)
class Task:
    """What later steps need to know of a task: its kind (for the prompt), synonyms and form of answers."""

    kind: str  # "inverse_dictionary", "sentiment" or "own"
    synonyms: str  # "controlled" or "wordnet"
    answer: str = "token"  # or "text": several tokens, see `carma_lib.collate.encode`
    tests: tuple[str, ...] = ("test",)  # its test splits; none are known of a file before it is read

    def replacement(self, rows: datasets.Dataset) -> dict[str, Any]:
        """`source` and `forbidden` of `replaced_rows` for rows of this task: a definition never receives its target."""
        return {"source": controlled_synonyms() if self.synonyms == "controlled" else "wordnet",
                "forbidden": rows["target"] if self.kind == "inverse_dictionary" else None}


_CONTROLLED = ("test_seen", "test_held_out", "test_longer")
TASKS = {
    "controlled_inverse_dictionary": Task("inverse_dictionary", "controlled", tests=_CONTROLLED),
    "controlled_sentiment": Task("sentiment", "controlled", tests=_CONTROLLED),
    "wordnet_inverse_dictionary": Task("inverse_dictionary", "wordnet", tests=("test", "test_headword")),
    "sst3": Task("sentiment", "wordnet"),
    "sst5": Task("sentiment", "wordnet"),
}


_ALSO = {"carma_lib.tasks": [f"carma_lib.tasks.controlled.{module}" for module in ("lexicon", "definitions", "opinions")],
         "carma_lib.tasks.wordnet": ["carma_lib.synonyms.wordnet"]}  # whose rules a builder follows too


def task_named(name: str | os.PathLike) -> Task:
    """The task of a name, of a file's path, or of the name that `task_names` gives to a file (`own_…`).

    `ValueError` naming the known ones.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if name in TASKS:
        return TASKS[name]
    if isinstance(name, str) and (own.is_file_name(name) or name.startswith(own.PREFIX)):
        return Task("own", "wordnet", "text", ())
    raise ValueError(f"unknown task '{name}'; the tasks are {', '.join(TASKS)}, and files that end in "
                     f"{', '.join(own.FORMATS)}")


def build_task(name: str | os.PathLike, folder: Path | str, *, seed: int = 42, split_by: str = "synset", train_phrases: bool = True,
               split_sizes: Sequence[float] | None = None, file: str | None = None) -> datasets.DatasetDict:
    """Build a task into `folder`, or load it from there if it is whole and made from the same source, parameters and rules.

    Parameters
    ----------
    name: a name of `TASKS`, the path of a file of one's own, or `own_…` with that path as `file`.
    seed: of the grammar (controlled lexicon) or of the split (WordNet; published: 42; a file without splits).
    split_by: WordNet only: "synset" (no definition on both sides), "row" (published) or "headword".
    train_phrases: SST only: every distinct phrase of the training trees is a training item too.
    split_sizes: a file without splits only: shares of train, validation and test; None for 0.8, 0.1 and 0.1.
    file: the path for a name `own_…`, else None.

    Raises `ValueError` for an unknown task or split, `DataNotFound` for a source that is missing, `RunError` for a file
    that is damaged or breaks the rules of `carma_lib.tasks.file`.
    """
    build, made = _builder(name, seed=seed, split_by=split_by, train_phrases=train_phrases, split_sizes=split_sizes,
                           file=file)
    folder = user_path(folder)
    if not is_current(folder, **made):
        save_rows(folder, build(**made["parameters"]), **made)
    return load_task(folder)


def is_built(name: str | os.PathLike, folder: Path | str, **parameters: Any) -> bool:
    """Whether `build_task` with these parameters would find the task built and whole."""
    try:
        return is_current(user_path(folder), **_builder(name, **parameters)[1])
    except DataNotFound:
        return False


def _builder(name: str | os.PathLike, *, seed: int = 42, split_by: str = "synset", train_phrases: bool = True,
             split_sizes: Sequence[float] | None = None, file: str | None = None
             ) -> tuple[Callable[..., TaskRows], dict[str, Any]]:
    """What makes the rows, and the name, parameters and fingerprint of rules that the card will hold."""
    kind, name = task_named(name).kind, os.fspath(name)
    parameters: dict[str, Any]
    if name in ("sst3", "sst5"):
        parameters = {"classes": int(name[3:]), "train_phrases": train_phrases}
        if files := sst.source_files():
            parameters["content"] = fingerprint([sha256_of(path) for path in files])
        build = sst.build_rows
    elif name == "wordnet_inverse_dictionary":
        parameters = {"seed": seed, "split_by": split_by}
        build = wordnet.build_rows
    elif kind == "own":
        file = name if own.is_file_name(name) else file
        if file is None:
            raise RunError(f"{name}: its file is not known; give the path as file")
        name = task_names([name])[name]
        sizes = own.check_sizes(split_sizes or own.SPLIT_SIZES)
        parameters = {"content": own.content_of(file), "seed": seed, "split_sizes": sizes}
        build = partial(own.build_rows, file=file, name=name)
    else:
        parameters = {"seed": seed, "lexicon": fingerprint(asdict(load_lexicon()))}
        build = partial(_controlled_rows, name)
    module = getattr(build, "func", build).__module__
    rules = code_fingerprint("carma_lib.tasks.schema", module, *_ALSO.get(module, ()))
    return build, {"task": name, "parameters": parameters, "rules": rules}


def _controlled_rows(name: str, *, seed: int, lexicon: str) -> TaskRows:
    make = inverse_dictionary_rows if name == "controlled_inverse_dictionary" else sentiment_rows
    content = load_lexicon()
    return TaskRows(make(content, seed=seed), source="the project's own lexicon and grammar",
                    licence="MIT, as the project", facts={"terms": len(content.terms), "lexicon": lexicon})
