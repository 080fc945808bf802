"""Speed and quality of synonym replacement on SST's test sentences and on WordNet's definitions.

    CARMA_DATA=folder-that-holds-sst python benchmarks/perturbation.py [--texts 200] [--show 10]
"""
import argparse
import os
import random
import re
import tempfile
import time
from pathlib import Path

from carma_lib.synonyms.wordnet import definition_pairs
from carma_lib.synonyms.replacement import replace_all, replace_synonyms
from carma_lib.synonyms.quality import mark_changes, quality_table


def sst_sentences() -> list[str]:
    """The leaves of the test trees, joined by spaces."""
    path = Path(os.environ["CARMA_DATA"]) / "sst" / "trees" / "test.txt"
    trees = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    brackets = {"-LRB-": "(", "-RRB-": ")"}
    leaves = (re.findall(r"\(\d ([^ ()]+)\)", tree) for tree in trees)
    return [" ".join(brackets.get(leaf, leaf) for leaf in sentence) for sentence in leaves]


def show_quality(name: str, texts: list[str], show: int) -> None:
    print(f"\n{name}: {len(texts)} texts")
    print(quality_table(texts).round(3).to_string(index=False))
    for text, done in zip(texts[:show], replace_all(texts[:show], rate=0.25, seed=0)):
        print(f"  {mark_changes(text, done)}  ({done.made} of {done.requested})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200, help="texts of each kind for the quality table")
    parser.add_argument("--show", type=int, default=10, help="texts of each kind to print with their changes")
    options = parser.parse_args()

    sentences = sst_sentences()
    start = time.perf_counter()
    replace_synonyms("A film.", rate=1, seed=0)
    print(f"start-up {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for label in ("first run", "from the cache"):
            start = time.perf_counter()
            replace_all(sentences, rate=0.25, seed=0, cache_dir=folder)
            print(f"{len(sentences)} sentences at 25 %, {label}: {time.perf_counter() - start:.2f} s")

    draw = random.Random(0)
    definitions = definition_pairs()["definition"].drop_duplicates().tolist()
    show_quality("SST test sentences", draw.sample(sentences, options.texts), options.show)
    show_quality("WordNet definitions", draw.sample(definitions, options.texts), options.show)


if __name__ == "__main__":
    main()
