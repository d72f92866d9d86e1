"""A tiny student of every method, a batch for it, and what the FM left behind."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from noise import noisy, parts

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.data.schema import Field, Numeric, Schema
from loopfm_jax.history import codes
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.reader import Entries, Past, Reading, raw_fields
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.methods import Method, find_method
from loopfm_jax.vm.student import DistilConfig, Student, VMConfig

B, N, Z, L, T, E = 6, 9, 5, 3, 16, 3
SCHEMA = Schema(
    fields=(Field("user", 7), Field("item", 6), Field("cate", 4)),
    numeric=(Numeric("price"),),
    item=("item", "cate"),
    entity=("user",),
)
VM = VMConfig(
    backbone=BackboneConfig(hidden=(7, 6), tables=TableConfig(width=E, row_multiple=1)),
    encoder=EncoderConfig(name="mean", width=4, fields=2),
)
TAPS = ("hidden_0", "item", "entity")
KEYS = ("key", "item")
PLAIN = DistilConfig()
LENGTH = np.array([2, 0, 3, 1, 0, 2], np.int32)
END = np.array([2, 0, 5, 6, 0, 9], np.int32)
NAMES = (
    "base", "kd", "kd+adapter", "fitnets", "current", "entity", "loopfm", "kd+loopfm", "raw",
    "raw+loopfm", "soft", "item-only", "self", "kd+raw+loopfm+outcome",
)  # fmt: skip


def make_batch(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    offsets = np.array([SCHEMA.offsets[f.name] for f in SCHEMA.fields])
    local = rng.integers(1, [f.rows for f in SCHEMA.fields], (B, 3))
    own = {"end_B": END, "length_B": LENGTH, "slot_PS": np.zeros((1, T), np.uint8)}
    turned = own | {"end_B": END[::-1].copy(), "length_B": LENGTH[::-1].copy()}
    return {
        "ids_BF": (offsets + local).astype(np.int32),
        "floats_BN": rng.normal(size=(B, 1)).astype(np.float32),
        "events": {},
        "label_B": (np.arange(B) % 2).astype(np.float32),
        "weight_B": np.array([1, 1, 1, 1, 1, 0], np.float32),
        "teacher_B": np.linspace(0.05, 0.95, B, dtype=np.float32),
        "codes": {tap: rng.uniform(-1, 1, (B, Z)).astype(np.float32) for tap in TAPS},
        "slices": {"key": own, "item": turned},
        "seconds_B": np.full(B, 5_000, np.int32),
    }


def make_past(code: codes.Code = "fp32") -> Past:
    rng = np.random.default_rng(1)

    def entries() -> Entries:
        z = {tap: rng.uniform(-1, 1, (N, Z)).astype(np.float32) for tap in TAPS}
        return Entries(
            codes={tap: codes.quantise(jnp.asarray(z[tap]), Codec(code, Z)) for tap in TAPS},
            ids_SF=jnp.asarray(7 + rng.integers(1, 4, (N, 2)) + [[0, 6]], jnp.int32),
            seconds=jnp.asarray(rng.integers(0, 5_000, N), jnp.int32),
            outcome=jnp.asarray(rng.integers(0, 2, N), jnp.uint8),
            soft=jnp.asarray(rng.uniform(size=N), jnp.float32),
            longest=L,
        )

    return Past({key: entries() for key in KEYS}, {tap: Codec(code, Z) for tap in TAPS})


def make_reading(
    method: Method, keys: tuple[str, ...] = KEYS, raw: tuple[str, ...] = ()
) -> Reading:
    codecs = {tap: Codec("fp32", Z) for tap in TAPS}
    fields = raw_fields(SCHEMA, raw)
    return Reading(method.contents, keys, method.side, codecs, "hidden_0", fields)


def make(name: str) -> Student:
    method = find_method(name)
    return noisy(lambda rngs: Student(SCHEMA, VM, method, make_reading(method), rngs=rngs))


@cache
def program(name: str, distil: DistilConfig):
    """(loss, its terms, answer, gradient), compiled."""
    method = find_method(name)
    vm = replace(VM, distil=distil)
    graphdef, params, rest = parts(
        noisy(lambda rngs: Student(SCHEMA, vm, method, make_reading(method), rngs=rngs))
    )

    @jax.jit
    def run(batch, past, params=params):
        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            value, terms = model.loss(batch, past, jax.random.key(0), config=distil)
            return value, (terms, nnx.merge(graphdef, params, rest)(batch, past))

        (value, (terms, answer)), slopes = jax.value_and_grad(objective, has_aux=True)(params)
        return value, terms, answer, slopes

    return run


def run(name: str, *, distil: DistilConfig = PLAIN, batch=None, **arguments):
    batch = make_batch() if batch is None else batch
    return jax.tree.map(np.asarray, program(name, distil)(batch, make_past(), **arguments))


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(parts(module)[1]))


def same(a, b, *, scale: float = 1.0, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(lambda x, y: close(x, scale * y), a, b)
