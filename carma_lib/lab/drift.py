"""How far fine-tuning took a model from its start: hidden states by layer, and the perplexity of plain text.

Linear CKA: arXiv 1905.00414. Sums are in float64. Models run in evaluation mode and are left as they were.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carma_lib.blocks import decoder_blocks, evaluation_mode, read_states

Batch = dict[str, Tensor]


@torch.no_grad()
def hidden_state_drift(model: nn.Module, start: nn.Module, batches: Iterable[Batch]) -> pd.DataFrame:
    """Distance of a model's hidden states h from its start's, h0: one row a layer.

    With h, h0 (width,) of one real token, and H, H0 (tokens, width) of all of them less their means:

        layer   block l's output, before the final norm; −1 for what enters block 0, the embeddings
        drift   mean of ‖h − h0‖ / ‖h0‖, in [0, ∞)
        cosine  mean of h · h0 / (‖h‖ ‖h0‖), in [−1, 1]
        cka     ‖Hᵀ H0‖² / (‖Hᵀ H‖ ‖H0ᵀ H0‖), Frobenius norms, in [0, 1]: blind to rotation and scale, biased
                upwards unless tokens far outnumber the width; NaN where all states of a layer are one vector

    batches: as `Collator` makes them, read once: `input_ids`, `attention_mask` and, if there, `position_ids`
    (batch, tokens); padding on either side never counts. Memory: 32 · width² bytes a layer. `ValueError`:
    different depth or width, states that are not finite, no real token. `TypeError`: no decoder.
    """
    shapes = [(len(decoder_blocks(each)), each.config.hidden_size) for each in (model, start)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"model and start differ in (blocks, width), {shapes[0]} and {shapes[1]}: "
                         "pass the model that fine-tuning started from")
    layers = [_Layer() for _ in range(shapes[0][0] + 1)]
    with evaluation_mode(model), evaluation_mode(start):
        for batch in (each for each in batches if each["attention_mask"].any()):
            for layer, *states in zip(layers, _states(model, batch), _states(start, batch), strict=True):
                layer.add(*states)
    if not layers[0].tokens:
        raise ValueError("the batches hold no real token")
    return pd.DataFrame([{"layer": place - 1, **layer.means()} for place, layer in enumerate(layers)])


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    """exp of the mean of −log p(token | the tokens before it), in [1, ∞]; lower is better.

    The mean is over all real tokens of all rows but each row's first, which nothing precedes. `batches`
    as for `hidden_state_drift`. Memory: the logits of a batch, and those of a row in float32. `ValueError`: logits that
    are not finite, or no row of two real tokens.
    """
    total, predicted = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            inputs = _inputs(model, batch)
            ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            counted = mask[:, 1:] & mask[:, :-1]
            for logits, targets, asked in zip(model(**inputs, use_cache=False).logits[:, -ids.size(1):-1], ids[:, 1:], counted):
                losses = F.cross_entropy(logits[asked].float(), targets[asked], reduction="none")
                total += losses.double().sum().item()
                predicted += len(losses)
    if not predicted:
        raise ValueError("no row has a second real token: there is nothing to predict")
    if not math.isfinite(total):
        raise ValueError("the model's logits are not finite: its training failed, or its weights are damaged")
    return torch.tensor(total / predicted, dtype=torch.double).exp().item()


class _Layer:
    """Sums over the pairs of states of one layer; in products less the first pair, which keeps digits."""

    def __init__(self) -> None:
        self.tokens, self.drift, self.cosine, self.sums, self.products = 0, 0, 0, 0, 0

    def add(self, states: Tensor, before: Tensor) -> None:
        states, before = states.cpu().double(), before.cpu().double()  # where there is room for the sums
        norms = before.norm(dim=-1).clamp_min(torch.finfo(before.dtype).tiny)
        self.drift += ((states - before).norm(dim=-1) / norms).sum()
        self.cosine += F.cosine_similarity(states, before, dim=-1).sum()
        pairs = torch.cat([states, before], dim=-1)
        self.origin = self.origin if self.tokens else pairs[:1]
        pairs = pairs - self.origin
        self.tokens += len(pairs)
        self.sums += pairs.sum(0)
        self.products += pairs.T @ pairs

    def means(self) -> dict[str, float]:
        if not self.products.isfinite().all():
            raise ValueError("hidden states are not finite: training failed, or weights are damaged")
        centred, width = self.products - self.sums.outer(self.sums) / self.tokens, len(self.sums) // 2
        parts = centred[:width, :width], centred[:width, width:], centred[width:, width:]
        own, cross, first = (part.norm().item() for part in parts)
        cka = cross / own * (cross / first) if own and first else math.nan
        drift, cosine = (total.item() / self.tokens for total in (self.drift, self.cosine))
        return {"drift": drift, "cosine": cosine, "cka": cka}


def _states(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What enters block 0 and what leaves each block, (real tokens, width) each."""
    states = read_states(model, batch)
    real = batch["attention_mask"].bool().to(states[0].device)
    return [state[real] for state in states]


def _inputs(model: nn.Module, batch: Batch) -> Batch:
    """What the forward pass needs of a batch, on the model's device."""
    device, wanted = next(model.parameters()).device, ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name].to(device) for name in wanted if name in batch}
