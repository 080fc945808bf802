"""The WordNet builder on the real database: every pair counted, every filter, three splits, the cache."""
import functools
import re

import pandas as pd
import pytest

from carma_lib.files import RunError
from carma_lib.tasks import DataNotFound, build_task, read_card, wordnet


@pytest.fixture(scope="module")
def pairs(wordnet_database):
    return wordnet.filtered_pairs()


@pytest.fixture(scope="module")
def built(pairs):
    """Rows by seed and split, each made once, of pairs that are read once."""
    @functools.cache
    def build(seed, split_by):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wordnet, "filtered_pairs", lambda: (pairs[0].copy(), list(pairs[1])))
            return wordnet.build_rows(seed=seed, split_by=split_by)

    return build


def test_every_pair_is_enumerated(pairs):
    assert pairs[1][0] == {"filter": "all (lemma, synset) pairs", "pairs": 206_978}


def test_filters_by_an_independent_reading(pairs, wordnet_database):
    kept = set()
    for synset in wordnet_database.all_synsets():
        for lemma in synset.lemma_names():
            if lemma.isascii() and lemma.isalpha() and lemma.islower() and len(lemma) > 1:
                kept.add((lemma, synset.name()))
    ours = pairs[0]
    assert set(zip(ours["lemma"], ours["synset"])) <= kept
    assert len(kept) - 10 <= pairs[1][2]["pairs"] <= len(kept) + 10  # a synset may list one lemma in two cases
    assert ours["definition"].str.split().str.len().between(3, 40).all()
    own = [re.search(rf"(?<![a-z]){lemma}(?![a-z])", text.lower()) for lemma, text in zip(ours["lemma"], ours["definition"])]
    assert not any(own)
    assert not ours.duplicated(["lemma", "definition"]).any()


@pytest.mark.parametrize(("split_by", "column"), [("synset", "text"), ("headword", "target")])
def test_split_keeps_its_promise(built, split_by, column):
    splits = dict(built(42, split_by).splits)
    values = {split: {row[column] for row in rows} for split, rows in splits.items()}
    assert not values["train"] & values["test"] and not values["train"] & values["validation"]
    assert not values["validation"] & values["test"]
    second = splits.pop("test_headword", [])
    sizes = {split: len(rows) / sum(map(len, splits.values())) for split, rows in splits.items()}
    assert abs(sizes["train"] - 0.8) < 0.01 and abs(sizes["test"] - 0.1) < 0.01
    assert bool(second) == (split_by == "synset")


def test_second_test_set_shares_neither_headword_nor_definition(built):
    rows = built(42, "synset")
    splits = rows.splits
    assert list(splits) == ["train", "validation", "test", "test_headword"]
    second = splits["test_headword"]
    for column in ("target", "text"):
        values = {row[column] for row in second}
        for split in ("train", "validation", "test"):
            assert not values & {row[column] for row in splits[split]}
    assert 4000 < len(second) < 6500 and len(splits["train"]) > 70_000
    senses = [sum(row["target"] == word for row in second) for word in {row["target"] for row in second}]
    assert max(senses) > 5  # common words of many senses are held out too, with every sense
    assert rows.facts["shared_with_train"]["test_headword"] == {"definitions": 0, "headwords": 0}
    assert rows.facts["shared_with_train"]["test"]["definitions"] == 0
    assert rows.facts["shared_with_train"]["test"]["headwords"] > 1000
    other = {row["target"] for row in built(7, "synset").splits["test_headword"]}
    assert len(other & {row["target"] for row in second}) < len(other) / 5


@pytest.mark.parametrize("damage", [
    lambda pairs: pairs.iloc[:1000], lambda pairs: (_ for _ in ()).throw(IndexError("list index out of range"))])
def test_damaged_wordnet_is_named(wordnet_database, monkeypatch, damage):
    whole = pd.DataFrame({"lemma": ["a"], "synset": ["a.n.01"], "definition": ["one two three"]})
    monkeypatch.setattr(wordnet.lexicon, "definition_pairs", lambda: damage(whole))
    with pytest.raises(RunError, match="^WordNet in .* is damaged .*: install it again$"):
        wordnet.filtered_pairs()


def test_the_first_items_are_like_all(built):
    """WordNet's files go by part of speech: of the first test items in file order all are adjectives."""
    rows = built(42, "synset").splits["test"]
    nouns = [".n." in row["item_id"] for row in rows]
    assert 0.4 < sum(nouns) / len(nouns) and abs(sum(nouns[:300]) / 300 - sum(nouns) / len(nouns)) < 0.1


def test_second_build_comes_from_the_cache(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet, "filtered_pairs", lambda: (pairs[0].copy(), list(pairs[1])))
    first = build_task("wordnet_inverse_dictionary", tmp_path / "wordnet")
    monkeypatch.setattr(wordnet, "filtered_pairs", lambda: pytest.fail("built a second time"))
    second = build_task("wordnet_inverse_dictionary", tmp_path / "wordnet")
    assert second["test"][:] == first["test"][:]
    card = read_card(tmp_path / "wordnet")
    assert card["counts"] == {split: rows.num_rows for split, rows in first.items()}
    assert card["facts"]["shared_with_train"]["test"]["definitions"] == 0


def test_unknown_split_and_missing_wordnet(monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'letter'; WordNet is split by row, synset, headword"):
        wordnet.build_rows(seed=1, split_by="letter")

    def nowhere():
        raise wordnet.lexicon.WordNetNotFound

    monkeypatch.setattr(wordnet.lexicon, "wordnet", nowhere)
    with pytest.raises(DataNotFound, match="WordNet"):
        wordnet.build_rows(seed=1, split_by="synset")
