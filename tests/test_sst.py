"""SST: trees read by an independent reading, published thresholds, splits, and what happens without the data."""
import re

import pytest

from carma_lib.tasks import DataNotFound, build_task, sst
from carma_lib.tasks.sst import parse_tree, phrase_spans, three_class


def nested(line):
    """The tree by recursion on brackets: (label, children or word)."""
    def read(position):
        label = int(line[position + 1])
        position += 3
        if line[position] != "(":
            end = line.index(")", position)
            return (label, line[position:end]), end + 1
        children = []
        while line[position] == "(":
            child, position = read(position)
            children.append(child)
            position += line[position] == " "
        return (label, children), position + 1
    return read(0)[0]


def flat(tree):
    """(label, words) of every subtree, the root first."""
    label, content = tree
    if isinstance(content, str):
        return [(label, [content])]
    below = [flat(child) for child in content]
    return [(label, [word for each in below for word in each[0][1]])] + [node for each in below for node in each]


def test_parse_tree_equals_recursive_reading(sst_folder):
    lines = (sst_folder / "trees" / "dev.txt").read_text(encoding="utf-8").split("\n")
    for line in [line for line in lines if line and "\\" not in line and "RB-" not in line][:300]:
        tree = parse_tree(line)
        assert [(node.label, list(tree.words[node.first:node.last])) for node in tree.nodes] == flat(nested(line))


@pytest.mark.parametrize("line", ["(3 (2 a) (4 gem)", "(3 (2 a) (4 gem)))", "(7 gem)", "", "gem"])
def test_malformed_tree_is_refused(line):
    with pytest.raises(ValueError, match="not a labelled tree"):
        parse_tree(line)


@pytest.mark.parametrize(("score", "label"), [(0, "negative"), (0.39999, "negative"), (0.4, "neutral"),
                                              (0.6, "neutral"), (0.60001, "positive"), (1, "positive")])
def test_published_thresholds(score, label):
    assert three_class(score) == label


def test_phrases_are_largest_small_subtrees(sst_folder):
    for line in (sst_folder / "trees" / "test.txt").read_text(encoding="utf-8").split("\n")[:200]:
        tree = parse_tree(line)
        spans = phrase_spans(tree)
        texts = {tree.text_of(node) for node in tree.nodes if 2 <= node.last - node.first <= 4}
        assert all(tree.text[start:end] in texts for start, end in spans)
        assert all(before[1] < after[0] for before, after in zip(spans, spans[1:]))
        covered = {place for start, end in spans for place in range(start, end)}
        assert not texts or covered, "a sentence with small subtrees has a phrase"


def test_rows_of_the_real_treebank(sst_folder, tmp_path):
    rows = build_task("sst3", tmp_path / "sst3")
    assert (rows["validation"].num_rows, rows["test"].num_rows) == (1101, 2210)
    labels = rows["test"].to_pandas()["target"].value_counts()
    assert labels["negative"] == 912 and labels.sum() == 2210
    held_out = set(rows["test"]["text"]) | set(rows["validation"]["text"])
    assert not held_out & set(rows["train"]["text"])
    assert len(set(rows["train"]["text"])) > 150_000


def test_the_first_items_are_like_all(sst_folder):
    """Stanford's files begin with positive sentences: 82 % of the first 200 of the test file."""
    for split, rows in sst.build_rows(classes=3, train_phrases=False).splits.items():
        positive = [row["target"] == "positive" for row in rows]
        if split != "train":
            assert abs(sum(positive[:200]) / 200 - sum(positive) / len(positive)) < 0.1


def test_five_classes_follow_score_bins(sst_folder):
    rows = sst.build_rows(classes=5, train_phrases=False).splits
    _, scores = sst.load_trees()
    if not scores:
        pytest.skip("this copy has no sentence scores")
    for split, items in rows.items():
        for item in items:
            score = scores[split, int(item["item_id"][-5:])]
            assert sst.FIVE_CLASSES[sum(score > edge for edge in (.2, .4, .6, .8))] == item["target"]


def test_without_scores_the_root_label_decides(sst_folder, tmp_path, monkeypatch):
    (tmp_path / "sst").mkdir()
    (tmp_path / "sst" / "trees").symlink_to(sst_folder / "trees")
    monkeypatch.setenv("CARMA_DATA", str(tmp_path))
    rows = sst.build_rows(classes=3, train_phrases=False)
    assert rows.facts["sentences_with_a_score"] == 0
    assert {item["target"] for item in rows.splits["test"]} == {"negative", "neutral", "positive"}


def test_missing_data_name_the_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("CARMA_DATA", str(tmp_path))
    with pytest.raises(DataNotFound, match="no folder sst.*Three ways"):
        sst.build_rows(classes=3, train_phrases=True)
    (tmp_path / "sst" / "trees").mkdir(parents=True)
    (tmp_path / "sst" / "trees" / "train.txt").write_text("")
    with pytest.raises(DataNotFound, match=re.escape("train.txt") + ".*empty"):
        sst.build_rows(classes=3, train_phrases=True)
    monkeypatch.delenv("CARMA_DATA")
    with pytest.raises(DataNotFound, match="Three ways"):
        sst.build_rows(classes=3, train_phrases=True)
