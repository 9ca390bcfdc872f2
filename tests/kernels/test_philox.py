import pytest
import torch
import triton
import triton.language as tl

from qtts_compile.kernels.philox import philox_reference, uniform, uniform_reference


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    drawn = philox_reference(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in drawn) == words


@triton.jit
def _uniform_kernel(Seed_ptr, Offset_ptr, U_ptr, BLOCK: tl.constexpr):
    tl.store(U_ptr + tl.arange(0, BLOCK), uniform(tl.load(Seed_ptr), tl.load(Offset_ptr), BLOCK))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 7, 2**32 + 1, -1])
def test_kernel_and_reference_draw_the_same_bits(device, seed, offset):
    seed, offset = torch.tensor([seed], device=device), torch.tensor([offset], device=device)
    numbers = torch.full((256,), float("nan"), device=device)
    _uniform_kernel[(1,)](seed, offset, numbers, BLOCK=256)  # pyright: ignore[reportArgumentType]
    assert torch.equal(numbers[None], uniform_reference(seed, offset, 256))
    assert (0 < numbers).all() and (numbers < 1).all() and numbers.unique().numel() > 250


def test_the_extreme_words_stay_inside_0_and_1(monkeypatch):
    words = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr("qtts_compile.kernels.philox.philox_reference", lambda counter, key: (words[None, :1], words[None, 1:]) * 2)
    numbers = uniform_reference(torch.tensor([0]), torch.tensor([0]), 2)
    assert (numbers > 0).all() and (numbers < 1).all() and numbers.dtype == torch.float32
