"""MixMask in solo-learn's pretraining, switched on by a block of the configuration.

    python -m mixmask.integrations.solo main_pretrain.py --config-path … --config-name … \
        +mixmask.grid_size=4

runs their script with their arguments and no edit; `patch()` does the same for a script of one's
own. The block, in YAML or on the command line, holds the options of `mixmask.MixMask` and

- `switch`: False keeps the term of λ alone;
- `symmetric`: False mixes the first large crop alone, at the cost of one more forward pass
  instead of two;
- `small_crops`: True mixes the small crops of a multi-crop run as well;
- `enabled`: False switches it off, as everywhere in solo-learn.

Without the block a run is what it was. The mixed term weighs as much as the original loss does
(VICReg's has the spread of the mixed view alone), and is logged as `train_mixmask_loss`, the share
of own pixels as `train_lambda`. The online classifier and the kNN see clean images only.

Needs solo-learn from its repository (1.0.6 or newer).
"""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import losses
from mixmask._distributed import world_size
from mixmask.mixing import MixedBatch, MixMask

_MODULE = "mixmask.integrations.solo"
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
    """Add MixMask to the methods in `solo.methods.METHODS`; harmless when called again.

    A method reads the `mixmask:` block of the configuration that it is built from. AutoResumer
    learns to resume a run only with the block that it was started with.

    Raises:
        ImportError: If solo-learn cannot be imported, or is the old release that is not built
            from a configuration.

    Source:
        MixMask, eq. 1-4, in every method as the table in the README has it.
    """
    try:
        from solo.methods import METHODS
        from solo.utils.auto_resumer import AutoResumer
    except ImportError as error:
        raise ImportError(
            f"{_MODULE} needs solo-learn, which could not be imported ({error}); install it from "
            "its repository, vturrisi/solo-learn on GitHub, and run from there"
        ) from error
    parameters = list(inspect.signature(METHODS["base"].__init__).parameters)
    if parameters != ["self", "cfg"] or not hasattr(METHODS["base"], "base_training_step"):
        raise ImportError(
            f"{_MODULE} needs solo-learn 1.0.6 or newer, whose methods are built from a "
            f"configuration, got methods built from {parameters[1:4]}; install it from its "
            "repository, vturrisi/solo-learn on GitHub"
        )
    for name, theirs in METHODS.items():
        if name != "linear" and not issubclass(theirs, _Block):
            ours = _MIXED.get(name, _Refusing)
            METHODS[name] = type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__})
    if "mixmask" not in AutoResumer.SHOULD_MATCH:
        AutoResumer.SHOULD_MATCH.append("mixmask")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a solo-learn script patched: `main([script, *its arguments])`.

    Args:
        arguments: Default: those of the command line.

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
    """Make Lightning start the other processes of a run through this module as well.

    It starts them as `python script …`; they would train without MixMask beside one that has it.
    """
    from lightning.pytorch.strategies.launchers import subprocess_script

    def patched(command: list[str]) -> list[str]:
        return [command[0], "-m", _MODULE, *command[1:]]

    basic = subprocess_script._basic_subprocess_cmd
    hydra = subprocess_script._hydra_subprocess_cmd

    def hydra_command(local_rank: int) -> tuple[list[str], str]:
        command, folder = hydra(local_rank)
        return patched(command), folder

    subprocess_script._basic_subprocess_cmd = lambda: patched(basic())
    subprocess_script._hydra_subprocess_cmd = hydra_command


class _Block:
    """Reads the `mixmask:` block of a configuration."""

    def _options(self, cfg: Any) -> dict[str, Any] | None:
        """Return the block's options, or None if MixMask is off."""
        block = cfg.get("mixmask")
        if block is None or block is False:
            return None
        if not hasattr(block, "items"):
            raise TypeError(
                f"mixmask must be a block of options, got {block!r}; write for instance "
                "mixmask: {grid_size: 4}"
            )
        options = {key: tuple(v) if _is_list(v) else v for key, v in block.items()}
        parameters = inspect.signature(MixMask).parameters
        known = [*parameters, *_OWN_OPTIONS]
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ValueError(
                f"mixmask has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}"
            )
        switches = {key for key in parameters if isinstance(parameters[key].default, bool)}
        for key in switches.union(_OWN_OPTIONS).intersection(options):
            # On hydra's command line `no` and `off` are words, which Python takes for true.
            if not isinstance(options[key], bool):
                raise TypeError(
                    f"mixmask.{key} must be a bool, got {options[key]!r}; write true or false"
                )
        return options if options.get("enabled", True) else None


class _Refusing(_Block):
    """A method that MixMask does not go into."""

    def __init__(self, cfg: Any) -> None:
        """Refuse the block, or build the method as it is."""
        if self._options(cfg) is not None:
            name = cfg.method
            reason = _LEFT_OUT.get(name, "it is not known here")
            raise ValueError(
                f"mixmask does not work with the method {name!r}: {reason}; use one of "
                f"{', '.join(sorted(_MIXED))}, or leave the mixmask block out"
            )
        super().__init__(cfg)  # type: ignore[call-arg]


class _Step:
    """What one training step of theirs produced, as far as the mixed term needs it."""

    def __init__(self) -> None:
        self.clean: list[dict[str, Tensor]] = []
        self.momentum: list[dict[str, Tensor]] = []
        self.noted: list[Tensor] = []
        self.after: list[Callable[[], None]] = []


class _Mixed(_Block):
    """A method of theirs with the mixed term; goes before it in the order of classes.

    Their training step runs as it is. What it computed for the clean crops is noted on the way,
    and what it would enqueue waits until the mixed term has read the same queue.
    """

    output = "z"
    both_directions = True
    # Provided by their class.
    queue: Any
    temperature: float
    num_large_crops: int
    log_dict: Callable[..., None]

    def __init__(self, cfg: Any) -> None:
        """Check the block before anything is built."""
        options = self._options(cfg)
        own = {key: options.pop(key) for key in _OWN_OPTIONS if options and key in options}
        mixing = None if options is None else MixMask(**options)
        super().__init__(cfg)  # type: ignore[call-arg]
        self.mixmask = mixing
        self._mix_options = own
        self._step: _Step | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return their loss plus the mixed term."""
        if self.mixmask is None:
            return super().training_step(batch, batch_idx)  # type: ignore[misc]
        self._step = step = _Step()
        try:
            self._before(step)
            loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        finally:
            self._step = None
        mixed_loss, share = self._mixed_loss(step, batch[1])
        for enqueue in step.after:
            enqueue()
        self.log_dict(
            {"train_mixmask_loss": mixed_loss, "train_lambda": share},
            on_epoch=True,
            sync_dist=True,
        )
        return loss + mixed_loss

    def base_training_step(self, X: Tensor, targets: Tensor) -> Any:  # noqa: N803
        """Note what a clean crop gave."""
        out = super().base_training_step(X, targets)  # type: ignore[misc]
        if self._step is not None:
            self._step.clean.append(out)
        return out

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> Any:  # noqa: N803
        """Note what the momentum branch gave for a clean crop."""
        out = super()._shared_step_momentum(X, targets)  # type: ignore[misc]
        if self._step is not None:
            self._step.momentum.append(out)
        return out

    def _mixed_loss(self, step: _Step, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mixed term, and the mean share of own pixels."""
        assert self.mixmask is not None
        targets = self._targets(step)
        terms, shares = [], []
        for view in self._mixed_views(len(crops)):
            mixed = self.mixmask(crops[view])
            z_mixed = self._embed(mixed.images, small=view >= self.num_large_crops)
            terms += [
                self._term(step, z_mixed, target, mixed, other)
                for other, target in enumerate(targets)
                if other != view
            ]
            shares.append(mixed.lam.mean())
        weight = self._weight(len(crops))
        return weight * torch.stack(terms).mean(), torch.stack(shares).mean()

    def _term(
        self, step: _Step, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, other: int
    ) -> Tensor:
        criterion = self._criterion(step, other)
        switch = self._mix_options.get("switch", True)
        return losses.lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=switch)

    def _mixed_views(self, crops: int) -> list[int]:
        both = self.both_directions and self._mix_options.get("symmetric", True)
        views = list(range(self.num_large_crops if both else 1))
        if self._mix_options.get("small_crops", False):
            views += range(self.num_large_crops, crops)
        return views

    def _embed(self, images: Tensor, *, small: bool) -> Tensor:
        out = self.multicrop_forward(images) if small else self(images)  # type: ignore[attr-defined, operator]
        if self.output not in out:
            raise ValueError(
                f"mixmask.small_crops needs a method that embeds small crops, got "
                f"{type(self).__name__}; leave the option out"
            )
        embedding: Tensor = out[self.output]
        return embedding

    def _later(self, enqueue: Callable[..., None], *keys: Tensor) -> None:
        """Enqueue after the mixed term, if it is to come."""
        if self._step is None:
            enqueue(*keys)
        else:
            self._step.after.append(partial(enqueue, *keys))

    def _before(self, step: _Step) -> None:
        """Note what their training step is about to change."""

    def _weight(self, crops: int) -> float:
        """Return how many terms their loss of so many crops adds up; 1 for a mean."""
        del crops
        return 1.0

    def _targets(self, step: _Step) -> list[Tensor]:
        """Return one target a large crop."""
        raise NotImplementedError

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        """Return the criterion against the targets of one large crop."""
        raise NotImplementedError


class _MoCoV2Plus(_Mixed):
    """Each direction has a queue of its own."""

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.momentum]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step
        return losses.InfoNCE(self.queue[other].T, self.temperature)

    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        self._later(super()._dequeue_and_enqueue, keys)  # type: ignore[misc]


class _MoCoV3(_Mixed):
    """The sum of both directions, each times 2 τ."""

    output = "q"

    def _weight(self, crops: int) -> float:
        del crops
        return 2.0

    def _embed(self, images: Tensor, *, small: bool) -> Tensor:
        return F.normalize(super()._embed(images, small=small), dim=1)

    def _targets(self, step: _Step) -> list[Tensor]:
        return [F.normalize(out["k"], dim=1) for out in step.momentum]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        criterion = losses.InfoNCE(
            None, self.temperature, gather_distributed=True, reduction="none"
        )
        return lambda z, target: 2 * self.temperature * criterion(z, target)


class _SimCLR(_Mixed):
    """Both views of every other image are negatives."""

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.clean]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        return losses.NTXent(self.temperature, gather_distributed=True)


class _BYOL(_Mixed):
    """The sum of squared distances, of every crop to each large one's target but its own."""

    output = "p"

    def _weight(self, crops: int) -> float:
        return self.num_large_crops * (crops - 1.0)

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.momentum]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        criterion = losses.NegativeCosine(reduction="none")
        return lambda z, target: 2 + 2 * criterion(z, target)


class _SimSiam(_Mixed):
    """The mean over both directions; targets take no gradient."""

    output = "p"

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"].detach() for out in step.clean]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        return losses.NegativeCosine()


class _BarlowTwins(_Mixed):
    """A statistic of the batch: one λ a batch."""

    lamb: float
    scale_loss: float

    def _options(self, cfg: Any) -> dict[str, Any] | None:
        options = super()._options(cfg)
        if options and options.get("per_sample"):
            raise ValueError(
                "mixmask.per_sample needs a loss of each image, and that of barlow_twins is a "
                "statistic of the batch; leave the option out"
            )
        return options

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.clean]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        criterion = losses.BarlowTwins(self.lamb, gather_distributed=True)

        def weighed(z: Tensor, target: Tensor) -> Tensor:
            loss = self.scale_loss * criterion(z, target)
            # Theirs averages over the processes without their gradients, which leaves a share.
            return loss.detach() + (loss - loss.detach()) / world_size()

        return weighed


class _VICReg(_Mixed):
    """λ weighs the invariance; variance and covariance are taken once, of the mixed view."""

    sim_loss_weight: float
    var_loss_weight: float
    cov_loss_weight: float

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.clean]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        # They sum the hinges of both views where the published code takes the mean.
        return losses.VICReg(
            self.sim_loss_weight,
            2 * self.var_loss_weight,
            self.cov_loss_weight,
            gather_distributed=True,
        )


class _SwAV(_Mixed):
    """Codes are made once, of the clean crops, with their queue."""

    output = "p"

    def get_assignments(self, preds: Any) -> Any:
        """Note the codes of the clean crops."""
        codes = super().get_assignments(preds)  # type: ignore[misc]
        if self._step is not None:
            self._step.noted = codes
        return codes

    def _targets(self, step: _Step) -> list[Tensor]:
        return step.noted

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        return losses.SwAV(self.temperature)


class _DINO(_Mixed):
    """The center is the one that the clean crops met, from before the step."""

    dino_loss_func: Any

    def _before(self, step: _Step) -> None:
        # Their update binds a new tensor and leaves this one as it is.
        step.noted = [self.dino_loss_func.center]

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.momentum]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del other
        theirs = self.dino_loss_func
        temperature = float(theirs.teacher_temp_schedule[theirs.epoch])
        return losses.DINO(step.noted[0], theirs.student_temp, temperature)


class _NNCLR(_Mixed):
    """Targets are the neighbours that the clean crops found; they contrast the predictions."""

    output = "p"

    def find_nn(self, z: Tensor) -> Any:
        """Note the neighbours of a clean crop."""
        index, neighbours = super().find_nn(z)  # type: ignore[misc]
        if self._step is not None:
            self._step.noted.append(neighbours)
        return index, neighbours

    def dequeue_and_enqueue(self, z: Tensor, y: Tensor) -> None:
        """Wait for the mixed term."""
        self._later(super().dequeue_and_enqueue, z, y)  # type: ignore[misc]

    def _targets(self, step: _Step) -> list[Tensor]:
        return step.noted

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del step, other
        criterion = losses.InfoNCE(
            None, self.temperature, gather_distributed=True, reduction="none"
        )
        return lambda z, target: criterion(F.normalize(target, dim=1), F.normalize(z, dim=1))


class _ReSSL(_Mixed):
    """One direction: the first crop learns the second one's similarities to the queue."""

    both_directions = False
    temperature_q: float
    temperature_k: float

    def _before(self, step: _Step) -> None:
        # What autograd keeps must not change when the keys are enqueued.
        step.noted = [self.queue.clone()]

    def dequeue_and_enqueue(self, k: Tensor) -> None:
        """Wait for the mixed term."""
        self._later(super().dequeue_and_enqueue, k)  # type: ignore[misc]

    def _targets(self, step: _Step) -> list[Tensor]:
        return [out["z"] for out in step.momentum]

    def _criterion(self, step: _Step, other: int) -> losses.Criterion:
        del other
        criterion = losses.SwAV(self.temperature_q, reduction="none")
        queue = step.noted[0].T

        def relation(z: Tensor, target: Tensor) -> Tensor:
            return criterion(z @ queue, (target @ queue / self.temperature_k).softmax(dim=1))

        return relation


_MIXED: dict[str, type[_Mixed]] = {
    "barlow_twins": _BarlowTwins,
    "byol": _BYOL,
    "dino": _DINO,
    "mocov2plus": _MoCoV2Plus,
    "mocov3": _MoCoV3,
    "nnclr": _NNCLR,
    "ressl": _ReSSL,
    "simclr": _SimCLR,
    "simsiam": _SimSiam,
    "swav": _SwAV,
    "vicreg": _VICReg,
}


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence)


if __name__ == "__main__":
    # Under its own name, so that what it defines can be pickled and is there only once.
    from mixmask.integrations import solo

    solo.main()
