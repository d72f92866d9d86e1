"""A made-up log whose rows may see each other by a plain rule, and who sees whom in the code.

`World` goes through the real prepare, structure, join and Student (with noise for weights); only
the FM is missing: codes are random, but for their first number, which names the row.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import nnx
from noise import noisy, parts

from loopfm_jax import flow, inputs, stages
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data import builder
from loopfm_jax.data.blocks import Blocks
from loopfm_jax.data.log import Log, load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.data.raw import Card, Column, RawLog, Windows
from loopfm_jax.data.schema import Schema
from loopfm_jax.data.synthetic import START_MS
from loopfm_jax.history import reader
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.reader import Past, Reading
from loopfm_jax.history.store import OWN, HistoryConfig
from loopfm_jax.sharding import MeshConfig, make_mesh
from loopfm_jax.stages import Stage
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm import train
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import Student, VMConfig

DELAY_MS, RETENTION_MS, LONGEST, PAST = 4_000, 90_000, 3, 4
SLICES = HistoryConfig(
    length=LONGEST, delay_s=DELAY_MS / 1000, retention_days=RETENTION_MS / 86_400_000
)
CODE_WIDTH, SLOTS = 5, 384
"""Slots are the same for every batch, so that one program serves."""
VM = VMConfig(
    backbone=BackboneConfig(
        hidden=(6, 5), behaviours=True, tables=TableConfig(width=3, row_multiple=1)
    ),
    encoder=EncoderConfig(width=4, heads=2, score_hidden=(4,)),
)
METHOD = find_method("kd+loopfm+outcome")
TAP = "hidden_0"
READING = Reading(
    contents=METHOD.contents,
    keys=(OWN,),
    side=METHOD.side,
    codecs={TAP: Codec("fp32", CODE_WIDTH)},
    tap=TAP,
)


def made_up_log() -> RawLog:
    """4 users; slates of 1-3 rows over up to 20 s, on a coarse clock, so that ties abound."""
    rng = np.random.default_rng(0)
    rows = []
    for group in range(60):
        key, start = f"u{rng.integers(4)}", 4_000 * int(rng.integers(150))
        for _ in range(rng.integers(1, 4)):
            wait = int(rng.choice([0, 0, 2_000, 6_000, 20_000]))
            rows.append((key, START_MS + start + wait, group, int(rng.integers(2))))
    frame = pl.DataFrame(rows, schema=["key", "time", "group", "label"], orient="row")
    return RawLog(
        frame=frame.with_columns(
            item_id=pl.Series(rng.integers(6, size=len(frame))),
            topic=pl.Series(rng.integers(3, size=len(frame))),
            price=pl.Series(rng.normal(size=len(frame))),
        ),
        columns=(Column("item_id"), Column("topic"), Column("price", kind="numeric")),
        item=("item_id", "topic"),
        behaviour=("item_id", "topic"),
        behaviour_length=PAST,
    )


def stored_codes(past: Past):
    return past.entries[OWN].codes[TAP]


def changed(past: Past, *, codes, outcome=None) -> Past:
    entries = replace(past.entries[OWN], codes={TAP: codes})
    if outcome is not None:
        entries = replace(entries, outcome=outcome)
    return replace(past, entries={OWN: entries})


@cache
def compiled(what: str, schema: Schema, pack):
    """A program over (batch, past): serving logits [B]; their slopes by the stored numbers
    [B,S,Z]; or the logits [S+1,B] after each stored row in turn was turned over, and at last none
    (another program may round otherwise). `pack` is the student's own at this moment: with another
    one it is another program."""
    assert pack is reader.pack
    graphdef, params, rest = parts(
        noisy(lambda rngs: Student(schema, VM, METHOD, READING, rngs=rngs))
    )

    def logits(batch, past: Past):
        return nnx.merge(graphdef, params, rest)(batch, past).logits_B

    def slopes(batch, past: Past):
        values, backward = jax.vjp(
            lambda stored: logits(batch, changed(past, codes=stored)), stored_codes(past)
        )
        return jax.vmap(backward)(jnp.eye(len(values)))[0]

    def turned_over(batch, past: Past):
        codes, outcome = stored_codes(past), past.entries[OWN].outcome

        def turn(row):
            return logits(
                batch,
                changed(
                    past,
                    codes=codes.at[row].set(~codes[row]),
                    outcome=outcome.at[row].set(1 - outcome[row]),
                ),
            )

        return jax.lax.map(turn, jnp.arange(len(codes) + 1))  # the last is out of bounds

    program = {"logits": logits, "slopes": slopes, "turned over": turned_over}[what]
    return jax.jit(program)


@dataclass(frozen=True)
class World:
    """A run directory up to `structure`."""

    root: Path

    @property
    def flow(self) -> flow.Flow:
        return flow.Flow(Config(history=SLICES, workdir=self.root, force=True))

    @classmethod
    def create(cls, root: Path) -> "World":
        world = cls(root)
        windows = Windows(fm_end="34%", vm_end="75%")

        def make_data(directory: Path):
            card = Card(description="made up")
            return prepare(made_up_log(), windows, name="made_up", card=card, directory=directory)

        def make_export(directory: Path):
            rows = len(world.exported)
            codes = np.random.default_rng(1).normal(size=(rows, CODE_WIDTH)).astype(np.float32)
            codes[:, 0] = np.arange(rows) / rows  # so a stored row can be recognised
            np.save(directory / f"codes_{TAP}.npy", codes)
            np.save(directory / "soft.npy", np.linspace(0, 1, rows, dtype=np.float32))
            first = int(world.exported[0])
            cutoffs = [[int(world.log["time"][first]), START_MS]]
            facts = {"taps": [TAP], "first": first, "cutoffs": cutoffs}
            return {"code": "fp32", "width": CODE_WIDTH, **facts}

        stages.run(Stage("prepare", world.flow.data, {}), make_data)
        data = {"data": world.flow.data}
        stages.run(Stage("export", world.flow.exported, {}, inputs=data), make_export)
        return world

    @cached_property
    def schema(self) -> Schema:
        return inputs.open_inputs(self.flow.data, reader="vm", behaviours=True).schema

    @cached_property
    def loaded(self) -> tuple[Log, dict[str, slice]]:
        return load(self.flow.data)

    @property
    def log(self) -> Log:
        return self.loaded[0]

    @property
    def exported(self) -> np.ndarray:
        """Rows of the log that are examples and store entries: the VM and test windows."""
        return np.arange(self.loaded[1]["vm"].start, len(self.log))

    def examples(self, *, swap: bool = False) -> train.Examples:
        """Structures the export anew and joins it, by whatever the code says now."""
        self.flow.structure()
        return train.open_examples(self.sources(swap=swap), VM, METHOD)

    def sources(self, *, swap: bool = False) -> train.Sources:
        return train.Sources(self.flow.data, self.flow.exported, self.flow.history, swap=swap)

    def batch_of(self, examples: train.Examples):
        batch = examples.batch(self.exported)
        own = batch["slices"][OWN]
        assert own["slot_PS"].size >= own["length_B"].sum()
        return batch | {"slices": {OWN: own | {"slot_PS": np.zeros((1, SLOTS), np.uint8)}}}

    def past_of(self, examples: train.Examples) -> Past:
        return examples.join.past(make_mesh(MeshConfig()))

    def relabelled(self, monkeypatch, label: np.ndarray) -> None:
        """From now on the log on disk seems to hold other labels."""
        open_blocks = builder.open_blocks

        def relabelled(*whole) -> Blocks:
            blocks = open_blocks(*whole)

            def read(number: int) -> dict[str, np.ndarray]:
                rows = slice(*blocks.bounds[number : number + 2])
                return blocks.read(number) | {"label": label[rows]}

            return replace(blocks, read=read)

        monkeypatch.setattr(builder, "open_blocks", relabelled)

    # ------------------------------------------------------------------- what may be seen

    def may_see(self) -> list[list[int]]:
        """The rule in plain Python: exported rows that each exported row sees, newest first."""
        key, time, logged = (self.log[n][self.exported] for n in ("key", "time", "logged_time"))
        seen = []
        for i in range(len(key)):
            past = [
                (logged[j], j)
                for j in range(len(key))
                if key[j] == key[i]
                and logged[j] + DELAY_MS < time[i]
                and time[i] - logged[j] <= RETENTION_MS
            ]
            seen.append([j for _, j in sorted(past, reverse=True)][:LONGEST])
        return seen

    def liked(self, label: np.ndarray) -> list[list[int]]:
        """Rows of every row's behaviour sequence, oldest first: positive ones of before."""
        key, time, logged = (self.log[n] for n in ("key", "time", "logged_time"))
        rows = range(len(key))
        return [
            sorted(
                (j for j in rows if label[j] and key[j] == key[i] and logged[j] < time[i]),
                key=lambda j: (logged[j], j),
            )[-PAST:]
            for i in rows
        ]


def matrix(seen: list[list[int]]) -> np.ndarray:
    """[examples, entries], True where one is seen."""
    result = np.zeros((len(seen), len(seen)), bool)
    for i, rows in enumerate(seen):
        result[i, rows] = True
    return result


def names(past: Past) -> np.ndarray:
    """The exported row behind every stored one, by what its code says."""
    codes = np.asarray(stored_codes(past))
    return np.rint(codes[:, 0] * len(codes)).astype(int)


def depends(world: World, examples: train.Examples) -> np.ndarray:
    """[examples, exported rows]: whose logit has a slope by whose code."""
    past = world.past_of(examples)
    slopes = compiled("slopes", world.schema, reader.pack)
    slopes_BSZ = slopes(world.batch_of(examples), past)
    result = np.zeros((len(world.exported),) * 2, bool)
    result[:, names(past)] = (np.asarray(slopes_BSZ) != 0).any(axis=2)
    return result


def order_seen(world: World, examples: train.Examples) -> list[list[int]]:
    """Exported rows in every example's tokens, in the order of their ranks."""
    own, past = world.batch_of(examples)["slices"][OWN], world.past_of(examples)
    tokens = reader.pack(own["end_B"], own["length_B"], slots=SLOTS, longest=LONGEST)
    real = np.asarray(tokens.real_T)
    rows = names(past)[np.asarray(tokens.row_T)[real]]
    segment, rank = np.asarray(tokens.segment_T)[real], np.asarray(tokens.rank_T)[real]
    order = np.lexsort((rank, segment))
    return [rows[order][segment[order] == b].tolist() for b in range(tokens.examples)]


def logits(world: World) -> np.ndarray:
    examples = world.examples()
    run = compiled("logits", world.schema, reader.pack)
    return np.asarray(run(world.batch_of(examples), world.past_of(examples)))


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with one place of its source changed."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    other = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), other.__dict__)
    return other
