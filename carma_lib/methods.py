"""The methods of fine-tuning that a study compares: plain, CARMA and its parts, and what people use instead.

Each has one main hyperparameter, its `strength`, so that all can be tuned with the same number of trials. A
method is data here; what two of them add to a training step stands in the two trainers at the end.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from carma_lib.losses import CarmaConfig
from carma_lib.trainer import CarmaTrainer


class Method(NamedTuple):
    """What a method adds to fine-tuning, its strength (None: it has none) and the source of the default."""

    adds: str
    strength: str | None = None
    default: float | None = None
    source: str = ""


CARMA_SOURCE = "arXiv 2502.11066"
METHODS: dict[str, Method] = {
    "untuned": Method("no training"),
    "fine_tuning": Method("nothing: the cross-entropy of the answer"),
    "carma": Method("both terms", "carma_weight", None, CARMA_SOURCE),
    "mutual_information_only": Method("the first term with weight 1", "carma_weight", None, CARMA_SOURCE),
    "stability_only": Method("the second term with weight 1", "carma_weight", None, CARMA_SOURCE),
    "r_drop": Method("agreement of two passes under dropout", "alpha", 1.0, "arXiv 2106.14448"),
    "neftune": Method("uniform noise on the embeddings", "noise_alpha", 5.0, "arXiv 2310.05914"),
    "label_smoothing": Method("a share of the target spread over all tokens", "smoothing", 0.1, "arXiv 1512.00567"),
    "synonym_augmentation": Method("a copy of each training item with synonyms", "rate", 0.25,
                                   "arXiv 1901.11196"),
    "l2_sp": Method("squared distance from the start's weights", "alpha", 0.01, "arXiv 1802.01483"),
}
R_DROP_DROPOUT = 0.1  # on attention, where a family has no other dropout
CARMA_METHODS = ("carma", "mutual_information_only", "stability_only")


def method_config(method: str, carma: CarmaConfig, strength: float | None = None) -> CarmaConfig | None:
    """The CARMA terms of a method, λ = `strength` if given; None for the methods that have none.

    The parts alone have weight 1 (published ablations).
    """
    if method not in CARMA_METHODS:
        return None
    weights = {"carma": {}, "mutual_information_only": {"mi_weight": 1.0, "stability_weight": 0.0},
               "stability_only": {"mi_weight": 0.0, "stability_weight": 1.0}}[method]
    return replace(carma, **weights, **({} if strength is None else {"carma_weight": strength}))


def check_method(method: str) -> str:
    """The name itself. `ValueError` naming the known methods."""
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; the methods are {', '.join(METHODS)}")
    return method


def make_trainer(method: str, model: nn.Module, arguments: TrainingArguments, *, carma: CarmaConfig,
                 strength: float | None = None, train_dataset: Sequence[dict], data_collator: Callable,
                 eval_dataset: Sequence[dict] | None = None, callbacks: list | None = None) -> CarmaTrainer:
    """The trainer of a method for single-target rows, ready to `train()`.

    strength: the method's main hyperparameter, None for its default. Training rows come as they are: those of
    `synonym_augmentation` hold the copies already. A batch of `r_drop` has half as many items, each passed
    twice, so that every method's step costs the same.

    Raises `ValueError` for an unknown method, "untuned", or a strength that is not above 0.
    """
    if check_method(method) == "untuned":
        raise ValueError("an untuned model is not trained; take its start as it is")
    if strength is None:
        strength = METHODS[method].default
    elif METHODS[method].strength is None or not strength > 0:
        raise ValueError(f"strength is {strength}; it must be above 0, and fine_tuning has none")
    arguments = copy.copy(arguments)
    settings: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset,
                                "data_collator": data_collator, "callbacks": callbacks}
    if method == "r_drop":
        arguments.per_device_train_batch_size = max(1, arguments.per_device_train_batch_size // 2)
        return RDropTrainer(model, arguments, alpha=strength, **settings)
    if method == "l2_sp":
        return L2SPTrainer(model, arguments, alpha=strength, **settings)
    if method == "neftune":
        arguments.neftune_noise_alpha = strength
    elif method == "label_smoothing":
        arguments.label_smoothing_factor = strength
    return CarmaTrainer(model, arguments, carma=method_config(method, carma, strength), **settings)


class RDropTrainer(CarmaTrainer):
    """L = ½ (CE₁ + CE₂) + α ¼ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)), the paper's loss over two (arXiv 2106.14448, eq. 4).

    p₁ and p₂ (batch, vocabulary) are the answers of two passes of one batch under different dropout, made
    as one pass of a doubled batch. A model without any dropout gets 0.1 on its attention.

    Raises `TypeError` for a model that has no dropout to switch on, `ValueError` for batches without
    `target_ids`.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, alpha: float, train_dataset: Sequence[dict],
                 eval_dataset: Sequence[dict] | None, data_collator: Callable, callbacks: list | None) -> None:
        _switch_dropout_on(model)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         data_collator=data_collator, callbacks=callbacks)
        self._alpha = alpha

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "target_ids" not in inputs:
            raise ValueError("R-Drop here is for single-target rows: batches need target_ids")
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        loss, outputs = super().compute_loss(model, twice, True, num_items_in_batch)
        first, second = outputs.logits[:, -1].float().log_softmax(-1).chunk(2)
        apart = (F.kl_div(first, second, log_target=True, reduction="batchmean")
                 + F.kl_div(second, first, log_target=True, reduction="batchmean"))
        loss = loss + self._alpha * apart / 4
        return (loss, outputs) if return_outputs else loss


class L2SPTrainer(CarmaTrainer):
    """L = CE + α/2 Σ (w − w⁰)² over all trained weights w, w⁰ those before training (arXiv 1802.01483, eq. 3)."""

    def __init__(self, model: nn.Module, args: TrainingArguments, *, alpha: float, train_dataset: Sequence[dict],
                 eval_dataset: Sequence[dict] | None, data_collator: Callable, callbacks: list | None) -> None:
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         data_collator=data_collator, callbacks=callbacks)
        self._alpha = alpha
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._start = [weight.detach().clone() for weight in self._trained]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        away = torch.stack([(weight - start).square().sum() for weight, start in zip(self._trained, self._start)])
        penalty = self._alpha / 2 * away.sum()
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty


def _switch_dropout_on(model: nn.Module) -> None:
    """Dropout on attention where the model has none at all: families after GPT-2 are trained without."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return
    places = [module for module in model.modules() if isinstance(getattr(module, "attention_dropout", None), float)]
    if not places:
        raise TypeError(f"{type(model).__name__} has no dropout, which R-Drop needs; choose another method")
    for module in places:
        module.attention_dropout = R_DROP_DROPOUT
