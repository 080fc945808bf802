"""WordNet's reader: found by three ways, opened once, entered by one thread at a time."""
from __future__ import annotations

import io
import socket
import threading
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING

from carma_lib.files import DataNotFound

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

DEBIAN_FOLDER = Path("/usr/share/wordnet")
DOWNLOAD_TIMEOUT = 15  # seconds

# The table `lexnames` of WordNet 3.0, which Debian leaves out: file numbers 00 to 44 in this order.
LEXICOGRAPHER_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()


class WordNetNotFound(DataNotFound):
    """No WordNet on this machine; the message names the three ways to get it."""

    def __init__(self) -> None:
        super().__init__(
            'WordNet not found: run `python -m nltk.downloader wordnet`, or `apt-get install wordnet-base '
            'wordnet-sense-index` (Debian, Ubuntu), or name a folder that holds corpora/wordnet in NLTK_DATA')


_lock = threading.RLock()  # NLTK's readers, TextBlob's and lemminflect's tables are made for one thread


def one_thread_at_a_time(function):
    """The function, entered by one thread at a time together with all others of this kind."""
    @wraps(function)
    def entered(*values, **options):
        with _lock:
            return function(*values, **options)
    return entered


def remembered(function):
    """The function with a cache without a limit, entered by one thread at a time."""
    return one_thread_at_a_time(lru_cache(maxsize=None)(function))


@remembered
def wordnet() -> WordNetCorpusReader:
    """NLTK's WordNet reader, opened once: from NLTK's own data, else Debian's packages, else downloaded.

    Raises WordNetNotFound if all three ways fail.
    """
    for open_reader in (_nltk_reader, _debian_reader, _downloaded_reader):
        reader = open_reader()
        if reader is not None:
            return reader
    raise WordNetNotFound


def _nltk_reader() -> WordNetCorpusReader | None:
    from nltk.corpus import wordnet as reader

    try:
        reader.ensure_loaded()
    except LookupError:
        return None
    return reader


def _debian_reader() -> WordNetCorpusReader | None:
    if not all((DEBIAN_FOLDER / name).is_file() for name in ("data.noun", "index.sense", "cntlist.rev")):
        return None
    import nltk
    from nltk.corpus import WordNetCorpusReader

    class DebianWordNet(WordNetCorpusReader):
        """Debian's files, with the one table that they lack."""

        def open(self, file):
            if file != "lexnames":
                return super().open(file)
            categories = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
            return io.StringIO("".join(f"{number:02d}\t{name}\t{categories[name.split('.')[0]]}\n"
                                       for number, name in enumerate(LEXICOGRAPHER_FILES)))

        def map_wn(self, version="wordnet"):
            """None: only other languages need a map between versions, and it wants NLTK's own data."""

    if str(DEBIAN_FOLDER) not in nltk.data.path:
        nltk.data.path.append(str(DEBIAN_FOLDER))  # NLTK reads nowhere else
    return DebianWordNet(str(DEBIAN_FOLDER), object())  # the object stands for the other languages' reader


def _downloaded_reader() -> WordNetCorpusReader | None:
    import nltk

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        downloaded = nltk.download("wordnet", quiet=True)
    except OSError:
        downloaded = False
    finally:
        socket.setdefaulttimeout(timeout)
    return _nltk_reader() if downloaded else None
