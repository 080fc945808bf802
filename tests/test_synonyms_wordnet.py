"""WordNet by three ways, its pairs, and synonyms against a plain restatement of their gate."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from carma_lib.synonyms import reader
from carma_lib.synonyms.wordnet import (
    AGREEMENT, FUNCTION_WORDS, RARITY, VALENCY, definition_of, definition_pairs, in_its_own_definition, inflect, is_coarse,
    lemmas_of, sense_counts, sense_shares,
    synonym_forms, synonyms, usual_part_of_speech, wordnet)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reader_knows_lexicographer_files():
    kinds = [wordnet().synsets(word, letter)[0].lexname() for word, letter in
             [("dog", "n"), ("entity", "n"), ("run", "v"), ("rain", "v"), ("huge", "a"), ("often", "r"),
              ("atomic", "a")]]
    assert kinds == [
        "noun.animal", "noun.Tops", "verb.motion", "verb.weather", "adj.all", "adv.all", "adj.pert"]
    for key in sense_counts():  # lemma%part:file:..., with satellites as a part of their own
        part, file = key.split("%")[1].split(":")[:2]
        kind = ["noun", "verb", "adj", "adv", "adj"][int(part) - 1]
        assert reader.LEXICOGRAPHER_FILES[int(file)].split(".")[0] == kind, key


def test_nltks_own_data_come_first(tmp_path):
    if not reader.DEBIAN_FOLDER.is_dir():
        pytest.skip("WordNet is here by another way than Debian's packages, so there is nothing to copy")
    corpus = tmp_path / "corpora" / "wordnet"
    shutil.copytree(reader.DEBIAN_FOLDER, corpus, ignore=shutil.ignore_patterns("bin", "pixmaps", "wnres"))
    (corpus / "lexnames").write_text("".join(
        f"{number:02d}\t{name}\t1\n" for number, name in enumerate(reader.LEXICOGRAPHER_FILES)))
    code = ("import nltk; nltk.data.path[:] = [r'%s']\n"
            "from carma_lib.synonyms.wordnet import wordnet\n"
            "print(type(wordnet()).__name__, wordnet().synset('dog.n.01').lexname())" % tmp_path)
    assert run_python(code, NLTK_DATA=str(tmp_path)) == "WordNetCorpusReader noun.animal"


def test_without_wordnet_one_line_names_three_ways():
    code = ("import nltk; nltk.data.path.clear(); nltk.download = lambda *names, **options: False\n"
            "from pathlib import Path\n"
            "import carma_lib.synonyms.reader as lexicon\n"
            "lexicon.DEBIAN_FOLDER = Path('nowhere')\n"
            "try: lexicon.wordnet()\n"
            "except lexicon.WordNetNotFound as error: print(error)")
    message = run_python(code, NLTK_DATA="")
    assert len(message.splitlines()) == 1
    for way in ("nltk.downloader wordnet", "wordnet-base", "wordnet-sense-index", "NLTK_DATA"):
        assert way in message


def test_import_loads_nothing_heavy():
    code = ("import sys, carma_lib.synonyms.quality\n"
            "heavy = {'nltk', 'textblob', 'lemminflect', 'pandas', 'torch', 'tqdm'}\n"
            "print(sorted(heavy & set(sys.modules)))")
    assert run_python(code) == "[]"


def test_definition_pairs():
    pairs = definition_pairs()
    assert list(pairs.columns) == ["lemma", "synset", "part_of_speech", "definition", "count"]
    assert len(pairs) > 206_000
    assert not pairs.duplicated(["lemma", "synset"]).any()
    assert sorted(pairs["part_of_speech"].unique()) == ["a", "n", "r", "s", "v"]
    assert (pairs["definition"].str.len() > 0).all()
    definitions = pairs["definition"]
    assert not definitions.str.contains(r";\s*;|;\s*-+\s*[A-Z]").any(), "remains of examples"
    assert not definitions.str.contains('"').any() and not definitions.str.contains(r"[:;,]$|\s-$").any()
    assert not definitions.str.contains(r"  |in the phrase \)|; \)|\( | \)").any(), "holes where quotations were"
    assert not definitions.str.contains(r"\b(?:as in|e\.g\.)$").any()
    dog = pairs[(pairs["lemma"] == "dog") & (pairs["synset"] == "dog.n.01")].iloc[0]
    assert dog["definition"].startswith("a member of the genus Canis")
    for row in pairs.iloc[::20_000].itertuples():
        lemma = next(lemma for lemma in wordnet().synset(row.synset).lemmas() if lemma.name() == row.lemma)
        assert row.count == lemma.count() and lemma.synset().definition().startswith(row.definition)


@pytest.mark.parametrize("gloss, definition", [
    ('deeply religious; "a devout man"- H.L.Mencken', "deeply religious"),
    ('deeply religious;  "a man" - A. B. Writer; "another"', "deeply religious"),
    ('having more than is normal: "a long wait"', "having more than is normal"),
    ('focus once again; The physicist refocused the light beam"', "focus once again"),
    ('a local branch of the post"', "a local branch of the post"),
    ('progress (especially in the phrase "make strides"); "big strides"', "progress (especially in the phrase `make strides')"),
    ('a summary; as in e.g. "a news roundup"', "a summary"), ('(of a ball) "it is dead"', "(of a ball)"),
    ('toed; often in combination; "long-toed; "five-toed"', "toed; often in combination"),
    ("clear; ,", "clear"), ("( bridge) a suit", "(bridge) a suit"), ("", ""), ("plain; twice", "plain; twice")])
def test_definition_of_a_gloss(gloss, definition):
    assert definition_of(gloss) == definition


@pytest.mark.parametrize("lemma, definition, inside", [
    ("reverse", "reversed (turned backward) in order", True), ("cherry", "the color of blood or cherries", True),
    ("goose", "one of the geese", True), ("buy", "something bought", True), ("dog", "a dog", True),
    ("dog", "a member of the genus Canis", False), ("act", "an actor's play", False), ("car", "a carpet", False)])
def test_in_its_own_definition(lemma, definition, inside):
    assert in_its_own_definition(lemma, definition) == inside


def plain_shares(word: str, letter: str) -> dict[str, float]:
    counts = {synset.name(): lemma.count() for synset in wordnet().synsets(word, letter)
              for lemma in synset.lemmas() if lemma.name() == word}
    return {name: (count + 1) / (sum(counts.values()) + len(counts)) for name, count in counts.items()}


def dated(entry) -> bool:
    return any(domain.name().startswith(("archaism", "dialect", "regionalism", "combining", "trade"))
               for domain in entry.usage_domains())


def plain_objectless(verb: str) -> float:
    frame = re.compile(r"(Something|Somebody|It is|Something is|Somebody's \(body part\)) \S+"
                       r"( PP| Adjective\S*| (to|on|at|for|out of) (somebody|something))?")
    return sum(share for name, share in plain_shares(verb, "v").items() for lemma in wordnet().synset(name).lemmas()
               if lemma.name() == verb and any(map(frame.fullmatch, lemma.frame_strings())))


def plain_synonyms(word: str, letter: str) -> set[str]:
    """The gate of `synonyms` once more, from NLTK's own counts."""
    found = set()
    own = plain_shares(word, letter)
    for candidate in {lemma.name() for name in own for lemma in wordnet().synset(name).lemmas()} - {word}:
        other, share, other_share, uses, other_uses = plain_shares(candidate, letter), 0.0, 0.0, 0, 0
        for name in own:
            lemmas = {lemma.name(): lemma for lemma in wordnet().synset(name).lemmas()}
            if candidate not in lemmas:
                continue
            one, two = lemmas[word], lemmas[candidate]
            if not set(one.frame_ids()) <= set(two.frame_ids()):
                continue
            if one.syntactic_marker() != two.syntactic_marker():
                continue
            if is_coarse(candidate) or dated(two) or dated(two.synset()):
                continue
            if letter == "n" and lemmas_of(candidate, "n") != (candidate,):
                continue
            if letter == "n" and candidate.endswith("ing") and lemmas_of(candidate, "v") != (candidate,):
                continue
            share, other_share = share + own[name], other_share + other[name]
            uses, other_uses = uses + one.count(), other_uses + two.count()
        if letter == "v" and plain_objectless(word) - plain_objectless(candidate) > VALENCY:
            continue
        plain = candidate.isalpha() and candidate.islower() and len(candidate) > 2
        alike = candidate.startswith(word[:4]) or word.startswith(candidate[:4])
        if (plain and not alike and candidate not in FUNCTION_WORDS and share * other_share >= AGREEMENT
                and other_uses >= max(1, RARITY * uses) and usual_part_of_speech(candidate, letter)):
            found.add(candidate)
    return found


@pytest.mark.parametrize("word, letter", [
    ("film", "n"), ("movie", "n"), ("story", "n"), ("act", "v"), ("move", "v"), ("buy", "v"), ("begin", "v"),
    ("big", "a"), ("huge", "a"), ("funny", "a"), ("often", "r"), ("usually", "r"), ("child", "n"),
    ("help", "v"), ("enroll", "v"), ("rely", "v"), ("enter", "v"), ("answer", "v"), ("reply", "v"), ("cross", "v"),
    ("wonderful", "a"), ("animal", "n"), ("allow", "v"), ("tragedy", "n"),
    ("rebellion", "n"), ("delivery", "n"), ("government", "n")])
def test_synonyms_equal_plain_restatement(word, letter):
    assert sense_shares(word, letter) == pytest.approx(plain_shares(word, letter))
    assert set(synonyms(word, letter)) == plain_synonyms(word, letter)


def test_gate_keeps_sense_and_drops_nonsense():
    assert "purchase" in synonyms("buy", "v")
    assert "immense" in synonyms("huge", "a"), "satellite adjectives count as adjectives"
    assert "move" not in synonyms("act", "v")
    assert "recruit" not in synonyms("enroll", "v") and "trust" not in synonyms("rely", "v"), "verbs that want an object"
    assert "minor" not in synonyms("kid", "n"), "a rare word for a common one"
    assert "theatre" not in synonyms("theater", "n"), "another spelling"
    assert "uprising" in synonyms("rebellion", "n") and "workout" in synonyms("exercise", "n")
    assert "exercising" not in synonyms("exercise", "n", 0.0), "a verb's -ing form"
    assert "bringing" not in synonyms("delivery", "n", 0.0), "a verb's -ing form"
    assert "authorities" not in synonyms("government", "n", 0.0), "a plural"
    assert synonyms("zorblax", "n") == ()
    assert set(synonyms("funny", "a")) <= set(synonyms("funny", "a", 0.1))


@pytest.mark.parametrize("lemma, tag, form", [
    ("hound", "NNS", "hounds"), ("purchase", "VBD", "purchased"), ("large", "JJR", "larger"),
    ("child", "NNS", "children"), ("begin", "VBN", "begun"), ("purchase", "VBN", "purchased"),
    ("happy", "JJS", "happiest"), ("run", "VBG", "running"), ("quickly", "RB", "quickly"),
    ("beautiful", "JJR", None), ("zorblax", "NNS", None), ("zorblax", "NN", "zorblax")])
def test_inflect(lemma, tag, form):
    assert inflect(lemma, tag) == form


@pytest.mark.parametrize("form, tag, expected", [
    ("bought", "VBD", "purchased"), ("bigger", "JJR", "larger"), ("films", "NNS", "movies"),
    ("began", "VBD", "started"), ("children", "NNS", "kids"), ("frequently", "RB", "often")])
def test_inflection_is_carried_over(form, tag, expected):
    assert expected in synonym_forms(form, tag)


def test_form_of_two_tags_takes_no_candidate_of_two_forms():
    assert "start" in synonyms("begin", "v") and "begin" in synonyms("start", "v")
    assert synonym_forms("begins", "VBZ") and "begins" in synonym_forms("starts", "VBZ")
    for tag in ("VBD", "VBN"):
        assert not {"began", "begun"} & set(synonym_forms("started", tag))


def test_names_and_unknown_words_have_no_forms():
    for word, tag in [("london", "NNP"), ("the", "DT"), ("zorblaxes", "NNS")]:
        assert synonym_forms(word, tag) == ()
