"""One line per event, facts as key=value, no secrets."""

import logging
from collections.abc import Iterator

import pytest

from runtime.logs import configure_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_names_time_level_role_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode-0", "info")
    logging.getLogger("engine.core").info("request %s finished", "r1", extra={"num_tokens": 5, "note": "a b", "s": 0.5})
    time, rest = capsys.readouterr().err.strip().split(" ", 1)
    assert time.endswith("Z")
    assert rest == 'INFO decode-0 engine.core request r1 finished num_tokens=5 note="a b" s=0.5'


def test_an_event_is_one_line_even_with_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode-0", "info")
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logging.getLogger("x").exception("it\nfailed")
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "it failed" in output
    assert r"ValueError: broken\nin two" in output


def test_secrets_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router", "debug", ["top-secret", None, ""])
    log = logging.getLogger("x")
    log.warning("the key top-secret was wrong", extra={"header": "Bearer abc.def", "api_key": "xyz"})
    output = capsys.readouterr().err
    assert "top-secret" not in output
    assert "abc.def" not in output
    assert "xyz" not in output


def test_levels_and_the_web_server(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router", "warning")
    configure_logging("router", "info")
    logging.getLogger("a").debug("too quiet")
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("a slow client", extra={"color_message": "red"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("WARNING router uvicorn.error a slow client")
