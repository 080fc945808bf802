"""CARMA in TRL's SFTTrainer: twelve ways to fine-tune, terms above zero in each, SFTTrainer itself at λ = 0."""
import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TEXTS, byte_level_tokenizer, tiny_model
from trl import SFTConfig, SFTTrainer

from carma_lib import CarmaConfig, CarmaLoss, CarmaMixin, CarmaSFTTrainer

CARMA, PLAIN = CarmaConfig(carma_weight=0.3), CarmaConfig(carma_weight=0)
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
                 "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
                 "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}")
TOKENIZER = byte_level_tokenizer(vocab_size=290)
TOKENIZER.chat_template = CHAT_TEMPLATE

TEXT = [{"text": TEXTS[number % 6]} for number in range(8)]
COMPLETION = [{"prompt": f"Say more of {row['text']}:", "completion": f" {TEXTS[5 - number % 6]}"}
              for number, row in enumerate(TEXT)]
CHAT = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in COMPLETION]
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
SAVING = {"gradient_checkpointing": True}

# name: (rows, settings of SFTConfig, arguments of the trainer)
SCENARIOS = {
    "text": (TEXT, {}, {}),
    "prompt and completion": (COMPLETION, {}, {}),
    "chat, the assistant's words alone": (CHAT, {"assistant_only_loss": True}, {}),
    "packing, best fit": (TEXT, {"packing": True, "packing_strategy": "bfd", "max_length": 64}, {}),
    "packing, wrapped": (TEXT, {"packing": True, "packing_strategy": "wrapped", "max_length": 64}, {}),
    "packing, wrapped, no padding": (TEXT, {"packing": True, "packing_strategy": "wrapped", "padding_free": True, "max_length": 64}, {}),
    "no padding": (TEXT, {"padding_free": True, "max_length": None}, {}),
    "truncation": (TEXT, {"max_length": 12}, {}),
    "LoRA": (TEXT, {"learning_rate": 0.5}, LORA),
    "checkpointing": (TEXT, {**SAVING, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
    "reentrant checkpointing": (TEXT, {**SAVING, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}),
    "accumulation": (TEXT, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
    "evaluation": (TEXT, {"eval_strategy": "steps", "eval_steps": 1},
                   {"eval_dataset": Dataset.from_list(TEXT[:4])}),
}


def trained(kind, folder, name, **more):
    rows, settings, arguments = SCENARIOS[name]
    chosen = dict(max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, optim="sgd", logging_steps=1, seed=1,
                  lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, bf16=False,
                  disable_tqdm=True, gradient_checkpointing=False)
    trainer = kind(tiny_model("llama"), SFTConfig(str(folder), **(chosen | settings)),
                   train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER, **arguments, **more)
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.mark.parametrize("name", SCENARIOS)
def test_terms_are_above_zero_and_weight_zero_is_the_base_trainer(tmp_path, name):
    base, ours = trained(SFTTrainer, tmp_path, name), trained(CarmaSFTTrainer, tmp_path, name, carma=PLAIN)
    assert torch.equal(weights(base), weights(ours))
    shown = [[{key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
              for entry in trainer.state.log_history] for trainer in (base, ours)]
    assert shown[0] == shown[1]
    carma = trained(CarmaSFTTrainer, tmp_path, name, carma=CARMA)
    logged = [entry for entry in carma.state.log_history if "loss" in entry]
    assert len(logged) == 2 and not torch.equal(weights(carma), weights(base))
    for entry in logged:
        assert all(math.isfinite(entry[term]) and entry[term] > 0
                   for term in ("task_loss", "mutual_information", "stability"))
        parts = sum(value for term, value in entry.items() if term.startswith("weighted_"))
        assert entry["loss"] == pytest.approx(parts, rel=1e-3)
    assert logged[0]["task_loss"] == pytest.approx(base.state.log_history[0]["loss"], rel=1e-3)
    assert ("eval_loss" in carma.state.log_history[1]) == (name == "evaluation")


@pytest.mark.parametrize("name", ["packing, best fit", "packing, wrapped", "packing, wrapped, no padding", "no padding"])
def test_documents_of_one_row_never_meet(tmp_path, monkeypatch, name):
    """Wrapped packing marks no documents, so they end at the end-of-text token; the other ways count positions anew."""
    seen, several = [], 0
    terms = CarmaLoss.__call__

    def spy(self, states, words, mask, **more):
        seen.append((words, more["document_ids"]))
        return terms(self, states, words, mask, **more)

    monkeypatch.setattr(CarmaLoss, "__call__", spy)
    inputs, base = [], SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, model, given, *args, **more:
                        (inputs.append((given["input_ids"], given.get("position_ids"))), base(self, model, given, *args, **more))[1])
    trained(CarmaSFTTrainer, tmp_path, name, carma=CARMA)
    assert len(seen) == len(inputs) == 2
    for (ids, positions), (words, documents) in zip(inputs, seen):
        rows_begin = {place for place, position in enumerate(positions[0].tolist()) if not position} if "wrapped, no" in name else ()
        for tokens, row, found in zip(ids.tolist(), words.tolist(), documents.tolist()):
            expected, number = [], 0  # by the end-of-text token that TRL puts after each text
            for place, token in enumerate(tokens, 1):
                expected.append(number)
                number += token == TOKENIZER.eos_token_id or place in rows_begin
            names = {each: place for place, each in enumerate(dict.fromkeys(found))}
            assert [names[each] for each in found] == expected
            several += number > 1
            assert len({(word, document) for word, document in zip(row, found) if word >= 0}) == len({*row} - {-1})
    assert several


def test_what_fills_rows_without_a_mask_up_is_padding(tmp_path, monkeypatch):
    masks, terms = [], CarmaLoss.__call__
    monkeypatch.setattr(CarmaLoss, "__call__", lambda self, states, words, mask, **more: (
        masks.append((words, mask)), terms(self, states, words, mask, **more))[1])
    monkeypatch.setitem(SCENARIOS, "filled up", (TEXT, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64}, {}))
    for name in ("no padding", "filled up"):
        trained(CarmaSFTTrainer, tmp_path, name, carma=CARMA)
    for (plain, _), (filled, mask) in zip(masks[:2], masks[2:]):
        assert filled.shape[1] % 64 == 0 and mask.sum() == plain.shape[1] < filled.shape[1]
        assert torch.equal(filled[:, :plain.shape[1]], plain) and not mask[:, plain.shape[1]:].any()


def test_no_name_of_the_mixin_is_one_of_the_base_trainers(tmp_path):
    trainer = trained(CarmaSFTTrainer, tmp_path, "text", carma=CARMA)
    base = trained(SFTTrainer, tmp_path, "text")
    overridden = {"train", "compute_loss", "prediction_step", "evaluation_loop", "log",
                  "_set_signature_columns_if_needed"}
    own = {name for name in vars(CarmaMixin) if not name.startswith("__")} | (set(vars(trainer)) - set(vars(base)))
    assert {name for name in own if hasattr(base, name)} == overridden
    assert all(name.startswith(("_carma", "carma")) for name in set(vars(trainer)) - set(vars(base)))


def test_trl_is_asked_for_in_one_line_if_it_is_not_there(tmp_path):
    code = ("import sys; sys.modules['trl'] = None\nimport carma_lib\ncarma_lib.CarmaTrainer\n"
            "try: carma_lib.CarmaSFTTrainer\nexcept ImportError as error: print(error)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.startswith("CarmaSFTTrainer needs TRL: pip install trl") and found.count("\n") == 1
