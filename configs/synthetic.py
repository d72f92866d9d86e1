"""The embedded default: a simulated feed, no download."""

from loopfm_jax.config import Config


def get_config() -> Config:
    return Config()
