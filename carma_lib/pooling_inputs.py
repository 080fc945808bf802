"""What pooling is given, checked before anything is computed; each error is a `ValueError` in one line."""
from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from carma_lib.blocks import learned_positions

PROTOCOLS = ("sum", "mean", "max")


def check_inputs(input_ids: Tensor, attention_mask: Tensor, constituent_ids: Tensor) -> None:
    """Three whole-number tensors (batch, tokens); the mask holds 0 and 1, a row real tokens in one run, at one of its ends."""
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "constituent_ids": constituent_ids}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name} must be a tensor of integers, not {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.dim() != 2 or tensor.shape != input_ids.shape or not tensor.numel():
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
            raise ValueError(f"inputs must share one shape (batch, tokens) and hold a token, not {shapes}")
    if ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (real token)")
    if empty := (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist():
        raise ValueError(f"rows {empty} have no real token; leave them out of the batch")
    if (attention_mask.long().diff(dim=1) != 0).sum(dim=1).max() > 1:
        raise ValueError("attention_mask has a row with padding on both sides or within; pad one side only")


def check_reach(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Real tokens lie in the model's vocabulary, and a row has no more of them than the model has positions."""
    vocabulary, most = model.get_input_embeddings().weight.shape[0], learned_positions(model)
    inside = input_ids.long().masked_fill(attention_mask == 0, 0)
    if inside.min() < 0 or inside.max() >= vocabulary:
        raise ValueError(f"input_ids must lie from 0 to {vocabulary - 1}, the model's vocabulary; they reach from {int(inside.min())} to "
                         f"{int(inside.max())}")
    if most and (longest := int(attention_mask.sum(dim=1).max())) > most:
        raise ValueError(f"a row has {longest:,} tokens, and the model knows {most:,} positions: cut the rows")


def checked_grid(start_layers: Sequence[int], protocols: Sequence[str], depth: int) -> tuple[list[int], list[str]]:
    """Both axes of the grid, each value once."""
    for name, values, example in (("start_layers", start_layers, "[0, 5]"), ("protocols", protocols, '["mean"]')):
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"{name} must be a list, such as {example}, not {values!r}")
    start_layers, protocols = list(start_layers), list(protocols)
    for layer in start_layers:
        if not hasattr(layer, "__index__"):
            raise ValueError(f"start layer must be an integer, not {layer!r}")
        if not 0 <= layer < depth:
            raise ValueError(f"start layer {layer} lies outside the model's blocks 0 to {depth - 1}")
    if unknown := [protocol for protocol in protocols if protocol not in PROTOCOLS]:
        raise ValueError(f"unknown protocol {unknown[0]!r}; use one of {', '.join(PROTOCOLS)}")
    return list(dict.fromkeys(map(operator.index, start_layers))), list(dict.fromkeys(protocols))
