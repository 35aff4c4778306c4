"""Text towers made here: CLIP's transformer, and a bag of tokens to compare it with."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.encoders.base import LayerGroup, PackingTextEncoder
from clipkit.encoders.packing import Packed, from_grid, to_grid
from clipkit.errors import UserError
from clipkit.pieces import run_again
from clipkit.ranges import check_choice, check_number, check_ratio, check_whole
from clipkit.tokenizer import TextContract

KEY = "model.text_encoder"
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
TextPooling = Literal["end", "last", "first", "mean"]

# Shapes: B captions, L tokens, T real tokens of all captions together, W width, H heads.


def _quick_gelu(values: Tensor) -> Tensor:
    return values * torch.sigmoid(1.702 * values)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


class TextTransformer(PackingTextEncoder):
    """CLIP's pre-norm transformer, tokens (B, L) to features (B, width): https://arxiv.org/abs/2103.00020.

    SigLIP's is the same with `causal=False, pooling="last", attend_padding=True, norm_eps=1e-6`.

    Args:
        contract: what the tokenizer says of its tokens.
        causal: a token sees only what stands before it.
        pooling: the feature is taken at the first end token, at the last place of the sequence
            (padding or not), at the first, or as the mean up to the first end token.
        attend_padding: a tower that is not causal lets tokens see the padding after the end token.
        gradient_checkpointing: keep the inputs of the blocks alone, and run each again for its
            gradient.

    Raises:
        UserError: a number out of its range, `heads` that does not divide `width`, or a pooling or
            activation that is unknown.
    """

    def __init__(
        self,
        contract: TextContract,
        *,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        causal: bool = True,
        pooling: TextPooling = "end",
        attend_padding: bool = False,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_whole(f"{KEY}.width", width)
        super().__init__(feature_dim=width)
        if heads < 1 or width % heads:
            raise UserError(
                f"{KEY}.heads: {heads} does not divide the width {width}, accepted are its divisors"
            )
        check_whole(f"{KEY}.depth", depth)
        check_choice(f"{KEY}.pooling", pooling, get_args(TextPooling))
        check_choice(f"{KEY}.activation", activation, get_args(Activation))
        check_number(f"{KEY}.norm_eps", norm_eps, least=0, most=1)
        check_number(f"{KEY}.mlp_ratio", mlp_ratio, least=1 / width, most=100)
        check_ratio(f"{KEY}.dropout", dropout)
        self.end_id = contract.end_id
        self.causal = causal
        self.gradient_checkpointing = gradient_checkpointing
        self.pooling = pooling
        self.mask_padding = not causal and not attend_padding
        # Up to the end token nothing sees the padding, and nothing after it is pooled.
        self.trim_is_exact = pooling != "last" and (causal or self.mask_padding)
        self.token_embedding = nn.Embedding(contract.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(contract.context_length, width))
        self.blocks = nn.ModuleList(
            _Block(width, heads, round(width * mlp_ratio), activation, norm_eps, dropout)
            for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width, eps=norm_eps)
        self._init_as_clip()

    def look_up(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.token_embedding(tokens)
        return vectors

    def forward(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        length, context = tokens.shape[1], self.position_embedding.shape[0]
        if length > context:
            raise UserError(
                f"tokenizer.context_length: tokens are {length} long, accepted are up to {context}"
            )
        end = _first_end(tokens, self.end_id)  # (B,)
        real = torch.arange(length, device=tokens.device) <= end[:, None]  # (B, L)
        seen = (
            real[:, None, None, :] if self.mask_padding else None
        )  # (B, 1, 1, L) over H and queries
        attend = _Attend(seen, self.causal, tokens.shape, packed and packed.places)
        if packed is None:
            hidden = self.look_up(tokens) + self.position_embedding[:length]  # (B, L, W)
        else:
            hidden = packed.vectors + self.position_embedding[packed.places % length]  # (T, W)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        pooled = self._pooled(tokens.shape, end, packed)
        for block in self.blocks:
            inputs = (hidden, attend, pooled if block is self.blocks[-1] else None)
            hidden = run_again(block, *inputs) if again else block(*inputs)
        features: Tensor = self.final_norm(hidden)
        if pooled is not None:
            return features
        if packed is not None:
            features = to_grid(features, packed.places, tokens.shape)
        return _mean_where(real, features)

    def _pooled(self, grid: torch.Size, end: Tensor, packed: Packed | None) -> Tensor | None:
        """Which of all tokens are the features, (B,); None where the feature is a mean."""
        if self.pooling == "mean":
            return None
        columns = {
            "end": end,
            "first": torch.zeros_like(end),
            "last": torch.full_like(end, grid[1] - 1),
        }
        places = torch.arange(grid[0], device=end.device) * grid[1] + columns[self.pooling]
        return places if packed is None else torch.searchsorted(packed.places, places)

    def layer_groups(self) -> list[LayerGroup]:
        groups: list[LayerGroup] = [[self.token_embedding, self.position_embedding]]
        groups.extend([block] for block in self.blocks)
        return [*groups[:-1], [*groups[-1], self.final_norm]]

    def no_weight_decay(self) -> set[str]:
        return {"position_embedding"}

    def _init_as_clip(self) -> None:
        """Residual branches shrink with depth; what is not named here keeps PyTorch's default."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        width, depth = self.feature_dim, len(self.blocks)
        for module in self.blocks.modules():
            if isinstance(module, _Attention):
                for linear in (module.query, module.key, module.value):
                    nn.init.normal_(linear.weight, std=width**-0.5)
                    nn.init.zeros_(linear.bias)
                nn.init.normal_(module.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
                nn.init.zeros_(module.out.bias)
            elif isinstance(module, _MLP):
                nn.init.normal_(module.expand.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.shrink.weight, std=width**-0.5 * (2 * depth) ** -0.5)


class BagOfTokens(PackingTextEncoder):
    """The mean of the caption's token embeddings and a small MLP: what word order is compared with.

    Args:
        contract: what the tokenizer says of its tokens.
        hidden_dim: width inside the MLP, by default `width`.
    """

    trim_is_exact = True

    def __init__(
        self,
        contract: TextContract,
        *,
        width: int = 512,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_whole(f"{KEY}.width", width)
        check_whole(f"{KEY}.hidden_dim", hidden_dim or width)
        check_ratio(f"{KEY}.dropout", dropout)
        super().__init__(feature_dim=width)
        self.end_id = contract.end_id
        self.token_embedding = nn.Embedding(contract.vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = _MLP(width, hidden_dim or width, "gelu", dropout)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def look_up(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.token_embedding(tokens)
        return vectors

    def forward(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        real = (
            torch.arange(tokens.shape[1], device=tokens.device)
            <= _first_end(tokens, self.end_id)[:, None]
        )
        if packed is None:
            vectors = self.look_up(tokens)
        else:
            vectors = to_grid(packed.vectors, packed.places, tokens.shape)
        mean = _mean_where(real, vectors)
        features: Tensor = self.mlp(self.norm(mean))
        return features

    def layer_groups(self) -> list[LayerGroup]:
        return [[self.token_embedding], [self.norm, self.mlp]]


class _Attend(NamedTuple):
    """Tokens look at tokens of the same caption: what all blocks have in common of it."""

    seen: Tensor | None  # bool, as attention's mask
    causal: bool
    grid: torch.Size  # (B, L)
    places: Tensor | None  # of tokens without padding, (T,)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Mix the values, (T, W) without padding or (B, L, W) with, as they are given."""
        query, key, value = (self._of_heads(values, heads) for values in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.seen, is_causal=self.causal
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed if self.places is None else from_grid(mixed, self.places)

    def _of_heads(self, values: Tensor, heads: int) -> Tensor:
        if self.places is not None:
            values = to_grid(values, self.places, self.grid)
        return values.view(*self.grid, heads, -1).transpose(1, 2)  # (B, H, L, W / H)


class _Block(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: Activation,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = _MLP(width, hidden, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, attend: _Attend, pooled: Tensor | None) -> Tensor:
        """All tokens, (T, W) or (B, L, W), to as many; with `pooled`, to those of them, (B, W)."""
        mixed = self.attention(self.attention_norm(hidden), attend, pooled)
        hidden = _chosen(hidden, pooled) + self.dropout(mixed)
        branch: Tensor = self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden + branch


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, attend: _Attend, pooled: Tensor | None) -> Tensor:
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        out: Tensor = self.out(_chosen(attend(query, key, value, self.heads), pooled))
        return out


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        self.shrink = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.shrink(self.dropout(self.activation(self.expand(hidden))))
        return out


def _chosen(values: Tensor, pooled: Tensor | None) -> Tensor:
    # Nothing but the pooled tokens leaves the last block: the rest of it is not computed.
    return values if pooled is None else values.flatten(0, -2)[pooled]


def _first_end(tokens: Tensor, end_id: int) -> Tensor:
    """The place of each caption's first end token, by equality; the last place if it has none."""
    is_end = tokens == end_id
    last = torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)


def _mean_where(real: Tensor, hidden: Tensor) -> Tensor:
    """The mean of the real places of each caption, (B, L), (B, L, W) -> (B, W)."""
    weights = real.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
