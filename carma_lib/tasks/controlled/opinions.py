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
    longer: "although A, B, but C", "A and B, but C", "A, but although B, C", "C, although A and B"  that of C
"""
from __future__ import annotations

import random
from typing import NamedTuple

from carma_lib.tasks.controlled.lexicon import LABELS, Lexicon, SynonymChoice, read_brackets

TASK = "controlled_sentiment"
SIZES = {"train": 4000, "validation": 500, "test_seen": 600, "test_held_out": 600, "test_longer": 600}
CLAUSES = {  # label → (construct, polarity of its word)
    "positive": [("plain", "positive"), ("intensified", "positive"), ("downtoned", "positive")],
    "neutral": [("plain", "neutral"), ("downtoned", "neutral"), ("negated", "negative"),
                ("neither", "positive")],
    "negative": [("plain", "negative"), ("intensified", "negative"), ("downtoned", "negative"),
                 ("negated", "positive")],
}
COMPOUNDS = ("conjunction", "contrast", "concession")
CONSTRUCTS = ("plain", "intensified", "downtoned", "negated", "neither", *COMPOUNDS)
SUBORDINATORS = ("although", "though", "even though")
HELD_OUT_SHARE = 0.2  # of the combinations kept for test_held_out
TRIES = 2000  # sentences drawn for one row before the split counts as exhausted

Combination = tuple[str, str]  # construct, opinion word


class Word(NamedTuple):
    """An opinion word: polarity is a label, kind is gradable, strong or verb."""

    text: str
    polarity: str
    kind: str

    def fits(self, construct: str) -> bool:
        """Only gradable words are downtoned or follow "neither"; no neutral one is intensified or negated."""
        if construct == "downtoned":
            return self.kind == "gradable"
        if construct == "neither":
            return self.kind == "gradable" and self.polarity == "positive"
        return self.polarity != "neutral" or construct not in ("intensified", "negated")


class Clause(NamedTuple):
    """A worded clause, and the combination that it is made with."""

    subject: str
    predicate: str
    construct: str
    word: str

    def __str__(self) -> str:
        return f"[{self.subject}] [{self.predicate}]"


class Opinion(NamedTuple):
    """A sentence, its phrases in brackets; combinations of the deciding clause, and all."""

    marked: str
    deciding: set[Combination]
    used: set[Combination]


def sentiment_rows(
    lexicon: Lexicon, *, seed: int, sizes: dict[str, int] | None = None,
) -> dict[str, list[dict]]:
    """Rows of the controlled sentiment task, by split; the labels take turns, so each split is balanced.

    A combination is a construct (plain, intensified, …, contrast, concession) with an opinion word, its
    synonyms included. No text stands in two splits.

    train, validation, test_seen  one or two clauses, no held-out combination
    test_held_out                 one or two clauses; the one that decides the label is a held-out combination
    test_longer                   three clauses, no held-out combination

    seed            same seed, same rows
    sizes           rows by split, put over `SIZES`

    Raises ValueError for a size above what the lexicon can give.
    """
    sizes = {**SIZES, **(sizes or {})}
    rng = random.Random(f"{TASK}/{seed}")
    write = SynonymChoice(lexicon.synonyms, rng)
    grammar = _Grammar(lexicon.opinions, rng)
    held_out = _held_out(grammar.words, HELD_OUT_SHARE, rng)
    texts: set[str] = set()
    rows: dict[str, list[dict]] = {}
    for split, size in sizes.items():
        rows[split] = []
        hold = split == "test_held_out"
        for index in range(size):
            label = LABELS[index % len(LABELS)]
            for _ in range(TRIES):
                opinion = grammar.longer(label) if split == "test_longer" else grammar.sentence(label)
                combinations = opinion.deciding if hold else opinion.used
                if combinations.isdisjoint(held_out) == hold:
                    continue
                text, phrases = read_brackets(write(opinion.marked))
                text = text[0].upper() + text[1:]
                if text not in texts:
                    break
            else:
                raise ValueError(f"the lexicon gives only {index} opinions for split {split!r}, not {size}; "
                                 "lower its size or add words")
            texts.add(text)
            rows[split].append({"item_id": f"{TASK}/{split}/{index:05d}", "text": text, "target": label,
                                "phrases": phrases, "group": text})
    return rows


def _held_out(words: dict[str, Word], share: float, rng: random.Random) -> set[Combination]:
    """A share of all combinations, so that no word loses more than half of its constructs.

    Plain use stays in train, and so do negated verbs ("did not impress us"), whose base stands nowhere else.
    """
    combinations = [(construct, word.text) for word in words.values() for construct in CONSTRUCTS[1:]
                    if word.fits(construct) and (construct, word.kind) != ("negated", "verb")]
    rng.shuffle(combinations)
    can_lose = {text: sum(text == other for _, other in combinations) // 2 for text in words}
    held_out: set[Combination] = set()
    for construct, text in combinations:
        if can_lose[text] and len(held_out) < share * len(combinations):
            held_out.add((construct, text))
            can_lose[text] -= 1
    return held_out


class _Grammar:
    """Draws sentences of a wanted label from the lexicon's section `opinions`."""

    def __init__(self, opinions: dict, rng: random.Random):
        self.rng = rng
        self.domains = list(opinions["domains"].values())
        self.general = {label: opinions[label] for label in LABELS}
        self.words: dict[str, Word] = {}
        for label, kinds in self.general.items():
            own = [text for domain in self.domains for text in domain.get(label, [])]
            for kind, texts in (("gradable", [*kinds["gradable"], *own]), ("strong", kinds["strong"]),
                                ("verb", kinds["verbs"])):
                self.words |= {text: Word(text, label, kind) for text in texts}

    def sentence(self, label: str) -> Opinion:
        """One or two clauses."""
        domain, subjects = self._about()
        kind = self.rng.choice(("single", *COMPOUNDS))
        main = self._clause(domain, subjects[0], label)
        deciding = {(main.construct, main.word)}
        if kind == "single":
            return Opinion(str(main), deciding, deciding)
        other = self._clause(domain, subjects[1], label if kind == "conjunction" else self._other(label))
        deciding.add((kind, main.word))
        used = deciding | {(other.construct, other.word), (kind, other.word)}
        if kind == "conjunction":
            return Opinion(f"{main} and {other}", deciding, used)
        if kind == "contrast":
            return Opinion(f"{other}, but {main}", deciding, used)
        although = self.rng.choice(SUBORDINATORS)
        forms = [f"{although} {other}, {main}", f"{main}, {although} {other}"]
        if other.predicate == f"was {other.word}":
            forms.append(f"[despite the {other.word} {other.subject.removeprefix('the ')}], {main}")
        return Opinion(self.rng.choice(forms), deciding, used)

    def longer(self, label: str) -> Opinion:
        """Three clauses; each word counts as used in contrast, concession and conjunction."""
        domain, subjects = self._about()
        main = self._clause(domain, subjects[0], label)
        first, second = (self._clause(domain, subject, self._other(label)) for subject in subjects[1:])
        although = self.rng.choice(SUBORDINATORS)
        marked = self.rng.choice([
            f"{although} {first}, {second}, but {main}",
            f"{first} and {second}, but {main}",
            f"{first}, but {although} {second}, {main}",
            f"{main}, {although} {first} and {second}",
        ])
        used = {(construct, clause.word) for clause in (main, first, second)
                for construct in (clause.construct, *COMPOUNDS)}
        return Opinion(marked, {(main.construct, main.word)}, used)

    def _about(self) -> tuple[dict, list[str]]:
        """A domain and three subjects of it; where the first one is may be said."""
        domain = self.rng.choice(self.domains)
        first, *others = (f"the {aspect}" for aspect in self.rng.sample(domain["aspects"], 3))
        return domain, [self.rng.choice([first, f"{first} {domain['frame']}"]), *others]

    def _other(self, label: str) -> str:
        return self.rng.choice([other for other in LABELS if other != label])

    def _clause(self, domain: dict, subject: str, label: str) -> Clause:
        construct, polarity = self.rng.choice(CLAUSES[label])
        texts = [text for kind in self.general[polarity].values() for text in kind] + domain.get(polarity, [])
        word = self.rng.choice([word for word in map(self.words.get, texts) if word.fits(construct)])
        if word.kind == "verb":
            return Clause(subject, self._verb(word, construct), construct, word.text)
        return Clause(subject, self._adjective(word, construct, domain), construct, word.text)

    def _verb(self, word: Word, construct: str) -> str:
        base = self.general[word.polarity]["verbs"][word.text]
        verb = {"plain": word.text, "intensified": f"really {word.text}",
                "negated": self.rng.choice([f"did not {base}", f"failed to {base}"])}[construct]
        return f"{verb} {self.rng.choice(['us', 'me', 'everyone'])}"

    def _adjective(self, word: Word, construct: str, domain: dict) -> str:
        negative = self.rng.choice([*self.general["negative"]["gradable"], *domain["negative"]])
        stress = self.rng.choice(["really", "very" if word.kind == "gradable" else "absolutely"])
        if construct == "negated":
            return f"was {self.rng.choice(['not', 'not', 'never', 'hardly'])} {word.text}"
        return self.rng.choice(["was", "was", "seemed"]) + {
            "plain": f" {word.text}",
            "intensified": f" {stress} {word.text}",
            "downtoned": f" rather {word.text}",
            "neither": f" neither {word.text} nor {negative}",
        }[construct]
