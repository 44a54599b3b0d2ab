"""The buffer of past errors."""

import numpy as np
import pytest
import torch

from objectives.error_recycling import ErrorBuffer


def filled(bucket_size: int = 2) -> ErrorBuffer:
    buffer = ErrorBuffer(num_buckets=10, bucket_size=bucket_size)
    for value, timestep in ((1.0, 50.0), (2.0, 60.0), (3.0, 70.0), (4.0, 1000.0)):
        buffer.add("latent", timestep, torch.full((1, 2, 1, 1), value))
    return buffer


def drawn(buffer: ErrorBuffer, timestep: float | None) -> set[float]:
    rng = np.random.default_rng(0)
    return {buffer.draw("latent", rng, timestep)[0, 0, 0, 0].item() for _ in range(60)}


def test_errors_are_drawn_from_the_class_of_their_time():
    assert drawn(filled(3), 99.0) == {1.0, 2.0, 3.0}
    assert drawn(filled(3), 950.0) == {4.0}
    assert drawn(filled(3), None) == {1.0, 2.0, 3.0, 4.0}


def test_a_full_class_forgets_its_oldest():
    assert drawn(filled(2), 0.0) == {2.0, 3.0}
    assert len(filled(2)) == 3


def test_an_empty_class_has_nothing_to_draw():
    assert filled().draw("latent", np.random.default_rng(0), 500.0) is None
    assert filled().draw("noise", np.random.default_rng(0)) is None


def test_what_is_kept_is_a_copy():
    buffer, error = ErrorBuffer(1, 1), torch.zeros(1, 2, 1, 1)
    buffer.add("noise", 0.0, error)
    error += 1
    assert not buffer.draw("noise", np.random.default_rng(0)).any()


def test_a_state_goes_on_as_the_buffer_would(tmp_path):
    buffer = filled()
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    other = ErrorBuffer(10, 2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (buffer, other):
        each.add("latent", 55.0, torch.full((1, 2, 1, 1), 9.0))
    assert drawn(buffer, 0.0) == drawn(other, 0.0) == {9.0, 3.0}


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match="10 buckets of up to 2, this one 5 of 2"):
        ErrorBuffer(5, 2).load_state_dict(filled().state_dict())
    with pytest.raises(ValueError, match="at least 1, got 0 of 3"):
        ErrorBuffer(0, 3)
