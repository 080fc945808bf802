"""The controlled lexicon: the project's own hand-written words, from which a seeded grammar makes two tasks.

`data/lexicon.yml` explains its own format. `definitions` makes definitions → term from it, `opinions` makes opinions →
sentiment; both give rows {item_id, text, target, phrases, group} by split.
"""
from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

LABELS = ("positive", "neutral", "negative")
SECTIONS = ("adjectives", "terms", "synonyms", "opinions")
SYNONYM_RATE = 0.3  # share of the words with synonyms that are written as one of them, once each synonym was written
WORD = re.compile(r"[A-Za-z]+")


class LexiconError(ValueError):
    """The lexicon cannot be used; the message names file and entry, and the way out."""


@dataclass(frozen=True)
class Lexicon:
    """What `load_lexicon` read and checked.

    terms       term → its features, in the order of the file
    genus       term → its genus
    adjectives  one-word features, in the order in which they stand before a noun
    synonyms    word → the words interchangeable with it (never itself), symmetric
    opinions    the section of this name, as in the file
    """

    terms: dict[str, tuple[str, ...]]
    genus: dict[str, str]
    adjectives: tuple[str, ...]
    synonyms: dict[str, list[str]]
    opinions: dict

    def terms_with(self, genus: str, features: tuple[str, ...]) -> list[str]:
        """All terms of this genus that have all these features."""
        return [term for term, known in self.terms.items()
                if self.genus[term] == genus and set(features) <= set(known)]


def load_lexicon(path: str | Path | None = None) -> Lexicon:
    """Read and check a lexicon; without `path` the one that comes with the package.

    Raises LexiconError in one line for a file that is missing, empty or no YAML, and for the first entry
    that breaks the format written at the top of `data/lexicon.yml`.
    """
    path = Path(path) if path is not None else lexicon_file()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror
        raise LexiconError(f"{path}: cannot be read ({reason}); give the path of a lexicon file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        reason = getattr(error, "problem", None) or "not UTF-8 text"
        raise LexiconError(f"{path}: {line}no valid YAML ({reason}); correct it there") from None
    try:
        return _checked(content)
    except LexiconError as error:
        raise LexiconError(f"{path}: {error}") from None


@cache
def controlled_synonyms() -> dict[str, list[str]]:
    """Lower-case word → the words interchangeable with it wherever the two tasks use it."""
    return load_lexicon().synonyms


def lexicon_file() -> Path:
    """In an installed package beside the code, in a checkout at the top."""
    package = Path(__file__).resolve().parents[2]
    packaged = package / "data" / "lexicon.yml"
    return packaged if packaged.is_file() else package.parent / "data" / "lexicon.yml"


def _checked(content: object) -> Lexicon:
    if not isinstance(content, dict) or not content:
        raise LexiconError(f"holds no lexicon; it needs the sections {', '.join(SECTIONS)}")
    for section in SECTIONS:
        if not content.get(section):
            raise LexiconError(f"section {section!r} is missing or empty; add it")
    adjectives = _words(content["adjectives"], "adjectives")
    terms, genus = _terms(content["terms"], adjectives)
    return Lexicon(terms, genus, adjectives, _synonyms(content["synonyms"]), _opinions(content["opinions"]))


def _words(value: object, entry: str) -> tuple[str, ...]:
    """A list of single words, none twice."""
    if not isinstance(value, list):
        raise LexiconError(f"{entry}: expected a list of words, got {value!r}; write [one, two]")
    for word in value:
        if not isinstance(word, str) or not WORD.fullmatch(word):
            raise LexiconError(f"{entry}: {word!r} is no single word; use letters only, quote yes and no")
        if value.count(word) > 1:
            raise LexiconError(f"{entry}: {word!r} stands there twice; take one away")
    return tuple(value)


def _terms(section: object, adjectives: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Term → features and term → genus."""
    if not isinstance(section, dict):
        raise LexiconError("terms: expected genus → term → features; put each term under its genus")
    terms: dict[str, tuple[str, ...]] = {}
    genus_of: dict[str, str] = {}
    for genus, members in section.items():
        if not members or not isinstance(genus, str):
            raise LexiconError(f"terms: genus {genus!r} has no terms or no name; add them")
        if not isinstance(members, dict):
            raise LexiconError(f"terms: no genus above {genus!r}; write each term under its genus")
        for term, features in members.items():
            _words([term], f"terms of {genus!r}")
            if term in terms:
                raise LexiconError(f"term {term!r} stands there twice; take one away")
            if not isinstance(features, list) or not features:
                raise LexiconError(f"term {term!r} has no features; give it some, as in [small, eats fish]")
            terms[term], genus_of[term] = tuple(features), genus
    _check_features(terms, adjectives)
    return terms, genus_of


def _check_features(terms: dict[str, tuple[str, ...]], adjectives: tuple[str, ...]) -> None:
    uses = Counter(str(feature) for features in terms.values() for feature in features)
    for term, features in terms.items():
        for feature in features:
            entry = f"term {term!r}: feature {feature!r}"
            if not isinstance(feature, str) or (" " not in feature and feature not in adjectives):
                raise LexiconError(f"{entry} is unknown; write a verb phrase or add it to the adjectives")
            if features.count(feature) > 1:
                raise LexiconError(f"{entry} stands there twice; take one away")
            if uses[feature] == 1:
                raise LexiconError(f"{entry} is unknown to all other terms; correct it or share it")


def _synonyms(section: object) -> dict[str, list[str]]:
    if not isinstance(section, dict):
        raise LexiconError("synonyms: expected word → list of words; write large: [big, sizeable]")
    synonyms: dict[str, list[str]] = {}
    for word, others in section.items():
        members = _words([word, *_words(others, f"synonyms of {word!r}")], f"synonyms of {word!r}")
        for member in members:
            if member in synonyms:
                raise LexiconError(f"synonyms of {word!r}: {member!r} stands in another class too; keep one")
            synonyms[member] = [other for other in members if other != member]
    return synonyms


def _opinions(section: object) -> dict:
    """The section as it is, once each list of it is there and holds words."""
    _check_keys(section, (*LABELS, "domains"), "opinions")
    for label in LABELS:
        entry = f"opinions: {label}"
        kinds = section[label]
        _check_keys(kinds, ("gradable", "strong", "verbs"), entry)
        _words(kinds["gradable"], entry)
        _words(kinds["strong"], entry)
        if not isinstance(kinds["verbs"], dict):
            raise LexiconError(f"{entry}: expected past → base form of verbs; write {{impressed: impress}}")
        _words([*kinds["verbs"], *kinds["verbs"].values()], entry)
    if not isinstance(section["domains"], dict) or not section["domains"]:
        raise LexiconError("opinions: no domains; add at least one")
    for name, domain in section["domains"].items():
        entry = f"opinions: domain {name!r}"
        _check_keys(domain, ("frame", "aspects", "positive", "negative"), entry)
        _words(domain["positive"], entry)
        _words(domain["negative"], entry)
        if len(_words(domain["aspects"], entry)) < 3:
            raise LexiconError(f"{entry} has fewer than three aspects; add some")
    return section


def _check_keys(value: object, keys: tuple[str, ...], entry: str) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise LexiconError(f"{entry} needs exactly the entries {', '.join(keys)}; add or take away")


class SynonymChoice:
    """Writes some words as one of their synonyms, the one written least so far.

    A word is replaced until each of its synonyms was written once, then with probability `SYNONYM_RATE`.
    """

    def __init__(self, synonyms: dict[str, list[str]], rng: random.Random):
        self.synonyms, self.rng = synonyms, rng
        self.written: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        return WORD.sub(self._word, text)

    def _word(self, match: re.Match) -> str:
        word = match[0]
        choices = self.synonyms.get(word)
        if not choices:
            return word
        chosen = min(choices, key=lambda choice: (self.written[choice], self.rng.random()))
        if self.written[chosen] and self.rng.random() >= SYNONYM_RATE:
            return word
        self.written[chosen] += 1
        return chosen


def read_brackets(marked: str) -> tuple[str, list[list[int]]]:
    """"[A bird] [that sings]" → "A bird that sings" and the spans [[0, 6], [7, 17]] of its phrases."""
    text, phrases = "", []
    for piece in re.split(r"([\[\]])", marked):
        if piece == "[":
            phrases.append([len(text)])
        elif piece == "]":
            phrases[-1].append(len(text))
        else:
            text += piece
    return text, phrases
