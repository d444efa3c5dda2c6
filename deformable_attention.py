"""Multi-scale deformable attention on small maps, as one matrix product: equal to transformers' and faster on a CPU.

Deformable attention (Zhu et al., *Deformable DETR*, 2021, equation 3) takes for each query a weighted sum of values
read bilinearly at a few points. Reading bilinearly is itself a weighted sum of four pixels, so the whole is A V with a
matrix A (queries, pixels) that is nearly empty. Where maps are small, filling A and one dense product cost less than
reading every channel at every point; where they are large, and on a GPU, the library's way is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.mask2former import modeling_mask2former as library

# Of all levels together: square images of s pixels a side have 21·s²/1024 of them, 336 for s = 128 and 1344 for 256.
# A grows with their square, the library's reading in proportion to them: measured, 336 are faster as A and 1344 slower;
# the limit is a round number between the two.
MOST_PIXELS = 800


def speed_up(model: nn.Module) -> None:
    """Let the pixel decoder of a Mask2Former attend by `deformable_attention` where that is the faster way."""
    for module in model.modules():
        if isinstance(module, library.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
            module.__class__ = _Attention


class _Attention(library.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """The library's module with its parameters; only the last step before the output projection is another."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        position_embeddings=None,
        reference_points=None,
        spatial_shapes_list=None,
        **options,
    ):
        pixels = encoder_hidden_states.shape[1]
        if encoder_hidden_states.device.type != "cpu" or pixels > MOST_PIXELS or reference_points.shape[-1] != 2:
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes_list,
                **options,
            )
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(attention_mask[..., None], 0.0)
        asking = self.with_pos_embed(hidden_states, position_embeddings)
        grid = (*asking.shape[:2], self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(asking).view(*grid, 2)
        weights = self.attention_weights(asking).view(*grid[:3], -1).softmax(-1).view(grid)
        offsets, points = _exact(offsets), _exact(reference_points)
        size = offsets.new_tensor([(width, height) for height, width in spatial_shapes_list])
        locations = points[:, :, None, :, None] + offsets / size[:, None]
        value = value.view(*value.shape[:2], self.n_heads, -1)
        return self.output_proj(deformable_attention(value, spatial_shapes_list, locations, weights)), weights


def deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """value (B, pixels, heads, channels), locations (B, Q, heads, levels, points, 2) as x, y in [0, 1], weights without
    the last axis -> (B, Q, heads · channels). The pixels of all levels follow one another, each level row by row.

    Values of 16 bits are read by places and shares of 32 (those that are given so), and the answer has 16 again."""
    batch, pixels, heads, channels = value.shape
    queries = locations.shape[1]
    places, shares = _corners(shapes, _exact(locations).transpose(1, 2))
    shares = shares * weights.transpose(1, 2)
    flat = (batch * heads, queries, -1)
    attention = shares.new_zeros(batch * heads, queries, pixels)
    for place, share in zip(places, shares):
        attention = attention.scatter_add_(2, place.reshape(flat), share.reshape(flat))
    read = attention.to(value.dtype) @ value.transpose(1, 2).reshape(batch * heads, pixels, channels)
    return read.view(batch, heads, queries, channels).transpose(1, 2).reshape(batch, queries, heads * channels)


def _exact(tensor: Tensor) -> Tensor:
    """In 32 bits at least: in the 16 of bfloat16 whole numbers above 256, as those of pixels are, are rounded."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _corners(shapes: list[tuple[int, int]], locations: Tensor) -> tuple[list[Tensor], Tensor]:
    """The four pixels around each of the locations (…, levels, points, 2), and their bilinear shares, each (4, …).

    Pixel centres lie at half-integers. A corner outside its map has share 0 (and the number of a pixel inside).
    """
    height, width = (locations.new_tensor(sides)[:, None] for sides in zip(*shapes))
    areas = [rows * columns for rows, columns in shapes]
    start = locations.new_tensor([sum(areas[:level]) for level in range(len(areas))])[:, None]
    columns, x_shares = _neighbours(locations[..., 0] * width - 0.5, width)
    rows, y_shares = _neighbours(locations[..., 1] * height - 0.5, height)
    places = [(row * width + (column + start)).long() for row in rows for column in columns]  # whole numbers below 2²⁴
    return places, torch.stack([y * x for y in y_shares for x in x_shares])


def _neighbours(position: Tensor, size: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Along one axis: the pixels below and above a position, and their shares."""
    low = position.detach().floor()
    share = position - low
    inside = ((low >= 0) & (low < size), (low >= -1) & (low < size - 1))
    zero, last = torch.zeros_like(size), size - 1
    whole = low.nan_to_num()  # of a model that diverged: its shares stay NaN, and so does the answer
    pixels = (whole.clamp(zero, last), (whole + 1).clamp(zero, last))
    return pixels, ((1 - share) * inside[0], share * inside[1])
