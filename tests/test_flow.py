"""Noise levels, loss, guidance and samplers against closed forms: a point mass, a Gaussian, a mixture of Gaussians."""
import math

import pytest
import torch

import flow

SAMPLERS = ["euler", "heun", "multistep"]
double = dict(dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(shape=(3, 4, 4), n=6, t=(0.05, 0.051, 0.3, 0.7, 0.999, 1.0)):
    """x, eps, an imperfect x_hat, t, z: all float64."""
    x, eps, off = torch.randn(3, n, *shape, generator=seeded(), **double)
    t = torch.tensor(t, **double)
    return x, eps, x + 0.1 * off, t, flow.interpolate(x, eps, t)


def mixture(means, std, weights=None):
    """The exact denoise(z, t) of sum_k w_k N(mean_k, std^2): posterior means of x and of eps, neither divided by t."""
    log_w = torch.log(torch.ones(len(means), **double) / len(means) if weights is None else weights)

    def denoise(z, t):
        variance = (1 - t) ** 2 * std ** 2 + t ** 2
        off = z[:, None] - (1 - t) * means                                                                # (B, K, D)
        w = (log_w - off.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        x_hat = (w * (means + (1 - t) * std ** 2 / variance * off)).sum(1)
        return x_hat, (w * t / variance * off).sum(1) - x_hat
    return denoise


def fine(denoise, z, steps=400):
    """Runge-Kutta of fourth order, equal steps: shares nothing with flow.sample."""
    v, h = lambda z, t: denoise(z, t)[1], 1 / steps
    for i in range(steps):
        t = 1 - i * h
        a = v(z, t)
        b = v(z - h / 2 * a, t - h / 2)
        c = v(z - h / 2 * b, t - h / 2)
        z = z - h / 6 * (a + 2 * b + 2 * c + v(z - h * c, t - h))
    return z


TRIANGLE = torch.tensor([[0.8, 0.0], [-0.5, 0.6], [-0.2, -0.8]], **double)


# ------------------------------------------------------------------------------------------------------------------
# Training

def test_quantiles_of_t():
    """reference values: 10^6 draws of the published scheme, which rejects where we clamp."""
    t = flow.draw_t(1_000_000, 3.0, 0.1, seeded())
    got = t.quantile(torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]))
    torch.testing.assert_close(got, torch.tensor([0.0964, 0.2913, 0.5758, 0.7371, 0.8503, 0.9400, 0.9709]), rtol=0, atol=0.003)
    assert abs(t.mean() - 0.6926) < 0.003 and abs((t < 0.05).float().mean() - 0.0050) < 0.0003
    t = flow.draw_t(1_000_000, 1.0, 0.1, seeded())
    assert abs(t.mean() - 0.4998) < 0.003 and abs(t.median() - 0.4995) < 0.003


def test_the_uniform_share_is_not_shifted():
    t = flow.draw_t(100_000, 3.0, 1.0, seeded())
    torch.testing.assert_close(t.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1009, 0.5005, 0.9001]), rtol=0, atol=0.006)
    none, some = flow.draw_t(100_000, 3.0, 0.0, seeded()), flow.draw_t(100_000, 3.0, 0.25, seeded())
    assert abs((none != some).float().mean() - 0.25) < 0.01


@pytest.mark.parametrize("shift", [1e-6, 1.0, 3.0, 1e9])
def test_t_stays_inside_and_leaves_the_generator_where_it_always_does(shift):
    g = seeded(1)
    t = flow.draw_t(10_000, shift, 0.1, g)
    assert t.dtype == torch.float32 and t.shape == (10_000,) and 1e-3 <= t.min() and t.max() < 1
    other = seeded(1)
    flow.draw_t(10_000, 3.0, 0.9, other)
    assert torch.equal(g.get_state(), other.get_state())
    assert not torch.equal(flow.draw_t(100, 3.0, 0.1, other), flow.draw_t(100, 3.0, 0.1, other))


@pytest.mark.parametrize("shape", [(3, 4, 4), (5, 12), ()])
def test_the_path_is_straight_from_image_to_noise(shape):
    x, eps, _, t, z = case(shape)
    assert torch.equal(flow.interpolate(x, eps, torch.zeros(6, **double)), x)
    assert torch.equal(flow.interpolate(x, eps, torch.ones(6, **double)), eps)
    torch.testing.assert_close((flow.interpolate(x, eps, t + 1e-3) - z) / 1e-3, eps - x, rtol=0, atol=1e-10)
    for i in range(6):
        torch.testing.assert_close(z[i], (1 - t[i]) * x[i] + t[i] * eps[i])


def test_image_velocity_and_noise_are_recovered():
    x, eps, _, t, z = case()
    v = eps - x
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    close(flow.to_v("x", x, z, t), v)
    close(flow.to_x("v", v, z, t), x)
    close(z + (1 - flow.wide(t, z)) * flow.to_v("x", x, z, t), eps)
    assert flow.to_x("x", x, z, t) is x and flow.to_v("v", v, z, t) is v
    small = torch.full((6,), 0.01, **double)                                    # below T_MIN the velocity is damped
    close(flow.to_v("x", x, flow.interpolate(x, eps, small), small), v * 0.01 / 0.05)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5, 12)])
def test_the_same_image_costs_the_same_as_x_and_as_v(shape):
    x, eps, x_hat, t, z = case(shape)
    as_x, as_v = flow.loss("x", x_hat, x, eps, t), flow.loss("v", flow.to_v("x", x_hat, z, t), x, eps, t)
    assert as_x.shape == (6,) and as_x.min() > 0
    torch.testing.assert_close(as_x, as_v, rtol=1e-10, atol=0)


def test_loss_by_definition_also_where_t_is_small():
    x, eps, x_hat, t, z = case(t=(0.001, 0.01, 0.0499, 0.0501, 0.5, 0.999))
    for i in range(6):
        assert flow.loss("x", x_hat, x, eps, t)[i].item() == pytest.approx(((x_hat[i] - x[i]) ** 2).mean().item() / max(t[i].item(), 0.05) ** 2, rel=1e-12)
        assert flow.loss("v", x_hat, x, eps, t)[i].item() == pytest.approx(((x_hat[i] - eps[i] + x[i]) ** 2).mean().item(), rel=1e-12)
    both_clamped = (flow.to_v("x", x_hat, z, t) - flow.to_v("x", x, z, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(flow.loss("x", x_hat, x, eps, t), both_clamped)


def test_tokens_cost_what_their_images_cost():
    """Patches (B, K, P) in any order hold the same numbers as the image: the mean over them is the same."""
    x, eps, x_hat, t, _ = case((3, 4, 6))
    patches = lambda a: a.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(6, 6, 12).flip(1)
    for prediction in ("x", "v"):
        tokens = flow.loss(prediction, *map(patches, (x_hat, x, eps)), t)
        torch.testing.assert_close(tokens, flow.loss(prediction, x_hat, x, eps, t), rtol=1e-12, atol=0)


def test_gradient_of_the_loss_by_hand():
    x, eps, x_hat, t, _ = case(t=(0.001, 0.01, 0.0499, 0.0501, 0.5, 0.999))
    weight = torch.tensor([1 / max(a, 0.05) ** 2 for a in t.tolist()], **double).reshape(6, 1, 1, 1)
    by_hand = {"x": weight * (x_hat - x), "v": x_hat - (eps - x)}               # of |error|^2 / n: times 2 / n
    for prediction, expected in by_hand.items():
        out = x_hat.clone().requires_grad_()
        gradient, = torch.autograd.grad(flow.loss(prediction, out, x, eps, t).sum(), out)
        torch.testing.assert_close(gradient, 2 / x[0].numel() * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_loss_is_fp32_when_the_network_is_bf16(prediction):
    x, eps, out, t, z = (a.float() for a in case())
    loss = flow.loss(prediction, out.bfloat16(), x, eps, t)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, flow.loss(prediction, out.bfloat16().float(), x, eps, t))


# ------------------------------------------------------------------------------------------------------------------
# Guidance

def linear_model(calls, prediction="x"):
    """A network whose output depends on z, t and the branch; notes what it is asked."""
    def model(z, t, branch):
        calls.append((branch, len(z), t.clone()))
        gain = torch.full_like(t, {"dense": 0.5, "routed": 0.2}.get(branch, 0.5))
        if branch == "both":
            gain[len(t) // 2:] = -0.3
        x_hat = flow.wide(gain + 0.1 * t, z) * z
        return x_hat if prediction == "x" else (z - x_hat) / flow.wide(t, z)
    return model


@pytest.mark.parametrize("guide, bad", [("cfg", -0.3), ("self", 0.2)])
def test_guidance_on_the_image_is_guidance_on_the_velocity(guide, bad):
    z = torch.randn(4, 3, 2, 2, generator=seeded(), **double)
    x_hat = (0.1 * 0.6 + bad + 2.5 * (0.5 - bad)) * z                           # bad + scale (good - bad), by hand
    for prediction in ("x", "v"):
        x, v = flow.guided(linear_model([], prediction), prediction, guide, 2.5)(z, 0.6)
        torch.testing.assert_close(x, x_hat)
        torch.testing.assert_close(v, (z - x_hat) / 0.6)


def test_no_second_pass_outside_the_interval_or_without_guidance():
    z, calls = torch.randn(4, 3, 2, 2, generator=seeded()), []
    for t in (1.0, 0.81, 0.8, 0.5, 0.2, 0.19, 0.01):
        flow.guided(linear_model(calls), "x", "cfg", 3.0, 0.2, 0.8)(z, t)
    assert [(branch, n) for branch, n, _ in calls] == [("dense", 4)] * 2 + [("both", 8)] * 3 + [("dense", 4)] * 2
    assert all(t.shape == (n,) and t.dtype == z.dtype and len(t.unique()) == 1 for _, n, t in calls)
    calls.clear()
    for guide in ("cfg", "self"):
        flow.guided(linear_model(calls), "x", guide, 1.0)(z, 0.5)
    assert [c[:2] for c in calls] == [("dense", 4)] * 2
    calls.clear()
    flow.guided(linear_model(calls), "x", "self", 3.0, 0.2, 0.8)(z, 0.5)
    assert [c[:2] for c in calls] == [("dense", 4), ("routed", 4)]
    calls.clear()
    flow.sample(flow.guided(linear_model(calls), "x", "cfg", 3.0), z, 10, 3.0, "euler")
    assert [c[:2] for c in calls] == [("both", 8)] * 10                         # t = 1 is inside the default interval


def test_outside_the_interval_it_is_the_model_itself():
    z = torch.randn(4, 3, 2, 2, generator=seeded())
    plain, inside = flow.guided(linear_model([]), "x")(z, 0.9), flow.guided(linear_model([]), "x", "cfg", 3.0, 0.0, 0.8)(z, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_a_bf16_network_is_guided_and_sampled_in_fp32():
    z = torch.randn(4, 3, 2, 2, generator=seeded())
    half = lambda z, t, branch: linear_model([])(z, t, branch).bfloat16()
    denoise = flow.guided(half, "x", "cfg", 3.0)
    cond, null = half(torch.cat([z, z]), torch.full((8,), 0.5), "both").float().chunk(2)
    assert torch.equal(denoise(z, 0.5)[0], null + 3.0 * (cond - null))
    assert all(flow.sample(denoise, z, 3, 1.0, s).dtype == torch.float32 for s in SAMPLERS)


# ------------------------------------------------------------------------------------------------------------------
# Sampling

def test_sigmas():
    s = flow.sigmas(28, 3.0)
    assert len(s) == 29 and s[0] == 1 and s[-1] == 0 and all(a > b for a, b in zip(s, s[1:]))
    assert [round(a, 4) for a in s[1:3]] == [0.9878, 0.975] and [round(a, 4) for a in s[-4:-1]] == [0.2647, 0.1875, 0.1]
    assert round(flow.sigmas(50, 3.0)[-2], 4) == 0.0577
    assert flow.sigmas(4, 1.0) == [1, 0.75, 0.5, 0.25, 0] and flow.sigmas(1, 3.0) == [1, 0]


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 3.0), (7, 3.0), (100, 1.0)])
def test_a_point_mass_is_reached_on_a_straight_line(prediction, sampler, steps, shift):
    """Every z that the network is shown lies on the line, also at t below T_MIN (last of the cases)."""
    eps, x = torch.randn(2, 4, 3, 2, 2, generator=seeded(), **double)
    seen = []

    def model(z, t, branch):
        seen.append((z, t))
        return x if prediction == "x" else (z - x) / flow.wide(t, z)
    out = flow.sample(flow.guided(model, prediction), eps, steps, shift, sampler)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-10)
    for z, t in seen:
        torch.testing.assert_close(z, flow.interpolate(x, eps, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler, order", [("euler", 1.0), ("heun", 2.0), ("multistep", 1.87)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_accuracy(sampler, order, shift):
    """Multistep: x_hat linear in t errs by h^2 log(1/h), because its error per step is relative to t, so that the slope
    on paper lies below 2; with the logarithm divided out it is 2."""
    denoise, z = mixture(TRIANGLE, 0.8), torch.randn(64, 2, generator=seeded(), **double)
    exact = fine(denoise, z)
    error = [(flow.sample(denoise, z, n, shift, sampler) - exact).square().mean().sqrt().item() for n in (200, 400, 800)]
    slopes = [math.log2(a / b) for a, b in zip(error, error[1:])]
    assert error[0] < 0.01 and all(abs(slope - order) < (0.12 if sampler == "multistep" else 0.05) for slope in slopes), (error, slopes)
    if sampler == "multistep":
        assert slopes[1] > slopes[0] and abs(slopes[1] + math.log2(math.log(800) / math.log(400)) - 2) < 0.12, slopes


@pytest.mark.parametrize("sampler, most", [("euler", 0.03), ("heun", 0.005), ("multistep", 0.002)])
def test_a_gaussian_is_stretched_exactly(sampler, most):
    """Along the flow of N(m, s^2) a point keeps its quantile: z(0) = m + s z(1). Heun gets as many calls as the others."""
    mean, std = torch.tensor([[0.5, -0.3]], **double), 0.5
    z = torch.randn(200, 2, generator=seeded(), **double)
    out = flow.sample(mixture(mean, std), z, 30 // (2 if sampler == "heun" else 1), 1.0, sampler)
    assert (out - (mean + std * z)).square().mean().sqrt() < most


@pytest.mark.parametrize("sampler, steps", [("euler", 200), ("heun", 100), ("multistep", 100)])
def test_samples_follow_the_mixture(sampler, steps):
    """Kolmogorov-Smirnov distance to the mixture's distribution function, 1% level of 20,000 samples plus discretisation."""
    means, std, weights = torch.tensor([[-0.9], [0.1], [0.8]], **double), 0.15, torch.tensor([0.5, 0.2, 0.3], **double)
    z = torch.randn(20_000, 1, generator=seeded(), **double)
    out = flow.sample(mixture(means, std, weights), z, steps, 3.0, sampler).flatten().sort().values
    cdf = (weights * torch.distributions.Normal(means.T, std).cdf(out[:, None])).sum(1)
    distance = (cdf - (torch.arange(20_000) + 0.5) / 20_000).abs().max().item()
    assert distance < 1.63 / 20_000 ** 0.5 + 0.002, distance


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_part_of_a_mixture_in_the_plane_gets_its_share(sampler):
    """Parts 8 and more deviations apart, so that the nearest mean tells whose a sample is; bounds: 4 standard errors and discretisation."""
    std, weights, n = 0.15, torch.tensor([0.5, 0.2, 0.3], **double), 5_000
    z = torch.randn(n, 2, generator=seeded(), **double)
    out = flow.sample(mixture(TRIANGLE, std, weights), z, 200, 3.0, sampler)
    part = torch.cdist(out, TRIANGLE).argmin(1)
    for k, weight in enumerate(weights.tolist()):
        mine = out[part == k]
        assert abs(len(mine) / n - weight) < 4 * (weight * (1 - weight) / n) ** 0.5 + 0.003
        assert abs(mine.mean(0) - TRIANGLE[k]).max() < 4 * std / (weight * n) ** 0.5 + 0.005
        covariance = mine.T.cov() / std ** 2                                    # the identity, if it is right
        assert abs(covariance - torch.eye(2, **double)).max() < 4 * (2 / (weight * n)) ** 0.5 + 0.03, covariance


def test_multistep_is_the_best_of_them_at_thirty_calls():
    denoise, z = mixture(TRIANGLE, 0.3), torch.randn(64, 2, generator=seeded(), **double)
    exact = fine(denoise, z)
    error = {s: (flow.sample(denoise, z, n, 3.0, s) - exact).square().mean().sqrt() for s, n in (("euler", 30), ("heun", 15), ("multistep", 30))}
    assert error["multistep"] < 0.7 * error["euler"] and error["multistep"] < 0.7 * error["heun"], error


@pytest.mark.parametrize("sampler, calls", [("euler", 9), ("heun", 17), ("multistep", 9)])
def test_calls_progress_and_the_last_step(sampler, calls):
    asked, ticks, z = [], [], torch.randn(5, 2, generator=seeded(), **double)
    denoise, start = mixture(TRIANGLE, 0.5), z.clone()

    def watched(z, t):
        asked.append((t, denoise(z, t)))
        return asked[-1][1]
    out = flow.sample(watched, z, 9, 3.0, sampler, lambda: ticks.append(len(asked)))
    assert len(asked) == calls and len(ticks) == 9 and ticks[-1] == calls
    assert asked[-1][0] == flow.sigmas(9, 3.0)[-2] and torch.equal(out, asked[-1][1][0])
    assert torch.equal(z, start)                                                # the caller's noise is left alone


def test_an_unknown_sampler_is_refused():
    with pytest.raises(AssertionError, match="dpm"):
        flow.sample(mixture(TRIANGLE, 0.5), torch.zeros(1, 2), 2, 1.0, "dpm")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_7_is_the_same_in_any_batch(sampler):
    model = lambda z, t, branch: torch.tanh(z) * flow.wide(0.5 + t, z)          # elementwise: exactly batch-free itself
    draw = lambda seeds: flow.sample(flow.guided(model, "x", "cfg", 2.0), flow.noise(seeds, (3, 4, 4)), 5, 3.0, sampler)
    eight, alone, shuffled = draw(range(8)), draw([7]), draw([7, 3])
    assert torch.equal(eight[7], alone[0]) and torch.equal(eight[7], shuffled[0]) and torch.equal(eight[3], shuffled[1])
    assert not torch.equal(eight[7], eight[3])


def test_noise_is_standard_normal_fp32():
    z = flow.noise(range(50), (3, 32, 32))
    assert z.shape == (50, 3, 32, 32) and z.dtype == torch.float32
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs(torch.corrcoef(z.flatten(1)).fill_diagonal_(0)).max() < 0.1      # one seed's image says nothing of the next's


def test_the_global_generator_is_neither_read_nor_moved():
    def everything():
        z = flow.noise([1, 2], (2,)).double()
        return torch.cat([flow.draw_t(8, 3.0, 0.1, seeded()).double(), *(flow.sample(mixture(TRIANGLE, 0.5), z, 4, 3.0, s).flatten() for s in SAMPLERS)])
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), everything()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(everything(), first)
