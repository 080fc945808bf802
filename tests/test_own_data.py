"""One's own file as a task: every format, splits that keep their promises, and what is refused; task folders that heal."""
import json
import os
import shutil

import pandas as pd
import pytest
from tiny import byte_level_tokenizer

from carma_lib.collate import encode
from carma_lib.files import RunError
from carma_lib.models.table import prompt_for
from carma_lib.tasks import DataNotFound, build_task, is_built, load_task, read_card, task_named, task_names

ROWS = [{"text": f"the bird number {number} sings", "target": ("a long answer", "short")[number % 2]} for number in range(60)]


def write(path, rows=ROWS, encoding="utf-8", **columns):
    frame = pd.DataFrame(rows).assign(**columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, encoding=encoding, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")), encoding=encoding)
    return path


def everything(task):
    return {split: sorted(map(json.dumps, rows)) for split, rows in task.items()}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".CSV"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    expected = build_task(str(write(tmp_path / "birds.csv")), tmp_path / "expected")
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / f"birds{suffix}"
    write(path.with_suffix(suffix.lower())).rename(path)
    built = build_task(str(path), tmp_path / "task")
    assert everything(built) == everything(expected) == everything(load_task(tmp_path / "task"))
    assert sum(map(len, built.values())) == 60 and set(built) == {"train", "validation", "test"}
    card = read_card(tmp_path / "task")
    assert card["task"] == "own_birds" and card["counts"] == {"train": 48, "validation": 6, "test": 6}
    assert card["targets"]["train"] == 2 and card["facts"]["split"] == "by row" and card["source"] == f"birds{suffix}"


def test_a_task_of_ones_own_is_asked_for_whole_answers(tmp_path):
    path = str(write(tmp_path / "birds.csv"))
    task = task_named(path)
    assert task == task_named("own_birds") and (task.kind, task.synonyms, task.answer) == ("own", "wordnet", "text")
    prompt, rows = prompt_for(task.kind), build_task(path, tmp_path / "task")
    encoded = encode(rows["train"], byte_level_tokenizer(), **prompt._asdict(), answer=task.answer)
    assert len(encoded) == 48 and task.replacement(rows["train"]) == {"source": "wordnet", "forbidden": None}
    for name in ("birds", "birds.txt", "birds.json", "sst33"):
        with pytest.raises(ValueError, match="unknown task .*files that end in .csv"):
            task_named(name)


def test_marks_line_ends_and_quotes(tmp_path):
    lines = "text,target,more\r\n" + "".join(
        f'"he said ""no"", {n} times,\nthen\u2028 left",é{n % 3},x\r\n' for n in range(12))
    (tmp_path / "a.csv").write_bytes(("\ufeff" + lines + "\r\n").encode())
    rows = build_task(str(tmp_path / "a.csv"), tmp_path / "task")
    found = {row["text"]: row["target"] for split in rows.values() for row in split}
    assert found == {f'he said "no", {n} times,\nthen\u2028 left': f"é{n % 3}" for n in range(12)}


def test_ids_and_splits_follow_rows_not_places(tmp_path):
    first = build_task(str(write(tmp_path / "birds.csv")), tmp_path / "first")
    shuffled = [*ROWS[30:], *ROWS[:30]]
    again = build_task(str(write(tmp_path / "birds.csv", shuffled)), tmp_path / "again")
    assert everything(first) == everything(again)
    other = build_task(str(tmp_path / "birds.csv"), tmp_path / "other", seed=7)
    assert set(other["test"]["text"]) != set(first["test"]["text"])
    more = [*ROWS, {"text": "one more bird", "target": "short"}]
    longer = build_task(str(write(tmp_path / "birds.csv", more)), tmp_path / "longer")
    assert len(set(longer["test"]["text"]) & set(first["test"]["text"])) >= len(first["test"]) - 2


@pytest.mark.parametrize("seed", range(6))
def test_one_large_group_is_in_train(tmp_path, seed):
    """As rows without a source have it: as validation or test it would leave next to nothing to learn from."""
    path = write(tmp_path / "birds.csv", group=["none"] * 40 + [f"g{number}" for number in range(20)])
    rows = build_task(str(path), tmp_path / "task", seed=seed)
    assert {split: len(some) for split, some in rows.items()} == {"train": 48, "validation": 6, "test": 6}
    path = write(tmp_path / "two.csv", group=["none"] * 34 + ["other"] * 23 + [f"g{number}" for number in range(3)])
    rows = build_task(str(path), tmp_path / "two", seed=seed)
    assert {split: len(some) for split, some in rows.items()} == {"train": 57, "validation": 1, "test": 2}


@pytest.mark.parametrize("sizes", [(0.8, 0.1, 0.1), [0.5, 0.2, 0.3], (0.98, 0.01, 0.01)])
def test_groups_stay_together(tmp_path, sizes):
    groups = [f"g{number // 3}" for number in range(60)]
    path = str(write(tmp_path / "birds.csv", group=groups))
    rows = build_task(path, tmp_path / "task", split_sizes=sizes)
    held = {split: set(some["group"]) for split, some in rows.items()}
    assert not held["train"] & held["test"] and not held["train"] & held["validation"]
    assert not held["validation"] & held["test"] and all(held.values())
    for split, size in zip(("train", "validation", "test"), sizes):
        assert abs(len(rows[split]) - size * 60) <= (3 if size < 0.9 else 6)
    assert read_card(tmp_path / "task")["facts"]["split"] == "by group"


def test_splits_phrases_and_numbers_of_groups_that_are_given(tmp_path):
    splits = ["Train"] * 40 + ["dev"] * 8 + ["test"] * 6 + ["test_hard"] * 6
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "a.csv"):
        spans = [[[0, 8], [9, 15]]] * 60
        phrases = [json.dumps(some) for some in spans] if path.suffix == ".csv" else spans
        rows = build_task(str(write(path, split=splits, phrases=phrases, group=list(range(60)))), tmp_path / path.suffix[1:])
        assert {name: len(some) for name, some in rows.items()} == {"train": 40, "validation": 8, "test": 6, "test_hard": 6}
        assert rows["train"][0]["phrases"] == [[0, 8], [9, 15]] and rows["train"][5]["group"] == "5"
    words = build_task(str(write(tmp_path / "w.jsonl", phrases=[["the bird", "sings"]] * 60)), tmp_path / "w")
    for row in words["test"]:
        assert [row["text"][start:end] for start, end in row["phrases"]] == ["the bird", "sings"]


def test_the_first_held_out_items_of_a_sorted_file_are_like_all(tmp_path):
    splits, targets = ["train"] * 20 + ["validation"] * 30 + ["test"] * 10, ["no"] * 35 + ["yes"] * 25
    rows = build_task(str(write(tmp_path / "a.csv", split=splits, target=targets)), tmp_path / "task")
    assert set(rows["validation"]["target"][:10]) == {"no", "yes"} and rows["train"]["target"][:] == ["no"] * 20


def test_rows_that_repeat_are_left_out_and_counted(tmp_path):
    rows = build_task(str(write(tmp_path / "a.csv", [*ROWS, *ROWS[:5]])), tmp_path / "task")
    assert sum(map(len, rows.values())) == 60 and read_card(tmp_path / "task")["facts"]["repeated_rows_left_out"] == 5


def csv_of(rows, header="text,target"):
    return "\n".join([header, *rows]) + "\n"


def many(last, header="text,target"):
    extra = ",train" if "split" in header else ""
    return csv_of([*(f"text {n},answer {n % 2}{extra}" for n in range(20)), last], header)


BROKEN = {
    "empty.csv": ("", "is empty: write a row"),
    "blank.csv": ("\n  \n", "is empty: write a row"),
    "header.csv": ("text,target\n", "holds 0 different rows"),
    "few.csv": (csv_of([f"text {n},a{n}" for n in range(9)]), "holds 9 different rows; .* at least 10"),
    "column.csv": (csv_of(["a,b"], "text,label"), r"the column 'target' is missing \(columns: 'text', 'label'\): rename"),
    "twice.csv": (csv_of(["a,b,c"], "text,target,text"), "two columns are called 'text'"),
    "semicolon.csv": (csv_of(["a;b"], "text;target"), "line 1: the columns are parted by ';', not by ','"),
    "tab.csv": (csv_of(["a\tb"], "text\ttarget"), r"parted by '\\t', not by ',': .* or call it .tsv"),
    "comma.tsv": (csv_of(["a,b"]), r"parted by ',', not by '\\t'"),
    "ragged.csv": (many("one, two,a"), "line 22: 3 columns, where the first line has 2: put texts that hold ','"),
    "quote.csv": (many('"open,a'), "close its quotes"),
    "conflict.csv": (many("text 3,answer 0"), "line 22: its text has the target 'answer 0' here and 'answer 1' in line 5"),
    "one.csv": (csv_of([f"text {n},yes" for n in range(20)]), "every row has the target 'yes'"),
    "no_text.csv": (many(" ,a"), "line 22: the text is missing: fill it in"),
    "unseen.csv": (many("\u200b\u2060 \ufeff,a"), "line 22: the text is missing: fill it in"),
    "unseen.jsonl": ('{"text": "a", "target": "\\u200b"}\n', "line 1: the target is missing"),
    "no_target.csv": (many("b,"), "line 22: the target is missing"),
    "split.csv": (many("b,a,holdout", "text,target,split"), "line 22: the split is 'holdout': write train, validation"),
    "half.csv": (many("b,a,", "text,target,split"), "the row with the text 'b' has no split: fill the column in every"),
    "lacks.csv": (many("b,a,test", "text,target,split"), "no row has the split 'validation'"),
    "leak.csv": (many("text 3,answer 1,test", "text,target,split"),
                 "line 22: its text is in test here and in train in line 5: keep one"),
    "phrase.csv": (csv_of([*(f"text {n},a{n % 2}," for n in range(20)), 'bird,a,"[[0, 9]]"'], "text,target,phrases"),
                   r"line 22: phrases is .*\[0, 9\] is not in the text of 4 characters"),
    "phrases.csv": (csv_of([*(f"text {n},a{n % 2}," for n in range(20)), 'bird,a,"[[0, 3], [1, 4]]"'],
                           "text,target,phrases"), "phrases overlap"),
    "words.csv": (csv_of([*(f"text {n},a{n % 2}," for n in range(20)), 'bird,a,"[""dog""]"'], "text,target,phrases"),
                  "'dog' is not in the text"),
    "no_spans.csv": (csv_of([*(f"text {n},a{n % 2}," for n in range(20)), "bird,a,0-4"], "text,target,phrases"),
                     "line 22: phrases is '0-4'"),
    "latin.csv": (many("caf\xe9,a").encode("latin-1"), "is not UTF-8 .*: save it as UTF-8"),
    "utf16.csv": (many("b,a").encode("utf-16"), "is not UTF-8"),
    "zeros.csv": (b"text,target\n" + b"\0" * 50, "holds zero bytes"),
    "line.jsonl": ('{"text": "a", "target": "b"}\n{"text": "a", "targ\n', r"line 2: not JSON \(.*\): write one object a line"),
    "list.jsonl": ('["text", "target"]\n', "line 1: a list where an object"),
    "array.jsonl": (json.dumps(ROWS, indent=1), "line 1: not JSON"),
    "number.jsonl": ("\n".join(json.dumps({"text": f"t{n}", "target": n}) for n in range(20)),
                     r"line 1: the target is '0' \(int\), not text: write it in quotes"),
    "true.jsonl": ('{"text": "a", "target": true}\n', r"the target is 'True' \(bool\), not text"),
    "null.jsonl": ('{"text": "a", "target": "b"}\n{"text": null, "target": "b"}\n', "line 2: the text is missing"),
    "nan.jsonl": ('{"text": "a", "target": NaN}\n', "line 1: the target is missing"),
    "absent.jsonl": ('{"text": "a", "target": "b"}\n{"text": "c"}\n', "line 2: the target is missing"),
    "surrogate.jsonl": ('{"text": "a \\ud800", "target": "b"}\n', "line 1: the text holds half a character"),
    "cut.parquet": (b"PAR1" + b"\1" * 40, "is no Parquet file, or is cut"),
    "text.parquet": ("text,target\na,b\n", "is no Parquet file, or is cut"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name):
    content, says = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=says) as caught:
        build_task(str(path), tmp_path / "task")
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    assert not (tmp_path / "task").exists()


def test_numbers_in_parquet_and_groups_on_both_sides(tmp_path):
    with pytest.raises(RunError, match=r"row 1: the target is '0' \(int\), not text: save the column as text"):
        build_task(str(write(tmp_path / "a.parquet", target=[number % 2 for number in range(60)])), tmp_path / "task")
    splits = ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
    with pytest.raises(RunError, match="the group 'g' is in train and in test: keep it in one"):
        build_task(str(write(tmp_path / "b.csv", split=splits, group=["g"] * 3 + [""] * 50 + ["g"] * 7)), tmp_path / "task")
    with pytest.raises(RunError, match="holds 2 groups of rows"):
        build_task(str(write(tmp_path / "c.csv", group=["g", "h"] * 30)), tmp_path / "task")
    for sizes in ((0.5, 0.5), (0.8, 0.2, 0), (1, 1, 1), "abc", 3, (0.5, 0.5, float("nan"))):
        with pytest.raises(ValueError, match="split_sizes are three shares"):
            build_task(str(write(tmp_path / "d.csv")), tmp_path / "task", split_sizes=sizes)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("none.csv", "folder.csv"):
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        with pytest.raises(DataNotFound, match=f"{path}: there is no such file; give the path of your data, from"):
            build_task(path, tmp_path / "task")
        assert not is_built(path, tmp_path / "task")
    with pytest.raises(RunError, match="own_birds: its file is not known; give the path as file"):
        build_task("own_birds", tmp_path / "task")
    write(tmp_path / "birds.csv")
    with pytest.raises(RunError, match="birds.csv is a file where a folder would be written"):
        build_task("birds.csv", "birds.csv")
    assert len(pd.read_csv("birds.csv")) == 60


def test_names_in_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path / "My birds (2).csv"), write(tmp_path / "b" / "My birds (2).jsonl", ROWS[:30])
    other = write(tmp_path / "...parquet")
    build_task(str(write(tmp_path / "sst3_of_mine.csv")), tmp_path / "sst3")
    assert task_names([str(one), "sst3", str(other)]) == {str(one): "own_my_birds_2", "sst3": "sst3", str(other): "own_data"}
    both = task_names([str(one), str(two), str(one)])
    assert len(set(both.values())) == len(both) == 2
    assert all(name.startswith("own_my_birds_2_") and task_named(name).kind == "own" for name in both.values())
    for given, name in both.items():  # the name with its path is the same task
        build_task(name, tmp_path / name, file=given)
        assert is_built(name, tmp_path / name, file=given) and read_card(tmp_path / name)["task"] == name
    assert len(build_task("~/b/My birds (2).jsonl", "~/task")["train"]) == 24 and (tmp_path / "task").is_dir()


def damage_card(folder):
    (folder / "card.json").write_text("")


def cut(folder):
    path = next((folder / "train").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:200])


def flip(folder):
    path = next((folder / "test").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[content.index(b"bird")] ^= 1
    path.write_bytes(content)


def lose(folder):
    shutil.rmtree(folder / "validation")


def swap(folder):
    shutil.copy(next((folder / "train").glob("*.arrow")), next((folder / "test").glob("*.arrow")))


@pytest.mark.parametrize("damage", [damage_card, cut, flip, lose, swap])
def test_a_damaged_task_is_named_and_built_again(tmp_path, damage):
    path, folder = str(write(tmp_path / "birds.csv")), tmp_path / "task"
    whole = everything(build_task(path, folder))
    before = os.stat(folder / "card.json").st_mtime_ns
    build_task(path, folder)
    assert is_built(path, folder) and os.stat(folder / "card.json").st_mtime_ns == before  # not built again
    damage(folder)
    assert not is_built(path, folder)
    with pytest.raises(RunError, match=r"task.* is damaged \(.*\): .*delete"):
        load_task(folder)
    assert everything(build_task(path, folder)) == whole == everything(load_task(folder)) and is_built(path, folder)


def test_a_task_is_built_again_if_the_file_parameters_or_rules_changed(tmp_path, monkeypatch):
    path, folder = write(tmp_path / "birds.csv"), tmp_path / "task"
    build_task(str(path), folder)
    assert is_built(str(path), folder) and not is_built(str(path), folder, seed=1)
    assert not is_built(str(path), folder, split_sizes=(0.5, 0.3, 0.2))
    write(path, ROWS[:30])
    assert not is_built(str(path), folder)
    assert sum(map(len, build_task(str(path), folder).values())) == 30
    monkeypatch.setattr("carma_lib.tasks.code_fingerprint", lambda *modules: "other rules")
    assert not is_built(str(path), folder)
    build_task(str(path), folder)
    assert is_built(str(path), folder) and read_card(folder)["rules"] == "other rules"


def test_the_controlled_tasks_follow_the_same_rules(tmp_path):
    folder = tmp_path / "task"
    assert not is_built("controlled_sentiment", folder)
    rows = build_task("controlled_sentiment", folder)
    card = read_card(folder)
    damage_card(folder)
    with pytest.raises(RunError, match="card.json is damaged"):
        read_card(folder)
    assert everything(build_task("controlled_sentiment", folder)) == everything(rows)
    assert read_card(folder)["content"] == card["content"] and is_built("controlled_sentiment", folder)
    with pytest.raises(DataNotFound, match="build them first"):
        load_task(tmp_path / "none")


@pytest.mark.parametrize("phrases", ["[[true, 4]]", "[[false, true]]", "[" * 5000])
def test_phrases_that_are_no_numbers_are_told(tmp_path, phrases):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the number {each}", "target": "one", "phrases": phrases}) + "\n" for each in range(6)))
    with pytest.raises(RunError, match="a.jsonl.*phrases is"):
        build_task(str(path), tmp_path / "data")


def test_a_path_is_a_name_of_a_task(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,target\n" + "".join(f"the number {each},word{each % 2}\n" for each in range(20)))
    assert build_task(path, tmp_path / "data").keys() == {"train", "validation", "test"}
    assert task_named(path) == task_named(str(path))
    with pytest.raises((RunError, DataNotFound), match="b.csv"):
        build_task(tmp_path / "b.csv", tmp_path / "other")


SPELLINGS = {"space": ("{}", "{} "), "space before": ("{}", " {}"), "no width": ("{}", "{}\u200b"), "composed": ("cafe\u0301 {}", "caf\u00e9 {}")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_text_in_two_spellings_is_one_text(tmp_path, spelling):
    """Its second row is left out; with another target it is refused."""
    first, again = ([{"text": form.format(f"the number {number}"), "target": "ab"[number % 2]} for number in range(20)] for form in SPELLINGS[spelling])
    build_task(str(write(tmp_path / "a.jsonl", first + again)), tmp_path / "task")
    assert read_card(tmp_path / "task")["facts"]["repeated_rows_left_out"] == 20
    again[3]["target"] = "c"
    with pytest.raises(RunError, match="line 24: its text has the target 'c' here and 'b' in line 4"):
        build_task(str(write(tmp_path / "b.jsonl", first + again)), tmp_path / "other")


def test_an_accent_makes_another_text(tmp_path):
    rows = [{"text": f"the cafe{accent} {number}", "target": "ab"[number % 2]} for number in range(20) for accent in ("", "\u0301")]
    build_task(str(write(tmp_path / "a.jsonl", rows)), tmp_path / "task")
    assert read_card(tmp_path / "task")["facts"]["repeated_rows_left_out"] == 0


def test_spaces_around_a_target_are_no_part_of_it(tmp_path):
    rows = [{"text": f"the number {number}", "target": ("yes", "yes ", " yes")[number % 3]} for number in range(20)]
    with pytest.raises(RunError, match="every row has the target 'yes'"):
        build_task(str(write(tmp_path / "a.jsonl", rows)), tmp_path / "task")
