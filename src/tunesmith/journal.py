"""How a process writes its log: lines of text, or a JSON object a line."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

FIELDS = "fields"
"""The `extra` of a record under which its structured part lies."""


class Json(logging.Formatter):
    """Time, level, part and words of a record, and its fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, FIELDS, None)
        told |= fields or {"message": record.getMessage()}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def formatter(kind: str) -> logging.Formatter:
    """For `log_format`: text or json."""
    if kind == "json":
        return Json()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def tell(log: logging.Logger, fields: dict[str, Any]) -> None:
    """One structured line; as text, `name=value` after another."""
    line = " ".join(f"{name}={value}" for name, value in fields.items())
    log.info("%s", line, extra={FIELDS: fields})
