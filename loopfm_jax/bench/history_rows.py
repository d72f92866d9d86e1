"""The rows about histories alone: structured, encoded, compressed, read."""

from dataclasses import asdict

from loopfm_jax.bench import flops
from loopfm_jax.bench.encoding import lengths
from loopfm_jax.bench.terms import EXACT, Case, Check, Side, nothing
from loopfm_jax.history.encoders import EncoderConfig


def structure(events: int, mean_history: int) -> Case:
    """Histories of a whole log, files written, beside a loop over events in plain Python."""
    few = 2_000_000 // mean_history  # the loop takes as long as its events times their histories
    spec = {"events": events, "mean_history": mean_history, "loop_events": few}
    return Case(
        name=f"structure/history-{mean_history}" + ("" if events < 10**7 else "-10m"),
        unit="events/s",
        ours=(EXACT,),
        peers=(Side("python-loop", spec={"job": "structure-loop"}),),
        spec={"job": "structure", **spec},
        prepare=nothing,
    )


def encoder(
    fill: float, *, batch: int = 2048, width: int = 64, length: int = 50, entries: int = 1_000_000
) -> Case:
    """The DMIN encoder over histories full by `fill`, packed beside padded."""
    config = EncoderConfig("dmin", width=width, heads=4)
    spec = {"batch": batch, "width": width, "length": length, "entries": entries, "fill": fill}
    length_N = lengths(spec).astype(float)
    tokens, pairs = length_N.mean(), (length_N * (length_N + 1) / 2).mean()
    sizes = {"inputs": width, "query": width, "field": 0}  # no summary becomes a field here
    count = flops.encoder_train(config, **sizes, tokens=tokens, pairs=pairs)
    return Case(
        name=f"encoder/dmin-{fill:.0%}-full",
        unit="examples/s",
        ours=(Side("loopfm", spec={"layout": "packed"}),),
        peers=(Side("padded", spec={"layout": "padded"}),),
        spec={"job": "encode", "encoder": asdict(config), **spec},
        prepare=nothing,
        flops=lambda _: count,
        check=Check(),
    )


def compress(inputs: int = 896, *, width: int = 64, batch: int = 4096) -> Case:
    """Activations to int4 codes, beside codes that stay float32."""
    count = flops.chain(inputs, 128, width)
    return Case(
        name="compress/int4",
        unit="rows/s",
        ours=(Side("loopfm", spec={"code": "int4"}),),
        peers=(Side("float32-codes", spec={"code": "fp32"}),),
        spec={"job": "compress", "inputs": inputs, "width": width, "batch": batch},
        prepare=nothing,
        flops=lambda _: count,
    )


def read_codes(*, width: int = 32, batch: int = 65_536, entries: int = 2_000_000) -> Case:
    """Codes of random rows as numbers again, beside a store of float32, eight times its size."""
    return Case(
        name="compress/read-int4",
        unit="rows/s",
        ours=(Side("loopfm", spec={"code": "int4"}),),
        peers=(Side("float32-store", spec={"code": "fp32"}),),
        spec={"job": "read", "width": width, "batch": batch, "entries": entries},
        prepare=nothing,
    )
