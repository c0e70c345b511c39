"""Random views of a batch on its device: kornia's distributions in few passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixmask._devices import move

# Mean and deviation of each channel, by which images are normalised.
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
# Those of ImageNet are the usual ones whatever the photographs.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IMAGENET: Normalization = (MEAN, STD)

# Probability of colour jitter and deviations of the blur (SimCLR, MoCo v2).
_JITTERED = 0.8
_SIGMA = (0.1, 2.0)
# Crops are torchvision's: the first of this many tries that lies inside the image.
_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)
# More channels than this beside a side of fewer pixels: the axes are in another order.
_FEW = 13
# Luma of RGB, by which grey views, contrast and saturation go.
_LUMA = (0.299, 0.587, 0.114)


def check_pixels(images: Tensor, name: str = "images") -> None:
    """Require images (N, C, H, W), uint8 or float within [0, 1].

    The range of floats is looked at, which on a GPU waits for it; uint8 needs no look.

    Raises:
        TypeError: If they are not a tensor, or have another dtype.
        ValueError: If they have another shape or range.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} must be a tensor (N, C, H, W), got {type(images).__name__}; use torch.stack "
            "for a list of tensors, torch.from_numpy for an array"
        )
    if images.ndim != 4 or min(images.shape[2:]) <= _FEW < images.shape[1]:
        fixes = {
            3: "add the batch's axis with images[None]",
            4: "bring channels to their place, for instance with images.permute(0, 3, 1, 2)",
        }
        raise ValueError(
            f"{name} must be (N, C, H, W), got {tuple(images.shape)}; "
            f"{fixes.get(images.ndim, 'pass a batch of images')}"
        )
    if 0 in images.shape[1:]:
        raise ValueError(
            f"{name} must have pixels, got the shape {tuple(images.shape)}; leave empty images out"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be uint8 or float within 0 ... 1, got {images.dtype}; divide them by "
            "their format's largest value, 65535 for 16 bits, or convert 0 ... 255 with .byte()"
        )
    low, high = (bound.item() for bound in images.aminmax()) if images.numel() else (0, 0)
    if not (low >= 0 and high <= 1):  # NaN is neither.
        raise ValueError(
            f"floats of {name} must lie within 0 ... 1, got {low:.4g} ... {high:.4g}; divide them "
            "by their format's largest value, 255 for 8 bits, and leave normalisation to the views"
        )


def normalize(images: Tensor, normalization: Normalization = IMAGENET) -> Tensor:
    """Bring images (N, C, H, W) to float32 with about zero mean and unit deviation.

    Args:
        images: uint8 or float within [0, 1]; see `check_pixels` for what is refused.
        normalization: Mean and deviation of each channel, for pixels from 0 to 1; see
            `fit_channels`.

    Example:
        >>> normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).mean().item() < 0
        True
    """
    check_pixels(images)
    mean, std = _statistics(images, normalization)
    x = images.float()
    return ((x if images.is_floating_point() else x / 255) - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """Undo `normalize`, up to clamping: float (N, C, H, W) within [0, 1]."""
    mean, std = _statistics(images, IMAGENET)
    return (images.float() * std + mean).clamp(0, 1)


def fit_channels(normalization: Normalization, channels: int) -> Normalization:
    """Return a normalisation for as many channels, all by their mean where it has others.

    Example:
        >>> fit_channels(((0.25, 0.75), (0.5, 0.5)), 3)
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    mean, std = (
        values if len(values) == channels else (fmean(values),) * channels
        for values in normalization
    )
    return mean, std


def _statistics(images: Tensor, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, (C, 1, 1), on the images' device."""
    values = _tensor(fit_channels(normalization, images.shape[1]))  # (2, C)
    mean, std = move(values[:, :, None, None], images.device)  # (C, 1, 1) each
    return mean, std


def _tensor(values: Sequence[object]) -> Tensor:
    """Return numbers as they are drawn, whatever torch's default device and dtype are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of a batch of views; on the CPU, so that drawing does not wait for the device.

    Attributes:
        boxes: (N, 4) float32, left, top, width and height of each crop in pixels.
        flipped: (N,) bool.
        factors: (4, N) float32, brightness, contrast, saturation, and hue in turns of the circle;
            1, 1, 1 and 0 where a view is not jittered.
        order: The order in which the four are applied.
        grey: (N,) bool.
        sigma: (N,) float32, deviation of the blur in pixels; 0 where there is none.
    """

    boxes: Tensor
    flipped: Tensor
    factors: Tensor
    order: tuple[int, ...]
    grey: Tensor
    sigma: Tensor


class RandomView(nn.Module):
    """One random view of each image: crop, flip, colour jitter, grey, blur, normalisation.

    The distributions are those of kornia's `RandomResizedCrop` (by resampling),
    `RandomHorizontalFlip`, `ColorJitter` with one random order per batch, `RandomGrayscale` and
    `RandomGaussianBlur`; with the same parameters the views are the same. All draws are
    made on the host: a seed gives the same parameters on every device. For two views of a
    batch, pass it twice in a row and split the result, which is cheaper than two calls.

    Images without three channels (greyscale, several bands) keep brightness, contrast and blur;
    saturation, hue and grey views have no meaning there and are left out.

    Args:
        size: Height and width of the views, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        jitter: Strength of the jitter in brightness, contrast and saturation.
        hue: Strength of the jitter in hue, at most 0.5.
        grey: Probability of a grey view.
        blur: Probability of a Gaussian blur with a deviation of 0.1 to 2 pixels.
        crop: Whether to crop; without, images are crops already, (N, C, size, size).
        normalization: See `normalize`.

    Source:
        Chen et al., "MoCo v2", section 3, after SimCLR.

    Example:
        >>> view = RandomView(32)
        >>> view(torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        size: int,
        *,
        min_scale: float = 0.2,
        jitter: float = 0.4,
        hue: float = 0.1,
        grey: float = 0.2,
        blur: float = 0.0,
        crop: bool = True,
        normalization: Normalization = IMAGENET,
    ) -> None:
        super().__init__()
        self.size, self.min_scale, self.crop = size, min_scale, crop
        self.normalization = normalization
        self.jitter, self.hue, self.grey, self.blur = jitter, hue, grey, blur
        # SimCLR's kernel spans a tenth of the image; it has to be odd.
        self.kernel = max(3, size // 10 // 2 * 2 + 1)

    def draw(
        self, n: int, height: int, width: int, *, generator: torch.Generator | None = None
    ) -> ViewParameters:
        """Draw the parameters of n views of images (C, height, width), by a CPU generator."""

        def uniform(*shape: int) -> Tensor:
            return _uniform(shape, generator)

        whole = _tensor([0, 0, width, height]).expand(n, 4)  # (n, 4)
        boxes = whole
        if self.crop:
            boxes = random_boxes(n, height, width, self.min_scale, generator=generator)
        strengths = _tensor([self.jitter, self.jitter, self.jitter, self.hue])[:, None]  # (4, 1)
        middle = _tensor([1, 1, 1, 0])[:, None]  # (4, 1)
        low = (middle - strengths).clamp_min(0)
        low[3] = -self.hue
        factors = low + uniform(4, n) * (middle + strengths - low)  # (4, n)
        jittered = uniform(n) < _JITTERED
        low_sigma, high_sigma = _SIGMA
        sigma = low_sigma + uniform(n) * (high_sigma - low_sigma)
        return ViewParameters(
            boxes,
            uniform(n) < 0.5,
            torch.where(jittered, factors, middle),
            tuple(torch.randperm(4, generator=generator, device="cpu").tolist()),
            uniform(n) < self.grey,
            torch.where(uniform(n) < self.blur, sigma, 0.0),
        )

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        parameters: ViewParameters | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return a view of each image: (N, C, size, size) float32, channels last.

        Args:
            images: (N, C, H, W), uint8 or float within [0, 1]; `check_pixels` refuses others.
            parameters: What `draw` returned, to make the same views again. Default: new ones.
            generator: A CPU generator for the draws. Default: torch's global one.
        """
        check_pixels(images)
        drawn = parameters or self.draw(len(images), *images.shape[-2:], generator=generator)
        x = images.float() if images.is_floating_point() else images.float().mul_(1 / 255)
        x = self._jitter(self._crop(x, drawn), drawn)
        if self.grey > 0 and images.shape[1] == 3:
            grey = move(drawn.grey, x.device)[:, None, None, None]  # (N, 1, 1, 1)
            x = torch.where(grey, luma(x), x)
        if self.blur > 0:
            x = self._blur(x, drawn)
        mean, std = _statistics(x, self.normalization)
        x = (x - mean).div_(std)
        return x.contiguous(memory_format=torch.channels_last)

    def _crop(self, x: Tensor, drawn: ViewParameters) -> Tensor:
        """Crop, resize and flip in one resampling, or only flip: (N, C, S, S)."""
        if not self.crop:
            return torch.where(move(drawn.flipped, x.device)[:, None, None, None], x.flip(3), x)
        height, width = x.shape[-2:]
        left, top, w, h = drawn.boxes.unbind(1)  # (N,) each
        # A view's corners show the box's: from -1 ... 1 within the view to that of the image.
        across = (1 - 2 * drawn.flipped.float()) * (w - 1) / (width - 1)
        down = (h - 1) / (height - 1)
        centre_x = (2 * left + w - 1) / (width - 1) - 1
        centre_y = (2 * top + h - 1) / (height - 1) - 1
        zero = torch.zeros_like(down)
        theta = torch.stack([across, zero, centre_x, zero, down, centre_y], dim=1)  # (N, 6)
        theta = move(theta, x.device).view(-1, 2, 3)  # (N, 2, 3)
        shape = [*x.shape[:2], self.size, self.size]
        grid = F.affine_grid(theta, shape, align_corners=True)  # (N, S, S, 2)
        return F.grid_sample(x, grid, mode="bilinear", align_corners=True)  # (N, C, S, S)

    def _jitter(self, x: Tensor, drawn: ViewParameters) -> Tensor:
        factors = move(drawn.factors, x.device)[:, :, None, None, None]  # (4, N, 1, 1, 1)
        adjust = adjust_brightness, adjust_contrast, adjust_saturation, shift_hue
        # Saturation and hue have a meaning in RGB alone.
        jitter, rgb = self.jitter > 0, x.shape[1] == 3
        applied = jitter, jitter, jitter and rgb, self.hue > 0 and rgb
        for number in drawn.order:
            if applied[number]:
                x = adjust[number](x, factors[number])  # (N, C, S, S), factors (N, 1, 1, 1)
        return x

    def _blur(self, x: Tensor, drawn: ViewParameters) -> Tensor:
        """Blur the chosen views, first along rows and then along columns."""
        index = drawn.sigma.nonzero()[:, 0]  # (n,)
        if len(index) == 0:
            return x
        place = torch.arange(self.kernel, device="cpu") - self.kernel // 2
        weights = (-(place**2) / (2 * drawn.sigma[index, None] ** 2)).exp()  # (n, kernel)
        weights = move(weights / weights.sum(dim=1, keepdim=True), x.device)
        weights = weights.repeat_interleave(x.shape[1], dim=0)  # (n * C, kernel)
        index = move(index, x.device)
        # One group per channel of each view, so that all views take one convolution.
        rows = rearrange(x[index], "n c h w -> 1 (n c) h w")  # (1, n * C, S, S)
        half = self.kernel // 2  # P = S + 2 * half pixels, padded.
        rows = F.pad(rows, (half, half, half, half), mode="reflect")  # (1, n * C, P, P)
        rows = F.conv2d(rows, weights[:, None, None, :], groups=len(weights))  # (1, n * C, P, S)
        rows = F.conv2d(rows, weights[:, None, :, None], groups=len(weights))  # (1, n * C, S, S)
        return x.index_copy(0, index, rearrange(rows, "1 (n c) h w -> n c h w", n=len(index)))


def random_boxes(
    n: int,
    height: int,
    width: int,
    min_scale: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw crops as torchvision's `RandomResizedCrop` does, without a loop over images.

    Args:
        n: Number of crops.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        min_scale: Smallest share of the image's area; the largest is 1.
        generator: A CPU generator. Default: torch's global one.

    Returns:
        (n, 4) float32 of whole numbers: left, top, width, height.

    Example:
        >>> random_boxes(3, 48, 64, min_scale=0.2).shape
        torch.Size([3, 4])
    """
    shape = n, _TRIES
    area = (min_scale + _uniform(shape, generator) * (1 - min_scale)) * height * width
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    aspect = (low + _uniform(shape, generator) * (high - low)).exp()  # (n, tries)
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)  # (n, tries)
    first = fits.int().argmax(dim=1, keepdim=True)  # (n, 1)
    # Where none fits, the largest central part with an allowed aspect ratio.
    full_w = min(width, round(height * _ASPECTS[1]))
    full_h = min(height, round(width / _ASPECTS[0]))
    none = ~fits.any(dim=1)  # (n,)
    w = torch.where(none, float(full_w), w.gather(1, first)[:, 0])  # (n,)
    h = torch.where(none, float(full_h), h.gather(1, first)[:, 0])
    place = _uniform((2, n), generator)  # (2, n)
    left = torch.where(none, (width - w).div(2).floor(), (place[0] * (width - w + 1)).floor())
    top = torch.where(none, (height - h).div(2).floor(), (place[1] * (height - h + 1)).floor())
    return torch.stack([left, top, w, h], dim=1)  # (n, 4)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def luma(x: Tensor) -> Tensor:
    """Return the grey of RGB images (N, C, H, W), or the mean of other channels: (N, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    r, g, b = _LUMA
    return (r * x[:, 0] + g * x[:, 1] + b * x[:, 2])[:, None]  # (N, H, W) -> (N, 1, H, W)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale (N, C, H, W) within [0, 1] by factors (N, 1, 1, 1)."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each image's mean grey; shapes as in `adjust_brightness`."""
    mean = luma(x).mean(dim=(-2, -1), keepdim=True)  # (N, 1, 1, 1)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each pixel's grey; shapes as in `adjust_brightness`."""
    return (x * factor).add_(luma(x) * (1 - factor)).clamp_(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images (N, 3, H, W) within [0, 1] by shares of the circle (N, 1, 1, 1).

    As through HSV, without building it: a channel is the value less the chroma times
    clamp(min(k, 4 - k), 0, 1), with k = (offset + 6 hue) mod 6 and offsets 5, 3, 1 for R, G, B.
    """
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]  # (N, 1, H, W) each
    value = x.amax(dim=1, keepdim=True)  # (N, 1, H, W)
    chroma = value - x.amin(dim=1, keepdim=True)
    # Where there is no chroma any hue will do.
    divisor = torch.where(chroma == 0, 1.0, chroma)
    from_green = torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    sixths = torch.where(value == r, (g - b) / divisor, from_green)
    offsets = move(_tensor([5, 3, 1]), x.device).view(3, 1, 1)
    k = (sixths + 6 * turns + offsets).remainder_(6)  # (N, 3, H, W)
    away = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value - away.mul_(chroma)
