"""Three-dimensional rotary position embedding at any real-valued time position.

Wan splits the channels of a head over time, height and width: height and width take `2 * (head_dim // 6)` channels
each, time the rest, and within each group adjacent channels form the pairs that are rotated. Nothing here is read from
a table: a table has a last row, and a stream has no last frame. Angles are computed in float64 for the positions at
hand, because at position 100 000 a float32 angle is already wrong in its third digit.
"""

import torch


def axis_frequencies(channels: int, theta: float, device: torch.device | None = None) -> torch.Tensor:
    """Return the angular frequencies of one axis, float64 `[channels / 2]`."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return 1.0 / theta**exponents


def rotary_embedding(
    time_positions: torch.Tensor, height: int, width: int, head_dim: int, *, theta: float = 10000.0
) -> torch.Tensor:
    """Return the rotation of every token of the given frames.

    Args:
        time_positions: The position of each frame on the time axis, any real number, `[F]` or `[B, F]`.
        height, width: The number of tokens of a frame along each axis.
        head_dim: The number of channels of an attention head.
        theta: The base of the frequencies.

    Returns:
        The cosine and sine of each channel pair's angle, float32 `[B or 1, F * height * width, 1, head_dim / 2, 2]`,
        on the device of `time_positions`.
    """
    device = time_positions.device
    time_positions = torch.atleast_2d(time_positions).to(torch.float64)  # [B or 1, F]
    spatial_channels = 2 * (head_dim // 6)
    time_channels = head_dim - 2 * spatial_channels

    spatial_frequencies = axis_frequencies(spatial_channels, theta, device)
    rows, columns = (torch.arange(size, dtype=torch.float64, device=device) for size in (height, width))
    by_time = cos_and_sin(time_positions, axis_frequencies(time_channels, theta, device))
    by_row, by_column = cos_and_sin(rows, spatial_frequencies), cos_and_sin(columns, spatial_frequencies)

    grid = (*time_positions.shape, height, width, -1, -1)
    rotary = torch.cat(
        [
            by_time[:, :, None, None].expand(grid),
            by_row[None, None, :, None].expand(grid),
            by_column[None, None, None].expand(grid),
        ],
        dim=-2,
    )
    return rotary.flatten(1, 3).unsqueeze(2)


def cos_and_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Return the cosines and sines of the angles at `positions [...]`, float32 `[..., len(frequencies), 2]`. They are
    computed for each axis by itself: all tokens of a grid have few different ones."""
    angles = positions[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def apply_rotary(hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs of `hidden_states [B, tokens, heads, head_dim]`; computed in float32, dtype kept."""
    pairs = hidden_states.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it fuses real arithmetic into one kernel, and has none for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one kernel instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return rotated.flatten(-2).type_as(hidden_states)
