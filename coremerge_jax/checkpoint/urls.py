"""Addresses that are no local paths."""

import re
from pathlib import Path

from coremerge_jax.errors import FormatError

# `Path` makes one slash of two. A drive of Windows has one letter.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def refuse_url(path: str | Path) -> None:
    """Refuses a bucket or another remote address, which would be taken for a local folder.

    Raises:
        FormatError: the path starts like ``gs://`` or ``s3://``.
    """
    if _URL.match(str(path)):
        address = re.sub(":/+", "://", str(path), count=1)
        raise FormatError(
            f"{address}: only local folders are read and written; copy from or to it "
            "(such as by 'gcloud storage cp -r'), or mount the bucket"
        )
