"""Grids, rounding with a gradient, and the search for a weight's scale."""
import pytest
import torch
from torch.testing import assert_close

import hqdm


def test_grid_values():
    """What b bits hold: 15 values at 4 bits with 0 in the middle, 16 with a zero point, and 16 odd ones."""
    for bits, q_max in ((4, 7), (3, 3), (2, 1)):
        assert hqdm.make_grid(bits, "midtread") == (-q_max, q_max, 1)
    for bits, most in ((4, 15), (3, 7), (8, 255), (1, 1)):
        assert hqdm.make_grid(bits, "asymmetric") == (0, most, 1) and hqdm.make_grid(bits, "midrise") == (-most, most, 2)


def test_zero_is_on_the_grid_of_rows_without_it():
    """Rows in [3, 4] and [-4, -3]: the grid still reaches 0, at one of its ends, and no value is off by more than a step."""
    v = torch.rand(6, 200) + torch.tensor([[3.], [3.], [3.], [-4.], [-4.], [-4.]])
    s, z = hqdm.search_scale(v, hqdm.Grid(0, 15), 2.4)
    assert ((v - s * hqdm.quantize(v, s, z, hqdm.Grid(0, 15))).abs().amax(1, keepdim=True) <= s).all()
    assert (z[:3] == 0).all() and (z[3:] == 15).all()


def test_quantize_picks_the_nearest_grid_point():
    """s q is the nearest of all grid points, found here by trying every one."""
    v = torch.linspace(-5, 5, 999)
    s, z = torch.tensor(0.37), torch.tensor(5.0)
    points = s * (torch.arange(16) - z)                                       # (16,)
    nearest = points[(v[:, None] - points).abs().argmin(1)]
    assert_close(s * hqdm.quantize(v, s, z, hqdm.Grid(0, 15)), nearest)


def test_round_ste_rounds_and_passes_the_gradient():
    """Ties to even, integers to the last bit over the whole range of a grid and far beyond, the gradient untouched."""
    x = torch.cat([torch.tensor([-1.5, -0.5, 0.49, 0.5, 2.5, 7.4]), torch.randn(100_000) * 10 ** (8 * torch.rand(100_000) - 3)])
    x.requires_grad_()
    y = hqdm.round_ste(x)
    y.backward(g := torch.randn(len(x)))
    assert torch.equal(y.detach(), x.detach().round()) and torch.equal(x.grad, g)
    assert y[:6].tolist() == [-2.0, 0.0, 0.0, 0.0, 2.0, 7.0] and torch.equal(hqdm.round_ste(x.detach()), x.detach().round())


def test_gradients_of_clipping():
    """Inside v gets gradient 1 and s gets round(v/s) - v/s; outside v gets 0 and s gets q_min or q_max (LSQ eq. 3)."""
    v = torch.tensor([-9.0, -0.3, 0.2, 1.4, 9.0], requires_grad=True)
    s = torch.full((5,), 0.5, requires_grad=True)
    (s * hqdm.quantize(v, s, None, hqdm.Grid(-3, 3))).sum().backward()
    assert_close(v.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert_close(s.grad, torch.tensor([-3.0, -1 + 0.6, 0 - 0.4, 3 - 2.8, 3.0]))


def test_the_outermost_levels_pass_the_gradient():
    """What rounds to an end of the grid is on it: LSQ's rule, by hand, whatever torch's own clamp makes of its ends."""
    q = torch.tensor([-4.0, -3.0, -2.0, 3.0, 4.0], requires_grad=True)
    hqdm.clamp_ste(q, -3, 3).sum().backward()
    assert q.grad.tolist() == [0, 1, 1, 1, 0] and torch.equal(hqdm.clamp_ste(q, -3, 3), q.clamp(-3, 3))
    v, z = torch.tensor([-0.6, 3.4, 4.6, 5.6]).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    hqdm.quantize(v, torch.tensor(1.0), z, hqdm.Grid(0, 7)).sum().backward()          # on the grid: round(v) + 2 in 0 .. 7
    assert v.grad.tolist() == [1, 1, 1, 0] and z.grad.item() == -1


def test_the_search_keeps_the_precision():
    """float64 in, float64 out, and a scale that float32 could not tell from its neighbour."""
    v = torch.tensor([[0.0, 1.0 + 2.0**-40]], dtype=torch.float64)
    s, z = hqdm.search_scale(v, hqdm.Grid(0, 15), 2.0)
    assert s.dtype == z.dtype == torch.float64 and s.item() * 15 == v[0, 1].item()


def test_grids_that_do_not_exist():
    """The message names those that do; bits are for check_scheme to refuse."""
    with pytest.raises(ValueError, match="no grid 'odd'; choose midtread, midrise"):
        hqdm.make_grid(4, "odd")


def test_midrise_picks_the_nearest_odd_number():
    """All 2^b codes, found by trying every one; LSQ's gradients by hand; round_ste far beyond any grid."""
    v, s = torch.linspace(-5, 5, 1000), torch.tensor(0.37)
    points = torch.arange(-7, 8, 2)                                           # 3 bits: -7, -5 .. 7
    q = hqdm.quantize(v, s, None, hqdm.make_grid(3, "midrise"))
    assert torch.equal(q.long(), points[(v[:, None] - s * points).abs().argmin(1)]) and len(q.unique()) == 8
    v = torch.tensor([-9.0, -0.3, 0.2, 1.4, 9.0], requires_grad=True)
    s = torch.full((5,), 0.5, requires_grad=True)
    (s * hqdm.quantize(v, s, None, hqdm.make_grid(2, "midrise"))).sum().backward()          # -3, -1, 1, 3
    assert_close(v.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert_close(s.grad, torch.tensor([-3.0, -1 + 0.6, 1 - 0.4, 3 - 2.8, 3.0]))
    x = (torch.randn(100_000) * 10 ** (7 * torch.rand(100_000) - 3)).requires_grad_()
    y = hqdm.round_ste(x, 2)
    y.backward(g := torch.randn(len(x)))
    assert torch.equal(x.grad, g) and (y % 2 == 1).all() and ((y - x).abs() <= 1).all()


@pytest.mark.parametrize("bits, kind, p", [(4, "asymmetric", 2.4), (3, "midtread", 2.0), (3, "midrise", 2.0), (8, "asymmetric", 2.4)])
def test_scale_search_against_brute_force(bits, kind, p):
    """The scale kept is the best of the 80, by a plain loop in float64 over rows and candidates."""
    torch.manual_seed(1)
    v = torch.randn(6, 200) * torch.rand(6, 1)
    v[0], v[1] = -v[0].abs(), v[1].abs()             # all on one side
    grid, symmetric = hqdm.make_grid(bits, kind), kind != "asymmetric"
    q_min, q_max, _ = grid
    s, z = hqdm.search_scale(v, grid, p)

    def error(row, scale, zero):
        q = 2 * (row / scale / 2 - 0.5).round() + 1 if kind == "midrise" else (row / scale).round()
        q = (q + zero).clamp(q_min, q_max) - zero
        return ((row - scale * q).abs() ** p).sum()
    for row, scale, zero in zip(v.double(), s.double()[:, 0], z.double()[:, 0]):
        lo, hi, errors = row.min().clamp(max=0), row.max().clamp(min=0), []
        for i in range(80):
            width = (1 - i / 80) * (max(-lo, hi) / q_max if symmetric else (hi - lo) / (q_max - q_min))
            errors.append(error(row, width, 0 if symmetric else (-lo * (1 - i / 80) / width).round()))
        assert_close(error(row, scale, zero), min(errors), rtol=1e-4, atol=0)


def test_scale_search_of_many_rows_is_the_search_of_each():
    """A CPU takes a few rows at a time: 50 rows of 1,000 give what 50 searches of one row give."""
    v = torch.randn(50, 1000) * torch.rand(50, 1)
    alone = [hqdm.search_scale(row, hqdm.Grid(0, 15), 2.4) for row in v.split(1)]
    for found, parts in zip(hqdm.search_scale(v, hqdm.Grid(0, 15), 2.4), zip(*alone)):
        assert_close(found, torch.cat(parts))


@pytest.mark.parametrize("bits", [3, 4])
def test_searching_each_end_finds_the_zero_point_of_a_skewed_row(bits):
    """Values out of a SiLU: ends shrunk together keep one z; each alone comes within 2 % of the best of all (s, z)."""
    torch.manual_seed(0)
    v = torch.nn.functional.silu(torch.randn(2000, dtype=torch.float64))[None]
    v[0, 0] = 12                                                              # an outlier
    v, grid = torch.cat([v, -v]), hqdm.make_grid(bits, "asymmetric")                 # the second row's long end is below

    def errors(s, z):
        return (v - s * hqdm.quantize(v, s, z, grid)).square().sum(1)
    together, each = (errors(*hqdm.search_scale(v, grid, 2, ends=ends)) for ends in (False, True))
    scales = torch.linspace(0.05, 3, 500).tolist()
    every = torch.stack([errors(torch.full((2, 1), s), z) for s in scales for z in range(2**bits)])
    assert (each <= 1.02 * every.amin(0)).all() and (each < 0.95 * together).all()


def test_scale_search_survives_a_dead_row():
    """A row of zeros (a pruned channel) gets a positive scale: its logarithm must exist."""
    s, z = hqdm.search_scale(torch.zeros(2, 9), hqdm.Grid(0, 15), 2.4)
    assert (s > 0).all() and torch.isfinite(z).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 8), (1, 1)])
def test_packing_survives_a_round_trip(bits, shape):
    """pack, then unpack, gives the same integers; up to 4 bits two share a byte, with the first in the low half."""
    q = torch.randint(0, 2**bits, shape)
    packed = hqdm.pack_weights(q, bits)
    assert torch.equal(hqdm.unpack_weights(packed, bits, shape), q.to(torch.uint8))
    assert len(packed) == (-(-q.numel() // 2) if bits <= 4 else q.numel())
    assert hqdm.pack_weights(torch.tensor([3, 10]), 4).tolist() == [0xA3]
