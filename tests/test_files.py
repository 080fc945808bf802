"""Files appear whole or not at all; damage is noticed and named; a lock has one holder."""
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pandas as pd
import pytest
from safetensors import safe_open

from carma_lib import files
from carma_lib.files import (CHECKSUMS, PARTIAL, RunError, check_folder, code_fingerprint, fingerprint, locked,
                             parse_yaml, read_json, reading, remove_partial, user_path, whole_file, whole_folder,
                             write_checksums, write_json)


ROOT = Path(__file__).resolve().parent.parent


def test_a_broken_write_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"kept": 1})
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"kept": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_whole_folder_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "folder") as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_writer_leaves_is_found(tmp_path):
    script = """
import os, sys, signal
from carma_lib.files import whole_file, whole_folder
with whole_folder("folder") as new, whole_file("sub/file.json") as file:
    (new / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len(list(tmp_path.rglob(f"{PARTIAL}*"))) == 2 and not (tmp_path / "folder").exists()
    (tmp_path / "kept").write_text("")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "sub"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json("~/a/b.json", 1)
    with whole_folder("~/folder"):
        pass
    assert read_json("~/a/b.json") == 1 and (tmp_path / "a" / "b.json").is_file() and (tmp_path / "folder").is_dir()
    with pytest.raises(RunError, match="~nobody-of-that-name/x: there is no such home folder"):
        user_path("~nobody-of-that-name/x")


@pytest.mark.parametrize(("content", "why"), [
    (b"", "it is empty"), (b"\0" * 40, "it is empty"), (b" \n", "it is empty"), (b'{"a": 1', "Expecting"),
    (b'{"a": 1} tail', "Extra data"), (b"\xff\xfe{", "can't decode"), (b"[" * 100_000, "recursion"),
    (b"[1]", "no object"), (b'{"b": 1}', "lacks 'a'"), (b"null", "no object"),
], ids=["empty", "zeros", "blank", "cut", "tail", "encoding", "deep", "list", "key", "null"])
def test_damaged_json_is_named(tmp_path, content, why):
    path = tmp_path / "status.json"
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_json(path, keys=["a"])
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (") and why in message and "delete it" in message
    assert "\n" not in message


def test_json_that_is_absent_or_a_folder(tmp_path):
    assert read_json(tmp_path / "none.json", keys=["a"]) is None
    with pytest.raises(RunError, match="is a folder where a file is needed"):
        read_json(tmp_path)


@pytest.mark.parametrize("read", [pd.read_parquet, lambda path: safe_open(path, "pt")], ids=["parquet", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"\0" * 200, b"text"])
def test_damage_is_named_whichever_library_reads(tmp_path, read, content):
    path = tmp_path / "results"
    path.write_bytes(content)
    with pytest.raises(RunError, match="results is damaged .*: run again$"), reading(path, "run again"):
        read(path)
    with pytest.raises(FileNotFoundError), reading(tmp_path / "none"):
        read(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_not_called_damaged(tmp_path):
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "a.json").chmod(0)
    with pytest.raises(RunError, match="a.json cannot be read: Permission denied"):
        read_json(tmp_path / "a.json")


def model_folder(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as new:
        (new / "parts").mkdir()
        (new / "model.safetensors").write_bytes(bytes(range(256)))
        (new / "parts" / "one.arrow").write_bytes(b"rows")
        (new / "empty").touch()
        write_checksums(new)
    return folder


def test_a_folder_as_written_is_sound(tmp_path):
    folder = model_folder(tmp_path)
    assert check_folder(folder) is None
    assert set(read_json(folder / CHECKSUMS)) == {"model.safetensors", "parts/one.arrow", "empty"}
    (folder / "cache-1.arrow").write_text("a file that comes later")
    os.replace(folder, tmp_path / "moved")
    assert check_folder(tmp_path / "moved") is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "why"), [
    (lambda folder: (folder / "parts" / "one.arrow").unlink(), "one.arrow is missing"),
    (lambda folder: (folder / "model.safetensors").write_bytes(bytes(range(100))), "has 100 bytes, not 256"),
    (lambda folder: (folder / "empty").write_text("x"), "empty has 1 bytes, not 0"),
    (lambda folder: flip(folder / "model.safetensors"), "model.safetensors has other content"),
    (lambda folder: (folder / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
    (lambda folder: (folder / CHECKSUMS).write_text(""), f"{CHECKSUMS} is damaged"),
    (lambda folder: (folder / CHECKSUMS).write_text('["a"]'), f"{CHECKSUMS} is damaged"),
    (lambda folder: (folder / CHECKSUMS).write_text('{"empty": {}}'), f"{CHECKSUMS} is damaged"),
], ids=["missing", "cut", "grown", "flipped", "no sums", "no bytes", "no object", "no facts"])
def test_what_is_wrong_with_a_folder(tmp_path, damage, why):
    folder = model_folder(tmp_path)
    damage(folder)
    assert why in check_folder(folder)
    assert ("other content" in why) == (check_folder(folder, content=False) is None)


HOLDER = """
import sys, time
from carma_lib.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("soft", [False, True], ids=["locks", "no locks"])
def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path, soft, monkeypatch, capsys):
    path = tmp_path / "run" / "lock"
    script = HOLDER
    if soft:  # as NFS without its lock service answers
        refusal = "def refuse(self): raise OSError(errno.ENOLCK, 'No locks available')"
        script = f"import errno, filelock\n{refusal}\nfilelock.FileLock._acquire = refuse\n{HOLDER}"
        monkeypatch.setattr(filelock.FileLock, "_acquire", lambda self: (_ for _ in ()).throw(
            OSError(errno.ENOLCK, "No locks available")))
    holder = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=r"run is in use by another process \(lock file lock\)"), locked(path):
            pass
        with pytest.raises(RunError, match="^give another --run-dir$"), locked(path, busy="give another --run-dir"):
            pass
        started = time.monotonic()
        with pytest.raises(RunError), locked(path, wait=0.3):
            pass
        assert time.monotonic() - started >= 0.3
        monkeypatch.setattr(files, "PATIENCE", 0.1)
        threading.Timer(0.5, holder.kill).start()
        threading.Timer(0.8, lambda: (tmp_path / "run" / "lock.soft").unlink(missing_ok=True)).start()
        with locked(path, wait=-1):
            told = capsys.readouterr().out
        assert told.startswith("waiting for another process, which holds ") and ("delete that file" in told) == soft
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):
        with locked(path, wait=10):
            assert path.parent.is_dir()


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is in its way: move that away"), locked(tmp_path / "file" / "lock"):
        pass


def test_an_error_in_the_block_frees_the_lock_and_stays_itself(tmp_path):
    with pytest.raises(OSError, match="disk"), locked(tmp_path / "lock"):
        raise OSError(errno.ENOSPC, "disk full")
    with locked(tmp_path / "lock"):
        pass


def test_fingerprint_depends_on_every_value_and_not_on_key_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(1), fingerprint(2), fingerprint("1"), fingerprint([1])}) == 4


CODE = '''"""What it does."""
import re

# a remark
RULE = 3


class Reader:
    """A class."""

    def read(self, text):
        """Read.

        More of it.
        """
        return text * RULE


def empty():
    """Only this."""
'''


def test_code_fingerprint_is_of_the_rules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def of(source, name="rules_of_a_module"):
        (tmp_path / f"{name}.py").write_text(source)
        return code_fingerprint(name)

    before = of(CODE)
    assert before == of(CODE.replace("More of it.", "Other\n\n        words.")) == of(CODE.replace("# a remark\n", "\n"))
    assert before == of(CODE.replace('"""What it does."""', '"""Other."""'))
    changed = [of(CODE.replace("RULE = 3", "RULE = 4")), of(CODE.replace("text *", "text +")), of(CODE + "\nX = 1\n")]
    assert len({before, *changed}) == 4


def test_code_fingerprint_reads_every_module_of_the_package():
    package = ROOT / "carma_lib"
    names = [".".join(("carma_lib", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
             for path in sorted(package.rglob("*.py")) if path.stem != "__main__"]
    assert len({code_fingerprint(name) for name in names}) > len(names) - 5  # some `__init__` hold nothing else
    assert code_fingerprint(*names[:2]) != code_fingerprint(*names[1::-1])


@pytest.mark.parametrize(("text", "value"), [
    ("walltime: 12:00:00", {"walltime": "12:00:00"}), ("seeds: [010, 1:30, 7, -1, 1_000, 0]", {"seeds": ["010", "1:30", 7, -1, 1000, 0]}),
    ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}), ("rate: 0.5\nlow: 1.0e-3\nyes: true", {"rate": 0.5, "low": 1e-3, True: True}),
    ("rates: [6e-5, 1E3, -2.5e+2, 1e, e5, 6e-5x]", {"rates": [6e-5, 1000.0, -250.0, "1e", "e5", "6e-5x"]})])
def test_yaml_holds_what_it_says(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize(("text", "said"), [
    ("steps: 4\nsteps: 8", "line 2: 'steps' is written twice"), ("a:\n  b: 1\n  c: 2\n  b: 3", "line 4: 'b' is written twice"),
    ("a: [1, 2", "line 1: "), ("a: !!python/object:os.system {}", "line 1: ")])
def test_yaml_that_is_wrong_names_its_line(tmp_path, text, said):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(RunError, match=f"a.yml is damaged .{said}"), reading(tmp_path / "a.yml", "correct it"):
        parse_yaml(text)
