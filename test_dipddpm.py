"""Tests of dipddpm.py against closed forms, golden numbers and other libraries.

    python -m pytest -q               all but the long ones
    python -m pytest -q -m fuzz       random flags, several processes, longer fits: two minutes
    python -m pytest -q -m bench -s   the time of a step, against a matrix product's
"""
import ast
import copy
import csv
import inspect
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageSequence
from torch import nn

import dipddpm as D

torch.set_num_threads(1)       # quick also beside other jobs; the tensors are tiny
NOISY = D.Task("denoise", sigma=0.2)
SHORT = ["--iters", 6, "--rungs", 3, "--nets", 1]
TINY = [*SHORT, "--width", 4, "--depth", 2]
JOINED = [*TINY, "--nets", 2]       # two networks: a DDPM that is fitted to the photo, and a DIP

@pytest.fixture(autouse=True)
def photos_large_enough_to_fit_a_ddpm_to(monkeypatch):
    """The photos of most tests are tiny; `sample` would else take --method primed for them."""
    monkeypatch.setattr(D, "FITTED_PIXELS", 0)

BRIEF = ["--dips", 0, "--steps", 3, "--batch", 2, "--patch", 16, "--width", 8]

def run(*argv):
    """main() in-process; the exit code, also of SystemExit."""
    try:
        return D.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code

def one_line(capsys, *words):
    """What was said on stderr: one line that names each of words."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    return err

def smooth_image(n=16, channels=3):
    u = torch.linspace(-1, 1, n)
    waves = [torch.sin((2 + c) * u)[:, None] * torch.cos((3 - c) * u)[None] for c in range(channels)]
    return torch.stack(waves)[None] * 0.8

def with_noise(x, sigma=0.2):
    return x + sigma * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))

def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

def read_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))

def interrupt(*args, **settings):
    raise KeyboardInterrupt

def interrupt_at(count, function, action=interrupt):
    """The function, but its count-th call is a Ctrl-C, or another action."""
    calls = itertools.count(1)
    def wrapped(*args, **settings):
        if next(calls) == count:
            action()
        return function(*args, **settings)
    return wrapped

@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    D.to_image(smooth_image()).save(path)
    return path

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with one photo to train on."""
    folder = tmp_path_factory.mktemp("data")
    D.to_image(smooth_image(40)).save(folder / "a.png")
    return folder

@pytest.fixture(scope="session")
def priors(tmp_path_factory, data):
    """Tiny checkpoints of both kinds, colour, and one for grey images."""
    out = tmp_path_factory.mktemp("priors")
    np.save(out / "grey.npy", np.random.default_rng(0).integers(0, 255, (6, 16, 16), np.uint8))
    assert run("train", *BRIEF, "--data", data, "--out", out) == 0
    assert run("train", *BRIEF, "--data", data, "--out", out, "--prior", "dip") == 0
    assert run("train", *BRIEF, "--data", out / "grey.npy", "--out", out / "grey") == 0
    return out

with warnings.catch_warnings():
    warnings.simplefilter("ignore")                         # markers without a configuration file
    fuzz = pytest.mark.fuzz
    bench = pytest.mark.bench

@pytest.fixture(autouse=True)
def long_tests_run_when_asked(request):
    for name in ("fuzz", "bench"):
        if request.node.get_closest_marker(name) and request.config.getoption("-m") != name:
            pytest.skip(f"long; run with -m {name}")

# ---- 1. the diffusion process

@pytest.mark.parametrize("kind, golden", [
    ("linear", {1: 0.9999, 100: 0.8970181457, 500: 0.07858724288, 1000: 4.035829765e-05}),
    ("cosine", {1: 0.9999587158, 500: 0.4938435904})])
def test_golden_abar(kind, golden):
    schedule = D.NoiseSchedule(1000, kind)
    assert len(schedule.betas) == len(schedule.abar) == 1001
    assert schedule.betas[0] == 0 and schedule.abar[0] == 1
    for t, value in golden.items():
        assert schedule.abar[t].item() == pytest.approx(value, rel=1e-9)
    with pytest.raises(ValueError):
        D.NoiseSchedule(10, "quadratic")

def ancestral_step(schedule, x0, xt, t, z):
    """x_{t-1} ~ q(x_{t-1} | x_t, x0) by Bayes' rule: the prior N(sqrt(prev) x0, 1 - prev) times the
    likelihood N(x_t; sqrt(1 - beta) x_{t-1}, beta)."""
    beta, prev = schedule.betas[t].item(), schedule.abar[t - 1].item()
    if prev == 1:
        return x0
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (math.sqrt(1 - beta) / beta * xt + math.sqrt(prev) / (1 - prev) * x0) / precision
    return mean + math.sqrt(1 / precision) * z

class GaussianEps(nn.Module):
    """The exact eps*(x_t, t) when the data are N(m, s^2)."""

    def __init__(self, schedule, m, s):
        super().__init__()
        self.abar, self.m, self.s = schedule.abar.float(), m, s

    def forward(self, x, t):
        a = self.abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * self.m) / (a * self.s ** 2 + 1 - a)

@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ancestral_sampling_draws_from_the_posterior(kind):
    schedule = D.NoiseSchedule(50, kind)
    model = GaussianEps(schedule, 0.1, 0.5)
    xt = x = D.noise_like(torch.empty(1, 1, 8, 8), [D.stream(8, D.SAMPLE)])
    got = D.p_sample_loop(model, schedule, xt, 50, [D.stream(7, D.SAMPLE)])
    gens = [D.stream(7, D.SAMPLE)]
    for t in range(50, 0, -1):
        at = torch.tensor([t])
        x0 = D.predict_x0(schedule, x, at, model(x, at))
        x = ancestral_step(schedule, x0, x, t, D.noise_like(x, gens) if t > 1 else 0)
    assert torch.allclose(got, x, atol=1e-4)

def test_predict_x0_inverts_q_sample_for_every_t():
    schedule, t = D.NoiseSchedule(), torch.arange(1, 1001)
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 1, 2, 2, generator=gen)
    back = D.predict_x0(schedule, D.q_sample(schedule, x0, t, eps), t, eps)
    assert (back - x0).abs().max() < 1e-3

@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_chain_of_single_steps_equals_q_sample(kind):
    schedule, mean, var = D.NoiseSchedule(1000, kind), 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t in range(1, 1001):
        beta = schedule.betas[t].item()
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta
        if t < 4 or t % 37 == 0:
            at = torch.tensor([t])
            got = D.q_sample(schedule, one, at, zero).item()
            assert got == pytest.approx(mean, rel=1e-4, abs=1e-7)
            assert D.q_sample(schedule, zero, at, one).item() == pytest.approx(math.sqrt(var), rel=1e-5)

def test_the_start_rule_gives_the_smallest_t():
    schedule = D.NoiseSchedule()
    for sigma in (0.011, 0.1, 0.5, 3.0):
        t = schedule.start_t(sigma ** 2)
        assert schedule.sigma[t] >= sigma > schedule.sigma[t - 1]
    assert schedule.start_t(0.0) == 1 and schedule.start_t(-1.0) == 1
    assert schedule.start_t(1e9) == 1000

@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samplers_reproduce_gaussian_data(kind, sampler):
    schedule, m, std, n = D.NoiseSchedule(400, kind), 0.4, 0.3, 64 * 64
    model, gens = GaussianEps(schedule, m, std), [D.stream(1, D.SAMPLE)]
    xt = D.noise_like(torch.empty(1, 1, 64, 64), gens)
    if sampler == "ancestral":
        x = D.p_sample_loop(model, schedule, xt, 400, gens)
    else:
        x = D.ddim_sample(model, schedule, xt, 400, 400, gens)
    assert x.mean().item() == pytest.approx(m, abs=4 * std / math.sqrt(n) + 1e-3)
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.015)

def test_last_step_is_deterministic_and_start_index_is_exact():
    schedule = D.NoiseSchedule(100)
    model, xt = GaussianEps(schedule, 0.0, 0.5), torch.randn(1, 1, 4, 4)
    want = D.predict_x0(schedule, xt, torch.tensor([1]), model(xt, torch.tensor([1])))
    for seed in (0, 1):
        gens = [D.stream(seed, D.SAMPLE)]
        assert torch.allclose(D.p_sample_loop(model, schedule, xt, 1, gens), want, atol=1e-6)
        assert torch.allclose(D.ddim_sample(model, schedule, xt, 1, 5, gens, eta=1.0), want, atol=1e-6)
    seen = []

    def spy(x, t):
        seen.append(int(t[0]))
        return model(x, t)

    D.ddim_sample(spy, schedule, xt, 50, 5, [D.stream(0, D.SAMPLE)])
    assert seen == [50, 40, 30, 20, 10]

# ---- 2. the networks

@pytest.mark.parametrize("size", [(1, 1), (15, 17), (33, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_any_size(size, channels):
    x = torch.randn(2, channels, *size)
    assert D.UNet(channels, width=8)(x, torch.tensor([1, 2])).shape == x.shape
    out = D.SkipNet(channels, channels, width=8)(x)
    assert out.shape == x.shape and out.abs().max() <= 1

def shaken(net):
    """Weights away from zero and from their start, in every layer."""
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()

def test_unet_treats_every_place_alike_and_sees_t():
    """No normalisation: the middle of a picture does not depend on what is far away from it."""
    torch.manual_seed(0)
    net = shaken(D.UNet(width=8, mults=(1, 1)))
    x, t = torch.randn(1, 3, 96, 96), torch.tensor([5])
    other = x.clone()
    other[..., 80:] += 3
    a, b = net(x, t), net(other, t)
    assert torch.equal(a[..., :30], b[..., :30]) and (a - b).abs().max() > 0.01
    assert (net(x, t) - net(x, t + 100)).abs().max() > 1e-4

def silent_unet(channels=3):
    """A network whose correction is 0: what it says is the line that it corrects."""
    net = D.UNet(channels, width=8).eval()
    nn.init.zeros_(net.out.bias)
    return net

@pytest.mark.parametrize("t", [1, 60, 172, 1000])
def test_before_it_learns_the_network_is_the_posterior_mean_of_gaussian_images(t):
    """x ~ N(guess, s^2) and x_t / sqrt(abar) = x + sigma_t eps: E[x | x_t] by Bayes' rule, from the
    joint covariance; s is that of an interpolation (0.15), less where y knows a share of the pixel,
    or of pixels (0.5) where nothing is told."""
    torch.manual_seed(t)
    schedule = D.NoiseSchedule()
    abar = schedule.abar[t].item()
    xt, guess = 2 * torch.rand(1, 3, 6, 6) - 1, torch.rand(1, 3, 6, 6)
    share = torch.rand(1, 1, 6, 6)
    share[..., 0] = 1.0                                                 # known pixels
    tolerance = {1: 5e-4, 1000: 1e-3}.get(t, 1e-5)                      # float32 of z and eps
    for s, mean, x in ((0.5, 0 * guess, xt), (0.15 * (1 - share).sqrt(), guess, torch.cat([xt, guess, share], 1))):
        var = abar * s ** 2 + 1 - abar                                  # of x_t
        want = mean + math.sqrt(abar) * s ** 2 / var * (xt - math.sqrt(abar) * mean)
        at = torch.tensor([t])
        got = D.predict_x0(schedule, xt, at, silent_unet()(x, at))
        assert torch.allclose(got, want, atol=tolerance)
    assert torch.allclose(got[..., 0], guess[..., 0], atol=tolerance)

def test_the_clue_is_heard_and_its_absence_is_zeros():
    torch.manual_seed(0)
    net, t = shaken(D.UNet(width=8)), torch.tensor([100, 7])
    xt, clue = torch.randn(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    assert torch.equal(net(xt, t), net(torch.cat([xt, 0 * clue], 1), t))
    assert net(torch.cat([xt, clue], 1), t).shape == xt.shape
    for part in (slice(3, 6), slice(6, 7)):                 # the hourglass sees guess and share
        seen = torch.cat([xt, clue], 1)
        other = seen.clone()
        other[:, part] += 0.5
        assert (net.correction(seen, t) - net.correction(other, t)).abs().max() > 1e-3
    for channels in (1, 5, 9):
        with pytest.raises(RuntimeError):
            net(torch.randn(2, channels, 16, 16), t)

def test_a_tile_inside_a_hole_is_still_told():
    torch.manual_seed(0)
    task, x, t = D.Task("t", mask=torch.ones(1, 1, 200, 200)), torch.rand(1, 3, 200, 200), torch.tensor([172])
    task.mask[..., 20:, 20:] = 0
    seen = torch.cat([torch.randn(1, 3, 200, 200), task.clue(task.forward(x), 3)], 1)
    net = shaken(D.UNet(width=8))
    whole = net(seen, t).detach()
    assert (D.tiled(net, seen, t, side=64) - whole).abs().max() < 1e-4 * whole.abs().max()

@pytest.mark.parametrize("size", [(200, 330), (65, 300), (64, 64)])
def test_tiles_have_no_seams(size):
    """In tiles or at once, the same picture: each tile sees all that its pixels depend on."""
    torch.manual_seed(0)
    x, t = torch.randn(1, 3, *size), torch.tensor([7])
    for net in (shaken(D.SkipNet(width=4, skip=2)), shaken(D.UNet(width=8))):
        whole = net(x, t).detach()
        assert (D.tiled(net, x, t, side=64) - whole).abs().max() < 1e-4 * whole.abs().max()
        if size[1] > 300:                                   # a margin that is too small does show
            assert (D.tiled(net, x, t, side=64, margin=0) - whole).abs().max() > 1e-3 * whole.abs().max()

def test_no_network_looks_beyond_the_margin_of_a_tile():
    """Where no weight cancels another, a gradient shows each pixel that an output depends on."""
    margin, farthest = inspect.signature(D.tiled).parameters["margin"].default, []
    assert margin % 32 == 0                     # of the deepest network: its grids lie alike in each tile
    for net, more in ((D.SkipNet(width=2, skip=2), ()), (D.SkipNet(width=2, depth=5, skip=2), ()),
                      (D.UNet(width=8), (torch.tensor([7]),))):
        for p in net.parameters():
            p.data.fill_(1 / p[0].numel())
        x = torch.rand(1, 3, 64, 576).requires_grad_()
        output = net.eval()(x, *more)
        distances = []
        for place in range(256, 288):
            gradient, = torch.autograd.grad(output[..., place].sum(), x, retain_graph=True)
            columns = gradient.abs().amax(dim=(0, 1, 2)).nonzero()
            distances += [place - columns.min().item(), columns.max().item() - place]
        farthest.append(max(distances))
    assert max(farthest) <= margin and farthest[1] > 96

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_that_skips_times_has_the_right_covariance(eta):
    """Data that are all 0: x_t has the variance 1 - abar_t, and what a step keeps of it is known."""
    schedule, seen = D.NoiseSchedule(), []
    model = GaussianEps(schedule, 0.0, 0.0)
    now, then = schedule.abar[600].item(), schedule.abar[400].item()
    xt = math.sqrt(1 - now) * torch.randn(1, 1, 128, 128, generator=D.stream(0, D.FIT))
    watched = lambda x, t: seen.append(x) or model(x, t)
    D.ddim_sample(watched, schedule, xt, 600, 3, [D.stream(0, D.SAMPLE)], eta)
    v2 = eta ** 2 * (1 - then) / (1 - now) * (1 - now / then)
    assert seen[1].var().item() == pytest.approx(1 - then, abs=0.02)
    shared = (seen[0] * seen[1]).mean().item()
    assert shared == pytest.approx(math.sqrt((1 - then - v2) * (1 - now)), abs=0.02)

def test_every_skip_connection_is_used():
    dip, unet = D.SkipNet(width=8), shaken(D.UNet(width=8))
    dip(torch.randn(1, 3, 32, 32)).sum().backward()
    unet(torch.randn(1, 3, 32, 32), torch.tensor([9])).sum().backward()
    assert all(skip[0].weight.grad.abs().max() > 0 for skip in dip.skip)
    cuts = (24, 16, 8)                          # the last channels of a block's input are the skip's
    assert all(block.conv1.weight.grad[:, -cut:].abs().max() > 0 for block, cut in zip(unet.dec, cuts))

# ---- 3. the observation

def tasks():
    gen = torch.Generator().manual_seed(3)
    mask = (torch.rand(1, 1, 12, 12, generator=gen) < 0.4).float()
    small = (torch.rand(1, 1, 3, 3, generator=gen) < 0.6).float()
    return [D.Task("denoise", sigma=0.1), D.Task("inpaint", mask=mask), D.Task("sr", scale=4),
            D.Task("sr with holes", scale=4, mask=small)]

HOLES = tasks()[1]

@pytest.mark.parametrize("task", tasks(), ids=lambda t: t.name)
def test_operators(task):
    gen = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, 3, 12, 12, generator=gen, dtype=torch.float64)
    y = task.forward(other)
    assert torch.allclose(task.forward(task.pinv(y)), y)                       # A A^+ = I
    adjoint = task.pinv(y) / task.scale ** 2                                   # A^+ = s^2 A'
    assert (task.forward(x) * y).sum().item() == pytest.approx((x * adjoint).sum().item())
    error = (task.forward(x) - y)[task.forward(torch.ones_like(x)) > 0]        # of known pixels
    assert task.mse(x, y).item() == pytest.approx((error ** 2).mean().item())
    assert torch.allclose(task.forward(task.project(x, y)), y)
    assert torch.equal(task.keep_known(x, y), x if task.sigma else task.project(x, y))
    guess = task.interpolate(y.float())
    assert task.forward(guess).shape == y.shape and torch.isfinite(guess).all()
    if task.name in ("inpaint", "sr"):                                        # consistent with y
        assert torch.allclose(task.forward(guess), y.float(), atol=1e-6)

@pytest.mark.parametrize("task", tasks(), ids=lambda t: t.name)
def test_a_clue_is_the_guess_and_what_y_knows_of_each_pixel(task):
    """The share is the diagonal of A^+ A: pixel after pixel by the operators themselves."""
    x, dip = torch.rand(2, 1, 1, 12, 12)
    y = task.forward(x)
    clue = task.clue(y, 3)
    assert torch.equal(clue[:, :3], task.interpolate(y).expand(-1, 3, -1, -1))
    assert torch.equal(task.clue(y, 3, dip)[:, :3], dip.expand(-1, 3, -1, -1))
    basis = torch.eye(144).view(144, 1, 12, 12)
    diagonal = task.pinv(task.forward(basis)).view(144, 144).diagonal()
    assert torch.allclose(clue[0, 3].flatten(), diagonal)

@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_random_clues_tell_nothing_the_means_of_blocks_or_the_pixels_around_holes(batch):
    x0, gen = torch.rand(batch, 3, 24, 24), D.stream(0, D.TRAIN)
    kinds, missing = set(), []
    for _ in range(40):
        clues = D.random_clues(x0, gen)
        assert clues.shape == (batch, 4, 24, 24)
        for x, clue in zip(x0, clues):
            guess, share = clue[:3], clue[3]
            levels = set(share.unique().tolist())
            if levels == {0.0}:
                kinds.add("nothing")
                assert (guess == 0).all()
            elif levels <= {0.0, 1.0}:
                kinds.add("holes")
                missing.append(1 - share.mean().item())
                assert torch.equal(guess[:, share > 0], x[:, share > 0])
            else:
                scale = round(levels.pop() ** -0.5)
                kinds.add("blocks")
                assert torch.allclose(F.avg_pool2d(guess, scale), F.avg_pool2d(x, scale), atol=1e-5)
    assert len(kinds) == 3 and min(missing) < 0.2 and max(missing) > 0.8

@pytest.mark.parametrize("name", ["superres:4", "inpaint:0.8"])
def test_a_ddpm_of_one_task_is_told_that_task_of_every_image(name):
    x0, gen = torch.rand(12, 3, 24, 24), D.stream(0, D.TRAIN)
    told = torch.cat([D.random_clues(x0, gen, name) for _ in range(20)])
    if name == "superres:4":
        assert (told[:, 3] == 1 / 16).all()
        task = D.Task(name, scale=4)
        seen = torch.cat([task.clue(task.forward(v[None]), 3) for v in x0])
        assert all((clue == seen).all(dim=(1, 2, 3)).any() for clue in told)
    else:
        assert set(told[:, 3].unique().tolist()) == {0.0, 1.0}
        assert told[:, 3].mean().item() == pytest.approx(0.2, abs=0.01)
        assert len(torch.unique(told[:, 3], dim=0)) > 60        # another mask each time

def test_estimate_sigma():
    gen = torch.Generator().manual_seed(0)
    stripes = 0.5 * torch.sin(torch.arange(128.0)).expand(1, 3, 128, 128)     # a texture all over
    for sigma, x in itertools.product((0.05, 0.2, 0.5), (smooth_image(128), stripes)):
        y = x + sigma * torch.randn(1, 3, 128, 128, generator=gen)
        assert D.estimate_sigma(y) == pytest.approx(sigma, rel=0.04)
        assert D.estimate_sigma(y[:, :1]) == pytest.approx(sigma, rel=0.04)
    assert D.estimate_sigma(torch.zeros(1, 3, 1, 1)) == 0                   # nothing to tell it by
    assert D.estimate_sigma(torch.zeros(1, 1, 1, 60)) == 0                  # patches of one pixel

def blurred_noise(shape, sigma, seed=0):
    """Noise of level sigma with a known correlation of neighbours, 2/3 along a row or a column."""
    white = torch.randn((*shape[:2], shape[2] + 2, shape[3] + 2), generator=D.stream(seed, D.OBSERVE))
    kernel = torch.tensor([0.5, 1.0, 0.5])
    kernel = (kernel[:, None] * kernel[None]).expand(shape[1], 1, 3, 3)
    return sigma / 1.5 * F.conv2d(white, kernel, groups=shape[1])

def test_find_noise_tells_white_from_correlated():
    x = smooth_image(128)
    noise = D.find_noise(with_noise(x, 0.1))
    assert noise.white and noise.level == pytest.approx(0.1, rel=0.04)
    assert noise.neighbour == pytest.approx(0, abs=0.08)
    noise = D.find_noise(x + blurred_noise(x.shape, 0.1))
    assert not noise.white and noise.level == pytest.approx(0.1, rel=0.15)
    assert noise.neighbour == pytest.approx(2 / 3, abs=0.12)
    floored = D.find_noise(x + blurred_noise(x.shape, 0.1), floor=0.3)
    assert floored.level == noise.level and floored.strength() == 0.3
    assert floored.level_at(x).min() >= 0.3 and floored.level_at(x).max() <= 0.6
    dark, middle, bright = D.find_noise(x + (0.1 + 0.05 * x) * torch.randn(x.shape)).thirds
    assert dark < middle < bright

@pytest.mark.parametrize("side, white", [(1, True), (2, False), (3, False)])
@pytest.mark.parametrize("level", [7, 25])
def test_the_noise_of_averaged_pixels_is_not_white(level, side, white):
    """A photo has some noise that looks white; means of white noise must not be taken for it."""
    for name in ("rocket", "coffee"):
        x = D.centre(D.load_image(os.path.join(D.PHOTOS, "test", f"{name}.png")), [96, 96])
        eps = torch.randn((1, 3, 95 + side, 95 + side), generator=D.stream(0, D.OBSERVE))
        y = x + level / 127.5 * side * F.avg_pool2d(eps, side, stride=1)
        noise = D.find_noise((y * 127.5).round() / 127.5)
        assert noise.white == white
        assert noise.level * 127.5 == pytest.approx(level, rel=0.35)

def test_a_draw_of_noise_has_the_level_and_the_covariance_of_its_patches():
    patches = torch.zeros(2, 3, 4, 4)
    patches[0, :, 1, 1:3] = 1.0                     # neighbours in a row: correlation 1/2
    patches[1, :2] = -patches[0, :2]                # two channels go together, the third half the way
    noise = D.Noise(0.2, [0.2] * 3, [-0.5, 0.0, 0.5], 0.5, False, patches)
    w = noise.draw(torch.empty(1, 3, 200, 200), D.stream(0, D.FIT))[0]
    assert w.shape == (3, 200, 200) and w.mean().item() == pytest.approx(0, abs=0.01)
    assert (w ** 2).mean().sqrt().item() == pytest.approx(0.2, rel=0.02)
    unit = w / (w ** 2).mean(dim=(1, 2), keepdim=True).sqrt()
    assert (unit[..., 1:] * unit[..., :-1]).mean().item() == pytest.approx(0.5, abs=0.02)
    assert (unit[:, 1:] * unit[:, :-1]).mean().item() == pytest.approx(0, abs=0.02)
    assert (unit[0] * unit[1]).mean().item() == pytest.approx(1, abs=0.02)
    assert (unit[0] * unit[2]).mean().item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    white = replace(noise, white=True).draw(w[None], D.stream(0, D.FIT))
    assert white.std().item() == pytest.approx(0.2, rel=0.02)
    assert (white[..., 1:] * white[..., :-1]).mean().item() == pytest.approx(0, abs=0.001)

def test_risk_is_unbiased_for_correlated_noise():
    """Theorem 4 for a covariance: the mean of R over draws of all noise is the squared error."""
    x = smooth_image(32)
    task = D.Task("denoise", sigma=0.9)             # the ladder's level has no part in it
    risks, gen = [], D.stream(1, D.FIT)
    patches = blurred_noise((1, 3, 64, 64), 1.0, 9)[..., 4:20, 4:20]
    source = D.Noise(0.2, [0.2] * 3, [-0.5, 0.0, 0.5], 0.6, False, patches)
    for seed in range(150):
        y = x + source.draw(x, D.stream(seed, D.OBSERVE))
        seen, _, judge = D.hold_out(y, replace(task, noise=source), gen)
        xhat = 0.8 * seen                           # an estimate that lets some of the noise through
        error = ((xhat - x) ** 2).mean().item()
        risks.append(judge(xhat) - error)
    spread = np.std(risks) / math.sqrt(len(risks))
    assert abs(np.mean(risks)) < 4 * spread and spread < 0.01

def test_give_back():
    y = smooth_image(32)
    assert torch.allclose(D.give_back(y * 0.5, y, D.Noise(0.0)), y)                           # no noise: the photo
    assert torch.equal(D.give_back(y, y, D.Noise(0.1)), y)
    xhat = y + 0.1                                  # the removed part is 0.1 everywhere
    assert torch.equal(D.give_back(xhat, y, D.Noise(0.1)), xhat)                              # as strong as the noise
    want = xhat - 0.1 * (1 - 1.3 * 0.05 ** 2 / 0.1 ** 2)
    assert torch.allclose(D.give_back(xhat, y, D.Noise(0.05)), want, atol=1e-6)
    texture = torch.zeros(1, 3, 64, 64)
    texture[..., ::2, 40:] = 0.8                    # detail that a fit has lost, in one place
    y = texture + 0.05 * torch.randn(texture.shape, generator=D.stream(0, D.FIT))
    got = D.give_back(torch.zeros_like(y), y, D.Noise(0.05))
    assert ((got - texture)[..., 48:] ** 2).mean() < 0.05 ** 2 * 1.01
    assert ((got - texture)[..., :32] ** 2).mean() < 0.05 ** 2 * 0.1

def test_detail_comes_back_where_the_noise_was_found():
    y = with_noise(smooth_image(12))
    plain = list(D.fit_dip(y, NOISY, **SMALL))[-1].answer
    noise = D.Noise(0.2, [0.2] * 3, [-0.5, 0.0, 0.5], 0.0, True, torch.ones(1, 3, 4, 4))
    found = list(D.fit_dip(y, replace(NOISY, noise=noise), **SMALL))[-1].answer
    assert torch.equal(found, D.give_back(plain, y, D.Noise(0.2)))
    assert not torch.allclose(found, plain, atol=1e-3)

def test_the_level_follows_the_brightness():
    noise = D.Noise(0.1, [0.1, 0.15, 0.9], [-0.5, 0.0, 0.5], 0.6, False, torch.ones(1, 3, 4, 4))
    light = torch.tensor([-0.9, -0.5, -0.25, 0.0, 0.25, 0.9]).view(1, 1, 1, 6)
    got = noise.level_at(light.expand(1, 3, -1, -1)).flatten().tolist()
    assert got == pytest.approx([0.1, 0.1, 0.125, 0.15, 0.175, 0.2])            # 0.9 counts as 0.2
    assert replace(noise, white=True).level_at(light).item() == pytest.approx(0.1)

def test_settings_where_the_noise_is_not_white():
    noise = D.Noise(0.1, [0.1] * 3, [-0.5, 0.0, 0.5], 0.6, False, torch.ones(1, 3, 4, 4))
    y = torch.zeros(1, 3, 64, 64)
    o = D.complete(D.Settings(), D.Task("denoise", sigma=0.1, noise=noise), y)
    assert (o.high, o.low, o.tail) == (6.0, 2.0, 0.25)
    noise = replace(noise, white=True)
    assert D.complete(D.Settings(), D.Task("denoise", sigma=0.1, noise=noise), y).low == 0.4

@pytest.mark.parametrize("source", ["fit", "hold out"])
def test_conjugate_pair_is_uncorrelated(source):
    """Over many draws of the noise: cov(z1, z2 | x) = 0, and the variances are as stated."""
    n, sigma, a, gen = 40000, 0.3, 0.5, torch.Generator().manual_seed(0)
    x = torch.full((1, 1, n, 1), 0.2)
    y, task = x + sigma * torch.randn(x.shape, generator=gen), D.Task("denoise", sigma=sigma)
    if source == "fit":
        w = sigma * torch.randn(y.shape, generator=gen)
        o = D.Settings(input="observed", target="conjugate")
        z1, level = D.noisy_input(o, y, a, w, sigma)
        z2 = D.noisy_target(o, y, a, w, task)
    else:
        z1, seen_task, judge = D.hold_out(y, task, gen, a)
        _, z2, _ = judge.args
        level = seen_task.sigma
    assert level == pytest.approx(sigma * math.sqrt(1 + a * a))
    e1, e2 = (z1 - x).flatten(), (z2 - x).flatten()
    s2 = sigma * math.sqrt(1 + 1 / a ** 2)
    assert abs((e1 * e2).mean()) < 4 * level * s2 / math.sqrt(n)
    assert e1.std().item() == pytest.approx(level, rel=0.02)
    assert e2.std().item() == pytest.approx(s2, rel=0.02)

def test_what_the_methods_see_and_aim_at():
    y, w, z = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.3), torch.zeros(1, 1, 1, 1)
    value = {target: D.noisy_target(D.Settings(target=target), y, 2.0, w, NOISY).item()
             for target in ("conjugate", "plain", "noisy")}
    assert value == pytest.approx(dict(conjugate=0.5 - 0.3 / 2, plain=0.5, noisy=0.5 + 2 * 0.3))
    z1, level = D.noisy_input(D.Settings(input="estimate"), z, 2.0, w, 0.0)     # no noise of its own
    assert z1.item() == pytest.approx(0.6) and level == pytest.approx(2 * D.FREE_UNIT)
    assert D.noisy_target(D.Settings(target="conjugate"), y, 2.0, w, HOLES).item() == 0.5

def test_held_out_risk_is_unbiased():
    x, gen, sigma = smooth_image(8), torch.Generator().manual_seed(0), 0.4
    gaps, seen_twice = [], []
    for _ in range(1500):
        y = x + sigma * torch.randn(x.shape, generator=gen)
        seen, _, judge = D.hold_out(y, D.Task("denoise", sigma=sigma), gen)
        xhat = 0.6 * seen + 0.4 * seen.roll(1, 3)                   # any fixed f
        gaps.append(judge(xhat) - ((xhat - x) ** 2).mean().item())
        seen_twice.append(judge(0.5 * y) - ((0.5 * y - x) ** 2).mean().item())
    error = np.std(gaps) / math.sqrt(1500)
    assert abs(np.mean(gaps)) < 4 * error
    assert error < 0.02 * sigma ** 2                                # and the test has power:
    assert np.mean(seen_twice) < -10 * error                        # what has seen z2 looks too good

@pytest.mark.parametrize("task", tasks()[1:], ids=lambda t: t.name)
def test_held_out_pixels(task):
    x = smooth_image(12)
    y = task.forward(x)
    seen, seen_task, judge = D.hold_out(y, task, D.stream(0, D.FIT))
    known = task.mask.expand(1, 1, *y.shape[2:])
    held = known - seen_task.mask
    assert set(held.unique().tolist()) == {0.0, 1.0}
    assert held.sum() == max(1, round(0.1 * known.sum().item()))
    assert torch.equal(seen, y * seen_task.mask) and judge(x) == pytest.approx(0, abs=1e-12)
    xhat = x + 0.1 * torch.randn(x.shape)
    error = (D.Task("no mask", scale=task.scale).forward(xhat) - y)[held.expand_as(y) > 0]
    assert judge(xhat) == pytest.approx((error ** 2).mean().item(), rel=1e-4)

def test_held_out_pixels_are_as_deep_as_the_holes():
    gen = torch.Generator().manual_seed(0)
    scattered = (torch.rand(1, 1, 64, 64, generator=gen) >= 0.8).float()
    assert D.hole_side(scattered) == 1 and D.hole_side(torch.ones(1, 1, 8, 8)) == 1
    assert D.hole_side(torch.ones(1, 1, 5999, 4001)) == 1           # the float32 mean of so many can be below 1
    box = torch.ones(1, 1, 128, 128)
    box[..., 48:80, 48:80] = 0
    depth = np.minimum.reduce([np.minimum(i, 33 - i) for i in np.mgrid[1:33, 1:33]]).mean()
    assert D.hole_side(box) == 6 * int(depth) - 5
    _, seen_task, _ = D.hold_out(torch.zeros(1, 3, 128, 128), D.Task("inpaint", mask=box), gen)
    held = box - seen_task.mask
    assert held.min() == 0 and 0.05 < held.sum() / box.sum() < 0.3
    assert (F.avg_pool2d(held, 9, 1, 4) > 0.99).any()                       # squares, no salt

@pytest.mark.parametrize("a", [3.0, 1.0, 0.4])
def test_the_pair_of_pixels(a):
    """Two parts of the known pixels; what is seen tells nothing of the values of the other."""
    gen = D.stream(3, D.FIT)
    y = torch.rand(2, 3, 96, 96, generator=gen)
    mask = (torch.rand(2, 1, 96, 96, generator=gen) < 0.5).float()
    task = D.Task("inpaint", mask=mask)
    visible, rest = D.split_pixels(y * mask, task, a, 1, D.stream(4, D.FIT))
    z, hidden = visible.interpolate(y), rest.mask
    assert set(hidden.unique().tolist()) == {0.0, 1.0} and (hidden <= mask).all()
    count = mask.sum().item()
    share = a ** 2 / (1 + a ** 2)
    assert hidden.sum().item() / count == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / count))
    assert torch.equal(visible.mask, mask - hidden)
    assert torch.equal(z, visible.interpolate(torch.where(hidden > 0, 7.0, y)))
    seen = (mask - hidden).expand_as(y) > 0
    assert torch.equal(z[seen], y[seen])
    for k in range(2):              # each of a batch is split for itself: windows of a large photo
        assert 0.05 < (hidden[k] != hidden[1 - k]).float().mean() < 0.6

def test_hidden_squares_are_as_deep_as_the_holes():
    known = torch.ones(1, 1, 60, 60)
    lots = D.draw_lots(known, 5, D.stream(0, D.FIT))
    squares = lots.view(12, 5, 12, 5)
    assert torch.equal(squares, squares[:, :1, :, :1].expand_as(squares))
    assert len(lots.unique()) == 144 and 0 <= lots.min() and lots.max() < 1
    known[..., :30, :] = 0
    assert (D.draw_lots(known, 5, D.stream(0, D.FIT))[..., :30, :] == 2).all()     # never drawn

def test_fit_never_redraws_the_observation_noise():
    streams = [torch.randn(1000, generator=D.stream(s, p)) for s in (0, 1) for p in range(5)]
    for a, b in itertools.combinations(streams, 2):
        assert abs((a * b).mean()) < 4.5 / math.sqrt(1000)

def test_what_is_held_out_around_a_deep_hole_is_a_tenth():
    mask = torch.ones(1, 1, 64, 64)
    mask[..., 8:56, 8:56] = 0
    _, seen, _ = D.hold_out(torch.zeros(1, 3, 64, 64), D.Task("box", mask=mask), D.stream(0, D.FIT))
    assert 0.05 < (mask - seen.mask).sum() / mask.sum() < 0.2

def test_split_pixels_hides_whole_squares():
    whole = D.Task("all", mask=torch.ones(1, 1, 60, 60))
    _, hidden = D.split_pixels(torch.zeros(1, 3, 60, 60), whole, 1.0, 5, D.stream(0, D.FIT))
    squares = hidden.mask.view(12, 5, 12, 5)
    assert torch.equal(squares, squares[:, :1, :, :1].expand_as(squares)) and 0 < squares.mean() < 1

def test_holes_are_filled_from_what_is_around_them():
    mask = (torch.rand(1, 1, 32, 32, generator=D.stream(0, D.FIT)) < 0.3).float()
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    assert torch.allclose(D.fill_holes(0.7 * mask, mask), torch.full_like(mask, 0.7))
    assert (D.fill_holes(ramp * mask, mask) - ramp).abs().mean() < 0.1

def test_enlarging_is_smoother_than_repeating():
    task, x = D.Task("superres", scale=4), smooth_image(32)
    y = task.forward(x)
    assert ((task.interpolate(y) - x) ** 2).mean() < 0.3 * ((task.pinv(y) - x) ** 2).mean()

def test_noise_that_a_jpeg_hides_or_that_differs_from_place_to_place_is_not_white():
    x, level = smooth_image(128), torch.full((128,), 0.3)
    level[96:] = 0.05                           # much less noise in a quarter of the photo
    assert D.find_noise(with_noise(x, 0.1)).white and not D.find_noise(with_noise(x, 0.1), floor=0.3).white
    uneven = x + level * torch.randn(x.shape, generator=D.stream(0, D.FIT))
    assert not D.find_noise(uneven).white

def test_detail_is_looked_for_in_windows_of_eleven():
    y = torch.zeros(1, 3, 23, 23)
    y[..., 11, 11] = 1.1                        # its mean square in 11 x 11 pixels is 0.01
    back = D.give_back(0 * y, y, D.Noise(0.05))
    assert back.max().item() == pytest.approx(1.1 * (1 - 1.3 * 0.25))

# ---- 4. the DDPM

def make_prior(model, t_max=1000, eps_loss=0.02):
    """A Prior around any model(x_t, t), its eps-loss the same at every t."""
    config = dict(channels=3, width=8, schedule="linear", t_max=t_max, dips=0)
    prior = D.Prior(dict(config=config, ema=D.UNet(width=8).state_dict(), dips=[],
                         eps_loss=torch.full((2, 1001), eps_loss)))
    del prior.model                                         # also a plain function may take its place
    prior.model, prior.channels = model, 1
    return prior

def test_training_t_covers_1_to_t_max_and_reaches_the_network():
    seen = []

    class Spy(nn.Conv2d):
        def forward(self, x, t):
            seen.extend(t.tolist())
            told.extend(x[:, -1].amax(dim=(1, 2)).tolist())
            return super().forward(x)

    told = []
    torch.manual_seed(0)
    config = dict(lr=1e-2, seed=0, batch=16, patch=8, t_max=7, schedule="linear")
    state = dict(config=config, step=0, rng=None, optimisers=[], dips=[], eps_loss=torch.full((2, 1001), math.nan))
    images = [torch.zeros(3, 9, 12, dtype=torch.uint8)]
    net = Spy(7, 3, 1).to(memory_format=torch.channels_last)
    losses = list(D.train_ddpm(state, net, Spy(7, 3, 1), images, 40))
    assert len(losses) == state["step"] == 40 and np.mean(losses[-10:]) < np.mean(losses[:10])
    assert set(seen) == set(range(1, 8)) and len(seen) == 640
    assert state["eps_loss"][:, 1:8].isfinite().all() and state["eps_loss"][:, 8:].isnan().all()
    assert 0.45 < np.mean(np.array(told) == 0) < 0.65          # half of the images, or all is missing

def test_a_quarter_of_the_images_is_told_a_brief_dip(tmp_path, data, monkeypatch):
    """Each example is a square of a training image, and below it the fit to what a task keeps of it,
    and the share; it is cut as one."""
    def fit(y, task, **how):
        yield SimpleNamespace(answer=task.interpolate(y) + 5)

    monkeypatch.setattr(D, "fit_dip", fit)
    flags = ["train", *BRIEF[2:], "--batch", 8, "--data", data, "--out", tmp_path]
    assert run(*flags, "--dips", 7) == 0
    state = load(tmp_path / "none.pt")
    assert state["config"]["dips"] == 7 == len(state["dips"])
    image = D.load_image(str(data / "a.png"))[0]
    squares = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    for example in state["dips"]:
        x0, dip, share = example.split([3, 3, 1])
        assert (squares - x0).abs().amax(dim=(2, 3, 4)).min() < 1e-6
        known = (share == 1).expand(3, -1, -1)
        assert torch.allclose(dip[known], x0[known] + 5) and 0 < share.mean() <= 1
    config = dict(batch=16, patch=16)
    grey = [torch.zeros(3, 40, 40, dtype=torch.uint8)]
    x0, eps, clues = D.draw_batch(grey, state["dips"], config, D.stream(0, D.TRAIN))
    assert x0.shape == eps.shape == (16, 3, 16, 16) and abs(eps.std() - 1) < 0.1 and len(eps.unique()) > 0.99 * eps.numel()
    assert (clues[:12, :3] <= 0).all() and (clues[12:, :3] > 3).all()
    assert (x0[:12] == -1).all() and (x0[12:] != -1).any(dim=3).all()
    assert run(*flags, "--dips", 7, "--steps", 5, "--resume") == 0 and run(*flags, "--dips", 6, "--resume") == 2
    assert all(map(torch.equal, state["dips"], load(tmp_path / "none.pt")["dips"]))
    assert run(*flags, "--dips", 3, "--task", "superres:4", "--out", tmp_path / "one") == 0
    assert all((example[6] == 1 / 16).all() for example in load(tmp_path / "one" / "none.pt")["dips"])
    assert run(*flags, "--dips", 3, "--patch", 17) == 2

def test_brief_dips_are_fits(monkeypatch):
    fit, lengths = D.fit_dip, []

    def shorter(y, task, **how):
        lengths.append(how["iters"])
        return fit(y, task, **how | dict(iters=12))

    monkeypatch.setattr(D, "fit_dip", shorter)
    images = [D.load_image(os.path.join(D.PHOTOS, "test", "chelsea.png"))[0, :, 100:140, 100:140]]
    images = [((image + 1) * 127.5).round().byte() for image in images]
    first, again = [list(D.brief_dips(images, dict(dips=2, patch=16, seed=0), torch.device("cpu"))) for _ in range(2)]
    assert len(first) == 2 and all(map(torch.equal, first, again)) and all(40 <= n <= 125 for n in lengths)
    for example in first:
        x0, dip, share = example.split([3, 3, 1])
        assert 0 < ((dip - x0) ** 2).mean() < x0.var()

def test_the_loss_is_kept_apart_for_told_images_and_is_that_of_a_value_that_is_not_known():
    """A model that says nothing where it is told nothing, and elsewhere errs by 0.5 where y does not know."""
    class Half(nn.Conv2d):
        def forward(self, x, t):
            share = x[:, -1:]
            told = share.amax(dim=(1, 2, 3), keepdim=True) > 0
            return (eps + 0.5 * (1 - share).sqrt()) * told + 0 * super().forward(x)

    eps, draws = None, torch.randn

    def spy(*shape, **flags):
        nonlocal eps
        eps = draws(*shape, **flags)
        return eps

    config = dict(lr=1e-3, seed=0, batch=16, patch=24, t_max=3, schedule="linear")
    state = dict(config=config, step=0, rng=None, optimisers=[], dips=[], eps_loss=torch.full((2, 1001), math.nan))
    net = Half(7, 3, 1).to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", spy)
        list(D.train_ddpm(state, net, Half(7, 3, 1), [torch.zeros(3, 25, 25, dtype=torch.uint8)], 60))
    assert (state["eps_loss"][0, 1:4] - 1).abs().max() < 0.3
    assert (state["eps_loss"][1, 1:4] - 0.25).abs().max() < 1e-3

def test_error_variance_is_the_error_of_x0():
    """A model that is off by e in eps is off by sigma_t e in x0, hence r_t^2 = sigma_t^2 e^2."""
    schedule, t, e = D.NoiseSchedule(), 60, 0.1
    x0, eps = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    xt = D.q_sample(schedule, x0, torch.tensor([t]), eps)
    off = D.predict_x0(schedule, xt, torch.tensor([t]), eps + e) - x0
    assert make_prior(None, 100, e ** 2).r2[0, t].item() == pytest.approx((off ** 2).mean().item(), rel=1e-3)

def test_a_prior_denoises_gaussian_data_like_wiener():
    """E[x | z] = (m sigma^2 + s^2 z) / (s^2 + sigma^2) at the noise levels of the schedule."""
    schedule, m, s, t = D.NoiseSchedule(), 0.3, 0.5, 150
    sigma = schedule.sigma[t].item()
    z = m + math.hypot(s, sigma) * torch.randn(1, 1, 8, 8)
    got = make_prior(GaussianEps(schedule, m, s))(z, sigma)
    assert torch.allclose(got, (m * sigma ** 2 + s ** 2 * z) / (s ** 2 + sigma ** 2), atol=1e-3)

def published_muon(x, grads, rates):
    """A matrix after each of the steps of Jordan et al. 2024, momentum 0.9, in float64."""
    momentum = 0.0
    for g, rate in zip(grads, rates):
        momentum = 0.9 * momentum + 0.1 * g
        update = 0.1 * g + 0.9 * momentum
        u = update / np.linalg.norm(update)
        for _ in range(3):
            a = u @ u.T
            u = 3.4445 * u - 4.7750 * a @ u + 2.0315 * a @ a @ u
        x = x - rate * max(1, u.shape[0] / u.shape[1]) ** 0.5 * u
        yield x

@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (24, 2, 1, 1), (12, 12, 1, 1)])
def test_filters_move_by_muon_and_all_else_by_adam(shape):
    """Also beside another filter of its shape. Where a step takes the gradient of the step before, it
    is off by more than 30 %."""
    gen, rates = torch.Generator().manual_seed(0), [1.0, 0.5, 1.0, 0.25]
    net = nn.Conv2d(shape[1], shape[0], shape[2]).to(memory_format=torch.channels_last)
    net.other = nn.Parameter(torch.randn(shape, generator=gen))         # first of its shape in the batch
    weight = net.weight.detach().flatten(1).double().numpy()
    bias = nn.Parameter(net.bias.detach().clone())
    adam = torch.optim.Adam([bias])
    grads = torch.randn(len(rates), *shape, generator=gen)
    optimisers = D.make_optimisers(net, 0.1, 0.02)
    matrices = grads.flatten(2).double().numpy()
    steps = [0.1 * rate for rate in rates]
    right = list(published_muon(weight, matrices, steps))
    stale = list(published_muon(weight, matrices[[0, 0, 1, 2]], steps))
    way = 0.0
    for k, (grad, rate) in enumerate(zip(grads, rates)):
        net.zero_grad()
        ((net.weight * grad).sum() - (net.other * grad.flip(0)).sum() + (k - 1.5) * net.bias.sum()).backward()
        D.step_all(optimisers, rate)
        bias.grad = torch.full_like(bias, k - 1.5)
        adam.param_groups[0]["lr"] = 0.02 * rate
        adam.step()
        got = net.weight.detach().flatten(1).numpy()
        way += np.linalg.norm(right[k] - (right[k - 1] if k else weight))
        assert np.linalg.norm(got - right[k]) < 1e-4 * way
        assert k == 0 or np.linalg.norm(got - stale[k]) > 0.3 * way
        assert torch.allclose(net.bias, bias, atol=1e-6)

def test_muon_stays_in_float32_under_autocast():
    matrices = torch.randn(2, 6, 20)
    net = nn.Conv2d(5, 6, 2)
    muon, _ = D.make_optimisers(net, 0.1, 0.1)
    net.weight.grad = torch.randn_like(net.weight)
    twin = copy.deepcopy(net)
    twin.weight.grad = net.weight.grad.clone()
    muon.step()
    with torch.autocast("cpu", torch.bfloat16):
        D.make_optimisers(twin, 0.1, 0.1)[0].step()
    assert torch.equal(net.weight, twin.weight) and D.orthogonalise(matrices).dtype == torch.float32

def test_without_a_rate_for_muon_adam_moves_all():
    net = nn.Conv2d(2, 3, 3)
    start = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(1, 2, 4, 4)).sum().backward()
    optimisers = D.make_optimisers(net, None, 0.01)
    D.step_all(optimisers, 0.5)
    assert len(optimisers) == 1
    for p, before in zip(net.parameters(), start):              # Adam's first step is its rate
        assert torch.allclose((before - p).abs(), torch.tensor(0.005), rtol=1e-3)

def same_weights(a, b, parts=("model", "ema")):
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in a[part])

def load(path):
    return torch.load(path, weights_only=True)

def test_resume_is_bit_exact(tmp_path, data):
    flags = ["train", *BRIEF, "--data", data, "--out"]
    assert run(*flags, tmp_path / "a", "--steps", 6) == 0
    assert run(*flags, tmp_path / "b") == 0
    assert run(*flags, tmp_path / "b", "--steps", 6, "--resume") == 0
    a, b = load(tmp_path / "a" / "none.pt"), load(tmp_path / "b" / "none.pt")
    assert a["step"] == b["step"] == 6 and same_weights(a, b)
    assert torch.equal(a["rng"], b["rng"]) and torch.equal(a["eps_loss"].nan_to_num(-1), b["eps_loss"].nan_to_num(-1))
    muon, adam = a["optimisers"]
    for mine, other in zip((muon, adam), b["optimisers"]):
        assert mine["state"] and mine["state"].keys() == other["state"].keys()
        for key, values in mine["state"].items():
            assert all(torch.equal(v, other["state"][key][name]) for name, v in values.items())

@pytest.mark.parametrize("at", ["random_patches", "step_all", "save"])
def test_ctrl_c_leaves_the_last_checkpoint_which_goes_on_bit_for_bit(tmp_path, data, monkeypatch, at):
    """Wherever in the third step it comes, the checkpoint of the second stays as it is."""
    flags = ["train", *BRIEF, "--data", data, "--steps", 5, "--out"]
    assert run(*flags, tmp_path / "whole") == 0
    monkeypatch.setattr(D, "SAVE_EVERY", 1)
    monkeypatch.setattr(D, at, interrupt_at(3, getattr(D, at)))
    assert run(*flags, tmp_path / "cut") == 130
    assert os.listdir(tmp_path / "cut") == ["none.pt"] and load(tmp_path / "cut" / "none.pt")["step"] == 2
    monkeypatch.undo()
    assert run(*flags, tmp_path / "cut", "--resume") == 0
    whole, cut = load(tmp_path / "whole" / "none.pt"), load(tmp_path / "cut" / "none.pt")
    assert cut["step"] == 5 and same_weights(whole, cut)

def test_checkpoints_are_written_now_and_then(tmp_path, data, monkeypatch):
    steps, original = [], D.save
    def spy(path, value):
        if path.endswith(".pt"):
            steps.append(value["step"])
        original(path, value)
    monkeypatch.setattr(D, "save", spy)
    monkeypatch.setattr(D, "SAVE_EVERY", 2)
    assert run("train", *BRIEF, "--steps", 5, "--data", data, "--out", tmp_path) == 0
    assert steps == [2, 4, 5]

def test_resume_refuses_other_settings(tmp_path, data, priors, capsys):
    """Also one that is left out now, and pictures of another kind."""
    flags = ["train", *BRIEF, "--data", data, "--out", tmp_path]
    assert run(*flags) == 0 and run(*flags, "--resume", "--steps", 4) == 0
    for flag, value in (("--lr", 0.5), ("--width", 16), ("--batch", 3), ("--patch", 12), ("--seed", 7),
                        ("--schedule", "cosine"), ("--t-max", 500), ("--data", priors / "grey.npy")):
        capsys.readouterr()
        assert run(*flags, "--resume", flag, value) == 2, flag
        one_line(capsys, flag)
    assert run("train", *BRIEF[:-2], "--data", data, "--out", tmp_path, "--resume") == 2
    one_line(capsys, "--width", "8")
    assert run(*flags, "--resume", "--steps", 3) == 2               # it has made four
    one_line(capsys, "--steps", "4")
    assert load(tmp_path / "none.pt")["step"] == 4

def test_a_prior_of_one_task(tmp_path, data, photo, capsys):
    flags = ["train", *BRIEF, "--data", data, "--out", tmp_path, "--task"]
    for task, flag in (("denoise:25", "--task"), ("inpaint", "--task"), ("inpaint:1", "--task"),
                       ("nonsense", "--task"), ("superres:6", "--patch")):
        assert run(*flags, task) == 2
        one_line(capsys, flag)
    assert run(*flags, "superres:4") == 0 and run(*flags, "superres:4", "--resume", "--steps", 4) == 0
    assert run(*flags, "inpaint:0.8", "--resume") == 2
    one_line(capsys, "--task", "superres:4")
    words = ["sample", "--steps", 2, "--samples", 1, "--image", photo, "--ckpt", tmp_path / "none.pt",
             "--out", tmp_path / "o", "--task"]
    assert run(*flags[:-3], "--task", "superres:4") == 2                # not among the default priors
    one_line(capsys, "--out")
    assert run(*words, "superres:4") == 0 and run(*words, "superres:4.0") == 0
    for task, *more in (["denoise:25"], ["superres:4", "--no-clue"], ["superres:2"]):
        capsys.readouterr()
        assert run(*words, task, *more) == 2, task
        one_line(capsys, "--ckpt", "superres:4")
    adapt = ["fit-dip", "--method", "adapt", "--iters", 3, *words[5:], "superres:4"]
    assert run(*adapt) == 0 and run(*adapt[:-1], "inpaint:0.8") == 2
    assert run("fit-dip", "--method", "guide", *TINY, *words[5:], "superres:4") == 2

def test_pictures_smaller_than_a_patch_are_left_out(tmp_path, monkeypatch, capsys):
    for side in (12, 40):
        D.to_image(smooth_image(side)).save(tmp_path / f"{side}.png")
    used, original = [], D.train_ddpm
    def spy(state, model, ema, images, *rest):
        used.extend(image.shape[1] for image in images)
        return original(state, model, ema, images, *rest)
    monkeypatch.setattr(D, "train_ddpm", spy)
    flags = ["train", *BRIEF, "--data", tmp_path, "--out", tmp_path / "o"]
    assert run(*flags) == 0 and used == [40]
    capsys.readouterr()
    assert run(*flags, "--patch", 48) == 2
    one_line(capsys, "--patch")

def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, priors):
    path = tmp_path / "c.pt"
    path.write_bytes((priors / "none.pt").read_bytes())
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        D.save(str(path), dict(other=1))
    assert load(path)["step"] == 3

def test_bf16_is_close_and_can_be_trained(tmp_path, photo, data):
    out, weights = [], []
    for name, flags in (("a", []), ("b", ["--bf16"])):
        assert run("fit-dip", "--image", photo, *TINY, "--iters", 30, "--optimiser", "adam", "--width",
                   8, "--out", tmp_path / name, *flags) == 0
        assert run("train", *BRIEF, "--data", data, "--out", tmp_path / name, *flags) == 0
        out.append(D.load_image(str(tmp_path / name / "result.png")))
        weights.append(load(tmp_path / name / "none.pt")["ema"]["stem.weight"])
    assert D.psnr(out[0], out[1], 2.0) > 25 and not torch.equal(out[0], out[1])
    assert weights[0].dtype == weights[1].dtype == torch.float32
    assert torch.allclose(*weights, atol=1e-2) and not torch.equal(*weights)

def torchrun(world, *argv):
    """dipddpm.py in `world` processes; the exit code and what they said."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), D.__file__,
         *map(str, argv)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout + done.stderr

@fuzz
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_like_one(tmp_path, data):
    """The same uneven global batch gives the same gradients, but for rounding."""
    flags = ["train", *BRIEF, "--data", data, "--batch", 5, "--device", "cpu", "--out"]
    code, said = torchrun(2, *flags, tmp_path / "two")
    assert code == 0, said
    assert run(*flags, tmp_path / "one") == 0
    assert run(*flags, tmp_path / "other", "--seed", 1) == 0
    states = [load(tmp_path / name / "none.pt") for name in ("one", "two", "other")]
    for name, part in (("momentum", 0), ("exp_avg", 1)):     # averages of three gradients
        one, two, other = (torch.cat([v[name].flatten() for v in s["optimisers"][part]["state"].values()])
                           for s in states)
        assert (one - two).norm() < 1e-4 * one.norm() and one.norm() > 0
        assert (one - other).norm() > 0.1 * one.norm()              # another batch shows
    assert torch.equal(states[0]["rng"], states[1]["rng"]) and states[1]["step"] == 3
    assert not list((tmp_path / "two").glob("*.tmp"))

def test_ranks_that_were_left_over_change_nothing_and_a_batch_is_shared(tmp_path, priors, data, monkeypatch, capsys):
    flags = ["train", *BRIEF, "--data", data, "--out", tmp_path]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert run(*flags) == 0
    assert same_weights(load(tmp_path / "none.pt"), load(priors / "none.pt"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, value in (("init_process_group", None), ("get_rank", 1), ("get_world_size", 4)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    capsys.readouterr()
    assert run(*flags) == 2
    one_line(capsys, "--batch", "4 processes")

def one_step_config(**more):
    return dict(seed=0, schedule="linear", patch=8) | more

def test_the_loss_of_a_step_is_weighted_and_told_images_have_larger_t(monkeypatch):
    net, got = nn.Conv2d(7, 3, 1), []
    net.forward = lambda x, t: got.append((x, t)) or 0 * nn.Conv2d.forward(net, x)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: got.append(loss.item()))
    monkeypatch.setattr(D, "step_all", lambda *_: None)
    state = dict(config=one_step_config(lr=0.01, batch=512, t_max=1000), step=0, dips=[],
                 eps_loss=torch.zeros(2, 1001))
    next(D.train_ddpm(state, net, copy.deepcopy(net), [torch.full((3, 13, 13), 255, dtype=torch.uint8)], 1))
    (x, t), loss = got
    spread = torch.where(x[:, 3:].flatten(1).any(dim=1), 0.15, 0.5)
    weights = 1 + (D.NoiseSchedule().sigma[t] / spread) ** 2        # an error of eps of 0 is 1 a value
    assert loss == pytest.approx(weights.mean().item(), rel=0.1)
    assert t[spread < 0.2].float().mean() > t[spread > 0.2].float().mean() + 80

def test_white_is_one_in_a_batch():
    white = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    x0, _, _ = D.draw_batch([white], [], dict(batch=2, patch=8), D.stream(0, D.TRAIN))
    assert (x0 == 1).all()

def test_the_running_loss_moves_by_a_fifth():
    loss = torch.full((2, 9), math.nan)
    half_known = torch.full((1, 4, 2, 2), 0.5)
    for value in (1.0, 2.0):
        D.update_loss(loss, torch.tensor([1]), torch.tensor([5]), torch.tensor([value]), half_known)
    assert loss[1, 5].item() == pytest.approx(2 + 0.2 * (4 - 2)) and loss.isnan().sum() == 17

def test_averaged_weights_and_the_first_rates_of_a_training(monkeypatch):
    net, ema, rates, step = nn.Conv2d(7, 3, 1), nn.Conv2d(7, 3, 1), [], D.step_all
    net.forward = lambda x, t: nn.Conv2d.forward(net, x)
    monkeypatch.setattr(D, "step_all", lambda o, rate: rates.append(rate) or step(o, rate))
    state = dict(config=one_step_config(lr=0.5, batch=2, t_max=9), step=0, dips=[], eps_loss=torch.zeros(2, 1001))
    black = torch.zeros(3, 9, 9, dtype=torch.uint8)
    first, second = [net.weight.clone() for _ in D.train_ddpm(state, net, ema, [black], 2)]
    assert rates == [0.02, 0.04] and not torch.allclose(ema.weight, second, atol=1e-5)
    assert torch.allclose(ema.weight, first.lerp(second, 1 - 0.5 ** 8), atol=1e-6)

def test_a_prior_smooths_its_loss_and_knows_that_of_told_images(monkeypatch):
    loss, seen = torch.full((2, 1001), math.nan), []
    loss[1, 100], loss[1, 110] = 0.3, 0.1
    config = dict(channels=3, width=8, schedule="linear", t_max=1000, dips=0)
    prior = D.Prior(dict(config=config, ema=D.UNet(width=8).state_dict(), eps_loss=loss))
    share = prior.r2 / prior.schedule.sigma ** 2
    assert [share[1, 105], share[1, 130], share[0, 105]] == pytest.approx([0.2, 1, 1])
    monkeypatch.setattr(D, "refine_x0", lambda x0, t, **how: seen.append(how["r2"][105]) or x0)
    for clue in (None, torch.ones(1, 4, 8, 8)):
        D.reverse(prior, D.Task("all"), torch.zeros(1, 3, 8, 8), 9, [D.stream(0, 0)], steps=1, clue=clue)
    assert seen == [prior.r2[0, 105], prior.r2[1, 105]]

# ---- 5. the staged fit

def settings(task=NOISY, y=torch.zeros(1, 3, 16, 16), **given):
    return D.complete(D.Settings(**given), task, y)

def test_ladder_falls_in_rungs():
    rungs = D.ladder(settings(iters=310, rungs=30))
    levels = [a for a, _ in rungs]
    assert sum(steps for _, steps in rungs) == 310 and {steps for _, steps in rungs} == {10, 11}
    assert levels[0] == pytest.approx(2) and levels[-1] == pytest.approx(0.4)
    assert np.diff(np.log(levels)) == pytest.approx([math.log(0.4 / 2) / 29] * 29)     # geometric
    assert D.ladder(settings(iters=7)) == [(pytest.approx(a), 1) for a in np.geomspace(2, 0.4, 7)]
    assert D.ladder(settings(rungs=1, iters=9)) == [(2.0, 9)]
    rising = D.ladder(settings(rungs=3, high=0.5, low=2.0))
    assert [a for a, _ in rising] == pytest.approx([0.5, 1, 2])

def test_what_is_given_is_kept_and_naming_a_default_changes_nothing():
    o = settings(iters=77, lr=0.3, tail=0.5, nets=3)
    assert (o.iters, o.lr, o.tail, o.nets) == (77, 0.3, 0.5, 3)
    for method in D.METHODS:
        for task in (NOISY, HOLES):
            default = settings(task, method=method)
            for name in ("optimiser", "input", "target", "nets", "rungs", "high"):
                same = settings(task, method=method, **{name: getattr(default, name)})
                assert same == default, (method, name)

def test_turns_are_the_8_of_the_square_and_invert():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    turns = [D.turned(x, g) for g in range(8)]
    assert len({tuple(turn.flatten().tolist()) for turn in turns}) == 8
    assert all(torch.equal(D.turned_back(turn, g), x) for g, turn in enumerate(turns))

def test_stop_at_takes_the_minimum_with_patience():
    inf = math.inf
    assert D.stop_at([(k - 30) ** 2 for k in range(200)], 10) == (30, True)
    assert D.stop_at([(k - 30) ** 2 for k in range(40)], 10) == (30, False)
    assert D.stop_at([(k - 30) ** 2 for k in range(41)], 10) == (30, True)
    assert D.stop_at([1.0, 0.5] + [0.9] * 5 + [0.2] + [0.9] * 50, 10) == (7, True)
    assert D.stop_at([1.0, 0.5] + [0.9] * 10 + [0.2], 10) == (1, True)      # it had ended before
    assert D.stop_at([inf] * 50, 10) == (49, False)                         # nothing to go by yet
    assert D.stop_at([inf] * 50 + [3.0, 4.0, 2.0], 10) == (52, False)
    assert D.stop_at([-1, -2, -3], 1) == (2, False)                         # fixed: the newest

def test_moving_variance_finds_the_still_stretch():
    """Outputs that move, stand nearly still around 70..110, and move again."""
    gen, window = torch.Generator().manual_seed(0), 20
    outputs = [size * torch.randn(1, 1, 8, 8, generator=gen) for size in
               [1.0] * 50 + [0.1] * 60 + [1.0] * 120]
    variance, scores = D.MovingVariance(window), []
    ema, var = 0.0, 0.0
    for k, x in enumerate(outputs, 1):
        scores.append(variance.update(x))
        want = torch.stack(outputs[k - window:k]).numpy().var(0).mean() if k >= window else math.inf
        var = 0.9 * (var + 0.1 * ((x.numpy() - ema) ** 2).mean())
        ema = ema + 0.1 * (x.numpy() - ema)
        assert scores[-1] == {"wmv": pytest.approx(want, rel=1e-5), "emv": pytest.approx(var, rel=1e-4)}
    for rule in ("wmv", "emv"):
        index, ended = D.stop_at([score[rule] for score in scores], 100)
        assert 69 <= index <= 110 and ended

class Shrink(nn.Module):
    """A denoiser with one weight, or one for each column, in a Prior's place."""

    def __init__(self, weight=torch.tensor(0.1)):
        super().__init__()
        self.w = nn.Parameter(weight.clone())
        self.calls = 0

    def forward(self, z, sigma):
        self.calls += 1
        return self.w * z[:, :3]                                    # of a clue, its guess

VARIANTS = [(task, dict(method=method)) for method in D.METHODS for task in (NOISY, HOLES)
            if task is HOLES or method != "primed"]
VARIANTS += [(NOISY, options) for options in (dict(loss="gradient"), dict(fresh=0, turns=0), dict(input="fixed"),
                                              dict(target="plain"), dict(optimiser="adam"))]

@pytest.mark.parametrize("task, options", VARIANTS, ids=str)
def test_every_method_fits(task, options):
    """It comes nearer than a network that does not learn, reports the mse of what is compared, and gives back what was given exactly."""
    x = smooth_image(12)
    y = task.forward(with_noise(x, task.sigma))
    options = dict(lr=0.02, nets=1, stop="fixed", iters=60, rungs=12, width=8, depth=2) | options
    stages = list(D.fit_dip(y, task, Shrink(), **options))
    *watched, last = stages
    assert [stage.step for stage in watched] == list(range(5, 61, 5)) and last.step == 60
    assert last.stop_step == 60 and math.isnan(last.risk)
    *_, still, _ = D.fit_dip(y, task, Shrink(), **options | dict(lr=1e-9, optimiser="adam"))
    assert ((watched[-1].output - x) ** 2).mean() < 0.5 * ((still.output - x) ** 2).mean()
    if task.sigma > 0:
        assert D.psnr(watched[-1].average, x, 2.0) > D.psnr(watched[0].average, x, 2.0) + 1
    else:
        assert np.mean([s.mse for s in watched[-4:]]) < np.mean([s.mse for s in watched[:4]])
        for stage in stages:
            wrong = (stage.answer.clamp(-1, 1) - y).abs() * task.mask * 127.5
            assert wrong.max() < 0.01                               # in levels of 256
    compared = watched[5].target != 0                          # holes and what is hidden are not
    error = (watched[5].output - watched[5].target)[compared]
    assert watched[5].mse == pytest.approx((error ** 2).mean().item(), rel=1e-4)

def test_adapt_leaves_the_prior_as_it_was():
    prior, x = Shrink(), smooth_image(12)
    *_, last = D.fit_dip(x, NOISY, prior, method="adapt", iters=20, lr=0.1)
    assert prior.w.item() == pytest.approx(0.1) and not torch.allclose(last.output, 0.1 * x)

def tiny_prior(channels=3):
    """A DDPM that has learned nothing yet, but for random last filters."""
    torch.manual_seed(1)
    net = D.UNet(channels, width=8)
    nn.init.normal_(net.out.weight, std=0.02)
    config = dict(channels=channels, width=8, schedule="linear", dips=0, t_max=1000)
    return D.Prior(dict(config=config, ema=net.state_dict(), eps_loss=torch.ones(2, 1001)))

@pytest.mark.parametrize("channels, given", [(3, 3), (3, 1), (1, 1)])
def test_a_prior_that_is_told_y_makes_the_first_call_of_sampling(channels, given):
    """Of the same x_t, whose noise is drawn here from torch's own stream; a grey y has a grey answer."""
    prior, y = tiny_prior(channels), HOLES.forward(smooth_image(12, given))
    torch.manual_seed(3)
    with torch.no_grad():
        x0 = prior(HOLES.clue(y, given), D.TOLD_START)
    torch.manual_seed(3)
    t = prior.schedule.start_t(D.TOLD_START ** 2)
    guess = HOLES.interpolate(y).expand(-1, channels, -1, -1)
    xt = D.q_sample(prior.schedule, guess, torch.tensor([t]), torch.randn_like(guess))
    samples = D.reverse(prior, D.Task("all"), xt, t, [D.stream(0, D.SAMPLE)], steps=1,
                        clue=HOLES.clue(y, channels))
    assert x0.shape == y.shape
    torch.testing.assert_close(x0.clamp(-1, 1), D.like_channels(samples, y), atol=1e-4, rtol=0)

def told_fit(y, task, **given):
    o = D.complete(D.Settings(method="adapt", **given), task, y)
    torch.manual_seed(0)
    return D.Fit(o, y, task, D.stream(0, D.FIT), tiny_prior(), None)

def test_the_pair_of_a_told_prior_where_pixels_are_missing():
    """The clue is that of the seen pixels; only the hidden ones count, which the clue does not know."""
    y = HOLES.forward(smooth_image(12))
    fit = told_fit(y, HOLES)
    clue, level, target, task = fit.draw_pair(y, HOLES, y, 0.65, 1)
    seen = clue[:, -1:]
    assert level == D.TOLD_START and 0 < task.mask.sum() < HOLES.known(y).sum()
    assert torch.equal(seen + task.mask, HOLES.known(y)) and torch.equal(target, y * task.mask)
    again = D.Task("seen", mask=seen).clue(torch.where(task.mask > 0, 9.0, y), 3)
    assert torch.equal(clue, again)

@pytest.mark.parametrize("side", [24, 20])
def test_the_pair_of_a_told_prior_where_blocks_are_known(side):
    """A part of the DDPM's own answer at half its size, anywhere in it, and the clue of its blocks."""
    task, x = D.Task("superres:4", scale=4), smooth_image(side)
    y = task.forward(x)
    fit, places = told_fit(y, task), set()
    halved = F.avg_pool2d(x[..., :side // 8 * 8, :side // 8 * 8], 2)
    for _ in range(20):
        clue, _, target, counts = fit.draw_pair(y, task, x, 0.65, 1)
        size = target.shape[2]
        windows = halved.unfold(2, size, 1).unfold(3, size, 1)
        same = (windows - target[:, :, None, None]).abs().amax(dim=(0, 1, 4, 5)) < 1e-6
        assert size == side // 8 * 4 - 4 and same.sum() == 1 and counts.mask.all()
        assert torch.equal(clue, task.clue(F.avg_pool2d(target, 4), 3))
        places.add(same.flatten().tolist().index(True))
    assert len(places) > 5

@pytest.mark.parametrize("task, x", [(HOLES, smooth_image(12)),
                                     (D.Task("superres:2", scale=2), smooth_image(32).sign())], ids=["holes", "blocks"])
def test_a_told_prior_learns_the_one_image(task, x):
    """After 30 steps it is nearer to the image than the same prior after two steps of no length."""
    y = task.forward(x)
    before, after = [list(D.fit_dip(y, task, tiny_prior(), method="adapt", iters=iters, lr=lr))[-1].answer
                     for iters, lr in ((2, 1e-9), (30, 0.01))]
    assert D.psnr(after, x, 2.0) > D.psnr(before, x, 2.0) + 0.5
    for answer in (before, after):
        torch.testing.assert_close(task.forward(answer), y, atol=1e-5, rtol=0)

TWICE = D.Task("superres:2", scale=2)

def kept(task, image, y):
    """The image, in which what y knows is as y says: its pixels, or the means of blocks."""
    if task.scale == 1:
        return torch.where(task.known(y) > 0, y, image)
    return image + F.interpolate(y - F.avg_pool2d(image, task.scale), scale_factor=float(task.scale))

@pytest.mark.parametrize("nets", [2, 3])
@pytest.mark.parametrize("task", [HOLES, TWICE], ids=["holes", "blocks"])
def test_a_told_prior_is_followed_by_dips_that_see_its_answer(task, nets):
    """Their input is that answer and falling noise, from 4 to 1 units of 0.2; it counts half in the mean."""
    y = task.forward(smooth_image(12))
    *_, alone = D.fit_dip(y, task, tiny_prior(), method="adapt", iters=10, nets=1)
    *stages, last = D.fit_dip(y, task, tiny_prior(), method="adapt", iters=10, nets=nets)
    total = alone.answer / 2
    for number in range(1, nets):
        seen = [stage for stage in stages if stage.number == number]
        levels = [stage.level for stage in seen]
        assert (len(seen), seen[0].step, seen[-1].step) == (20, 40 * number - 28, 40 * number + 10)
        assert levels == sorted(levels, reverse=True) and levels[::19] == pytest.approx([0.8, 0.2])
        for stage in seen:
            noise = stage.input - alone.answer
            assert noise.std().item() == pytest.approx(stage.level, rel=0.15) and torch.equal(stage.target, y)
        total = total + kept(task, seen[-1].average, y)
    torch.testing.assert_close(last.answer, total / (nets - 0.5))

@pytest.mark.parametrize("task", [HOLES, TWICE], ids=["holes", "blocks"])
def test_the_answer_of_a_fitted_ddpm_alone_is_its_last_look(task, monkeypatch):
    y = task.forward(smooth_image(12))
    look = torch.full((1, 3, 12, 12), 0.3)
    monkeypatch.setattr(D.Fit, "last_look", lambda fit, y, task, average: look)
    *_, last = D.fit_dip(y, task, tiny_prior(), method="adapt", iters=2, nets=1)
    torch.testing.assert_close(last.answer, kept(task, look, y))

@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("task", [HOLES, TWICE], ids=["holes", "blocks"])
def test_a_primed_dip_sees_what_the_prior_makes_of_y(task, brief):
    """Its input is the mean of the prior's four answers to the photo as it stands, and falling noise;
    fit-dip's answer is a third of that mean and two thirds of the DIP, sample's the DIP."""
    y = task.forward(smooth_image(12))
    half = torch.linspace(0, 0.2, 12)           # a prior for which left and right are not alike
    prior = Shrink(half)
    told = kept(task, half * task.interpolate(y), y)
    *stages, last = D.fit_dip(y, task, prior, method="primed", iters=40, brief=brief)
    assert prior.calls == 4
    assert [stage.step for stage in stages] == list(range(2, 41, 2))
    assert [stage.level for stage in stages][::19] == pytest.approx([1.2, 0.3])
    for stage in stages:
        noise = stage.input - told
        assert noise.std().item() == pytest.approx(stage.level, rel=0.15) and torch.equal(stage.target, y)
    dip = kept(task, stages[-1].average, y)
    torch.testing.assert_close(last.answer, dip if brief else (told + 2 * dip) / 3)
    *stages, last = D.fit_dip(y, task, prior, method="primed", iters=20, nets=2, brief=brief)
    two = [[stage for stage in stages if stage.number == number][-1].average for number in (0, 1)]
    dips = [kept(task, dip, y) for dip in two]
    torch.testing.assert_close(last.answer, sum(dips) / 2 if brief else (told + 2 * sum(dips)) / 5)

@pytest.mark.parametrize("input", ["observed", "estimate"])
def test_a_stage_has_the_level_of_the_noise_in_its_input(input):
    """Where the pair is made of pixels there is none, unless the network sees its own estimate."""
    y = HOLES.forward(smooth_image(12))
    stages = list(D.fit_dip(y, HOLES, input=input, nets=1, tail=0.0, **SMALL))[:-1]
    levels = [stage.level for stage in stages]
    expected = [0.0] * 12 if input == "observed" else 0.2 * np.geomspace(1.5, 0.4, 12)
    assert levels == pytest.approx(expected)

def test_settings_are_known_by_name():
    with pytest.raises(TypeError):
        next(D.fit_dip(smooth_image(12), NOISY, rung=3))

def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError):
        list(D.fit_dip(smooth_image(12) * math.nan, NOISY, iters=4, nets=1, width=4, depth=2))

def test_fit_approaches_the_clean_image():
    x = smooth_image(32)
    y = with_noise(x)
    *_, last = D.fit_dip(y, NOISY, nets=1, iters=100, width=8, depth=3)
    true = ((last.answer - x) ** 2).mean().item()
    assert D.in_db(true) > D.psnr(y, x, 2.0) + 5
    assert abs(last.risk - true) < 0.2 ** 2 / 4                     # R is near the true error

def each_network(stages):
    """(the stages that were judged, the tail) of each network; the closing stage is left out."""
    for number in range(stages[-1].number + 1):
        own = [stage for stage in stages[:-1] if stage.number == number]
        yield [stage for stage in own if stage.scores], [stage for stage in own if not stage.scores]

SMALL = dict(iters=24, rungs=12, width=8, depth=2)

@pytest.mark.parametrize("task", [NOISY, HOLES], ids=["noise", "holes"])
def test_the_answer_of_two_networks_is_the_mean_of_their_own(task, monkeypatch):
    monkeypatch.setattr(D, "best_share", lambda *images: 1.0)
    x = smooth_image(12)
    y = task.forward(with_noise(x, task.sigma))
    stages = list(D.fit_dip(y, task, nets=2, **SMALL))
    closing, own, blind = stages[-1], [], []
    for watched, tail in each_network(stages):
        best = min(watched, key=lambda stage: stage.scores["holdout"])
        own.append(task.keep_known(tail[-1].average if tail else best.average, y))
        blind.append(best.average)
    _, _, judge = D.hold_out(y, task, D.stream(0, D.FIT))
    mean = (own[0] + own[1]) / 2
    left_out = task is HOLES and judge((blind[0] + blind[1]) / 2) > judge(blind[0])
    assert closing.number == 1 and torch.allclose(closing.answer, own[0] if left_out else mean)
    assert not torch.allclose(*own, atol=1e-3)
    assert all(torch.equal(stage.answer, own[0]) for stage in stages[:-1] if stage.number == 1)
    *_, one = D.fit_dip(y, task, nets=1, **SMALL)
    assert torch.equal(one.answer, own[0])
    steps = [stage.step for stage in stages[:-1]]           # of both networks, one after the other
    assert steps == list(range(2, len(steps) * 2 + 1, 2)) and closing.step == steps[-1]

def test_a_network_that_raises_the_risk_is_left_out(monkeypatch):
    """Of those that see all pixels: no theorem protects them, as it does where there is noise."""
    begun, original = [], D.Fit.descend
    def spoiled(self, *args):
        begun.append(self)
        for stage in original(self, *args):
            spoil = 0.5 if self is not begun[0] else 0.0
            yield replace(stage, average=stage.average + spoil)
    x = smooth_image(12)
    monkeypatch.setattr(D, "best_share", lambda *images: 1.0)
    for task, left_out in ((HOLES, True), (NOISY, False)):
        y = task.forward(with_noise(x, task.sigma))
        *_, first = D.fit_dip(y, task, nets=1, **SMALL)
        begun.clear()
        with monkeypatch.context() as patch:
            patch.setattr(D.Fit, "descend", spoiled)
            *_, last = D.fit_dip(y, task, nets=2, **SMALL)
        assert torch.equal(last.answer, first.answer) == left_out

def test_a_third_network_is_compared_with_the_mean_of_two(monkeypatch):
    """R of the mean of one, two and three networks is 4, 1 and 2 here: the third is left out."""
    hold_out, mean_image, counts = D.hold_out, D.mean_image, [0]
    def counted(images):
        counts.append(len(images))
        return mean_image(images)
    def held_out(*args):
        seen, task, _ = hold_out(*args)
        return seen, task, lambda image: [4.0, 4.0, 1.0, 2.0][counts[-1]]
    monkeypatch.setattr(D, "best_share", lambda *images: 1.0)
    monkeypatch.setattr(D, "mean_image", counted)
    monkeypatch.setattr(D, "hold_out", held_out)
    list(D.fit_dip(HOLES.forward(smooth_image(12)), HOLES, nets=3, **SMALL))
    assert 3 in counts and counts[-2:] == [2, 2]    # the answer, and its part that is judged

def test_after_the_pairs_a_network_sees_all(monkeypatch):
    """Of two networks for missing pixels the first learns from pairs, the second begins where it
    ended, sees its own estimate with noise, and is compared with every pixel that it may see."""
    begun, seen, original = [], [], D.Fit.descend
    def spy(self, y, task, rungs, average):
        begun.append((self.o.input, self.o.target, average))
        for stage in original(self, y, task, rungs, average):
            seen.append((stage, (stage.target != 0).sum().item(), (y != 0).sum().item()))
            yield stage
    monkeypatch.setattr(D.Fit, "descend", spy)
    y = HOLES.forward(smooth_image(12))
    stages = list(D.fit_dip(y, HOLES, nets=2, tail=0.0, iters=60, rungs=12, width=8, depth=2))
    (input1, target1, guess), _, (input2, target2, start), _ = begun
    assert (input1, target1) == ("observed", "conjugate") and (input2, target2) == ("estimate", "plain")
    best = min(stages[:12], key=lambda stage: stage.scores["holdout"])
    assert torch.equal(start, best.average) and not torch.equal(start, guess)
    assert all(count < known for _, count, known in seen[:12])
    assert all(count == known for _, count, known in seen[12:])
    assert stages[0].level == 0 < stages[12].level          # noise is in the second's input only

def test_only_pairs_are_turned(monkeypatch):
    """Theorem 3 allows it: for noise and for missing pixels, but for enlarging there is no pair."""
    turns, original = set(), D.turned
    monkeypatch.setattr(D, "turned", lambda x, g: turns.add(g) or original(x, g))
    cases = [(NOISY, 1, True), (NOISY, 0, False), (HOLES, 1, True), (HOLES, 0, False),
             (D.Task("superres", scale=2), 1, False)]
    for task, allowed, expected in cases:
        turns.clear()
        list(D.fit_dip(task.forward(smooth_image(12)), task, nets=1, turns=allowed, **SMALL))
        assert (len(turns) > 1) == expected

def a_fit(task, y, **options):
    o = D.complete(D.Settings(**options), task, y)
    return D.Fit(o, y, task, torch.Generator().manual_seed(0), None, None)

def test_enlarging_the_dip_cannot_see_where_the_blocks_begin():
    """What a network draws at fixed places of the blocks averages out over the shifts."""
    task = D.Task("blocks", scale=4)
    x = smooth_image(16)
    fit = a_fit(task, task.forward(x), **SMALL)
    fit.net = lambda z, level: z
    assert all(torch.equal(fit.shifted_output(x, 0.1, 4), x) for _ in range(20))
    pattern = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)            # of mean 0 in each block
    fit.net = lambda z, level: z + pattern
    mean = sum(fit.shifted_output(x, 0.1, 4) for _ in range(1000)) / 1000
    assert (fit.shifted_output(x, 0.1, 4) - x).abs().min() > 0.9
    assert (mean - x).abs().max() < 0.2                                 # six standard deviations

@pytest.mark.parametrize("task, options, expected", [
    (D.Task("blocks", scale=4), {}, True), (D.Task("blocks", scale=4), dict(turns=0), False),
    (D.Task("blocks", scale=4), dict(method="primed"), True), (D.Task("blocks", scale=4), dict(method="dip"), False),
    (HOLES, dict(method="primed"), False), (D.Task("blocks", scale=4), dict(method="adapt"), False),
    (D.Task("blocks", scale=4), dict(method="selfdiff"), False), (NOISY, {}, False), (HOLES, {}, False)])
def test_only_the_dip_of_superres_is_shifted(monkeypatch, task, options, expected):
    shifts, original = [], torch.roll
    monkeypatch.setattr(torch, "roll", lambda *args: shifts.append(args[1]) or original(*args))
    prior = tiny_prior() if "method" in options else None
    list(D.fit_dip(task.forward(smooth_image(12)), task, prior, nets=1, **SMALL, **options))
    assert bool(shifts) == expected
    if expected:
        assert len(shifts) == 2 * SMALL["iters"] and len(set(shifts)) > 8
        assert set(sum(shifts, ())) == {-3, -2, -1, 0, 1, 2, 3}

def test_enlarged_pictures_are_the_mean_with_the_interpolation():
    task = D.Task("superres", scale=2)
    x = smooth_image(24)
    y = task.forward(x)
    *stages, last = D.fit_dip(y, task, nets=1, **SMALL)
    assert torch.allclose(last.answer, (stages[-1].answer + task.keep_known(task.interpolate(y), y)) / 2)
    assert torch.allclose(task.forward(last.answer), y, atol=1e-5)
    # Each stage knows every block: none is held out, to be put in at last, unless it is asked for.
    assert all(torch.allclose(task.forward(stage.average), y, atol=1e-5) for stage in stages)
    assert math.isnan(last.risk) and "holdout" not in stages[0].scores
    held = next(D.fit_dip(y, task, nets=1, stop="holdout", **SMALL))
    assert not torch.allclose(task.forward(held.average), y, atol=1e-3) and "holdout" in held.scores
    *stages, last = D.fit_dip(y, task, nets=1, method="selfdiff", **SMALL)       # theirs as it is
    assert torch.equal(last.answer, stages[-1].answer)

@pytest.mark.parametrize("task", [NOISY, HOLES], ids=["noise", "holes"])
def test_the_risk_is_of_what_never_saw_the_held_out_part(task, monkeypatch):
    monkeypatch.setattr(D, "best_share", lambda *images: 1.0)       # it has a test of its own
    x = smooth_image(12)
    y = task.forward(with_noise(x, task.sigma))
    _, _, judge = D.hold_out(y, task, D.stream(0, D.FIT))
    stages = list(D.fit_dip(y, task, nets=2, **SMALL))
    blind = []                                              # estimates before the tails
    for watched, tail in each_network(stages):
        for stage in watched:
            assert stage.scores["holdout"] == pytest.approx(judge(stage.average), rel=1e-5)
        best = min(watched, key=lambda stage: stage.scores["holdout"])
        blind.append(best.average)
        for stage in [watched[-1], *tail]:                  # R is of the answer: of the first network's
            assert stage.stop_step == best.step
            assert stage.risk == pytest.approx(judge(blind[0]), rel=1e-5)
    assert len(blind) == 2 and stages[-1].stop_step == best.step
    risk = judge((blind[0] + blind[1]) / 2)
    if task is HOLES:                   # the second network is left out where it raises R
        risk = min(risk, judge(blind[0]))
    assert stages[-1].risk == pytest.approx(risk, rel=1e-5)

@pytest.mark.parametrize("task, tail", [(NOISY, 0.0), (NOISY, 0.25), (HOLES, 0.25)])
def test_the_tail_sees_what_was_held_out(task, tail, monkeypatch):
    """Every input and target before the tail is made of what the fit may see; those in it of y."""
    bases, targets = [], []
    original_input, original_target, original_split = D.noisy_input, D.noisy_target, D.split_pixels

    def input_spy(o, base, *rest):
        bases.append(base)
        return original_input(o, base, *rest)

    def target_spy(o, y, *rest):
        targets.append(y)
        return original_target(o, y, *rest)

    def split_spy(y, *rest):            # where pixels are missing, it makes the target
        targets.append(y)
        return original_split(y, *rest)

    monkeypatch.setattr(D, "noisy_input", input_spy)
    monkeypatch.setattr(D, "noisy_target", target_spy)
    monkeypatch.setattr(D, "split_pixels", split_spy)
    y = task.forward(with_noise(smooth_image(12), task.sigma))
    stages = list(D.fit_dip(y, task, nets=1, tail=tail, input="observed", **SMALL))
    (watched, rest), = each_network(stages)
    closing = stages[-1]
    seen, seen_task, _ = D.hold_out(y, task, D.stream(0, D.FIT))
    assert len(watched) == round(12 * (1 - tail)) == 12 - len(rest)
    best = min(watched, key=lambda stage: stage.scores["holdout"])
    assert closing.stop_step == best.step and closing.step == 2 * 12
    count = 2 * len(watched)
    assert len(bases) == len(targets) == 2 * 12
    assert all(torch.equal(v, seen) for v in targets[:count])
    assert all(torch.equal(v, y) for v in targets[count:])
    assert all(torch.equal(v, seen_task.interpolate(seen)) for v in bases[:count])
    assert all(torch.equal(v, task.interpolate(y)) for v in bases[count:])
    assert not torch.equal(seen, y)

def test_the_guide_adds_its_weight_times_its_distance():
    """To the classic loss; the distance is that of the output from what the prior makes of it."""
    x, losses = smooth_image(12), []
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        o = settings(method="guide", weight=weight)
        losses.append(D.fit_loss(o, x, x + 0.1, NOISY, 0.0, lambda z, sigma: z + 0.5).item())
    assert losses == pytest.approx([0.01, 0.01 + 0.25, 0.01 + 3 * 0.25])

def test_the_tail_goes_on_from_the_best_stage(monkeypatch):
    """From its weights and from its estimate, also where the judged stages after it were worse."""
    begun, left, original = [], [], D.Fit.descend
    def spy(self, y, task, rungs, average):
        begun.append((copy.deepcopy(self.net.state_dict()), average))
        for stage in original(self, y, task, rungs, average):
            left.append((copy.deepcopy(self.net.state_dict()), stage.average))
            yield stage
    monkeypatch.setattr(D.Fit, "descend", spy)
    scores = itertools.chain([3.0, 1.0], itertools.repeat(2.0))
    monkeypatch.setattr(D, "held_out_risk", lambda *args: next(scores))
    y = HOLES.forward(smooth_image(12))
    assert len(list(D.fit_dip(y, HOLES, nets=1, tail=0.25, **SMALL))) == 13
    (weights, average), (best, estimate) = begun[1], left[1]
    assert torch.equal(average, estimate) and all(torch.equal(weights[name], best[name]) for name in best)

@pytest.mark.parametrize("rise, tail", [(0.9, True), (1.1, False)])
def test_with_noise_a_fit_that_went_past_its_best_has_no_tail(rise, tail, monkeypatch):
    """It would learn there the noise of y, unseen by R: it answers with its best estimate."""
    calls = itertools.count()                               # R is asked twice at each rung
    worse = rise * NOISY.sigma ** 2 / 200
    monkeypatch.setattr(D, "held_out_risk", lambda *args: 3.0 if next(calls) // 2 == 4 else 3.0 + worse)
    *stages, last = D.fit_dip(with_noise(smooth_image(12)), NOISY, nets=1, tail=0.25, **SMALL)
    assert last.stop_step == 10 and len(stages) == (12 if tail else 9)
    assert torch.equal(last.answer, stages[-1 if tail else 4].average)

def test_a_fit_ends_when_its_patience_does(monkeypatch):
    monkeypatch.setattr(D, "PATIENCE", 10)
    scores = iter([3.0, 1.0] + [2.0] * 100)
    monkeypatch.setattr(D, "held_out_risk", lambda *args: next(scores))
    stages = list(D.fit_dip(with_noise(smooth_image(12)), NOISY, nets=1, tail=0.0, **SMALL))
    assert len(stages) == 2 + 10 * 12 // 24 + 1 and stages[-1].stop_step == 4

@pytest.mark.parametrize("stop", ["wmv", "emv"])
def test_a_rule_that_watches_the_outputs(stop):
    y = with_noise(smooth_image(12))
    stages = list(D.fit_dip(y, NOISY, stop=stop, iters=110, nets=1, width=4, depth=1))
    *watched, closing = stages
    assert [stage.step for stage in watched] == list(range(1, 111)) and math.isnan(closing.risk)
    best = min(watched, key=lambda stage: stage.scores[stop])
    assert closing.stop_step == best.step and torch.equal(closing.answer, best.average)

def test_gradient_loss_counts_edges():
    """A constant error has no edges: both losses agree; a checkerboard has many."""
    flat, zero = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).view(1, 1, 8, 8)
    loss = {(kind, name): D.fit_loss(D.Settings(loss=kind), error, zero, NOISY, 0.1, None).item()
            for kind in ("squares", "gradient") for name, error in (("flat", flat), ("board", board))}
    assert loss["squares", "flat"] == loss["gradient", "flat"] == loss["squares", "board"] == 1
    assert loss["gradient", "board"] == pytest.approx(1 + 4 * 2 * 4 * 7 / 8)

def test_edges_count_by_default_where_blocks_are_known():
    blocks = D.Task("superres:2", scale=2)
    assert settings(blocks).loss == "gradient"
    assert {settings(blocks, method="dip").loss, settings(HOLES).loss, settings(NOISY).loss} == {"squares"}
    assert settings(blocks, loss="squares").loss == "squares"

def test_what_each_method_takes_by_default():
    names = "input target stop iters nets rungs high low tail optimiser lr loss".split()
    blocks = D.Task("superres", scale=2)
    classic = ("holdout", 1000, 1, 30, 3.0, 0.4, 0.0, "adam", 0.01, "squares")
    for method, task, *want in (
            ("staged", NOISY, "observed", "conjugate", "holdout", 250, 2, 30, 2.0, 0.4, 0.25, "muon", 0.05, "squares"),
            ("staged", HOLES, "observed", "conjugate", "holdout", 200, 2, 30, 1.5, 0.4, 0.25, "muon", 0.05, "squares"),
            ("staged", blocks, "estimate", "plain", "fixed", 320, 1, 30, 3.0, 0.4, 0.0, "muon", 0.05, "gradient"),
            ("adapt", NOISY, "observed", "conjugate", "holdout", 100, 1, 30, 3.0, 0.4, 0.25, "adam", 1e-4, "squares"),
            ("adapt", HOLES, "first", "conjugate", "fixed", 40, 2, 5, 0.65, 0.65, 0.0, "adam", 1e-3, "squares"),
            ("adapt", blocks, "first", "conjugate", "fixed", 60, 2, 5, 3.0, 0.4, 0.0, "adam", 3e-4, "gradient"),
            ("primed", HOLES, "first", "plain", "fixed", 160, 1, 20, 6.0, 1.5, 0.0, "muon", 0.05, "squares"),
            ("primed", blocks, "first", "plain", "fixed", 160, 1, 20, 6.0, 1.5, 0.0, "muon", 0.05, "gradient"),
            ("dip", NOISY, "fixed", "plain", *classic), ("targets", NOISY, "fixed", "noisy", *classic),
            ("selfdiff", NOISY, "estimate", "plain", *classic), ("guide", NOISY, "fixed", "plain", *classic)):
        o = settings(task, method=method)
        assert [getattr(o, name) for name in names] == want, (method, task.name)
    o = D.complete(D.Settings(), NOISY, torch.zeros(1, 3, 16, 16), brief=True)
    assert (o.iters, o.nets) == (156, 1)
    o = D.complete(D.Settings(), NOISY, torch.zeros(1, 3, 801, 801))
    assert (o.iters, o.nets, o.rungs, o.tail) == (1000, 1, 8, 0.0)
    assert D.in_turn(settings(HOLES), HOLES, torch.zeros(1, 3, 16, 16))[1].high == 3.0
    task = D.Task("inpaint")
    for side, nets in ((192, 2), (193, 1)):             # large: one network; but a DDPM is followed by a DIP
        y = torch.zeros(1, 3, side, side)
        assert [D.complete(D.Settings(method=method), task, y).nets for method in ("staged", "adapt")] == [nets, 2]
    for side, brief, steps, rungs in ((800, False, 160, 20), (800, True, 160, 20), (801, True, 960, 8)):
        y = torch.zeros(1, 3, side, side)
        o = D.complete(D.Settings(method="adapt"), task, y, brief)
        assert [(own.iters, own.rungs) for own in D.in_turn(o, task, y)] == [(40, 5), (steps, rungs)]

def test_pairs_of_pixels_hide_squares_as_deep_as_the_hole(monkeypatch):
    task, sides, split = D.Task("box", mask=torch.ones(1, 1, 48, 48)), [], D.split_pixels
    task.mask[..., 12:36, 12:36] = 0
    monkeypatch.setattr(D, "split_pixels", lambda *words: sides.append(words[3]) or split(*words))
    next(D.fit_dip(task.forward(smooth_image(48)), task, nets=1, **SMALL))
    assert min(sides) > 3

def test_a_told_ddpm_sees_most_of_the_known_pixels():
    y = HOLES.forward(smooth_image(12))
    _, _, _, hidden = told_fit(y, HOLES).draw_pair(y, HOLES, y, 0.65, 1)
    assert hidden.mask.sum() < 0.5 * HOLES.known(y).sum()

def test_the_weight_of_the_newest_step_and_its_rate():
    fit = a_fit(NOISY, torch.zeros(1, 3, 16, 16), iters=200, width=8, depth=2)
    for step, weight, rate in ((1, 1, 0.02), (20, 0.25, 0.4), (50, 0.1, 1), (200, 0.025, 1), (5000, 0.01, 1)):
        fit.step = step - 1
        fit.learn(fit.net(torch.rand(1, 3, 16, 16)).mean())
        assert fit.newest_weight() == pytest.approx(weight)
        want = 0.05 * rate * (1 - 0.9 * min(1, step / 200))
        assert fit.optimisers[0].param_groups[0]["lr"] == pytest.approx(want)

def test_turns_are_made_and_the_last_look_of_a_told_network_makes_eight():
    half, x = torch.zeros(8, 8), torch.rand(1, 1, 8, 8)
    half[:, :4] = 1                             # this network keeps the left half of what it sees
    for turns in (range(4), range(8)):
        assert torch.allclose(D.mean_of_turns(lambda z, level: z * half, x, 0.0, turns), x / 2)
    for given, want in ((1, list(range(8))), (0, [0] * 4)):         # not fitted to turns, it is not asked for any
        fit = told_fit(HOLES.forward(smooth_image(12)), HOLES, turns=given)
        fit.look = lambda y, task, average, turns: turns
        assert sorted(fit.last_look(x, HOLES, x)) == want

def test_without_fresh_a_rung_has_one_noise(monkeypatch):
    ws, original = [], D.noisy_input
    monkeypatch.setattr(D, "noisy_input", lambda *words: ws.append(words[3]) or original(*words))
    list(D.fit_dip(with_noise(smooth_image(12)), NOISY, fresh=0, nets=1, tail=0.0, **SMALL))
    assert all(torch.equal(ws[k], ws[k + 1]) == (k % 2 == 0) for k in range(23))

def test_a_fixed_input_is_shaken():
    z = torch.zeros(1, 32, 64, 64)
    seen, level = D.noisy_input(D.Settings(input="fixed"), z, 1.0, None, 0.2)
    assert seen.std().item() == pytest.approx(1 / 30, rel=0.02) and level == 1 / 30

def test_hold_changes_what_judges():
    how = dict(iters=2, rungs=1, nets=1, width=4, depth=1)
    y = with_noise(smooth_image(12))
    first, second = [next(D.fit_dip(y, NOISY, hold=hold, **how)).scores["holdout"] for hold in (0.25, 1.0)]
    assert first != second

# ---- 5. windows of large photos

@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("side", [4, 64])
def test_a_window_of_y_is_a_of_the_window_of_x(scale, side):
    """Also where the photo is smaller than the window: then it is all of the photo."""
    x = torch.rand(1, 3, 40, 64, generator=D.stream(0, 0))
    mask = (torch.rand(1, 1, 40 // scale, 64 // scale, generator=D.stream(1, 0)) > 0.4).float()
    y = D.Task("both", scale=scale, mask=mask).forward(x)
    gen = D.stream(0, D.FIT)
    places = [D.random_place(y, side, gen) for _ in range(16)]
    part, seen = D.cut(x, places, scale), D.cut(y, places)
    assert seen.shape == (16, 3, min(side, y.shape[2]), min(side, y.shape[3]))
    view = D.Task("both", scale=scale, mask=D.cut(mask, places))
    assert torch.allclose(view.forward(part), seen, atol=1e-6) and 0 < view.mask.mean() < 1
    if side == 4:
        assert len({window.sum().item() for window in part}) > 8
    else:
        assert all(torch.equal(window, x[0]) for window in part)

WINDOWS = dict(width=8, depth=2, nets=1, rungs=8)

@pytest.fixture
def windows(monkeypatch):
    """Photos of more than 1000 pixels are large, and seen in 16 windows of 16 x 16."""
    monkeypatch.setattr(D, "TWO_NETS_PIXELS", 1000)
    monkeypatch.setattr(D, "WHOLE_PIXELS", 1000)
    monkeypatch.setattr(D, "WINDOW", 16)

@fuzz
def test_a_large_photo_is_fitted_in_windows(windows):
    """The answer is for all of y, and better than y; R is near the true error."""
    x = smooth_image(64)[..., :48]
    y = with_noise(x)
    *watched, last = D.fit_dip(y, NOISY, iters=120, tail=0.0, **WINDOWS)
    assert [stage.step for stage in watched] == list(range(15, 121, 15))
    assert all(stage.output.shape == stage.input.shape == (16, 3, 16, 16) for stage in watched)
    best = min(watched, key=lambda stage: stage.scores["holdout"])
    true = ((last.answer - x) ** 2).mean().item()
    assert last.answer.shape == x.shape and true < 0.2 ** 2 / 3
    assert abs(last.risk - ((best.average - x) ** 2).mean()) < 0.2 ** 2 / 4

@pytest.mark.parametrize("scale", [1, 4])
def test_windows_without_noise(windows, scale):
    """Known pixels stay as they are, R is finite, and no window sees what is held out."""
    x = smooth_image(64)
    known = (torch.rand(1, 1, 64, 64, generator=D.stream(0, D.OBSERVE)) > 0.5).float()
    task = D.Task("free", 0.0, scale, known if scale == 1 else torch.tensor(1.0))
    y = task.forward(x)
    *_, last = D.fit_dip(y, task, iters=48, stop="holdout", **WINDOWS)
    assert torch.allclose(task.forward(last.answer), y, atol=1e-5) and last.answer.shape == x.shape
    _, seen_task, judge = D.hold_out(y, task, D.stream(0, D.FIT))
    assert 0 < last.risk < judge(0 * x)
    assert ((last.answer - x) ** 2).mean() < ((task.pinv(y) - x) ** 2).mean()
    other = torch.where(seen_task.mask > 0, y, 1.0)         # another picture where it is held out
    outputs = [[stage.output for stage in D.fit_dip(v, task, iters=8, stop="holdout", **WINDOWS)]
               for v in (y, other)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs))

def test_commands_on_large_photos(tmp_path, priors, windows):
    D.to_image(F.interpolate(smooth_image(), (40, 28), mode="bicubic")).save(tmp_path / "big.png")
    for n, words in enumerate((
            ["fit-dip"], ["fit-dip", "--task", "inpaint:0.5"], ["fit-dip", "--task", "superres:2"],
            ["fit-dip", "--stop", "wmv"], ["fit-dip", "--method", "dip"], ["fit-dip", "--input", "fixed"],
            ["fit-dip", "--method", "adapt"], ["fit-dip", "--observed", "--task", "denoise"],
            ["fit-dip", "--method", "adapt", "--task", "superres:2"],
            ["fit-dip", "--method", "primed", "--task", "inpaint:0.5"],
            ["sample", "--init", "dip", "--task", "superres:4", "--steps", "1", "--samples", "1"],
            ["sample", "--init", "dip", "--task", "inpaint:0.5", "--samples", "1"])):
        flags = ["--image", tmp_path / "big.png", "--iters", 4]
        flags += ["--ckpt", priors / "dip.pt"] if {"sample", "adapt", "primed"} & set(words) else []
        flags += [] if words == ["fit-dip", "--method", "adapt"] else ["--width", 4, "--depth", 2]
        assert run(*words, *flags, "--out", tmp_path / f"{n}") == 0, words
        metrics = read_json(tmp_path / f"{n}" / "metrics.json")
        followed = "sample" in words or ("adapt" in words and "superres:2" in words)   # by a DIP of 96 steps
        assert metrics["iters"] in ((100,) if followed else (3, 4))     # 3: R has risen, so there is no tail
        assert (metrics["psnr"] is None) == ("--observed" in words)
        assert (metrics["risk"] is None) == any(word in " ".join(words) for word in ("wmv", "primed", "superres", "sample"))
        assert Image.open(tmp_path / f"{n}" / "result.png").size == (28, 40)
        both = "sample" not in words and "--observed" not in words      # PSNR, and below it SSIM
        assert (Image.open(tmp_path / f"{n}" / "curves.png").size[1] > 900) == both

CLEAN = ("clean", "x", "x0", "reference", "ground_truth", "truth")

@pytest.mark.parametrize("function", [
    D.fit_dip, D.hold_out, D.draw_lots, D.split_pixels, D.held_out_risk, D.complete, D.ladder,
    D.is_told, D.shifts, D.in_turn, D.told_answer, D.best_share, D.mean_of_turns, D.with_roles, D.splits, D.Fit.__init__, D.Fit.descend, D.Fit.draw_pair, D.Fit.shifted_output,
    D.Fit.told_pair, D.Fit.look, D.Fit.last_look, D.Fit.search, D.Fit.mixed, D.Fit.tail_rungs, D.Fit.source, D.Fit.learn,
    D.noisy_input, D.noisy_target, D.fit_loss, D.random_place, D.cut, D.stop_at,
    D.MovingVariance.update, D.NoiseSchedule.start_t, D.reverse], ids=lambda f: f.__qualname__)
def test_fit_and_stop_have_no_clean_image_parameter(function):
    assert not set(inspect.signature(function).parameters) & set(CLEAN)

@pytest.mark.parametrize("words", [["fit-dip"], ["sample", "--init", "dip", "--steps", 3, "--ckpt"]],
                         ids=["fit-dip", "sample"])
def test_changing_the_clean_image_changes_no_output_bit(priors, words, photo, tmp_path, monkeypatch):
    words = words + [priors / "dip.pt"] if "--ckpt" in words else words
    observe = D.observe
    metrics, results = [], []
    for name, change in (("a", lambda x: x), ("b", torch.zeros_like), ("c", lambda x: None)):
        def changed(args):
            x, y, task = observe(args)
            return change(x), y, task

        monkeypatch.setattr(D, "observe", changed)
        assert run(*words, "--image", photo, *JOINED, "--out", tmp_path / name) == 0
        metrics.append(read_json(tmp_path / name / "metrics.json"))
        results.append((tmp_path / name / "result.png").read_bytes())
    assert results[0] == results[1] == results[2]
    assert metrics[0]["psnr"] != metrics[1]["psnr"] and metrics[2]["psnr"] is None
    assert metrics[0]["stop_iter"] == metrics[1]["stop_iter"] and metrics[0]["risk"] == metrics[2]["risk"]

# ---- 6. joining

def test_marginal_of_the_start():
    schedule, t0 = D.NoiseSchedule(), 300
    xhat, gens = torch.full((1, 1, 64, 64), 0.7), [D.stream(i, D.SAMPLE) for i in range(4)]
    xt = D.noised(schedule, xhat, t0, gens)
    abar = schedule.abar[t0].item()
    assert xt.mean().item() == pytest.approx(0.7 * math.sqrt(abar), abs=4 / 128)
    assert xt.std().item() == pytest.approx(math.sqrt(1 - abar), rel=0.03)
    assert len({v.sum().item() for v in xt}) == 4

def test_a_noisy_start_gets_only_the_missing_noise():
    schedule, sigma = D.NoiseSchedule(), 0.4
    y = with_noise(torch.full((1, 1, 128, 128), 0.5), sigma)
    for t in (250, schedule.start_t(sigma ** 2)):
        abar = schedule.abar[t].item()
        xt = D.noised(schedule, y, t, [D.stream(0, D.SAMPLE)], sigma)
        assert xt.mean().item() == pytest.approx(0.5 * math.sqrt(abar), abs=4 / 128)
        assert xt.std().item() == pytest.approx(math.sqrt(1 - abar), rel=0.03)

def test_noise_init_starts_from_noise_alone(priors, photo, tmp_path, monkeypatch):
    starts, original = [], D.ddim_sample

    def spy(model, schedule, xt, *rest):
        starts.append(xt)
        return original(model, schedule, xt, *rest)

    monkeypatch.setattr(D, "ddim_sample", spy)
    D.to_image(-smooth_image()).save(tmp_path / "other.png")
    for path in (photo, tmp_path / "other.png"):
        assert run("sample", "--init", "noise", "--steps", 1, "--ckpt", priors / "none.pt", "--image",
                   path, "--out", tmp_path / "o") == 0
    assert torch.equal(*starts) and starts[0].std().item() == pytest.approx(1, rel=0.05)

def test_guidance_is_the_product_of_two_gaussians():
    one = torch.full((1, 1, 2, 2), 0.8)
    join = dict(r2=torch.full((11,), 0.04), risk=0.01)
    got = D.refine_x0(one, 5, xhat=one * 0, y=None, task=D.Task("d", sigma=0.1), **join)
    want = (0.8 / 0.04 + 0 / 0.01) / (1 / 0.04 + 1 / 0.01)
    assert got.mean().item() == pytest.approx(want, rel=1e-5)
    task = D.Task("inpaint", mask=torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    got = D.refine_x0(one, 5, xhat=one * 0, y=0.3 * task.mask, task=task, **join)
    assert got[0, 0, 0].tolist() == pytest.approx([0.3, 0.16])
    got = D.refine_x0(one, 5, xhat=None, y=one * 0, task=D.Task("d", sigma=0.2), **join)
    assert got.mean().item() == pytest.approx(0.8 * 0.5)            # noisy y: equal precisions

@pytest.mark.parametrize("scale, mask", [(4, torch.tensor(1.0)), (1, (torch.rand(1, 1, 16, 16) < 0.3).float())])
def test_noise_init_begins_at_the_interpolation_where_it_is_told_of_it(scale, mask):
    """A network that adds nothing answers with the guess, after one call from pure noise; and with
    the mean of pixels, 0, if it is not told."""
    prior, gens = make_prior(silent_unet(1)), [D.stream(k, D.SAMPLE) for k in range(2)]
    task, x = D.Task("t", scale=scale, mask=mask), smooth_image(16, 1)
    y, xt = task.forward(x), D.noise_like(torch.empty(2, 1, 16, 16), gens)
    told = D.reverse(prior, task, xt, 1000, gens, steps=1, clue=task.clue(y, 1))
    assert (told - task.interpolate(y)).abs().max() < 0.01
    assert D.reverse(prior, task, xt, 1000, gens, steps=1).abs().max() < 0.02

def test_the_share_of_an_estimate_is_that_of_least_squares():
    """R of (1 - share) first + share second, least at the projection of the truth, within 0..1."""
    gen = torch.Generator().manual_seed(3)
    x, first, second = torch.randn(3, 1, 1, 20, 20, generator=gen)
    def mse(v):
        return ((v - x) ** 2).mean().item()
    def share(v):
        return D.best_share(mse, first, v)
    step = second - first
    want = ((x - first) * step).mean() / (step ** 2).mean()
    assert 0.1 < want < 0.9 and share(second) == pytest.approx(want.item(), rel=1e-4)
    assert share(2 * first - x) == 0 and share(first) == 1
    assert share(x) == 1 and share(first + 0.1 * (x - first)) == 1
    near = x + 0.3 * torch.randn(x.shape, generator=gen)    # a mean would be better, but by little
    best = min(mse(first.lerp(near, k / 100)) for k in range(101))
    assert 0.8 * mse(near) < best < mse(near) and share(near) == 1

@pytest.mark.parametrize("method", [{}, dict(method="dip", target="conjugate")], ids=["staged", "pairs"])
def test_a_fit_of_pairs_of_pixels_is_mixed_with_the_interpolation(monkeypatch, method):
    """By the share that R finds; the R that comes with the answer is that of the mean, too."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)              # interpolation knows it
    task = D.Task("inpaint", mask=(torch.rand(1, 1, 32, 32) < 0.5).float())
    y = task.forward(x)
    how = dict(iters=4, rungs=2, width=8, depth=2, nets=1, tail=0.0) | method
    guess = task.interpolate(y)
    last = list(D.fit_dip(y, task, **how))[-1]
    assert ((last.answer - x) ** 2).mean() < 1.05 * ((guess - x) ** 2).mean()
    assert torch.equal(task.forward(last.answer), y)
    monkeypatch.setattr(D, "best_share", lambda *images: 0.7)
    *stages, last = D.fit_dip(y, task, **how)
    assert torch.allclose(last.answer, guess.lerp(stages[-1].answer, 0.7))
    assert torch.allclose(task.forward(last.answer), y, atol=1e-6)
    seen, seen_task, judge = D.hold_out(y, task, D.stream(0, D.FIT))
    best = min(stages, key=lambda stage: stage.scores["holdout"])
    want = judge(seen_task.interpolate(seen).lerp(best.average, 0.7))
    assert last.risk == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize("words, told, joined, knows, only", [
    ([], True, False, False, None), (["--no-guide"], False, False, True, None),
    (["--method", "staged"], True, False, False, None), (["--task", "superres:2"], False, True, False, None),
    (["--task", "superres:2"], True, False, True, None), ([], False, True, False, "inpaint:0.5"),
    ([], True, False, True, "inpaint:0.5")])
def test_the_dip_is_the_guess_that_the_ddpm_is_told(tmp_path, photo, priors, monkeypatch, words, told, joined, knows, only):
    """Where the DDPM was trained on DIPs, or for inpaint on many tasks; elsewhere it is told the
    interpolation, and the DIP is weighed in."""
    read = D.read_checkpoint
    def read_as(path):
        state, prior = read(path)
        prior.knows_dips, prior.task = knows, only
        return state, prior
    monkeypatch.setattr(D, "read_checkpoint", read_as)
    clues, joins, original = [], [], D.reverse
    def spy(*args, **flags):
        clues.append(flags["clue"])
        joins.append(flags.get("xhat"))
        return original(*args, **flags)
    answers, fit = [], D.fit_dip
    def spy_fit(*args, **flags):
        for stage in fit(*args, **flags):
            answers.append(stage.answer)
            yield stage
    monkeypatch.setattr(D, "reverse", spy)
    monkeypatch.setattr(D, "fit_dip", spy_fit)
    monkeypatch.setattr(D, "best_share", lambda *images: 0.7)
    flags = ["sample", "--init", "dip", "--image", photo, *JOINED, "--ckpt", priors / "dip.pt", "--out", tmp_path]
    if "--task" not in words:
        flags += ["--task", "inpaint:0.5"]
    _, y, task = observed(*flags, *words)
    assert run(*flags, *words) == 0
    plain = task.interpolate(y)
    assert torch.equal(clues[-1][:, :3], answers[-1] if told else plain)
    assert torch.allclose(task.forward(clues[-1][:, :3]), y, atol=1e-6)
    assert (joins[-1] is not None) == joined and not torch.equal(answers[-1], plain)
    if len(clues) == 2:                 # the control comes first, and sees no DIP
        assert torch.equal(clues[0][:, :3], plain) and joins[0] is None

def test_sample_i_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    prior, start = make_prior(shaken(D.UNet(1, width=8))), smooth_image(16, 1)
    task = D.Task("sr", scale=4)
    y = task.forward(start)

    def sample(seeds):
        gens = [D.stream(seed, D.SAMPLE) for seed in seeds]
        xt = D.noised(prior.schedule, start, 200, gens)
        return D.reverse(prior, task, xt, 200, gens, steps=4, y=y, clue=task.clue(y, 1), xhat=start, risk=0.01)

    many = sample([5, 6, 7])
    for i in range(3):
        assert torch.allclose(many[i:i + 1], sample([5 + i]), atol=1e-4)
    assert (many[0] - many[1]).abs().max() > 1e-3
    assert torch.allclose(task.forward(many), y.expand(3, -1, -1, -1), atol=1e-5)

def test_two_measurements_and_a_noisy_y():
    """0.8 and 0 with the variances 0.04 and 0.01 are 0.16 with 0.008; y, 0 with 0.04, takes a sixth."""
    one = torch.full((1, 1, 2, 2), 0.8)
    join = dict(r2=torch.full((11,), 0.04), task=D.Task("d", sigma=0.2), xhat=0 * one)
    assert D.refine_x0(one, 5, risk=0.01, y=0 * one, **join).mean().item() == pytest.approx(0.16 * 5 / 6)
    assert D.refine_x0(one, 5, risk=-1.0, y=None, **join).abs().max() < 1e-5     # R may be below 0

# ---- 7. metrics

def two_images():
    u = np.arange(3 * 24 * 20).reshape(1, 3, 24, 20)
    a = torch.from_numpy(0.5 + 0.5 * np.sin(u / 7.0))
    return a, torch.from_numpy((0.5 + 0.5 * np.sin(u / 7.0 + 0.3) + 0.1 * np.cos(u)).clip(0, 1))

def test_psnr_and_ssim_golden():
    a, b = two_images()
    assert D.psnr(torch.zeros(4), torch.full((4,), 0.1), 1.0) == pytest.approx(20.0)
    assert D.psnr(a * 2 - 1, b * 2 - 1, 2.0) == pytest.approx(D.psnr(a, b, 1.0))
    assert D.psnr(a, a, 1.0) == math.inf and D.ssim(a, a, 1.0) == pytest.approx(1.0)
    assert D.in_db(0.04) == pytest.approx(20.0) and math.isnan(D.in_db(-1e-9))
    assert D.ssim(a, b, 1.0) == pytest.approx(0.9124603986409611, abs=1e-6)
    assert D.ssim(a[:, :1], b[:, :1], 1.0) == pytest.approx(0.9021090969300879, abs=1e-6)
    with pytest.raises(ValueError):
        D.ssim(a[..., :10], b[..., :10], 1.0)

def test_quality_is_none_where_it_cannot_be_known():
    a, b = two_images()
    a, b = a * 2 - 1, b * 2 - 1
    assert D.quality(a, None) == (None, None) == D.quality(a, b[..., :15])
    assert D.quality(a * 3, b) == (D.psnr((a * 3).clamp(-1, 1), b, 2.0), D.ssim((a * 3).clamp(-1, 1), b, 2.0))
    small, value = b[..., :10], D.psnr(a[..., :10], b[..., :10], 2.0)
    assert D.quality(a[..., :10], small) == (value, None)   # too small for the window of SSIM

def test_ssim_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = two_images()
    want = metrics.structural_similarity(a[0].numpy(), b[0].numpy(), channel_axis=0, data_range=1.0,
                                         gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
    assert D.ssim(a, b, 1.0) == pytest.approx(want, abs=1e-4)

def test_frechet_distance_of_two_gaussians():
    """Exact samples: mean and covariance are as wished, so the distance is the closed form."""
    torch.manual_seed(0)
    white = torch.randn(50, 3, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T)).T)
    a, b = white * torch.tensor([1.0, 2.0, 3.0]) + 1, white * torch.tensor([2.0, 2.0, 0.5]) - 1
    want = 3 * 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert D.frechet(a, b) == pytest.approx(want, rel=1e-9)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    c = (white * torch.tensor([2.0, 2.0, 0.5])) @ turn
    got, sa, sc = D.frechet(a, c), torch.cov(a.T).numpy(), torch.cov(c.T).numpy()
    values = np.linalg.eigvals(sa @ sc).real                # trace of the root of the product
    assert got == pytest.approx(3 + np.trace(sa) + np.trace(sc) - 2 * np.sqrt(values).sum(), rel=1e-6)
    assert abs(D.frechet(a, a)) < 1e-9

def test_recall_and_coverage_by_hand():
    """In one dimension every ball is known: real radii 2 1 2 2 1 2, fake radii 1.1 1 1.1 2 1 2."""
    real = torch.tensor([0.0, 1, 2, 10, 11, 12])[:, None]
    fake = torch.tensor([0.5, 1.5, 1.6, 50, 51, 52])[:, None]
    recall, coverage = D.recall_coverage(real, fake, k=2)
    assert recall == pytest.approx(3 / 6)                   # 0, 1, 2 lie in balls of 0.5, 1.5, 1.6
    assert coverage == pytest.approx(3 / 6)                 # those of 0, 1, 2 hold some of them
    assert D.recall_coverage(real, real + 0.1, k=2) == (1.0, 1.0)
    assert D.recall_coverage(real, real + 0.1, k=9) == (1.0, 1.0)       # fewer than k neighbours

# ---- 8. files, pictures, plots, progress

def pixels(seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

def tensor(array):
    """The plain formula of an 8-bit array."""
    return torch.from_numpy(np.atleast_3d(array) / 127.5 - 1).permute(2, 0, 1)[None].float()

def loaded(path):
    return D.load_image(str(path))

def test_no_code_page_and_no_closed_pipe_raises(tmp_path, monkeypatch, capsys):
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding, newline="\n"))
        assert run("fit-dip", "--image", "\u03c3 \u65e5 \udcff.png", "--out", tmp_path) == 2
        assert raw.getvalue().startswith(b"error: --image: ") and b"\\udcff" in raw.getvalue()
        assert ("\u65e5".encode() in raw.getvalue()) == (encoding == "utf-8")
    monkeypatch.undo()
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError
    for stdout in (Closed(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        D.say("x")
        D.say("y")
    with pytest.raises(SystemExit) as stop:
        D.fail("--out: one\ntwo\r\nthree")
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --out: one two three\n"

@fuzz
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_leaves_and_a_name_that_cannot_be_printed(tmp_path):
    D.to_image(smooth_image()).save(tmp_path / "bild-\u00e4.png")
    flags = " ".join(str(word) for word in [*TINY, "--iters", 2, "--size", 16])
    line = (f'"{sys.executable}" "{D.__file__}" fit-dip --image bild-\u00e4.png {flags} --out o '
            "| head -c 5; exit ${PIPESTATUS[0]}")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and done.stdout == "fit-d" and done.stderr == ""
    assert read_json(tmp_path / "o" / "metrics.json")["image"] == "bild-\u00e4.png"

def test_json_and_csv_are_strict(tmp_path):
    path = tmp_path / "new" / "folder" / "m.json"
    D.save(str(path), {"a": math.nan, "Infinity": [math.inf, (-math.inf, 1.5)], "n": np.float64("nan"),
                       "b": True, "none": None, "name": 'NaN, "Infinity"\n'})
    assert read_json(path) == {"a": None, "Infinity": [None, [None, 1.5]], "n": None, "b": True,
                               "none": None, "name": 'NaN, "Infinity"\n'}
    names = ['a, "b"', "two\nlines", "Infinity.png", "caf\u00e9"]
    rows = [dict(name=name, psnr=value) for name, value in zip(names, (20.5, math.nan, None, math.inf))]
    D.save(str(tmp_path / "log.csv"), rows + [{"name": "x", "extra, column": 0.5}])
    got = read_csv(tmp_path / "log.csv")
    assert [row["name"] for row in got] == names + ["x"]
    assert [row["psnr"] for row in got] == ["20.5", "", "", "", ""]
    assert [row["extra, column"] for row in got] == [""] * 4 + ["0.5"]

def test_pictures_load_as_the_numbers_in_them(tmp_path):
    image = Image.fromarray(pixels())
    image.save(tmp_path / "rgb.png")
    got = loaded(tmp_path / "rgb.png")
    assert got.dtype == torch.float32 and torch.allclose(got, tensor(pixels()), atol=1e-6)
    assert np.array_equal(np.asarray(D.to_image(got)), pixels())
    small = image.quantize(30)                                      # 30 pixels, 30 colours
    small.save(tmp_path / "palette.png")
    assert torch.allclose(loaded(tmp_path / "palette.png"), tensor(np.asarray(small.convert("RGB"))),
                          atol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 6                                                # turn by 90 degrees to view
    image.save(tmp_path / "exif.png", exif=exif)
    assert torch.allclose(loaded(tmp_path / "exif.png"), torch.rot90(tensor(pixels()), -1, (2, 3)), atol=1e-6)
    flat = Image.new("RGB", (16, 16), (200, 60, 30))
    flat.convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    assert (loaded(tmp_path / "c.jpg") - tensor(np.asarray(flat))).abs().max() < 5 / 127.5

def test_every_grey_has_one_channel(tmp_path):
    grey = pixels(shape=(6, 5))
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "g.png")
        assert torch.allclose(loaded(tmp_path / "g.png"), tensor(grey), atol=1e-6), mode
    almost = np.repeat(grey[..., None], 3, 2)
    almost[2, 3, 1] ^= 1
    Image.fromarray(almost).save(tmp_path / "almost.png")
    assert loaded(tmp_path / "almost.png").shape == (1, 3, 6, 5)

def test_transparency_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))                           # a fifth of black
    image.save(tmp_path / "a.png")
    want = np.array([[[255, 255, 255], [0, 0, 255], [204, 204, 204]]])
    assert torch.allclose(loaded(tmp_path / "a.png"), tensor(want), atol=1e-6)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    want = np.array([[[255, 255, 255], [40, 50, 60]]])
    assert torch.allclose(loaded(tmp_path / "p.png"), tensor(want), atol=1e-6)

@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused_by_name(tmp_path, capsys, kind):
    Image.fromarray(np.array([[0, 1], [255, 100]]).astype(kind)).save(tmp_path / "d.tif")
    assert run("fit-dip", "--image", tmp_path / "d.tif", *TINY, "--out", tmp_path / "o") == 2
    one_line(capsys, "--image", "d.tif", "8 bits")

def test_a_profile_is_converted_to_srgb_and_a_broken_one_changes_nothing(tmp_path):
    """sRGB's own profile with red and blue exchanged means the picture with red and blue exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    for profile, want in ((swapped, pixels()[..., ::-1]), (srgb, pixels()), (b"rubbish", pixels()),
                          (swapped[:300], pixels())):
        for mode in ("RGB", "RGBA", "P"):
            Image.fromarray(pixels()).convert(mode).save(tmp_path / "a.png", icc_profile=profile)
            shades = Image.open(tmp_path / "a.png").convert("RGB")          # of a palette there are few
            plain = tensor(np.asarray(shades)[..., ::-1] if profile is swapped else np.asarray(shades))
            assert (loaded(tmp_path / "a.png") - plain).abs().max() < 1.6 / 127.5
            assert mode == "P" or (plain - tensor(want)).abs().max() == 0
    assert (tensor(pixels()) - tensor(pixels()[..., ::-1])).abs().max() > 1     # it is no small thing

def test_saving_rounds_and_clamps():
    x = torch.tensor([[[[-2.0, -1.0, 0.0, 1.0, 2.0, 0.0039]]]], requires_grad=True)
    assert np.asarray(D.to_image(x)).tolist() == [[0, 0, 128, 255, 255, 128]]

def test_find_photos(tmp_path, capsys):
    wanted = ["a.PNG", "b.jpeg", "deep/c.webp", "deep/er/d.tiff", "e.pgm", "f.gif", "g [1].avif"]
    unwanted = ["notes.txt", "h.pdf", "i.eps", "j.h5", ".git/l.png", "runs/m.png", "out/n.png",
                "deep/runs/x/p.png", "noend", "out/metrics.json", "res/arms.png", "res/seconds-x.png"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "deep" / "circle")
    assert D.find_photos(str(tmp_path), "--data") == sorted(str(tmp_path / name) for name in wanted)
    with pytest.raises(SystemExit):
        D.find_photos(str(tmp_path / "out"), "--data")
    one_line(capsys, "--data", "no pictures in")

@pytest.mark.parametrize("size, shown", [((32, 32), (256, 256)), ((50, 100), (150, 300)),
                                         ((256, 256), (256, 256)), ((3000, 1500), (512, 256))])
def test_a_figure_enlarges_by_whole_factors_and_cuts_nothing(size, shown):
    x = torch.full((1, 3, *size), -1.0)
    x[:, 0] = 1                                                     # red
    page = np.asarray(D.figure([("title", x, "note")]))
    red = (page == (255, 0, 0)).all(2)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (len(rows), len(columns)) == shown and red.sum() == shown[0] * shown[1]
    ink = page.min(2) < 128
    assert ink[:rows[0]].any() and ink[rows[-1] + 1:].any()         # title above, note below
    assert not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()

def test_many_panels_wrap():
    def page(count):
        return D.figure([("t", torch.zeros(1, 1, 64, 64), "")] * count)
    assert page(7).height == 2 * page(6).height and page(7).width == page(6).width == 6 * page(1).width

def test_gif_frames_and_times(tmp_path):
    D.save(str(tmp_path / "a.gif"), [Image.new("RGB", (20, 10), (60 * i,) * 3) for i in range(4)])
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [(frame.info["duration"], np.asarray(frame.convert("L")).mean())
                 for frame in ImageSequence.Iterator(gif)]
    assert shown == [(150, 0), (150, 60), (150, 120), (1500, 180)]

@pytest.mark.parametrize("log", [False, True])
def test_a_point_is_where_its_numbers_say(log):
    """Between two dots of another colour, at the share of the way that its numbers give."""
    xs, ys = [1, 30, 1000], [0.01, 0.2, 5]
    curves = [(".ends", xs[::2], ys[::2]), (".dot", xs[1:2], ys[1:2])]
    page = np.asarray(D.plot(curves, "t", "x", "y", log, log), int)
    def centres(color):
        near = np.abs(page - [int(color[i:i + 2], 16) for i in (1, 3, 5)]).max(2) < 40
        rows, columns = np.nonzero(near[:470])                      # the legend is below
        return rows, columns
    rows, columns = centres(D.COLORS[0])
    right = columns > (columns.min() + columns.max()) / 2           # the dot of the largest numbers
    ends = [(columns[~right].mean(), rows[~right].mean()), (columns[right].mean(), rows[right].mean())]
    rows, columns = centres(D.COLORS[1])
    for got, values, low, high in ((columns.mean(), xs, ends[0][0], ends[1][0]),
                                   (rows.mean(), ys, ends[0][1], ends[1][1])):
        a, b, c = np.log10(values) if log else values
        assert got == pytest.approx(low + (b - a) / (c - a) * (high - low), abs=1.5)

@pytest.mark.parametrize("log", [False, True])
def test_every_axis_has_ticks_that_differ(log):
    """Also of few values, of one, of none, and of those that a logarithmic axis cannot show."""
    for values in ([0.3, 0.25], [0.21, 0.4], [1.0], [], [math.nan], [0.0, -1.0, 2.0], [1e-5, 3e5], [29.1, 29.3],
                   [1, 40000], [0.62, 0.98], [5, 6]):
        (low, high), places, names = D.axis_ticks(D.on_axis(values, log), log)
        assert len(places) >= 2 and low <= min(places) and max(places) <= high, values
        assert len(set(names)) == len(names)
        for place, name in zip(places, names):
            assert float(name) == pytest.approx(10 ** place if log else place, rel=1e-3, abs=1e-9)
        curves = [("c", values, values), (".d", values, [None] * len(values))]
        assert D.plot(curves, "t", "x", "y", log, log, (1, "mark")).width == 900

def test_clock():
    assert [D.clock(s) for s in (0, 8.4, 59.6, 3599.7, 7391)] == [
        "0:00:00", "0:00:08", "0:01:00", "1:00:00", "2:03:11"]

def test_progress_is_a_line_now_and_then(monkeypatch, capsys):
    """By a clock that goes on by a second in each step."""
    now, when, lines = [1000.0], [], []
    monkeypatch.setattr(D.time, "monotonic", lambda: now[0])
    bar = D.Progress(3600, "DIP")
    bar.text = "loss 0.25"
    for second in range(1, 3601):
        now[0] += 1
        bar.step()
        said = capsys.readouterr().out
        if said:
            when.append(second)
            lines.append(said)
    assert when[:4] == [5, 10, 20, 40] and bar.count == bar.seconds == 3600
    gaps = np.diff(when).tolist()
    assert gaps == sorted(gaps) and gaps[-1] == 60 and 3600 - when[-1] < 60
    assert lines[0] == "DIP 5/3600, 0:59:55 left loss 0.25\n"
    assert all(line.count("\n") == 1 and "\r" not in line for line in lines)

# ---- 9. the commands

FIT_KEYS = {"psnr", "ssim", "psnr_observed", "seconds", "iters", "stop_iter", "risk", "sigma"}
SAMPLE_KEYS = {"psnr", "ssim", "psnr_observed", "seconds", "psnr_dip", "psnr_ddpm", "psnr_mean", "psnr_sample",
               "t0", "nfe", "seconds_dip", "seconds_ddpm"}

def outputs(out, keys):
    """The metrics of a command, whose files are all there and whole."""
    for name in ("result.png", "figure.png", "curves.png"):
        Image.open(out / name).load()
    metrics = read_json(out / "metrics.json")
    assert keys <= set(metrics) and (out / "log.csv").exists()
    assert read_csv(out / "log.csv") or metrics["interrupted"]
    assert not list(out.glob("*.tmp"))
    return metrics

@pytest.mark.parametrize("extra", [
    "", "--task inpaint:0.8", "--task superres:4", "--method dip --stop wmv", "--method targets --stop emv",
    "--method selfdiff --stop fixed", "--method adapt", "--method guide", "--tail 0.9", "--rungs 1",
    "--observed --task denoise", "--observed --task superres:2"])
def test_fit_dip(tmp_path, photo, priors, extra):
    flags = ["--image", photo, *(SHORT if "adapt" in extra else TINY), "--out", tmp_path]
    if "mv" in extra:                                       # these rules look at every step
        assert run("fit-dip", *flags, *extra.split()) == 2
        flags = [word for k, word in enumerate(flags) if "--rungs" not in flags[max(0, k - 1):k + 1]]
    if "adapt" in extra or "guide" in extra:
        flags += ["--ckpt", priors / "dip.pt"]
    assert run("fit-dip", *flags, *extra.split()) == 0
    metrics = outputs(tmp_path, FIT_KEYS)
    assert (metrics["psnr"] is None) == ("--observed" in extra) and metrics["stop_iter"] > 0
    steps = [int(row["step"]) for row in read_csv(tmp_path / "log.csv")]
    assert steps == sorted(steps) and steps[-1] == metrics["iters"]
    if metrics["psnr"] is not None:
        x, result = loaded(photo), loaded(tmp_path / "result.png")
        assert metrics["psnr"] == pytest.approx(D.psnr(result, x, 2.0), abs=0.1)

@pytest.mark.parametrize("line", [
    "sample --init dip --method adapt --task denoise:25 --steps 2", "sample --init dip --method guide --steps 2",
    "fit-dip --method guide --input estimate", "fit-dip --method adapt --nets 2",
    "fit-dip --method adapt --optimiser muon", "fit-dip --input fixed --task superres:4"])
def test_odd_combinations_work(tmp_path, photo, priors, line):
    flags = ["--image", photo, *SHORT, "--out", tmp_path / "o"]
    if "superres" not in line:
        flags += ["--ckpt", priors / "dip.pt"]
    assert run(line.split()[0], *flags, *line.split()[1:]) == 0
    metrics = read_json(tmp_path / "o" / "metrics.json")
    assert metrics["iters"] == (12 if "--nets 2" in line else 6)

def test_what_is_known_comes_back_as_given(tmp_path, photo, priors):
    """With a mask of the photo's own size, with and without --size, by the whole command."""
    mask = np.full((16, 16), 255, np.uint8)
    mask[4:8, 4:8] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--image", photo, "--observed", "--task", "inpaint", "--mask", tmp_path / "mask.png", *TINY,
             "--nets", 2, "--out", tmp_path / "o"]
    given = np.asarray(Image.open(photo))
    for words in (["fit-dip"], ["fit-dip", "--method", "dip"],
                  ["sample", "--init", "dip", "--steps", 2, "--ckpt", priors / "dip.pt"]):
        assert run(*words, *flags) == 0
        result = np.asarray(Image.open(tmp_path / "o" / "result.png"))
        assert np.array_equal(result[mask > 0], given[mask > 0])
    assert run("fit-dip", *flags, "--size", 12) == 0
    result = np.asarray(Image.open(tmp_path / "o" / "result.png"))
    inner = mask[2:14, 2:14] > 0
    assert np.array_equal(result[inner], given[2:14, 2:14][inner])

def test_grey_in_three_equal_channels_is_grey(tmp_path):
    grey = D.to_image(smooth_image(channels=1))
    grey.save(tmp_path / "one.png")
    grey.convert("RGB").save(tmp_path / "three.png")
    for name in ("one", "three"):
        assert run("fit-dip", "--image", tmp_path / f"{name}.png", *TINY, "--out", tmp_path / name) == 0
    one, three = ((tmp_path / name / "result.png").read_bytes() for name in ("one", "three"))
    assert one == three

def test_same_seed_same_bytes(tmp_path, photo):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("fit-dip", "--image", photo, *TINY, "--seed", seed, "--out", tmp_path / name) == 0
    a, b, c = ((tmp_path / name / "result.png").read_bytes() for name in "abc")
    assert a == b != c

@pytest.mark.parametrize("size", [(1, 1), (15, 17), (2, 40)])
@pytest.mark.parametrize("task", ["denoise:25", "inpaint:0.05"])
def test_small_images(tmp_path, size, task):
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "s.png")
    assert run("fit-dip", "--image", tmp_path / "s.png", "--task", task, *TINY, "--depth", 4, "--seed", 3,
               "--out", tmp_path / "o") == 0
    assert Image.open(tmp_path / "o" / "result.png").size == size[::-1]

def observed(*flags):
    return D.observe(D.parse([str(word) for word in flags]))

def test_told_changes_the_method_not_the_observation(tmp_path):
    photo = tmp_path / "photo.png"
    D.to_image(smooth_image(64)).save(photo)
    got = [observed("fit-dip", "--image", photo, *told) for told in ([], ["--told", 30], ["--told", 0])]
    assert all(torch.equal(got[0][1], y) for _, y, _ in got)
    assert [task.sigma for _, _, task in got] == pytest.approx(
        [50 / 255, 60 / 255, D.estimate_sigma(got[0][1])])

def test_a_clean_photo_is_degraded_as_the_task_says(photo):
    x = loaded(photo)
    clean, y, task = observed("fit-dip", "--image", photo, "--task", "superres:4")
    assert torch.equal(clean, x) and torch.allclose(y, F.avg_pool2d(x, 4)) and task.sigma == 0
    _, y, task = observed("fit-dip", "--image", photo, "--task", "inpaint:0.6")
    assert torch.equal(y, x * task.mask) and task.mask.mean().item() == pytest.approx(0.4, abs=0.12)
    _, y, _ = observed("fit-dip", "--image", photo, "--task", "denoise:50")
    assert (y - x).std().item() == pytest.approx(50 / 127.5, rel=0.1)
    clean, y, task = observed("fit-dip", "--image", photo, "--task", "denoise", "--observed")
    assert clean is None and torch.equal(y, x)
    assert task.noise.level in (0, D.find_noise(x).level) and task.sigma == task.noise.level

@pytest.mark.parametrize("extra", [
    "--init dip", "--init dip --task denoise:25", "--init dip --no-guide", "--init dip --no-clue", "--init dip --observed --task superres:4",
    "--init observed --task inpaint:0.8 --start 30", "--init noise --eta 1"])
def test_sample(tmp_path, photo, priors, extra):
    ckpt = priors / ("none.pt" if "init noise" in extra else "dip.pt")
    flags = ["--image", photo, "--steps", 3, "--samples", 2, "--out", tmp_path, "--ckpt", ckpt]
    if "--init dip" in extra:
        flags += JOINED
    assert run("sample", *flags, *extra.split()) == 0
    metrics = outputs(tmp_path, SAMPLE_KEYS)
    assert 1 <= metrics["nfe"] <= 3 and metrics["t0"] >= metrics["nfe"]
    assert (metrics["psnr_dip"] is None) == ("--init dip" not in extra or "--observed" in extra)
    assert (metrics["psnr_ddpm"] is not None) == (extra in ("--init dip", "--init dip --no-guide"))
    assert metrics["seconds"] == pytest.approx(metrics["seconds_dip"] + metrics["seconds_ddpm"])

@pytest.mark.parametrize("task", ["inpaint:0.8", "superres:4"])
def test_the_control_of_a_join_is_the_answer_from_the_interpolation(tmp_path, photo, priors, task):
    """`--init dip` shows what the DDPM alone makes of y: bit for bit the answer of `--init observed`."""
    flags = ["--image", photo, "--task", task, "--steps", 2, "--samples", 2, "--ckpt", priors / "dip.pt"]
    assert run("sample", "--init", "dip", *JOINED, *flags, "--out", tmp_path / "joined") == 0
    assert run("sample", "--init", "observed", *flags, "--out", tmp_path / "alone") == 0
    joined, alone = [outputs(tmp_path / name, SAMPLE_KEYS) for name in ("joined", "alone")]
    assert joined["psnr_ddpm"] == alone["psnr"] != joined["psnr"]

@pytest.mark.parametrize("extra, method", [
    ("", "adapt"), ("--task inpaint:0.5", "adapt"), ("--task superres:4", "adapt"), ("--task denoise:25", "staged"),
    ("--no-clue", "staged"), ("--no-guide", "staged"), ("--method dip", "dip")])
def test_a_join_fits_the_ddpm_to_the_photo_where_it_is_told_y(extra, method):
    assert D.parse(["sample", "--init", "dip", *extra.split()]).method == method

@pytest.mark.parametrize("extra, method", [
    ("", "adapt"), ("--task superres:2", "adapt"), ("--method primed", "primed"), ("--no-guide", None),
    ("--nets 3", "adapt"),
    ("--no-clue", None), ("--method staged", None), ("--method adapt --task denoise:25", None)])
def test_the_answer_of_a_join_is_the_mean_of_three(tmp_path, photo, priors, monkeypatch, extra, method):
    """The DDPM's answer that the DIP saw, the DIP, and the DDPM that starts at the DIP, as 1 : 3 : 1. With
    adapt this DDPM is fitted to the photo; that of the control never is."""
    drawn, asked, pages, seen = [], [], [], []
    draw, finish, search = D.draw_samples, D.finish, D.Fit.search
    monkeypatch.setattr(D, "draw_samples", lambda args, prior, *a, **k: (
        asked.append(prior.model.out.bias.clone()), drawn.append(draw(args, prior, *a, **k)))[1] or drawn[-1])
    monkeypatch.setattr(D, "finish", lambda *a: pages.append(dict(a[4])) or finish(*a))
    monkeypatch.setattr(D.Fit, "search", lambda *a: seen.append(a[3]) or search(*a))
    flags = ["--image", photo, "--ckpt", priors / "dip.pt", "--out", tmp_path, "--iters", 6]
    assert run("sample", "--init", "dip", *flags, *extra.split()) == 0
    *_, told = [samples.mean(dim=0, keepdim=True) for samples in drawn]
    expected = (seen[-1] + 3 * pages[0]["DIP"] + told) / 5 if method else told
    torch.testing.assert_close(pages[0]["joined"], expected)
    trained = load(priors / "dip.pt")["ema"]["out.bias"]
    assert [torch.equal(bias, trained) for bias in asked][:-1] == [True] * (len(asked) - 1)
    assert torch.equal(asked[-1], trained) == (method != "adapt")

@pytest.mark.parametrize("extra, fitted", [("", True), ("--size 35", False), ("--size 35 --method adapt", True),
                                           ("--task superres:4", False), ("--task superres:2", True)])
def test_a_ddpm_is_fitted_to_256_known_pixels_at_least(tmp_path, photo, priors, monkeypatch, capsys, extra, fitted):
    """Of 40 x 40 pixels a fifth is 320, of 35 x 35 it is 245; of 2 x 2 blocks there are 400, of 4 x 4 100."""
    monkeypatch.setattr(D, "FITTED_PIXELS", 16 ** 2)
    built, begin = [], D.Fit.__init__
    monkeypatch.setattr(D.Fit, "__init__", lambda fit, o, *a: built.append(o.method) or begin(fit, o, *a))
    D.to_image(smooth_image(40)).save(photo)
    flags = ["--image", photo, "--ckpt", priors / "dip.pt", "--out", tmp_path, "--iters", 2, *extra.split()]
    assert run("sample", "--init", "dip", *flags) == 0
    assert built == (["adapt", "primed"] if fitted else ["primed"])
    assert ("fewer than 256 known pixels" in capsys.readouterr().out) == (not fitted)

def test_what_the_rules_take_is_in_the_metrics(tmp_path, photo):
    assert run("fit-dip", "--image", photo, *TINY, "--out", tmp_path) == 0
    metrics = read_json(tmp_path / "metrics.json")
    path = [row for row in read_csv(tmp_path / "log.csv") if row["fixed"]]
    assert metrics["psnr_oracle"] == max(float(row["psnr"]) for row in path)
    chosen = min(path, key=lambda row: float(row["holdout"]))
    assert metrics["psnr_holdout"] == float(chosen["psnr"])

def test_samples_are_compared_as_a_mean_alone_and_with_each_other():
    x = torch.zeros(1, 1, 4, 4)
    found = D.compare_samples(torch.cat([x + 0.1, x - 0.1]), x + 0.1)
    assert found == pytest.approx(dict(psnr_mean=D.in_db(0.01), psnr_sample=D.in_db(0.02), spread=12.75))

def test_where_a_noisy_photo_starts_and_what_joins_it(tmp_path, photo, priors, monkeypatch):
    seen, noised, reverse = [], D.noised, D.reverse
    monkeypatch.setattr(D, "noised", lambda *words: seen.append(words[2:]) or noised(*words))
    monkeypatch.setattr(D, "reverse", lambda *words, **join: seen.append(join) or reverse(*words, **join))
    for words, sigma in ((["observed"], 50 / 255), (["dip", *TINY], 0)):
        flags = ["--task", "denoise:25", "--image", photo, "--ckpt", priors / "dip.pt", "--out", tmp_path]
        assert run("sample", *flags, "--init", *words) == 0
        risk = read_json(tmp_path / "metrics.json").get("risk")
        (t0, _, level), join = seen[-2:]
        assert level == pytest.approx(sigma) and t0 == D.NoiseSchedule().start_t(risk or sigma ** 2)
        assert join.get("y") is None and join["eta"] == 1 and join.get("risk") == risk

@pytest.mark.parametrize("words, name", [
    ("sample", "none"), ("sample --task superres:4", "none"), ("sample --init observed", "inpaint-0.8"),
    ("sample --init dip --task inpaint:0.50", "inpaint-0.5"), ("sample --init dip --task superres:4.0", "superres-4"),
    ("sample --init dip --task inpaint:0.123456789", "inpaint-0.123456789"),
    ("sample --init dip --task inpaint:0.00001", "inpaint-1e-05"),
    ("sample --init dip --no-clue", "dip"), ("sample --init dip --method guide", "dip"),
    ("sample --init dip --task inpaint:1", "dip"), ("sample --init dip --task inpaint", "dip"),
    ("sample --init dip --task denoise:25", "dip"), ("fit-dip --method adapt", "dip"),
    ("fit-dip --method adapt --task superres:2", "superres-2"), ("fit-dip --method guide --task superres:2", "dip"),
    ("fit-dip --method primed --task inpaint:0.8", "inpaint-0.8")])
def test_the_default_prior_is_that_of_the_start_and_of_the_task(words, name):
    assert D.prior_path(D.parse(words.split())) == f"runs/train/{name}.pt"

def test_a_method_without_a_ddpm_has_no_prior():
    assert D.prior_path(D.parse(["fit-dip", "--task", "superres:4"])) is None

@pytest.mark.parametrize("words, trained", [
    ("--init observed --task superres:2", ("dip", "superres:2")),
    ("--init observed --task inpaint:0.00001", ("dip", "inpaint:1e-05")), ("--init observed --task denoise:25", ("dip", None)),
    ("--task superres:2", ("none", None)), ("--ckpt runs/train/none.pt", ("none", None)),
    ("--init observed --ckpt runs/train/dip.pt", ("dip", None))])
def test_what_is_trained_by_default(tmp_path, photo, default_prior, words, trained):
    assert run("sample", "--steps", 1, "--samples", 1, "--image", photo, *words.split()) == 0
    assert [entry[:2] for entry in default_prior] == [trained]

def test_a_prior_that_is_named_is_not_trained(photo, default_prior, capsys):
    assert run("sample", "--init", "observed", "--image", photo, "--ckpt", "runs/train/superres-4.pt") == 2
    one_line(capsys, "--ckpt")
    assert default_prior == []

def test_the_mask_is_in_the_fingerprint(tmp_path, photo):
    flags = ["--image", str(photo), "--task", "inpaint", "--mask", str(photo), "--out", str(tmp_path)]
    args = D.parse(["fit-dip", *flags])
    args.image = None
    assert list(D.fingerprint(args)) == [str(photo)]

def test_a_schedule_is_that_of_the_network(tmp_path, data, monkeypatch):
    nets, train = [], D.train_ddpm
    monkeypatch.setattr(D, "train_ddpm", lambda state, net, *more: nets.append(net) or train(state, net, *more))
    assert run("train", *BRIEF, "--data", data, "--out", tmp_path, "--schedule", "cosine") == 0
    for net in (nets[0], D.Prior(load(tmp_path / "none.pt")).model):
        assert torch.equal(net.schedule.abar, D.NoiseSchedule(1000, "cosine").abar)

# ---- 9. photos as they are

def noisy_photo(path, n=96, sigma=0.1):
    """A photo whose noise is not white, saved as a picture of 8 bits."""
    x = smooth_image(n)
    y = x + blurred_noise(x.shape, sigma)
    D.to_image(y).save(path)
    return x

def test_a_thumbnail_smaller_than_a_block_is_enlarged(tmp_path):
    D.to_image(smooth_image(5)).save(tmp_path / "t.png")
    words = ["fit-dip", "--image", tmp_path / "t.png", "--observed", "--task", "superres:8", *TINY]
    assert run(*words, "--out", tmp_path / "o") == 0
    assert Image.open(tmp_path / "o" / "result.png").size == (40, 40)

@fuzz
def test_a_photo_with_noise_of_its_own(tmp_path, capsys):
    x = noisy_photo(tmp_path / "p.png", n=136)
    words = ["fit-dip", "--image", tmp_path / "p.png", "--observed", "--task", "denoise", "--iters", 20,
             "--rungs", 4, "--width", 8, "--out", tmp_path / "o"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    found = outputs(tmp_path / "o", FIT_KEYS)["noise"]
    assert "not white" in said and found["white"] is False
    assert found["level"] == pytest.approx(0.1 * 127.5, rel=0.15) and str(round(found["level"], 1)) in said
    assert found["neighbour"] == pytest.approx(2 / 3, abs=0.12)
    assert {"dark", "middle", "bright"} < set(found)
    assert Image.open(tmp_path / "o" / "noise.png").size[0] > 400               # two panels
    assert Image.open(tmp_path / "o" / "figure.png").size[1] > 2 * 136          # and the centres
    y, answer = loaded(tmp_path / "p.png"), loaded(tmp_path / "o" / "result.png")
    assert ((answer - x) ** 2).mean() <= 1.1 * ((y - x) ** 2).mean()

def band_energies(error):
    """The mean square of an image's Fourier coefficients in eight rings of frequency."""
    power = torch.fft.fft2(error).abs() ** 2
    u = torch.fft.fftfreq(error.shape[-1]).abs()
    ring = (torch.maximum(u[:, None], u[None]) * 15.99).long()
    return [power[..., ring == k].mean().item() for k in range(8)]

@fuzz
def test_noise_told_wrongly_is_amplified_in_no_band(tmp_path, capsys):
    """A grey wall with correlated noise of level 6 and white of 1, told to be white and 25."""
    x = torch.full((1, 3, 64, 64), 0.1)
    y = with_noise(x, 1 / 127.5) + blurred_noise(x.shape, 6 / 127.5, seed=1)
    D.to_image(y).save(tmp_path / "p.png")
    y = loaded(tmp_path / "p.png")
    before = band_energies(y - x)
    words = ["fit-dip", "--image", tmp_path / "p.png", "--observed", "--task", "denoise:25", "--iters", 60,
             "--nets", 1, "--width", 16, "--out", tmp_path / "o"]
    assert run(*words) == 0
    assert "not white noise of level 25" in capsys.readouterr().out
    after = band_energies(loaded(tmp_path / "o" / "result.png") - x)
    assert all(b <= 1.02 * a for a, b in zip(before, after))
    assert after[0] < 0.5 * before[0]               # and it is removed

def test_told_rightly_nothing_is_said_and_insisting_is_obeyed(photo, tmp_path, capsys):
    D.to_image(with_noise(smooth_image(96), 0.1)).save(tmp_path / "white.png")
    _, _, task = observed("fit-dip", "--image", tmp_path / "white.png", "--observed", "--task", "denoise:13")
    assert task.noise is None and task.sigma == 13 / 127.5
    assert "instead" not in capsys.readouterr().out
    noisy_photo(tmp_path / "p.png")
    insist = ["fit-dip", "--image", tmp_path / "p.png", "--observed", "--noise", "white", "--task"]
    _, _, task = observed(*insist, "denoise:25")
    assert task.noise is None and task.sigma == 25 / 127.5
    _, _, task = observed(*insist, "denoise")
    assert task.noise.white and task.sigma == pytest.approx(0.1, rel=0.15)

@pytest.mark.parametrize("kind", ["screenshot", "one pixel", "a line"])
@pytest.mark.parametrize("command", ["fit-dip", "sample"])
def test_where_no_noise_is_found_the_photo_comes_back(tmp_path, capsys, kind, command, priors):
    pixels = np.full((1, 1, 3), 90, np.uint8)
    if kind != "one pixel":
        pixels = np.full((3, 70, 3) if kind == "a line" else (60, 70, 3), 240, np.uint8)
        pixels[1:40, 20:50] = (20, 90, 200)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    flags = ["--ckpt", priors / "dip.pt", "--init", "observed"] if command == "sample" else []
    words = ["--image", tmp_path / "p.png", "--observed", "--task", "denoise", "--out", tmp_path / "o"]
    assert run(command, *flags, *words) == 0
    assert "nothing is found to remove" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o" / "result.png").convert("RGB")), pixels)
    assert read_json(tmp_path / "o" / "metrics.json")["noise"]["level"] == 0

def test_jpeg_level(tmp_path):
    image = D.to_image(smooth_image(32))
    image.save(tmp_path / "p.png")
    assert D.jpeg_level(tmp_path / "p.png") == 0
    levels = []
    for quality in (95, 75, 50):
        image.save(tmp_path / "p.jpg", quality=quality)
        levels.append(D.jpeg_level(tmp_path / "p.jpg") * 127.5)
        steps = Image.open(tmp_path / "p.jpg").quantization[0]
        assert levels[-1] == pytest.approx(math.sqrt(sum(q * q for q in steps) / 64 / 12) / 2)
    assert levels == sorted(levels) and levels[1] == pytest.approx(4.87, abs=0.01)

@fuzz
def test_what_cannot_be_right_is_said(tmp_path, capsys, monkeypatch):
    white = with_noise(torch.zeros(1, 3, 64, 64), 0.05).clamp(-1, 1)
    white[..., :20] = 1.0                           # nearly a third is clipped
    D.to_image(white).save(tmp_path / "p.png")
    observed("fit-dip", "--image", tmp_path / "p.png", "--observed", "--task", "denoise")
    assert "a fifth of the photo is clipped" in capsys.readouterr().out
    flags = ["--image", tmp_path / "p.png", "--out", tmp_path / "o", "--task", "denoise:10", "--iters", 60,
             "--nets", 1, "--width", 8, "--rungs", 6]
    assert run("fit-dip", *flags, "--told", 40) == 0                            # four times too much
    assert "R is below zero by more than its spread" in capsys.readouterr().out
    assert run("fit-dip", *flags) == 0
    assert "R is below zero" not in capsys.readouterr().out

def test_sample_takes_noise_that_is_not_white_for_twice_as_much(tmp_path, priors, monkeypatch):
    noisy_photo(tmp_path / "p.png", sigma=0.05)
    prior = D.Prior(load(priors / "dip.pt"))
    words = ["sample", "--init", "observed", "--image", tmp_path / "p.png", "--observed", "--task",
             "denoise", "--steps", 1, "--ckpt", priors / "dip.pt", "--out", tmp_path / "o"]
    assert run(*words) == 0
    metrics = outputs(tmp_path / "o", SAMPLE_KEYS)
    level = metrics["noise"]["level"] / 127.5
    assert metrics["t0"] == prior.schedule.start_t((2 * level) ** 2)

def test_sample_gives_detail_back(tmp_path, priors, monkeypatch):
    backs, back = [], D.give_back
    monkeypatch.setattr(D, "give_back", lambda *words: backs.append(1) or back(*words))
    noisy_photo(tmp_path / "p.png", sigma=0.05)
    assert run("sample", "--init", "observed", "--image", tmp_path / "p.png", "--observed", "--task", "denoise",
               "--ckpt", priors / "dip.pt", "--out", tmp_path / "o") == 0
    assert len(backs) == 1

def test_the_error_of_a_jpeg_is_a_floor(tmp_path):
    D.to_image(smooth_image(32)).save(tmp_path / "p.jpg", quality=50)
    _, _, task = observed("fit-dip", "--observed", "--task", "denoise", "--image", tmp_path / "p.jpg")
    assert task.noise.floor == D.jpeg_level(tmp_path / "p.jpg") and not task.noise.white
    assert task.sigma >= task.noise.floor

# ---- 9. the commands

def test_sample_starts_where_it_is_told_or_where_the_rule_says(tmp_path, photo, priors):
    """Untold, the start rule; told, the level 2; one call each; flags go first. From noise 20 calls."""
    prior = D.Prior(load(priors / "dip.pt"))
    flags = ["sample", "--image", photo, "--samples", 1, "--ckpt", priors / "dip.pt", "--out", tmp_path]
    for init, extra in itertools.product((["--init", "observed"], ["--init", "dip", *JOINED]),
                                         ([], ["--start", 9], ["--start", "auto", "--no-clue", "--steps", 2],
                                          ["--steps", 3])):
        assert run(*flags, *init, *extra) == 0
        metrics = read_json(tmp_path / "metrics.json")
        told, given_steps = "--no-clue" not in extra, "--steps" in extra
        error = metrics["risk"] if "dip" in init else (25 / 127.5) ** 2
        rule = min(prior.schedule.start_t(4.0 if told else error), prior.t_max)
        assert metrics["t0"] == (9 if 9 in extra else rule)
        assert metrics["nfe"] == (extra[-1] if given_steps else 1)
    assert run(*flags, "--init", "observed", "--no-clue") == 0
    assert read_json(tmp_path / "metrics.json")["nfe"] == 1
    assert run(*flags, "--ckpt", priors / "none.pt") == 0
    assert read_json(tmp_path / "metrics.json")["nfe"] == 20

@pytest.mark.parametrize("kind, mode", [("none.pt", "RGB"), ("grey/none.pt", "L")])
def test_samples_from_noise_alone_have_a_panel_each(tmp_path, priors, kind, mode, monkeypatch):
    """Nothing is known: the result is the first, and does not depend on how many there are."""
    panels, original = [], D.figure
    monkeypatch.setattr(D, "figure", lambda page, *more: panels.append(page) or original(page, *more))
    D.to_image(smooth_image(channels=len(mode))).save(tmp_path / "photo.png")
    flags = ["sample", "--init", "noise", "--task", "inpaint:1", "--steps", 3, "--image",
             tmp_path / "photo.png", "--ckpt", priors / kind]
    for count in (3, 1):
        assert run(*flags, "--samples", count, "--out", tmp_path / f"{count}") == 0
        metrics = outputs(tmp_path / f"{count}", SAMPLE_KEYS)
        assert metrics["nfe"] == 3 and metrics["t0"] == 1000 and metrics["psnr_dip"] is None
    assert [title for title, _, _ in panels[0]] == ["given", "seed 2", "seed 1", "seed 0", "clean"]
    assert not torch.equal(panels[0][1][1], panels[0][2][1])
    results = [np.asarray(Image.open(tmp_path / name / "result.png"), int) for name in "31"]
    assert Image.open(tmp_path / "3" / "result.png").mode == mode and abs(results[0] - results[1]).max() <= 1

def test_grey_photo_with_a_colour_prior(tmp_path, priors):
    D.to_image(smooth_image(channels=1)).save(tmp_path / "grey.png")
    for name, words in (("o", ["sample", "--init", "dip", "--steps", 2]), ("p", ["fit-dip", "--method", "adapt"]),
                        ("q", ["fit-dip", "--method", "adapt", "--task", "inpaint:0.5"])):
        assert run(*words, "--image", tmp_path / "grey.png", *SHORT, "--nets", 2, "--out", tmp_path / name, "--ckpt",
                   priors / "dip.pt") == 0
        assert Image.open(tmp_path / name / "result.png").mode == "L"

def test_each_channel_of_a_grey_photo_has_noise_of_its_own(tmp_path, priors, monkeypatch):
    """As in training: a colour prior has not learned to remove noise that is grey."""
    begun, reverse = [], D.reverse
    def spy(prior, task, xt, *args, **options):
        begun.append(xt)
        return reverse(prior, task, xt, *args, **options)
    monkeypatch.setattr(D, "reverse", spy)
    D.to_image(smooth_image(channels=1)).save(tmp_path / "grey.png")
    for n, init in enumerate(("observed", "dip")):
        flags = [*SHORT, "--nets", 2] if init == "dip" else []
        assert run("sample", "--init", init, "--image", tmp_path / "grey.png", *flags, "--out", tmp_path / "o",
                   "--ckpt", priors / "dip.pt") == 0
        apart = begun[n] - begun[n].mean(dim=1, keepdim=True)
        assert begun[n].shape[1] == 3 and apart.std() > 0.3
        assert Image.open(tmp_path / "o" / "result.png").mode == "L"

def test_nothing_known_is_a_sample_of_the_prior(tmp_path, priors, photo):
    Image.new("RGB", (16, 16), (200, 60, 30)).save(tmp_path / "other.png")
    for name, path in (("a", photo), ("b", tmp_path / "other.png")):
        assert run("sample", "--init", "noise", "--image", path, "--task", "inpaint:1", "--steps", 2,
                   "--ckpt", priors / "none.pt", "--out", tmp_path / name) == 0
    a, b = ((tmp_path / name / "result.png").read_bytes() for name in "ab")
    assert a == b

@pytest.mark.parametrize("step", [1, 5])
def test_ctrl_c_keeps_the_best_so_far_if_there_is_one(tmp_path, photo, monkeypatch, step):
    monkeypatch.setattr(D.Fit, "learn", interrupt_at(step, D.Fit.learn))
    assert run("fit-dip", "--image", photo, *TINY, "--out", tmp_path / "o") == 130
    if step == 1:
        assert not list(tmp_path.rglob("metrics.json"))
    else:
        metrics = outputs(tmp_path / "o", FIT_KEYS)
        assert metrics["interrupted"] is True and metrics["iters"] == 4

@pytest.mark.parametrize("step", [5, 15])       # in the fit of the DDPM, and in that of the DIP
def test_ctrl_c_in_the_fit_of_a_sample_leaves_the_last_call_out(tmp_path, photo, priors, monkeypatch, step):
    """What there is by then is the DDPM's answer, as fit-dip gives it where it is stopped there, too."""
    learn = D.Fit.learn
    monkeypatch.setattr(D, "reverse", lambda *args, **flags: pytest.fail("the DDPM was called"))
    flags = ["--image", photo, "--task", "inpaint:0.8", *JOINED, "--ckpt", priors / "dip.pt", "--out"]
    for words in (["fit-dip", "--method", "adapt"], ["sample", "--init", "dip"]):
        monkeypatch.setattr(D.Fit, "learn", interrupt_at(step, learn))
        assert run(*words, *flags, tmp_path / words[0]) == 130
    results = [(tmp_path / name / "result.png").read_bytes() for name in ("fit-dip", "sample")]
    assert results[0] == results[1]
    metrics = outputs(tmp_path / "sample", SAMPLE_KEYS)
    assert metrics["interrupted"] is True and metrics["nfe"] == 0 and metrics["psnr"] == metrics["psnr_dip"]

@pytest.mark.parametrize("init, call, made", [("observed", 1, 0), ("observed", 2, 1), ("dip", 2, 0),
                                              ("dip", 5, 0), ("dip", 6, 1)])
def test_ctrl_c_while_sampling_keeps_the_start(tmp_path, photo, priors, monkeypatch, init, call, made):
    """Of a grey photo, too: the plain first guess, or the DIP's answer, is the result. With a DIP the
    first four calls are those of the control."""
    D.to_image(smooth_image(channels=1)).save(photo)
    monkeypatch.setattr(D, "predict_x0", interrupt_at(call, D.predict_x0))
    flags = ["--image", photo, "--task", "superres:4", *([*TINY, "--method", "staged"] if init == "dip" else [])]
    assert run("sample", "--init", init, *flags, "--ckpt", priors / "dip.pt", "--samples", 2, "--steps", 4,
               "--out", tmp_path / "cut") == 130
    metrics = outputs(tmp_path / "cut", SAMPLE_KEYS)
    assert metrics["interrupted"] is True and metrics["nfe"] == made
    if init == "dip":
        assert run("fit-dip", *flags, "--out", tmp_path / "dip") == 0
        want = Image.open(tmp_path / "dip" / "result.png")
        assert metrics["psnr"] == metrics["psnr_dip"]
    else:
        _, y, task = observed("sample", *flags)
        want = D.to_image(task.interpolate(y))
    assert np.array_equal(want, Image.open(tmp_path / "cut" / "result.png"))

def folder_of_photos(folder, *names):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        D.to_image(smooth_image() * (1 - k / 4)).save(folder / name)
    return folder

def diverge():
    raise FloatingPointError("the loss is not finite")

@pytest.fixture
def default_prior(tmp_path, data, monkeypatch):
    """The priors that sample trains by itself are tiny here; gives the list of what was trained."""
    monkeypatch.chdir(tmp_path)
    trained, original = [], D.cmd_train
    def small(args):
        trained.append((args.prior, args.task, args.resume))
        args.data, args.steps, args.batch, args.patch, args.width, args.dips = str(data), 4, 2, 16, 8, 0
        return original(args)
    monkeypatch.setattr(D, "cmd_train", small)
    return trained

SAMPLE = ["sample", "--init", "dip", *JOINED, "--steps", 2, "--samples", 1, "--image"]

def test_first_sample_trains_a_prior_and_keeps_it(tmp_path, photo, default_prior):
    for _ in range(2):
        assert run(*SAMPLE, photo) == 0
    assert default_prior == [("dip", "inpaint:0.8", False)]
    config = load(tmp_path / "runs" / "train" / "inpaint-0.8.pt")["config"]
    assert config["t_max"] == 397 and config["task"] == "inpaint:0.8"

def test_an_interrupted_default_prior_is_resumed(tmp_path, photo, default_prior, monkeypatch):
    assert run(*SAMPLE, photo) == 0
    whole = load(tmp_path / "runs" / "train" / "inpaint-0.8.pt")
    os.rename(tmp_path / "runs", tmp_path / "before")
    monkeypatch.setattr(D, "SAVE_EVERY", 1)
    monkeypatch.setattr(D, "random_patches", interrupt_at(3, D.random_patches))
    assert run(*SAMPLE, photo) == 130 and not (tmp_path / "runs" / "train" / "inpaint-0.8.pt").exists()
    assert run(*SAMPLE, photo) == 0
    assert default_prior[1:] == [("dip", "inpaint:0.8", False), ("dip", "inpaint:0.8", True)]
    assert same_weights(whole, load(tmp_path / "runs" / "train" / "inpaint-0.8.pt"))

def test_two_processes_do_not_train_one_prior(tmp_path, photo, default_prior, capsys):
    busy = tmp_path / "runs" / "train" / "inpaint-0.8-unfinished" / "busy"
    busy.mkdir(parents=True)
    assert run(*SAMPLE, photo) == 2 and default_prior == []
    one_line(capsys, "--ckpt", "busy")
    busy.rmdir()
    assert run(*SAMPLE, photo) == 0 and not busy.exists()

def test_no_prior_is_trained_where_there_can_be_no_folder_for_it(tmp_path, photo, default_prior, capsys):
    (tmp_path / "runs").write_text("a file")
    assert run(*SAMPLE, photo, "--out", tmp_path / "o") == 2 and default_prior == []
    one_line(capsys, "--ckpt")

def test_pictures_of_an_earlier_run_do_not_stay(tmp_path, photo):
    out, words = tmp_path / "o", ["fit-dip", "--image", photo, *TINY, "--out", tmp_path / "o"]
    assert run(*words) == 0 and (out / "stages.png").exists() and (out / "ladder.gif").exists()
    assert run(*words, "--method", "dip") == 0
    assert not (out / "stages.png").exists() and not (out / "ladder.gif").exists()

# ---- 10. evaluation

def test_every_arm_is_a_command():
    for arms in D.SUITES.values():
        assert len(set(arms)) == len(arms) > 1
        for arm in arms:
            assert D.parse(arm.split()).command in ("fit-dip", "sample")

ARM = "fit-dip --nets 1 --iters 4 --width 4 --depth 1"

@pytest.fixture
def table(tmp_path, monkeypatch):
    """Evaluates arms on a folder of photos; gives (exit code, rows, command lines that ran)."""
    ran, original = [], D.run
    def spy(args):
        if args.command != "evaluate":
            ran.append(args.argv)
        return original(args)
    monkeypatch.setattr(D, "run", spy)
    def evaluate(folder, *arms, flags=("--size", 16)):
        ran.clear()
        (tmp_path / "arms.txt").write_text("\n".join(arms) + "\n")
        code = run("evaluate", "--images", folder, "--arms", tmp_path / "arms.txt", *flags, "--out",
                   tmp_path / "e")
        path = tmp_path / "e" / "all.csv"
        return code, read_csv(path) if path.exists() else None, list(ran)
    return evaluate

def test_a_row_is_reused_only_if_all_that_made_it_is_the_same(tmp_path, table, priors):
    folder = folder_of_photos(tmp_path / "in", "a b.png", "a-b.png")
    ckpt = tmp_path / "p.pt"
    ckpt.write_bytes((priors / "dip.pt").read_bytes())
    arms = [ARM, f"fit-dip --method adapt --iters 3 --ckpt {ckpt}"]
    code, rows, ran = table(folder, *arms)
    assert code == 0 and len(ran) == 4
    assert [(row["photo"], row["arm"]) for row in rows] == [
        (name, arm) for name in ("a b.png", "a-b.png") for arm in arms]
    assert len({row["psnr"] for row in rows}) == 4                  # no two share a folder
    again, same, ran = table(folder, *arms)
    assert again == 0 and same == rows and ran == []
    D.to_image(-smooth_image()).save(folder / "a-b.png")            # another photo of this name
    _, other, ran = table(folder, *arms)
    assert len(ran) == 2 and all(str(folder / "a-b.png") in argv for argv in ran)
    assert other[:2] == rows[:2] and other[2]["psnr"] != rows[2]["psnr"]
    state = load(ckpt)
    state["ema"]["out.bias"] += 0.1
    torch.save(state, ckpt)                                         # another prior of this name
    assert [argv[argv.index("--method") + 1] for argv in table(folder, *arms)[2]] == ["adapt", "adapt"]
    code, rows, ran = table(folder, ARM + " --told 30", arms[1])    # another arm
    assert len(ran) == 2 and len(rows) == 4                         # the table holds what was asked
    assert len(table(folder, ARM, flags=("--size", 12))[2]) == 2

def test_the_flags_of_an_arm_win(tmp_path, table):
    """Over those of evaluate; two seeds never share a folder."""
    folder = folder_of_photos(tmp_path / "in", "a.png")
    code, rows, ran = table(folder, ARM, ARM + " --size 8 --seed 5", flags=("--size", 12))
    assert code == 0 and [row["seed"] for row in rows] == ["0", "5"]
    sizes = [Image.open(path).size for path in (tmp_path / "e").rglob("result.png")]
    assert sorted(sizes) == [(8, 8), (12, 12)]
    table(folder, ARM, flags=("--size", 12, "--seed", 3))
    assert table(folder, ARM, flags=("--size", 12))[2] == []

def test_a_mask_of_greys_is_known_where_it_is_bright(tmp_path, photo):
    """A JPEG's holes are nearly black, not black; all channels count."""
    mask = np.full((16, 16, 3), 250, np.uint8)
    mask[:6] = (90, 3, 2)
    Image.fromarray(mask).save(tmp_path / "m.png")
    _, _, task = observed("fit-dip", "--image", photo, "--task", "inpaint", "--mask", tmp_path / "m.png")
    assert not task.mask[..., :6, :].any() and task.mask[..., 6:, :].all()

def test_a_bad_photo_or_arm_stops_no_other(tmp_path, table, capsys, monkeypatch):
    folder = folder_of_photos(tmp_path / "in", "b.png", 'c "d",\nInfinity.png')
    (folder / "a.png").write_text("no picture")
    code, rows, _ = table(folder, ARM)
    assert code == 2
    assert [row["photo"] for row in rows] == ["b.png", 'c "d",\nInfinity.png']
    assert "a.png" in capsys.readouterr().err.splitlines()[-1]
    (folder / "a.png").unlink()
    code, rows, _ = table(folder, ARM, "fit-dip --observed --task denoise --nets 1 --iters 2 --width 4")
    assert code == 0 and len(rows) == 4 and rows[1]["psnr"] == ""
    monkeypatch.setattr(D, "fit_loss", interrupt_at(1, D.fit_loss, diverge))     # a fit that diverges
    code, rows, _ = table(folder, ARM + " --seed 9", ARM)
    assert code == 2 and len(rows) == 3
    for path in folder.iterdir():
        path.write_text("no picture")
    capsys.readouterr()
    assert table(folder, ARM)[0] == 2                               # and where all are bad
    assert "Traceback" not in capsys.readouterr().err

@pytest.mark.parametrize("arm", ["train", "fit-dip --x", "fit-dip --task blur", "{", "sample --iters 3", "nothing"])
def test_a_bad_arm_is_found_before_the_first_fit(tmp_path, table, capsys, arm):
    code, rows, ran = table(folder_of_photos(tmp_path / "in", "a.png"), ARM, arm)
    assert code == 2 and rows is None and ran == []
    one_line(capsys, "--")

def test_evaluate_quick_needs_nothing_but_the_clone(tmp_path, table, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arms = ["fit-dip", "sample --init dip --task superres:4 --steps 2", D.SUITES["training"][0],
            "sample --samples 1 --init noise --steps 2 --task inpaint:1"]
    code, rows, _ = table(os.path.join(D.PHOTOS, "test"), *arms, flags=["--quick"])
    assert code == 0 and [row["arm"] for row in rows] == arms
    assert all(math.isfinite(float(row["psnr"])) for row in rows)
    said = capsys.readouterr().out.splitlines()
    head = next(k for k, line in enumerate(said) if line.startswith("| arm | n | over the first | psnr |"))
    assert [line.split(" | ")[0] for line in said[head + 2:]] == ["| " + arm for arm in arms]
    assert [path.name for path in (tmp_path / "e" / "prior").glob("*.pt")] == ["none.pt"]
    assert not (tmp_path / "runs").exists()

def test_evaluate_stopped_before_it_has_measured_anything(tmp_path, table, monkeypatch):
    monkeypatch.setattr(D.Fit, "learn", interrupt)
    code, rows, _ = table(folder_of_photos(tmp_path / "in", "a.png"), ARM)
    assert code == 130 and rows is None and not list(tmp_path.rglob("metrics.json"))

def table_rows():
    """Arm a on two photos with two seeds, b on one of them, c of another task, d without a clean photo."""
    rows = [dict(arm="a --iters 5", photo=photo, seed=seed, task="T", psnr=psnr, seconds=1.0, nfe=None)
            for photo, seed, psnr in (("x", 0, 30.0), ("x", 100, 32.0), ("y", 0, 34.0), ("y", 100, 34.0))]
    rows.append(rows[0] | dict(arm="b", psnr=30.5, ssim=0.5, seconds=3.0, nfe=20))
    rows.append(rows[0] | dict(arm="c", task="U", psnr=20.0))
    return rows + [rows[0] | dict(arm="d", task="V", psnr=None)]

def test_markdown_means_over_photos_and_seeds():
    rows = table_rows() + [row | dict(arm="e", psnr=row["psnr"] + 1) for row in table_rows()[:4]]
    assert D.markdown(rows, D.over_first(rows)).splitlines() == [
        "| arm | n | over the first | psnr | ssim | seconds | nfe |", "|" + " --- |" * 7,
        "| a --iters 5 | 4 | 0.00 | 32.500 |  | 1.000 |  |",
        "| b | 1 | -0.50 | 30.500 | 0.500 | 3.000 | 20.000 |",
        "| c | 1 | 0.00 | 20.000 |  | 1.000 |  |", "| d | 1 |  |  |  | 1.000 |  |",
        "| e | 4 | 1.00 | 33.500 |  | 1.000 |  |"]
    rows[-1]["psnr"] += 2                                           # one photo gains 2, the other 1
    assert "| e | 4 | 1.50 (1.00 to 2.00) |" in D.markdown(rows, D.over_first(rows))

def test_an_interval_is_that_of_the_mean():
    """Of many differences it is the normal distribution's; of one there is none."""
    differences = np.random.default_rng(1).normal(0.3, 2, 400)
    mean, low, high = D.interval(list(differences))
    assert mean == pytest.approx(differences.mean())
    half = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03 * half)
    assert D.interval([1.5])[0] == 1.5 and math.isnan(D.interval([1.5])[1])

def test_arms_that_differ_in_numbers_are_one_curve():
    rows = table_rows() + [table_rows()[0] | dict(arm="a --iters 10", psnr=36.0, seconds=0.5)]
    of_task = [row for row in rows if row["task"] == "T"]
    assert D.curves_of(of_task, "seconds") == [("a --iters N", (0.5, 1.0), (36.0, 32.5)), (".b", (3.0,), (30.5,))]
    assert D.curves_of(of_task, "nfe") == [(".b", (20.0,), (30.5,))]
    rows = [rows[0] | dict(arm=f"a --task superres:{k} --ckpt r2/none.pt", psnr=30.0 + k) for k in (2, 4)]
    assert [name for name, *_ in D.curves_of(rows, "seconds")] == ["a --task superres:N --ckpt r2/none.pt"]

def test_evaluate_draws_what_it_measured(tmp_path):
    args = D.parse(["evaluate", "--out", str(tmp_path)])
    D.draw_arms(args, table_rows(), D.over_first(table_rows()))
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["arms.png", "seconds"]
    rows = [row | dict(t0=10 * k, nfe=k) for k, row in enumerate(table_rows())]
    args.out = str(tmp_path / "starts")
    D.draw_arms(args, rows, D.over_first(rows))                     # several times and calls
    drawn = {path.name.split("-")[0] for path in (tmp_path / "starts").iterdir()}
    assert drawn == {"arms.png", "nfe", "seconds", "t0"}
    args.out = str(tmp_path / "none")
    D.draw_arms(args, table_rows()[-1:], {})                        # without a clean photo: nothing
    assert not (tmp_path / "none").exists()

def test_a_dot_stands_at_its_mean_and_its_line_ends_at_the_interval():
    page = np.asarray(D.dot_plot("title", "dB", [("heading",), ("zero", 0, 0, 0), ("one", 1, 0.5, 2)]), int)
    blue = (page[..., 2] > page[..., 0] + 60) & (np.arange(page.shape[1]) > 60)
    rows = np.flatnonzero(blue.any(axis=1))
    first, second = [np.flatnonzero(blue[rows[part]].any(axis=0)) for part in (slice(0, 8), slice(-8, None))]
    zero, two, half = first.mean(), second.max(), second.min()
    assert half - zero == pytest.approx((two - zero) / 4, abs=2)    # 0.5 and 2
    thick = np.flatnonzero(blue[rows[-8:]].sum(axis=0) > 5)
    assert thick.mean() - zero == pytest.approx((two - zero) / 2, abs=2)        # the dot, at 1

@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_sets_are_compared_by_a_given_network(tmp_path, priors, table, capsys):
    class Features(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.min() >= -1 and x.max() <= 1 and x.min() < 0 and x.shape[1] == 3
            return torch.nn.functional.adaptive_avg_pool2d(x, 2)
    torch.jit.script(Features()).save(str(tmp_path / "features.pt"))
    names = [f"{k}.png" for k in range(3)]
    folder, held = (folder_of_photos(tmp_path / name, *names) for name in ("in", "held"))
    D.to_image(smooth_image(channels=1)).save(held / "0.png")           # a grey one among them
    arms = [f"sample --samples 1 --init noise --task inpaint:1 --steps 2 --ckpt {priors / 'none.pt'}", ARM]
    code, _, _ = table(folder, *arms, flags=["--size", 16, "--held", held, "--features", tmp_path / "features.pt"])
    sets = read_csv(tmp_path / "e" / "sets.csv")
    assert code == 0 and [row["arm"] for row in sets] == ["held", *arms] and {row["n"] for row in sets} == {"3"}
    found = [[held / name for name in names]]
    found += [sorted((tmp_path / "e").glob(f"*/{D.folder_name(arm)}/result.png")) for arm in arms]
    assert len({path.read_bytes() for path in found[1]}) == 3           # no two from one noise
    real, *_ = found = [torch.cat([F.adaptive_avg_pool2d(loaded(path).expand(-1, 3, -1, -1), 2).flatten(1).double()
                                   for path in paths]) for paths in found]
    for row, fake in zip(sets, found):
        assert float(row["frechet"]) == pytest.approx(D.frechet(real, fake), rel=1e-3, abs=1e-6)
    assert float(sets[0]["coverage"]) == 1 and min(float(row["frechet"]) for row in sets[1:]) > 0.01
    capsys.readouterr()
    assert table(folder, ARM, flags=["--held", held, "--features", priors / "none.pt"])[0] == 2
    one_line(capsys, "--features")
    (folder / "1.png").write_text("no picture")
    (folder / "2.png").unlink()             # one result is no set: the bad photo is named, no traceback
    code, _, _ = table(folder, ARM, flags=["--size", 16, "--held", held, "--features", tmp_path / "features.pt"])
    assert code == 2 and [row["arm"] for row in read_csv(tmp_path / "e" / "sets.csv")] == ["held"]
    assert "--arms: not run, see above: 1.png" in capsys.readouterr().err

def test_seeds_are_a_hundred_apart(tmp_path, table):
    folder = folder_of_photos(tmp_path / "in", "a.png")
    _, rows, ran = table(folder, ARM, flags=("--size", 16, "--seeds", 2))
    assert [row["seed"] for row in rows] == ["0", "100"] and len({row["psnr"] for row in rows}) == len(ran) == 2

# ---- 11. errors: one line, the flag, exit code 2

@pytest.fixture(scope="session")
def bad(tmp_path_factory, priors):
    folder = tmp_path_factory.mktemp("bad")
    D.to_image(smooth_image()).save(folder / "photo.png")
    (folder / "text.png").write_text("no image")
    Image.fromarray(pixels(shape=(64, 64, 3))).save(folder / "big.jpg")
    (folder / "cut.jpg").write_bytes((folder / "big.jpg").read_bytes()[:900])
    for name, value, side in (("small", 0, 3), ("black", 0, 16), ("white", 255, 16), ("one", 0, 1)):
        Image.fromarray(np.full((side, side), value, np.uint8)).save(folder / f"{name}.png")
    half = np.full((16, 16), 255, np.uint8)
    half[:8] = 0
    Image.fromarray(half).save(folder / "half.png")
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")                # 200 megapixels, 24 kB
    (folder / "empty").mkdir()
    folder_of_photos(folder / "photos", "a.png")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a")
    np.savez(folder / "floats.npz", images=np.zeros((2, 8, 8)))
    np.save(folder / "none.npy", np.zeros((0, 8, 8), np.uint8))
    whole = (priors / "dip.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[:len(whole) // 2])
    state = load(priors / "dip.pt")
    state["config"]["width"] = 16
    torch.save(state, folder / "other_shape.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "file").write_text("a file where a folder should be")
    for name, arm in (("seed", "fit-dip --seed 7"), ("out", "fit-dip --out=o"), ("eta", "sample --eta 0 --steps 1")):
        (folder / f"{name}.txt").write_text(arm)
    return folder

ERRORS = [line.rsplit(" -> ", 1) for line in """
fit-dip --image missing.png -> --image
fit-dip --image text.png -> --image
fit-dip --image cut.jpg -> --image
fit-dip --image bomb.png -> bomb
fit-dip --image photos -> --image
sample --image photos -> --image
fit-dip --image one.png --task superres:4 -> --image
fit-dip P --task blur:3 -> --task
fit-dip P --task denoise:0 -> --task
fit-dip P --task denoise:-25 -> --task
fit-dip P --task denoise:nan -> --task
fit-dip P --task denoise -> --task
fit-dip P --task inpaint:1 -> --task
fit-dip P --task superres:5 -> --task
fit-dip P --task inpaint --observed -> --mask
fit-dip P --task inpaint --mask small.png -> --mask
fit-dip P --task inpaint --mask black.png -> --mask
fit-dip P --task inpaint --mask white.png -> --mask
fit-dip P --task inpaint --mask missing.png -> --mask
sample P --task inpaint --mask black.png -> --mask
sample --observed --init dip -> --image
fit-dip P --iters 0 -> --iters
fit-dip P --iters many -> --iters
fit-dip P --lr nan -> --lr
fit-dip P --lr 10 --iters 60 -> --lr
fit-dip P --size 0 -> --size
fit-dip P --rungs 0 -> --rungs
fit-dip P --method adapt --input fixed -> --input
fit-dip P --method magic -> --method
fit-dip P --out file/below -> --out
fit-dip P --method adapt --ckpt cut.pt -> --ckpt
fit-dip P --ckpt {p}/dip.pt -> --ckpt
fit-dip P --method adapt --width 16 -> --width
fit-dip P --method adapt --task inpaint:0.5 --target plain -> --target
fit-dip P --method adapt --task superres:4 --high 2 -> --high
fit-dip P --method adapt --task superres:4 --nets 1 --fresh 0 -> --fresh
fit-dip P --method adapt --task inpaint:0.5 --nets 1 --width 16 -> --width
fit-dip P --method adapt --task inpaint:0.5 --tail 0.2 -> --tail
fit-dip P --method adapt --task inpaint:0.5 --stop holdout -> --stop
fit-dip P --method primed --task denoise:25 -> --method
sample --init dip P --method primed --task denoise:25 -> --method
fit-dip P --method primed --task inpaint:0.5 --stop holdout -> --stop
fit-dip P --method primed --task inpaint:0.5 --turns 0 -> --turns
sample --init dip P --method primed --no-clue -> --method
sample --init dip P --method primed --no-guide -> --no-guide
sample --init dip P --input observed -> --input
sample --init dip P --method adapt --nets 1 -> --nets
sample --init dip P --method adapt --no-clue -> --method
sample --init dip P --method adapt --no-guide -> --no-guide
fit-dip --nonsense -> --nonsense
evaluate --arms missing.txt -> --arms
evaluate --images photos --arms seed.txt --seeds 2 -> --seeds
evaluate --images photos --arms eta.txt -> --eta
evaluate --images photos --arms out.txt -> --arms
evaluate stopping --arms missing.txt -> --arms
evaluate --images empty -> --images
evaluate nonsense -> nonsense
train --data empty -> --data
train --data texts -> --data
train --data missing -> --data
train --data floats.npz -> --data
train --data none.npy -> --data
train --data photos -> --patch
train --resume --out nothing -> --resume
train --steps 0 -> --steps
train --prior dip --t-max 2000 -> --t-max
sample --init dip P --ckpt missing.pt -> --ckpt
sample --init dip P --ckpt cut.pt -> --ckpt
sample --init dip P --ckpt text.png -> --ckpt
sample --init dip P --ckpt other_shape.pt -> --ckpt
sample --init dip P --ckpt list.pt -> --ckpt
sample --init dip P --ckpt {p}/grey/none.pt -> --ckpt
sample --init noise P --ckpt {p}/dip.pt -> --ckpt
sample --init dip P --start 0 -> --start
sample --init dip P --ckpt {p}/dip.pt --start 398 -> --start
sample --init dip P --eta 2 -> --eta
sample --init dip P --eta 0.5 -> --eta
sample --init noise P --steps 1 --eta 0 -> --eta
fit-dip P --task inpaint:0.5 --nets 1 --fresh 0 -> --fresh
sample --init dip P --method staged --fresh 0 -> --fresh
fit-dip P --iter 5 -> --iter
fit-dip P --mask half.png -> --mask
fit-dip P --task inpaint:0.5 --mask half.png -> --mask
fit-dip P --task superres:4 --told 20 -> --told
fit-dip P --task superres:4 --method selfdiff --turns 0 -> --turns
fit-dip P --task superres:4 --tail 0.5 -> --tail
fit-dip P --task superres:4 --target conjugate -> --target
fit-dip P --weight 2 -> --weight
fit-dip P --task inpaint:0.5 --hold 0.1 -> --hold
fit-dip P --method dip --high 2 -> --high
fit-dip P --method guide --fresh 0 -> --fresh
fit-dip P --method targets --turns 0 -> --turns
fit-dip P --method selfdiff --turns 0 -> --turns
fit-dip P --stop wmv --hold 0.3 -> --hold
fit-dip P --stop fixed --tail 0.3 -> --tail
sample --init observed P --iters 5 -> --iters
sample --init observed P --no-guide -> --no-guide
sample --init observed P --task denoise:25 --no-clue -> --no-clue
sample --task inpaint:1 --no-clue -> --no-clue
sample --init observed P --ckpt {p}/dip.pt --eta 0 -> --eta
sample --init noise P --start 5 -> --start
sample --init noise P --method dip -> --method
sample --iters 5 -> --iters
sample --start 5 -> --start
sample --told 5 -> --told
sample --no-guide -> --no-guide
sample --observed -> --image
sample --mask half.png -> --image
evaluate --features list.pt -> --features
fit-dip P --task superres:4 --input fixed --high 5 -> --high
fit-dip P --observed --task denoise:25 --told 20 -> --told
train --width 7 -> --width
evaluate --held photos -> --features
""".strip().splitlines()]

@pytest.mark.parametrize("line, flag", ERRORS, ids=[line for line, _ in ERRORS])
def test_errors(bad, priors, line, flag, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(D, "train_default_prior", lambda *args: pytest.fail("a prior is trained"))
    monkeypatch.setattr(D, "run_arm", lambda *args: pytest.fail("an arm is run"))
    monkeypatch.setattr(D, "finish", lambda *args: pytest.fail("it came to a result"))
    if "--lr 10" in line:                       # a loss that overflows
        monkeypatch.setattr(D.Task, "mse", lambda self, x, y: x.mean() * math.inf)
    else:
        monkeypatch.setattr(D, "fit_dip", lambda *args, **settings: pytest.fail("a fit begins"))
    assert run(*line.replace(" P", " --image photo.png").format(p=priors).split()) == 2
    said = one_line(capsys, flag)
    assert "functools" not in said
    said = said.replace("error: argument ", "error: ").replace("unrecognized arguments: ", "")
    assert said.startswith(f"error: {flag}") or flag in ("bomb", "nonsense")

@pytest.mark.parametrize("line", [
    "--method dip --target noisy --high 2", "--method dip --input observed --low 0.3", "--told 0",
    "--method guide --input estimate --high 2", "--task inpaint:0.5 --tail 0.25", "--stop fixed --turns 0",
    "--task inpaint:0.5 --turns 0", "--task superres:4 --turns 0"])
def test_flags_that_have_an_effect_are_taken(line):
    assert D.parse(["fit-dip", *line.split()]).command == "fit-dip"

@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_missing_device(capsys):
    assert run("fit-dip", "--device", "cuda") == 2
    one_line(capsys, "--device")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    """To 0.5 dB: the draws are the same, the rounding is not, and a fit amplifies it."""
    x, found = smooth_image(32), []
    for device in ("cpu", "cuda"):
        *_, last = D.fit_dip(with_noise(x).to(device), NOISY, nets=1, iters=200, width=16)
        found.append(D.psnr(last.answer, x, 2.0))
    assert abs(found[0] - found[1]) < 0.5

def test_a_malicious_checkpoint_is_refused(tmp_path, photo, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save(dict(config=Evil()), tmp_path / "evil.pt")
    assert run("sample", "--init", "dip", "--image", photo, "--ckpt", tmp_path / "evil.pt", "--out",
               tmp_path / "o") == 2
    one_line(capsys, "--ckpt")
    assert not (tmp_path / "owned").exists()

def forked(work):
    """Run work() in a child process and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, priors):
    """A limit on the size of files stands for a full disk: writing fails in the middle."""
    resource = pytest.importorskip("resource")
    state, path = load(priors / "dip.pt"), tmp_path / "dip.pt"
    D.save(str(path), state)
    before = path.read_bytes()
    def work():
        sys.stderr = open(tmp_path / "err", "w")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        with pytest.raises(SystemExit):
            D.save(str(path), state | dict(step=99))
        sys.stderr.close()
    os.waitpid(forked(work), 0)
    err = (tmp_path / "err").read_text()
    assert err.startswith("error: --out: cannot write") and err.count("\n") == 1
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["dip.pt", "err"]

def test_imports_are_the_promised_ones():
    tree = ast.parse(open(D.__file__, encoding="utf-8").read())
    names = {(node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
             for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names}
    assert names <= {"torch", "numpy", "PIL"} | set(sys.stdlib_module_names)

# ---- when asked for: -m bench -s and -m fuzz

@bench
def test_time_of_a_step():
    """ms (median of 20), GFLOP/s, and the ratio to a matrix product's, which is the machine's."""
    from torch.utils.flop_counter import FlopCounterMode
    x, task = torch.randn(1024, 1024), D.Task("denoise", sigma=0.2)
    net, schedule = D.UNet().to(memory_format=torch.channels_last), D.NoiseSchedule()
    images = list(torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8))
    config = dict(lr=0.02, seed=0, batch=16, patch=48, t_max=1000, schedule="linear")
    state = dict(config=config, step=0, rng=None, optimisers=[], dips=[], eps_loss=torch.full((2, 1001), math.nan))
    xt = torch.randn(4, 3, 128, 128)
    jobs = {"1024 x 1024 matrix product": ((x @ x).sum().item() for _ in itertools.count())}
    for side, width in itertools.product((128, 256), (32, 64)):
        y = torch.rand(1, 3, side, side)
        jobs[f"fit-dip --width {width}, {side} x {side}"] = D.fit_dip(
            y, task, nets=1, width=width, stop="fixed", iters=99, rungs=99)
    jobs["train, 16 x 48 x 48"] = D.train_ddpm(state, net, D.UNet(), images, 99)
    jobs["sample, 4 x 128 x 128"] = (D.ddim_sample(net, schedule, xt, 9, 1, []).sum().item()
                                     for _ in itertools.count())
    operations, rates = {}, {}
    print("\n| step | ms | GFLOP/s | of the matrix product's |\n| --- | --- | --- | --- |")
    for name, steps in jobs.items():
        with FlopCounterMode(display=False) as counter:
            next(steps)
        clock = [time.perf_counter() for _ in itertools.islice(steps, 23)]
        ms = 1e3 * np.median(np.diff(clock[2:]))
        operations[name] = counter.get_total_flops()
        rates[name] = operations[name] / ms / 1e6
        share = rates[name] / rates["1024 x 1024 matrix product"]
        print(f"| {name} | {ms:.1f} | {rates[name]:.1f} | {share:.2f} |", flush=True)
    assert operations["1024 x 1024 matrix product"] == 2 * 1024 ** 3
    small, large = (operations[f"fit-dip --width 32, {side} x {side}"] for side in (128, 256))
    assert large == pytest.approx(4 * small, rel=0.05)              # twice the side

def ends_well(argv, where):
    """Exit code 0 or 2, nothing half-written: else a failure that names the command line."""
    code = run(*argv)                                       # any other exception: a traceback
    assert code in (0, 2), argv
    assert not list(where.rglob("*.tmp")), argv
    for path in where.rglob("*.png"):
        assert path.is_dir() or Image.open(path).verify() is None
    for path in where.rglob("metrics.json"):
        read_json(path)
    return code

@fuzz
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_pictures(tmp_path):
    rng, codes = np.random.default_rng(0), []
    picture = D.to_image(smooth_image(20))
    for k in range(120):
        kind = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "TGA")[k % 8]
        path = tmp_path / f"{k}.{kind.lower()}"
        mode = ("RGB", "L", "P", "1", "RGBA")[k // 8 % 5]
        try:
            picture.convert(mode).save(path, kind)
        except OSError:                                     # JPEG has no transparency, and so on
            picture.save(path, kind)
        data = bytearray(path.read_bytes())
        for _ in range(rng.integers(0, 6)):
            at = int(rng.integers(min(len(data), 80 if rng.random() < 0.5 else 10 ** 6) or 1))
            action = rng.integers(4)
            if action == 0 and data:
                data[at] = rng.integers(256)
            elif action == 1:
                del data[at:at + int(rng.integers(1, 20))]
            elif action == 2:
                data[at:at] = rng.integers(0, 256, rng.integers(1, 20), np.uint8).tobytes()
            elif rng.random() < 0.3:
                del data[at:]
        path.write_bytes(bytes(data))
        out = tmp_path / f"out{k}"
        codes.append(ends_well(["fit-dip", "--image", path, *TINY, "--iters", 2, "--size", 16, "--out", out], out))
    assert codes.count(0) > 15 and codes.count(2) > 15

@fuzz
def test_random_flags(tmp_path, priors, photo, data, default_prior):
    rng, codes = np.random.default_rng(0), []
    folder = folder_of_photos(tmp_path / "grey", "grey.png")
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (4, 4, 9, 9))
    mask.save("mask.png")
    for name, text in (("arms", "fit-dip --iters 3 --width 4"), ("arms2", "sample --init dip\ntrain"),
                       ("arms3", "")):
        (tmp_path / name).write_text(text)
    pool = {"--image": [photo, photo, "missing.png", "", "."], "--task": [
        "denoise:25", "denoise", "inpaint:0.8", "inpaint", "inpaint:1", "superres:2", "superres:4",
        "superres:5", "denoise:-1", "nothing", ":", "denoise:nan", "superres:8", "inpaint:0.999"],
        "--mask": ["mask.png", photo, "x"], "--ckpt": [priors / "dip.pt", priors / "none.pt", photo],
        "--data": [data, photo, "none"], "--images": [folder], "--held": [folder], "--features": [photo],
        "--arms": ["arms", "arms2", "arms3", "x"], "--out": ["out", "mask.png", "a/b/c"]}
    small = {"--steps": 3, "--iters": 5, "--samples": 2, "--batch": 2, "--patch": 16, "--seeds": 1,
             "--width": 8, "--depth": 2, "--size": 16}
    subparsers, = (action for action in D.make_parser()._actions if action.choices)
    for k in range(160):
        command = ("fit-dip", "sample", "train", "evaluate")[k % 4]
        actions = [action for action in subparsers.choices[command]._actions if action.option_strings[-1:]]
        actions = {action.option_strings[-1]: action for action in actions if action.dest != "help"}
        argv = [command]
        if command == "evaluate":
            argv += [rng.choice([*D.SUITES, "nonsense"]), "--quick", "--images", folder, "--arms", "arms"]
        if command == "sample":
            argv += ["--ckpt", priors / "none.pt", "--init", rng.choice(["noise", "observed", "dip"])]
        for name, value in small.items():
            if name in actions and (command in ("fit-dip", "train") or "dip" in argv or name in (
                    "--steps", "--samples", "--size")):
                argv += [name, value]
        for name in rng.choice(list(actions), rng.integers(4), replace=False):
            action = actions[name]
            if action.nargs == 0:
                argv.append(name)
                continue
            values = pool.get(name, [""])
            if action.choices:
                values = [*action.choices, "other"]
            elif action.type is not None:
                low, high = getattr(action.type, "args", (1, 1000))[-2:]
                values = [low, min(high, 7), low + 0.5, "nan", "auto", "1e400"]
                if name in small:
                    values = [small[name], low, -1, "x", "nan"]
            argv += [name, values[rng.integers(len(values))]]
        codes.append(ends_well(argv, tmp_path))
    assert codes.count(0) > 20 and codes.count(2) > 20

@fuzz
def test_every_setting_that_is_taken_changes_the_result():
    """A setting with another value than its default, in every method: another path, or a refusal."""
    change = dict(input="estimate", target="noisy", iters=5, nets=3, optimiser="adam", lr=0.03, width=5, depth=1,
                  high=2.0, low=0.2, rungs=2, fresh=0, turns=0, loss="gradient", weight=3.0, hold=0.5, tail=0.5)
    words = {"denoise:25": NOISY, "inpaint:0.5": HOLES, "superres:2": D.Task("sr", scale=2)}
    idle, brief = [], dict(iters=8, rungs=4, width=4, depth=2)
    for method, (task_flag, task) in itertools.product(D.METHODS, words.items()):
        y = task.forward(with_noise(smooth_image(12), task.sigma))
        nets = 2 if method == "adapt" and task.sigma == 0 else 1        # with the DIP that follows
        settings = brief | dict(method=method, nets=nets)
        plain = list(D.fit_dip(y, task, Shrink(), **settings))
        default = D.complete(D.Settings(**settings), task, y)
        for name, value in change.items():
            try:
                flags = ["--nets", str(nets), f"--{name}", str(value)]
                D.parse(["fit-dip", "--method", method, "--task", task_flag, *flags])
            except SystemExit:
                continue
            other = list(D.fit_dip(y, task, Shrink(), **settings | {name: value}))
            same = len(plain) == len(other) and all(
                torch.equal(a.output, b.output) and torch.equal(a.answer, b.answer) for a, b in zip(plain, other))
            if same and getattr(default, name) != value:
                idle.append(f"--method {method} --task {task_flag} --{name} {value}")
    assert not idle, "\n".join(idle)

@fuzz
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_checkpoint_survives_kill_minus_9(tmp_path, priors):
    """One process writes it again and again; another reads it meanwhile, and kills the first."""
    state, path = load(priors / "dip.pt"), str(tmp_path / "dip.pt")
    rng = np.random.default_rng(0)
    for start in range(0, 30000, 1000):
        D.save(path, state | dict(step=start))
        def work():
            for step in itertools.count(start + 1):
                D.save(path, state | dict(step=step))
        pid = forked(work)
        while load(path)["step"] == start:
            pass
        for _ in range(rng.integers(9)):
            load(path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert load(path)["step"] > start and same_weights(load(path), state)

@fuzz
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_killed_rank_ends_the_run_and_leaves_a_whole_checkpoint(tmp_path, data):
    flags = [*BRIEF, "--steps", 10 ** 6, "--device", "cpu", "--data", data, "--out", tmp_path / "o"]
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", D.__file__, "train",
         *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"))
    path = tmp_path / "o" / "none.pt"
    for _ in range(1200):                                   # until the first checkpoint
        if path.exists():
            break
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "train"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None) and "SIGKILL" in said.replace("Signal 9", "SIGKILL")
    assert load(path)["step"] % D.SAVE_EVERY == 0 and not list((tmp_path / "o").glob("*.tmp"))
