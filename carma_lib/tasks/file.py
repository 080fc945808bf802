"""One's own data as a task: a CSV, TSV, JSON lines or Parquet file of texts and their answers.

Columns: `text` and `target`, and if one likes `split` (train, validation, test or "test_" and a name),
`phrases` (character spans of the text, [[0, 7], [11, 20]]) and `group` (rows that a split keeps together). Other
columns are left out. Without `split`, the groups are split by a seeded order of their names' hashes; without `group`,
rows of one text are a group. Targets may have several tokens.
"""
from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from carma_lib.files import RunError, first_line, sha256_of, user_path
from carma_lib.tasks.schema import DataNotFound, TaskRows, shuffle_held_out

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
COLUMNS = ("text", "target", "split", "phrases", "group")
MIN_ROWS = 10
SPLIT_SIZES = (0.8, 0.1, 0.1)  # train, validation, test
PREFIX = "own_"  # how the name of such a task begins in tables and folders
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test"}


def is_file_name(name: str) -> bool:
    """Whether a task's name is the path of a file of one's own."""
    return Path(name).suffix.lower() in FORMATS


def task_names(tasks: Iterable[str]) -> dict[str, str]:
    """Each task, by name or path → its name in tables and folders.

    A path becomes "own_" and the file's stem in letters, digits and "_"; if two paths share that, eight digits of each
    file's sha256 follow. Raises `DataNotFound` for one of these that cannot be found.
    """
    tasks = list(dict.fromkeys(tasks))
    names = {task: PREFIX + (re.sub(r"[^A-Za-z0-9]+", "_", Path(task).stem).strip("_").lower() or "data")
             if is_file_name(task) else task for task in tasks}
    shared = [task for task in tasks if is_file_name(task) and list(names.values()).count(names[task]) > 1]
    return names | {task: f"{names[task]}_{content_of(task)[:8]}" for task in shared}


def content_of(path: Path | str) -> str:
    """The sha256 of the file's bytes. `DataNotFound` if there is no such file."""
    path = user_path(path)
    if not path.is_file():
        raise DataNotFound(f"{path}: there is no such file; give the path of your data, from {Path.cwd()} or whole")
    return sha256_of(path)


def check_file(path: Path | str) -> None:
    """Read the file and check every row. `DataNotFound` or `RunError` in one line."""
    build_rows(file=str(path), name="own", content=content_of(path), seed=0, split_sizes=SPLIT_SIZES)


def build_rows(*, file: str, name: str, content: str, seed: int, split_sizes: Sequence[float]) -> TaskRows:
    """The file as rows, every one checked.

    name: begins every `item_id`; a hash of the text follows. content: the file's sha256. split_sizes: shares of train,
    validation and test if the file has no column `split`. Raises `RunError` naming the file, the row and the way out.
    """
    path = user_path(file)
    if content_of(path) != content:
        raise RunError(f"{path} changed while it was read: start again")
    rows, first_of, repeated = [], {}, 0
    for place, given in _read(path):
        row = _checked(path, place, given)
        first_place, first = first_of.setdefault(_plain(row["text"]), (place, row))
        if first["target"] != row["target"]:
            raise RunError(f"{path}, {place}: its text has the target {row['target'][:40]!r} here and "
                           f"{first['target'][:40]!r} in {first_place}: keep one of them")
        if first["split"] != row["split"]:
            raise RunError(f"{path}, {place}: its text is in {row['split']} here and in {first['split']} in {first_place}: "
                           "keep one of them")
        if first is row:
            rows.append(row)
        else:
            repeated += 1
    if len(rows) < MIN_ROWS:
        raise RunError(f"{path} holds {len(rows)} different rows; to train, choose and test it takes at least {MIN_ROWS}: "
                       "add rows")
    if len({row["target"] for row in rows}) == 1:
        raise RunError(f"{path}: every row has the target {rows[0]['target']!r}, so nothing can be learned: add rows "
                       "with another")
    given = [row["split"] is not None for row in rows]
    if any(given) and not all(given):
        raise RunError(f"{path}: the row with the text {rows[given.index(False)]['text'][:40]!r} has no split: fill the "
                       "column in every row, or in none")
    splits = _given_splits(path, rows) if all(given) else _made_splits(path, rows, seed, split_sizes)
    facts = {"file": path.name, "rows": len(rows), "repeated_rows_left_out": repeated,
             "split": "given" if all(given) else "by group" if any(row["group"] for row in rows) else "by row"}
    return TaskRows({split: [_row(name, row) for row in some] for split, some in splits.items()},
                    source=path.name, licence="your own", facts=facts)


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(row["text"].encode()).hexdigest()[:16]
    return {"item_id": f"{name}/{digest}", "text": row["text"], "target": row["target"], "phrases": row["phrases"],
            "group": row["group"] or _plain(row["text"])}


def _plain(text: str) -> str:
    """What two spellings of one text share: composed letters (NFC), single spaces, and no mark without width."""
    seen = "".join(letter for letter in unicodedata.normalize("NFC", text) if unicodedata.category(letter) != "Cf")
    return " ".join(seen.split())


def check_sizes(sizes: Any) -> list[float]:
    """The shares of train, validation and test as numbers. `ValueError` unless they are above 0 and add up to 1."""
    try:
        found = [float(size) for size in sizes]
    except (TypeError, ValueError):
        found = []
    if len(found) != 3 or any(not 0 < size < 1 for size in found) or not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise ValueError(f"split_sizes are three shares above 0 that add up to 1 (train, validation, test), not {sizes}")
    return found


def _read(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each row's place in words, and its known columns. `RunError` if the file is not such a table."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise RunError(f"{path}: the format is not known; it must be one of {', '.join(FORMATS)}")
    if not path.stat().st_size:
        raise RunError(f"{path} is empty: write a row for each text, with its target")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    if not text.strip():
        raise RunError(f"{path} is empty: write a row for each text, with its target")
    if "\0" in text:
        raise RunError(f"{path} holds zero bytes, so it is no table of text: save it again as UTF-8 text")
    yield from _read_json_lines(path, text) if "json" in kind else _read_delimited(path, text, kind)


def _read_delimited(path: Path, text: str, kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if kind == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(header) == 1 and (other := next((sign for sign in ";\t,|" if sign in header[0]), None)):
            raise RunError(f"{path}, line 1: the columns are parted by {other!r}, not by {delimiter!r}: save it with "
                           f"{delimiter!r}" + (", or call it .tsv" if other == "\t" else ""))
        _check_columns(path, header)
        before = reader.line_num
        for cells in reader:
            place, before = f"line {before + 1}", reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise RunError(f"{path}, {place}: {len(cells)} columns, where the first line has {len(header)}: put texts "
                               f"that hold {delimiter!r} in double quotes")
            yield place, {name: cell for name, cell in zip(header, cells) if name in COLUMNS}
    except csv.Error as error:
        raise RunError(f"{path}, line {reader.line_num}: {error}: close its quotes, and double those inside") from error


def _read_json_lines(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {number}: not JSON ({first_line(error)}): write one object a line") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number}: a {type(row).__name__} where an object with text and target must be: "
                           "write one object a line")
        if not seen:
            _check_columns(path, list(row))
        seen |= {*row}
        yield f"line {number}", {name: row.get(name) for name in COLUMNS}


def _read_parquet(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        rows = [row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist()]
    except RunError:
        raise
    except Exception as error:  # pyarrow's errors share no type
        raise RunError(f"{path} is no Parquet file, or is cut ({first_line(error)}): save it again") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _check_columns(path: Path, names: list[str]) -> None:
    if missing := [name for name in COLUMNS[:2] if name not in names]:
        found = ", ".join(repr(str(name)) for name in names[:8]) or "none"
        raise RunError(f"{path}: the column '{missing[0]}' is missing (columns: {found}): rename one of them to it")
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise RunError(f"{path}: two columns are called '{twice[0]}': rename one of them")


def _checked(path: Path, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its columns as text and spans, those that are absent None. `RunError` naming what is wrong."""
    def wrong(what: str, way_out: str) -> RunError:
        return RunError(f"{path}, {place}: {what}: {way_out}")

    for name in ("text", "target"):
        value = row.get(name)
        if _missing(value):
            raise wrong(f"the {name} is missing", "fill it in, or delete the row")
        if not isinstance(value, str):
            raise wrong(f"the {name} is {str(value)[:40]!r} ({type(value).__name__}), not text",
                        "write it in quotes" if "json" in path.suffix.lower() else "save the column as text")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise wrong(f"the {name} holds half a character (a lone surrogate)", "save the file again as UTF-8")
    split, group = (None if _missing(row.get(name)) else str(row[name]).strip() for name in ("split", "group"))
    if split is not None:
        known = SPLITS.get(split.lower(), split if re.fullmatch(r"test_[a-z0-9_]{1,60}", split) else None)
        if known is None:
            raise wrong(f"the split is {split[:40]!r}",
                        "write train, validation, test, or test_ and a name of at most 60 small letters")
        split = known
    try:
        phrases = _phrases(row.get("phrases"), row["text"])
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong(f"phrases is {str(row['phrases'])[:60]!r} ({first_line(error)})",
                    "write [[0, 7], [11, 20]] or [\"the bird\"], or leave the column out") from error
    return {"text": row["text"], "target": row["target"].strip(), "split": split, "group": group, "phrases": phrases}


def _missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value) or isinstance(value, str) and all(
        unicodedata.category(letter)[0] in "ZC" for letter in value)  # spaces, and marks that show nothing


def _phrases(value: Any, text: str) -> list[list[int]]:
    """Phrases, given as spans or as their words from left to right, as spans in order. `ValueError` if they do not fit."""
    spans: list[list[int]] = []
    for phrase in [] if _missing(value) else json.loads(value) if isinstance(value, str) else value:
        if isinstance(phrase, str):
            start = text.find(phrase, spans[-1][1] if spans else 0)
            if start < 0:
                raise ValueError(f"{phrase[:40]!r} is not in the text, or not in this order")
            phrase = [start, start + len(phrase)]
        start, end = phrase
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
            raise ValueError(f"[{start}, {end}] is not in the text of {len(text)} characters")
        spans.append([start, end])
    spans.sort()
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:])):
        raise ValueError("phrases overlap")
    return spans


def _given_splits(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for row in rows:
        splits.setdefault(row["split"], []).append(row)
    lacking = [name for name in ("train", "validation", "test") if not splits.get(name)]
    if "test" in lacking and any(name.startswith("test_") for name in splits):
        lacking.remove("test")
    if lacking:
        raise RunError(f"{path}: no row has the split '{lacking[0]}': add some, or leave the column out to have it split")
    seen: dict[str, str] = {}
    for row in rows:
        if row["group"] and seen.setdefault(row["group"], row["split"]) != row["split"]:
            raise RunError(f"{path}: the group {row['group'][:40]!r} is in {seen[row['group']]} and in {row['split']}: "
                           "keep it in one of them")
    shuffle_held_out(splits)
    return splits


def _made_splits(path: Path, rows: list[dict[str, Any]], seed: int,
                 sizes: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """Whole groups in the order of a seeded hash fill test, then validation, up to their shares; train has the rest.

    Groups larger than the share of validation or test come last, and the last of the others is left for validation, so that
    they are in train. A row that is added later moves no other row's place in that order, unless its group becomes as large.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["group"] or _plain(row["text"])].append(row)
    if len(groups) < 3:
        raise RunError(f"{path} holds {len(groups)} groups of rows, and train, validation and test need one each: add rows")
    most = max(sizes[1:]) * len(rows)
    order = sorted(groups, key=lambda group: (len(groups[group]) > most, hashlib.sha256(json.dumps([seed, group]).encode()).digest()))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    left, last_small = len(order), sum(len(some) <= most for some in groups.values()) - 1
    for place, group in enumerate(order):
        for split, size in (("test", sizes[2]), ("validation", sizes[1]), ("train", 1.0)):
            later = {"test": 2, "validation": 1, "train": 0}[split]  # groups that must be left for what follows
            spare = left > later and not (split == "test" and place == last_small and not splits["validation"])
            if not splits[split] or len(splits[split]) + len(groups[group]) / 2 <= size * len(rows) and spare:
                splits[split] += groups[group]
                break
        left -= 1
    return splits
