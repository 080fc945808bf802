"""A notebook's parameters → settings: gaps filled from the table, ours and published told apart, refusals."""
import pytest
import torch

from carma_lib.losses import CarmaConfig
from carma_lib.models import ModelNotFound, small_model, train_tokenizer
from carma_lib.lab.settings import Settings, fill

OPEN = dict(seeds=[], steps={}, epochs=0, batch_size=-1, learning_rate=-1, warmup_steps=-1, carma_weight=-1,
            mi_weight=-1, stability_weight=-1, mi_layers=[], stability_layers=[])
CARMA = CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tokenizer = train_tokenizer(["a small bird"] * 5, vocabulary_size=300)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    small_model("gpt2", tokenizer, layers=12, width=8, heads=1).save_pretrained(folder)
    return str(folder)


def test_gaps_are_filled_and_their_source_is_told(start):
    filled = fill("sentiment", {**OPEN, "start": start})
    settings = filled.settings
    assert (settings.epochs, settings.batch_size, settings.warmup_steps, settings.learning_rate) == (2, 16, 500, 6e-5)
    assert filled.seeds == (32,) and settings.carma.mi_layers == (0, 3) and settings.carma.carma_weight == 0.4
    defaults = {name for name, source in filled.filled.items() if source == "published default"}
    assert defaults == {"mi_weight", "stability_weight"} and set(filled.filled.values()) == {"published", "published default"}
    assert fill("inverse_dictionary", {**OPEN, "start": start}).filled["batch_size"] == "ours"
    table = filled.table().set_index("setting")
    assert table.value["seeds"] == "32," and "steps" not in table.index and table.source["epochs"] == "published"


def test_what_is_given_wins(start):
    filled = fill("sentiment", {**OPEN, "start": start, "steps": {"sentiment": 4}, "batch_size": 8, "seeds": [7],
                                "carma_weight": 0.0})
    assert (filled.settings.steps, filled.settings.epochs, filled.settings.batch_size) == (4, 0, 8)
    assert filled.seeds == (7,) and filled.settings.carma.carma_weight == 0
    assert not {"seeds", "batch_size", "epochs", "carma_weight"} & set(filled.filled)
    assert filled.table().set_index("setting").source["batch_size"] == "given"


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(start="random"), "no value for seeds, batch_size.*give one, or a pretrained start"),
    (dict(start="random", layers=1), "no value for"),
    (dict(stepps=3), "unknown setting 'stepps'; there are accumulation"),
])
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        fill("sentiment", {**OPEN, **wrong})


def test_steps_and_epochs_exclude_each_other(start):
    with pytest.raises(ValueError, match="steps and epochs are both given for sentiment"):
        fill("sentiment", {**OPEN, "start": start, "steps": {"sentiment": 4}, "epochs": 1})


def test_no_model_no_settings(tmp_path):
    with pytest.raises(ModelNotFound, match="the folder holds none"):
        fill("sentiment", {**OPEN, "start": str(tmp_path)})


def test_steps_of_epochs_and_rows_of_a_pass():
    settings = Settings(carma=CARMA, epochs=3, batch_size=8, accumulation=2, processes=2)
    assert settings.training_steps(17) == 9 and settings.rows_a_pass == 2
    assert Settings(carma=CARMA, steps=5).training_steps(17) == 5


def test_weights_are_bf16_only_where_they_are_frozen():
    assert Settings(carma=CARMA, precision="bf16").start_dtype == torch.float32
    assert Settings(carma=CARMA, precision="bf16", adapter="lora").start_dtype == torch.bfloat16
    assert Settings(carma=CARMA, adapter="lora", precision="float32").start_dtype == torch.float32


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(steps=0), "steps is 0"), (dict(learning_rate=0), "learning_rate must be above 0"),
    (dict(training_items=-1), "at least 0"), (dict(layers=1), "lower mi_layers"), (dict(epochs=-1), "at least 0"),
    (dict(precision="fp8"), "precision is 'fp8'; it must be one of auto"), (dict(adapter="ia3"), "one of none, lora"),
    (dict(adapter="qlora", processes=2), "a start of 4 bits is not sharded"),
    (dict(batch_size=8, accumulation=3), "not a multiple of accumulation × processes = 3")])
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(carma=CARMA, **wrong)
