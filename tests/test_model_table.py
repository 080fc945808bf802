"""The table of models against the published facts, the rule for all others, and the prompts."""
from statistics import median

import pytest

from carma_lib.losses import CarmaConfig
from carma_lib.models.table import find_model, prompt_for, read_table, settings_for
from carma_lib.pooling import start_layers_from_depth

# model, kind → λ, end layer, batch, epochs, seeds: the ablation runs of the paper's repository
PUBLISHED = {
    ("gpt2", "sentiment"): (.4, 3, 16, 2, (32,)),
    ("gpt2-large", "inverse_dictionary"): (.3, 8, 32, 2, (42, 60)),
    ("gpt2-large", "sentiment"): (.4, 12, 16, 2, (32, 123, 42, 60)),
    ("gemma-2b", "inverse_dictionary"): (.3, 10, 16, 2, (32, 123, 42, 60)),
    ("gemma-2b", "sentiment"): (.3, 7, 16, 2, (32, 123, 42, 60)),
    ("Llama-3.2-1B", "inverse_dictionary"): (.4, 7, 32, 2, (32, 123, 42, 60)),
    ("Llama-3.2-1B", "sentiment"): (.3, 8, 32, 2, (32, 123, 42, 60)),
    ("Qwen2.5-0.5B", "inverse_dictionary"): (.5, 5, 64, 3, (32, 123, 111, 42, 60)),
    ("Qwen2.5-0.5B", "sentiment"): (.5, 3, 16, 2, (32, 123, 111, 42, 60)),
    ("Qwen2.5-3B", "inverse_dictionary"): (.5, 10, 32, 2, (32, 123, 111, 42, 60)),
    ("Qwen2.5-3B", "sentiment"): (.5, 10, 32, 2, (32, 123, 111, 42, 60)),
}


def chosen(name, kind):
    return settings_for(name, kind, num_layers=find_model(name)["blocks"])


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_published_settings_are_taken_as_they_are(name, kind):
    found = chosen(name, kind)
    assert (found.carma_weight, found.last_layer, found.batch_size, found.epochs, found.seeds) == PUBLISHED[name, kind]
    assert {"carma_weight", "last_layer", "batch_size", "epochs", "seeds", "learning_rate"} <= set(found.published)
    assert (found.learning_rate, found.warmup_steps) == (6e-5, 500)
    assert (found.mi_weight, found.stability_weight) == (.2, .3)


def test_nothing_else_is_called_published():
    for model in read_table()["models"]:
        for kind in read_table()["prompts"]:
            if (model["id"].split("/")[-1], kind) not in PUBLISHED:
                found = chosen(model["id"], kind)
                assert found.published == ()
                assert set(found.defaults) == set(read_table()["common"])


def test_the_rule_for_others_is_the_median_of_the_published():
    scaled, values = read_table()["scaled"], list(PUBLISHED.values())
    assert scaled["carma_weight"] == median(each[0] for each in values)
    assert scaled["batch_size"] == median(each[2] for each in values)
    assert scaled["epochs"] == median(each[3] for each in values)
    shares = [value[1] / find_model(name)["blocks"] for (name, _), value in PUBLISHED.items()]
    assert scaled["last_layer_share"] == round(median(shares), 1) and round(median(shares), 2) == 0.28
    counts = {seed: sum(seed in each[4] for each in values) for each in values for seed in each[4]}
    assert set(scaled["seeds"]) == set(sorted(counts, key=counts.get)[-4:])


@pytest.mark.parametrize(("blocks", "last"), [(2, 1), (4, 1), (12, 4), (28, 8), (80, 24)])
def test_any_other_model_is_scaled_from_its_depth(blocks, last):
    found = settings_for("some/folder/of-mine", "sentiment", num_layers=blocks)
    assert found.last_layer == last and found.carma_weight == 0.4 and "last_layer" not in found.published
    CarmaConfig(mi_layers=(0, last), stability_layers=(0, last)).for_depth(blocks)


def test_a_known_name_with_another_depth_is_another_model():
    assert settings_for("my/gpt2", "sentiment", num_layers=12).last_layer == 3
    found = settings_for("my/gpt2", "sentiment", num_layers=4)
    assert found.last_layer == 1 and "carma_weight" not in found.published


def test_pooling_starts_by_our_rule_are_the_published_ones_where_depth_was_followed():
    published = {"gpt2-large": [1, 8, 17, 26, 35], "gemma-2b": [1, 4, 8, 13, 17], "Llama-3.2-1B": [1, 3, 7, 11, 15], "Qwen2.5-3B": [1, 8, 17, 26, 35]}
    for name, layers in published.items():
        assert start_layers_from_depth(find_model(name)["blocks"]) == layers


def test_what_pip_fetches_is_scaled_from_its_depth_with_its_family_s_prompts():
    for name, blocks, last in (("smollm2-135m", 30, 9), ("gemma3-270m", 18, 5)):
        found = settings_for(name, "inverse_dictionary", num_layers=blocks)
        assert (found.last_layer, found.carma_weight, found.published) == (last, 0.4, ())
        family = find_model(name)["family"]
        assert prompt_for("inverse_dictionary", family, pretrained=True) == ("", ' is called a "')
        assert prompt_for("sentiment", family, pretrained=True).suffix == "] ="
    assert find_model("smollm2-135m")["id"] == "smollm2-135m"
    assert find_model("HuggingFaceTB/SmolLM2-135M")["id"] == "HuggingFaceTB/SmolLM2-135M"


def test_prompts():
    assert prompt_for("inverse_dictionary").suffix == ' is called a "'
    assert prompt_for("inverse_dictionary", "qwen2", pretrained=True).suffix == ' is commonly known as "'
    assert prompt_for("inverse_dictionary", "qwen2") == prompt_for("inverse_dictionary")
    assert prompt_for("sentiment", "llama", pretrained=True).suffix == "] ="
    assert prompt_for("sentiment", "gpt_neox", pretrained=True) == ("The sentiment of ", ' is "')


def test_refusals():
    with pytest.raises(ValueError, match="unknown kind of task 'translation'; the kinds are"):
        prompt_for("translation")
    with pytest.raises(ValueError, match="unknown kind of task 'translation'"):
        settings_for("gpt2", "translation", num_layers=12)
    with pytest.raises(ValueError, match="has 1 decoder block; CARMA compares layers"):
        settings_for("mine", "sentiment", num_layers=1)
