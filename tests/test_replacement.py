"""Synonym replacement: rates, seeds, places, inflection, articles, adversary, cache, quality."""
import copy
import functools
import math
import os
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from datasets import Dataset

from carma_lib.synonyms import replacement as perturbation
from carma_lib.synonyms.articles import indefinite_article
from carma_lib.synonyms.wordnet import (
    FUNCTION_WORDS, definition_pairs, is_coarse, lemmas_of, sense_counts, synonym_forms)
from carma_lib.synonyms.replacement import (
    Change, Replacement, replace_all, replace_synonyms, replaced_rows, shift_spans, worst_replacements)
from carma_lib.synonyms.quality import (
    first_lemma_of_any_sense, mark_changes, quality_table, replacement_quality)
from carma_lib.synonyms.grammar import fixed_words
from carma_lib.synonyms.tagging import is_content, tagged_words
from carma_lib.tasks import FEATURES
from carma_lib.tasks.controlled.lexicon import controlled_synonyms

SENTENCES = [
    "The film begins slowly, but the children often enjoy a huge and fascinating story.",
    "An entirely wonderful movie that deserves its place among the biggest films ever made.",
    "She bought a car and frequently allowed the kids to start it; perhaps that was a mistake.",
    "Usually the teacher speaks quickly, yet the lawyer seldom needs an opportunity to answer.",
    "A tiny animal with a large head, especially a young one, that seems to vanish in tall grass.",
    "It is an example of a tragedy, and exactly the kind of tale that viewers rarely remember.",
    "Nothing here.",
    "",
]
COLOURS = {"red": ["crimson"], "dogs": ["hounds", "pups"], "cat": ["animal"], "old": ["ancient"],
           "apple": ["fruit"], "sings": ["chants", "hums"], "quiet": ["silent"], "unhappy": ["sad"]}
RATES = (0.1, 0.25, 0.4, 1.0)


def content_count(text: str) -> int:
    return sum(is_content(word) for word in tagged_words(text))


# Rates and seeds

@pytest.mark.parametrize("rate", RATES)
def test_counts_and_changes(rate):
    for text in SENTENCES:
        done = replace_synonyms(text, rate=rate, seed=3)
        changed, changes = done
        assert done.requested == math.floor(rate * content_count(text) + 0.5)
        assert done.made == min(done.requested, replace_synonyms(text, rate=1, seed=3).made)
        assert done.made == sum(change.before.lower() not in ("a", "an") for change in changes)
        rebuilt, end = "", 0
        for start, stop, before, after in changes:
            assert start >= end and text[start:stop] == before != after
            rebuilt, end = rebuilt + text[end:start] + after, stop
        assert changed == rebuilt + text[end:]


def test_real_text_is_changed():
    done = [replace_synonyms(text, rate=1, seed=0) for text in SENTENCES]
    assert sum(replacement.made for replacement in done) >= 20


@pytest.mark.parametrize("source", [synonym_forms, COLOURS])
def test_nested(source):
    text = "The red dogs and the quiet cat ate an old apple. " + SENTENCES[0] + " " + SENTENCES[2]
    for seed in range(10):
        smaller: set = set()
        for rate in np.linspace(0, 1, 21):
            larger = set(replace_synonyms(text, rate=rate, seed=seed, source=source).changes)
            assert smaller <= larger
            smaller = larger


def test_an_item_depends_on_nothing_but_itself():
    ids = [f"item/{i}" for i in range(len(SENTENCES))]
    every = replace_all(SENTENCES, rate=0.4, seed=5, item_ids=ids)
    order = [4, 0, 6, 2]
    assert replace_all([SENTENCES[i] for i in order], rate=0.4, seed=5, item_ids=[ids[i] for i in order]) == [
        every[i] for i in order]
    assert every == [replace_synonyms(text, rate=0.4, seed=5, item_id=name)
                     for text, name in zip(SENTENCES, ids)]


def test_seed_and_item_decide():
    text = " ".join(SENTENCES)
    by_seed = {replace_synonyms(text, rate=0.25, seed=seed).text for seed in range(8)}
    by_item = {replace_synonyms(text, rate=0.25, seed=0, item_id=str(item)).text for item in range(8)}
    assert len(by_seed) == len(by_item) == 8
    assert replace_synonyms(text, rate=0.25, seed=np.int64(3)) == replace_synonyms(text, rate=0.25, seed=3)


def test_every_candidate_and_place_is_drawn():
    seen = {replace_synonyms("The dogs slept.", rate=1, seed=seed, source=COLOURS).text for seed in range(40)}
    assert seen == {"The hounds slept.", "The pups slept."}
    done = [replace_synonyms("The red, old, quiet thing.", rate=0.34, seed=seed, source=COLOURS)
            for seed in range(60)]
    assert len({replacement.changes[0].start for replacement in done}) == 3


def test_hash_seed_changes_nothing():
    code = ("from carma_lib.synonyms.replacement import replace_all\n"
            f"for done in replace_all({SENTENCES!r}, rate=0.4, seed=1): print(done)")
    outputs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": "0"}).stdout,
               "".join(f"{done}\n" for done in replace_all(SENTENCES, rate=0.4, seed=1))]
    assert outputs[0] == outputs[1] and "Change(" in outputs[0] and os.environ.get("PYTHONHASHSEED") != "0"


# What may change

def test_names_numbers_function_words_and_expressions_stay():
    text = ("Big Story films bought 25 movies in Paris. In the end a hot dog turned up at the movie theater, "
            "and THE FILM wasn't well-made.")
    for seed in range(5):
        after = replace_synonyms(text, rate=1, seed=seed).text
        for kept in ("Big Story", "25", "Paris", "hot dog", "turned up", "movie theater", "THE FILM",
                     "wasn't", "well-made"):
            assert kept in after
        assert "bought" not in after, "and yet something changed"


def test_a_capital_at_the_start_is_a_name_before_another():
    source = {**COLOURS, "dogs": ["hounds"], "rose": ["flower"]}
    for text, after in [("Old Dogs sing.", "Old Dogs sing."), ("Old dogs.", "Ancient hounds."),
                        ("Go! Old dogs.", "Go! Ancient hounds."), ("Go, Old dogs.", "Go, Old hounds."),
                        ("OLD dogs.", "OLD hounds."), ("Rose saw red dogs.", "Rose saw crimson hounds.")]:
        assert replace_synonyms(text, rate=1, seed=0, source=source).text == after


def test_function_words_and_names_are_no_content():
    words = tagged_words("Have you ever been to Rome, 3 times? Dogs bark.")
    assert [word.form for word in words if is_content(word)] == ["times", "Dogs", "bark"]
    assert {"be", "not", "very"} <= FUNCTION_WORDS


def test_fixed_words():
    words = tagged_words("He dreamed up hot dogs and a dog story, strolled off, and saw films.")
    fixed = [words[i].form for i in sorted(fixed_words(words))]
    assert fixed == ["dreamed", "up", "hot", "dogs", "dog", "strolled"]


def test_capitals_and_punctuation_stay():
    text = "Dogs (red dogs), \"old\" dogs... Dogs' apple; red!"
    after = replace_synonyms(text, rate=1, seed=2, source={**COLOURS, "dogs": ["hounds"]}).text
    assert after == "Hounds (crimson hounds), \"ancient\" hounds... Hounds' fruit; crimson!"


@pytest.mark.parametrize("before, source, after", [
    ("He bought two dogs.", {"bought": ["purchased"], "dogs": ["hounds"]}, "He purchased two hounds."),
    ("The films were bigger.", synonym_forms, "The movies were larger."),
])
def test_inflection(before, source, after):
    assert replace_synonyms(before, rate=1, seed=0, source=source).text == after


@pytest.mark.parametrize("word, article", [
    ("old", "an"), ("dog", "a"), ("hour", "an"), ("honest", "an"), ("heir", "an"), ("hero", "a"),
    ("unit", "a"),
    ("unique", "a"), ("unimportant", "an"), ("uninspired", "an"), ("unidentified", "an"), ("unanimous", "a"),
    ("usual", "a"), ("user", "a"), ("uranium", "a"), ("urban", "an"), ("ugly", "an"), ("utter", "an"),
    ("European", "a"), ("one", "a"), ("oneself", "a"), ("onerous", "an"), ("ewe", "a"), ("year", "a"),
    ("oneness", "a"), ("onetime", "a"), ("unilluminated", "an"), ("unilateral", "a"), ("unironic", "an"), ("unity", "a"),
    ("unissued", "an"), ("unimodal", "a"), ("x-ray", "an"), ("X", "an"), ("u-turn", "a"), ("T-shirt", "a"),
    ("unary", "a"), ("unaware", "an"), ("Uighur", "a"), ("ROM", "a"), ("MSc", "an"), ("NYPD", "an"), ("BSc", "a"),
    ("f-word", "an"), ("MRI", "an"), ("MRIs", "an"), ("FBI", "an"), ("UFO", "a"), ("NASA", "a"), ("HTML", "an"),
    ("CEO", "a"), ("mp3", "an"), ("tv", "a"), ("8-bit", "an"), ("11th", "an"), ("18-hole", "an"), ("110-year", "a"),
    ("80s", "an"), ("1800", "an"), ("yttrium", "an"), ("yacht", "a"), ("houri", "a"), ("ukulele", "a")])
def test_article_by_sound(word, article):
    other = {"a": "an", "an": "a"}[article]
    done = replace_synonyms(f"{other} thingy", rate=1, seed=0, source={"thingy": [word]})
    assert done.text == f"{article} {word}"
    assert done.changes[0] == Change(0, len(other), other, article)
    assert (done.made, done.requested) == (1, 1)
    right = replace_synonyms(f"{article} thingy", rate=1, seed=0, source={"thingy": [word]})
    assert right.text == f"{article} {word}" and len(right.changes) == 1


def test_article_keeps_its_capital_and_needs_its_word():
    assert replace_synonyms("A cat.", rate=1, seed=0, source=COLOURS).text == "An animal."
    assert replace_synonyms("An unhappy man.", rate=1, seed=0, source=COLOURS).text == "A sad man."
    assert replace_synonyms("Plan a, cat.", rate=1, seed=0, source=COLOURS).text == "Plan a, animal."


@pytest.mark.parametrize("before, source, after", [
    ('It is a "great" film.', {"great": ["excellent"]}, 'It is an "excellent" film.'),
    ("an (ugly) film", {"ugly": ["hideous"]}, "a (hideous) film"),
    ("an `` odd '' film", {"odd": ["strange"]}, "a `` strange '' film"),
    ("A “great” film", {"great": ["excellent"]}, "An “excellent” film"),
    ("a *great* film", {"great": ["excellent"]}, "an *excellent* film"),
    ("Plan A goals matter.", {"goals": ["objectives"]}, "Plan A objectives matter."),
    ("vitamin A lack", {"lack": ["insufficiency"]}, "vitamin A insufficiency"),
    ("vitamin a lack", {"lack": ["insufficiency"]}, "vitamin a insufficiency"),
    ("Grade A milk", {"milk": ["ale"]}, "Grade A ale"),
    ('He said: "A cat!"', {"cat": ["animal"]}, 'He said: "An animal!"'),
    ("(A cat.)", {"cat": ["animal"]}, "(An animal.)"), ("a, cat", {"cat": ["animal"]}, "a, animal"),
    ("a) cat", {"cat": ["animal"]}, "a) animal"), ("a-cat", {"cat": ["animal"]}, "a-cat"),
])
def test_article_before_marks_and_letters(before, source, after):
    assert replace_synonyms(before, rate=1, seed=0, source=source).text == after


def test_span_is_respected():
    text = "The old dogs see a cat and the old dogs sleep."
    start, end = text.index("see"), text.index(" and")
    for seed in range(5):
        done = replace_synonyms(text, rate=1, seed=seed, span=(start, end), source=COLOURS)
        assert done.text == "The old dogs see an animal and the old dogs sleep."
    cut = replace_synonyms(text, rate=1, seed=0, span=(5, 12), source=COLOURS)
    assert cut.requested == 1, "old crosses the edge"
    assert [change.before for change in cut.changes] == ["dogs"]
    word = (text.index("cat"), text.index("cat") + 3)
    outside = replace_synonyms(text, rate=1, seed=0, span=word, source=COLOURS)
    assert outside.changes == (), "its article is outside, so nothing that wants another one comes in"
    fits = replace_synonyms(text, rate=1, seed=0, span=word, source={"cat": ["animal", "kitten"]})
    assert fits.text == text.replace("cat", "kitten")


@pytest.mark.parametrize("forbidden, allowed", [
    ("hound", {"pups"}), (["Hounds"], {"pups"}), (["hound", "pup"], {"dogs"}), ("sea-hound", {"pups"}),
    ("cat", {"pups", "hounds"})])
def test_target_and_its_forms_are_never_introduced(forbidden, allowed):
    after = {replace_synonyms("The dogs.", rate=1, seed=seed, forbidden=forbidden, source=COLOURS).text
             for seed in range(20)}
    assert after == {f"The {word}." for word in allowed}


def test_forbidden_on_real_text():
    for text in SENTENCES:
        for change in replace_synonyms(text, rate=1, seed=0).changes:
            if change.before.lower() in ("a", "an"):
                continue
            form = change.after.lower()
            for lemma in sorted({form, *(lemma for letter in "nvar" for lemma in lemmas_of(form, letter))}):
                redone = replace_synonyms(text, rate=1, seed=0, forbidden=lemma)
                assert change not in redone.changes


# Sources

def test_source_may_be_a_function():
    asked = []

    def shout(form, tag):
        asked.append((form, tag))
        return [form + "ish"]

    assert replace_synonyms("Dogs bark.", rate=1, seed=0, source=shout).text == "Dogsish barkish."
    assert asked == [("dogs", "NNS"), ("bark", "NN")] or asked == [("dogs", "NNS"), ("bark", "VBP")]


def test_dict_source_counts_its_own_words():
    done = replace_synonyms("Very very very.", rate=1, seed=0, source={"very": ["truly"]})
    assert (done.text, done.made, done.requested) == ("Truly truly truly.", 3, 3)


def test_looser_gate_changes_more():
    loose = functools.partial(synonym_forms, agreement=0.1)
    assert sum(done.made for done in replace_all(SENTENCES, rate=1, seed=0, source=loose)) > sum(
        done.made for done in replace_all(SENTENCES, rate=1, seed=0))


def test_controlled_lexicon_is_a_source():
    source = controlled_synonyms()
    words = sorted(source)[:60]
    for start in range(0, len(words), 6):
        text = "It is a " + " and a ".join(words[start:start + 6])
        done = replace_synonyms(text, rate=1, seed=start, source=source)
        new = [change for change in done.changes if change.before not in ("a", "an")]
        assert [change.before for change in new] == words[start:start + 6]
        assert all(change.after in source[change.before] for change in new)
    code = ("import carma_lib.synonyms.wordnet as lexicon; lexicon.wordnet = None\n"
            "from carma_lib.synonyms.replacement import replace_synonyms as replace\n"
            "source = {'dogs': ['hounds']}\n"
            "print(replace('Old dogs zorblaxed.', rate=1, seed=0, source=source, forbidden='pup').text)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Old hounds zorblaxed.", "a dict needs no WordNet: " + done.stderr


@pytest.mark.parametrize("source", [
    {"big": "large"}, {"big": None}, {"big": [""]}, {"big": ["Big"]}, {"big": [None]}, {"big": ["big"]},
    {"big": {"large", "huge"}}, {"big": [" large"]}, {"a": ["one"], "big": ["large"]}, {"An": ["one"]},
    {"hot dog": ["sausage"]}, {"Big": ["Large"]}, {"": ["x"]}, {3: ["three"]}, "thesaurus", ["big", "large"], None])
def test_a_dictionary_of_ones_own_is_checked(source):
    for replace in (replace_synonyms, lambda text, **options: replace_all([text], **options)):
        with pytest.raises((ValueError, TypeError), match="source|synonyms of") as refused:
            replace("A big house", rate=1, seed=0, source=source)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(TypeError, match="list of words"):
        replace_synonyms("Dogs bark.", rate=1, seed=0, source=lambda form, tag: form + "s")


# What never comes out of WordNet

def possible(text, seeds=6):
    return {replace_synonyms(text, rate=1, seed=seed).text for seed in range(seeds)}


@pytest.mark.parametrize("text", [
    "He fell on his buttocks.", "The dog urinated there.", "The prostitute wept.", "It was rubbish and nonsense.",
    "He saw an immaculate house.", "They copulated.", "A Chinese man sat there.", "He is a fool.", "The homosexual slept.",
    "My breasts hurt.", "The lesbian left.", "He cheated them.", "It is excrement.", "A stupid person laughed."])
def test_no_slur_and_no_coarse_word(text):
    for changed in possible(text):
        for word in tagged_words(changed):
            assert word.form.lower() in text.lower() or not is_coarse(word.form), changed


@pytest.mark.parametrize("word", [
    "spic", "spick", "ass", "asses", "whore", "whores", "piss", "pissed", "pissing", "arse", "fanny", "nigger", "dago",
    "faggot", "bastard", "cunt", "bitch", "retard", "crap", "shit", "kike", "slut", "tits", "screw", "gook", "coon", "goddamned", "darned",
    "handicapped", "prostitute", "neanderthal"])
def test_coarse_words_are_known(word):
    assert is_coarse(word) and is_coarse(word.capitalize())


@pytest.mark.parametrize("word", ["spotless", "movie", "film", "children", "kids", "large", "story", "assist", "purchase",
                                  "gifted", "house", "grass", "shot", "woman", "attack", "wonderful", "often"])
def test_plain_words_are_not_coarse(word):
    assert not is_coarse(word)


def test_no_coarse_word_in_many_replacements():
    texts = definition_pairs()["definition"].drop_duplicates().sample(400, random_state=1).tolist()
    done = replace_all(texts, rate=1, seed=0, source=functools.partial(synonym_forms, agreement=0.0))
    changes = [change for each in done for change in each.changes]
    assert len(changes) > 400
    assert not [change for change in changes if is_coarse(change.after)]


@pytest.mark.parametrize("text", [
    "I love to see somebody beat him.", "She was letting him win.", "He lets them sleep.", "She is getting there.",
    "Nobody is there.", "None of the others.", "Everybody and somebody.",
    "He passed the Turing test.", "She won the Nobel prize.", "A Ford factory.", "The Hubble telescope.",
    "The twist ending is great.", "Beginning and end are good.", "His acting.", "The singing was bad.",
    "Every single one left.", "Soon after he left, she wept.", "Long before that.",
    "Sick people benefit from exercise.", "They asked for film.", "She saw him leave.", "He made me weep."])
def test_grammar_holds_words(text):
    held = {"somebody", "letting", "lets", "getting", "nobody", "none", "others", "everybody", "test", "prize", "factory",
            "telescope", "ending", "beginning", "acting", "singing", "single", "soon", "long", "exercise", "film", "saw",
            "made"}
    for changed in possible(text):
        for word in tagged_words(text):
            assert word.form.lower() not in held or word.form in changed


@pytest.mark.parametrize("text", ["If I enroll in the plan, tell me.", "She enrolled in the course."])
def test_a_verb_without_an_object_takes_no_verb_that_wants_one(text):
    verb = tagged_words(text)[next(i for i, word in enumerate(tagged_words(text)) if word.tag[:2] == "VB")].form
    assert all(f" {verb} " in changed for changed in possible(text))


def test_intensifier_is_kept():
    assert all("a super long" in text for text in possible("I waited a super long time."))
    assert all("pretty" in text for text in possible("It is pretty good."))


# Letters and scripts

@pytest.mark.parametrize("word", ["हिन्दी", "தமிழ்", "كِتَابٌ", "שָׁלוֹם", "น้ำ", "می‌خواهم", "co\u00adoperate",
                                  "cafe\u0301", "naïve", "ক্ষমা", "q\u0307\u0323"])
def test_a_word_stays_whole(word):
    assert [each.form for each in tagged_words(f"x {word} y")] == ["x", word, "y"]
    done = replace_synonyms(f"The {word} sat.", rate=1, seed=0, source={word: ["thing"]})
    assert done.text == "The thing sat."


def test_letters_with_marks_are_other_letters():
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "a nice café")
        assert replace_synonyms(text, rate=1, seed=0, source={"cafe": ["bar"]}).text == text
        assert replace_synonyms(text, rate=1, seed=0, source={"café": ["bar"]}).text == "a nice bar"
    assert replace_synonyms("to co\u00adoperate", rate=1, seed=0, source={"cooperate": ["help"]}).text == "to help"


# Threads

def test_threads_give_what_one_thread_gives():
    code = ("import sys; from concurrent.futures import ThreadPoolExecutor\n"
            "from carma_lib import replace_synonyms\n"
            "texts = sys.argv[1:]\n"
            "with ThreadPoolExecutor(4) as pool:\n"
            "    print(*pool.map(lambda text: replace_synonyms(text, rate=1, seed=0).text, texts), sep='\\n')")
    nouns = sorted({key.split("%")[0] for key, count in sense_counts().items() if "%1:" in key and count > 9})
    nouns = [noun for noun in nouns if noun.isalpha()][::20][:90]
    texts = [f"The {a} and the {b} saw the {c}." for a, b, c in zip(*[iter(nouns)] * 3)]
    found = subprocess.run([sys.executable, "-c", code, *texts], capture_output=True, text=True, check=True).stdout
    assert found.split("\n")[:-1] == [replace_synonyms(text, rate=1, seed=0).text for text in texts] != texts


# Adversary

def vowels(texts):
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in texts]


def test_adversary_equals_brute_force():
    seeds = [4, 0, 7, 1]
    worst = worst_replacements(SENTENCES, rate=0.4, seeds=seeds, score=vowels)
    for text, found in zip(SENTENCES, worst):
        tries = [replace_synonyms(text, rate=0.4, seed=seed) for seed in seeds]
        best = max(range(len(seeds)), key=lambda k: (vowels([tries[k].text])[0], -k))
        assert found == tries[best]
        assert [found] == worst_replacements([text], rate=0.4, seeds=seeds, score=vowels)
    assert len({vowels([replace_synonyms(SENTENCES[2], rate=0.4, seed=seed).text])[0] for seed in seeds}) > 1
    equal = worst_replacements(SENTENCES, rate=0.4, seeds=seeds, score=lambda texts: [0.0] * len(texts))
    assert equal == replace_all(SENTENCES, rate=0.4, seed=4), "of equal losses the first seed wins"


@pytest.mark.parametrize("score", [lambda texts: [1.0], lambda texts: [float("nan")] * len(texts)])
def test_adversary_refuses_bad_losses(score):
    with pytest.raises(ValueError, match="finite losses"):
        worst_replacements(SENTENCES, rate=0.4, seeds=range(2), score=score)
    with pytest.raises(ValueError, match="seeds is empty"):
        worst_replacements(["A dog."], rate=0.4, seeds=[], score=vowels)


# Spans

def test_shift_spans():
    text = "An old dog sings a quiet song; the red cat sleeps."
    for seed in range(6):
        done = replace_synonyms(text, rate=0.6, seed=seed, source=COLOURS)
        edges = sorted({edge for word in tagged_words(text) for edge in (word.start, word.end)})
        spans = [(start, end) for start in edges for end in edges if start <= end]
        for (start, end), (new_start, new_end) in zip(spans, shift_spans(spans, done.changes), strict=True):
            inside = [change for change in done.changes if start <= change.start and change.end <= end]
            expected, position = "", start
            for change in inside:
                expected, position = expected + text[position:change.start] + change.after, change.end
            assert done.text[new_start:new_end] == expected + text[position:end]
    assert shift_spans([(0, 2), (4, 5), (5, 7)], [Change(3, 6, "abc", "z")]) == [(0, 2), (3, 4), (3, 5)]


# Cache

def test_cache_equals_no_cache_and_is_used(tmp_path, monkeypatch):
    plain = replace_all(SENTENCES, rate=0.4, seed=1)
    assert replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path / "new") == plain
    monkeypatch.setattr(perturbation, "replace_synonyms", None)
    cached = replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path / "new")
    assert cached == plain and [done.requested for done in cached] == [done.requested for done in plain]
    assert [type(done) for done in cached] == [Replacement] * len(plain)


def test_cache_tells_calls_apart(tmp_path):
    calls = [{}, {"rate": 0.3}, {"seed": 2}, {"source": COLOURS}, {"source": {"red": ["crimson"]}},
             {"forbidden": ["film"] * len(SENTENCES)},
             {"item_ids": list(range(len(SENTENCES)))}, {"item_ids": ["None"] * len(SENTENCES)},
             {"source": functools.partial(synonym_forms, agreement=0.2)}]
    for number, call in enumerate(calls, start=1):
        arguments = {"rate": 0.4, "seed": 1, **call}
        assert replace_all(SENTENCES, cache_dir=tmp_path, **arguments) == replace_all(SENTENCES, **arguments)
        assert len(list(tmp_path.iterdir())) == number, "one whole file a call and nothing left over"
    with pytest.raises(ValueError, match="cache"):
        replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path, source=lambda form, tag: [])


def test_truncated_cache_is_never_read_as_whole(tmp_path):
    whole = replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path)
    file, = tmp_path.iterdir()
    content = file.read_bytes()
    for cut in (0, 1, 5, len(content) // 10, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:cut])
        assert replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path) == whole
        assert file.read_bytes() == content, "made again"
    changed = [b"\xff" + content, content.replace(b"movie", b"mouse"), content + content, b"{}", b"PAR1" * 9]
    for place in range(0, len(content), 97):
        changed.append(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
    for damaged in changed:
        file.write_bytes(damaged)
        assert replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path) == whole


def test_cache_knows_the_rules(tmp_path, monkeypatch):
    before = replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path)
    monkeypatch.setattr(perturbation, "RULES", perturbation.RULES + 1)
    monkeypatch.setattr(perturbation, "_candidates", lambda word, source, refused: ["xyz"])
    assert replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path) != before
    monkeypatch.undo()
    assert replace_all(SENTENCES, rate=0.4, seed=1, cache_dir=tmp_path) == before


# Bad input and edges

@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan"), 25])
def test_rate_outside(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        replace_synonyms("A dog.", rate=rate, seed=0)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        replace_all([], rate=rate, seed=0)


@pytest.mark.parametrize("span", [(-1, 3), (0, 99), (4, 2)])
def test_span_outside(span):
    with pytest.raises(ValueError, match="outside the text of 6 characters"):
        replace_synonyms("A dog.", rate=1, seed=0, span=span)


@pytest.mark.parametrize("text", ["", "   ", "...", "?", "\n", "the", "zorblax", "Zorblax!", "42", "a", "an",
                                  "not of the", "a/b \\ c_d", "😀 ’ “quoted”", "x\u2028y\u00a0z"])
def test_text_without_candidates_comes_back(text):
    done = replace_synonyms(text, rate=1, seed=0)
    assert (done.text, done.changes, done.made) == (text, (), 0)


def test_text_of_one_token():
    assert replace_synonyms("film", rate=1, seed=0) == ("movie", (Change(0, 4, "film", "movie"),))
    assert replace_synonyms("film", rate=0, seed=0).text == "film"


def test_lists():
    assert replace_all([], rate=0.5, seed=0) == []
    with pytest.raises(ValueError, match="one length, got 2, 1"):
        replace_all(["a", "b"], item_ids=["x"], rate=0.5, seed=0)
    with pytest.raises(TypeError, match="replace_synonyms"):
        replace_all("a text", rate=0.5, seed=0)


# Quality

def test_quality_counts():
    texts = ["The old dogs sleep.", "An apple."]
    source = {"dogs": ["hound"], "apple": ["quickly"], "old": ["ancient"]}
    done = replace_all(texts, rate=1, seed=0, source=source)
    quality = replacement_quality(texts, done)
    assert (quality["content_words"], quality["requested"], quality["made"]) == (4, 4, 3)
    assert quality["coverage"] == quality["reached"] == 3 / 4 and quality["texts_reached"] == 1 / 2
    for rate in ("wrong_part_of_speech", "broken_inflection", "changed_article"):
        assert quality[rate] == 1 / 3
    assert mark_changes(texts[1], done[1]) == "[An → A] [apple → quickly]."
    assert math.isnan(replacement_quality([""], replace_all([""], rate=1, seed=0))["coverage"])


def test_gate_beats_baseline_on_mistakes():
    table = quality_table(SENTENCES, rates=(0.25, 1.0)).set_index(["source", "rate"])
    ours, baseline = table.loc[("wordnet", 1.0)], table.loc[("first lemma of any sense", 1.0)]
    assert ours["wrong_part_of_speech"] + ours["broken_inflection"] < 0.1
    assert baseline["wrong_part_of_speech"] + baseline["broken_inflection"] > 0.3
    assert 0 < ours["coverage"] < baseline["coverage"] and ours["no_candidate"] == 1 - ours["coverage"]
    assert first_lemma_of_any_sense("dogs", "NNS") == ("dog",)


# --- what is not language, names, compounds, and articles before them ------------------------------------------

@pytest.mark.parametrize(("text", "changed"), [
    ("Ms. Swift began.", "Ms. Swift started."), ("Lt. Savage began.", "Lt. Savage started."), ("Dr. Large began", "Dr. Large started"),
    ("the St. Large school", "the St. Large school"), ("J. Large began. Begin!", "J. Large started. Start!"),
    ("Mr . Large began .", "Mr . Large started ."), ("it is as good as the I. Begin now.", "it is as good as the I. Start now."),
    ("see https://buy.com/cars.", "see https://buy.com/cars."), ("www.buy.com/cars", "www.buy.com/cars"), ("buy.com", "buy.com"),
    ("user@large.com", "user@large.com"), ("#movies @movie", "#movies @movie"), ("/usr/share/movie/big", "/usr/share/movie/big"),
    ("C:\\movie\\big", "C:\\movie\\big"), ("\\begin{movie}", "\\begin{movie}"), ("<movie>big</movie>", "<movie>large</movie>"),
    ("3 < 4 big > 1", "3 < 4 large > 1"), ("big and/or big", "large and/or large"),
    ("a big\u2011budget band", "a big\u2011budget band"), ("an extra\u2010large", "an extra\u2010large"),
    ("a rock'n'roll band", "a rock'n'roll band"), ("rock 'n' roll", "rock 'n' roll"), ("rock ’n’ roll", "rock ’n’ roll"),
    ("rock & roll", "rock & roll"), ("he didn't begin", "he didn't start")])
def test_names_addresses_and_compounds_stay(text, changed):
    source = {"big": ["large"], "large": ["big"], "begin": ["start"], "began": ["started"], "buy": ["purchase"], "cars": ["automobiles"],
              "movie": ["film"], "movies": ["films"]}
    assert replace_synonyms(text, rate=1, seed=0, source=source).text == changed


@pytest.mark.parametrize("text", ["rock'n'roll", "rock 'n' roll", "rock ’n’ roll", "rock & roll", "big\u2011budget", "extra\u2010large",
                                  "#movies", "@movie", "user@large.com", "www.buy.com/cars", "\\begin{movie}", "Ms. Swift", "Lt. Savage",
                                  "J. Savage", "Gen. Savage", "the St. Large"])
def test_wordnet_leaves_whole_what_is_one(text):
    assert all(replace_synonyms(text, rate=1, seed=seed).text == text for seed in range(4))


@pytest.mark.parametrize(("word", "article"), [
    ("élite", "an"), ("e\u0301lite", "an"), ("école", "an"), ("Ölige", "an"), ("œuvre", "an"), ("æsthetic", "an"), ("ñandú", "a"), ("$8", "an"),
    ("£80", "an"), ("$5", "a"), ("h2o", "an"), ("b2b", "a"), ("ufo", "a"), ("ufos", "a"), ("UFO", "a"), ("únique", "a")])
def test_articles_hear_through_accents_money_and_digits(word, article):
    assert indefinite_article(word) == article
    other = "a big house" if article == "an" else "an old house"
    source = {other.split()[1]: [word]}
    assert replace_synonyms(other, rate=1, seed=0, source=source).text == f"{article} {word} house"


@pytest.mark.parametrize("opening", ["›", "”", "’", "「", "~", "\u200b", "\u200e", "<b>", "(“"])
def test_articles_pass_over_marks_of_every_script(opening):
    assert replace_synonyms(f"a {opening}great film", rate=1, seed=0, source={"great": ["excellent"]}).text == f"an {opening}excellent film"


@pytest.mark.parametrize(("arguments", "said"), [
    ({"text": None}, "the text is None, not text"), ({"text": 3.0}, "the text is 3.0"), ({"rate": "0.5"}, "rate must be a number"),
    ({"rate": None}, "rate must be a number"), ({"rate": True}, "rate must be a number"),
    ({"seed": None}, "seed must be a whole number"),
    ({"seed": 1.5}, "seed must be a whole number"), ({"span": (0,)}, r"span must be two places"), ({"span": 3}, r"span must be two places"),
    ({"source": lambda form, tag: [""]}, "the source gave ''"), ({"source": lambda form, tag: None}, "the source gave None"),
    ({"source": lambda form, tag: [3]}, "the source gave 3"), ({"source": lambda form, tag: "large"}, "the source gave 'large'")])
def test_odd_arguments_are_told_in_one_line(arguments, said):
    with pytest.raises(TypeError, match=said):
        replace_synonyms(**{"text": "a big house", "rate": 1, "seed": 0, **arguments})


def test_a_bad_text_among_many_is_named():
    with pytest.raises(TypeError, match="text 1 is None, not text"):
        replace_all(["a big house", None], rate=1, seed=0)
    assert replace_synonyms("a big house", rate=1, seed=0, forbidden=None).text == replace_synonyms("a big house", rate=1, seed=0).text
    assert [each.text for each in replace_all((text for text in ["a big house"]), rate=0, seed=0)] == ["a big house"]


@pytest.mark.parametrize("source", [
    {"naïve": ["simple"], "nai\u0308ve": ["artless"]}, {"big": ["large"], "bi\u00adg": ["huge"]}, {"big": ["\u200b"]}, {"big": ["\0"]},
    {"big": ["large\nhuge"]}, {"big": ["\ud800"]}, {"big": ["\u0301"]}])
def test_dictionaries_that_lose_or_hide_a_word_are_refused(source):
    with pytest.raises(ValueError, match="^synonyms of "):
        replace_synonyms("a big man", rate=1, seed=0, source=source)


def test_capitals_of_letters_that_are_two():
    assert [replace_synonyms("Big house", rate=1, seed=0, source={"big": [word]}).text for word in ("ﬁne", "ßtraße", "large")] == [
        "Fine house", "Sstraße house", "Large house"]


@pytest.mark.parametrize("text", [
    "held by means of a rope", "at the start", "The remake was good .", "an elaborate plan", "He is mean.", "its needs were met", "The boasts were empty",
    "a double of it", "an attribute of sound", "an act that results in a loss", "said to result in loss", "a theory concerning mental functioning",
    ", provided there's lots of it", "He answered the question.", "She speaks French.", "French is spoken here.", "He reached for it.", "as a result",
    "rest assured", "I mean, it was good", "`` My god , it was good", "stand the test of time", "the big screen", "a writer's block", "a stone's throw",
    "for all intents and purposes", "come out of the closet", "an old wives' tale"])
def test_grammar_and_fixed_expressions_hold_words(text):
    assert replace_synonyms(text, rate=1, seed=0).text == text


@pytest.mark.parametrize(("text", "changed"), [
    ("the children's film", "the children's movie"), ("the kids' film", "the kids' movie"), ("the kids left", "the children left"),
    ("the movie's end", "the film's end"), ("the start of the film", "the start of the movie"), ("He answered.", "He replied."), ("They speak.", "They talk.")])
def test_a_possessed_word_keeps_its_mark_and_others_are_replaced(text, changed):
    assert replace_synonyms(text, rate=1, seed=0).text == changed


@pytest.mark.parametrize("text, allowed", [
    ("they terminate, end, or stop it", "halt"), ("kids and children laughed", "halt"), ("The Ends meet where the roads terminate", "halt"),
    ("they terminate it", "end")])
def test_a_word_of_the_text_is_not_introduced_again(text, allowed):
    source = {"terminate": ["end", "halt"], "terminates": ["ends", "halts"], "children": ["kids", "halt"], "kids": ["children", "halt"]}
    found = {change.after for seed in range(8) for change in replace_synonyms(
        text, rate=1, seed=seed, source=lambda form, tag: source.get(form, [])).changes}
    assert found == {"halt", allowed}



@pytest.mark.parametrize("text", ["film://movie", "file:///film/movie", "film.co.uk", "movie.tv", "C:/film/movie", "./start now", "../film", "`buy(car)`",
                                  "[text](film.png)", "$x_{film}$", ":movie:", "t.co/film"])
def test_addresses_and_code_stay(text):
    assert replace_synonyms(text, rate=1, seed=0).text == text
    assert replace_synonyms(f"the film, {text}", rate=1, seed=0).text == f"the movie, {text}"


@pytest.mark.parametrize(("forbidden", "source"), [
    ("mo\u00advie", {"film": ["movie"]}), ("nai\u0308ve", {"big": ["na\u00efve"]}), ("STRASSE", {"big": ["straße"]}), ("large", {"big": ["lar\u00adge"]})])
def test_a_forbidden_word_in_another_spelling_is_forbidden(forbidden, source):
    text = f"the {next(iter(source))} house"
    assert replace_synonyms(text, rate=1, seed=0, forbidden=forbidden, source=source).text == text
    assert replace_synonyms(text, rate=1, seed=0, source=source).text != text


def test_a_replacement_is_copied_whole():
    found = replace_synonyms("A big house stands near an old river.", rate=0.4, seed=0, source=controlled_synonyms())
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other == found and (other.requested, other.made) == (found.requested, found.made) and other.requested > 0


def test_phrases_of_rows_move_with_their_words():
    source = {"big": ["enormous"], "river": ["stream"]}
    text, phrases = "a big house near the river", [[0, 11], [17, 26]]
    rows = Dataset.from_list([{"item_id": "1", "text": text, "target": "x", "phrases": phrases, "group": ""}], features=FEATURES)
    changed, made = replaced_rows(rows, source=source, rate=1.0, seed=0)
    row = changed[0]
    assert made == [2] and [row["text"][start:end] for start, end in row["phrases"]] == ["an enormous house", "the stream"]
