"""Mixed batches: MixMask (paper, eq. 1-3), Un-Mix's mixtures, and erasing as in MSCN.

Every function returns the same `MixedBatch`, so one loss serves them all. `lam` is the share
of an image's own content everywhere in this package. What `mix_batch` says of a `generator`
holds for all of them, and for `mixmask.masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mixmask._checks import Ratio, check_choice, check_images, check_positive
from mixmask._devices import as_operator, is_transformed, make_generator, move
from mixmask._partners import Partner, choose_partners
from mixmask._seeds import draw_seed
from mixmask.masks import PATTERNS, MaskGenerator, fit_masks


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """What was mixed with what, and by how much; all that the loss needs to know.

    A loader may return it: it can be moved, pinned and pickled as a tensor can. Two records are
    equal only if they are the same object.

    Attributes:
        images: (N, C, H, W) mixed images, in the dtype and memory format of the originals.
        lam: () or (N,) float32, the share of each image's own content, measured on the mask.
        partner: (N,) int64, the index of the image that each one was mixed with.
        mask: (H, W) or (N, H, W) bool, True for own pixels; None for mixup, which has none, and
            (1, C, H, W) or (N, C, H, W) where `erase_batch` was given one per channel.
    """

    images: Tensor
    lam: Tensor
    partner: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.partner)

    def __repr__(self) -> str:
        images = f"{tuple(self.images.shape)} {self.images.dtype}".replace("torch.", "")
        if self.images.device.type != "cpu":
            images += f" {self.images.device}"
        mask = None if self.mask is None else tuple(self.mask.shape)
        return (
            f"MixedBatch(images={images}, lam={_describe_shares(self.lam)}, "
            f"partner={tuple(self.partner.shape)}, mask={mask})"
        )

    def to(self, *args: Any, **kwargs: Any) -> MixedBatch:
        """Return the record on another device, or its images in another dtype.

        Takes what `torch.Tensor.to` takes. A device moves everything; a dtype converts the images
        alone, so that `lam` keeps its precision.
        """
        images = self.images.to(*args, **kwargs)
        options = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        # λ in half precision would weigh the loss by another share than the mask's.
        return self._map(images, lambda tensor: tensor.to(images.device, **options))

    def pin_memory(self) -> MixedBatch:
        """Return the record in pinned memory, as `DataLoader(pin_memory=True)` asks."""
        return self._map(self.images.pin_memory(), Tensor.pin_memory)

    def _map(self, images: Tensor, move: Callable[[Tensor], Tensor]) -> MixedBatch:
        mask = None if self.mask is None else move(self.mask)
        return MixedBatch(images, move(self.lam), move(self.partner), mask)


def _describe_shares(lam: Tensor) -> str:
    # Meta tensors have no values to print, and an empty batch has no range.
    if lam.ndim == 0 or lam.numel() == 0 or lam.is_meta:
        return str(tuple(lam.shape)) if lam.is_meta or lam.ndim else f"{float(lam):.4g}"
    return f"{float(lam.min()):.4g}...{float(lam.max()):.4g}"


def mix_batch(
    images: Tensor,
    masks: MaskGenerator | Tensor,
    *,
    partner: Partner = "reverse",
    generator: torch.Generator | None = None,
) -> MixedBatch:
    r"""Fill the masked-out part of each image from its partner (MixMask, eq. 1 and 3).

    $m_i = M_i \odot x_i + (1 - M_i) \odot x_{\pi(i)}$ with $\lambda_i = mean(M_i)$. Pixels are
    chosen, never computed: NaN or infinite pixels stay where they are.

    Args:
        images: (N, C, H, W) with N of at least 2, floating or uint8, any memory format. One
            view: mix each of several on its own, and split those that lie in one tensor first.
        masks: A generator, of which one mask is drawn for the whole batch; or a bool tensor
            at cell or pixel size, (h, w) for a shared mask or (N, h, w) for one per sample.
        partner: "reverse" pairs i with N - 1 - i; in an odd batch the middle three form a ring, so
            that no image is its own partner (unlike with `torch.flip`: use `mixed.partner`).
            "random" draws a random ring through the whole batch. Or an index tensor (N,).
        generator: A CPU generator for the mask and the partners. Default: torch's global one,
            which `torch.compile(fullgraph=True)` needs: a generator breaks the graph, at no
            change of what is drawn.

    Returns:
        A `MixedBatch`, its `lam` () for a shared mask and (N,) for one per sample.

    Raises:
        ValueError: If a shape, an index or the generator does not fit.
        TypeError: If an argument has the wrong type or dtype.

    Source:
        MixMask, section 3.1 and eq. 1-3.

    Example:
        >>> from mixmask import BlockMaskGenerator
        >>> images = torch.rand(8, 3, 32, 32)
        >>> mixed = mix_batch(images, BlockMaskGenerator(grid_size=4))
        >>> mixed.images.shape, mixed.lam.item(), mixed.partner.tolist()
        (torch.Size([8, 3, 32, 32]), 0.5, [7, 6, 5, 4, 3, 2, 1, 0])
    """
    check_images(images, partners=True)
    index = choose_partners(partner, images.shape[0], images.device, generator)  # (N,)
    mask = fit_masks(masks, images, generator)  # (H, W) or (N, H, W)
    # Measured on the mask that is applied, which need not have the share that was asked for.
    lam = mask.mean(dim=(-2, -1), dtype=torch.float32)  # () or (N,)
    return MixedBatch(_fill(images, mask, index), lam, index, mask)


def mixup_batch(
    images: Tensor, *, alpha: float = 1.0, per_sample: bool = False,
    partner: Partner = "reverse", generator: torch.Generator | None = None,
) -> MixedBatch:  # fmt: skip
    r"""Blend each image with its partner: Un-Mix's global mixture, $\lambda x + (1-\lambda)x_\pi$.

    Args:
        images: (N, C, H, W) with N of at least 2, floating or uint8 (the blend is rounded).
        alpha: Parameter of the symmetric Beta distribution that the shares follow.
        per_sample: One share per sample instead of one for the batch.
        partner: See `mix_batch`.
        generator: A CPU generator. Default: torch's global one.

    Returns:
        A `MixedBatch` without a mask.

    Raises:
        ValueError: If a shape, an index, `alpha` or the generator does not fit.
        TypeError: If an argument has the wrong type or dtype.

    Source:
        Zhang et al., "mixup"; Shen et al., "Un-Mix", section 3.

    Example:
        >>> mixup_batch(torch.rand(8, 3, 32, 32), per_sample=True).lam.shape
        torch.Size([8])
    """
    check_images(images, partners=True)
    n = images.shape[0]
    index = choose_partners(partner, n, images.device, generator)
    lam = move(_draw_shares(n if per_sample else 1, alpha, generator), images.device)
    # A shared share is (), as that of a shared mask is.
    lam = lam if per_sample else lam[0]  # (N,) or ()
    # Bytes would wrap around.
    work = images if images.is_floating_point() else images.float()
    share = (rearrange(lam, "n -> n 1 1 1") if per_sample else lam).to(work.dtype)
    mixed = share * work + (1 - share) * work.index_select(0, index)  # (N, C, H, W)
    if not images.is_floating_point():
        mixed = mixed.round().to(images.dtype)
    return MixedBatch(mixed, lam, index)


def cutmix_batch(
    images: Tensor, *, alpha: float = 1.0, per_sample: bool = False,
    partner: Partner = "reverse", generator: torch.Generator | None = None,
) -> MixedBatch:  # fmt: skip
    """Paste a box of the partner into each image: Un-Mix's regional mixture.

    The box has the area (1 - share) of the image, a uniform centre and is clipped at the
    border; `lam` is measured after clipping.

    Takes and refuses what `mixup_batch` does; `per_sample` draws one box per sample.

    Returns:
        A `MixedBatch`; its mask, (H, W) or (N, H, W), is False inside the box.

    Source:
        Yun et al., "CutMix"; Shen et al., "Un-Mix", section 3.

    Example:
        >>> mixed = cutmix_batch(torch.rand(8, 3, 32, 32))
        >>> bool(mixed.lam == mixed.mask.float().mean())
        True
    """
    check_images(images, partners=True)
    n, _, height, width = images.shape
    index = choose_partners(partner, n, images.device, generator)
    count = n if per_sample else 1
    # CutMix draws the area; its root scales both sides, so a box has the image's proportions.
    side = (1 - _draw_shares(count, alpha, generator)).sqrt()  # (n,)
    centres = _draw_centres(draw_seed(generator), count)  # (2, n)
    # Sent as rows and columns: at pixel size they would be hundreds of times as many bytes.
    rows = move(_mark_outside(height, side, centres[0]), images.device)  # (n, H)
    columns = move(_mark_outside(width, side, centres[1]), images.device)  # (n, W)
    # A pixel is outside of the box where its row or its column is.
    mask = rearrange(rows, "n h -> n h 1") | rearrange(columns, "n w -> n 1 w")  # (n, H, W)
    return mix_batch(images, mask if per_sample else mask[0], partner=index)


def erase_batch(
    images: Tensor,
    masks: MaskGenerator | Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> MixedBatch:
    """Replace the masked-out part of each image by Gaussian noise, as MSCN does.

    Each image is its own partner, so both terms of the loss have the same target.

    Args:
        images: (N, C, H, W), floating; normalised images suit the default noise.
        masks: As for `mix_batch` (a spatial mask, the same in all channels), or a bool tensor with
            a mask per channel: (1, C, h, w) shared by the batch, or (N, C, h, w).
        mean: Mean of the noise, in the images' units.
        std: Standard deviation of the noise, in the images' units; 0 fills with `mean`.
        generator: A CPU generator. Default: torch's global one.

    Returns:
        A `MixedBatch` whose partners are the images themselves; `lam` is the share kept.

    Raises:
        ValueError: If a shape or the generator does not fit.
        TypeError: If an argument has the wrong type or dtype.

    Source:
        Jing et al., "Masked Siamese ConvNets", section 3; MixMask, section 3.1.

    Example:
        >>> from mixmask import BlockMaskGenerator
        >>> erase_batch(torch.rand(2, 3, 32, 32), BlockMaskGenerator(4)).partner.tolist()
        [0, 1]
    """
    check_images(images, partners=False)
    if not images.is_floating_point():
        raise TypeError(
            f"erase_batch needs floating images, got {images.dtype}; normalise them first, "
            "the noise is drawn in their units"
        )
    if not 0 <= std < float("inf"):
        raise ValueError(f"std must be at least 0, got {std}; 0 fills with the mean")
    mask = fit_masks(masks, images, generator, by_channel=True)
    noise = _draw_noise(draw_seed(generator), images).mul_(std).add_(mean)  # (N, C, H, W)
    by_channel = mask.ndim == 4
    # (H, W) -> (1, H, W), (N, H, W) -> (N, 1, H, W)
    kept = mask if by_channel else rearrange(mask, "... h w -> ... 1 h w")
    # Over channels too where they differ: the loss has one share per image.
    lam = mask.mean(dim=(-3, -2, -1) if by_channel else (-2, -1), dtype=torch.float32)
    # A shared mask has a shared share: () rather than (1,).
    if by_channel and mask.shape[0] == 1:
        lam = lam[0]
    index = torch.arange(images.shape[0], device=images.device)  # (N,)
    return MixedBatch(torch.where(kept, images, noise), lam, index, mask)


class MixMask(nn.Module):
    """A mask generator and `mix_batch` as one module, for loops built from a config file.

    Args:
        grid_size: Cells along a side; the paper's best are 2, 4, 8 at 32, 64, 224 pixels.
        ratio: Share of own pixels, or a range (low, high).
        pattern: "block" or "discrete".
        per_sample: One mask per sample instead of one for the batch.
        partner: "reverse" or "random".
        roll: Shift block masks by a random offset, so that no place is favoured.

    Raises:
        ValueError: If an option is out of range, at construction.

    Example:
        >>> mix = MixMask(grid_size=4, per_sample=True)
        >>> mix(torch.rand(8, 3, 32, 32)).lam.shape
        torch.Size([8])
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
    ) -> None:
        super().__init__()
        check_choice("pattern", pattern, tuple(PATTERNS))
        check_choice("partner", partner, ("reverse", "random"))
        if roll and pattern != "block":
            raise ValueError(
                f"roll=True needs pattern='block', got {pattern!r}; leave it out, for discrete "
                "masks keep every place equally often anyway"
            )
        options = {"roll": True} if roll else {}
        self.masks: MaskGenerator = PATTERNS[pattern](grid_size, ratio, **options)
        self.per_sample = per_sample
        self.partner = partner

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> MixedBatch:
        """Mix a batch (N, C, H, W); see `mix_batch`."""
        masks = self.masks_for(images, generator=generator)
        return mix_batch(images, masks, partner=self.partner, generator=generator)

    def masks_for(
        self, images: Tensor, *, generator: torch.Generator | None = None
    ) -> MaskGenerator | Tensor:
        """Return what `mix_batch` takes as masks: the generator, or (N, g, g) drawn per sample."""
        check_images(images, partners=False)
        if not self.per_sample:
            return self.masks
        return self.masks(images.shape[0], device=images.device, generator=generator)

    def extra_repr(self) -> str:
        """Show the options in the printed module."""
        return f"{self.masks}, per_sample={self.per_sample}, partner={self.partner!r}"


# By the size of an element: choosing by bits takes no account of what they mean.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fill(images: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """Take pixels from the images where the mask is True, and from their partners elsewhere."""
    kept = rearrange(mask, "... h w -> ... 1 h w")  # (1, H, W) or (N, 1, H, W)
    plain = images.is_cpu and not (
        images.requires_grad
        or torch.compiler.is_compiling()
        or images.is_complex()
        or is_transformed()
    )
    if not plain:
        return torch.where(kept, images, images.index_select(0, index))
    # Eager torch.where on a CPU is not vectorised for a bool condition. Choosing by bits,
    # ((partner ^ own) & ~mask) ^ own, is, and it is exact for every dtype and for NaN. In place,
    # for the partners are a copy already: no memory beside the result is written.
    bits = _BITS[images.element_size()]
    partners = torch.index_select(images, 0, index, out=torch.empty_like(images))
    own, mixed = images.view(bits), partners.view(bits)
    mixed.bitwise_xor_(own).bitwise_and_(kept.to(bits) - 1).bitwise_xor_(own)
    return partners


def _draw_shares(n: int, alpha: float, generator: torch.Generator | None) -> Tensor:
    """Draw n shares from Beta(alpha, alpha) on the host."""
    check_positive("alpha", alpha)
    return _draw_beta(draw_seed(generator), n, float(alpha))


def _make_floats(seed: Tensor, *shape: int) -> Tensor:
    return seed.new_empty(shape, dtype=torch.float32)


@as_operator(
    "(Tensor seed, SymInt n, float alpha) -> Tensor", lambda seed, n, _: _make_floats(seed, n)
)
def _draw_beta(seed: Tensor, n: int, alpha: float) -> Tensor:
    # x / (x + y) of two gamma variables is a beta variable; torch's Beta takes no generator.
    parameters = torch.full((2, n), alpha, dtype=torch.float64, device="cpu")
    gamma = torch._standard_gamma(parameters, generator=make_generator(seed))  # (2, n)
    # The tiny summand keeps a very small alpha from dividing zero by zero.
    tiny = torch.finfo(gamma.dtype).tiny
    return ((gamma[0] + tiny) / (gamma.sum(dim=0) + 2 * tiny)).float()


@as_operator("(Tensor seed, SymInt n) -> Tensor", lambda seed, n: _make_floats(seed, 2, n))
def _draw_centres(seed: Tensor, n: int) -> Tensor:
    return torch.rand(2, n, generator=make_generator(seed), dtype=torch.float32, device="cpu")


def _mark_outside(length: int, side: Tensor, centre: Tensor) -> Tensor:
    """Mark the pixels of an axis outside CutMix's box: (n, length) bool."""
    # Clipped at the border: λ is measured, and is not the share that was drawn.
    half = (length * side).long() // 2  # (n,)
    middle = (length * centre).long()
    pixel = torch.arange(length, device="cpu")
    low, high = (middle - half).clamp(0, length), (middle + half).clamp(0, length)
    return (pixel < low[:, None]) | (pixel >= high[:, None])


@as_operator("(Tensor seed, Tensor images) -> Tensor", lambda _, images: torch.empty_like(images))
def _draw_noise(seed: Tensor, images: Tensor) -> Tensor:
    """Draw standard Gaussian noise where the images are, from a seed that was drawn on the host."""
    return torch.empty_like(images).normal_(generator=make_generator(seed, images.device))
