"""Candidates in context by a small random model: the tree against plain passes, scores, nesting, the cache."""
import math
import os

import pandas as pd
import pytest
import torch
from lab_cells import DICTIONARY, cell_of
from tiny import TEXTS, byte_level_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from carma_lib.lab.cell import cell_folder
from carma_lib.lab.evaluate import asked_rows, replacements
from carma_lib.lab.run import run
from carma_lib.synonyms import ranking, replacement
from carma_lib.synonyms.replacement import replace_all, replace_synonyms
from carma_lib.synonyms.tagging import tagged_words
from carma_lib.synonyms.wordnet import is_coarse

SENTENCES = ["It is a great film about an old house and wonderful actors.",
             "A large animal sleeps quickly in the small car", "She bought a car and frequently allowed the kids to start it.",
             "Nothing here.", "", "An odd (big) story \"begins\"."]


@pytest.fixture(autouse=True)
def small_scorer(monkeypatch):
    """A random model of the scorer's family, in float32; everything else is real."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer([*TEXTS, *SENTENCES], 400)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer)))
    scorer = ranking.Scorer(model, tokenizer)
    monkeypatch.setattr(ranking, "scorer", lambda: scorer)
    monkeypatch.setattr("carma_lib.models.native_bf16", lambda device: False)
    return scorer


def plain(scorer, path):
    """Last token's state before the last block, and the log-likelihood of the token, from one plain pass of a path."""
    with torch.no_grad():
        out = scorer.model(torch.tensor([path]), output_hidden_states=True)
    return out.hidden_states[-2][0, -1], out.logits[0, -2].log_softmax(-1)[path[-1]]


def test_tree_equals_plain_passes(small_scorer):
    tokens, parents = [5, 9, 30, 7, 8, 40, 41, 9, 12], [-1, 0, 1, 1, 3, 0, 5, 2, 4]
    states, likely = small_scorer.run(tokens, parents)
    for place in range(1, len(tokens)):
        path, at = [], place
        while at >= 0:
            path.insert(0, tokens[at])
            at = parents[at]
        state, value = plain(small_scorer, path)
        torch.testing.assert_close(states[place], state, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(likely[place], value, atol=1e-5, rtol=1e-4)


def naive_score(scorer, text, place, candidate):
    """The score once more, by whole texts one at a time."""
    words = tagged_words(text)
    word, full = words[place], text if text.rstrip()[-1:] in ".!?" else text + " ."
    ids = lambda piece: scorer.tokenizer(piece, add_special_tokens=False)["input_ids"]
    offsets = scorer.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    article = words[place - 1] if words[place - 1].form.lower() in ("a", "an") else None
    begin = len(full[:article.start if article else word.start].rstrip(" "))
    start = [0, *[token for token, (_, end) in zip(ids(full), offsets) if end <= begin]]
    after = [end for _, end in offsets if end > word.end][:ranking.TAIL]
    trunk = torch.stack([plain(scorer, [0, *ids(full)][:n])[0] if n > 1 else scorer.model(
        torch.tensor([[0]]), output_hidden_states=True).hidden_states[-2][0, 0] for n in range(1, len(ids(full)) + 2)]).detach()
    unit = lambda state: torch.nn.functional.normalize(state - trunk.mean(0), dim=-1)

    def parts(form):
        lead = full[begin:word.start]
        if article:
            lead = lead.replace(article.form, ranking.agree(article.form, form), 1)
        branch = ids(lead + (form.capitalize() if word.form[0].isupper() else form) + full[word.end:after[-1]])
        passes = [plain(scorer, start + branch[:n]) for n in range(1, len(branch) + 1)]
        own = len(branch) - len(after)
        return (float(sum(value for _, value in passes[:own])), float(sum(value for _, value in passes[own:])),
                [unit(state) for state, _ in passes[own:]])

    spoken = word.form.lower()
    asked, named = [0, *ids(full), *ids(f' A synonym of "{spoken}" in this sentence is "')], 0.0
    for token in [*ids(candidate.form), *ids('"')]:
        asked.append(token)
        named += float(plain(scorer, asked)[1])
    (own, tail, states), (own_before, tail_before, states_before) = parts(candidate.form), parts(spoken)
    embeddings = scorer.model.get_input_embeddings().weight.detach()
    one, two = (embeddings[ids(f" {form}")[-1]] - embeddings[[0, *ids(full)]].mean(0) for form in (candidate.form, spoken))
    shares = candidate.word_share, candidate.candidate_share
    features = {
        "candidate": max(-15, own), "word": max(-15, own_before), "after": max(-5, min(5, tail - tail_before)),
        "synonym": max(-14, named), "states": sum(float(x @ y) for x, y in zip(states, states_before)) / len(states),
        "embeddings": float(one @ two / (one.norm() * two.norm())), "word_share": math.log(shares[0] + 0.001),
        "candidate_share": math.log(shares[1] + 0.001), "agreement": 0 if candidate.beside else shares[0] * shares[1],
        "hypernym": candidate.beside and word.tag[0] != "J", "senses": math.log(1 + candidate.senses),
        "word_tokens": len(ids(f" {spoken}")), "candidate_tokens": len(ids(f" {candidate.form}"))}
    assert set(features) == set(ranking.WEIGHTS)
    return ranking.BIAS + sum(weight * features[name] for name, weight in ranking.WEIGHTS.items())


@pytest.mark.parametrize("text", [SENTENCES[0], SENTENCES[1]])
def test_scores_equal_a_naive_restatement(small_scorer, text):
    ranked, words, checked = ranking.rank(text), tagged_words(text), 0
    for place, pairs in ranked.items():
        known = {each.form: each for each in ranking.candidates(words[place].form.lower(), words[place].tag)}
        assert {form for form, _ in pairs} == set(known)
        assert [score for _, score in pairs] == sorted((score for _, score in pairs), reverse=True)
        for form, score in pairs[:2]:
            assert score == pytest.approx(naive_score(small_scorer, text, place, known[form]), abs=1e-3)
            checked += 1
    assert checked >= 4


def test_a_long_text_is_scored_in_several_passes(small_scorer, monkeypatch):
    text = "The old house near the river was big and the small boy began to build a fast boat there . " * 3
    whole, read = ranking.rank(text), []
    run = small_scorer.run
    monkeypatch.setattr(small_scorer, "run", lambda tokens, parents: read.append(len(tokens)) or run(tokens, parents))
    monkeypatch.setattr(ranking, "TOKENS", 400)
    parts = ranking.rank(text)
    assert len(read) > 2 and max(read) <= 400 and list(parts) == list(whole)
    for place, found in whole.items():
        assert dict(parts[place]) == pytest.approx(dict(found), abs=1e-4)


def test_nested_seeded_and_counted(monkeypatch):
    monkeypatch.setattr(replacement, "LEAST", -1e9)
    for text in SENTENCES:
        for seed in range(3):
            smaller = set()
            for rate in (0.1, 0.25, 0.4, 0.7, 1.0):
                done = replace_synonyms(text, rate=rate, seed=seed, source="ranked")
                assert done.made <= done.requested and smaller <= set(done.changes)
                smaller = set(done.changes)
                assert not any(is_coarse(change.after) for change in done.changes)
    assert len({replace_synonyms(SENTENCES[0], rate=0.4, seed=seed, source="ranked").text for seed in range(12)}) > 1
    monkeypatch.setattr(replacement, "LEAST", 1e9)
    assert replace_synonyms(SENTENCES[0], rate=1, seed=0, source="ranked").changes == ()


def test_forbidden_and_articles(monkeypatch):
    monkeypatch.setattr(replacement, "LEAST", -1e9)
    text = SENTENCES[0]
    done = replace_synonyms(text, rate=1, seed=0, source="ranked")
    for change in [each for each in done.changes if each.before not in ("a", "an")]:
        again = replace_synonyms(text, rate=1, seed=0, source="ranked", forbidden=change.after)
        assert change.after not in [each.after for each in again.changes]
    assert "a a" not in done.text and " a o" not in done.text


def test_cache(tmp_path, monkeypatch, small_scorer):
    monkeypatch.setattr(ranking, "BLOCK", 2)
    whole = ranking.ranked_candidates(SENTENCES, cache_dir=tmp_path)
    plain = replace_all(SENTENCES, rate=0.4, seed=1, source="ranked")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and list(whole) == SENTENCES
    monkeypatch.setattr(ranking, "rank", None)
    assert ranking.ranked_candidates(SENTENCES, cache_dir=tmp_path) == whole
    assert replace_all(SENTENCES, rate=0.4, seed=1, source="ranked", cache_dir=tmp_path) == plain
    monkeypatch.undo()
    monkeypatch.setattr(ranking, "scorer", lambda: small_scorer)
    monkeypatch.setattr("carma_lib.models.native_bf16", lambda device: False)
    monkeypatch.setattr(ranking, "BLOCK", 2)
    for place, content in ((0, b""), (1, files[1].read_bytes()[:40]), (2, files[0].read_bytes()[::-1])):
        files[place].write_bytes(content)
    assert ranking.ranked_candidates(SENTENCES, cache_dir=tmp_path) == whole, "damaged files are made again"
    monkeypatch.setattr(ranking, "RULES", ranking.RULES + 1)
    ranking.ranked_candidates(SENTENCES, cache_dir=tmp_path)
    assert len([name for name in os.listdir(tmp_path) if name.startswith("ranked-")]) == 6


@pytest.mark.parametrize("form, tag, some", [("film", "NN", "movie"), ("bought", "VBD", "purchased"), ("quickly", "RB", "rapidly"),
                                             ("children", "NNS", "kids"), ("larger", "JJR", "bigger")])
def test_candidates(form, tag, some):
    found = [each.form for each in ranking.candidates(form, tag)]
    assert some in found and form not in found and len(found) <= ranking.MOST


def test_what_has_no_candidates():
    for form, tag in (("london", "NNP"), ("the", "DT"), ("zorblax", "NN")):
        assert ranking.candidates(form, tag) == ()
    assert ranking.rank("") == {} and ranking.rank("It is on it.") == {}


def test_cells_are_asked_in_the_ranked_words(folder, client, monkeypatch):
    """Both methods in the same words, none of them a target, and the rows say where they come from."""
    monkeypatch.setattr(replacement, "LEAST", -1e9)  # of a random scorer no candidate is good
    wanted = [cell_of(method, task=DICTIONARY, synonyms="ranked", adversary_rate=0.25, adversary_tries=2, depth_shares=())
              for method in ("fine_tuning", "carma")]
    assert run(wanted, folder, client) == {}
    tables = [pd.read_parquet(cell_folder(folder, cell) / "answers.parquet") for cell in wanted]
    for table in tables:
        assert table.groupby("source").size().to_dict() == {"": 12, "ranked": 12, "adversary": 6}
        ranked = table[table.source == "ranked"]
        assert ranked.changed.sum() > 0 and ranked.changed.tolist() == tables[0].changed[tables[0].source == "ranked"].tolist()
    rows = asked_rows(folder, wanted[0], "test_seen")
    expected = replace_all(rows["text"], rate=0.25, seed=wanted[0].recipe.replacement_seed, item_ids=rows["item_id"],
                           source="ranked", forbidden=list(rows["target"]))
    assert replacements(folder, wanted[0], "test_seen")[0.25] == (tuple(each.text for each in expected), [each.made for each in expected])
    assert not any(change.after == target for each, target in zip(expected, rows["target"]) for change in each.changes)
