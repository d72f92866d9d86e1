"""The three public data sets of PAPER section 5: schemas, configurations, parameter counts.

Configurations and counts are those of the BARS logs (reczoo/BARS, ranking/ctr).
"""

from dataclasses import dataclass, field
from typing import Any

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.backbones.config import BackboneName
from loopfm_jax.data.schema import Behaviour, Field, Numeric, Schema
from loopfm_jax.tables import TableConfig


@dataclass(frozen=True)
class Public:
    """A data set, its embedding width, and per model its other settings and parameter count."""

    schema: Schema
    width: int
    models: dict[BackboneName, tuple[dict[str, Any], int]]
    unread: dict[BackboneName, int] = field(default_factory=dict)
    """Parameters in the count that the public model builds and never reads; ours has none."""

    def config(self, name: BackboneName) -> BackboneConfig:
        """The public configuration of a model."""
        tables = TableConfig(width=self.width, row_multiple=1)
        return BackboneConfig(name, tables=tables, **self.models[name][0])


def fields(**rows: int) -> tuple[Field, ...]:
    return tuple(Field(name, n) for name, n in rows.items())


def history(name: str, target: Field, length: int) -> Field:
    """A sequence field over the table of `target`."""
    return Field(
        name,
        target.rows,
        kind="sequence",
        length=length,
        shares=target.name,
        frozen_width=target.frozen_width,
    )


TAOBAO_FIELDS = fields(
    userid=403_958,
    cms_segid=99,
    cms_group=15,
    gender=4,
    age=9,
    pvalue=6,
    shopping=5,
    occupation=4,
    city=7,
    adgroup=246_851,
    cate=11_330,
    campaign=191_771,
    customer=132_136,
    brand=308_870,
    pid=4,
    btag=6,
)
TAOBAO = Schema(
    fields=(
        *TAOBAO_FIELDS,
        *(history(f"{f.name}_his", f, 50) for f in TAOBAO_FIELDS if f.name in "cate brand btag"),
    ),
    numeric=(Numeric("price"),),
    behaviours=(Behaviour(("cate", "brand", "btag"), ("cate_his", "brand_his", "btag_his")),),
    item=("adgroup", "cate", "brand"),
)

USER, ITEM = fields(user=10_002, item=632_406)
VISUAL = Field("visual", 3_242_317, frozen_width=64)
KUAIVIDEO = Schema(
    fields=(
        USER,
        ITEM,
        VISUAL,
        history("pos_items", ITEM, 100),
        history("neg_items", ITEM, 100),
        history("pos_visual", VISUAL, 100),
        history("neg_visual", VISUAL, 100),
    ),
    behaviours=(
        Behaviour(("item", "visual"), ("pos_items", "pos_visual")),
        Behaviour(("item", "visual"), ("neg_items", "neg_visual")),
    ),
    item=("item", "visual"),
)

AMAZON_FIELDS = fields(item=63_003, cate=803)
AMAZON = Schema(
    fields=(*AMAZON_FIELDS, *(history(f"{f.name}_history", f, 100) for f in AMAZON_FIELDS)),
    behaviours=(Behaviour(("item", "cate"), ("item_history", "cate_history")),),
    item=("item", "cate"),
)

DNN: dict[str, Any] = dict(hidden=(1024, 512, 256))
DICE: dict[str, Any] = dict(attention_activation="dice")
PUBLIC = {
    "TaobaoAd_x1": Public(
        TAOBAO,
        width=32,
        models={
            "fm2": ({}, 43_057_715),
            "fmfm": (dict(pair="vector"), 43_063_795),
            "deepfm": ({}, 43_550_260),
            "dcnv2": (dict(dropout=0.1, cross_layers=4), 43_576_577),
            "din": (dict(dropout=0.1, attention_dropout=0.4), 42_263_682),
            "dien": (dict(dropout=0.1, attention_dropout=0.0, **DICE), 42_376_194),
            "dmr": (dict(dropout=0.1, position_width=64), 52_528_930),
            "dmin": ({}, 42_347_786),
        },
        unread={"dmr": 32 * (11_330 + 308_870 + 6)},
    ),
    "KuaiVideo_x1": Public(
        KUAIVIDEO,
        width=64,
        models={
            "fm2": ({}, 52_760_572),
            "fmfm": (dict(pair="matrix"), 52_846_588),
            "deepfm": (DNN, 53_876_733),
            "dcnv2": (dict(dropout=0.1, norm="hidden", cross_layers=2, **DNN), 42_648_897),
            "din": (dict(activation="dice", dropout=0.1, **DNN), 43_032_835),
            "dien": (
                dict(
                    dropout=0.1,
                    attention_hidden=(256, 256),
                    attention_dropout=0.3,
                    **DICE,
                    **DNN,
                ),
                43_034_627,
            ),
            "dmr": (
                dict(
                    activation="dice",
                    dropout=0.1,
                    attention_dropout=0.1,
                    position_width=8,
                    **DNN,
                ),
                291_051_779,
            ),
            "dmin": (
                dict(activation="dice", dropout=0.1, heads=2, position_width=0, **DNN),
                44_479_237,
            ),
        },
        unread={"dmr": 64 * (632_406 + 3_242_317)},
    ),
    "AmazonElectronics_x1": Public(
        AMAZON,
        width=64,
        models={
            "fm2": ({}, 4_211_197),
            "fmfm": (dict(pair="matrix"), 4_235_773),
            "deepfm": (dict(dropout=0.1, norm="hidden", **DNN), 5_134_334),
            "dcnv2": (dict(norm="hidden", cross_layers=2, **DNN), 5_138_561),
            "din": (
                dict(
                    activation="dice",
                    dropout=0.1,
                    norm="hidden",
                    attention_dropout=0.1,
                    attention_softmax=True,
                    **DICE,
                    **DNN,
                ),
                5_403_522,
            ),
            "dien": (
                dict(
                    dropout=0.1,
                    norm="hidden",
                    attention_hidden=(256, 128),
                    attention_dropout=0.0,
                    **DICE,
                    **DNN,
                ),
                5_369_602,
            ),
            "dmr": (
                dict(
                    dropout=0.1,
                    norm="hidden",
                    attention_dropout=0.1,
                    position_width=8,
                    u2i=True,
                    **DICE,
                    **DNN,
                ),
                9_918_147,
            ),
            "dmin": (
                dict(
                    dropout=0.1,
                    norm="input",
                    heads=8,
                    refiner=True,
                    attention_hidden=(256, 128),
                    attention_dropout=0.1,
                    **DICE,
                    **DNN,
                ),
                8_107_401,
            ),
        },
    ),
}
