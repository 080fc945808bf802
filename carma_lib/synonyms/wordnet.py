"""WordNet: definitions, synonyms by part of speech and sense, inflection.

Parts of speech are WordNet's letters: "n" noun, "v" verb, "a" adjective (satellites included), "r" adverb.
Tags are those of the Penn Treebank. Heavy libraries are imported when first used.
"""
from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

from carma_lib.synonyms.reader import WordNetNotFound, one_thread_at_a_time, remembered, wordnet  # noqa: F401

if TYPE_CHECKING:
    import pandas
    from nltk.corpus.reader.wordnet import Lemma

# What introduces the examples of a gloss, and what is left before them.
CONNECTIVES = re.compile(r"(?:[\s;:,]|\be\.g\.|\bas in(?: the expression)?|\bespecially in the phrase|"
                         r"`\w+' is formal or literary)+$")
# What makes a synonym; see `synonyms` and `usual_part_of_speech`.
AGREEMENT = 0.5
RARITY = 0.1
USUAL = 0.33
VALENCY = 0.4
WITHOUT_OBJECT = frozenset([1, 2, 3, 4, 6, 7, 12, 13, 22, 23, 27, 36, 37, 38, 39])  # sentence frames, "Somebody ----s PP"
# Words that taggers call nouns, verbs, adjectives or adverbs, but that carry grammar rather than content.
FUNCTION_WORDS = frozenset(
    "be am is are was were been being have has had having do does did done doing get gets got let lets "
    "not no never so very too as all but off more most less least much many few such own same other another "
    "only just even still yet then there here now how why when where ever however else almost also well "
    "rather quite about enough plenty several various certain one ones none other others "
    "thing things something nothing anything everything someone anyone everyone somebody anybody everybody nobody "
    "somewhere anywhere everywhere nowhere somehow anyhow anyway lot lots bit kind sort rest little alone "
    "getting gotten letting ain ca wo sha concerning regarding".split())
# Usage domains of WordNet whose words are never introduced, in whichever of their senses they carry it; the same said
# in a gloss; and words that WordNet does not mark.
COARSE_DOMAINS = frozenset("disparagement ethnic_slur obscenity vulgarism slang street_name".split())
COARSE_GLOSS = re.compile(r"\bslang\b|\b(?:obscen|vulgar|derogat|disparag|offensive|insult|contemptuous|ethnic slur)\w*"
                          r"\b[^;]*\b(?:term|word|name|expression|reference|for)s?\b", re.IGNORECASE)
COARSE_WORDS = frozenset(
    "arse arsehole ass backside balls bastard bawd bimbo bitch blackamoor bloody bollocks bonk boob boobs booty bugger "
    "bum buns butt butthole camp cocotte coloured colored crap cretin crip cripple cunt damn damned dammit darky dick "
    "dike dirt dumbass dyke fag faggot fairy fanny fart floozie floozy fruit fuck fucking gaga gimp git goddam "
    "goddamn gook gyp gypsy half-breed halfbreed halfwit harlot harelip heathen hell ho homo honky hooker hump hussy "
    "hustler idiot imbecile infidel jackass jerk jew jewess jism jizz keister knocker knockers lesbo lezzie "
    "loony lunatic midget minge mong mongol mongoloid mongrel moron mulatto nance negress negro nigga nigger niggard "
    "niggardly nuts nutter nympho octoroon oriental pagan pansy papist pecker pee peeing piddle pillock piss pissed "
    "pisser pissing poof poop poove prat prick puke puss pussy quadroon queer redneck redskin retard retarded savage "
    "schmuck screw screwed screwing shag shaft shit shite shitty shtup sissy slag slit slut snatch sod spastic spaz "
    "spic spick spik squaw streetwalker strumpet tart tit tits titty tosser tramp tranny trollop turd tush twat wank "
    "wanker wee wee-wee welch welsh whore wimp wog wop wuss yid bosom "
    "bust dame dumb gay gayly hick idiotic queerly "
    "crippled darn darned doggone doggoned goddamned handicapped neanderthal prostitute spinster".split())
DATED_DOMAINS = frozenset("archaism dialect regionalism combining_form trade_name trademark".split())
BASE_TAGS = ("NN", "VB", "VBP", "JJ", "RB")
TAGS = {"n": ("NN", "NNS"), "v": ("VB", "VBP", "VBZ", "VBD", "VBN", "VBG"), "a": ("JJ", "JJR", "JJS"),
        "r": ("RB", "RBR", "RBS")}


@remembered
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
    "s" for satellite adjectives, "r"), definition (`definition_of` its gloss), count (tagged uses of this sense).
    """
    import pandas

    counts, rows, glosses = sense_counts(), [], _glosses()
    for synset in wordnet().all_synsets():
        definition = definition_of(glosses[synset.pos().replace("s", "a"), synset.offset()])
        rows += [(lemma.name(), synset.name(), synset.pos(), definition, counts.get(lemma.key(), 0))
                 for lemma in synset.lemmas()]
    return pandas.DataFrame(rows, columns=["lemma", "synset", "part_of_speech", "definition", "count"])


def definition_of(gloss: str) -> str:
    """A gloss without its quoted examples, the names of those quoted, and the words that introduce them.

    Quotation marks inside brackets are part of the definition and become `single ones'. An example whose first
    quotation mark is missing begins at the semicolon before it.
    """
    if gloss.count('"') % 2 and re.match(r'[^"]*\w"', gloss):
        before = gloss.split('"')[0]
        gloss = before.rpartition(";")[0] or before
    depth, marks, kept = 0, itertools.cycle("`'"), []
    for letter in gloss:
        depth += (letter == "(") - (letter == ")")
        if letter == '"' and depth == 0:
            break
        kept.append(next(marks) if letter == '"' else letter)
    gloss = re.sub(r"\s+", " ", re.sub(r"(?<=\()\s+|\s+(?=\))", "", "".join(kept)))
    return CONNECTIVES.sub("", gloss).strip()


def in_its_own_definition(lemma: str, definition: str) -> bool:
    """Whether a definition holds its lemma, or a word that may be another form of it ("reversed" for "reverse")."""
    return any(lemma in _possible_lemmas(word) for word in set(re.findall(r"[^\W\d_]+", definition.lower())))


@remembered
def _possible_lemmas(form: str) -> frozenset[str]:
    return frozenset([form]).union(*(lemmas_of(form, letter) for letter in TAGS))


def _glosses() -> dict[tuple[str, int], str]:
    found = {}
    for name, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        for line in wordnet().open(f"data.{name}").read().splitlines():
            if line[:1].isdigit():
                found[letter, int(line[:8])] = line.partition("| ")[2].strip()
    return found


@remembered
def is_coarse(word: str) -> bool:
    """Whether a word is a slur, obscene or slang in any sense, by WordNet's usage domains, its glosses or our list."""
    names = {word.lower(), *(lemma for letter in TAGS for lemma in lemmas_of(word.lower(), letter))}
    return bool(names & COARSE_WORDS) or any(
        COARSE_GLOSS.search(synset.definition()) or COARSE_DOMAINS & _domains(synset)
        or any(COARSE_DOMAINS & _domains(lemma) for lemma in synset.lemmas() if lemma.name().lower() in names)
        for synset in wordnet().synsets(word.lower()))


def is_dated(lemma: Lemma) -> bool:
    """Whether WordNet marks a lemma or its synset as archaic, dialect, a combining form or a trade name."""
    return bool(DATED_DOMAINS & (_domains(lemma) | _domains(lemma.synset())))


def _domains(entry) -> set[str]:
    """Names of the usage domains of a synset or a lemma."""
    return {domain.name().split(".")[0].lower() for domain in entry.usage_domains()}


@remembered
def tagged_uses(word: str, part_of_speech: str) -> dict[str, int]:
    """Synset name → how often the lemma was tagged in that sense; empty if WordNet lacks the word as this."""
    return {synset.name(): sense_counts().get(lemma.key(), 0)
            for synset in wordnet().synsets(word, part_of_speech)
            for lemma in synset.lemmas() if lemma.name() == word}


def sense_shares(word: str, part_of_speech: str) -> dict[str, float]:
    """Synset name → share of the word's uses in that sense: (count + 1) / (all counts + number of senses).

    The ones added keep a word that was tagged once or twice from looking certain, and give the senses of a
    word that was never tagged equal shares.
    """
    uses = tagged_uses(word, part_of_speech)
    return {synset: (count + 1) / (sum(uses.values()) + len(uses)) for synset, count in uses.items()}


@remembered
def synonyms(word: str, part_of_speech: str, agreement: float = AGREEMENT) -> tuple[str, ...]:
    """Lemmas that mean the same as the lemma `word` in most uses of both; single words without hyphens.

    Two words share the senses (synsets) that hold both. With p(s | w) of `sense_shares` and n(w) the tagged
    uses of w in the shared senses, a candidate c stays if

        Σ_s p(s | word) · Σ_s p(s | c) ≥ agreement,  s over the shared senses,
        n(c) ≥ max(1, RARITY · n(word)),

    so neither word is likely to be read in another sense ("move" is no synonym of "act", though they share
    one) and no common word becomes a rare one. Besides, it must fit grammatically (`_fits`; of verbs, `objectless` of
    the candidate is at most VALENCY lower), be used as this part of speech, be neither coarse (`is_coarse`) nor dated,
    and be another word rather than an abbreviation, a spelling or a derivation: candidates of one or two letters, and
    words that begin with the same four letters, are left out. Best first. Source: own decision; the published code
    takes WordNet's lemmas without a gate.
    """
    own, shared, agreeing = sense_shares(word, part_of_speech), {}, {}
    for name in own:
        lemmas = {lemma.name(): lemma for lemma in wordnet().synset(name).lemmas()}
        for candidate in lemmas:
            if _is_other_word(candidate, word) and _fits(lemmas[candidate], lemmas[word]):
                shared.setdefault(candidate, []).append(name)
    for candidate, names in shared.items():
        other = sense_shares(candidate, part_of_speech)
        uses, other_uses = (sum(tagged_uses(lemma, part_of_speech)[name] for name in names) for lemma in (word, candidate))
        score = sum(own[name] for name in names) * sum(other[name] for name in names)
        if (score >= agreement and other_uses >= max(1, RARITY * uses) and usual_part_of_speech(candidate, part_of_speech)
                and (part_of_speech != "v" or objectless(candidate) >= objectless(word) - VALENCY)):
            agreeing[candidate] = score
    return tuple(sorted(agreeing, key=lambda candidate: (-agreeing[candidate], candidate)))


@remembered
def objectless(verb: str) -> float:
    """Share of a verb's uses (`sense_shares`) in senses that WordNet gives a sentence frame without an object; 1 if it lacks the verb.

    "enroll" has 1, "recruit" 0.53: one enrolls in a plan, but recruits somebody. The frames of the one sense that both
    share do not tell, since WordNet gives all words of a synset the same.
    """
    lemmas, shares = wordnet().lemmas(verb, "v"), sense_shares(verb, "v")
    return sum(shares.get(each.synset().name(), 0.0) for each in lemmas if WITHOUT_OBJECT & set(each.frame_ids())) if shares else 1.0


def _is_other_word(candidate: str, word: str) -> bool:
    return (len(candidate) > 2 and candidate.isalpha() and candidate.islower() and candidate not in FUNCTION_WORDS
            and not candidate.startswith(word[:4]) and not word.startswith(candidate[:4]))


def _fits(candidate: Lemma, lemma: Lemma) -> bool:
    """Whether a lemma can stand where another of its synset stands.

    A verb takes every sentence frame of the other; an adjective stands on the same side of its noun; a noun
    is neither a verb's -ing form (bringing) nor a plural (authorities), which take other articles.
    """
    name = candidate.name()
    if is_coarse(name) or is_dated(candidate):
        return False
    if candidate.synset().pos() == "n":
        gerund = name.endswith("ing") and lemmas_of(name, "v") != (name,)
        return not gerund and lemmas_of(name, "n") == (name,)
    return (set(lemma.frame_ids()) <= set(candidate.frame_ids())
            and candidate.syntactic_marker() == lemma.syntactic_marker())


@remembered
def _uses_by_part_of_speech() -> Counter[tuple[str, str]]:
    uses = Counter()
    for key, count in sense_counts().items():
        lemma, sense = key.split("%")
        uses[lemma, "nvara"[int(sense[0]) - 1]] += count
    return uses


@remembered
def usual_part_of_speech(form: str, part_of_speech: str) -> bool:
    """Whether at least USUAL of the tagged uses of a form's lemmas are of this part of speech."""
    uses = {letter: sum(_uses_by_part_of_speech()[lemma, letter] for lemma in lemmas_of(form, letter))
            for letter in TAGS}
    return uses[part_of_speech] >= USUAL * sum(uses.values())


def part_of_speech_of(tag: str) -> str | None:
    """WordNet's letter for a Penn tag, None for tags of names and of function words."""
    if tag.startswith("NNP"):
        return None
    return {"NN": "n", "VB": "v", "JJ": "a", "RB": "r"}.get(tag[:2])


@remembered
def lemmas_of(form: str, part_of_speech: str) -> tuple[str, ...]:
    """The lemmas of a lower-case form: ("act",) for "acted" as "v". An unknown form is its own lemma."""
    from lemminflect import getAllLemmas

    universal = {"n": "NOUN", "v": "VERB", "a": "ADJ", "r": "ADV"}[part_of_speech]
    return getAllLemmas(form, universal).get(universal, (form,))


@remembered
def inflections(lemma: str, tag: str) -> tuple[str, ...]:
    """The lemma's forms for a Penn tag, usual one first: ("dogs", "dog") for "dog", "NNS". Empty if none."""
    from lemminflect import getAllInflections

    universal = {"NN": "NOUN", "VB": "VERB", "JJ": "ADJ", "RB": "ADV"}[tag[:2]]
    forms = getAllInflections(lemma, universal)
    if tag == "VBN":  # listed only where it is not the past tense
        forms = {"VBN": forms.get("VBD", ()), **forms}
    return forms.get(tag, (lemma,) if tag in BASE_TAGS else ())


def inflect(lemma: str, tag: str) -> str | None:
    """The lemma's usual one-word form for a Penn tag ("hounds" for "hound", "NNS"), None if there is none."""
    forms = inflections(lemma, tag)
    return forms[0] if forms and forms[0].isalpha() else None


@remembered
def synonym_forms(form: str, tag: str, agreement: float = AGREEMENT) -> tuple[str, ...]:
    """Forms that can stand for a lower-case word form with this Penn tag: `synonyms`, inflected alike.

    A form that serves several tags ("started": past and participle) takes only candidates that have one form
    for all of them, since taggers often mistake one for the other. Empty if there are none. A lower
    `agreement` finds more candidates, of which more mean something else.
    """
    part_of_speech = part_of_speech_of(tag)
    if part_of_speech is None or not usual_part_of_speech(form, part_of_speech):
        return ()
    forms: dict[str, None] = {}
    for lemma in lemmas_of(form, part_of_speech):
        tags = [other for other in TAGS[part_of_speech] if form == inflect(lemma, other)]
        if tag not in tags:
            continue
        for candidate in synonyms(lemma, part_of_speech, agreement):
            inflected = {inflect(candidate, other) for other in tags}
            if len(inflected) == 1:
                forms.update(dict.fromkeys(each for each in inflected - {None, form} if not is_coarse(each)))
    return tuple(forms)


@remembered
def multiword_lemmas() -> frozenset[str]:
    """WordNet's lemmas of several words, joined by underscores ("hot_dog", "end_up")."""
    return frozenset(name for name in wordnet().all_lemma_names() if "_" in name)
