import logging
import subprocess
import sys
import warnings

import pytest

from hf_ext import log


@pytest.fixture(autouse=True)
def _forget_warnings():
    log._seen.clear()


def test_every_logger_is_below_hf_ext():
    assert log.get_logger("hf_ext.config").name == "hf_ext.config"
    assert log.get_logger("benchmark").name == "hf_ext.benchmark"


def test_a_warning_is_logged_once(caplog):
    logger = log.get_logger("hf_ext.test_log")
    with caplog.at_level(logging.WARNING, logger="hf_ext"):
        log.warn_once(logger, "rank 9 lowered to 8")
        log.warn_once(logger, "rank 9 lowered to 8")
        log.warn_once(logger, "rank 7 lowered to 6")
    assert [record.message for record in caplog.records] == ["rank 9 lowered to 8", "rank 7 lowered to 6"]


def test_a_warning_is_seen_where_logging_was_never_configured(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.warn_once(log.get_logger("hf_ext.test_log"), "dropped 3 settings")
    assert [str(warning.message) for warning in caught] == ["dropped 3 settings"]


@pytest.mark.parametrize(
    ("verbosity", "heard"), [("", ""), ("info", "INFO hf_ext.x: hello"), ("error", ""), ("20", "INFO hf_ext.x: hello")]
)
def test_the_environment_sets_the_level(verbosity, heard):
    code = "from hf_ext.log import get_logger; get_logger('hf_ext.x').info('hello')"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"HF_EXT_VERBOSITY": verbosity}, capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == heard
