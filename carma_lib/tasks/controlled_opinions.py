"""Opinions → sentiment: short sentences from the controlled lexicon, worded by a seeded grammar.

The label of a clause:
    plain, intensified, downtoned   the polarity of its word ("rather good" stays positive)
    negated positive word           negative ("was not convincing", "failed to impress us")
    negated negative word           neutral ("was not bad" neither praises nor blames)
    neither … nor …                 neutral
The label of a sentence:
    conjunction "A and B"           A and B have one label, the sentence has it too
    contrast "A, but B"             that of B
    concession "although A, B", "B, although A", "despite the bland soup, B"    that of B, the main clause
    longer: "although A, B, but C" → C; "A and B, but C" → C; "A, but although B, C" → C; "C, although A and B" → C
"""
from __future__ import annotations

import random
from dataclasses import dataclass

from carma_lib.tasks.controlled import LABELS, Lexicon, SynonymChoice, check_sizes, read_brackets

TASK = "controlled_sentiment"
SIZES = {"train": 4000, "validation": 500, "test_seen": 600, "test_held_out": 600, "test_longer": 600}
CLAUSES = {  # label → (construct, polarity of its word)
    "positive": [("plain", "positive"), ("intensified", "positive"), ("downtoned", "positive")],
    "neutral": [("plain", "neutral"), ("downtoned", "neutral"), ("negated", "negative"), ("neither", "positive")],
    "negative": [("plain", "negative"), ("intensified", "negative"), ("downtoned", "negative"),
                 ("negated", "positive")],
}
SENTENCES = ("single", "conjunction", "contrast", "concession")
CONSTRUCTS = ("plain", "intensified", "downtoned", "negated", "neither", *SENTENCES[1:])
SUBORDINATORS = ("although", "though", "even though")
TRIES = 2000  # sentences drawn for one row before the split counts as exhausted


@dataclass(frozen=True)
class Clause:
    """A worded clause, and the (construct, word) combination that it is made with."""

    subject: str
    predicate: str
    construct: str
    word: str

    def __str__(self) -> str:
        return f"[{self.subject}] [{self.predicate}]"


def sentiment_rows(
    lexicon: Lexicon, *, seed: int, sizes: dict[str, int] | None = None, synonym_rate: float = 0.3,
    held_out_share: float = 0.2,
) -> dict[str, list[dict]]:
    """Rows of the controlled sentiment task, by split; the labels take turns, so each split is balanced.

    A combination is a construct (plain, intensified, …, contrast, concession) with an opinion word, its synonyms
    included. No text stands in two splits.

    train, validation, test_seen  one or two clauses, no held-out combination
    test_held_out                 one or two clauses; the clause that decides the label is a held-out combination
    test_longer                   three clauses, no held-out combination

    seed            same seed, same rows
    sizes           rows by split, put over `SIZES`
    synonym_rate    share of the words with synonyms that are written as one of them
    held_out_share  share of the combinations kept for test_held_out

    Raises ValueError for an unknown split, a size below 1 or above what the lexicon can give, or a bad share.
    """
    sizes = check_sizes(sizes or {}, SIZES)
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must lie between 0 and 1, got {held_out_share}")
    rng = random.Random(f"{TASK}/{seed}")
    write = SynonymChoice(lexicon.synonyms, synonym_rate, rng)
    held_out = held_out_combinations(lexicon, held_out_share, rng)
    texts: set[str] = set()
    rows: dict[str, list[dict]] = {}
    for split, size in sizes.items():
        rows[split] = []
        for index in range(size):
            label = LABELS[index % len(LABELS)]
            for _ in range(TRIES):
                marked, deciding, used = _sentence(lexicon.opinions, label, split == "test_longer", rng)
                wanted = deciding & held_out if split == "test_held_out" else not used & held_out
                text, phrases = read_brackets(write(marked)) if wanted else ("", [])
                if text and text not in texts:
                    break
            else:
                raise ValueError(f"the lexicon gives only {index} opinions for split {split!r}, {size} are asked for; "
                                 "lower its size or add words")
            texts.add(text)
            rows[split].append({"item_id": f"{TASK}/{split}/{index:05d}", "text": text[0].upper() + text[1:],
                                "target": label, "phrases": phrases, "group": text})
    return rows


def held_out_combinations(lexicon: Lexicon, share: float, rng: random.Random) -> set[tuple[str, str]]:
    """A share of all (construct, word) combinations, so that no word loses more than half of its constructs."""
    combinations = [(construct, word) for word, kind in _words(lexicon.opinions).items()
                    for construct in CONSTRUCTS if _possible(construct, kind)]
    rng.shuffle(combinations)
    left = {word: sum(word == other for _, other in combinations) // 2 for _, word in combinations}
    held_out: set[tuple[str, str]] = set()
    for construct, word in combinations:
        if left[word] and len(held_out) < share * len(combinations):
            held_out.add((construct, word))
            left[word] -= 1
    return held_out


def _words(opinions: dict) -> dict[str, tuple[str, str]]:
    """Opinion word → its polarity and its kind: gradable, strong or verb."""
    words = {}
    for label in LABELS:
        kinds = opinions[label]
        own = [word for domain in opinions["domains"].values() for word in domain.get(label, [])]
        words |= {word: (label, "gradable") for word in [*kinds["gradable"], *own]}
        words |= {word: (label, "strong") for word in kinds["strong"]}
        words |= {word: (label, "verb") for word in kinds["verbs"]}
    return words


def _possible(construct: str, polarity_and_kind: tuple[str, str]) -> bool:
    """Only gradable words are downtoned or joined by "neither … nor", and nothing neutral is stressed or negated."""
    polarity, kind = polarity_and_kind
    if construct == "downtoned":
        return kind == "gradable"
    if construct == "neither":
        return kind == "gradable" and polarity == "positive"
    return polarity != "neutral" or construct not in ("intensified", "negated")


def _sentence(opinions: dict, label: str, longer: bool, rng: random.Random) -> tuple[str, set, set]:
    """A sentence in brackets, the combinations of the clause that decides its label, and all combinations."""
    domain = opinions["domains"][rng.choice(list(opinions["domains"]))]
    subjects = [f"the {aspect}" for aspect in rng.sample(domain["aspects"], 3)]
    if rng.random() < 0.5:
        subjects[0] += f" {domain['frame']}"
    if longer:
        return _longer(opinions, domain, subjects, label, rng)
    kind = rng.choice(SENTENCES)
    main = _clause(opinions, domain, subjects[0], label, rng)
    deciding = {(main.construct, main.word)}
    if kind == "single":
        return str(main), deciding, deciding
    other_label = label if kind == "conjunction" else rng.choice([other for other in LABELS if other != label])
    other = _clause(opinions, domain, subjects[1], other_label, rng)
    deciding.add((kind, main.word))
    used = deciding | {(other.construct, other.word), (kind, other.word)}
    if kind == "conjunction":
        return f"{main} and {other}", deciding, used
    if kind == "contrast":
        return f"{other}, but {main}", deciding, used
    if other.construct == "plain" and other.predicate == f"was {other.word}" and rng.random() < 0.5:
        return f"[despite {other.subject.replace('the', f'the {other.word}', 1)}], {main}", deciding, used
    although = rng.choice(SUBORDINATORS)
    marked = f"{although} {other}, {main}" if rng.random() < 0.5 else f"{main}, {although} {other}"
    return marked, deciding, used


def _longer(opinions: dict, domain: dict, subjects: list[str], label: str, rng: random.Random) -> tuple[str, set, set]:
    """Three clauses; the label is that of the clause after "but", or of the one that "although" does not open."""
    other_label = rng.choice([other for other in LABELS if other != label])
    main = _clause(opinions, domain, subjects[0], label, rng)
    first = _clause(opinions, domain, subjects[1], other_label, rng)
    second = _clause(opinions, domain, subjects[2], other_label, rng)
    although = rng.choice(SUBORDINATORS)
    marked = rng.choice([
        f"{although} {first}, {second}, but {main}",
        f"{first} and {second}, but {main}",
        f"{first}, but {although} {second}, {main}",
        f"{main}, {although} {first} and {second}",
    ])
    used = {(clause.construct, clause.word) for clause in (main, first, second)}
    return marked, {(main.construct, main.word)}, used


def _clause(opinions: dict, domain: dict, subject: str, label: str, rng: random.Random) -> Clause:
    """A clause of this label about this subject."""
    construct, polarity = rng.choice(CLAUSES[label])
    words = [(word, kind) for word, (own, kind) in _words_of(opinions, domain, polarity).items()
             if _possible(construct, (own, kind))]
    word, kind = rng.choice(words)
    if kind == "verb":
        base = opinions[polarity]["verbs"][word]
        predicate = {"plain": word, "intensified": f"really {word}",
                     "negated": rng.choice([f"did not {base}", f"failed to {base}"])}[construct]
        return Clause(subject, f"{predicate} {rng.choice(['us', 'me', 'everyone'])}", construct, word)
    was = "was" if construct == "negated" else rng.choice(["was", "was", "seemed"])
    if construct == "intensified":
        adverb = rng.choice(["really", "very" if kind == "gradable" else "absolutely"])
        word_phrase = f"{adverb} {word}"
    elif construct == "downtoned":
        word_phrase = f"rather {word}"
    elif construct == "negated":
        word_phrase = f"{rng.choice(['not', 'not', 'never', 'hardly'])} {word}"
    elif construct == "neither":
        bad = rng.choice([*opinions["negative"]["gradable"], *domain["negative"]])
        word_phrase = f"neither {word} nor {bad}"
    else:
        word_phrase = word
    return Clause(subject, f"{was} {word_phrase}", construct, word)


def _words_of(opinions: dict, domain: dict, polarity: str) -> dict[str, tuple[str, str]]:
    return _words({**opinions, "domains": {"": domain}}) if polarity == "all" else {
        word: found for word, found in _words({**opinions, "domains": {"": domain}}).items() if found[0] == polarity}
