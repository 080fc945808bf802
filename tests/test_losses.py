"""The terms against a restatement with plain loops, their properties, and every bad input at the door."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from carma_lib.losses import terms
from carma_lib.losses import CarmaConfig, CarmaLoss, mutual_information_loss, stability_loss
from carma_lib.losses.negatives import sample_negatives


def naive_mutual_information(states, ids, mask, temperature, similarity, negatives_of):
    """The formula, pair by pair; `negatives_of(row, anchor)` gives the negatives' positions."""
    layer_means = []
    for layer in states:
        costs = []
        for row in range(ids.shape[0]):
            real = [t for t in range(ids.shape[1]) if mask[row, t]]

            def score(a, b):
                x, y = layer[row, a], layer[row, b]
                product = (x * y).sum()
                return (product / (x.norm() * y.norm()) if similarity == "cosine" else product) / temperature

            for i in real:
                for j in real:
                    if i < j and ids[row, i] >= 0 and ids[row, i] == ids[row, j]:
                        positive = score(i, j).exp()
                        rest = sum((score(i, n).exp() for n in negatives_of(row, i)), torch.zeros(()))
                        costs.append(-(positive / (positive + rest)).log())
        layer_means.append(sum(costs) / len(costs) if costs else layer.sum() * 0)
    return sum(layer_means) / len(layer_means)


def naive_stability(states, mask):
    total = 0
    for before, after in zip(states, states[1:]):
        moved, size_before, size_after, values = 0, 0, 0, 0
        for row in range(mask.shape[0]):
            for t in range(mask.shape[1]):
                if mask[row, t]:
                    moved = moved + ((after[row, t] - before[row, t]) ** 2).sum()
                    size_before = size_before + (before[row, t] ** 2).sum()
                    size_after = size_after + (after[row, t] ** 2).sum()
                    values += before.shape[-1]
        total = total + (moved / values) / (size_before / values + size_after / values + 1e-8)
    return total


def random_case(seed, layers=None, dtype=torch.float64):
    """Random sizes, padding on either side, constituents that need not be contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    layers = layers or number(1, 3)
    rows, tokens, width = number(1, 4), number(1, 9), number(2, 6)
    states = torch.randn(layers, rows, tokens, width, generator=generator, dtype=dtype).requires_grad_()
    ids = torch.randint(-1, 4, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        padding = number(0, tokens - 1)
        if number(0, 1):
            mask[row, :padding] = 0
        else:
            mask[row, tokens - padding :] = 0
    return states, ids, mask


def value_and_gradient(loss, states):
    (gradient,) = torch.autograd.grad(loss, states)
    return loss.detach(), gradient


def eligible_negatives(ids, mask):
    real = mask.bool()
    return (ids[:, :, None] != ids[:, None, :]) & (ids[:, :, None] >= 0) & real[:, :, None] & real[:, None, :]


def drawn_negatives(ids, mask, number, seed, documents=None):
    """The draw as a mask (row, anchor, negative)."""
    drawn = sample_negatives(
        ids, mask, number, document_ids=documents, generator=torch.Generator().manual_seed(seed)
    )
    return torch.nn.functional.one_hot(drawn + 1, ids.shape[1] + 1)[..., 1:].sum(2).bool()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("num_negatives", [None, 1, 3])
def test_mutual_information_equals_the_formula(similarity, num_negatives):
    for seed in range(50):
        states, ids, mask = random_case(seed)
        chosen = eligible_negatives(ids, mask)
        if num_negatives:
            chosen = drawn_negatives(ids, mask, num_negatives, seed)
        fast = mutual_information_loss(
            states,
            ids,
            mask,
            temperature=0.5,
            num_negatives=num_negatives,
            similarity=similarity,
            generator=torch.Generator().manual_seed(seed),
        )
        slow = naive_mutual_information(
            states, ids, mask, 0.5, similarity, lambda row, i: chosen[row, i].nonzero().flatten().tolist()
        )
        for ours, formula in zip(value_and_gradient(fast, states), value_and_gradient(slow, states)):
            torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-9, msg=f"case {seed}")


@pytest.mark.parametrize("num_negatives", [None, 2])
def test_documents_are_rows_of_their_own_and_chunks_change_nothing(num_negatives, monkeypatch):
    """Rows cut into documents that need not be neighbours, computed two numbers at a time."""
    monkeypatch.setattr(terms, "CHUNK", 2)
    monkeypatch.setattr(terms, "EDGES", 2)
    for seed in range(50):
        states, ids, mask = random_case(seed)
        documents = torch.randint(0, 3, ids.shape, generator=torch.Generator().manual_seed(seed))
        eligible = eligible_negatives(ids, mask) & (documents[:, :, None] == documents[:, None])
        chosen = drawn_negatives(ids, mask, num_negatives, seed, documents) if num_negatives else eligible
        assert not (chosen & ~eligible).any()
        fast = mutual_information_loss(
            states, ids, mask, num_negatives=num_negatives, document_ids=documents, temperature=0.5,
            generator=torch.Generator().manual_seed(seed),
        )
        slow = naive_mutual_information(
            states, ids + 10 * documents * (ids >= 0), mask, 0.5, "cosine",
            lambda row, i: chosen[row, i].nonzero().flatten().tolist(),
        )
        for ours, formula in zip(value_and_gradient(fast, states), value_and_gradient(slow, states)):
            torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-9, msg=f"case {seed}")


def test_a_packed_row_equals_its_documents_in_rows_of_their_own():
    states = torch.randn(2, 1, 8, 5, dtype=torch.float64)
    ids, documents = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 2]]), torch.tensor([[4, 4, 4, 7, 7, 7, 7, 7]])
    apart = torch.stack([F.pad(states[:, 0, :3], (0, 0, 0, 2)), states[:, 0, 3:]], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for negatives in (None, 99):
        torch.testing.assert_close(
            mutual_information_loss(states, ids, torch.ones_like(ids), num_negatives=negatives, document_ids=documents),
            mutual_information_loss(apart, torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 2]]), mask, num_negatives=None),
        )


def test_many_drawn_tokens_are_all_of_them():
    for seed in range(20):
        states, ids, mask = random_case(seed)
        values = [mutual_information_loss(states, ids, mask, num_negatives=k) for k in (None, ids.shape[1], 10**6)]
        values.append(mutual_information_loss(states, ids, mask, num_negatives=max(1, ids.shape[1] - 1)))
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])


@pytest.mark.parametrize("num_negatives", [None, 5])
def test_a_word_of_many_tokens_needs_no_more_memory_than_others(num_negatives):
    """A constituent of 800 tokens has 319,600 pairs, more than are kept: a step keeps the states and a sum of each token."""
    states = torch.randn(1, 1, 900, 4, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.arange(900).sub(799).clamp_min(0)[None], torch.ones(1, 900).long()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fast = mutual_information_loss(states, ids, mask, num_negatives=num_negatives)
    step = fast.grad_fn
    while "_Terms" not in type(step).__name__:
        step = step.next_functions[0][0]
    assert sum(kept) == states.numel() and step.batch.few is None
    assert [tensor.numel() for tensors in step.kept.values() for tensor in tensors] == [900]
    if num_negatives is None:
        scores = F.normalize(states[0, 0], dim=-1) @ F.normalize(states[0, 0], dim=-1).T / 0.1
        costs = F.softplus(scores[:800, 800:].logsumexp(1, keepdim=True) - scores[:800, :800])
        slow = costs[torch.ones(800, 800).triu(1).bool()].mean()
        for ours, formula in zip(value_and_gradient(fast, states), value_and_gradient(slow, states)):
            torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-9)
    else:
        assert torch.isfinite(value_and_gradient(fast, states)[1]).all()


def test_gradients_can_be_taken_twice_and_of_some_layers_only():
    states, ids, mask = random_case(8, layers=3)
    total = mutual_information_loss(states, ids, mask, num_negatives=None) + stability_loss(states, mask)
    first = torch.autograd.grad(total, states, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, states)[0]) and first.abs().sum() > 0
    leaves = [layer.detach().requires_grad_(index == 1) for index, layer in enumerate(states)]
    total = mutual_information_loss(leaves, ids, mask, num_negatives=None) + stability_loss(leaves, mask)
    total.backward()
    torch.testing.assert_close(leaves[1].grad, first[1])
    assert leaves[0].grad is leaves[2].grad is None


def test_scalars_are_read_with_the_check():
    outputs, ids, mask = torch.randn(4, 1, 3, 4), torch.tensor([[0, 0, 1]]), torch.ones(1, 3).long()
    for weight in (0.5, 0):
        found = CarmaLoss(CarmaConfig(carma_weight=weight))(
            outputs, ids, mask, read=(torch.tensor(0.25, requires_grad=True), torch.tensor(3))
        )
        assert found.read == (0.25, 3.0)
    assert CarmaLoss(CarmaConfig())(outputs, ids, mask).read == ()


def test_stability_equals_the_formula():
    for seed in range(100):
        states, _, mask = random_case(seed, layers=2 + seed % 3)
        slow = value_and_gradient(naive_stability(states, mask), states)
        for ours, formula in zip(value_and_gradient(stability_loss(states, mask), states), slow):
            torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-9, msg=f"case {seed}")
        mean = stability_loss(states, mask, reduction="mean")
        torch.testing.assert_close(mean * (len(states) - 1), slow[0])


def test_padding_has_no_gradient_and_may_hold_anything():
    states, ids, mask = random_case(3, layers=3)
    ids[0, mask[0] == 1] = 0
    padded = torch.cat([torch.full_like(states[:, :, :2], float("nan")), states], 2).detach().requires_grad_()
    more_ids = torch.cat([torch.zeros_like(ids[:, :1]).expand(-1, 2), ids], 1)
    more_mask = torch.cat([torch.zeros_like(mask[:, :1]).expand(-1, 2), mask], 1)
    for term in (
        lambda s, i, m: mutual_information_loss(s, i, m, num_negatives=None),
        lambda s, i, m: stability_loss(s, m),
    ):
        value, gradient = value_and_gradient(term(states, ids, mask), states)
        padded_value, padded_gradient = value_and_gradient(term(padded, more_ids, more_mask), padded)
        torch.testing.assert_close(padded_value, value)
        torch.testing.assert_close(padded_gradient[:, :, 2:], gradient)
        assert (padded_gradient[:, more_mask == 0] == 0).all() and gradient.abs().sum() > 0


def test_order_of_the_batch_does_not_matter():
    for seed in range(20):
        states, ids, mask = random_case(seed, layers=2)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            mutual_information_loss(states, ids, mask, num_negatives=None),
            mutual_information_loss(states[:, order], ids[order], mask[order], num_negatives=None),
        )
        torch.testing.assert_close(
            stability_loss(states, mask), stability_loss(states[:, order], mask[order])
        )


def test_rows_are_never_mixed():
    """With one pair a row and exact negatives, the batch's value is the mean of its rows' values."""
    states = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, -1], [5, 1, 5, 2], [-1, 7, 3, 7]])
    mask = torch.ones_like(ids)
    rows = [
        mutual_information_loss(states[:, [row]], ids[[row]], mask[[row]], num_negatives=None)
        for row in range(3)
    ]
    torch.testing.assert_close(
        mutual_information_loss(states, ids, mask, num_negatives=None), torch.stack(rows).mean()
    )


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1, 2, 3]],  # every word one token
        [[-1, -1, -1, -1]],  # no constituent at all
        [[0, -1, -1, 0]],  # the pair's second token is padding
    ],
)
def test_no_pair_is_zero_with_a_gradient_path(ids):
    states = torch.randn(2, 1, 4, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0]])
    value, gradient = value_and_gradient(mutual_information_loss(states, torch.tensor(ids), mask), states)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anchor_without_negative_costs_nothing():
    states = torch.randn(1, 1, 3, 4, requires_grad=True)
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        value, gradient = value_and_gradient(
            mutual_information_loss(states, ids, mask, num_negatives=None), states
        )
    assert value == 0 and (gradient == 0).all()


def test_zero_states_give_finite_gradients():
    states = torch.zeros(2, 1, 4, 3, requires_grad=True)
    ids, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.long)
    value, gradient = value_and_gradient(
        mutual_information_loss(states, ids, mask, num_negatives=None) + stability_loss(states, mask), states
    )
    assert math.isclose(value, math.log(3), rel_tol=1e-6) and torch.isfinite(gradient).all()


def test_wholly_padded_row_and_batch():
    states, ids = torch.randn(2, 2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    alone = stability_loss(states[:, :1], mask[:1])
    torch.testing.assert_close(stability_loss(states, mask), alone)
    nothing = torch.zeros_like(mask)
    assert stability_loss(states, nothing) == 0 and mutual_information_loss(states, ids, nothing) == 0


def test_sampling_is_uniform_without_replacement():
    """Every subset is as likely as every other: chi-square against the exact enumeration, 3,000 draws each."""
    ids = torch.tensor([3, -1, 0, 3, -1, 7, 0, 2, 5]).repeat(3000, 1)  # anchors 0 and 2; their partners 3 and 6
    mask = torch.ones_like(ids)
    mask[:, 7] = 0
    for number, bound in ((1, 24.3), (2, 38), (3, 48), (5, 24.3)):  # 0.9999 quantiles of chi-square
        drawn = sample_negatives(ids, mask, number, generator=torch.Generator().manual_seed(number))
        for anchor, eligible in ((0, {1, 2, 4, 5, 6, 8}), (2, {0, 1, 3, 4, 5, 8})):
            counts = Counter(frozenset(row) for row in drawn[:, anchor].tolist())
            subsets = [frozenset(subset) for subset in combinations(eligible, number)]
            assert set(counts) <= set(subsets)
            expected = 3000 / len(subsets)
            assert sum((counts[subset] - expected) ** 2 / expected for subset in subsets) < bound
        assert (drawn[:, [1, 3, 4, 5, 6, 7, 8]] == -1).all()
    for number in (6, 9, 99):
        drawn = sample_negatives(ids, mask, number)
        assert drawn.shape == (*ids.shape, number)
        assert (drawn[:, 0].sort(-1).values[:, -6:] == torch.tensor([1, 2, 4, 5, 6, 8])).all()
        assert ((drawn[:, 0] >= 0).sum(-1) == 6).all()


def test_sampled_value_follows_its_generator():
    states, ids, mask = (
        torch.randn(2, 2, 9, 4),
        torch.arange(9).div(3).long().repeat(2, 1),
        torch.ones(2, 9).long(),
    )

    def value(seed):
        return mutual_information_loss(
            states, ids, mask, num_negatives=2, generator=torch.Generator().manual_seed(seed)
        )

    assert value(1) == value(1) and value(1) != value(2)


@pytest.mark.parametrize(
    "dtype, inside",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_inside(dtype, inside):
    states, ids, mask = random_case(5, layers=2)
    states = states.detach().to(dtype).requires_grad_()
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            value = mutual_information_loss(states, ids, mask, num_negatives=None)
            moved = stability_loss(states, mask)
        exact = mutual_information_loss(states.to(inside), ids, mask, num_negatives=None)
        assert value.dtype == moved.dtype == inside
        assert value == exact and moved == stability_loss(states.to(inside), mask)
        assert torch.autograd.grad(value + moved, states)[0].dtype == dtype


def test_memory_grows_with_the_batch_not_its_square():
    """The largest tensor that autograd saves, per row; what a step keeps beside them has its bound in `EDGES`."""

    def largest(rows):
        sizes = []
        states = torch.randn(2, rows, 12, 4, requires_grad=True)
        ids, mask = torch.arange(12).div(2).long().repeat(rows, 1), torch.ones(rows, 12).long()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            mutual_information_loss(states, ids, mask) + stability_loss(states, mask)
        return max(sizes)

    assert largest(32) == 8 * largest(4)


def test_carma_loss_joins_the_terms():
    outputs, ids, mask = (
        torch.randn(6, 2, 7, 4),
        torch.tensor([[0, 0, 1, 1, 1, 2, -1]] * 2),
        torch.ones(2, 7).long(),
    )
    config = CarmaConfig(
        mi_layers=(1, 2), stability_layers=(2, 4), mi_weight=0.5, stability_weight=0.7, num_negatives=None
    )
    found = CarmaLoss(config)(tuple(outputs), ids, mask)
    torch.testing.assert_close(
        found.mutual_information, mutual_information_loss(outputs[2:4], ids, mask, num_negatives=None)
    )
    torch.testing.assert_close(found.stability, stability_loss(outputs[3:6], mask))
    torch.testing.assert_close(found.total, 0.5 * found.mutual_information + 0.7 * found.stability)
    unread = [state if index - 1 in config.layers else None for index, state in enumerate(outputs)]
    assert CarmaLoss(config)(unread, ids, mask) == found


@pytest.mark.parametrize("family", ["mamba", "rwkv", "llama"])
def test_tuples_of_models_with_and_without_their_embeddings(family):
    """State-space families leave the embeddings out of their tuple: None goes before it, as the docstring says."""
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, state_size=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).train()
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4][0]
    outputs = [None] * 4
    for layer, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, out, layer=layer: outputs.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
    ids, mask = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.ones(1, 6).long()
    states = model(torch.tensor([[5, 6, 7, 8, 9, 11]]), output_hidden_states=True).hidden_states
    loss = CarmaLoss(CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1), num_negatives=None))
    given = states if family == "llama" else (None, *states)
    assert loss(given, ids, mask) == loss((None, *outputs), ids, mask)
    assert family == "llama" or loss(states, ids, mask) != loss((None, *outputs), ids, mask)


def test_weights_of_zero_switch_terms_off():
    outputs, ids, mask = torch.randn(4, 1, 3, 4), torch.tensor([[0, 0, 1]]), torch.ones(1, 3).long()
    layers = dict(mi_layers=(0, 1), stability_layers=(1, 2))
    only_mi = CarmaConfig(mi_weight=1, stability_weight=0, **layers)
    only_stability = CarmaConfig(mi_weight=0, stability_weight=1, **layers)
    assert only_mi.layers == (0, 1) and only_stability.layers == (1, 2)
    found = CarmaLoss(only_mi)(outputs, ids, mask)
    assert found.stability == 0 and found.total == found.mutual_information > 0
    found = CarmaLoss(only_stability)(outputs, ids, mask)
    assert found.mutual_information == 0 and found.total == found.stability > 0
    assert CarmaConfig(carma_weight=0, mi_layers=(0, 99)).layers == ()
    assert CarmaLoss(CarmaConfig(carma_weight=0))(outputs, ids, mask).total == 0


def test_published_defaults():
    config = CarmaConfig()
    assert (config.carma_weight, config.mi_weight, config.stability_weight) == (0.2, 0.2, 0.3)
    assert config.mi_layers is config.stability_layers is None
    assert (config.temperature, config.num_negatives, config.similarity) == (0.1, 5, "cosine")
    assert CarmaConfig(mi_layers=[0, 3]) == CarmaConfig(mi_layers=(0, 3))


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(carma_weight=1.1), "carma_weight must lie between 0 and 1"),
        (dict(mi_weight=-0.1), "mi_weight must lie"),
        (dict(stability_weight=float("nan")), "stability_weight must lie"),
        (dict(mi_layers=(3, 1)), "mi_layers must be"),
        (dict(stability_layers=(-1, 2)), "stability_layers must be"),
        (dict(mi_layers=(1,)), "mi_layers must be"),
        (dict(stability_layers=(2, 2)), "at least two layers"),
        (dict(temperature=0), "temperature must be greater than 0"),
        (dict(num_negatives=0), "num_negatives must be"),
        (dict(num_negatives=2.5), "num_negatives must be"),
        (dict(similarity="euclidean"), "similarity must be one of"),
        (dict(temperature=1e-30), "temperature must be greater than 0, at least 1e-06"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(temperature=float("inf")), "temperature must be"),
        (dict(temperature="0.1"), "temperature must be"),
        (dict(temperature=True), "temperature must be"),
        (dict(carma_weight=True), "carma_weight must lie"),
        (dict(mi_weight="0.2"), "mi_weight must lie"),
        (dict(stability_weight=None), "stability_weight must lie"),
        (dict(carma_weight=float("inf")), "carma_weight must lie"),
        (dict(num_negatives=True), "num_negatives must be"),
        (dict(num_negatives=np.float64(5)), "num_negatives must be"),
        (dict(mi_layers=3), "mi_layers must be"),
        (dict(mi_layers="01"), "mi_layers must be"),
        (dict(mi_layers=(False, True)), "mi_layers must be"),
        (dict(mi_layers=()), "mi_layers must be"),
        (dict(stability_layers=(0, 1.5)), "stability_layers must be"),
    ],
)
def test_config_rejects(setting, message):
    with pytest.raises(ValueError, match=message):
        CarmaConfig(**setting)


def test_numbers_of_numpy_become_pythons():
    config = CarmaConfig(np.float32(0.5), mi_layers=np.array([0, 2]), num_negatives=np.int64(3), temperature=np.float64(1))
    assert config == CarmaConfig(0.5, mi_layers=(0, 2), num_negatives=3, temperature=1.0)
    assert {type(config.carma_weight), type(config.temperature)} == {float}
    assert {type(config.mi_layers[1]), type(config.num_negatives)} == {int}


@pytest.mark.parametrize("depth, last", [(2, 1), (3, 1), (4, 1), (5, 2), (12, 4), (30, 9), (80, 24)])
def test_open_layers_are_a_share_of_the_depth(depth, last):
    config = CarmaConfig().for_depth(depth)
    assert config.mi_layers == config.stability_layers == (0, last) and config.layers == tuple(range(last + 1))
    assert CarmaConfig(stability_layers=(0, 1)).for_depth(depth).mi_layers == (0, last)
    assert config.for_depth(depth) == config
    with pytest.raises(ValueError, match="for_depth"):
        CarmaConfig().layers
    assert CarmaConfig(carma_weight=0).for_depth(depth).layers == ()


def test_loss_with_open_layers_takes_the_share_of_its_tuple():
    states, ids, mask = torch.randn(13, 1, 4, 3), torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4).long()
    open_config = CarmaConfig(num_negatives=None)
    assert CarmaLoss(open_config)(states, ids, mask) == CarmaLoss(open_config.for_depth(12))(states, ids, mask)


def test_config_checks_the_depth():
    published = CarmaConfig(mi_layers=(0, 7), stability_layers=(0, 7))
    assert published.for_depth(8) == published
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        published.for_depth(4)
    with pytest.raises(ValueError, match="at least two layers"):
        CarmaConfig().for_depth(1)
    assert CarmaConfig(stability_weight=0).for_depth(1).layers == (0,)
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        CarmaLoss(published)([torch.randn(1, 2, 3)] * 4, torch.zeros(1, 2).long(), torch.ones(1, 2).long())


STATES, IDS, MASK = (
    torch.randn(2, 2, 3, 4),
    torch.zeros(2, 3, dtype=torch.long),
    torch.ones(2, 3, dtype=torch.long),
)


@pytest.mark.parametrize(
    "states, ids, mask, message",
    [
        (STATES[0], IDS, MASK, "layers × "),
        ([], IDS, MASK, "at least one layer"),
        ([STATES[0], STATES[0, :1]], IDS, MASK, "differ in shape"),
        (STATES.long(), IDS, MASK, "floating point"),
        ([STATES[0], STATES[1].long()], IDS, MASK, "floating point"),
        ([STATES[0], STATES[1].to(torch.complex64)], IDS, MASK, "floating point"),
        (STATES.to(torch.float8_e4m3fn), IDS, MASK, "at least 16 bits"),
        (None, IDS, MASK, "at least one layer"),
        (STATES, IDS, MASK.to(torch.complex64), "attention_mask must hold integers"),
        (STATES, IDS.to(torch.uint16), MASK, "constituent_ids must hold integers"),
        (STATES, IDS[:1], MASK, "constituent_ids has shape"),
        (STATES, IDS, MASK[:, :2], "attention_mask has shape"),
        (STATES, IDS.float(), MASK, "constituent_ids must hold integers"),
        (STATES, IDS, MASK.float(), "attention_mask must hold integers"),
        (STATES, IDS - 2, MASK, "constituent_ids must be −1"),
        (STATES / 0, IDS, MASK, "NaN or infinity"),
        (STATES[:, :0], IDS[:0], MASK[:0], "hidden_states are empty"),
        (STATES[:, :, :0], IDS[:, :0], MASK[:, :0], "hidden_states are empty"),
    ],
)
def test_bad_input(states, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        mutual_information_loss(states, ids, mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_seen_even_where_no_pair_uses_it(bad):
    states = torch.randn(2, 1, 4, 3)
    states[1, 0, 3, 2] = bad
    ids, mask = torch.tensor([[0, 0, 1, -1]]), torch.ones(1, 4).long()
    for call in (
        lambda: mutual_information_loss(states, ids, mask, num_negatives=1),
        lambda: stability_loss(states, mask),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


def test_scores_that_overflow_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="NaN or infinity"):
        mutual_information_loss(torch.full((1, 1, 3, 4), 1e17), IDS[:1], MASK[:1], similarity="dot", temperature=1e-6)


def test_bad_settings_of_the_functions():
    with pytest.raises(ValueError, match="temperature"):
        mutual_information_loss(STATES, IDS, MASK, temperature=-1)
    with pytest.raises(ValueError, match="reduction"):
        stability_loss(STATES, MASK, reduction="none")
    with pytest.raises(ValueError, match="at least 2"):
        stability_loss(STATES[:1], MASK)


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden_states": None}, "hidden_states is None: call the model with output_hidden_states=True"),
    ({"hidden_states": "embeddings"}, "hidden_states has 1 entry, and the layers follow"), ({"hidden_states": ()}, "hidden_states has 0 entr"),
    ({"attention_mask": None}, "attention_mask must be a tensor .batch, tokens., got NoneType"),
    ({"attention_mask": [[1, 1, 1]]}, "attention_mask must be a tensor"), ({"constituent_ids": None}, "constituent_ids must be a tensor"),
    ({"constituent_ids": [[0, 0, -1]]}, "constituent_ids must be a tensor")])
def test_a_loop_of_ones_own_is_told_what_is_missing(change, said):
    states = tuple(torch.randn(1, 3, 4) for _ in range(4))
    change = {name: states[:1] if value == "embeddings" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=said):
        CarmaLoss(CarmaConfig())(**{"hidden_states": states, "constituent_ids": torch.tensor([[0, 0, -1]]),
                                    "attention_mask": torch.ones(1, 3, dtype=torch.long), **change})
