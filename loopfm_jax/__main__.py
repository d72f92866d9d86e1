"""`python -m loopfm_jax`."""

from loopfm_jax.cli import main

main()
