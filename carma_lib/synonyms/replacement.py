"""Seeded synonym replacement that reports what it changed.

A *content word* is a noun, verb, adjective or adverb by its tag in context that is neither a function word,
nor a name, nor a number. At a rate, round(rate × content words) replacements are requested (halves upwards)
and as many are made as there are words with a candidate, so `made <= requested`. Which words change, and to
what, is drawn from a hash of (seed, item, word): the same on every machine, independent of other items, and
nested, so that what changes at 25 % changes at 40 % in the same way.
"""
from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple

from carma_lib.files import fingerprint
from carma_lib.synonyms import ranking
from carma_lib.synonyms.wordnet import lemmas_of, sense_counts, synonym_forms, wordnet
from carma_lib.synonyms.articles import ARTICLES, article_before, indefinite_article
from carma_lib.synonyms.grammar import fixed_words, in_place
from carma_lib.synonyms.cache import read_rows, write_rows
from carma_lib.synonyms.tagging import TOKEN, Word, entry_of, is_content, tagged_words

if TYPE_CHECKING:
    from datasets import Dataset

RULES = 8  # part of every cache key: raise it with any change of what is replaced by what
NOISE = 0.5  # how far a seed may move the log-odds of ranked candidates
LEAST = -0.2  # log-odds below which a ranked candidate is never used

Source = str | Mapping[str, Sequence[str]] | Callable[[str, str], Sequence[str]]
"""Where candidates come from: "wordnet" (gated, without context), "ranked" (WordNet's, chosen in context by a language
model), a dict lower-case form → forms, or a function (form, Penn tag) → forms."""


class Change(NamedTuple):
    """Characters [start, end) of the original text, what stood there and what stands there now."""
    start: int
    end: int
    before: str
    after: str


class Replacement(NamedTuple("Replacement", [("text", str), ("changes", tuple[Change, ...])])):
    """A named tuple (text, changes): the changed text, and its changes in order of place.

    A changed article (a, an) is a change of its own. Besides: `requested`, how many words the rate asked for,
    and `made`, how many were replaced; `made < requested` where too few words have a candidate.
    """

    def __new__(cls, text: str, changes: Iterable[Change], requested: int) -> Replacement:
        self = super().__new__(cls, text, tuple(changes))
        self.requested = requested
        return self

    __getnewargs__ = lambda self: (self.text, self.changes, self.requested)  # for copies, and for other processes

    @property
    def made(self) -> int:
        return sum(change.before.lower() not in ARTICLES for change in self.changes)


def replace_synonyms(text: str, *, rate: float, seed: int, span: tuple[int, int] | None = None,
                     item_id: str | None = None, forbidden: str | Sequence[str] = (),
                     source: Source = "wordnet") -> Replacement:
    """Replace a share of a text's content words by synonyms.

    text: any text; one without content words or candidates comes back as it is, with no changes.
    rate: share of content words in `span` to replace, from 0 to 1.
    seed, item_id: what the draw depends on; the item is the text itself if no item_id is given.
    span: characters [start, end) that may change, all of the text if None; words across its edge stay.
    forbidden: words (targets) that are not introduced in any of their forms.
    source: where candidates come from, WordNet by default, `functools.partial(synonym_forms, agreement=0.25)`
        for more and looser candidates; a dict from lower-case forms to forms is taken as it is, whatever the
        tag, and needs no WordNet.

    Raises ValueError for a rate outside [0, 1] or a span outside the text, TypeError for a text that is none, a rate or
    seed that is no number.
    """
    _check_draw(rate, seed)
    _check_text(text, "the text")
    try:
        begin, end = (0, len(text)) if span is None else map(operator.index, span)
    except (TypeError, ValueError):
        raise TypeError(f"span must be two places (start, end) in the text, got {span!r}") from None
    if not 0 <= begin <= end <= len(text):
        raise ValueError(f"span {tuple(span)} lies outside the text of {len(text)} characters")
    item, source, words = text if item_id is None else str(item_id), _checked(source), tagged_words(text)
    content = [i for i, word in enumerate(words) if begin <= word.start and word.end <= end
               and (is_content(word) or isinstance(source, _Dictionary) and source.lists(word))]
    requested = int(rate * len(content) + 0.5)
    refused = _families([forbidden] if isinstance(forbidden, str) else forbidden or ())
    ranked = source.of(text) if isinstance(source, _Ranking) else None
    fixed = frozenset() if isinstance(source, (_Dictionary, _Ranking)) else fixed_words(words)

    choices = {}  # place of a word → what orders it, and its replacement
    for i in content:
        word, article = words[i], article_before(text, words, i)
        if ranked is not None:
            scores = {form: score + NOISE * _gumbel(seed, item, [word.form.lower(), form]) for form, score in ranked.get(i, ()) if score >= LEAST}
            found = _candidates(word, lambda form, tag: list(scores), refused)
        else:
            found = [] if i in fixed else _candidates(word, source, refused)
        if found and not isinstance(source, _Dictionary):
            found = in_place(words, i, found)
        if article and article.start < begin:  # it cannot be put right
            found = [form for form in found if indefinite_article(form) == article.form.lower()]
        if found and ranked is not None:
            best = max(found, key=scores.__getitem__)
            choices[i] = -scores[best], best
        elif found:
            choices[i] = _draw(seed, item, word.start), found[_draw(seed, item, word.form.lower()) % len(found)]

    changes = []
    for i in sorted(sorted(choices, key=lambda i: (choices[i][0], i))[:requested]):
        article, after = article_before(text, words, i), choices[i][1]
        if article and article.form.lower() != indefinite_article(after):
            changes.append(_change(article, indefinite_article(after)))
        changes.append(_change(words[i], after))
    changed = text
    for change in reversed(changes):
        changed = changed[:change.start] + change.after + changed[change.end:]
    return Replacement(changed, changes, requested)


def replace_all(texts: Sequence[str], *, rate: float, seed: int, item_ids: Sequence[str] | None = None,
                forbidden: Sequence[str | Sequence[str]] | None = None, source: Source = "wordnet",
                cache_dir: str | Path | None = None) -> list[Replacement]:
    """`replace_synonyms` of every text, with a progress bar after two seconds and an optional cache on disk.

    item_ids, forbidden: one an item, in the order of texts; None as for `replace_synonyms`.
    cache_dir: folder of results, found again by the content of all arguments, the rules and the versions of
        the dictionaries; a damaged file is made again. None: no cache.

    Raises ValueError for lists of unequal length, or for a cache of a source that is a function of one's own,
    since no key can tell when it changes.
    """
    from tqdm import tqdm

    _check_draw(rate, seed)
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts; use replace_synonyms for a single one")
    texts = list(texts)
    for place, text in enumerate(texts):
        _check_text(text, f"text {place}")
    source = _checked(source)
    columns = [[None] * len(texts) if column is None else list(column) for column in (texts, item_ids, forbidden)]
    if len({len(column) for column in columns}) > 1:
        raise ValueError("texts, item_ids and forbidden must be of one length, got "
                         + ", ".join(str(len(column)) for column in columns))
    path = Path(cache_dir) / f"{_cache_key(*columns, rate, seed, source)}.parquet" if cache_dir else None
    if path and (cached := read_rows(path)) is not None:
        return [Replacement(row["text"], (Change(**change) for change in row["changes"]), row["requested"])
                for row in cached]
    if isinstance(source, _Ranking) and (unranked := [text for text in texts if text not in source.known]):
        source.known.update(ranking.ranked_candidates(unranked, cache_dir=cache_dir))
    replacements = [
        replace_synonyms(text, rate=rate, seed=seed, item_id=item, forbidden=words or (), source=source)
        for text, item, words in tqdm(zip(*columns), total=len(texts), desc="replacing", delay=2)]
    if path:
        write_rows(path, [{"text": done.text, "changes": [change._asdict() for change in done.changes],
                           "requested": done.requested} for done in replacements])
    return replacements


def replaced_rows(rows: Dataset, *, source: Source = "wordnet", rate: float, seed: int,
                  forbidden: Sequence[str] | None = None,
                  cache_dir: str | Path | None = None) -> tuple[Dataset, list[int]]:
    """The rows (`carma_lib.tasks.FEATURES`) with synonyms in their texts, and how many words of each were replaced.

    source, forbidden, cache_dir: see `replace_all`. `task_named(name).replacement(rows)` gives the first two for a
    task: its source of synonyms, and for an inverse dictionary the targets, which no definition may receive.
    """
    replaced = replace_all(rows["text"], rate=rate, seed=seed, item_ids=rows["item_id"], source=source,
                           forbidden=forbidden, cache_dir=cache_dir)
    changed = {**rows.to_dict(), "text": [each.text for each in replaced],
               "phrases": [shift_spans(spans, each.changes) for spans, each in zip(rows["phrases"], replaced)]}
    return type(rows).from_dict(changed, features=rows.features), [each.made for each in replaced]


def worst_replacements(texts: Sequence[str], *, seeds: Iterable[int], score: Callable[[list[str]], Sequence[float]],
                       **options: Any) -> list[Replacement]:
    """An adversary: of each text's replacements under several seeds, the one with the highest loss.

    seeds: the k seeds to try; of equal losses the earlier seed wins.
    score: called once a seed with the changed texts, in the order of texts; returns one finite loss a text.
        Batching and the model are the caller's.
    options: rate and the rest of `replace_all`.

    Raises ValueError without seeds, or for losses of another number or that are not finite.
    """
    import numpy

    tries, losses, source = [], [], _checked(options.pop("source", "wordnet"))
    for seed in seeds:
        tries.append(replace_all(texts, seed=seed, source=source, **options))
        losses.append(numpy.asarray(score([done.text for done in tries[-1]]), dtype=float))
        if losses[-1].shape != (len(texts),) or not numpy.isfinite(losses[-1]).all():
            raise ValueError(f"score must return {len(texts)} finite losses, one a text; seed {seed} gave "
                             f"{int(numpy.isfinite(losses[-1]).sum())} in shape {losses[-1].shape}")
    if not tries:
        raise ValueError("seeds is empty; give the seeds to try, for instance range(8)")
    return [tries[k][i] for i, k in enumerate(numpy.argmax(losses, axis=0))]


def shift_spans(spans: Sequence[tuple[int, int]], changes: Sequence[Change]) -> list[tuple[int, int]]:
    """Character spans [start, end) of the original text → the same spans of the changed one.

    A boundary inside a changed word moves out to that word's edge, so that words stay whole.
    """
    def shifted(position: int, at_end: bool) -> int:
        moved = 0
        for change in changes:
            if position <= change.start:
                break
            if position < change.end:
                return change.start + moved + (len(change.after) if at_end else 0)
            moved += len(change.after) - (change.end - change.start)
        return position + moved

    return [(shifted(start, False), shifted(end, True)) for start, end in spans]


def _cache_key(texts: list, item_ids: list, forbidden: list, rate: float, seed: int, source: Source) -> str:
    if isinstance(source, _Dictionary):
        content = {form: source[form] for form in sorted(source)}
    elif isinstance(source, _Ranking):
        content = [wordnet().get_version(), ranking.SCORER, ranking.RULES, NOISE, LEAST]
    elif source is synonym_forms or getattr(source, "func", None) is synonym_forms:
        content = [wordnet().get_version(), len(sense_counts()), getattr(source, "keywords", {})]
    else:
        raise ValueError("a cache needs the default source or a dict; leave cache_dir out for a function")
    words = [[word] if isinstance(word, str) else sorted(word or ()) for word in forbidden]
    return fingerprint(RULES, version("textblob"), version("lemminflect"), content, float(rate), int(seed),
                       texts, [item if item is None else str(item) for item in item_ids], words)


class _Dictionary(dict):
    """Somebody's own synonyms, checked, as a source like any other."""

    def __call__(self, form: str, tag: str) -> list[str]:
        return self.get(form, [])

    def lists(self, word: Word) -> bool:
        """Whether it has the word, which then counts for the rate; a name it never has."""
        return entry_of(word.form) in self and not word.tag.startswith("NNP")


class _Ranking:
    """Candidates of texts, ranked in context; texts that were not ranked together are ranked one by one."""

    def __init__(self) -> None:
        self.known: dict[str, ranking.Ranked] = {}

    def of(self, text: str) -> ranking.Ranked:
        if text not in self.known:
            self.known[text] = ranking.rank(text)
        return self.known[text]


def _checked(source: Source) -> Callable[[str, str], Sequence[str]] | _Ranking:
    if isinstance(source, _Ranking) or callable(source):
        return source
    if isinstance(source, str):
        if source not in ("wordnet", "ranked"):
            raise ValueError(f"unknown source of synonyms '{source}'; give 'wordnet', 'ranked', a dict or a function")
        return synonym_forms if source == "wordnet" else _Ranking()
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be 'wordnet', 'ranked', a dict or a function, got {type(source).__name__}")
    found = _Dictionary()
    for form, others in source.items():
        example = "write {'big': ['large', 'huge']}"
        if not isinstance(form, str) or not TOKEN.fullmatch(form) or form != form.lower():
            raise ValueError(f"synonyms of {form!r}: the key must be one word in lower case; {example}")
        if form in ARTICLES:
            raise ValueError(f"synonyms of {form!r}: articles follow their words and have no synonyms; leave it out")
        if isinstance(others, str) or not isinstance(others, Sequence):
            raise ValueError(f"synonyms of {form!r}: expected a list of words, got {others!r}; {example}")
        for other in others:
            if not _is_word(other) or entry_of(other) == entry_of(form):
                raise ValueError(f"synonyms of {form!r}: {other!r} is no other word; {example}")
        if entry_of(form) in found:
            raise ValueError(f"synonyms of {form!r} are given twice, under two spellings of one word: put them in one list")
        found[entry_of(form)] = list(others)
    return found


def _is_word(other: object) -> bool:
    """Whether it can stand for a word: text with a letter or digit, no space around it and no control character in it."""
    return (isinstance(other, str) and any(map(str.isalnum, other)) and other == other.strip()
            and not any(unicodedata.category(mark) in ("Cc", "Cs") for mark in other))


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} is {text!r}, not text")


def _check_draw(rate: float, seed: int) -> None:
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"rate must be a number in [0, 1] (0.25 for a quarter of the content words), got {rate!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1] (0.25 for a quarter of the content words), got {rate}")


def _draw(seed: int, item: str, what: object) -> int:
    key = json.dumps([int(seed), item, what]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _gumbel(seed: int, item: str, what: object) -> float:
    """Standard Gumbel noise from a hash."""
    return -math.log(-math.log((_draw(seed, item, what) + 0.5) / 2**64))


def _candidates(word: Word, source: Callable[[str, str], Sequence[str]], refused: frozenset[str]) -> list[str]:
    form = entry_of(word.form)
    found = source(form, word.tag)
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise TypeError(f"the source gave {found!r} for {form!r}; it must give a list of words, as ['large', 'huge']")
    found = list(found)
    if odd := [other for other in found if not _is_word(other)]:
        raise TypeError(f"the source gave {odd[0]!r} among the words for {form!r}; it must give words, as ['large', 'huge']")
    return [other for other in found if entry_of(other) != form and not (refused and refused & _families([other]))]


def _families(words: Iterable[str]) -> frozenset[str]:
    """The words, as dictionaries list them and split at spaces and hyphens, and every lemma they may be a form of."""
    parts = [part for word in words for part in re.split(r"[\W_]+", entry_of(word).casefold()) if part]
    return frozenset(parts).union(*(lemmas_of(part, letter) for part in parts for letter in "nvar"))


def _change(word: Word, after: str) -> Change:
    return Change(word.start, word.end, word.form, after[0].title() + after[1:] if word.form[0].isupper() else after)
