"""What a cell measures besides its answers: hidden states and plain text, before and after training."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from carma_lib.collate import Collator, encode_text
from carma_lib.lab.cell import Cell
from carma_lib.lab.drift import hidden_state_drift, perplexity
from carma_lib.lab.evaluate import asked_rows, split_prompts
from carma_lib.lab.mechanism import (additive_structure, final_states, part_matrix, read_out_accuracy,
                                     token_mutual_information)
from carma_lib.lab.recipe import EXAMPLES
from carma_lib.lab.start import content_of, rows_of, start_model, text_rows, tokenizer_of
from carma_lib.lab.train import measure
from carma_lib.tasks.controlled.lexicon import controlled_synonyms
from carma_lib.tasks.wordnet import example_sentences

TEXT_BATCH, TEXT_TOKENS = 64, 4096  # rows and tokens of a batch of plain texts: each token has logits of a whole vocabulary
TEXT_STEP, TEXTS = 5, 200  # every fifth validation text, or so many, are enough for a perplexity


def seen_split(folder: Path, cell: Cell) -> str:
    """The test split whose combinations training has shown, or the task's only one."""
    rows = rows_of(folder, cell.task)
    return "test_seen" if "test_seen" in rows else next(name for name in rows if name.startswith("test"))


def measured(folder: Path, cell: Cell, model: Any) -> list[dict[str, Any]]:
    """The recipe's measures of a trained model and of its start, and how far it went from there."""
    wanted = cell.recipe.measures
    if not wanted or cell.untuned:
        return []
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=cell.recipe.bf16):
        found = [*_before(folder, cell), *_measures(folder, cell, model, "after")]
        if "drift" in wanted:
            start = start_model(folder, cell).to(next(model.parameters()).device)
            drift = hidden_state_drift(model, start, _batches(folder, cell))
            found += [measure(name, value, layer=layer) for name in ("drift", "cosine", "cka")
                      for layer, value in zip(drift["layer"], drift[name])]
    return found


def _batches(folder: Path, cell: Cell) -> list[dict[str, torch.Tensor]]:
    return split_prompts(folder, cell, seen_split(folder, cell), first=cell.recipe.measured_items).batches


_known_before: dict[tuple, list[dict[str, Any]]] = {}


def _before(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    """The measures of the start, the same for every method; random weights are told apart by their seed."""
    recipe = cell.recipe
    tasks = (cell.task, *recipe.tokenizer_tasks, *(name for name in recipe.plain_texts if name != EXAMPLES))
    key = (folder, cell.task, *(content_of(folder, task) for task in tasks), recipe.start_mark(), recipe.testing_mark(),
           0 if recipe.has_pretrained_weights else cell.seed, recipe.validation_items)
    if key not in _known_before:
        model = start_model(folder, cell)
        if torch.cuda.is_available():
            model.to("cuda")
        _known_before[key] = _measures(folder, cell, model, "before")
    return _known_before[key]


def _measures(folder: Path, cell: Cell, model: Any, when: str) -> list[dict[str, Any]]:
    found, wanted = [], cell.recipe.measures
    if "structure" in wanted and "test_held_out" in rows_of(folder, cell.task):
        found += [measure(f"{name}_{when}", value, layer=layer)
                  for name, values in _structure(folder, cell, model).items() for layer, value in enumerate(values)]
    if "information" in wanted:
        found += [measure(f"token_mutual_information_{when}", value, layer=layer - 1)
                  for layer, value in enumerate(token_mutual_information(model, _batches(folder, cell)))]
    if "perplexity" in wanted:
        for name in cell.recipe.plain_texts or ("",):
            found.append(measure(f"perplexity_{when}", perplexity(model, _text_batches(folder, cell, name)), split=name))
    return found


def _structure(folder: Path, cell: Cell, model: Any) -> dict[str, list[float]]:
    """Additive structure over the test items, and a read-out fitted on validation rows and tested, by layer."""
    splits = ("validation", "test_seen", "test_held_out")
    asked = {split: split_prompts(folder, cell, split) for split in splits}
    states = {split: final_states(model, prompts.batches, prompts.places) for split, prompts in asked.items()}
    parts = _parts(tuple(text for split in splits[1:] for text in asked_rows(folder, cell, split)["text"]))
    found: dict[str, list[float]] = {name: [] for name in (
        "variance_explained", "angle", "read_out_seen", "read_out_held_out")}
    fitted = asked["validation"].targets + asked["test_seen"].targets[::2]
    for layer in range(len(states["validation"])):
        both = np.concatenate([states[split][layer] for split in splits[1:]])
        explained, cosine = additive_structure(both, parts)
        found["variance_explained"].append(explained)
        found["angle"].append(cosine)
        known = np.concatenate([states["validation"][layer], states["test_seen"][layer][::2]])
        for split, rest in (("test_seen", slice(1, None, 2)), ("test_held_out", slice(None))):
            found["read_out_" + split.removeprefix("test_")].append(read_out_accuracy(
                known, fitted, states[split][layer][rest], asked[split].targets[rest]))
    return found


@lru_cache(maxsize=8)
def _parts(texts: tuple[str, ...]) -> np.ndarray:
    return part_matrix(texts, controlled_synonyms())


_known_texts: dict[tuple, list[dict[str, torch.Tensor]]] = {}


def _text_batches(folder: Path, cell: Cell, name: str) -> list[dict[str, torch.Tensor]]:
    """The plain texts of a name in `plain_texts`, or, for "", of every task that the tokenizer was made of."""
    tasks, tokenizer = cell.recipe.tokenizer_tasks or (cell.task,), tokenizer_of(folder, cell)
    of = () if name == EXAMPLES else (name,) if name else tasks
    key = (name, *(content_of(folder, task) for task in of), tokenizer)
    if key not in _known_texts:
        if name == EXAMPLES:
            rows = encode_text(datasets.Dataset.from_dict({"text": example_sentences(TEXTS)}), tokenizer).to_list()
        else:
            rows = text_rows(folder, of, cell, "validation")
            rows = rows[:TEXTS] if name else rows[::TEXT_STEP]
        _known_texts[key] = [Collator(tokenizer)(batch) for batch in _in_batches(rows)]
    return _known_texts[key]


def _in_batches(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Shorter rows first, at most `TEXT_BATCH` of them and `TEXT_TOKENS` tokens with their padding in a batch."""
    batches: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        full = not batches or len(batches[-1]) >= min(TEXT_BATCH, TEXT_TOKENS // len(row["input_ids"]))
        batches += [[]] if full else []
        batches[-1].append(row)
    return batches
