"""Constituent-Aware Pooling (CAP): what of a model's answer survives when a constituent becomes one vector.

At a start layer *l*, of the residual stream entering block *l*, the vectors of the tokens of one constituent (a
word, a phrase) are replaced by their sum, mean or maximum. The blocks from *l* on see a sequence of that length:
positions counted anew, a causal mask of its own. Blocks that read the embeddings again read them pooled too.

Method: arXiv 2410.12924 and arXiv 2502.11066. Our decisions where they are open: a token of no constituent (id −1)
stays as it is, and so does the prompt's last token, so that the answer is always read at the same place.

All but the change is the model's own forward pass, with the blocks below the start layer passed over; whether that is
right is checked on the model itself, once a start layer. During a call the model is in evaluation mode, without
gradients; afterwards it is as it was. Two threads must not use one model at a time.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from carma_lib.blocks import decoder_blocks, evaluation_mode, language_model
from carma_lib.pooling_inputs import PROTOCOLS, check_inputs, check_reach, checked_grid

DEPTH_SHARES = (0.01, 0.25, 0.5, 0.75, 1.0)

# What the check found out about a model, without autocast and with it: the start layers that passed, and whether
# padding leaves its answer alone.
_checked: WeakKeyDictionary[nn.Module, dict[bool, tuple[set[int], bool]]] = WeakKeyDictionary()


class PoolingGrid(NamedTuple):
    """Logits (batch, vocabulary) after the last real token, with nothing pooled and by (start layer, protocol).

    changed: (batch,) int64, the number of tokens pooled away.
    """

    clean: Tensor
    pooled: dict[tuple[int, str], Tensor]
    changed: Tensor


def constituent_aware_pooling(
        model: nn.Module, input_ids: Tensor, attention_mask: Tensor, constituent_ids: Tensor, *, start_layer: int,
        protocol: str) -> Tensor:
    """Logits (batch, vocabulary) after each row's last real token, constituents pooled from `start_layer` on.

    protocol: "sum", "mean" or "max". Inputs and errors as in `pooling_grid`, which is cheaper for several runs.
    """
    grid = pooling_grid(model, input_ids, attention_mask, constituent_ids, start_layers=[start_layer],
                        protocols=[protocol])
    return grid.pooled.popitem()[1]


@torch.no_grad()
def pooling_grid(
        model: nn.Module, input_ids: Tensor, attention_mask: Tensor, constituent_ids: Tensor, *,
        start_layers: Sequence[int], protocols: Sequence[str] = PROTOCOLS) -> PoolingGrid:
    """Every start layer × protocol from one clean pass; a pooled run computes only the blocks from its start.

    `input_ids`, `attention_mask` (1 = real token) and `constituent_ids` are integers (batch, tokens), padded on either
    side. Tokens of one constituent share an id ≥ 0 within their row and stand next to each other; −1 is a token of
    none, on any device. The model may be wrapped by peft (LoRA and the like) or for data parallelism.

    Before a start layer is used for the first time, two made rows are pooled there: with one token a constituent the
    logits must be those of the model alone, up to rounding (the square root of the precision's epsilon, as a share of
    the largest logit). Rows of a model whose answer changes with padding run one by one.

    Raises ValueError for a model that fails this check, an unknown start layer or protocol, wrong shapes or types, a
    row without a real token or padded on both sides, a constituent whose tokens are not next to each other.
    """
    model, blocks = _model_and_blocks(model)
    check_inputs(input_ids, attention_mask, constituent_ids)
    check_reach(model, input_ids, attention_mask)
    start_layers, protocols = checked_grid(start_layers, protocols, len(blocks))
    device = next(model.parameters()).device
    inputs = tuple(tensor.to(device, torch.long) for tensor in (input_ids, attention_mask, constituent_ids))
    pooled_positions(*inputs[1:])  # refuses before anything runs
    with evaluation_mode(model):
        together = _check_model(model, blocks, start_layers, device)
        parts = [inputs] if together else zip(*(tensor.split(1) for tensor in inputs))
        grids = [_grid(model, blocks, start_layers, protocols, *part) for part in parts]
    pooled = {key: torch.cat([grid.pooled[key] for grid in grids]) for key in grids[0].pooled}
    return PoolingGrid(torch.cat([grid.clean for grid in grids]), pooled, torch.cat([grid.changed for grid in grids]))


def _grid(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int], protocols: Sequence[str],
          *inputs: Tensor) -> PoolingGrid:
    """The runs of one batch, whose padding is moved to the left first; a column of padding alone is left out."""
    order = inputs[1].argsort(dim=1, stable=True)[:, -int(inputs[1].sum(dim=1).max()):]
    input_ids, mask, ids = (tensor.gather(1, order) for tensor in inputs)
    positions = pooled_positions(mask, ids)
    clean, record = _clean_pass(model, blocks, layers, input_ids, mask)
    pooled = {(layer, protocol): _pooled_pass(model, blocks, layer, record, positions, protocol)
              for layer, protocol in itertools.product(layers, protocols)}
    return PoolingGrid(clean, pooled, changed=mask.sum(dim=1) - positions[:, -1] - 1)


def pooled_positions(attention_mask: Tensor, constituent_ids: Tensor) -> Tensor:
    """The position of every token in the pooled sequence, (batch, tokens) int64; −1 for padding.

    Tokens of one constituent have one position. Shapes, rules and errors as in `pooling_grid`.
    """
    check_inputs(attention_mask, attention_mask, constituent_ids)
    real = attention_mask.bool()
    ids = constituent_ids.long().masked_fill(~real, -1)
    heads = ids.masked_fill(F.pad(ids[:, 1:] == ids[:, :-1], (1, 0)), -1).sort(dim=1).values  # one a run of tokens
    if (split := (heads[:, 1:] == heads[:, :-1]) & (heads[:, 1:] >= 0)).any():
        row, column = split.nonzero()[0].tolist()
        raise ValueError(f"the tokens of constituent {int(heads[row, column])} in row {row} are not next to each "
                         "other; give each run of tokens its own id")
    count = real.cumsum(dim=1)
    ids = ids.masked_fill(count == count[:, -1:], -1)  # the last real token stays alone
    begins = real.clone()
    begins[:, 1:] &= (ids[:, 1:] != ids[:, :-1]) | (ids[:, 1:] < 0)
    return (begins.cumsum(dim=1) - 1).masked_fill(~real, -1)


def start_layers_from_depth(num_layers: int, shares: Sequence[float] = DEPTH_SHARES) -> list[int]:
    """Block indices at shares of depth: ceil(share × `num_layers`) − 1, but at least 1 of more than 8 blocks.

    The rule gives the published start layers of 16, 18, 24 and 36 blocks, and 1, 2, 5, 8, 11 of 12 blocks, where
    1, 4, 5, 8, 11 were published. One index a share: of four blocks or fewer, two shares can give the same one.

    Raises ValueError for a share outside (0, 1] or `num_layers` below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, not {num_layers}")
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"shares of depth must lie in (0, 1], not {list(shares)}")
    return [max(int(num_layers > 8), math.ceil(round(share * num_layers, 9)) - 1) for share in shares]


def _pool(stream: Tensor, positions: Tensor, protocol: str) -> Tensor:
    """(batch, tokens, width) → (batch, longest pooled length, width), both padded on the left."""
    lengths = positions[:, -1:] + 1
    longest = int(lengths.max())
    slots = torch.where(positions < 0, 0, positions + 1 + longest - lengths)  # slot 0 takes the padding
    values = stream.to(torch.promote_types(stream.dtype, torch.float32))
    pooled = values.new_zeros(len(stream), longest + 1, stream.shape[-1]).scatter_reduce(
        1, slots.to(stream.device).unsqueeze(-1).expand_as(stream), values,
        reduce="amax" if protocol == "max" else protocol, include_self=False)
    found = pooled[:, 1:].to(stream.dtype).contiguous()
    if stream.dtype == torch.float16 and not torch.isfinite(found).all() and torch.isfinite(values).all():
        raise ValueError(f"the {protocol} of a constituent overflows float16: load the model in bfloat16 or float32")
    return found


@dataclass
class _Record:
    """What a clean pass leaves: embeddings, streams entering the start layers by visit, forms of blocks' outputs."""

    embeddings: Tensor | None = None
    streams: dict[int, list[Tensor]] = field(default_factory=dict)
    forms: dict[int, tuple[type, int]] = field(default_factory=dict)


def _clean_pass(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int], input_ids: Tensor,
                mask: Tensor) -> tuple[Tensor, _Record]:
    """Logits (batch, vocabulary) after the last token of left-padded rows, and what pooled passes need."""
    record = _Record()

    def keep_embeddings(module: nn.Module, args: tuple, output: Tensor) -> None:
        record.embeddings = output.clone()  # some models scale them in place

    def keep_stream(layer: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        record.streams.setdefault(layer, []).append(args[0] if args else kwargs["hidden_states"])

    def keep_form(layer: int, block: nn.Module, args: tuple, output: Tensor | Sequence) -> None:
        if not isinstance(output, Tensor):
            record.forms[layer] = type(output), len(output)

    handles = [model.get_input_embeddings().register_forward_hook(keep_embeddings)]
    for layer in layers:
        handles.append(blocks[layer].register_forward_pre_hook(partial(keep_stream, layer), with_kwargs=True))
    for layer in range(max(layers, default=0)):
        handles.append(blocks[layer].register_forward_hook(partial(keep_form, layer)))
    try:
        return _last_logits(model, mask.sum(dim=1), input_ids=input_ids), record
    finally:
        for handle in handles:
            handle.remove()


def _pooled_pass(model: nn.Module, blocks: nn.ModuleList, layer: int, record: _Record, positions: Tensor,
                 protocol: str) -> Tensor:
    """Logits (batch, vocabulary) after the last token: blocks below `layer` passed over, the pooled stream enters."""
    stream = _pool(record.streams[layer][0], positions, protocol)
    embeddings = _pool(record.embeddings, positions, protocol)
    below = list(blocks)[:layer]

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    handle = blocks[layer].register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
    try:
        for index, block in enumerate(below):
            blocks[index] = _PassedOver(block, record.forms.get(index))
        return _last_logits(model, positions[:, -1] + 1, inputs_embeds=embeddings)
    finally:
        handle.remove()
        for index, block in enumerate(below):
            blocks[index] = block


class _PassedOver(nn.Module):
    """In place of a block below the start layer: returns its input in the form of the block's output."""

    def __init__(self, block: nn.Module, form: tuple[type, int] | None):
        super().__init__()
        self.__dict__.update(block=block, form=form)  # no submodule: its parameters are not ours

    def __getattr__(self, name: str):
        return getattr(self.__dict__["block"], name)  # models read attributes of their blocks

    def forward(self, *args, **kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        return stream if self.form is None else self.form[0]((stream, *[None] * (self.form[1] - 1)))


def _last_logits(model: nn.Module, lengths: Tensor, **inputs: Tensor) -> Tensor:
    """Logits (batch, vocabulary) after the last position of left-padded inputs of `lengths` (batch,)."""
    (tokens,) = inputs.values()
    longest = tokens.shape[1]
    if (lengths < longest).any():
        position_ids = torch.arange(longest, device=lengths.device) - (longest - lengths).unsqueeze(1)
        inputs |= {"attention_mask": (position_ids >= 0).long(), "position_ids": position_ids.clamp(min=0)}
    outputs = model(**inputs, use_cache=False, output_attentions=False, output_hidden_states=False, return_dict=True,
                    logits_to_keep=1)
    return outputs.logits[:, -1]


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within: hooks registered before are not called; afterwards they are, in their order."""
    kept = [(hooks, dict(hooks)) for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, before in kept:
            new = dict(hooks)
            hooks.clear()
            hooks.update(before | new)


def _check_model(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int], device: torch.device) -> bool:
    """Whether padded rows run together; refuses a model that is pooled wrongly at one of the start layers."""
    exact = not any(map(torch.is_autocast_enabled, ("cpu", "cuda")))  # a check in bf16 says less
    passed, together = _checked.get(model, {}).get(exact, (set(), True))
    if new := [layer for layer in layers if layer not in passed]:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        input_ids = (torch.arange(14, device=device).view(2, 7) + vocabulary // 2) % vocabulary
        mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4], device=device)
        alone = [(input_ids[:1], mask[:1]), (input_ids[1:, 3:], mask[1:, 3:])]
        with _without_hooks(model):
            together = together and not _fault(model, blocks, new, input_ids, mask, alone)
            faults = [] if together else [_fault(model, blocks, new, *row, [row]) for row in alone]
        if fault := next(filter(None, faults), None):
            raise _refusal(model, fault)
        _checked.setdefault(model, {})[exact] = passed | set(new), together
    return together


def _fault(model: nn.Module, blocks: nn.ModuleList, layers: list[int], input_ids: Tensor, mask: Tensor,
           alone: list[tuple[Tensor, Tensor]]) -> str | None:
    """What goes wrong when made rows are pooled; `alone` holds the same rows without padding."""
    each = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    try:
        expected = torch.cat([model(input_ids=row, use_cache=False, return_dict=True).logits[:, -1] for row, _ in alone])
        clean, record = _clean_pass(model, blocks, layers, input_ids, mask)
        for layer in layers:
            visits = record.streams.get(layer, [])
            if len(visits) != 1:
                return f"block {layer} runs {len(visits)} times in a forward pass"
            if not isinstance(visits[0], Tensor) or visits[0].dim() != 3 or visits[0].shape[:2] != mask.shape:
                return f"what enters block {layer} is not of the shape (batch, tokens, width)"
        if not _equal(clean, expected, record):
            return "its answer changes when a row is padded"
        for layer in layers:
            _pooled_pass(model, blocks, layer, record, pooled_positions(mask, each // 3), "mean")
            logits = _pooled_pass(model, blocks, layer, record, pooled_positions(mask, each), "mean")
            if not _equal(logits, clean, record):
                return (f"one token a constituent at start layer {layer} does not give its own answer, "
                        "so its blocks read something else than the stream and the embeddings")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code raises when it meets embeddings of its stream
        return f"its forward pass fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return None


def _equal(logits: Tensor, expected: Tensor, record: _Record) -> bool:
    """Equal up to rounding in the coarsest of the precisions that take part."""
    types = {logits.dtype, record.embeddings.dtype, *(visits[0].dtype for visits in record.streams.values())}
    epsilon = max(1e-7, *(torch.finfo(dtype).eps for dtype in types))
    if logits.is_cuda and torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2**-10)  # TensorFloat-32
    atol = epsilon**0.5 * float(expected.abs().max())
    return torch.allclose(logits, expected, rtol=0, atol=atol, equal_nan=True)


def _model_and_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The causal language model within its wrappers, and its blocks."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"pooling needs a model, not {model!r}")
    outer, inner = extract_model_from_parallel(model, keep_torch_compile=False), language_model(model)
    if outer is not inner and outer.active_peft_config.is_prompt_learning:
        raise _refusal(inner, "prompt-learning adapters put virtual tokens before the text; use LoRA")
    try:
        return inner, decoder_blocks(inner)
    except TypeError as error:
        raise _refusal(inner, str(error)) from None


def _refusal(model: nn.Module, reason: str) -> ValueError:
    family = getattr(getattr(model, "config", None), "model_type", "no language model")
    return ValueError(f"pooling does not support {type(model).__name__} ({family}): {reason}")
