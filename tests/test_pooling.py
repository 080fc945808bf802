"""Constituent-Aware Pooling against a restatement that runs one unpadded row block by block."""
import copy
import itertools
from functools import partial

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from carma_lib.pooling import (
    PROTOCOLS, _pool, constituent_aware_pooling, pooled_positions, pooling_grid,
    start_layers_from_depth,
)

SETTINGS = {
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "layer_types": ["full_attention"] + 2 * ["sliding_attention"]},
}
# Families that the restatement below runs block by block, and where their blocks are.
BLOCKS = {"gpt2": "h"} | dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt_neox", "olmo2", "smollm3"), "layers"
)
NO_SDPA = ("gemma2", "sdpa")  # Gemma 2 caps its attention scores
FORMS = [(family, form) for family in BLOCKS for form in ("eager", "sdpa") if (family, form) != NO_SDPA]
# Constituents of one to four tokens, tokens of none, constituents at the prompt's end, a prompt of one token.
CONSTITUENTS = [
    [-1, 0, 0, 1, -1, 2, 2, 2, 3, 3, -1, 4, 4, 4, 4, -1],
    [5, 5, -1, 7, 7, 7, 7],
    [-1, 0, 0],
    [0, 1, 2, 3, -1, -1, 4, 9, 9],
    [0],
]


def make_model(family: str, form: str = "eager"):
    """A tiny model with weights large enough for positions and attention to matter."""
    config = tiny_config(family)
    for name, value in SETTINGS.get(family, {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=form)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_batch(constituents=CONSTITUENTS, side: str = "left", seed: int = 0):
    """input_ids, attention_mask, constituent_ids of random tokens; padding holds arbitrary values."""
    longest = max(map(len, constituents))
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 300, (len(constituents), longest), generator=generator)
    mask, ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, values in enumerate(constituents):
        where = slice(longest - len(values), None) if side == "left" else slice(len(values))
        mask[row, where] = 1
        ids[row, where] = torch.tensor(values)
    return input_ids, mask, ids


def clean_logits(model, input_ids):
    """Logits after the last token of each unpadded row (list of 1-D tensors)."""
    with torch.no_grad():
        return torch.stack([model(row.unsqueeze(0)).logits[0, -1] for row in input_ids])


def real_tokens(values, mask):
    return [row[keep.bool()] for row, keep in zip(values, mask)]


def naive_pool(stream, ids, protocol):
    """(tokens, width) → (pooled tokens, width), by a loop over tokens."""
    groups = []
    for token, vector in enumerate(stream):
        alone = token == len(stream) - 1 or ids[token] < 0
        if not alone and token > 0 and ids[token] == ids[token - 1]:
            groups[-1].append(vector)
        else:
            groups.append([vector])
    pool = {"sum": torch.Tensor.sum, "mean": torch.Tensor.mean, "max": torch.Tensor.amax}[protocol]
    return torch.stack([pool(torch.stack(group), dim=0) for group in groups])


def naive_mask(config, block, tokens):
    """Additive causal mask (1, 1, tokens, tokens) of one block, entry by entry."""
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "layer_types", None) and config.layer_types[block] == "full_attention":
        window = None
    mask = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min)
    for query, key in itertools.product(range(tokens), repeat=2):
        if key <= query and (not window or query - key < window):
            mask[0, 0, query, key] = 0
    return mask


def naive_logits(model, input_ids, ids, start_layer, protocol):
    """One unpadded row through the blocks one by one, pooled before `start_layer`."""
    base, config = model.base_model, model.config
    stream = model(input_ids.unsqueeze(0), output_hidden_states=True).hidden_states[0]
    for index, block in enumerate(getattr(base, BLOCKS[config.model_type])):
        if index == start_layer:
            stream = naive_pool(stream[0], ids, protocol).unsqueeze(0)
        arguments = {"attention_mask": naive_mask(config, index, stream.shape[1])}
        if config.model_type != "gpt2":
            positions = torch.arange(stream.shape[1]).unsqueeze(0)
            arguments["position_ids"] = positions
            arguments["position_embeddings"] = base.rotary_emb(stream, positions)
        output = block(stream, **arguments)
        stream = output[0] if isinstance(output, tuple) else output
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(config.model_type, "norm")
    logits = model.get_output_embeddings()(getattr(base, norm)(stream[:, -1]))
    cap = getattr(config, "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits)[0]


@pytest.mark.parametrize("family, form", FORMS)
def test_equals_blocks_run_one_by_one(family, form):
    model = make_model(family, form)
    input_ids, mask, ids = make_batch()
    grid = pooling_grid(model, input_ids, mask, ids, start_layers=range(3))
    assert set(grid.pooled) == set(itertools.product(range(3), PROTOCOLS))
    rows = list(zip(real_tokens(input_ids, mask), real_tokens(ids, mask)))
    torch.testing.assert_close(grid.clean, clean_logits(model, [row for row, _ in rows]), atol=1e-4, rtol=0)
    with torch.no_grad():
        for (layer, protocol), logits in grid.pooled.items():
            expected = torch.stack([naive_logits(model, *row, layer, protocol) for row in rows])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert (logits - grid.clean)[:2].abs().amax(dim=1).min() > 1e-2  # pooling did change these rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, form", FORMS)
def test_identity_pooling_equals_the_clean_model(family, form, side):
    model = make_model(family, form)
    input_ids, mask, ids = make_batch(side=side)
    expected = clean_logits(model, real_tokens(input_ids, mask))
    of_none, of_one_token = torch.full_like(ids, -1), torch.arange(ids.shape[1]).expand_as(ids)
    for identity in (of_none, of_one_token):
        grid = pooling_grid(model, input_ids, mask, identity, start_layers=range(3))
        assert grid.changed.tolist() == [0] * len(ids)
        for logits in (grid.clean, *grid.pooled.values()):
            assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_row_depends_neither_on_its_batch_nor_on_the_padding_side(family):
    model = make_model(family, "sdpa")
    left, right = make_batch(side="left"), make_batch(side="right")
    right[0][right[1].bool()] = left[0][left[1].bool()]  # the same tokens
    together = pooling_grid(model, *left, start_layers=[0, 2])
    padded_right = pooling_grid(model, *right, start_layers=[0, 2])
    for row in range(len(CONSTITUENTS)):
        keep = left[1][row].bool()
        alone = pooling_grid(model, *(tensor[row:row + 1, keep] for tensor in left), start_layers=[0, 2])
        for grid in (together, padded_right):
            assert grid.changed[row] == alone.changed[0]
            torch.testing.assert_close(alone.clean[0], grid.clean[row], atol=1e-4, rtol=0)
            for key, logits in alone.pooled.items():
                torch.testing.assert_close(logits[0], grid.pooled[key][row], atol=1e-4, rtol=0)


def test_what_stands_in_padding_is_ignored():
    model = make_model("gpt2")
    input_ids, mask, ids = make_batch()
    padding = mask == 0
    first = pooling_grid(model, input_ids, mask, ids, start_layers=[1])
    second = pooling_grid(
        model, input_ids.masked_fill(padding, 7), mask, ids.masked_fill(padding, 3), start_layers=[1]
    )
    assert all(torch.equal(first.pooled[key], second.pooled[key]) for key in first.pooled)


def test_single_run_is_the_grid_entry():
    model, batch = make_model("llama"), make_batch()
    grid = pooling_grid(model, *batch, start_layers=[2, 1, 2], protocols=["max", "sum"])
    assert list(grid.pooled) == [(2, "max"), (2, "sum"), (1, "max"), (1, "sum")]
    for (layer, protocol), logits in grid.pooled.items():
        single = constituent_aware_pooling(model, *batch, start_layer=layer, protocol=protocol)
        assert torch.equal(single, logits)


def test_pooled_positions_and_tokens_pooled_away():
    for side in ("left", "right"):
        _, mask, ids = make_batch(side=side)
        positions = [row.tolist() for row in real_tokens(pooled_positions(mask, ids), mask)]
        assert positions == [
            [0, 1, 1, 2, 3, 4, 4, 4, 5, 5, 6, 7, 7, 7, 7, 8],
            [0, 0, 1, 2, 2, 2, 3],  # the last token stays alone
            [0, 1, 2],
            [0, 1, 2, 3, 4, 5, 6, 7, 8],
            [0],
        ]
        assert (pooled_positions(mask, ids)[mask == 0] == -1).all()
        grid = pooling_grid(make_model("gpt2"), *make_batch(side=side), start_layers=[0], protocols=["sum"])
        assert grid.changed.tolist() == [7, 3, 0, 0, 0]


def test_one_clean_pass_and_then_only_the_blocks_above_each_start_layer():
    model, calls = make_model("gpt2"), [0, 0, 0]

    def count(index, block, args, output):
        calls[index] += 1

    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(partial(count, index))
    pooling_grid(model, *make_batch(), start_layers=[0, 1, 2])
    assert calls == [1 + 3, 1 + 6, 1 + 9]


def test_hooks_on_the_start_block_see_the_pooled_stream():
    model, seen = make_model("gpt2"), []
    model.transformer.h[1].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    input_ids, mask, ids = (tensor[:1] for tensor in make_batch())
    constituent_aware_pooling(model, input_ids, mask, ids, start_layer=1, protocol="mean")
    clean, pooled = seen
    torch.testing.assert_close(pooled[0], naive_pool(clean[0], ids[0], "mean"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pooled_in_float32_and_padding_cannot_overflow(dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.full((2, 2001, 8), 0.1, dtype=dtype, device=device)
    stream[1, :-1] = torch.finfo(dtype).max
    positions = torch.tensor([[0] * 2000 + [1], [-1] * 2000 + [0]], device=device)
    assert torch.equal(_pool(stream, positions, "mean")[0], stream[0, :2])
    total = _pool(stream, positions, "sum")
    assert total[0, 0, 0] == torch.tensor(2000 * stream[0, 0, 0].item(), dtype=dtype)
    assert torch.equal(total[1, 0], torch.zeros_like(total[1, 0]))


def test_adapters_and_wrappers_are_looked_through():
    batch = make_batch()
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_model("llama"), lora)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = constituent_aware_pooling(merged, *batch, start_layer=1, protocol="mean")
    plain = constituent_aware_pooling(make_model("llama"), *batch, start_layer=1, protocol="mean")
    assert (expected - plain).abs().max() > 1e-2

    def never(graph, inputs):
        raise AssertionError("pooling runs the model as it is, not compiled")

    for model in (adapted, torch.nn.DataParallel(adapted), torch.compile(merged, backend=never)):
        logits = constituent_aware_pooling(model, *batch, start_layer=1, protocol="mean")
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = get_peft_model(make_model("llama"), prompts)
    with pytest.raises(ValueError, match="prompt-learning"):
        constituent_aware_pooling(prompted, *batch, start_layer=1, protocol="mean")


def state_of(model):
    """Everything a call might leave changed: modules, their modes and hooks, the config."""
    modules = dict(model.named_modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules.values()]
    return modules, [module.training for module in modules.values()], hooks, model.config.to_dict()


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(failure):
    model = make_model("gpt2").train()
    model.transformer.drop.eval()  # a mode of its own
    before = state_of(model)

    def fail_on_the_pooled_run(block, args):
        if failure and args[0].shape[1] < len(CONSTITUENTS[0]):
            raise failure("stopped")

    handle = model.transformer.h[2].register_forward_pre_hook(fail_on_the_pooled_run)
    if failure:
        with pytest.raises(failure, match="stopped"):
            pooling_grid(model, *make_batch(), start_layers=[0, 1, 2])
    else:
        pooling_grid(model, *make_batch(), start_layers=[0, 1, 2])
    handle.remove()
    assert state_of(model) == before


def test_no_dropout_and_no_gradients():
    model = make_model("gpt2")
    expected = pooling_grid(model, *make_batch(), start_layers=[1])
    grid = pooling_grid(model.train(), *make_batch(), start_layers=[1])
    assert model.training and not grid.clean.requires_grad
    assert torch.equal(grid.clean, expected.clean)
    assert all(torch.equal(grid.pooled[key], expected.pooled[key]) for key in grid.pooled)


def test_start_layers_from_depth():
    published = {
        16: [1, 3, 7, 11, 15], 18: [1, 4, 8, 13, 17], 24: [1, 5, 11, 17, 23], 36: [1, 8, 17, 26, 35],
        12: [1, 2, 5, 8, 11],  # published with 4 as second
    }
    assert {depth: start_layers_from_depth(depth) for depth in published} == published
    assert start_layers_from_depth(8) == [0, 1, 3, 5, 7]
    assert start_layers_from_depth(4) == [0, 0, 1, 2, 3]
    assert start_layers_from_depth(1) == [0] * 5
    assert start_layers_from_depth(30, [0.1, 0.7]) == [2, 20]  # 0.1 × 30 > 3 in floating point
    for depth, shares in ((12, [0.0]), (12, [1.1]), (12, [float("nan")]), (0, [1.0])):
        with pytest.raises(ValueError):
            start_layers_from_depth(depth, shares)


ROW = torch.ones(1, 4, dtype=torch.long)
TINY_BERT = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start_layer": 3}, "blocks 0 to 2"),
        ({"start_layer": -1}, "blocks 0 to 2"),
        ({"start_layer": 0.5}, "must be an integer"),
        ({"start_layer": [1]}, "must be an integer"),
        ({"start_layer": None}, "must be an integer"),
        ({"protocol": "median"}, "sum, mean, max"),
        ({"protocol": None}, "sum, mean, max"),
        ({"input_ids": ROW * 300}, "input_ids must lie from 0 to 299, the model's vocabulary"),
        ({"input_ids": -ROW}, "input_ids must lie from 0 to 299, the model's vocabulary"),
        ({name: ROW.repeat(1, 200) for name in ("input_ids", "attention_mask", "constituent_ids")}, "the model knows [0-9]+ positions"),
        ({"input_ids": ROW[0]}, "one shape"),
        ({"constituent_ids": ROW[:, :3]}, "one shape"),
        ({"attention_mask": ROW.repeat(2, 1)}, "one shape"),
        ({name: ROW[:, :0] for name in ("input_ids", "attention_mask", "constituent_ids")}, "hold a token"),
        ({name: ROW[:0] for name in ("input_ids", "attention_mask", "constituent_ids")}, "hold a token"),
        ({"constituent_ids": ROW.float()}, "tensor of integers, not torch.float32"),
        ({"constituent_ids": [[1, 1, 1, 1]]}, "tensor of integers, not list"),
        ({"attention_mask": ROW * 2}, "only 0"),
        ({"attention_mask": ROW * 0}, r"rows \[0\] have no real token"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "pad one side only"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 0]])}, "pad one side only"),
        ({"constituent_ids": torch.tensor([[5, -1, 5, 5]])}, "constituent 5 in row 0 are not next to"),
        ({"constituent_ids": torch.tensor([[5, 2, 2, 5]])}, "constituent 5 in row 0 are not next to"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, message):
    good = {"input_ids": ROW, "attention_mask": ROW, "constituent_ids": ROW}
    good |= {"start_layer": 1, "protocol": "sum"}
    model = tiny_model("gpt2")
    constituent_aware_pooling(model, **good)
    with pytest.raises(ValueError, match=message) as error:
        constituent_aware_pooling(model, **(good | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model, reason", [
    (AutoModel.from_config(tiny_config("gpt2")), "no decoder-only language model"),
    (torch.nn.Linear(2, 2), "no decoder-only language model"),
    (AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **TINY_BERT)), "no decoder-only language model"),
], ids=["headless", "no language model", "encoder"])
def test_what_is_no_causal_language_model_is_refused_in_one_line(model, reason):
    with pytest.raises(ValueError, match=f"pooling does not support .*{reason}") as error:
        constituent_aware_pooling(model, ROW, ROW, ROW, start_layer=0, protocol="sum")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", [None, "gpt2"])
def test_what_is_no_model_is_told(model):
    with pytest.raises(ValueError, match="pooling needs a model"):
        pooling_grid(model, ROW, ROW, ROW, start_layers=[0])


@pytest.mark.parametrize("wrong", [{"start_layers": 1}, {"start_layers": None}, {"protocols": "mean"}, {"protocols": None}])
def test_axes_are_lists(wrong):
    with pytest.raises(ValueError, match="must be a list, such as"):
        pooling_grid(tiny_model("gpt2"), ROW, ROW, ROW, **{"start_layers": [1], **wrong})


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int8, torch.int16, torch.int32])
def test_every_type_of_whole_numbers_gives_the_same(kind):
    model, ids = tiny_model("gpt2"), torch.tensor([[0, 0, 1, 1, 1]]) if kind == torch.bool else torch.tensor([[0, 0, 1, 2, 2]])
    text, mask = torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5, dtype=torch.long)
    whole = pooling_grid(model, text, mask, ids, start_layers=[1], protocols=["sum"])
    found = pooling_grid(model, text if kind == torch.bool else text.to(kind), mask.to(kind), ids.to(kind), start_layers=[1], protocols=["sum"])
    assert torch.equal(whole.pooled[1, "sum"], found.pooled[1, "sum"]) and torch.equal(whole.changed, found.changed)


def test_a_sum_that_overflows_half_precision_is_told():
    stream, positions = torch.full((1, 9, 4), 3e4, dtype=torch.float16), torch.tensor([[0] * 8 + [1]])
    with pytest.raises(ValueError, match="the sum of a constituent overflows float16"):
        _pool(stream, positions, "sum")
    assert torch.isfinite(_pool(stream, positions, "mean")).all() and torch.isfinite(_pool(stream.bfloat16(), positions, "sum")).all()
