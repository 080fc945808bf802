"""From rows of text to padded tensors: token ids, positions, constituents, and the answers."""
from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from carma_lib.words import constituent_ids, phrase_spans, word_spans

LEVELS = ("word", "phrase")
ANSWERS = ("token", "text")
IGNORED = -100  # the label of a position where nothing is learned


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, prefix: str = "", suffix: str = "",
           level: str = "word", drop: bool = False, answer: str = "token", max_length: int | None = None) -> Dataset:
    """Tokenize the prompts `prefix + text + suffix` and their answers, in memory and anew at each call.

    Adds `input_ids`, `constituent_ids` (of `text`; −1 for tokens of the template, the answer and special tokens),
    `length` (tokens), and the answer. With `answer="token"` that is `target_id`, the one token that continues the
    prompt to `prompt + target` (as published). With `answer="text"`, `input_ids` goes on with the answer's tokens
    and the end-of-text token, `labels` holds these (−100 on the prompt), and `prompt_length` says where they begin.
    A column that the other kind of answer has is dropped.

    level: "word", or "phrase" for the character spans of the column `phrases`; where no row has any, those that
        `phrase_spans` finds.
    drop: leave out rows that are too long, or whose target is not one token, instead of raising.
    max_length: most tokens of a row, from 2 up; None for what the tokenizer says of its model.

    Raises `TypeError` for a slow tokenizer (it knows no character offsets) or rows that are no `Dataset`, `ValueError`
    for an unknown level or answer, no rows (or none left), a missing column, a value that is not text, a prompt without
    a token, a row that is too long, a target that is empty or (without `drop`) not one token, phrases that do not fit
    their text, a max_length below 2, rows with a transform of their own (`set_transform`).
    """
    if answer not in ANSWERS:
        raise ValueError(f"answer must be one of {ANSWERS}, got {answer!r}")
    if answer == "text" and tokenizer.eos_token_id is None:
        raise ValueError("answers end with the end-of-text token, and the tokenizer has none: set tokenizer.eos_token")
    plain, limit = _checked(dataset, tokenizer, level, ("text", "target")), _limit(max_length, tokenizer)
    stale = [name for name in (("target_id",) if answer == "text" else ("labels", "prompt_length")) if name in plain.column_names]
    encoded = _tokenized(plain.remove_columns(stale), tokenizer, level, _encode_answers if answer == "text" else _encode_targets,
                         prefix=prefix, suffix=suffix)
    lengths = encoded["length"][:]
    if long := [row for row, length in enumerate(lengths) if length > limit]:
        what = (f"{len(long)} of {len(lengths)} rows are longer than {limit:,} tokens, the first is row {long[0]} with "
                f"{lengths[long[0]]:,}")
        if not drop:
            raise ValueError(f"{what}: shorten them or pass drop=True")
        warnings.warn(f"{what}: they are left out", stacklevel=2)
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    if answer == "token":
        target_ids = encoded["target_id"][:]
        if (failed := [row for row in kept if target_ids[row] < 0]) and not drop:
            raise ValueError(f"{len(failed)} of {len(encoded)} targets are not one token after the prompt, the first "
                             f"is {encoded[failed[0]]['target']!r}: choose others or pass drop=True")
        kept = [row for row in kept if target_ids[row] >= 0]
    if not kept:
        why = f"all are longer than {limit:,} tokens" if len(long) == len(lengths) else "no target is one token of this tokenizer"
        raise ValueError(f"none of {len(encoded)} rows is left, {why}: cut them, or take another tokenizer or answer='text'")
    return encoded if len(kept) == len(encoded) else encoded.select(kept)


def encode_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, level: str = "word",
                max_length: int | None = None) -> Dataset:
    """Tokenize `text` for language modelling: `input_ids`, `constituent_ids`, `labels` (the ids), `length`.

    Rows of fewer than two tokens (blank lines) have nothing to predict and are left out; rows longer than
    `max_length` (None: what the tokenizer says of its model) are cut; a warning says how many of either. For
    instruction tuning set `labels` to −100 on what is not to be learned. Errors as in `encode`.
    """
    plain, limit = _checked(dataset, tokenizer, level, ("text",)), _limit(max_length, tokenizer)
    encoded = _tokenized(plain, tokenizer, level, _encode_texts, limit=limit)
    lengths = encoded["length"][:]
    if cut := sum(length > limit for length in lengths):
        warnings.warn(f"{cut} of {len(lengths)} rows are longer than {limit:,} tokens and are cut there", stacklevel=2)
        encoded = encoded.remove_columns("length").add_column("length", [min(length, limit) for length in lengths])
    kept = [row for row, length in enumerate(lengths) if length > 1]
    if len(kept) == len(lengths):
        return encoded
    what = f"{len(lengths) - len(kept)} of {len(lengths)} rows have fewer than two tokens, so nothing to predict"
    if not kept:
        raise ValueError(f"{what}: give longer texts")
    warnings.warn(f"{what}: they are left out", stacklevel=2)
    return encoded.select(kept)


def answerable(rows: Dataset, tokenizer: PreTrainedTokenizerBase, prompt: Any, limit: int | None = None) -> Dataset:
    """The rows whose answer is one token after the prompt (as published, so test sets differ by tokenizer).

    prompt: has `prefix` and `suffix`. limit: the first so many of them, fewer if there are no more; None for all.
    Raises `ValueError` if there is none, or as in `encode`.
    """
    plain, kept = _checked(rows, tokenizer, "word", ("text", "target")), list[int]()
    for first in range(0, len(rows), 1000):
        some = plain[first:first + 1000]
        found = _encode_targets(some, list(range(first, first + len(some["text"]))), tokenizer=tokenizer, level=None,
                                prefix=prompt.prefix, suffix=prompt.suffix)["target_id"]
        kept += [first + row for row, target in enumerate(found) if target >= 0]
        if limit and len(kept) >= limit:
            break
    if not kept:
        raise ValueError(f"none of {len(rows)} items has an answer of one token of this tokenizer: take more items, "
                         "another start, or answer='text'")
    return rows.select(kept[:limit])


class Collator:
    """Pad rows on the left to the longest of the batch, so that every prompt ends at the last position.

    Every row has the same columns, and no padding yet. Returns int64 tensors (batch, tokens): `input_ids`, `attention_mask`, `position_ids` (counted from each row's
    first real token), and, if the rows have them, `constituent_ids` (−1 at padding) and `labels` (−100 at padding
    and at the first token, which nothing precedes), else `target_ids` (batch,).

    padding: the padding token's id, or a tokenizer: its padding token, else its end-of-text token.
    """

    def __init__(self, padding: PreTrainedTokenizerBase | int) -> None:
        if not isinstance(padding, int):
            padding = padding.eos_token_id if padding.pad_token_id is None else padding.pad_token_id
        if padding is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-text token: set tokenizer.pad_token")
        self.pad_token_id = padding

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        _check_rows(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        batch = {"input_ids": _pad_left(rows, "input_ids", lengths, self.pad_token_id)}
        columns = torch.arange(max(lengths))
        first = max(lengths) - torch.tensor(lengths).unsqueeze(1)
        batch["attention_mask"] = (columns >= first).long()
        batch["position_ids"] = (columns - first).clamp_min(0)
        if "constituent_ids" in rows[0]:
            batch["constituent_ids"] = _pad_left(rows, "constituent_ids", lengths, -1)
        if "labels" in rows[0]:
            batch["labels"] = _pad_left(rows, "labels", lengths, IGNORED)
            batch["labels"][columns == first] = IGNORED  # else a padding position would have to predict the first token
        elif "target_id" in rows[0]:
            batch["target_ids"] = torch.tensor([row["target_id"] for row in rows])
        return batch


def _tokenized(dataset: Dataset, tokenizer, level: str, function: Callable, **more) -> Dataset:
    """`dataset.map` in memory: a cache on disk would outlive changes of these rules, and be trusted when damaged.

    Without a cache nothing asks for the fingerprint, whose making would write out the whole tokenizer at each call.
    """
    return dataset.map(function, batched=True, with_indices=True, keep_in_memory=True, load_from_cache_file=False,
                       new_fingerprint=generate_random_fingerprint(), desc="Tokenizing",
                       fn_kwargs={"tokenizer": tokenizer, "level": level, **more})


def _encode_targets(rows: dict[str, list], places: list[int], **settings) -> dict[str, list]:
    ids, constituents, answered = _encode_prompts(rows, places, **settings)
    return {"input_ids": ids, "constituent_ids": constituents, "length": [len(row) for row in ids],
            "target_id": [_single_target(prompt, both) for prompt, both in zip(ids, answered)]}


def _encode_answers(rows: dict[str, list], places: list[int], tokenizer, **settings) -> dict[str, list]:
    prompts = _encode_prompts(rows, places, tokenizer=tokenizer, **settings)
    if empty := [place for place, target in zip(places, rows["target"]) if not target.strip()]:
        raise ValueError(f"row {empty[0]}: the target is empty")
    alone = tokenizer(rows["target"], add_special_tokens=False).input_ids
    columns = {name: [] for name in ("input_ids", "constituent_ids", "labels", "prompt_length", "length")}
    for ids, constituents, answered, target in zip(*prompts, alone):
        # If the target's first characters would join the prompt's last token, the target is tokenized alone.
        target = [*(answered[len(ids):] if answered[:len(ids)] == ids else target), tokenizer.eos_token_id]
        columns["input_ids"].append(ids + target)
        columns["constituent_ids"].append(constituents + [-1] * len(target))
        columns["labels"].append([IGNORED] * len(ids) + target)
        columns["prompt_length"].append(len(ids))
        columns["length"].append(len(ids) + len(target))
    return columns


def _encode_texts(rows: dict[str, list], places: list[int], tokenizer, level: str, limit: int) -> dict[str, list]:
    encoded = tokenizer(_texts(rows, "text", places), return_offsets_mapping=True, return_attention_mask=False)
    ids = [row[:limit] for row in encoded.input_ids]
    return {"input_ids": ids, "labels": ids, "length": [len(row) for row in encoded.input_ids],
            "constituent_ids": [owners[:limit] for owners in _constituents(rows, places, encoded, rows["text"], level)]}


def _encode_prompts(rows: dict[str, list], places: list[int], tokenizer, level: str | None, prefix: str,
                    suffix: str) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ids of the prompts, their constituents (none if `level` is None), and ids of prompt + target in one piece."""
    texts = [prefix + text + suffix for text in _texts(rows, "text", places)]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    if empty := [place for place, ids in zip(places, encoded.input_ids) if not ids]:
        raise ValueError(f"row {empty[0]}: the prompt is empty, so nothing comes before the answer: give a text or a prefix")
    ends = {tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.sep_token_id: tokenizer.sep_token}
    if ended := [(place, ends[ids[-1]]) for place, ids, text in zip(places, encoded.input_ids, texts)
                 if ends.get(ids[-1]) and not text.endswith(ends[ids[-1]])]:
        raise ValueError(f"row {ended[0][0]}: the tokenizer ends prompts with {ended[0][1]!r}, after which no answer follows: "
                         "load it with add_eos_token=False")
    answered = tokenizer([text + target for text, target in zip(texts, _texts(rows, "target", places))]).input_ids
    found = _constituents(rows, places, encoded, texts, level, len(prefix)) if level else [[] for _ in texts]
    return encoded.input_ids, found, answered


def _constituents(rows: dict[str, list], places: list[int], encoded, texts: list[str], level: str,
                  before: int = 0) -> list[list[int]]:
    found = []
    for row, (place, offsets, whole) in enumerate(zip(places, encoded.offset_mapping, texts)):
        if level == "word":
            spans = word_spans(rows["text"][row])
        elif "phrases" in rows:
            spans = _spans(rows["phrases"][row], place)
        else:
            spans = phrase_spans(rows["text"][row])
        try:
            found.append(constituent_ids(offsets, [(start + before, end + before) for start, end in spans], whole))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {place}: {error}") from error
    return found


def _spans(phrases: Any, place: int) -> list[tuple[int, int]]:
    try:
        return [(operator.index(start), operator.index(end)) for start, end in phrases]
    except (TypeError, ValueError):
        raise ValueError(f"row {place}: phrases are {phrases!r}, not pairs of characters [start, end)") from None


def _limit(max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    if max_length is None:
        return tokenizer.model_max_length
    if isinstance(max_length, bool) or not isinstance(max_length, Integral) or max_length < 2:
        raise ValueError(f"max_length must be a whole number from 2 up, or None for the model's own, got {max_length!r}")
    return int(max_length)


def _texts(rows: dict[str, list], column: str, places: list[int]) -> list[str]:
    for place, value in zip(places, rows[column]):
        if not isinstance(value, str):
            raise ValueError(f"row {place}: {column} is {value!r}, not text: drop the row or convert the value")
    return rows[column]


def _single_target(prompt: list[int], answered: list[int]) -> int:
    """The one token that `answered` has beyond `prompt`, or −1."""
    return answered[-1] if len(answered) == len(prompt) + 1 and answered[:-1] == prompt else -1


def _pad_left(rows: list[dict], column: str, lengths: list[int], value: int) -> torch.Tensor:
    for row, length in zip(rows, lengths):
        if len(row[column]) != length:
            raise ValueError(f"{column} has {len(row[column])} entries where input_ids has {length}")
    width = max(lengths)
    return torch.tensor([[value] * (width - length) + list(row[column]) for row, length in zip(rows, lengths)],
                        dtype=torch.int64)


def _check_rows(rows: list[dict]) -> None:
    """ValueError for a batch that is empty, padded already, or whose rows have different columns."""
    if not rows:
        raise ValueError("the batch has no rows")
    for column in ("constituent_ids", "labels", "target_id"):
        having = [column in row for row in rows]
        if any(having) and not all(having):
            raise ValueError(f"row {having.index(False)} of the batch has no {column}, and others have it: encode all rows alike")
    for place, row in enumerate(rows):
        if 0 in row.get("attention_mask", ()):
            raise ValueError(f"row {place} of the batch is padded already: tokenize without padding, the collator pads")


def _checked(dataset: Dataset, tokenizer, level: str, columns: Sequence[str]) -> Dataset:
    """The rows as plain Python values, whatever format they are set to give."""
    if not tokenizer.is_fast:
        raise TypeError(f"{type(tokenizer).__name__} is a slow tokenizer without character offsets: use its fast one")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"rows must be a datasets.Dataset, not {type(dataset).__name__}: take one split of a "
                        "dictionary, Dataset.from_list for a list, Dataset.from_generator for a stream")
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the rows lack {missing}; they have {dataset.column_names}")
    if not len(dataset):
        raise ValueError("there are no rows")
    if dataset.format["type"] == "custom":
        raise ValueError("the rows have a transform that is applied as they are read: apply it with map, then reset_format()")
    dataset = dataset.with_format(None)
    if level == "phrase" and "phrases" in dataset.column_names and not any(dataset["phrases"][:]):
        return dataset.remove_columns("phrases")  # a task without phrases of its own
    return dataset
