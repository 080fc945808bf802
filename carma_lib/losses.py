"""The two terms of CARMA as pure functions of hidden states, their config, and the loss that joins them.

    L_total = (1 − λ) L_task + λ L_CARMA        L_CARMA = γ L_MI + η L_stability

(arXiv 2502.11066, method section). Where the published code departs from that description, this module
follows the description: every row uses its own constituents, and padding is never a token. Nothing here holds
parameters, touches a model or reads a file. Shapes: L layers, B rows, T tokens, D width.
"""

from __future__ import annotations

import math
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
    """Scalars: total = γ · mutual_information + η · stability. A term of weight 0 is left at 0."""

    total: Tensor
    mutual_information: Tensor
    stability: Tensor


class CarmaLoss:
    """L_CARMA = γ L_MI + η L_stability of one forward pass (λ is applied by the caller).

    `hidden_states` is the tuple a model returns, embeddings first: layer l of the config is entry l + 1, and
    entries that the config does not name may be None. The last entry of a Hugging Face model is taken after
    its final norm, so a config that names the last block needs that entry replaced by the block's own
    output, as `CarmaTrainer` does.
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
        """Return the terms; arguments, errors and shapes as in the two functions below."""
        config = self.config
        config.check_depth(len(hidden_states) - 1)
        if not config.layers:
            zero = attention_mask.new_zeros((), dtype=torch.float32)
            return CarmaTerms(zero, zero, zero)
        kept = [hidden_states[layer + 1] for layer in config.layers]
        tokens = _checked(kept, attention_mask, constituent_ids)
        mutual_information = stability = tokens.states.new_zeros(())
        if config.mi_weight:
            mutual_information = _mutual_information(
                _within(tokens, config.layers, config.mi_layers),
                constituent_ids,
                config.temperature,
                config.num_negatives,
                config.similarity,
                generator,
            )
        if config.stability_weight:
            stability = _stability(_within(tokens, config.layers, config.stability_layers)).sum()
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

    Pairs: all i < j of one row with the same constituent, over all rows of the batch. Negatives n of an
    anchor i: the real tokens of its row outside its constituent; with `num_negatives=k`, k of them drawn
    without replacement (all, where there are no more than k), one draw per anchor shared by its pairs and by the
    layers; with None all of them, which needs no random numbers. A pair whose anchor has no negative costs 0.
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
    tokens = _checked(hidden_states, attention_mask, constituent_ids)
    return _mutual_information(tokens, constituent_ids, temperature, num_negatives, similarity, generator)


def stability_loss(
    hidden_states: Tensor | Sequence[Tensor], attention_mask: Tensor, *, reduction: str = "sum"
) -> Tensor:
    """How far consecutive layers move, relative to their size.

        L_stability = Σ_l  mean((h_{l+1} − h_l)²) / (mean(h_l²) + mean(h_{l+1}²) + 1e-8)

    Means run over the real tokens of the batch and the width. The published weights were used with the sum,
    which grows with the number of layers; `reduction="mean"` divides it by the number of consecutive pairs.
    (arXiv 2502.11066, method section; that padding is left out is our decision.)

    Args:
        hidden_states: at least 2 layers × (B, T, D), stacked or a sequence; half precision is raised to
            float32.
        attention_mask: (B, T), 1 for a real token.
        reduction: "sum" or "mean" over the consecutive pairs of layers.

    Raises:
        ValueError: shapes disagree, fewer than two layers, unknown reduction, NaN or infinity at a real
            token.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    tokens = _checked(hidden_states, attention_mask)
    if len(tokens.states) < 2:
        raise ValueError(
            f"stability compares consecutive layers and needs at least 2, got {len(tokens.states)}"
        )
    steps = _stability(tokens)
    return steps.sum() if reduction == "sum" else steps.mean()


def sample_negatives(
    eligible: Tensor, num_negatives: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw up to `num_negatives` of each anchor's eligible tokens, uniformly and without replacement.

    Args:
        eligible: (B, T, T) bool; entry (b, i, n) says that token n may be a negative of anchor i.

    Returns:
        (B, T, T) bool, the drawn ones.
    """
    keys = torch.where(eligible, torch.rand(eligible.shape, generator=generator, device=eligible.device), -1)
    highest = keys.topk(min(num_negatives, eligible.size(-1)), sorted=False).indices
    return torch.zeros_like(eligible).scatter_(-1, highest, True) & eligible


class _Tokens(NamedTuple):
    """Checked hidden states, padding at 0, with what both terms need of them."""

    states: Tensor  # (L, B, T, D), float32 or float64
    squares: Tensor  # (L, B, T), squared length of each state
    real: Tensor  # (B, T) bool


def _mutual_information(tokens, constituent_ids, temperature, num_negatives, similarity, generator) -> Tensor:
    states, squares, real = tokens
    ids = constituent_ids.masked_fill(~real, -1)
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    positives = (same & (ids >= 0).unsqueeze(2)).triu(1)
    negatives = ~same & real.unsqueeze(1)  # of interest only where the row of the anchor has positives
    if num_negatives is not None:
        negatives = sample_negatives(negatives, num_negatives, generator)
    with torch.autocast(states.device.type, enabled=False):
        if similarity == "cosine":
            scaled = states * (squares * temperature + 1e-16).rsqrt().unsqueeze(-1)
        else:
            scaled = states * temperature**-0.5
        scores = scaled @ scaled.transpose(-1, -2)  # s / τ, (L, B, T, T)
        # finfo.min, not −inf: an anchor without negatives then has a finite sum and a zero gradient.
        rivals = torch.where(negatives, scores, torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
        costs = F.softplus(rivals - scores) * positives
        return costs.sum() / (len(states) * positives.sum().clamp_min(1))


def _stability(tokens) -> Tensor:
    """The relative movement between each two consecutive layers, (L − 1,)."""
    states, squares, real = tokens
    values = real.sum() * states.size(-1)
    size = squares.sum((1, 2)).unfold(0, 2, 1).sum(-1)  # of both layers of each pair
    movement = states.diff(dim=0).square().sum((1, 2, 3))
    return movement / (size + 1e-8 * values.clamp_min(1))


def _checked(hidden_states, attention_mask, constituent_ids=None) -> _Tokens:
    """Check everything, stack the layers, raise half precision to float32 and put padding at 0."""
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
    real = attention_mask.bool()
    with torch.autocast(layers[0].device.type, enabled=False):
        states = torch.stack(layers).to(torch.promote_types(layers[0].dtype, torch.float32))
        states = states.masked_fill_(~real.unsqueeze(-1), 0)
        squares = states.square().sum(-1)
    lowest_id = squares.new_zeros(()) if constituent_ids is None else constituent_ids.min()
    # One transfer from the device for both checks; a sum is finite only if all its parts are.
    size, lowest_id = torch.stack([squares.detach().sum(), lowest_id.to(squares.dtype)]).tolist()
    if not math.isfinite(size):
        raise ValueError("hidden_states hold NaN or infinity: lower the learning rate or check the input")
    if lowest_id < -1:
        raise ValueError("constituent_ids must be −1 (no constituent) or not negative")
    return _Tokens(states, squares, real)


def _check_sampling(temperature: float, num_negatives: int | None, similarity: str) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if num_negatives is not None and (not isinstance(num_negatives, int) or num_negatives < 1):
        raise ValueError(
            f"num_negatives must be a whole number from 1 up, or None for all, got {num_negatives}"
        )
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")


def _layer_range(name: str, layers: Sequence[int]) -> tuple[int, int]:
    layers = tuple(layers)
    if (
        len(layers) != 2
        or not all(isinstance(layer, int) for layer in layers)
        or not 0 <= layers[0] <= layers[1]
    ):
        raise ValueError(f"{name} must be (first, last) with 0 <= first <= last, got {layers}")
    return layers


def _within(tokens: _Tokens, kept: tuple[int, ...], bounds: tuple[int, int]) -> _Tokens:
    """The layers first..last of those that were kept; slicing is left out where it would only cost time."""
    if bounds == (kept[0], kept[-1]):
        return tokens
    chosen = slice(kept.index(bounds[0]), kept.index(bounds[1]) + 1)
    return _Tokens(tokens.states[chosen], tokens.squares[chosen], tokens.real)
