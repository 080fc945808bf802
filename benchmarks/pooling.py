"""What the full grid of Constituent-Aware Pooling costs, in clean passes, on a model of GPT-2 small's size.

    python benchmarks/pooling.py [--rows 16] [--repeats 3] [--threads 1] [--json FILE]

Random weights and random tokens with the lengths of real texts (`lengths.json`). A grid is 5 start layers
(1, 25, 50, 75, 100 % of depth) × 3 protocols and its own clean pass. It is set against two clean passes: `one`
computes logits at the last position only, `stock` at every position, as `model(**batch)` does.

Ideal cost in passes of `one`: 1 + protocols × (sum over start layers of blocks above / all blocks) × share of
positions left, were a pass nothing but blocks and linear in positions. Words of a large vocabulary are mostly one
token, so that pooling them shortens little; phrases here are stretches of three words.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Callable

import pandas as pd
import torch
from lengths import batches, read_lengths
from transformers import GPT2Config, GPT2LMHeadModel

from carma_lib.files import write_json
from carma_lib.pooling import PROTOCOLS, pooled_positions, pooling_grid, start_layers_from_depth

WORDS_IN_PHRASE = 3


def phrase_ids(word_ids: torch.Tensor) -> torch.Tensor:
    """Constituents of up to three words that follow each other, from those of one word."""
    ids = torch.where(word_ids < 0, -1, word_ids // WORDS_IN_PHRASE)
    begins = torch.ones_like(ids)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.where(ids < 0, -1, begins.cumsum(dim=1))


def best_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of the fastest of `repeats` runs each, taken in turn, so that a noisy moment meets all."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def measure(model: GPT2LMHeadModel, table: dict, level: str, rows: int, repeats: int) -> dict[str, float]:
    """Seconds and ratios, summed over the shortest, a middle and the longest batch of a table of lengths."""
    layers = start_layers_from_depth(model.config.n_layer)
    seconds, positions, left = dict.fromkeys(("one", "stock", "grid"), 0.0), 0, 0
    for batch in batches(table, rows, 3, model.config.vocab_size):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        ids = batch["constituent_ids"] if level == "word" else phrase_ids(batch["constituent_ids"])
        best = best_seconds({
            "one": lambda: model(**inputs, use_cache=False, logits_to_keep=1),
            "stock": lambda: model(**inputs, use_cache=False),
            "grid": lambda: pooling_grid(model, batch["input_ids"], batch["attention_mask"], ids, start_layers=layers),
        }, repeats)
        seconds = {name: seconds[name] + best[name] for name in seconds}
        positions += ids.shape[1]
        left += int(pooled_positions(batch["attention_mask"], ids).max()) + 1
    above = sum(model.config.n_layer - layer for layer in layers) / model.config.n_layer
    return {
        "level": level, "positions": positions / 3, "left": left / positions, **seconds,
        "grid / one": seconds["grid"] / seconds["one"], "ideal": 1 + len(PROTOCOLS) * above * left / positions,
        "grid / stock": seconds["grid"] / seconds["stock"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows a batch")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tables = read_lengths(Path(__file__).parent / "lengths.json")
    with torch.no_grad():
        rows = [{"texts": name, **measure(model, table, level, arguments.rows, arguments.repeats)}
                for name, table in tables.items() for level in ("word", "phrase")]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
