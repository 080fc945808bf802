"""Small models, their tokenizers, loading, and clear refusals."""
import ast
import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import carma_lib
from carma_lib.files import RunError
from carma_lib.models import (SMALL_FAMILIES, ModelNotFound, add_adapter, load_config, load_model, load_tokenizer,
                              native_bf16, save_adapter, small_model, train_tokenizer)

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


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="unknown family 'bert'.*gpt2"):
        small_model("bert", tokenizer)
    with pytest.raises(ValueError, match="width 30 is not a multiple"):
        small_model("gpt2", tokenizer, width=30)
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(TEXTS, vocabulary_size=100)
    with pytest.raises(ModelNotFound, match="the folder holds none"):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFound, match="no local folder, and the hub cannot be reached"):
        load_model("nobody/no-such-model")


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers as the real one does: gated/… and absent/… are refused, all else hangs up."""
    answers = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound")}

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, code = answers.get(self.path.split("/")[1], (0, ""))
            if status:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *unused):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_gated_absent_and_out_of_reach_are_told_apart(hub, tmp_path):
    """In a fresh process, since the hub's address is read once."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path),
                   "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    code = """from carma_lib.models import ModelNotFound, load_config
for name in ("gated/model", "absent/model", "away/model"):
    try:
        load_config(name)
    except ModelNotFound as error:
        print(error)"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    gated, absent, away = done.stdout.splitlines()
    assert "'gated/model': its owners gate it; ask for access" in gated
    assert "'absent/model': the hub has no such model, or a private one; check the name" in absent
    assert "'away/model': it is no local folder, and the hub cannot be reached; connect, give a folder" in away


def test_a_full_disk_is_not_taken_for_an_absent_model():
    from carma_lib.models import _explained

    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise OSError("cannot load this") from error
    except OSError as error:
        found = _explained("some/model", "tokenizer", error)
    assert found.errno == errno.ENOSPC and "free space, or set HF_HOME" in str(found)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapter_is_saved_alone_and_loaded_with_its_start_wherever_both_lie(family, tokenizer, tmp_path):
    start, folder = tmp_path / "run" / "untuned", tmp_path / "run" / "lora"
    for part in (small_model(family, tokenizer, layers=2, width=32, heads=2), tokenizer):
        part.save_pretrained(start)
    one, two = (add_adapter(load_model(str(start))[0], rank=4, seed=3) for _ in range(2))
    trained = [name for name, weight in one.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    with torch.no_grad():
        for name, weight in one.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    save_adapter(one, folder, start=start)
    assert not (folder / "model.safetensors").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded, _ = load_model(str(tmp_path / "moved" / "lora"))
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, one.eval()(input_ids=ids).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without CUDA")
def test_four_bits_need_cuda(tokenizer, tmp_path):
    for part in (small_model("llama", tokenizer, layers=2, width=32, heads=2), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4-bit weights need a CUDA GPU and bitsandbytes.*'lora' does without"):
        load_model(str(tmp_path), four_bits=True)


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_an_empty_folder_holds_no_model(load, tmp_path):
    with pytest.raises(ModelNotFound, match="the folder holds none; give one made by save_pretrained"):
        load(str(tmp_path))


def test_damaged_weights_are_told(tokenizer, tmp_path):
    small_model("llama", tokenizer, layers=2, width=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelNotFound, match="its weights are damaged; fetch or save them again"):
        load_model(str(tmp_path))


@pytest.fixture
def start(tokenizer, tmp_path):
    """A whole start: a llama of two blocks and its tokenizer in a folder."""
    small_model("llama", tokenizer, layers=2, width=16, heads=2).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(start, *, load=load_model):
    with pytest.raises(ModelNotFound) as refusal:
        load(start)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    return str(refusal.value)


@pytest.mark.parametrize(("lacking", "named"), [
    ("layers.1.", "model.layers.1.input_layernorm.weight"), ("embed_tokens", "model.embed_tokens.weight"),
    ("model.norm", "model.norm.weight"), ("lm_head", "lm_head.weight"), ("layers.0.mlp.up", "layers.0.mlp.up_proj")])
def test_weights_that_do_not_cover_the_model_are_refused_by_name(start, lacking, named):
    change_weights(start, lambda weights: {name: value for name, value in weights.items() if lacking not in name})
    said = refused(start)
    assert "do not cover the model" in said and named in said and "would be random" in said


def test_other_weights_than_the_configuration_s_are_refused(start, tokenizer, tmp_path):
    small_model("gpt2", tokenizer, layers=2, width=16, heads=2).config.save_pretrained(start)
    assert "do not cover the model" in refused(start) and "transformer.h.0" in refused(start)
    small_model("llama", tokenizer, layers=3, width=16, heads=2).config.save_pretrained(start)
    assert "model.layers.2" in refused(start)
    small_model("llama", tokenizer, layers=2, width=32, heads=2).config.save_pretrained(start)
    refused(start)  # other shapes
    small_model("llama", tokenizer, layers=1, width=16, heads=2).config.save_pretrained(start)
    with pytest.warns(UserWarning, match="no place for: model.layers.1"):
        load_model(start)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(start, value, name):
    def spoil(weights):
        weights[name].view(-1)[3] = value
        return weights

    change_weights(start, spoil)
    assert f"not finite (NaN or infinity), in {name}" in refused(start)


def test_large_finite_weights_are_taken(start):
    change_weights(start, lambda weights: {name: torch.full_like(value, 3e38) for name, value in weights.items()})
    load_model(start)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(start, tokenizer):
    larger = train_tokenizer(TEXTS, vocabulary_size=300, whole_tokens=["heron", "positive", "egret", "owl"])
    larger.save_pretrained(start)
    assert "too few for its tokenizer's tokens egret, owl" in refused(start)
    spare = train_tokenizer(TEXTS, vocabulary_size=300, whole_tokens=["heron", "positive"])
    spare.add_special_tokens({"additional_special_tokens": ["<image>"]})
    spare.save_pretrained(start)
    load_model(start)  # a mark that no text and no padding gives, as Gemma 3's for images
    padded = train_tokenizer(TEXTS, vocabulary_size=300, whole_tokens=["heron", "positive"])
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(start)
    assert "too few for its tokenizer's tokens [PAD]" in refused(start)


def test_a_start_is_a_folder_and_nothing_else(start, tmp_path, monkeypatch):
    assert "is a file; give the folder that it lies in" in refused(start / "config.json", load=load_config)
    assert "there is no folder" in refused(tmp_path / "none", load=load_tokenizer)
    assert "there is no folder" in refused("a/b/c", load=load_config)
    assert "there is no folder ''" in refused("", load=load_config)
    for load in (load_config, load_tokenizer, load_model):
        refused("x" * 300, load=load)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/start").num_hidden_layers == 2 and load_model("~/start")[0].dtype == torch.float32
    with pytest.raises(RunError, match="no such home folder"):
        load_config("~nobody-of-this-name/start")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert "also a folder here: write './smollm2-135m' for the folder" in refused("smollm2-135m", load=load_config)
    assert "the folder holds none" in refused("./smollm2-135m", load=load_config)


@pytest.mark.parametrize(("file", "content"), [
    ("config.json", ""), ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model_type": "none_such"}'),
    ("config.json", "{}"), ("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{"),
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1"), ("model.safetensors", ""),
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1"), ("model.safetensors", "\0" * 5000)])
def test_damaged_files_are_told_in_one_line(start, file, content):
    (start / file).write_text(content)
    assert str(start) in refused(start)


def test_pickled_weights_are_refused(start):
    torch.save(load_file(start / "model.safetensors"), start / "pytorch_model.bin")
    (start / "model.safetensors").unlink()
    assert "pytorch_model.bin is pickled, which is never read; save it again as safetensors" in refused(start)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_code_in_a_folder_never_runs_and_nothing_is_asked(file, load, start, tmp_path, monkeypatch):
    mark = tmp_path / "it_ran"
    (start / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.setattr("builtins.input", lambda *unused: pytest.fail("asked"))
    code = {name: "foreign.Thing" for name in ("AutoConfig", "AutoModelForCausalLM")}
    change_json(start / file, auto_map={**code, "AutoTokenizer": ["foreign.Thing", "foreign.Thing"]},
                **({"model_type": "none_such"} if file == "config.json" else {"tokenizer_class": "Thing"}))
    with contextlib.suppress(ModelNotFound):  # what needs none of the code may load
        load(start)
    assert not mark.exists()
    if file == "config.json" and load is load_config:
        assert "it needs code of its own, which is never run" in refused(start, load=load)


def test_every_load_in_the_package_forbids_foreign_code():
    calls = {}
    for path in Path(carma_lib.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                calls.setdefault(path.name, []).append(ast.unparse(node))
    adapter, rest = [], []
    for call in sum(calls.values(), []):
        (adapter if "PeftModel" in call else rest).append(call)  # peft reads a configuration and safetensors only
    assert set(calls) == {"__init__.py", "pretrained.py"} and len(adapter) == 1 and len(rest) == 5
    assert all("trust_remote_code=False" in call for call in rest)


@pytest.fixture
def adapter(start, tmp_path):
    save_adapter(add_adapter(load_model(start)[0], rank=2, seed=0), tmp_path / "lora", start=start)
    return tmp_path / "lora"


def test_adapters_are_whole_or_refused(adapter, start):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value for name, value in weights.items() if "layers.1." not in name},
              adapter / "adapter_model.safetensors")
    assert "missing adapter keys" in refused(adapter)
    save_file({name: torch.full_like(value, float("nan")) for name, value in weights.items()},
              adapter / "adapter_model.safetensors")
    assert "not finite" in refused(adapter)
    (adapter / "adapter_model.safetensors").write_text("no weights")
    assert "cannot load an adapter" in refused(adapter) and "damaged" in refused(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    assert "no adapter_model.safetensors (pickled weights are not read)" in refused(adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=".")
    assert "belongs to another adapter" in refused(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="adapter_config.json is damaged"):
        load_model(adapter)


def test_weights_are_float32_unless_asked(start):
    half = load_model(start, dtype=torch.bfloat16)[0]
    assert half.dtype == torch.bfloat16
    half.save_pretrained(start)
    assert load_model(start)[0].dtype == torch.float32 and load_model(start, dtype="auto")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("flags", "capability", "library", "expected"), [
    ({"avx512_bf16"}, "AVX512", True, True), ({"amx_bf16"}, "AVX512", True, True),
    ({"avx512_f"}, "AVX512", True, False),
    ({"avx512_bf16"}, "AVX2", True, False), ({"avx512_bf16"}, "AVX512", False, False), (set(), "NO AVX", True, False)])
def test_native_bf16_on_processors(flags, capability, library, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: library)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)
    assert native_bf16() is expected
    monkeypatch.delattr("torch.cpu.get_capabilities")  # an older PyTorch
    assert native_bf16() is False


@pytest.mark.parametrize("native", [True, False])
def test_native_bf16_of_a_gpu_does_not_count_emulation(native, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert native_bf16() is native_bf16("cuda") is native
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "NO AVX")
    assert native_bf16("cpu") is False  # of the processor beside it


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/cpuinfo").exists()
                    or not hasattr(torch.cpu, "get_capabilities"), reason="compares two lists of flags")
def test_native_bf16_agrees_with_the_kernel_s_flags():
    flags = Path("/proc/cpuinfo").read_text().split()
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert native_bf16() == ("avx512_bf16" in flags or "amx_bf16" in flags)
