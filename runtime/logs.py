"""Logs: one line per event, on stderr, the same shape for every role.

    2026-11-21T12:00:00.123Z INFO decode-0 kv_transfer.handoff.imports fetched request_id=req-1 blocks=12

Facts go into `extra={"request_id": ...}` and come out as key=value. A traceback is one of them, so a line is an event,
always. Secrets do not come out: values of the keys that hold them, bearer tokens, and whatever `secrets` names.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]

MASK = "***"
_SECRET_NAMES = frozenset({"api_key", "cluster_key", "authorization", "password", "secret"})
_BEARER = re.compile(r"(bearer\s+)\S+", re.IGNORECASE)
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_PLAIN = re.compile(r"[^\s\"=]+")
_QUIET = {"uvicorn.error": logging.WARNING, "uvicorn.access": logging.CRITICAL, "httpx": logging.WARNING}
"""Loggers of others whose news is none to us. uvicorn's goes through the root like all; its access log is off."""


def configure_logging(role: str, level: Level, secrets: Iterable[str | None] = ()) -> None:
    """Set up the process's logging; a second call replaces the first. `role` names the process in each line;
    `secrets` are masked wherever they would appear."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(role, secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", *_QUIET):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(_QUIET.get(name, logging.NOTSET))


class LineFormatter(logging.Formatter):
    """A record as one line."""

    def __init__(self, role: str, secrets: Iterable[str | None] = ()) -> None:
        super().__init__()
        self._role = role
        self._secrets = [secret for secret in secrets if secret]

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = f"{moment}.{int(record.msecs):03d}Z {record.levelname} {self._role} {record.name}"
        message = " ".join(record.getMessage().splitlines())
        line = " ".join([head, message, *self._facts(record)])
        for secret in self._secrets:
            line = line.replace(secret, MASK)
        return _BEARER.sub(rf"\1{MASK}", line)

    def _facts(self, record: logging.LogRecord) -> Iterable[str]:
        for name, value in vars(record).items():
            if name not in _OWN_FIELDS:
                yield f"{name}={MASK if name in _SECRET_NAMES else _quoted(value)}"
        if record.exc_info:
            yield f"traceback={json.dumps(self.formatException(record.exc_info), ensure_ascii=False)}"


def _quoted(value: object) -> str:
    """As it is where that is one word, in JSON quotes where it is not."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
