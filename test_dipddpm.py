"""Tests of dipddpm.py against closed forms, golden numbers and other libraries."""
import ast
import csv
import functools
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dipddpm as D

HERE = os.path.dirname(os.path.abspath(D.__file__))
torch.set_num_threads(1)       # quick also beside other jobs; the tensors are tiny


def run(*argv):
    """main() in-process; the exit code, also of SystemExit."""
    try:
        return D.main([str(a) for a in argv])
    except SystemExit as e:
        return e.code


def make_prior(model, t_max, eps_loss):
    """A Prior around any model(x_t, t), its eps-loss the same at every t."""
    config = dict(unet=dict(width=8), T=1000, schedule="linear", t_max=t_max, prior="none")
    prior = D.Prior(dict(config=config, ema=D.UNet(width=8).state_dict(), log=[],
                         eps_loss=torch.full((1001,), eps_loss)))
    del prior.model                                         # also a plain function may take its place
    prior.model, prior.channels = model, 1
    return prior


def smooth_image(n=16, channels=3):
    u = torch.linspace(-1, 1, n)
    waves = [torch.sin((2 + c) * u)[:, None] * torch.cos((3 - c) * u)[None] for c in range(channels)]
    return torch.stack(waves)[None] * 0.8


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    D.to_image(smooth_image()).save(path)
    return path


@pytest.fixture(scope="session")
def priors(tmp_path_factory):
    """Tiny checkpoints of both kinds, colour, and one for grey images."""
    out = tmp_path_factory.mktemp("priors")
    grey = np.random.default_rng(0).integers(0, 255, (6, 16, 16), np.uint8)
    np.save(out / "grey.npy", grey)
    flags = ["--steps", 3, "--batch", 2, "--patch", 16, "--width", 8, "--out", out]
    assert run("train", "--prior", "none", *flags) == 0
    assert run("train", "--prior", "dip", *flags) == 0
    assert run("train", "--data", out / "grey.npy", *flags[:-1], out / "grey") == 0
    return out


# ---- the diffusion process


@pytest.mark.parametrize("kind, golden", [
    ("linear", {1: 0.9999, 100: 0.8970181457, 500: 0.07858724288, 1000: 4.035829765e-05}),
    ("cosine", {1: 0.9999587158, 500: 0.4938435904})])
def test_golden_abar(kind, golden):
    s = D.NoiseSchedule(1000, kind)
    assert len(s.betas) == len(s.abar) == 1001 and s.betas[0] == 0 and s.abar[0] == 1
    for t, value in golden.items():
        assert s.abar[t].item() == pytest.approx(value, rel=1e-9)
    with pytest.raises(ValueError):
        D.NoiseSchedule(10, "quadratic")


def ancestral_step(s, x0, xt, t, z):
    """x_{t-1} ~ q(x_{t-1} | x_t, x0) by Bayes' rule: the prior N(sqrt(prev) x0, 1 - prev) times the
    likelihood N(x_t; sqrt(1 - beta) x_{t-1}, beta)."""
    beta, prev = s.betas[t].item(), s.abar[t - 1].item()
    if prev == 1:
        return x0
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (math.sqrt(1 - beta) / beta * xt + math.sqrt(prev) / (1 - prev) * x0) / precision
    return mean + math.sqrt(1 / precision) * z


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ancestral_sampling_draws_from_the_posterior(kind):
    s = D.NoiseSchedule(50, kind)
    model, gens = GaussianEps(s, 0.1, 0.5), [D.stream(7, 3)]
    xt = x = D.noise((1, 1, 8, 8), [D.stream(8, 3)])
    got = D.p_sample_loop(model, s, xt, 50, gens)
    gens = [D.stream(7, 3)]
    for t in range(50, 0, -1):
        at = torch.tensor([t])
        x0 = D.predict_x0(s, x, at, model(x, at))
        x = ancestral_step(s, x0, x, t, D.noise(x.shape, gens) if t > 1 else 0)
    assert torch.allclose(got, x, atol=1e-4)


def test_predict_x0_inverts_q_sample_for_every_t():
    s = D.NoiseSchedule()
    t = torch.arange(1, 1001)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1000, 1, 2, 2, generator=g), torch.randn(1000, 1, 2, 2, generator=g)
    back = D.predict_x0(s, D.q_sample(s, x0, t, eps), t, eps)
    assert (back - x0).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_chain_of_single_steps_equals_q_sample(kind):
    s, mean, var = D.NoiseSchedule(1000, kind), 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t in range(1, 1001):
        mean, var = math.sqrt(1 - s.betas[t]) * mean, (1 - s.betas[t].item()) * var + s.betas[t].item()
        at = torch.tensor([t])
        assert D.q_sample(s, one, at, zero).item() == pytest.approx(mean, rel=1e-4, abs=1e-7)
        assert D.q_sample(s, zero, at, one).item() == pytest.approx(math.sqrt(var), rel=1e-5)


def test_first_t_is_the_smallest():
    s = D.NoiseSchedule()
    for sigma in (0.011, 0.1, 0.5, 3.0):
        t = s.start_t(sigma ** 2)
        assert s.sigma[t] >= sigma > s.sigma[t - 1]
    assert s.start_t(0.0) == 1 and s.start_t(1e9) == 1000
    assert s.start_t(0.01, c=2.0) == s.start_t(0.04)


class GaussianEps(nn.Module):
    """The exact eps*(x_t, t) when the data are N(m, s^2)."""

    def __init__(self, schedule, m, s):
        super().__init__()
        self.abar, self.m, self.s = schedule.abar.float(), m, s

    def forward(self, x, t):
        a = self.abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * self.m) / (a * self.s ** 2 + 1 - a)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samplers_reproduce_gaussian_data(kind, sampler):
    s, m, std, n = D.NoiseSchedule(1000, kind), 0.4, 0.3, 96 * 96
    model, gens = GaussianEps(s, m, std), [torch.Generator().manual_seed(1)]
    xt = D.noise((1, 1, 96, 96), gens)
    if sampler == "ancestral":
        x = D.p_sample_loop(model, s, xt, 1000, gens)
    else:
        x = D.ddim_sample(model, s, xt, 1000, 1000, gens)
    assert x.mean().item() == pytest.approx(m, abs=4 * std / math.sqrt(n) + 1e-3)
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.01)


def test_last_step_is_deterministic_and_start_index_is_exact():
    s = D.NoiseSchedule(100)
    model, xt = GaussianEps(s, 0.0, 0.5), torch.randn(1, 1, 4, 4)
    want = D.predict_x0(s, xt, torch.tensor([1]), model(xt, torch.tensor([1])))
    for seed in (0, 1):
        gens = [D.stream(seed, 2)]
        assert torch.allclose(D.p_sample_loop(model, s, xt, 1, gens), want, atol=1e-6)
        assert torch.allclose(D.ddim_sample(model, s, xt, 1, 5, gens, eta=1.0), want, atol=1e-6)
    seen = []

    class Spy(nn.Module):
        def forward(self, x, t):
            seen.append(int(t[0]))
            return model(x, t)

    D.ddim_sample(Spy(), s, xt, 50, 5, [D.stream(0, 2)])
    assert seen == [50, 40, 30, 20, 10]


# ---- networks and training


def test_training_t_covers_1_to_t_max_and_reaches_the_network():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            seen.extend(t.tolist())
            return x * self.w

    state = dict(config=dict(lr=1e-3, seed=0, batch=16, patch=8, t_max=7, prior="none"), step=0, rng=None,
                 optimiser={}, eps_loss=torch.ones(101))
    images = [torch.zeros(3, 9, 12, dtype=torch.uint8)]
    list(D.train_ddpm(state, Spy(), Spy(), D.NoiseSchedule(100), images, 40))
    assert set(seen) == set(range(1, 8))
    net = D.UNet(width=8)
    nn.init.normal_(net.out.weight)
    x = torch.randn(1, 3, 16, 16)
    for block in net.enc:
        nn.init.normal_(block.conv2.weight, std=0.1)
    a, b = net(x, torch.tensor([3])), net(x, torch.tensor([4]))
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(1, 1), (15, 17), (33, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_any_size(size, channels):
    x = torch.randn(2, channels, *size)
    assert D.UNet(channels, width=8)(x, torch.tensor([1, 2])).shape == x.shape
    out = D.SkipNet(channels, channels, width=8)(x)
    assert out.shape == x.shape and out.abs().max() <= 1


def test_error_variance_is_the_error_of_x0():
    """A model that is off by e in eps is off by sigma_t e in x0, hence r_t^2 = sigma_t^2 e^2."""
    s, t, e = D.NoiseSchedule(), 60, 0.1
    x0, eps = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    xt = D.q_sample(s, x0, torch.tensor([t]), eps)
    off = D.predict_x0(s, xt, torch.tensor([t]), eps + e) - x0
    prior = make_prior(None, 100, e ** 2)
    assert prior.r2[t].item() == pytest.approx((off ** 2).mean().item(), rel=1e-3)


def test_unet_treats_every_place_alike():
    """No normalisation: the middle of a picture does not depend on what is far away from it."""
    torch.manual_seed(0)
    net = D.UNet(width=8, mults=(1, 1))
    nn.init.normal_(net.out.weight, std=0.1)
    for block in [*net.enc, net.mid, *net.dec]:
        nn.init.normal_(block.conv2.weight, std=0.1)
    x, t = torch.randn(1, 3, 96, 96), torch.tensor([5])
    other = x.clone()
    other[..., 80:] += 3
    a, b = net(x, t), net(other, t)
    assert torch.equal(a[..., :30], b[..., :30]) and (a - b).abs().max() > 0.1


def test_prior_shift_is_the_ddpm_of_the_difference():
    """x_t = sqrt(abar) x0 + (1 - sqrt(abar)) u + sqrt(1 - abar) eps (ShiftDDPMs): what the network
    sees in training, and what the reverse process undoes when the network is perfect."""
    s, seen = D.NoiseSchedule(), []
    photo, dip = torch.full((3, 8, 8), 255, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            seen.append((x.detach().clone(), t))
            return x * 0 + self.w

    state = dict(config=dict(lr=1e-3, seed=0, batch=64, patch=8, t_max=1000, prior="shift"), step=0,
                 rng=None, optimiser={}, eps_loss=torch.ones(1001))
    next(D.train_ddpm(state, Spy(), Spy(), s, [torch.cat([photo, dip])], 1))
    (xt, t), = seen
    root = s.abar[t].sqrt().float()                                     # x0 = 1, u = -1
    expected, std = 2 * root - 1, (1 - s.abar[t]).sqrt().float()
    z = (xt.mean((1, 2, 3)) - expected) / std * math.sqrt(192)
    assert xt.shape == (64, 3, 8, 8) and z.abs().max() < 5 and z.std() == pytest.approx(1, abs=0.3)

    x0, u = torch.rand(1, 3, 8, 8) - 0.5, torch.full((1, 3, 8, 8), 0.7)

    def perfect(xt, t):
        abar = s.abar[t[0]].item()
        mean = math.sqrt(abar) * x0 + (1 - math.sqrt(abar)) * u
        return (xt - mean) / math.sqrt(1 - abar)

    prior = make_prior(perfect, 1000, 1e-8)
    for prior.shift, good in ((True, True), (False, False)):
        out = D.reverse(prior, None, D.Task("x"), u, 600, guide=u, risk=1e6, steps=5)
        assert torch.allclose(out, x0.expand_as(out), atol=1e-3) == good


def test_kept_weights_are_priors(tmp_path):
    flags = ["train", "--batch", 2, "--patch", 16, "--width", 8, "--out", tmp_path, "--halve"]
    assert run(*flags, "--steps", 4, "--keep", 2) == 0
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "metrics.json", "none-000002.pt",
                                            "none-000004.pt", "none.pt"]
    whole, kept = (D.Prior(D.load_state(tmp_path / f)) for f in ("none.pt", "none-000004.pt"))
    for a, b in zip(whole.parameters(), kept.parameters()):
        assert torch.equal(a, b)
    assert whole.trained == kept.trained > 0


def test_training_a_shift_prior(tmp_path):
    flags = ["train", "--batch", 2, "--patch", 16, "--width", 8, "--out", tmp_path, "--steps", 2]
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = (np.random.default_rng(0).random((24, 24, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    assert run(*flags, "--prior", "shift", "--data", folder) == 0
    prior = D.Prior(D.load_state(tmp_path / "shift.pt"))
    assert prior.shift and prior.t_max == 1000 and prior.channels == 3


def test_bf16_is_close_and_can_be_trained(tmp_path, photo):
    out = {}
    for flag in ([], ["--bf16"]):
        flags = ["--image", photo, "--iters", 30, "--nets", 1, "--out", tmp_path / f"f{len(flag)}"]
        assert run("fit-dip", *flags, *flag) == 0
        out[len(flag)] = D.load_image(str(tmp_path / f"f{len(flag)}" / "result.png"))
        assert run("train", "--batch", 2, "--patch", 16, "--width", 8, "--steps", 5, *flag,
                   "--out", tmp_path / f"t{len(flag)}") == 0
    assert D.psnr(out[0], out[1], 2.0) > 25 and not torch.equal(out[0], out[1])
    a, b = (D.load_state(tmp_path / f"t{k}" / "none.pt") for k in (0, 1))
    assert a["ema"]["stem.weight"].dtype == b["ema"]["stem.weight"].dtype == torch.float32
    assert torch.allclose(a["ema"]["stem.weight"], b["ema"]["stem.weight"], atol=1e-2)
    assert not torch.equal(a["ema"]["stem.weight"], b["ema"]["stem.weight"])


def test_resume_is_bit_exact(tmp_path):
    flags = ["train", "--batch", 2, "--patch", 16, "--width", 8, "--out"]
    assert run(*flags, tmp_path / "a", "--steps", 6) == 0
    assert run(*flags, tmp_path / "b", "--steps", 3) == 0
    assert run(*flags, tmp_path / "b", "--steps", 6, "--resume") == 0
    a, b = (torch.load(tmp_path / d / "none.pt", weights_only=True) for d in "ab")
    assert a["step"] == b["step"] == 6
    for key in ("model", "ema"):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
    assert torch.equal(a["rng"], b["rng"]) and torch.equal(a["eps_loss"], b["eps_loss"])


def test_ctrl_c_saves_a_whole_checkpoint_and_exits_130(tmp_path, monkeypatch):
    def interrupted(*args):
        for i, loss in enumerate(original(*args)):
            if i == 1:
                os.kill(os.getpid(), 2)
            yield loss

    original = D.train_ddpm
    flags = ["train", "--batch", 2, "--patch", 16, "--width", 8, "--steps", 5, "--out"]
    assert run(*flags, tmp_path / "whole") == 0
    monkeypatch.setattr(D, "train_ddpm", interrupted)
    assert run(*flags, tmp_path / "cut") == 130
    assert torch.load(tmp_path / "cut" / "none.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    assert run(*flags, tmp_path / "cut", "--resume") == 0
    a, b = (torch.load(tmp_path / d / "none.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, priors):
    path = tmp_path / "c.pt"
    path.write_bytes((priors / "none.pt").read_bytes())
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        D.save(str(path), dict(other=1))
    assert D.load_state(str(path))["step"] == 3


# ---- tasks, ladder, held-out risk, stop rules


def tasks():
    g = torch.Generator().manual_seed(3)
    mask = (torch.rand(1, 1, 12, 12, generator=g) < 0.4).float()
    small = (torch.rand(1, 1, 3, 3, generator=g) < 0.6).float()
    return [D.Task("denoise", sigma=0.1), D.Task("inpaint", mask=mask), D.Task("sr", scale=4),
            D.Task("sr with holes", scale=4, mask=small)]


@pytest.mark.parametrize("task", tasks(), ids=lambda t: t.name)
def test_operators(task):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 12, 12, generator=g, dtype=torch.float64)
    y = task.forward(torch.randn(1, 3, 12, 12, generator=g, dtype=torch.float64))
    assert torch.allclose(task.forward(task.pinv(y)), y)                       # A A^+ = I
    adjoint = task.pinv(y) / task.scale ** 2                                   # A^+ = s^2 A'
    assert (task.forward(x) * y).sum().item() == pytest.approx((x * adjoint).sum().item())
    error = (task.forward(x) - y)[task.forward(torch.ones_like(x)) > 0]        # of known pixels
    assert task.mse(x, y).item() == pytest.approx((error ** 2).mean().item())
    assert torch.allclose(task.forward(task.project(x, y)), y)
    known = task.forward(task.interpolate(y.float()))
    assert known.shape == y.shape and torch.isfinite(known).all()


@pytest.mark.parametrize("source", ["fit", "hold out"])
def test_conjugate_pair_is_uncorrelated(source):
    """Over many draws of the noise: cov(z1, z2 | x) = 0, and the variances are as stated."""
    n, sigma, g = 40000, 0.3, torch.Generator().manual_seed(0)
    x = torch.full((1, 1, n, 1), 0.2)
    y = x + sigma * torch.randn(x.shape, generator=g)
    task, a = D.Task("denoise", sigma=sigma), 0.5
    if source == "fit":
        w = torch.randn(y.shape, generator=g)
        z1, level, z2 = D.network_io("observed", "conjugate", y, task, y, y, a * sigma, w, g)
        assert level == pytest.approx(sigma * math.sqrt(1 + a * a))
    else:
        held = D.HeldOut(y, task, g, a=a)
        z1, z2, level = held.y, held.val_y, held.task.sigma
    e1, e2 = (z1 - x).flatten(), (z2 - x).flatten()
    s2 = sigma * math.sqrt(1 + 1 / a ** 2)
    assert abs((e1 * e2).mean()) < 4 * level * s2 / math.sqrt(n)
    assert e1.std().item() == pytest.approx(level, rel=0.02)
    assert e2.std().item() == pytest.approx(s2, rel=0.02)


def test_held_out_risk_is_unbiased():
    x, g, sigma, gaps, n = smooth_image(8), torch.Generator().manual_seed(0), 0.4, [], 1500
    for _ in range(n):
        y = x + sigma * torch.randn(x.shape, generator=g)
        held = D.HeldOut(y, D.Task("denoise", sigma=sigma), g)
        xhat = 0.6 * held.y + 0.4 * held.y.roll(1, 3)               # any fixed f
        gaps.append(held.risk(xhat) - ((xhat - x) ** 2).mean().item())
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / math.sqrt(n)
    assert np.std(gaps) / math.sqrt(n) < 0.02 * sigma ** 2          # and the test has power


@pytest.mark.parametrize("task", tasks()[1:], ids=lambda t: t.name)
def test_held_out_pixels(task):
    x = smooth_image(12)
    held = D.HeldOut(task.forward(x), task, D.stream(0, D.FIT), share=0.3)
    known = torch.ones(1, 1, 3, 3) if task.mask is None else task.mask
    assert torch.equal(held.task.mask + held.val_task.mask, known)
    assert held.risk(x) == pytest.approx(0, abs=1e-12)
    assert held.val_task.mask.sum() == max(1, round(0.3 * known.sum().item()))
    out = held.val_task.mask.expand(1, 3, -1, -1) > 0
    xhat = x + 0.1 * torch.randn(x.shape)
    plain = replace_mask(task).forward(xhat - x)[out]
    assert held.risk(xhat) == pytest.approx((plain ** 2).mean().item(), rel=1e-4)


def replace_mask(task):
    return D.Task("no mask", scale=task.scale)


def test_fit_never_redraws_the_observation_noise():
    streams = [torch.randn(1000, generator=D.stream(s, p)) for s in (0, 1) for p in range(5)]
    for a, b in itertools.combinations(streams, 2):
        assert abs((a * b).mean()) < 4.5 / math.sqrt(1000)


def feed(rule, scores):
    for k, score in enumerate(scores, 1):
        rule.update(k, torch.zeros(1, 1, 2, 2), score)
        if rule.done:
            break
    return k


def test_holdout_stops_at_the_minimum_with_patience():
    rule = D.StopRule("holdout", patience=10)
    scores = [(k - 30) ** 2 / 100 for k in range(1, 200)]
    assert feed(rule, scores) == 40 and rule.best_k == 30
    rule = D.StopRule("holdout", patience=10)                       # a dip before a lower one
    scores = [1.0, 0.5] + [0.9] * 5 + [0.2] + [0.9] * 50
    assert feed(rule, scores) == 18 and rule.best_k == 8


def test_fixed_takes_the_newest():
    rule = D.StopRule("fixed")
    assert feed(rule, [math.nan] * 25) == 25 and rule.best_k == 25 and not rule.done


def test_wmv_and_emv_find_the_still_stretch():
    """Outputs that move, stand nearly still around k = 120..160, and move again."""
    g, window = torch.Generator().manual_seed(0), 20
    size = [1.0] * 100 + [0.1] * 60 + [1.0] * 100
    outputs = [s * torch.randn(1, 1, 16, 16, generator=g) for s in size]
    wmv, emv = D.StopRule("wmv", patience=50, window=window), D.StopRule("emv", patience=50)
    ema, var = 0.0, 0.0
    for k, x in enumerate(outputs, 1):
        wmv.update(k, x, math.nan)
        emv.update(k, x, math.nan)
        if k >= window:
            stack = torch.stack(outputs[k - window:k]).numpy()
            assert wmv.score == pytest.approx(stack.var(0).mean(), rel=1e-5)
        var = 0.9 * (var + 0.1 * ((x.numpy() - ema) ** 2).mean())
        ema = ema + 0.1 * (x.numpy() - ema)
        assert emv.score == pytest.approx(var, rel=1e-4)
    assert 120 <= wmv.best_k <= 160 and wmv.done
    assert 120 <= emv.best_k <= 160 and emv.done


def settings(**given):
    return Namespace(**{name: default for name, default, *_ in D.SETTINGS} | given)


def test_ladder_falls_in_rungs():
    s = D.ladder(settings(), 0.2, 300)
    assert len(s) == 300 and len(set(s)) == 30 and s == sorted(s, reverse=True)
    assert s[0] == pytest.approx(0.6) and s[-1] == pytest.approx(0.08)
    assert s == D.ladder(settings(), 0.0, 300) and len(D.ladder(settings(), 0.2, 7)) == 7
    assert s[10] / s[0] == pytest.approx(s[20] / s[10])                      # geometric
    line, wave = (D.ladder(settings(shape=k, rungs=3), 1.0, 3) for k in ("linear", "cosine"))
    assert line == pytest.approx([3, 1.7, 0.4]) and wave == pytest.approx([3, 1.7, 0.4])
    wave = D.ladder(settings(shape="cosine", rungs=4, high=0.4, low=3.0), 1.0, 4)
    assert wave == pytest.approx([0.4, 0.4 + 2.6 / 4, 0.4 + 2.6 * 3 / 4, 3])    # and it may rise


def test_turns_are_the_8_of_the_square_and_invert():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    turns = [D.turned(x, g) for g in range(8)]
    assert len({tuple(t.flatten().tolist()) for t in turns}) == 8
    assert all(torch.equal(D.turned(t, g if g > 3 else -g % 4), x) for g, t in enumerate(turns))


def test_estimate_sigma():
    g = torch.Generator().manual_seed(0)
    for sigma in (0.05, 0.2, 0.5):
        y = smooth_image(128) + sigma * torch.randn(1, 3, 128, 128, generator=g)
        assert D.estimate_sigma(y) == pytest.approx(sigma, rel=0.05)
    assert math.isnan(D.estimate_sigma(torch.zeros(1, 3, 1, 1)))            # nothing to tell it by


class Shrink(nn.Module):
    """A denoiser with one weight, in a Prior's place."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.1))

    def forward(self, z, sigma):
        return self.w * z


VARIANTS = [dict(method=m) for m in D.METHODS] + [
    dict(loss="gradient"), dict(norm="group", upsample="bilinear"), dict(fresh=0, flips=0),
    dict(input="fixed"), dict(target="plain"), dict(target="noisy")]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("task", [D.Task("denoise", sigma=0.2), tasks()[1]], ids=["noise", "holes"])
def test_every_method_fits(options, task):
    x = smooth_image(12)
    options = dict(lr=0.02, nets=1, stop="fixed", iters=60, width=16, depth=2) | options
    steps = list(D.fit_dip(task.forward(x), task, Shrink(), **options))
    assert [s.k for s in steps] == list(range(1, 61)) and steps[-1].best_k == 60
    assert sum(s.ends for s in steps) == 30
    if task.sigma > 0:
        assert D.psnr(steps[-1].average, x, 2.0) > D.psnr(steps[0].average, x, 2.0) + 1
    else:
        assert np.mean([s.mse for s in steps[-10:]]) < np.mean([s.mse for s in steps[:10]])
    known = 3 * (144 if task.mask is None else task.mask.sum().item())
    error = task.forward(steps[9].output) - steps[9].target
    assert steps[9].mse == pytest.approx((error ** 2).sum().item() / known, rel=1e-4)


def test_adapt_leaves_the_prior_as_it_was():
    prior, x = Shrink(), smooth_image(12)
    *_, last = D.fit_dip(x, D.Task("denoise", sigma=0.2), prior, method="adapt", iters=20, lr=0.1)
    assert prior.w.item() == pytest.approx(0.1) and not torch.allclose(last.output, 0.1 * x)


def test_settings_are_known_by_name():
    with pytest.raises(TypeError):
        next(D.fit_dip(smooth_image(12), D.Task("denoise", sigma=0.2), rung=3))


def test_fit_approaches_the_clean_image_and_keeps_what_it_does_not_see():
    x = smooth_image(32)
    y = x + 0.2 * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))
    *_, last = D.fit_dip(y, D.Task("denoise", sigma=0.2), nets=1, iters=200, width=16)
    assert D.psnr(last.best, x, 2.0) > D.psnr(y, x, 2.0) + 5


def test_the_answer_of_two_networks_is_the_mean_of_each_alone():
    """The first network is that of nets=1; with the second, whatever it is, the mean moves by half
    of its own answer, which must itself be near the image."""
    x = smooth_image(16)
    y = x + 0.2 * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))
    fit = functools.partial(D.fit_dip, y, D.Task("denoise", sigma=0.2), iters=80, width=16)
    (*_, one), two = fit(nets=1), list(fit(nets=2))
    first = [s for s in two if s.k <= 80][-1]
    assert torch.equal(first.best, one.best) and two[-1].iters == 160
    second = 2 * two[-1].best - one.best
    assert not torch.allclose(second, one.best, atol=1e-3)
    assert D.psnr(second, x, 2.0) > D.psnr(y, x, 2.0)


@pytest.mark.parametrize("tail", [0.0, 0.25])
def test_the_tail_sees_what_was_held_out(tail, monkeypatch):
    """Every target before the tail is made from y_fit; those in it from y."""
    monkeypatch.setattr(D, "network_io", lambda source, aim, y, *rest: (y, 0.1, y))
    y, task = smooth_image(12), D.Task("denoise", sigma=0.2)
    steps = list(D.fit_dip(y, task, nets=1, iters=40, width=16, tail=tail))
    seen = D.HeldOut(y, task, D.stream(0, D.FIT)).y
    before = [s for s in steps if not math.isnan(s.risk)]
    assert len(before) == round(40 * (1 - tail))
    assert all(torch.equal(s.target, seen) for s in before)
    assert all(torch.equal(s.target, y) for s in steps[len(before):])
    best = min(before, key=lambda s: s.risk)
    assert steps[-1].best_k == best.k and steps[-1].best_risk == best.risk
    assert len(steps) - len(before) == round(best.k / (1 - tail)) - best.k


@pytest.mark.parametrize("task", [D.Task("denoise", sigma=0.2), tasks()[1]], ids=["noise", "holes"])
def test_the_risk_of_two_networks_is_of_what_never_saw_the_held_out_part(task):
    x = smooth_image(12)
    y = task.forward(x) + task.sigma * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))
    steps = list(D.fit_dip(y, task, nets=2, iters=40, width=16))
    held = D.HeldOut(y, task, D.stream(0, D.FIT))
    first, second = ([s for s in steps if not math.isnan(s.risk) and n < s.k / 40 <= n + 1]
                     for n in (0, 1))
    blind = min(first, key=lambda s: s.risk).average            # the first answer, before its tail
    total = [s for s in steps if s.k <= 40][-1].best            # and after it
    for s in second:
        average = 2 * s.average - total
        assert s.risk == pytest.approx(held.risk((blind + average) / 2), rel=1e-3, abs=1e-5)


def test_a_second_network_counts_only_when_it_is_half_done():
    x = smooth_image(12)
    steps = list(D.fit_dip(x, D.Task("denoise", sigma=0.2), nets=2, iters=40, width=16))
    first = [s for s in steps if s.k <= 40][-1].best
    assert all(torch.equal(s.best, first) for s in steps if 40 < s.k < 60 and not math.isnan(s.risk))
    assert not torch.equal(steps[-1].best, first)


def test_gradient_loss_counts_edges(monkeypatch):
    """A constant error has no edges: both losses agree; a checkerboard has many."""
    losses = {}
    for kind in ("squares", "gradient"):
        for name, error in (("flat", torch.ones(1, 1, 8, 8)),
                            ("board", (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1)):
            net = Shrink()
            net.forward = lambda z, level: error.view(1, 1, 8, 8) * net.w / 0.1
            opt = torch.optim.SGD(net.parameters(), lr=0.0)
            task, zero = D.Task("d", sigma=0.1), torch.zeros(1, 1, 8, 8)
            o = settings(loss=kind, target="plain", lr=0.0)
            list(D.descend(net, opt, o, zero, task, [0.1], 0, zero, D.stream(0, 2), zero, None))
            losses[kind, name] = net.w.grad.item()              # d loss / d w = 20 loss at w = 1/10
    assert losses["squares", "flat"] == losses["gradient", "flat"] == pytest.approx(20)
    assert losses["squares", "board"] == pytest.approx(20)
    assert losses["gradient", "board"] == pytest.approx(20 * (1 + 2 * 4 * 7 / 8))


CLEAN = ("clean", "x", "x0", "reference", "target", "ground_truth")


@pytest.mark.parametrize("f", [D.fit_dip, D.fit_crops, D.descend, D.network_io, D.HeldOut.__init__, D.HeldOut.risk,
                               D.StopRule.__init__, D.StopRule.update, D.NoiseSchedule.start_t, D.reverse])
def test_fit_and_stop_have_no_clean_image_parameter(f):
    assert not set(inspect.signature(f).parameters) & set(CLEAN)


@pytest.mark.parametrize("init, task", [(None, "denoise:25"), ("dip", "superres:4")])
def test_changing_the_clean_image_changes_no_output_bit(priors, init, task, photo, tmp_path,
                                                        monkeypatch):
    command = "sample" if init else "fit-dip"
    flags = [command, "--image", str(photo), "--task", task, "--iters", "8",
             "--ckpt", str(priors / "dip.pt")] + (["--init", init] if init else [])
    args = D.make_parser().parse_args(flags)
    args.device, args.samples, args.steps, args.out = torch.device("cpu"), 2, 3, str(tmp_path)
    x, *rest = D.prepare(args)
    psnrs, images = [], []
    for v in (x, torch.zeros_like(x), None):
        monkeypatch.setattr(D, "prepare", lambda _: (v, *rest))
        metrics, panels = D.restore(args)
        psnrs.append(metrics["psnr"])
        images.append(panels[-1 if v is None else -2][1])
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert psnrs[0] != psnrs[1] and psnrs[2] is None


# ---- joining


def tiny_prior(model=None):
    s = D.NoiseSchedule()
    return make_prior(model or GaussianEps(s, 0.0, 0.5), 1000, 0.02)


def test_marginal_of_the_start(monkeypatch):
    monkeypatch.setattr(D, "ddim_sample", lambda model, schedule, xt, *rest: xt)
    xhat, t0 = torch.full((1, 1, 64, 64), 0.7), 300
    prior = tiny_prior()
    xt = D.reverse(prior, xhat, D.Task("denoise", sigma=0.1), xhat, t0, samples=4)
    abar = prior.schedule.abar[t0].item()
    assert xt.mean().item() == pytest.approx(0.7 * math.sqrt(abar), abs=4 / 128)
    assert xt.std().item() == pytest.approx(math.sqrt(1 - abar), rel=0.03)
    assert len({v.sum().item() for v in xt}) == 4


def test_a_noisy_start_gets_only_the_missing_noise(monkeypatch):
    monkeypatch.setattr(D, "ddim_sample", lambda model, schedule, xt, *rest: xt)
    prior, sigma, g = tiny_prior(), 0.4, torch.Generator().manual_seed(0)
    y = 0.5 + sigma * torch.randn(1, 1, 128, 128, generator=g)
    task, t0 = D.Task("denoise", sigma=sigma), 250
    for s, t in ((sigma, t0), (sigma, prior.schedule.start_t(sigma ** 2))):
        abar = prior.schedule.abar[t].item()
        xt = D.reverse(prior, None, task, y, t, sigma=s, samples=1)
        assert xt.mean().item() == pytest.approx(0.5 * math.sqrt(abar), abs=4 / 128)
        assert xt.std().item() == pytest.approx(math.sqrt(1 - abar), rel=0.03)


def test_noise_init_starts_from_noise_alone(priors, photo, monkeypatch):
    starts = []
    monkeypatch.setattr(D, "ddim_sample", lambda m, s, xt, *rest: starts.append(xt) or xt)
    flags = ["sample", "--init", "noise", "--ckpt", str(priors / "none.pt"), "--image"]
    for path in (photo, photo.with_name("other.png")):
        D.to_image(-smooth_image() if path != photo else smooth_image()).save(path)
        args = D.make_parser().parse_args(flags + [str(path)])
        args.device, args.out = torch.device("cpu"), str(photo.with_name("o"))
        D.restore(args)
    assert torch.equal(*starts) and starts[0].std().item() == pytest.approx(1, rel=0.05)


def test_guidance_is_the_product_of_two_gaussians():
    r2, risk, one = torch.full((11,), 0.04), 0.01, torch.full((1, 1, 2, 2), 0.8)
    got = D.refine_x0(one, 5, r2=r2, xhat=one * 0, risk=risk, y=None, task=D.Task("d", sigma=0.1))
    want = (0.8 / 0.04 + 0 / 0.01) / (1 / 0.04 + 1 / 0.01)
    assert got.mean().item() == pytest.approx(want, rel=1e-5)
    task = D.Task("inpaint", mask=torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    got = D.refine_x0(one, 5, r2=r2, xhat=one * 0, risk=risk, y=0.3 * task.mask, task=task)
    assert got[0, 0, 0, 0].item() == pytest.approx(0.3) and got[0, 0, 0, 1].item() == pytest.approx(0.16)
    got = D.refine_x0(one, 5, r2=r2, xhat=None, risk=0.0, y=one * 0, task=D.Task("d", sigma=0.2))
    assert got.mean().item() == pytest.approx(0.8 * 0.5)            # noisy y: equal precisions


def test_sample_i_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    net = D.UNet(width=8)
    nn.init.normal_(net.out.weight, std=0.1)
    y = smooth_image(16)[..., ::4, ::4]
    prior, task, start = tiny_prior(net), D.Task("sr", scale=4), smooth_image(16)
    many = D.reverse(prior, y, task, start, 200, steps=4, eta=1.0, samples=3, seed=5)
    for i in range(3):
        one = D.reverse(prior, y, task, start, 200, steps=4, eta=1.0, samples=1, seed=5 + i)
        assert torch.allclose(many[i:i + 1], one, atol=1e-4)
    assert (many[0] - many[1]).abs().max() > 1e-3


# ---- metrics


def two_images():
    u = np.arange(3 * 24 * 20).reshape(1, 3, 24, 20)
    a = torch.from_numpy(0.5 + 0.5 * np.sin(u / 7.0))
    return a, torch.from_numpy((0.5 + 0.5 * np.sin(u / 7.0 + 0.3) + 0.1 * np.cos(u)).clip(0, 1))


def test_psnr_and_ssim_golden():
    a, b = two_images()
    assert D.psnr(torch.zeros(4), torch.full((4,), 0.1), 1.0) == pytest.approx(20.0)
    assert D.psnr(a * 2 - 1, b * 2 - 1, 2.0) == pytest.approx(D.psnr(a, b, 1.0))
    assert D.psnr(a, a, 1.0) == math.inf and D.ssim(a, a, 1.0) == pytest.approx(1.0)
    assert D.ssim(a, b, 1.0) == pytest.approx(0.9124603986409611, abs=1e-6)
    assert D.ssim(a[:, :1], b[:, :1], 1.0) == pytest.approx(0.9021090969300879, abs=1e-6)
    with pytest.raises(ValueError):
        D.ssim(a[..., :10], b[..., :10], 1.0)


def test_ssim_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = two_images()
    want = metrics.structural_similarity(a[0].numpy(), b[0].numpy(), channel_axis=0, data_range=1.0,
                                         gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
    assert D.ssim(a, b, 1.0) == pytest.approx(want, abs=1e-4)


# ---- files


def test_images_of_every_kind_load(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)
    want = torch.from_numpy(rgb / 127.5 - 1).permute(2, 0, 1)[None].float()
    image = Image.fromarray(rgb)
    image.save(tmp_path / "rgb.png")
    assert torch.allclose(D.load_image(str(tmp_path / "rgb.png")), want, atol=1e-6)
    assert np.array_equal(np.asarray(D.to_image(want)), rgb)
    image.quantize(256).save(tmp_path / "palette.png")
    assert D.load_image(str(tmp_path / "palette.png")).shape == (1, 3, 6, 5)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert (D.load_image(str(tmp_path / "clear.png")) == 1).all()
    grey16 = np.array([[0, 65535], [32768, 257]], np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    got = D.load_image(str(tmp_path / "grey16.png"))
    assert got.shape == (1, 1, 2, 2) and np.allclose(got[0, 0], grey16 / 32767.5 - 1, atol=1e-4)
    exif = Image.Exif()
    exif[0x0112] = 6                                                # turn by 90 degrees to view
    image.save(tmp_path / "turned.png", exif=exif)
    assert torch.allclose(D.load_image(str(tmp_path / "turned.png")),
                          torch.rot90(want, -1, (2, 3)), atol=1e-6)


def test_saving_rounds_and_clips():
    x = torch.tensor([[[[-2.0, -1.0, 0.0, 1.0, 2.0, 0.0039]]]])
    assert np.asarray(D.to_image(x)).tolist() == [[0, 0, 128, 255, 255, 128]]


# ---- the commands, at 16 x 16


FIT_KEYS = {"psnr", "ssim", "psnr_observed", "seconds", "iters", "stop_iter", "risk", "sigma"}
SAMPLE_KEYS = {"psnr", "ssim", "psnr_observed", "seconds", "psnr_dip", "psnr_mean", "psnr_sample",
               "t0", "nfe", "seconds_dip", "seconds_ddpm"}


def outputs(out, keys):
    for name in ("result.png", "figure.png"):
        Image.open(out / name).load()
    metrics = json.loads((out / "metrics.json").read_text())
    assert keys <= set(metrics) and list(csv.DictReader(open(out / "log.csv")))
    assert not [f for f in os.listdir(out) if f.endswith(".tmp")]
    return metrics


@pytest.mark.parametrize("extra", [
    [], ["--task", "inpaint:0.8"], ["--task", "superres:4"], ["--method", "dip", "--stop", "wmv"],
    ["--method", "targets", "--stop", "emv"], ["--method", "selfdiff", "--stop", "fixed"],
    ["--method", "adapt"], ["--method", "guide"], ["--tail", "0.9"], ["--observed", "--task", "denoise"], ["--observed", "--task", "superres:2"]],
    ids=" ".join)
def test_fit_dip(tmp_path, photo, priors, extra):
    code = run("fit-dip", "--image", photo, "--iters", 8, "--out", tmp_path, "--ckpt",
               priors / "dip.pt", *extra)
    m = outputs(tmp_path, FIT_KEYS)
    assert code == 0 and (m["psnr"] is None) == ("--observed" in extra) and m["stop_iter"] > 0


def test_ctrl_c_keeps_the_best_so_far(tmp_path, photo, monkeypatch):
    def interrupted(*args, **options):
        for step in original(*args, **options):
            if step.k == 3:
                os.kill(os.getpid(), 2)
            yield step

    original = D.fit_dip
    monkeypatch.setattr(D, "fit_dip", interrupted)
    assert run("fit-dip", "--image", photo, "--iters", 50, "--out", tmp_path) == 130
    assert outputs(tmp_path, FIT_KEYS)["iters"] == 3


def test_fit_dip_with_a_mask_file(tmp_path, photo):
    mask = np.full((16, 16), 255, np.uint8)
    mask[4:8, 4:8] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("fit-dip", "--image", photo, "--observed", "--task", "inpaint", "--mask",
               tmp_path / "mask.png", "--iters", 8, "--out", tmp_path / "o") == 0
    result, given = (np.asarray(Image.open(p)) for p in (tmp_path / "o" / "result.png", photo))
    assert np.array_equal(result[mask > 0], given[mask > 0])


@pytest.mark.parametrize("extra", [
    ["--init", "dip"], ["--init", "dip", "--task", "denoise:25"], ["--init", "dip", "--no-guide"],
    ["--init", "observed", "--task", "inpaint:0.8", "--start", "30"],
    ["--init", "noise", "--eta", "1"], ["--init", "dip", "--observed"]], ids=" ".join)
def test_sample(tmp_path, photo, priors, extra):
    ckpt = priors / ("none.pt" if "noise" in extra else "dip.pt")
    assert run("sample", "--image", photo, "--iters", 8, "--steps", 3, "--samples", 2, "--out",
               tmp_path, "--ckpt", ckpt, *extra) == 0
    m = outputs(tmp_path, SAMPLE_KEYS)
    assert 1 <= m["nfe"] <= 3 and m["t0"] >= m["nfe"]
    assert (m["psnr_dip"] is None) == ("dip" not in extra or "--observed" in extra)
    assert m["seconds"] >= m["seconds_ddpm"] > 0


def test_ctrl_c_while_sampling_keeps_what_is_there(tmp_path, photo, priors, monkeypatch):
    def interrupted(*args, **options):
        os.kill(os.getpid(), 2)
        return original(*args, **options)

    original = D.refine_x0
    monkeypatch.setattr(D, "refine_x0", interrupted)
    assert run("sample", "--init", "observed", "--image", photo, "--out", tmp_path, "--ckpt",
               priors / "dip.pt") == 130
    outputs(tmp_path, SAMPLE_KEYS)


def test_auto_is_the_default_of_a_number():
    assert D.in_range(5, int, 1, 9, "auto") == 5 and D.in_range(5, int, 1, 9, "7") == 7


def test_sample_grid(tmp_path, priors):
    assert run("sample", "--init", "noise", "--steps", 3, "--samples", 3, "--size", 16, "--out",
               tmp_path, "--ckpt", priors / "none.pt") == 0
    m = outputs(tmp_path, SAMPLE_KEYS)
    assert m["nfe"] == 3 and m["t0"] == 1000 and m["psnr"] is None


def test_super_resolution_is_consistent_with_what_was_observed(tmp_path, photo, priors, monkeypatch):
    args = D.make_parser().parse_args(["sample", "--init", "dip", "--image", str(photo), "--iters",
                                       "6", "--steps", "3", "--samples", "2", "--ckpt",
                                       str(priors / "dip.pt")])
    args.device, args.out, samples = torch.device("cpu"), str(tmp_path), []
    reverse = D.reverse
    monkeypatch.setattr(D, "reverse", lambda *a, **k: samples.append(reverse(*a, **k)) or samples[0])
    x, y, task, prior = D.prepare(args)
    D.restore(args)
    assert torch.allclose(task.forward(samples[0]), y.expand(2, -1, -1, -1), atol=1e-5)


def test_grey_photo_with_a_colour_prior(tmp_path, priors):
    D.to_image(smooth_image(channels=1)).save(tmp_path / "grey.png")
    assert run("sample", "--init", "dip", "--image", tmp_path / "grey.png", "--iters", 6, "--steps",
               2, "--out", tmp_path / "o", "--ckpt", priors / "dip.pt") == 0
    assert run("fit-dip", "--method", "adapt", "--image", tmp_path / "grey.png", "--iters", 6,
               "--out", tmp_path / "p", "--ckpt", priors / "dip.pt") == 0
    assert all(Image.open(tmp_path / d / "result.png").mode == "L" for d in "op")


def test_first_sample_trains_a_prior_and_keeps_it(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained, original = [], D.cmd_train

    def small(args):
        trained.append(args.prior)
        args.steps, args.batch, args.patch, args.width = 2, 2, 16, 8
        return original(args)

    monkeypatch.setattr(D, "cmd_train", small)
    for _ in range(2):
        assert run("sample", "--init", "dip", "--image", photo, "--iters", 6, "--steps", 2) == 0
    assert trained == ["dip"] and os.path.exists(tmp_path / "runs" / "train" / "dip.pt")
    assert "minutes" in capsys.readouterr().out


@pytest.mark.parametrize("suite, task", [("stopping", "denoise:25,inpaint:0.8"),
                                         ("init", "superres:4")])
def test_evaluate_quick(tmp_path, priors, monkeypatch, suite, task):
    monkeypatch.setattr(D, "load_prior", load_tiny(priors))
    flags = ["evaluate", suite, "--quick", "--task", task, "--out", tmp_path / "a[1]"]
    assert run(*flags) == 0
    tmp_path = tmp_path / "a[1]"                        # a name that a pattern would misread
    rows = list(csv.DictReader(open(tmp_path / f"{suite}.csv")))
    arms = [a for part in D.SUITES[suite][1].split(";") for a in D.expand(part)]
    assert [(r["task"], r["arm"]) for r in rows] == [
        (t, a) for t in task.split(",") for a in arms
        if "--told" not in a and "--steps 1 " not in a or t.startswith("denoise")]
    assert all(math.isfinite(float(r["psnr"])) for r in rows)
    assert (tmp_path / f"{suite}.md").read_text().startswith("| task | arm | n | psnr |")
    for r in rows if suite == "stopping" else ():
        assert float(r["gap"]) >= -1e-9 and float(r["gap_wmv"]) >= -1e-9
        assert float(r["oracle"]) == pytest.approx(float(r["psnr"]) + float(r["gap"]))
    monkeypatch.setattr(D, "restore", None)             # a second run measures nothing again
    assert run(*flags) == 0


def test_evaluate_stopped_before_it_has_measured_anything(tmp_path, monkeypatch):
    fit = D.fit_dip

    def interrupted(*args, **settings):
        os.kill(os.getpid(), signal.SIGINT)
        yield from fit(*args, **settings)

    monkeypatch.setattr(D, "fit_dip", interrupted)
    flags = ["evaluate", "stopping", "--quick", "--arms", "fit-dip --nets 1 --rungs 2", "--out", tmp_path]
    assert run(*flags) == 130 and not list(tmp_path.rglob("metrics.json"))


def test_torchrun_shares_the_work(tmp_path, photo, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seeds in (("1", {100}), ("0", {0, 100, 200})):
        monkeypatch.setenv("RANK", rank)
        assert run("evaluate", "ablation", "--quick", "--seeds", 3,
                   "--arms=fit-dip --nets {1|1 --told 0}", "--out", tmp_path) == 0
        rows = list(csv.DictReader(open(tmp_path / "ablation.csv")))
        assert {int(r["seed"]) for r in rows} == seeds and len(rows) == 2 * len(seeds)


def test_every_arm_is_a_command():
    for tasks_, text in D.SUITES.values():
        arms = [arm for part in text.split(";") for arm in D.expand(part)]
        assert len(arms) == len(set(arms)) and not set("{|};") & set("".join(arms).replace("{KEPT}", ""))
        for line in arms:
            assert D.make_parser().parse_args(line.split()).command in ("fit-dip", "sample")


def test_expand_writes_every_option_out_in_order():
    assert D.expand("a --{x 1|y}") == ["a --x 1", "a --y"]
    assert D.expand("{a|b} {1|2}") == ["a 1", "a 2", "b 1", "b 2"]
    assert D.expand("a") == ["a"]


def test_evaluate_fits_a_dip_once_for_all_arms_with_it(tmp_path, priors, monkeypatch):
    fits = []
    original = D.fit_dip
    monkeypatch.setattr(D, "load_prior", load_tiny(priors))
    monkeypatch.setattr(D, "fit_dip", lambda *a, **k: fits.append(k) or original(*a, **k))
    arms = "sample --init dip{| --steps 2| --start 9};fit-dip --nets 1;sample --init observed"
    assert run("evaluate", "init", "--quick", "--arms", arms, "--task", "superres:2",
               "--out", tmp_path) == 0
    rows = list(csv.DictReader(open(tmp_path / "init.csv")))
    assert len(rows) == 5 and len(fits) == 1
    assert len({r["seconds_dip"] for r in rows[:4]}) == 1 and float(rows[4]["seconds_dip"]) == 0
    assert rows[0]["psnr_dip"] == rows[1]["psnr_dip"] == rows[3]["psnr"]


def test_nothing_known_is_a_sample_of_the_prior(tmp_path, priors, photo):
    flags = ["sample", "--init", "noise", "--image", photo, "--task", "inpaint:1", "--steps", 2,
             "--ckpt", priors / "none.pt"]
    other = tmp_path / "other.png"
    Image.new("RGB", Image.open(photo).size, "red").save(other)
    for k, f in enumerate((photo, other)):
        assert run(*flags[:4], f, *flags[5:], "--out", tmp_path / f"s{k}") == 0
    a, b = ((tmp_path / f"s{k}" / "result.png").read_bytes() for k in (0, 1))
    assert a == b
    assert run("fit-dip", "--image", photo, "--task", "inpaint:1", "--out", tmp_path / "n") == 2


def test_a_ddpm_and_a_dip_in_one_ensemble():
    """adapt with two networks: the first from the prior's weights, the second a hourglass."""
    used = []

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, z, sigma):
            used.append(sigma)
            return 0 * z + self.bias

    y = smooth_image(16)
    steps = list(D.fit_dip(y, D.Task("denoise", sigma=0.1), Zero(), method="adapt", iters=12, nets=2,
                           stop="fixed", lr=1e-9))
    assert len(steps) == 24 and len(used) == 12
    assert steps[11].best.abs().max() < 1e-6 < steps[-1].best.abs().max()


def test_markdown_means_gaps_and_seeds():
    rows = [dict(task="t", arm="a", seed=s, psnr=p, gap=g, oracle=None)
            for s, p, g in ((0, 30.0, 0.1), (0, 32.0, 0.3), (100, 33.0, 1.4))]
    head, _, line = D.markdown(rows).strip().split("\n")
    assert head == "| task | arm | n | psnr | gap | std |"
    assert line == "| t | a | 3 | 32 | 0.60 / 1.40 / 1 | 1.41 |".replace("32 |", "31.67 |")


def test_told_changes_the_method_not_the_observation(photo):
    got = []
    for extra in ([], ["--told", "30"], ["--told", "0"]):
        args = D.make_parser().parse_args(["fit-dip", "--image", str(photo), *extra])
        args.device = torch.device("cpu")
        got.append(D.observe(args, str(photo), "denoise:25"))
    assert all(torch.equal(got[0][1], y) for _, y, _ in got)
    assert [t.sigma for _, _, t in got] == pytest.approx(
        [50 / 255, 60 / 255, D.estimate_sigma(got[0][1])])


def test_a_folder_is_shared_by_the_processes_of_torchrun(tmp_path, monkeypatch):
    for k, name in enumerate(("a.png", "b.png", "c/b.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        D.to_image(smooth_image() * (1 - k / 4)).save(tmp_path / "in" / name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run("fit-dip", "--image", tmp_path / "in", "--iters", 6, "--out", tmp_path / rank) == 0
        found.append({os.path.relpath(f.parent, tmp_path / rank)
                      for f in (tmp_path / rank).rglob("metrics.json")})
    assert found == [{"a.png", os.path.join("c", "b.png")}, {"b.png"}]


def torchrun(world, *argv, **env):
    """dipddpm.py in `world` processes; the exit code and what they said."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), D.__file__,
         *map(str, argv)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_like_one(tmp_path):
    """The same global batch gives the same gradients, but for rounding."""
    (tmp_path / "data").mkdir()
    D.to_image(smooth_image(40)).save(tmp_path / "data" / "a.png")
    flags = ["train", "--data", tmp_path / "data", "--steps", 3, "--batch", 6, "--patch", 16,
             "--width", 8, "--device", "cpu", "--lr", 0.01, "--out"]
    code, said = torchrun(2, *flags, tmp_path / "two")
    assert code == 0, said
    assert run(*flags, tmp_path / "one") == 0
    one, two = (torch.load(tmp_path / d / "none.pt", weights_only=True) for d in ("one", "two"))
    grads = [torch.cat([v["exp_avg"].flatten() for v in d["optimiser"]["state"].values()])
             for d in (one, two)]                           # averages of the three gradients
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[0].norm() and grads[0].norm() > 0
    assert run(*flags[:-1], "--seed", 1, "--out", tmp_path / "other") == 0
    other = torch.load(tmp_path / "other" / "none.pt", weights_only=True)["optimiser"]["state"]
    other = torch.cat([v["exp_avg"].flatten() for v in other.values()])
    assert (grads[0] - other).norm() > 0.1 * grads[0].norm()                # another batch shows
    assert torch.equal(one["rng"], two["rng"]) and two["step"] == 3
    assert sorted(os.listdir(tmp_path / "two")) == ["log.csv", "metrics.json", "none.pt"]


# ---- sets of pictures


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


def test_precision_recall_density_coverage_by_hand():
    """Real: 0 and 10 .. in one dimension, so every ball is known."""
    real = torch.tensor([0.0, 1, 2, 10, 11, 12])[:, None]
    fake = torch.tensor([0.5, 1.5, 1.6, 50, 51, 52])[:, None]
    got = D.precision_recall(real, fake, k=2)
    # real radii 2 1 2 2 1 2; fake radii 1.1 1 1.1 2 1 2. Inside real balls: 0.5 (of 0, 1, 2), 1.5, 1.6
    assert got["precision"] == pytest.approx(3 / 6)
    assert got["density"] == pytest.approx((3 + 3 + 3) / (2 * 6))
    assert got["coverage"] == pytest.approx(3 / 6)
    assert got["recall"] == pytest.approx(3 / 6)            # 0, 1, 2 lie in balls of 0.5, 1.5, 1.6


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_generation_compares_sets_also_by_a_given_inception(tmp_path, priors, monkeypatch, capsys):
    class Inception(nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            assert return_features and x.min() >= 0 and x.max() > 2 and x.shape[1] == 3
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).unsqueeze(-1)

    monkeypatch.setattr(D, "load_prior", load_tiny(priors))
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    for folder, level in (("targets", 0.5), ("held", -0.5)):
        for k in range(6):
            (tmp_path / folder).mkdir(exist_ok=True)
            D.to_image(smooth_image(16) * level * (1 + k / 5)).save(tmp_path / folder / f"{k}.png")
    flags = ["evaluate", "generation", "--images", tmp_path / "targets", "--size", 16, "--held",
             tmp_path / "held", "--out", tmp_path / "out", "--arms",
             "sample --samples 1 --init {noise|dip --iters 6} --steps 2"]
    assert run(*flags) == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "sets.csv")))
    assert [r["arm"] for r in rows] == ["the targets", "sample --samples 1 --init noise --steps 2",
                                        "sample --samples 1 --init dip --iters 6 --steps 2"]
    assert all(int(r["n"]) == 6 and math.isfinite(float(r["rFD"])) for r in rows)
    noise = [f.read_bytes() for f in (tmp_path / "out").rglob("result.png") if "init-noise" in str(f)]
    assert len(set(noise)) == len(noise) == 6               # no two from the same noise
    real, fake = (torch.cat([D.features(D.load_image(str(f))) for f in sorted((tmp_path / d).iterdir())])
                  for d in ("held", "targets"))
    assert float(rows[0]["rFD"]) == pytest.approx(D.frechet(real, fake))
    assert run(*flags, "--inception", tmp_path / "inception.pt") == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "sets.csv")))
    means = [torch.stack([(D.load_image(str(f))[0] + 1) * 127.5 for f in (tmp_path / d).iterdir()])
             for d in ("held", "targets")]
    gap = sum((a - b) ** 2 for a, b in zip(*(
        torch.nn.functional.adaptive_avg_pool2d(m, 2).mean(0).flatten() for m in means)))
    assert float(rows[0]["FID"]) > gap.item() * (1 - 1e-5) and "rFD" not in rows[0]
    assert run(*flags, "--inception", tmp_path / "none.pt") == 2
    assert "--inception" in capsys.readouterr().err


def test_held_out_pixels_are_as_deep_as_the_holes():
    gen = torch.Generator().manual_seed(0)
    scattered = (torch.rand(1, 1, 64, 64, generator=gen) >= 0.8).float()
    assert D.hole_side(scattered) == 1 and D.hole_side(torch.ones(1, 1, 8, 8)) == 1
    box = torch.ones(1, 1, 128, 128)
    box[..., 48:80, 48:80] = 0
    depth = np.minimum.reduce([np.minimum(i, 33 - i) for i in np.mgrid[1:33, 1:33]]).mean()
    assert D.hole_side(box) == 6 * int(depth) - 5
    held = D.HeldOut(torch.zeros(1, 3, 128, 128), D.Task("inpaint", mask=box), gen)
    out = held.val_task.mask
    assert (out * (1 - box)).sum() == 0 and 0.05 < out.sum() / box.sum() < 0.3
    inside = torch.nn.functional.avg_pool2d(out, 9, 1, 4) > 0.99            # squares, no salt
    assert inside.any() and torch.equal(out + held.task.mask, box)


def load_tiny(priors):
    original = D.load_prior

    def load(args, kind, channels):
        args.ckpt = str(priors / f"{kind}.pt")
        return original(args, kind, channels)
    return load


def test_same_seed_same_bytes(tmp_path, photo):
    for out in ("a", "b"):
        assert run("fit-dip", "--image", photo, "--iters", 8, "--out", tmp_path / out) == 0
    assert run("fit-dip", "--image", photo, "--iters", 8, "--seed", 1, "--out", tmp_path / "c") == 0
    a, b, c = ((tmp_path / d / "result.png").read_bytes() for d in "abc")
    assert a == b != c


@pytest.mark.parametrize("size", [(1, 1), (15, 17), (2, 40)])
@pytest.mark.parametrize("task", ["denoise:25", "inpaint:0.05"])
def test_small_images(tmp_path, size, task):
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "s.png")
    code = run("fit-dip", "--image", tmp_path / "s.png", "--task", task, "--iters", 6, "--seed", 3,
               "--out", tmp_path / "o")
    assert code == 0 and Image.open(tmp_path / "o" / "result.png").size == size[::-1]


# ---- errors: one line, the flag, exit code 2


@pytest.fixture
def bad(tmp_path, photo, priors):
    (tmp_path / "text.png").write_text("no image")
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    big.save(tmp_path / "big.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "big.jpg").read_bytes()[:900])
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "small_mask.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "black_mask.png")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8)))
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8), np.uint8))
    whole = (priors / "dip.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    state = torch.load(priors / "dip.pt", weights_only=True)
    state["config"]["unet"]["width"] = 16
    torch.save(state, tmp_path / "other_shape.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "file").write_text("a file where a folder should be")
    return tmp_path


ERRORS = [
    ("fit-dip --image {d}/missing.png", "--image"),
    ("fit-dip --image {d}/text.png", "--image"),
    ("fit-dip --image {d}/cut.jpg", "--image"),
    ("fit-dip --image {d} --iters 5", "--image"),
    ("fit-dip --image {d}/one.png --task superres:4", "--image"),
    ("fit-dip --image {d}/photo.png --task blur:3", "--task"),
    ("fit-dip --image {d}/photo.png --task denoise:0", "--task"),
    ("fit-dip --image {d}/photo.png --task denoise:-25", "--task"),
    ("fit-dip --image {d}/photo.png --task denoise:nan", "--task"),
    ("fit-dip --image {d}/photo.png --task denoise", "--task"),
    ("fit-dip --image {d}/photo.png --task inpaint:1", "--task"),
    ("fit-dip --image {d}/photo.png --task superres:5", "--task"),
    ("fit-dip --image {d}/one.png --task denoise --observed", "--task"),
    ("fit-dip --image {d}/photo.png --task inpaint --observed", "--mask"),
    ("fit-dip --image {d}/photo.png --task inpaint --mask {d}/small_mask.png", "--mask"),
    ("fit-dip --image {d}/photo.png --task inpaint --mask {d}/black_mask.png", "--mask"),
    ("fit-dip --image {d}/photo.png --task inpaint --mask {d}/missing.png", "--mask"),
    ("fit-dip --image {d}/photo.png --mask {d}/black_mask.png", "--mask"),
    ("sample --observed", "--image"),
    ("fit-dip --image {d}/photo.png --iters 0", "--iters"),
    ("fit-dip --image {d}/photo.png --lr nan", "--lr"),
    ("fit-dip --image {d}/photo.png --size 0", "--size"),
    ("fit-dip --image {d}/photo.png --rungs 1", "--rungs"),
    ("fit-dip --image {d}/photo.png --method adapt --input fixed", "--input"),
    ("fit-dip --image {d}/photo.png --shape round", "--shape"),
    ("evaluate stopping --arms nothing", "--arms"),
    ("fit-dip --image {d}/photo.png --method magic", "--method"),
    ("fit-dip --image {d}/photo.png --out {d}/file/below", "--out"),
    ("fit-dip --image {d}/photo.png --method adapt --ckpt {d}/cut.pt", "--ckpt"),
    ("fit-dip --nonsense", "--nonsense"),
    ("fit-dip --image {d}/photo.png --lr 10 --iters 60", "--lr"),
    ("train --data {d}/empty", "--data"),
    ("train --data {d}/texts", "--data"),
    ("train --data {d}/missing", "--data"),
    ("train --data {d}/floats.npz", "--data"),
    ("train --data {d}/none.npy", "--data"),
    ("train --resume --out {d}/nothing", "--resume"),
    ("train --steps 0", "--steps"),
    ("train --prior dip --t-max 2000", "--t-max"),
    ("sample --init dip --image {d}/photo.png --ckpt {d}/missing.pt", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --ckpt {d}/cut.pt", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --ckpt {d}/text.png", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --ckpt {d}/other_shape.pt", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --ckpt {d}/list.pt", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --ckpt {p}/grey/none.pt", "--ckpt"),
    ("sample --init noise --image {d}/photo.png --ckpt {p}/dip.pt", "--ckpt"),
    ("sample --init dip --image {d}/photo.png --start 0", "--start"),
    ("sample --init dip --image {d}/photo.png --eta 2", "--eta"),
    ("evaluate stopping --images {d}/empty", "--images"),
]


@pytest.mark.parametrize("line, flag", ERRORS, ids=[e[0] for e in ERRORS])
def test_errors(bad, priors, line, flag, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    if "--lr 10" in line:                       # a loss that overflows
        monkeypatch.setattr(D.Task, "mse", lambda self, x, y: x.mean() * math.inf)
    code = run(*line.format(d=bad, p=priors).split())
    err = capsys.readouterr().err
    assert code == 2 and flag in err and err.count("\n") == 1 and "Traceback" not in err
    assert not os.path.exists(bad / "runs" / "fit-dip" / "result.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_missing_device(capsys):
    assert run("fit-dip", "--device", "cuda") == 2 and "--device" in capsys.readouterr().err


# ---- large photos, speed


def shaken(net):
    """Weights away from zero and from their start, in every layer."""
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("size", [(200, 330), (65, 300), (64, 64)])
def test_tiles_have_no_seams(size):
    """In tiles or at once, the same picture: each tile sees all that its pixels depend on."""
    torch.manual_seed(0)
    x, t = torch.randn(1, 3, *size), torch.tensor([7])
    dip, ddpm = shaken(D.SkipNet(width=4, skip=2)), shaken(D.UNet(width=8))
    for f, *more in ((dip,), (ddpm, t)):
        whole = f(x, *more).detach()
        assert (D.tiled(f, x, *more, side=64, margin=96) - whole).abs().max() < 1e-4 * whole.abs().max()
    if size[1] > 300:                                       # a margin that is too small does show
        assert (D.tiled(dip, x, side=64, margin=0) - dip(x)).abs().max() > 1e-3


def test_crops_of_a_large_photo():
    """The answer is for all of y, is better than y by R, and R is near the true error."""
    x = smooth_image(96)[..., :80]
    y = x + 0.2 * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))
    steps = list(D.fit_crops(y, D.Task("denoise", sigma=0.2), width=8, depth=2, stop="holdout",
                             iters=120, lr=None, hold=0.25))
    assert [s.k for s in steps] == list(range(1, 121)) and steps[0].best is y
    looks = [s for s in steps if s.risk == s.risk]
    assert [s.k for s in looks] == list(range(15, 121, 15)) and looks[-1].average.shape == x.shape
    best = min(looks, key=lambda s: s.risk)
    assert steps[-1].best_k == best.k and torch.equal(steps[-1].best, best.average)
    true = ((best.average - x) ** 2).mean().item()
    assert true < 0.2 ** 2 / 3 and abs(best.risk - true) < 0.2 ** 2 / 4
    one, two = (list(D.fit_crops(y, D.Task("denoise", sigma=0.2), width=4, depth=1, stop="fixed",
                                 iters=8, lr=None, hold=0.25, seed=seed))[-1] for seed in (0, 0))
    assert torch.equal(one.best, two.best) and one.best_k == 8 and math.isnan(one.best_risk)
    assert next(D.fit_crops(y, D.Task("denoise", sigma=0.2), width=4, depth=1)).iters == 5000


@pytest.mark.parametrize("name, scale", [("inpaint", 1), ("superres", 4)])
def test_crops_without_noise(name, scale):
    """Known pixels stay as they are, R is right where it looks, and no crop sees what is held out."""
    x = smooth_image(96)
    known = (torch.rand(1, 1, 96, 96, generator=D.stream(0, D.OBSERVE)) > 0.5).float()
    task = D.Task(name, 0.0, scale, known if scale == 1 else None)
    y = task.forward(x)
    settings = dict(width=8, depth=2, stop="holdout", iters=80, lr=None, hold=0.25)
    last = list(D.fit_crops(y, task, **settings))[-1]
    assert torch.allclose(task.forward(last.best), y, atol=1e-5) and last.best.shape == x.shape
    held = D.HeldOut(y, task, D.stream(0, D.TRAIN))
    assert 0 < last.best_risk < held.risk(0 * x)
    assert ((last.best - x) ** 2).mean() < ((task.pinv(y) - x) ** 2).mean()
    other = y.clone()
    other[held.val_task.mask.expand_as(y) > 0] = 1.0        # another picture where it is held out
    pair = [next(D.fit_crops(v, task, **settings)).output for v in (y, other)]
    assert torch.equal(*pair)


def test_a_large_photo_by_a_trained_ddpm_and_without_noise(tmp_path, priors):
    x = torch.nn.functional.interpolate(smooth_image(), (816, 824), mode="bicubic")
    D.to_image(x).save(tmp_path / "big.png")
    for n, words in enumerate((["fit-dip", "--task", "denoise:25", "--method", "adapt", "--size", 408],
                               ["fit-dip", "--task", "inpaint:0.5"],
                               ["sample", "--init", "dip", "--task", "superres:4", "--steps", 1,
                                "--samples", 1])):
        more = ["--ckpt", priors / "dip.pt"] if n != 1 else ["--depth", 2]
        assert run(*words, "--image", tmp_path / "big.png", "--iters", 2, "--width", 4, *more,
                   "--out", tmp_path / f"{n}") == 0
        m = json.loads((tmp_path / f"{n}" / "metrics.json").read_text())
        assert m["iters"] == 2 and m["risk"] is not None and m["psnr"] > 0


@pytest.mark.parametrize("size", [(402, 403), (20, 9000)])
@pytest.mark.parametrize("extra", [["--observed", "--task", "denoise"], ["--stop", "fixed"]])
def test_a_large_photo(tmp_path, size, extra):
    x = torch.nn.functional.interpolate(smooth_image(), size, mode="bicubic")
    D.to_image(x + 0.2 * torch.randn(x.shape)).save(tmp_path / "big.png")
    assert run("fit-dip", "--image", tmp_path / "big.png", "--iters", 8, "--width", 4, "--depth", 2,
               "--out", tmp_path / "o", *extra) == 0
    m = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert Image.open(tmp_path / "o" / "result.png").size == size[::-1] and m["iters"] == 8
    assert (m["risk"] is None) == ("fixed" in extra) and (m["psnr"] is None) == ("denoise" in extra)
    assert max(Image.open(tmp_path / "o" / "figure.png").size) < 6300


def test_sampling_a_large_photo(tmp_path, priors):
    x = torch.nn.functional.interpolate(smooth_image(), (402, 403), mode="bicubic")
    D.to_image(x).save(tmp_path / "big.png")
    assert run("sample", "--init", "dip", "--task", "denoise:25", "--image", tmp_path / "big.png",
               "--ckpt", priors / "dip.pt", "--iters", 8, "--width", 4, "--depth", 2, "--steps", 2,
               "--samples", 1, "--out", tmp_path / "o") == 0
    m = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert m["nfe"] == 2 and m["iters"] == 8 and m["t0"] >= 1 and m["risk"] > 0
    assert Image.open(tmp_path / "o" / "sample.png").size == (403, 402)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    """To 0.5 dB: the draws are the same, the rounding is not, and a fit amplifies it."""
    x = smooth_image(32)
    y = x + 0.2 * torch.randn(x.shape, generator=D.stream(0, D.OBSERVE))
    found = []
    for device in ("cpu", "cuda"):
        *_, last = D.fit_dip(y.to(device), D.Task("denoise", sigma=0.2), nets=1, iters=200, width=16)
        found.append(D.psnr(last.best, x, 2.0))
    assert abs(found[0] - found[1]) < 0.5


def test_evaluate_speed(tmp_path, capsys):
    assert run("evaluate", "speed", "--quick", "--out", tmp_path) == 0
    rows = list(csv.DictReader(open(tmp_path / "speed.csv")))
    product, fits = rows[0], [r for r in rows if "fit-dip" in r["step"]]
    operations = [float(r["GFLOP/s"]) * float(r["ms"]) / 1e3 for r in rows]
    assert operations[0] == pytest.approx(2 * 1.024 ** 3) and float(product["ratio"]) == 1
    assert len(rows) == 7 and len(fits) == 4
    assert operations[3] == pytest.approx(4 * operations[1], rel=0.05)      # twice the side
    assert all(float(r["ratio"]) > 0 for r in rows) and "GFLOP/s" in capsys.readouterr().out


# ---- long tests: python -m pytest -q -m fuzz

with warnings.catch_warnings():
    warnings.simplefilter("ignore")                         # a marker without a configuration file
    fuzz = pytest.mark.fuzz


@pytest.fixture(autouse=True)
def long_tests_run_when_asked(request):
    if request.node.get_closest_marker("fuzz") and request.config.getoption("-m") != "fuzz":
        pytest.skip("long; run with -m fuzz")


def ends_well(argv, where):
    """Exit code 0 or 2, nothing half-written: else a failure that names the command line."""
    code = run(*argv)                                       # any other exception: a traceback
    assert code in (0, 2), argv
    assert not [f for f in where.rglob("*") if f.name.endswith(".tmp")], argv
    for f in where.rglob("*.png"):
        assert f.is_dir() or Image.open(f).verify() is None
    for f in where.rglob("metrics.json"):
        assert isinstance(json.loads(f.read_text()), dict)
    return code


@fuzz
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_pictures(tmp_path):
    rng, codes = np.random.default_rng(0), []
    picture = D.to_image(smooth_image(20))
    for k in range(200):
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
        codes.append(ends_well(["fit-dip", "--image", path, "--iters", 2, "--nets", 1, "--width", 4,
                                "--depth", 2, "--size", 16, "--out", out], out))
    assert codes.count(0) > 20 and codes.count(2) > 20


@fuzz
def test_random_flags(tmp_path, priors, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = D.cmd_train

    def brief(args):                                        # also when a prior is missing
        args.steps, args.batch, args.width = min(args.steps, 3), min(args.batch, 4), 8
        return train(args)

    monkeypatch.setattr(D, "cmd_train", brief)
    rng, codes = np.random.default_rng(0), []
    (tmp_path / "grey").mkdir()
    D.to_image(smooth_image(channels=1)).save(tmp_path / "grey" / "grey.png")
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (4, 4, 9, 9))
    mask.save(tmp_path / "mask.png")
    pool = {"--image": [photo, tmp_path / "grey", "missing.png", "", "."], "--task": [
        "denoise:25", "denoise", "inpaint:0.8", "inpaint", "inpaint:1", "superres:2", "superres:4",
        "superres:5", "denoise:-1", "nothing", ":", "denoise:nan", "superres:8", "inpaint:0.999"],
        "--mask": ["mask.png", photo, "x"], "--ckpt": [priors / "dip.pt", priors / "none.pt", photo],
        "--data": [tmp_path / "grey", photo, tmp_path / "none"], "--images": [tmp_path / "grey"],
        "--held": [tmp_path / "grey"], "--inception": [photo], "--arms": [
            "fit-dip --iters 3", "sample --init {dip|noise} --iters 3", "train", "fit-dip --x", "{"],
        "--out": ["out", "mask.png", "a/b/c"], "--device": ["auto", "cpu", "cuda", "tpu"]}
    small = {"--steps": 3, "--iters": 5, "--samples": 2, "--batch": 2, "--patch": 16, "--seeds": 1,
             "--width": 8, "--depth": 2, "--size": 16}
    for k in range(200):
        command = ("fit-dip", "sample", "train", "evaluate")[k % 4]
        flags = [f for f in D.FLAGS if command in f[0].split() and f[1][0] == "-"]
        argv = [command] + ([rng.choice([*D.SUITES, "nonsense"])] if command == "evaluate" else [])
        names = [f[1] for f in flags]
        for name, value in small.items():
            argv += [name, value] if name in names else []
        argv += ["--quick", "--images", tmp_path / "grey", "--arms", "fit-dip --iters 3"
                 ] if command == "evaluate" else []
        argv += ["--data", tmp_path / "grey"] if command == "train" else []
        argv += ["--ckpt", priors / "none.pt"] if command == "sample" else []
        for i in rng.choice(len(flags), 4, replace=False):
            _, name, _, kind, _ = flags[i]
            values = pool.get(name, [""])
            if isinstance(kind, list):
                values = [*kind, "other"]
            elif isinstance(kind, tuple) and name in small:
                values = [small[name], kind[1], -1, "x", "nan"]
            elif isinstance(kind, tuple):
                values = [kind[1], min(kind[2], 7), kind[1] + 0.5, "nan", "auto", "1e400"]
            argv += [name] + ([] if kind is True else [values[rng.integers(len(values))]])
        codes.append(ends_well(argv, tmp_path))
    assert codes.count(0) > 20 and codes.count(2) > 20


def forked(work):
    """Run work() in a child process and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@fuzz
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_checkpoint_survives_kill_minus_9(tmp_path, priors):
    state, path = D.load_state(str(priors / "dip.pt")), str(tmp_path / "dip.pt")
    D.save(path, state)

    def work():
        for step in itertools.count(1):
            D.save(path, state | dict(step=step))

    last, rng = 0, np.random.default_rng(0)
    for _ in range(30):
        pid = forked(work)
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        last = max(last, D.load_state(path)["step"])
    assert last > 0


@fuzz
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_killed_rank_ends_the_run_and_leaves_a_whole_checkpoint(tmp_path):
    D.to_image(smooth_image(40)).save(tmp_path / "a.png")
    run_ = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", D.__file__, "train",
         "--data", str(tmp_path), "--steps", "1000000", "--batch", "2", "--patch", "16", "--width", "8",
         "--device", "cpu", "--out", str(tmp_path / "o")], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    path = tmp_path / "o" / "none.pt"
    for _ in range(1200):                                   # until the first checkpoint, step 500
        if path.exists():
            break
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(run_.pid), "-f", "train"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    said, _ = run_.communicate(timeout=300)
    assert run_.returncode not in (0, None) and "SIGKILL" in said.replace("Signal 9", "SIGKILL")
    assert D.load_state(str(path))["step"] % 500 == 0
    assert not list((tmp_path / "o").glob("*.tmp"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, priors):
    """A limit on the size of files stands for a full disk: writing fails in the middle."""
    resource = pytest.importorskip("resource")
    state, path = D.load_state(str(priors / "dip.pt")), tmp_path / "dip.pt"
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


def test_a_malicious_checkpoint_is_refused(tmp_path, photo, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(dict(config=Evil()), tmp_path / "evil.pt")
    assert run("sample", "--init", "dip", "--image", photo, "--ckpt", tmp_path / "evil.pt") == 2
    err = capsys.readouterr().err
    assert "--ckpt" in err and err.count("\n") == 1 and not (tmp_path / "owned").exists()


def test_a_decompression_bomb_is_refused(tmp_path, capsys):
    Image.new("1", (20000, 5000)).save(tmp_path / "bomb.png")               # 100 megapixels, 12 kB
    assert run("fit-dip", "--image", tmp_path / "bomb.png", "--out", tmp_path / "o") == 2
    err = capsys.readouterr().err
    assert "--image" in err and "bomb" in err and err.count("\n") == 1


# ---- the file itself


def test_imports_are_the_promised_ones():
    tree = ast.parse(open(D.__file__).read())
    names = {(n.module if isinstance(n, ast.ImportFrom) else a.name).split(".")[0]
             for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert names <= {"torch", "numpy", "PIL"} | set(sys.stdlib_module_names)


def test_the_file_keeps_its_size():
    lines = open(D.__file__).read().splitlines()
    assert len(lines) <= 1200 and max(map(len, lines)) <= 100
