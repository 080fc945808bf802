"""The Stanford Sentiment Treebank as sentiment classification, from its trees.

Thresholds as published (arXiv 2502.11066): sentence score > .6 positive, .4 ≤ score ≤ .6 neutral, else
negative; the five classes are the trees' own labels (bins at .2, .4, .6, .8). Stock splits.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from carma_lib.tasks.schema import DataNotFound, TaskRows, shuffle_held_out

THREE_CLASSES = ("negative", "neutral", "positive")
FIVE_CLASSES = ("terrible", "bad", "okay", "good", "excellent")
MAX_PHRASE_WORDS = 4
_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
_UNESCAPE = {"-LRB-": "(", "-RRB-": ")", "\\/": "/", "\\*": "*"}
_TOKEN = re.compile(r"\(|\)|[^() ]+")


class Node(NamedTuple):
    """A subtree: its sentiment label (0 to 4), and the first and one past the last of its words."""

    label: int
    first: int
    last: int


class Tree(NamedTuple):
    """A sentence's words and its subtrees, the root first."""

    words: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def text_of(self, node: Node) -> str:
        return " ".join(self.words[node.first:node.last])


def parse_tree(line: str) -> Tree:
    """Read one labelled bracketed tree, e.g. `(3 (2 a) (4 gem))`. `ValueError` where brackets do not match."""
    words: list[str] = []
    nodes: list[list[int]] = []
    open_nodes: list[int] = []
    expects_label = False
    for token in _TOKEN.findall(line.strip(" \n")):
        if token == "(":
            expects_label = True
        elif token == ")":
            if not open_nodes:
                raise ValueError(f"not a labelled tree (a bracket too many): {line[:60]!r}")
            nodes[open_nodes.pop()][2] = len(words)
        elif expects_label:
            if token not in tuple("01234"):
                raise ValueError(f"not a labelled tree (label {token!r} is not 0 to 4): {line[:60]!r}")
            open_nodes.append(len(nodes))
            nodes.append([int(token), len(words), -1])
            expects_label = False
        else:
            for escaped, character in _UNESCAPE.items():
                token = token.replace(escaped, character)
            words.append(token)
    if open_nodes or not nodes or not words:
        raise ValueError(f"not a labelled tree (brackets do not match): {line[:60]!r}")
    return Tree(tuple(words), tuple(Node(*node) for node in nodes))


def phrase_spans(tree: Tree) -> list[list[int]]:
    """Character spans of the largest subtrees of two to four words, left to right; they never overlap."""
    starts = [0]
    for word in tree.words:
        starts.append(starts[-1] + len(word) + 1)
    spans, covered = [], 0
    for node in sorted(tree.nodes, key=lambda node: (node.first, -node.last)):
        if 2 <= node.last - node.first <= MAX_PHRASE_WORDS and node.first >= covered:
            spans.append([starts[node.first], starts[node.last] - 1])
            covered = node.last
    return spans


def three_class(score: float) -> str:
    """The published thresholds: > .6 positive, .4 to .6 neutral, else negative."""
    return "positive" if score > 0.6 else "neutral" if score >= 0.4 else "negative"


def _from_folder(folder: Path) -> tuple[dict[str, list[Tree]], dict[tuple[str, int], float]]:
    trees, scores = {}, {}
    for split, name in _FILES.items():
        path = folder / "trees" / name
        if not path.is_file():
            raise DataNotFound(f"{folder} is no SST folder: it lacks trees/{name}. {_HOW_TO_GET}")
        lines = path.read_text(encoding="utf-8").split("\n")
        trees[split] = [parse_tree(line) for line in lines if line]
        if not trees[split]:
            raise DataNotFound(f"trees/{name} in {folder} is empty. {_HOW_TO_GET}")
    score_file = folder / "sentence_scores.tsv"
    if score_file.is_file():
        split_of = {"train": "train", "dev": "validation", "test": "test"}
        for line in score_file.read_text(encoding="utf-8").splitlines()[1:]:
            split, row, score = line.split("\t")
            scores[split_of[split], int(row)] = float(score)
    return trees, scores


def _from_hub() -> tuple[dict[str, list[Tree]], dict[tuple[str, int], float]]:
    import datasets

    branch = {"revision": "refs/convert/parquet"}  # the data set itself is a script, which `datasets` no longer runs
    try:
        bracketed = datasets.load_dataset("stanfordnlp/sst", "ptb", **branch)
        scored = datasets.load_dataset("stanfordnlp/sst", "default", **branch)
    except Exception as error:  # the hub's client raises many kinds when out of reach
        raise DataNotFound(f"SST is not on this machine and the hub gave none ({type(error).__name__}). {_HOW_TO_GET}"
                           ) from error
    trees = {split: [parse_tree(line) for line in bracketed[split]["ptb_tree"]] for split in _FILES}
    by_text = {tokens.replace("|", " "): score
               for split in _FILES for tokens, score in zip(scored[split]["tokens"], scored[split]["label"])}
    scores = {(split, row): by_text[tree.text] for split in _FILES
              for row, tree in enumerate(trees[split]) if tree.text in by_text}
    return trees, scores


_HOW_TO_GET = ("Three ways: set CARMA_DATA to a folder that holds sst/trees/{train,dev,test}.txt; unpack Stanford's "
               "trainDevTestTrees_PTB.zip as $CARMA_DATA/sst; or allow access to the Hugging Face hub.")


def load_trees() -> tuple[dict[str, list[Tree]], dict[tuple[str, int], float]]:
    """The trees by split, and sentence scores by (split, row); from `$CARMA_DATA/sst`, else the hub.

    Raises `DataNotFound` naming the ways to get them.
    """
    root = os.environ.get("CARMA_DATA")
    if root is None:
        return _from_hub()
    folder = Path(root) / "sst"
    if not folder.is_dir():
        raise DataNotFound(f"CARMA_DATA is {root}, but there is no folder sst in it. {_HOW_TO_GET}")
    return _from_folder(folder)


def _phrase_items(trees: list[Tree], classes: int, forbidden: set[str]) -> Iterator[dict[str, Any]]:
    seen = set(forbidden)
    for row, tree in enumerate(trees):
        for number, node in enumerate(tree.nodes[1:], start=1):
            text = tree.text_of(node)
            if text not in seen and any(character.isalnum() for character in text):
                seen.add(text)
                target = _label(node.label, None, classes)
                yield {"item_id": f"sst{classes}/train/{row:05d}/{number:03d}", "text": text, "target": target,
                       "phrases": [], "group": f"train/{row:05d}"}


def _label(label: int, score: float | None, classes: int) -> str:
    if classes == 5:
        return FIVE_CLASSES[label]
    return three_class((label + 0.5) / 5 if score is None else score)


def build_rows(*, classes: int, train_phrases: bool) -> TaskRows:
    """SST as rows: 3 or 5 classes; with `train_phrases`, every distinct phrase of the training trees too.

    A training text that also stands in validation or test is left out; the card counts them. Without
    sentence scores (Stanford's zip of trees alone) the root's label stands in for the score. Stanford's files
    begin with positive sentences; validation and test are shuffled, so that their first items are like all of them.
    """
    if classes not in (3, 5):
        raise ValueError(f"SST has 3 or 5 classes here, not {classes}")
    trees, scores = load_trees()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, sentences in trees.items():
        splits[split] = [
            {"item_id": f"sst{classes}/{split}/{row:05d}", "text": tree.text,
             "target": _label(tree.nodes[0].label, scores.get((split, row)), classes),
             "phrases": phrase_spans(tree), "group": f"{split}/{row:05d}"}
            for row, tree in enumerate(sentences)]
    held_out = {item["text"] for split in ("validation", "test") for item in splits[split]}
    kept = [item for item in splits["train"] if item["text"] not in held_out]
    facts = {"training_sentences_also_held_out_and_dropped": len(splits["train"]) - len(kept),
             "sentences_with_a_score": len(scores), "training_sentences": len(kept)}
    if train_phrases:
        kept += _phrase_items(trees["train"], classes, held_out | {item["text"] for item in kept})
    facts["training_phrases"] = len(kept) - facts["training_sentences"]
    splits["train"] = kept
    shuffle_held_out(splits)
    return TaskRows(splits, source="Stanford Sentiment Treebank, Socher et al. 2013",
                    licence="no licence file; the authors ask for the citation", facts=facts)
