"""The two terms of CARMA as pure functions of hidden states, their config, and the loss that joins them.

    L_total = (1 − λ) L_task + λ L_CARMA        L_CARMA = γ L_MI + η L_stability

(arXiv 2502.11066, method section). Where the published code departs from that description, this module follows
the description: every row uses its own constituents, and padding is never a token. Nothing here holds
parameters, touches a model or reads a file. Shapes: L layers, B rows, T tokens, D width.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class CarmaConfig:
    """Weights and layers of CARMA; the defaults are the published code's.

    Args:
        carma_weight: λ in [0, 1], the share of CARMA in the training loss; 0 is plain fine-tuning.
        mi_weight: γ in [0, 1], weight of the mutual-information term; with `stability_weight=0`, "MI only".
        stability_weight: η in [0, 1], weight of the stability term; with `mi_weight=0`, "stability only".
        mi_layers: (first, last) decoder block, both included, counted from 0; layer l is block l's output.
        stability_layers: (first, last) likewise; consecutive layers within it are compared, so first < last.
        temperature: τ > 0 of the mutual-information term.
        num_negatives: negatives sampled per anchor, or None for all of them.
        similarity: "cosine" or "dot".

    Raises:
        ValueError: for a value outside these bounds.
    """

    carma_weight: float = 0.2
    mi_weight: float = 0.2
    stability_weight: float = 0.3
    mi_layers: tuple[int, int] = (0, 7)
    stability_layers: tuple[int, int] = (0, 7)
    temperature: float = 0.1
    num_negatives: int | None = 5
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("carma_weight", "mi_weight", "stability_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("mi_layers", "stability_layers"):
            first, last = _layer_range(name, getattr(self, name))
            object.__setattr__(self, name, (first, last))
        if self.stability_weight and self.stability_layers[0] == self.stability_layers[1]:
            raise ValueError("stability_layers must name at least two layers, or set stability_weight=0")
        _check_sampling(self.temperature, self.num_negatives, self.similarity)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose outputs the terms of non-zero weight read, in ascending order."""
        if not self.carma_weight:
            return ()
        ranges = [(self.mi_weight, self.mi_layers), (self.stability_weight, self.stability_layers)]
        needed = {layer for weight, (first, last) in ranges if weight for layer in range(first, last + 1)}
        return tuple(sorted(needed))

    def check_depth(self, num_layers: int) -> None:
        """Raise ValueError if a layer this config reads does not exist in a model of `num_layers` blocks."""
        if self.layers and self.layers[-1] >= num_layers:
            raise ValueError(
                f"the config reads block {self.layers[-1]}, the model has blocks 0 to {num_layers - 1}: "
                "lower mi_layers and stability_layers"
            )


class CarmaTerms(NamedTuple):
    """Scalars: total = γ · mutual_information + η · stability. A term of weight 0 is not computed and stands at 0."""

    total: Tensor
    mutual_information: Tensor
    stability: Tensor


class CarmaLoss:
    """L_CARMA = γ L_MI + η L_stability of one forward pass (λ is applied by the caller).

    `hidden_states` is the tuple a model returns, embeddings first: layer l of the config is entry l + 1, and
    entries that the config does not name may be None. The last entry of a Hugging Face model is taken after its
    final norm, so a config that names the last block needs that entry replaced by the block's own output, as
    `CarmaTrainer` does.
    """

    def __init__(self, config: CarmaConfig) -> None:
        self.config = config

    def __call__(
        self,
        hidden_states: Sequence[Tensor | None],
        constituent_ids: Tensor,
        attention_mask: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> CarmaTerms:
        """Return the terms; arguments, errors and shapes as in `mutual_information_loss` and `stability_loss`."""
        config = self.config
        config.check_depth(len(hidden_states) - 1)
        if not config.layers:
            zero = attention_mask.new_zeros((), dtype=torch.float32)
            return CarmaTerms(zero, zero, zero)
        kept = [hidden_states[layer + 1] for layer in config.layers]
        states = _real_states(kept, attention_mask, constituent_ids)
        mutual_information = stability = states.new_zeros(())
        if config.mi_weight:
            mutual_information = _mutual_information(
                states[_positions(config.layers, config.mi_layers)], constituent_ids, attention_mask.bool(),
                config.temperature, config.num_negatives, config.similarity, generator,
            )
        if config.stability_weight:
            stability = _stability(
                states[_positions(config.layers, config.stability_layers)], attention_mask.bool()
            ).sum()
        total = config.mi_weight * mutual_information + config.stability_weight * stability
        return CarmaTerms(total, mutual_information, stability)


def mutual_information_loss(
    hidden_states: Tensor | Sequence[Tensor],
    constituent_ids: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float = 0.1,
    num_negatives: int | None = 5,
    similarity: str = "cosine",
    generator: torch.Generator | None = None,
) -> Tensor:
    """InfoNCE between the tokens of one constituent, against the other tokens of the same row.

        L_MI = mean over layers, mean over pairs (i, j) of
               −log( exp(s_ij / τ) / (exp(s_ij / τ) + Σ_n exp(s_in / τ)) )

    Pairs: all i < j of one row with the same constituent, over all rows of the batch. Negatives n of an anchor
    i: the real tokens of its row outside its constituent; with `num_negatives=k`, k of them drawn without
    replacement (all, where there are no more than k), one draw per anchor shared by its pairs and by the layers;
    with None all of them, which needs no random numbers. A pair whose anchor has no negative costs 0.
    (arXiv 2502.11066, method section; the draw is our decision, the published code draws with replacement.)

    Args:
        hidden_states: L × (B, T, D), stacked or a sequence; half precision is raised to float32.
        constituent_ids: (B, T) integers; tokens of one constituent share a number, −1 belongs to none.
        attention_mask: (B, T), 1 for a real token. Padding is neither anchor, positive nor negative.
        temperature: τ > 0.
        num_negatives: negatives per anchor, or None for all.
        similarity: "cosine" or "dot".
        generator: random numbers of the draw, on the device of `hidden_states`; torch's default if None.

    Returns:
        A scalar; 0 with a gradient path if the batch has no pair.

    Raises:
        ValueError: shapes disagree, ids below −1, bad settings, NaN or infinity at a real token.
    """
    _check_sampling(temperature, num_negatives, similarity)
    states = _real_states(hidden_states, attention_mask, constituent_ids)
    return _mutual_information(
        states, constituent_ids, attention_mask.bool(), temperature, num_negatives, similarity, generator
    )


def stability_loss(
    hidden_states: Tensor | Sequence[Tensor], attention_mask: Tensor, *, reduction: str = "sum"
) -> Tensor:
    """How far consecutive layers move, relative to their size.

        L_stability = Σ_l  mean((h_{l+1} − h_l)²) / (mean(h_l²) + mean(h_{l+1}²) + 1e-8)

    Means run over the real tokens of the batch and the width. The published weights were used with the sum, which
    grows with the number of layers; `reduction="mean"` divides it by the number of consecutive pairs.
    (arXiv 2502.11066, method section; that padding is left out is our decision.)

    Args:
        hidden_states: at least 2 layers × (B, T, D), stacked or a sequence; half precision is raised to float32.
        attention_mask: (B, T), 1 for a real token.
        reduction: "sum" or "mean" over the consecutive pairs of layers.

    Raises:
        ValueError: shapes disagree, fewer than two layers, unknown reduction, NaN or infinity at a real token.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    states = _real_states(hidden_states, attention_mask)
    if len(states) < 2:
        raise ValueError(f"stability compares consecutive layers and needs at least 2, got {len(states)}")
    steps = _stability(states, attention_mask.bool())
    return steps.sum() if reduction == "sum" else steps.mean()


def sample_negatives(eligible: Tensor, num_negatives: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw up to `num_negatives` of each anchor's eligible tokens, uniformly and without replacement.

    Args:
        eligible: (B, T, T) bool; entry (b, i, n) says that token n may be a negative of anchor i.

    Returns:
        (B, T, T) bool, the drawn ones.
    """
    keys = torch.rand(eligible.shape, generator=generator, device=eligible.device)
    highest = keys.masked_fill(~eligible, -1).topk(min(num_negatives, eligible.size(-1)), sorted=False).indices
    return torch.zeros_like(eligible).scatter_(-1, highest, True) & eligible


def _mutual_information(states, constituent_ids, real, temperature, num_negatives, similarity, generator) -> Tensor:
    same = constituent_ids.unsqueeze(2) == constituent_ids.unsqueeze(1)
    real_pair = real.unsqueeze(2) & real.unsqueeze(1)
    inside = (constituent_ids >= 0).unsqueeze(2)
    positives = (same & real_pair & inside).triu(1)
    negatives = ~same & real_pair & inside
    if num_negatives is not None:
        negatives = sample_negatives(negatives, num_negatives, generator)
    with torch.autocast(states.device.type, enabled=False):
        scores = states @ states.transpose(-1, -2)  # (L, B, T, T)
        if similarity == "cosine":
            inverse_norms = scores.diagonal(dim1=-2, dim2=-1).clamp_min(1e-16).rsqrt()
            scores = scores * inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2)
        scores = scores / temperature
        # finfo.min, not −inf: an anchor without negatives then has a finite sum and a zero gradient.
        rivals = scores.masked_fill(~negatives, torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
        costs = F.softplus(rivals - scores).masked_fill(~positives, 0)
        return costs.sum() / (len(states) * positives.sum().clamp_min(1))


def _stability(states, real) -> Tensor:
    """The relative movement between each two consecutive layers, (L − 1,)."""
    values = real.sum().clamp_min(1) * states.size(-1)
    energy = states.square().sum((1, 2, 3)) / values
    movement = (states[1:] - states[:-1]).square().sum((1, 2, 3)) / values
    return movement / (energy[:-1] + energy[1:] + 1e-8)


def _real_states(hidden_states, attention_mask, constituent_ids=None) -> Tensor:
    """Stack the layers to (L, B, T, D) in float32 or float64 with padding at 0, after checking everything."""
    layers = list(hidden_states)
    if not layers or any(not isinstance(layer, Tensor) or layer.dim() != 3 for layer in layers):
        raise ValueError("hidden_states must be layers × (batch, tokens, width), at least one layer")
    if any(layer.shape != layers[0].shape for layer in layers):
        raise ValueError(f"hidden_states differ in shape: {[tuple(layer.shape) for layer in layers]}")
    if not layers[0].is_floating_point():
        raise ValueError(f"hidden_states must be floating point, got {layers[0].dtype}")
    for name, tensor in (("attention_mask", attention_mask), ("constituent_ids", constituent_ids)):
        if tensor is not None and tensor.shape != layers[0].shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, hidden_states have (batch, tokens) = "
                f"{tuple(layers[0].shape[:2])}"
            )
        if tensor is not None and tensor.is_floating_point():
            raise ValueError(f"{name} must hold integers or booleans, got {tensor.dtype}")
    dtype = torch.promote_types(layers[0].dtype, torch.float32)
    with torch.autocast(layers[0].device.type, enabled=False):
        states = torch.stack(layers).to(dtype).masked_fill_(~attention_mask.bool()[None, :, :, None], 0)
    _check_values(states, constituent_ids)
    return states


def _check_values(states: Tensor, constituent_ids: Tensor | None) -> None:
    """Both checks of values in one transfer from the device; a sum is finite only if all its parts are."""
    finite = torch.isfinite(states.detach().sum())
    in_range = torch.ones_like(finite) if constituent_ids is None else (constituent_ids >= -1).all()
    finite, in_range = torch.stack([finite, in_range]).tolist()
    if not finite:
        raise ValueError("hidden_states hold NaN or infinity: lower the learning rate or check the input")
    if not in_range:
        raise ValueError("constituent_ids must be −1 (no constituent) or not negative")


def _check_sampling(temperature: float, num_negatives: int | None, similarity: str) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if num_negatives is not None and (not isinstance(num_negatives, int) or num_negatives < 1):
        raise ValueError(f"num_negatives must be a whole number from 1 up, or None for all, got {num_negatives}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")


def _layer_range(name: str, layers: Sequence[int]) -> tuple[int, int]:
    layers = tuple(layers)
    if len(layers) != 2 or not all(isinstance(layer, int) for layer in layers) or not 0 <= layers[0] <= layers[1]:
        raise ValueError(f"{name} must be (first, last) with 0 <= first <= last, got {layers}")
    return layers


def _positions(layers: tuple[int, ...], bounds: tuple[int, int]) -> slice:
    """Where the layers first..last stand among those that were kept."""
    return slice(layers.index(bounds[0]), layers.index(bounds[1]) + 1)
