"""The words of a text with their parts of speech in context; which of them are content, which are fixed."""
from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, Sequence

from carma_lib.synonyms.wordnet import FUNCTION_WORDS, lemmas_of, multiword_lemmas, part_of_speech_of

# "n't" and "'s" are words of their own, hyphenated compounds are one word.
TOKEN = re.compile(r"n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\w+?(?=n['’]t\b)|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
SENTENCE_END = frozenset(".!?")
PARTICLES = frozenset("up out off down away apart along around back over".split())


class Word(NamedTuple):
    """A word of a text: its characters [start, end), its form as written and its Penn tag in context."""
    start: int
    end: int
    form: str
    tag: str


def is_content(word: Word) -> bool:
    """Whether a word counts for the rate: by its tag, and neither function word, nor name, nor number."""
    return (part_of_speech_of(word.tag) is not None and word.form.lower() not in FUNCTION_WORDS
            and word.form.replace("-", "").isalpha())


@lru_cache(maxsize=8192)
def tagged_words(text: str) -> tuple[Word, ...]:
    """The words and punctuation marks of a text with their Penn tags in context (TextBlob's PatternTagger).

    A capitalised word is a name (NNP), unless it opens a sentence and no capital follows it. One that does is
    tagged in lower case; a name if the tagger knows it as one, and else as a noun or verb (Rose, not Old).
    """
    from textblob.en import lexicon

    places = [match.span() for match in TOKEN.finditer(text)]
    forms = [text[start:end] for start, end in places]
    opens = _openers(forms)
    tagged = _tags([form.lower() if first else form for form, first in zip(forms, opens)])
    words = []
    for (start, end), form, first, tag in zip(places, forms, opens, tagged, strict=True):
        known_name = tag[:2] in ("NN", "VB") and lexicon.get(form, "").startswith("NNP")
        if form[0].isupper() and (not first or known_name) and len(form) > 1:
            tag = "NNP"
        words.append(Word(start, end, form, tag))
    return tuple(words)


def _openers(forms: Sequence[str]) -> list[bool]:
    """For every word whether it has its capital from opening a sentence: no other capital in or after it."""
    opening, openers = True, []
    for form, after in zip(forms, [*forms[1:], ""]):
        openers.append(opening and len(form) > 1 and form.istitle() and not after[:1].isupper())
        opening = form in SENTENCE_END or (opening and not form[0].isalnum())
    return openers


def _tags(forms: Sequence[str]) -> list[str]:
    """Penn tags, sentence by sentence."""
    lines = "".join(form + ("\n" if form in SENTENCE_END else " ") for form in forms).strip()
    return [tag for _, tag in _tagger().tag(lines, tokenize=False)] if lines else []


@lru_cache(maxsize=1)
def _tagger():
    from textblob.en.taggers import PatternTagger

    return PatternTagger()


def fixed_words(words: Sequence[Word]) -> frozenset[int]:
    """Places of the words that other words hold in place.

    They stand in an expression of several words that WordNet knows (hot dog, end up), or are a verb before a
    particle (dream up) or a noun before a noun (love story).
    """
    known, places = multiword_lemmas(), set()
    forms = [word.form.lower() for word in words]
    for first, (word, after) in enumerate(zip(words, words[1:])):
        before_particle = word.tag[:2] == "VB" and after.form.lower() in PARTICLES
        if before_particle or (word.tag == "NN" and after.tag[:2] == "NN"):
            places.add(first)
        for last in range(first + 1, min(first + 4, len(words))):
            ways = ["_".join(forms[first:last + 1])]
            ways += ["_".join([lemma, *forms[first + 1:last + 1]]) for lemma in _lemmas(word)]
            ways += ["_".join([*forms[first:last], lemma]) for lemma in _lemmas(words[last])]
            if any(way in known for way in ways):
                places.update(range(first, last + 1))
    return frozenset(places)


def _lemmas(word: Word) -> tuple[str, ...]:
    letter = part_of_speech_of(word.tag)
    return lemmas_of(word.form.lower(), letter) if letter else ()


