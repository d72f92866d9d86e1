"""The engine's options, and what is said where Beam is not installed."""

import sys

import pytest

from loopfm_jax.engine import BeamConfig, import_beam
from loopfm_jax.errors import UserError


@pytest.mark.parametrize("option", ["--region=x", "", "=x", "a b=c", "runner=FlinkRunner"])
def test_options_that_are_none(option):
    with pytest.raises(UserError, match="beam.options"):
        BeamConfig(options=(option,))


def test_options_are_passed_on_as_they_are():
    assert BeamConfig(options=("region=us-east1", "no_use_public_ips")).options


def test_without_beam_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[beam\]'.*--engine polars"):
        import_beam()
