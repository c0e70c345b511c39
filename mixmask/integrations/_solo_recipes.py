"""What the mixed term of each of solo-learn's methods is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mixmask import losses
from mixmask._distributed import world_size


class Step:
    """What one training step of theirs produced, as far as the mixed term needs it."""

    def __init__(self) -> None:
        self.clean: list[dict[str, Tensor]] = []
        self.momentum: list[dict[str, Tensor]] = []
        self.noted: list[Tensor] = []
        self.after: list[Callable[[], None]] = []


Criterion = Callable[[Any, Step, int], losses.Criterion]


@dataclass(frozen=True)
class Recipe:
    """What the mixed term of one method is made of.

    Attributes:
        output: Which output of the online branch their loss takes.
        targets: From a step to one target per large crop.
        criterion: From the model, the step and the number of a target's crop.
        before: What to note before their step changes it.
        weight: How many terms their loss of so many crops adds up; 1 for a mean.
        both_directions: False if their loss has one direction.
    """

    output: str
    targets: Callable[[Step], list[Tensor]]
    criterion: Criterion
    before: Callable[[Any], list[Tensor]] = lambda _: []
    weight: Callable[[Any, int], float] = lambda _, __: 1.0
    both_directions: bool = True


def _clean(step: Step) -> list[Tensor]:
    return [out["z"] for out in step.clean]


def _noted(step: Step) -> list[Tensor]:
    return step.noted


def _momentum(step: Step) -> list[Tensor]:
    return [out["z"] for out in step.momentum]


def _in_batch(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """InfoNCE per image, against the other targets of all processes."""
    criterion = losses.InfoNCE(None, temperature, gather_distributed=True, reduction="none")
    return lambda z, target: criterion(F.normalize(z, dim=1), F.normalize(target, dim=1))


def _mocov3(model: Any, step: Step, other: int) -> losses.Criterion:
    del step, other
    criterion, tau = _in_batch(model.temperature), model.temperature
    return lambda z, target: 2 * tau * criterion(z, target)


def _nnclr(model: Any, step: Step, other: int) -> losses.Criterion:
    """The neighbours contrast the predictions, not the other way round."""
    del step, other
    criterion = _in_batch(model.temperature)
    return lambda z, target: criterion(target, z)


def _byol(model: Any, step: Step, other: int) -> losses.Criterion:
    del model, step, other
    criterion = losses.NegativeCosine(reduction="none")
    return lambda z, target: 2 + 2 * criterion(z, target)


def _barlow_twins(model: Any, step: Step, other: int) -> losses.Criterion:
    del step, other
    criterion = losses.BarlowTwins(model.lamb, gather_distributed=True)

    def scaled(z: Tensor, target: Tensor) -> Tensor:
        loss = model.scale_loss * criterion(z, target)
        # Theirs averages over the processes without their gradients, which leaves a share.
        shared: Tensor = loss.detach() + (loss - loss.detach()) / world_size()
        return shared

    return scaled


def _vicreg(model: Any, step: Step, other: int) -> losses.Criterion:
    """λ weights the invariance; variance and covariance are those of the mixed view, once."""
    del step, other
    # They sum the hinges of both views where the published code takes the mean.
    weights = model.sim_loss_weight, 2 * model.var_loss_weight, model.cov_loss_weight
    return losses.VICReg(*weights, gather_distributed=True)


def _dino(model: Any, step: Step, other: int) -> losses.Criterion:
    """The center is the one that the clean crops met, from before the step."""
    del other
    theirs = model.dino_loss_func
    temperature = float(theirs.teacher_temp_schedule[theirs.epoch])
    return losses.DINO(step.noted[0], theirs.student_temp, temperature)


def _ressl(model: Any, step: Step, other: int) -> losses.Criterion:
    """The first crop learns the second one's similarities to the queue."""
    del other
    criterion = losses.SwAV(model.temperature_q, reduction="none")
    queue = step.noted[0].T
    return lambda z, target: criterion(
        z @ queue, (target @ queue / model.temperature_k).softmax(dim=1)
    )


RECIPES = {
    "barlow_twins": Recipe("z", _clean, _barlow_twins),
    # The sum over every crop and each large one's target but its own.
    "byol": Recipe(
        "p", _momentum, _byol, weight=lambda model, crops: model.num_large_crops * (crops - 1.0)
    ),
    # Their update of the center binds a new tensor and leaves this one as it is.
    "dino": Recipe("z", _momentum, _dino, before=lambda model: [model.dino_loss_func.center]),
    # Each direction has a queue of its own.
    "mocov2plus": Recipe(
        "z",
        _momentum,
        lambda model, _, other: losses.InfoNCE(model.queue[other].T, model.temperature),
    ),
    "mocov3": Recipe(
        "q", lambda step: [out["k"] for out in step.momentum], _mocov3, weight=lambda _, __: 2.0
    ),
    "nnclr": Recipe("p", _noted, _nnclr),
    # What autograd keeps must not change when the keys are enqueued.
    "ressl": Recipe(
        "z", _momentum, _ressl, before=lambda model: [model.queue.clone()], both_directions=False
    ),
    "simclr": Recipe(
        "z", _clean, lambda model, _, __: losses.NTXent(model.temperature, gather_distributed=True)
    ),
    "simsiam": Recipe(
        "p",
        lambda step: [out["z"].detach() for out in step.clean],
        lambda *_: losses.NegativeCosine(),
    ),
    "swav": Recipe("p", _noted, lambda model, _, __: losses.SwAV(model.temperature)),
    "vicreg": Recipe("z", _clean, _vicreg),
}
