"""Peak memory of real trainings of small models, a forked process each: prints {name: [measured, estimated]} bytes."""
import ctypes
import gc
import json
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from carma_lib.lab.memory import estimate_memory
from carma_lib.models import add_adapter
from carma_lib.lab.recipe import Recipe
from carma_lib.trainer import CarmaTrainer, checkpointing

TOKENS, WIDTH, BLOCKS, VOCABULARY = 64, 256, 4, 2000
PLAIN = Recipe(mi_layers=(0, 1), stability_layers=(0, 1), batch_size=16, precision="float32", steps=2)
CASES = {
    "gpt2": ("gpt2", {}), "llama": ("llama", {}), "more rows": ("llama", {"batch_size": 32}),
    "accumulation": ("llama", {"batch_size": 32, "accumulation": 4}),
    "activation checkpointing": ("llama", {"batch_size": 32, "activation_checkpointing": True}),
    "all layers": ("llama", {"mi_layers": (0, 3), "stability_layers": (0, 3), "num_negatives": None}),
    "lora": ("llama", {"start": "a pretrained llama", "adapter": "lora"}), "bf16": ("llama", {"precision": "bf16"}),
}


def config_of(family, width=WIDTH):
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_layer=BLOCKS, n_embd=width, n_head=4, **tokens)
    return AutoConfig.for_model("llama", num_hidden_layers=BLOCKS, hidden_size=width, intermediate_size=4 * width,
                                num_attention_heads=4, num_key_value_heads=4, **tokens)


def resident(name):
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def train(config, recipe):
    model = AutoModelForCausalLM.from_config(config)
    if recipe.adapter == "lora":
        model = add_adapter(model, rank=recipe.lora_rank, seed=1)
    row = {"input_ids": torch.randint(5, VOCABULARY, (TOKENS,)), "target_ids": torch.tensor(7),
           "attention_mask": torch.ones(TOKENS, dtype=torch.int64), "constituent_ids": torch.arange(TOKENS) // 2}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=recipe.rows_a_pass, report_to="none", disable_tqdm=True,
            gradient_accumulation_steps=recipe.accumulation, save_strategy="no", use_cpu=True, bf16=recipe.bf16,
            **checkpointing() if recipe.activation_checkpointing else {})
        CarmaTrainer(model, arguments, carma=recipe.carma, train_dataset=[row] * 256, data_collator=lambda rows: {
            name: torch.stack([each[name] for each in rows]) for name in row}).train()


def measure(family, more):
    torch.set_num_threads(1)
    recipe = PLAIN.but(**more)
    train(config_of(family, width=8), recipe.but(batch_size=4))  # loads all code that a training needs
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    train(config_of(family), recipe)
    return resident("VmHWM") - before, estimate_memory(config_of(family), recipe, tokens=TOKENS).total


def main(names):
    context, found = multiprocessing.get_context("fork"), {}
    for name in names:
        with context.Pool(1) as pool:
            found[name] = pool.apply(measure, CASES[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
