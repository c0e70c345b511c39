"""Losses that keep features from repeating each other: Barlow Twins and VICReg."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_non_negative
from mixmask._devices import without_autocast
from mixmask._distributed import average, check_even, gather_rows, world_size
from mixmask.losses._rows import check_rows, mix_losses, mix_rows, upcast

_STATISTICS_EPS = 1e-5


def barlow_twins(
    z: Tensor,
    target: Tensor,
    redundancy_weight: float = 5e-3,
    *,
    gather_distributed: bool = False,
    sync_statistics: bool = False,
) -> Tensor:
    r"""Distance of the cross-correlation of two views' features from the identity.

    $\sum_i (1 - C_{ii})^2 + w \sum_{i \neq j} C_{ij}^2$ with $C = \hat z^T \hat t / N$, where each
    feature is standardised over the batch.

    Args:
        z: (N, C) projections of one view, N of at least 2, floating.
        target: (N, C) projections of the other view.
        redundancy_weight: w, the weight of the off-diagonal part.
        gather_distributed: Average C over all processes, as lightly's criterion does.
        sync_statistics: Standardise features over the batches of all processes, as synchronised
            batch norm does. With both, the loss is that of the whole batch, as the authors' code.

    Returns:
        () scalar, at least float32; mixed terms thus need a λ shared by the batch.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If z is not floating.

    Source:
        Zbontar et al., "Barlow Twins", eq. 1 and 2.

    Example:
        >>> z = torch.randn(256, 8)
        >>> bool(barlow_twins(z, z) < 0.1)
        True
    """
    check_non_negative("redundancy_weight", redundancy_weight)
    check_rows(z, target, at_least=2)
    z, target = upcast(z), upcast(target)
    rows = _standardize(z, z, sync_statistics)  # (N, C)
    columns = _standardize(target, target, sync_statistics)  # (N, C)
    options = redundancy_weight, gather_distributed, sync_statistics
    return _measure_redundancy(rows, columns, 1.0, *options)


@dataclass(frozen=True)
class BarlowTwins:
    """`barlow_twins` with its options stored.

    Its λ-weighted form cannot reach zero, not even for an encoder that mixes ideally;
    `MatchedBarlowTwins` can.
    """

    redundancy_weight: float = 5e-3
    _: KW_ONLY
    gather_distributed: bool = False
    sync_statistics: bool = False

    def __post_init__(self) -> None:
        check_non_negative("redundancy_weight", self.redundancy_weight)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `barlow_twins`."""
        return barlow_twins(z, target, **vars(self))


@dataclass(frozen=True)
class MatchedBarlowTwins(BarlowTwins):
    r"""Barlow Twins with a mixed term that reaches zero for an ideal mix.

    Clean views use `barlow_twins`. A mixed view is matched to the mixture of the clean
    correlations, $C(z_m, t) \to \lambda C(z, t) + (1 - \lambda) C(z_\pi, t)$: the squares of the
    difference, weighted as in `barlow_twins`. Mixed features are standardised by the clean ones'
    mean and deviation, so that $f(m) = \lambda f(x) + (1 - \lambda) f(x_\pi)$ reaches zero. No
    gradient goes to the clean z. It needs z, so use it with `LambdaWeightedLoss`.

    Source:
        Zbontar et al., "Barlow Twins", eq. 2, and MixMask, eq. 4; after Bandara et al., "Guarding
        Barlow Twins against overfitting with mixed samples".

    Example:
        >>> z1, z2 = torch.randn(2, 32, 8)
        >>> partner, lam = torch.arange(31, -1, -1), torch.tensor(0.25)
        >>> ideal = lam * z1 + (1 - lam) * z1[partner]
        >>> bool(MatchedBarlowTwins().matched(ideal, z2, z1, z1[partner], lam) < 1e-8)
        True
    """

    def matched(
        self, z_mixed: Tensor, target: Tensor, z: Tensor, other: Tensor | None, lam: Tensor
    ) -> Tensor:
        """Return the distance of the mixed correlations from the mixture of the clean ones.

        Args:
            z_mixed: (N, C) projections of the mixed view.
            target: (N, C) projections of the other, clean view.
            z: (N, C) projections of the clean view that was mixed.
            other: (N, C) those of the partners; None leaves them out of the mixture.
            lam: () or (N,).

        Returns:
            () scalar.
        """
        check_rows(z_mixed, target, at_least=2)
        check_rows(z_mixed, z, names=("z_mixed", "z"))
        sync = self.sync_statistics
        # What is matched to is a constant, as a target is.
        clean = upcast(z).detach()
        others = None if other is None else _standardize(upcast(other).detach(), clean, sync)
        mixture = mix_rows(_standardize(clean, clean, sync), others, lam)
        # C is linear in its rows: the difference of two correlations is that of the difference.
        rows = _standardize(upcast(z_mixed), clean, sync) - mixture
        columns = _standardize(upcast(target), upcast(target), sync)
        options = self.redundancy_weight, self.gather_distributed, sync
        return _measure_redundancy(rows, columns, 0.0, *options)


def _standardize(rows: Tensor, reference: Tensor, sync: bool) -> Tensor:
    """Bring each feature to the mean 0 and the deviation 1 that the reference then has."""
    if sync:
        mean = average(reference.mean(dim=0))  # (C,)
        # Around the mean of all processes, so that no square of a mean is subtracted.
        variance = average((reference - mean).square().mean(dim=0))  # (C,)
    else:
        # Over N and not N - 1, as batch norm does: the authors' code standardises by one.
        variance, mean = torch.var_mean(reference, dim=0, correction=0)  # (C,)
    return (rows - mean) * (variance + _STATISTICS_EPS).rsqrt()


def _measure_redundancy(
    rows: Tensor, columns: Tensor, wanted: float, weight: float, gather: bool, sync: bool
) -> Tensor:
    """Return the weighted squares of the cross-correlation less the wanted diagonal, ()."""
    if gather or sync:
        # An average of averages is that of all rows only if every process holds as many rows.
        check_even(rows.shape[0], rows.device)
    # A gathered correlation is a mean over processes, which products of images do not give.
    if not (gather and world_size() > 1) and _is_wide(rows):
        diagonal = (rows * columns).mean(dim=0)  # (C,)
        squares = _sum_squares(rows, columns) - diagonal.square().sum()
        return (diagonal - wanted).square().sum() + weight * squares
    correlation = _multiply_features(rows, columns) / rows.shape[0]  # (C, C)
    if gather:
        correlation = average(correlation)
    diagonal = correlation.diagonal()  # (C,)
    # Squared after the diagonal has gone: next to its squares the others' would be rounded.
    squares = (correlation - torch.diag(diagonal)).square().sum()
    return (diagonal - wanted).square().sum() + weight * squares


def _is_wide(rows: Tensor) -> bool:
    """Tell whether products of images, (N, N), are far smaller than those of features, (C, C)."""
    # Of rank N at most, (C, C) is then more than its diagonal: a difference of both keeps digits.
    # One graph serves batches of all sizes, so there it is always (C, C).
    return not torch.compiler.is_compiling() and rows.shape[0] * 2 <= rows.shape[1]


def _sum_squares(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of the squares of rows^T columns / N, ()."""
    # |A^T B|^2 = <A A^T, B B^T>: of two products (N, N), and none (C, C).
    own = _multiply_features(rows.T, rows.T)  # (N, N)
    others = own if columns is rows else _multiply_features(columns.T, columns.T)
    return (own * others).sum() / rows.shape[0] ** 2


def vicreg(
    z: Tensor, target: Tensor, invariance_weight: float = 25.0, variance_weight: float = 25.0,
    covariance_weight: float = 1.0, *, gather_distributed: bool = False,
) -> Tensor:  # fmt: skip
    r"""Pull two views together, and keep features spread and uncorrelated.

    $\mu_s \frac{1}{NC} \sum_i \|z_i - t_i\|^2 + \mu_v [v(z) + v(t)] + \mu_c [c(z) + c(t)]$ with
    $v(z) = \frac{1}{2C} \sum_j \max(0, 1 - \sqrt{Var(z_j) + 10^{-4}})$ and $c(z) = \frac{1}{C}
    \sum_{i \neq j} Cov(z)_{ij}^2$.

    Args:
        z: (N, C) projections of one view, N of at least 2, floating.
        target: (N, C) projections of the other view.
        invariance_weight: Weight of the distance, 25 in the paper.
        variance_weight: Weight of v, 25 in the paper.
        covariance_weight: Weight of c, 1 in the paper.
        gather_distributed: Take v and c over the batches of all processes.

    Returns:
        () scalar, at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If z is not floating.

    Source:
        Bardes et al., "VICReg", eq. 1-6; the ½ of v is that of the published code.

    Example:
        >>> z = torch.randn(64, 8)
        >>> bool(vicreg(z, z) < vicreg(z, z + 1))
        True
    """
    _check_weights(invariance_weight, variance_weight, covariance_weight)
    check_rows(z, target, at_least=2)
    z, target = upcast(z), upcast(target)
    distance = ((z - target) ** 2).mean()
    weights = variance_weight, covariance_weight
    regular = _regularize(z, *weights, gather_distributed)
    regular = regular + _regularize(target, *weights, gather_distributed)
    return invariance_weight * distance + regular


@dataclass(frozen=True)
class VICReg:
    """`vicreg` with its options stored; λ weighs the distance alone.

    The mixed term has v and c once, of the mixed view: those of the targets are part of the
    clean images' loss already. The function `vicreg`, passed instead, would count them again.
    """

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    _: KW_ONLY
    gather_distributed: bool = False

    def __post_init__(self) -> None:
        _check_weights(self.invariance_weight, self.variance_weight, self.covariance_weight)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `vicreg`."""
        return vicreg(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return the λ-weighted distance, with v and c of z once; see `SharingCriterion`."""
        check_rows(z, target, at_least=2)
        z = upcast(z)
        # Eq. 4 for the invariance alone: v and c see no target.
        own = ((z - upcast(target)) ** 2).mean(dim=1)  # (N,)
        others = None if other is None else ((z - upcast(other)) ** 2).mean(dim=1)
        distance = mix_losses(own, others, lam).mean()
        weights = self.variance_weight, self.covariance_weight
        return self.invariance_weight * distance + _regularize(z, *weights, self.gather_distributed)


def _check_weights(invariance: float, variance: float, covariance: float) -> None:
    check_non_negative("invariance_weight", invariance)
    check_non_negative("variance_weight", variance)
    check_non_negative("covariance_weight", covariance)


def _regularize(
    z: Tensor, variance_weight: float, covariance_weight: float, gather: bool
) -> Tensor:
    """Return the weighted variance and covariance terms of one view, ()."""
    if gather:
        z = gather_rows(z)  # (W * N, C)
    n, features = z.shape
    centred = z - z.mean(dim=0)  # (N, C)
    if _is_wide(z):
        variance = centred.square().sum(dim=0) / (n - 1)  # (C,)
        squares = _sum_squares(centred, centred) * (n / (n - 1)) ** 2 - variance.square().sum()
    else:
        covariance = _multiply_features(centred, centred) / (n - 1)  # (C, C)
        variance = covariance.diagonal()  # (C,)
        # Squared after the diagonal has gone: next to its squares the others' would be rounded.
        squares = (covariance - torch.diag(variance)).square().sum()
    # The published code takes the mean of both views' hinges where the loss adds them up.
    hinge = F.relu(1 - (variance + 1e-4).sqrt()).mean() / 2
    return variance_weight * hinge + covariance_weight * squares / features


def _multiply_features(rows: Tensor, others: Tensor) -> Tensor:
    """Return rows^T others in full precision: (N, C) and (N, C) give (C, C)."""
    # Autocast would round them to half precision, and their squares are then subtracted.
    with without_autocast(rows):
        return rows.T @ others
