"""The published way of computing the terms, restated from the formula for comparison: a loop over every pair.

As published: every item padded to a fixed length, logits at every position, negatives drawn one pair at a
time and with replacement. `every_row=True` also applies the word spans of every item to every row of the
batch, as the authors' code does; `every_row=False` uses each row's own, which is what the formula says.
"""

import random

import torch
import torch.nn.functional as F

from carma_lib.losses import CarmaConfig

PADDED_LENGTH = {"wordnet": 58, "many_pieces": 58, "sst": 124}


def pad_to_published_length(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the left to `length` tokens; a longer batch stays as it is."""
    missing = max(0, length - batch["input_ids"].shape[1])
    fill = {"constituent_ids": -1}
    return {
        name: tensor if tensor.dim() == 1 else F.pad(tensor, (missing, 0), value=fill.get(name, 0))
        for name, tensor in batch.items()
    }


def naive_loss(model, batch: dict[str, torch.Tensor], carma: CarmaConfig, every_row: bool) -> torch.Tensor:
    """(1 − λ) L_task + λ (γ L_MI + η L_stability), pair by pair."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    outputs = model(**inputs, output_hidden_states=True)
    task_loss = F.cross_entropy(outputs.logits[:, -1].float(), batch["target_ids"])
    ids = batch["constituent_ids"].tolist()
    first, last = carma.mi_layers
    mutual_information = sum(
        _layer_loss(outputs.hidden_states[layer + 1].float(), ids, carma, every_row)
        for layer in range(first, last + 1)
    ) / (last - first + 1)
    first, last = carma.stability_layers
    stability = 0
    for layer in range(first, last):
        before, after = outputs.hidden_states[layer + 1].float(), outputs.hidden_states[layer + 2].float()
        stability += (after - before).pow(2).mean() / (before.pow(2).mean() + after.pow(2).mean() + 1e-8)
    regulariser = carma.mi_weight * mutual_information + carma.stability_weight * stability
    return (1 - carma.carma_weight) * task_loss + carma.carma_weight * regulariser


def _layer_loss(
    states: torch.Tensor, ids: list[list[int]], carma: CarmaConfig, every_row: bool
) -> torch.Tensor:
    costs = []
    for row in range(len(ids)):
        for spans_of in range(len(ids)) if every_row else [row]:
            for word in range(max(ids[spans_of]) + 1):
                inside = [token for token, owner in enumerate(ids[spans_of]) if owner == word]
                outside = [token for token, owner in enumerate(ids[spans_of]) if owner != word]
                for i, anchor in enumerate(inside):
                    for positive in inside[i + 1 :]:
                        costs.append(_pair_loss(states[row], anchor, positive, outside, carma))
    return torch.stack(costs).mean() if costs else states.sum() * 0


def _pair_loss(
    states: torch.Tensor, anchor: int, positive: int, outside: list[int], carma: CarmaConfig
) -> torch.Tensor:
    similarity = F.cosine_similarity(states[anchor], states[positive], dim=0) / carma.temperature
    drawn = states[random.choices(outside, k=carma.num_negatives)]
    rivals = F.cosine_similarity(states[anchor].unsqueeze(0), drawn, dim=1) / carma.temperature
    return torch.logsumexp(torch.cat([similarity.unsqueeze(0), rivals]), 0) - similarity
