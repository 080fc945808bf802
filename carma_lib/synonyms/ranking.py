"""Synonyms chosen in context by a pretrained language model, one fixed scorer for all models that are compared.

A candidate is a lemma of WordNet that shares a sense with the word, or whose sense lies beside it (similar adjectives,
hypernyms). One forward pass scores all candidates of a text (of a long one, several passes): the text is the trunk of a tree of tokens, a candidate
with the words after it is a branch, and a token sees only its ancestors. The score of a candidate is a log-odds, the
sum of `WEIGHTS` times their values, and `BIAS`.

The weights are those of a logistic regression on 1,600 substitutions in 435 of SST's validation sentences and WordNet's
validation definitions, which eight readers, sessions of a language model, had called good or bad (41 % good; area under
the curve on texts left out: 0.80). Own method.

Quality in 100 test sentences of SST and 100 test definitions: at rate 0.25, 83 % of the requested changes were made, and
30 % of the 306 read badly (95 % interval 25 to 35 %); at rate 0.4, 70 % were made, and 33 % read badly. Two more such
readers judged every change without its source, and agreed on 97 %. They were strict: of the unranked changes of
`wordnet.synonyms`, which are 38 % of those requested at 0.25, they called 27 % bad, and of 80 first lemmas 79 %.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
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
RULES = 6  # part of every cache key: raise it with any change of candidates or scores
TAIL = 12  # tokens after a candidate that are compared
MOST = 5  # candidates of a word that are scored
BLOCK = 100  # texts a cache file
TOKENS = 4096  # of one pass, text and branches; a sentence of 50 words has 1,800
#: The fitted weights of what speaks for a candidate. Likelihoods are logarithms, kept in bounds.
WEIGHTS = {
    "candidate": 0.163,  # likelihood of the candidate in its place, from -15
    "word": -0.063,  # of the word in its place, from -15
    "after": 0.179,  # of the next tokens after the candidate, over that after the word, -5 to 5
    "synonym": 0.147,  # of the candidate after the text and ' A synonym of "word" in this sentence is "', from -14
    "states": 10.874,  # mean cosine of the next tokens' states with those after the word
    "embeddings": 1.697,  # cosine of both words' last tokens' embeddings, less the text's mean
    "word_share": 0.257,  # logarithm of the word's share of uses in the shared senses
    "candidate_share": 0.177,  # the same of the candidate
    "agreement": 0.775,  # product of both shares, 0 beside
    "hypernym": -0.589,  # 1 if the candidate's sense is a hypernym of the word's
    "senses": -0.142,  # logarithm of 1 + the word's number of senses
    "word_tokens": 0.507,
    "candidate_tokens": 0.517,
}
BIAS = -9.795

Ranked = dict[int, list[tuple[str, float]]]  # place of a word in `tagged_words` → candidates and scores, best first


class Candidate(NamedTuple):
    """A form, whether its sense only lies beside the word's, the shares of the word's and of the candidate's uses in the
    shared senses (`wordnet.sense_shares`), and the word's number of senses."""
    form: str
    beside: bool
    word_share: float
    candidate_share: float
    senses: int


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
                found[written] = worth, Candidate(written, beside, own_share, share, len(own))
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

    cache_dir: folder of Parquet files of BLOCK texts, found again by the scorer, the rules, the texts and the versions
        of WordNet, textblob and lemminflect; a damaged file is made again. The first text that is not in the cache
        loads the scorer (and fetches it, see `carma_lib.models.load_model`, which tells what it may raise).
    """
    from tqdm import tqdm

    distinct, found = list(dict.fromkeys(texts)), {}
    made_by = SCORER, RULES, wordnet().get_version(), version("textblob"), version("lemminflect")
    with tqdm(total=len(distinct), desc="ranking synonyms", delay=2) as bar:
        for first in range(0, len(distinct), BLOCK):
            block = distinct[first:first + BLOCK]
            path = Path(cache_dir) / f"ranked-{fingerprint(*made_by, block)}.parquet" if cache_dir else None
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
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=native_bf16(device.type)):
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
            spoken = word.form.lower()
            asked = grow(end, self._tokens(f' A synonym of "{spoken}" in this sentence is "'))[-1]
            for form in [spoken, *(each.form for each in found)]:
                lead, written = text[begin:word.start], form.capitalize() if word.form[0].isupper() else form
                if article:
                    lead = lead.replace(article.form, agree(article.form, written), 1)
                branch = grow(parent, self._tokens(lead + written + (text[word.end:after[-1]] if after else "")))
                own = len(branch) - min(len(after), len(branch) - 1)
                named = grow(asked, self._tokens(form) + self._tokens('"')) if form != spoken else ()
                spans[place, form] = _Spans(list(branch[:own]), list(branch[own:]), list(named))
        if len(tokens) > TOKENS and len(places) > 1:  # memory grows with the square of what one run reads
            both = list(places.items())
            return {**self.rank(text, words, dict(both[:len(both) // 2])), **self.rank(text, words, dict(both[len(both) // 2:]))}
        states, likely = self.run(tokens, parents)
        states = torch.nn.functional.normalize(states - states[:end + 1].mean(0), dim=-1)
        embeddings = self.model.get_input_embeddings().weight.detach().float().cpu()
        middle = embeddings[tokens[:end + 1]].mean(0)

        def score(each: Candidate, place: int) -> float:
            spoken = words[place].form.lower()
            mine, its = spans[place, spoken], spans[place, each.form]
            length = min(len(mine.after), len(its.after))
            before, after = mine.after[:length], its.after[:length]
            spelled, itself = self._tokens(f" {spoken}"), self._tokens(f" {each.form}")
            values = {
                "candidate": max(-15.0, likely[its.own].sum()), "word": max(-15.0, likely[mine.own].sum()),
                "after": max(-5.0, min(5.0, likely[after].sum() - likely[before].sum())),
                "synonym": max(-14.0, likely[its.named].sum()),
                "states": (states[after] * states[before]).sum(-1).mean() if length else 1.0,
                "embeddings": torch.nn.functional.cosine_similarity(
                    embeddings[itself[-1]] - middle, embeddings[spelled[-1]] - middle, dim=0),
                "word_share": math.log(each.word_share + 1e-3), "candidate_share": math.log(each.candidate_share + 1e-3),
                "agreement": 0.0 if each.beside else each.word_share * each.candidate_share,
                "hypernym": each.beside and words[place].tag[0] != "J", "senses": math.log(1 + each.senses),
                "word_tokens": len(spelled), "candidate_tokens": len(itself)}
            return BIAS + sum(weight * float(values[name]) for name, weight in WEIGHTS.items())

        return {place: sorted(((each.form, score(each, place)) for each in found), key=lambda pair: (-pair[1], pair[0]))
                for place, found in places.items()}


class _Spans(NamedTuple):
    """Places of the tokens of a form in the text, of the tokens after it, and of the form named as a synonym."""
    own: list[int]
    after: list[int]
    named: list[int]
