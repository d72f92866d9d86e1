"""Threads of simulated devices."""

import os

import pytest

from loopfm_jax.simulated import THREADS, give_threads


@pytest.mark.parametrize(
    ("flags", "given", "want"),
    [
        ("--xla_force_host_platform_device_count=999 --xla_cpu_x=1", None, "1000"),
        ("--xla_force_host_platform_device_count=1", None, str(max(2, os.cpu_count() or 1))),
        (
            "--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=999",
            None,
            "1000",
        ),
        ("--xla_force_host_platform_device_count=999", "7", "7"),
        ("--xla_cpu_x=1", None, None),
    ],
)
def test_every_device_has_one_and_there_is_one_more(monkeypatch, flags, given, want):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv(THREADS)
    if given:
        monkeypatch.setenv(THREADS, given)
    give_threads()
    assert os.environ.get(THREADS) == want
