"""Words, phrases, and the constituents of tokens, for both kinds of tokenizer."""

import pytest
from tiny import byte_level_tokenizer, metaspace_tokenizer

from carma_lib.words import constituent_ids, phrase_spans, word_spans


def cut(text, spans):
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a small bird", ["a", "small", "bird"]),
        ("The end.", ["The", "end"]),
        ("well-known; don't, l’été (3.5 or 1,000)", ["well-known", "don't", "l’été", "3.5", "or", "1,000"]),
        ("red,green and/or blue -- it 's n't", ["red", "green", "and", "or", "blue", "it", "s", "n't"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("snake_case", ["snake", "case"]),
        ("鳥 птица", ["鳥", "птица"]),
        (" \n\t", []),
        ("", []),
        ("?!", []),
    ],
)
def test_words(text, words):
    assert cut(text, word_spans(text)) == words


def test_phrases_are_base_noun_phrases_within_punctuation():
    text = "a small brown bird, the very old house and sunrise"
    assert cut(text, phrase_spans(text)) == ["a small brown bird", "the very old house"]
    assert phrase_spans("") == phrase_spans("run") == phrase_spans("...") == []
    for text in ("well-known don't 3.5 and/or l’été", "every\nline of\r\nthe text", "what's n't 1,000 B-29s"):
        for (_, end), (start, _) in zip(phrase_spans(text), phrase_spans(text)[1:]):
            assert end <= start


TEXT = " unbelievably kind-hearted, café!"


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_every_token_finds_its_word(make):
    tokenizer = make()
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    spans = word_spans(TEXT)
    ids = constituent_ids(encoded.offset_mapping, spans, TEXT)
    assert len(ids) == len(encoded.input_ids)
    for word, (start, end) in enumerate(spans):
        covered = [TEXT[a:b].strip() for (a, b), i in zip(encoded.offset_mapping, ids) if i == word]
        joined = "".join(
            piece for n, piece in enumerate(covered) if n == 0 or piece != covered[n - 1] or piece != "é"
        )
        assert joined == TEXT[start:end]  # the bytes of é may be two tokens with the same characters
    for (a, b), i in zip(encoded.offset_mapping, ids):
        if i < 0:
            assert not any(character.isalnum() for character in TEXT[a:b])
    if tokenizer.bos_token == "<begin>":
        assert ids[0] == -1


def test_tokens_beyond_a_span_belong_to_none():
    text = "ab cd. "
    spans = [(3, 5), (0, 2)]
    offsets = [(0, 0), (0, 1), (1, 3), (2, 5), (3, 6), (5, 6), (1, 4), (6, 7)]
    assert constituent_ids(offsets, spans, text) == [-1, 1, 1, 0, -1, -1, -1, -1]


def test_phrases_hold_the_spaces_inside_them():
    assert constituent_ids([(0, 1), (1, 4), (4, 5), (5, 9)], [(0, 4)], "a big cat") == [0, 0, -1, -1]


@pytest.mark.parametrize(
    "spans, message",
    [
        ([(0, 2), (1, 3)], "overlaps"),
        ([(0, 3), (1, 2)], "overlaps"),
        ([(2, 9)], "outside"),
        ([(-1, 2)], "outside"),
        ([(2, 2)], "empty"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(ValueError, match=message):
        constituent_ids([(0, 1)], spans, "abcd")


def test_a_lone_space_belongs_to_the_phrase_around_it_and_to_no_word():
    text = "a gem of wit"
    offsets = [
        (0, 0),
        (0, 1),
        (1, 2),
        (2, 5),
        (5, 6),
        (6, 8),
        (9, 9),
        (9, 12),
        (0, 0),
    ]  # one space kept, one trimmed
    phrases = [(0, 5), (6, 12)]
    assert constituent_ids(offsets, phrases, text) == [-1, 0, 0, 0, -1, 1, 1, 1, -1]
    assert constituent_ids(offsets, word_spans(text), text) == [-1, 0, -1, 1, -1, 2, -1, 3, -1]
