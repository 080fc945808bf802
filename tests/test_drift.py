"""Drift from the start against a restatement in loops over single unpadded rows; perplexity likewise."""
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model

from carma_lib.collate import Collator
from carma_lib.lab.drift import hidden_state_drift, perplexity
from carma_lib.blocks import decoder_blocks

FAMILIES = ("gpt2", "llama", "gemma2")
LENGTHS = (7, 1, 12, 4, 9, 2)
MEASURES = ["drift", "cosine", "cka"]


def random_rows(lengths=LENGTHS, seed=0):
    draw = np.random.default_rng(seed)
    return [{"input_ids": draw.integers(2, 300, size=length).tolist()} for length in lengths]


def batches_of(rows, size):
    return [Collator(1)(rows[first:first + size]) for first in range(0, len(rows), size)]


def padded_right(rows):
    """One batch with arbitrary tokens as padding on the right, without positions."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [5] * (longest - len(row["input_ids"])) for row in rows])
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return [{"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths).long()}]


def pair_of(family, noise=0.05):
    """A start with weights large enough to matter, and a model that strayed from it."""
    start, model = tiny_model(family), tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for first, second in zip(start.parameters(), model.parameters()):
            if first.dim() > 1:
                first.normal_(std=0.2, generator=generator)
            second.copy_(first + noise * torch.randn(first.shape, generator=generator))
    return model, start


@torch.no_grad()
def naive_states(model, rows):
    """layer → list of float64 vectors, a token each."""
    states = {}

    def keep(layer, output):
        stream = output[0] if isinstance(output, tuple) else output
        states.setdefault(layer, []).extend(stream[0].double().numpy())

    blocks = decoder_blocks(model)
    hooks = [blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: keep(-1, args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]
    for layer, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(
            lambda block, args, output, layer=layer: keep(layer, output)))
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return states


def naive_drift(model, start, rows):
    """(drift, cosine, cka) a layer, CKA from the Gram matrices of tokens × tokens."""
    after, before = naive_states(model, rows), naive_states(start, rows)
    table = {}
    for layer in after:
        drifts, cosines = [], []
        for one, other in zip(after[layer], before[layer]):
            norm, norm_before = math.sqrt(sum(one * one)), math.sqrt(sum(other * other))
            drifts.append(math.sqrt(sum((one - other) ** 2)) / norm_before)
            cosines.append(sum(one * other) / (norm * norm_before))
        count = len(drifts)
        centre = np.eye(count) - np.full((count, count), 1 / count)
        grams = [centre @ states @ states.T @ centre
                 for states in (np.array(after[layer]), np.array(before[layer]))]

        def hsic(first, second):
            return sum(first[i, j] * second[i, j] for i in range(count) for j in range(count))

        cka = hsic(*grams) / math.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1]))
        table[layer] = (sum(drifts) / count, sum(cosines) / count, cka)
    return table


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_against_loops(family):
    model, start = pair_of(family)
    expected = naive_drift(model, start, random_rows())
    found = hidden_state_drift(model, start, batches_of(random_rows(), 4))
    assert list(found.columns) == ["layer", *MEASURES] and found["layer"].tolist() == [-1, 0, 1, 2]
    for row in found.itertuples():
        assert (row.drift, row.cosine, row.cka) == pytest.approx(expected[row.layer], rel=2e-5)
        assert row.drift > 0.01 and 0 < row.cosine < 0.9999 and 0 < row.cka < 0.9999


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_batches_and_order_change_nothing(family):
    model, start = pair_of(family)
    rows = random_rows()
    whole = hidden_state_drift(model, start, batches_of(rows, 1))
    surprise = perplexity(model, batches_of(rows, 1))
    for batches in (batches_of(rows, 2), batches_of(rows, 6), batches_of(rows[::-1], 4), padded_right(rows)):
        again = hidden_state_drift(model, start, iter(batches))
        np.testing.assert_allclose(again, whole, rtol=2e-5)
        assert perplexity(model, iter(batches)) == pytest.approx(surprise, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_not_drifted_from_itself(family):
    model, _ = pair_of(family)
    found = hidden_state_drift(model, model, batches_of(random_rows(), 3))
    assert (found["drift"] == 0).all()
    np.testing.assert_allclose(found[["cosine", "cka"]], 1, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_against_the_models_own_loss(family):
    model, _ = pair_of(family)
    rows = random_rows()
    total = count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        if ids.numel() > 1:
            loss = model(input_ids=ids, labels=ids).loss.item()
            assert perplexity(model, batches_of([row], 1)) == pytest.approx(math.exp(loss), rel=1e-5)
            total, count = total + loss * (ids.numel() - 1), count + ids.numel() - 1
    assert perplexity(model, batches_of(rows, 4)) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_turns_one_row_of_logits_into_float32_at_a_time(monkeypatch):
    """A batch of 64 sentences and a vocabulary of 262,144 would take several GiB for each copy in float32."""
    rows, seen = random_rows(), []
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr("carma_lib.lab.drift.F.cross_entropy", lambda logits, *rest, **more: seen.append(len(logits)) or cross_entropy(logits, *rest, **more))
    perplexity(tiny_model("llama"), batches_of(rows, len(rows)))
    assert seen == [len(row["input_ids"]) - 1 for row in rows]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = tiny_model("gpt2")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, batches_of(random_rows(), 3)) == pytest.approx(300)


def test_scale_and_rotation_are_drift_but_no_loss_of_cka():
    start, model = tiny_model("gpt2"), tiny_model("gpt2")
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        for name in ("wte", "wpe"):
            embeddings = getattr(start.transformer, name).weight
            getattr(model.transformer, name).weight.copy_(3 * embeddings @ rotation)
    first = hidden_state_drift(model, start, batches_of(random_rows(), 3)).iloc[0]
    assert first["drift"] > 2 and first["cosine"] < 0.5 and first["cka"] == pytest.approx(1)


def test_one_token_has_drift_and_cosine_but_no_cka_and_nothing_to_predict():
    model, start = pair_of("gpt2")
    rows = random_rows((1,))
    found = hidden_state_drift(model, start, batches_of(rows, 1))
    expected = naive_states(model, rows), naive_states(start, rows)
    distance = [np.linalg.norm(expected[0][layer][0] - expected[1][layer][0]) /
                np.linalg.norm(expected[1][layer][0]) for layer in (-1, 0, 1, 2)]
    assert found["drift"].tolist() == pytest.approx(distance, rel=1e-5) and found["cka"].isna().all()
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(model, batches_of(rows, 1))


def test_errors_say_what_is_wrong():
    model, start = pair_of("gpt2")
    rows = batches_of(random_rows(), 6)
    with pytest.raises(ValueError, match=r"\(3, 32\) and \(2, 32\)"):
        hidden_state_drift(model, tiny_model("gpt2", layers=2), rows)
    with pytest.raises(ValueError, match=r"\(3, 32\) and \(3, 16\)"):
        hidden_state_drift(model, tiny_model("gpt2", width=16), rows)
    empty = [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()}]
    for none in ([], empty):
        with pytest.raises(ValueError, match="no real token"):
            hidden_state_drift(model, start, none)
    assert hidden_state_drift(model, start, empty + rows).equals(hidden_state_drift(model, start, rows))
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        hidden_state_drift(model, start, rows)
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, rows)


def test_models_are_left_as_they_were():
    model, start = pair_of("gpt2")
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    rows = batches_of(random_rows(), 3)
    kept = hidden_state_drift(model, start, rows), perplexity(model, rows)
    assert [module.training for module in model.modules()] == modes and not start.training
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in decoder_blocks(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()  # dropout played no part
    assert kept[0].equals(hidden_state_drift(model, start, rows)) and kept[1] == perplexity(model, rows)


def test_adapters_and_half_precision():
    rows = batches_of(random_rows(), 3)
    start = tiny_model("llama")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = get_peft_model(tiny_model("llama"), lora)
    assert (hidden_state_drift(adapted, start, rows)["drift"] == 0).all()
    assert perplexity(adapted, rows) == pytest.approx(perplexity(start, rows), rel=1e-6)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = get_peft_model(tiny_model("llama"), virtual)
    found = hidden_state_drift(prompted, start, rows)  # virtual tokens are no real ones
    assert found["drift"][0] == 0 and (found["drift"][1:] > 0).all() and perplexity(prompted, rows) > 1
    halved = hidden_state_drift(tiny_model("llama").bfloat16(), start, rows)
    assert (halved["drift"] < 0.02).all() and (halved["cka"] > 0.999).all()
