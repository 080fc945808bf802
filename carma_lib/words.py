"""Words and phrases of a text as character spans, and the constituent that each token belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]

# Letters, digits, combining accents; apostrophe or hyphen inside a word, point or comma inside a number.
_WORD = re.compile(
    r"(?:[^\W_]|[\u0300-\u036f])+(?:(?:['’‐‑-]|(?<=\d)[.,](?=\d))(?:[^\W_]|[\u0300-\u036f])+)*"
)
_NOUN_PHRASE = re.compile(r"D?(?:R?A)*N+")


def word_spans(text: str) -> list[Span]:
    """Character spans (start, end) of the words of `text`, in order; punctuation belongs to no word.

    "well-known", "don't" and "3.5" are one word each. The published code takes white-space units, punctuation
    attached, and leaves out the last one; this is our decision.
    """
    return [match.span() for match in _WORD.finditer(text)]


def phrase_spans(text: str) -> list[Span]:
    """Character spans of the base noun phrases of two or more words: determiner, modifiers, nouns.

    For text without gold trees. Parts of speech come from TextBlob's pattern tagger, whose English lexicon is
    part of the package; no phrase crosses punctuation.
    """
    from textblob.en.taggers import PatternTagger  # slow to import, and only needed here

    words = word_spans(text)
    if not words:
        return []
    tagged = PatternTagger().tag(" ".join(text[start:end] for start, end in words), tokenize=False)
    if len(tagged) != len(words):
        raise ValueError(f"the tagger read {len(tagged)} words where the text has {len(words)}: {text!r}")
    spans = []
    for first, last in _stretches(text, words):
        kinds = "".join(_kind(tag) for _, tag in tagged[first:last])
        for match in _NOUN_PHRASE.finditer(kinds):
            if match.end() - match.start() > 1:
                spans.append((words[first + match.start()][0], words[first + match.end() - 1][1]))
    return spans


def constituent_ids(offsets: Sequence[Span], spans: Sequence[Span], text: str) -> list[int]:
    """For each token the index of the span that holds it, or −1.

    Args:
        offsets: character span of each token in `text`, as a fast tokenizer's `return_offsets_mapping` gives
            it. White space at a token's edges is cut off first. A token that reaches beyond a span belongs
            to none, and so do special tokens and white space, except between two words of one span.
        spans: constituents of `text`, in any order.

    Raises:
        ValueError: a span is empty, reaches outside `text`, or overlaps another.
    """
    owner = [-1] * len(text)
    for index, (start, end) in enumerate(spans):
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"span {index} = ({start}, {end}) is empty or outside a text of {len(text)} characters"
            )
        if any(held >= 0 for held in owner[start:end]):
            raise ValueError(f"span {index} = ({start}, {end}) overlaps another span")
        owner[start:end] = [index] * (end - start)
    ids = []
    for start, end in offsets:
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        # white space alone belongs to a constituent on both its sides: between two words of a phrase
        owners = set(owner[start:end] if start < end else owner[max(start - 1, 0) : start + 1])
        ids.append(owners.pop() if len(owners) == 1 and (start < end or start) else -1)
    return ids


def _stretches(text: str, words: list[Span]) -> list[Span]:
    """Ranges of words between which there is nothing but white space."""
    breaks = [i for i in range(1, len(words)) if text[words[i - 1][1] : words[i][0]].strip()]
    edges = [0, *breaks, len(words)]
    return list(zip(edges, edges[1:]))


def _kind(tag: str) -> str:
    if tag in ("DT", "PRP$", "CD"):
        return "D"
    if tag in ("VBN", "VBG") or tag.startswith("JJ"):
        return "A"
    if tag.startswith("NN"):
        return "N"
    return "R" if tag == "RB" else "o"
