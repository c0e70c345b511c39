"""The MixMask term of the loss (paper, eq. 4), around any criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixmask._checks import check_choice
from mixmask._devices import move
from mixmask.losses._criteria import (
    Criterion,
    check_criterion,
    check_kind,
    gives_both_terms,
    is_library,
    matches,
    takes_partners,
)
from mixmask.losses._inputs import (
    Embeddings,
    Records,
    as_directions,
    as_list,
    as_pairs,
    as_records,
    check_gradient,
    check_loss,
    check_mixed,
    check_sizes,
    count_rows,
    match_directions,
)
from mixmask.losses._state import is_traceable, lend_buffers, lend_state
from mixmask.mixing import MixedBatch


def lambda_weighted_loss(
    criterion: Criterion, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, *, switch: bool = True
) -> Tensor:
    r"""Weigh the loss towards an image and towards its partner by their shares (eq. 4).

    $\frac{1}{N} \sum_i \lambda_i \ell(z_i, t_i) + (1 - \lambda_i) \ell(z_i, t_{\pi(i)})$. Add it
    to the loss of the clean images, with weight one. A `SharingCriterion`, such as
    `losses.InfoNCE`, is asked for both terms at once.

    Do not pass

    - a similarity, such as `nn.CosineSimilarity`, whose sign is wrong: use
      `losses.NegativeCosine()`;
    - `nn.CrossEntropyLoss` with embeddings, or with MoCo's logits and labels: its positives are
      in the logits, so permuting the labels does nothing;
    - a model that takes images and returns its loss: pass the loss inside it;
    - a criterion whose queue, bank or center moves when called: use `LambdaWeightedLoss`;
    - both views in one tensor of 2N rows: split them, and pair each with its own target.

    Args:
        criterion: (z, target) -> () or (N,).
        z_mixed: (N, ...) embeddings of the mixed images, by the online branch.
        target: (N, ...) targets of the clean images, in the order of the batch.
        mixed: What `mix_batch` returned.
        switch: False keeps the term of λ alone (the paper's ablation).

    Returns:
        () scalar loss.

    Raises:
        ValueError: If sizes do not fit, if the criterion returns neither () nor (N,), or () where
            each sample has its own λ, if its result has no gradient though z_mixed requires one, or
            if a classifier's loss is given embeddings.
        TypeError: If an argument or the criterion's result is not a tensor, or if the criterion
            is a similarity or a whole model.

    Source:
        MixMask, section 3.2 and eq. 4.

    Example:
        >>> import torch, mixmask
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> z = torch.nn.functional.normalize(mixed.images.flatten(1), dim=1)
        >>> lambda_weighted_loss(mixmask.losses.InfoNCE(), z, z, mixed).shape
        torch.Size([])
    """
    check_mixed(mixed)
    check_sizes(mixed.partner.shape[0], z_mixed=z_mixed, target=target)
    check_criterion(criterion, z_mixed, target)
    if matches(criterion):
        raise TypeError(
            f"{type(criterion).__name__} compares with the clean embeddings, which "
            "lambda_weighted_loss does not have; use LambdaWeightedLoss(criterion)"
        )
    return _weigh(criterion, z_mixed, target, mixed, switch=switch)


def _weigh(
    criterion: Criterion, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, *, switch: bool
) -> Tensor:
    """Return the mixed term of `lambda_weighted_loss`, its inputs checked."""
    n = mixed.partner.shape[0]
    lam = move(mixed.lam, z_mixed.device)  # () or (N,)
    # The paper flips the queries: the switch image of x_i is m_π(i), already in the batch. To
    # permute the targets is the same for a shared mask, and right for one λ per sample too.
    partner = move(mixed.partner, target.device)
    other = target.index_select(0, partner) if switch else None  # (N, ...)
    if gives_both_terms(criterion):
        known: dict[str, Tensor] = {"partner": partner} if takes_partners(criterion) else {}
        loss = check_loss(criterion.weighted(z_mixed, target, other, lam, **known), n)
        return check_gradient(loss.mean(), z_mixed)
    # Eq. 4, term by term.
    loss = lam * check_loss(criterion(z_mixed, target), n, lam)  # () or (N,)
    if other is not None:
        loss = loss + (1 - lam) * check_loss(criterion(z_mixed, other), n, lam)
    return check_gradient(loss.mean(), z_mixed)


class LambdaWeightedLoss(nn.Module):
    r"""The whole loss of a step, original and mixed terms, around a criterion that may hold state.

    $L = \ell(z, t) + \frac{1}{N} \sum_i \lambda_i \ell(z^m_i, t_i) + (1 - \lambda_i) \ell(z^m_i,
    t_{\pi(i)})$. A criterion with a memory bank, a queue or a running center changes it at every
    call. Here the mixed terms come first, on copies of its state from before the step, and the
    original term last, which updates it once.

    State is what the criterion holds: buffers, attributes such as pointers, counters and lists of
    tensors, its functions' closure variables, and the globals that they name. Attributes of classes
    and of imported modules, random generators, files and what lies deep in objects of other
    packages are not covered. State is copied twice per mixed view, unless `ignore` names it. Pass
    the loss alone: for a function around a model, the model's buffers are copied too. Build this
    module once, and call it from one thread at a time. State outside of buffers breaks
    torch.compile's graph, and `fullgraph=True` refuses it.

    Symmetric methods (BYOL, SimSiam, SwAV, DINO, MoCo v3) take both directions at once: z is
    (p1, p2) and target (t2, t1). The original term is then their sum. A single mixed view belongs
    to the first direction; otherwise there is one mixed view per direction.

    Args:
        criterion: (z, target) -> () or (N,), a module or any callable; see `lambda_weighted_loss`.
        switch: False keeps the term of λ alone (the paper's ablation).
        ignore: Names of attributes to use without a copy, because the loss does not depend on
            their changes, or because they are large and constant.
        directions: "sum" or "mean" of the original terms of several directions; the mean is
            SimSiam's ½. Each mixed view has weight one in either case.

    Raises:
        TypeError: If the criterion is not callable, or is a class or a similarity.
        ValueError: If an option does not fit.

    Example:
        >>> import torch, mixmask
        >>> criterion = mixmask.LambdaWeightedLoss(mixmask.losses.NegativeCosine())
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> p1, p2, t1, t2, p_mixed = torch.randn(5, 4, 16)
        >>> criterion(p1, t2, p_mixed, mixed).shape
        torch.Size([])
        >>> both = criterion((p1, p2), (t2, t1), p_mixed, mixed)
        >>> bool(both.isclose(criterion(p1, t2, p_mixed, mixed) + criterion(p2, t1)))
        True
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        switch: bool = True,
        ignore: Sequence[str] = (),
        directions: str = "sum",
    ) -> None:
        super().__init__()
        check_kind(criterion)
        if isinstance(ignore, str):
            raise TypeError(f"ignore must be a sequence of names, got {ignore!r}; use [{ignore!r}]")
        check_choice("directions", directions, ("sum", "mean"))
        self.criterion = criterion
        self.switch = switch
        self.ignore = tuple(ignore)
        self.directions = directions
        self._tried = False

    def forward(
        self, z: Embeddings, target: Embeddings,
        z_mixed: Embeddings | None = None, mixed: Records | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss of the clean images plus that of each mixed view, each with weight 1.

        Args:
            z: (N, ...) embeddings of the clean images, by the online branch; or a tuple with one
                per direction, as (p1, p2).
            target: (N, ...) their targets; or a tuple with one per direction, as (t2, t1).
            z_mixed: (N, ...) embeddings of the mixed images, or a list of them, one per mixed
                view. Without them the criterion is called as it is.
            mixed: What was mixed, or a list in the same order.

        Returns:
            () scalar.

        Raises:
            ValueError: If sizes do not fit, if the criterion returns neither () nor (N,), or if
                it writes to parameters.
            TypeError: If an argument or the criterion's result is not a tensor, or if the
                criterion is a whole model.
        """
        clean = as_directions(z, target)  # One pair (z, target) per direction.
        # All sizes are checked before the first call of the criterion can move its state.
        pairs = as_pairs(z_mixed, mixed)
        n = pairs[0][1].partner.shape[0] if pairs else count_rows(clean[0][0])
        for one, its_target in clean:
            check_sizes(n, z=one, target=its_target)
        mixed_terms = self._mixed_terms(pairs, [t for _, t in clean], [one for one, _ in clean])
        # Last, because it moves the state.
        first, *others = [self._clean_term(one, t, len(clean)) for one, t in clean]
        return sum([*others, *mixed_terms], first)

    def mixed_loss(
        self, z_mixed: Embeddings, target: Embeddings, mixed: Records, *,
        z: Embeddings | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mixed terms alone, (), and leave the criterion's state as it is.

        For loops that call backward on them before the original term, which moves the state.
        Arguments and errors are those of `forward`; only a `MatchingCriterion` needs z.
        """
        pairs = as_pairs(z_mixed, mixed)
        if not pairs:
            raise ValueError("mixed_loss needs z_mixed and mixed, got None for both")
        clean = as_list(z) if z is not None else []
        first, *others = self._mixed_terms(pairs, as_list(target), clean)
        return sum(others, first)

    def terms(
        self, encode: Callable[[Tensor], Tensor],
        images: Embeddings, target: Embeddings, mixed: Records,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the loss term by term, the mixed ones first; each is embedded when asked for.

        Call backward on a term before asking for the next: only one forward pass is alive at a
        time, so a step needs the memory of one without mixing. Under DistributedDataParallel, put
        all but the last backward into `no_sync()`. The terms sum to what `forward` returns, except
        that batch norm's running statistics see the mixed views first.

        Args:
            encode: The online branch, from images to what the criterion takes.
            images: (N, C, H, W) clean views; or a tuple with one per direction, as (x1, x2).
            target: (N, ...) their targets, without a gradient; or a tuple, as (t2, t1).
            mixed: As in `forward`.

        Yields:
            () scalars, one per mixed view and then one per direction of the clean images.

        Raises:
            ValueError: As `forward` does; or if the targets carry a gradient.
            TypeError: If the criterion compares mixed with clean embeddings, which needs both.

        Example:
            >>> import torch, mixmask
            >>> criterion = mixmask.LambdaWeightedLoss(mixmask.losses.InfoNCE())
            >>> encode = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
            >>> x, target = torch.rand(4, 3, 8, 8), torch.randn(4, 16)
            >>> mixed = mixmask.mix_batch(x, mixmask.BlockMaskGenerator(2))
            >>> for term in criterion.terms(encode, x, target, mixed):
            ...     term.backward()
        """
        if matches(self.criterion):
            raise TypeError(
                f"{type(self.criterion).__name__} compares mixed with clean embeddings, so its "
                "terms cannot be taken one by one; call it with z, target, z_mixed, mixed"
            )
        clean = as_directions(images, target, "images")
        records = as_records(mixed)
        for one, its_target in clean:
            for record in records:
                check_sizes(len(record), images=one, target=its_target)
            if its_target.requires_grad:
                raise ValueError(
                    "targets must carry no gradient where terms are taken one by one, for the "
                    "first backward frees their graph; pass target.detach(), or call the loss at "
                    "once"
                )
        targets = match_directions([t for _, t in clean], len(records))
        return self._yield_terms(encode, clean, list(zip(records, targets, strict=True)))

    def _yield_terms(
        self,
        encode: Callable[[Tensor], Tensor],
        clean: list[tuple[Tensor, Tensor]],
        mixed: list[tuple[MixedBatch, Tensor]],
    ) -> Iterator[Tensor]:
        # A generator: the next forward pass begins after the caller's backward.
        for record, target in mixed:
            yield self._mixed_term(encode(record.images), target, record, None)
        for images, target in clean:
            z = encode(images)
            check_sizes(len(images), z=z)
            yield self._clean_term(z, target, len(clean))

    def _clean_term(self, z: Tensor, target: Tensor, directions: int) -> Tensor:
        """Return the original term of one direction, which moves the state."""
        check_criterion(self.criterion, z, target)
        loss = check_loss(self.criterion(z, target), z.shape[0]).mean()
        return loss / directions if self.directions == "mean" and directions > 1 else loss

    def _mixed_terms(
        self, pairs: list[tuple[Tensor, MixedBatch]], targets: list[Tensor], z: list[Tensor]
    ) -> list[Tensor]:
        matched = match_directions(targets, len(pairs))
        clean: list[Any] = match_directions(z, len(pairs)) if z else [None] * len(pairs)
        return [
            self._mixed_term(one, target, record, its_z)
            for (one, record), target, its_z in zip(pairs, matched, clean, strict=True)
        ]

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        """Return the term of one mixed view; the state stays as it is."""
        # Dynamo can follow state in buffers and numbers of modules, and nothing else.
        if torch.compiler.is_compiling() and not (is_library(self.criterion) or is_traceable(self)):
            return self._untraced_term(z_mixed, target, mixed, z)
        return self._lent_term(z_mixed, target, mixed, z)

    def _lent_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        criterion, switch = self.criterion, self.switch
        check_sizes(mixed.partner.shape[0], z_mixed=z_mixed, target=target)
        check_criterion(criterion, z_mixed, target)
        if matches(criterion):
            return self._matched_term(z_mixed, target, mixed, z)
        # One call gives both terms, so one copy serves them.
        if gives_both_terms(criterion):
            with self._lend() as lent:
                return _weigh(lent, z_mixed, target, mixed, switch=switch)

        def criterion_on_copies(z: Tensor, target: Tensor) -> Tensor:
            # Each of the two terms sees the state from before the step.
            with self._lend() as lent:
                return cast("Tensor", lent(z, target))

        return _weigh(criterion_on_copies, z_mixed, target, mixed, switch=switch)

    # The private decorator imports the compiler where it is needed, not with the package.
    _untraced_term = torch._disable_dynamo(_lent_term)  # type: ignore[attr-defined]
    # What Dynamo says where it must not break the graph.
    vars(_untraced_term).update(
        _torchdynamo_disable=True,
        _torchdynamo_disable_msg="a criterion whose state is not in buffers takes a graph break; "
        "keep its state in buffers, or compile without fullgraph=True",
    )

    def _matched_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        if z is None:
            raise TypeError(
                f"{type(self.criterion).__name__} compares with the clean embeddings; pass them "
                "as z="
            )
        check_sizes(mixed.partner.shape[0], z=z)
        # Matched to the mixture of clean embeddings: here the partners' are taken of z.
        other = z.index_select(0, move(mixed.partner, z.device)) if self.switch else None  # (N, C)
        lam = move(mixed.lam, z_mixed.device)  # () or (N,)
        with self._lend() as lent:
            # And not len(z), which would fix the batch's size in an exported graph.
            loss = check_loss(lent.matched(z_mixed, target, z, other, lam), z.shape[0])
            return check_gradient(loss.mean(), z_mixed)

    def _lend(self) -> AbstractContextManager[Any]:
        """Lend the criterion's state; trained parameters are kept safe at the first call alone."""
        if torch.compiler.is_compiling():
            return lend_buffers(self.criterion)
        cautious, self._tried = not self._tried, True
        return lend_state(self.criterion, self.ignore, cautious=cautious)

    def extra_repr(self) -> str:
        """Show the options in the printed module."""
        described = [] if isinstance(self.criterion, nn.Module) else [repr(self.criterion)]
        if self.directions != "sum":
            described.append(f"directions={self.directions!r}")
        return ", ".join([*described, f"switch={self.switch}"])
