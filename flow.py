"""Noise -> loss -> samples. The only file that knows what t is:

    t = 1 is noise, t = 0 the image:   z_t = (1 - t) x + t eps,   dz/dt = v = eps - x,   x = z_t - t v

Training: `draw_t`, `interpolate`, the network, `loss`. Sampling: `noise`, `guided`, `sample`. The network returns the image
("x") or the velocity ("v"); `to_x` and `to_v` convert. Tensors are images (B, 3, H, W) or tokens (B, K, P); t is (B,).
If the noise of a recipe is not of unit variance, scale eps (and the sampler's first z): nothing here changes.
"""
import math
from itertools import pairwise

import torch

T_MIN = 0.05        # an error of x_hat is one of v = (z - x_hat) / t, unbounded as t -> 0: the loss stops weighting it here
T_LOW = 1e-3        # training never draws less


def draw_t(n, shift, uniform, generator):
    """Noise levels to train at, (n,) fp32 in [T_LOW, 1): logit-normal, shifted; a share `uniform` uniform and not shifted. (AMD's have
    a thousand levels.)

    Always three draws of n numbers, whatever they are: no loop, no host sync. What falls outside is clamped, not drawn
    again; a logit-normal t does once in 10^11 draws or less."""
    made = dict(generator=generator, device=generator.device)
    t = torch.randn(n, **made).sigmoid()
    t = shift * t / (1 + (shift - 1) * t)
    flat, pick = torch.rand(n, **made), torch.rand(n, **made)
    t = torch.where(pick < uniform, T_LOW + (1 - T_LOW) * flat, t)
    return t.clamp(T_LOW, 1 - 2**-24)                       # the largest fp32 below 1


def wide(t, x):
    """t (B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x, eps, t):
    """z_t."""
    t = wide(t, x)
    return (1 - t) * x + t * eps


def to_v(prediction, out, z, t, floor=T_MIN):
    """The velocity that the network's output means."""
    return (z - out) / wide(t, z).clamp(min=floor) if prediction == "x" else out


def to_x(prediction, out, z, t):
    """The clean image that the network's output means."""
    return out if prediction == "x" else z - wide(t, z) * out


def loss(prediction, out, x, eps, t):
    """Squared error of the velocity, mean per sample (B,), in fp32 also if `out` is bf16 (x and eps are fp32).

    For x-prediction, output and target both go through the clamped `to_v`; z cancels: |x_hat - x|^2 / max(t, T_MIN)^2."""
    error = (out - x) / wide(t, x).clamp(min=T_MIN) if prediction == "x" else out - (eps - x)
    return error.square().flatten(1).mean(1)


def noise(seeds, shape):
    """One image of noise per seed, (len(seeds), *shape) fp32 on the CPU: the same on any device and in any batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(model, prediction, guide="cfg", scale=1.0, lo=0.0, hi=1.0):
    """The `denoise(z, t) -> x_hat, v` that `sample` wants, of a model(z (B, ...), t (B,), branch) -> output, where branch is

        "dense"     with the captions; the only one called at scale 1 and outside lo <= t <= hi
        "both"      z and t hold 2 B rows: B for the captions, then the same B for the empty caption     (guide "cfg")
        "routed"    with the captions, seeing only some of the tokens                                    (guide "self")

    Guidance is bad + scale (good - bad). x_hat and v are affine in each other, so it is the same on either."""
    def denoise(z, t):
        time = z.new_full((len(z),), t)                                                                   # (B,)
        if scale == 1 or not lo <= t <= hi:
            out = model(z, time, "dense").to(z.dtype)
        else:
            if guide == "cfg":
                good, bad = model(torch.cat([z, z]), torch.cat([time, time]), "both").to(z.dtype).chunk(2)
            else:
                good, bad = model(z, time, "dense").to(z.dtype), model(z, time, "routed").to(z.dtype)
            out = bad + scale * (good - bad)
        # No floor: the clamp bounds the loss's weight. A sampler multiplies v by a step shorter than t, and t > 0.
        return to_x(prediction, out, z, time), to_v(prediction, out, z, time, floor=0.0)
    return denoise


def sigmas(steps, shift):
    """The noise levels that a sampler visits: steps + 1 of them, from 1 to 0, denser near 1 for a larger shift."""
    return [shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps for i in range(steps + 1))]


@torch.no_grad()
def sample(denoise, z, steps, shift=1.0, sampler="euler", progress=None):
    """Integrate dz/dt = v from noise z at t = 1 to t = 0. `denoise(z, t: float) -> x_hat, v` with v = (z - x_hat) / t.

        euler       first order, one call per step
        heun        second order, two calls per step (one in the last)
        multistep   second order, one call per step: with u = 1/t the ODE reads d(z/t) = x_hat du, which is exact for
                    constant x_hat (that is Euler's step) and here for x_hat linear in t through its last two values

    The last is DPM-Solver++(2M), lambda = log((1 - t) / t), d(1/t) = e^lambda d lambda, but x_hat is extrapolated in t,
    which unlike lambda is finite at both ends. The step to t = 0 returns x_hat itself, in all of them (where x_hat has
    slope 0 along an exact path: nothing is lost). `progress()` is called once per step."""
    assert sampler in ("euler", "heun", "multistep"), sampler
    before = None
    for t, s in pairwise(sigmas(steps, shift)):
        x, v = denoise(z, t)
        if s == 0:
            z = x
        elif sampler == "heun":
            z = z + (s - t) * (v + denoise(z + (s - t) * v, s)[1]) / 2
        else:
            z = z + (s - t) * v
            if sampler == "multistep" and before:
                slope = (x - before[0]) / (t - before[1])
                z = z + (s - t - s * math.log(s / t)) * slope
        before = x, t
        if progress:
            progress()
    return z
