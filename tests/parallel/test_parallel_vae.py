"""A VAE that is split over ranks gives what one process gives. The ranks are started once, and
`programs/parallel_vae.py`, which they run, writes for each case what every rank found."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from longlive_diffusers.models.streaming_vae import StreamingDecoder, StreamingEncoder
from longlive_diffusers.parallel.columns import HEIGHT, WIDTH, ColumnSplit
from longlive_diffusers.parallel.halo import HaloExchange
from tests.programs import parallel_vae
from tests.programs.parallel_vae import OPERATORS, TILES, WHOLE, Case, all_cases
from tests.support.processes import run_program
from tests.support.tiny_vae import tiny_vae


CASES = all_cases()
EXACT = [name for name, (case, _) in CASES.items() if case in WHOLE.values() or case in TILES.values()]
SHARED = [name for name in CASES if name not in EXACT]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """For each case, what each of its ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_program(parallel_vae, folder)
    return json.loads((folder / "results.json").read_text())


def error_of(ranks: list[dict], expected_ranks: int) -> float:
    assert len(ranks) == expected_ranks
    return max(rank["error"] for rank in ranks)


# -- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_every_rank_gets_what_one_process_makes(found, name):
    case, _ = CASES[name]
    half_a_step = 2**-8  # of bfloat16 just below 1
    assert error_of(found[name], case.ranks) <= (half_a_step if case.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_what_cannot_be_shared_is_done_by_every_rank_to_the_bit(found, name):
    case, _ = CASES[name]
    assert error_of(found[name], case.ranks) == 0
    assert [rank["bytes"] for rank in found[name]] == [1] * case.ranks


def parts(case: Case) -> list[int]:
    """The number of columns, or rows, of each rank."""
    height, width = case.size
    total = width if width >= case.ranks else height
    return [len(range(rank, total, case.ranks)) for rank in range(case.ranks)]


@pytest.mark.parametrize("name", SHARED)
def test_a_rank_keeps_the_features_of_its_own_columns_only(found, name):
    case, _ = CASES[name]
    own = parts(case)
    assert [rank["bytes"] for rank in found[name]] == pytest.approx([part / sum(own) for part in own])


@pytest.mark.parametrize(
    "name, calls", [("thread", 3), ("turns", 5), ("chunk decoder", 1), ("encode_video", 3), ("odd pixels", 1)]
)
def test_two_ranks_share_the_work_of(found, name, calls):
    """Each call takes its part of the picture once."""
    assert error_of(found[name], 2) <= 1e-5
    assert [rank["times shared"] for rank in found[name]] == [calls, calls]


def test_a_process_outside_the_group_is_told_so(found):
    message = "This process is not in the group of ranks that it is to share its work with."
    assert found["outsider"] == [{"message": message}] * 2


# -- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("axis", ["width", "height"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_operator_of_the_parts_is_that_of_the_whole(found, operator, axis, ranks):
    assert error_of(found[f"{axis}, {ranks} ranks: {operator}"], ranks) <= 1e-5


PICTURES = torch.zeros(1, 4, 6, 6)  # twice the resolution of 3 latent columns
KERNEL, KERNEL_4X4 = torch.zeros(4, 4, 3, 3), torch.zeros(4, 4, 4, 4)
MASK = torch.ones(6, 6, dtype=torch.bool)

# What is done to pictures that are split along an axis, and what the message says.
REFUSED: dict[str, tuple[Callable[[torch.Tensor, int], object], str]] = {
    "reflected padding": (lambda x, axis: F.pad(x, (1, 1, 1, 1), mode="reflect"), "Only zeros are padded"),
    "padding with ones": (lambda x, axis: F.pad(x, (1, 1, 1, 1), value=1.0), "Only zeros are padded"),
    "cropping by padding": (lambda x, axis: F.pad(x, (-1, -1, -1, -1)), "Only zeros are padded"),
    "padding of more than a neighbor has": (lambda x, axis: F.pad(x, (5, 5, 5, 5)), "padding of 5 and 5 columns"),
    "no padding": (lambda x, axis: F.conv2d(x, KERNEL), "reaches over 2 more columns, of a picture with 0"),
    "padding by name": (lambda x, axis: F.conv2d(x, KERNEL, padding="same"), "padding='same'"),
    "a stride that does not divide the parts": (
        lambda x, axis: F.conv2d(x, KERNEL_4X4, stride=4),
        r"stride of 4 over parts that are \[6, 4\]",
    ),
    "transposed convolution": (lambda x, axis: F.conv_transpose2d(x, KERNEL), "conv_transpose2d"),
    "bilinear interpolation": (lambda x, axis: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "mode='bilinear'"),
    "interpolation by one and a half": (lambda x, axis: F.interpolate(x, scale_factor=1.5), "scale_factor=1.5"),
    "interpolation to less": (lambda x, axis: F.interpolate(x, scale_factor=0.5), "scale_factor=0.5"),
    "interpolation to a size": (lambda x, axis: F.interpolate(x, size=(8, 8)), r"size=\(8, 8\)"),
    "pooling": (lambda x, axis: F.max_pool2d(x, 2), "max_pool2d"),
    "norm over the picture": (lambda x, axis: F.group_norm(x, 2), "group_norm"),
    "causal attention": (lambda x, axis: F.scaled_dot_product_attention(x, x, x, is_causal=True), "causal"),
    "masked attention": (lambda x, axis: F.scaled_dot_product_attention(x, x, x, attn_mask=MASK), "mask"),
    "attention with dropout": (lambda x, axis: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "dropout"),
    "joining": (lambda x, axis: torch.cat([x, x], dim=axis), "cat along dimension"),
    "parting": (lambda x, axis: x.split(3, dim=axis), "split along dimension"),
    "mean over columns": (lambda x, axis: x.mean(dim=(1, axis + 4)), "mean along dimension"),
    "mean of everything": (lambda x, axis: x.mean(), "mean along dimension None"),
    "normalizing over columns": (lambda x, axis: F.normalize(x, dim=axis), "normalize along dimension"),
    "rolling": (lambda x, axis: x.roll(1, dims=axis), "roll, which is not known"),
    "flipping": (lambda x, axis: x.flip(axis), "flip, which is not known"),
    "softmax": (lambda x, axis: x.softmax(dim=axis), "softmax, which is not known"),
    "a matrix product": (lambda x, axis: x @ x, "matmul, which is not known"),
    "numbers made for each column": (lambda x, axis: torch.arange(6), "arange, which is not known"),
    "one column left out": (lambda x, axis: x[..., 1:, 1:], "Some of the columns"),
    "one column alone": (lambda x, axis: x[..., 0, 0], "Some of the columns"),
    "another width": (
        lambda x, axis: F.conv2d(x.reshape((1, 4, 9, 4) if axis == WIDTH else (1, 4, 4, 9)), KERNEL, padding=1),
        "4 columns are no multiple of the 3",
    ),
}


@pytest.mark.parametrize("axis", [WIDTH, HEIGHT], ids=["width", "height"])
@pytest.mark.parametrize("operator", REFUSED)
def test_what_would_mix_columns_is_refused_before_anything_is_sent(operator, axis):
    function, message = REFUSED[operator]
    with HaloExchange(ColumnSplit((3, 2), 0, axis)), pytest.raises(NotImplementedError, match=message):
        function(PICTURES, axis)


PADDED = {
    "padded again": lambda x: F.pad(x, (1, 1, 1, 1)),
    "some channels of it": lambda x: x[:, :1],
    "joined": lambda x: torch.cat([x, x], dim=1),
    "rearranged": lambda x: x.view(1, 4, 64),
    "enlarged": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("use", PADDED)
def test_a_padded_picture_is_for_a_convolution_only(monkeypatch, use):
    no_edges = torch.zeros(0)
    monkeypatch.setattr(ColumnSplit, "exchange_edges", lambda *arguments: (no_edges, no_edges))
    with HaloExchange(ColumnSplit((3, 2))):
        padded = F.pad(PICTURES, (1, 1, 1, 1))
        assert padded.to(torch.float32).contiguous().shape == (1, 4, 8, 8)
        with pytest.raises(NotImplementedError, match="padded, and not yet convolved"):
            PADDED[use](padded)
        assert F.conv2d(padded, KERNEL).shape == PICTURES.shape


# -- alone -----------------------------------------------------------------------------------------------------------


def test_without_a_group_no_operator_is_looked_at(monkeypatch):
    def fail(*arguments):
        raise AssertionError("entered")

    monkeypatch.setattr(HaloExchange, "__enter__", fail)
    vae = tiny_vae()
    assert StreamingDecoder(vae).decode(torch.zeros(1, 8, 1, 1, 2)).shape == (1, 3, 1, 16, 32)
    assert StreamingEncoder(vae).encode(torch.zeros(1, 3, 1, 16, 32)).shape == (1, 8, 1, 1, 2)


def test_the_features_that_are_kept_are_counted():
    decoder, encoder = StreamingDecoder(tiny_vae()), StreamingEncoder(tiny_vae())
    assert decoder.num_bytes == encoder.num_bytes == 0
    sizes = []
    for width in (1, 2):
        decoder.reset()
        for _ in range(3):
            decoder.decode(torch.zeros(1, 8, 1, 1, width))
        sizes.append(decoder.num_bytes)
    assert 0 < 2 * sizes[0] == sizes[1]
    decoder.reset()
    assert decoder.num_bytes == 0


@pytest.mark.parametrize("columns", [(1, 1), (3, 2), (2, 2, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("axis", [WIDTH, HEIGHT], ids=["width", "height"])
@pytest.mark.parametrize("scale", [1, 8])
def test_the_parts_are_the_whole(columns, axis, scale):
    pictures = torch.arange(3 * scale * sum(columns)).view(3, -1).movedim(-1, axis)
    splits = [ColumnSplit(columns, rank, axis) for rank in range(len(columns))]
    assert torch.equal(torch.cat([split.part(pictures) for split in splits], dim=axis), pictures)
    widths = [split.part(pictures).shape[axis] for split in splits]
    assert all(split.widths(own) == widths for split, own in zip(splits, widths, strict=True))
