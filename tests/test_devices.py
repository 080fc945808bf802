"""What reads a model builds its tensors where the model is: the same values on a stand-in for a second device."""
import numpy as np
import pytest
import torch
from datasets import Dataset
from elsewhere import THERE, There, elsewhere, moved
from tiny import TEXTS, byte_level_tokenizer, tiny_model

from carma_lib.collate import Collator, encode
from carma_lib.lab.drift import hidden_state_drift, perplexity
from carma_lib.lab.mechanism import final_states, token_mutual_information
from carma_lib.losses import CarmaConfig, CarmaLoss
from carma_lib.pooling import pooling_grid
from carma_lib.words import WordTable, document_ids

TOKENIZER = byte_level_tokenizer()
ROWS = encode(Dataset.from_list([{"text": text, "target": "a"} for text in TEXTS]), TOKENIZER, suffix=' is called a "').to_list()
BATCHES = [Collator(TOKENIZER)(ROWS[first:first + 3]) for first in (0, 3)]


def measures(model, start):
    drift = hidden_state_drift(model, start, BATCHES)
    return [drift.to_numpy(), perplexity(model, BATCHES), token_mutual_information(model, BATCHES),
            final_states(model, BATCHES, [[0, 1, 2], [3, 4, 5]])]


def pooled(model, start):
    batch = BATCHES[0]  # which the grid brings to the model
    grid = pooling_grid(model, batch["input_ids"], batch["attention_mask"], batch["constituent_ids"], start_layers=[0, 1])
    return [grid.clean, *grid.pooled.values(), grid.changed]


def terms(model, start):
    batch = {name: tensor.to(model.device) for name, tensor in BATCHES[0].items() if name != "target_ids"}
    ids, mask, table = batch["input_ids"], batch["attention_mask"], WordTable(TOKENIZER)
    found = []
    for number in (2, None):
        documents = document_ids(batch["position_ids"], mask, ids, end_of_document=TOKENIZER.eos_token_id)
        states = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        generator = torch.Generator(ids.device).manual_seed(0)
        total = CarmaLoss(CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1), num_negatives=number))(
            states, table.constituent_ids(ids, mask, documents), mask, document_ids=documents, generator=generator).total
        found += [total, torch.autograd.grad(total, model.get_input_embeddings().weight)[0]]
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("of", [measures, pooled, terms])
def test_a_model_elsewhere_gives_the_same(monkeypatch, family, of):
    models = tiny_model(family), tiny_model(family, seed=1)
    here = of(*models)
    with elsewhere(monkeypatch):
        there = of(*map(moved, models))
        assert models[0].device == THERE
    assert len(here) == len(there)
    for one, other in zip(here, there):
        assert not isinstance(one, torch.Tensor) or isinstance(other, There)
        one, other = (each.inner if isinstance(each, There) else each for each in (one, other))
        one, other = (np.asarray(each.detach() if isinstance(each, torch.Tensor) else each) for each in (one, other))
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_the_stand_in_refuses_to_mix(monkeypatch):
    model = tiny_model("llama")
    with elsewhere(monkeypatch):
        model = moved(model)
        with pytest.raises(RuntimeError, match="on the same device"):
            model(BATCHES[0]["input_ids"])
        there = torch.arange(3, device=THERE)
        with pytest.raises(RuntimeError, match="on the same device"):
            there + torch.arange(3)
        assert (there + 1).inner.tolist() == [1, 2, 3] and there.cpu().tolist() == [0, 1, 2]
