"""MixMask as a kornia mix augmentation, like `RandomMixUpV2` and `RandomCutMixV2`.

kornia's labels hold the partner's share, records of this package the own share; only
`RandomMixMask` converts between them.
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
from mixmask._devices import move
from mixmask.masks import cells_to_pixels
from mixmask.mixing import MixedBatch, MixMask, mix_batch

Params = dict[str, Tensor]


class RandomMixMask(MixAugmentationBaseV2):
    r"""Fill part of each image from another image of the batch, as kornia's augmentations do.

    Images (B, C, H, W) are mixed as by `mixmask.mix_batch`. Labels (B,) become rows (B, 3) as in
    `RandomMixUpV2`: label, partner's label, and the partner's share $1 - \lambda$, in float64 for
    float64 images, otherwise float32. Images not chosen by `p` stay as they are, with rows (label,
    label, 0). Params stay on the CPU; the device is not waited for.

    In an `AugmentationSequential` with labels, use `data_keys=["input", "class"]` and
    `take_labels(container)`: kornia's containers refuse labels to mix augmentations.

    Args:
        grid_size, ratio, pattern, per_sample, partner, roll: As for `mixmask.MixMask`.
        same_on_batch: Draw the mask, and whether to mix at all, once for the batch. A container
            that sets it overrides `per_sample`.
        p: Probability of each image to be mixed; with `same_on_batch`, of the batch.
        keepdim: Has no effect, because a single image has no partner.
        data_keys: The inputs, of "input" (or "image") and "class" (or "label"). Default:
            ["input"].

    Raises:
        ValueError: At construction, if an option is out of range; in a call, if the batch has
            one image, or the labels or `params` do not belong to it.
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
        self, grid_size: int = 8, ratio: Ratio = 0.5, pattern: str = "block", *,
        per_sample: bool = False, partner: str = "reverse", roll: bool = False,
        same_on_batch: bool = False, p: float = 1.0, keepdim: bool = False,
        data_keys: Sequence[str | int | DataKey] | None = None,
    ) -> None:  # fmt: skip
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
                _refuse(repr(key.name.lower()))
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
        """Draw masks and partners for a batch (B, C, H, W), from torch's global generator.

        A seed gives the draws that it gives `mixmask.MixMask`.

        Returns:
            "cells", (g, g) or (B, g, g) bool, True for own pixels; "partner", (B,) int64.
        """
        n = batch_shape[0]
        # A generator draws one mask for the batch, a tensor (B, g, g) holds one per sample.
        masks = self.masks(n) if self.per_sample and not self.same_on_batch else self.masks
        # One pixel per cell: the record of this mix holds the draw, as `MixMask` makes it.
        images = torch.zeros(n, 1, self.grid_size, self.grid_size, dtype=torch.uint8, device="cpu")
        drawn = mix_batch(images, masks, partner=self.partner)
        cells = drawn.mask
        assert cells is not None
        if 0 < self.p < 1 and not self.same_on_batch and cells.ndim == 2:
            # Some images of the batch may stay whole, so masks differ, whatever is drawn.
            cells = cells.repeat(n, 1, 1)  # (g, g) -> (B, g, g)
        return {"cells": cells, "partner": drawn.partner}

    def forward_parameters(self, batch_shape: Sequence[int]) -> Params:
        """Draw "batch_prob" (B,), which images are mixed, then what `generate_parameters` draws."""
        # kornia's own method asks, in older versions, only for as many draws as images were
        # chosen; partners come from the whole batch.
        shape = torch.Size(batch_shape)
        chosen = self.__batch_prob_generator__(shape, self.p, self.p_batch, self.same_on_batch)
        params = self.generate_parameters(shape)
        size = torch.tensor(shape, device="cpu")
        return {**params, "batch_prob": chosen, "forward_input_shape": size}

    # kornia's versions disagree on what `apply_transform` returns for a batch of which some
    # images are left out; here both methods return the whole batch, done.

    def transform_input(self, images: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """Mix a batch by given params, which also say which images are left out."""
        return self.apply_transform(self.transform_tensor(images), params, flags)

    def transform_class(self, labels: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """Return the rows of a batch; an image left out has the row (label, label, 0)."""
        return self.apply_transform_class(labels, params, flags)

    def apply_transform(self, images: Tensor, params: Params, flags: Any = None) -> Tensor:  # noqa: ARG002
        """Mix (B, C, H, W) by given params; images left out are returned unchanged."""
        cells, partner = _send("images", images, params)
        return mix_batch(images, cells, partner=partner).images

    def apply_transform_class(self, labels: Tensor, params: Params, flags: Any = None) -> Tensor:  # noqa: ARG002
        """Return the rows (B, 3) for labels (B,): label, partner's label, partner's share."""
        if labels.ndim != 1:
            raise ValueError(
                f"labels must be (B,), got {tuple(labels.shape)}; for one-hot labels, pass "
                "labels.argmax(dim=1)"
            )
        cells, partner = _send("labels", labels, params)
        height, width = params["forward_input_shape"][-2:].tolist()
        # On pixels, as `mix_batch` measures: where the grid does not divide them, cells differ.
        share = 1 - _own_share(cells_to_pixels(cells, height, width))  # () or (B,)
        # Halves would round labels above 2048 (bfloat16: 256).
        double = "dtype" in params and DType.get(params["dtype"]) is DType.FLOAT64
        columns = (labels, labels[partner], share.expand(len(labels)))  # (B,) each
        dtype = torch.float64 if double else torch.float32
        return torch.stack([column.to(dtype) for column in columns], dim=1)  # (B, 3)

    def mixed_batch(self, images: Tensor, params: Params | None = None) -> MixedBatch:
        """Return the record of a mix, for `mixmask.lambda_weighted_loss`.

        An image that was left out is its own partner, with a λ of one and a mask all True.

        Args:
            images: (B, C, H, W), what this module or its container returned for the params. The
                mask no longer fits if something moved pixels after the mixing.
            params: Params of the mix. Default: those of this module's last call.

        Returns:
            A `MixedBatch`, its `lam` () if all images share a mask and `p` is 0 or 1 or
            `same_on_batch` is set, otherwise (B,).

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
                "params must be those of a mix, got none yet; call the augmentation first, or pass "
                "params"
            )
        check_images(images, partners=True)
        cells, partner = _send("images", images, params)
        mask = cells_to_pixels(cells, *images.shape[-2:])
        return MixedBatch(images, _own_share(mask), partner, mask)

    def transform_mask(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse inputs other than images and labels."""
        _refuse("masks, boxes or keypoints")

    transform_boxes = transform_keypoint = transform_mask


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
        if isinstance(module, RandomMixMask):
            params = cls.get_instance_module_param(param)
            return module.transform_class(input, params, module.flags)
        labels: Tensor = super().transform(input, module, param, extra_args)
        return labels


class _Operations(AugmentationSequentialOps):
    def _get_op(self, data_key: DataKey) -> type[SequentialOpsInterface[Any]]:
        operation: type[SequentialOpsInterface[Any]] = super()._get_op(data_key)
        return _MixedLabels if data_key == DataKey.CLASS else operation


def take_labels(container: AugmentationSequential) -> AugmentationSequential:
    """Let a container pass its labels to `RandomMixMask`.

    kornia's containers refuse labels as soon as they hold a mix augmentation. This changes one
    container; kornia's classes and other containers stay as they are.

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


def _send(name: str, values: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Return gated cells and partners on the device of the values, (B, ...), they belong to."""
    cells, partner = _apply_gate(params)
    if len(values) != len(partner):
        raise ValueError(
            f"{name} must be those of the {len(partner)} images that the params were drawn for, "
            f"got {len(values)}; draw new params, or pass {name} of that batch"
        )
    if values.device.type != "cuda" or cells.device.type != "cpu":
        return move(cells, values.device), move(partner, values.device)
    # One copy for both, and pinned: the host would wait for pageable memory.
    packed = torch.cat([partner.view(torch.uint8), cells.flatten().view(torch.uint8)])
    packed = move(packed.pin_memory(), values.device)
    head, rest = packed[: partner.nbytes], packed[partner.nbytes :]
    return rest.view(torch.bool).view(cells.shape), head.view(partner.dtype)


def _apply_gate(params: Params) -> tuple[Tensor, Tensor]:
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
    chosen = (params["batch_prob"] > 0.5).to(cells.device).expand(len(partner))  # (B,)
    partner = torch.where(chosen, partner, own)  # (B,)
    # All or none were chosen: one mask still serves them all, and λ stays ().
    if cells.ndim == 2 and bool(chosen.any()) == bool(chosen.all()):
        return cells | ~chosen[0], partner
    return cells | ~chosen[:, None, None], partner  # (B, g, g)


def _own_share(mask: Tensor) -> Tensor:
    """Measure λ as `mix_batch` does: () or (B,) float32."""
    return mask.mean(dim=(-2, -1), dtype=torch.float32)


def _refuse(others: str) -> NoReturn:
    raise NotImplementedError(
        f"RandomMixMask takes 'input' and 'class', got {others}; pass it images and labels alone"
    )
