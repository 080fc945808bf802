"""How good synonym replacements are: coverage and mistakes, beside a baseline.

The mistakes are counted by reading the changed text again with the tagger, which played no part in choosing
the candidates. It errs itself, so compare the rates with the baseline's rather than with zero.
"""
from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Mapping, Sequence

from carma_lib.synonyms.wordnet import part_of_speech_of, synonym_forms, wordnet
from carma_lib.synonyms.articles import ARTICLES
from carma_lib.synonyms.replacement import Replacement, Source, replace_all, shift_spans
from carma_lib.synonyms.tagging import is_content, tagged_words

if TYPE_CHECKING:
    import pandas

SAME_INFLECTION = {"VBN": "VBD", "VBP": "VB"}  # pairs that look alike in most verbs


@lru_cache(maxsize=None)
def first_lemma_of_any_sense(form: str, tag: str) -> tuple[str, ...]:
    """The baseline: WordNet's first other lemma, of any sense and any part of speech, uninflected."""
    names = (lemma.name() for synset in wordnet().synsets(form) for lemma in synset.lemmas())
    other = next((name for name in names if name.lower() != form), None)
    return () if other is None else (other.replace("_", " "),)


def replacement_quality(texts: Sequence[str], replacements: Sequence[Replacement]) -> dict[str, float]:
    """Counts and rates of replacements of whole texts.

    content_words, requested, made: counts. coverage: made / content_words. reached: made / requested.
    texts_reached: share of texts with as many replacements as requested. changed_article: a/an put right, per
    replacement. wrong_part_of_speech: share of the replacements that the tagger reads as another part of
    speech than the word before. broken_inflection: share that it reads as the same part of speech in another
    form (a plural for a singular); past and participle, and base form and present, count as one form.
    Rates without anything to count are NaN.
    """
    content = sum(is_content(word) for text in texts for word in tagged_words(text))
    pairs = [pair for text, done in zip(texts, replacements, strict=True) for pair in _tags(text, done)]
    wrong = [part_of_speech_of(before) != part_of_speech_of(after) for before, after in pairs]
    broken = [not other and SAME_INFLECTION.get(before, before) != SAME_INFLECTION.get(after, after)
              for other, (before, after) in zip(wrong, pairs)]
    requested, made = (sum(getattr(done, name) for done in replacements) for name in ("requested", "made"))
    return {
        "content_words": content, "requested": requested, "made": made,
        "coverage": _share(made, content), "reached": _share(made, requested),
        "texts_reached": _share(sum(done.made == done.requested for done in replacements), len(texts)),
        "changed_article": _share(sum(len(done.changes) - done.made for done in replacements), made),
        "wrong_part_of_speech": _share(sum(wrong), len(wrong)),
        "broken_inflection": _share(sum(broken), len(broken)),
    }


def quality_table(texts: Sequence[str], *, rates: Sequence[float] = (0.1, 0.25, 0.4, 1.0),
                  sources: Mapping[str, Source] | None = None) -> pandas.DataFrame:
    """`replacement_quality` of every source (default: gated WordNet, and the baseline) at every rate.

    Besides: no_candidate, the share of content words that no rate can change, from the run at rate 1.
    The baseline replaces in the same places by the same rules and differs in the candidates only.
    """
    import pandas

    sources = sources or {"wordnet": synonym_forms, "first lemma of any sense": first_lemma_of_any_sense}
    rows = []
    for name, source in sources.items():
        every = replacement_quality(texts, replace_all(texts, rate=1.0, seed=0, source=source))
        for rate in rates:
            replaced = replace_all(texts, rate=rate, seed=0, source=source)
            rows.append({"source": name, "rate": rate, **replacement_quality(texts, replaced),
                         "no_candidate": 1 - every["coverage"]})
    return pandas.DataFrame(rows)


def mark_changes(text: str, replacement: Replacement) -> str:
    """The original text with every change in place: "The [dogs → hounds] slept."."""
    for change in reversed(replacement.changes):
        text = f"{text[:change.start]}[{change.before} → {change.after}]{text[change.end:]}"
    return text


def _tags(text: str, replacement: Replacement) -> list[tuple[str, str]]:
    """Tags before and after of every replaced word; of a replacement of several words, the last one's."""
    before = {word.start: word.tag for word in tagged_words(text)}
    after = {word.end: word.tag for word in tagged_words(replacement.text)}
    words = [change for change in replacement.changes if change.before.lower() not in ARTICLES]
    spans = shift_spans([change[:2] for change in words], replacement.changes)
    return [(before[change.start], after.get(end, "")) for change, (_, end) in zip(words, spans, strict=True)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
