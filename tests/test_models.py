"""Small models, their tokenizers, loading, and clear refusals."""
import errno
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from carma_lib.models import (SMALL_FAMILIES, ModelNotFound, add_adapter, load_config, load_model, load_tokenizer,
                              save_adapter, small_model, train_tokenizer)

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
    assert "'away/model': it is no local folder, and the hub cannot be reached; connect, or give a folder" in away


def test_a_full_disk_is_not_taken_for_an_absent_model():
    from carma_lib.models import _not_found

    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise OSError("cannot load this") from error
    except OSError as error:
        found = _not_found("some/model", "tokenizer", error)
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
