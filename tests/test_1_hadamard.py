"""The transform. Exercise: delete the body of fwht in hqdm.py and make this file green again."""
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import hqdm
from conftest import DEVICES
from plumbing import kept


def dense(n):
    """H from its closed form, H_ij = (-1)^(number of common one bits of i and j) / sqrt(n), float64: the oracle."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(n)


def block_dense(channels, block):
    return torch.block_diag(*[dense(block)] * (channels // block))


@pytest.mark.parametrize("n", [2**i for i in range(11)])
def test_recursion_is_the_dense_matrix(n):
    """fwht(x) = x H in values and in gradients, for n = 1 .. 1024."""
    x = torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, n, dtype=torch.float64)
    y = hqdm.fwht(x)
    assert_close(y, x @ dense(n), rtol=1e-12, atol=1e-12)
    assert_close(torch.autograd.grad(y, x, g)[0], g @ dense(n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("shape, dim", [((2, 128, 3, 5), 1), ((2, 7, 128), -1), ((128, 2), 0), ((2, 64, 2, 3, 2), 1)])
def test_fast_transform_is_the_block_diagonal_matrix(block, shape, dim):
    """hadamard(x) = blockdiag(H .. H) x along any dimension, values and gradients, equal to the recursion too."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    M = block_dense(shape[dim], block)
    y = hqdm.hadamard(x, dim, block)
    assert_close(y, (x.movedim(dim, -1) @ M).movedim(-1, dim), rtol=1e-12, atol=1e-12)
    assert_close(torch.autograd.grad(y, x, g)[0], (g.movedim(dim, -1) @ M).movedim(-1, dim), rtol=1e-12, atol=1e-12)
    blocks = x.detach().movedim(dim, -1).unflatten(-1, (-1, block))
    assert_close(y, hqdm.fwht(blocks).flatten(-2).movedim(-1, dim), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_formats_agree(device):
    """However the numbers lie in memory, the values are the same; channels_last stays channels_last."""
    x = torch.randn(2, 64, 4, 4, device=device)
    last = hqdm.hadamard(x.to(memory_format=torch.channels_last), 1, 32)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, hqdm.hadamard(x, 1, 32))


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_float32_error_is_small(block, device):
    """Against float64 the float32 transform and its gradient err by less than 1e-6 of the norm (TF32: by 1e-3)."""
    x = torch.randn(5, 128, 3, 7, device=device, requires_grad=True)
    for v in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(1, 3)):
        dim = 1 if v.shape[1] == 128 else -1
        exact = hqdm.hadamard(v.detach().double(), dim, block)
        y = hqdm.hadamard(v, dim, block)
        g, = torch.autograd.grad(y, v, exact.float())
        assert (y - exact).norm() / exact.norm() < 1e-6 and (g - v).norm() / v.norm() < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int16, torch.int8])
def test_walsh_keeps_integers(dtype, device):
    """R x is an exact integer, the same from matmul on floats and from additions on integers."""
    q = torch.randint(-7, 8, (2, 64, 3, 3))
    oracle = (q.movedim(1, -1) @ (block_dense(64, 32) * math.sqrt(32)).round().long()).movedim(-1, 1)
    assert torch.equal(hqdm.walsh(q.to(device, dtype), 1, 32).cpu().long(), oracle)
    assert torch.equal(hqdm.walsh(q.to(device, dtype), 1, 32, 0.25).cpu(), oracle * 0.25)            # nothing is cut off


@pytest.mark.parametrize("device", DEVICES)
def test_walsh_of_large_integers(device):
    """int32 keeps all its bits: sums up to 2^31 are exact, where float32 would end at 2^24."""
    q = torch.randint(-2**25, 2**25, (3, 32), dtype=torch.int32)
    assert torch.equal(hqdm.walsh(q.to(device), -1, 32).cpu().long(), q.long() @ (dense(32) * math.sqrt(32)).round().long())


def test_the_orthonormal_transform_refuses_integers():
    """H x of integers is not integer: R x, which is, has a name of its own."""
    with pytest.raises(TypeError, match="use walsh"):
        hqdm.hadamard(torch.ones(2, 32, dtype=torch.int8))


def test_single_numbers():
    """H of one outlier spreads it evenly: [32, 0, 0, ..] -> 32 / sqrt(32) everywhere."""
    x = torch.zeros(32)
    x[0] = 32
    assert_close(hqdm.hadamard(x, 0, 32), torch.full((32,), 32 / math.sqrt(32)))


@pytest.mark.parametrize("n", [3, 12, 100, 0])
def test_recursion_refuses_other_lengths(n):
    with pytest.raises(ValueError, match="power of two"):
        hqdm.fwht(torch.zeros(2, n))


def test_block_that_does_not_divide_is_refused_with_choices():
    """No silent skip: the message names the blocks that would do."""
    with pytest.raises(ValueError, match="48 channels are not a multiple of the Hadamard block 32; use a block of 16 or less"):
        hqdm.hadamard(torch.zeros(1, 48, 2, 2))
    fits = {24: "block of 8 or", 20: "block of 4 or", 6: "block of 2 or", 5: "rotation none$", 224: "block of 32 or"}
    for channels, choice in fits.items():
        with pytest.raises(ValueError, match=choice):
            hqdm.check_block(channels, 64)
    with pytest.raises(ValueError, match="not a power of two"):
        hqdm.hadamard(torch.zeros(1, 48, 2, 2), block=24)


def wish():
    """(what this program asked of float32 products, what "no TF32, no bf16" is called), in old and new torch."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision(), "highest"
    parts = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    return ["ieee" if part.fp32_precision == "none" else part.fp32_precision for part in parts], ["ieee"] * 3


@pytest.mark.parametrize("api", ["old", "new"])
def test_no_tf32_inside(api, monkeypatch):
    """Whatever precision the program asks for elsewhere, H x is computed in full float32, and the wish is restored."""
    seen, real, changed = [], hqdm.hadamard_matrix, []
    monkeypatch.setattr(hqdm, "hadamard_matrix", lambda *args, **kwargs: seen.append(wish()) or real(*args, **kwargs))
    if api == "old":
        torch.set_float32_matmul_precision("medium")
    elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"       # from here on torch refuses to read the old setting
        changed = [(part, part.fp32_precision) for part in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]
        for part, _ in changed:
            part.fp32_precision = "bf16"
    before = wish()[0]
    try:
        hqdm.hadamard(torch.randn(2, 32), 1, 8)                  # a block that no kernel takes
        assert [asked == full for asked, full in seen] == [True] and wish()[0] == before
        assert api == "new" or torch.get_float32_matmul_precision() == "medium"
    finally:
        for part, precision in changed:
            part.fp32_precision = precision
        torch.set_float32_matmul_precision("highest")


def test_nobody_can_change_the_matrix():
    """Writing to what hadamard_matrix hands out changes no later transform."""
    x = torch.randn(2, 32)
    y = hqdm.hadamard(x, 1, 32)
    hqdm.hadamard_matrix(32).zero_()
    assert torch.equal(hqdm.hadamard(x, 1, 32), y)


def test_the_matrix_may_be_made_in_inference_mode():
    """The first transform of a size may run where no gradients are; later ones have theirs all the same."""
    with torch.inference_mode():
        hqdm.hadamard(torch.randn(2, 256), 1, 256)
    x = torch.randn(2, 256, requires_grad=True)
    hqdm.hadamard(x, 1, 256).sum().backward()
    assert x.grad.abs().sum() > 0


def test_an_exporters_tensors_are_not_kept():
    """The first transform of a size, and the first abar, may run on stand-ins without numbers; later calls are real."""
    table = kept.kept(lambda n: torch.arange(n))
    with FakeTensorMode():
        hqdm.hadamard(torch.randn(2, 1024), 1, 1024), table(4)
    assert torch.equal(table(4), torch.arange(4)) and table(4) is table(4)
    assert hqdm.hadamard(torch.ones(1, 1024), 1, 1024)[0, 0] == 32
    table(4)[0] = 9
    assert torch.equal(table(4), torch.arange(4))                # who writes to it, writes to his own
