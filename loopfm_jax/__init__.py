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

__version__ = "0.1.0"

share_arena()  # here, because libraries start threads when they are imported
