"""What a model's hidden states look like: information between a word's tokens, sums of parts, linear read-outs.

Layer l is block l's output (the last one after the final norm), −1 what enters block 0. The states of an item are
those at the prompt's last position, where the answer is read.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from carma_lib.blocks import evaluation_mode, read_states
from carma_lib.losses import mutual_information_loss
from carma_lib.synonyms.tagging import is_content, tagged_words

Batch = dict[str, torch.Tensor]
NEGATIVES = 5  # a fixed number, so that the bound has one ceiling, ln 6
RIDGE = 1.0  # penalty of both linear fits, on parts that are 0 or 1 and on states of unit mean square
FOLDS = 5


@torch.no_grad()
def token_mutual_information(model: torch.nn.Module, batches: Iterable[Batch]) -> list[float]:
    """ln(1 + k) − L_MI by layer, in nats: a lower bound of the information between two tokens of one word.

    k = 5 negatives of the same text, drawn with one fixed seed; cosine similarity, temperature 0.1. Bounded by
    ln 6 ≈ 1.79; 0 or less, and then no bound at all, where a word's tokens are no more alike than any two
    (InfoNCE: arXiv 1807.03748, section 2.3).
    Mean over batches, weighted by their pairs of tokens. Layers −1, 0, …; `ValueError` without a word of two tokens.
    """
    totals, pairs = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            ids = batch["constituent_ids"]
            same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
            number = int(same.triu(1).sum())
            if not number:
                continue
            states = read_states(model, batch, final_norm=True)
            device = states[0].device
            losses = [mutual_information_loss([layer], ids.to(device), batch["attention_mask"].to(device),
                                              num_negatives=NEGATIVES,
                                              generator=torch.Generator(device).manual_seed(0)).item()
                      for layer in states]
            totals, pairs = totals + number * np.array(losses), pairs + number
    if not pairs:
        raise ValueError("no word of two tokens in these texts: there is no pair to measure")
    return (math.log(1 + NEGATIVES) - totals / pairs).tolist()


@torch.no_grad()
def final_states(model: torch.nn.Module, batches: Iterable[Batch], places: Iterable[Sequence[int]]) -> np.ndarray:
    """The blocks' outputs at the last position, (blocks, items, width), items in the order of their places."""
    parts, order = [], []
    with evaluation_mode(model):
        for batch, some in zip(batches, places, strict=True):
            states = read_states(model, batch, final_norm=True)[1:]
            parts.append(torch.stack([layer[:, -1] for layer in states]).cpu().double())
            order.extend(some)
    return torch.cat(parts, dim=1)[:, np.argsort(order)].numpy()


def part_matrix(texts: Sequence[str], synonyms: Mapping[str, Sequence[str]], *, least: int = 5) -> np.ndarray:
    """Items × parts, 1 where a text holds a content word or a synonym of it; parts of `least` texts or more."""
    words = [{min(form, *synonyms.get(form, [form])) for form in
              (word.form.lower() for word in tagged_words(text) if is_content(word))} for text in texts]
    counts = Counter(word for some in words for word in some)
    parts = sorted(word for word, count in counts.items() if least <= count <= len(texts) - least)
    return np.array([[float(part in some) for part in parts] for some in words]).reshape(len(texts), len(parts))


def additive_structure(states: np.ndarray, parts: np.ndarray) -> tuple[float, float]:
    """How near the states come to a sum of one vector a part: (variance explained, mean |cosine| of parts).

    Model: h = v₀ + Σ over the item's parts v_p, fitted by ridge regression. Variance explained is
    1 − Σ‖h − ĥ‖² / Σ‖h − mean‖² on items left out (five folds in turn, by position), at most 1. The mean
    |cosine| is over all pairs of fitted v_p: 0 where parts are orthogonal; random vectors of width D give
    about √(2 / (π D)).

    states (items, width); parts (items, parts), 0 or 1. `ValueError`: fewer than two parts or ten items.
    """
    if parts.shape[1] < 2 or len(states) < 2 * FOLDS:
        raise ValueError(f"{parts.shape[1]} parts in {len(states)} texts; give at least 2 parts and {2 * FOLDS} texts")
    states = (states - states.mean(axis=0)) / _scale(states)
    folds = PredefinedSplit(np.arange(len(states)) % FOLDS)
    missed = np.square(states - cross_val_predict(Ridge(alpha=RIDGE), parts, states, cv=folds)).sum()
    explained = 1 - missed / np.square(states).sum()
    vectors = Ridge(alpha=RIDGE).fit(parts, states).coef_.T
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    cosines = np.abs(unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return float(explained), float(cosines.mean())


def read_out_accuracy(states: np.ndarray, targets: Sequence[str], others: np.ndarray,
                      other_targets: Sequence[str]) -> float:
    """Share of `others` whose target a linear read-out fitted on (states, targets) names: its transfer.

    One ridge regression a target on indicators; the largest output is the answer.
    """
    scale, middle = _scale(states), states.mean(axis=0)
    fitted = RidgeClassifier(alpha=RIDGE).fit((states - middle) / scale, targets)
    return float(fitted.score((others - middle) / scale, other_targets))


def _scale(states: np.ndarray) -> float:
    return float(np.sqrt(np.square(states - states.mean(axis=0)).mean())) or 1.0
