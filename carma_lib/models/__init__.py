"""Models and tokenizers: small ones from a configuration, and any causal language model by name or folder."""
from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig,
                          PreTrainedModel, PreTrainedTokenizerFast)

from carma_lib.models import pretrained
from carma_lib.files import RunError, first_line, read_json, user_path, write_json
from carma_lib.models.table import Prompt, prompt_for

__all__ = ["SMALL_FAMILIES", "ModelNotFound", "Prompt", "add_adapter", "load_config", "load_model", "load_tokenizer",
           "native_bf16", "prompt_for", "save_adapter", "small_model", "train_tokenizer"]

SMALL_POSITIONS = 256  # tokens of the longest text of a small model
SMALL_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3")


class ModelNotFound(RunError, OSError):
    """A model is not to be had, or not fit to start from; the message says why and what to do."""


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
                heads: int = 4, seed: int = 0) -> PreTrainedModel:
    """A causal language model of a family with the random weights of a seed.

    Raises `ValueError` for an unknown family or a width that the heads do not divide.
    """
    if family not in SMALL_FAMILIES:
        raise ValueError(f"unknown family '{family}' for a small model; the families are {', '.join(SMALL_FAMILIES)}")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "gpt2":
        # the fused form of GPT-2's own activation, and no attention dropout, which has no fast path on a CPU
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": SMALL_POSITIONS,
                 "activation_function": "gelu_pytorch_tanh", "attn_pdrop": 0.0}
    else:
        shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
                 "num_key_value_heads": heads, "intermediate_size": 4 * width, "head_dim": width // heads,
                 "max_position_embeddings": SMALL_POSITIONS}
    config = AutoConfig.for_model(family, **shape, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def random_model(start: str | Path, *, seed: int) -> PreTrainedModel:
    """A model of a start's shape with the random weights of a seed. Raises as `load_model` does."""
    config = load_config(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_config(start: str | Path) -> PretrainedConfig:
    """The configuration of a start. Raises as `load_model` does."""
    where = _place(start)
    with _loading("configuration", where):
        return AutoConfig.from_pretrained(where, trust_remote_code=False)


def load_tokenizer(start: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a start, padding on the left. Raises as `load_model` does, `TypeError` for a slow one."""
    where = _place(start)
    with _loading("tokenizer", where):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise TypeError(f"the tokenizer of '{start}' is slow and gives no character offsets; constituents need a fast "
                        "one")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelNotFound(f"the tokenizer of '{start}' has neither a padding nor an end-of-text token; set one "
                                "and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(start: str | Path, *, dtype: torch.dtype | str = torch.float32,
               four_bits: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal language model and its fast tokenizer; never runs code that comes with a model.

    start: a name that pip fetches (`pretrained.names`), a folder, or a hub id. A folder written by `save_adapter` gives
    the adapter's model with the adapter.
    dtype: of the weights, whatever a checkpoint stores; "auto" keeps it as it is stored. four_bits: quantised to NF4,
    for a frozen start (QLoRA, arXiv 2305.14314); needs CUDA and bitsandbytes.

    Raises `ModelNotFound` for a model that is absent, gated, damaged or pickled, weights that do not cover it or are
    not finite, and more tokens than embeddings; `RunError` where pip cannot fetch it; `TypeError` for one without a
    fast tokenizer; `ValueError` where four bits or adapters are not to be had here.
    """
    where = _place(start)
    adapter = read_json(Path(where) / "adapter_config.json", keys=["base_model_name_or_path"])
    if adapter is None:
        return _load_whole(where, dtype, four_bits)
    base = str(adapter["base_model_name_or_path"])
    base = str(Path(where) / base) if (Path(where) / base).is_dir() else _place(base)
    if (Path(base) / "adapter_config.json").exists():
        raise ModelNotFound(f"the adapter in '{where}' belongs to another adapter, '{base}'; merge that one first")
    if not (Path(where) / "adapter_model.safetensors").is_file():
        raise ModelNotFound(f"cannot load an adapter from '{where}': the folder has no adapter_model.safetensors "
                            "(pickled weights are not read); save it again")
    model, tokenizer = _load_whole(base, dtype, four_bits)
    with _loading("adapter", where), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = _peft().PeftModel.from_pretrained(model, where)
    _check_finite(where, model)
    return model, tokenizer


def _load_whole(where: str, dtype: torch.dtype | str, four_bits: bool) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    tokenizer = load_tokenizer(where)
    options = {"quantization_config": _four_bits()} if four_bits else {}
    with _loading("causal language model", where):
        model, info = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options)
    if lacking := [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]:
        raise ModelNotFound(f"the weights in '{where}' do not cover the model that its config.json describes; these "
                            f"would be random: {_some(lacking)}. Fetch or save it again, or give the config.json that "
                            "belongs to the weights")
    if extra := info["unexpected_keys"]:
        warnings.warn(f"'{where}' holds weights that this model has no place for: {_some(extra)}", stacklevel=3)
    _check_finite(where, model)
    rows, used = model.get_input_embeddings().num_embeddings, {tokenizer.pad_token_id, tokenizer.bos_token_id,
                                                               tokenizer.eos_token_id, tokenizer.unk_token_id}
    unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    if beyond := [token for token, number in tokenizer.get_vocab().items() if number >= rows and number not in unused]:
        raise ModelNotFound(f"the model in '{where}' has {rows:,} embeddings, too few for its tokenizer's tokens "
                            f"{_some(beyond)}: give the tokenizer that belongs to it, or resize its embeddings")
    return model, tokenizer


def _check_finite(where: str, model: nn.Module) -> None:
    bad = [name for name, weight in model.named_parameters()
           if weight.is_floating_point() and not torch.isfinite(weight.detach().sum(dtype=torch.float64))]
    if bad:
        raise ModelNotFound(f"the weights in '{where}' hold values that are not finite (NaN or infinity), in "
                            f"{_some(bad)}: fetch them again, or take an earlier checkpoint")


def _some(names: Iterable[str]) -> str:
    """A few of many names, sorted, with their number."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def native_bf16(device: str | None = None) -> bool:
    """Whether a device ("cuda" or "cpu"; None: the one that trains here) computes bfloat16 itself, so that autocast to
    it is faster: a GPU without emulation, a processor with AVX-512's or AMX's instructions for PyTorch's oneDNN."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
            and bool(can.get("avx512_bf16") or can.get("amx_bf16")))


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


def save_adapter(model: nn.Module, folder: Path, *, start: str | Path, home: Path | None = None,
                 weights: dict[str, torch.Tensor] | None = None) -> None:
    """Save an adapter alone with its start: a name or hub id as it is, a folder relative to `home`, so that both may move.

    home: what `folder` will become, if it is a temporary one. weights: gathered ones, if processes share the model.
    """
    model.save_pretrained(folder, state_dict=weights)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json",
               {**config, "base_model_name_or_path":
                os.path.relpath(start, home or folder) if Path(start).is_dir() else str(start)})


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
                              bnb_4bit_compute_dtype=torch.bfloat16 if native_bf16() else torch.float32)


def _place(start: str | Path) -> str:
    """Where a start lies: a folder, which is fetched first where pip can, or a hub id."""
    start = str(start)
    if start in pretrained.names():
        if os.path.exists(start):
            raise ModelNotFound(f"'{start}' is a model that pip fetches and also a folder here: write './{start}' for "
                                "the folder, or rename it to get the model")
        return str(pretrained.fetch(start))
    place = str(user_path(start)) if start.startswith("~") else start
    if os.path.isfile(place):
        raise ModelNotFound(f"'{start}' is a file; give the folder that it lies in")
    if not place.strip() or not os.path.isdir(place) and (
            place[0] in "/.~" or place.count("/") > 1 or "\\" in place or len(place) > 200):
        raise ModelNotFound(f"there is no folder '{start}'; give a folder made by save_pretrained, a hub id, or one of "
                            f"{', '.join(pretrained.names())}")
    return place


@contextlib.contextmanager
def _loading(what: str, where: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one line that says what is the matter and what to do."""
    try:
        yield
    except (RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each file's library has errors of its own
        raise _explained(where, what, error) from error


def _explained(where: str, what: str, error: Exception) -> OSError:
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    if any(getattr(each, "errno", None) == errno.ENOSPC for each in chain):
        return OSError(errno.ENOSPC, f"the disk is full while loading '{where}': free space, or set HF_HOME to a "
                                     "folder on another disk")
    names, files = {kind.__name__ for each in chain for kind in type(each).__mro__}, Path(where)
    pickled = sorted([*files.glob("*.bin"), *files.glob("*.pt")])
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own, which is never run; give a model that transformers itself knows"
    elif "SafetensorError" in names:
        reason = "its weights are damaged; fetch or save them again"
    elif os.path.isdir(where) and what != "adapter" and not (files / "config.json").is_file():
        reason = "the folder holds none; give one made by save_pretrained"
    elif pickled and "model" in what and not list(files.glob("*.safetensors")):
        reason = f"{pickled[0].name} is pickled, which is never read; save it again as safetensors"
    elif os.path.isdir(where):
        reason = f"its files do not make one ({first_line(error)}); fetch or save it again"
    elif "GatedRepoError" in names:
        reason = "its owners gate it; ask for access on its page at the hub, then log in with `hf auth login`"
    elif "RepositoryNotFoundError" in names:
        reason = "the hub has no such model, or a private one; check the name, or log in with `hf auth login`"
    elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError"}:
        reason = ("it is no local folder, and the hub cannot be reached; connect, give a folder (made where there is a "
                  f"network with `hf download`), or take {' or '.join(pretrained.names())}, which pip fetches")
    else:
        reason = (f"it is no local folder, and the hub's answer is no model ({type(error).__name__}); give a hub id "
                  "you may read, or a folder made by save_pretrained")
    return ModelNotFound(f"cannot load {'an' if what == 'adapter' else 'a'} {what} from '{where}': {reason}")
