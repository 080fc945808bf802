"""Small models, their tokenizers, loading, and clear refusals."""
import pytest
import torch
from transformers import AutoModelForCausalLM

from carma_lib.models import (PROMPTS, SMALL_FAMILIES, ModelNotFound, load_model, prompt_for, small_model,
                              train_tokenizer)

TEXTS = ["A small bird that eats fish", "The soup was unusually bland"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary_size=300, whole_tokens=["heron", "positive", "heron"])


def test_answers_are_one_token_and_text_comes_back(tokenizer):
    prompt = 'A small bird is called a "'
    before, after = tokenizer(prompt).input_ids, tokenizer(prompt + "heron").input_ids
    assert after[:-1] == before and tokenizer.decode(after[-1:]) == "heron"
    for text in (*TEXTS[:2], "naïve — “quoted” 日本"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_same_seed_same_weights_and_save_and_load(family, tokenizer, tmp_path):
    one, two, other = (small_model(family, tokenizer, layers=2, width=32, heads=2, seed=seed) for seed in (1, 1, 2))
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(first, second), name
    assert not all(torch.equal(first, second) for first, second in zip(one.parameters(), other.parameters()))
    one.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = load_model(str(tmp_path))
    assert again.padding_side == "left" and again("a heron").input_ids == tokenizer("a heron").input_ids
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    assert torch.equal(loaded.eval()(input_ids=ids).logits, one.eval()(input_ids=ids).logits)


def test_building_leaves_the_global_random_state_alone(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small_model("gpt2", tokenizer, layers=1, width=8, heads=1, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_small_gpt2_computes_what_gpt2_does(tokenizer):
    """The fused activation is GPT-2's own function."""
    ours = small_model("gpt2", tokenizer, layers=2, width=32, heads=2).eval()
    config = ours.config.from_dict({**ours.config.to_dict(), "activation_function": "gelu_new"})
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_prompts():
    assert prompt_for("inverse_dictionary").suffix == ' is called a "'
    assert prompt_for("inverse_dictionary", "qwen2", pretrained=True).suffix == ' is commonly known as "'
    assert prompt_for("inverse_dictionary", "qwen2") == prompt_for("inverse_dictionary")
    assert all("default" in by_family for by_family in PROMPTS.values())


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="unknown family 'bert'.*gpt2"):
        small_model("bert", tokenizer)
    with pytest.raises(ValueError, match="width 30 is not a multiple"):
        small_model("gpt2", tokenizer, width=30)
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(TEXTS, vocabulary_size=100)
    with pytest.raises(ModelNotFound, match="the folder holds none"):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFound, match="no local folder"):
        load_model("nobody/no-such-model")
    with pytest.raises(ValueError, match="unknown kind"):
        prompt_for("translation")
