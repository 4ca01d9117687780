"""Normal distributions over thoughts whose dimensions may lean on each other."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch import Tensor
from torch.distributions import Independent

from ltm_pyro.models.shaped import Shaped


class FullNormal(Shaped):
    """N(mean, covariance) over K x D thoughts: batch shape (...), event shape (K, D).

    Args:
        loc: (..., K, D) means.
        scale_tril: (..., K * D, K * D) lower Cholesky factor of the covariance.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        flat = MultivariateNormal(
            loc.flatten(-2), scale_tril=scale_tril, validate_args=validate_args
        )
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order: (k, d) at k * D + d."""
        covariance: Tensor = self.flat.covariance_matrix  # type: ignore[attr-defined]
        return covariance


class BlockNormal(Shaped):
    """A normal over K x D thoughts in which dimensions lean on each other within equal blocks only.

    Args:
        loc: (..., K, D) means.
        scale_tril: (..., M, N, N) lower Cholesky factors of the covariances of M blocks, each of N
            neighbours in row order; M * N = K * D.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        blocks = loc.reshape(loc.shape[:-2] + scale_tril.shape[-3:-1])
        each = MultivariateNormal(blocks, scale_tril=scale_tril, validate_args=validate_args)
        flat: Any = Independent(each, 1, validate_args=validate_args)
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), zero between blocks."""
        blocks: Tensor = self.flat.base_dist.covariance_matrix  # type: ignore[attr-defined]
        count, size = blocks.shape[-3], blocks.shape[-1]
        # Block m, row i is dimension m * N + i; only m = m' is filled.
        out = blocks.new_zeros((*blocks.shape[:-3], count, size, count, size))
        at = torch.arange(count, device=blocks.device)
        out[..., at, :, at, :] = blocks.movedim(-3, 0)
        return out.reshape((*blocks.shape[:-3], count * size, count * size))


class LowRankNormal(Shaped):
    """N(loc, S (I + A A') S) over K x D thoughts, S diagonal and A of R columns.

    Density, entropy and draws cost K * D * R + R^3 (Woodbury's identity and the determinant
    lemma). The R x R matrix they factor is I + A'A, whose eigenvalues are 1 or more.

    Args:
        loc: (..., K, D) means.
        scale: (..., K, D) the diagonal of S.
        factor: (..., K, D, R) the columns of A.
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, factor: Tensor, validate_args: bool | None = None
    ) -> None:
        columns = (scale[..., None] * factor).flatten(-3, -2)
        flat: Any = LowRankMultivariateNormal(
            loc.flatten(-2), columns, scale.square().flatten(-2), validate_args=validate_args
        )
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order."""
        covariance: Tensor = self.flat.covariance_matrix  # type: ignore[attr-defined]
        return covariance
