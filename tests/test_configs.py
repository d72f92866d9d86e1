"""Every configuration loads, is complete on the command line, and its models take a step."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from loopfm_jax import options
from loopfm_jax.config import Config, as_json, load
from loopfm_jax.fm.teacher import Teacher
from loopfm_jax.fm.teacher import loss as teacher_loss
from loopfm_jax.inputs import open_inputs
from loopfm_jax.sharding import MeshConfig, make_mesh

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_loads_and_takes_options(path: Path) -> None:
    given = "--seeds 3 --fm.taps all item --vm.backbone.name dmin --history.side outcome age"
    config = options.parse(path, given.split())
    assert config.history.side == ("outcome", "age")
    assert (config.seeds, config.fm.taps, config.vm.backbone.name) == (3, ("all", "item"), "dmin")
    assert as_json(config)["seeds"] == 3
    assert path.read_text().startswith('"""'), "a docstring with command, hardware, result, date"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_help_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(path, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--seeds", "--mesh.data", "--fm.taps", "--vm.distil.alpha", "--history.length"):
        assert option in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_teacher_takes_a_step(path: Path, prepared: Path) -> None:
    config: Config = load(path)
    backbone = config.fm.backbone
    inputs = open_inputs(
        prepared, reader="fm", behaviours=backbone.reads_behaviours, timed=backbone.reads_times
    )
    rows = inputs.rows("fm")[:8]
    batch = inputs.batch(rows) | {"weight_B": inputs.log["label"][rows].astype("float32") * 0 + 1}
    backbone = replace(backbone, tables=replace(backbone.tables, width=8))
    small = replace(config.fm, backbone=backbone)

    @jax.jit
    def step(batch: dict[str, jax.Array]) -> jax.Array:
        model = Teacher(inputs.schema, small, rngs=nnx.Rngs(0))
        return teacher_loss(model, batch, None, jax.random.key(0), config=small)[0]

    with jax.set_mesh(make_mesh(MeshConfig())):
        assert 0.5 < float(step(batch)) < 10


def test_a_bare_control_means_all_of_them() -> None:
    assert options.parse(CONFIGS[0], ["--control", "--seeds", "2"]).control == options.CONTROLS
    assert options.parse(CONFIGS[0], ["--control", "swapped-histories"]).control == (
        "swapped-histories",
    )
