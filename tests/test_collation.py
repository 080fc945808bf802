"""Rows to tensors: prompts, targets, constituents and padding."""

import pytest
import torch
from datasets import Dataset
from tiny import TEXTS, byte_level_tokenizer, metaspace_tokenizer, tiny_model

from carma_lib.collate import Collator, _single_target, encode, encode_text


def rows(*texts, target="dog"):
    return Dataset.from_list([{"text": text, "target": target, "phrases": [[0, 3]]} for text in texts])


def tokenizer_with_targets(make):
    return make([*TEXTS, *["hotdog bulldog lapdog", "copycat wildcat bobcat"] * 9], 400)


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_prompts(make):
    tokenizer = tokenizer_with_targets(make)
    text = "An unbelievable bird."
    encoded = encode(rows(text), tokenizer, prefix="Word: ", suffix=' is called a "')[0]
    prompt = f'Word: {text} is called a "'
    assert encoded["input_ids"] == tokenizer(prompt).input_ids and encoded["length"] == len(
        encoded["input_ids"]
    )
    assert tokenizer(prompt + "dog").input_ids == [*encoded["input_ids"], encoded["target_id"]]
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    for word, expected in enumerate(["An", "unbelievable", "bird"]):
        pieces = [prompt[a:b] for (a, b), i in zip(offsets, encoded["constituent_ids"]) if i == word]
        assert "".join(pieces).strip() == expected
    assert max(encoded["constituent_ids"]) == 2  # nothing of the template


def test_phrases_come_from_the_rows_or_from_the_chunker():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    ids = encode(rows("An old bird."), tokenizer, suffix=' "', level="phrase")[0]["constituent_ids"]
    offsets = tokenizer('An old bird. "', return_offsets_mapping=True).offset_mapping
    assert [i == 0 for i in ids] == [b <= 3 and ("An old bird."[a:b].strip() != "") for a, b in offsets]
    found = encode(rows("An old bird.").remove_columns("phrases"), tokenizer, suffix=' "', level="phrase")[0]
    assert [i == 0 for i in found["constituent_ids"]] == [a < len("An old bird") for a, b in offsets]


def test_targets_of_several_tokens():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    data = Dataset.from_list(
        [{"text": "a bird", "target": target} for target in ("dog", "unbelievably odd", "cat")]
    )
    with pytest.raises(ValueError, match="1 of 3 targets are not one token.*'unbelievably odd'"):
        encode(data, tokenizer, suffix=' is called a "')
    kept = encode(data, tokenizer, suffix=' is called a "', drop=True)
    assert kept["target"][:] == ["dog", "cat"] and all(
        tokenizer.decode(row["target_id"]) == row["target"] for row in kept
    )


def test_a_target_that_changes_the_prompts_own_tokens_is_none():
    """As where "hot" and "dog" are known and "hotdog" is one token: it does not continue the prompt."""
    assert _single_target([1, 2], [1, 2, 3]) == 3
    assert (
        _single_target([1, 2], [1, 4, 3])
        == _single_target([1, 2], [1, 4])
        == _single_target([1], [1, 2, 3])
        == -1
    )


def test_language_modelling():
    tokenizer = metaspace_tokenizer()
    row = encode_text(Dataset.from_dict({"text": ["a small bird"]}), tokenizer)[0]
    assert row["labels"] == row["input_ids"] and row["length"] == len(row["input_ids"])
    assert row["constituent_ids"][0] == -1 and set(row["constituent_ids"][1:]) == {0, 1, 2}
    short = {
        name: values[-2:]
        for name, values in row.items()
        if name in ("input_ids", "labels", "constituent_ids")
    }
    batch = Collator(tokenizer)([row, short])
    assert batch["labels"].tolist() == [
        [-100, *row["labels"][1:]],
        [-100] * (row["length"] - 1) + row["labels"][-1:],
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_does_not_change_the_language_model_loss(family):
    model, rows = tiny_model(family), [
        {"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [9, 8, 7, 6, 5, 4])
    ]
    with torch.no_grad():
        alone = [model(**Collator(1)([row])).loss for row in rows]
        together = model(**Collator(1)(rows)).loss
    torch.testing.assert_close(together, (2 * alone[0] + 5 * alone[1]) / 7)


def test_padding_is_on_the_left():
    batch = Collator(9)(
        [
            {"input_ids": [3, 4, 5], "constituent_ids": [0, 0, -1], "target_id": 7, "text": "ignored"},
            {"input_ids": [6], "constituent_ids": [2], "target_id": 8, "text": "ignored"},
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[3, 4, 5], [9, 9, 6]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "constituent_ids": [[0, 0, -1], [-1, -1, 2]],
        "target_ids": [7, 8],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_does_not_change_what_the_model_says(family):
    model = tiny_model(family)
    row, longer = {"input_ids": [5, 6, 7]}, {"input_ids": [9] * 8}
    with torch.no_grad():
        alone = model(**Collator(1)([row])).logits[0, -1]
        together = model(**Collator(1)([row, longer])).logits[0, -1]
    torch.testing.assert_close(alone, together)


def test_padding_token():
    tokenizer = byte_level_tokenizer()
    assert Collator(tokenizer).pad_token_id == tokenizer.pad_token_id == 1
    tokenizer.pad_token = None
    assert Collator(tokenizer).pad_token_id == tokenizer.eos_token_id == 0
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        Collator(tokenizer)


def test_errors_at_the_door():
    tokenizer = byte_level_tokenizer()

    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="Slow is a slow tokenizer"):
        encode(rows("a"), Slow())
    with pytest.raises(ValueError, match="level must be one of"):
        encode(rows("a"), tokenizer, level="clause")
    with pytest.raises(ValueError, match=r"the rows lack \['target'\]"):
        encode(rows("a").remove_columns("target"), tokenizer)
    with pytest.raises(ValueError, match="constituent_ids has 1 entries where input_ids has 2"):
        Collator(0)([{"input_ids": [1, 2], "constituent_ids": [0]}])
