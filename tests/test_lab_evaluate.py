"""The answers of cells against one row at a time, without padding; scores by hand; whole answers against `generate`."""
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from lab_cells import DICTIONARY, cell_of
from tiny import byte_level_tokenizer, tiny_model

from carma_lib.collate import Collator, encode
from carma_lib.lab.cell import cell_folder
from carma_lib.lab.evaluate import (_score, _score_texts, answers, asked_rows, changed_answers, prompts_of, replacements,
                                     shares_by_layer, test_splits as splits_of)
from carma_lib.lab.drift import perplexity
from carma_lib.lab.measure import _in_batches
from carma_lib.lab.run import run
from carma_lib.lab.start import rows_of, tokenizer_of
from carma_lib.lab.train import trained
from carma_lib.models import Prompt, prompt_for
from carma_lib.pooling import constituent_aware_pooling
from carma_lib.stats.metrics import macro_f1, summarise
from carma_lib.stats.table import RESULT_COLUMNS, check_results, read_results
from carma_lib.synonyms.replacement import replace_all
from carma_lib.tasks import build_task, load_task, task_named
from carma_lib.tasks.wordnet import example_sentences

SPLITS = ("test_held_out", "test_longer")
SETTINGS = dict(task=DICTIONARY, layers=3, rates=(0.25, 0.4), depth_shares=(0.5, 1.0), protocols=("sum", "max"), levels=("word", "phrase"),
                test_splits=SPLITS, test_items=24, pooled_items=7, evaluation_batch=5, adversary_rate=0.25, adversary_tries=2,
                measures=("drift", "perplexity", "information", "structure"), measured_items=5)
CARMA = cell_of("carma", seed=2, **SETTINGS)


@pytest.fixture(scope="module")
def tested(data, tmp_path_factory, client):
    folder = tmp_path_factory.mktemp("tested") / "run"
    shutil.copytree(data, folder)
    assert run([CARMA, cell_of("untuned", seed=2, **SETTINGS)], folder, client) == {}
    return folder


@pytest.fixture(scope="module")
def results(tested):
    return check_results(pd.read_parquet(cell_folder(tested, CARMA) / "answers.parquet"))


@pytest.fixture(scope="module")
def model(tested):
    return trained(tested, CARMA).model


def test_a_row_for_every_item_and_condition(tested, results):
    assert set(RESULT_COLUMNS) <= set(results.columns)
    counts = results.groupby(["split", "condition", "source"], observed=True).size()
    assert len(counts) == 2 * 4
    assert counts.xs("clean", level="condition").eq(24).all()
    assert counts.xs("controlled", level="source").eq(2 * 24).all() and counts.xs("adversary", level="source").eq(7).all()
    assert counts.xs("pooled", level="condition").eq(2 * 2 * 2 * 7).all(), "layers × protocols × levels × items"
    assert set(results.budget) == {6} and set(results.start.astype(str)) == {"random"} and set(results["cell"].astype(str)) == {CARMA.key}
    untuned = read_results(cell_folder(tested, cell_of("untuned", seed=2, **SETTINGS)) / "answers.parquet")
    assert len(untuned) == 2 * 24 and set(untuned.budget) == {0} and set(untuned.condition) == {"clean"}
    keys = ["item_id", "split", "budget", "condition", "source", "rate", "start_layer", "protocol", "level"]
    assert not results.duplicated(keys).any()


@torch.no_grad()
def test_clean_and_pooled_answers_equal_one_row_at_a_time(tested, results, model):
    tokenizer, prompt = tokenizer_of(tested, CARMA), prompt_for("inverse_dictionary")
    table = results[results.split == "test_longer"].set_index("item_id")
    rows = asked_rows(tested, CARMA, "test_longer").select(range(7))
    for level in ("word", "phrase"):
        for row in encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, level=level):
            ids = torch.tensor([row["input_ids"]])
            found = {(-1, ""): model(input_ids=ids).logits[0, -1]}
            for layer in (1, 2):
                for protocol in ("sum", "max"):
                    found[layer, protocol] = constituent_aware_pooling(
                        model, ids, torch.ones_like(ids), torch.tensor([row["constituent_ids"]]),
                        start_layer=layer, protocol=protocol)[0]
            own = table.loc[[row["item_id"]]]
            for (layer, protocol), logits in found.items():
                answer = own[(own.start_layer == layer) & (own.protocol == protocol) & own.level.isin([level] if layer >= 0 else [""])
                             & (own.condition != "replaced")].iloc[0]
                target = row["target_id"]
                assert answer.log_probability == pytest.approx(logits.log_softmax(-1)[target].item(), abs=0.006), "kept to two digits"
                assert answer["rank"] == pytest.approx(sum(value >= logits[target] for value in logits), abs=1), "near ties"
                assert answer.prediction == tokenizer.decode([logits.argmax()]).strip()
                assert answer.correct == (logits.argmax() == target)


def test_of_equally_likely_tokens_the_first_is_the_answer():
    logits = torch.randint(3, (200, 7), generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.arange(200) % 7
    for row, target, answer in zip(logits.tolist(), targets.tolist(), _score(logits, targets).itertuples()):
        first = row.index(max(row))
        rank = 1 if first == target else sum(value >= row[target] for value in row)
        assert (answer.prediction, answer.rank, answer.correct) == (first, rank, first == target)


def test_replaced_texts_count_their_changes_and_leave_the_target_out(tested, results):
    for split in SPLITS:
        rows = asked_rows(tested, CARMA, split)
        for rate, (texts, made) in replacements(tested, CARMA, split).items():
            table = results[(results.split == split) & (results.rate == rate) & (results.source == "controlled")].set_index("item_id")
            assert [table.loc[item].changed for item in rows["item_id"]] == made and sum(made) > 0
            for before, after, target, number in zip(rows["text"], texts, rows["target"], made):
                assert (before != after) == (number > 0) and target not in after.lower().split()


def test_the_adversary_takes_the_worst_of_its_tries(tested, results, model):
    split = "test_held_out"
    found = changed_answers(tested, CARMA, model, split)
    worst = found[found.source == "adversary"]
    rows, prompt = asked_rows(tested, CARMA, split).select(range(7)), prompt_for("inverse_dictionary")
    tries = []
    for seed in (1, 2):
        texts = replace_all(rows["text"], rate=0.25, seed=seed, item_ids=rows["item_id"], **task_named(DICTIONARY).replacement(rows))
        tried = rows.remove_columns(["text", "phrases"]).add_column("text", [each.text for each in texts])
        one = answers(model, tokenizer_of(tested, CARMA), prompts_of(tried, tokenizer_of(tested, CARMA), prompt))
        tries.append(one.log_probability.to_numpy())
    np.testing.assert_allclose(worst.log_probability, np.minimum(*tries), atol=1e-4)
    assert worst.item_id.tolist() == rows["item_id"][:] and (worst.changed > 0).any()


def test_measures_are_complete(tested):
    measures = pd.read_parquet(cell_folder(tested, CARMA) / "measures.parquet")
    counts = measures.groupby("measure").size()
    for name in ("variance_explained", "angle", "read_out_seen", "read_out_held_out"):
        assert counts[f"{name}_before"] == counts[f"{name}_after"] == 3, "after each block"
    for name in ("token_mutual_information_before", "token_mutual_information_after", "drift", "cosine", "cka"):
        assert sorted(measures[measures.measure == name].layer) == [-1, 0, 1, 2], name
    assert counts["perplexity_before"] == counts["perplexity_after"] == 1 and counts["accuracy"] == len(SPLITS)
    assert measures.value.notna().all() and measures[measures.measure == "drift"].value.gt(0).any()
    assert set(measures[measures.measure == "accuracy"].split) == set(SPLITS)


def test_some_measures_and_some_splits(folder, client):
    cell = cell_of(measures=("perplexity",), changed_splits=("test_seen",), test_splits=(), depth_shares=(), rates=())
    assert run([cell], folder, client) == {}
    found = pd.read_parquet(cell_folder(folder, cell) / "answers.parquet")
    assert set(found.condition) == {"clean"} and set(found.split) == set(splits_of(folder, cell)) >= {"test_seen", "test_held_out"}
    measures = pd.read_parquet(cell_folder(folder, cell) / "measures.parquet")
    assert set(measures.measure) == {"accuracy", "perplexity_before", "perplexity_after"}


def test_perplexity_is_measured_on_each_plain_text_that_is_named(folder, client):
    texts = (DICTIONARY, "controlled_sentiment", "wordnet_examples")
    cell = cell_of(measures=("perplexity",), plain_texts=texts, test_items=5, depth_shares=(), rates=())
    assert run([cell], folder, client) == {}
    found = pd.read_parquet(cell_folder(folder, cell) / "measures.parquet").set_index(["measure", "split"])["value"]
    tokenizer, model = tokenizer_of(folder, cell), trained(folder, cell).model
    for text in texts:
        sentences = example_sentences(200) if text == "wordnet_examples" else rows_of(folder, text)["validation"]["text"][:200]
        batches = [Collator(tokenizer)([{"input_ids": ids}]) for ids in tokenizer(list(sentences)).input_ids]
        assert found["perplexity_after", text] == pytest.approx(perplexity(model, batches), rel=1e-4), text
        assert found["perplexity_before", text] != found["perplexity_after", text]
    with pytest.raises(ValueError, match="lorem"):
        cell_of(plain_texts=("lorem",))


def test_batches_of_plain_text_are_bounded_by_rows_and_tokens():
    rows = [{"input_ids": [1] * length} for length in [5000, *[60] * 100, *[600] * 10, 4000]]
    lengths = [[len(row["input_ids"]) for row in batch] for batch in _in_batches(rows)]
    assert [(len(batch), batch[-1]) for batch in lengths] == [(64, 60), (36, 60), (6, 600), (4, 600), (1, 4000), (1, 5000)]


@pytest.mark.parametrize("wrong", [dict(test_splits=("test_longest",)), dict(test_splits=(), changed_splits=("test_longest",))])
def test_unknown_splits_are_refused(folder, wrong):
    """When the cell is written down; those of one's own file, which no one knows before it is read, when its rows are."""
    with pytest.raises(ValueError, match="^controlled_sentiment has no split 'test_longest'; models are tested on test_seen, test_held_out, test_longer$"):
        cell_of(**wrong)
    pd.DataFrame({"text": [f"bird {n}" for n in range(20)], "target": ["a", "b"] * 10}).to_csv(folder / "birds.csv", index=False)
    build_task(str(folder / "birds.csv"), folder / "data" / "own_birds")
    with pytest.raises(ValueError, match="^own_birds has no split 'test_longest'; it has train, validation, test$"):
        splits_of(folder, cell_of(task="own_birds", **wrong))


def test_a_start_layer_named_by_two_shares_keeps_the_first():
    assert list(shares_by_layer(4, (0.25, 0.5, 1.0)).values()) == [1.0, 0.5, 0.25]
    found = shares_by_layer(2, (0.01, 0.1, 1.0))
    assert sorted(found.values()) == [0.01, 1.0] and len(found) == 2


# -- scores ----------------------------------------------------------------------------------------

def test_score_by_hand():
    frame = _score(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]), torch.tensor([2, 2]))
    assert frame.prediction.tolist() == [1, 2] and frame.correct.tolist() == [False, True]
    assert frame["rank"].tolist() == [2, 1]
    expected = 2 - math.log(sum(math.exp(value) for value in (1, 3, 2)))
    assert frame.prediction_probability[0] == pytest.approx(math.exp(expected + 1), abs=1e-6)
    assert frame.log_probability[0] == pytest.approx(expected, abs=1e-6)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            _score(torch.tensor([[wrong, 1.0]]), torch.tensor([0]))


def test_a_collapsed_model_knows_nothing():
    tokenizer, model = byte_level_tokenizer(), tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    rows = Dataset.from_list([{"item_id": str(item), "text": "ago", "target": "b", "phrases": []} for item in range(4)])
    table = answers(model, tokenizer, prompts_of(rows, tokenizer, Prompt("", ' "')))
    assert not table.correct.any() and table["rank"].eq(300).all()


def always(token, vocabulary):
    """A model that always says one token."""
    model = tiny_model("gpt2", vocab_size=vocabulary)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, vocabulary)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 5.0
    return model


@pytest.mark.parametrize("says", ["good", " good", "mood", " mood"])
def test_tokens_of_the_same_letters_are_told_apart(says):
    """' good' and 'good' read alike: the wrong one is no correct answer in any metric."""
    tokenizer = byte_level_tokenizer(["good goods good bad mood good say good"] * 20)
    token = (tokenizer('"' + says) if says == says.strip() else tokenizer(says)).input_ids[-1]
    rows = Dataset.from_list([{"item_id": str(item), "text": "say", "target": "good", "phrases": []} for item in range(4)])
    table = answers(always(token, len(tokenizer)), tokenizer, prompts_of(rows, tokenizer, Prompt("", ' "')))
    right = says == "good"
    assert table.correct.eq(right).all() and (table.prediction == table.target).eq(right).all()
    if says == " good":
        assert set(table.prediction) == {f"good#{token}"}
    table = table.assign(task="t", split="test", model="m", start="s", budget=1, method="carma", seed=1)
    assert summarise(table, "accuracy")["estimate"].item() == macro_f1(table)["estimate"].item() == float(right)


# -- answers of several tokens ---------------------------------------------------------------------

TEXTS = ["the bird sings a long song", "a small boat", "someone who studies birds", "to move slowly across the water"]


def whole_answers(model, tokenizer, targets, texts=TEXTS, prompt=Prompt('Of "', '" comes "')):
    rows = Dataset.from_list([{"item_id": str(item), "text": text, "target": target} for item, (text, target) in enumerate(zip(texts, targets))])
    return answers(model, tokenizer, prompts_of(rows, tokenizer, prompt, answer="text", batch_size=3)), rows


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_whole_answer_is_right_if_generate_says_it(family):
    """Items whose answer is what `generate` says greedily, with its end, and others that part from it at some token."""
    tokenizer = byte_level_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer))
    prompt = Prompt('Of "', '" comes "')
    said = []
    for text in TEXTS:
        ids = tokenizer(f"{prompt.prefix}{text}{prompt.suffix}", return_tensors="pt").input_ids
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4, pad_token_id=1)[0, ids.size(1):]
        said.append(made.tolist())
    batch = {"input_ids": [], "labels": []}
    end, expected = tokenizer.eos_token_id, []
    for text, made in zip(TEXTS, said):
        start = tokenizer(f"{prompt.prefix}{text}{prompt.suffix}").input_ids
        for answer in (made[:3], [*made[:2], (made[2] + 1) % 300], [(made[0] + 1) % 300, *made[1:3]]):
            batch["input_ids"].append(start + answer)
            batch["labels"].append([-100] * len(start) + answer)
            expected.append((answer == made[:3], [one == other for one, other in zip(answer, made)]))
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(batch["input_ids"], batch["labels"])]
    with torch.no_grad():
        table = _score_texts(model, Collator(tokenizer)(rows), tokenizer)
    assert table.correct.tolist() == [whole for whole, _ in expected] and end == 0
    for row, ((_, tokens), made) in enumerate(zip(expected, [each for each in said for _ in range(3)])):
        right = int(np.cumprod(tokens).sum())
        assert table.prediction[row] == tokenizer.decode(made[:right + 1][:3], skip_special_tokens=True).strip(' "')
        ids = torch.tensor([rows[row]["input_ids"]])
        with torch.no_grad():
            of_tokens = model(input_ids=ids).logits[0, -4:-1].log_softmax(-1)
        assert table.log_probability[row] == pytest.approx(of_tokens.gather(1, ids[0, -3:, None]).sum().item(), abs=1e-4)
        confidence = of_tokens.amax(-1).exp()[:right + 1].prod().item()
        assert table.prediction_probability[row] == pytest.approx(confidence, abs=1e-5), "of the answer that is shown"
        assert (table["rank"][row] == 1) == table.correct[row]


def test_an_answer_without_its_end_is_not_right():
    tokenizer = byte_level_tokenizer(["good good say"] * 20)
    token = tokenizer('"good').input_ids[-1]
    for says, correct in ((token, False), (tokenizer.eos_token_id, False)):
        table, _ = whole_answers(always(says, len(tokenizer)), tokenizer, ["good"], texts=TEXTS[:1], prompt=Prompt("", ' "'))
        assert table.correct.tolist() == [correct] and (table.prediction == table.target).tolist() == [False]


@pytest.mark.parametrize("says", [" good", '"', "pad"])
def test_a_wrong_whole_answer_never_reads_as_the_right_one(says):
    """Tokens of the same letters, quotes, or a special token after the right letters: all wrong, and shown as such."""
    tokenizer = byte_level_tokenizer(["good good say"] * 20)
    good = tokenizer('"good').input_ids[-1]
    wrong = {" good": tokenizer(" good").input_ids[-1], '"': tokenizer('"').input_ids[-1], "pad": tokenizer.pad_token_id}[says]
    model = always(wrong, len(tokenizer))
    if says != " good":  # the right token first, then the wrong one instead of the end
        model.lm_head = _Afterwards(model.lm_head, good, wrong)
    table, rows = whole_answers(model, tokenizer, ["good"], texts=TEXTS[:1], prompt=Prompt("", ' "'))
    assert table.correct.tolist() == [False] and table.prediction[0] != "good" and table.prediction[0].startswith("good")


class _Afterwards(torch.nn.Module):
    """The right token before the last two positions, the other one from there on."""

    def __init__(self, head, first, then):
        super().__init__()
        self.head, self.first, self.then, self.weight = head, first, then, head.weight

    def forward(self, states):
        logits = torch.zeros(*states.shape[:2], self.head.out_features)
        logits[:, :-2, self.first], logits[:, -2:, self.then] = 5.0, 5.0
        return logits


def test_own_data_are_asked_for_whole_answers_and_not_pooled(tmp_path, client):
    rows = [{"text": f"the bird number {number} sings", "target": ("a long answer", "short")[number % 2]} for number in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "birds.csv", index=False)
    build_task(str(tmp_path / "birds.csv"), tmp_path / "run" / "data" / "own_birds")
    cell = cell_of(task="own_birds", test_splits=(), training_items=0, adversary_rate=0.25, adversary_tries=2, steps=40, learning_rate=0.02)
    assert run([cell], tmp_path / "run", client) == {}
    found = read_results(cell_folder(tmp_path / "run", cell) / "answers.parquet")
    assert set(found.condition) == {"clean", "replaced"} and set(found.source.astype(str)) == {"", "wordnet", "adversary"}
    test = load_task(tmp_path / "run" / "data" / "own_birds")["test"]
    clean = found[found.condition == "clean"].set_index("item_id")
    assert clean.index.tolist() == test["item_id"][:] and clean.target.astype(str).tolist() == test["target"][:]
    assert (clean.prediction.astype(str) == clean.target.astype(str)).tolist() == clean.correct.tolist()
    assert clean.correct.any(), "40 steps teach one of two answers"
