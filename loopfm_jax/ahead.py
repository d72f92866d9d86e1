"""What a later stage would refuse, found before an earlier one has cost hours.

Nothing is decided here: these are the later stages' own checks, asked as soon as what they look at
is known.
"""

from pathlib import Path

from loopfm_jax import stages
from loopfm_jax.auto import METHODS
from loopfm_jax.config import Config
from loopfm_jax.data.log import read_schema
from loopfm_jax.data.narrow import stored_columns
from loopfm_jax.fm.exporter import code_width
from loopfm_jax.history.codes import Codec
from loopfm_jax.history.keys import key_columns
from loopfm_jax.history.reader import Reading, raw_fields
from loopfm_jax.inputs import check_order
from loopfm_jax.loop import check_batch
from loopfm_jax.results import CONTROL_METHOD
from loopfm_jax.vm.methods import Method, find_method
from loopfm_jax.vm.train import check_entity, check_taps


def check(config: Config) -> None:
    """Raises UserError for what the configuration alone tells of a whole run."""
    for reader, part in (("fm", config.fm), ("vm", config.vm)):
        check_order(part.train.order.order, config.log_residency, reader=reader)
        check_batch(part.train.order.batch, config.mesh.data)
    check_methods(config)


def check_methods(config: Config) -> None:
    """Raises UserError where a VM will read what the FM's codes will not hold."""
    codec = Codec(config.export.code, code_width(config.export, config.fm))
    for method in _methods(config):
        reading = Reading(
            contents=method.contents,
            keys=config.history.keys,
            side=method.side,
            codecs=dict.fromkeys(config.fm.taps, codec),
            tap=config.history.tap or config.fm.taps[0],
        )
        check_taps(method, reading)


def check_log(config: Config, data: Path) -> None:
    """Raises UserError for what the VMs and their histories lack, in the prepared log too."""
    check_methods(config)
    stages.verify(data)
    key_columns(config.history.keys, stored_columns(data))
    schema = read_schema(data).for_vm()
    for method in _methods(config):
        check_entity(method, schema.entity)
        if "raw" in method.contents:
            raw_fields(schema, config.history.raw)


def _methods(config: Config) -> list[Method]:
    """Of all VMs that will be trained."""
    auto = METHODS if config.transfer == "auto" else ()
    control = (CONTROL_METHOD,) if config.control else ()
    return [find_method(name) for name in (*config.methods, *auto, *control)]
