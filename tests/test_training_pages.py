"""The Python of the pages on one's own training, as it stands there, on a tiny model of a folder."""
import re
from pathlib import Path

import pytest
from small_pretrained import save_small_pretrained
from tiny import TEXTS

BOOK = Path(__file__).resolve().parent.parent / "book"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (BOOK / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return str(save_small_pretrained("llama", tmp_path_factory.mktemp("start") / "tiny", texts=TEXTS * 20, vocabulary=300))


def run(code, names, *changes):
    """Run a page's code with what a reader would fill in; each change must find its place."""
    for before, after in changes:
        assert code.count(before) >= 1, f"the page no longer has {before!r}"
        code = code.replace(before, after)
    exec(compile(code, "page", "exec"), names)
    return names


def test_own_training(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("\n".join(TEXTS * 4), encoding="utf-8")
    with_trainer, own_loop = blocks("own_training.md")
    names = run(with_trainer, {}, ("path/or/id", start), ('"out", max_steps=1000', '"out", max_steps=2, logging_steps=1, use_cpu=True, report_to="none"'))
    log = names["trainer"].state.log_history[0]
    assert log["mutual_information"] > 0 and log["stability"] > 0
    names["trainer"].save_model("kept")
    again = names["AutoModelForCausalLM"].from_pretrained("kept")
    assert all(one.equal(two) for one, two in zip(again.state_dict().values(), names["model"].state_dict().values())), "no hook or wrapper is saved"
    before = {name: value.clone() for name, value in names["model"].named_parameters()}
    run(own_loop, names)
    assert names["terms"].mutual_information > 0 and any(not value.equal(before[name]) for name, value in names["model"].named_parameters())


def test_sft(start, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    trainer, counting = blocks("sft.md")
    names = run(trainer, {"rows": Dataset.from_dict({"text": TEXTS * 4})}, ("HuggingFaceTB/SmolLM2-135M-Instruct", start),
                ('"out", packing=True', '"out", packing=True, max_length=64, max_steps=1, logging_steps=1, use_cpu=True, report_to="none"'))
    assert names["trainer"].state.log_history[0]["mutual_information"] > 0
    found = run(counting, names | {"tokenizer": names["trainer"].processing_class})
    assert 0 < (found["tokens"] > 1).sum() < len(found["tokens"])
