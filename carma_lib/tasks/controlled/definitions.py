"""Definitions → term: genus and features of the controlled lexicon, worded by a seeded grammar."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations

from carma_lib.tasks.controlled.lexicon import Lexicon, SynonymChoice, read_brackets

TASK = "controlled_inverse_dictionary"
SIZES = {"train": 4500, "validation": 500, "test_seen": 600, "test_held_out": 600, "test_longer": 600}
HELD_OUT_SHARE = 0.3  # of a term's pairs kept for test_held_out: at least one, if its features allow it
TRIES = 20  # wordings tried for one definition before another is taken


def inverse_dictionary_rows(
    lexicon: Lexicon, *, seed: int, sizes: dict[str, int] | None = None,
) -> dict[str, list[dict]]:
    """Rows of the controlled inverse dictionary, by split.

    A definition is a genus and some features of a term, true of no other term: "A small bird that eats fish".
    No text stands in two splits.

    train          one or two features a definition
    validation     feature sets of train in other wordings
    test_seen      feature sets of train in other wordings
    test_held_out  pairs of features that never stand together for this term in train, though each of them
                   stands there with others; neither names the term alone
    test_longer    three or four features, each known from train, no held-out pair among them

    seed            same seed, same rows
    sizes           rows by split, put over `SIZES`

    Raises ValueError for a size above what the lexicon can give.
    """
    sizes = {**SIZES, **(sizes or {})}
    rng = random.Random(f"{TASK}/{seed}")
    write = SynonymChoice(lexicon.synonyms, rng)
    seen, held_out = {}, {}
    for term in lexicon.terms:
        seen[term], held_out[term] = _feature_sets(lexicon, term, HELD_OUT_SHARE, rng)
    texts: set[str] = set()
    rows = {}

    def fill(split: str, choices: dict[str, list[tuple[str, ...]]]) -> Counter:
        rows[split], used = _fill(split, sizes[split], choices, lexicon, write, rng, texts)
        return used

    used = fill("train", seen)
    seen = {term: [features for features in seen[term] if used[term, features]] for term in seen}
    known = {term: {feature for features in seen[term] for feature in features} for term in seen}
    fill("validation", seen)
    fill("test_seen", seen)
    held_out = {term: [pair for pair in held_out[term] if known[term].issuperset(pair)] for term in seen}
    fill("test_held_out", held_out)
    fill("test_longer", {term: _longer(lexicon, term, known[term], held_out[term], rng) for term in seen})
    return rows


def _feature_sets(lexicon: Lexicon, term: str, share: float, rng: random.Random) -> tuple[list, list]:
    """The single features and the pairs that name this term alone, for train and held out."""
    genus = lexicon.genus[term]
    features = lexicon.terms[term]
    singles = [(feature,) for feature in features if lexicon.terms_with(genus, (feature,)) == [term]]
    pairs = [pair for pair in combinations(features, 2) if lexicon.terms_with(genus, pair) == [term]]
    seen = singles + pairs
    rng.shuffle(seen)
    telling = {feature for single in singles for feature in single}
    candidates = [pair for pair in seen if len(pair) == 2 and telling.isdisjoint(pair)]
    wanted = max(1, int(share * len(candidates)))
    uses = Counter(feature for chosen in seen for feature in chosen)
    held_out: list[tuple[str, ...]] = []
    for pair in candidates:
        if len(held_out) < wanted and all(uses[feature] > 1 for feature in pair):
            held_out.append(pair)
            uses.subtract(pair)
    return [chosen for chosen in seen if chosen not in held_out], held_out


def _longer(lexicon: Lexicon, term: str, known: set[str], held_out: list, rng: random.Random) -> list:
    """Three or four of the known features that name the term alone, without a held-out pair among them."""
    features = [feature for feature in lexicon.terms[term] if feature in known]
    sets = [chosen for size in (3, 4) for chosen in combinations(features, size)
            if not any(set(pair) <= set(chosen) for pair in held_out)
            and lexicon.terms_with(lexicon.genus[term], chosen) == [term]]
    rng.shuffle(sets)
    return sets


def _fill(
    split: str, size: int, choices: dict[str, list[tuple[str, ...]]], lexicon: Lexicon,
    write: Callable[[str], str], rng: random.Random, texts: set[str],
) -> tuple[list[dict], Counter]:
    """Rows with new texts, terms and each term's feature sets taking turns; how often each set was used."""
    order = [term for term, sets in choices.items() if sets]
    rng.shuffle(order)
    rows: list[dict] = []
    used: Counter = Counter()
    turn, last = 0, -1
    while len(rows) < size:
        if len(rows) == last:
            raise ValueError(f"the lexicon gives only {last} definitions for split {split!r}, not {size}; "
                             "lower its size or add terms")
        last = len(rows)
        for term in order[: size - len(rows)]:
            features = choices[term][turn % len(choices[term])]
            for _ in range(TRIES):
                text, phrases = read_brackets(write(_worded(lexicon, lexicon.genus[term], features, rng)))
                if text not in texts:
                    texts.add(text)
                    used[term, features] += 1
                    rows.append({"item_id": f"{TASK}/{split}/{len(rows):05d}", "text": text, "target": term,
                                 "phrases": phrases, "group": term})
                    break
        turn += 1
    return rows, used


def _worded(lexicon: Lexicon, genus: str, features: tuple[str, ...], rng: random.Random) -> str:
    """One wording with its phrases in brackets: "[A small bird] [that eats fish] and [swims well]"."""
    adjectives = [feature for feature in features if feature in lexicon.adjectives]
    others = [feature for feature in features if feature not in lexicon.adjectives]
    rng.shuffle(others)
    most = 2 if others else len(adjectives) - 1  # a definition never is its genus phrase alone
    before = [adjective for adjective in adjectives if rng.random() < 0.7][:most]
    before.sort(key=lexicon.adjectives.index)
    noun = " ".join([*before, genus])
    phrases = [f"[{_opening(noun, rng)}]"]
    if others and rng.random() < 0.5:
        if others[0].startswith("has "):
            phrases.append(f"[with {others.pop(0).removeprefix('has ')}]")
        elif others[0].startswith("is "):
            phrases.append(f"[{others.pop(0).removeprefix('is ')}]")
    clauses = others + [f"is {adjective}" for adjective in adjectives if adjective not in before]
    rng.shuffle(clauses)
    if clauses:
        pronoun = rng.choice(["that", "that", "which"])
        first, *rest = clauses
        clause = f"[{pronoun} {first}]"
        if rest:
            clause += "".join(f", [{middle}]" for middle in rest[:-1]) + f" and [{rest[-1]}]"
        phrases.append(clause)
    return " ".join(phrases)


def _opening(noun: str, rng: random.Random) -> str:
    article = "An" if noun[0] in "aeiou" else "A"
    return rng.choice([f"{article} {noun}"] * 4 + [f"Any {noun}", f"A kind of {noun}"])
