"""Shared by all tests: one thread a process, because tests run in two processes on two cores; and real data."""
import gc
import os
import shutil
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

#: Files of minutes start first, so that no process is left alone with one at the end.
LONGEST = tuple(f"test_{name}.py" for name in (
    "notebooks", "notebooks_further", "lab_run", "lab_pretrained", "runs", "book", "trainer", "lab_train", "synonyms_wordnet",
    "wordnet_task", "replacement", "jupyterlab", "pipeline", "figures", "statistics", "sst", "extending"))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What is loaded already is not searched by the garbage collection with which the trainer ends every training."""
    gc.collect()
    gc.freeze()


def _missing(what: str) -> None:
    """Without its data a test is a failure in CI and a skip elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="session")
def client():
    """A Dask client whose one worker is a thread of this process, for tests that need no other process."""
    from distributed import Client

    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A run folder with the rows of both controlled tasks and the tokenizer of their small starts."""
    from carma_lib.lab.start import tokenizer_of
    from carma_lib.tasks import build_task
    from lab_cells import DICTIONARY, SENTIMENT, cell_of

    folder = tmp_path_factory.mktemp("data")
    for task in (SENTIMENT, DICTIONARY):
        build_task(task, folder / "data" / task)
        tokenizer_of(folder, cell_of(task=task))
    return folder


@pytest.fixture
def folder(data, tmp_path):
    """A run folder of one test's own, its data made."""
    shutil.copytree(data, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def trained_run(data, tmp_path_factory, client):
    """A run folder in which fine-tuning and CARMA of seed 1 are trained and tested; tests only read it."""
    from carma_lib.lab.run import run
    from lab_cells import cell_of

    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(data, folder)
    assert run([cell_of("fine_tuning"), cell_of("carma")], folder, client) == {}
    return folder


@pytest.fixture(scope="session")
def sst_folder() -> Path:
    """The folder of the real treebank, from CARMA_DATA."""
    folder = Path(os.environ.get("CARMA_DATA", "")) / "sst"
    if "CARMA_DATA" not in os.environ or not (folder / "trees" / "train.txt").is_file():
        _missing("SST is not here: set CARMA_DATA to a folder that holds sst/trees")
    return folder


@pytest.fixture(scope="session")
def wordnet_database():
    """The real WordNet 3.0."""
    from carma_lib.synonyms.wordnet import WordNetNotFound, wordnet

    try:
        return wordnet()
    except WordNetNotFound as error:
        _missing(str(error))
