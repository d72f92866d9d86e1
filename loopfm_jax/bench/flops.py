"""How many floating-point operations an example needs: products only (2 m n k), real events only.

The least that computes the published functions: the first layer of a score MLP is split (see
`backbones.attention`), what does not depend on the event is multiplied once per example, nothing is
spent on padding. Activations, softmax, lookups and the optimiser are left out; so a share of the
peak reckoned from this is a lower bound.
"""

from collections.abc import Sequence

from loopfm_jax.backbones import BackboneConfig, interformer, kunlun
from loopfm_jax.backbones.config import SEQUENCE_BACKBONES
from loopfm_jax.data.schema import Behaviour, Schema
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.history.encoders import POOLING, EncoderConfig, spec_of


def forward(
    schema: Schema, config: BackboneConfig, *, tokens: float, pairs: float, extra_fields: int = 0
) -> float:
    """FLOPs of one example.

    Args:
      tokens: mean events of a behaviour.
      pairs: mean causal pairs of events of a behaviour, each with itself included.
      extra_fields: K, of histories.
    """
    if config.name not in COUNTED:
        raise ValueError(f"no count for {config.name}")
    read = schema.read(behaviours=config.reads_behaviours)
    width = config.tables.width
    flat = width * (len(read.categorical) + len(read.numeric) + extra_fields)
    total = 0.0
    if config.name not in SEQUENCE_BACKBONES:
        flat += width * len(read.sequences)
    else:
        past = {name for b in read.behaviours for name in b.history}
        flat += width * sum(f.name not in past for f in read.sequences)
        for pair in read.behaviours:
            wide = width * len(pair.target)
            if config.name in INTERESTS:
                total += INTERESTS[config.name](config, wide, tokens, pairs)
                flat += interest_width(config, pair)
    if config.name == "dcnv2":
        total += config.cross_layers * chain(flat, flat) + chain(flat, 1)
    if config.name == "wukong":
        total += config.layers * interaction(config, flat // width, width=width)
    if config.name in ARMS:
        total += arms(config, flat // width, read, tokens=tokens, pairs=pairs)
    return total + chain(flat, *config.hidden, 1)


def train(
    schema: Schema, config: BackboneConfig, *, tokens: float, pairs: float, extra_fields: int = 0
) -> float:
    """FLOPs of one example's training step: the backward pass costs two forwards. What a step
    computes again to save memory (`remat`, `backbones.blockwise`) is not counted."""
    return 3 * forward(schema, config, tokens=tokens, pairs=pairs, extra_fields=extra_fields)


def compressor(config: CompressorConfig, inputs: int) -> float:
    """FLOPs of one code of an activation [inputs]."""
    hidden = config.hidden if config.kind == "autoencoder" else ()
    return chain(inputs, *hidden, config.width)


def compressor_train(config: CompressorConfig, inputs: int) -> float:
    """FLOPs of one example in a compressor of activations [inputs], which get no gradient."""
    code = compressor(config, inputs)
    if config.kind != "autoencoder":
        return code
    prefixes = {*config.prefixes, config.width}
    back = sum(chain(prefix, *config.hidden[::-1], inputs) for prefix in prefixes)
    return 3 * (code + back) - chain(inputs, *config.hidden[:1] or (config.width,))


def encoder_train(
    config: EncoderConfig,
    *,
    inputs: int,
    query: int,
    field: int,
    tokens: float,
    pairs: float,
) -> float:
    """FLOPs of one example's history in a training step; stored codes get no gradient.

    Args:
      inputs: X, numbers of an entry.
      query: Q, numbers of the candidate.
      field: E, width of the fields that the summary becomes.
      tokens: mean entries.
      pairs: mean causal pairs of entries.
    """
    width, project = config.width, tokens * chain(inputs, config.width)
    total, outputs = project, width
    if config.name not in POOLING:
        name = "din" if config.name == "transformer" else config.name
        reads = spec_of(config).config
        total += chain(query, width) + INTERESTS[name](reads, width, tokens, pairs)
        outputs *= config.heads if name == "dmin" else 1
    if config.name == "transformer":
        block = chain(width, 3 * width) + chain(width, width) + chain(width, 2 * width, width)
        total += config.layers * (tokens * block + pairs * 4 * width)
    return 3 * (total + chain(outputs, config.fields * field)) - project


def chain(*widths: float) -> float:
    """Dense layers of these widths on one row."""
    return sum(2.0 * a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def interest_width(config: BackboneConfig, pair: Behaviour) -> int:
    if config.name == "hstu":
        return config.token_width
    heads = config.heads if config.name == "dmin" else 1
    return heads * config.tables.width * len(pair.target)


def scores(hidden: Sequence[int], wide: int, tokens: float) -> float:
    """A score MLP over the events: [H, t*H] per event, t once."""
    return chain(wide, hidden[0]) + tokens * (chain(2 * wide, hidden[0]) + chain(*hidden, 1))


def din(config: BackboneConfig, wide: int, tokens: float, pairs: float) -> float:
    return scores(config.attention_hidden, wide, tokens) + tokens * 2 * wide


def dien(config: BackboneConfig, wide: int, tokens: float, pairs: float) -> float:
    """Two GRUs, each with two products M -> 3M a step."""
    cells = 2 * tokens * 2 * chain(wide, 3 * wide)
    return cells + scores(config.attention_hidden, wide, tokens)


def dmin(config: BackboneConfig, wide: int, tokens: float, pairs: float) -> float:
    """Self-attention over causal pairs; per head out, feed-forward, query, scores, sum."""
    attend = tokens * chain(wide, 3 * wide) + pairs * 4 * wide
    own = tokens * (chain(wide // config.heads, wide) + chain(wide, 2 * wide, wide))
    own += scores(config.attention_hidden, wide, tokens) + tokens * 2 * wide
    if config.position_width:
        own += chain(wide, wide)
    refiner = 0.0
    if config.refiner:
        refiner = tokens * (chain(wide, 3 * wide) + chain(wide, wide) + chain(wide, 2 * wide, wide))
        refiner += pairs * 4 * wide
    return refiner + attend + config.heads * own


def hstu(config: BackboneConfig, wide: int, tokens: float, pairs: float) -> float:
    """The candidate is one token more, which sees all."""
    width, tokens, pairs = config.token_width, tokens + 1, pairs + tokens + 1
    layer = tokens * (chain(width, 4 * width) + chain(width, width)) + pairs * 4 * width
    return tokens * chain(wide, width) + config.layers * layer


def interaction(config: BackboneConfig, fields: int, *, width: int, beside: int = 0) -> float:
    """Wukong's layer: X^T Y, X of that, the MLP, and the fields that are kept."""
    made, read = fields // 2, fields + beside
    products = 4 * read * width * config.rank
    mixed = chain(read * config.rank, *config.mix_hidden, made * width)
    return products + mixed + 2 * read * (fields - made) * width


def arms(
    config: BackboneConfig, fields: int, schema: Schema, *, tokens: float, pairs: float
) -> float:
    """Fields and events to tokens of one width, and fields back; between them the layers."""
    width = config.token_width
    total, told, layer = fields * 2 * chain(config.tables.width, width), 0, 0.0
    for pair in schema.behaviours:
        wide = config.tables.width * len(pair.target)
        total += tokens * (chain(wide, wide) + chain(wide, width))
        told += TOLD[config.name]
        layer += ARMS[config.name](config, fields, tokens, pairs)
    mixed = interaction(config, fields, width=width, beside=told)
    return total + config.layers * (layer + LAYERS_OF[config.name] * mixed)


def interformer_arm(config: BackboneConfig, fields: int, tokens: float, pairs: float) -> float:
    """X_sum and its matrix; PFFN and self-attention, CLS among the tokens; seeds; both gates."""
    width, rank, cls = config.token_width, config.rank, interformer.CLS
    own, every = chain(width, width), tokens + cls
    across = 2 * fields * (rank + cls) * width + 2 * rank * own
    forward = every * 4 * width * rank
    attend = tokens * 3 * own + cls * own + (pairs + cls * tokens) * 4 * width + every * own
    pool = tokens * 2 * own + interformer.SEEDS * tokens * 4 * width
    return across + forward + attend + pool + TOLD["interformer"] * own


def kunlun_arms(config: BackboneConfig, fields: int, tokens: float, pairs: float) -> float:
    """GDPA and self-attention in a window; in both layers the seeds and their SumKronLinear."""
    width, rank = config.token_width, config.rank
    own = chain(width, width)
    answer = 2 * fields * rank * width + rank * 2 * own + tokens * (2 * own + rank * 4 * width)
    attend = tokens * 4 * own + in_window(config.window, tokens, pairs) * 4 * width
    fewer = kunlun.TERMS * kunlun.TOLD
    pool = tokens * 2 * own + kunlun.SEEDS * tokens * 4 * width
    pool += 2 * kunlun.SEEDS * fewer * width + fewer * own
    return answer + attend + 2 * pool


def in_window(window: int, tokens: float, pairs: float) -> float:
    """Pairs of events that are less than `window` apart, were all histories equally long."""
    length = 2 * pairs / tokens - 1 if tokens else 0
    if not window or length <= window:
        return pairs
    return tokens * (window - window * (window - 1) / (2 * length))


INTERESTS = {"din": din, "dien": dien, "dmin": dmin, "hstu": hstu}
ARMS = {"interformer": interformer_arm, "kunlun": kunlun_arms}
TOLD = {
    "interformer": interformer.CLS + interformer.SEEDS + interformer.RECENT,
    "kunlun": kunlun.TOLD,
}
"""Tokens of a history that a layer's fields are mixed with."""
LAYERS_OF = {"interformer": 1, "kunlun": 2}
"""Of what `layers` counts."""
COUNTED = ("deepfm", "dcnv2", "wukong", *INTERESTS, *ARMS)
"""Backbones with a count."""
