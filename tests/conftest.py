"""Shared by all tests: one thread a process, because tests run in two processes on two cores; and real data."""
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


def _missing(what: str) -> None:
    """Without its data a test is a failure in CI and a skip elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


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
