"""The controlled lexicon and its two tasks, read back from the finished texts by plain rules of their own."""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import yaml

from carma_lib.tasks import controlled_opinions
from carma_lib.tasks.controlled import LABELS, LexiconError, controlled_synonyms, load_lexicon
from carma_lib.tasks.controlled_definitions import inverse_dictionary_rows
from carma_lib.tasks.controlled_opinions import sentiment_rows

LEXICON = load_lexicon()
CANONICAL = {word: min([word, *others]) for word, others in LEXICON.synonyms.items()}
FUNCTION_WORDS = set(
    "a an the any that which with of on in at by for to from near into over through against between as its and or but "
    "is was has seemed did not never hardly failed neither nor although though even despite this us me everyone two four"
    .split())
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


def replaced(text, rng, rate=0.5):
    def swap(match):
        choices = LEXICON.synonyms.get(match[0])
        return rng.choice(choices) if choices and rng.random() < rate else match[0]
    return re.sub("[A-Za-z]+", swap, text)


# --- the lexicon ---------------------------------------------------------------------------------------------

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


def test_most_content_words_have_three_synonyms(definitions, opinions):
    plain = [inverse_dictionary_rows(LEXICON, seed=1, synonym_rate=0), sentiment_rows(LEXICON, seed=1, synonym_rate=0)]
    counts = Counter(word for rows in plain for split in rows.values() for row in split for word in words(row["text"])
                     if word not in FUNCTION_WORDS)
    rich = [word for word in counts if len(LEXICON.synonyms.get(word, [])) >= 3]
    assert len(rich) > 0.65 * len(counts)
    assert sum(counts[word] for word in rich) > 0.75 * counts.total()


def test_synonyms_are_symmetric_single_words():
    synonyms = controlled_synonyms()
    assert synonyms == controlled_synonyms(LEXICON)
    for word, others in synonyms.items():
        assert re.fullmatch("[a-z]+", word) and word not in others and len(others) == len(set(others)) > 0
        assert all({word, *others} == {other, *synonyms[other]} for other in others)


def test_every_synonym_is_seen_in_training(definitions, opinions):
    seen = {word for rows in (definitions, opinions) for row in rows["train"] for word in words(row["text"])}
    assert sorted(LEXICON.synonyms.keys() - seen) == []


# --- both tasks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["definitions", "opinions"])
def test_rows(task, request):
    rows = request.getfixturevalue(task)
    assert {split: len(found) for split, found in rows.items()} == {
        "train": 4500 if task == "definitions" else 4000, "validation": 500,
        "test_seen": 600, "test_held_out": 600, "test_longer": 600}
    everything = [row for split in rows.values() for row in split]
    assert len({row["text"] for row in everything}) == len({row["item_id"] for row in everything}) == len(everything)
    for row in everything:
        assert list(row) == ["item_id", "text", "target", "phrases", "group"]
        text = row["text"]
        assert re.fullmatch(r"[A-Z][A-Za-z]*(,? [a-z]+)+", text)
        ends = [0, *(end for _, end in row["phrases"])]
        assert len(row["phrases"]) >= 2
        for (start, end), before in zip(row["phrases"], ends):
            assert before <= start < end <= len(text)
            assert re.fullmatch(r"\w.*\w", text[start:end]) and " " in text[start:end]
            assert re.fullmatch(r"|.*\W", text[:start]) and re.fullmatch(r"|\W.*", text[end:])
        outside = "".join(" " * (end - start) if any(s <= start < e for s, e in row["phrases"]) else text[start:end]
                          for start, end in ((i, i + 1) for i in range(len(text))))
        assert set(words(outside)) <= {"and", "but", "although", "though", "even"}


@pytest.mark.parametrize("task", ["definitions", "opinions"])
def test_articles_agree_also_after_replacement(task, request):
    rng = random.Random(0)
    for split in request.getfixturevalue(task).values():
        for row in split:
            for text in (row["text"], replaced(row["text"], rng)):
                for article, word in re.findall(r"\b([Aa]n?) ([a-z]+)", text):
                    assert (article.lower() == "an") == (word[0] in "aeiou"), text


@pytest.mark.parametrize("make", [inverse_dictionary_rows, sentiment_rows])
def test_seed_decides_the_rows(make):
    assert make(LEXICON, seed=3, sizes=SMALL) == make(LEXICON, seed=3, sizes=SMALL)
    assert make(LEXICON, seed=3, sizes=SMALL) != make(LEXICON, seed=4, sizes=SMALL)


def test_rows_do_not_depend_on_string_hashes():
    code = """
import hashlib, json
from tests.test_controlled import LEXICON, SMALL, inverse_dictionary_rows, sentiment_rows
rows = [make(LEXICON, seed=0, sizes=SMALL) for make in (inverse_dictionary_rows, sentiment_rows)]
print(hashlib.sha256(json.dumps([rows, LEXICON.synonyms]).encode()).hexdigest())
"""
    digests = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                              capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__))).stdout
               for seed in ("1", "2")]
    rows = [make(LEXICON, seed=0, sizes=SMALL) for make in (inverse_dictionary_rows, sentiment_rows)]
    here = hashlib.sha256(json.dumps([rows, LEXICON.synonyms]).encode()).hexdigest()
    assert digests == [here + "\n"] * 2


@pytest.mark.parametrize("make", [inverse_dictionary_rows, sentiment_rows])
@pytest.mark.parametrize("options, message", [
    ({"sizes": {"dev": 3}}, "unknown split 'dev'; choose from train, validation"),
    ({"sizes": {"train": 0}}, "size of split 'train' must be a whole number of at least 1, got 0"),
    ({"synonym_rate": 1.5}, "synonym_rate must lie between 0 and 1, got 1.5"),
    ({"held_out_share": 1}, "held_out_share must lie between 0 and 1, got 1"),
])
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(LEXICON, seed=0, **options)


@pytest.mark.parametrize("make", [inverse_dictionary_rows, sentiment_rows])
def test_too_large_a_split(make, tmp_path, monkeypatch):
    monkeypatch.setattr(controlled_opinions, "TRIES", 5)
    (tmp_path / "lexicon.yml").write_text(yaml.safe_dump(SOUND))
    with pytest.raises(ValueError, match="gives only [0-9]+ .* for split 'train', not 5000; lower its size or add"):
        make(load_lexicon(tmp_path / "lexicon.yml"), seed=0, sizes={"train": 5000})


# --- definitions ---------------------------------------------------------------------------------------------

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
        options = [core, core.removeprefix("is "), re.sub("^with ", "has ", core), "is " + core]
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
            possible = {form for word in words(row["text"]) for form in [word, *LEXICON.synonyms.get(word, [])]}
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


# --- opinions ------------------------------------------------------------------------------------------------

SUBORDINATOR = r"(?:even though|although|though)"


def polarity_of(adjective_or_verb):
    for label in LABELS:
        kinds = LEXICON.opinions[label]
        own = [word for domain in LEXICON.opinions["domains"].values() for word in domain.get(label, [])]
        forms = [*kinds["gradable"], *kinds["strong"], *kinds["verbs"], *kinds["verbs"].values(), *own]
        if adjective_or_verb in {CANONICAL[form] for form in forms}:
            return label
    raise AssertionError(adjective_or_verb)


def label_of_clause(clause):
    """The rule, restated: the last opinion word counts; "neither" makes neutral, a negation lowers by one step."""
    found = [word for word in words(clause) if word not in FUNCTION_WORDS]
    opinion = [CANONICAL[word] for word in found if word in CANONICAL and is_opinion(CANONICAL[word])][-1]
    if " neither " in clause:
        return "neutral"
    negated = re.search(" (not|never|hardly|failed to) ", clause)
    return {"positive": "negative", "negative": "neutral"}[polarity_of(opinion)] if negated else polarity_of(opinion)


def is_opinion(word):
    try:
        return bool(polarity_of(word))
    except AssertionError:
        return False


def label_of_sentence(text):
    """The rule, restated: what follows "but" decides; in it, the clause that no subordinator opens."""
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
    compound = [name for name, sign in [("contrast", ", but "), ("concession", f"{SUBORDINATOR} |despite "),
                                        ("conjunction", " and the ")] if re.search(sign, text)]
    found = set()
    for clause in re.split(rf",? and (?=the )|, but |, |{SUBORDINATOR} ", text):
        opinion = [CANONICAL[word] for word in words(clause) if is_opinion(CANONICAL.get(word, ""))]
        adverbs = {CANONICAL.get(word) for word in words(clause)}
        if not opinion:
            continue
        construct = ("neither" if " neither " in clause
                     else "negated" if re.search(" (not|never|hardly|failed to) ", clause)
                     else "downtoned" if CANONICAL["rather"] in adverbs
                     else "intensified" if adverbs & {CANONICAL[word] for word in ("really", "very", "absolutely")}
                     else "plain")
        base = {CANONICAL[base]: CANONICAL[past] for label in LABELS
                for past, base in LEXICON.opinions[label]["verbs"].items()}
        found |= {(name, base.get(opinion[0], opinion[0])) for name in (construct, *compound)}
    return found


def test_opinion_splits_keep_their_promises(opinions):
    used = {split: [combinations_of(row) for row in rows] for split, rows in opinions.items()}
    train = set().union(*used["train"])
    for split in ("validation", "test_seen"):
        assert all(found <= train for found in used[split])
    for row, found in zip(opinions["test_held_out"], used["test_held_out"]):
        assert found - train, row["text"]
        parts = [{combination[part] for combination in train} for part in (0, 1)]
        assert all(construct in parts[0] and word in parts[1] for construct, word in found)
    clauses = {split: {len(re.findall(r"\bthe ", row["text"].lower())) for row in rows}
               for split, rows in opinions.items()}
    assert clauses == {split: {3} if split == "test_longer" else {1, 2} for split in opinions}


# --- bad lexicons --------------------------------------------------------------------------------------------

SOUND = {
    "adjectives": ["small", "grey"],
    "terms": {"bird": {"wren": ["small", "eats seeds"], "crow": ["grey", "eats seeds"], "dove": ["small", "grey"],
                       "finch": ["small", "eats seeds"]}},
    "synonyms": {"small": ["little", "tiny"]},
    "opinions": {
        **{label: {"gradable": [word], "strong": [], "verbs": {}}
           for label, word in zip(LABELS, ("good", "usual", "bad"))},
        "domains": {"film": {"frame": "in this film", "aspects": ["plot", "cast", "score"], "positive": ["gripping"],
                             "negative": ["dull"]}}},
}


def changed(*path, to):
    content = json.loads(json.dumps(SOUND))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return yaml.safe_dump(content)


@pytest.mark.parametrize("text, message", [
    ("", "holds no lexicon; it needs the sections adjectives, terms, synonyms, opinions"),
    ("- bird", "holds no lexicon"),
    ("terms: [a, b", "line 1: no valid YAML"),
    ("terms: {bird: {}}", "section 'adjectives' is missing or empty; add it"),
    (changed("terms", to={"wren": ["small", "grey"]}), "no genus above 'wren'; write each term under its genus"),
    (changed("terms", "bird", "wren", to=[]), "term 'wren' has no features"),
    (changed("terms", "bird", "wren", to=None), "term 'wren' has no features"),
    (changed("terms", "bird", "wren", to=["tiny"]), "term 'wren': feature 'tiny' is unknown; write a verb phrase"),
    (changed("terms", "bird", "wren", to=["eats sedes"]), "feature 'eats sedes' is unknown to all other terms"),
    (changed("terms", "bird", "wren", to=["small", "small"]), "feature 'small' stands there twice"),
    (changed("terms", "bird", "blue tit", to=["small"]), "'blue tit' is no single word"),
    (changed("terms", "fish", to={"wren": ["small"]}), "term 'wren' stands there twice"),
    (changed("synonyms", "small", to=["very little"]), "synonyms of 'small': 'very little' is no single word"),
    (changed("synonyms", "small", to="little"), "synonyms of 'small': expected a list of words, got 'little'"),
    (changed("synonyms", "small", to=["little", "little"]), "synonyms of 'small': 'little' stands there twice"),
    (changed("synonyms", "wee", to=["tiny"]), "'tiny' stands in another class too; keep one"),
    (changed("opinions", "neutral", to={}), "opinions: neutral needs exactly the entries gradable, strong, verbs"),
    (changed("opinions", "domains", "film", "aspects", to=["plot"]), "domain 'film' has fewer than three aspects"),
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
