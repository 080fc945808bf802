"""Constituent-Aware Pooling (CAP): what of a model's answer survives when a constituent becomes one vector.

At a start layer *l* the residual stream entering block *l* is changed once: the vectors of the tokens of one
constituent (a word, a phrase) are replaced by their sum, mean or maximum. The blocks from *l* on see the
shorter sequence as if it had always been that long: positions counted anew, a causal mask (and sliding
window) of its length.

Method: arXiv 2410.12924 and arXiv 2502.11066. What they leave open is decided here: a real token of no
constituent (id −1) stays as it is, and so does the prompt's last token whatever its id, so that the answer is
always read at the same place.

Everything after the change is the model's own code: its forward pass runs with the blocks below the start
layer passed over and the pooled stream handed to the start layer. Masks, rotary or absolute positions, the
final norm and the head need no restatement per family. During a call the model is in evaluation mode (no
dropout) and records no gradients; afterwards it is as it was. Two threads must not use one model at a time.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

PROTOCOLS = ("sum", "mean", "max")
DEPTH_SHARES = (0.01, 0.25, 0.5, 0.75, 1.0)

# Model families (`config.model_type`) and where the base model keeps its blocks.
BLOCKS = {
    "gpt2": "h",
    "llama": "layers",
    "mistral": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "gemma": "layers",
    "gemma2": "layers",
    "phi3": "layers",
    "gpt_neox": "layers",
    "olmo2": "layers",
    "smollm3": "layers",
}


class PoolingGrid(NamedTuple):
    """What `pooling_grid` returns."""

    clean: Tensor
    """(batch, vocabulary) logits after the last real token, nothing pooled."""
    pooled: dict[tuple[int, str], Tensor]
    """(start layer, protocol) → (batch, vocabulary) logits after the last real token."""
    changed: Tensor
    """(batch,) int64, the number of tokens pooled away: real tokens minus the pooled sequence's length."""


def constituent_aware_pooling(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    constituent_ids: Tensor,
    *,
    start_layer: int,
    protocol: str,
) -> Tensor:
    """Logits (batch, vocabulary) after each row's last real token, constituents pooled from `start_layer` on.

    `start_layer` *l* pools the stream entering block *l*, 0 ≤ *l* < number of blocks; `protocol` is "sum",
    "mean" or "max" (element by element). Inputs and errors as in `pooling_grid`, cheaper for several runs.
    """
    grid = pooling_grid(
        model, input_ids, attention_mask, constituent_ids, start_layers=[start_layer], protocols=[protocol]
    )
    (logits,) = grid.pooled.values()
    return logits


@torch.no_grad()
def pooling_grid(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    constituent_ids: Tensor,
    *,
    start_layers: Sequence[int],
    protocols: Sequence[str] = PROTOCOLS,
) -> PoolingGrid:
    """Every start layer × protocol from one clean pass; a pooled run computes only the blocks from its start.

    `input_ids`, `attention_mask` (1 = real token) and `constituent_ids` are integers (batch, tokens), padded
    on either side. Tokens of one constituent share an id ≥ 0 and stand next to each other; −1 is a token of
    none. Ids count within a row; those of padding are ignored. A row's answer does not depend on the other
    rows. The model may be wrapped by peft (LoRA and the like) or for data parallelism.

    Raises ValueError for an unsupported model, start layer or protocol, wrong shapes or types, a row without
    a real token or padded on both sides, and a constituent whose tokens are not next to each other.
    """
    model, blocks = _model_and_blocks(model)
    _check_inputs(input_ids, attention_mask, constituent_ids)
    start_layers = [_checked_start_layer(layer, len(blocks)) for layer in dict.fromkeys(start_layers)]
    protocols = [_checked_protocol(protocol) for protocol in dict.fromkeys(protocols)]

    input_ids, mask, ids = _left_padded(input_ids, attention_mask.long(), constituent_ids)
    positions = pooled_positions(mask, ids)
    lengths = positions[:, -1] + 1

    pooled = {}
    with evaluation_mode(model):
        with _recording(blocks, start_layers) as record:
            clean = _last_logits(model, mask.sum(dim=1), input_ids=input_ids)
        for layer, protocol in itertools.product(start_layers, protocols):
            stream = _pool(record.streams[layer], positions, protocol)
            with _starting_at(blocks, layer, stream, record.blocks_return_tuples):
                pooled[layer, protocol] = _last_logits(model, lengths, inputs_embeds=stream)
    return PoolingGrid(clean, pooled, changed=mask.sum(dim=1) - lengths)


def pooled_positions(attention_mask: Tensor, constituent_ids: Tensor) -> Tensor:
    """The position of every token in the pooled sequence, (batch, tokens) int64; −1 for padding.

    Tokens of one constituent have one position. Shapes, rules and errors as in `pooling_grid`.
    """
    _check_inputs(attention_mask, attention_mask, constituent_ids)
    real = attention_mask.bool()
    ids = constituent_ids.masked_fill(~real, -1)
    _refuse_split_constituents(ids)
    count = real.cumsum(dim=1)
    ids = ids.masked_fill(count == count[:, -1:], -1)  # the last real token stays alone
    begins = real.clone()
    begins[:, 1:] &= (ids[:, 1:] != ids[:, :-1]) | (ids[:, 1:] < 0)
    return (begins.cumsum(dim=1) - 1).masked_fill(~real, -1)


def start_layers_from_depth(num_layers: int, shares: Sequence[float] = DEPTH_SHARES) -> list[int]:
    """Block indices at shares of depth: ceil(share × `num_layers`) − 1, but at least 1 of more than 8 blocks.

    The rule gives the published start layers of 16, 18, 24 and 36 blocks, and 1, 2, 5, 8, 11 of 12 blocks,
    where 1, 4, 5, 8, 11 were published. Fewer blocks start at 0, so that 1 % and 25 % differ. One index per
    share: of four blocks or fewer, two shares can give the same one.

    Raises ValueError for a share outside (0, 1] or `num_layers` below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, not {num_layers}")
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"shares of depth must lie in (0, 1], not {list(shares)}")
    lowest = 1 if num_layers > 8 else 0
    return [max(lowest, math.ceil(round(share * num_layers, 9)) - 1) for share in shares]


def _pool(stream: Tensor, positions: Tensor, protocol: str) -> Tensor:
    """(batch, tokens, width) → (batch, longest pooled length, width), both padded on the left."""
    lengths = positions[:, -1:] + 1
    longest = int(lengths.max())
    slots = torch.where(positions < 0, 0, positions + 1 + longest - lengths)  # slot 0 takes the padding
    values = stream.to(torch.promote_types(stream.dtype, torch.float32))
    pooled = values.new_zeros(len(stream), longest + 1, stream.shape[-1]).scatter_reduce(
        1,
        slots.to(stream.device).unsqueeze(-1).expand_as(stream),
        values,
        reduce="amax" if protocol == "max" else protocol,
        include_self=False,
    )
    return pooled[:, 1:].to(stream.dtype)


def _last_logits(model: nn.Module, lengths: Tensor, **inputs: Tensor) -> Tensor:
    """Logits (batch, vocabulary) after the last position of left-padded inputs of `lengths` (batch,)."""
    (tokens,) = inputs.values()
    longest = tokens.shape[1]
    position_ids = torch.arange(longest, device=lengths.device) - (longest - lengths).unsqueeze(1)
    outputs = model(
        **inputs,
        attention_mask=(position_ids >= 0).long(),
        position_ids=position_ids.clamp(min=0),
        use_cache=False,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
        logits_to_keep=1,
    )
    return outputs.logits[:, -1]


@dataclass
class _Record:
    """What a clean pass leaves: the stream entering each start layer, and the form blocks return it in."""

    streams: dict[int, Tensor] = field(default_factory=dict)
    blocks_return_tuples: bool = False


@contextmanager
def _recording(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[_Record]:
    """Within: a forward pass of the model fills the record."""
    record = _Record()

    def keep_stream(layer: int, block: nn.Module, args: tuple) -> None:
        record.streams[layer] = args[0]

    def keep_form(block: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        record.blocks_return_tuples = isinstance(output, tuple)

    handles = []
    try:
        handles.append(blocks[0].register_forward_hook(keep_form))
        for layer in layers:
            handles.append(blocks[layer].register_forward_pre_hook(partial(keep_stream, layer)))
        yield record
    finally:
        for handle in handles:
            handle.remove()


class _PassedOver(nn.Module):
    """Stands in for a block below the start layer: returns its input, as the block would."""

    def __init__(self, block: nn.Module, returns_tuple: bool):
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)  # read by the model in transformers 4
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if self.returns_tuple else hidden_states


@contextmanager
def _starting_at(blocks: nn.ModuleList, layer: int, stream: Tensor, returns_tuple: bool) -> Iterator[None]:
    """Within: a forward pass runs only the blocks from `layer` on, and `stream` enters `layer`."""
    below = list(blocks)[:layer]
    handle = blocks[layer].register_forward_pre_hook(lambda block, args: (stream, *args[1:]), prepend=True)
    try:
        for index, block in enumerate(below):
            blocks[index] = _PassedOver(block, returns_tuple)
        yield
    finally:
        handle.remove()
        for index, block in enumerate(below):
            blocks[index] = block


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within: every module is in evaluation mode; afterwards each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _left_padded(input_ids: Tensor, attention_mask: Tensor, constituent_ids: Tensor) -> tuple[Tensor, ...]:
    """The three (batch, tokens) tensors, every row's padding on the left and no column of padding only."""
    longest = int(attention_mask.sum(dim=1).max())
    order = attention_mask.argsort(dim=1, stable=True)[:, -longest:]
    return tuple(tensor.gather(1, order) for tensor in (input_ids, attention_mask, constituent_ids))


def _model_and_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The causal language model within its wrappers, and its blocks."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(model, "get_base_model"):  # peft
        if model.active_peft_config.is_prompt_learning:
            raise ValueError("pooling does not support prompt-learning adapters; use LoRA or the plain model")
        model = model.get_base_model()
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in BLOCKS or model.get_output_embeddings() is None:
        raise ValueError(
            f"pooling does not support {type(model).__name__} ({family}); "
            f"it supports causal language models of the families {', '.join(BLOCKS)}"
        )
    return model, getattr(model.base_model, BLOCKS[family])


def _check_inputs(input_ids: Tensor, attention_mask: Tensor, constituent_ids: Tensor) -> None:
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "constituent_ids": constituent_ids}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{name} must be a tensor of integers, not {kind}")
        if tensor.dim() != 2 or tensor.shape != input_ids.shape or not tensor.numel():
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
            raise ValueError(f"inputs must share one shape (batch, tokens) and hold a token, not {shapes}")
    if ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (real token)")
    empty = (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} have no real token; leave them out of the batch")
    if (attention_mask.long().diff(dim=1) != 0).sum(dim=1).max() > 1:
        raise ValueError("attention_mask has a row with padding on both sides or within; pad one side only")


def _refuse_split_constituents(ids: Tensor) -> None:
    """ValueError where an id ≥ 0 of `ids` (batch, tokens; padding −1) stands in two places of a row."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    heads = ids.masked_fill(~begins, -1).sort(dim=1).values
    split = (heads[:, 1:] == heads[:, :-1]) & (heads[:, 1:] >= 0)
    if split.any():
        row, column = split.nonzero()[0].tolist()
        raise ValueError(
            f"the tokens of constituent {int(heads[row, column])} in row {row} are not next to each other; "
            "give each run of tokens its own id"
        )


def _checked_start_layer(layer: int, num_blocks: int) -> int:
    try:
        index = operator.index(layer)
    except TypeError:
        raise ValueError(f"start layer must be an integer, not {layer!r}") from None
    if not 0 <= index < num_blocks:
        raise ValueError(f"start layer {index} lies outside the model's blocks 0 to {num_blocks - 1}")
    return index


def _checked_protocol(protocol: str) -> str:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    return protocol
