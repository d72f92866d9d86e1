"""LoopFM in JAX/Flax (arXiv 2605.29280): a foundation model's past embeddings as model features.

The data flow is the listing: `data` -> `fm` (teacher, export) -> `history` -> `vm` (student);
`backbones` are the CTR models that both sides share.

Dimension key, used as array suffixes everywhere:

    B examples      F categorical fields   C id columns (fields, then sequence positions)
    E field width   N numeric columns      S store rows
    L history length  T packed tokens      Z code width (numbers, not bytes)
    W hidden width  H heads                V vocabulary rows
"""

from loopfm_jax.memory import share_arena
from loopfm_jax.simulated import give_threads
from loopfm_jax.vectors import sort_by_avx2

__version__ = "0.1.0"

# Here, because libraries start threads when they are imported, and numpy chooses its loops then.
share_arena()
sort_by_avx2()
give_threads()
