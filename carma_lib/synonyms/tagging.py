"""The words of a text with their parts of speech in context, and which of them are content."""
from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple, Sequence

import regex

from carma_lib.synonyms.wordnet import FUNCTION_WORDS, one_thread_at_a_time, part_of_speech_of

# What is not language stays whole: addresses, names on the web, paths, commands of TeX, marks of HTML.
MARKUP = regex.compile(r"</?[a-z][^<>]*>|<!--.*?-->|\\(?:begin|end|label|ref|cite\w*|input|include\w*)\{[^{}]*\}|\\[a-z]+"
                       r"|`[^`'\s]+`|\$[^$\n]*[\\_^{}][^$\n]*\$|(?<=\])\([^()\s]+\)|(?<!\w):[a-z_]+:(?!\w)", regex.IGNORECASE)
ADDRESS = regex.compile(
    r"[a-z][a-z\d+.-]*://\S*[^\s.,;:!?)\]}'\"’”]|www\.\S*[^\s.,;:!?)\]}'\"’”]|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?<![\w@#])[@#]\w+"
    r"|(?<!\S)(?:~|\.{1,2})?(?:/[\w.-]*\w){2,}/?|(?<!\S)(?:~|\.{1,2})/\S*\w|(?<!\w)[a-z]:[\\/]\S+"
    r"|(?<![\w.-])[\w-]+(?:\.[\w-]+)*\.(?:com?|org|net|edu|gov|io|info|app|dev|ai|tv|eu|uk|de|fr|es|ch|nl|se|ru|cn|jp|ca|au|br)\b(?:/\S*\w)?",
    regex.IGNORECASE)
# "n't" and "'s" are words of their own; hyphenated compounds, "'n'" and what it joins (rock'n'roll) are one word.
# Combining marks, joiners and soft hyphens belong to the letter before them.
_W = r"\w[\p{M}\u200c\u200d\u00ad\u2060]*"
TOKEN = regex.compile(rf"{MARKUP.pattern}|{ADDRESS.pattern}|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|(?<!\w)['’]n['’](?!\w)"
                      rf"|(?:{_W})+?(?=n['’]t\b)|(?:{_W})+(?:(?:[-\u2010\u2011]|['’]n['’])(?:{_W})+)*|[^\w\s]\p{{M}}*",
                      regex.IGNORECASE)
_PLAIN = {0x00ad: None, 0x2060: None, 0x2010: "-", 0x2011: "-", 0x2019: "'"}
LETTERS = regex.compile(r"[\p{L}\p{M}\u200c\u200d-]+")
SENTENCE_END = frozenset(".!?")
TITLES = frozenset("mr mrs ms dr st lt gen prof sen rep gov capt col sgt maj rev mt messrs mme mlle vs".split())


class Word(NamedTuple):
    """A word of a text: its characters [start, end), its form as written and its Penn tag in context."""
    start: int
    end: int
    form: str
    tag: str


def is_content(word: Word) -> bool:
    """Whether a word counts for the rate: by its tag, and neither function word, nor name, nor number."""
    return (part_of_speech_of(word.tag) is not None and entry_of(word.form) not in FUNCTION_WORDS
            and LETTERS.fullmatch(entry_of(word.form)) is not None)


def entry_of(form: str) -> str:
    """How a dictionary lists a form: lower case, accents composed (NFC), plain hyphens and apostrophes, no soft hyphens
    or word joiners; "&" is "and"."""
    return "and" if form == "&" else unicodedata.normalize("NFC", form).lower().translate(_PLAIN)


@one_thread_at_a_time
@lru_cache(maxsize=8192)
def tagged_words(text: str) -> tuple[Word, ...]:
    """The words and punctuation marks of a text with their Penn tags in context (TextBlob's PatternTagger).

    A capitalised word is a name (NNP), unless it opens a sentence and no capital follows it. One that does is
    tagged in lower case; a name if the tagger knows it as one, and else as a noun or verb (Rose, not Old). Addresses
    are names, and marks of HTML and TeX symbols (SYM).
    """
    from textblob.en import lexicon

    places = [match.span() for match in TOKEN.finditer(text)]
    forms = [text[start:end] for start, end in places]
    opens = _openers(forms)
    foreign = ["SYM" if MARKUP.fullmatch(form) else "NNP" if ADDRESS.fullmatch(form) else "" for form in forms]
    tagged = _tags(["X" if kind else entry_of(form) if first else form for form, first, kind in zip(forms, opens, foreign)])
    words = []
    for (start, end), form, first, kind, tag in zip(places, forms, opens, foreign, tagged, strict=True):
        if kind:
            words.append(Word(start, end, form, kind))
            continue
        known_name = tag[:2] in ("NN", "VB") and lexicon.get(form, "").startswith("NNP")
        if form[0].isupper() and (not first or known_name) and len(form) > 1:
            tag = "NNP"
        words.append(Word(start, end, form, tag))
    return tuple(words)


def _openers(forms: Sequence[str]) -> list[bool]:
    """For every word whether it has its capital from opening a sentence: no other capital in or after it."""
    opening, openers, before = True, [], ""
    for form, after in zip(forms, [*forms[1:], ""]):
        openers.append(opening and len(form) > 1 and form.istitle() and not after[:1].isupper())
        opening = _ends(before, form) or (opening and not form[0].isalnum())
        before = form
    return openers


def _ends(before: str, form: str) -> bool:
    """Whether a mark ends a sentence: not the full stop of a title or an initial (Dr. Large, J. Savage)."""
    initial = len(before) == 1 and before.isupper() and before not in "AI"
    return form in SENTENCE_END and not (form == "." and (initial or before.lower() in TITLES))


def _tags(forms: Sequence[str]) -> list[str]:
    """Penn tags, sentence by sentence."""
    ends = map(_ends, ["", *forms], forms)
    lines = "".join(form + ("\n" if end else " ") for form, end in zip(forms, ends)).strip()
    return [tag for _, tag in _tagger().tag(lines, tokenize=False)] if lines else []


@lru_cache(maxsize=1)
def _tagger():
    from textblob.en.taggers import PatternTagger

    return PatternTagger()
