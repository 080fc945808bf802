"""The decoder blocks of a causal language model, and the states of the residual stream between them.

Block l's state is what it hands to block l + 1, or for the last block what leaves it, before the final norm:
(batch, tokens, width). States are read by hooks on the blocks, never from a model's own `hidden_states` tuple,
which families lay out differently.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


class UnreadableStates(TypeError):
    """The blocks of a model do not hand on one stream of (batch, tokens, width)."""


class KeptStates:
    """Keeps the states of the blocks named by `layers` (−1: what enters block 0) while a forward pass runs.

    A state is read where it enters the next block (the last one where it leaves), outside any checkpointed region, so
    that it has its gradient under both kinds of gradient checkpointing.
    """

    def __init__(self, blocks: nn.ModuleList, layers: Iterable[int]) -> None:
        self._depth, self._layers = len(blocks), tuple(layers)
        self._passes: list[dict[int, object]] = []
        self._keeping = self._gradients_only = False
        self._hooks = [
            blocks[layer + 1].register_forward_pre_hook(partial(self._keep_input, layer), with_kwargs=True)
            if layer + 1 < len(blocks) else blocks[layer].register_forward_hook(partial(self._keep_output, layer))
            for layer in self._layers]

    def remove(self) -> None:
        """Take the hooks off the model and let go of what was kept."""
        self._passes.clear()
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def during(self, *, gradients_only: bool = True) -> Iterator[None]:
        """Keep within this context, by default of passes with gradients alone; not what backward recomputes."""
        self._passes.clear()
        self._keeping, self._gradients_only = True, gradients_only
        try:
            yield
        finally:
            self._keeping = False

    def take(self, rows: int, tokens: int, loss: Tensor | None = None, *,
             exact: bool = False) -> tuple[Tensor | None, ...]:
        """The kept states, embeddings first: entry l + 1 is block l's; None where nothing was to be kept.

        Virtual tokens that peft puts before the text are cut off: the last `tokens` positions remain.
        loss: if the model ran several times, the pass that this loss was computed from is taken.
        exact: whether nothing may stand before the text.

        Raises:
            UnreadableStates: states of another shape, or a block that did not run.
            ValueError: no pass with gradients, or no gradient reaches the states.
        """
        passes, self._passes = self._passes, []
        if not passes:
            raise ValueError("the model ran no forward pass with gradients: there are no states for CARMA")
        kept = passes[0]
        if loss is not None and len(passes) > 1:
            kept = next((each for each in passes if _was_used(each[max(each)], loss)), kept)
        states = {layer: _stream(kept.get(layer), layer, rows, tokens, exact) for layer in self._layers}
        last = max(states)
        if self._gradients_only and not states[last].requires_grad:
            raise ValueError(
                f"the output of block {last} has no gradient, CARMA could train nothing: unfreeze parameters up to "
                "there, or let gradient checkpointing be non-reentrant ({'use_reentrant': False})")
        return tuple(states.get(layer) for layer in range(-1, self._depth))

    def _keep_input(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._keeping:
            self._keep(layer, args[0] if args else kwargs.get("hidden_states"))

    def _keep_output(self, layer: int, module: nn.Module, args: tuple, output) -> None:
        if self._keeping:
            self._keep(layer, output[0] if isinstance(output, (tuple, list)) else output)

    def _keep(self, layer: int, state: object) -> None:
        if self._gradients_only and not torch.is_grad_enabled() and not getattr(state, "requires_grad", False):
            return
        if not self._passes or layer in self._passes[-1]:
            self._passes.append({})
        self._passes[-1][layer] = state


def language_model(model: nn.Module) -> nn.Module:
    """The causal language model inside peft, DDP or torch.compile wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of the language model names this argument."""
    return argument in inspect.signature(language_model(model).forward).parameters


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, plain or wrapped (peft, DDP, torch.compile), in order.

    They are sought in the model's own decoder, so a vision tower of the same depth is not taken for them. Raises
    `TypeError` for an encoder, an encoder-decoder, or a model whose blocks cannot be found.
    """
    inner = language_model(model)
    config = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or _is_encoder(inner):
        raise TypeError(f"{type(inner).__name__} is no decoder-only language model: load AutoModelForCausalLM")
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "decoder_layers", None) or getattr(text, "num_hidden_layers", None)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    for place in (decoder, inner) if text is config else (decoder,):
        for module in place.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
    raise TypeError(f"{type(inner).__name__} has no list of {depth} decoder blocks to read hidden states from")


def checked_blocks(model: nn.Module) -> nn.ModuleList:
    """`decoder_blocks` of a model whose states can be trained on, tried on three tokens without gradients.

    What cannot be tried (weights that are not here, as under DeepSpeed ZeRO-3; a model that needs more than token ids)
    is left to the first training step. Raises `TypeError` as `decoder_blocks`, and for a model that passes over whole
    blocks at random or whose states are not one stream of (batch, tokens, width).
    """
    blocks, inner = decoder_blocks(model), language_model(model)
    name, text = type(inner).__name__, inner.config.get_text_config(decoder=True)
    for setting in ("layerdrop", "decoder_layerdrop"):
        if getattr(text, setting, 0):
            raise UnreadableStates(f"{name} passes over whole blocks at random while it trains, so states are "
                                   f"missing: set model.config.{setting} = 0 before the model is made")
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):
        return blocks
    ids = torch.ones(1, 3, dtype=torch.long)
    try:
        with evaluation_mode(inner), torch.random.fork_rng(devices=[]):
            _read(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, exact=True)
    except UnreadableStates as error:
        raise UnreadableStates(f"{name} cannot be trained with CARMA: {error}") from None
    except Exception:  # whatever a model needs beyond token ids, its own training step says better
        pass
    return blocks


def read_states(model: nn.Module, batch: Mapping[str, Tensor], *, final_norm: bool = False) -> tuple[Tensor, ...]:
    """What enters block 0, then what leaves each block, (batch, tokens, width) each, on the model's device.

    batch: `input_ids` and, if there, `attention_mask` and `position_ids` (batch, tokens), on any device.
    final_norm: whether the last entry is taken after the final norm, where the head reads it.

    The model runs without gradients, in the mode that it is in; virtual tokens that peft puts before the text are cut
    off. Raises `TypeError` as `decoder_blocks`, and for states that are not one stream of (batch, tokens, width).
    """
    states, outputs = _read(model, batch, **({"output_hidden_states": True} if final_norm else {}))
    if final_norm:
        states = (*states[:-1], outputs.hidden_states[-1][:, -states[-1].size(1):])
    return states


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within this context every module is in evaluation mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _read(model: nn.Module, batch: Mapping[str, Tensor], *, exact: bool = False,
          **settings) -> tuple[tuple[Tensor, ...], object]:
    blocks, device = decoder_blocks(model), next(model.parameters()).device
    wanted = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name].to(device) for name in wanted if name in batch}
    if takes(model, "logits_to_keep"):
        settings["logits_to_keep"] = 1
    kept = KeptStates(blocks, range(-1, len(blocks)))
    try:
        with kept.during(gradients_only=False):
            outputs = model(**inputs, use_cache=False, **settings)
        return kept.take(*inputs["input_ids"].shape, exact=exact), outputs
    finally:
        kept.remove()


def _stream(state: object, layer: int, rows: int, tokens: int, exact: bool) -> Tensor:
    """The state without what stands before the text; an error in one line if it is no state."""
    if state is None:
        raise UnreadableStates(f"block {layer} handed on no state with a gradient: it was passed over, takes no "
                               "hidden_states, or is checkpointed reentrantly")
    if not (isinstance(state, Tensor) and state.dim() == 3 and state.size(0) == rows
            and (state.size(1) == tokens or state.size(1) > tokens and not exact)):
        found = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise UnreadableStates(f"block {layer} hands on {found}, not one stream of (batch, tokens, width) with "
                               f"{rows} × {tokens} tokens")
    return state[:, state.size(1) - tokens:]


def _was_used(state: Tensor, loss: Tensor) -> bool:
    """Whether a loss was computed from a state: its node is in the loss's graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node is state.grad_fn:
            return True
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
    return False


def _is_encoder(model: nn.Module) -> bool:
    """Models of a family that fills masks attend in both directions, unless told to be a decoder."""
    family = model.config.model_type
    decodes = getattr(model.config, "is_decoder", False) or family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not (decodes and model.can_generate())


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has embeddings for; None if its positions are computed."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)
              and module is not language_model(model).get_input_embeddings()] if most else []
    known = [most - 1 - table.padding_idx if table.num_embeddings == most and table.padding_idx is not None else most  # RoBERTa
             for table in tables if table.num_embeddings - most in (0, 2)]  # 2: OPT's offset
    return min(known, default=None)
