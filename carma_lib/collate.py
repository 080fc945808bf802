"""From rows of text to padded tensors: token ids, positions, constituents, and the answers."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from carma_lib.words import constituent_ids, phrase_spans, word_spans

LEVELS = ("word", "phrase")


def encode(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str = "",
    suffix: str = "",
    level: str = "word",
    drop: bool = False,
) -> Dataset:
    """Tokenize the prompts `prefix + text + suffix` of a single-target task.

    Adds the columns `input_ids`, `constituent_ids` (of `text`; −1 for tokens of the template and special
    tokens), `target_id` (the one token that continues the prompt to `prompt + target`) and `length`
    (tokens). Cached by `datasets`.

    Args:
        dataset: rows with `text` and `target`; with `level="phrase"` the column `phrases` gives the
            constituents as character spans of `text`, or where there is no such column `phrase_spans` finds
            them.
        drop: leave out rows whose target is not one token, instead of raising.

    Raises:
        TypeError: the tokenizer is slow (it knows no character offsets).
        ValueError: unknown level, missing column, or (without `drop`) a target that is not one token.
    """
    _check_encoding(dataset, tokenizer, level, ("text", "target"))
    settings = dict(tokenizer=tokenizer, prefix=prefix, suffix=suffix, level=level)
    encoded = dataset.map(_encode_prompts, batched=True, fn_kwargs=settings, desc="Tokenizing")
    if drop:
        return encoded.filter(_has_target, input_columns="target_id")
    failed = [row for row, target_id in enumerate(encoded["target_id"]) if target_id < 0]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(encoded)} targets are not one token after the prompt, the first is "
            f"{encoded[failed[0]]['target']!r}: choose others or pass drop=True"
        )
    return encoded


def encode_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, level: str = "word") -> Dataset:
    """Tokenize `text` for language modelling: `input_ids`, `constituent_ids`, `labels` (the ids), `length`.

    For instruction tuning set `labels` to −100 where nothing is to be learned. Errors as in `encode`.
    """
    _check_encoding(dataset, tokenizer, level, ("text",))
    return dataset.map(
        _encode_texts, batched=True, fn_kwargs=dict(tokenizer=tokenizer, level=level), desc="Tokenizing"
    )


class Collator:
    """Pad rows on the left to the longest of the batch, so that every prompt ends at the last position.

    Returns int64 tensors (batch, tokens): `input_ids`, `attention_mask`, `position_ids` (counted from each
    row's first real token), `constituent_ids` (−1 at padding), and either `target_ids` (batch,) or `labels`
    (−100 at padding and at the first token, which nothing precedes); the last three where the rows have
    `constituent_ids`, `target_id` or `labels`.

    Args:
        padding: the padding token's id, or a tokenizer: its padding token, else its end-of-text token
            (padding is masked, so either will do).
    """

    def __init__(self, padding: PreTrainedTokenizerBase | int) -> None:
        if not isinstance(padding, int):
            padding = padding.eos_token_id if padding.pad_token_id is None else padding.pad_token_id
        if padding is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end-of-text token: set tokenizer.pad_token"
            )
        self.pad_token_id = padding

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        batch = {"input_ids": _pad_left(rows, "input_ids", lengths, self.pad_token_id)}
        columns = torch.arange(max(lengths))
        first = max(lengths) - torch.tensor(lengths).unsqueeze(1)
        batch["attention_mask"] = (columns >= first).long()
        batch["position_ids"] = (columns - first).clamp_min(0)
        if "constituent_ids" in rows[0]:
            batch["constituent_ids"] = _pad_left(rows, "constituent_ids", lengths, -1)
        if "target_id" in rows[0]:
            batch["target_ids"] = torch.tensor([row["target_id"] for row in rows])
        elif "labels" in rows[0]:
            batch["labels"] = _pad_left(rows, "labels", lengths, -100)
            # Else a padding position would have to predict the first token.
            batch["labels"][columns == first] = -100
        return batch


def _encode_prompts(
    rows: dict[str, list], tokenizer, prefix: str, suffix: str, level: str
) -> dict[str, list]:
    prompts = [prefix + text + suffix for text in rows["text"]]
    encoded = tokenizer(prompts, return_offsets_mapping=True, return_attention_mask=False)
    answered = tokenizer([prompt + target for prompt, target in zip(prompts, rows["target"])]).input_ids
    columns = {"input_ids": encoded.input_ids, "constituent_ids": [], "target_id": [], "length": []}
    for row, (ids, offsets) in enumerate(zip(encoded.input_ids, encoded.offset_mapping)):
        spans = [(start + len(prefix), end + len(prefix)) for start, end in _spans(rows, row, level)]
        columns["constituent_ids"].append(constituent_ids(offsets, spans, prompts[row]))
        columns["target_id"].append(_single_target(ids, answered[row]))
        columns["length"].append(len(ids))
    return columns


def _encode_texts(rows: dict[str, list], tokenizer, level: str) -> dict[str, list]:
    encoded = tokenizer(rows["text"], return_offsets_mapping=True, return_attention_mask=False)
    ids = [
        constituent_ids(offsets, _spans(rows, row, level), rows["text"][row])
        for row, offsets in enumerate(encoded.offset_mapping)
    ]
    return {
        "input_ids": encoded.input_ids,
        "constituent_ids": ids,
        "labels": encoded.input_ids,
        "length": [len(row) for row in encoded.input_ids],
    }


def _spans(rows: dict[str, list], row: int, level: str) -> list[tuple[int, int]]:
    if level == "word":
        return word_spans(rows["text"][row])
    return rows["phrases"][row] if "phrases" in rows else phrase_spans(rows["text"][row])


def _single_target(prompt: list[int], answered: list[int]) -> int:
    """The one token that `answered` has beyond `prompt`, or −1."""
    return answered[-1] if len(answered) == len(prompt) + 1 and answered[:-1] == prompt else -1


def _has_target(target_id: int) -> bool:
    return target_id >= 0


def _pad_left(rows: list[dict], column: str, lengths: list[int], value: int) -> torch.Tensor:
    for row, length in zip(rows, lengths):
        if len(row[column]) != length:
            raise ValueError(f"{column} has {len(row[column])} entries where input_ids has {length}")
    width = max(lengths)
    return torch.tensor(
        [[value] * (width - length) + list(row[column]) for row, length in zip(rows, lengths)]
    )


def _check_encoding(dataset: Dataset, tokenizer, level: str, columns: tuple[str, ...]) -> None:
    if not tokenizer.is_fast:
        raise TypeError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets: use its fast version"
        )
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the rows lack {missing}; they have {dataset.column_names}")
