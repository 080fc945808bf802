"""WordNet 3.0 as inverse dictionary: definition → headword.

Every (lemma, synset) pair is enumerated, then filtered, with the count after each filter. Three splits of
80/10/10: by row (published; a headword or a definition can occur on both sides), by synset (default here: no
definition on both sides), by headword (no target on both sides). The split by synset has a second test set,
`test_headword`: first, 5 % of the headwords are held out with every definition of theirs.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pandas as pd

from carma_lib.files import reading
from carma_lib.synonyms import wordnet as lexicon
from carma_lib.tasks.schema import TaskRows, shuffle_held_out

SPLIT_KEYS = {"row": None, "synset": "definition", "headword": "lemma"}
MIN_WORDS, MAX_WORDS = 3, 40
HELD_OUT_HEADWORDS = 0.05
PAIRS = 206_978  # of WordNet 3.0


def _filters() -> list[tuple[str, Callable[[pd.DataFrame], pd.Series]]]:
    return [
        ("headword of lower-case letters only (no phrases, hyphens, names, numbers)",
         lambda pairs: pairs["lemma"].str.fullmatch(r"[a-z]+")),
        ("headword of two letters or more", lambda pairs: pairs["lemma"].str.len() >= 2),
        (f"definition of {MIN_WORDS} to {MAX_WORDS} words",
         lambda pairs: pairs["definition"].str.split().str.len().between(MIN_WORDS, MAX_WORDS)),
        ("headword not in its own definition, in whatever form", lambda pairs: pd.Series(
            [not lexicon.in_its_own_definition(*pair) for pair in zip(pairs["lemma"], pairs["definition"])],
            index=pairs.index, dtype=bool)),
        ("no pair of headword and definition twice", lambda pairs: ~pairs.duplicated(["lemma", "definition"])),
    ]


def filtered_pairs() -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The pairs that pass every filter, and the count after each one.

    Raises `DataNotFound` without WordNet, `RunError` if its files are cut or damaged.
    """
    database = lexicon.wordnet()
    with reading(f"WordNet in {database.root}", "install it again"):
        pairs = lexicon.definition_pairs()
        if database.get_version() == "3.0" and len(pairs) != PAIRS:
            raise ValueError(f"{len(pairs):,} pairs of lemma and synset, where WordNet 3.0 has {PAIRS:,}")
    pairs["definition"] = pairs["definition"].str.strip()
    counts = [{"filter": "all (lemma, synset) pairs", "pairs": len(pairs)}]
    for name, keeps in _filters():
        pairs = pairs[keeps(pairs)]
        counts.append({"filter": name, "pairs": len(pairs)})
    return pairs.reset_index(drop=True), counts


def split_groups(groups: list[str], seed: int) -> dict[str, str]:
    """Each distinct group → its split, 80/10/10 by a seeded shuffle of the groups in sorted order."""
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    first, second = int(0.8 * len(names)), int(0.9 * len(names))
    return {name: "train" if place < first else "validation" if place < second else "test"
            for place, name in enumerate(names)}


def build_rows(*, seed: int, split_by: str) -> TaskRows:
    """WordNet as rows. `ValueError` for an unknown `split_by`, `DataNotFound` without WordNet."""
    if split_by not in SPLIT_KEYS:
        raise ValueError(f"unknown split '{split_by}'; WordNet is split by {', '.join(SPLIT_KEYS)}")
    pairs, counts = filtered_pairs()
    key = SPLIT_KEYS[split_by]
    pairs["item_id"] = "wordnet/" + pairs["synset"] + "/" + pairs["lemma"]
    pairs["group"] = pairs[key] if key else pairs["item_id"].str.removeprefix("wordnet/")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    if split_by == "synset":  # the second test set
        headwords = sorted(set(pairs["lemma"]))
        unseen = pairs["lemma"].isin(random.Random(seed).sample(headwords, int(HELD_OUT_HEADWORDS * len(headwords))))
        splits["test_headword"] = _rows(pairs[unseen])
        pairs = pairs[~pairs["definition"].isin(pairs["definition"][unseen])]
    split_of = pairs["group"].map(split_groups(list(pairs["group"]), seed))
    for split in ("train", "validation", "test"):
        splits[split] = _rows(pairs[split_of == split])
    shuffle_held_out(splits)
    return TaskRows(splits, source="WordNet 3.0, Princeton University",
                    licence="WordNet 3.0 licence (free use with the notice kept)",
                    facts={"filters": counts, "shared_with_train": {name: _shared(splits, name) for name in splits if name != "train"}})


def example_sentences(number: int) -> list[str]:
    """So many of WordNet's examples of eight words or more, by a fixed shuffle: plain English that no task here trains on."""
    found = {text for synset in lexicon.wordnet().all_synsets() for text in synset.examples() if len(text.split()) >= 8}
    return random.Random(0).sample(sorted(found), number)


def _rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    return [{"item_id": item, "text": text, "target": target, "phrases": [], "group": group} for item, text, target, group
            in zip(pairs["item_id"], pairs["definition"], pairs["lemma"], pairs["group"])]


def _shared(splits: dict[str, list[dict[str, Any]]], split: str) -> dict[str, int]:
    """How many rows of a split have a definition, or a headword, that occurs in train too."""
    seen = {column: {row[column] for row in splits["train"]} for column in ("text", "target")}
    return {name: sum(row[column] in seen[column] for row in splits[split])
            for name, column in (("definitions", "text"), ("headwords", "target"))}
