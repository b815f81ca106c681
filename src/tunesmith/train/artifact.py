"""What a finished job leaves: a model or an adapter that anything can load, and how it was made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith import manifest

KIND = "artifact"
RECORD = "training.json"


def write(
    attempt_dir: Path, save_model: Callable[[Path], None], record: dict[str, Any]
) -> tuple[Path, str]:
    """Write `<attempt>/artifact`. Returns it with the SHA-256 of its manifest.

    Raises whatever the disk says, with nothing half-made left.
    """
    final, staging = attempt_dir / "artifact", attempt_dir / ".artifact.part"
    shutil.rmtree(staging, ignore_errors=True)
    if final.exists():
        manifest.remove(final)
    try:
        staging.mkdir(parents=True)
        save_model(staging)
        body = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True)
        (staging / RECORD).write_text(body + "\n", encoding="utf-8")
        return final.absolute(), manifest.commit(staging, final, KIND)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
