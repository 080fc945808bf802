"""How long real texts are, as counts without the texts, and batches of random tokens with those lengths.

A row is a list of integers: n > 0 is a word of n tokens, 0 is one token outside any word (or of the prompt).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from carma_lib.collate import Collator
from carma_lib.words import constituent_ids, word_spans
from carma_lib.files import whole_file

ROWS = 512
VOCABULARIES = {"wordnet": 16000, "sst": 16000, "many_pieces": 3300}


def write_lengths(path: Path) -> None:
    """Tokenize WordNet definitions and SST sentences, which must be on this machine, and write their counts.

    The tokenizers are byte-level BPE trained on the definitions: 16,000 entries split about as many words as
    large vocabularies do on general text, 3,300 split about a third (`many_pieces`, on definitions too).
    """
    from carma_lib.synonyms.wordnet import definition_pairs
    from carma_lib.tasks.sst import load_trees

    definitions = sorted(set(definition_pairs()["definition"]))
    random.Random(0).shuffle(definitions)
    sentences = [" ".join(tree.words) for tree in load_trees()[0]["test"]]
    random.Random(0).shuffle(sentences)
    tables = {}
    for name, vocabulary in VOCABULARIES.items():
        texts = sentences if name == "sst" else definitions
        prefix, suffix = ("The sentiment of ", ' is "') if name == "sst" else ("", ' is called a "')
        tokenizer = _byte_level(definitions[ROWS:], vocabulary)
        rows = [_shape(tokenizer, prefix, text, suffix) for text in texts[:ROWS]]
        words = [n for row in rows for n in row if n]
        tables[name] = {
            "vocabulary": vocabulary,
            "mean_tokens": sum(max(n, 1) for row in rows for n in row) / len(rows),
            "share_of_words_with_several_tokens": sum(n > 1 for n in words) / len(words),
            "rows": [" ".join(map(str, row)) for row in rows],
        }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")


def read_lengths(path: Path) -> dict[str, dict]:
    """The tables that `write_lengths` wrote, rows as lists of integers."""
    tables = json.loads(path.read_text())
    return {
        name: {**table, "rows": [[int(n) for n in row.split()] for row in table["rows"]]}
        for name, table in tables.items()
    }


def batches(table: dict, size: int, count: int, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of `size` rows of like length, spread evenly from the shortest to the longest."""
    rows = sorted(table["rows"], key=lambda row: sum(max(n, 1) for n in row))
    starts = list(range(0, len(rows) - size + 1, size))
    chosen = [starts[i * (len(starts) - 1) // max(1, count - 1)] for i in range(count)]
    tokens = random.Random(0)
    return [
        Collator(0)([_row(row, tokens, vocab_size) for row in rows[start : start + size]]) for start in chosen
    ]


def _row(shape: list[int], tokens: random.Random, vocab_size: int) -> dict:
    ids: list[int] = []
    for unit, number in enumerate(shape):
        ids += [unit] * number or [-1]
    drawn = [tokens.randrange(1, vocab_size) for _ in range(len(ids) + 1)]
    return {"input_ids": drawn[1:], "constituent_ids": ids, "target_id": drawn[0]}


def _shape(tokenizer: Tokenizer, prefix: str, text: str, suffix: str) -> list[int]:
    prompt = prefix + text + suffix
    spans = [(start + len(prefix), end + len(prefix)) for start, end in word_spans(text)]
    shape: list[int] = []
    previous = -1
    for owner in constituent_ids(tokenizer.encode(prompt).offsets, spans, prompt):
        if owner >= 0 and owner == previous:
            shape[-1] += 1
        else:
            shape.append(1 if owner >= 0 else 0)
        previous = owner
    return shape


def _byte_level(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer
