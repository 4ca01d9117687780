"""The decoder's likelihood, computed quickly: the same numbers, sooner.

**Prepacking.** A matrix product on the CPU rearranges its second factor before it begins. In the
fast loop that factor is a weight which stays as it is for T_fast steps, forward as W^T and backward
as W. oneDNN can be handed both rearranged. Where it has no such layout (other devices, other
precisions) products are plain.

**Log softmax(h E^T)[y]** of more logits than are held at once: see `vocabulary`.

**Once a fast loop** (`Scoring`): what does not depend on z.

What each buys, measured alone by `benchmarks/tricks.py`, is in `engine/README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ltm_pyro.config import Precision
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.kernels import vocabulary
from ltm_pyro.engine.kernels.compiled import CompiledScore, Score

_PRECISIONS = (torch.float32, torch.bfloat16)
_ROWS = 2048
"""Rows of the first factor that a layout is made for; others are as welcome."""


class Prepacked(NamedTuple):
    """A matrix W as products take it: x W^T, and x W."""

    transposed: Tensor
    plain: Tensor


_PREPACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weights to their layouts; a weight that is gone takes its own along."""


def prepack(weight: Tensor) -> Tensor:
    """The same matrix (out, in), detached, prepacked while it lives; it must not change."""
    weight = weight.detach()
    if can_prepack(weight):
        _PREPACKED[weight] = Prepacked(_reordered(weight), _reordered(weight.T))
    return weight


def prepacked(weight: Tensor) -> Prepacked | None:
    """What `prepack` made for this very tensor."""
    return _PREPACKED.get(weight)


def can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for a matrix of this device and precision."""
    known = all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
    usable = weight.is_cpu and weight.dtype in _PRECISIONS and torch.backends.mkldnn.is_available()
    return usable and known


def _reordered(second: Tensor) -> Tensor:
    """What a product with second^T takes."""
    return torch.ops.mkldnn._reorder_linear_weight(second.contiguous(), _ROWS)


@torch.library.custom_op("ltm_pyro::frozen_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """The product of x (..., in) with W^T, or of x (..., out) with W."""
    found = prepacked(weight)
    if found is None:
        return x @ (weight.T if transposed else weight)
    second = found.transposed if transposed else found.plain
    return torch.ops.mkldnn._linear_pointwise(x, second, None, "none", [], "")


@_product.register_fake
def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0 if transposed else 1]))


@register_flop_formula(torch.ops.ltm_pyro.frozen_product)
def _product_flops(x: Sequence[int], weight: Sequence[int], transposed: bool, **_: Any) -> int:
    """For `torch.utils.flop_counter`."""
    del transposed
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])
    ctx.transposed = inputs[2]


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return _product(grad.contiguous(), weight, not ctx.transposed), None, None


_product.register_autograd(_product_backward, setup_context=_keep_weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X (..., in) times weight (out, in)^T, from the layout of a weight that is prepacked."""
    casting = torch.is_autocast_enabled("cpu")
    low = weight.dtype == torch.get_autocast_dtype("cpu")
    if weight.requires_grad or not weight.is_cpu or (casting and not low):
        return F.linear(x, weight)
    # A compiler cannot ask; in its graphs the product itself does.
    if not torch.compiler.is_compiling() and prepacked(weight) is None:
        return F.linear(x, weight)
    return _product(x.to(weight.dtype), weight, True)


class Projection(nn.Linear):
    """A linear map without bias; quicker where its weight is frozen and prepacked."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return linear(x, self.weight)


def token_log_prob(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log probability of each target, (N,), in nats.

    Under autocast the products are in its lower precision; sums and exponentials are in single
    precision at least. Of a large vocabulary at most `MOST_LOGITS` logits live at a time, forward
    and backward.

    Args:
        h: (N, H) hidden states.
        weight: (V, H) output embedding.
        targets: (N,) int64 in 0..V-1, at padded positions too.
    """
    if h.device.type != "meta" and torch.is_autocast_enabled(h.device.type):
        low = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(low), weight.to(low)
    if len(h) * len(weight) <= vocabulary.MOST_LOGITS:
        logits = h @ weight.T
        full = torch.promote_types(logits.dtype, torch.float32)
        return -F.cross_entropy(logits.to(full), targets, reduction="none")
    gradient = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return vocabulary.by_chunks(h, weight, targets, gradient)[0]


def frozen_weights(decoder: Any) -> dict[str, Tensor]:
    """Matrices that a decoder's `score` multiplies by, for `functional_call`, while weights stay.

    They are rounded as autocast would round them, again and again, at every step; those of the
    layers are prepacked.
    """
    device = decoder.bos.device.type
    low = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if low else decoder.bos.dtype
    out: dict[str, Tensor] = {}
    if not low and not can_prepack(decoder.bos):
        return out
    for name, module in decoder.named_modules():
        if name.startswith("layers.0.self_attention"):  # in the trunk, which is computed
            continue
        if isinstance(module, Projection):
            out[f"{name}.weight"] = prepack(module.weight.to(dtype))
        elif low and isinstance(module, nn.Linear | nn.Embedding):
            out[f"{name}.weight"] = module.weight.detach().to(dtype)
    return out


HIDDEN, TRUNK = "hidden", "trunk"
"""Covariates that a batch of tokens may have: what is not read, and what does not depend on z."""


class Scoring:
    """Log p(x | z) by a decoder, with frozen weights or with learning ones.

    A fast loop asks for it T_fast times with weights and tokens that stay: what does not depend on
    z is then computed once (`prepare`). Both clocks may be compiled, each to a graph of its own;
    scores and simulations stay uncompiled.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.precision: Precision = "fp32"
        self._frozen: Score = self._score
        self._learning: Score | None = None
        self._weights = WeakTensorKeyDictionary()  # of a trunk, while it lives

    def compile(self) -> None:
        """See `Scored.compile_fast_loop`."""
        if self._learning is None:
            self._frozen = CompiledScore(self._score)
            self._learning = CompiledScore(self.decoder.score_embedded)

    @contextmanager
    def computing(self, precision: Precision, checkpointing: bool) -> Iterator[None]:
        """See `Scored.computing`."""
        before = self.precision, self.decoder.checkpointing
        self.precision, self.decoder.checkpointing = precision, checkpointing
        try:
            yield
        finally:
            self.precision, self.decoder.checkpointing = before

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """The batch with its trunk (B, T, H), without columns that are padding in every row.

        With the trunk, while it lives, go the matrices in their products' form.
        """
        length, hidden = batch.filled_length, batch.covariates.get(HIDDEN)
        x, mask = batch.observed[:, :length], batch.mask[:, :length]
        known = dict(batch.covariates)
        if hidden is not None:
            known[HIDDEN] = hidden[:, :length]
        with self._autocast():
            known[TRUNK] = self.decoder.trunk(x, known.get(HIDDEN))
            self._weights[known[TRUNK]] = frozen_weights(self.decoder)
        return replace(batch, x=x, mask=mask, covariates=known)

    def __call__(self, batch: Batch, z: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Log p(x | z) in nats, z (..., B, K, D) to (..., B), of `tokens` (..., B, T) if given."""
        mask, hidden = batch.mask, batch.covariates.get(HIDDEN)
        trunk = batch.covariates.get(TRUNK) if tokens is None else None
        tokens = batch.observed if tokens is None else tokens
        learning, plain = self.decoder.learning, tokens.dim() == 2 and z.dim() == 3
        if learning and self._learning is not None and plain:
            with self._autocast():
                return self._learning(self.decoder.embed(tokens, hidden), tokens, mask, z)
        weights = {} if trunk is None else self._weights.get(trunk, {})
        if trunk is None:
            unread = None if hidden is None else hidden.expand_as(tokens).flatten(0, -2)
            with self._autocast():
                trunk = self.decoder.trunk(tokens.flatten(0, -2), unread)
            trunk = trunk.view(*tokens.shape, -1)
        draws = z.shape[:-2]
        if len(draws) > 1:
            trunk = trunk.expand(*draws, *trunk.shape[-2:]).flatten(0, -3)
            tokens, mask = (a.expand(*draws, a.shape[-1]).flatten(0, -2) for a in (tokens, mask))
        # Only a fast loop differentiates by thoughts alone; one compiled graph serves just that.
        score = self._frozen if z.requires_grad and not learning else self._score
        with self._autocast():
            return score(trunk, tokens, mask, z.flatten(0, -3), weights=weights).view(draws)

    def _score(self, *inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """`Decoder.score` with some weights replaced."""
        if not weights:
            return self.decoder.score(*inputs)
        return functional_call(self.decoder, dict(weights), inputs)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.decoder.bos.device.type, dtype=torch.bfloat16)


class Scored:
    """A model whose likelihood is that of a `Scoring`, and what an `Execution` asks of it."""

    scoring: Scoring

    def computing(
        self, precision: Precision = "fp32", checkpointing: bool = False
    ) -> AbstractContextManager[None]:
        """Inside the block the decoder computes in this way.

        Args:
            precision: Of matrix products. With `bf16` weights, thoughts, residuals, norms, sums and
                log probabilities stay in their own precision; so do prior, guide and KL, which the
                decoder has no part in.
            checkpointing: Where weights learn, keep the inputs of layers alone and compute the rest
                again in the backward pass: less memory, a third more work in the slow step.
        """
        return self.scoring.computing(precision, checkpointing)

    def compile_fast_loop(self) -> None:
        """Compiles the likelihood where the two clocks call it; falls back, with a warning.

        Two graphs for a shape: thoughts learning with the weights frozen, called T_fast times, and
        weights learning. Scores and simulations stay uncompiled.
        """
        self.scoring.compile()

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the part below the first cross-attention computed once.

        Valid while the weights stay. Columns that are padding in every row may be cut off.
        """
        return self.scoring.prepare(batch)

    def hide_inputs(self, batch: Batch, hidden: Tensor) -> Batch:
        """The same sequences, of which the decoder reads no token where `hidden` (B, T) is true.

        Every token is still scored.
        """
        return replace(batch, covariates={**batch.covariates, HIDDEN: hidden})

    def token_log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x_t | x_<t, z) in nats, z (..., B, K, D) to (..., B, T), 0 where masked."""
        decoder, lead, x = self.scoring.decoder, z.shape[:-2], batch.observed
        trunk = decoder.trunk(x, batch.covariates.get(HIDDEN))
        trunk, x = (a.expand(*lead, *a.shape[1:]).flatten(0, len(lead) - 1) for a in (trunk, x))
        scores = decoder.score_tokens(trunk, x, z.flatten(0, -3)).view(*lead, -1)
        return torch.where(batch.mask, scores, 0.0)
