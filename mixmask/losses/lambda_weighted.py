"""The MixMask term of the loss (paper, eq. 4), around any criterion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from mixmask.mixing import MixedBatch

Criterion = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class SharingCriterion(Protocol):
    """A criterion that evaluates both weighted terms at once, because they share work."""

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the plain criterion, () or (N,)."""

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), () or (N,).

        Without `other`, return lam * l(z, target) alone.
        """


def lambda_weighted_loss(
    criterion: Criterion,
    z_mixed: Tensor,
    target: Tensor,
    mixed: MixedBatch,
    *,
    switch: bool = True,
) -> Tensor:
    r"""Weigh the loss towards an image and towards its partner by their shares (eq. 4).

    $\frac{1}{N} \sum_i \lambda_i \ell(z_i, t_i) + (1 - \lambda_i) \ell(z_i, t_{\pi(i)})$. Add it
    to the loss of the clean images, with weight one. A criterion that has a `weighted` method
    (see `SharingCriterion`), such as `losses.InfoNCE`, is asked for both terms at once.

    Args:
        criterion: (z, target) -> () or (N,).
        z_mixed: (N, ...) embeddings of the mixed images, by the online branch.
        target: (N, ...) targets of the clean images, in the order of the batch.
        mixed: What `mix_batch` returned.
        switch: False keeps the term of λ alone (the paper's ablation).

    Returns:
        () scalar loss.

    Raises:
        ValueError: If the sizes do not belong together, if the criterion returns neither ()
            nor (N,), or if it returns () where each sample has a λ of its own.
        TypeError: If the criterion does not return a tensor.

    Source:
        MixMask, section 3.2 and eq. 4.

    Example:
        >>> import torch, mixmask
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> z = torch.nn.functional.normalize(mixed.images.flatten(1), dim=1)
        >>> lambda_weighted_loss(mixmask.losses.InfoNCE(), z, z, mixed).shape
        torch.Size([])
    """
    n = len(mixed)
    for name, tensor in (("z_mixed", z_mixed), ("target", target)):
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(
                f"{name} must hold one row for each of the {n} mixed images, got "
                f"{tuple(tensor.shape)}; pass the embeddings of this batch, before any gathering"
            )
    lam = mixed.lam.to(z_mixed.device)
    if isinstance(criterion, SharingCriterion) and callable(criterion.weighted):
        other = target.index_select(0, mixed.partner) if switch else None
        return criterion.weighted(z_mixed, target, other, lam).mean()
    own = _checked(criterion(z_mixed, target), lam, n)
    if not switch:
        return (lam * own).mean()
    other = target.index_select(0, mixed.partner)
    return (lam * own + (1 - lam) * _checked(criterion(z_mixed, other), lam, n)).mean()


def _checked(loss: Tensor, lam: Tensor, n: int) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the criterion must return a tensor, () or (N,), got {type(loss).__name__}; "
            "wrap it so that it returns the loss alone"
        )
    if loss.shape not in ((), (n,)):
        raise ValueError(
            f"the criterion must return () or (N,) with N = {n}, got {tuple(loss.shape)}; "
            "reduce it over all axes but the first"
        )
    if lam.ndim == 1 and loss.ndim == 0:
        raise ValueError(
            "one λ a sample needs a criterion that returns (N,), got a scalar; "
            "build it with reduction='none', or use one mask for the whole batch"
        )
    return loss
