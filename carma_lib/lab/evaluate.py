"""Clean, replaced and pooled answers of a model → rows of the result table, one an item and condition.

The answer is the single most likely token of the whole vocabulary after the prompt's last token (as published:
exact match, no restriction to the task's labels). An answer of several tokens (one's own data) is right if the greedy
answer equals it with its end; such items are not pooled, since pooling here reads one token.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch

from carma_lib.blocks import takes
from carma_lib.collate import Collator, answerable, encode
from carma_lib.lab.cell import Cell
from carma_lib.lab.start import content_of, depth_of, model_name, prompt_of, rows_of, tokenizer_of
from carma_lib.models import Prompt
from carma_lib.pooling import PROTOCOLS, pooling_grid, start_layers_from_depth
from carma_lib.synonyms.replacement import replaced_rows, worst_replacements
from carma_lib.tasks import task_named


class Prompts(NamedTuple):
    """Rows as padded batches of like length, made once for any number of models: `places` are rows' numbers."""

    item_ids: list[str]
    targets: list[str]
    places: list[list[int]]
    batches: list[dict[str, torch.Tensor]]


def prompts_of(rows: datasets.Dataset, tokenizer: Any, prompt: Prompt, *, level: str = "word", answer: str = "token",
               batch_size: int = 64) -> Prompts:
    """The encoded rows of a split (see `collate.encode`) in batches, short ones first."""
    encoded = encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, level=level, answer=answer).to_list()
    order = sorted(range(len(encoded)), key=lambda row: encoded[row]["length"])
    places = [order[first:first + batch_size] for first in range(0, len(order), batch_size)]
    collate = Collator(tokenizer)
    return Prompts(list(rows["item_id"]), list(rows["target"]), places,
                   [collate([encoded[place] for place in some]) for some in places])


def shares_by_layer(depth: int, depth_shares: Sequence[float]) -> dict[int, float]:
    """Start layer → share of depth; of shares that name one layer the first is kept."""
    layers = start_layers_from_depth(depth, depth_shares)
    return {layer: share for layer, share in zip(reversed(layers), reversed(depth_shares))}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Prompts, *, shares: dict[int, float] | None = None,
            protocols: Sequence[str] = PROTOCOLS, level: str = "word", bf16: bool = False) -> pd.DataFrame:
    """Clean answers without `shares` (start layer → share of depth), else pooled ones by layer and protocol.

    bf16: matrix products in bf16, as in training. Columns: item_id, target, and those from `condition` on of the
    result table. `ValueError` for logits that are not finite.
    """
    device, shares = next(model.parameters()).device, shares or {}
    pieces: dict[tuple[int, str], list[pd.DataFrame]] = {}
    model.eval()
    for places, batch in zip(prompts.places, prompts.batches):
        batch = {name: value.to(device) for name, value in batch.items()}
        if "labels" in batch:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                pieces.setdefault((-1, ""), []).append(_score_texts(model, batch, tokenizer).assign(row=places, changed=0))
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            grid = pooling_grid(model, batch["input_ids"], batch["attention_mask"], batch["constituent_ids"],
                                start_layers=list(shares), protocols=protocols if shares else ())
        changed = grid.changed.cpu().numpy() if shares else 0
        for key, logits in (grid.pooled if shares else {(-1, ""): grid.clean}).items():
            pieces.setdefault(key, []).append(_score(logits, batch["target_ids"]).assign(row=places, changed=changed))
    frames = []
    for (layer, protocol), piece in pieces.items():
        frame = pd.concat(piece).sort_values("row")
        frames.append(frame.drop(columns="row").assign(
            item_id=prompts.item_ids, target=prompts.targets, condition="pooled" if shares else "clean", source="",
            rate=0.0, start_layer=layer, depth_share=shares.get(layer, float("nan")), protocol=protocol,
            level=level if shares else ""))
    table = pd.concat(frames, ignore_index=True)
    token = table.pop("token") if "token" in table else table["prediction"]
    if table["prediction"].dtype.kind in "iu":
        table["prediction"] = token.map({each: tokenizer.decode([each]).strip() for each in token.unique()})
    texts = table["prediction"]
    same = (texts == table["target"]) & ~table["correct"]  # other tokens of the same letters, as with a space before
    table["prediction"] = texts.where(~same, texts + "#" + token.astype(str)).where(~table["correct"], table["target"])
    return table


def _score_texts(model: Any, batch: dict[str, torch.Tensor], tokenizer: Any) -> pd.DataFrame:
    """The greedy answers to items whose answers have several tokens: right if each token is the most likely one.

    Until the first wrong token the greedy answer is what this one pass reads; the prediction, and its probability, go
    up to there, and `token` is its last one. rank: the worst of the answer's tokens; log_probability: of the whole answer.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    answered = (batch["labels"] != -100).any(0).nonzero()
    from_first = batch["labels"].size(1) - max(1, int(answered[0])) + 1  # positions that have logits: from the one before an answer
    settings = {"logits_to_keep": from_first} if takes(model, "logits_to_keep") else {}
    logits = model(**inputs, use_cache=False, **settings).logits[:, -from_first:-1]
    labels = batch["labels"][:, 1 - from_first:]
    asked, rows = labels != -100, []
    for row in range(len(labels)):
        targets, found = labels[row][asked[row]], logits[row][asked[row]]
        scores = _score(found, targets)
        right = int(scores["correct"].cumprod().sum())
        said = scores[:right + 1]
        rows.append({"prediction": tokenizer.decode(said["prediction"].to_numpy(), skip_special_tokens=True).strip(' "'),
                     "token": said["prediction"].iloc[-1], "correct": right == len(scores),
                     "prediction_probability": said["prediction_probability"].prod(), "rank": int(scores["rank"].max()),
                     "log_probability": scores["log_probability"].sum()})
    return pd.DataFrame(rows)


def _score(logits: torch.Tensor, targets: torch.Tensor) -> pd.DataFrame:
    """Prediction (token id) and its probability, correctness, rank and log-probability of the target, from logits.

    Of tokens that are equally likely, as in bf16 the best two often are, the first of the vocabulary is the prediction,
    as greedy decoding takes it. A target that is not predicted has the worst of the ranks that it shares.
    """
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite; it was not trained well, or its weights are damaged")
    log_probability = logits.float().log_softmax(-1)
    of_target = log_probability.gather(1, targets[:, None])
    prediction = log_probability.argmax(-1)
    correct = prediction == targets
    rank = (log_probability >= of_target).sum(-1).masked_fill(correct, 1)
    return pd.DataFrame({
        "prediction": prediction.cpu().numpy(), "correct": correct.cpu().numpy(),
        "prediction_probability": log_probability.amax(-1).double().exp().cpu().numpy(),
        "rank": rank.cpu().numpy(),
        "log_probability": of_target[:, 0].double().cpu().numpy()})


def test_splits(folder: Path, cell: Cell) -> tuple[str, ...]:
    """The splits that a cell is tested on. `ValueError` for one that the task does not have."""
    rows, wanted = rows_of(folder, cell.task), cell.recipe.test_splits
    if unknown := [name for name in (*wanted, *cell.recipe.changed_splits) if name not in rows]:
        raise ValueError(f"{cell.task} has no split '{unknown[0]}'; it has {', '.join(rows)}")
    return wanted or tuple(name for name in rows if name.startswith("test"))


def asked_rows(folder: Path, cell: Cell, split: str) -> datasets.Dataset:
    """The items of a split that models from this cell's start are asked.

    A pretrained start is asked the first so many that its tokenizer can answer in one token (as published, so test
    sets differ by tokenizer). `ValueError` if there is none.
    """
    recipe = cell.recipe
    limit = recipe.validation_items if split == "validation" else recipe.test_items
    free = recipe.small or task_named(cell.task).answer == "text"
    return _asked_rows(folder, cell.task, split, limit, None if free else tokenizer_of(folder, cell), prompt_of(cell.task, recipe),
                       content_of(folder, cell.task))


@lru_cache(maxsize=64)
def _asked_rows(folder: Path, task: str, split: str, limit: int, tokenizer: Any, prompt: Prompt, content: str) -> datasets.Dataset:
    rows = rows_of(folder, task)[split]
    if tokenizer is not None:
        return answerable(rows, tokenizer, prompt, limit=limit or None)
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def split_prompts(folder: Path, cell: Cell, split: str, *, level: str = "word", first: int = 0,
                  texts: tuple[str, ...] | None = None) -> Prompts:
    """The prompts of a split, made once a process; first: so many items of it; texts: the items in these wordings."""
    return _prompts(asked_rows(folder, cell, split), cell.task, level, first, texts, tokenizer_of(folder, cell),
                    prompt_of(cell.task, cell.recipe), cell.recipe.evaluation_batch)


@lru_cache(maxsize=64)
def _prompts(rows: datasets.Dataset, task: str, level: str, first: int, texts: tuple[str, ...] | None,
             tokenizer: Any, prompt: Prompt, batch_size: int) -> Prompts:
    if texts is not None:
        of_texts = rows.select(range(len(texts))).remove_columns("phrases")
        rows = datasets.Dataset.from_dict({**of_texts.to_dict(), "text": list(texts)}, features=of_texts.features)
    elif first:
        rows = rows.select(range(min(first, len(rows))))
    return prompts_of(rows, tokenizer, prompt, level=level, answer=task_named(task).answer, batch_size=batch_size)


def _replacement(cell: Cell, rows: datasets.Dataset) -> dict[str, Any]:
    """Source and forbidden words of a cell's replaced texts."""
    own = task_named(cell.task).replacement(rows)
    return {**own, "source": "ranked"} if cell.recipe.synonyms == "ranked" else own


def replacements(folder: Path, cell: Cell, split: str) -> dict[float, tuple[tuple[str, ...], list[int]]]:
    """By rate: the texts of a split with synonyms, and how many words of each were replaced; the same for all models."""
    rows, found = asked_rows(folder, cell, split), {}
    for rate in cell.recipe.rates:
        changed, numbers = replaced_rows(rows, rate=rate, seed=cell.recipe.replacement_seed, cache_dir=folder / "cache",
                                         **_replacement(cell, rows))
        found[rate] = (tuple(changed["text"]), numbers)
    return found


def clean_answers(folder: Path, cell: Cell, model: Any, split: str) -> pd.DataFrame:
    """Answers to the unchanged items of a split."""
    return answers(model, tokenizer_of(folder, cell), split_prompts(folder, cell, split), bf16=cell.recipe.bf16)


def changed_answers(folder: Path, cell: Cell, model: Any, split: str) -> pd.DataFrame:
    """Answers to the items of a split with synonyms, to the adversary's choice of them, and under pooling."""
    recipe, tokenizer, parts = cell.recipe, tokenizer_of(folder, cell), []
    source = "ranked" if recipe.synonyms == "ranked" else task_named(cell.task).synonyms

    def asked(texts: Sequence[str]) -> pd.DataFrame:
        return answers(model, tokenizer, split_prompts(folder, cell, split, texts=tuple(texts)), bf16=recipe.bf16)

    for rate, (texts, changed) in replacements(folder, cell, split).items():
        parts.append(asked(texts).assign(condition="replaced", source=source, rate=rate, changed=changed))
    rows = asked_rows(folder, cell, split)
    some = rows.select(range(min(recipe.pooled_items or len(rows), len(rows))))
    if recipe.adversary_rate:
        worst = worst_replacements(
            some["text"], rate=recipe.adversary_rate, seeds=range(1, recipe.adversary_tries + 1),
            score=lambda texts: -asked(texts)["log_probability"].to_numpy(), item_ids=some["item_id"],
            cache_dir=folder / "cache", **_replacement(cell, some))
        parts.append(asked([each.text for each in worst]).assign(
            condition="replaced", source="adversary", rate=recipe.adversary_rate, changed=[each.made for each in worst]))
    pooled = recipe.depth_shares and task_named(cell.task).answer == "token"
    shares = shares_by_layer(depth_of(recipe), recipe.depth_shares) if pooled else {}
    for level in recipe.levels if shares else ():
        prompts = split_prompts(folder, cell, split, level=level, first=len(some))
        parts.append(answers(model, tokenizer, prompts, shares=shares, protocols=recipe.protocols, level=level, bf16=recipe.bf16))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def finish(folder: Path, cell: Cell, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Parts with `split` and `budget` as one table in the columns of the result table, compactly typed."""
    table = pd.concat([part for part in tables if len(part)], ignore_index=True).assign(
        task=cell.task, method=cell.method, seed=cell.seed, model=model_name(cell.recipe), start=cell.recipe.start,
        cell=cell.key)
    whole = {"seed": np.int64, **dict.fromkeys(("budget", "changed", "rank"), np.int32), "start_layer": np.int16}
    return table.astype({name: kind for name, kind in whole.items()}).assign(
        rate=table["rate"].round(4), depth_share=table["depth_share"].round(4),
        log_probability=table["log_probability"].round(2).astype("float32"),
        prediction_probability=table["prediction_probability"].astype("float32"))
