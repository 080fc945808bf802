"""How often words read off token ids (`WordTable`) are those of character offsets, by vocabulary and language.

Texts: SST sentences and WordNet glosses for English; paragraphs of translated manual pages (Debian's manpages-de,
-fr, -ru, -ja, -zh) and messages of translated programs (locale files) for the others. None of them is kept.
Tokenizers: folders of pretrained ones, and word pieces and </w> vocabularies trained here on the texts themselves.
"""
from __future__ import annotations

import argparse
import gettext
import gzip
import random
import re
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from carma_lib.files import whole_file
from carma_lib.words import WordTable, constituent_ids, word_spans

MANUALS = {"German": "de", "French": "fr", "Russian": "ru", "Japanese": "ja", "Chinese": "zh_CN"}
MESSAGES = {"Hindi": "hi", "Arabic": "ar", "Thai": "th", "Tamil": "ta", "Korean": "ko", "Hebrew": "he"}


def texts_by_language(number: int) -> dict[tuple[str, str], list[str]]:
    """(language, source) → up to `number` different texts in random order; sources that are missing are left out."""
    found = {}
    try:
        from carma_lib.tasks.sst import load_trees

        found["English", "SST"] = [" ".join(tree.words) for tree in load_trees()[0]["test"]]
    except Exception as error:  # the benchmark goes on with what this machine has
        print(f"no SST: {error}")
    from carma_lib.synonyms.wordnet import definition_pairs

    found["English", "WordNet glosses"] = list(definition_pairs()["definition"])
    for language, code in MANUALS.items():
        pages = sorted(Path("/usr/share/man", code).rglob("*.gz"))
        found[language, "manual pages"] = [text for page in random.Random(0).sample(pages, min(300, len(pages)))
                                           for text in _paragraphs(page)]
    for language, code in MESSAGES.items():
        found[language, "program messages"] = [
            text for file in sorted(Path("/usr/share/locale", code, "LC_MESSAGES").glob("*.mo"))
            for text in _messages(file)]
    chosen = {}
    for key, texts in found.items():
        texts = sorted(set(texts))
        random.Random(0).shuffle(texts)
        if len(texts) >= 100:
            chosen[key] = texts[:number]
    return chosen


def _paragraphs(page: Path) -> list[str]:
    lines = gzip.open(page, "rt", encoding="utf-8", errors="ignore").read().splitlines()
    plain = [re.sub(r"\\f.|\\\(..|\\[-&/, ]|\\\[.*?\]", "", line) for line in lines if not line.startswith((".", "'"))]
    return [line for line in plain if len(line.encode()) > 40 and "\\" not in line]


def _messages(file: Path) -> list[str]:
    with file.open("rb") as stream:
        catalogue = gettext.GNUTranslations(stream)._catalog
    return [text for key, text in catalogue.items() if key and len(text.encode()) > 20]


def compare(tokenizer, table: WordTable, texts: list[str]) -> dict[str, float]:
    """Counts of tokens and of pairs of one word, and the shares on which both ways agree."""
    tokens = agreeing = 0
    pairs_by_offsets = pairs_by_table = pairs_of_both = 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        by_offsets = torch.tensor(constituent_ids(encoded.offset_mapping, word_spans(text), text))
        by_table = table.constituent_ids(torch.tensor([encoded.input_ids]))[0]
        tokens += len(by_table)
        agreeing += int(((by_offsets < 0) == (by_table < 0)).logical_and(_begins(by_offsets) == _begins(by_table)).sum())
        offsets, ids = _pairs(by_offsets), _pairs(by_table)
        pairs_by_offsets += int(offsets.sum())
        pairs_by_table += int(ids.sum())
        pairs_of_both += int((offsets & ids).sum())
    return {"texts": len(texts), "tokens": tokens, "tokens_that_agree": agreeing / tokens, "pairs": pairs_by_offsets,
            "pairs_found": pairs_of_both / max(1, pairs_by_offsets), "pairs_right": pairs_of_both / max(1, pairs_by_table)}


def _begins(ids: torch.Tensor) -> torch.Tensor:
    return (ids >= 0) & (ids != torch.cat([ids.new_tensor([-2]), ids[:-1]]))


def _pairs(ids: torch.Tensor) -> torch.Tensor:
    return ((ids[:, None] == ids) & (ids >= 0)[:, None]).triu(1)


def trained(kind: str, texts: list[str], size: int = 8000) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of BERT ("word piece") or GPT-1 ("word end")."""
    special = ["[UNK]", "[PAD]"]
    settings = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "word piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **settings)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="*", default=[], metavar="KIND=FOLDER", help="byte-level=…, metaspace=…")
    parser.add_argument("--number", type=int, default=1000, help="texts a language")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "word_agreement.csv")
    options = parser.parse_args()
    texts = texts_by_language(options.number)
    chosen = [(kind, Path(folder).name, AutoTokenizer.from_pretrained(folder))
              for kind, folder in (entry.split("=", 1) for entry in options.tokenizers)]
    everything = [text for some in texts.values() for text in some]
    chosen += [(kind, "trained here", trained(kind, everything)) for kind in ("word piece", "word end")]
    rows = []
    for kind, name, tokenizer in chosen:
        table = WordTable(tokenizer)
        for (language, source), some in texts.items():
            rows.append({"vocabulary": kind, "tokenizer": name, "language": language, "source": source,
                         **compare(tokenizer, table, some)})
            print(*rows[-1].values(), flush=True)
    with whole_file(options.out) as temporary:
        pd.DataFrame(rows).round(4).to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
