"""Encoders: networks that read a sequence and answer with numbers for each of its thoughts.

    tokens: embed -> n x [RMSNorm -> self-attention, RMSNorm -> SwiGLU] -> K queries cross-attend
    others: x, mask and covariates in one row of numbers -> linear map + two-layer perceptron

Only what the mask shows enters. The last linear map starts at zero, and so does every answer.
Shapes: B rows, T positions, H width, K thoughts, D thought width.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.checks import MOST, refuse_too_large, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.decoder import SwiGLU, rotary_angles, rotate
from ltm_pyro.models.latent_thought import LatentThoughtModel

_MOST_LAYERS = 256


def build_encoder(
    model: LatentModel, answers: int, width: int | None = None, layers: int = 2
) -> nn.Module:
    """The encoder for a model's kind of sequences: (x (B, T), mask (B, T)) to (B, K, answers * D).

    Args:
        model: Tells what it reads: tokens of a `LatentThoughtModel`; of any other model the numbers
            of x, and the covariates that its `blank` makes.
        answers: Numbers per dimension of a thought.
        width: H; by default the decoder's for tokens, and 64 for other models.
        layers: Transformer layers for tokens; hidden layers for other models.
    """
    whole_number("encoder layers", layers, 1, _MOST_LAYERS)
    if width is not None:
        whole_number("encoder width", width, 1, MOST)
        refuse_too_large(
            f"encoder width {width} in {layers} layers", 4 * layers * width**2, "choose less"
        )
    thoughts, dim = model.thought_shape
    if isinstance(model, LatentThoughtModel):
        config = model.config
        width = config.width if width is None else width
        if width % (2 * config.n_heads):
            raise InputError(
                f"encoder width {width} with the decoder's {config.n_heads} heads: must be a "
                f"multiple of {2 * config.n_heads}"
            )
        return TokenEncoder(
            config.vocab_size, width, config.n_heads, layers, thoughts, answers * dim
        )
    try:
        with torch.random.fork_rng(devices=[]):  # it may make covariates up
            blank = model.blank(1)
    except InputError as error:
        raise InputError(
            f"no encoder for a {type(model).__name__}, which does not tell the shape of x: set its "
            "attribute x_shape, or use a guide with local parameters"
        ) from error
    return VectorEncoder(blank, width or 64, layers, thoughts, answers * dim)


def _start(*linear: nn.Linear) -> None:
    """Unit variance through products."""
    for module in linear:
        nn.init.normal_(module.weight, std=module.in_features**-0.5)


class Attention(nn.Module):
    """Multi-head attention from every query to every visible key, in both directions.

    Residual branches start the smaller the more layers (`depth`) the network has.
    """

    def __init__(self, width: int, n_heads: int, depth: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        _start(self.query, self.key_value, self.out)
        with torch.no_grad():
            self.out.weight.mul_((2 * depth) ** -0.5)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        visible: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Queries (B, Q, H) and keys (B, T, H) to (B, Q, H).

        Of `visible` (B, T) at least one is true per row; `angles` are rotary, of T positions, where
        queries and keys have positions.
        """
        rows = len(queries)
        q = self.query(queries).view(rows, queries.shape[1], self.n_heads, -1).transpose(1, 2)
        k, v = (
            part.view(rows, keys.shape[1], self.n_heads, -1).transpose(1, 2)
            for part in self.key_value(keys).chunk(2, dim=-1)
        )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention over all visible positions, then SwiGLU; each after RMSNorm, each residual."""

    def __init__(self, width: int, n_heads: int, depth: int) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width)
        self.attention = Attention(width, n_heads, depth)
        self.norm_mlp = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)
        _start(self.mlp.gate_up, self.mlp.down)
        with torch.no_grad():
            self.mlp.down.weight.mul_((2 * depth) ** -0.5)

    def forward(self, h: Tensor, visible: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        normed = self.norm_attention(h)
        h = h + self.attention(normed, normed, visible, angles)
        return h + self.mlp(self.norm_mlp(h))


class TokenEncoder(nn.Module):
    """Bidirectional Transformer over tokens, read out by one learned query per thought.

    H = `width` is a multiple of twice the heads; `outputs` are numbers per thought.
    """

    def __init__(
        self, vocab_size: int, width: int, n_heads: int, layers: int, thoughts: int, outputs: int
    ) -> None:
        super().__init__()
        self.head_dim = width // n_heads
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight)
        # Stands before the first token and is always visible: no row is ever empty.
        self.start = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(EncoderLayer(width, n_heads, layers) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.queries = nn.Embedding(thoughts, width)
        self.pool = Attention(width, n_heads, 1)
        self.norm_mlp = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)
        _start(self.mlp.gate_up, self.mlp.down)
        self.norm_head = nn.RMSNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask, (B, T) each, to (B, K, outputs)."""
        rows = len(x)
        h = torch.cat((self.start.expand(rows, 1, -1), self.embedding(x)), dim=1)
        visible = F.pad(mask, (1, 0), value=True)
        positions = torch.arange(h.shape[1], device=h.device)
        angles = rotary_angles(positions, self.head_dim)
        for layer in self.layers:
            h = layer(h, visible, angles)
        q = self.queries.weight.expand(rows, -1, -1)
        q = q + self.pool(q, self.norm(h), visible)
        q = q + self.mlp(self.norm_mlp(q))
        return self.head(self.norm_head(q))


class VectorEncoder(nn.Module):
    """Linear map plus perceptron over x, mask and covariates of a row, as one vector.

    The linear map is there because a linear-Gaussian posterior's mean is linear in x. `blank` tells
    the shape of x and the covariates to read; `width` and `layers` are of hidden units, and
    `outputs` numbers per thought.
    """

    def __init__(self, blank: Batch, width: int, layers: int, thoughts: int, outputs: int) -> None:
        super().__init__()
        self.thoughts = thoughts
        self.shapes = {name: value.shape[1:] for name, value in blank.covariates.items()}
        self.inputs = blank.mask[0].numel()
        inputs = self.inputs + sum(shape.numel() for shape in self.shapes.values())
        self.linear = nn.Linear(2 * inputs, thoughts * outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        sizes = [2 * inputs, *[width] * layers]
        hidden = [
            part
            for before, after in itertools.pairwise(sizes)
            for part in (nn.Linear(before, after), nn.SiLU())
        ]
        self.hidden = nn.Sequential(*hidden)
        self.head = nn.Linear(width, thoughts * outputs, bias=False)
        nn.init.zeros_(self.head.weight)

    def row_of_numbers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is read of a batch, and which of it is there, (B, Dx) each.

        Raises:
            InputError: if x or a covariate is not of the shape that the encoder was made for.
        """
        mask = batch.mask.flatten(1) if batch.mask.dim() > 1 else batch.mask[:, None]
        x = torch.where(mask, batch.observed.reshape(mask.shape), 0).to(self.linear.weight)
        if mask.shape[1] != self.inputs:
            raise InputError(
                f"x has {mask.shape[1]} numbers a row: this encoder was made for {self.inputs}; "
                "pad and mask x"
            )
        parts = []
        for name, shape in self.shapes.items():
            value = batch.covariates[name]
            if value.shape[1:] != shape:
                raise InputError(
                    f"covariate {name!r} is {tuple(value.shape[1:])} a row: this encoder was made "
                    f"for {tuple(shape)}"
                )
            parts.append(value.reshape(len(batch), -1).to(x))
        known = torch.cat((x, *parts), dim=-1)
        return known, F.pad(mask, (0, known.shape[1] - self.inputs), value=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Reals and mask, (B, Dx) each, to (B, K, outputs)."""
        seen = torch.cat((x * mask, mask.to(x.dtype)), dim=-1)
        answer = self.linear(seen) + self.head(self.hidden(seen))
        return answer.unflatten(-1, (self.thoughts, -1))
