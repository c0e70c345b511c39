"""The MixMask term of the loss (paper, eq. 4), around any criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mixmask.losses._state import lent_buffers, watched
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


@runtime_checkable
class MatchingCriterion(Protocol):
    """A criterion whose mixed term is matched to what it finds between the clean views."""

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the plain criterion, ()."""

    def matched(
        self, z_mixed: Tensor, target: Tensor, z: Tensor, other: Tensor | None, lam: Tensor
    ) -> Tensor:
        """Return the whole mixed term, (); `z` and `other` are of the images and partners."""


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
    check_sizes(n, z_mixed=z_mixed, target=target)
    if isinstance(criterion, MatchingCriterion) and callable(criterion.matched):
        raise TypeError(
            f"{type(criterion).__name__} compares with the clean embeddings, which "
            "lambda_weighted_loss does not have; use LambdaWeightedLoss(criterion)"
        )
    lam = mixed.lam.to(z_mixed.device)
    if isinstance(criterion, SharingCriterion) and callable(criterion.weighted):
        other = target.index_select(0, mixed.partner) if switch else None
        return _checked(criterion.weighted(z_mixed, target, other, lam), n).mean()
    own = _checked(criterion(z_mixed, target), n, lam)
    if not switch:
        return (lam * own).mean()
    other = target.index_select(0, mixed.partner)
    return (lam * own + (1 - lam) * _checked(criterion(z_mixed, other), n, lam)).mean()


class LambdaWeightedLoss(nn.Module):
    r"""The whole loss of a step, original and mixed terms, around a criterion that may hold state.

    $L = \ell(z, t) + \frac{1}{N} \sum_i \lambda_i \ell(z^m_i, t_i) + (1 - \lambda_i) \ell(z^m_i,
    t_{\pi(i)})$. A criterion with a memory bank, a queue or a running center changes it at every
    call. Here the mixed terms are taken first, on copies of its buffers, and the original one
    last, on the buffers themselves: after the step they are as one clean call would have left
    them, and every term has seen the same state. State that is not in buffers is noticed and
    refused.

    Args:
        criterion: (z, target) -> () or (N,), a module or any callable.
        switch: False keeps the term of λ alone (the paper's ablation).
        ignore: Names of plain attributes that may change during a call, because the loss does
            not depend on them: caches, counters.

    Example:
        >>> import torch, mixmask
        >>> criterion = mixmask.LambdaWeightedLoss(mixmask.losses.NTXent())
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> z, target, z_mixed = torch.randn(3, 4, 16)
        >>> criterion(z, target, z_mixed, mixed).shape
        torch.Size([])
    """

    def __init__(
        self, criterion: Criterion, *, switch: bool = True, ignore: Sequence[str] = ()
    ) -> None:
        """Store the criterion; if it is a module, its buffers are part of this one's state."""
        super().__init__()
        if not callable(criterion):
            raise TypeError(
                f"criterion must be callable as (z, target), got {type(criterion).__name__}; "
                "pass for instance losses.InfoNCE(queue)"
            )
        if isinstance(ignore, str):
            raise TypeError(
                f"ignore must be a sequence of names, got {ignore!r}; use ({ignore!r},)"
            )
        self.criterion = criterion
        self.switch = switch
        self.ignore = tuple(ignore)
        self._watched_closely = False

    def forward(
        self,
        z: Tensor,
        target: Tensor,
        z_mixed: Tensor | Sequence[Tensor] | None = None,
        mixed: MixedBatch | Sequence[MixedBatch] | None = None,
    ) -> Tensor:
        """Return the loss of the clean images plus that of each mixed view, every one of weight 1.

        Args:
            z: (N, ...) embeddings of the clean images, by the online branch.
            target: (N, ...) their targets.
            z_mixed: (N, ...) embeddings of the mixed images, or a list of them, one a mixed view.
                Without them the criterion is called as it is.
            mixed: What was mixed, or a list in the same order.

        Returns:
            () scalar.

        Raises:
            ValueError: If sizes do not belong together, if the criterion returns neither () nor
                (N,), or if it keeps state outside its buffers.
            TypeError: If the criterion does not return a tensor.
        """
        pairs = as_pairs(z_mixed, mixed)
        check_sizes(len(pairs[0][1]) if pairs else len(z), z=z, target=target)
        terms = [self._mixed_term(one, target, record, z) for one, record in pairs]
        total = _checked(self.criterion(z, target), len(z)).mean()
        for term in terms:
            total = total + term
        return total

    def mixed_loss(
        self,
        z_mixed: Tensor | Sequence[Tensor],
        target: Tensor,
        mixed: MixedBatch | Sequence[MixedBatch],
        *,
        z: Tensor | None = None,
    ) -> Tensor:
        """Return the mixed terms alone, and leave the criterion's state as it is.

        For loops that call backward on them before the clean images' loss, so that one forward
        pass is alive at a time. Take them first: the original term moves the state.

        Args:
            z_mixed: As in `forward`.
            target: As in `forward`.
            mixed: As in `forward`.
            z: (N, ...) clean embeddings, which only a `MatchingCriterion` needs.

        Returns:
            () scalar.

        Raises:
            ValueError: As `forward` does.
            TypeError: As `forward` does.
        """
        pairs = as_pairs(z_mixed, mixed)
        terms = [self._mixed_term(one, target, record, z) for one, record in pairs]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def terms(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        mixed: MixedBatch | Sequence[MixedBatch],
    ) -> Iterator[Tensor]:
        """Yield the loss term by term, each embedded when asked for: the mixed ones, the clean one.

        Call backward on a term before asking for the next, and only one forward pass is alive at
        a time, so that a step needs the memory of one without mixing; gradients add up. Under
        DistributedDataParallel, put all but the last backward into `no_sync()`, and gradients
        travel once. The sum of the terms is what `forward` returns, but for batch norm, whose
        running statistics see the mixed views first.

        Args:
            encode: The online branch, from images to what the criterion takes.
            images: (N, C, H, W) clean views.
            target: (N, ...) their targets, without a gradient.
            mixed: As in `forward`.

        Yields:
            () scalars, one a mixed view and then that of the clean images.

        Raises:
            ValueError: As `forward` does; or if the targets carry a gradient, whose graph the
                first backward would free.
            TypeError: If the criterion compares mixed with clean embeddings, which has to be done
                at once.

        Example:
            >>> import torch, mixmask
            >>> criterion = mixmask.LambdaWeightedLoss(mixmask.losses.InfoNCE())
            >>> encode = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
            >>> x, target = torch.rand(4, 3, 8, 8), torch.randn(4, 16)
            >>> mixed = mixmask.mix_batch(x, mixmask.BlockMaskGenerator(2))
            >>> for term in criterion.terms(encode, x, target, mixed):
            ...     term.backward()
        """
        records = [mixed] if isinstance(mixed, MixedBatch) else list(mixed)
        if isinstance(self.criterion, MatchingCriterion):
            raise TypeError(
                f"{type(self.criterion).__name__} compares mixed with clean embeddings, so its "
                "terms cannot be taken one by one; call it with z, target, z_mixed, mixed"
            )
        if target.requires_grad:
            raise ValueError(
                "targets must carry no gradient where terms are taken one by one, for the first "
                "backward frees their graph; pass target.detach(), or call the loss at once"
            )
        for record in records:
            check_sizes(len(record), images=images, target=target)
        return self._terms(encode, images, target, records)

    def _terms(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        records: Sequence[MixedBatch],
    ) -> Iterator[Tensor]:
        for record in records:
            yield self._mixed_term(encode(record.images), target, record, None)
        yield _checked(self.criterion(encode(images), target), len(images)).mean()

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        criterion = self.criterion
        closely, self._watched_closely = not self._watched_closely, True
        with watched(criterion, self.ignore, closely=closely):
            if isinstance(criterion, MatchingCriterion) and callable(criterion.matched):
                return self._matched(criterion, z_mixed, target, mixed, z)
            if isinstance(criterion, SharingCriterion) and callable(criterion.weighted):
                with lent_buffers(criterion):
                    return lambda_weighted_loss(
                        criterion, z_mixed, target, mixed, switch=self.switch
                    )

            def sheltered(z: Tensor, target: Tensor) -> Tensor:
                with lent_buffers(criterion):
                    return criterion(z, target)

            return lambda_weighted_loss(sheltered, z_mixed, target, mixed, switch=self.switch)

    def _matched(
        self,
        criterion: MatchingCriterion,
        z_mixed: Tensor,
        target: Tensor,
        mixed: MixedBatch,
        z: Tensor | None,
    ) -> Tensor:
        if z is None:
            raise TypeError(
                f"{type(criterion).__name__} compares with the clean embeddings; pass them as z="
            )
        n = len(mixed)
        check_sizes(n, z_mixed=z_mixed, target=target, z=z)
        other = z.index_select(0, mixed.partner) if self.switch else None
        lam = mixed.lam.to(z_mixed.device)
        with lent_buffers(criterion):
            return _checked(criterion.matched(z_mixed, target, z, other, lam), n).mean()

    def extra_repr(self) -> str:
        """Show the options in the printed module."""
        described = [] if isinstance(self.criterion, nn.Module) else [repr(self.criterion)]
        return ", ".join([*described, f"switch={self.switch}"])


def as_pairs(
    z_mixed: Tensor | Sequence[Tensor] | None, mixed: MixedBatch | Sequence[MixedBatch] | None
) -> list[tuple[Tensor, MixedBatch]]:
    """Return what belongs together, one pair a mixed view; none where nothing was mixed."""
    if z_mixed is None and mixed is None:
        return []
    if z_mixed is None or mixed is None:
        raise ValueError(
            "z_mixed and mixed belong together, got only one of them; pass the embeddings of "
            "mixed.images and mixed itself"
        )
    embeddings = [z_mixed] if isinstance(z_mixed, Tensor) else list(z_mixed)
    records = [mixed] if isinstance(mixed, MixedBatch) else list(mixed)
    if len(embeddings) != len(records) or not records:
        raise ValueError(
            f"z_mixed and mixed must be as many, at least one, got {len(embeddings)} and "
            f"{len(records)}; pass one embedding for each mixed view, in the same order"
        )
    return list(zip(embeddings, records, strict=True))


def check_sizes(n: int, **tensors: Tensor) -> None:
    """Refuse tensors that do not hold one row an image, by their names."""
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(
                f"{name} must hold one row for each of the {n} mixed images, got "
                f"{tuple(tensor.shape)}; pass the embeddings of this batch, before any gathering"
            )


def _checked(loss: Tensor, n: int, lam: Tensor | None = None) -> Tensor:
    """Return what a criterion gave if it is () or (N,), and (N,) for shares of one's own."""
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
    if lam is not None and lam.ndim == 1 and loss.ndim == 0:
        raise ValueError(
            "one λ a sample needs a criterion that returns (N,), got a scalar; "
            "build it with reduction='none', or use one mask for the whole batch"
        )
    return loss
