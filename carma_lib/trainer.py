"""CARMA in a trainer: a mixin over any Hugging Face trainer, and the two made of it for `Trainer` and `SFTTrainer`."""
from __future__ import annotations

import math
import operator
import warnings
import weakref
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments,
                          default_data_collator)

from carma_lib.blocks import KeptStates, checked_blocks, decoder_blocks, learned_positions, takes
from carma_lib.collate import IGNORED, Collator
from carma_lib.losses import CarmaConfig, CarmaLoss, checked_config
from carma_lib.words import WordTable, document_ids

OWN_COLUMNS = ("constituent_ids", "target_id", "target_ids")


class CarmaMixin:
    """Adds CARMA to a trainer that follows it in the bases: L = (1 − λ) L_task + λ (γ L_MI + η L_stability).

        class Mine(CarmaMixin, AnyTrainer): ...
        Mine(model, args, carma=CarmaConfig(), ...)  # every other argument is the trainer's own

    L_task is computed once, by the `compute_loss` of the trainer below; with λ = 0 training is that trainer's, bit for
    bit. Words come from the batch's `constituent_ids` (batch, tokens) if it has them, else from `input_ids` by the
    tokenizer's vocabulary. Documents packed into one row never share a word nor give each other negatives: they are told by
    `position_ids` or an attention mask that numbers them, after TRL's wrapped packing by the end-of-text token.

    Rows of a single answer, as `carma_lib.collate.encode` makes them, have `target_ids` (batch,) in place of `labels`,
    padded on the left: L_task is the cross-entropy of that token after the last position, evaluation adds `accuracy`
    and `task_loss`, means over rows, and `predict` gives (predicted ids, cross-entropies).

    The terms are means over a micro-batch, whatever the accumulation and the number of processes. Training logs add,
    with λ > 0, `task_loss`, `mutual_information`, `stability` and `weighted_…`, the shares that add up to `loss`. Evaluation
    computes no term. A step with λ > 0 reads from the device once, one with λ = 0 never.

    Args:
        carma: the terms and their weights; `CarmaConfig()` by default.

    Raises:
        TypeError: λ > 0 and the model is an encoder, or its blocks hand on no stream that can be read.
        ValueError: layers that do not exist; several GPUs in one process; no tokenizer and no `constituent_ids`;
            rows longer than the model's table of positions; hidden states or, with λ > 0, a loss that is not finite;
            single-answer rows that are padded right or, at the next log or the end of an evaluation, have a loss
            that is not finite.
    """

    def __init__(self, *args, carma: CarmaConfig | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.carma = checked_config(CarmaConfig() if carma is None else carma)
        self._carma_kept = self._carma_attached = self._carma_terms = None
        self._carma_word_table = self._carma_unchecked = None
        self._carma_tally, self._carma_misplaced, self._carma_answers, self._carma_micro_step = {}, [], [], (-1, 0)
        virtual = getattr(getattr(self.model, "active_peft_config", None), "num_virtual_tokens", None) or 0  # of prompt tuning
        most = learned_positions(self.model)
        self._carma_positions = most and most - virtual
        _warn_of_half_precision(self.model)
        if self._carma_weighted():
            if self.args.n_gpu > 1 or self.is_model_parallel:
                raise ValueError("several GPUs in one process, or another than its first, are not supported: start one process "
                                 "a GPU with torchrun, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0, set before torch is imported)")
            self.carma.for_depth(len(checked_blocks(self.model)))

    def train(self, *args, **kwargs):
        """As in the base trainer; afterwards no hook of CARMA is on the model."""
        self._carma_tally = {}  # steps of an earlier training that were not logged
        try:
            return super().train(*args, **kwargs)
        finally:
            self._carma_detach()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch=None):
        """The base trainer's loss, and while training with λ > 0 the terms beside it."""
        inputs = dict(inputs)
        words = inputs.pop("constituent_ids", None)
        self._carma_check_length(inputs.get("input_ids"), inputs.get("position_ids"))
        base = partial(self._carma_base_loss, model, inputs, return_outputs, num_items_in_batch)
        if not (model.training and self._carma_weighted()):
            return base()
        if self._carma_attached is None or any(map(operator.is_not, self._carma_attached, (self.model, self.carma))):
            self._carma_attach()  # the first step, or another model or config since
        if not isinstance(inputs.get("input_ids", words), Tensor):
            raise ValueError("the batch has no input_ids to read words from: give constituent_ids (batch, tokens) with it")
        ids = inputs.get("input_ids", words)
        mask = self._carma_mask(inputs, ids)
        packed = getattr(self.args, "packing", False) and (  # and cut without a mark
            inputs.get("position_ids") is None or getattr(self.args, "packing_strategy", "") == "wrapped")
        documents = document_ids(inputs.get("position_ids"), mask, ids,
                                 end_of_document=self._carma_tokenizer().eos_token_id if packed else None)
        mask = torch.ones_like(ids) if mask is None else mask
        if words is None:
            words = self._carma_words().constituent_ids(ids, mask, documents)
        labels = inputs.get("labels")  # which label smoothing takes out
        with self._carma_kept.during():
            found = base()
        task_loss = found[0] if return_outputs else found
        if isinstance(labels, Tensor) and labels.dim() == 2:  # rows of which nothing is learned have no mean: they count 0
            learned = (labels[:, 1:] != IGNORED).any() | task_loss.detach().isfinite()
            task_loss = torch.where(learned, task_loss, torch.zeros_like(task_loss))
        states = self._carma_kept.take(*ids.shape, task_loss)
        terms = self._carma_terms(states, words, mask.bool(), document_ids=documents,
                                  generator=self._carma_seeded_generator(ids.device),
                                  read=[task_loss.detach(), *self._carma_misplaced])
        self._carma_check(*terms.read)
        weight, share = self.carma.carma_weight, self.share_of_step(num_items_in_batch)
        loss = (1 - weight) * task_loss + weight * share * terms.total
        values = {"task_loss": task_loss / share, "mutual_information": terms.mutual_information, "stability": terms.stability}
        shares = {name: value for name, value in self._carma_shares().items() if value or name == "task_loss"}
        self.record(**{name: values[name] for name in shares})
        self.record(**{f"weighted_{name}": value * values[name] for name, value in shares.items()})
        return (loss, found[1]) if return_outputs else loss

    def _carma_mask(self, inputs: dict[str, Tensor], ids: Tensor) -> Tensor | None:
        """1 for real tokens, or the number of a document, (batch, tokens); None where nothing tells what is padding.

        Rows that TRL packs without a mask it may fill up with padding tokens at position 0.
        """
        mask, positions, labels = (inputs.get(name) for name in ("attention_mask", "position_ids", "labels"))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
        if mask is not None and positions is None:
            raise ValueError("the attention mask is not of the shape (batch, tokens), so it does not say what is padding "
                             "and where documents end: give position_ids with it")
        padding = getattr(getattr(self.processing_class, "tokenizer", self.processing_class), "pad_token_id", None)
        if positions is None or padding is None:
            return None
        filled = ((positions[0] if positions.dim() == 3 else torch.atleast_2d(positions)) == 0) & (ids == padding)
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            filled &= labels == IGNORED
        return 1 - filled.long().flip(1).cumprod(1).flip(1)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool,
                        ignore_keys=None):
        """As in the base trainer; single-answer rows give (predicted ids, cross-entropies), never logits."""
        inputs = {name: value for name, value in inputs.items() if name != "constituent_ids"}
        if "target_ids" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        logits, targets = outputs.logits[:, -1].float(), inputs["target_ids"]
        predicted, losses = logits.argmax(-1), F.cross_entropy(logits, targets, reduction="none")
        gathered = self.accelerator.gather_for_metrics((predicted == targets, losses))
        self._carma_answers.append(torch.stack([each.cpu().double() for each in gathered]))
        return (loss, None, None) if prediction_loss_only else (loss, (predicted, losses), targets)

    def evaluation_loop(self, *args, **kwargs):
        """As in the base trainer, with `accuracy` and `task_loss` where rows have a single answer."""
        self._carma_answers: list[Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        self._carma_check_waiting()
        if self._carma_answers:
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            means = torch.cat(self._carma_answers, dim=1).mean(dim=1).tolist()
            for name, value in zip(("accuracy", "task_loss"), means):
                output.metrics.setdefault(f"{prefix}_{name}", value)
        return output

    def share_of_step(self, num_items_in_batch) -> float:
        """What a micro-batch's mean is multiplied by: `Trainer` divides a loss by the number of micro-batches of a
        step, unless it is normalised by the items of all of them already; what is added is then divided here."""
        normalised = getattr(self, "loss_is_scaled_for_ga", None)
        if normalised is None:
            normalised = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        return 1 / self._carma_micro_batches if normalised else 1.0

    def record(self, **values: Tensor) -> None:
        """Add a micro-batch's scalars to the next training log, where their means over its steps appear."""
        share = 1 / self._carma_micro_batches
        for name, value in values.items():
            total, steps = self._carma_tally.get(name, (0.0, 0.0))
            self._carma_tally[name] = total + share * value.detach().float(), steps + share

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add what was recorded, averaged over processes and the steps since the last log, to training logs."""
        self._carma_check_waiting()
        if "loss" in logs and self._carma_tally:
            weighted = self._carma_tally.get("weighted_task_loss", (0, 0))[1]  # steps; one without a term has 0 of it
            means = torch.stack([total / (weighted if name.startswith("weighted_") else steps)
                                 for name, (total, steps) in self._carma_tally.items()])
            logs |= dict(zip(self._carma_tally, self.accelerator.reduce(means, reduction="mean").tolist()))
            self._carma_tally = {}
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in OWN_COLUMNS if name not in self._signature_columns]

    def _carma_base_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool, num_items_in_batch):
        self._carma_misplaced = []
        if "target_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs,
                                        num_items_in_batch=num_items_in_batch)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func needs rows with labels; single-answer rows have their own loss")
        forward = {name: value for name, value in inputs.items() if name != "target_ids"}
        if takes(model, "logits_to_keep"):
            forward["logits_to_keep"] = 1
        outputs = model(**forward)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = F.cross_entropy(outputs.logits[:, -1].float(), inputs["target_ids"], label_smoothing=smoothing)
        mask = inputs.get("attention_mask")
        self._carma_misplaced = [] if mask is None else [(mask[:, -1] == 0).any()]
        if not (self._carma_weighted() and model.training):  # looked at with the next log
            misplaced = self._carma_misplaced[0] if self._carma_misplaced else torch.zeros_like(loss)
            found = torch.stack([loss.detach(), misplaced.to(loss.dtype)])
            self._carma_unchecked = found if self._carma_unchecked is None else self._carma_unchecked + found
        return (loss, outputs) if return_outputs else loss

    def _carma_check_waiting(self) -> None:
        unchecked, self._carma_unchecked = self._carma_unchecked, None
        if unchecked is not None:
            self._carma_check(*unchecked.tolist())

    def _carma_check(self, loss: float, misplaced: float = 0.0) -> None:
        if misplaced:
            raise ValueError("single-answer batches must be padded on the left: use carma_lib.collate.Collator")
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.state.global_step}: lower the learning rate")

    def _carma_check_length(self, ids: Tensor | None, positions: Tensor | None) -> None:
        most = self._carma_positions  # rows that are packed may be longer, if their positions are not
        if most and ids is not None and ids.size(1) > most and (positions is None or positions.max() >= most):
            raise ValueError(f"a row has {ids.size(1):,} tokens, and the model knows {most:,} positions: cut the rows, "
                             f"with max_length={most} where they are tokenized")

    def _carma_weighted(self) -> bool:
        carma = self.carma
        return bool(carma.carma_weight and (carma.mi_weight or carma.stability_weight))

    def _carma_shares(self) -> dict[str, float]:
        carma = self.carma
        return {"task_loss": 1 - carma.carma_weight, "mutual_information": carma.carma_weight * carma.mi_weight,
                "stability": carma.carma_weight * carma.stability_weight}

    @property
    def _carma_micro_batches(self) -> int:
        return getattr(self, "current_gradient_accumulation_steps", 1)

    def _carma_attach(self) -> None:
        """Find the blocks of the model that is trained now, and put hooks on those that the terms of this config read."""
        self._carma_detach()
        blocks = decoder_blocks(self.model)
        config = checked_config(self.carma).for_depth(len(blocks))
        self._carma_terms, self._carma_attached = CarmaLoss(config), (self.model, self.carma)
        self._carma_kept = KeptStates(blocks, config.layers)
        if self.args.torch_compile or hasattr(self.model, "_orig_mod"):
            torch.compiler.reset()  # code that was compiled before runs without these hooks
        weakref.finalize(self, self._carma_kept.remove)

    def _carma_detach(self) -> None:
        if self._carma_kept is not None:
            self._carma_kept.remove()
        self._carma_kept = self._carma_attached = None

    def _carma_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError("carma_weight > 0 needs to know words: pass the tokenizer as processing_class, or "
                             "constituent_ids in every batch (carma_lib.collate.encode_text)")
        return tokenizer

    def _carma_words(self) -> WordTable:
        if self._carma_word_table is None:
            self._carma_word_table = WordTable(self._carma_tokenizer())
        return self._carma_word_table

    def _carma_seeded_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Draws depend on seed, step, micro-batch and process alone, so resuming repeats them."""
        step = self.state.global_step
        self._carma_micro_step = (step, self._carma_micro_step[1] + 1 if self._carma_micro_step[0] == step else 0)
        entropy = (self.args.seed, *self._carma_micro_step, self.args.process_index)
        words = np.random.SeedSequence(entropy).generate_state(2)
        return torch.Generator(device).manual_seed((int(words[0]) << 31) ^ int(words[1]))


class CarmaTrainer(CarmaMixin, Trainer):
    """`transformers.Trainer` with CARMA: see `CarmaMixin`. Given a tokenizer as `processing_class` and no collator,
    rows that hold `constituent_ids` or `target_id` are padded by `carma_lib.collate.Collator`, others as `Trainer` does."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        default = self.data_collator is default_data_collator or type(self.data_collator) is DataCollatorWithPadding
        if default and isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.data_collator = partial(_collate, self.data_collator, self.processing_class)


def checkpointing(*, use_reentrant: bool = False) -> dict:
    """The training arguments that compute hidden states twice instead of keeping them, as the installed version of
    transformers spells them: `activation_checkpointing` from 5.24 on, `gradient_checkpointing` before."""
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def __getattr__(name: str):
    """`CarmaSFTTrainer` is made when it is first asked for, so that TRL is needed by those alone who use it."""
    if name != "CarmaSFTTrainer":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ImportError(f"CarmaSFTTrainer needs TRL: pip install trl ({error})") from error
    made = type(name, (CarmaMixin, SFTTrainer), {"__module__": __name__, "__doc__": (
        "TRL's `SFTTrainer` with CARMA: every argument is `SFTTrainer`'s own, and `carma` is added (`CarmaMixin`).")})
    return globals().setdefault(name, made)


def _collate(base, tokenizer: PreTrainedTokenizerBase, rows: list) -> dict[str, Tensor]:
    ours = isinstance(rows[0], dict) and ("constituent_ids" in rows[0] or "target_id" in rows[0])
    return (Collator(tokenizer) if ours else base)(rows)


def _warn_of_half_precision(model: nn.Module) -> None:
    kinds = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    for kind in kinds & {torch.bfloat16, torch.float16}:
        warnings.warn(f"the trained weights are {kind}, in which most small steps round to nothing: load the model "
                      "with dtype=torch.float32 and pass bf16=True to the training arguments", stacklevel=4)
