"""Small random models saved to a folder as pretrained ones are, with tokenizers trained on WordNet's definitions.

`python tests/small_pretrained.py FAMILY FOLDER`: gpt2 and qwen2 with byte-level BPE, llama and gemma with metaspace
BPE and a begin-of-text token, as their families have them.
"""
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tiny import byte_level_tokenizer, metaspace_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from carma_lib.tasks.wordnet import filtered_pairs

BYTE_LEVEL = ("gpt2", "qwen2", "qwen3", "gpt_neox", "olmo2")


def training_texts(definitions: list[str], headwords: list[str], *, definitions_read: int, words: int) -> list[str]:
    """Some definitions, and the words defined most often on lines of their own, so that many become one token."""
    common = [word for word, _ in Counter(headwords).most_common(words)]
    labels = ["positive", "neutral", "negative"]
    return [*random.Random(0).sample(definitions, definitions_read), *20 * common, *50 * labels]


def save_small_pretrained(family: str, folder: Path, *, texts: list[str], vocabulary: int = 6000, layers: int = 4,
                          width: int = 32) -> Path:
    """The folder, with a model of random weights and a tokenizer trained on `texts`."""
    if family in BYTE_LEVEL:
        tokenizer = byte_level_tokenizer(texts, vocabulary)
    else:
        prepend = "never" if family == "gemma" else "first"
        tokenizer = metaspace_tokenizer(texts, vocabulary, prepend=prepend, learn="never")
    config = tiny_config(family, len(tokenizer), layers, width)
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    pairs = filtered_pairs()[0]
    learned = training_texts(list(pairs["definition"]), list(pairs["lemma"]), definitions_read=6000, words=3000)
    save_small_pretrained(sys.argv[1], Path(sys.argv[2]), texts=learned)
