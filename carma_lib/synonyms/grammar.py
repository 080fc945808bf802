"""Which words grammar and fixed expressions hold in place, and which synonyms a place takes."""
from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Sequence

from carma_lib.synonyms.tagging import Word, entry_of
from carma_lib.synonyms.wordnet import (
    lemmas_of, multiword_lemmas, objectless, one_thread_at_a_time, part_of_speech_of, remembered, tagged_uses, wordnet)

PARTICLES = frozenset("up out off down away apart along around back over".split())
INTENSIFIERS = frozenset("super real awful dead mighty jolly dreadful precious bloody pretty plain way damn".split())
CLAUSE_OPENERS = frozenset("after before as than if when until till since because though while enough".split())
BARE_INFINITIVE = frozenset("help make see hear watch feel notice observe dare need".split())  # "saw him leave"
# A finite verb cannot follow these, so what the tagger calls one is a noun or adjective ("the start", "by means of").
DETERMINERS = frozenset("a an the every no another my your his her its our their whose".split())
SUBORDINATORS = CLAUSE_OPENERS | frozenset("that whether whilst although unless so lest like".split())
FINITE = ("VB", "VBP", "VBZ", "VBD")
# Fixed expressions that WordNet does not list.
EXPRESSIONS = frozenset("as_a_result rest_assured my_god oh_god i_mean you_mean big_screen small_screen silver_screen test_of_time "
                        "old_wives'_tale as_a_matter_of_fact make_a_living of_all_time all_the_same".split())
MASS = frozenset(f"noun.{kind}" for kind in "attribute feeling food phenomenon state substance".split())
# Verbs that are never said of an object, although WordNet's frames allow it ("speak French", but not "talk French").
NO_OBJECT = frozenset("reply respond talk chat chatter converse arrive depart belong consist rely depend wait look listen happen occur "
                      "appear disappear vanish emerge exist".split())


@one_thread_at_a_time
def fixed_words(words: Sequence[Word]) -> frozenset[int]:
    """Places of the words that other words hold in place.

    They stand in an expression of several words that WordNet knows (hot dog, end up), in a name (Turing test), or are
    a verb before a particle (dream up), a noun before a noun (love story), or one of `_held`.
    """
    known, longest = _expressions()
    places: set[int] = set()
    forms = [entry_of(word.form) for word in words]
    for place, word in enumerate(words):
        before, after = _beside(words, place)
        if (word.tag == "NN" and after.tag[:2] == "NN") or (before.tag[:3] == "NNP" and word.tag[:2] == "NN"):
            places.add(place)
        if (word.tag[:2] == "VB" and after.form.lower() in PARTICLES) or _held(before, word, after):
            places.add(place)
        if word.tag == "NN" and _bare(words, place) and not _mass(forms[place]):
            places.add(place)
        reach = max(longest.get(form, 1) for form in (forms[place], *_lemmas(word)))
        for last in range(place + 1, min(place + reach, len(words))):
            ways = [forms[place:last + 1]]
            ways += [[lemma, *forms[place + 1:last + 1]] for lemma in _lemmas(word)]
            ways += [[*forms[place:last], lemma] for lemma in _lemmas(words[last])]
            if any("_".join(way).replace("_'", "'") in known for way in ways):
                places.update(range(place, last + 1))
    return frozenset(places)


@remembered
def _expressions() -> tuple[frozenset[str], dict[str, int]]:
    """Expressions of several words, WordNet's and ours, and for each first word the most tokens of one."""
    known, longest = multiword_lemmas() | EXPRESSIONS, {}
    for name in known:
        first = name.split("_")[0].split("'")[0].lower()
        longest[first] = max(longest.get(first, 1), 1 + name.count("_") + name.count("'"))
    return known, longest


def _held(before: Word, word: Word, after: Word) -> bool:
    """Whether grammar holds a word: "super long", "every single one", "soon after", "a twist ending", "saw him go", "a start"."""
    form, next_form, kind = word.form.lower(), after.form.lower(), part_of_speech_of(word.tag)
    before_form = before.form.lower()
    if word.tag in FINITE and (before_form in DETERMINERS or before.tag[:2] == "JJ" or "be" in _lemmas(before)
                               or (before.tag == "IN" and before_form not in SUBORDINATORS)):
        return True
    if kind == "n" and before_form in ("to", "which", "who") and any(tagged_uses(lemma, "v") for lemma in _lemmas(word)):
        return True
    if kind == "a" and next_form == "of" or form == "provided" and (next_form == "that" or not before_form[:1].isalnum()):
        return True
    if next_form in ("in", "from") and form in ("result", "results", "resulted", "resulting"):
        return True
    if kind in ("a", "r") and form in INTENSIFIERS and part_of_speech_of(after.tag) in ("a", "r"):
        return True
    if kind == "a" and next_form in ("one", "ones"):
        return True
    if kind == "r" and next_form in CLAUSE_OPENERS:
        return True
    if word.tag == "VBG" and bool(tagged_uses(form, "n")) and "be" not in _lemmas(before):
        return True
    return kind == "v" and after.tag == "PRP" and not BARE_INFINITIVE.isdisjoint(_lemmas(word))


def _bare(words: Sequence[Word], place: int) -> bool:
    """Whether a singular noun follows other words without an article, possessive or number: "more from exercise"."""
    first = place - 1
    while first >= 0 and (words[first].tag[:2] in ("JJ", "NN", "RB") or words[first].tag in ("VBN", "VBG")):
        first -= 1
    return first >= 0 and words[first].form[0].isalnum() and words[first].tag not in ("DT", "PRP$", "POS", "CD", "PDT")


def _mass(form: str) -> bool:
    """Whether the noun's commonest sense names a state, attribute, feeling, substance, food or phenomenon."""
    senses = wordnet().synsets(form, "n")
    return bool(senses) and senses[0].lexname() in MASS


def _lemmas(word: Word) -> tuple[str, ...]:
    letter = part_of_speech_of(word.tag)
    return lemmas_of(entry_of(word.form), letter) if letter else ()


def _spellings(form: str, letter: str) -> frozenset[str]:
    return frozenset((entry_of(form), *lemmas_of(entry_of(form), letter)))


@lru_cache(maxsize=64)
def _times_held(words: tuple[Word, ...], letter: str) -> Counter[str]:
    """In how many words of a text each form and lemma is found, read as one part of speech."""
    return Counter(each for word in words for each in _spellings(word.form, letter))


def _beside(words: Sequence[Word], place: int) -> tuple[Word, Word]:
    """The words before and after a place, empty ones beyond the ends."""
    before, after = (words[i] if 0 <= i < len(words) else Word(0, 0, "", "") for i in (place - 1, place + 1))
    return before, after


def in_place(words: Sequence[Word], place: int, found: list[str]) -> list[str]:
    """Those of the synonyms found that the text does not hold already ("terminate, end"), and that can stand before what
    follows: an apostrophe (children's, kids'), an object, a preposition."""
    word, (before, after) = words[place], _beside(words, place)
    letter = part_of_speech_of(word.tag) or "n"
    held, own = _times_held(tuple(words), letter), _spellings(word.form, letter)
    found = [form for form in found if not any(held[each] > (each in own) for each in _spellings(form, letter))]
    if after.form[:1] in ("'", "\u2019"):
        found = [form for form in found if form.endswith("s") == entry_of(word.form).endswith("s")]
    if part_of_speech_of(word.tag) != "v":
        return found
    lemma = {form: lemmas_of(form, "v")[0] for form in found}
    if "be" in _lemmas(before) or after.tag[:2] in ("DT", "PR", "NN", "JJ", "CD"):
        return [form for form in found if lemma[form] not in NO_OBJECT]
    return [form for form in found if objectless(lemma[form]) > 0 or after.tag not in ("IN", "TO")]
