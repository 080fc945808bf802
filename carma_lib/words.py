"""Words and phrases of a text as character spans, and the constituent that each token belongs to.

The constituent of a token follows from its characters' offsets where a text is at hand (`constituent_ids`), or from
token ids alone, inside a training step, by a table of the vocabulary (`WordTable`). Both follow one rule.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import regex
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Inside a word, between two letters: apostrophes, hyphens, the middle dot of Catalan, Hebrew geresh and gershayim, the
# soft hyphen, and the non-joiner and joiner of Persian and Indic scripts, which marks may follow. In a number: . and ,
_JOINERS, _UNSEEN = "'’ʼ＇‐‑\\-·׳״\u00ad", "\u200c\u200d"
_LETTERS = r"(?:[\p{L}\p{N}]\p{M}*)+"  # a mark after anything else, as in an emoji, is of no word
_WORD = regex.compile(rf"{_LETTERS}(?:(?:[{_JOINERS}]|[{_UNSEEN}]\p{{M}}*|(?<=\p{{N}})[.,٫٬](?=\p{{N}})){_LETTERS})*")
_NOUN_PHRASE = regex.compile(r"D?(?:R?A)*N+")


def word_spans(text: str) -> list[Span]:
    """Character spans (start, end) of the words of `text`, in order; punctuation belongs to no word.

    "well-known", "don't" and "3.5" are one word each, and so is a letter with its combining marks. A script that
    writes no spaces has one word from mark to mark. The published code takes white-space units, punctuation
    attached, and leaves out the last one; this is our decision.
    """
    return [match.span() for match in _WORD.finditer(text)]


def phrase_spans(text: str) -> list[Span]:
    """Character spans of the base noun phrases of two or more words: determiner, modifiers, nouns.

    For text without gold trees. Parts of speech come from TextBlob's pattern tagger, whose English lexicon is
    part of the package; no phrase crosses punctuation.
    """
    from textblob.en.taggers import PatternTagger  # slow to import, and only needed here

    words = word_spans(text)
    if not words:
        return []
    tagged = PatternTagger().tag(" ".join(text[start:end] for start, end in words), tokenize=False)
    if len(tagged) != len(words):
        raise ValueError(f"the tagger read {len(tagged)} words where the text has {len(words)}: {text!r}")
    spans = []
    for first, last in _stretches(text, words):
        kinds = "".join(_kind(tag) for _, tag in tagged[first:last])
        for match in _NOUN_PHRASE.finditer(kinds):
            if match.end() - match.start() > 1:
                spans.append((words[first + match.start()][0], words[first + match.end() - 1][1]))
    return spans


def constituent_ids(offsets: Sequence[Span], spans: Sequence[Span], text: str) -> list[int]:
    """For each token the index of the span that holds it, or −1.

    offsets: character span of each token in `text`, as a fast tokenizer's `return_offsets_mapping` gives it, white space
        at its edges left out. A token that reaches beyond a span belongs to none, and so do special tokens and white
        space, except between two words of one span.
    spans: in any order. Raises `ValueError` for one that is empty, reaches outside `text`, or overlaps another.
    """
    owner = [-1] * len(text)
    for index, (start, end) in enumerate(spans):
        if not 0 <= start < end <= len(text):
            raise ValueError(f"span {index} = ({start}, {end}) is empty or outside a text of {len(text)} characters")
        if any(held >= 0 for held in owner[start:end]):
            raise ValueError(f"span {index} = ({start}, {end}) overlaps another span")
        owner[start:end] = [index] * (end - start)
    ids = []
    for start, end in offsets:
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        # white space alone belongs to a constituent on both its sides: between two words of a phrase
        owners = set(owner[start:end] if start < end else owner[max(start - 1, 0) : start + 1])
        ids.append(owners.pop() if len(owners) == 1 and (start < end or start) else -1)
    return ids


class WordTable:
    """Word ids of tokens from their ids alone, by what each entry of a tokenizer's vocabulary says of itself.

    The rule is that of `word_spans`: a token is of a word if its characters are, and continues the word of the token
    before it if nothing lies between. Special tokens and punctuation are of none. What a vocabulary does not tell is
    guessed: a character cut into bytes is a letter if its first byte begins mostly letters; and word pieces and "</w>"
    vocabularies, which do not say where spaces were around marks, make "don't" two words.

    tokenizer: byte-level (GPT-2, Llama 3, Qwen), metaspace (Llama 2, Gemma), word-piece (BERT), or with "</w>" at
    words' ends (GPT-1). Raises `ValueError` for a vocabulary that marks words in no known way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        names = [name or "" for name in tokenizer.convert_ids_to_tokens(range(size))]
        added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
        special |= {token for token, entry in added.items() if entry.special}
        spell = _speller(names)
        rows = [(_OTHER, _OTHER, False, True, True) if token in special else
                _looks(added[token].content.encode() if token in added else spell(name))
                for token, name in enumerate(names)]
        self._table = torch.tensor([[int(value) for value in row] for row in rows], dtype=torch.int8).T.contiguous()

    def constituent_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                        document_ids: Tensor | None = None) -> Tensor:
        """For each token the number of its word in its row, or −1: (batch, tokens) int64, on the device of the ids.

        Words do not go on across padding or from one document (see `document_ids`) into the next.
        """
        if self._table.device != input_ids.device:
            self._table = self._table.to(input_ids.device)
        known = input_ids.clamp(0, self._table.size(1) - 1)
        first, last, whole, starts_apart, ends_apart = self._table[:, known]
        apart = F.pad(ends_apart[:, :-1], (1, 0), value=1).bool() | starts_apart.bool()
        for marks in (attention_mask, document_ids):
            if marks is not None:
                apart[:, 1:] |= marks[:, 1:] != marks[:, :-1]
        # A token of continued bytes alone is what the last token with a first byte is.
        position = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        known_last = last.gather(1, position.where(last != _CONTINUED, 0).cummax(1).values)
        last = known_last.where((last != _CONTINUED) | (known_last != _DIGIT), _LETTER)  # no point goes on after a digit's mark
        before = F.pad(last[:, :-1], (1, 0), value=_OTHER).masked_fill(apart, _OTHER)
        first = first.where(first != _CONTINUED, before.where(before != _LINK, _LETTER))
        after = F.pad(first[:, 1:], (0, 1), value=_OTHER).masked_fill(F.pad(apart[:, 1:], (0, 1), value=True), _OTHER)
        member = whole.bool() & _joins(first, before) & _joins(last, after)
        if attention_mask is not None:
            member &= attention_mask.bool()
        continues = member & F.pad(member[:, :-1], (1, 0)) & ~apart
        return ((member & ~continues).long().cumsum(1) - 1).masked_fill(~member, -1)


def document_ids(position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                 input_ids: Tensor | None = None, *, end_of_document: int | None = None) -> Tensor | None:
    """The document of each token of rows that may be packed, (batch, tokens) int64; numbers count within a row.

    A document begins where positions do not rise (packing without padding, as TRL and transformers do it; of three rows of
    positions, time, height and width, where all are 0; of four rows the first is the text's), where
    the attention mask, if it numbers documents 1, 2, …, holds another number, and after the token `end_of_document`
    of `input_ids`, if that is given (rows that were packed and cut without a mark). None if nothing is given.
    """
    begins = []
    if position_ids is not None:
        if position_ids.dim() == 3 and len(position_ids) == 3:
            begins.append((position_ids[:, :, 1:] == 0).all(0))
        else:
            position_ids = position_ids[0] if position_ids.dim() == 3 else torch.atleast_2d(position_ids)
            begins.append(position_ids[:, 1:] <= position_ids[:, :-1])
    if end_of_document is not None:
        begins.append(input_ids[:, :-1] == end_of_document)
    documents = sum(F.pad(starts.long(), (1, 0)).cumsum(1) for starts in begins) if begins else None
    if attention_mask is None:
        return documents if documents is None or input_ids is None else documents.expand_as(input_ids)
    return (0 if documents is None else documents) + attention_mask.long() * (attention_mask.size(1) + 1)


# What a token's first and last characters are; joiners and points are of a word only between two letters or digits.
_OTHER, _LETTER, _DIGIT, _JOINER, _LINK, _POINT, _CONTINUED = range(7)


def _joins(edge: Tensor, neighbour: Tensor) -> Tensor:
    """Whether an edge of a token lies within a word, by the character next to it."""
    letter = (neighbour == _LETTER) | (neighbour == _DIGIT)
    return ((edge == _LETTER) | (edge == _DIGIT) | ((edge == _JOINER) | (edge == _LINK)) & letter
            | (edge == _POINT) & (neighbour == _DIGIT))


def _looks(spelling: bytes) -> tuple[int, int, bool, bool, bool]:
    """Kinds of the first and last character, whether all may be one word, and white space before and after."""
    whole_characters = spelling.lstrip(_CONTINUATION)
    text = _decoded(whole_characters)
    rest = regex.sub(r"^\p{M}+", "", text)  # marks go on with what stands before them, as cut bytes do
    continued = len(whole_characters) < len(spelling) or len(rest) < len(text)
    text = ("x" if continued else "") + rest
    core = text.strip()
    if not core:
        return _OTHER, _OTHER, False, True, True
    # One word once a letter or digit stands on either side of it, if an edge is a joiner or a point.
    bare = regex.sub(r"(?<=.)\p{M}+$", "", core)
    first, last = _kind_of(core[0]), _kind_of(bare[-1])
    last = _LETTER if last == _DIGIT and bare != core else last
    around = {_JOINER: "x", _LINK: "x", _POINT: "0"}
    whole = word_spans(around.get(first, "") + core + around.get(last, ""))
    whole = len(whole) == 1 and whole[0][1] == len(core) + (first in around) + (last in around)
    if continued:
        first, last = _CONTINUED, last if rest else _CONTINUED
    return first, last, whole, core[0] != text[0], core[-1] != text[-1]


def _stretches(text: str, words: list[Span]) -> list[Span]:
    """Ranges of words between which there is nothing but white space."""
    breaks = [i for i in range(1, len(words)) if text[words[i - 1][1] : words[i][0]].strip()]
    edges = [0, *breaks, len(words)]
    return list(zip(edges, edges[1:]))


def _kind(tag: str) -> str:
    if tag in ("DT", "PRP$", "CD"):
        return "D"
    if tag in ("VBN", "VBG") or tag.startswith("JJ"):
        return "A"
    if tag.startswith("NN"):
        return "N"
    return "R" if tag == "RB" else "o"


_CONTINUATION = bytes(range(0x80, 0xC0))


@cache
def _kind_of(character: str) -> int:
    if regex.match(r"\p{N}", character):
        return _DIGIT
    if regex.match(r"\p{L}", character):
        return _LETTER
    return (_JOINER if regex.match(f"[{_JOINERS}]", character) else _LINK if character in _UNSEEN else
            _POINT if character in ".,٫٬" else _OTHER)


def _decoded(spelling: bytes) -> str:
    """The text of bytes that begin with a whole character; a character cut at the end counts as what it mostly is."""
    try:
        return spelling.decode()
    except UnicodeDecodeError as error:
        cut = spelling[error.start:]
        # General punctuation begins with E2, that of Chinese and Japanese with E3 80 and EF, signs with C2 and F0.
        letter = cut[0] not in (0xC2, 0xE2, 0xEF, 0xF0) and cut[:2] != b"\xe3\x80" and cut[0] >= 0xC2
        return spelling[: error.start].decode() + ("x" if letter else "…")


def _speller(names: list[str]):
    """From a vocabulary's way of writing to the bytes of a token, a space before a word included."""
    marks = {"Ġ": lambda name: name.startswith("Ġ"), "▁": lambda name: name.startswith("▁"),
             "##": lambda name: name.startswith("##"), "</w>": lambda name: name.endswith("</w>")}
    found = {mark: sum(map(has, names)) for mark, has in marks.items()}
    mark = max(found, key=found.get)
    if not found[mark] or mark in ("##", "</w>") and found[mark] < len(names) / 100:  # a stray entry marks nothing
        raise ValueError("the tokenizer's vocabulary does not tell where words begin: give each row constituent_ids, "
                         "for example by carma_lib.collate.encode_text")
    return {"Ġ": _of_byte_level, "▁": _of_metaspace, "##": _of_word_piece, "</w>": _of_word_end}[mark]


def _of_byte_level(name: str) -> bytes:
    table = _byte_of_character()
    return bytes(table[character] for character in name) if set(name) <= table.keys() else name.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _of_metaspace(name: str) -> bytes:
    byte = regex.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


def _of_word_piece(name: str) -> bytes:
    if name.startswith("##"):
        return name[2:].encode()
    # Chinese characters are pieces of their own, with or without a space before them.
    return name.encode() if regex.match(r"\p{Han}", name) else f" {name}".encode()


def _of_word_end(name: str) -> bytes:
    return name.replace("</w>", " ").encode()
