"""MixMask as a kornia mix augmentation, like `RandomMixUpV2` and `RandomCutMixV2`.

kornia's labels carry the partner's share, records of this package the own share. `RandomMixMask`
is the only place that converts between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from kornia.augmentation import AugmentationSequential, MixAugmentationBaseV2
from kornia.augmentation.container.ops import (
    AugmentationSequentialOps,
    ClassSequentialOps,
    SequentialOpsInterface,
)
from kornia.augmentation.container.params import ParamItem
from kornia.constants import DataKey, DType
from torch import Tensor, nn

from mixmask._checks import Ratio, check_images
from mixmask.masks import cells_to_pixels
from mixmask.mixing import MixedBatch, MixMask, mix_batch

Params = dict[str, Tensor]


class RandomMixMask(MixAugmentationBaseV2):
    r"""Fill part of each image from another image of the batch, as kornia's augmentations do.

    Images (B, C, H, W) come out as `mixmask.mix_batch` makes them, labels (B,) as the rows
    (B, 3) of `RandomMixUpV2`: label, partner's label, and the partner's share $1 - \lambda$.
    Images that `p` does not choose stay as they are; their rows are (label, label, 0). Rows are
    float64 for float64 images, else float32.

    In an `AugmentationSequential` with labels, use `data_keys=["input", "class"]` and
    `take_labels(container)`: kornia's containers refuse labels to mix augmentations.

    Args:
        grid_size: Cells along a side; the paper's best are 2, 4, 8 at 32, 64, 224 pixels.
        ratio: Share of own pixels, or a range (low, high).
        pattern: "block" or "discrete".
        per_sample: One mask per sample instead of one for the batch.
        partner: "reverse" or "random"; see `mixmask.mix_batch`.
        roll: Shift block masks by a random offset, so that no place is favoured.
        same_on_batch: One draw for the whole batch, of the mask and of whether to mix at all;
            partners differ as ever. A container that sets it overrules `per_sample`.
        p: Probability of each image to be mixed; with `same_on_batch`, of the batch, which is
            what `RandomMixUpV2` and `RandomCutMixV2` mean by it.
        keepdim: As in kornia. It changes nothing here: a single image has no partner.
        data_keys: What is passed, of "input" (or "image") and "class" (or "label"). Default:
            ["input"].

    Raises:
        ValueError: If an option is out of range, at construction; if a batch has one image, or
            the labels or the `params` do not belong to it.
        TypeError: If an option has the wrong type.
        NotImplementedError: If masks, boxes or keypoints are passed.

    Source:
        MixMask, section 3.1 and eq. 1-3.

    Example:
        >>> mix = RandomMixMask(grid_size=4, data_keys=["input", "class"])
        >>> images, labels = mix(torch.rand(4, 3, 32, 32), torch.tensor([5, 6, 7, 8]))
        >>> labels.tolist()
        [[5.0, 8.0, 0.5], [6.0, 7.0, 0.5], [7.0, 6.0, 0.5], [8.0, 5.0, 0.5]]
    """

    def __init__(
        self,
        grid_size: int = 8,
        ratio: Ratio = 0.5,
        pattern: str = "block",
        *,
        per_sample: bool = False,
        partner: str = "reverse",
        roll: bool = False,
        same_on_batch: bool = False,
        p: float = 1.0,
        keepdim: bool = False,
        data_keys: Sequence[str | int | DataKey] | None = None,
    ) -> None:
        """Check and store the options."""
        options = MixMask(
            grid_size, ratio, pattern, per_sample=per_sample, partner=partner, roll=roll
        )
        if per_sample and same_on_batch:
            raise ValueError(
                "per_sample=True draws one mask per sample and same_on_batch=True one for all; "
                "set one of them"
            )
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie within [0, 1], got {p}; use for instance 1.0")
        keys = [DataKey.get(key) for key in data_keys or [DataKey.INPUT]]
        for key in keys:
            if key not in (DataKey.INPUT, DataKey.CLASS):
                _refuse(key.name.lower())
        super().__init__(
            p=p, p_batch=1.0, same_on_batch=same_on_batch, keepdim=keepdim, data_keys=[*keys]
        )
        self.grid_size = grid_size
        self.masks = options.masks
        self.per_sample = per_sample
        self.partner = partner
        # Only for kornia's __repr__.
        self.flags = {"masks": self.masks, "per_sample": per_sample, "partner": partner}

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        """Draw masks and partners for a batch, from torch's global generator, on the CPU.

        A seed gives the draws that it gives `mixmask.MixMask`.

        Args:
            batch_shape: (B, C, H, W).

        Returns:
            "cells", (g, g) or (B, g, g) bool, True for own pixels; "partner", (B,) int64.

        Example:
            >>> params = RandomMixMask(2).generate_parameters((6, 3, 32, 32))
            >>> params["cells"].shape, params["partner"].tolist()
            (torch.Size([2, 2]), [5, 4, 3, 2, 1, 0])
        """
        n = batch_shape[0]
        masks = self.masks(n) if self.per_sample and not self.same_on_batch else self.masks
        # One pixel per cell: the record of this mix holds the draw, as `MixMask` makes it.
        images = torch.zeros(n, 1, self.grid_size, self.grid_size, dtype=torch.uint8, device="cpu")
        drawn = mix_batch(images, masks, partner=self.partner)
        cells = drawn.mask
        assert cells is not None
        if 0 < self.p < 1 and not self.same_on_batch and cells.ndim == 2:
            # Some images of the batch may stay whole, so masks differ, whatever is drawn.
            cells = cells.repeat(n, 1, 1)
        return {"cells": cells, "partner": drawn.partner}

    def forward_parameters(self, batch_shape: Sequence[int]) -> Params:
        """Draw which images are mixed, then all that `generate_parameters` draws.

        kornia's own method asks, in older versions, only for as many draws as images were
        chosen; partners come from the whole batch.

        Args:
            batch_shape: (B, C, H, W).

        Returns:
            What `generate_parameters` returns, "batch_prob" (B,) and "forward_input_shape" (4,).
        """
        shape = torch.Size(batch_shape)
        chosen = self.__batch_prob_generator__(shape, self.p, self.p_batch, self.same_on_batch)
        params = self.generate_parameters(shape)
        size = torch.tensor(shape, device="cpu")
        return {**params, "batch_prob": chosen, "forward_input_shape": size}

    def transform_input(self, images: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """Mix a batch along given params, which hold who is left out as well.

        kornia's versions disagree on what `apply_transform` returns for a batch of which some
        images are left out; here it is the whole batch, done.
        """
        return self.apply_transform(self.transform_tensor(images), params, flags)

    def apply_transform(self, images: Tensor, params: Params, flags: Any = None) -> Tensor:  # noqa: ARG002
        """Mix (B, C, H, W) along given params; images left out come back as they were."""
        cells, partner = _gated(params)
        _check_length("images", images, partner)
        return mix_batch(images, cells, partner=partner).images

    def apply_transform_class(self, labels: Tensor, params: Params, flags: Any = None) -> Tensor:  # noqa: ARG002
        """Return the rows (B, 3) for labels (B,): label, partner's label, partner's share."""
        cells, partner = _gated(params)
        if labels.ndim != 1:
            raise ValueError(
                f"labels must be (B,), got {tuple(labels.shape)}; for one-hot labels, pass "
                "labels.argmax(dim=1)"
            )
        _check_length("labels", labels, partner)
        height, width = params["forward_input_shape"][-2:].tolist()
        share = 1 - _own_share(cells_to_pixels(cells.to(labels.device), height, width))
        # Halves would round labels above 2048 (bfloat16: 256).
        double = "dtype" in params and DType.get(params["dtype"]) is DType.FLOAT64
        columns = (labels, labels[partner.to(labels.device)], share.expand(len(labels)))
        dtype = torch.float64 if double else torch.float32
        return torch.stack([column.to(dtype) for column in columns], dim=1)

    def apply_non_transform_class(
        self, labels: Tensor, params: Params, flags: Any = None
    ) -> Tensor:
        """Return the same rows: those of images left out say so themselves."""
        return self.apply_transform_class(labels, params, flags)

    def mixed_batch(self, images: Tensor, params: Params | None = None) -> MixedBatch:
        """Return the record of a mix, with which `mixmask.lambda_weighted_loss` goes on.

        An image that was left out has itself as its partner, a λ of one and a mask all True.

        Args:
            images: (B, C, H, W), what this module returned for the params, or what the container
                did. Its mask no longer fits if something moved pixels after the mixing.
            params: Params of the mix. Default: those of this module's last call, which is an
                earlier one if a container with `random_apply` left the module out.

        Returns:
            A `MixedBatch`. Its `lam`, the share of own pixels, is () if all images share a mask
            and `p` is 0 or 1 or `same_on_batch` is set, otherwise (B,).

        Raises:
            ValueError: If nothing was mixed yet, or the images do not belong to the params.

        Example:
            >>> from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip
            >>> mix = RandomMixMask(grid_size=4)
            >>> views = AugmentationSequential(RandomHorizontalFlip(), mix)
            >>> mixed = mix.mixed_batch(views(torch.rand(6, 3, 32, 32)))
            >>> mixed.lam.item(), mixed.partner.tolist()
            (0.5, [5, 4, 3, 2, 1, 0])
        """
        params = self._params if params is None else params
        if not params:
            raise ValueError(
                "there are no params of a mix yet; call the augmentation first, or pass params"
            )
        check_images(images, partners=True)
        cells, partner = _gated(params)
        _check_length("images", images, partner)
        mask = cells_to_pixels(cells.to(images.device), *images.shape[-2:])
        return MixedBatch(images, _own_share(mask), partner.to(images.device), mask)

    def transform_mask(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse masks of segmentation."""
        _refuse("mask")

    def transform_boxes(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse boxes."""
        _refuse("bbox")

    def transform_keypoint(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse keypoints."""
        _refuse("keypoints")


class _MixedLabels(ClassSequentialOps):
    """Labels of a container's step: mixed by `RandomMixMask`, otherwise as kornia has it."""

    @classmethod
    def transform(
        cls,
        input: Tensor,  # noqa: A002
        module: nn.Module,
        param: ParamItem,
        extra_args: dict[str, Any] | None = None,
    ) -> Tensor:
        if not isinstance(module, RandomMixMask):
            labels: Tensor = super().transform(input, module, param, extra_args)
            return labels
        params = cls.get_instance_module_param(param)
        rows: Tensor = module(input, params=params, data_keys=[DataKey.CLASS])
        return rows


class _Operations(AugmentationSequentialOps):
    """A container's operations, with labels of mixes."""

    def _get_op(self, data_key: DataKey) -> type[SequentialOpsInterface[Any]]:
        operation: type[SequentialOpsInterface[Any]] = super()._get_op(data_key)
        return _MixedLabels if data_key == DataKey.CLASS else operation


def take_labels(container: AugmentationSequential) -> AugmentationSequential:
    """Let a container pass its labels to `RandomMixMask`.

    kornia's containers refuse labels as soon as they hold a mix augmentation. This changes the
    one container; kornia's classes and other containers stay as they are.

    Args:
        container: An `AugmentationSequential` with "class" (or "label") among its `data_keys`.

    Returns:
        The container itself.

    Raises:
        TypeError: If it is not an `AugmentationSequential`.

    Example:
        >>> mix = RandomMixMask(grid_size=2)
        >>> views = take_labels(AugmentationSequential(mix, data_keys=["input", "class"]))
        >>> images, labels = views(torch.rand(2, 3, 8, 8), torch.tensor([3, 4]))
        >>> labels.tolist()
        [[3.0, 4.0, 0.5], [4.0, 3.0, 0.5]]
    """
    if not isinstance(container, AugmentationSequential):
        raise TypeError(
            f"container must be an AugmentationSequential, got {type(container).__name__}; "
            "a RandomMixMask by itself takes labels without this call"
        )
    container.transform_op = _Operations(container.data_keys)
    return container


def _gated(params: Params) -> tuple[Tensor, Tensor]:
    """Return cells and partners in which the images left out keep all their pixels."""
    cells, partner = params["cells"], params["partner"].to(params["cells"].device)
    own = torch.arange(len(partner), device=partner.device)
    # All our draws are permutations. kornia's VideoSequential repeats params over frames, after
    # which they name the wrong images.
    if not partner.sort().values.equal(own):
        raise ValueError(
            f"the {len(partner)} partners in params must be a permutation of the batch, got "
            f"{partner.tolist()}; in a VideoSequential, set same_on_frame=False"
        )
    chosen = (params["batch_prob"] > 0.5).to(cells.device).expand(len(partner))
    partner = torch.where(chosen, partner, own)
    if cells.ndim == 2 and bool(chosen.any()) == bool(chosen.all()):
        return cells | ~chosen[0], partner
    return cells | ~chosen[:, None, None], partner


def _own_share(mask: Tensor) -> Tensor:
    """Measure λ as `mix_batch` does: () or (B,) float32."""
    return mask.mean(dim=(-2, -1), dtype=torch.float32)


def _check_length(name: str, values: Tensor, partner: Tensor) -> None:
    if len(values) != len(partner):
        raise ValueError(
            f"{name} must be those of the {len(partner)} images that the params were drawn for, "
            f"got {len(values)}; draw new params, or pass {name} of that batch"
        )


def _refuse(key: str) -> NoReturn:
    raise NotImplementedError(
        f"RandomMixMask takes 'input' and 'class', got {key!r}; pass it images and labels alone"
    )
