"""Models and tokenizers: small ones from a configuration, and any causal language model by name or folder."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig,
                          PreTrainedModel, PreTrainedTokenizerFast)

from carma_lib.files import read_json, write_json
from carma_lib.model_table import Prompt, prompt_for

__all__ = ["SMALL_FAMILIES", "ModelNotFound", "Prompt", "add_adapter", "load_config", "load_model", "load_tokenizer",
           "prompt_for", "save_adapter", "small_model", "train_tokenizer"]

SMALL_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3")


class ModelNotFound(OSError):
    """A model is neither a local folder nor to be had from the hub; the message says what to do."""


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
        raise _not_found(name_or_folder, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise TypeError(f"the tokenizer of '{name_or_folder}' is slow and gives no character offsets; "
                        "constituents need a fast one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_config(name_or_folder: str) -> PretrainedConfig:
    """The configuration of a model, from a folder or the hub. Raises `ModelNotFound` where there is none."""
    try:
        return AutoConfig.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _not_found(name_or_folder, "configuration", error) from error


def load_model(name_or_folder: str, *, dtype: torch.dtype | str = "auto",
               four_bits: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal language model and its fast tokenizer, from a folder or the hub; never runs remote code.

    A folder written by `save_adapter` gives the model that its adapter belongs to, with the adapter.
    dtype: of the weights; "auto" as they are stored. four_bits: quantised to NF4, for a frozen start (QLoRA,
    arXiv 2305.14314); needs CUDA and bitsandbytes. What is stored quantised is loaded so.

    Raises `ModelNotFound` for an absent, gated or damaged model, `TypeError` for one without a fast tokenizer,
    `ValueError` where four bits or adapters are not to be had here.
    """
    adapter = read_json(Path(name_or_folder) / "adapter_config.json")
    if adapter is not None:
        base = Path(name_or_folder) / adapter["base_model_name_or_path"]
        model, tokenizer = load_model(str(base) if base.is_dir() else adapter["base_model_name_or_path"], dtype=dtype)
        return _peft().PeftModel.from_pretrained(model, name_or_folder), tokenizer
    tokenizer = load_tokenizer(name_or_folder)
    options = {"quantization_config": _four_bits()} if four_bits else {}
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=dtype, **options), tokenizer
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_found(name_or_folder, "causal language model", error) from error


def add_adapter(model: PreTrainedModel, *, rank: int, seed: int) -> nn.Module:
    """The model with trainable LoRA adapters (arXiv 2106.09685) on every linear map of its blocks, all else frozen.

    rank: r of each adapter; its scale is α / r = 2. seed: of the adapters' weights. Raises `ValueError` where
    peft is not installed.
    """
    peft = _peft()
    if getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank,
                             fan_in_fan_out=model.config.model_type == "gpt2")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def save_adapter(model: nn.Module, folder: Path, *, start: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Save an adapter alone, with the way to its start's folder relative to its own, so that both may move.

    weights: the model's, gathered, where it is spread over processes.
    """
    model.save_pretrained(folder, state_dict=weights)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json",
               {**config, "base_model_name_or_path": os.path.relpath(start, folder)})


def _peft():
    try:
        import peft
    except ImportError:
        raise ValueError("adapters need peft: pip install peft, or leave adapter at 'none'") from None
    return peft


def _four_bits():
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need a CUDA GPU and bitsandbytes (pip install bitsandbytes); "
                         "adapter 'lora' does without both")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _not_found(name_or_folder: str, what: str, error: BaseException) -> OSError:
    """The error in one line that says what is the matter and what to do."""
    chain = list(_chain(error))
    if any(getattr(each, "errno", None) == errno.ENOSPC for each in chain):
        return OSError(errno.ENOSPC, f"the disk is full while loading '{name_or_folder}': free space, or set HF_HOME "
                                     "to a folder on another disk")
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if isinstance(error, SafetensorError):
        why, way_out = "its weights are damaged", "fetch or save them again"
    elif Path(name_or_folder).is_dir():
        why, way_out = "the folder holds none", "give one made by save_pretrained"
    elif "GatedRepoError" in names:
        why, way_out = "its owners gate it", "ask for access on its page at the hub, then log in with `hf auth login`"
    elif "RepositoryNotFoundError" in names:
        why, way_out = ("the hub has no such model, or a private one", "check the name, or log in with `hf auth login`")
    elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError"}:
        why, way_out = ("it is no local folder, and the hub cannot be reached",
                        "connect, or give a folder (made where there is a network with `hf download`)")
    else:
        why = f"it is no local folder, and the hub's answer is no model ({type(error).__name__})"
        way_out = "give a hub id you may read, or a folder made by save_pretrained"
    return ModelNotFound(f"cannot load a {what} from '{name_or_folder}': {why}; {way_out}")
