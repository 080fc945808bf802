"""Which families pooling takes, and that it gives the right answer for those: no list of names decides."""
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from families import tiny_config, tiny_family

from carma_lib import pooling
from carma_lib.pooling import PROTOCOLS, constituent_aware_pooling, pooling_grid

ROWS = ([160, 161, 162, 163, 164, 165, 166], [170, 171, 172])
INPUT_IDS = torch.tensor([ROWS[0], [0, 0, 0, 0, *ROWS[1]]])
MASK = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
EACH = torch.arange(7).repeat(2, 1)
# no positions in the stream that enters block 0: rotary, ALiBi, state-space, recurrent
FREE = ("bloom", "mpt", "falcon", "granite", "qwen3_next", "mamba", "falcon_mamba", "recurrent_gemma", "gpt_oss")
# learned or sinusoidal positions, embeddings scaled in place or read again, outputs in lists, padding that disturbs
OTHERS = ("opt", "ctrl", "zamba2", "openai-gpt", "bart", "roberta", "rwkv", "xglm")


def larger(model):
    """Weights large enough for positions and attention to matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def alone(model, row):
    with torch.no_grad():
        return model(torch.tensor([row]), use_cache=False).logits[0, -1]


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FREE + OTHERS)
def test_one_token_a_constituent_is_the_model_alone_and_a_row_does_not_feel_its_batch(family):
    model = larger(tiny_family(family))
    layers = range(len(pooling.decoder_blocks(model)))
    grid = pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=layers)
    assert set(grid.pooled) == {(layer, protocol) for layer in layers for protocol in PROTOCOLS}
    for row, tokens in enumerate(ROWS):
        for logits in (grid.clean, *grid.pooled.values()):
            close(logits[row], alone(model, tokens))
    ids = torch.tensor([[-1, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 5, 5, 6]])
    grid = pooling_grid(model, INPUT_IDS, MASK, ids, start_layers=layers)
    assert grid.changed.tolist() == [3, 1]
    single = pooling_grid(model, INPUT_IDS[1:, 4:], MASK[1:, 4:], ids[1:, 4:], start_layers=layers)
    for key, logits in grid.pooled.items():
        close(logits[1], single.pooled[key][0])
        assert (logits[0] - grid.clean[0]).abs().max() > 1e-4, key


@pytest.mark.parametrize("family", FREE)
def test_the_mean_of_a_repeated_token_is_the_token(family):
    model = larger(tiny_family(family))
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1]])
    repeated = torch.tensor([[160, 161, 161, 163, 164, 164, 164, 165]])
    for protocol in ("mean", "max"):
        logits = constituent_aware_pooling(model, repeated, torch.ones_like(ids), ids, start_layer=0, protocol=protocol)
        close(logits[0], alone(model, [160, 161, 163, 164, 165]))


@pytest.mark.parametrize("family, reason", [
    ("gemma3n_text", "not of the shape"),  # four streams
    ("deepseek_v4", "not of the shape"),
    ("xlnet", "not of the shape"),  # tokens first
    ("prophetnet", "not of the shape"),
    ("gemma4_text", "its forward pass fails"),  # token ids are looked up from embeddings
    ("dory", "block 0 runs 2 times"),
    ("xlm", "no decoder-only"),
])
def test_what_would_be_pooled_wrongly_is_refused_in_one_line(family, reason):
    model = tiny_family(family)
    depth = model.config.get_text_config().num_hidden_layers
    for _ in range(2):  # the refusal is no exception of the first time
        with pytest.raises(ValueError, match=f"pooling does not support .*{family}.*{reason}") as error:
            pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=range(depth))
        assert "\n" not in str(error.value)


def test_blocks_that_share_keys_and_values_with_blocks_below_are_refused_from_there():
    model = larger(tiny_family("llama"))
    blocks = model.model.layers
    kept, below, above = [], blocks[1].forward, blocks[3].forward

    def keep(stream, **rest):
        kept.append(below(stream, **rest))
        return kept[-1]

    blocks[1].forward = keep
    blocks[3].forward = lambda stream, **rest: above(stream + kept.pop()[:, -1:], **rest)
    pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=[0])
    with pytest.raises(ValueError, match="start layer 2 does not give its own answer|its forward pass fails"):
        pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=[0, 2])


def test_the_check_runs_once_calls_no_hook_of_others_and_leaves_no_trace(monkeypatch):
    model, calls, checks = tiny_family("llama").train(), [], []
    real = pooling._fault
    monkeypatch.setattr(pooling, "_fault", lambda *inputs: checks.append(inputs[2]) or real(*inputs))
    model.model.layers[2].register_forward_pre_hook(lambda block, inputs: calls.append(inputs[0].shape[1]))
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    ids = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1]])
    for layers in ([2], [2], [1, 2]):
        pooling_grid(model, INPUT_IDS, MASK, ids, start_layers=layers, protocols=["mean"])
    assert checks == [[2], [1]]
    assert calls == [7, 4, 7, 4, 7, 4, 4]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_what_passed_in_bf16_is_checked_again_in_float32(monkeypatch):
    model, checks = tiny_family("llama"), []
    real = pooling._fault
    monkeypatch.setattr(pooling, "_fault", lambda *inputs: checks.append(inputs[2]) or real(*inputs))
    for enabled in (True, True, False, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=[1])
    assert checks == [[1], [1]]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mamba"])
def test_bf16_passes_the_check_and_its_identity_is_exact(family, autocast):
    model = larger(tiny_family(family))
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grid = pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=[0, 2])
        assert pooling._checked[model][not autocast][1], "rows run together"
    assert all(torch.equal(logits, grid.clean) for logits in grid.pooled.values())


def test_a_constituent_that_is_the_whole_prompt_leaves_the_answer_position_alone():
    model = larger(tiny_family("llama"))
    whole = torch.zeros_like(MASK)
    for mask in (MASK, MASK.flip(1)):
        input_ids = INPUT_IDS if mask is MASK else torch.tensor([ROWS[0], [*ROWS[1], 0, 0, 0, 0]])
        grid = pooling_grid(model, input_ids, mask, whole, start_layers=[1])
        assert grid.changed.tolist() == [5, 1]  # everything but the answer's position is one vector
    one = pooling_grid(model, torch.tensor([[160], [170]]), torch.ones(2, 1).long(), torch.zeros(2, 1).long(),
                       start_layers=[1])
    assert one.changed.tolist() == [0, 0]
    assert all(torch.equal(logits, one.clean) for logits in one.pooled.values())


def test_learned_embeddings_narrower_than_the_stream():
    config = tiny_config("opt", word_embed_proj_dim=16)
    config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    grid = pooling_grid(model, INPUT_IDS, MASK, EACH, start_layers=[0, 3])
    for row, tokens in enumerate(ROWS):
        for logits in grid.pooled.values():
            close(logits[row], alone(model, tokens))
