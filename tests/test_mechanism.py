"""Measures of hidden states: on states made to have the property, on states made to lack it, and by loops."""
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TEXTS, byte_level_tokenizer, tiny_model

from carma_lib.collate import Collator, encode
from carma_lib.lab.mechanism import (FOLDS, RIDGE, additive_structure, final_states, part_matrix, read_out_accuracy,
                                 token_mutual_information)

TOKENIZER = byte_level_tokenizer()


def random_parts(items=200, parts=12, seed=0):
    return (np.random.default_rng(seed).random((items, parts)) < 0.3).astype(float)


@pytest.fixture(scope="module")
def rows():
    data = [{"text": TEXTS[i], "target": "abcdef"[i]} for i in range(6)]
    return encode(Dataset.from_list(data), TOKENIZER, suffix=' is called a "').select_columns(
        ["input_ids", "constituent_ids", "target_id"]).to_list()


def test_a_sum_of_orthogonal_parts_is_recognised():
    parts, vectors = random_parts(), 3 * np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0][:12]
    explained, angle = additive_structure(parts @ vectors + 5, parts)
    assert explained > 0.995 and angle < 0.02


def test_parts_that_point_one_way_are_not_orthogonal():
    parts, direction = random_parts(), np.random.default_rng(1).normal(size=20)
    explained, angle = additive_structure(parts @ np.outer(np.ones(12), direction), parts)
    assert explained > 0.99 and angle > 0.98


def test_states_without_parts_or_with_their_products_are_no_sum():
    parts, numbers = random_parts(), np.random.default_rng(2)
    assert additive_structure(numbers.normal(size=(200, 20)), parts)[0] < 0.05
    product = (parts[:, :1] - 0.3) * (parts[:, 1:2] - 0.3) * numbers.normal(size=(1, 20))
    assert additive_structure(product, parts)[0] < 0.1


def test_additive_structure_against_loops():
    parts, states = random_parts(40, 4), np.random.default_rng(3).normal(size=(40, 5))
    states += parts @ np.random.default_rng(4).normal(size=(4, 5))
    missed = 0.0
    for left_out in range(FOLDS):
        known = [item for item in range(40) if item % FOLDS != left_out]
        for column in range(5):  # ridge as least squares with RIDGE^½ more rows; the constant is not held down
            centre, mean = parts[known].mean(0), states[known, column].mean()
            rows = np.vstack([parts[known] - centre, math.sqrt(RIDGE) * np.eye(4)])
            scale = np.sqrt(np.mean((states - states.mean(0)) ** 2))
            weights = np.linalg.lstsq(rows, np.concatenate([(states[known, column] - mean) / scale, np.zeros(4)]), rcond=None)[0]
            for item in range(left_out, 40, FOLDS):
                missed += ((states[item, column] - mean) / scale - (parts[item] - centre) @ weights) ** 2
    total = np.sum(((states - states.mean(0)) / np.sqrt(np.mean((states - states.mean(0)) ** 2))) ** 2)
    assert additive_structure(states, parts)[0] == pytest.approx(1 - missed / total)
    assert additive_structure(7 * states + 3, parts) == pytest.approx(additive_structure(states, parts))


def test_read_out():
    numbers = np.random.default_rng(0)
    centres = {"a": numbers.normal(size=8), "b": numbers.normal(size=8), "c": numbers.normal(size=8)}
    targets = ["a", "b", "c"] * 30
    states = np.array([centres[target] for target in targets]) + 0.05 * numbers.normal(size=(90, 8))
    assert read_out_accuracy(states[:60], targets[:60], states[60:], targets[60:]) == 1.0
    assert read_out_accuracy(states[:60], targets[:60], states[60:], ["d"] * 30) == 0.0, "an unknown answer is never named"
    shuffled = list(numbers.permutation(targets[:60]))
    assert read_out_accuracy(states[:60], shuffled, states[60:], targets[60:]) < 0.7


def test_parts_are_content_words_and_synonyms_share_one():
    texts = ["a large bird that sings", "a big bird that swims", "a small fish that swims"] * 3
    matrix = part_matrix(texts, {"large": ["big"], "big": ["large"]}, least=3)
    assert matrix.shape == (9, 6) and set(matrix.ravel()) == {0.0, 1.0}  # big, bird, fish, sings, small, swims
    assert sorted(matrix.sum(0)) == [3, 3, 3, 6, 6, 6]
    assert part_matrix(texts, {}, least=3).shape == (9, 7), "large and big are two parts"
    assert part_matrix(texts, {}, least=4).shape == (9, 0), "too rare, or in too many texts to tell them apart"


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="1 parts in 40 texts; give at least 2 parts and 10 texts"):
        additive_structure(np.ones((40, 3)), np.ones((40, 1)))


def test_final_states_are_those_of_single_rows_in_order(rows):
    model, collate = tiny_model("llama"), Collator(TOKENIZER)
    places = [[4, 0, 2], [5, 1, 3]]
    batches = [collate([dict(rows[place]) for place in some]) for some in places]
    found = final_states(model, batches, places)
    assert found.shape == (3, 6, 32)
    with torch.no_grad():
        for place, row in enumerate(rows):
            alone = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[1:]
            np.testing.assert_allclose(found[:, place], [each[0, -1].numpy() for each in alone], atol=1e-5)


def test_token_mutual_information_by_loops(rows):
    """On texts whose anchors have five negatives or fewer, so that none is drawn."""
    model, collate = tiny_model("gpt2"), Collator(TOKENIZER)
    short = [{"input_ids": [5, 6, 7, 8, 9], "constituent_ids": [0, 0, 1, 1, -1], "target_id": 3},
             {"input_ids": [15, 16, 17], "constituent_ids": [0, 0, -1], "target_id": 3}]
    found = token_mutual_information(model, [collate([dict(row) for row in short])])
    with torch.no_grad():
        for layer in range(4):
            losses = []
            for row in short:
                states = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer][0].double()
                ids = row["constituent_ids"]
                for i in range(len(ids)):
                    for j in range(i + 1, len(ids)):
                        if ids[i] == ids[j] >= 0:
                            like = [math.exp(torch.cosine_similarity(states[i], states[k], dim=0).item() / 0.1)
                                    for k in [j, *(k for k in range(len(ids)) if ids[k] != ids[i])]]
                            losses.append(-math.log(like[0] / sum(like)))
            assert found[layer] == pytest.approx(math.log(6) - sum(losses) / len(losses), abs=1e-4)


def test_token_mutual_information_needs_a_pair(rows):
    single = [{"input_ids": [5, 6], "constituent_ids": [0, 1], "target_id": 3}]
    with pytest.raises(ValueError, match="no word of two tokens"):
        token_mutual_information(tiny_model("gpt2"), [Collator(TOKENIZER)(single)])
