"""The two terms of CARMA as pure functions of hidden states, their config, and the loss that joins them.

    L_total = (1 − λ) L_task + λ L_CARMA        L_CARMA = γ L_MI + η L_stability

(arXiv 2502.11066, method section). Where the published code departs from that description, this module
follows the description: every row uses its own constituents, and padding is never a token. Nothing here holds
parameters, touches a model or reads a file. Shapes: L layers, B rows, T tokens, D width.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from carma_lib.losses.terms import carma_terms

SIMILARITIES = ("cosine", "dot")
LOWEST_TEMPERATURE = 1e-6  # below it, float32 rounding of a cosine decides the value
DEPTH_SHARE = 0.3  # of a model's blocks, where layers are left open


@dataclass(frozen=True)
class CarmaConfig:
    """Weights and layers of CARMA; the defaults are the published code's, except for the layers.

    Args:
        carma_weight: λ in [0, 1], the share of CARMA in the training loss; 0 is plain fine-tuning.
        mi_weight: γ in [0, 1], weight of the mutual-information term; with `stability_weight=0`, "MI only".
        stability_weight: η in [0, 1], weight of the stability term; with `mi_weight=0`, "stability only".
        mi_layers: (first, last) decoder block, both included, counted from 0; layer l is block l's output.
            None leaves them open: the first 30 % of the model's depth, blocks 0 to max(1, round(0.3 × depth))
            (our decision; the published code uses (0, 7) for every model).
        stability_layers: likewise; consecutive layers within it are compared, so first < last.
        temperature: τ of the mutual-information term, at least 1e-6.
        num_negatives: negatives sampled per anchor, or None for all of them.
        similarity: "cosine" or "dot".

    Raises:
        ValueError: for a value outside these bounds.
    """

    carma_weight: float = 0.2
    mi_weight: float = 0.2
    stability_weight: float = 0.3
    mi_layers: tuple[int, int] | None = None
    stability_layers: tuple[int, int] | None = None
    temperature: float = 0.1
    num_negatives: int | None = 5
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        checked = {name: _weight(name, getattr(self, name))
                   for name in ("carma_weight", "mi_weight", "stability_weight")}
        checked |= {name: _layer_range(name, getattr(self, name)) for name in ("mi_layers", "stability_layers")}
        checked["temperature"], checked["num_negatives"] = _check_sampling(
            self.temperature, self.num_negatives, self.similarity)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        layers = self.stability_layers
        if self.stability_weight and layers and layers[0] == layers[1]:
            raise ValueError("stability_layers must name at least two layers, or set stability_weight=0")

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose outputs the terms of non-zero weight read, in ascending order.

        Raises `ValueError` while they are open: see `for_depth`.
        """
        if not self.carma_weight:
            return ()
        ranges = [layers for weight, layers in ((self.mi_weight, self.mi_layers),
                                                (self.stability_weight, self.stability_layers)) if weight]
        if None in ranges:
            raise ValueError("the layers are open: config.for_depth(number of blocks) gives explicit ones")
        return tuple(sorted({layer for first, last in ranges for layer in range(first, last + 1)}))

    def for_depth(self, num_layers: int) -> CarmaConfig:
        """This config with explicit layers for a model of `num_layers` blocks.

        Raises `ValueError` if a layer that it reads does not exist there.
        """
        if not _is_whole(num_layers) or num_layers < 1:
            raise ValueError(f"num_layers must be a whole number of blocks, at least 1, not {num_layers!r}")
        if not self.carma_weight:
            return self
        open_range = (0, min(num_layers - 1, max(1, round(DEPTH_SHARE * num_layers))))
        found = replace(self, mi_layers=self.mi_layers or open_range,
                        stability_layers=self.stability_layers or open_range)
        if found.layers[-1:] >= (num_layers,):
            raise ValueError(f"the config reads block {found.layers[-1]}, the model has blocks 0 to "
                             f"{num_layers - 1}: lower mi_layers and stability_layers")
        return found


def checked_config(config: CarmaConfig) -> CarmaConfig:
    """The config itself; `TypeError` for anything else, such as a dictionary."""
    if not isinstance(config, CarmaConfig):
        raise TypeError(f"carma must be a CarmaConfig, such as CarmaConfig(carma_weight=0.2), not {config!r}")
    return config


class CarmaTerms(NamedTuple):
    """Scalars: total = γ · mutual_information + η · stability. A term of weight 0 is left at 0.

    `read` holds, as floats, the scalars that the caller asked for.
    """

    total: Tensor
    mutual_information: Tensor
    stability: Tensor
    read: tuple[float, ...] = ()


class CarmaLoss:
    """L_CARMA = γ L_MI + η L_stability of one forward pass (λ is applied by the caller).

    `hidden_states` is the tuple a model returns, embeddings first: layer l of the config is entry l + 1, entries that
    the config does not name may be None, and open layers follow from its length. Its last entry is after the final
    norm, so a config that names the last block needs that block's own output there, as `CarmaTrainer` gives it.
    State-space families (mamba, rwkv) return a tuple without the embeddings: put None before it.
    """

    def __init__(self, config: CarmaConfig) -> None:
        self.config = checked_config(config)

    def __call__(self, hidden_states: Sequence[Tensor | None], constituent_ids: Tensor, attention_mask: Tensor, *,
                 document_ids: Tensor | None = None, generator: torch.Generator | None = None,
                 read: Sequence[Tensor] = ()) -> CarmaTerms:
        """The terms; arguments, errors and shapes as in the two functions below.

        read: scalars that the caller wants on the host; they come, as `terms.read`, with the one transfer made anyway.
        """
        if hidden_states is None:
            raise ValueError("hidden_states is None: call the model with output_hidden_states=True")
        if len(hidden_states) < 2:
            raise ValueError(f"hidden_states has {len(hidden_states)} entry, and the layers follow the first one, the embeddings: give "
                             "all that the model returns, and None first where a family returns no embeddings")
        config = self.config.for_depth(len(hidden_states) - 1)
        if not config.layers:
            zero = torch.zeros((), device=next((state.device for state in hidden_states if state is not None), None))
            return CarmaTerms(zero, zero, zero, tuple(scalar.item() for scalar in read))
        kept = [hidden_states[layer + 1] for layer in config.layers]
        within = {"mi": config.mi_layers if config.mi_weight else None,
                  "stability": config.stability_layers if config.stability_weight else None}
        within = {term: layers and range(config.layers.index(layers[0]), config.layers.index(layers[1]) + 1)
                  for term, layers in within.items()}
        mutual_information, stability, read = carma_terms(
            kept, attention_mask, constituent_ids, document_ids, within["mi"], within["stability"],
            (config.temperature, config.num_negatives, config.similarity), generator, read)
        total = config.mi_weight * mutual_information + config.stability_weight * stability
        return CarmaTerms(total, mutual_information, stability, read)


def mutual_information_loss(hidden_states: Tensor | Sequence[Tensor], constituent_ids: Tensor,
                            attention_mask: Tensor, *, temperature: float = 0.1, num_negatives: int | None = 5,
                            similarity: str = "cosine", generator: torch.Generator | None = None,
                            document_ids: Tensor | None = None) -> Tensor:
    """InfoNCE between the tokens of one constituent, against the other tokens of the same row.

        L_MI = mean over layers, mean over pairs (i, j) of
               −log( exp(s_ij / τ) / (exp(s_ij / τ) + Σ_n exp(s_in / τ)) )

    Pairs: all i < j of one row with the same constituent, over all rows of the batch. Negatives n of an anchor i: the
    real tokens of its row outside its constituent, k of them drawn without replacement for `num_negatives=k` (one draw
    an anchor, shared by its pairs and the layers), all of them for None. A pair whose anchor has none costs 0.
    Documents packed into one row count as rows of their own.
    (arXiv 2502.11066, method section; the draw is our decision, the published code draws with replacement.)

    Args:
        hidden_states: L × (B, T, D), stacked or a sequence; half precision is raised to float32.
        constituent_ids: (B, T) integers; tokens of one constituent share a number, −1 belongs to none.
        attention_mask: (B, T), 1 for a real token; padding takes no part.
        temperature: τ, at least 1e-6. num_negatives: an anchor's, or None for all. similarity: "cosine" or "dot".
        generator: random numbers of the draw, on the device of `hidden_states`; torch's default if None.
        document_ids: (B, T) integers; tokens of one document of a row share a number. None: a row is one.

    Returns a scalar; 0 with a gradient path if the batch has no pair. Raises `ValueError` for shapes that disagree, ids
    below −1, bad settings, NaN or infinity at a real token.
    """
    sampling = (*_check_sampling(temperature, num_negatives, similarity), similarity)
    states = [] if hidden_states is None else list(hidden_states)
    return carma_terms(states, attention_mask, constituent_ids, document_ids, range(len(states)), None, sampling,
                  generator)[0]


def stability_loss(hidden_states: Tensor | Sequence[Tensor], attention_mask: Tensor, *,
                   reduction: str = "sum") -> Tensor:
    """How far consecutive layers move, relative to their size.

        L_stability = Σ_l  mean((h_{l+1} − h_l)²) / (mean(h_l²) + mean(h_{l+1}²) + 1e-8)

    Means run over the real tokens of the batch and the width. The published weights were used with the sum,
    which grows with the number of layers; `reduction="mean"` divides it by the number of consecutive pairs.
    (arXiv 2502.11066, method section; that padding is left out is our decision.)

    hidden_states: at least 2 × (B, T, D), as above. attention_mask: (B, T), 1 for a real token. Raises `ValueError` for
    shapes that disagree, fewer than two layers, an unknown reduction, NaN or infinity at a real token.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    states = [] if hidden_states is None else list(hidden_states)
    if len(states) == 1:
        raise ValueError("stability compares consecutive layers and needs at least 2, got 1")
    steps = carma_terms(states, attention_mask, None, None, None, range(len(states)))[1]
    return steps if reduction == "sum" else steps / (len(states) - 1)


def _check_sampling(temperature: float, num_negatives: int | None, similarity: str) -> tuple[float, int | None]:
    """Both numbers as Python's own."""
    if not (_is_number(temperature) and LOWEST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(f"temperature must be greater than 0, at least {LOWEST_TEMPERATURE}, got {temperature}")
    if num_negatives is not None and (not _is_whole(num_negatives) or num_negatives < 1):
        raise ValueError(f"num_negatives must be a whole number from 1 up, or None for all, got {num_negatives}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    return float(temperature), num_negatives if num_negatives is None else int(num_negatives)


def _weight(name: str, value: float) -> float:
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    return float(value)


def _layer_range(name: str, layers: Sequence[int] | None) -> tuple[int, int] | None:
    if layers is None:
        return None
    found = tuple(layers) if isinstance(layers, Iterable) else ()
    if len(found) != 2 or not all(map(_is_whole, found)) or not 0 <= found[0] <= found[1]:
        raise ValueError(f"{name} must be (first, last) with 0 <= first <= last, or None, got {layers!r}")
    return int(found[0]), int(found[1])


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
