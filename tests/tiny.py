"""Tiny random models of every supported family and tokenizers trained on the spot, for tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3")

TEXTS = (
    "a small bird that sings before sunrise",
    "An unbelievably complicated arrangement of interlocking mechanisms.",
    "the quality of being kindhearted, warm and generous",
    "to move slowly across the water in a wooden boat",
    "someone who studies butterflies; a lepidopterist",
    "a well-known story told to children at bedtime",
)


def tiny_config(family: str, vocab_size: int = 300, layers: int = 3, width: int = 32):
    """A config of `family` with `layers` blocks of `width`, four heads, and at most 128 positions."""
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            vocab_size=vocab_size,
            n_layer=layers,
            n_embd=width,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    sizes = dict(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    if family in ("qwen3", "gemma", "gemma2"):
        sizes["head_dim"] = width // 4
    if family == "gemma2":
        sizes.update(query_pre_attn_scalar=width // 4, sliding_window=16)
    if family == "mistral":
        sizes["sliding_window"] = None
    return AutoConfig.for_model(family, **sizes)


def tiny_model(
    family: str,
    vocab_size: int = 300,
    layers: int = 3,
    width: int = 32,
    seed: int = 0,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A random causal language model in evaluation mode; the same seed gives the same weights."""
    config = tiny_config(family, vocab_size, layers, width)
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **chosen).eval()


def byte_level_tokenizer(texts=TEXTS, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE without begin-of-text token, as in GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<end>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<pad>"
    )


def metaspace_tokenizer(
    texts=TEXTS, vocab_size: int = 300, prepend: str = "first", learn: str = "first"
) -> PreTrainedTokenizerFast:
    """Metaspace BPE that puts a begin-of-text token first, as in Llama and Gemma.

    prepend: "first" sets a space before a text (Llama), "never" does not (Gemma). learn: the same while it is
    trained; "never" makes tokens without a space of the words that begin a text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=learn)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<begin>", "<pad>", "<end>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
