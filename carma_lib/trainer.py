"""`CarmaTrainer`: the Hugging Face Trainer with CARMA's two terms; with λ = 0 it is plain fine-tuning."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from carma_lib.blocks import KeptHiddenStates, decoder_blocks, language_model
from carma_lib.collate import Collator
from carma_lib.losses import CarmaConfig, CarmaLoss

LOGGED = ("task_loss", "mutual_information", "stability")


def single_target_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy` and `task_loss`, means over rows, from (predicted ids, cross-entropies) and target ids."""
    predicted, losses = prediction.predictions
    return {
        "accuracy": float(np.mean(predicted == prediction.label_ids)),
        "task_loss": float(np.mean(losses)),
    }


class CarmaTrainer(Trainer):
    """Fine-tune a causal language model with L = (1 − λ) L_task + λ (γ L_MI + η L_stability).

    Batches hold `input_ids`, `attention_mask`, `constituent_ids` (needed while training with λ > 0), and
    either `target_ids` (batch,), with L_task the cross-entropy of that one token at the last position of a
    batch padded on the left, or `labels` (batch, tokens), with L_task the model's own shifted language-model
    loss; `carma_lib.collate` makes both. The terms are means over a micro-batch: neither accumulation nor
    the number of processes changes their scale. Logs add `task_loss`, `mutual_information`, `stability` and
    `weighted_…`, the shares that add up to `loss`. Evaluation adds `task_loss` and `accuracy` for
    single-target rows, so `metric_for_best_model="accuracy"` works, and computes no CARMA term.

    Args:
        model: any causal language model of transformers, plain or wrapped by peft.
        args: as for Trainer; `remove_unused_columns` is set to False.
        carma: the terms, or None for plain fine-tuning.
        data_collator: `Collator(processing_class)` if None.
        train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers: as for Trainer.

    Raises:
        TypeError: the model is an encoder, or its decoder blocks cannot be found.
        ValueError: layers that do not exist, several GPUs in one process, a batch without `constituent_ids`,
            a single-target batch padded on the right, NaN or infinity in the loss.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        carma: CarmaConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        blocks = decoder_blocks(model)
        self.carma = (carma or CarmaConfig(carma_weight=0)).for_depth(len(blocks))
        if self.carma.layers and args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: start one process a GPU with torchrun"
            )
        if data_collator is None:
            if processing_class is None:
                raise ValueError("pass the tokenizer as processing_class, or a data_collator")
            data_collator = Collator(processing_class)
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics or single_target_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._carma_loss = CarmaLoss(self.carma)
        self._kept = KeptHiddenStates(blocks, self.carma.layers)
        self._keeps_logits = "logits_to_keep" in inspect.signature(language_model(model).forward).parameters
        self._negatives = torch.Generator(args.device)
        self._micro_step = (-1, 0)
        self._reset_tally()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch=None,
    ):
        inputs = dict(inputs)
        constituent_ids = inputs.pop("constituent_ids", None)
        regularised = model.training and bool(self.carma.layers)
        if regularised and constituent_ids is None:
            raise ValueError(
                "carma_weight > 0 needs constituent_ids in every batch: see carma_lib.collate.encode"
            )
        with self._kept.during(regularised):
            task_loss, outputs = self._task_loss(model, inputs, num_items_in_batch)
        loss, parts, share = task_loss, [], 1.0
        if regularised:
            attention_mask = inputs.get("attention_mask")
            if attention_mask is None:
                attention_mask = torch.ones_like(constituent_ids)
            states = self._kept.take(constituent_ids.size(1))
            terms = self._carma_loss(
                states, constituent_ids, attention_mask, generator=self._seeded_generator()
            )
            # Trainer divides a loss by the number of micro-batches, unless num_items_in_batch normalised it.
            share = 1 / self.current_gradient_accumulation_steps
            normalised = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            weight = self.carma.carma_weight
            loss = (1 - weight) * task_loss + weight * (share if normalised else 1) * terms.total
            parts = [
                task_loss / share if normalised else task_loss,
                terms.mutual_information,
                terms.stability,
            ]
        self._check_and_tally(loss, inputs, parts, share)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys=None
    ):
        """As in Trainer; single-target rows give (predicted ids, cross-entropies), never logits."""
        if "target_ids" not in inputs:
            loss_only = prediction_loss_only or self.compute_metrics is single_target_metrics
            return super().prediction_step(model, inputs, loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        logits = outputs.logits[:, -1].float()
        losses = F.cross_entropy(logits, inputs["target_ids"], reduction="none")
        return loss, (logits.argmax(-1), losses), inputs["target_ids"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, averaged over processes and the steps since the last log, to training logs."""
        if "loss" in logs and self._tallied_steps:
            means = torch.tensor(
                self._tally / self._tallied_steps, dtype=torch.float32, device=self.args.device
            )
            means = dict(zip(LOGGED, self.accelerator.reduce(means, reduction="mean").tolist()))
            carma = self.carma
            weights = {
                "task_loss": 1 - carma.carma_weight,
                "mutual_information": carma.carma_weight * carma.mi_weight,
                "stability": carma.carma_weight * carma.stability_weight,
            }
            shown = {name: value for name, value in means.items() if name == "task_loss" or weights[name]}
            logs |= shown | {f"weighted_{name}": weights[name] * value for name, value in shown.items()}
            self._reset_tally()
        super().log(logs, start_time)

    def _task_loss(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch):
        if "target_ids" not in inputs:
            return super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        forward = {name: value for name, value in inputs.items() if name != "target_ids"}
        if self._keeps_logits:
            forward["logits_to_keep"] = 1
        outputs = model(**forward)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        logits = outputs.logits[:, -1].float()
        return F.cross_entropy(logits, inputs["target_ids"], label_smoothing=smoothing), outputs

    def _check_and_tally(
        self, loss: Tensor, inputs: dict[str, Tensor], parts: list[Tensor], share: float
    ) -> None:
        """All that the host needs of a micro-batch in one transfer, before the backward pass."""
        ends_real = torch.ones_like(loss)
        if "target_ids" in inputs and "attention_mask" in inputs:
            ends_real = inputs["attention_mask"][:, -1].min().to(loss.dtype)
        ends_real, value, *parts = torch.stack([ends_real, loss, *parts]).tolist()
        if not ends_real:
            raise ValueError(
                "single-target batches must be padded on the left: use carma_lib.collate.Collator"
            )
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {self.state.global_step}: lower the learning rate")
        if parts:
            self._tally += share * np.array(parts)
            self._tallied_steps += share

    def _seeded_generator(self) -> torch.Generator:
        """Draws depend on seed, step, micro-batch and process alone, so resuming repeats them."""
        step = self.state.global_step
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        words = np.random.SeedSequence(
            (self.args.seed, *self._micro_step, self.args.process_index)
        ).generate_state(2)
        return self._negatives.manual_seed((int(words[0]) << 31) ^ int(words[1]))

    def _reset_tally(self) -> None:
        self._tally, self._tallied_steps = np.zeros(len(LOGGED)), 0.0
