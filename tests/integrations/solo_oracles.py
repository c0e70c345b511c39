"""The mixed terms of solo-learn's methods, written out with the losses of theirs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixmask import MixMask

N = 6


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def double_precision() -> Iterator[None]:
    """As a Trainer of precision "64-true": their Barlow Twins builds a batch norm in its loss."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def find_loss(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(
        importlib.import_module("solo.losses"), f"{name}_loss_func"
    )
    return found


def _momentum(key: str) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    return lambda model, crops: [model.momentum_forward(x)[key] for x in crops]


def _clean(model: Any, crops: list[Tensor]) -> list[Tensor]:
    return [model(x)["z"] for x in crops]


def _neighbours(model: Any, crops: list[Tensor]) -> list[Tensor]:
    return [model.find_nn(z)[1] for z in _clean(model, crops)]


def _codes(model: Any, crops: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = model.get_assignments([model(x)["p"] for x in crops])
    return found


def _barlow_twins(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    return find_loss("barlow")(z, target, lamb=model.lamb, scale_loss=model.scale_loss)


def _dino(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    # Its two directions are the same here, and so is their mean; its center must not move.
    found: Tensor = copy.deepcopy(model.dino_loss_func)(torch.cat([z, z]), torch.cat([target] * 2))
    return found


def _mocov2plus(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    return find_loss("mocov2plus")(z, target, model.queue[other], model.temperature)


def _simclr(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    indexes = torch.arange(len(z)) + len(z) * rank()
    return find_loss("simclr")(torch.cat([z, target]), indexes.repeat(2), model.temperature)


def _distance(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    invariance = importlib.import_module("solo.losses.vicreg").invariance_loss
    found: Tensor = model.sim_loss_weight * invariance(z, target)
    return found


def _spread(model: Any, z: Tensor) -> Tensor:
    """Half of what two equal views have, which is once what one view has."""
    return find_loss("vicreg")(z, z, 0.0, model.var_loss_weight, model.cov_loss_weight) / 2


def _ressl(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    return find_loss("ressl")(z, target, model.queue, model.temperature_q, model.temperature_k)


def _simclr_row(model: Any, z: Tensor, target: Tensor, other: int, i: int) -> Tensor:
    del other
    rows = F.normalize(torch.cat([z, target]), dim=1)
    total = z.new_zeros(())
    for row, positive in ((i, len(z) + i), (len(z) + i, i)):
        logits = rows[row] @ rows.T / model.temperature
        rest = [column for column in range(len(rows)) if column != row]
        total = total + (logits[rest].logsumexp(dim=0) - logits[positive]) / 2
    return total


@dataclass(frozen=True)
class Method:
    """A method of theirs, as far as the mixed term repeats it."""

    output: str
    targets: Callable[[Any, list[Tensor]], list[Tensor]]
    loss: Callable[[Any, Tensor, Tensor, int], Tensor]
    row: Callable[[Any, Tensor, Tensor, int, int], Tensor] | None = None
    once: Callable[[Any, Tensor], Tensor] | None = None
    summed: bool = False
    views: int = 2

    def of_row(self, model: Any, z: Tensor, target: Tensor, other: int, i: int) -> Tensor:
        """Return the loss of one image alone."""
        if self.row is not None:
            return self.row(model, z, target, other, i)
        return self.loss(model, z[i : i + 1], target[i : i + 1], other)


METHODS = {
    "barlow_twins": Method("z", _clean, _barlow_twins),
    "byol": Method("p", _momentum("z"), lambda _m, p, z, _o: find_loss("byol")(p, z), summed=True),
    "dino": Method("z", _momentum("z"), _dino),
    "mocov2plus": Method("z", _momentum("z"), _mocov2plus),
    "mocov3": Method(
        "q",
        _momentum("k"),
        lambda m, q, k, _o: find_loss("mocov3")(q, k, m.temperature),
        # Rolled, the one query meets its own key in the first column, where they look for it.
        lambda m, q, k, _o, i: find_loss("mocov3")(q[i : i + 1], k.roll(-i, 0), m.temperature),
        summed=True,
    ),
    "nnclr": Method(
        "p",
        _neighbours,
        lambda m, p, nn, _o: find_loss("nnclr")(nn, p, m.temperature),
        lambda m, p, nn, _o, i: find_loss("nnclr")(nn[i : i + 1], p.roll(-i, 0), m.temperature),
    ),
    "ressl": Method("z", _momentum("z"), _ressl, views=1),
    "simclr": Method("z", _clean, _simclr, _simclr_row),
    "simsiam": Method("p", _clean, lambda _m, p, z, _o: find_loss("simsiam")(p, z)),
    "swav": Method("p", _codes, lambda m, p, c, _o: find_loss("swav")([p, p], [c], m.temperature)),
    "vicreg": Method("z", _clean, _distance, once=_spread),
}


def weigh_losses(
    name: str, model: Any, z: Tensor, target: Tensor, other: int, share: Tensor | float
) -> Tensor:
    """Weigh the losses of the images by their shares, all alike or each its own."""
    method = METHODS[name]
    if not isinstance(share, Tensor):
        return share * method.loss(model, z, target, other)
    rows = [share[i] * method.of_row(model, z, target, other, i) for i in range(N)]
    return torch.stack(rows).mean()


@double_precision()
def mixed_term(
    name: str,
    model: Any,
    crops: list[Tensor],
    *,
    switch: bool = True,
    symmetric: bool = True,
    small_crops: bool = False,
    **options: Any,
) -> tuple[Tensor, float]:
    """Write the mixed term out, drawing masks where the integration is to draw them."""
    method, large = METHODS[name], 2
    targets = method.targets(model, crops[:large])
    views = list(range(method.views if symmetric else 1))
    views += range(large, len(crops)) if small_crops else []
    mix = MixMask(**options)
    terms, shares = [], []
    for view in views:
        x, record = crops[view], mix(crops[view])
        assert record.mask is not None
        own = record.mask.to(x.dtype).expand(N, *x.shape[-2:])
        kept = own[:, None]
        images = kept * x + (1 - kept) * x[record.partner]
        z = (model(images) if view < large else model.multicrop_forward(images))[method.output]
        each = own.mean(dim=(1, 2))
        shares.append(float(each.mean()))
        lam = each if options.get("per_sample") else float(each[0])
        for other, target in enumerate(targets):
            if other == view:
                continue
            term = weigh_losses(name, model, z, target, other, lam)
            if switch:
                partner = target[record.partner]
                term = term + weigh_losses(name, model, z, partner, other, 1 - lam)
            terms.append(term if method.once is None else term + method.once(model, z))
    # BYOL and MoCo v3 add their directions up, the others average.
    directions = 2 * (len(crops) - 1) if method.summed else 1
    return directions * torch.stack(terms).mean(), sum(shares) / len(shares)
