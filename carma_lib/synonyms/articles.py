"""The indefinite article: which one a word takes, and where it stands before a word."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from carma_lib.synonyms.tagging import MARKUP, Word

ARTICLES = frozenset(["a", "an"])
OPENING = frozenset("\"'`*_~")  # with opening and closing marks of every script, what may stand between an article and its word
LETTER_A = frozenset("vitamin hepatitis influenza appendix".split())  # "vitamin a" holds a letter, no article
# A written vowel or a silent h, unless the word begins with the sound of "you" or "w" (unique, European, one)
VOWEL_SOUND = re.compile(
    r"(?!una(?:r[yi]|$)|u[iy]gh?ur|uni(?:[acfgopqtvx]|d(?:im|ir)|l(?!l)|mod|no|nuc|s(?!s)|$)|unanim|unesco|u[bstv][aeiou]|ur[aeiou]|u[gk]a|uk|ufos?(?![^\W_])|eu"
    r"|ewe|one(?![ri])|once|oui)[aeiou]|hon(?:est|or|our)|hour(?!i)|heir|y[^\W\daeiouy]", re.IGNORECASE)
# Read letter by letter: one letter (x-ray), capitals of two or three or that make no syllable (MRI, HTML), no vowel
SPELLED = re.compile(r"(?!(?:ROM|RAM|LAN|SIM)s?(?![^\W_]))(?:[A-Za-z](?![^\W\d_])|[A-Z]{2,3}s?(?![^\W_])|[A-Z]{2}c(?![^\W_])"
                     r"|[B-DF-HJ-NP-TV-Z]{4,}s?(?![^\W_])|(?:[B-DF-HJ-NP-TV-XZ]{2}|[A-Z]{0,2}\d)[A-Z\d]*s?(?![^\W_])|[b-df-hj-np-tv-xz\d]+(?![^\W_]))")
NUMBER_AN = re.compile(r"8|1[18](?:\d\d|\d{3})?(?!\d)")  # eight, eleven, eighteen, and their hundreds and thousands


def article_before(text: str, words: Sequence[Word], i: int) -> Word | None:
    """The a or an of word i, before it or before the quotation marks and brackets that open at it."""
    place = i - 1
    while place >= 0 and _opens(words[place].form):
        place -= 1
    if place < 0 or words[place].form.lower() not in ARTICLES:
        return None
    article, before = words[place], words[place - 1].form if place else ""
    between = text[article.end:words[i].start]
    if not any(map(str.isspace, between)):
        return None
    letter = (article.form == "A" and before[-1:].isalnum()) or before.lower() in LETTER_A  # Plan A, vitamin A
    return None if letter else article


def _opens(form: str) -> bool:
    """Whether a token is a quotation mark or bracket of any script, a mark without width, or markup."""
    return form in OPENING or bool(MARKUP.fullmatch(form)) or len(form) == 1 and unicodedata.category(form) in {"Pi", "Pf", "Ps", "Cf"}


def indefinite_article(word: str) -> str:
    """The article by the sound that a word, an abbreviation, a letter or a number begins with: "a" or "an"."""
    folded = unicodedata.normalize("NFKD", word).translate({0x152: "Oe", 0x153: "oe", 0xc6: "Ae", 0xe6: "ae", 0xd8: "O", 0xf8: "o"})
    word = re.sub("^[\\W_]+", "", "".join(mark for mark in folded if not unicodedata.combining(mark)))
    if word[:1].isdigit():
        return "an" if NUMBER_AN.match(word) else "a"
    if SPELLED.match(word):
        return "an" if word[0].lower() in "aefhilmnorsx" else "a"
    return "an" if VOWEL_SOUND.match(word) else "a"


def agree(article: str, word: str) -> str:
    """An article as it is written ("A"), made to agree with the word that follows it."""
    return indefinite_article(word).capitalize() if article[0].isupper() else indefinite_article(word)
