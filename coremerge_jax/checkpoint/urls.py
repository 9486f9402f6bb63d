"""Addresses that are no local paths."""

import re
from pathlib import Path

from coremerge_jax.errors import FormatError

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
