"""Synonyms chosen in context by a pretrained language model, one fixed scorer for all models that are compared.

A candidate is a lemma of WordNet that shares a sense with the word, or whose sense lies beside it (similar adjectives,
hypernyms). One forward pass scores all candidates of a text: the text is the trunk of a tree of tokens, a candidate
with the words after it is a branch, and a token sees only its ancestors. The score of a candidate is a log-odds

    w · (log-likelihood against the word's, log-likelihood after text + ' "word" means "', cosines of the states of the
         next tokens, of the last of them, and of both words after the text, beside, relative frequency, adjective,
         agreement) + b

with weights of a logistic regression on 230 substitutions in SST's validation sentences and WordNet's definitions that
a language model had read and called good or bad; the weight of the agreement was set on 165 more. The margin between
senses that both words share and others, as cosines of states with glosses, told nothing there (area under the curve
0.49) and is left out. Own method.

In 100 test sentences of SST and 100 definitions (seed 2, read blindly by a language model among the changes of other
sources), 25 % made 79 % of the requested changes, and 38 of 200 read badly; 40 % made 65 %, about 22 % badly. Of the
gate of `wordnet.synonyms`, 37 % were made at 25 %, 12 of 60 badly; of the first lemma of any sense, 21 of 40 badly.
That was read under rules 3; since then more words are held (`grammar`), and nobody has read again.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from carma_lib.files import fingerprint
from carma_lib.synonyms.articles import agree, article_before
from carma_lib.synonyms.cache import read_rows, write_rows
from carma_lib.synonyms.grammar import fixed_words
from carma_lib.synonyms.tagging import Word, entry_of, is_content, tagged_words
from carma_lib.synonyms.wordnet import (
    FUNCTION_WORDS, inflect, is_coarse, is_dated, lemmas_of, one_thread_at_a_time, part_of_speech_of, remembered,
    sense_shares, tagged_uses, usual_part_of_speech, wordnet)

SCORER = "smollm2-135m"  # dequantised 4-bit weights, see `carma_lib.models.pretrained`
RULES = 5  # part of every cache key: raise it with any change of candidates or scores
TAIL = 5  # tokens after a candidate that are compared
MOST = 5  # candidates of a word that are scored
BLOCK = 100  # texts a cache file
WEIGHTS = (0.185, 0.197, 11.112, 16.532, 2.702, -0.847, -0.168, 0.953, 2.5)
BIAS = -27.318

Ranked = dict[int, list[tuple[str, float]]]  # place of a word in `tagged_words` → candidates and scores, best first


class Candidate(NamedTuple):
    """A form, whether its sense only lies beside the word's, log of its tagged uses over the word's, and the agreement
    of both words on the shared senses (product of their shares, see `wordnet.synonyms`; 0 beside)."""
    form: str
    beside: bool
    frequency: float
    agreement: float


@remembered
def candidates(form: str, tag: str) -> tuple[Candidate, ...]:
    """The MOST likeliest candidates of a lower-case form with this Penn tag, from WordNet alone.

    They are sorted by (share of the word's uses in the shared senses + 0.02) · √(the candidate's share + 0.02) ·
    log(2 + its uses), times 0.4 if it lies beside. One that was never tagged stays only if the word was not either.
    """
    letter, found = part_of_speech_of(tag), {}
    if letter is None or not usual_part_of_speech(form, letter):
        return ()
    for lemma in lemmas_of(form, letter):
        if form != inflect(lemma, tag):
            continue
        own, own_uses = sense_shares(lemma, letter), sum(tagged_uses(lemma, letter).values())
        for name, (pairs, beside) in _related(lemma, letter).items():
            written, uses = inflect(name, tag), sum(tagged_uses(name, letter).values())
            if not written or written == form or is_coarse(written) or (own_uses and not uses):
                continue
            share = sum(sense_shares(name, letter)[theirs] for theirs in dict.fromkeys(theirs for _, theirs in pairs))
            own_share = sum(own[mine] for mine in dict.fromkeys(mine for mine, _ in pairs))
            worth = ((own_share + 0.02) * math.sqrt(share + 0.02) * math.log(2 + uses)
                     * (0.4 if beside else 1))
            if worth > found.get(written, (0,))[0]:
                found[written] = worth, Candidate(written, beside, math.log((uses + 1) / (own_uses + 1)),
                                                   0.0 if beside else own_share * share)
    return tuple(found[each][1] for each in sorted(found, key=lambda each: (-found[each][0], each))[:MOST])


def _related(lemma: str, letter: str) -> dict[str, tuple[list[tuple[str, str]], bool]]:
    """Other lemma → pairs (sense of `lemma`, sense of the other), and whether they only lie beside each other."""
    found: dict[str, tuple[list[tuple[str, str]], bool]] = {}
    for beside in (False, True):
        for name in sense_shares(lemma, letter):
            synset = wordnet().synset(name)
            for other in [*synset.similar_tos(), *synset.hypernyms()] if beside else [synset]:
                for each in other.lemmas():
                    if _usable(each, lemma, letter) and not (beside and not found.get(each.name(), ((), True))[1]):
                        found.setdefault(each.name(), ([], beside))[0].append((name, other.name()))
    return found


def _usable(candidate: Any, word: str, letter: str) -> bool:
    name = candidate.name()
    return (len(name) > 2 and name.isalpha() and name.islower() and name != word and name not in FUNCTION_WORDS
            and not is_coarse(name) and not is_dated(candidate) and lemmas_of(name, letter) == (name,))


def ranked_candidates(texts: Sequence[str], *, cache_dir: str | Path | None = None) -> dict[str, Ranked]:
    """Every text → its words' candidates with scores, with a progress bar and an optional cache on disk.

    cache_dir: folder of Parquet files of BLOCK texts, found again by the scorer, the rules and the texts; a damaged
        file is made again. The first text that is not in the cache loads the scorer (and fetches it, see
        `carma_lib.models.load_model`, which tells what it may raise).
    """
    from tqdm import tqdm

    distinct, found = list(dict.fromkeys(texts)), {}
    with tqdm(total=len(distinct), desc="ranking synonyms", delay=2) as bar:
        for first in range(0, len(distinct), BLOCK):
            block = distinct[first:first + BLOCK]
            path = Path(cache_dir) / f"ranked-{fingerprint(SCORER, RULES, block)}.parquet" if cache_dir else None
            rows = read_rows(path) if path else None
            if rows is None:
                rows = []
                for number, text in enumerate(block):
                    rows += [{"text": number, "place": place, "form": form, "score": score}
                             for place, pairs in rank(text).items() for form, score in pairs]
                    bar.update()
                if path:
                    write_rows(path, rows)
            else:
                bar.update(len(block))
            found.update((text, {}) for text in block)
            for row in rows:
                found[block[row["text"]]].setdefault(row["place"], []).append((row["form"], row["score"]))
    return found


def rank(text: str) -> Ranked:
    """The candidates of one text's words with their scores."""
    words = tagged_words(text)
    held = fixed_words(words)
    places = {i: candidates(entry_of(word.form), word.tag) for i, word in enumerate(words)
              if i not in held and is_content(word)}
    places = {i: found for i, found in places.items() if found}
    return scorer().rank(text, words, places) if places else {}


@one_thread_at_a_time
@cache
def scorer() -> Scorer:
    """The one scorer, loaded once."""
    from carma_lib.models import load_model

    return Scorer(*load_model(SCORER))


class Scorer:
    """A causal language model of the Llama family and its tokenizer, which score candidates of words in texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def run(self, tokens: list[int], parents: list[int]) -> tuple[Any, Any]:
        """States before the last block (tokens × width), and the log-likelihood of each token after its ancestors.

        parents: place of the token before each, itself before it; -1 for the first, which has no likelihood.
        """
        import torch

        from carma_lib.models import native_bf16

        sees, depths = torch.zeros(len(tokens), len(tokens), dtype=torch.bool), []
        for place, parent in enumerate(parents):
            if parent >= 0:
                sees[place] = sees[parent]
            sees[place, place] = True
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        device = self.model.device
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=native_bf16()):
            out = self.model.model(
                input_ids=torch.tensor([tokens], device=device), attention_mask=sees[None, None].to(device),
                position_ids=torch.tensor([depths], device=device), output_hidden_states=True, use_cache=False)
            logits = self.model.lm_head(out.last_hidden_state[0][parents]).float()
            likely = logits.gather(-1, torch.tensor(tokens, device=device)[:, None])[:, 0] - logits.logsumexp(-1)
        return out.hidden_states[-2][0].float().cpu(), likely.cpu()

    def rank(self, text: str, words: Sequence[Word], places: dict[int, tuple[Candidate, ...]]) -> Ranked:
        """Candidates at places of `words` → the same with scores, best first."""
        import torch

        text = text if text.rstrip()[-1:] in ".!?" else f"{text} ."
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        tokens, parents, spans = [0, *encoded["input_ids"]], list(range(-1, len(offsets))), {}
        end = len(tokens) - 1

        def grow(parent: int, branch: list[int]) -> range:
            first = len(tokens)
            tokens.extend(branch)
            parents.extend([parent, *range(first, first + len(branch) - 1)])
            return range(first, first + len(branch))

        for place, found in places.items():
            word, article = words[place], article_before(text, words, place)
            begin = len(text[:article.start if article else word.start].rstrip(" "))
            parent = sum(stop <= begin for _, stop in offsets)
            after = [stop for _, stop in offsets if stop > word.end][:TAIL]
            asked = grow(end, self._tokens(f' "{word.form.lower()}" means "'))[-1]
            for form in [word.form.lower(), *(each.form for each in found)]:
                lead, written = text[begin:word.start], form.capitalize() if word.form[0].isupper() else form
                if article:
                    lead = lead.replace(article.form, agree(article.form, written), 1)
                branch = grow(parent, self._tokens(lead + written + (text[word.end:after[-1]] if after else "")))
                own = len(branch) - min(len(after), len(branch) - 1)
                spans[place, form] = (branch[:own], branch[own:], grow(asked, self._tokens(form)),
                                      grow(end, self._tokens(f" {form}")))
        states, likely = self.run(tokens, parents)
        states = torch.nn.functional.normalize(states - states[:end + 1].mean(0), dim=-1)
        return {place: sorted(((each.form, self._score(spans, place, words[place], each, states, likely))
                               for each in found), key=lambda pair: (-pair[1], pair[0]))
                for place, found in places.items()}

    @staticmethod
    def _score(spans: dict, place: int, word: Word, candidate: Candidate, states: Any, likely: Any) -> float:
        own, tail, meant, echo = spans[place, candidate.form]
        own_before, tail_before, _, echo_before = spans[place, word.form.lower()]
        length = min(len(tail), len(tail_before))
        cosines = [float(states[one] @ states[two]) for one, two in zip(tail[:length], tail_before[:length])] or [1.0]
        gain = float(likely[list(own)].sum() - likely[list(own_before)].sum())
        features = (max(-8.0, min(6.0, gain)), max(-14.0, float(likely[list(meant)].sum())),
                    sum(cosines) / len(cosines), cosines[-1], float(states[echo[-1]] @ states[echo_before[-1]]),
                    float(candidate.beside), candidate.frequency, float(word.tag[0] == "J"), candidate.agreement)
        return BIAS + sum(weight * value for weight, value in zip(WEIGHTS, features))
