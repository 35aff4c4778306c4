"""From an encoder's features to the joint space; the module normalises what comes out."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from clipkit.ranges import check_ratio, check_whole


class Head(nn.Module, ABC):
    """Features (B, in_dim) to embeddings (B, out_dim), not yet of unit norm."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Features (B, in_dim) -> embeddings (B, out_dim)."""


class LinearHead(Head):
    """CLIP's projection: one matrix, drawn so that the length of a feature vector survives it."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.projection = nn.Linear(in_dim, out_dim, bias=bias)
        _init_projection(self.projection)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.projection(features)
        return projected


class MLPHead(Head):
    """Two layers with a GELU between them, as in SimCLR (https://arxiv.org/abs/2002.05709)."""

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int = 2048, dropout: float = 0.0
    ) -> None:
        check_whole("MLPHead.hidden_dim", hidden_dim)
        check_ratio("MLPHead.dropout", dropout)
        super().__init__()
        self.expand = nn.Linear(in_dim, hidden_dim)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(hidden_dim, out_dim, bias=False)
        _init_projection(self.projection)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.expand(features)))
        projected: Tensor = self.projection(hidden)
        return projected


def _init_projection(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
