"""Files that are whole or absent, known by checksums, locked while in use, and named when they are damaged."""
from __future__ import annotations

import ast
import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml

CHECKSUMS = "checksums.json"
PARTIAL = ".partial-"  # how the name of a file or folder begins that is being written, or that a kill left behind
PATIENCE = 60.0  # seconds after which whoever waits for a lock without end says so
_WAY_OUT = "delete it, or put a whole copy in its place"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system


class RunError(Exception):
    """Why a run cannot start or go on, in one line that names the way out."""


class DataNotFound(RunError, FileNotFoundError):
    """A source of data is not on this machine; the message says how to get it."""


def user_path(path: Path | str) -> Path:
    """The path with a leading `~` or `~name` replaced by that home folder. `RunError` for an unknown user or a zero byte."""
    if "\0" in str(path):
        raise RunError(f"{str(path)!r} holds a zero byte, which no name can: write it again")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RunError(f"{path}: there is no such home folder; write the folder's full path") from error


def ignore_in_children(warning: str) -> None:
    """Add `warning` ("ignore:MESSAGE…") to `PYTHONWARNINGS`, which the processes started from now on inherit."""
    said = os.environ.get("PYTHONWARNINGS", "")
    if warning not in said.split(","):
        os.environ["PYTHONWARNINGS"] = f"{said},{warning}" if said else warning


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{folder} cannot be made, because a file or a dangling link is in its way: move that away") from error


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block ends well, else nothing is left.

    Raises `RunError` if `path` is a folder or its parent a file.
    """
    path = user_path(path)
    if path.is_dir():
        raise RunError(f"{path} is a folder where a file would be written: move it away")
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it takes the place of `path` when the block ends well.

    A kill at any moment leaves the old folder, the new one or none, never a mixture. Raises `RunError` if `path` is a
    file.
    """
    path = user_path(path)
    if path.is_file():
        raise RunError(f"{path} is a file where a folder would be written: move it away, or give another folder")
    _make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        os.chmod(new, 0o755)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial(folder: Path | str) -> None:
    """Delete what killed writers left anywhere below `folder`. Hold the folder's lock: a live writer loses its file."""
    for path in list(Path(folder).rglob(f"{PARTIAL}*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path | str, way_out: str = _WAY_OUT) -> Iterator[None]:
    """Turn any error of the block into `RunError` "PATH is damaged (why): way out", whichever library reads.

    A file that is absent stays `FileNotFoundError`; what the system refuses (rights, disk) is told as that.
    """
    try:
        yield
    except (RunError, FileNotFoundError, MemoryError):
        raise
    except IsADirectoryError as error:
        raise RunError(f"{path} is a folder where a file is needed: move it away") from error
    except OSError as error:
        if error.strerror:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        raise RunError(f"{path} is damaged ({first_line(error)}): {way_out}") from error
    except Exception as error:  # each format's library has errors of its own
        raise RunError(f"{path} is damaged ({first_line(error)}): {way_out}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key is written once, only decimal digits are a whole number (not 12:00:00 or 010), and 6e-5 is a number."""

    yaml_implicit_resolvers = {first: [(tag, rule) for tag, rule in rules if not tag.endswith(":int")]
                               for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is written twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; `yaml.YAMLError` for a text that is damaged, has tags, or writes a key twice."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506, a SafeLoader


def first_line(error: BaseException) -> str:
    """An error's first line of at most 160 characters, or its type where it says nothing; of YAML with the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"[:160]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str, *, keys: Collection[str] = ()) -> Any:
    """The value in a JSON file, or None if there is none. keys: what it must have, which then is an object.

    Raises `RunError` naming a file that is empty, damaged or without these keys, with what to delete.
    """
    path = user_path(path)
    if not path.exists():
        return None
    with reading(path):
        text = path.read_text(encoding="utf-8")
        if not text.strip("\0 \r\n\t"):
            raise ValueError("it is empty")
        value = json.loads(text)
        if keys and not isinstance(value, dict):
            raise ValueError("it holds no object of names and values")
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"it lacks '{missing[0]}'")
        return value


def write_checksums(folder: Path | str) -> None:
    """Write `checksums.json`: bytes and sha256 of every file in `folder`, below it too. Call it last.

    Files that begin with a point are left out, since they are caches and unfinished files.
    """
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
             for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    write_json(folder / CHECKSUMS, found)


def check_folder(folder: Path | str, *, content: bool = True) -> str | None:
    """Why `folder` is not as `write_checksums` saw it, naming the first such file; None if it is. Files may be added.

    content: read all files (about a second a gigabyte); else only sizes are compared.
    """
    folder = Path(folder)
    try:
        expected = read_json(folder / CHECKSUMS)
        if expected is None:
            return f"{folder / CHECKSUMS} is missing"
        for name, facts in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{path} has {size:,} bytes, not {facts['bytes']:,}"
            if content and sha256_of(path) != facts["sha256"]:
                return f"{path} has other content than when it was written"
    except RunError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{folder / CHECKSUMS} is damaged"
    return None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path | str, *, wait: float = 0.0, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` for the block; the system frees it when the process ends, however it ends.

    wait: seconds to wait for another holder, below 0 without end, which is said after a minute. busy: what `RunError` says if it is held still.
    On a file system without locks, the presence of a second file, `path` + ".soft", is the lock: after a kill on
    another machine it must be deleted by hand.
    """
    path = user_path(path)
    busy = busy or f"{path.parent} is in use by another process (lock file {path.name}): wait until it ends"
    try:
        _make_folder(path.parent)
        lock: Any = filelock.FileLock(path)
        try:
            _acquire(lock, wait)
        except (NotImplementedError, OSError) as error:
            if isinstance(error, filelock.Timeout) or getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            lock = filelock.SoftFileLock(f"{path}.soft")
            _acquire(lock, wait)
    except filelock.Timeout:
        raise RunError(busy) from None
    except OSError as error:
        raise RunError(f"{path} cannot be made or locked: {error.strerror or first_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: Any, wait: float) -> None:
    """Take a lock; whoever waits without end says once what for."""
    try:
        lock.acquire(timeout=wait if wait >= 0 else PATIENCE)
    except filelock.Timeout:
        if wait >= 0:
            raise
        by_hand = "; if none runs any more, delete that file" if isinstance(lock, filelock.SoftFileLock) else ""
        print(f"waiting for another process, which holds {lock.lock_file}{by_hand}", flush=True)
        lock.acquire(timeout=-1)


def fingerprint(*values: Any) -> str:
    """Twelve hexadecimal digits that change when any of the (JSON-like) values does."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def code_fingerprint(*modules: str) -> str:
    """The fingerprint of these modules' code: a rule that changes changes it, a docstring or comment line does not.

    modules: full names, e.g. "carma_lib.words"; they are not imported, and what they import is not looked at.
    """
    found = []
    for name in modules:
        source = Path(importlib.util.find_spec(name).origin)
        found.append(_code_of(name, source, source.stat().st_mtime_ns, source.stat().st_size))
    return fingerprint(found)


@functools.cache
def _code_of(name: str, source: Path, *seen: int) -> list[str]:
    """The lines of a module's code, read once for each state (`seen`) of its file."""
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            assert doc.lineno > getattr(node, "lineno", 0), f"a docstring on its function's line: {name}"
            lines[doc.lineno - 1:doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    return [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
