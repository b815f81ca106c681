"""A full disk, told as what it is."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.errors import NoSpaceError


@contextmanager
def told_as_no_space() -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpaceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                "the disk that holds the workspace is full; free space and try again"
            ) from error
        raise
