"""Rows to tensors: prompts, targets, constituents and padding."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from tokenizers.processors import ByteLevel, TemplateProcessing
from tiny import TEXTS, byte_level_tokenizer, metaspace_tokenizer, tiny_model
from transformers import TrainingArguments

from carma_lib import CarmaConfig, CarmaTrainer
from carma_lib.collate import Collator, _single_target, answerable, encode, encode_text
from carma_lib.models.table import Prompt

ROOT = Path(__file__).resolve().parent.parent


def rows(*texts, target="dog"):
    return Dataset.from_list([{"text": text, "target": target, "phrases": [[0, 3]]} for text in texts])


def tokenizer_with_targets(make):
    return make([*TEXTS, *["hotdog bulldog lapdog", "copycat wildcat bobcat"] * 9], 400)


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_prompts(make):
    tokenizer = tokenizer_with_targets(make)
    text = "An unbelievable bird."
    encoded = encode(rows(text), tokenizer, prefix="Word: ", suffix=' is called a "')[0]
    prompt = f'Word: {text} is called a "'
    assert encoded["input_ids"] == tokenizer(prompt).input_ids and encoded["length"] == len(
        encoded["input_ids"]
    )
    assert tokenizer(prompt + "dog").input_ids == [*encoded["input_ids"], encoded["target_id"]]
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    for word, expected in enumerate(["An", "unbelievable", "bird"]):
        pieces = [prompt[a:b] for (a, b), i in zip(offsets, encoded["constituent_ids"]) if i == word]
        assert "".join(pieces).strip() == expected
    assert max(encoded["constituent_ids"]) == 2  # nothing of the template


def test_phrases_come_from_the_rows_or_from_the_chunker():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    ids = encode(rows("An old bird."), tokenizer, suffix=' "', level="phrase")[0]["constituent_ids"]
    offsets = tokenizer('An old bird. "', return_offsets_mapping=True).offset_mapping
    assert [i == 0 for i in ids] == [b <= 3 and ("An old bird."[a:b].strip() != "") for a, b in offsets]
    found = encode(rows("An old bird.").remove_columns("phrases"), tokenizer, suffix=' "', level="phrase")[0]
    assert [i == 0 for i in found["constituent_ids"]] == [a < len("An old bird") for a, b in offsets]
    none = Dataset.from_list([{"text": "An old bird.", "target": "dog", "phrases": []}], features=rows("An old bird.").features)
    assert encode(none, tokenizer, suffix=' "', level="phrase")[0]["constituent_ids"] == found["constituent_ids"], "as of a task without phrases"


def test_targets_of_several_tokens():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    data = Dataset.from_list(
        [{"text": "a bird", "target": target} for target in ("dog", "unbelievably odd", "cat")]
    )
    with pytest.raises(ValueError, match="1 of 3 targets are not one token.*'unbelievably odd'"):
        encode(data, tokenizer, suffix=' is called a "')
    kept = encode(data, tokenizer, suffix=' is called a "', drop=True)
    assert kept["target"][:] == ["dog", "cat"] and all(
        tokenizer.decode(row["target_id"]) == row["target"] for row in kept
    )


def test_a_target_that_changes_the_prompts_own_tokens_is_none():
    """As where "hot" and "dog" are known and "hotdog" is one token: it does not continue the prompt."""
    assert _single_target([1, 2], [1, 2, 3]) == 3
    assert (
        _single_target([1, 2], [1, 4, 3])
        == _single_target([1, 2], [1, 4])
        == _single_target([1], [1, 2, 3])
        == -1
    )


def test_language_modelling():
    tokenizer = metaspace_tokenizer()
    row = encode_text(Dataset.from_dict({"text": ["a small bird"]}), tokenizer)[0]
    assert row["labels"] == row["input_ids"] and row["length"] == len(row["input_ids"])
    assert row["constituent_ids"][0] == -1 and set(row["constituent_ids"][1:]) == {0, 1, 2}
    short = {
        name: values[-2:]
        for name, values in row.items()
        if name in ("input_ids", "labels", "constituent_ids")
    }
    batch = Collator(tokenizer)([row, short])
    assert batch["labels"].tolist() == [
        [-100, *row["labels"][1:]],
        [-100] * (row["length"] - 1) + row["labels"][-1:],
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_does_not_change_the_language_model_loss(family):
    model, rows = tiny_model(family), [
        {"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [9, 8, 7, 6, 5, 4])
    ]
    with torch.no_grad():
        alone = [model(**Collator(1)([row])).loss for row in rows]
        together = model(**Collator(1)(rows)).loss
    torch.testing.assert_close(together, (2 * alone[0] + 5 * alone[1]) / 7)


def test_padding_is_on_the_left():
    batch = Collator(9)(
        [
            {"input_ids": [3, 4, 5], "constituent_ids": [0, 0, -1], "target_id": 7, "text": "ignored"},
            {"input_ids": [6], "constituent_ids": [2], "target_id": 8, "text": "ignored"},
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[3, 4, 5], [9, 9, 6]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "constituent_ids": [[0, 0, -1], [-1, -1, 2]],
        "target_ids": [7, 8],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_does_not_change_what_the_model_says(family):
    model = tiny_model(family)
    row, longer = {"input_ids": [5, 6, 7]}, {"input_ids": [9] * 8}
    with torch.no_grad():
        alone = model(**Collator(1)([row])).logits[0, -1]
        together = model(**Collator(1)([row, longer])).logits[0, -1]
    torch.testing.assert_close(alone, together)


def test_padding_token():
    tokenizer = byte_level_tokenizer()
    assert Collator(tokenizer).pad_token_id == tokenizer.pad_token_id == 1
    tokenizer.pad_token = None
    assert Collator(tokenizer).pad_token_id == tokenizer.eos_token_id == 0
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        Collator(tokenizer)


def test_errors_at_the_door():
    tokenizer = byte_level_tokenizer()

    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="Slow is a slow tokenizer"):
        encode(rows("a"), Slow())
    with pytest.raises(ValueError, match="level must be one of"):
        encode(rows("a"), tokenizer, level="clause")
    with pytest.raises(ValueError, match=r"the rows lack \['target'\]"):
        encode(rows("a").remove_columns("target"), tokenizer)
    with pytest.raises(ValueError, match="constituent_ids has 1 entries where input_ids has 2"):
        Collator(0)([{"input_ids": [1, 2], "constituent_ids": [0]}])


def test_rows_that_are_no_rows_of_text():
    """The case "odd rows" and its neighbours: each is refused in one line that says which row, or what to pass."""
    tokenizer = byte_level_tokenizer()
    good = {"text": ["a", "b"], "target": ["c", "d"]}
    for columns, error, says in [
        ({"text": ["a", None]}, ValueError, "row 1: text is None, not text"),
        ({"text": [None, None]}, ValueError, "row 0: text is None"),
        ({"text": [float("nan"), 2.0]}, ValueError, "row 0: text is nan"),
        ({"target": ["c", None]}, ValueError, "row 1: target is None"),
        ({"target": [1, 2]}, ValueError, "row 0: target is 1, not text: drop the row or convert the value"),
        ({"target": [True, False]}, ValueError, "row 0: target is True"),
        ({"text": [["a"], ["b"]]}, ValueError, r"row 0: text is \['a'\]"),
        ({"text": [], "target": []}, ValueError, "there are no rows"),
    ]:
        rows = Dataset.from_dict({**good, **columns})
        for call in (encode, encode_text) if "target" not in columns else (encode,):
            for more in ({"answer": "text"}, {"drop": True}) if call is encode else ({},):
                with pytest.raises(error, match=says) as caught:
                    call(rows, tokenizer, **more)
                assert "\n" not in str(caught.value)
    rows = Dataset.from_dict(good)
    for other, says in [(rows.to_iterable_dataset(), "not IterableDataset: .*Dataset.from_generator for a stream"),
                        (DatasetDict(train=rows), "not DatasetDict: take one split"), (rows.to_list(), "not list"),
                        (good, "not dict")]:
        for call in (encode, encode_text):
            with pytest.raises(TypeError, match=says):
                call(other, tokenizer)


def test_phrases_that_do_not_fit_name_their_row():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    for span in ([[0, 99]], [[2, 2]], [[0, 3], [2, 4]], [[-1, 2]], None):
        data = Dataset.from_list([{"text": "a bird", "target": "dog", "phrases": phrases} for phrases in ([[0, 1]], span)])
        with pytest.raises(ValueError, match="^row 1: "):
            encode(data, tokenizer, suffix=' "', level="phrase", drop=True)


def tiny_training(train, evaluate=None, batch=1):
    tokenizer = byte_level_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = encode_text(Dataset.from_dict({"text": train}), tokenizer)
        evaluate = evaluate and encode_text(Dataset.from_dict({"text": evaluate}), tokenizer)
    more = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1} if evaluate else {}
    arguments = TrainingArguments(str(Path(tempfile.gettempdir()) / "never"), max_steps=8, per_device_train_batch_size=batch, report_to="none", use_cpu=True,
                                  disable_tqdm=True, save_strategy="no", logging_strategy="no", **more)
    carma = CarmaConfig(mi_layers=(0, 2), stability_layers=(0, 2))
    trainer = CarmaTrainer(tiny_model("gpt2"), arguments, processing_class=tokenizer, train_dataset=train,
                           eval_dataset=evaluate, carma=carma)
    trainer.train()
    return trainer


def test_blank_lines_train():
    """The README's own lines on a text with blank lines; a line of one token, in training and held out."""
    tiny_training("\n\n".join(f"a small bird {i}" for i in range(20)).splitlines(), batch=8)
    tiny_training(["a small bird", "a", "  ", ""])
    trainer = tiny_training(["a small bird"], evaluate=["a small bird", "a", "b"])
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 8 and all(loss == loss for loss in losses)


def test_rows_with_nothing_to_predict_are_left_out_and_told_once():
    tokenizer = byte_level_tokenizer()
    with pytest.warns(UserWarning, match="3 of 5 rows have fewer than two tokens.*left out") as caught:
        kept = encode_text(Dataset.from_dict({"text": ["a small bird", "", "a", "b", "a cat"]}), tokenizer)
    assert kept["text"][:] == ["a small bird", "a cat"] and len(caught) == 1
    assert all(row["length"] == len(row["input_ids"]) == len(row["constituent_ids"]) > 1 for row in kept)
    with pytest.raises(ValueError, match="2 of 2 rows have fewer than two tokens"):
        encode_text(Dataset.from_dict({"text": ["", "a"]}), tokenizer)
    begins = metaspace_tokenizer()  # a begin-of-text token predicts a line of one token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode_text(Dataset.from_dict({"text": ["a"]}), begins)) == 1


def test_an_empty_row_is_a_tensor_of_whole_numbers():
    batch = Collator(0)([{"input_ids": [], "labels": []}])
    assert all(tensor.dtype == torch.int64 and tensor.shape == (1, 0) for tensor in batch.values())


@pytest.mark.parametrize("told_by", ["argument", "tokenizer"])
def test_long_rows(told_by):
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    if told_by == "tokenizer":
        tokenizer.model_max_length = 20
    more = {"max_length": 20} if told_by == "argument" else {}
    data = Dataset.from_list([{"text": text, "target": "dog"} for text in ("a small bird", "a small bird " * 200)])
    with pytest.warns(UserWarning, match="1 of 2 rows are longer than 20 tokens and are cut there"):
        texts = encode_text(data, tokenizer, **more)
    whole = encode_text(data, byte_level_tokenizer([*TEXTS, *["hotdog bulldog lapdog", "copycat wildcat bobcat"] * 9], 400))
    assert texts[0] == whole[0] and texts["length"][:] == [whole[0]["length"], 20]
    for column in ("input_ids", "labels", "constituent_ids"):
        assert texts[1][column] == whole[1][column][:20]
    for answer in ("token", "text"):
        with pytest.raises(ValueError, match=r"1 of 2 rows are longer than 20 tokens, the first is row 1 with \d{3,}"):
            encode(data, tokenizer, suffix=' "', answer=answer, **more)
        with pytest.warns(UserWarning, match="longer than 20 tokens.*left out"):
            assert len(encode(data, tokenizer, suffix=' "', answer=answer, drop=True, **more)) == 1


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_answers_of_several_tokens(make):
    tokenizer = tokenizer_with_targets(make)
    targets = ["dog", "unbelievably odd", "a small bird that sings", "é§"]
    data = Dataset.from_list([{"text": "An old bird", "target": target} for target in targets])
    prompt = 'Say: An old bird = "'
    encoded = encode(data, tokenizer, prefix="Say: ", suffix=' = "', answer="text")
    alone = encode(data.select([0]), tokenizer, prefix="Say: ", suffix=' = "')[0]
    for row in encoded:
        ids, size = row["input_ids"], row["prompt_length"]
        assert ids[:size] == tokenizer(prompt).input_ids and ids[-1] == tokenizer.eos_token_id
        assert row["labels"] == [-100] * size + ids[size:] and row["length"] == len(ids) == len(row["constituent_ids"])
        assert row["constituent_ids"] == alone["constituent_ids"] + [-1] * (len(ids) - size)
        text = tokenizer.decode(ids[size:-1])
        assert text.strip() == row["target"] or "é" in row["target"] and make is metaspace_tokenizer
    assert encoded[0]["input_ids"][encoded[0]["prompt_length"]:-1] == [alone["target_id"]]


def test_an_answer_that_would_join_the_prompts_last_token_is_tokenized_alone():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    data = Dataset.from_list([{"text": "hot", "target": "dog"}])  # "hotdog" is one token
    assert _single_target(tokenizer("hot").input_ids, tokenizer("hotdog").input_ids) == -1
    row = encode(data, tokenizer, answer="text")[0]
    size = row["prompt_length"]
    assert row["input_ids"][:size] == tokenizer("hot").input_ids
    assert row["input_ids"][size:-1] == tokenizer("dog").input_ids


def test_the_loss_of_answers_is_of_their_tokens_alone():
    """Naive: one row at a time, the mean cross-entropy of the answer's tokens and of the end."""
    tokenizer, model = byte_level_tokenizer(), tiny_model("gpt2")
    data = Dataset.from_list([{"text": text, "target": target}
                              for text, target in (("a bird", "odd"), ("a well-known story", "a tale, or two"))])
    encoded = encode(data, tokenizer, suffix=" =", answer="text")
    losses = []
    with torch.no_grad():
        for row in encoded:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
            losses += [-F.log_softmax(logits[place - 1], -1)[row["input_ids"][place]]
                       for place in range(row["prompt_length"], row["length"])]
        together = model(**{name: tensor for name, tensor in Collator(tokenizer)(list(encoded)).items()
                            if name != "constituent_ids"}).loss
    torch.testing.assert_close(together.double(), sum(losses) / len(losses), rtol=1e-5, atol=1e-6)


def test_answers_of_several_tokens_at_the_door():
    tokenizer = byte_level_tokenizer()
    for target in ("", " "):
        with pytest.raises(ValueError, match="row 1: the target is empty"):
            encode(Dataset.from_dict({"text": ["a", "b"], "target": ["c", target]}), tokenizer, answer="text")
    with pytest.raises(ValueError, match="answer must be one of"):
        encode(rows("a"), tokenizer, answer="word")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        encode(rows("a"), tokenizer, answer="text")


def test_a_limit_counts_the_rows_that_are_answerable():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    data = Dataset.from_list([{"text": f"bird {row}", "target": "dog" if row % 40 == 39 else "unbelievably odd"}
                              for row in range(2500)])
    prompt = Prompt("", ' is called a "')
    kept = answerable(data, tokenizer, prompt, 30)
    assert kept["text"][:] == [f"bird {row}" for row in range(39, 2500, 40)][:30]
    assert kept.column_names == data.column_names
    assert len(answerable(data, tokenizer, prompt)) == len(answerable(data, tokenizer, prompt, 999)) == 62
    assert encode(kept, tokenizer, suffix=prompt.suffix)["text"][:] == kept["text"][:]
    with pytest.raises(ValueError, match="none of 39 items has an answer of one token"):
        answerable(data.select(range(39)), tokenizer, prompt)
    with pytest.raises(ValueError, match="there are no rows"):
        answerable(data.select([]), tokenizer, prompt)


def test_rules_that_change_are_used_on_rows_encoded_before(tmp_path):
    """The case "stale cache": rows on disk are encoded, the package's rule for words changes, they are encoded again."""
    shutil.copytree(ROOT / "carma_lib", tmp_path / "carma_lib", ignore=shutil.ignore_patterns("__pycache__"))
    byte_level_tokenizer().save_pretrained(tmp_path / "tok")
    Dataset.from_dict({"text": ["a well-known story"]}).save_to_disk(tmp_path / "rows")
    code = ("import datasets; datasets.disable_progress_bars(); from transformers import PreTrainedTokenizerFast\n"
            "from carma_lib.collate import encode_text; rows = datasets.load_from_disk('rows')\n"
            "print(encode_text(rows, PreTrainedTokenizerFast.from_pretrained('tok'))[0]['constituent_ids'])")

    def run():
        return subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)}).stdout

    before = run()
    with open(tmp_path / "carma_lib" / "words.py", "a") as words:
        words.write("\n\ndef word_spans(text):\n    return [(0, len(text))]\n")
    assert before != run()
    assert not list((tmp_path / "rows").glob("cache-*"))


@pytest.mark.parametrize("most", [1, 0, -1, True, 3.5, "5"])
def test_a_limit_below_two_tokens_is_no_limit(most):
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    for call in (lambda: encode_text(rows("a small bird"), tokenizer, max_length=most),
                 lambda: encode(rows("a small bird"), tokenizer, max_length=most)):
        with pytest.raises(ValueError, match="^max_length must be a whole number from 2 up, or None"):
            call()


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_the_rows_changes_nothing(kind):
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    plain = rows("a small bird", "an unbelievable bird")
    for encoding in (encode_text, lambda some, tokenizer: encode(some, tokenizer, answer="text"),
                     lambda some, tokenizer: encode(some, tokenizer, suffix=' "', level="phrase").with_format(None),
                     lambda some, tokenizer: answerable(some, tokenizer, Prompt("", ' is called a "')).with_format(None)):
        assert encoding(plain.with_format(kind), tokenizer).to_list() == encoding(plain, tokenizer).to_list()
    with pytest.raises(ValueError, match="^the rows have a transform"):
        encode_text(plain.with_transform(lambda some: {"text": some["text"]}), tokenizer)


@pytest.mark.parametrize("answer", ["token", "text"])
def test_a_tokenizer_that_ends_every_prompt_is_refused(answer):
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    end, post = tokenizer.eos_token, tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    with pytest.raises(ValueError, match="row 0: the tokenizer ends prompts with '"):
        encode(rows("An old bird."), tokenizer, suffix=' "', answer=answer)
    tokenizer.backend_tokenizer.post_processor = post or ByteLevel(trim_offsets=False)
    assert len(encode(rows("An old bird."), tokenizer, suffix=f" {end}", answer="text")), "a prompt may end so of itself"


def test_prompts_without_a_token_are_refused():
    tokenizer = tokenizer_with_targets(byte_level_tokenizer)
    for answer in ("token", "text"):
        with pytest.raises(ValueError, match="^row 1: the prompt is empty"):
            encode(rows("x", ""), tokenizer, answer=answer)
    assert len(encode(rows("x", ""), tokenizer, answer="text", prefix="Word: ")) == 2
    with pytest.raises(ValueError, match="^none of 2 rows is left"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encode(rows("a small bird", "an old bird", target="inconceivable things"), tokenizer, drop=True)


@pytest.mark.parametrize(("batch", "said"), [
    ([], "^the batch has no rows"),
    ([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [5, 6, -100]}], "^row 0 of the batch is padded already"),
    ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}], "^row 1 of the batch has no labels"),
    ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}], "^row 0 of the batch has no labels"),
    ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "constituent_ids": [0, 0]}], "^row 0 of the batch has no constituent_ids"),
    ([{"input_ids": [1, 2], "target_id": 3}, {"input_ids": [1, 2]}], "^row 1 of the batch has no target_id"),
])
def test_batches_that_lose_something_are_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        Collator(0)(batch)


@pytest.mark.parametrize("phrases", [None, [0.5, 2], [[0.5, 2]], ["a small"], [[0, 1, 2]]])
def test_odd_phrases_name_row_and_column(phrases):
    from carma_lib.collate import _spans
    with pytest.raises(ValueError, match="^row 4: phrases are "):
        _spans(phrases, 4)


def test_columns_of_the_other_kind_of_answer_are_dropped():
    """A data set with a column of classes called labels is common, and the collator would take it for tokens."""
    rows = Dataset.from_list([{"text": text, "target": "a", "labels": 1, "prompt_length": 9, "target_id": 7} for text in TEXTS[:2]])
    tokenizer = byte_level_tokenizer()
    tokens = encode(rows, tokenizer, suffix=' is called a "')
    assert "labels" not in tokens.column_names and (Collator(0)(list(tokens))["target_ids"] != 7).all()
    answers = encode(rows, tokenizer, suffix=' is called a "', answer="text")
    assert "target_id" not in answers.column_names and answers[0]["labels"][-1] == tokenizer.eos_token_id


def test_what_rows_are_made_with_is_public():
    import carma_lib

    assert (carma_lib.encode, carma_lib.encode_text, carma_lib.Collator) == (encode, encode_text, Collator)
