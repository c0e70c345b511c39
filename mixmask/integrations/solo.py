"""MixMask in solo-learn's pretraining, switched on by a block of the configuration.

    python -m mixmask.integrations.solo main_pretrain.py --config-path … --config-name … \
        +mixmask.grid_size=4

runs their script unchanged; in your own script, call `patch()`. The `mixmask` block, in YAML or on
the command line, takes the options of `mixmask.MixMask` and

- `switch`: False keeps the term of λ alone;
- `symmetric`: False mixes only the first large crop: one extra forward pass instead of two;
- `small_crops`: True also mixes the small crops of a multi-crop run;
- `enabled`: False switches MixMask off.

Without the block nothing changes. The mixed term has the weight of the original loss and is logged
as `train_mixmask_loss`, the share of own pixels as `train_lambda`. Online classifier and kNN see
clean images only. For VICReg, variance and covariance of the mixed view count once.
"""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mixmask import losses
from mixmask._distributed import world_size
from mixmask.integrations._steps import View, mix_views
from mixmask.losses.cosine import squared_distance
from mixmask.mixing import MixMask

_MODULE = "mixmask.integrations.solo"
_INSTALL = "install it from its repository, vturrisi/solo-learn on GitHub"
_OWN_OPTIONS = ("enabled", "small_crops", "switch", "symmetric")
_LEFT_OUT = {
    "all4one": "its neighbours are combined by a transformer over the clean batch",
    "base": "it has no loss of its own",
    "deepclusterv2": "its targets are looked up by the number of an image, and a mixture has two",
    "mae": "it masks images itself and rebuilds pixels, without a target embedding",
    "nnbyol": "neighbours as the targets of a predictor are not tested",
    "nnsiam": "neighbours as the targets of a predictor are not tested",
    "supcon": "labels choose its positives, and a mixture has two labels",
    "vibcreg": "its head whitens each batch by itself, mixtures like clean images",
    "wmse": "it whitens all views of a batch together, so mixtures would change the clean loss",
}


def patch() -> None:
    """Add MixMask to the methods in `solo.methods.METHODS`; calling it again changes nothing.

    Methods read the `mixmask:` block of their configuration. AutoResumer then resumes a run only
    with the block it was started with.

    Raises:
        ImportError: If solo-learn cannot be imported, or is the old release whose methods are not
            built from a configuration.

    Source:
        MixMask, eq. 1-4.
    """
    try:
        from solo.methods import METHODS
        from solo.utils.auto_resumer import AutoResumer
    except ImportError as error:
        raise ImportError(
            f"{_MODULE} needs solo-learn, which could not be imported ({error}); {_INSTALL}, and "
            "run from there"
        ) from error
    parameters = list(inspect.signature(METHODS["base"].__init__).parameters)
    if parameters != ["self", "cfg"] or not hasattr(METHODS["base"], "base_training_step"):
        raise ImportError(
            f"{_MODULE} needs solo-learn 1.0.6 or newer, whose methods are built from a "
            f"configuration, got methods built from {parameters[1:4]}; {_INSTALL}"
        )
    for name, theirs in METHODS.items():
        if name != "linear" and not issubclass(theirs, _Mixed):
            more = {"__module__": theirs.__module__, "recipe": RECIPES.get(name)}
            METHODS[name] = type(theirs.__name__, (_Mixed, theirs), more)
    if "mixmask" not in AutoResumer.SHOULD_MATCH:
        AutoResumer.SHOULD_MATCH.append("mixmask")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a solo-learn script patched: `main([script, *its arguments])`, or the command line.

    Raises:
        SystemExit: With status 2 and one line if no script is named.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    script = Path(arguments[0]) if arguments else Path()
    if not script.is_file():
        named = f"got {arguments[0]!r}" if arguments else "got none"
        sys.stderr.write(
            f"{_MODULE}: expected the path of solo-learn's main_pretrain.py, {named}; use "
            f"python -m {_MODULE} path/to/main_pretrain.py and its own arguments\n"
        )
        raise SystemExit(2)
    # As Python does for a script: its folder first, so that a checkout finds its own `solo`.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(script), *arguments[1:]]
    patch()
    _start_processes_patched()
    runpy.run_path(str(script), run_name="__main__")


def _start_processes_patched() -> None:
    """Make Lightning start the other processes of a run through this module."""
    from lightning.pytorch.strategies.launchers import subprocess_script as launcher

    basic, hydra = launcher._basic_subprocess_cmd, launcher._hydra_subprocess_cmd

    def patched(command: list[str]) -> list[str]:
        return [command[0], "-m", _MODULE, *command[1:]]

    def hydra_command(local_rank: int) -> tuple[list[str], str]:
        command, folder = hydra(local_rank)
        return patched(command), folder

    launcher._basic_subprocess_cmd = lambda: patched(basic())
    launcher._hydra_subprocess_cmd = hydra_command


def _read_options(cfg: Any) -> dict[str, Any] | None:
    """Return the options of the `mixmask:` block, or None if MixMask is off."""
    block = cfg.get("mixmask")
    if block is None or block is False:
        return None
    if not hasattr(block, "items"):
        raise TypeError(
            f"mixmask must be a block of options, got {block!r}; write for instance "
            "mixmask: {grid_size: 4}"
        )
    # A range is a list in YAML, a number or a word is not.
    options = {key: tuple(v) if hasattr(v, "append") else v for key, v in block.items()}
    parameters = inspect.signature(MixMask).parameters
    known = [*parameters, *_OWN_OPTIONS]
    switches = {key for key in parameters if isinstance(parameters[key].default, bool)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"mixmask has no option {key!r}; it takes {', '.join(sorted(known))}")
        # On hydra's command line `no` and `off` are words, which Python takes for true.
        if key in switches.union(_OWN_OPTIONS) and not isinstance(value, bool):
            raise TypeError(f"mixmask.{key} must be a bool, got {value!r}; write true or false")
    return options if options.get("enabled", True) else None


@dataclass
class Step:
    """The parts of one of their training steps that the mixed term needs."""

    clean: list[dict[str, Tensor]] = field(default_factory=list)
    momentum: list[dict[str, Tensor]] = field(default_factory=list)
    noted: list[Tensor] = field(default_factory=list)
    after: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """What the mixed term of one method is made of."""

    output: str  # Which output of the online branch their loss takes.
    targets: Callable[[Step], list[Tensor]]  # One per large crop.
    # From the model, the step and the number of the crop that gives the target.
    criterion: Callable[[Any, Step, int], losses.Criterion]
    before: Callable[[Any], list[Tensor]] = lambda _: []  # What their step is about to change.
    # How many terms their loss of so many crops adds up; 1 for a mean.
    weight: Callable[[Any, int], float] = lambda _, __: 1.0
    both_directions: bool = True


def _record_output(name: str, note: Callable[[Step, Any], None]) -> Callable[..., Any]:
    """Return their method of this name, which records its output during a step."""

    def method(self: _Mixed, *args: object, **options: object) -> object:
        out = getattr(super(_Mixed, self), name)(*args, **options)
        if self._step is not None:
            note(self._step, out)
        return out

    return method


class _Mixed:
    """A method of theirs with the mixed term; goes before it in the order of classes.

    Their training step runs unchanged. Its outputs for the clean crops are recorded, and
    enqueueing waits until the mixed term has read the same queue.
    """

    recipe: Recipe  # Set by `patch`; None where MixMask does not support the method.
    num_large_crops: int  # Provided by their class, as the next one.
    log_dict: Callable[..., None]

    def __init__(self, cfg: Any) -> None:
        options = _read_options(cfg)
        if options is not None and not self.recipe:
            reason = _LEFT_OUT.get(cfg.method, "it was not tested")
            raise ValueError(
                f"mixmask does not support the method {cfg.method!r}: {reason}; use one of "
                f"{', '.join(sorted(RECIPES))}, or leave the mixmask block out"
            )
        if options and options.get("per_sample") and cfg.method == "barlow_twins":
            raise ValueError(
                "mixmask.per_sample needs a loss of each image, and that of barlow_twins is a "
                "statistic of the batch; leave the option out"
            )
        own = {key: options.pop(key) for key in _OWN_OPTIONS if options and key in options}
        mixing = None if options is None else MixMask(**options)
        super().__init__(cfg)  # type: ignore[call-arg]
        self.mixmask = mixing
        self._mix_options = own
        self._step: Step | None = None

    def training_step(self, batch: Any, batch_idx: int) -> object:
        """Return their loss plus the mixed term."""
        if self.mixmask is None:
            return super().training_step(batch, batch_idx)  # type: ignore[misc]
        self._step = step = Step()
        # Their step runs whole; `_record_output` and `_later` fill the record on the way.
        try:
            step.noted = self.recipe.before(self)
            loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        finally:
            self._step = None
        mixed_loss, share = self._mixed_loss(step, batch[1])
        # Only now, so that mixed and clean terms have met the same queue.
        for enqueue in step.after:
            enqueue()
        logged = {"train_mixmask_loss": mixed_loss, "train_lambda": share}
        self.log_dict(logged, on_epoch=True, sync_dist=True)
        return loss + mixed_loss

    base_training_step = _record_output(
        "base_training_step", lambda step, out: step.clean.append(out)
    )
    _shared_step_momentum = _record_output(
        "_shared_step_momentum", lambda step, out: step.momentum.append(out)
    )
    # The codes of the large crops (SwAV), and the neighbours of a crop (NNCLR).
    get_assignments = _record_output(
        "get_assignments", lambda step, codes: step.noted.extend(codes)
    )
    find_nn = _record_output("find_nn", lambda step, out: step.noted.append(out[1]))

    def _dequeue_and_enqueue(self, *keys: Tensor) -> None:
        self._later(super()._dequeue_and_enqueue, *keys)  # type: ignore[misc]

    def dequeue_and_enqueue(self, *keys: Tensor) -> None:
        self._later(super().dequeue_and_enqueue, *keys)  # type: ignore[misc]

    def _later(self, enqueue: Callable[..., None], *keys: Tensor) -> None:
        """Enqueue after the mixed term, if there will be one."""
        if self._step is None:
            enqueue(*keys)
        else:
            self._step.after.append(partial(enqueue, *keys))

    def _mixed_loss(self, step: Step, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mixed term, and the mean share of own pixels."""
        assert self.mixmask is not None
        large, options = self.num_large_crops, self._mix_options
        pairs = [
            (self.recipe.criterion(self, step, crop), target)
            for crop, target in enumerate(self.recipe.targets(step))
        ]
        both = self.recipe.both_directions and options.get("symmetric", True)
        small = range(large, len(crops)) if options.get("small_crops", False) else ()
        views: list[View] = []
        for view in (*range(large if both else 1), *small):
            embed = partial(self._embed, small=view >= large)
            # Of a large crop, all targets but its own.
            views.append((crops[view], embed, pairs[:view] + pairs[view + 1 :]))
        term, share = mix_views(self.mixmask, views, switch=options.get("switch", True))
        return self.recipe.weight(self, len(crops)) * term, share

    def _embed(self, images: Tensor, *, small: bool) -> Tensor:
        out = self.multicrop_forward(images) if small else self(images)  # type: ignore[attr-defined, operator]
        if self.recipe.output not in out:
            raise ValueError(
                f"mixmask.small_crops needs a method that embeds small crops, got "
                f"{type(self).__name__}; leave the option out"
            )
        embedding: Tensor = out[self.recipe.output]
        return embedding


def _clean(step: Step) -> list[Tensor]:
    return [out["z"] for out in step.clean]


def _momentum(step: Step) -> list[Tensor]:
    return [out["z"] for out in step.momentum]


def _contrast(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """InfoNCE per image (N,), against the other targets of all processes."""
    criterion = losses.InfoNCE(None, temperature, gather_distributed=True, reduction="none")
    return criterion(F.normalize(z, dim=1), F.normalize(target, dim=1))  # (N, C) -> (N,)


def _mocov3(model: Any, _step: Step, _other: int) -> losses.Criterion:
    # MoCo v3 scales each direction by 2 τ (its algorithm 1).
    return lambda z, target: 2 * model.temperature * _contrast(z, target, model.temperature)


def _nnclr(model: Any, _step: Step, _other: int) -> losses.Criterion:
    # The neighbours contrast the predictions, not the other way round.
    return lambda z, target: _contrast(target, z, model.temperature)


def _barlow_twins(model: Any, _step: Step, _other: int) -> losses.Criterion:
    criterion = losses.BarlowTwins(model.lamb, gather_distributed=True)

    def scale(z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = model.scale_loss * criterion(z, target)
        # Theirs averages over the processes without their gradients, which leaves a share.
        return loss.detach() + (loss - loss.detach()) / world_size()

    return scale


def _vicreg(model: Any, _step: Step, _other: int) -> losses.Criterion:
    # They sum the hinges of both views where the published code takes the mean.
    weights = model.sim_loss_weight, 2 * model.var_loss_weight, model.cov_loss_weight
    return losses.VICReg(*weights, gather_distributed=True)


def _dino(model: Any, step: Step, _other: int) -> losses.Criterion:
    theirs = model.dino_loss_func
    temperature = float(theirs.teacher_temp_schedule[theirs.epoch])
    return losses.DINO(step.noted[0], theirs.student_temp, temperature)


def _ressl(model: Any, step: Step, _other: int) -> losses.Criterion:
    """The first crop learns the second one's similarities to the queue."""
    criterion, queue = losses.SwAV(model.temperature_q, reduction="none"), step.noted[0].T  # (C, K)
    # (N, C) @ (C, K) -> (N, K): similarities to the queue are ReSSL's classes.
    return lambda z, target: criterion(
        z @ queue, (target @ queue / model.temperature_k).softmax(dim=1)
    )


RECIPES = {
    "barlow_twins": Recipe("z", _clean, _barlow_twins),
    # The sum over every crop and each large one's target but its own.
    "byol": Recipe(
        "p",
        _momentum,
        lambda *_: squared_distance,
        weight=lambda model, crops: model.num_large_crops * (crops - 1.0),
    ),
    # The center that the clean crops met: their update binds a new tensor.
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
    "nnclr": Recipe("p", lambda step: step.noted, _nnclr),
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
    "swav": Recipe(
        "p", lambda step: step.noted, lambda model, _, __: losses.SwAV(model.temperature)
    ),
    "vicreg": Recipe("z", _clean, _vicreg),
}


if __name__ == "__main__":
    # Under its own name, so that what it defines can be pickled and is there only once.
    from mixmask.integrations import solo

    solo.main()
