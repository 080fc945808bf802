"""Constituent-Aware Pooling against a restatement that runs one unpadded row block by block."""
import itertools

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from carma_lib.pooling import (
    BLOCKS, PROTOCOLS, constituent_aware_pooling, pooled_positions, pooling_grid, start_layers_from_depth,
)

SETTINGS = {
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
}
# The eager and the SDPA form of every family; Gemma 2 caps its attention scores and has no SDPA form.
FORMS = [(family, form) for family in BLOCKS for form in ("eager", "sdpa") if (family, form) != ("gemma2", "sdpa")]
# Constituents of one to four tokens, tokens of none, one that ends with the prompt, one used twice in two rows.
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
    pool = {"sum": lambda g: sum(g), "mean": lambda g: sum(g) / len(g), "max": lambda g: torch.stack(g).amax(0)}
    return torch.stack([pool[protocol](group) for group in groups])


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
def test_a_row_does_not_depend_on_its_batch_or_padding_side(family):
    model = make_model(family, "sdpa")
    together = pooling_grid(model, *make_batch(side="left"), start_layers=[0, 2])
    right = pooling_grid(model, *make_batch(side="right"), start_layers=[0, 2])
    input_ids, mask, ids = make_batch(side="left")
    for row in range(len(ids)):
        keep = mask[row].bool()
        alone = pooling_grid(
            model, input_ids[row:row + 1, keep], mask[row:row + 1, keep], ids[row:row + 1, keep], start_layers=[0, 2]
        )
        torch.testing.assert_close(alone.clean[0], together.clean[row], atol=1e-4, rtol=0)
        for key, logits in alone.pooled.items():
            torch.testing.assert_close(logits[0], together.pooled[key][row], atol=1e-4, rtol=0)
    tokens = real_tokens(*make_batch(side="right")[:2])
    torch.testing.assert_close(right.clean, clean_logits(model, tokens), atol=1e-4, rtol=0)
