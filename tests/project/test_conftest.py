"""What the fixtures promise of every test."""

import logging
from pathlib import Path
from typing import TextIO

import pytest
from detectron2.utils.logger import setup_logger

STREAMS: list[TextIO] = []


@pytest.mark.parametrize("number", [1, 2])
def test_a_log_ends_with_its_test(tmp_path: Path, number: int) -> None:
    logger = logging.getLogger("detectron2")
    assert all(stream.closed for stream in STREAMS)
    assert not logger.handlers
    assert logger.propagate
    setup_logger(str(tmp_path))
    logger.info("test %d", number)
    assert (tmp_path / "log.txt").read_text().count("test") == 1
    handler = logger.handlers[-1]
    assert isinstance(handler, logging.StreamHandler)
    STREAMS.append(handler.stream)
