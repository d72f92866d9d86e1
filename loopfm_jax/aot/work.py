"""Operations of a program's step, by the counts of `bench.flops`."""

from loopfm_jax.aot.programs import Setting
from loopfm_jax.bench import flops


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
    count = flops.forward if program == "export" else flops.train
    if program != "vm-train":
        each = count(schema, backbone, tokens=tokens, pairs=pairs)
        return examples * each
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


def _lengths(longest: list[int], fill: float) -> tuple[float, float]:
    """Mean events, and causal pairs of them, of sequences that are all so full."""
    mean = [fill * length for length in longest]
    if not mean:
        return 0.0, 0.0
    return sum(mean) / len(mean), sum(m * (m + 1) / 2 for m in mean) / len(mean)
