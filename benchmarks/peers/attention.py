"""What FuxiCTR's package lacks of DIEN, DMR and DMIN, written from their definitions.

`ours`: run our way where loopfm_jax differs on purpose. That is, here:
  - batch statistics of Dice in a score MLP are those of real events; publicly padding counts;
  - DMIN's refiner masks by a boolean; publicly the float mask adds 1 to every masked score;
  - DMIN without any history gives zeros; publicly the mean of what padding turns into;
  - DMR's match reads the view of the last real event; publicly that of the last column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fuxictr.pytorch.layers import DIN_Attention, MLP_Block, ScaledDotProductAttention
from torch import Tensor, nn

if TYPE_CHECKING:  # a timed peer runs without JAX
    from loopfm_jax.backbones import BackboneConfig

LOWEST = -1.0e9


def mlp(config: BackboneConfig, width: int) -> MLP_Block:
    """The score MLP of width 4 * `width` inputs."""
    return MLP_Block(
        4 * width,
        hidden_units=list(config.attention_hidden),
        hidden_activations=config.attention_activation,
        output_dim=1,
        dropout_rates=config.attention_dropout,
    )


def score(
    block: MLP_Block, query_BLM: Tensor, events_BLM: Tensor, mask_BL: Tensor, *, ours: bool
) -> Tensor:
    """Scores [B,L] by an MLP of [t, H, t-H, t*H]."""
    query_BLM = query_BLM.expand_as(events_BLM)
    parts = [query_BLM, events_BLM, query_BLM - events_BLM, query_BLM * events_BLM]
    x = torch.cat(parts, dim=-1)
    if ours:
        return x.new_zeros(mask_BL.shape).masked_scatter(mask_BL, block(x[mask_BL])[:, 0])
    return block(x.flatten(0, 1)).view(mask_BL.shape)


def weigh(scores_BL: Tensor, events_BLM: Tensor, mask_BL: Tensor) -> Tensor:
    """Masked softmax, weighted sum."""
    weights_BL = scores_BL.masked_fill(~mask_BL, LOWEST).softmax(dim=-1)
    return (weights_BL[..., None] * events_BLM).sum(dim=1)


class DIN(nn.Module):
    """FuxiCTR's own attention."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours, self.width = ours, width
        self.attention = DIN_Attention(
            width,
            attention_units=list(config.attention_hidden),
            hidden_activations=config.attention_activation,
            dropout_rate=config.attention_dropout,
            use_softmax=config.attention_softmax,
        )

    def forward(self, target_BM: Tensor, events_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        if not self.ours:
            return self.attention(target_BM, events_BLM, mask_BL)
        block = self.attention.attention_layer
        scores_BL = score(block, target_BM[:, None], events_BLM, mask_BL, ours=True)
        if self.attention.use_softmax:
            return weigh(scores_BL, events_BLM, mask_BL)
        return (scores_BL[..., None] * events_BLM).sum(dim=1)


class DIEN(nn.Module):
    """GRU, DIN's scores of its states, softmax, AUGRU. Padding stands at the end."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours, self.width = ours, width
        self.extraction = nn.GRU(width, width, batch_first=True)
        self.scores = mlp(config, width)
        self.input, self.state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, target_BM: Tensor, events_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        # With padding at the end, no real state depends on a padded step: no need to pack.
        interests_BLM, _ = self.extraction(events_BLM)
        scores_BL = score(self.scores, target_BM[:, None], interests_BLM, mask_BL, ours=self.ours)
        attention_BL = scores_BL.masked_fill(~mask_BL, LOWEST).softmax(dim=-1)
        from_x = self.input(interests_BLM)
        h_BM = torch.zeros_like(target_BM)
        for t in range(mask_BL.shape[1]):
            xu, xr, xn = from_x[:, t].chunk(3, dim=-1)
            hu, hr, hn = self.state(h_BM).chunk(3, dim=-1)
            new_BM = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            update_BM = torch.sigmoid(xu + hu) * attention_BL[:, t, None]
            h_BM = torch.where(mask_BL[:, t, None], h_BM + update_BM * (new_BM - h_BM), h_BM)
        return h_BM


class Match(nn.Module):
    """DMR's user-to-item network: a causal attention's view, and its product with the candidate."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours = ours
        self.positions = nn.Parameter(torch.zeros(length, config.position_width))
        self.query = nn.Sequential(nn.Linear(config.position_width, width), nn.ReLU())
        self.scores = mlp(config, width)
        self.user = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, item_BM: Tensor, events_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        query_BLM = self.query(self.positions)[None]
        scores_BL = score(self.scores, query_BLM, events_BLM, mask_BL, ours=self.ours)
        length = mask_BL.shape[1]
        sees_BLL = mask_BL[:, None].expand(-1, length, -1).tril()
        sees_BLL = sees_BLL | torch.eye(length, dtype=torch.bool, device=mask_BL.device)
        weights_BLL = scores_BL[:, None].expand(-1, length, -1).masked_fill(~sees_BLL, LOWEST)
        users_BLM = self.user(weights_BLL.softmax(dim=-1) @ events_BLM)
        columns = torch.arange(length, device=mask_BL.device)
        last_B = (mask_BL * columns).amax(dim=1)
        if not self.ours:
            last_B = torch.full_like(last_B, length - 1)
        user_BM = users_BLM[torch.arange(len(last_B), device=last_B.device), last_B]
        return (user_BM * item_BM).sum(dim=-1, keepdim=True)


class DMR(nn.Module):
    """Attention whose query is ReLU(W [target ; position]); the match is `Match`."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours, self.width = ours, width + config.u2i
        self.positions = nn.Parameter(torch.zeros(length, config.position_width))
        inputs = width + config.position_width
        self.query = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.scores = mlp(config, width)
        self.match = Match(config, width, length, ours=ours) if config.u2i else None

    def forward(
        self, target_BM: Tensor, events_BLM: Tensor, mask_BL: Tensor, item_BM: Tensor | None
    ) -> Tensor:
        batch, length = mask_BL.shape
        asked = [
            target_BM[:, None].expand(-1, length, -1),
            self.positions[None].expand(batch, -1, -1),
        ]
        query_BLM = self.query(torch.cat(asked, dim=-1))
        scores_BL = score(self.scores, query_BLM, events_BLM, mask_BL, ours=self.ours)
        past_BM = weigh(scores_BL, events_BLM, mask_BL)
        if self.match is None:
            return past_BM
        return torch.cat([past_BM, self.match(item_BM, events_BLM, mask_BL)], dim=-1)


class Forward(nn.Module):
    """LayerNorm, then M -> 2M -> M with ReLU and a residual from the normalised input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(torch.relu(self.up(x)))


class Head(nn.Module):
    """One interest of DMIN."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours = ours
        self.out = nn.Linear(width // config.heads, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.forward_net = Forward(width)
        self.positions = self.query = None
        if config.position_width:
            self.positions = nn.Parameter(torch.zeros(length, config.position_width))
            self.query = nn.Linear(width + config.position_width, width)
        self.scores = mlp(config, width)

    def forward(
        self, target_BM: Tensor, events_BLM: Tensor, seen_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        head_BLM = self.forward_net(events_BLM + self.dropout(self.out(seen_BLD)))
        query_BLM = target_BM[:, None].expand_as(head_BLM)
        if self.query is not None and self.positions is not None:
            positions = self.positions[None].expand(len(target_BM), -1, -1)
            query_BLM = self.query(torch.cat([query_BLM, positions], dim=-1))
        scores_BL = score(self.scores, query_BLM, head_BLM, mask_BL, ours=self.ours)
        interest_BM = weigh(scores_BL, head_BLM, mask_BL)
        if self.ours:
            interest_BM = interest_BM * mask_BL.any(dim=1, keepdim=True)
        return interest_BM


class DMIN(nn.Module):
    """Behaviour refiner, multi-head self-attention, per head a target attention."""

    def __init__(self, config: BackboneConfig, width: int, length: int, *, ours: bool):
        super().__init__()
        self.ours, self.heads, self.width = ours, config.heads, config.heads * width
        self.refiner = self.refined = None
        if config.refiner:
            self.refiner = nn.MultiheadAttention(
                width, config.heads, dropout=config.attention_dropout, batch_first=True
            )
            self.refined = Forward(width)
        self.dropout = nn.Dropout(config.dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention = ScaledDotProductAttention(config.attention_dropout)
        self.interests = nn.ModuleList(
            Head(config, width, length, ours=ours) for _ in range(config.heads)
        )

    def refine(self, x_BLM: Tensor, sees_BLL: Tensor) -> Tensor:
        assert self.refiner is not None and self.refined is not None
        hidden_BLL = (~sees_BLL).repeat_interleave(self.heads, dim=0)
        # True forbids; a float is added to the scores.
        mask_BLL = hidden_BLL if self.ours else hidden_BLL.to(x_BLM.dtype)
        seen_BLM, _ = self.refiner(x_BLM, x_BLM, x_BLM, attn_mask=mask_BLL, need_weights=False)
        return self.refined(x_BLM + self.dropout(seen_BLM))

    def forward(self, target_BM: Tensor, events_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        batch, length = mask_BL.shape
        itself_LL = torch.eye(length, dtype=torch.bool, device=mask_BL.device)
        sees_BLL = mask_BL[:, None].expand(-1, length, -1).tril() | itself_LL
        if self.refiner is not None:
            events_BLM = self.refine(events_BLM, sees_BLL)
        q, k, v = (
            x.reshape(batch, length, self.heads, -1).transpose(1, 2)
            for x in self.qkv(events_BLM).chunk(3, dim=-1)
        )
        sees_BHLL = sees_BLL[:, None].expand(-1, self.heads, -1, -1).contiguous()
        seen_BHLD, _ = self.attention(q, k, v, scale=q.shape[-1] ** 0.5, mask=sees_BHLL)
        interests = [
            head(target_BM, events_BLM, seen_BHLD[:, i], mask_BL)
            for i, head in enumerate(self.interests)
        ]
        return torch.cat(interests, dim=-1)
