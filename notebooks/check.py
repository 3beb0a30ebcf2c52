"""Checks of the exercises: check.fwht(my_fwht) says whether an answer is right, and if not, which mistake it is.

Each check draws inputs of random shapes and compares with the truth, a slow loop or hqdm.py. An answer that differs is
looked up among plausible wrong ones; the hint that goes with the one it equals is printed. Model answers: answers.py.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
import unet  # noqa: E402

# ---------------------------------------------------------------- how an answer is looked at


def compare(name, yours, truth, cases, mistakes):
    """Print in a few lines what `yours` is on all cases (argument tuples): right, a mistake by name, or what differs.

    mistakes: {hint: wrong answer}. All are called alike and return a tensor, a number, or a tuple of them.
    """
    for args in cases:
        try:
            got = values(yours(*clones(args)))
        except Exception as e:
            return print(f"{name}: not yet. Called with {describe(args)} it raised {type(e).__name__}: "
                         f"{str(e).splitlines()[0] if str(e) else ''}")
        target = values(truth(*clones(args)))
        if got is None or [v.shape for v in got] != [v.shape for v in target]:
            shapes = "nothing: does it end with return?" if got is None else ", ".join(str((*v.shape,)) for v in got)
            wanted = ", ".join(str((*v.shape,)) for v in target)
            return print(f"{name}: not yet. Called with {describe(args)} it should return {wanted}; yours is {shapes}")
    if same(yours, truth, cases):
        return print(f"{name}: right, on {len(cases)} random inputs.")
    for hint, wrong in mistakes.items():
        if same(yours, wrong, cases):
            return print(f"{name}: not yet. {hint}")
    args = next(args for args in cases if not same(yours, truth, [args]))
    print(f"{name}: not yet, and none of the usual mistakes. The first input that differs: {describe(args)}")
    for word, function in (("yours ", yours), ("target", truth)):
        numbers = [f"{v:.4g}" for part in values(function(*clones(args))) for v in part.flatten()[:8]]
        print(f"  {word} {', '.join(numbers)} ..")


def same(f, g, cases):
    """Whether two functions agree on all cases; one that cannot take a case agrees with nothing."""
    try:
        results = [(values(f(*clones(args))), values(g(*clones(args)))) for args in cases]
        pairs = [pair for result in results for pair in zip(*result, strict=True)]
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def values(result):
    """A tensor, a number or a tuple of them as a list of float64 tensors; None where there is nothing."""
    if result is None or isinstance(result, tuple) and None in [v if v is None else 0 for v in result]:
        return None
    return [torch.as_tensor(v).detach().double() for v in (result if isinstance(result, tuple) else (result,))]


def clones(args):
    return [v.clone() if torch.is_tensor(v) else v for v in args]


def describe(args):
    return ", ".join(f"a tensor {(*v.shape,)}" if torch.is_tensor(v) else str(v) for v in args)


# ---------------------------------------------------------------- the transform

def butterfly(x, pair=lambda a, b: (a + b, a - b), split=lambda x: x.chunk(2, -1), levels=99):
    """The recursion with its parts exchangeable: for wrong answers."""
    if x.shape[-1] == 1 or levels == 0:
        return x
    a, b = (butterfly(half, pair, split, levels - 1) for half in split(x))
    return torch.cat(pair(a, b), -1)


def fwht(yours):
    """yours(x): H x along the last dimension, (.., n) -> (.., n); n a power of two."""
    def scaled(**parts):
        return lambda x: butterfly(x, **parts) / math.sqrt(x.shape[-1])
    compare("fwht", yours, hqdm.fwht, [(torch.randn(3, n),) for n in (1, 2, 4, 32)] + [(torch.randn(2, 5, 8),)], {
        "It is R x: 1/sqrt(n) is missing, and H H x would be n x.": butterfly,
        "It is R x / n: the length of x should stay, and that takes 1/sqrt(n).": lambda x: butterfly(x) / x.shape[-1],
        "The two halves of the result are swapped: sums first, then differences.":
            scaled(pair=lambda a, b: (a - b, a + b)),
        "The second half is b - a: it should be a - b.": scaled(pair=lambda a, b: (a + b, b - a)),
        "It splits into even and odd places: the recursion splits into a first and a second half.":
            scaled(split=lambda x: (x[..., ::2], x[..., 1::2])),
        "It stops after one level: each half must be transformed, too.": scaled(levels=1),
        "It divides by sqrt(2) once and not at each of the log2(n) levels.": lambda x: butterfly(x) / math.sqrt(2)})


def hadamard(yours):
    """yours(x, dim, block): H x in blocks of neighbours along a dimension."""
    def moved(f):
        return lambda x, dim, block: f(x.movedim(dim, -1), block).movedim(-1, dim)

    def far(v, k):                                   # channels c, c + C / k, c + 2 C / k .. in one block
        return hqdm.fwht(v.unflatten(-1, (k, -1)).mT).mT.flatten(-2)
    cases = [(torch.randn(2, 32, 3, 8), 1, 8), (torch.randn(3, 5, 64), -1, 16), (torch.randn(16, 16), 0, 4)]
    compare("hadamard", yours, hqdm.hadamard, cases, {
        "It goes along the last dimension, whatever dim says.": lambda x, dim, block: hqdm.hadamard(x, -1, block),
        "It is one transform over all channels: blocks of k neighbours are transformed each alone.":
            moved(lambda v, k: hqdm.fwht(v)),
        "A block holds channels that are C/k apart: it should hold neighbours.": moved(far),
        "It is R x: 1/sqrt(block) is missing.": lambda x, dim, block: hqdm.walsh(x, dim, block),
        "It divides by the square root of all channels: a block has only k.":
            lambda x, dim, block: hqdm.walsh(x, dim, block) / math.sqrt(x.shape[dim])})


# ---------------------------------------------------------------- grids and gradients

def _grid_inputs():
    return [(torch.cat([torch.randn(50) * 3, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -40, 40]) * s]), s, bits)
            for s, bits in ((0.7, 3), (0.5, 4), (1.0, 2))]


def quantize_symmetric(yours):
    """yours(v, s, bits): integers of v on the grid -q_max .. q_max, q_max = 2^(bits - 1) - 1."""
    def on(low, high, rounding=torch.round):
        return lambda v, s, bits: rounding(v / s).clamp(low(bits), high(bits))
    low, high = (lambda b: 1 - 2 ** (b - 1)), (lambda b: 2 ** (b - 1) - 1)
    compare("quantize_symmetric", yours, on(low, high), _grid_inputs(), {
        "The grid has 2^bits + 1 levels: q_max is 2^(bits - 1) - 1.":
            on(lambda b: -(2 ** (b - 1)), lambda b: 2 ** (b - 1)),
        "It goes down to -2^(bits - 1), as two's complement does: on a symmetric grid -q is there with q.":
            on(lambda b: -(2 ** (b - 1)), high),
        "q_max is 2^bits - 1: that takes a bit more, for the sign.": on(lambda b: 1 - 2**b, lambda b: 2**b - 1),
        "It cuts off the fraction, as .int() does: round to the nearest.": on(low, high, torch.trunc),
        "It rounds down, always: round to the nearest.": on(low, high, torch.floor),
        "It rounds .5 upwards: torch.round, and so everything here, rounds ties to even.":
            on(low, high, lambda t: (t + 0.5).floor()),
        "It returns s q: wanted are the integers.": lambda v, s, bits: s * on(low, high)(v, s, bits),
        "Nothing is clamped: 40 steps do not fit the grid.": lambda v, s, bits: (v / s).round(),
        "It clamps v before it divides by s.": lambda v, s, bits: (v.clamp(low(bits), high(bits)) / s).round()})


def quantize_asymmetric(yours):
    """yours(v, s, z, bits): v as the grid holds it, s (q - z), q on 0 .. 2^bits - 1 with zero point z."""
    def on(shift=lambda z: z, back=lambda z: z, low=lambda b: 0, high=lambda b: 2**b - 1):
        return lambda v, s, z, bits: s * (((v / s).round() + shift(z)).clamp(low(bits), high(bits)) - back(z))
    compare("quantize_asymmetric", yours, on(), [(v, s, float(2**bits // 4), bits) for v, s, bits in _grid_inputs()], {
        "The zero point is added and never taken off.": on(back=lambda z: 0),
        "All that is negative is lost: the zero point must be added, and before the clamp.":
            on(lambda z: 0, lambda z: 0),
        "The zero point has the wrong sign: q = round(v / s) + z.": on(lambda z: -z, lambda z: -z),
        "The grid is the symmetric one: this one is 0 .. 2^bits - 1.":
            on(low=lambda b: 1 - 2 ** (b - 1), high=lambda b: 2 ** (b - 1) - 1),
        "The grid ends at 2^bits: with 0 these are 2^bits + 1 levels.": on(high=lambda b: 2**b),
        "It returns the integers: wanted are the values, s (q - z).":
            lambda v, s, z, bits: ((v / s).round() + z).clamp(0, 2**bits - 1)})


def ste(yours):
    """yours(x): x rounded; its gradient passes as if nothing had happened."""
    def with_gradient(f):
        def run(x):
            with torch.enable_grad():
                y = f(x.requires_grad_())
                back = torch.autograd.grad(y.square().sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
            return y, back
        return run
    compare("ste", with_gradient(yours), with_gradient(hqdm.round_ste), [(torch.randn(n) * 4,) for n in (5, 40)], {
        "It rounds, but its gradient is 0, the true one, and nothing would learn: .detach() the difference "
        "x.round() - x.": with_gradient(torch.round),
        "It does not round.": with_gradient(lambda x: x * 1),
        "The gradient is right and the value is not: x + x.round() has one x too many.":
            with_gradient(lambda x: x + x.round().detach())})


def lsq_gradient(yours):
    """yours(v, s, q_max): the derivative of s clamp(round(v / s), -q_max, q_max) by s, at each v, by LSQ's rule."""
    def rule(inside=lambda t: t.round() - t, outside=lambda t, m: t.sign() * m):
        def run(v, s, q_max):
            t = v / s
            return torch.where(t.round().abs() <= q_max, inside(t), outside(t, q_max))
        return run
    compare("lsq_gradient", yours, rule(), [(torch.randn(60) * 3, s, m) for s, m in ((0.5, 3), (0.8, 7), (1.3, 1))], {
        "Inside it is round(v / s) alone: v / s depends on s, too, and the straight-through rule lets that pass.":
            rule(torch.round),
        "Outside of the grid it is 0: there s clamp(..) = +-s q_max, whose derivative is +-q_max.":
            rule(outside=lambda t, m: 0 * t),
        "Below the grid it is +q_max: there it is -q_max.": rule(outside=lambda t, m: 0 * t + m),
        "Inside the sign is wrong: round(v / s) - v / s.": rule(lambda t: t - t.round()),
        "Nothing is clamped.": rule(outside=lambda t, m: t.round() - t)})


def search_scale(yours):
    """yours(v, q_max, p): of the scales (1 - i/80) max|v| / q_max, i = 0 .. 79, that of the least sum |v - v_hat|^p."""
    def best(largest=lambda v: v.abs().max(), p_of=lambda p: p, clamp=True, pick=min):
        def run(v, q_max, p):
            def error(s):
                q = (v / s).round()
                return float((v - s * (q.clamp(-q_max, q_max) if clamp else q)).abs().pow(p_of(p)).sum())
            return pick([(1 - i / 80) * largest(v) / q_max for i in range(80)], key=error)
        return run
    cases = [(torch.randn(200) ** 3 - 1, q_max, p) for q_max, p in ((3, 2.4), (7, 2.0), (1, 1.0), (3, 4.0))]
    compare("search_scale", yours, best(), cases, {
        "It takes the largest v: that of |v| counts, and here it is a negative one.": best(lambda v: v.max()),
        "The error is always squared: p says which power.": best(p_of=lambda p: 2),
        "Without clamp smaller steps are always better, and it takes the smallest.": best(clamp=False),
        "It keeps the worst.": best(pick=max),
        "It keeps the first: no shrink was tried, or none kept.": lambda v, q_max, p: v.abs().max() / q_max})


def choose_block(yours):
    """yours(x, blocks): of these block sizes the one with which 3 bits lose the least of x (n, C)."""
    def lost(x, k):
        x_h = hqdm.hadamard(x, 1, k)
        s = x_h.abs().max() / 3
        return float((s * (x_h / s).round() - x_h).square().sum())

    def best(score, pick=min):
        return lambda x, blocks: pick(blocks, key=lambda k: score(x, k))
    cases = []
    for n, C, loud, rows in ((64, 32, 1, 0), (64, 64, 0, 1), (96, 16, 2, 0), (64, 32, 1, 1), (64, 64, 3, 0)):
        x = 0.3 * torch.randn(n, C)
        x[:, 5:5 + loud] += 6                        # loud channels, which H spreads; rows of H, which it gathers
        cases.append((x + rows * hqdm.hadamard_matrix(C)[7], [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= C]))
    compare("choose_block", yours, best(lost), cases, {
        "It takes the largest block, always: where H gathers instead of spreading, a smaller one is better.":
            lambda x, blocks: max(blocks),
        "It takes the smallest block, always. Is rounded H x compared with x? Rotate it back, or compare it with H x.":
            lambda x, blocks: min(blocks),
        "It keeps the worst.": best(lost, max),
        "It compares rounded R x: that is sqrt(k) times as long as x, and so is its error. H x has the 1/sqrt(k).":
            best(lambda x, k: k * lost(x, k))})


def step_for_4_bits(yours):
    """yours(errors_3, errors_4): of S DDIM steps, with the error of each at 3 and at 4 bits, the one to give 4 bits."""
    errors = torch.tensor([[0.5, 0.9, 0.1, 0.3, 0.05, 0.2], [0.2, 0.75, 0.02, 0.29, 0.015, 0.1]])
    cases = [tuple(errors[:, torch.randperm(6)]) for _ in range(4)] + [tuple(errors)]
    compare("step_for_4_bits", yours, lambda a, b: int((a - b).argmax()), cases, {
        "It takes the step with the largest error at 3 bits: what counts is how much of it 4 bits take away.":
            lambda a, b: int(a.argmax()),
        "It takes the largest ratio: a tenth of a small error is little.": lambda a, b: int((a / b).argmax()),
        "It takes the step where 4 bits help least.": lambda a, b: int((a - b).argmin()),
        "It takes the step that is best at 4 bits, wherever it came from.": lambda a, b: int(b.argmin()),
        "It takes the last step, always.": lambda a, b: len(a) - 1})


# ---------------------------------------------------------------- integers

def im2col(yours):
    """yours(x, k): (B, C, h, w) -> (B, h - k + 1, w - k + 1, C k k): what each output of a k x k filter sees."""
    def patches(order):
        return lambda x, k: x.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, *order).flatten(3)
    compare("im2col", yours, patches((1, 4, 5)), [(torch.randn(2, 3, 6, 5), 3), (torch.randn(1, 4, 3, 7), 2)], {
        "In a patch the channels come last: a weight (C_out, C, k, k), flattened, has them first.": patches((4, 5, 1)),
        "Rows and columns of the patch are swapped.": patches((1, 5, 4)),
        "The patches are reversed, as a mathematician's convolution does: a network's is not.":
            lambda x, k: patches((1, 4, 5))(x.flip(2, 3), k).flip(1, 2)})


def view_b(yours):
    """yours(q_w, k): the weight of view B, (q_w - z) R, from q_w - z (C_out, C_in, kh, kw); R in blocks of k."""
    compare("view_b", yours, lambda w, k: hqdm.walsh(w, 1, k), [
        (torch.randint(-8, 8, (o, c, 3, 3)).float(), k) for o, c, k in ((16, 16, 4), (8, 32, 8), (32, 64, 32))], {
        "It is (q_w - z) H, no longer integers: the 1/sqrt(k) belongs to the scales.":
            lambda w, k: hqdm.hadamard(w, 1, k),
        "It turns the output channels: R meets the input's.": lambda w, k: hqdm.walsh(w, 0, k),
        "It is not turned at all: that is the weight of view A.": lambda w, k: w,
        "It is one transform over all input channels: blocks of k are turned each alone.":
            lambda w, k: hqdm.walsh(w, 1, w.shape[1])})


def pack(yours):
    """yours(q): integers 0 .. 15, (n,) -> bytes ((n + 1) // 2,): two in each, the first in the low half."""
    def half(q):
        q = F.pad(q, (0, len(q) % 2))
        return q[: len(q) // 2] + 16 * q[len(q) // 2:]
    compare("pack", yours, lambda q: hqdm.pack_weights(q, 4), [(torch.randint(0, 16, (n,)),) for n in (8, 7, 1, 30)], {
        "The first of two is in the high half: it belongs into the low one.":
            lambda q: 16 * F.pad(q, (0, len(q) % 2))[::2] + F.pad(q, (0, len(q) % 2))[1::2],
        "A byte holds q[i] and q[i + n/2]: it should hold neighbours.": half,
        "The two overlap: four bits are a factor of 16.":
            lambda q: F.pad(q, (0, len(q) % 2))[::2] + 8 * F.pad(q, (0, len(q) % 2))[1::2]})


def unpack(yours):
    """yours(packed, n): the inverse of pack."""
    compare("unpack", yours, lambda b, n: hqdm.unpack_weights(b, 4, (n,)), [
        (torch.randint(0, 256, ((n + 1) // 2,)).to(torch.uint8), n) for n in (8, 7, 1, 30)], {
        "The high half comes first: pack puts the first of two into the low one.":
            lambda b, n: torch.stack([b // 16, b % 16], 1).flatten()[:n],
        "All low halves come first, then all high ones: they alternate.":
            lambda b, n: torch.cat([b % 16, b // 16])[:n]})


def accumulator_bound(yours):
    """yours(C_in, kh, kw, q_x_max, q_w_max, k): the largest |sum| of a layer with a transform over blocks of k."""
    def bound(taps=lambda c, h, w: c * h * w, stretch=math.sqrt):
        return lambda c, h, w, x, q, k: math.ceil(taps(c, h, w) * stretch(k) * x * q)
    cases = [(64, 3, 3, 3, 15, 32), (128, 1, 1, 7, 15, 16), (8, 3, 5, 127, 255, 1)]
    compare("accumulator_bound", yours, bound(), cases, {
        "It counts C_in products: a k x k filter has kh kw times as many.": bound(lambda c, h, w: c),
        "It counts kh kw products: there are as many for each input channel.": bound(lambda c, h, w: h * w),
        "The transform is forgotten: R stretches a vector by sqrt(k).": bound(stretch=lambda k: 1),
        "R stretches a vector by sqrt(k), not by k: a single entry can grow k times, not all of them at once.":
            bound(stretch=lambda k: k)})


# ---------------------------------------------------------------- diffusion

def ddim_step(yours):
    """yours(x, eps, a_t, a_s): x_t and the noise in it -> x_s; a is abar, the share of the picture's variance."""
    def step(x_0=lambda x, e, t: (x - (1 - t) ** 0.5 * e) / t**0.5,
             mix=lambda p, e, t, s: s**0.5 * p + (1 - s) ** 0.5 * e):
        return lambda x, eps, t, s: mix(x_0(x, eps, t), eps, t, s)
    cases = []
    for t, s in ((0.3, 0.5), (0.7, 0.9), (0.9, 1.0)):
        picture, eps = 2 * torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)      # what noisy steps believe is no picture yet
        cases.append((t**0.5 * picture + (1 - t) ** 0.5 * eps, eps, t, s))
    compare("ddim_step", yours, lambda x, eps, t, s: unet.ddim_step(x, eps, t, s)[0], cases, {
        "The picture is not divided by sqrt(a_t).": step(lambda x, e, t: x - (1 - t) ** 0.5 * e),
        "The noise that goes back is that of t: at s there is sqrt(1 - a_s) of it.":
            step(mix=lambda p, e, t, s: s**0.5 * p + (1 - t) ** 0.5 * e),
        "x_0 is kept within [-1, 1]: eq. 12 does not, and clamped noise is grey.":
            step(lambda x, e, t: ((x - (1 - t) ** 0.5 * e) / t**0.5).clamp(-1, 1)),
        "a_t and a_s are swapped.": lambda x, e, t, s: step()(x, e, s, t) if s < 1 else step()(x, e, t, t),
        "The square roots are missing: abar is a share of the variance.":
            step(lambda x, e, t: (x - (1 - t) * e) / t, lambda p, e, t, s: s * p + (1 - s) * e),
        "It returns the picture that x_t is believed to come from: wanted is x_s, noisier.":
            step(mix=lambda p, e, t, s: p)})


def carousel_step(yours):
    """yours(step, S): steps 0 .. S - 1 of some walks -> (next steps, which have arrived); who arrives starts at 0."""
    def move(arrived=lambda i, n: i + 1 == n, start=lambda n: 0):
        return lambda i, n: (torch.where(arrived(i, n), torch.full_like(i, start(n)), i + 1), arrived(i, n))
    compare("carousel_step", yours, move(), [(torch.arange(n).repeat(2), n) for n in (1, 4, 50)], {
        "Nobody ever arrives: the last step is S - 1, and who is there arrives by it.": move(lambda i, n: i >= n),
        "One step too early: who is at S - 2 has one more to go.": move(lambda i, n: i + 2 >= n),
        "Who arrives starts at S - 1, and arrives again at once: steps count from the noise, 0.":
            move(start=lambda n: n - 1)})
