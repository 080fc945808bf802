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
AGREEMENT = 0.4  # how sure it must be that two words mean the same, see `synonyms`
TAGS = {"n": ("NN", "NNS"), "v": ("VB", "VBP", "VBZ", "VBD", "VBN", "VBG"), "a": ("JJ", "JJR", "JJS"),
        "r": ("RB", "RBR", "RBS")}

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


@lru_cache(maxsize=None)
def sense_shares(word: str, part_of_speech: str) -> dict[str, float]:
    """Synset name → share of the word's uses in that sense: (count + 1) / (all counts + number of senses).

    The ones added keep a word that was tagged once or twice from looking certain, and give the senses of a
    word that was never tagged equal shares. Empty for a word that WordNet does not have as this part of speech.
    """
    counts = {}
    for synset in wordnet().synsets(word, part_of_speech):
        for lemma in synset.lemmas():
            if lemma.name() == word:
                counts[synset.name()] = sense_counts().get(lemma.key(), 0)
    total = sum(counts.values()) + len(counts)
    return {synset: (count + 1) / total for synset, count in counts.items()}


@lru_cache(maxsize=None)
def synonyms(word: str, part_of_speech: str) -> tuple[str, ...]:
    """Lemmas that mean the same as the lemma `word` in most uses of both; single words without hyphens.

    Two words share the senses (synsets) that hold both. With p(s | w) of `sense_shares`, a candidate c stays if

        Σ_s p(s | word) · Σ_s p(s | c) ≥ AGREEMENT,  s over the shared senses,

    so neither word is likely to be read in another sense ("act" is no synonym of "move", though they share one),
    if it was tagged at least once in a shared sense (no word that hardly anybody uses), and if, as a verb, it
    takes every sentence frame that the word takes there. Best first. Source: DESIGN, Traps already met.
    """
    own = sense_shares(word, part_of_speech)
    shared: dict[str, list[str]] = {}
    for name in own:
        synset = wordnet().synset(name)
        lemmas = {lemma.name(): lemma for lemma in synset.lemmas()}
        for candidate, lemma in lemmas.items():
            if candidate != word and candidate.isalpha() and candidate.islower() \
                    and sense_counts().get(lemma.key(), 0) > 0 and _fits(lemma, lemmas[word]):
                shared.setdefault(candidate, []).append(name)
    agreement = {}
    for candidate, names in shared.items():
        other = sense_shares(candidate, part_of_speech)
        agreement[candidate] = sum(own[name] for name in names) * sum(other[name] for name in names)
    kept = [candidate for candidate in shared if agreement[candidate] >= AGREEMENT]
    return tuple(sorted(kept, key=lambda candidate: (-agreement[candidate], candidate)))


def _fits(candidate, lemma) -> bool:
    """Whether a lemma can stand where another of its synset stands: verb frames, before or after the noun."""
    return (set(lemma.frame_ids()) <= set(candidate.frame_ids())
            and candidate.syntactic_marker() == lemma.syntactic_marker())


def part_of_speech_of(tag: str) -> str | None:
    """WordNet's letter for a Penn tag, None for tags of names and of function words."""
    if tag.startswith("NNP"):
        return None
    return {"NN": "n", "VB": "v", "JJ": "a", "RB": "r"}.get(tag[:2])


@lru_cache(maxsize=None)
def lemmas_of(form: str, part_of_speech: str) -> tuple[str, ...]:
    """The dictionary's lemmas of a lower-case form; ("act",) for "acted" as "v". Empty if unknown."""
    from lemminflect import getAllLemmas

    universal = {"n": "NOUN", "v": "VERB", "a": "ADJ", "r": "ADV"}[part_of_speech]
    return getAllLemmas(form, universal).get(universal, ())


@lru_cache(maxsize=None)
def inflections(lemma: str, tag: str) -> tuple[str, ...]:
    """The lemma's forms for a Penn tag, usual one first: ("dogs", "dog") for "dog", "NNS". Empty if unknown."""
    from lemminflect import getInflection

    return tuple(getInflection(lemma, tag, inflect_oov=False))


def inflect(lemma: str, tag: str) -> str | None:
    """The lemma's usual one-word form for a Penn tag ("hounds" for "hound", "NNS"), None if there is none."""
    forms = inflections(lemma, tag)
    return forms[0] if forms and forms[0].isalpha() else None


@lru_cache(maxsize=None)
def synonym_forms(form: str, tag: str) -> tuple[str, ...]:
    """Forms that can stand for a lower-case word form with this Penn tag: `synonyms`, inflected alike.

    A form that serves several tags ("started": past and participle) takes only candidates that have one form
    for all of them, since taggers often mistake one for the other. Empty if there are none.
    """
    part_of_speech = part_of_speech_of(tag)
    if part_of_speech is None:
        return ()
    forms: dict[str, None] = {}
    for lemma in lemmas_of(form, part_of_speech):
        tags = [other for other in TAGS[part_of_speech] if form in inflections(lemma, other)]
        if tag not in tags:
            continue
        for candidate in synonyms(lemma, part_of_speech):
            inflected = {inflect(candidate, other) for other in tags}
            if len(inflected) == 1:
                forms.update(dict.fromkeys(inflected - {None, form}))
    return tuple(forms)


@lru_cache(maxsize=1)
def multiword_lemmas() -> frozenset[str]:
    """WordNet's lemmas of several words, joined by underscores ("hot_dog", "end_up")."""
    return frozenset(name for name in wordnet().all_lemma_names() if "_" in name)
