"""The methods of fine-tuning that a study compares: plain, CARMA and its parts, and what people use instead.

Each has one main hyperparameter, its `strength`, so that all can be tuned with the same number of trials. A
method is an entry of the table; those that add a penalty to the loss are the trainers at the end.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from carma_lib.blocks import language_model
from carma_lib.losses import CarmaConfig
from carma_lib.trainer import CarmaTrainer

PLAIN = CarmaConfig(carma_weight=0)


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
#: The methods with CARMA's terms, and the weights that they change: the parts alone have weight 1 (published ablations).
CARMA_METHODS = {"carma": {}, "mutual_information_only": {"mi_weight": 1.0, "stability_weight": 0.0},
                 "stability_only": {"mi_weight": 0.0, "stability_weight": 1.0}}


def method_config(method: str, carma: CarmaConfig, strength: float | None = None) -> CarmaConfig:
    """The CARMA terms of a method, λ = `strength` if given; λ = 0 for the methods that have none."""
    if method not in CARMA_METHODS:
        return PLAIN
    return replace(carma, **CARMA_METHODS[method], **({} if strength is None else {"carma_weight": strength}))


def check_method(method: str) -> str:
    """The name itself. `ValueError` naming the known methods."""
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; the methods are {', '.join(METHODS)}")
    return method


def check_strength(method: str, strength: float) -> float:
    """The strength as a float. `ValueError` if the method takes none, or not this one."""
    most = 1 if METHODS[method].strength in ("carma_weight", "smoothing", "rate") else math.inf
    if (METHODS[method].strength is None or isinstance(strength, bool) or not isinstance(strength, Real)
            or not 0 < strength <= most or strength == math.inf):
        raise ValueError(f"strength of {method} must be a number above 0{' and at most 1' if most == 1 else ''}, "
                         f"and fine_tuning has none; not {strength!r}")
    return float(strength)


def make_trainer(method: str, model: nn.Module, arguments: TrainingArguments, *, carma: CarmaConfig,
                 strength: float | None = None, train_dataset: Sequence[dict], data_collator: Callable,
                 eval_dataset: Sequence[dict] | None = None, callbacks: list | None = None) -> CarmaTrainer:
    """The trainer of a method for rows with `target_id` or `labels`, ready to `train()`.

    strength: the method's main hyperparameter, None for its default. Rows of `synonym_augmentation` hold the copies
    already. A batch of `r_drop` has half as many items (at least one), each passed twice, so that every method's step costs
    the same. `task_loss`, logged where something is added to it, is the cross-entropy alone. `ValueError` for an unknown method, "untuned", or a strength
    that `check_strength` refuses.
    """
    if check_method(method) == "untuned":
        raise ValueError("an untuned model is not trained; take its start as it is")
    if strength is None:
        strength = METHODS[method].default
    else:
        strength = check_strength(method, strength)
    arguments = copy.copy(arguments)
    settings: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset,
                                "data_collator": data_collator, "callbacks": callbacks}
    if method == "r_drop":
        arguments.per_device_train_batch_size = max(1, arguments.per_device_train_batch_size // 2)
    elif method == "neftune":
        arguments.neftune_noise_alpha = strength
    if method in PENALTIES:
        return PENALTIES[method](model, arguments, strength=strength, **settings)
    return CarmaTrainer(model, arguments, carma=method_config(method, carma, strength), **settings)


class PenaltyTrainer(CarmaTrainer):
    """L = L_task + the mean penalty of a micro-batch, while training; subclasses say which by `penalty`.

    Logs hold `task_loss` and `penalty` beside their sum, `loss`. `strength` is the method's hyperparameter.
    """

    def __init__(self, *args, strength: float, **kwargs) -> None:
        super().__init__(*args, carma=PLAIN, **kwargs)
        self.strength = strength

    def penalty(self, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar; logits (answers, vocabulary) in float32 and the tokens (answers,) that were right."""
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if "target_ids" in inputs:
            logits, targets = outputs.logits[:, -1].float(), inputs["target_ids"]
        else:
            answered = inputs["labels"][:, 1:] != -100
            logits, targets = outputs.logits[:, :-1][answered].float(), inputs["labels"][:, 1:][answered]
        penalty, share = self.penalty(model, logits, targets), self.share_of_step(num_items_in_batch)
        self.record(task_loss=loss / share, penalty=penalty)
        loss = loss + share * penalty
        return (loss, outputs) if return_outputs else loss


class RDropTrainer(PenaltyTrainer):
    """L = ½ (CE₁ + CE₂) + α ¼ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)), the paper's loss over two (arXiv 2106.14448, eq. 4).

    p₁ and p₂ (answers, vocabulary) are the answers of two passes of one batch under different dropout, made
    as one pass of a doubled batch; `strength` is α. A model without any dropout gets 0.1 on its attention.

    Raises `TypeError` for one whose attention has no `attention_dropout` to set.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _switch_dropout_on(self.model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch=None):
        if model.training:
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
            num_items_in_batch = None if num_items_in_batch is None else 2 * num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def penalty(self, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        if not len(targets):  # nothing is learned of this batch, and nothing has no mean
            return logits.sum()
        first, second = logits.log_softmax(-1).chunk(2)
        return self.strength / 4 * (F.kl_div(first, second, log_target=True, reduction="batchmean")
                                    + F.kl_div(second, first, log_target=True, reduction="batchmean"))


class LabelSmoothingTrainer(PenaltyTrainer):
    """L = (1 − ε) CE + ε · mean over the vocabulary of −log p, `strength` being ε (arXiv 1512.00567, section 7)."""

    def penalty(self, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        if not len(targets):
            return logits.sum()
        return self.strength * (-logits.log_softmax(-1).mean() - F.cross_entropy(logits, targets))


class L2SPTrainer(PenaltyTrainer):
    """L = CE + α/2 Σ (w − w⁰)² over all trained weights w, w⁰ those before training (arXiv 1802.01483, eq. 3).

    `strength` is α. Raises `ValueError` where processes share the weights out among them (FSDP, ZeRO-3).
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._start = {name: weight.detach().clone() for name, weight in language_model(self.model).named_parameters()
                       if weight.requires_grad}

    def penalty(self, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        trained = dict(language_model(model).named_parameters())
        if any(name not in trained or trained[name].shape != start.shape or type(trained[name]) is not nn.Parameter
               for name, start in self._start.items()):
            raise ValueError("L2-SP needs whole weights in every process: train it without FSDP or ZeRO-3")
        away = [(trained[name] - start.to(trained[name].device)).square().sum() for name, start in self._start.items()]
        return self.strength / 2 * torch.stack(away).sum()


PENALTIES = {"r_drop": RDropTrainer, "l2_sp": L2SPTrainer, "label_smoothing": LabelSmoothingTrainer}


def _switch_dropout_on(model: nn.Module) -> None:
    """Dropout on attention if the model has none at all: families after GPT-2 are trained without."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return
    places = [module for module in model.modules() if isinstance(getattr(module, "attention_dropout", None), (int, float))]
    if not places:
        raise TypeError(f"R-Drop needs dropout, and {type(model).__name__} was made without; load it with dropout above 0 in its "
                        "config, or choose another method")
    for module in places:
        module.attention_dropout = R_DROP_DROPOUT
