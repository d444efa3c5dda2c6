"""UNet++'s decoder while it trains: the same sums as segmentation-models-pytorch's, with less arithmetic.

Each block convolves its upsampled input joined with its skip connections. A convolution of joined channels is the sum
of the convolutions of the parts, so nothing has to be joined, and what comes from a frozen encoder needs no gradient.
And a 3 × 3 kernel over an image that was doubled by repeating pixels meets each pixel several times: four 2 × 2 kernels
over the small image, one for each place in a doubled pixel, give the same with 4 products in place of 9.
In eval mode the library's own way is taken, so that every module inside can be listened to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.unetplusplus.decoder import DecoderBlock, UnetPlusPlusDecoder
from torch import Tensor, nn


def speed_up(model: nn.Module) -> None:
    """Let a UNet++ of segmentation-models-pytorch decode as described, where its blocks are plain ones."""
    decoder = model.decoder
    if type(decoder) is UnetPlusPlusDecoder and all(map(_is_plain, decoder.blocks.values())):
        decoder.__class__ = _Decoder


def _is_plain(block: DecoderBlock) -> bool:
    """3 × 3 convolutions without bias or attention, after doubling by repeated pixels."""
    return (
        not block.is_empty
        and block.interpolation_mode == "nearest"
        and isinstance(block.attention1.attention, nn.Identity)
        and block.conv1[0].kernel_size == (3, 3)
        and block.conv1[0].bias is None
    )


class _Decoder(UnetPlusPlusDecoder):
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        if not self.training:
            return super().forward(features)
        features = features[:0:-1]  # coarsest first, without the one at full resolution
        made: dict[tuple[int, int], Tensor] = {}  # (first, last): the block x_first_last
        for span in range(self.depth):
            for first in range(self.depth - span):
                last = first + span
                below = features[first] if span == 0 else made[first, last - 1]
                skips = [made[between, last] for between in range(first + 1, last + 1)]
                made[first, last] = _block(self.blocks[f"x_{first}_{last}"], below, [*skips, features[last + 1]])
        return _block(self.blocks[f"x_0_{self.depth}"], made[0, self.depth - 1], [])


def _block(block: DecoderBlock, below: Tensor, skips: Sequence[Tensor]) -> Tensor:
    """Twice the input's sides: below (B, C, H, W), skips (B, …, 2H, 2W) in the order of the kernel's channels."""
    convolution, *rest = block.conv1
    kernels = convolution.weight.split([part.shape[1] for part in (below, *skips)], dim=1)
    total = doubled_convolution(below, kernels[0])
    for skip, kernel in zip(skips, kernels[1:]):
        total = total + F.conv2d(skip, kernel, padding=1)
    for layer in rest:
        total = layer(total)
    return block.attention2(block.conv2(total))


def doubled_convolution(image: Tensor, kernel: Tensor) -> Tensor:
    """`conv2d(interpolate(image, 2, 'nearest'), kernel, padding=1)`: (B, C, H, W), (K, C, 3, 3) -> (B, K, 2H, 2W).

    Along an axis, an even output pixel meets the small pixels before it and its own with the kernel's entries 0 and
    1 + 2, an odd one its own and the next with 0 + 1 and 2.
    """
    batch, _, height, width = image.shape
    kernels = [four for rows in _even_and_odd(kernel, 2) for four in _even_and_odd(rows, 3)]  # 4 of (K, C, 2, 2)
    answer = F.conv2d(F.pad(image, (1, 1, 1, 1)), torch.cat(kernels))
    answer = answer.view(batch, 2, 2, len(kernel), height + 1, width + 1)
    output = image.new_empty(batch, len(kernel), height, 2, width, 2)
    for odd_row in (0, 1):
        for odd_column in (0, 1):
            part = answer[:, odd_row, odd_column, :, odd_row : odd_row + height, odd_column : odd_column + width]
            output[:, :, :, odd_row, :, odd_column] = part
    return output.view(batch, len(kernel), 2 * height, 2 * width)


def _even_and_odd(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    before, own, after = kernel.unbind(axis)
    return torch.stack([before, own + after], axis), torch.stack([before + own, after], axis)
