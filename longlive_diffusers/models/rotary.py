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

    grid = (*time_positions.shape, height, width, -1)
    time_angles = time_positions[..., None] * axis_frequencies(time_channels, theta, device)
    spatial_frequencies = axis_frequencies(spatial_channels, theta, device)
    row_angles = torch.arange(height, dtype=torch.float64, device=device)[:, None] * spatial_frequencies
    column_angles = torch.arange(width, dtype=torch.float64, device=device)[:, None] * spatial_frequencies

    angles = torch.cat(
        [
            time_angles[:, :, None, None, :].expand(grid),
            row_angles[None, None, :, None, :].expand(grid),
            column_angles[None, None, None, :, :].expand(grid),
        ],
        dim=-1,
    )
    angles = angles.flatten(1, 3).unsqueeze(2)  # [B or 1, tokens, 1, head_dim / 2]
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
