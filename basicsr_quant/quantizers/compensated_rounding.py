"""Rounding a weight so that the layer's output, not the weight, stays close: error-compensated rounding (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputMoments:
    """Moments of the columns that a layer multiplies its weight with, before (x) and after (q) its input quantizer.

    A layer computes W x for columns x of length K = in_channels / groups x kernel size; G is its number of groups.

    Sums are kept about the first columns' means: float32 products of columns far from zero would drown their variance.

    Attributes:
        count: Number of columns seen.
        x0, q0: Means of the first columns, (G, K).
        x, q: Sums of the columns less these, (G, K).
        xq, qq: Sums of the products x q^T and q q^T of such columns, (G, K, K).
    """

    count: int
    x0: Tensor
    q0: Tensor
    x: Tensor
    q: Tensor
    xq: Tensor
    qq: Tensor

    @classmethod
    def of(cls, x: Tensor, q: Tensor) -> InputMoments:
        """From columns (G, K, P)."""
        zero = x.new_zeros(())
        found = cls(0, x.mean(2), q.mean(2), zero, zero, zero, zero)
        found.add(x, q)
        return found

    def add(self, x: Tensor, q: Tensor) -> None:
        """Take in more columns (G, K, P)."""
        self.count += x.shape[2]
        x, q = x - self.x0[:, :, None], q - self.q0[:, :, None]
        self.x, self.q = self.x + x.sum(2), self.q + q.sum(2)
        self.xq, self.qq = self.xq + x @ q.mT, self.qq + q @ q.mT

    def means(self) -> tuple[Tensor, Tensor]:
        """E[x] and E[q], (G, K) in float64."""
        return self.x0 + self.x.double() / self.count, self.q0 + self.q.double() / self.count

    def covariances(self, centred: bool) -> tuple[Tensor, Tensor]:
        """E[x q^T] and E[q q^T] in float64, about the means if ``centred`` (a bias can take up the means)."""
        x, q = self.x.double() / self.count, self.q.double() / self.count
        xq = self.xq.double() / self.count - x[:, :, None] * q[:, None]
        qq = self.qq.double() / self.count - q[:, :, None] * q[:, None]
        if not centred:
            x, q = self.means()
            xq, qq = xq + x[:, :, None] * q[:, None], qq + q[:, :, None] * q[:, None]
        return xq, qq


def damped(covariance: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean of its diagonal to the diagonal of each (K, K) matrix; 1 to a zero matrix."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean * damping, torch.ones_like(mean))
    return covariance + mean[:, None, None] * torch.eye(covariance.shape[-1]).to(covariance)


def compensate_input(weight: Tensor, xq: Tensor, qq: Tensor, damping: float = 0.01) -> Tensor:
    """The weight that computes from quantized inputs what ``weight`` computes from unquantized ones, nearly.

    W* = argmin E|W x - W* q|^2 + d |W* - W|^2 = W + W (E[x q^T] - E[q q^T]) (E[q q^T] + d I)^-1.

    Args:
        weight: (G, O, K), for each of G groups O rows.
        xq, qq: From :meth:`InputMoments.covariances`.
        damping: d as a share of the mean of the diagonal of E[q q^T].
    """
    return weight + torch.linalg.solve(damped(qq, damping), weight @ (xq - qq), left=False)


def round_compensated(
    weight: Tensor, qq: Tensor, quantize: Callable[[Tensor], Tensor], damping: float = 0.01
) -> Tensor:
    """Round column after column, the error of each spread over the columns that are still to come.

    Minimizes E|W q - Ŵ q|^2 over weights Ŵ on the grid, greedily: with U the upper Cholesky factor of the inverse of
    E[q q^T] (damped), the error e_j = (w_j - ŵ_j) / U_jj of column j is taken from the later ones, w_k -= e_j U_jk.
    Columns go by falling E[q_j^2]. GPTQ (Frantar, Ashkboos, Hoefler, Alistarh; ICLR 2023, arXiv 2210.17323).

    Args:
        weight: (G, O, K).
        qq: (G, K, K), second moments of the layer's quantized input.
        quantize: Sends a column (G, O) to its grid.
        damping: As in :func:`compensate_input` (GPTQ: 0.01).

    Returns:
        (G, O, K), every value on the grid.
    """
    order = qq.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True)
    factor = _inverse_factor(qq[:, order][:, :, order], damping)
    left, rounded = weight[:, :, order].clone(), torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        rounded[:, :, column] = quantize(left[:, :, j])
        error = (left[:, :, j] - rounded[:, :, column]) / factor[:, None, j, j]
        left[:, :, j + 1 :] -= error[:, :, None] * factor[:, None, j, j + 1 :]
    return rounded


def _inverse_factor(covariance: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse; damped more where rounding has left no positive definite matrix."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(torch.linalg.inv(damped(covariance, damping)), upper=True)
        if not failed.any() and factor.isfinite().all():
            return factor
        damping *= 10
