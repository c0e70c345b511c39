"""MixMask in solo-learn's pretraining, switched on by a block of the configuration.

    python -m mixmask.integrations.solo main_pretrain.py --config-path … --config-name … \
        +mixmask.grid_size=4

runs their script unchanged; call `patch()` in a script of your own. The block, in YAML or on the
command line, holds the options of `mixmask.MixMask` and

- `switch`: False keeps the term of λ alone;
- `symmetric`: False mixes only the first large crop, which costs one extra forward pass instead
  of two;
- `small_crops`: True also mixes the small crops of a multi-crop run;
- `enabled`: False switches it off, as everywhere in solo-learn.

Without the block nothing changes. The mixed term has the weight of the original loss (for VICReg,
variance and covariance of the mixed view count once). It is logged as `train_mixmask_loss`, the
share of own pixels as `train_lambda`. The online classifier and the kNN see clean images only.

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
from torch import Tensor

from mixmask import losses
from mixmask.integrations._solo_recipes import RECIPES, Recipe, Step
from mixmask.mixing import MixMask

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

    A method reads the `mixmask:` block of its configuration. AutoResumer then resumes a run only
    with the block it was started with.

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
            ours = _Mixed if name in RECIPES else _Refusing
            more = {"__module__": theirs.__module__, "recipe": RECIPES.get(name)}
            METHODS[name] = type(theirs.__name__, (ours, theirs), more)
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
    """A method that MixMask does not support."""

    def __init__(self, cfg: Any) -> None:
        """Refuse the block, or build the method as it is."""
        if self._options(cfg) is not None:
            name = cfg.method
            reason = _LEFT_OUT.get(name, "it is not known here")
            raise ValueError(
                f"mixmask does not work with the method {name!r}: {reason}; use one of "
                f"{', '.join(sorted(RECIPES))}, or leave the mixmask block out"
            )
        super().__init__(cfg)  # type: ignore[call-arg]


class _Mixed(_Block):
    """A method of theirs with the mixed term; goes before it in the order of classes.

    Their training step runs as it is. What it computed for the clean crops is noted on the way,
    and what it would enqueue waits until the mixed term has read the same queue.
    """

    # Set by `patch`.
    recipe: Recipe
    # Provided by their class.
    num_large_crops: int
    log_dict: Callable[..., None]

    def __init__(self, cfg: Any) -> None:
        """Check the block before anything is built."""
        options = self._options(cfg)
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

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return their loss plus the mixed term."""
        if self.mixmask is None:
            return super().training_step(batch, batch_idx)  # type: ignore[misc]
        self._step = step = Step()
        try:
            step.noted = self.recipe.before(self)
            loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        finally:
            self._step = None
        mixed_loss, share = self._mixed_loss(step, batch[1])
        for enqueue in step.after:
            enqueue()
        logged = {"train_mixmask_loss": mixed_loss, "train_lambda": share}
        self.log_dict(logged, on_epoch=True, sync_dist=True)
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

    def get_assignments(self, preds: Any) -> Any:
        """Note the codes of the clean crops (SwAV)."""
        codes = super().get_assignments(preds)  # type: ignore[misc]
        if self._step is not None:
            self._step.noted = codes
        return codes

    def find_nn(self, z: Tensor) -> Any:
        """Note the neighbours of a clean crop (NNCLR)."""
        index, neighbours = super().find_nn(z)  # type: ignore[misc]
        if self._step is not None:
            self._step.noted.append(neighbours)
        return index, neighbours

    def _dequeue_and_enqueue(self, *keys: Tensor) -> None:
        self._later(super()._dequeue_and_enqueue, *keys)  # type: ignore[misc]

    def dequeue_and_enqueue(self, *keys: Tensor) -> None:
        """Wait for the mixed term."""
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
        targets = self.recipe.targets(step)
        switch = self._mix_options.get("switch", True)
        terms, shares = [], []
        for view in self._mixed_views(len(crops)):
            mixed = self.mixmask(crops[view])
            z_mixed = self._embed(mixed.images, small=view >= self.num_large_crops)
            for other, target in enumerate(targets):
                if other != view:
                    criterion = self._criterion(step, other)
                    terms.append(
                        losses.lambda_weighted_loss(
                            criterion, z_mixed, target, mixed, switch=switch
                        )
                    )
            shares.append(mixed.lam.mean())
        weight = self.recipe.weight(self, len(crops))
        return weight * torch.stack(terms).mean(), torch.stack(shares).mean()

    def _criterion(self, step: Step, other: int) -> losses.Criterion:
        """Return the criterion against the targets of one large crop."""
        return self.recipe.criterion(self, step, other)

    def _mixed_views(self, crops: int) -> list[int]:
        both = self.recipe.both_directions and self._mix_options.get("symmetric", True)
        views = list(range(self.num_large_crops if both else 1))
        if self._mix_options.get("small_crops", False):
            views += range(self.num_large_crops, crops)
        return views

    def _embed(self, images: Tensor, *, small: bool) -> Tensor:
        out = self.multicrop_forward(images) if small else self(images)  # type: ignore[attr-defined, operator]
        if self.recipe.output not in out:
            raise ValueError(
                f"mixmask.small_crops needs a method that embeds small crops, got "
                f"{type(self).__name__}; leave the option out"
            )
        embedding: Tensor = out[self.recipe.output]
        return embedding


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence)


if __name__ == "__main__":
    # Under its own name, so that what it defines can be pickled and is there only once.
    from mixmask.integrations import solo

    solo.main()
