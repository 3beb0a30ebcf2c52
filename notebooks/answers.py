"""Model answers of the exercises, under the names of their checks. Look after you have tried."""
import math

import torch
import torch.nn.functional as F


def fwht(x):
    n = x.shape[-1]
    if n == 1:
        return x
    a, b = fwht(x[..., :n // 2]), fwht(x[..., n // 2:])
    return torch.cat([a + b, a - b], dim=-1) / math.sqrt(2)


def hadamard(x, dim, block):
    v = x.movedim(dim, -1)
    return fwht(v.reshape(*v.shape[:-1], -1, block)).reshape(v.shape).movedim(-1, dim)


def quantize_symmetric(v, s, bits):
    q_max = 2 ** (bits - 1) - 1
    return (v / s).round().clamp(-q_max, q_max)


def quantize_asymmetric(v, s, z, bits):
    q = ((v / s).round() + z).clamp(0, 2**bits - 1)
    return s * (q - z)


def ste(x):
    return x + (x.round() - x).detach()


def lsq_gradient(v, s, q_max):
    t = v / s
    inside = t.round().abs() <= q_max
    return torch.where(inside, t.round() - t, t.sign() * q_max)


def search_scale(v, q_max, p):
    best_error, best = float("inf"), None
    for i in range(80):
        s = (1 - i / 80) * v.abs().max() / q_max
        error = (v - s * (v / s).round().clamp(-q_max, q_max)).abs().pow(p).sum()
        if error < best_error:
            best_error, best = error, s
    return best


def choose_block(x, blocks):
    best_error, best = float("inf"), None
    for k in blocks:
        x_h = hadamard(x, 1, k)
        s = x_h.abs().max() / 3
        error = (s * (x_h / s).round() - x_h).square().sum()
        if error < best_error:
            best_error, best = error, k
    return best


def step_for_4_bits(errors_3, errors_4):
    return (errors_3 - errors_4).argmax()


def im2col(x, k):
    B, C, h, w = x.shape
    rows = [[x[:, :, i:i + k, j:j + k].reshape(B, -1) for j in range(w - k + 1)] for i in range(h - k + 1)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def view_b(q_w, k):
    return hadamard(q_w, 1, k) * math.sqrt(k)


def pack(q):
    q = F.pad(q, (0, len(q) % 2))
    return q[0::2] + 16 * q[1::2]


def unpack(packed, n):
    return torch.stack([packed % 16, packed // 16], dim=1).flatten()[:n]


def accumulator_bound(C_in, kh, kw, q_x_max, q_w_max, k):
    return math.ceil(C_in * kh * kw * math.sqrt(k) * q_x_max * q_w_max)


def ddim_step(x, eps, a_t, a_s):
    x_0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps


def carousel_step(step, S):
    arrived = step + 1 == S
    return torch.where(arrived, 0, step + 1), arrived
