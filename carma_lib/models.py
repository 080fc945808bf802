"""Models and tokenizers: small ones from a configuration, and any causal language model by name or folder."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel,
                          PreTrainedTokenizerFast)

SMALL_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3")


class ModelNotFound(OSError):
    """A model is neither a local folder nor to be had from the hub; the message says what to do."""


class Prompt(NamedTuple):
    """What stands before and after the text of a row; neither is perturbed or pooled."""

    prefix: str
    suffix: str


# Published prompts (arXiv 2502.11066): one line of text that the answer's first token completes.
_INSTRUCTION = Prompt("Label the text in square brackets as positive, neutral or negative: [", "] =")
PROMPTS = {
    "inverse_dictionary": {"default": Prompt("", ' is called a "'), "qwen2": Prompt("", ' is commonly known as "')},
    "sentiment": {"default": Prompt("The sentiment of ", ' is "'), "llama": _INSTRUCTION, "gemma": _INSTRUCTION},
}


def prompt_for(kind: str, model_type: str = "default", *, pretrained: bool = False) -> Prompt:
    """The prompt of a kind of task. Published wordings by family for pretrained models, GPT-2's otherwise."""
    if kind not in PROMPTS:
        raise ValueError(f"unknown kind of task '{kind}'; the kinds are {', '.join(PROMPTS)}")
    by_family = PROMPTS[kind]
    return by_family.get(model_type, by_family["default"]) if pretrained else by_family["default"]


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int,
                    whole_tokens: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`.

    vocabulary_size: tokens before `whole_tokens` are added; 256 of them are the bytes, so at least 258.
    whole_tokens: strings that must be one token each, the task's answers (published: one-token targets only).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary_size < 258:
        raise ValueError(f"vocabulary_size is {vocabulary_size}; a byte-level vocabulary needs at least 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False)
                          for word in dict.fromkeys(whole_tokens) if tokenizer.token_to_id(word) is None])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                   pad_token="<|pad|>", padding_side="left", clean_up_tokenization_spaces=False)


def small_model(family: str, tokenizer: PreTrainedTokenizerFast, *, layers: int = 4, width: int = 128,
                heads: int = 4, max_length: int = 256, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised causal language model of a family, from its configuration.

    seed: of the weights; the same seed gives the same weights. Raises `ValueError` for an unknown family or
    a width that the heads do not divide.
    """
    if family not in SMALL_FAMILIES:
        raise ValueError(f"unknown family '{family}' for a small model; the families are {', '.join(SMALL_FAMILIES)}")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "gpt2":
        # the fused form of GPT-2's own activation, and no attention dropout, which has no fast path on a CPU
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": max_length,
                 "activation_function": "gelu_pytorch_tanh", "attn_pdrop": 0.0}
    else:
        shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
                 "num_key_value_heads": heads, "intermediate_size": 4 * width, "head_dim": width // heads,
                 "max_position_embeddings": max_length}
    config = AutoConfig.for_model(family, **shape, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer, padding on the left, from a local folder or the hub.

    Raises `ModelNotFound` where there is none, `TypeError` for a slow one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _not_found(name_or_folder, "tokenizer") from error
    if not tokenizer.is_fast:
        raise TypeError(f"the tokenizer of '{name_or_folder}' is slow and gives no character offsets; "
                        "constituents need a fast one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(name_or_folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal language model in float32 and its fast tokenizer, from a folder or the hub; never runs remote code.

    Raises `ModelNotFound` for an absent or gated model, `TypeError` for one without a fast tokenizer.
    """
    tokenizer = load_tokenizer(name_or_folder)
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        raise _not_found(name_or_folder, "causal language model") from error


def _not_found(name_or_folder: str, what: str) -> ModelNotFound:
    why = "the folder holds none" if Path(name_or_folder).is_dir() else (
        "it is no local folder, and the hub gave none (absent, gated or no network)")
    return ModelNotFound(f"cannot load a {what} from '{name_or_folder}': {why}. Give a folder made by "
                         "save_pretrained, or a hub id you may read (for a gated one, log in first).")
