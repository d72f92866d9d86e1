"""Operations of a program's step, by the counts of `bench.flops`."""

from flax import nnx

from loopfm_jax.aot.programs import Setting, teacher
from loopfm_jax.bench import flops
from loopfm_jax.rngs import Rngs


def work_of(setting: Setting, program: str, examples: int) -> float:
    """FLOPs of a step, all devices together; NaN where the backbone's are not counted."""
    config, fill = setting.config, setting.config.compile.fill
    backbone = (config.vm if program == "vm-train" else config.fm).backbone
    if backbone.name not in flops.COUNTED:
        return float("nan")
    schema = setting.schema.for_vm() if program == "vm-train" else setting.schema
    tokens, pairs = _lengths([schema[name].length for name in schema.groups], fill)
    if not backbone.reads_behaviours:
        tokens = pairs = 0.0
    if program != "vm-train":
        return examples * _teacher(setting, program, tokens=tokens, pairs=pairs)
    encoder, width = config.vm.encoder, backbone.tables.width
    entries, entry_pairs = _lengths([config.history.length], fill)
    each = flops.train(schema, backbone, tokens=tokens, pairs=pairs, extra_fields=encoder.fields)
    each += flops.encoder_train(
        encoder,
        inputs=setting.codec.width,
        query=len(schema.item) * width,
        field=width,
        tokens=entries,
        pairs=entry_pairs,
    )
    return examples * each


def _teacher(setting: Setting, program: str, *, tokens: float, pairs: float) -> float:
    """Of an example in the FM and its compressors."""
    config, model = setting.config.fm, nnx.eval_shape(lambda: teacher(setting)(Rngs(0)))
    if program == "export":
        count, compress = flops.forward, flops.compressor
    else:
        count, compress = flops.train, flops.compressor_train
    each = count(setting.schema, config.backbone, tokens=tokens, pairs=pairs)
    return each + sum(compress(config.compressor, c.inputs) for c in model.compressors)


def _lengths(longest: list[int], fill: float) -> tuple[float, float]:
    """Mean events, and causal pairs of them, of sequences that are all so full."""
    mean = [fill * length for length in longest]
    if not mean:
        return 0.0, 0.0
    return sum(mean) / len(mean), sum(m * (m + 1) / 2 for m in mean) / len(mean)
