"""The decoder blocks of a causal language model, and the hidden states between them."""
from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


class KeptHiddenStates:
    """Keeps the outputs of the blocks named by `layers` while a forward pass runs, and of no others.

    A block's output is read where it enters the next block, outside any checkpointed region, so it has its
    gradient under both kinds of gradient checkpointing; the last block's is read where it leaves.
    """

    def __init__(self, blocks: nn.ModuleList, layers: tuple[int, ...]) -> None:
        self._num_layers = len(blocks)
        self._kept: dict[int, Tensor] = {}
        self._keeping = False
        for layer in layers:
            if layer + 1 < len(blocks):
                blocks[layer + 1].register_forward_pre_hook(
                    partial(self._keep_input, layer), with_kwargs=True
                )
            else:
                blocks[layer].register_forward_hook(partial(self._keep_output, layer))

    @contextmanager
    def during(self, keeping: bool):
        """Keep within this context, unless told not to; recomputations in the backward pass come after it."""
        self._kept.clear()
        self._keeping = keeping
        try:
            yield
        finally:
            self._keeping = False

    def take(self, num_tokens: int) -> tuple[Tensor | None, ...]:
        """The kept outputs in the order of a model's `hidden_states` (embeddings first), None elsewhere.

        Virtual tokens that peft puts before the text are cut off: the last `num_tokens` positions remain.
        """
        kept, self._kept = self._kept, {}
        if torch.is_grad_enabled() and not kept[max(kept)].requires_grad:
            raise ValueError(
                f"the output of block {max(kept)} has no gradient, CARMA could train nothing: unfreeze "
                "parameters up to there, or set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        states = {layer: state[:, -num_tokens:] for layer, state in kept.items()}
        return (None, *(states.get(layer) for layer in range(self._num_layers)))

    def _keep_input(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._keeping:
            self._kept[layer] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, layer: int, module: nn.Module, args: tuple, output) -> None:
        if self._keeping:
            self._kept[layer] = output[0] if isinstance(output, tuple) else output


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, plain or wrapped (peft, DDP, torch.compile), in order.

    Raises:
        TypeError: an encoder, an encoder-decoder, or a model whose blocks cannot be found.
    """
    inner = language_model(model)
    config = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or _is_encoder(inner):
        raise TypeError(
            f"{type(inner).__name__} is no decoder-only language model: load AutoModelForCausalLM"
        )
    depth = config.get_text_config().num_hidden_layers
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise TypeError(
        f"{type(inner).__name__} has no list of {depth} decoder blocks to read hidden states from"
    )


def language_model(model: nn.Module) -> nn.Module:
    """The causal language model inside peft, DDP or torch.compile wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_encoder(model: nn.Module) -> bool:
    """Models of a family that fills masks attend in both directions, unless told to be a decoder."""
    family = model.config.model_type
    decodes = getattr(model.config, "is_decoder", False) or family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not (decodes and model.can_generate())
