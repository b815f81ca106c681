"""Files without a name, for what is too much to hold: they go with their descriptor."""

import tempfile
from pathlib import Path
from typing import BinaryIO


def scratch(near: Path) -> BinaryIO:
    """In the folder `near`, whose disk has room for data; else where temporary files go.

    The folder for temporary files may be memory, so it comes second.
    """
    try:
        return tempfile.TemporaryFile(dir=near)
    except OSError:
        return tempfile.TemporaryFile()
