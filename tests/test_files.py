"""Files and folders appear whole or not at all."""
import pytest

from carma_lib.files import fingerprint, read_json, whole_file, whole_folder, write_json


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


def test_fingerprint_depends_on_every_value_and_not_on_key_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(1), fingerprint(2), fingerprint("1"), fingerprint([1])}) == 4
