"""The words of a text with their parts of speech in context; which of them are content, which are fixed."""
from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple, Sequence

import regex

from carma_lib.synonyms.wordnet import (
    FUNCTION_WORDS, lemmas_of, multiword_lemmas, one_thread_at_a_time, part_of_speech_of, tagged_uses, wordnet)

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
PARTICLES = frozenset("up out off down away apart along around back over".split())
INTENSIFIERS = frozenset("super real awful dead mighty jolly dreadful precious bloody pretty plain way damn".split())
CLAUSE_OPENERS = frozenset("after before as than if when until till since because though while enough".split())
BARE_INFINITIVE = frozenset("help make see hear watch feel notice observe dare need".split())  # "saw him leave"
# A finite verb cannot follow these, so what the tagger calls one is a noun or adjective ("the start", "by means of").
DETERMINERS = frozenset("a an the every no another my your his her its our their whose".split())
SUBORDINATORS = frozenset("that because if whether as than while whilst though although since unless until till before after so lest like".split())
FINITE = ("VB", "VBP", "VBZ", "VBD")
# Fixed expressions that WordNet does not list.
EXPRESSIONS = frozenset("as_a_result rest_assured my_god oh_god i_mean you_mean big_screen small_screen silver_screen test_of_time "
                        "old_wives'_tale as_a_matter_of_fact make_a_living of_all_time all_the_same".split())
MASS = frozenset(f"noun.{kind}" for kind in "attribute feeling food phenomenon state substance".split())


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
        before, after = (words[i] if 0 <= i < len(words) else Word(0, 0, "", "") for i in (place - 1, place + 1))
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


@lru_cache(maxsize=1)
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
