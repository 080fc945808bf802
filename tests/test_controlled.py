"""The controlled lexicon and its two tasks, read back from the finished texts by plain rules of their own."""
import copy
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import yaml

from carma_lib.tasks.controlled import opinions as controlled_opinions
from carma_lib.tasks.controlled.lexicon import LABELS, LexiconError, controlled_synonyms, load_lexicon
from carma_lib.tasks.controlled.definitions import inverse_dictionary_rows
from carma_lib.tasks.controlled.opinions import sentiment_rows

LEXICON = load_lexicon()
CANONICAL = {word: min([word, *others]) for word, others in LEXICON.synonyms.items()}
FUNCTION_WORDS = set(
    "a an the any that which with of on in at by for to from near into over through against between as its and "
    "or but is was has seemed did not never hardly failed neither nor although though even despite this us me "
    "everyone two four".split())
SMALL = {"train": 700, "validation": 30, "test_seen": 30, "test_held_out": 30, "test_longer": 30}


@pytest.fixture(scope="module")
def definitions():
    return inverse_dictionary_rows(LEXICON, seed=0)


@pytest.fixture(scope="module")
def opinions():
    return sentiment_rows(LEXICON, seed=0)


def words(text):
    return re.findall("[a-z]+", text.lower())


def canonical(text):
    return " ".join(CANONICAL.get(word, word) for word in words(text))


def replaced(text, rng):
    """Half of the words that have synonyms written as one of them."""
    def swap(match):
        choices = LEXICON.synonyms.get(match[0])
        return rng.choice(choices) if choices and rng.random() < 0.5 else match[0]
    return re.sub("[A-Za-z]+", swap, text)


# --- the lexicon

def test_counts():
    assert len(LEXICON.terms) >= 250
    assert {len(features) for features in LEXICON.terms.values()} <= {5, 6, 7, 8}
    assert all(re.fullmatch("[a-z]+", term) for term in LEXICON.terms)


def test_features_are_shared_within_and_across_genera():
    terms, genera = defaultdict(set), defaultdict(set)
    for term, features in LEXICON.terms.items():
        for feature in features:
            terms[feature].add(term)
            genera[feature].add(LEXICON.genus[term])
    alone = [(term, feature) for term, features in LEXICON.terms.items() for feature in features
             if LEXICON.terms_with(LEXICON.genus[term], (feature,)) == [term]]
    assert min(map(len, terms.values())) >= 2
    assert sum(len(found) > 1 for found in genera.values()) > len(genera) / 3
    assert len(alone) < sum(map(len, LEXICON.terms.values())) / 10


def test_most_content_words_have_three_synonyms():
    counts = Counter()
    for make in (inverse_dictionary_rows, sentiment_rows):
        for rows in make(replace(LEXICON, synonyms={}), seed=1).values():
            counts.update(word for row in rows for word in words(row["text"]) if word not in FUNCTION_WORDS)
    rich = [word for word in counts if len(LEXICON.synonyms.get(word, [])) >= 3]
    assert len(rich) > 0.65 * len(counts)
    assert sum(counts[word] for word in rich) > 0.75 * counts.total()


def test_synonyms_are_symmetric_single_words():
    synonyms = controlled_synonyms()
    assert synonyms == LEXICON.synonyms
    for word, others in synonyms.items():
        assert re.fullmatch("[a-z]+", word) and word not in others and len(others) == len(set(others)) > 0
        assert all({word, *others} == {other, *synonyms[other]} for other in others)


def test_every_synonym_is_seen_in_training(definitions, opinions):
    seen = {word for rows in (definitions, opinions) for row in rows["train"] for word in words(row["text"])}
    assert sorted(LEXICON.synonyms.keys() - seen) == []


# --- both tasks

@pytest.mark.parametrize("task", ["definitions", "opinions"])
def test_rows(task, request):
    rows = request.getfixturevalue(task)
    assert {split: len(found) for split, found in rows.items()} == {
        "train": {"definitions": 4500, "opinions": 4000}[task],
        "validation": 500, "test_seen": 600, "test_held_out": 600, "test_longer": 600}
    everything = [row for split in rows.values() for row in split]
    for column in ("text", "item_id"):
        assert len({row[column] for row in everything}) == len(everything)
    for row in everything:
        assert list(row) == ["item_id", "text", "target", "phrases", "group"]
        assert re.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)+", row["text"])


@pytest.mark.parametrize("task", ["definitions", "opinions"])
def test_phrases_are_whole_words_apart_from_each_other(task, request):
    for row in (row for split in request.getfixturevalue(task).values() for row in split):
        text, between, last = row["text"], "", 0
        assert len(row["phrases"]) >= 2
        for start, end in row["phrases"]:
            assert last <= start < end <= len(text)
            assert re.fullmatch(r"\w+( \w+)+", text[start:end]), text
            between += text[last:start] + " "
            last = end
        assert set(words(between)) <= {"and", "but", "although", "though", "even"}
        assert last == len(text)


@pytest.mark.parametrize("task", ["definitions", "opinions"])
def test_articles_agree_also_after_replacement(task, request):
    rng = random.Random(0)
    for row in (row for split in request.getfixturevalue(task).values() for row in split):
        for text in (row["text"], replaced(row["text"], rng)):
            for article, word in re.findall(r"\b([Aa]n?) ([a-z]+)", text):
                assert (article.lower() == "an") == (word[0] in "aeiou"), text


@pytest.mark.parametrize("make", [inverse_dictionary_rows, sentiment_rows])
def test_seed_decides_the_rows(make):
    assert make(LEXICON, seed=3, sizes=SMALL) == make(LEXICON, seed=3, sizes=SMALL)
    assert make(LEXICON, seed=3, sizes=SMALL) != make(LEXICON, seed=4, sizes=SMALL)


def digest():
    rows = [make(LEXICON, seed=0, sizes=SMALL) for make in (inverse_dictionary_rows, sentiment_rows)]
    return hashlib.sha256(json.dumps([rows, LEXICON.synonyms]).encode()).hexdigest()


def test_rows_do_not_depend_on_string_hashes():
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", "import test_controlled; print(test_controlled.digest())"],
                              env={**os.environ, "PYTHONHASHSEED": hash_seed}, cwd=os.path.dirname(__file__),
                              check=True, capture_output=True, text=True)
        assert done.stdout.strip() == digest()


@pytest.mark.parametrize("make", [inverse_dictionary_rows, sentiment_rows])
def test_too_large_a_split(make, tmp_path, monkeypatch):
    monkeypatch.setattr(controlled_opinions, "TRIES", 5)
    (tmp_path / "lexicon.yml").write_text(yaml.safe_dump(SOUND))
    with pytest.raises(ValueError, match="gives only [0-9]+ .* for split 'train', not 5000; lower its size"):
        make(load_lexicon(tmp_path / "lexicon.yml"), seed=0, sizes={"train": 5000})


# --- definitions

GENERA = {canonical(genus): genus for genus in LEXICON.genus.values()}
FEATURES = {canonical(feature): feature for features in LEXICON.terms.values() for feature in features}


def read_definition(row):
    """Genus and features of a definition, from its phrases alone."""
    noun, *clauses = [canonical(row["text"][start:end]) for start, end in row["phrases"]]
    genus = max((name for name in GENERA if noun.endswith(" " + name)), key=len)
    opening = re.compile(f"^({canonical('a kind of')}|a|an|any) ")
    features = [*opening.sub("", noun.removesuffix(genus)).split()]
    for clause in clauses:
        core = re.sub("^(that|which) ", "", clause)
        options = [core, core.removeprefix("is "), re.sub("^with ", "has ", core), f"is {core}"]
        features.append(next(option for option in options if option in FEATURES))
    return GENERA[genus], frozenset(FEATURES[feature] for feature in features)


def test_a_definition_fits_its_term_only(definitions):
    assert len(FEATURES) == len({feature for features in LEXICON.terms.values() for feature in features})
    for split in definitions.values():
        for row in split:
            genus, features = read_definition(row)
            fitting = [term for term, known in LEXICON.terms.items()
                       if LEXICON.genus[term] == genus and features.issubset(known)]
            assert fitting == [row["target"]] == [row["group"]], row["text"]


def test_a_definition_never_holds_its_term(definitions):
    for split in definitions.values():
        for row in split:
            possible = set(words(row["text"]))
            possible |= {other for word in possible for other in LEXICON.synonyms.get(word, [])}
            stem = row["target"].removesuffix("y").removesuffix("e")
            forms = {row["target"], *(stem + ending for ending in ("s", "es", "ies", "ed", "ing", "er", "y"))}
            assert not possible & forms, row


def test_definition_splits_keep_their_promises(definitions):
    sets = defaultdict(lambda: defaultdict(set))  # split → term → feature sets
    for split, rows in definitions.items():
        for row in rows:
            sets[split][row["target"]].add(read_definition(row)[1])
    train = sets["train"]
    assert train.keys() == LEXICON.terms.keys()
    known = {term: frozenset().union(*found) for term, found in train.items()}
    assert {len(features) for found in train.values() for features in found} == {1, 2}
    for split in ("validation", "test_seen"):
        assert all(sets[split][term] <= train[term] for term in sets[split])
    for term, pairs in sets["test_held_out"].items():
        for pair in pairs:
            assert len(pair) == 2 and pair <= known[term] and pair not in train[term]
            assert all(LEXICON.terms_with(LEXICON.genus[term], (feature,)) != [term] for feature in pair)
    for term, longer in sets["test_longer"].items():
        for features in longer:
            assert len(features) in (3, 4) and features <= known[term]
            assert not any(pair <= features for pair in sets["test_held_out"][term])
    assert len(sets["test_held_out"]) > 0.95 * len(LEXICON.terms)


# --- opinions

SUBORDINATOR = "(?:even though|although|though)"
POLARITY, PAST = {}, {}  # by the canonical form of an opinion word; PAST undoes "did not impress"
for _label in LABELS:
    _kinds = LEXICON.opinions[_label]
    _own = [word for domain in LEXICON.opinions["domains"].values() for word in domain.get(_label, [])]
    for _word in [*_kinds["gradable"], *_kinds["strong"], *_kinds["verbs"], *_kinds["verbs"].values(), *_own]:
        POLARITY[CANONICAL[_word]] = _label
    PAST |= {CANONICAL[base]: CANONICAL[past] for past, base in _kinds["verbs"].items()}


def opinion_words(clause):
    return [CANONICAL[word] for word in words(clause) if CANONICAL.get(word) in POLARITY]


def is_negated(clause):
    return bool(re.search(" (not|never|hardly|failed to) ", clause))


def label_of_clause(clause):
    """The rule, restated: "neither" makes neutral, a negation lowers by one step."""
    if " neither " in clause:
        return "neutral"
    polarity = POLARITY[opinion_words(clause)[-1]]
    return {"positive": "negative", "negative": "neutral"}[polarity] if is_negated(clause) else polarity


def label_of_sentence(text):
    """The rule, restated: what follows "but" decides, and in it the clause that no "although" opens."""
    text = text[0].lower() + text[1:]
    text = text.split(", but ")[-1]
    opened = re.match(rf"(?:{SUBORDINATOR}|despite) [^,]+, (.*)", text)
    if opened:
        return label_of_sentence(opened[1])
    main = re.split(rf", {SUBORDINATOR} ", text)[0]
    labels = [label_of_clause(clause) for clause in re.split(" and (?=the )", main)]
    assert len(set(labels)) == 1, text
    return labels[0]


def test_labels_follow_the_rules(opinions):
    for split in opinions.values():
        for row in split:
            assert label_of_sentence(row["text"]) == row["target"], row["text"]


def test_labels_are_balanced(opinions):
    for rows in opinions.values():
        counts = Counter(row["target"] for row in rows)
        assert set(counts) == set(LABELS) and max(counts.values()) - min(counts.values()) <= 1


def combinations_of(row):
    """(construct, opinion word) of every clause of a sentence, from its text alone."""
    text = row["text"][0].lower() + row["text"][1:]
    signs = {"contrast": ", but ", "concession": f"{SUBORDINATOR} |despite ", "conjunction": " and the "}
    compound = [name for name, sign in signs.items() if re.search(sign, text)]
    stress = {CANONICAL[word] for word in ("really", "very", "absolutely")}
    found = set()
    for clause in filter(opinion_words, re.split(f",? and (?=the )|, but |, |{SUBORDINATOR} ", text)):
        adverbs = {CANONICAL.get(word) for word in words(clause)}
        construct = ("neither" if " neither " in clause else "negated" if is_negated(clause)
                     else "downtoned" if CANONICAL["rather"] in adverbs
                     else "intensified" if adverbs & stress else "plain")
        word = opinion_words(clause)[0]
        found |= {(name, PAST.get(word, word)) for name in (construct, *compound)}
    return found


def test_opinion_splits_keep_their_promises(opinions):
    used = {split: [combinations_of(row) for row in rows] for split, rows in opinions.items()}
    train = set().union(*used["train"])
    for split in ("validation", "test_seen"):
        assert all(found <= train for found in used[split])
    for row, found in zip(opinions["test_held_out"], used["test_held_out"]):
        assert found - train, row["text"]
        assert {construct for construct, _ in found} <= {construct for construct, _ in train}
        assert {word for _, word in found} <= {word for _, word in train}
    for split, rows in opinions.items():
        clauses = {len(re.findall(r"\bthe ", row["text"].lower())) for row in rows}
        assert clauses == ({3} if split == "test_longer" else {1, 2})


# --- bad lexicons

SOUND = {
    "adjectives": ["small", "grey"],
    "terms": {"bird": {"wren": ["small", "eats seeds"], "crow": ["grey", "eats seeds"],
                       "dove": ["small", "grey"], "finch": ["small", "eats seeds"]}},
    "synonyms": {"small": ["little", "tiny"]},
    "opinions": {
        **{label: {"gradable": [word], "strong": [], "verbs": {}}
           for label, word in zip(LABELS, ("good", "usual", "bad"))},
        "domains": {"film": {"frame": "in this film", "aspects": ["plot", "cast", "score"],
                             "positive": ["gripping"], "negative": ["dull"]}}},
}


def changed(*path, to):
    """The sound lexicon as YAML with one entry changed."""
    content = inner = copy.deepcopy(SOUND)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return yaml.safe_dump(content)


@pytest.mark.parametrize("text, message", [
    ("", "holds no lexicon; it needs the sections adjectives, terms, synonyms, opinions"),
    ("- bird", "holds no lexicon"),
    ("terms: [a, b", "line 1: no valid YAML"),
    ("terms: {bird: {}}", "section 'adjectives' is missing or empty; add it"),
    (changed("terms", to={"wren": ["small", "grey"]}), "no genus above 'wren'; write each"),
    (changed("terms", "bird", "wren", to=[]), "term 'wren' has no features"),
    (changed("terms", "bird", "wren", to=None), "term 'wren' has no features"),
    (changed("terms", "bird", "wren", to=["tiny"]), "term 'wren': feature 'tiny' is unknown; write"),
    (changed("terms", "bird", "wren", to=["eats sedes"]), "'eats sedes' is unknown to all other terms"),
    (changed("terms", "bird", "wren", to=["small", "small"]), "feature 'small' stands there twice"),
    (changed("terms", "bird", "blue tit", to=["small"]), "'blue tit' is no single word"),
    (changed("terms", "fish", to={"wren": ["small"]}), "term 'wren' stands there twice"),
    (changed("synonyms", "small", to=["very little"]), "synonyms of 'small': 'very little' is no single"),
    (changed("synonyms", "small", to="little"), "synonyms of 'small': expected a list of words"),
    (changed("synonyms", "small", to=["little", "little"]), "'small': 'little' stands there twice"),
    (changed("synonyms", "wee", to=["tiny"]), "'tiny' stands in another class too; keep one"),
    (changed("opinions", "neutral", to={}), "opinions: neutral needs exactly the entries grad"),
    (changed("terms", "bird", to=None), "genus 'bird' has no terms or no name"),
    (changed("opinions", "neutral", "gradable", to="usual"), "opinions: neutral: expected a list of words"),
    (changed("opinions", "neutral", "verbs", to=["met"]), "neutral: expected past → base form"),
    (changed("opinions", "domains", to={}), "opinions: no domains; add at least one"),
    (changed("opinions", "domains", "film", to=["plot"]), "domain 'film' needs exactly the entries"),
    (changed("opinions", "domains", "film", "aspects", to=["plot"]), "domain 'film' has fewer than three"),
])
def test_bad_lexicon(tmp_path, text, message):
    path = tmp_path / "lexicon.yml"
    path.write_text(text)
    with pytest.raises(LexiconError, match=re.escape(message)) as raised:
        load_lexicon(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_sound_lexicon_and_missing_file(tmp_path):
    path = tmp_path / "lexicon.yml"
    path.write_text(yaml.safe_dump(SOUND))
    assert load_lexicon(path).terms["wren"] == ("small", "eats seeds")
    with pytest.raises(LexiconError, match="cannot be read .*; give the path of a lexicon file"):
        load_lexicon(tmp_path / "none.yml")
