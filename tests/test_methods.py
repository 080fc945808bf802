"""The methods beside CARMA: each one's loss against the formula, and that its strength arrives where it works."""
import math
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from tiny import TEXTS, byte_level_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from carma_lib.collate import Collator, encode
from carma_lib.losses import CarmaConfig
from carma_lib.methods import METHODS, PLAIN, R_DROP_DROPOUT, RDropTrainer, make_trainer, method_config
from carma_lib.stats.table import METHOD_LABELS

CARMA = CarmaConfig(carma_weight=0.4, mi_weight=0.5, mi_layers=(0, 1), stability_layers=(0, 1))
TOKENIZER = byte_level_tokenizer()
TRAINED = [name for name in METHODS if name != "untuned"]


@pytest.fixture(scope="module")
def rows():
    data = [{"text": TEXTS[i % len(TEXTS)], "target": "abcdefgh"[i % 8]} for i in range(8)]
    encoded = encode(Dataset.from_list(data), TOKENIZER, suffix=' is called a "')
    return encoded.select_columns(["input_ids", "constituent_ids", "target_id"]).to_list()


def trainer(folder, rows, method, *, family="llama", strength=None, model=None, **settings):
    chosen = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.1,
                  lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to="none",
                  use_cpu=True, disable_tqdm=True, logging_steps=1)
    return make_trainer(method, model or tiny_model(family), TrainingArguments(**(chosen | settings)), carma=CARMA,
                        strength=strength, train_dataset=rows, data_collator=Collator(TOKENIZER))


def batch_of(rows):
    return Collator(TOKENIZER)([dict(row) for row in rows[:4]])


def test_methods_have_names_for_figures():
    assert list(METHODS) == list(METHOD_LABELS)


def test_method_configs():
    assert method_config("fine_tuning", CARMA) == PLAIN and method_config("carma", CARMA) == CARMA
    only = method_config("mutual_information_only", CARMA)
    assert (only.mi_weight, only.stability_weight, only.carma_weight) == (1, 0, CARMA.carma_weight)
    only = method_config("stability_only", CARMA, 0.7)
    assert (only.mi_weight, only.stability_weight, only.carma_weight) == (0, 1, 0.7)
    assert method_config("neftune", CARMA, 5.0) == PLAIN


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_and_answers_like_the_others(method, rows, tmp_path):
    made = trainer(tmp_path, rows, method)
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    made.train()
    after = made.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weight.isfinite().all() for weight in after.values())
    assert set(made.evaluate(rows)) >= {"eval_accuracy", "eval_task_loss"}


def test_r_drop_against_the_formula(rows, tmp_path):
    made = trainer(tmp_path, rows, "r_drop", strength=3.0, family="gpt2")  # GPT-2 has dropout of its own
    batch = batch_of(rows)
    made.model.train()
    torch.manual_seed(5)
    loss = made.compute_loss(made.model, batch)
    torch.manual_seed(5)
    twice = {name: torch.cat([batch[name]] * 2) for name in ("input_ids", "attention_mask", "position_ids")}
    logits = made.model(**twice).logits[:, -1].double().tolist()
    expected = 0.0
    for row, target in enumerate(batch["target_ids"].tolist()):
        passes = []
        for place in (row, row + 4):
            total = math.log(sum(math.exp(value) for value in logits[place]))
            passes.append([value - total for value in logits[place]])
        first, second = passes
        expected -= (first[target] + second[target]) / 2
        expected += 3.0 / 4 * sum(math.exp(a) * (a - b) + math.exp(b) * (b - a) for a, b in zip(first, second))
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


def test_r_drop_passes_each_item_twice_at_the_cost_of_one_batch(rows, tmp_path):
    made = trainer(tmp_path, rows, "r_drop")
    assert made.args.per_device_train_batch_size == 2
    assert {module.attention_dropout for module in made.model.modules() if hasattr(module, "attention_dropout")} == {
        R_DROP_DROPOUT}
    made.model.train()
    with torch.no_grad():
        plain = made.model(**{name: batch_of(rows)[name] for name in ("input_ids", "attention_mask")}).logits
        other = made.model(**{name: batch_of(rows)[name] for name in ("input_ids", "attention_mask")}).logits
    assert not torch.equal(plain, other)  # dropout is at work
    passed = []
    made.model.register_forward_pre_hook(lambda _, given, named: passed.append(len(named["input_ids"])), with_kwargs=True)
    made.compute_loss(made.model, batch_of(rows))
    made.model.eval()
    made.compute_loss(made.model, batch_of(rows))
    assert passed == [8, 4]  # twice while training, once while evaluating


def test_l2_sp_against_the_formula(rows, tmp_path):
    made = trainer(tmp_path, rows, "l2_sp", strength=0.3)
    plain = trainer(tmp_path, rows, "fine_tuning")
    batch = batch_of(rows)
    made.model.train(), plain.model.train()
    start = [weight.detach().double().clone() for weight in made.model.parameters()]
    assert made.compute_loss(made.model, dict(batch)).item() == pytest.approx(
        plain.compute_loss(plain.model, dict(batch)).item())
    with torch.no_grad():
        for weight in [*made.model.parameters(), *plain.model.parameters()]:
            weight.mul_(1.1)
    away = sum(((weight.double() - first) ** 2).sum().item() for weight, first in zip(made.model.parameters(), start))
    loss, base = made.compute_loss(made.model, dict(batch)), plain.compute_loss(plain.model, dict(batch))
    assert loss.item() - base.item() == pytest.approx(0.15 * away, rel=1e-4)
    loss.backward(), base.backward()
    for weight, other, first in zip(made.model.parameters(), plain.model.parameters(), start):
        torch.testing.assert_close(weight.grad.double(), other.grad.double() + 0.3 * (weight.double() - first).detach(),
                                   rtol=1e-4, atol=1e-5)
    made.model.eval()
    assert made.compute_loss(made.model, dict(batch)).item() == pytest.approx(base.item())


def test_the_noise_of_neftune_reaches_the_weights(rows, tmp_path):
    weights = []
    for method, strength in (("fine_tuning", None), ("neftune", 7.0), ("neftune", 7.0)):
        made = trainer(tmp_path, rows, method, strength=strength)
        made.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in made.model.parameters()]))
    assert torch.equal(weights[1], weights[2]) and not torch.allclose(weights[0], weights[1], atol=1e-6)


def test_neftune_and_label_smoothing_are_the_librarys(rows, tmp_path):
    assert trainer(tmp_path, rows, "neftune", strength=7.0).neftune_noise_alpha == 7.0
    made = trainer(tmp_path, rows, "label_smoothing", strength=0.2)
    batch = batch_of(rows)
    made.model.train()
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                        position_ids=batch["position_ids"]).logits[:, -1].double()
    logs = logits.log_softmax(-1)
    expected = torch.stack([-(0.8 * row[target] + 0.2 * row.mean()) for row, target in zip(logs, batch["target_ids"])])
    assert made.compute_loss(made.model, dict(batch)).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_arguments_of_the_caller_stay_as_they_were(rows, tmp_path):
    given = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True)
    before = {field.name: getattr(given, field.name) for field in fields(given)}
    for method in ("r_drop", "neftune", "label_smoothing"):
        make_trainer(method, tiny_model("llama"), given, carma=CARMA, train_dataset=rows, data_collator=Collator(TOKENIZER))
    after = {field.name: getattr(given, field.name) for field in fields(given)}
    assert before == after


def test_bad_methods_and_strengths_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'mixout'; the methods are untuned, fine_tuning"):
        trainer(tmp_path, rows, "mixout")
    with pytest.raises(ValueError, match="an untuned model is not trained"):
        trainer(tmp_path, rows, "untuned")
    with pytest.raises(ValueError, match="strength of l2_sp must be a number above 0, "):
        trainer(tmp_path, rows, "l2_sp", strength=0.0)
    for method in ("label_smoothing", "carma", "synonym_augmentation"):
        with pytest.raises(ValueError, match=f"strength of {method} must be a number above 0 and at most 1, "):
            trainer(tmp_path, rows, method, strength=3.0)
    with pytest.raises(ValueError, match="fine_tuning has none"):
        trainer(tmp_path, rows, "fine_tuning", strength=0.1)


def test_r_drop_switches_a_dropout_on_that_is_a_whole_number(rows, tmp_path):
    """As a config file may have it."""
    config = AutoConfig.for_model("llama", vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=64, attention_dropout=0)
    made = trainer(tmp_path, rows, "r_drop", model=AutoModelForCausalLM.from_config(config))
    ids = batch_of(rows)["input_ids"]
    made.model.train()
    with torch.no_grad():
        assert not torch.equal(made.model(ids).logits, made.model(ids).logits)


def test_r_drop_says_what_it_cannot_do(rows, tmp_path):
    model = tiny_model("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            del module.attention_dropout
    with pytest.raises(TypeError, match="R-Drop needs dropout, and LlamaForCausalLM was made without"):
        RDropTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), strength=1.0,
                     train_dataset=rows, data_collator=Collator(TOKENIZER))


@pytest.mark.parametrize("method", ["r_drop", "l2_sp", "label_smoothing"])
@pytest.mark.parametrize("labels", [False, True])
def test_the_logged_task_loss_holds_no_penalty(rows, tmp_path, method, labels):
    if labels:
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    made = trainer(tmp_path, rows, method, strength=0.5, max_steps=3, gradient_accumulation_steps=2)
    made.train()
    for entry in made.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["penalty"], rel=1e-4)
    assert made.state.log_history[2]["penalty"] > 0


@pytest.mark.parametrize("method", ["r_drop", "label_smoothing"])
def test_a_batch_of_which_nothing_is_learned_has_no_penalty(rows, tmp_path, method):
    made = trainer(tmp_path, rows, method, strength=0.5)
    logits = torch.ones(4, 5, requires_grad=True)
    penalty = made.penalty(made.model, logits[:0], torch.zeros(0, dtype=torch.long))
    penalty.backward()
    assert penalty == 0 and not logits.grad.any()
