"""What a VM attends to in its histories (PAPER section 3, embedding facts).

A class of entries (a few minutes old, of the candidate's category, clicked) has the attention it
gets over what it would get if every entry of a history got the same: 1 means no preference.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from loopfm_jax import infer
from loopfm_jax.flow import Flow
from loopfm_jax.fm.train import sample
from loopfm_jax.history.encoders import POOLING
from loopfm_jax.history.reader import Past, raw_fields
from loopfm_jax.history.store import Store
from loopfm_jax.sharding import make_mesh
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import Student
from loopfm_jax.vm.train import Examples, load_vm

AGES = {
    "under 1 minute": 60,
    "1 to 10 minutes": 600,
    "10 minutes to 1 hour": 3600,
    "1 to 8 hours": 8 * 3600,
    "8 to 24 hours": 86_400,
    "1 to 3 days": 3 * 86_400,
    "older": np.inf,
}
"""Class -> its end in seconds."""


class Attended(NamedTuple):
    """Entries of N histories, the newest first; `real_NL` says which are there."""

    row_N: np.ndarray
    """The candidate's row of the log."""
    weight_NL: np.ndarray
    real_NL: np.ndarray
    age_NL: np.ndarray
    """Seconds between entry and candidate."""
    outcome_NL: np.ndarray
    same_NL: dict[str, np.ndarray]
    """Item field -> whether the entry had the candidate's value, a known one."""


def analyse_attention(flow: Flow) -> dict[str, Any]:
    """`method`, `encoder`, `histories` and `classes` of the attention of one trained VM (the first
    of the configured methods that reads codes); or `missing`, why there is none to look at.

    Each class: `by`, `entries` (its name), `share` of all entries, `attention` and its standard
    error `se` over histories.
    """
    config = flow.config
    if config.vm.encoder.name in POOLING:
        return {"missing": f"the encoder {config.vm.encoder.name} has no attention"}
    for method in config.methods:
        if "loopfm" not in find_method(method).contents:
            continue
        own = flow.for_method(method)
        folder = own.trained_vm(method, config.seed)
        if folder is None:
            continue
        examples, mesh = own.examples(method, config.seed), make_mesh(config.mesh)
        model = load_vm(examples, config.vm, folder, mesh)
        attended = attend(model, examples, holdout=config.holdout, mesh=mesh)
        if not len(attended.row_N):
            return {"missing": "no row of the judged window has two entries in its history"}
        return {
            "method": method,
            "encoder": config.vm.encoder.name,
            "histories": len(attended.real_NL),
            "classes": classes(attended),
        }
    return {"missing": "no VM that reads codes is trained here: run `loopfm train-vm` first"}


def attend(model: Student, examples: Examples, *, holdout: str, mesh: Mesh) -> Attended:
    """The attention that candidates of the judged window pay to codes, by the first kind of key;
    of a sample of the rows with two entries or more."""
    join = examples.join
    assert join is not None
    part = examples.reading.parts.index((examples.reading.keys[0], "loopfm"))
    store = join.histories.stores[examples.reading.keys[0]]
    judged = examples.inputs.rows(holdout)
    rows = judged[np.asarray(store.length)[judged - join.first] > 1]
    rows = sample(rows)
    weight_NL = np.zeros((len(rows), join.histories.longest), np.float32)

    def step(model: Student, batch: dict[str, Any], past: Past) -> dict[str, jax.Array]:
        weight_BL = model.attention(batch, past)[part]
        assert weight_BL is not None
        return {"weight": weight_BL}

    if len(rows):
        infer.run(
            model,
            infer.make_step(step, model, mesh),
            rows,
            examples.batch,
            {"weight": weight_NL},
            batch=1024,
            mesh=mesh,
            constants=examples.past(mesh),
            title="analyse attention",
        )
    return _describe(examples, store, rows, weight_NL)


def _describe(
    examples: Examples, store: Store, rows: np.ndarray, weight_NL: np.ndarray
) -> Attended:
    """What is known of the entries behind the weights."""
    assert examples.join is not None
    log, schema, first = examples.inputs.log, examples.inputs.schema, examples.join.first
    end_N, length_N = (np.asarray(x)[rows - first] for x in (store.end, store.length))
    rank_L = np.arange(weight_NL.shape[1])
    real_NL = rank_L < length_N[:, None]
    at_NL = np.where(real_NL, end_N[:, None] - 1 - rank_L, 0)
    row_NL = first + np.asarray(store.row)[at_NL]
    start_ms = examples.join.histories.start_ms
    now_N = (log["time"][rows] - start_ms) / 1000
    names = [f.name for f in schema.categorical]
    same_NL = {}
    for field in raw_fields(schema):
        ids = log["ids"][:, names.index(field)]
        known_N = ids[rows] != schema.offsets[field] + schema[field].rows - 1  # the unknown id
        same_NL[field] = (ids[row_NL] == ids[rows][:, None]) & known_N[:, None]
    return Attended(
        row_N=rows,
        weight_NL=weight_NL,
        real_NL=real_NL,
        age_NL=now_N[:, None] - np.asarray(store.seconds)[at_NL],
        outcome_NL=np.asarray(store.outcome)[at_NL] == 1,
        same_NL=same_NL,
    )


def classes(attended: Attended) -> list[dict[str, Any]]:
    """Every class of entries that occurs, with the attention it gets against an even share."""
    low, named = -np.inf, []
    for name, high in AGES.items():
        named.append(("age", name, (attended.age_NL >= low) & (attended.age_NL < high)))
        low = high
    for field, same_NL in attended.same_NL.items():
        named += [(field, f"same {field}", same_NL), (field, f"other {field}", ~same_NL)]
    named += [
        ("outcome", "positive", attended.outcome_NL),
        ("outcome", "negative", ~attended.outcome_NL),
    ]
    even_NL = attended.real_NL / attended.real_NL.sum(axis=1, keepdims=True)
    found = []
    for by, name, of_NL in named:
        of_NL = of_NL & attended.real_NL
        got_N, even_N = ((x * of_NL).sum(axis=1) for x in (attended.weight_NL, even_NL))
        if not of_NL.any():
            continue
        ratio = got_N.sum() / even_N.sum()
        found.append(
            {
                "by": by,
                "entries": name,
                "share": float(of_NL.sum() / attended.real_NL.sum()),
                "attention": float(ratio),
                "se": float(np.linalg.norm(got_N - ratio * even_N) / even_N.sum()),
            }
        )
    return found
