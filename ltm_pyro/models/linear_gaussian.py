"""The oracle: a model of one's own choosing in which everything is known exactly.

    z_i        ~ N(0, I)                                    (K, D)
    x_i | z_i  ~ N(W vec(z_i) + b, s^2 I)                   (Dx,)

It has the interface of the language model, so guides, clocks and scores run on it unchanged, and
their answers can be held against the exact posterior, the exact log evidence and the exact best
mean-field posterior (Bishop 2006, sections 2.3.3, 10.1.2 and 12.2).
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import real_number, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import FullNormal
from ltm_pyro.models.priors import StandardNormal


class LinearGaussian(LatentModel):
    """Factor analysis with known loadings, called as a Pyro model with sites `z` and `x`.

    Args:
        W: (Dx, K * D) loadings, a tensor or anything `torch.as_tensor` takes; columns in the row
            order of z, (k, d) at k * D + d. Its dtype and device are the model's.
        noise_scale: s, the standard deviation of each observed dimension given z, in units of x.
        bias: (Dx,) b; 0 by default.
        shape: (K, D); one thought of W's width by default.

    Masked dimensions of a batch count as unobserved in every answer.

    Raises:
        InputError: if shapes disagree, a number is not finite, or `noise_scale` is not above 0.

    Example:
        >>> oracle = LinearGaussian([[1.0, 0.5]], noise_scale=0.3, shape=(1, 2))
        >>> batch = oracle.simulate(16, seed=0)
        >>> oracle.log_evidence(batch).shape
        torch.Size([16])
    """

    W: Tensor
    bias: Tensor
    noise_scale: Tensor

    def __init__(
        self,
        W: Tensor | ArrayLike,
        noise_scale: float,
        bias: Tensor | ArrayLike | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        loadings = _floats("W", W)
        if loadings.dim() != 2:
            raise InputError(f"W is {tuple(loadings.shape)}: must be a matrix (Dx, K * D)")
        if not (shape is None or (isinstance(shape, tuple | list) and len(shape) == 2)):
            raise InputError(f"shape is {shown(shape)}: must be (K, D)")
        shape = (1, loadings.shape[1]) if shape is None else (int(shape[0]), int(shape[1]))
        if min(shape) < 1 or loadings.shape[1] != shape[0] * shape[1] or not len(loadings):
            raise InputError(
                f"W is {tuple(loadings.shape)} and shape {shape}: W must be (Dx, K * D) with K, D "
                "and Dx above 0"
            )
        offset = _floats("bias", torch.zeros(len(loadings)) if bias is None else bias, loadings)
        if offset.shape != loadings.shape[:1]:
            raise InputError(
                f"bias is {tuple(offset.shape)}: must have one number per row of W, "
                f"({len(loadings)},)"
            )
        noise_scale = real_number("noise_scale", noise_scale)
        if not (noise_scale > 0 and math.isfinite(noise_scale)):
            raise InputError(f"noise_scale is {noise_scale}: must be a finite number above 0")
        self.thought_prior = StandardNormal(*shape).to(loadings)
        self.register_buffer("W", loadings)
        self.register_buffer("bias", offset)
        scale = torch.as_tensor(noise_scale, dtype=loadings.dtype, device=loadings.device)
        self.register_buffer("noise_scale", scale)

    @property
    def thought_shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self.thought_prior.shape

    @property
    def device(self) -> torch.device:
        """Where the loadings live."""
        return self.W.device

    def prior(self) -> TorchDistribution:
        """p(z) of one sequence: event shape (K, D)."""
        return self.thought_prior()

    def blank(self, size: int) -> Batch:
        """`size` rows still to be made."""
        size = whole_number("size", size, at_least=1)
        observed = torch.ones(size, len(self.W), dtype=torch.bool, device=self.device)
        return Batch(None, observed)

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        """p(x | z) for thoughts (..., B, K, D): batch shape (..., B), event shape (Dx,)."""
        each = dist.Normal(self._predict(z), self.noise_scale).mask(batch.mask)
        return each.to_event(1)

    def check(self, batch: Batch) -> None:
        """Refuses what is not finite real numbers, Dx of them per sequence."""
        x = batch.observed
        if not x.is_floating_point():
            raise InputError("this batch holds token ids, the linear-Gaussian model needs reals")
        if x.dim() != 2:
            raise InputError(f"x is {tuple(x.shape)}: must be (B, Dx)")
        if x.shape[1] != len(self.W):
            raise InputError(f"sequences of {x.shape[1]} numbers: W has {len(self.W)} rows")
        bad = batch.ids[~x.isfinite().all(-1)].tolist()
        if bad:
            raise InputError(
                f"x of sequence ids {bad[:8]} is not finite: for unobserved dimensions use the mask"
            )

    def simulate(self, n: int, seed: int = 0) -> Batch:
        """`n` sequences from the model, ids 0..n-1; torch's global generator is left alone."""
        return self.simulate_with_thoughts(n, seed)[0]

    def simulate_with_thoughts(self, n: int, seed: int = 0) -> tuple[Batch, Tensor]:
        """`simulate`, and the thoughts (n, K, D) that the sequences were made from."""
        n, seed = whole_number("n", n, at_least=1), whole_number("seed", seed, at_least=0)
        # Drawn on the CPU, so that every device gets the same data.
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, *self.thought_shape, generator=generator, dtype=self.W.dtype)
        noise = torch.randn(n, len(self.W), generator=generator, dtype=self.W.dtype)
        z, noise = z.to(self.device), noise.to(self.device)
        return Batch(self._predict(z) + self.noise_scale * noise), z

    def posterior(self, batch: Batch) -> FullNormal:
        """p(z | x), exact: batch shape (B,), event shape (K, D)."""
        mean, cholesky = self._posterior(batch)
        eye = torch.eye(cholesky.shape[-1], dtype=cholesky.dtype, device=self.device)
        covariance = torch.cholesky_solve(eye.expand_as(cholesky), cholesky)
        scale_tril = torch.linalg.cholesky(covariance).to(self.W.dtype)
        return FullNormal(self._thoughts(mean), scale_tril)

    def log_evidence(self, batch: Batch) -> Tensor:
        """Log p(x) in nats, exact, (B,)."""
        mean, cholesky = self._posterior(batch)
        # Bayes' rule at the posterior's mean, log p(x, m) - log p(m | x): no large terms cancel.
        log_joint = self._log_joint(mean, batch)
        half_log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        evidence = log_joint - half_log_det + 0.5 * mean.shape[-1] * math.log(2 * math.pi)
        return evidence.to(self.W.dtype)

    def best_mean_field(self, batch: Batch) -> TorchDistribution:
        """The factorised normal q with the highest ELBO: the least KL(q || p(z | x)).

        It has the posterior's means, and as variances the inverse diagonal of its precision: never
        more than the marginal variances, and less wherever dimensions are correlated.

        Returns:
            Batch shape (B,), event shape (K, D).
        """
        mean, cholesky = self._posterior(batch)
        precision = cholesky.square().sum(-1).expand_as(mean)  # its diagonal
        q = dist.Normal(self._thoughts(mean), self._thoughts(precision.rsqrt()))
        return q.to_event(2)

    def best_mean_field_elbo(self, batch: Batch) -> Tensor:
        """The ELBO of `best_mean_field` in nats, exact, (B,)."""
        _, cholesky = self._posterior(batch)
        log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        gap = 0.5 * (cholesky.square().sum(-1).log().sum(-1) - log_det)
        return self.log_evidence(batch) - gap.to(self.W.dtype)

    def _predict(self, z: Tensor) -> Tensor:
        """E[x | z], (..., K, D) to (..., Dx)."""
        return z.flatten(-2) @ self.W.T + self.bias

    def _thoughts(self, flat: Tensor) -> Tensor:
        """(..., K * D) in double precision to (..., K, D) in the model's own."""
        return flat.to(self.W.dtype).unflatten(-1, self.thought_shape)

    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means (B, K * D), and the precision's lower Cholesky factor, in double precision.

        The factor is (B, K * D, K * D), or (1, ...) where all sequences share one mask.
        """
        self.check(batch)
        W, variance = self.W.double(), self.noise_scale.double() ** 2
        seen = batch.mask.double()
        residual = seen * (batch.observed.double() - self.bias.double())
        shared = bool((batch.mask == batch.mask[:1]).all())
        masks = seen[:1] if shared else seen
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=self.device)
        precision = eye + (W.T * masks[:, None]) @ W / variance
        cholesky = torch.linalg.cholesky(precision)
        projected = (residual @ W / variance)[..., None]
        mean = torch.cholesky_solve(projected, cholesky.expand(len(batch), -1, -1))
        return mean.squeeze(-1), cholesky

    def _log_joint(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x, z) in double precision, z (B, K * D) to (B,)."""
        scale = self.noise_scale.double()
        error = batch.observed.double() - self.bias.double() - z @ self.W.double().T
        squares = (error / scale).square() + (2 * math.pi * scale**2).log()
        log_likelihood = -0.5 * torch.where(batch.mask, squares, 0.0).sum(-1)
        return log_likelihood - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def _floats(name: str, value: Tensor | ArrayLike, like: Tensor | None = None) -> Tensor:
    """`value` as a tensor of finite floating-point numbers, of dtype and device of `like`."""
    # At once: a list would be rounded to single precision on its way to a double tensor.
    dtype, device = (None, None) if like is None else (like.dtype, like.device)
    try:
        tensor = torch.as_tensor(value, dtype=dtype, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers: {error}") from None
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if tensor.is_meta:
        raise InputError(f"{name} lies on the meta device, without numbers: give one that has some")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity: every number must be finite")
    return tensor.clone()
