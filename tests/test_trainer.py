"""CarmaTrainer: plain Trainer at λ = 0, the stated loss otherwise, in every way people train."""

import copy
import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import FAMILIES, TEXTS, byte_level_tokenizer, tiny_model
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM,
                          AutoModelForSeq2SeqLM)
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from carma_lib.collate import Collator, encode, encode_text
from carma_lib.losses import CarmaConfig, CarmaLoss
from carma_lib.blocks import KeptStates, decoder_blocks
from carma_lib.methods import make_trainer
from carma_lib.trainer import CarmaMixin, CarmaTrainer, checkpointing

CARMA = CarmaConfig(
    carma_weight=0.4,
    mi_weight=0.5,
    stability_weight=0.7,
    mi_layers=(0, 2),
    stability_layers=(0, 1),
    num_negatives=None,
)
PLAIN = CarmaConfig(carma_weight=0)
TOKENIZER = byte_level_tokenizer()


def single_target_rows(number=8):
    data = [{"text": TEXTS[i % len(TEXTS)], "target": "abcdefgh"[i % 8]} for i in range(number)]
    return encode(Dataset.from_list(data), TOKENIZER, suffix=' is called a "')


def language_model_rows(number=8):
    return encode_text(Dataset.from_dict({"text": [TEXTS[i % len(TEXTS)] for i in range(number)]}), TOKENIZER)


def arguments(folder, **settings):
    chosen = dict(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        logging_steps=1,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**(chosen | settings))


def trained(folder, rows, model=None, carma=CARMA, eval_dataset=None, **settings):
    model = model or tiny_model("gpt2")
    trainer = CarmaTrainer(
        model,
        arguments(folder, **settings),
        carma=carma,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return torch.cat(
        [
            parameter.detach().flatten()
            for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters()
        ]
    )


def batch_of(rows):
    return Collator(TOKENIZER)(list(rows))


# λ = 0


@pytest.mark.parametrize("carma", [PLAIN, CarmaConfig(carma_weight=0, mi_layers=(0, 99))])
def test_weight_zero_is_plain_trainer_with_labels(tmp_path, carma):
    rows = language_model_rows()
    settings = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    ours = trained(tmp_path, rows, carma=carma, **settings)

    def collate(batch):
        return {
            name: value for name, value in Collator(TOKENIZER)(batch).items() if name != "constituent_ids"
        }

    plain = Trainer(
        tiny_model("gpt2"), arguments(tmp_path, remove_unused_columns=False, **settings), collate, rows
    )
    plain.train()
    assert torch.equal(weights(ours), weights(plain)) and losses(ours) == losses(plain)
    assert not torch.equal(weights(ours), weights(trained(tmp_path, rows, **settings)))


def test_weight_zero_is_plain_trainer_with_single_targets(tmp_path):
    rows = single_target_rows()
    ours = trained(tmp_path, rows, carma=PLAIN, max_steps=4)

    def collate(batch):
        inputs = Collator(TOKENIZER)(batch)
        del inputs["constituent_ids"]
        return {**inputs, "labels": inputs.pop("target_ids"), "logits_to_keep": 1}

    plain = Trainer(
        tiny_model("gpt2"),
        arguments(tmp_path, max_steps=4, remove_unused_columns=False),
        collate,
        rows,
        compute_loss_func=lambda outputs, labels, **_: F.cross_entropy(outputs.logits[:, -1].float(), labels),
    )
    plain.train()
    assert torch.equal(weights(ours), weights(plain)) and losses(ours) == losses(plain)


# the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_configured_blocks_are_kept(family):
    model, blocks_of = tiny_model(family, layers=4), decoder_blocks
    kept = KeptStates(blocks_of(model), (1, 3))
    ids = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    final = []
    blocks_of(model)[3].register_forward_hook(
        lambda m, a, o: final.append(o[0] if isinstance(o, tuple) else o)
    )
    with kept.during():
        states = model(ids, output_hidden_states=True).hidden_states
    ours = kept.take(2, 7)
    assert [state is not None for state in ours] == [False, False, True, False, True]
    assert torch.equal(ours[2], states[2]) and torch.equal(ours[4], final[0])
    model(ids)
    with kept.during(), torch.no_grad():
        model(ids)
    assert kept._passes == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make_rows", [single_target_rows, language_model_rows])
def test_the_logged_loss_is_the_stated_one(tmp_path, family, make_rows):
    """One step over one batch: the parts from the model's own outputs, then those that were logged."""
    rows = make_rows(4)
    carma = replace(CARMA, mi_layers=(0, 1))
    batch = batch_of(rows)
    constituent_ids, targets = batch.pop("constituent_ids"), batch.pop("target_ids", None)
    model = tiny_model(family)
    outputs = model(**batch, output_hidden_states=True)
    task_loss = outputs.loss if targets is None else F.cross_entropy(outputs.logits[:, -1], targets)
    terms = CarmaLoss(carma)(outputs.hidden_states, constituent_ids, batch["attention_mask"])
    no_dropout(model)
    logged = trained(tmp_path, rows, model, carma=carma, max_steps=1).state.log_history[0]
    expected = dict(
        loss=0.6 * task_loss + 0.4 * terms.total,
        task_loss=task_loss,
        mutual_information=terms.mutual_information,
        stability=terms.stability,
        weighted_task_loss=0.6 * task_loss,
        weighted_mutual_information=0.4 * 0.5 * terms.mutual_information,
        weighted_stability=0.4 * 0.7 * terms.stability,
    )
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-5), name


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_terms_are_averaged_over_the_logging_window(tmp_path):
    rows = single_target_rows()
    settings = dict(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    each = trained(tmp_path, rows, logging_steps=1, **settings).state.log_history[:4]
    pairs = trained(tmp_path, rows, logging_steps=2, **settings).state.log_history[:2]
    for name in ("loss", "task_loss", "mutual_information", "weighted_stability"):
        assert pairs[1][name] == pytest.approx((each[2][name] + each[3][name]) / 2, rel=1e-6)
    parts = sum(value for name, value in pairs[0].items() if name.startswith("weighted_"))
    assert parts == pytest.approx(pairs[0]["loss"], rel=1e-5)


def test_terms_that_are_off_are_not_logged(tmp_path):
    logged = trained(
        tmp_path, single_target_rows(), carma=replace(CARMA, stability_weight=0)
    ).state.log_history[0]
    assert "mutual_information" in logged and not [name for name in logged if "stability" in name]
    assert "task_loss" not in trained(tmp_path, single_target_rows(), carma=PLAIN).state.log_history[0]


# accumulation, processes, resumption


@pytest.mark.parametrize("make_rows", [single_target_rows, language_model_rows])
def test_accumulation_leaves_the_loss_as_it_is(tmp_path, make_rows):
    """Every micro-batch holds the same two texts, so all divisions of a batch of 8 must agree."""
    rows = make_rows(2)
    rows = rows.select([0, 1] * 8)

    def run(size, accumulation):
        model = tiny_model("gpt2")
        no_dropout(model)
        return trained(
            tmp_path,
            rows,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        )

    whole = run(8, 1)
    for accumulation in (2, 4):
        split = run(8 // accumulation, accumulation)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-6)
        for name in ("task_loss", "stability", "weighted_mutual_information"):
            assert split.state.log_history[0][name] == pytest.approx(
                whole.state.log_history[0][name], rel=1e-5
            )
        torch.testing.assert_close(weights(split), weights(whole), rtol=1e-4, atol=1e-5)


KINDS = {
    "single_target": (single_target_rows, "carma"),
    "language_model": (language_model_rows, "carma"),
    "l2_sp": (single_target_rows, "l2_sp"),  # whose penalty is of the weights, not of the rows
}


def trained_in(folder, make_rows, method, **settings):
    """Trained on the same two texts again and again, so that two processes see what one sees."""
    model = tiny_model("gpt2")
    no_dropout(model)
    trainer = make_trainer(method, model, arguments(folder, train_sampling_strategy="sequential", **settings), carma=CARMA,
                           strength=0.4, train_dataset=make_rows(2).select([0, 1] * 8), data_collator=Collator(TOKENIZER))
    trainer.train()
    return trainer


def logged(trainer):
    names = ("loss", "task_loss", "stability", "penalty")
    return [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history[:2]]


def test_two_processes_train_like_one(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), str(tmp_path)]
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=300, capture_output=True)
    for kind, (make_rows, method) in KINDS.items():
        two = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        one = trained_in(tmp_path, make_rows, method)
        assert method != "l2_sp" or logged(one)[1][-1] > 0
        for theirs, ours in zip(two["logged"], logged(one), strict=True):
            assert theirs == pytest.approx(ours, rel=1e-6), kind
        torch.testing.assert_close(two["weights"], weights(one), rtol=1e-4, atol=1e-5)


def test_resumed_run_equals_the_unbroken_one(tmp_path):
    rows = single_target_rows()
    carma = replace(CARMA, num_negatives=2)  # sampled: the draws must be the same ones
    settings = dict(
        max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=7, optim="adamw_torch"
    )
    unbroken = trained(tmp_path / "a", rows, carma=carma, save_strategy="steps", save_steps=2, **settings)
    resumed = CarmaTrainer(
        tiny_model("gpt2", seed=5),
        arguments(tmp_path / "b", **settings),
        carma=carma,
        train_dataset=rows,
        processing_class=TOKENIZER,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(resumed) == losses(unbroken) and torch.equal(weights(resumed), weights(unbroken))
    other = trained(tmp_path / "c", rows, carma=carma, **(settings | dict(seed=8)))
    assert losses(other) != losses(unbroken)


def test_draws_of_negatives_depend_on_seed_step_and_micro_batch(tmp_path):
    def draws(seed):
        trainer = CarmaTrainer(
            tiny_model("gpt2"),
            arguments(tmp_path, seed=seed, data_seed=1),
            carma=CARMA,
            processing_class=TOKENIZER,
        )
        for trainer.state.global_step in (0, 0, 1, 1):
            yield trainer._carma_seeded_generator().initial_seed()

    first, again, other = [list(draws(seed)) for seed in (7, 7, 8)]
    assert first == again and len({*first, *other}) == 8


# memory savers, compilation, precision, adapters


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(tmp_path, family, use_reentrant):
    rows = single_target_rows()
    plain = trained(tmp_path, rows, tiny_model(family))
    saving = trained(
        tmp_path,
        rows,
        tiny_model(family),
        **checkpointing(use_reentrant=use_reentrant),
    )
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)
    torch.testing.assert_close(weights(saving), weights(plain), rtol=1e-4, atol=1e-5)


def test_compiled_model(tmp_path):
    rows, model = single_target_rows(), tiny_model("llama")
    plain = trained(tmp_path, rows, model)
    compiled = trained(
        tmp_path,
        rows,
        tiny_model("llama"),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert compiled.state.log_history[0]["stability"] == pytest.approx(
        plain.state.log_history[0]["stability"], rel=1e-5
    )


def test_compiled_trainings_one_after_another(tmp_path):
    """What was compiled without hooks, or with those of other layers, must not run in their place."""
    compiled = dict(torch_compile=True, torch_compile_backend="aot_eager")
    for carma in (PLAIN, CARMA, replace(CARMA, mi_layers=(0, 2), stability_layers=(0, 2)), PLAIN):
        after, plain = (trained(tmp_path, single_target_rows(), tiny_model("llama"), carma, **more) for more in (compiled, {}))
        assert losses(after) == pytest.approx(losses(plain), rel=1e-5)


def test_bf16(tmp_path):
    full = trained(tmp_path, single_target_rows(), tiny_model("llama"))
    half = trained(tmp_path, single_target_rows(), tiny_model("llama"), bf16=True)
    assert losses(half) == pytest.approx(losses(full), rel=0.02) and losses(half) != losses(full)


def adapters():
    from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    task = dict(task_type="CAUSAL_LM")
    return [
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **task),
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task
        ),
        AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], **task),
        PromptTuningConfig(num_virtual_tokens=3, **task),
        PrefixTuningConfig(num_virtual_tokens=3, **task),
    ]


@pytest.mark.parametrize("adapter", adapters(), ids=lambda adapter: type(adapter).__name__)
@pytest.mark.parametrize("saving", [False, True])
def test_adapters(tmp_path, adapter, saving):
    from peft import get_peft_model

    prefix = type(adapter).__name__ == "PrefixTuningConfig"
    if prefix and saving:
        pytest.skip("peft: prefix tuning does not work with gradient checkpointing")
    model = get_peft_model(tiny_model("llama"), adapter)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trained(
        tmp_path,
        single_target_rows(),
        model,
        eval_dataset=single_target_rows(),
        carma=replace(CARMA, carma_weight=1),
        max_steps=3,
        **(checkpointing() if saving else {}),
    )
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed and all(model.get_parameter(name).requires_grad for name in changed)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


# evaluation


def test_evaluation_and_best_checkpoint(tmp_path):
    rows = single_target_rows()
    trainer = trained(
        tmp_path,
        rows,
        eval_dataset=rows,
        max_steps=8,
        learning_rate=3e-2,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        per_device_eval_batch_size=3,
    )
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.state.best_metric == max(accuracies) and len(set(accuracies)) > 1
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == max(accuracies)
    batch = batch_of(rows)
    targets = batch.pop("target_ids")
    del batch["constituent_ids"]
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits[:, -1]
    assert metrics["eval_task_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics["eval_accuracy"] == (logits.argmax(-1) == targets).double().mean().item()
    predicted, cross_entropies = trainer.predict(rows).predictions
    assert predicted.tolist() == logits.argmax(-1).tolist() and cross_entropies.shape == (8,)


def test_evaluation_with_labels_is_the_task_loss_alone(tmp_path):
    rows = language_model_rows(4)
    trainer = trained(tmp_path, rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    batch = batch_of(rows)
    del batch["constituent_ids"]
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-5)
    assert "eval_accuracy" not in metrics
    shapes = []
    own = CarmaTrainer(
        trainer.model,
        arguments(tmp_path),
        carma=CARMA,
        eval_dataset=rows,
        processing_class=TOKENIZER,
        compute_metrics=lambda prediction: {"width": shapes.append(prediction.predictions.shape) or 1},
    )
    assert own.evaluate()["eval_width"] == 1 and shapes == [(4, batch["input_ids"].shape[1], 300)]


def test_logits_only_where_they_are_read(tmp_path):
    model, shapes = tiny_model("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    trained(tmp_path, single_target_rows(), model, eval_dataset=single_target_rows()).evaluate()
    assert set(shapes) == {1}


# in the place of any trainer: arguments, models, metrics


def labelled(rows):
    """Rows that a plain `Trainer` can stack: of one length, without words."""
    return [{"input_ids": list(row), "labels": list(row)} for row in rows]


ROWS = labelled([[5 + row, 16, 17, 18, 19, 20] for row in range(8)])
OWN = [{**row, "constituent_ids": [0, 0, 1, 1, 2, 2]} for row in ROWS]
BOTH = [CARMA, PLAIN]


@pytest.mark.parametrize("carma", BOTH, ids=["carma", "plain"])
def test_every_argument_of_trainer_passes_through(tmp_path, carma):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (
            num_items_in_batch)

    seen = []
    trainer = CarmaTrainer(
        None, arguments(tmp_path, max_steps=2), None, OWN, OWN[:4], None, lambda: tiny_model("gpt2"), loss_func,
        lambda prediction: {"shape": seen.append(prediction.predictions.shape) or 1.0}, None, (None, None),
        (torch.optim.SGD, {"lr": 0.25}), lambda logits, labels: logits.argmax(-1), carma=carma)
    trainer.train()
    assert trainer.evaluate()["eval_shape"] == 1.0 and seen == [(4, 6)]
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    base = Trainer(
        None, arguments(tmp_path, max_steps=2), None, ROWS, None, None, lambda: tiny_model("gpt2"), loss_func,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.25}))
    base.train()
    assert torch.equal(weights(trainer), weights(base)) == (carma is PLAIN)


def test_nothing_said_is_carma_on_the_first_blocks(tmp_path):
    trainer = CarmaTrainer(tiny_model("gpt2", layers=6), arguments(tmp_path), train_dataset=OWN)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["mutual_information"] > 0 and logged["stability"] > 0
    assert trainer.carma == CarmaConfig() and trainer._carma_terms.config.layers == (0, 1, 2)


def test_neither_arguments_nor_a_model_are_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(CarmaTrainer(tiny_model("gpt2"), train_dataset=OWN).args, TrainingArguments)
    with pytest.raises(RuntimeError, match="`model` or `model_init`"):
        CarmaTrainer(train_dataset=OWN)


@pytest.mark.parametrize("carma", BOTH, ids=["carma", "plain"])
def test_the_callers_arguments_stay_as_they_were(tmp_path, carma):
    given = arguments(tmp_path)
    before = given.to_dict()
    trainer = CarmaTrainer(tiny_model("gpt2"), given, carma=carma, train_dataset=Dataset.from_list(OWN))
    trainer.train()
    assert given.to_dict() == before and trainer.args is given and given.remove_unused_columns
    assert ("mutual_information" in trainer.state.log_history[0]) == (carma is CARMA)


def test_a_new_model_for_each_training(tmp_path):
    """`model_init` makes one when training starts; hooks follow, also to a model that was put in by hand."""
    trainer = CarmaTrainer(args=arguments(tmp_path), model_init=lambda: tiny_model("gpt2"), carma=CARMA,
                           train_dataset=OWN)
    first = trainer.model
    trainer.train()
    once = losses(trainer)
    assert trainer.model is not first
    trainer.state.log_history.clear()
    trainer.train()
    assert losses(trainer) == once
    trainer = CarmaTrainer(tiny_model("gpt2", seed=3), arguments(tmp_path), carma=CARMA, train_dataset=OWN)
    trainer.model = trainer.model_wrapped = tiny_model("gpt2")
    trainer.train()
    assert losses(trainer) == once


@pytest.mark.parametrize("carma", [PLAIN, CARMA])
def test_hyperparameter_search(tmp_path, carma):
    pytest.importorskip("optuna")
    rows = single_target_rows()
    trainer = CarmaTrainer(args=arguments(tmp_path, eval_strategy="epoch"), carma=carma, model_init=lambda: tiny_model("gpt2"),
                           train_dataset=rows, eval_dataset=rows, processing_class=TOKENIZER)
    rates = iter((1e-9, 0.1))
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *2 * [next(rates)])}, n_trials=2,
        backend="optuna", direction="minimize", compute_objective=lambda metrics: metrics["eval_task_loss"])
    assert best.run_id == "1" and best.hyperparameters == {"learning_rate": 0.1}
    alone = trained(tmp_path, rows, tiny_model("gpt2"), carma=carma)
    assert losses(trainer) == losses(alone), "the last trial is a training like any other"
    assert best.objective == pytest.approx(alone.evaluate(rows)["eval_task_loss"])
    assert ("stability" in trainer.state.log_history[0]) == (carma is CARMA)


@pytest.mark.parametrize("carma", BOTH, ids=["carma", "plain"])
def test_predict_without_metrics_gives_what_trainer_gives(tmp_path, carma):
    bare = [{"input_ids": row["input_ids"]} for row in ROWS]
    for rows, own in ((ROWS, OWN), (bare, bare)):
        base = Trainer(tiny_model("gpt2"), arguments(tmp_path)).predict(rows)
        ours = CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path), carma=carma).predict(own)
        assert (base.predictions == ours.predictions).all()
        assert base.label_ids is None and ours.label_ids is None or (base.label_ids == ours.label_ids).all()
        assert set(base.metrics) == set(ours.metrics)


def test_metrics_batch_by_batch(tmp_path):
    calls = []

    def metrics(prediction, compute_result=False):
        calls.append((len(prediction.label_ids), compute_result))
        return {"batches": len(calls)} if compute_result else {}

    settings = arguments(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=2)
    trainer = CarmaTrainer(tiny_model("gpt2"), settings, carma=CARMA, compute_metrics=metrics)
    assert trainer.evaluate(OWN)["eval_batches"] == 4 and [last for _, last in calls] == [False, False, False, True]
    trainer = CarmaTrainer(tiny_model("gpt2"), settings, carma=CARMA, processing_class=TOKENIZER)
    assert {"eval_accuracy", "eval_task_loss"} <= set(trainer.evaluate(single_target_rows(5)))


class TwoPasses(Trainer):
    """Runs the model again for what it returns besides the loss, with or without gradients, before or after."""

    extra = ("after", False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        when, gradients = self.extra
        other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
        with torch.set_grad_enabled(gradients):
            if when == "before":
                model(**other)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.set_grad_enabled(gradients):
            if when == "after":
                model(**other)
        return (loss, outputs) if return_outputs else loss


class CarmaTwoPasses(CarmaMixin, TwoPasses):
    pass


@pytest.mark.parametrize("extra", [("after", False), ("before", False), ("after", True), ("before", True)], ids=str)
def test_states_are_those_of_the_pass_whose_loss_is_used(tmp_path, extra, monkeypatch):
    monkeypatch.setattr(TwoPasses, "extra", extra)
    trainers = [kind(tiny_model("llama"), arguments(tmp_path), carma=CARMA, train_dataset=OWN)
                for kind in (CarmaTrainer, CarmaTwoPasses)]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == losses(trainers[1]) and torch.equal(weights(trainers[0]), weights(trainers[1]))


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hook_is_left_on_the_model(tmp_path):
    model = tiny_model("gpt2")
    trainer = CarmaTrainer(model, arguments(tmp_path), carma=CARMA, train_dataset=OWN)
    assert hooks_on(model) == 0
    trainer.train()
    assert hooks_on(model) == 0
    model.train()
    trainer.compute_loss(model, Collator(TOKENIZER)(OWN[:2]))
    assert hooks_on(model) == 3
    copy.deepcopy(model)
    del trainer
    gc.collect()
    assert hooks_on(model) == 0

    class Stops(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise RuntimeError("stopped")

    trainer = CarmaTrainer(model, arguments(tmp_path), carma=CARMA, train_dataset=OWN, callbacks=[Stops()])
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    assert hooks_on(model) == 0


class Transfers(TorchFunctionMode):
    """Counts what brings a value from the device to the host."""

    NAMES = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make_rows", [single_target_rows, language_model_rows])
def test_a_step_reads_from_the_device_once_and_never_at_weight_zero(tmp_path, make_rows):
    batch, counts = batch_of(make_rows(4)), []
    for carma in (PLAIN, CARMA):
        trainer = CarmaTrainer(tiny_model("llama"), arguments(tmp_path), carma=carma)
        trainer.model.train()
        with Transfers() as transfers:
            trainer.compute_loss(trainer.model, dict(batch))
        counts.append(transfers.count)
    plain = {name: value for name, value in batch.items() if name not in ("constituent_ids", "target_ids")}
    with Transfers() as transfers:
        trainer.model(**plain)
    assert counts == [transfers.count, transfers.count + 1]


def test_half_precision_weights_are_warned_of_once(tmp_path, recwarn):
    with pytest.warns(UserWarning, match=r"weights are torch.bfloat16.* load .* dtype=torch.float32") as told:
        CarmaTrainer(tiny_model("llama").bfloat16(), arguments(tmp_path), train_dataset=OWN)
    assert len([each for each in told if "weights are" in str(each.message)]) == 1
    recwarn.clear()
    CarmaTrainer(tiny_model("llama"), arguments(tmp_path), train_dataset=OWN)
    frozen = tiny_model("llama").bfloat16().requires_grad_(False)
    frozen.lm_head.weight = torch.nn.Parameter(frozen.lm_head.weight.float())
    CarmaTrainer(frozen, arguments(tmp_path), carma=PLAIN, train_dataset=OWN)
    assert not [each for each in recwarn if "weights are" in str(each.message)]


# errors at the door


def test_models_that_cannot_be_trained(tmp_path):
    small = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    bert = AutoConfig.for_model("bert", **small)
    t5 = AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    encoders = [AutoModelForMaskedLM.from_config(bert), AutoModelForCausalLM.from_config(bert)]
    for model in (*encoders, AutoModelForSeq2SeqLM.from_config(t5), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="is no decoder-only language model"):
            CarmaTrainer(model, arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)
    model = tiny_model("gpt2")
    model.hf_device_map = {"transformer.h.0": "cpu", "transformer.h.1": "meta"}  # as device_map="auto" leaves it with two devices
    with pytest.raises(ValueError, match="several GPUs in one process"):
        CarmaTrainer(model, arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)
    CarmaTrainer(model, arguments(tmp_path), carma=CarmaConfig(carma_weight=0), processing_class=TOKENIZER)
    model = tiny_model("gpt2")
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(TypeError, match="no list of 3 decoder blocks"):
        CarmaTrainer(model, arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)


@pytest.mark.parametrize("family, sizes, reason", [
    ("opt", dict(ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.3), "passes over whole blocks at random"),
    ("gemma3n_text", dict(head_dim=8, intermediate_size=64, hidden_size_per_layer_input=8, num_key_value_heads=2,
                          vocab_size_per_layer_input=100, num_kv_shared_layers=0, laurel_rank=4), "not one stream"),
    ("xlnet", dict(d_inner=64, d_head=8), "not one stream")])
def test_streams_that_cannot_be_read_are_refused_at_the_door(tmp_path, family, sizes, reason):
    config = AutoConfig.for_model(family, vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TypeError, match=reason) as error:
        CarmaTrainer(model, arguments(tmp_path), train_dataset=OWN)
    assert "\n" not in str(error.value)
    CarmaTrainer(model, arguments(tmp_path), carma=PLAIN, train_dataset=OWN)


@pytest.mark.parametrize("family, sizes", [
    ("openai-gpt", {}), ("mamba", dict(state_size=8)), ("opt", dict(ffn_dim=64, word_embed_proj_dim=32)),
    ("bloom", {}), ("gpt_neox", dict(intermediate_size=64)), ("rwkv", {}), ("olmo2", dict(intermediate_size=64)),
    ("granite", dict(intermediate_size=64)), ("falcon_mamba", dict(state_size=8)), ("phi", dict(intermediate_size=64))])
def test_families_of_many_kinds_train(tmp_path, family, sizes):
    """Blocks that return lists, state spaces, other names: the terms are finite and above zero."""
    config = AutoConfig.for_model(family, vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    trainer = CarmaTrainer(AutoModelForCausalLM.from_config(config), arguments(tmp_path), train_dataset=OWN)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0 < logged["mutual_information"] < 100 and 0 < logged["stability"] < 100


@pytest.mark.parametrize("family, text, vision", [("llava", "llama", "clip_vision_model"),
                                                  ("gemma3", "gemma3_text", "siglip_vision_model")])
def test_a_vision_tower_of_the_same_depth_is_not_the_language_model(tmp_path, family, text, vision):
    """The tower comes first, and its blocks are as many and as wide."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3)
    tokens = {"mm_tokens_per_image": 4} if family == "gemma3" else {"image_token_index": 299}
    words = dict(model_type=text, vocab_size=300, num_key_value_heads=2, head_dim=8, pad_token_id=1, **sizes)
    config = AutoConfig.for_model(family, text_config=words, vision_config=dict(
        model_type=vision, image_size=28, patch_size=14, **sizes), **tokens)
    model = AutoModelForImageTextToText.from_config(config)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3]
    assert len(lists) == 2 and decoder_blocks(model) is lists[1] is model.model.language_model.layers
    logged = trained(tmp_path, language_model_rows(), model).state.log_history[0]
    assert logged["mutual_information"] > 0 and logged["stability"] > 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
@pytest.mark.parametrize("carma", [PLAIN, CARMA])
def test_rows_longer_than_the_models_positions(tmp_path, family, carma):
    """The tokenizer knows no maximum, so only the model can tell."""
    assert TOKENIZER.model_max_length > 1e9
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    model = tiny_model("gpt2") if family == "gpt2" else AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **shape, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128)
        if family == "opt" else AutoConfig.for_model("roberta", **shape, intermediate_size=64, is_decoder=True, max_position_embeddings=130))
    texts = Dataset.from_dict({"text": ["a small bird " * 200]})
    with pytest.raises(ValueError, match=r"^a row has \d[\d,]+ tokens, and the model knows 128 positions: cut .* max_length=128") as error:
        trained(tmp_path, encode_text(texts, TOKENIZER), model, carma=carma)
    assert "\n" not in str(error.value)
    trained(tmp_path, encode_text(texts, TOKENIZER, max_length=128), model, carma=carma)
    packed = {"input_ids": torch.full((1, 200), 5), "position_ids": torch.arange(100).repeat(2)[None]}
    trainer = CarmaTrainer(model, arguments(tmp_path), carma=carma, processing_class=TOKENIZER)
    if family == "gpt2":  # OPT counts its positions from the mask
        assert trainer.compute_loss(model.train(), {**packed, "labels": packed["input_ids"]}).isfinite()


def test_a_mask_of_another_shape_needs_positions(tmp_path):
    model, ids = tiny_model("llama").train(), torch.arange(5, 13)[None]
    trainer = CarmaTrainer(model, arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(8, 8, dtype=torch.bool).tril()[None, None]}
    with pytest.raises(ValueError, match="^the attention mask is not of the shape .* give position_ids with it$"):
        trainer.compute_loss(model, dict(given))
    assert trainer.compute_loss(model, {**given, "position_ids": torch.arange(8)[None]}).isfinite()


def test_rows_may_be_longer_where_positions_are_computed(tmp_path):
    rows = encode_text(Dataset.from_dict({"text": ["a small bird " * 60]}), TOKENIZER)
    assert rows[0]["length"] > 128 and all(loss > 0 for loss in losses(trained(tmp_path, rows, tiny_model("llama"))))


def test_layers_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="the config reads block 7, the model has blocks 0 to 2"):
        CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path), carma=CarmaConfig(mi_layers=(0, 7)))


def test_bad_batches_stop_before_a_step(tmp_path):
    rows = single_target_rows()
    without = CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path), carma=CARMA, data_collator=Collator(TOKENIZER),
                           train_dataset=rows.remove_columns("constituent_ids"))
    with pytest.raises(ValueError, match="pass the tokenizer as processing_class"):
        without.train()

    def pad_right(batch):
        return {
            name: tensor.flip(1) if tensor.dim() == 2 else tensor
            for name, tensor in Collator(TOKENIZER)(batch).items()
        }

    trainer = CarmaTrainer(
        tiny_model("gpt2"), arguments(tmp_path), carma=CARMA, train_dataset=rows, data_collator=pad_right
    )
    with pytest.raises(ValueError, match="padded on the left"):
        trainer.predict(rows)
    with pytest.raises(ValueError, match="padded on the left"):
        trainer.train()


def test_nan_in_the_loss(tmp_path):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias.fill_(float("nan"))
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        trained(tmp_path, single_target_rows(), model)
    assert torch.equal(model.lm_head.weight, before)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        trained(tmp_path, single_target_rows(), model, carma=PLAIN)


def test_frozen_below_the_terms(tmp_path):
    model = tiny_model("gpt2")
    model.requires_grad_(False)
    model.transformer.h[2].requires_grad_(True)
    with pytest.raises(ValueError, match="the output of block 1 has no gradient"):
        trained(tmp_path, single_target_rows(), model, carma=replace(CARMA, mi_layers=(0, 1)))


@pytest.mark.parametrize(("accumulated", "smoothing"), [(1, 0.0), (2, 0.0), (1, 0.1)])
def test_rows_of_which_nothing_is_learned_count_nothing(tmp_path, accumulated, smoothing):
    """Where a long prompt was cut, only −100 is left; such a micro-batch has no task loss, with or without CARMA."""
    rows = language_model_rows().to_list()
    rows = Dataset.from_list([{**row, "labels": [-100] * len(row["labels"])} if place % 2 else row for place, row in enumerate(rows)])
    for carma in (PLAIN, CARMA):
        model = tiny_model("llama")
        trainer = CarmaTrainer(model, arguments(tmp_path, max_steps=4, per_device_train_batch_size=1, learning_rate=0.01,
                                                gradient_accumulation_steps=accumulated, label_smoothing_factor=smoothing),
                               train_dataset=rows,
                               processing_class=TOKENIZER, carma=carma)
        trainer.train()
        losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
        assert all(weight.isfinite().all() for weight in model.parameters())
        assert carma is PLAIN or len(losses) == 4 and min(losses) >= 0 and max(losses) > 1
        assert accumulated == 2 or carma is PLAIN or 0 in losses


# --- another loss, another config, another training -------------------------------------------------------------

def test_a_loss_that_reads_its_labels_otherwise_counts(tmp_path):
    rows = language_model_rows()

    def collate(batch):
        together = Collator(TOKENIZER)([{name: row[name] for name in ("input_ids", "constituent_ids")} for row in batch])
        return {**together, "labels": torch.tensor([[row["input_ids"][-1]] for row in batch])}

    def loss_of(outputs, labels, **unused):
        return F.cross_entropy(outputs.logits[:, -1].float(), labels[:, 0])

    logged = {}
    for weight in (0, 1e-6):
        trainer = CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path, max_steps=1), carma=replace(CARMA, carma_weight=weight), train_dataset=rows,
                               data_collator=collate, compute_loss_func=loss_of, processing_class=TOKENIZER)
        trainer.train()
        logged[weight] = trainer.state.log_history[0]["loss"]
    assert logged[0] > 1 and logged[1e-6] == pytest.approx(logged[0], rel=1e-4)


def test_logs_of_a_second_training_are_its_own(tmp_path):
    trainer = trained(tmp_path, language_model_rows(), max_steps=3, logging_steps=2)
    trainer.args.max_steps = 2
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert sum(value for name, value in last.items() if name.startswith("weighted_")) == pytest.approx(last["loss"], abs=2e-4)


def test_a_config_replaced_in_training_counts_from_the_next_step(tmp_path):
    class Without(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            trainer.carma = replace(CARMA, mi_weight=0.0, carma_weight=0.2)

    trainer = CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path, max_steps=4, logging_steps=2), carma=CARMA, train_dataset=language_model_rows(),
                           processing_class=TOKENIZER, callbacks=[Without()])
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "mutual_information" in first and "mutual_information" not in second
    for entry in (first, second):
        assert sum(value for name, value in entry.items() if name.startswith("weighted_")) == pytest.approx(entry["loss"], abs=2e-4)


def test_batches_without_tokens_and_other_configs_are_told_in_one_line(tmp_path):
    trainer = CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)
    embedded = {"inputs_embeds": torch.zeros(1, 4, 32), "labels": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="no input_ids to read words from: give constituent_ids"):
        trainer.compute_loss(trainer.model.train(), embedded)
    for wrong in ({"carma_weight": 0.2}, 0.2):
        with pytest.raises(TypeError, match="carma must be a CarmaConfig"):
            CarmaTrainer(tiny_model("gpt2"), arguments(tmp_path), carma=wrong)
        with pytest.raises(TypeError, match="carma must be a CarmaConfig"):
            CarmaLoss(wrong)
    for depth in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_layers must be a whole number"):
            CARMA.for_depth(depth)


def test_virtual_tokens_take_positions(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    most = model.config.max_position_embeddings
    trainer = CarmaTrainer(model, arguments(tmp_path), carma=CARMA, processing_class=TOKENIZER)
    ids = torch.ones(1, most - 2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"the model knows {most - 3} positions"):
        trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
