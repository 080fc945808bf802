"""WordNet: where it is found, synonyms by part of speech and sense, inflection.

Parts of speech are WordNet's letters: "n" noun, "v" verb, "a" adjective (satellites included), "r" adverb.
Tags are those of the Penn Treebank. Heavy libraries are imported when first used.
"""
from __future__ import annotations

import io
import socket
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas
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


class WordNetNotFound(LookupError):
    """No WordNet on this machine; the message names the three ways to get it."""

    def __init__(self) -> None:
        super().__init__(
            'WordNet not found: run `python -m nltk.downloader wordnet`, or `apt-get install wordnet-base '
            'wordnet-sense-index` (Debian, Ubuntu), or name a folder that holds corpora/wordnet in NLTK_DATA')


@lru_cache(maxsize=1)
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


@lru_cache(maxsize=1)
def sense_counts() -> dict[str, int]:
    """Sense key → how often that sense was tagged in WordNet's corpora; a key not there was never tagged."""
    counts = {}
    for line in wordnet().open("cntlist.rev").read().splitlines():
        key, _, count = line.split()
        counts[key] = int(count)
    return counts


def definition_pairs() -> pandas.DataFrame:
    """Every (lemma, synset) pair of WordNet, in WordNet's order; takes seconds, so cache what you make of it.

    Columns: lemma (as WordNet writes it, "hot_dog"), synset ("dog.n.01"), part_of_speech ("n", "v", "a",
    "s" for satellite adjectives, "r"), definition (without the examples), count (tagged uses of this sense).
    """
    import pandas

    counts = sense_counts()
    rows = [(lemma.name(), synset.name(), synset.pos(), synset.definition(), counts.get(lemma.key(), 0))
            for synset in wordnet().all_synsets() for lemma in synset.lemmas()]
    return pandas.DataFrame(rows, columns=["lemma", "synset", "part_of_speech", "definition", "count"])
