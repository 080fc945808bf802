"""Words, phrases, and the constituents of tokens: by offsets, and by token ids alone."""

import unicodedata

import pytest
import torch
from tiny import TEXTS, byte_level_tokenizer, metaspace_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from carma_lib.words import WordTable, constituent_ids, document_ids, phrase_spans, word_spans


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
        *[(word, [word]) for word in (
            "हिन्दी", "தமிழ்", "كِتَابٌ", "שָׁלוֹם", "น้ำ", "می\u200cخواهم", "co\u00adoperate",  # marks, joiners
            "क्\u200dष", "বাংলা", "မြန်မာ", "col·lecció", "צה״ל", "٣٫٥", "o\u0308\u0304", "x²", "İ\u0307",
        )],
        ("'tis the dogs' 3, 4. e\u0301\u200d \u200dx a--b .5 1.a", [
            "tis", "the", "dogs", "3", "4", "e\u0301", "x", "a", "b", "5", "1", "a"]),
    ],
)
def test_words(text, words):
    assert cut(text, word_spans(text)) == words


def test_phrases_are_base_noun_phrases_within_punctuation():
    text = "a small brown bird, the very old house and sunrise"
    assert cut(text, phrase_spans(text)) == ["a small brown bird", "the very old house"]
    assert phrase_spans("") == phrase_spans("run") == phrase_spans("...") == []
    for text in ("the well-known don't of 3.5 old rules and/or the l’été", "every\nline of\r\nthe text", "the man's 1,000 B-29s in a big sky"):
        spans = phrase_spans(text)
        assert len(spans) > 1 and all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))


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


HARD = (
    "An unbelievably kind-hearted, café! don't (3.5 or 1,000) 'quoted' well-known... l’été snake_case e.g. 3,4",
    " it 's n't -- a - b, 'tis the dogs' 1,a .5 -5 x-", unicodedata.normalize("NFD", "naïve café"), "a\tb\n\nc  d",
    "你好世界，今天 天气。 日本語のテキスト。 हिन्दी में लिखा है 🙂 ok привет-мир كِتَابٌ שָׁלוֹם น้ำ", "x²=½ €5.30 50% A/B co\u00adoperate",
    "I ❤️ you, ❤️love it™️ 1️⃣ ☺️☺️s র\u200d্যাব क्\u200dष",
    "'\u0301ا ষ'\u0301 1️⃣,2️⃣ 3️⃣.5 a-\u0301b don't\u0301",
)


def word_end_tokenizer():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<unk>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def word_piece_tokenizer(texts=TEXTS):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "<pad>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def metaspace_with_bytes():
    """As Llama 2's: characters that the vocabulary lacks are bytes."""
    pieces = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz.,'-éN", "▁a", "do", "▁do"]
    tokenizer = Tokenizer(models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)}, byte_fallback=True, unk_token="<unk>",
        merges=[("▁", "a"), ("d", "o"), ("▁", "do")],
    ))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def by_offsets(tokenizer, text):
    """Words numbered in their order, as `WordTable` numbers them."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = constituent_ids(encoded.offset_mapping, word_spans(text), text)
    order = {word: number for number, word in enumerate(dict.fromkeys(word for word in ids if word >= 0))}
    return encoded.input_ids, [order.get(word, -1) for word in ids]


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("vocab_size", [300, 1200])
def test_words_of_token_ids_are_those_of_offsets(make, vocab_size):
    """With 1,200 entries every character is a token; with 300 most that are not ASCII are cut or unknown."""
    tokenizer = make((*TEXTS, *HARD), vocab_size)
    table = WordTable(tokenizer)
    for text in (TEXT, *TEXTS, *HARD) if vocab_size > 300 else TEXTS:
        input_ids, expected = by_offsets(tokenizer, text)
        assert tokenizer.unk_token_id not in input_ids
        found = table.constituent_ids(torch.tensor([input_ids]))
        assert found.dtype == torch.int64 and found[0].tolist() == expected, text


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_with_bytes])
def test_letters_that_are_cut_into_bytes(make):
    tokenizer = make()
    table = WordTable(tokenizer)
    for text in ("a привет-мир, do שלום", "a 天气不错 do हिन्दी, ok", "do naïve 한국어. 🙂 (a)", "a ελληνικά's 🙂🙂do"):
        input_ids, expected = by_offsets(tokenizer, text)
        assert len(input_ids) > len(text) and table.constituent_ids(torch.tensor([input_ids]))[0].tolist() == expected


@pytest.mark.parametrize("make", [word_piece_tokenizer, word_end_tokenizer])
def test_vocabularies_that_hide_spaces(make):
    tokenizer = make()
    table = WordTable(tokenizer)
    for text in TEXTS[:3]:
        input_ids, expected = by_offsets(tokenizer, text)
        assert table.constituent_ids(torch.tensor([input_ids]))[0].tolist() == expected
    input_ids, _ = by_offsets(tokenizer, "well-known")
    ids = table.constituent_ids(torch.tensor([input_ids]))[0].tolist()
    assert -1 in ids and max(ids) == 1  # two words and a mark


def test_special_tokens_padding_and_documents_end_words():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens([AddedToken("<think>"), "zyzzyva"])
    table = WordTable(tokenizer)

    def ids(text, **marks):
        return table.constituent_ids(torch.tensor([tokenizer(text).input_ids]), **marks)[0].tolist()

    assert ids("a<|turn|>b<think>c<end>zyzzyva<pad>") == [0, -1, 1, -1, 2, -1, 3, -1]
    assert ids("xqxq") == [0] * 4
    assert ids("xqxq", attention_mask=torch.tensor([[1, 1, 0, 1]])) == [0, 0, -1, 1]
    assert ids("xqxq", document_ids=torch.tensor([[0, 1, 1, 1]])) == [0, 1, 1, 1]
    assert ids("xqxq", attention_mask=torch.tensor([[0, 1, 1, 1]])) == [-1, 0, 0, 0]
    assert ids("x-q") == [0, 0, 0] and ids("x-q", document_ids=torch.tensor([[0, 0, 1]])) == [0, -1, 1]


def test_rows_do_not_touch_each_other_and_may_be_empty():
    tokenizer = byte_level_tokenizer()
    table = WordTable(tokenizer)
    rows = [tokenizer(text).input_ids[:8] for text in ("unbelievable", "xq-xqxqxqx")]
    rows = torch.tensor([row + [1] * (8 - len(row)) for row in rows])
    together = table.constituent_ids(rows)
    assert torch.equal(together, torch.cat([table.constituent_ids(row[None]) for row in rows]))
    assert table.constituent_ids(rows[:, :0]).shape == (2, 0)
    assert table.constituent_ids(torch.full((1, 2), 10**6)).shape == (1, 2)  # ids that the vocabulary lacks


@pytest.mark.parametrize("stray", [[], ["##"], ["x</w>"]])
def test_vocabulary_without_marks_of_words(stray):
    """Nor does one entry of many say how a vocabulary marks words."""
    names = ["<unk>", " bird", *(chr(97 + place // 26) + chr(97 + place % 26) for place in range(200)), *stray]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="constituent_ids"):
        WordTable(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("text, words", [
    ("I ❤️ you", ["I", "you"]), ("❤️love it", ["love", "it"]), ("no™️ ☺️☺️s", ["no", "s"]), ("nai\u0308ve e\u0301", ["nai\u0308ve", "e\u0301"]),
    ("\u0301a", ["a"]), ("র\u200d্যাব क्\u200dष", ["র\u200d্যাব", "क्\u200dष"])])
def test_marks_are_of_the_word_before_them_alone(text, words):
    """As a variation selector, which is the second half of many emoji and no word."""
    assert [text[start:end] for start, end in word_spans(text)] == words
    for make in (byte_level_tokenizer, metaspace_tokenizer):
        tokenizer = make((*TEXTS, *HARD, text), 1200)
        table = WordTable(tokenizer)
        ids, expected = by_offsets(tokenizer, text)
        assert table.constituent_ids(torch.tensor([ids]))[0].tolist() == expected


def test_documents_of_packed_rows():
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])

    def documents(**marks):
        found = document_ids(input_ids=ids, **marks)[0].tolist()
        return [list(dict.fromkeys(found)).index(document) for document in found]

    assert document_ids() is None and documents(attention_mask=torch.ones_like(ids)) == [0] * 6
    assert documents(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]])) == [0, 0, 0, 1, 1, 2]
    assert documents(position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]).expand(3, 1, 6)) == [0, 0, 1, 1, 1, 1]
    image = torch.tensor([[0, 1, 2, 2, 2, 0], [0, 1, 2, 2, 3, 0], [0, 1, 2, 3, 2, 0]])[:, None]  # time, height, width
    assert documents(position_ids=image) == [0, 0, 0, 0, 0, 1]
    assert documents(position_ids=torch.cat([torch.arange(6)[None, None], image])) == [0] * 6  # the text's positions before them
    assert documents(position_ids=torch.arange(6)) == [0] * 6  # one row of positions for all rows
    assert documents(attention_mask=torch.tensor([[1, 1, 2, 2, 2, 0]])) == [0, 0, 1, 1, 1, 2]
    assert documents(end_of_document=7) == [0, 0, 0, 1, 1, 1]
    left = document_ids(torch.tensor([[0, 0, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1]]))[0, 2:]
    assert (left == left[0]).all()
    holes = document_ids(attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))[0]
    assert holes[0] == holes[5]


def test_documents_of_trls_and_transformers_collators():
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]},
            {"input_ids": [9, 10], "labels": [9, 10]}]
    packed = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [5, 6, 7, 8, 9, 10], "seq_lengths": [3, 1, 2]}]
    for batch in (sft.DataCollatorForLanguageModeling(0, padding_free=True)(rows),
                  sft.DataCollatorForLanguageModeling(0, padding_free=True)(packed),
                  sft.DataCollatorForLanguageModeling(0, return_position_ids=True)(packed),
                  DataCollatorWithFlattening()(rows)):
        found = document_ids(batch["position_ids"], batch.get("attention_mask"), batch["input_ids"])
        assert found.diff().ne(0).tolist() == [[False, False, True, True, False]]
