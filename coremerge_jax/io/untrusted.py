"""Reads JSON and YAML that others wrote: the outcome is always data, or one error.

Limits are far above what real files need, and low enough that none of them costs much time or
memory.
"""

import errno
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from coremerge_jax.errors import FormatError

JSON_SIZE = 8 * 2**20
YAML_SIZE = 2**18  # PyYAML reads some 100 kB a second
_DEPTH = 64
_DIGITS = 100

# A test of a JSON value, and what it expects, for messages.
Kind = tuple[Callable[[Any], bool], str]


# --- Files ----------------------------------------------------------------------------------
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")  # a Path has lost one slash

_COPY = {
    "gs": "with 'gcloud storage cp -r'",
    "s3": "with 'aws s3 cp --recursive'",
    "hdfs": "with 'hdfs dfs -get'",
}
_COPY["s3a"] = _COPY["s3n"] = _COPY["s3"]


def refuse_url(path: str | Path) -> None:
    """Refuses ``scheme://…``, such as a bucket's address: coremerge reads and writes local folders.

    Args:
        path: of an input or an output; a `Path`, in which ``://`` has become ``:/``, counts too.

    Raises:
        FormatError: it is such an address, and no folder has that name.
    """
    text = str(path)
    found = _SCHEME.match(text)
    if not found or (found[2] == "/" and Path(path).exists()):
        return
    scheme, rest = found[1], text[found.end() :]
    copy = _COPY.get(scheme.lower(), "with the tools of that storage")
    raise FormatError(
        f"{scheme}://{rest}: no local folder, and coremerge reads and writes local ones only; copy "
        f"it {copy}, or mount it, and give that folder"
    )


def is_regular(file: Path) -> bool:
    """Returns True if a file is there.

    Raises:
        FormatError: something is there that is no regular file, and that reading might block on.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if file.is_symlink():
            raise FormatError(f"{file}: a link to a file that is not there") from None
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not stat.S_ISREG(mode):
        raise FormatError(f"{file}: not a regular file; expected a file, not {kind_of(mode)}")
    return True


def check_path(path: str | Path) -> None:
    """Checks that a path may be read: it is local, and the system and a record in UTF-8 take it.

    It need not exist.

    Raises:
        FormatError: it is an address (`refuse_url`), not UTF-8, too long, a loop of links, in a
            folder that may not be entered, or has a NUL in it.
    """
    refuse_url(path)
    try:
        for text in (os.fspath(path), os.path.basename(os.path.realpath(path))):  # noqa: PTH119
            text.encode()
        Path(path).stat()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{str(path)!r:.300}: its name is not UTF-8, so no record can have it; rename it"
        ) from error
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError | ValueError) -> FormatError:
    """Returns the error for a path that the system does not take: too long, a loop, with a NUL."""
    return FormatError(f"{str(path)!r:.300}: {getattr(error, 'strerror', None) or error}")


def kind_of(mode: int) -> str:
    """Returns the kind of something in a folder, by its mode: "a pipe", "a device"."""
    tests = {
        "a folder": stat.S_ISDIR,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((name for name, test in tests.items() if test(mode)), "something else")


def read_text(file: Path, limit: int) -> str:
    """Returns the text of a regular file in UTF-8.

    Args:
        file: the file.
        limit: the most bytes that it may have.

    Raises:
        FormatError: it is no regular file, too large, or not UTF-8.
        OSError: it is missing, or cannot be read.
    """
    if not is_regular(file):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:  # of a read, which does not say of what
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(file)) from error
    if len(data) > limit:
        raise FormatError(f"{file}: larger than {limit:,} bytes, the most that is read of its kind")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: not a text file in UTF-8 (byte {error.start})") from error


# --- JSON -----------------------------------------------------------------------------------
def read_json(file: Path, folder: str, *, limit: int = JSON_SIZE) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        file: the file.
        folder: what the folder should be that it is in, for messages.
        limit: the most bytes that it may have.

    Raises:
        FormatError: it is missing, or holds something else.
    """
    if not is_regular(file):
        raise FormatError(f"{file.parent}: no {file.name}; expected {folder}")
    content = parse_json(read_text(file, limit), str(file))
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text.

    Numbers that are not finite pass, as Python writes them (``Infinity``): where a number is
    needed, its kind is checked.

    Args:
        text: the text.
        where: where it is from, for messages.

    Raises:
        FormatError: it is not valid, has a key twice, is nested too deeply, or has a number of
            too many digits or half a character in it.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise FormatError(f"{where}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from error
    check_nesting(content, where)
    if re.search(r"\\u[dD]", text):
        _check_text(content, where)
    return content


_TOO_DEEP = f"nested more than {_DEPTH} levels deep; expected a few"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{short(twice)} is given twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:12]}…")
    return int(digits)


def check_nesting(value: Any, where: str) -> None:
    """Checks that lists and mappings are not nested too deeply to be walked through.

    Raises:
        FormatError: they are.
    """
    level = [value]
    for _ in range(_DEPTH):
        held = (x.values() if isinstance(x, dict) else x for x in level if _holds(x))
        level = [y for x in held for y in x]
        if not level:
            return
    raise FormatError(f"{where}: {_TOO_DEEP}")


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def _check_text(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise FormatError(f"{where}: has half of a character ({half!r}) in a text") from error


# --- Kinds of values ------------------------------------------------------------------------
def is_whole(value: object) -> bool:
    """Returns True if a value is a whole number that fits in 64 bits; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> bool:
    """Returns True if a value is a finite number; true and false are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def is_text(value: object) -> bool:
    """Returns True if a value is text."""
    return isinstance(value, str)


def is_list_of(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Returns the test for a list of which all values pass a test."""
    return lambda value: isinstance(value, list) and all(map(check, value))


SWITCH: Kind = (lambda value: isinstance(value, bool), "true or false")
WHOLE: Kind = (is_whole, "a whole number")
NUMBER: Kind = (is_number, "a finite number")
TEXT: Kind = (is_text, "a text")
TEXTS: Kind = (is_list_of(is_text), "a list of texts")
OBJECT: Kind = (lambda value: isinstance(value, dict), "an object")


def either(*kinds: Kind) -> Kind:
    """Returns the kind of a value that is of one of these kinds."""
    return lambda value: any(test(value) for test, _ in kinds), " or ".join(x for _, x in kinds)


def check_kinds(where: object, fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Checks the kind of each field that is there, and not null.

    Args:
        where: where they are from, for messages.
        fields: the fields.
        kinds: kind of each known field.

    Raises:
        FormatError: a field is of another kind.
    """
    for name in fields.keys() & kinds.keys():
        value, (test, expected) = fields[name], kinds[name]
        if value is not None and not test(value):
            raise FormatError(f"{where}: {name} is {short(value)}; expected {expected}")


def short(value: Any) -> str:
    """Returns a JSON value for messages."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- YAML -----------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, and a key given twice is an error.

    Aliases, by which a short text can mean a huge one, are refused.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        # The scanner's time is quadratic in this depth.
        if self.flow_level >= _DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"*{event.anchor} is an alias, which is not read; "
                "put names with a * in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if isinstance(key, str | int | float | None) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is given twice", problem_mark=node.start_mark
                )
            if isinstance(key, str | int | float | None):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        digits = len(node.value)
        if digits > _DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {digits} digits", problem_mark=node.start_mark
            )
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value of a YAML (or JSON) text.

    Args:
        text: the text.
        where: where it is from, for messages.

    Raises:
        FormatError: it is not valid, has a key twice or an alias, is too long or nested too
            deeply, or has a number of too many digits or half a character in it.
    """
    if len(text) > YAML_SIZE:
        raise FormatError(f"{where}: a text of {len(text):,} characters; at most {YAML_SIZE:,}")
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; put names with a * in quotes" if "alias" in f"{error.context}" else ""
        raise FormatError(f"{where}{line}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise FormatError(f"{where}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise FormatError(f"{where}: {_TOO_DEEP}") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors do not check what a tag or a date stands for.
        raise FormatError(f"{where}: not valid YAML ({error})") from error
    check_nesting(content, where)
    if "\\" in text:
        _check_text(content, where)
    return content
