"""The Stanford Sentiment Treebank as sentiment classification, from its trees.

Thresholds as published (arXiv 2502.11066): sentence score > .6 positive, .4 ≤ score ≤ .6 neutral, else
negative; the five classes are the trees' own labels (bins at .2, .4, .6, .8). Stock splits.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from carma_lib.files import first_line, reading, user_path
from carma_lib.tasks.schema import DataNotFound, TaskRows, shuffle_held_out

FIVE_CLASSES = ("terrible", "bad", "okay", "good", "excellent")
MAX_PHRASE_WORDS = 4
_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
_SENTENCES = {"train": 8544, "validation": 1101, "test": 2210}  # of Stanford's files
_UNESCAPE = {"-LRB-": "(", "-RRB-": ")", "\\/": "/", "\\*": "*"}


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
    """Read one labelled bracketed tree, e.g. `(3 (2 a) (4 gem))`: a label, then one word or at least one subtree.

    A byte-order mark and white space around the tree are left out. Raises `ValueError` for anything else: brackets
    that do not match, text or a second tree outside of them, a label that is not 0 to 4.
    """
    from nltk.tree import Tree as Brackets

    words: list[str] = []
    nodes: list[Node] = []

    def take(node: Brackets) -> None:
        if node.label() not in tuple("01234"):
            raise ValueError(f"label {node.label()!r} is not 0 to 4")
        if not len(node) or len(node) > 1 and any(isinstance(child, str) for child in node):
            raise ValueError("a bracket holds neither one word nor subtrees alone")
        place, first = len(nodes), len(words)
        nodes.append(Node(-1, first, first))
        for child in node:
            if isinstance(child, str):
                for escaped, character in _UNESCAPE.items():
                    child = child.replace(escaped, character)
                words.append(child)
            else:
                take(child)
        nodes[place] = Node(int(node.label()), first, len(words))

    try:
        take(Brackets.fromstring(line.strip("\ufeff \r\n\t"), node_pattern="[^() ]+", leaf_pattern="[^() ]+"))
    except ValueError as error:
        raise ValueError(f"not a labelled tree ({first_line(error)}): {line[:60]!r}") from None
    return Tree(tuple(words), tuple(nodes))


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
    trees = {}
    for split, name in _FILES.items():
        path = folder / "trees" / name
        if not path.is_file():
            raise DataNotFound(f"{folder} is no SST folder: it lacks trees/{name}. {_HOW_TO_GET}")
        with reading(path, "unpack Stanford's zip again"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            trees[split] = [_with_number(number, parse_tree, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not trees[split]:
            raise DataNotFound(f"trees/{name} in {folder} is empty. {_HOW_TO_GET}")
        if len(trees[split]) != _SENTENCES[split]:
            warnings.warn(f"{path} holds {len(trees[split]):,} sentences and Stanford's has {_SENTENCES[split]:,}: it is cut short, or "
                          "another file; unpack Stanford's zip again, or go on with what is there", stacklevel=2)
    scores = folder / "sentence_scores.tsv"
    with reading(scores, "correct it, or delete it and the trees' labels are used"):
        return trees, _read_scores(scores, trees) if scores.is_file() else {}


def _with_number(number: int, read: Callable, *values: Any) -> Any:
    try:
        return read(*values)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_scores(path: Path, trees: dict[str, list[Tree]]) -> dict[tuple[str, int], float]:
    header, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    if header.split("\t") != ["split", "row", "score"]:
        raise ValueError(f"line 1 must be 'split', 'row' and 'score' with tabs between, not {header[:60]!r}")
    split_of, scores = {"train": "train", "dev": "validation", "test": "test"}, {}

    def read(line: str) -> None:
        split, row, score = line.split("\t")
        if split not in split_of:
            raise ValueError(f"the split is train, dev or test, not {split!r}")
        place = split_of[split], int(row)
        if not 0 <= place[1] < len(trees[place[0]]) or place in scores:
            raise ValueError(f"row {row} of {split} " + ("occurs twice" if place in scores else "does not exist"))
        if not 0 <= float(score) <= 1:
            raise ValueError(f"a score lies between 0 and 1, not {score}")
        scores[place] = float(score)

    for number, line in enumerate(lines, 2):
        if line.strip():
            _with_number(number, read, line)
    return scores


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


def source_files() -> list[Path]:
    """The files of `$CARMA_DATA/sst` that `load_trees` reads; none where it would ask the hub."""
    folder = _folder()
    names = [*(f"trees/{name}" for name in _FILES.values()), "sentence_scores.tsv"]
    return [path for name in names if (path := folder / name).is_file()] if folder else []


def _folder() -> Path | None:
    root = os.environ.get("CARMA_DATA")
    return None if root is None else user_path(root) / "sst"


def load_trees() -> tuple[dict[str, list[Tree]], dict[tuple[str, int], float]]:
    """The trees by split, and sentence scores by (split, row); from `$CARMA_DATA/sst`, else the hub.

    Raises `DataNotFound` naming the ways to get them, `RunError` naming a damaged file and its line. Warns of a file with
    another number of sentences than Stanford's.
    """
    folder = _folder()
    if folder is None:
        return _from_hub()
    if not folder.is_dir():
        raise DataNotFound(f"CARMA_DATA is {folder.parent}, but there is no folder sst in it. {_HOW_TO_GET}")
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


def build_rows(*, classes: int, train_phrases: bool, content: str | None = None) -> TaskRows:
    """SST as rows: 3 or 5 classes; with `train_phrases`, every distinct phrase of the training trees too.

    A training text that also stands in validation or test is left out; the card counts them. Without
    sentence scores (Stanford's zip of trees alone) the root's label stands in for the score. Stanford's files
    begin with positive sentences; validation and test are shuffled, so that their first items are like all of them.
    `content` is the mark of the files, for the card alone.
    """
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
