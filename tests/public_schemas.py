"""The three public data sets of PAPER section 5: schemas, configurations, parameter counts."""

from dataclasses import dataclass
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

DEEP = (1024, 512, 256)
PUBLIC = {
    "TaobaoAd_x1": Public(
        TAOBAO,
        width=32,
        models={"dmin": ({}, 42_347_786), "deepfm": ({}, 43_550_260)},
    ),
    "KuaiVideo_x1": Public(
        KUAIVIDEO,
        width=64,
        models={
            "dmin": (
                dict(hidden=DEEP, activation="dice", dropout=0.1, heads=2, position_width=0),
                44_479_237,
            ),
            "deepfm": (dict(hidden=DEEP), 53_876_733),
        },
    ),
    "AmazonElectronics_x1": Public(
        AMAZON,
        width=64,
        models={
            "dmin": (
                dict(
                    hidden=DEEP,
                    dropout=0.1,
                    norm="input",
                    heads=8,
                    refiner=True,
                    attention_hidden=(256, 128),
                    attention_activation="dice",
                    attention_dropout=0.1,
                ),
                8_107_401,
            ),
            "deepfm": (dict(hidden=DEEP, dropout=0.1, norm="hidden"), 5_134_334),
        },
    ),
}
