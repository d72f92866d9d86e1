"""One table of rules: what is split over what, and what a mesh refuses."""

import re

import jax
import numpy as np
import pytest
from backbone_cases import CASES, SCHEMAS
from flax import nnx
from jax.sharding import PartitionSpec as P

from loopfm_jax import loop, processes, sharding
from loopfm_jax.backbones import build
from loopfm_jax.errors import UserError
from loopfm_jax.packing import Parts
from loopfm_jax.sharding import FSDP, MeshConfig, make_mesh

MESH = (4, 2)


@pytest.mark.parametrize("case", CASES)
def test_every_table_and_hidden_layer_of_a_backbone_has_one_rule(case):
    shapes = nnx.eval_shape(lambda: build(CASES[case], SCHEMAS[case], rngs=nnx.Rngs(0)))
    names = {
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(shapes, nnx.Param))
    }
    known = {name: axes for name in names if (axes := sharding.axes_of(name))}
    assert {n for n, axes in known.items() if "rows" in axes} == {
        n for n in names if n.endswith("rows_VE")
    }
    assert {n for n, axes in known.items() if "columns" in axes} == {
        n for n in names if re.search(r"dnn/layers/\d+/kernel", n)
    }


def test_a_compressor_is_split_as_the_activation_that_it_reads_where_that_divides():
    mesh = make_mesh(MeshConfig(*MESH))

    def spec(layer: str, *shape: int) -> P:
        name = f"compressors/0/{layer}/kernel"
        leaf = jax.ShapeDtypeStruct(shape, "f4")
        return sharding.for_state(mesh, {name: leaf})[name].spec

    assert spec("encoder/layers/0", 6, 5) == P("model", None)
    assert spec("encoder/layers/1", 6, 4) == P()
    assert spec("decoders/2/layers/0", 4, 6) == P()
    assert spec("decoders/2/layers/1", 5, 6) == P(None, "model")
    assert spec("encoder/layers/0", 7, 6) == P(None, None), "a tap of any width is allowed"


def test_rules_that_collide_say_so(monkeypatch):
    more = (*sharding.RULES, (r"layers/0/kernel$", (None, "columns")))
    monkeypatch.setattr(sharding, "RULES", more)
    assert sharding.axes_of("dnn/layers/1/kernel") == (None, "columns")
    with pytest.raises(ValueError, match="dnn/layers/0/kernel: the rules .* collide"):
        sharding.axes_of("dnn/layers/0/kernel")


def test_a_size_that_does_not_divide_names_its_axis_and_what_to_do():
    mesh = make_mesh(MeshConfig(*MESH))

    def place(name: str, *shape: int, fsdp: bool = False):
        return sharding.for_state(mesh, {name: jax.ShapeDtypeStruct(shape, "f4")}, fsdp=fsdp)

    assert place("rows_VE", 16, 3)["rows_VE"].spec == P(("data", "model"), None)
    with pytest.raises(UserError, match="12 rows .* mesh.data x mesh.model = 8.*row_multiple"):
        place("rows_VE", 12, 3)
    with pytest.raises(UserError, match="7 columns .* mesh.model = 2: .*`hidden`"):
        place("dnn/layers/0/kernel", 3, 7)
    assert place("dnn/layers/0/kernel", 3, 6)["dnn/layers/0/kernel"].spec == P(None, "model")
    with pytest.raises(UserError, match="6 columns do not .* mesh.model x mesh.data = 8: .*fsdp"):
        place("dnn/layers/0/kernel", 3, 6, fsdp=True)
    assert place("dnn/layers/0/kernel", 3, 8, fsdp=True)["dnn/layers/0/kernel"].spec == FSDP
    with pytest.raises(UserError, match=r"batch\['ids'\]: 6 examples .* mesh.data = 4"):
        loop.put({"ids": np.zeros((6, 2))}, mesh)


def test_no_process_is_left_without_a_part(monkeypatch):
    monkeypatch.setattr(processes, "many", lambda: True)
    with pytest.raises(UserError, match="has 4 of 8 devices, .* raise --mesh.data"):
        make_mesh(MeshConfig(2, 2))
    mesh = make_mesh(MeshConfig(*MESH))
    assert sharding.parts(mesh) == Parts(4, (0, 1, 2, 3))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sharding.parts(mesh) == Parts(4, ())
    monkeypatch.setattr(processes, "alone", lambda: True)
    with pytest.raises(UserError, match="left to train"):
        make_mesh(MeshConfig(*MESH))
