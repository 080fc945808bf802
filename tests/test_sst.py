"""SST: trees read by an independent reading, published thresholds, splits, and what happens without the data."""
import functools
import re
import warnings

import pytest

from carma_lib.files import RunError
from carma_lib.tasks import DataNotFound, build_task, is_built, sst
from carma_lib.tasks.sst import parse_tree, phrase_spans, three_class

pytestmark = pytest.mark.filterwarnings("ignore:.*Stanford's has")  # small files stand for large ones


@pytest.fixture(autouse=True, scope="module")
def _read_once():
    """The treebank's 11,855 trees are read once and not by every test; what was read cannot be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sst, "parse_tree", functools.lru_cache(None)(sst.parse_tree))
        yield


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


@pytest.mark.parametrize("line", [
    "(3 (2 a) (4 gem)", "(3 (2 a) (4 gem)))", "(7 gem)", "", "gem", "(3 (2 a) (4 gem)) (1 bad)", "(3 a) tail",
    "head (3 a)", "(3 a b)", "(3 (2 a) gem)", "(3 a (2 gem))", "(3)", "()", "((3 a))", "(3 (2 a) ())", ")(", "(33 a)",
    "(3 (2 a) (4 gem)) )"])
def test_malformed_tree_is_refused(line):
    with pytest.raises(ValueError, match="not a labelled tree"):
        parse_tree(line)


@pytest.mark.parametrize("line", ["\ufeff(3 (2 a) (4 gem))", "(3 (2 a) (4 gem))\r", " (3 (2 a) (4 gem)) \r\n", "(3 (2 a)(4 gem))"])
def test_marks_and_white_space_around_a_tree_are_no_words(line):
    tree = parse_tree(line)
    assert tree.words == ("a", "gem") and tree.nodes == ((3, 0, 2), (2, 0, 1), (4, 1, 2))


def test_a_hard_space_is_a_word():
    """Stanford's trees hold some."""
    assert parse_tree("(3 (2 \xa0) (4 gem))").words == ("\xa0", "gem")


@pytest.fixture
def small_sst(tmp_path, monkeypatch):
    """A treebank of two trees a split, with byte-order marks and the line ends of Windows."""
    (tmp_path / "sst" / "trees").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        content = "\ufeff(3 (2 a) (4 gem))\r\n\r\n(1 (2 not) (1 funny))\r\n"
        (tmp_path / "sst" / "trees" / f"{name}.txt").write_bytes(content.encode())
    monkeypatch.setenv("CARMA_DATA", str(tmp_path))
    return tmp_path / "sst"


def test_trees_with_marks_of_other_systems(small_sst):
    trees, scores = sst.load_trees()
    assert {split: [tree.text for tree in some] for split, some in trees.items()} == {
        split: ["a gem", "not funny"] for split in ("train", "validation", "test")}
    assert scores == {}
    (small_sst / "sentence_scores.tsv").write_bytes("\ufeffsplit\trow\tscore\r\ndev\t1\t0.25\r\n\r\n".encode())
    assert sst.load_trees()[1] == {("validation", 1): 0.25}


def test_a_file_cut_at_a_line_or_another_split_is_told(sst_folder, tmp_path, monkeypatch):
    own = tmp_path / "sst" / "trees"
    own.mkdir(parents=True)
    monkeypatch.setenv("CARMA_DATA", str(tmp_path))

    def told(**from_file):
        for name in ("train", "dev", "test"):
            (own / f"{name}.txt").write_bytes((sst_folder / "trees" / f"{from_file.get(name, name)}.txt").read_bytes())
        if "cut" in from_file:
            lines = (own / "test.txt").read_bytes().splitlines(keepends=True)
            (own / "test.txt").write_bytes(b"".join(lines[:from_file["cut"]]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sst.load_trees()
        return [str(each.message) for each in caught if "Stanford" in str(each.message)]

    assert told() == []
    assert ["test.txt holds 2,209 sentences and Stanford's has 2,210" in each for each in told(cut=2209)] == [True]
    assert ["dev.txt holds 2,210 sentences and Stanford's has 1,101" in each for each in told(dev="test")] == [True]


def test_other_files_are_built_anew_and_absent_ones_are_not_asked_for(small_sst, tmp_path, monkeypatch):
    folder = tmp_path / "task"

    def answers():
        return {row["text"]: row["target"] for row in build_task("sst3", folder, train_phrases=False)["test"]}

    assert not is_built("sst3", folder, train_phrases=False)
    (small_sst / "trees" / "train.txt").write_text("(3 (2 another) (4 gem))\n")  # a training text is never a held-out one
    assert answers() == {"a gem": "positive", "not funny": "negative"}
    assert is_built("sst3", folder, train_phrases=False) and not is_built("sst3", folder)
    (small_sst / "sentence_scores.tsv").write_text("split\trow\tscore\ntest\t0\t0.5\n")
    assert not is_built("sst3", folder, train_phrases=False)
    assert answers() == {"a gem": "neutral", "not funny": "negative"}
    (small_sst / "trees" / "test.txt").write_text("(3 (2 a) (4 gem))\n")
    assert answers() == {"a gem": "neutral"}
    monkeypatch.delenv("CARMA_DATA")
    assert is_built("sst3", folder, train_phrases=False) and answers() == {"a gem": "neutral"}


@pytest.mark.parametrize(("content", "says"), [
    ("validation\t0\t0.9\n", "line 1 must be 'split', 'row' and 'score'"),
    ("split,row,score\ndev,0,0.9\n", "line 1 must be"), ("", "line 1 must be"),
    ("split\trow\tscore\nvalidation\t0\t0.9\n", "line 2: the split is train, dev or test, not 'validation'"),
    ("split\trow\tscore\n\ndev\t7\t0.9\n", "line 3: row 7 of dev does not exist"),
    ("split\trow\tscore\ndev\t-1\t0.9\n", "line 2: row -1 of dev does not exist"),
    ("split\trow\tscore\ndev\t0\t0.9\ndev\t0\t0.8\n", "line 3: row 0 of dev occurs twice"),
    ("split\trow\tscore\ndev\t0\t1.9\n", "line 2: a score lies between 0 and 1"),
    ("split\trow\tscore\ndev\t0\tnan\n", "line 2: a score lies between 0 and 1"),
    ("split\trow\tscore\ndev\t0\t0,9\n", "line 2: could not convert"),
    ("split\trow\tscore\ndev\t0\n", "line 2: not enough values")])
def test_odd_score_files_are_named(small_sst, content, says):
    (small_sst / "sentence_scores.tsv").write_text(content)
    with pytest.raises(RunError) as caught:
        sst.load_trees()
    message = str(caught.value)
    assert message.startswith(f"{small_sst / 'sentence_scores.tsv'} is damaged (") and says in message
    assert "\n" not in message and "delete it and the trees' labels are used" in message


@pytest.mark.parametrize(("content", "says"), [
    ("(3 (2 a) (4 gem))\n(3 a) tail\n".encode(), "line 2: not a labelled tree"), (b"(3 (2 a) (4 g\xff))\n", "can't decode"),
    ("(3 (2 a) (4 gem))\n".encode("utf-16"), "can't decode"), (b"<html>not found</html>", "line 1: not a labelled tree")])
def test_damaged_trees_are_named(small_sst, content, says):
    (small_sst / "trees" / "dev.txt").write_bytes(content)
    with pytest.raises(RunError, match=re.escape(f"{small_sst / 'trees' / 'dev.txt'} is damaged (") + f".*{says}"):
        sst.load_trees()


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
