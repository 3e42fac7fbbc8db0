#!/usr/bin/env python3
"""Deep Image Prior x DDPM: one file, from the equations to restored photos.

A Deep Image Prior (DIP) is an untrained CNN fitted to one image; a DDPM is a denoiser trained on
many. Here each helps the other, and one number joins them: the held-out risk R, an estimate of
the mean squared error of the DIP's output that never sees the clean image.

    python dipddpm.py fit-dip                  # restore one photo: staged noise, stops by itself
    python dipddpm.py train --prior dip        # train a DDPM only where a DIP will start it
    python dipddpm.py sample --init dip        # brief DIP -> noise it -> 20 reverse steps
    python dipddpm.py evaluate stopping        # the tables of README.md and report.md

Notation (pixels in [-1, 1], N x C x H x W; t = 0..T, t = 0 is the clean image):
    x, xhat, y       clean image, estimate, observation  y = A x + sigma n
    A, A^+           task operator (mask and/or s x s mean) and its pseudo-inverse
    xt               x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, abar_t = prod (1 - beta_s)
    sigma_t          sqrt((1 - abar_t) / abar_t), the noise level of x_t / sqrt(abar_t)
    s                a rung of the ladder: the level of the noise s w in the network's input
    z1, z2           the conjugate pair  y + s w,  y - (sigma^2 / s) w
    R, r_t^2         variance of the DIP's error (held-out risk), of the DDPM's x0-prediction
"""
import csv
import functools
import glob
import io
import json
import math
import os
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import deque, namedtuple
from dataclasses import dataclass, replace
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
DIP_ITERS = (400, 1000)                                 # of fit-dip: without noise, with noise
BRIEF_ITERS, ADAPT_ITERS = 250, 200                     # before a DDPM; from a DDPM
TRAIN_STEPS, TRAIN_TIME = 2000, "about 4 minutes"       # of the default prior, on two CPU cores
OBSERVE, INIT, FIT, SAMPLE, TRAIN = range(5)            # what a random stream is for


def stream(seed: int, purpose: int) -> torch.Generator:
    """One generator for each purpose: the fit must never redraw the observation's own noise."""
    return torch.Generator().manual_seed(5 * seed + purpose)


# ---- 1. The diffusion process (Ho et al. 2020, sections 2 and 3) ------------------------------
class NoiseSchedule:
    """The variance schedule of a DDPM; t runs over 0..T and t = 0 is the clean image.
    kind: 'linear' (Ho et al. 2020: beta 1e-4..0.02, rescaled by 1000/T) or 'cosine' (Nichol &
    Dhariwal 2021, eq. 17), else ValueError. betas, abar, sigma: float64 of length T+1."""

    def __init__(self, T: int = 1000, kind: str = "linear"):
        self.T, self.kind = T, kind
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        elif kind == "cosine":
            u = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008
            f = torch.cos(u * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule must be 'linear' or 'cosine', not {kind!r}")
        self.betas = F.pad(betas.clamp(max=0.999), (1, 0))
        self.abar = torch.cumprod(1 - self.betas, 0)
        self.sigma = ((1 - self.abar) / self.abar).sqrt()

    def start_t(self, risk: float, c: float = 1.0) -> int:
        """Where reverse diffusion starts: the smallest t0 >= 1 with sigma_t0 >= c sqrt(risk).

        If risk is the mean of (x - xhat)^2: KL(q(x_t0 | x) || q(x_t0 | xhat)) <= d / (2 c^2)."""
        t = int(torch.searchsorted(self.sigma, c * math.sqrt(max(risk, 0))))
        return min(max(t, 1), self.T)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Float64 coefficients (N) as N x 1 x 1 x 1 float32 on the device of `like`."""
    return values.to(like.device, torch.float32).view(-1, 1, 1, 1)


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0) (Ho et al. eq. 4): x0, eps N x C x H x W; t int64 of length N."""
    abar = schedule.abar[t.cpu()]
    return column(abar.sqrt(), x0) * x0 + column((1 - abar).sqrt(), x0) * eps


def predict_x0(schedule: NoiseSchedule, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x0 that x_t and eps imply (Ho et al. eq. 15); inverts q_sample."""
    abar = schedule.abar[t.cpu()]
    return column(abar.rsqrt(), xt) * xt - column((1 / abar - 1).sqrt(), xt) * eps


def q_posterior(schedule: NoiseSchedule, x0: Tensor, xt: Tensor, t: Tensor) -> tuple:
    """Mean (N x C x H x W), variance (N x 1 x 1 x 1) of q(x_{t-1} | x_t, x0), Ho eq. 6, 7."""
    t = t.cpu()
    beta, abar, prev = schedule.betas[t], schedule.abar[t], schedule.abar[t - 1]
    mean = (column(prev.sqrt() * beta / (1 - abar), xt) * x0
            + column((1 - beta).sqrt() * (1 - prev) / (1 - abar), xt) * xt)
    return mean, column(beta * (1 - prev) / (1 - abar), xt)


# ---- 2. The two networks ----------------------------------------------------------------------
def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom to a multiple, at least two of them: reflect, or repeat if tiny."""
    h, w = x.shape[-2:]
    ph, pw = (max(-n % multiple, 2 * multiple - n) for n in (h, w))
    if ph == pw == 0:
        return x
    return F.pad(x, (0, pw, 0, ph), mode="reflect" if ph < h and pw < w else "replicate")


def conv_block(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, LeakyReLU: the brick of the DIP's hourglass."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.LeakyReLU(0.2, inplace=True))


class SkipNet(nn.Module):
    """The DIP's hourglass with skip connections (Ulyanov et al. 2018); 128k parameters.
    forward(x): N x cin x H x W of any size to N x cout x H x W in [-1, 1]. sigma, the noise level
    of x, is not used: it is there for a Prior, which may take this network's place."""

    def __init__(self, cin: int = 3, cout: int = 3, width: int = 32, depth: int = 4,
                 skip: int = 16):
        super().__init__()
        self.skip, self.down, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c in [cin] + [width] * (depth - 1):
            self.skip.append(conv_block(c, skip, 1))
            self.down.append(nn.Sequential(conv_block(c, width, 3, 2), conv_block(width, width, 3)))
            self.up.append(nn.Sequential(conv_block(width + skip, width, 3),
                                         conv_block(width, width, 1)))
        self.out = nn.Conv2d(width, cout, 1)

    def forward(self, x: Tensor, sigma: float | None = None) -> Tensor:
        h, w = x.shape[-2:]
        x, skips = pad_to(x, 2 ** len(self.down)), []
        for skip, down in zip(self.skip, self.down):
            skips.append(skip(x))
            x = down(x)                                                      # H, W halved
        for up in self.up[::-1]:
            x = up(torch.cat([skips.pop(), F.interpolate(x, scale_factor=2.0)], 1))
        return torch.tanh(self.out(x))[..., :h, :w]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t (N) to N x dim, dim even (Vaswani et al. 2017, section 3.5)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], 1)


conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """Residual block, told about t by a scale and a shift after its second GroupNorm."""

    def __init__(self, cin: int, cout: int, emb: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), conv3(cin, cout)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), conv3(cout, cout)
        nn.init.zeros_(self.conv2.weight)           # starts near the identity
        self.emb = nn.Linear(emb, 2 * cout)
        self.short = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.short(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class UNet(nn.Module):
    """Time-conditioned residual U-Net eps_theta(x_t, t) (Ho et al. 2020, appendix B).
    forward(x, t): x N x channels x H x W of any size, t int64 (N), to N x channels x H x W.
    Works on fold x fold blocks of pixels (pixel_unshuffle), for speed. Fully convolutional unless
    attention is set: trained on patches, it runs on any photo."""

    def __init__(self, channels: int = 3, width: int = 32, mults: tuple = (1, 2, 3),
                 attention: bool = False, fold: int = 2):
        super().__init__()
        self.channels, self.fold = channels, fold
        widths, emb, self.width = [m * width for m in mults], 4 * width, width
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem, c = conv3(channels * fold ** 2, width), width
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        for w in widths:
            self.enc.append(ResBlock(c, w, emb))
            c = w
        self.mid, self.attend = ResBlock(c, c, emb), None
        if attention:
            self.attend = nn.MultiheadAttention(c, 1, batch_first=True)
        for w in widths[::-1]:
            self.dec.append(ResBlock(c + w, w, emb))
            c = w
        self.norm, self.out = nn.GroupNorm(8, c), conv3(c, channels * fold ** 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        emb = self.time(timestep_embedding(t, self.width))
        x = F.pixel_unshuffle(pad_to(x, self.fold * 2 ** (len(self.enc) - 1)), self.fold)
        x, skips = self.stem(x), []
        for block in self.enc:
            x = block(F.avg_pool2d(x, 2) if skips else x, emb)               # H, W halved
            skips.append(x)
        x = self.mid(x, emb)
        if self.attend is not None:
            v = x.flatten(2).transpose(1, 2)                                 # N x HW x C
            x = x + self.attend(v, v, v)[0].transpose(1, 2).reshape(x.shape)
        for block in self.dec:
            x = block(torch.cat([x, skips.pop()], 1), emb)
            x = F.interpolate(x, scale_factor=2.0) if skips else x           # H, W doubled
        return F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.fold)[..., :h, :w]


class Prior(nn.Module):
    """A trained DDPM: network, schedule, largest t it knows, running eps-loss L_t (length T+1).

    r2: r_t^2 = sigma_t^2 L_t, the mean squared error of its x0 at t, as x0_pred - x0 =
    -sigma_t (eps_pred - eps); L is smoothed over 31 neighbours. forward(z, sigma): as a plain
    denoiser, z = x + noise of level sigma to x0, which `adapt` fine-tunes."""

    def __init__(self, model: nn.Module, schedule: NoiseSchedule, t_max: int, eps_loss: Tensor):
        super().__init__()
        self.model, self.schedule, self.t_max = model, schedule, t_max
        smooth = F.avg_pool1d(eps_loss[None, 1:t_max + 1], 31, 1, 15, count_include_pad=False)
        self.r2 = schedule.sigma ** 2 * F.pad(smooth[0], (1, schedule.T - t_max), value=1.0)

    def forward(self, z: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(z),), min(self.schedule.start_t(sigma ** 2), self.t_max)).to(z.device)
        wide = z.expand(-1, self.model.channels, -1, -1)                     # a grey z to colour
        xt = column(self.schedule.abar[t.cpu()].sqrt(), z) * wide
        x0 = predict_x0(self.schedule, xt, t, self.model(xt, t))
        return x0.unflatten(1, (-1, z.shape[1])).mean(1)


# ---- 3. Training the DDPM (Ho et al. Algorithm 1) ---------------------------------------------
def random_patches(images: list, batch: int, patch: int, gen: torch.Generator) -> Tensor:
    """Random flipped crops of uint8 C x H x W images: batch x C x patch x patch in [-1, 1]."""
    out = []
    for i in torch.randint(len(images), (batch,), generator=gen).tolist():
        u, (h, w) = torch.rand(3, generator=gen), images[i].shape[1:]
        top, left = int(u[0] * (h - patch + 1)), int(u[1] * (w - patch + 1))
        crop = images[i][:, top:top + patch, left:left + patch]
        out.append(crop.flip(2) if u[2] < 0.5 else crop)
    return torch.stack(out).float() / 127.5 - 1


def train_ddpm(state: dict, model: nn.Module, ema: nn.Module, schedule: NoiseSchedule,
               images: list, steps: int) -> Iterator[float]:
    """Algorithm 1 with t ~ U{1..t_max}; yields the loss of each step, updates state (new_state).
    Neither learning rate nor EMA depends on `steps`, so that any run may be prolonged."""
    c, device = state["config"], next(model.parameters()).device
    opt = torch.optim.Adam(model.parameters(), lr=c["lr"], betas=(0.9, 0.99))
    gen = stream(c["seed"], TRAIN)
    if state["step"]:
        opt.load_state_dict(state["optimiser"])
        gen.set_state(state["rng"])
    for step in range(state["step"] + 1, steps + 1):
        x0 = random_patches(images, c["batch"], c["patch"], gen).to(device)
        t = torch.randint(1, c["t_max"] + 1, (c["batch"],), generator=gen)
        eps = torch.randn(x0.shape, generator=gen).to(device)
        error = (model(q_sample(schedule, x0, t, eps), t.to(device)) - eps) ** 2   # Ho eq. 14
        opt.zero_grad()
        error.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.param_groups[0]["lr"] = c["lr"] * min(1, step / 200)
        opt.step()
        with torch.no_grad():               # averages the last tenth or so: Karras et al. 2024
            for p, q in zip(ema.parameters(), model.parameters()):
                p.lerp_(q, 1 - (1 - 1 / step) ** 8)
        state["eps_loss"][t] = state["eps_loss"][t].lerp(error.detach().mean((1, 2, 3)).cpu(), 0.2)
        state.update(step=step, optimiser=opt.state_dict(), rng=gen.get_state())
        yield error.mean().item()


# ---- 4. Sampling: the reverse process from any (x_t, t) ---------------------------------------
def noise(shape: torch.Size, gens: list) -> Tensor:
    """N(0, I) of a batch; image i uses gens[i] alone, so it does not depend on the batch size."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in gens])


@torch.no_grad()
def predicted_x0(model: nn.Module, schedule: NoiseSchedule, xt: Tensor, t: int, refine) -> Tensor:
    """The x0 that the model sees in x_t, corrected by refine(x0, t) where given."""
    ts = torch.full((len(xt),), t, device=xt.device)
    x0 = predict_x0(schedule, xt, ts, model(xt, ts))
    return refine(x0, t) if refine else x0


def p_sample_loop(model: nn.Module, schedule: NoiseSchedule, xt: Tensor, t: int, gens: list,
                  refine=None) -> Tensor:
    """Ancestral sampling from x_t to x_0 (Ho et al. Algorithm 2), t network calls.

    model(x_t, t) -> eps; xt N x C x H x W; t in 1..T; gens: one an image; refine: section 7."""
    for s in range(t, 0, -1):
        x0 = predicted_x0(model, schedule, xt, s, refine)
        xt, var = q_posterior(schedule, x0, xt, torch.full((len(xt),), s))
        if s > 1:                                                  # no noise at the last step
            xt = xt + var.sqrt() * noise(xt.shape, gens).to(xt)
    return xt


def ddim_sample(model: nn.Module, schedule: NoiseSchedule, xt: Tensor, t: int, steps: int,
                gens: list, eta: float = 0.0, refine=None, wrap=iter) -> Tensor:
    """Reverse diffusion from x_t in at most `steps` network calls (Song et al. 2021, eq. 12).

    eta 0 is deterministic (DDIM), eta 1 with steps = t is p_sample_loop. Returns the last x0, as
    the last step adds no noise. wrap may watch, or cut short, the list of steps."""
    path = torch.linspace(t, 0, min(steps, t) + 1).round().long().tolist()   # t > ... > 0
    for s, r in wrap(list(zip(path[:-1], path[1:]))):
        abar, prev = schedule.abar[s].item(), schedule.abar[r].item()
        x0 = predicted_x0(model, schedule, xt, s, refine)
        eps = (xt - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        std = eta * math.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev))   # Song eq. 16
        xt = math.sqrt(prev) * x0 + math.sqrt(max(1 - prev - std ** 2, 0)) * eps
        if std > 0:
            xt = xt + std * noise(xt.shape, gens).to(xt)
    return x0


# ---- 5. Tasks: y = A x + sigma n with A = mask o (s x s mean) ---------------------------------
@dataclass
class Task:
    """A linear observation; sigma in [-1, 1] units; mask 1 x 1 x h x w of 0 and 1, or None. Either
    with noise (denoise: scale 1, no mask) or without: inpaint (a mask), superres (scale > 1)."""

    name: str
    sigma: float = 0.0
    scale: int = 1
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """A x: N x C x H x W to N x C x H/s x W/s."""
        x = F.avg_pool2d(x, self.scale) if self.scale > 1 else x
        return x if self.mask is None else x * self.mask

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, the least-norm x with A x = y: the known pixels, each repeated s x s times."""
        y = y if self.mask is None else y * self.mask
        return F.interpolate(y, scale_factor=float(self.scale)) if self.scale > 1 else y

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, with <A x, y> = <x, A' y>."""
        return self.pinv(y) / self.scale ** 2

    def project(self, x: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
        """x - gain A^+ (A x - y): data consistency (DDNM, Wang et al. 2023, eq. 13)."""
        return x - gain * self.pinv(self.forward(x) - y)

    def interpolate(self, y: Tensor) -> Tensor:
        """A plain first guess of x: holes filled coarse to fine, then bicubic enlargement."""
        y = y if self.mask is None else fill_holes(y, self.mask)
        size = [n * self.scale for n in y.shape[-2:]]
        return F.interpolate(y, size, mode="bicubic") if self.scale > 1 else y


def fill_holes(y: Tensor, mask: Tensor) -> Tensor:
    """Unknown pixels (mask 0) from the mean of the known ones around them, coarse to fine."""
    if mask.all() or max(y.shape[-2:]) == 1:
        return y
    weight = F.avg_pool2d(mask, 2, ceil_mode=True)
    coarse = F.avg_pool2d(y * mask, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill_holes(coarse, (weight > 0).float())
    return torch.where(mask > 0, y, F.interpolate(coarse, y.shape[-2:], mode="bilinear"))


def estimate_sigma(y: Tensor) -> float:
    """Noise level of y (N x C x H x W) in units of y: median |finest diagonal Haar band| / 0.6745
    (Donoho & Johnstone 1994); 0 for an image of under 2 x 2 pixels."""
    if min(y.shape[-2:]) < 2:
        return 0.0
    y = y[..., :y.shape[-2] // 2 * 2, :y.shape[-1] // 2 * 2]
    band = y[..., ::2, ::2] - y[..., ::2, 1::2] - y[..., 1::2, ::2] + y[..., 1::2, 1::2]
    return (band / 2).abs().median().item() / 0.6745


# ---- 6. The DIP: one loop, two switches (input, target); the ladder of noise; when to stop ----
METHODS = {                 # input of the network, target of the loss
    "staged": ("observed", "conjugate"),   # ours: the pair z1, z2, noise falling from rung to rung
    "dip": ("fixed", "plain"),             # Ulyanov et al. 2018
    "targets": ("fixed", "noisy"),         # the literal ladder: y plus less and less noise
    "selfdiff": ("estimate", "plain"),     # Self-Diffusion, Luo & Huang 2025
    "adapt": ("observed", "conjugate"),    # as staged, from a trained DDPM's weights
}


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (1 x C x h x w) over the pixels where mask (1 x 1 x h x w, or None) is 1."""
    return values.mean() if mask is None else (values * mask).sum() / (
        mask.sum() * values.shape[1]).clamp(min=1)


class HeldOut:
    """Split an observation once, before the fit: (task, y) to see, (val_task, val_y) to score.
    With noise: y + a sigma w and y - sigma/a w, independent given x (Pang et al. 2021; Oliveira
    et al. 2021). Without: `share` of the known pixels is set aside."""

    def __init__(self, y: Tensor, task: Task, gen: torch.Generator, a: float = 0.25,
                 share: float = 0.1):
        if task.sigma > 0:
            w = torch.randn(y.shape, generator=gen).to(y)
            self.task, self.val_task = replace(task, sigma=task.sigma * math.hypot(1, a)), task
            self.y, self.val_y = y + a * task.sigma * w, y - task.sigma / a * w
            self.bias = task.sigma ** 2 * (1 + (w ** 2).mean().item() / a ** 2)
        else:
            known = torch.ones_like(y[:, :1]) if task.mask is None else task.mask
            u = torch.rand(known.shape, generator=gen).to(y) * known
            n = max(1, round(share * known.sum().item()))
            out = (u >= u.flatten().topk(n).values[-1]).float() * known
            self.task, self.val_task = replace(task, mask=known - out), replace(task, mask=out)
            self.y, self.val_y, self.bias = y * self.task.mask, y * out, 0.0

    def risk(self, xhat: Tensor) -> float:
        """R: unbiased for the mean of (A_val (xhat - x))^2, for any xhat made without val_y."""
        error = (self.val_task.forward(xhat) - self.val_y) ** 2
        return masked_mean(error, self.val_task.mask).item() - self.bias


class StopRule:
    """Every stop rule is a score to be minimised, with patience; none reads a clean image.
    holdout: the held-out risk. wmv, emv: the moving variance of the outputs, in a window or
    exponential (Wang et al. 2023, Algorithms 1, 2). fixed: minus the iteration: newest is best."""

    def __init__(self, kind: str, patience: int = 1000, window: int = 100, alpha: float = 0.1):
        self.kind, self.patience, self.window, self.alpha = kind, patience, window, alpha
        self.score, self.best, self.best_k, self.done = math.inf, math.inf, 0, False
        self.outputs, self.mean, self.square, self.var = deque(), 0.0, 0.0, 0.0

    def update(self, k: int, output: Tensor, risk: float) -> bool:
        """True when `output` of iteration k is the best so far; sets done: patience has run out."""
        if self.kind in ("wmv", "emv"):
            self.score = self.moving_variance(output.cpu().double())
        else:
            self.score = risk if self.kind == "holdout" else -float(k)
        better = self.score < self.best or self.best == math.inf
        if better:
            self.best, self.best_k = self.score, k
        self.done = k - self.best_k >= self.patience
        return better

    def moving_variance(self, output: Tensor) -> float:
        """Mean over pixels of the variance of the outputs so far; inf while there are too few."""
        if self.kind == "wmv":                      # of the last `window`, by running sums
            old = self.outputs.popleft() if len(self.outputs) == self.window else 0 * output
            self.outputs.append(output)
            self.mean = self.mean + (output - old) / self.window
            self.square = self.square + (output ** 2 - old ** 2) / self.window
            full = len(self.outputs) == self.window
            return (self.square - self.mean ** 2).mean().item() if full else math.inf
        delta = output - self.mean
        self.mean = self.mean + self.alpha * delta
        self.var = (1 - self.alpha) * (self.var + self.alpha * (delta ** 2).mean().item())
        return self.var


# After iteration k: rung s, loss, the outputs' average, its risk (or nan), the answer so far.
FitStep = namedtuple("FitStep", "k iters s loss average risk best best_k")


def turned(x: Tensor, g: int, back: bool = False) -> Tensor:
    """One of the 8 flips and quarter turns of the square (g in 0..7), or its inverse."""
    if back:
        return torch.rot90(x.flip(3) if g > 3 else x, -g, (2, 3))
    x = torch.rot90(x, g, (2, 3))
    return x.flip(3) if g > 3 else x


def ladder(sigma: float, steps: int, rungs: int = 30) -> list:
    """The noise level s of every step: `rungs` stairs falling geometrically, from 3 to 0.4 times
    the observation's noise sigma; from 0.6 to 0.06 ([-1, 1] units) where there is none."""
    high, low = (3 * sigma, 0.4 * sigma) if sigma > 0 else (0.6, 0.06)
    return [high * (low / high) ** (k * rungs // steps / (rungs - 1)) for k in range(steps)]


def network_io(method: str, y: Tensor, task: Task, estimate: Tensor, fixed: Tensor, s: float,
               gen: torch.Generator) -> tuple:
    """One draw of (network input, its noise level, target in the domain of y): the two switches."""
    (source, aim), w = METHODS[method], torch.randn(estimate.shape, generator=gen).to(y)
    if source == "fixed":
        z, level = fixed + torch.randn(fixed.shape, generator=gen).to(y) / 30, 1 / 30
    elif source == "observed" and task.sigma > 0:
        z, level = task.project(estimate, y) + s * w, math.hypot(s, task.sigma)              # z1
    else:                                                   # no noise in y to be told from w
        z, level = estimate + s * w, s
    if aim == "conjugate" and task.sigma > 0:
        return z, level, y - task.sigma ** 2 / s * task.forward(w)                           # z2
    return z, level, y + s * task.forward(w) if aim == "noisy" else y


def descend(net: nn.Module, opt: torch.optim.Optimizer, method: str, y: Tensor, task: Task,
            levels: list, average: Tensor, k: int, gen: torch.Generator,
            fixed: Tensor) -> Iterator[tuple]:
    """Down the ladder, one Adam step a level, after k steps; yields (k, s, loss, output, average).
    The average (exponential, over a fifth of the steps, 100 at most) of the outputs is the answer;
    at each new rung it becomes the estimate from which the next inputs are made."""
    lr, rung, estimate = opt.param_groups[0]["lr"], None, average
    for k, s in enumerate(levels, k + 1):
        if s != rung:
            rung, estimate = s, average
        z, level, target = network_io(method, y, task, estimate, fixed, s, gen)
        turns = 8 if METHODS[method][1] == "conjugate" and task.sigma > 0 else 1
        g = int(torch.randint(turns, (), generator=gen))
        z = turned(z, g).contiguous(memory_format=torch.channels_last)
        output = turned(net(z, level), g, back=True)
        loss = masked_mean((task.forward(output) - target) ** 2, task.mask)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite at iteration {k}")
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = lr * min(1, k / 50)
        opt.step()
        average = average.lerp(output.detach(), max(0.01, min(1, 5 / k)))
        average = task.project(average, y) if task.sigma == 0 else average
        yield k, s, loss.item(), output.detach(), average


def fit_dip(y: Tensor, task: Task, net: nn.Module | None = None, *, method: str = "staged",
            stop: str = "holdout", iters: int = 1000, lr: float = 0.01, width: int = 32,
            depth: int = 4, patience: int = 1000, tail: float = 0.25,
            seed: int = 0) -> Iterator[FitStep]:
    """Fit a network to the one observation y (1 x C x h x w, y = A x + sigma n); yield each step.

    No parameter lets the clean image in. The last step's `best` is the answer. With 'holdout'
    the fit sees only its part of the split, until 1 - tail of the iterations are done or the risk
    has not fallen for `patience` of them; then it goes on from its best weights with all of y,
    for tail / (1 - tail) as many. Raises FloatingPointError when the loss is not finite."""
    gen, channels = stream(seed, FIT), y.shape[1]
    torch.manual_seed(stream(seed, INIT).initial_seed())
    cin, skip = (32, 4) if METHODS[method][0] == "fixed" else (channels, 16)
    net = net or SkipNet(cin, channels, width, depth, skip)
    net = net.to(y.device, memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    held = HeldOut(y, task, gen) if stop == "holdout" else None
    seen, seen_task = (held.y, held.task) if held else (y, task)
    split = round((1 - tail) * iters) if held else iters
    rule, risk, weights = StopRule(stop, patience), math.nan, None
    best, levels = seen_task.interpolate(seen), ladder(seen_task.sigma, iters)[:split]
    fixed = torch.rand((1, 32, *best.shape[2:]), generator=gen).to(y) / 10           # the DIP's z
    for k, s, loss, output, average in descend(net, opt, method, seen, seen_task, levels, best, 0,
                                               gen, fixed):
        risk = held.risk(average) if held else math.nan
        if rule.update(k, output if stop in ("wmv", "emv") else average, risk):
            best = average
            weights = {n: p.clone() for n, p in net.state_dict().items()} if held else None
        yield FitStep(k, iters, s, loss, average, risk, best, rule.best_k)
        if rule.done:
            break
    if not held:
        return
    net.load_state_dict(weights)
    end = rule.best_k + round(rule.best_k * tail / (1 - tail))
    for k, s, loss, _, best in descend(net, opt, method, y, task, ladder(task.sigma, iters)[
            rule.best_k:end], best, rule.best_k, gen, fixed):
        yield FitStep(k, end, s, loss, best, rule.best, best, rule.best_k)


# ---- 7. Joining the two -----------------------------------------------------------------------
def refine_x0(x0: Tensor, t: int, *, r2: Tensor, xhat: Tensor | None, risk: float,
              y: Tensor | None, task: Task) -> Tensor:
    """The DDPM's x0 at t, joined with the DIP by precision and with y by data consistency.
    The product of N(x0, r_t^2) and N(xhat, R) has mean (x0 / r_t^2 + xhat / R) / (1/r_t^2 + 1/R).
    Then a proximal step towards A x = y, exact where y is noise-free. xhat, y: None to leave out.
    """
    x0, var = x0.clamp(-1, 1), r2[t].item()
    if xhat is not None:
        x0, var = (x0 * risk + xhat * var) / (risk + var), var * risk / (var + risk)
    return x0 if y is None else task.project(x0, y, var / (var + task.sigma ** 2))


def reverse(prior: Prior, y: Tensor | None, task: Task, start: Tensor, t0: int, *,
            sigma: float = 0.0, guide: Tensor | None = None, risk: float = 0.0, steps: int = 20,
            eta: float = 0.0, samples: int = 4, seed: int = 0, wrap=iter) -> Tensor:
    """Noise `start` (1 x C x H x W, of noise level sigma already) to t0, then go back to t = 0:
    samples x C x H x W. guide: the DIP's output, `risk` its error's variance; y: for the data
    consistency; or None. Sample i depends on seed + i alone."""
    gens = [stream(seed + i, SAMPLE) for i in range(samples)]
    added = math.sqrt(max(prior.schedule.sigma[t0].item() ** 2 - sigma ** 2, 0))
    z = start + added * noise(torch.Size([samples, *start.shape[1:]]), gens).to(start)
    xt = z * prior.schedule.abar[t0].sqrt().item()                   # x_t0 ~ q(x_t0 | x) or xhat
    refine = functools.partial(refine_x0, r2=prior.r2, xhat=guide, risk=max(risk, 1e-8), y=y,
                               task=task)
    return ddim_sample(prior.model, prior.schedule, xt, t0, steps, gens, eta, refine, wrap)


# ---- 8. Metrics -------------------------------------------------------------------------------
def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB; inf for equal images."""
    mse = ((a.cpu().double() - b.cpu().double()) ** 2).mean().item()
    return 10 * math.log10(data_range ** 2 / mse) if mse > 0 else math.inf


def ssim(a: Tensor, b: Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004), mean over pixels, channels and images.
    a, b: N x C x H x W, H and W at least 11 (ValueError). Gaussian window 11, sigma 1.5, K1
    0.01, K2 0.03, population covariance; borders without a whole window are left out."""
    if min(a.shape[-2:]) < 11:
        raise ValueError("ssim needs images of at least 11 x 11 pixels")
    a, b = (v.cpu().double().flatten(0, 1)[:, None] for v in (a, b))
    g = torch.exp(-torch.arange(-5, 6, dtype=a.dtype) ** 2 / (2 * 1.5 ** 2))
    g = torch.outer(g, g)[None, None] / g.sum() ** 2
    ma, mb, aa, bb, ab = (F.conv2d(v, g) for v in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    num = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    den = (ma ** 2 + mb ** 2 + c1) * (aa - ma ** 2 + bb - mb ** 2 + c2)
    return (num / den).mean().item()


def quality(xhat: Tensor, x: Tensor | None) -> tuple:
    """(psnr, ssim) of xhat against the clean x, both clipped to [-1, 1]; None where unknown."""
    if x is None or xhat is None:
        return None, None
    xhat = xhat.clamp(-1, 1)
    return psnr(xhat, x, 2.0), ssim(xhat, x, 2.0) if min(x.shape[-2:]) >= 11 else None


# ---- 9. Files, figures, progress --------------------------------------------------------------
def fail(message: str):
    """One line on stderr, exit code 2. Every message names the flag and the remedy."""
    print(f"error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def save(path: str, data):
    """Write all of a file or nothing: image to PNG, list of dicts to CSV, dict to JSON or .pt."""
    buffer, text = io.BytesIO(), io.StringIO(data if isinstance(data, str) else None)
    if isinstance(data, Image.Image):
        data.save(buffer, "PNG")
    elif path.endswith(".pt"):
        torch.save(data, buffer)
    elif isinstance(data, list):
        table = csv.DictWriter(text, data[0] if data else (), lineterminator="\n")
        table.writeheader()
        table.writerows(data)
    elif isinstance(data, dict):
        text.write(json.dumps(data, indent=1).replace("Infinity", "null"))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            f.write(buffer.getbuffer() or text.getvalue().encode())
        os.replace(path + ".tmp", path)
    except OSError as e:
        fail(f"--out: cannot write {path} ({e.strerror}); name a folder you may write to")


def to_tensor(image: Image.Image) -> Tensor:
    """Any Pillow image to 1 x C x H x W in [-1, 1]: upright, C = 1 or 3, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):                            # 16 bits a pixel
        pixels = np.asarray(image, np.float32) / 257
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("L" if image.mode in ("L", "1") else "RGB"), np.float32)
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1) / 127.5 - 1)[None]


def to_image(x: Tensor) -> Image.Image:
    """1 x C x H x W in [-1, 1] to an 8-bit Pillow image: rounded, clipped."""
    pixels = ((x[0].detach().cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def load_image(path: str, flag: str = "--image") -> Tensor:
    """Read a picture as 1 x C x H x W in [-1, 1], or fail naming the flag."""
    try:
        with Image.open(path) as image:
            return to_tensor(image)
    except Exception as e:                              # Pillow raises many kinds for bad files
        fail(f"{flag}: cannot read {path} ({e}); give a whole PNG, JPEG or other picture")


def photos(folder: str, flag: str) -> list:
    """The picture files in a folder and below it, sorted."""
    ends = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
    files = sorted(f for f in glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
                   if f.lower().endswith(ends))
    return files or fail(f"{flag}: no pictures in {folder}; name a folder of PNG or JPEG files")


def figure(panels: list, x: Tensor | None = None) -> Image.Image:
    """Pictures (title, 1 x C x H x W), up to 6 a row; below each its PSNR to the clean x."""
    h, w = panels[0][1].shape[-2:]
    zoom, columns = max(1, round(256 / max(h, w))), min(len(panels), 6)
    w, h, gap, bar, rows = w * zoom, h * zoom, 8, 26, math.ceil(len(panels) / columns)
    page = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + 2 * bar) + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=max(9, min(17, w // 13)))
    for i, (title, image) in enumerate(panels):
        left, top = gap + i % columns * (w + gap), gap + i // columns * (h + 2 * bar)
        page.paste(to_image(image).convert("RGB").resize((w, h), Image.NEAREST), (left, top + bar))
        draw.text((left + w / 2, top + bar / 2), title, "black", font, anchor="mm")
        if x is not None and image is not x:
            below = f"{quality(image, x)[0]:.2f} dB"
            draw.text((left + w / 2, top + h + bar * 1.5), below, "dimgrey", font, anchor="mm")
    return page


class Progress:
    """Runs through steps, with one line of rate and time left if stdout is a terminal. The first
    Ctrl-C ends the loop after the step in hand (`stopped`); a second one kills."""

    def __init__(self, what: str, steps: Iterator):
        self.what, self.steps, self.stopped = what, steps, False
        self.start, self.shown, self.seconds = time.monotonic(), 0.0, 0.0

    def __iter__(self):
        before = signal.signal(signal.SIGINT, self.stop)
        try:
            for step in self.steps:
                self.seconds = time.monotonic() - self.start
                yield step
                if self.stopped:
                    break
        finally:
            signal.signal(signal.SIGINT, before)

    def over(self, steps: list) -> Iterator:
        """Runs through a list of steps, showing each."""
        self.steps = steps
        for k, step in enumerate(self, 1):
            yield step
            self.show(k, len(steps), "")

    def stop(self, *_):
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def show(self, k: int, n: int, text: str):
        if sys.stdout.isatty() and (self.seconds - self.shown > 0.5 or k >= n):
            self.shown, rate = self.seconds, k / max(self.seconds, 1e-9)
            line = f"{self.what} {k}/{n}  {rate:.1f}/s  {(n - k) / rate:.0f} s left  {text}"
            print("\r" + line[:110].ljust(110), end="\n" if k >= n else "", flush=True)


# ---- 10. The observation: a photo degraded here, or one that the user already has -------------
def from_8bit(sigma: float) -> float:
    """A noise level in 8-bit units (25 of 255) to the [-1, 1] scale."""
    return 2 * sigma / 255


def observe(args: Namespace, path: str, text: str) -> tuple:
    """(clean x or None, observation y, Task) of one photo; tensors 1 x C x h x w, args.device."""
    name, _, number = text.partition(":")
    try:
        value = float(number) if number else None
    except ValueError:
        value = math.nan
    good = {"denoise": value is None or 0 < value <= 255,
            "inpaint": value is None or 0 < value < 1, "superres": value in (2, 3, 4, 6, 8)}
    if not good.get(name):
        fail(f"--task: {text!r} is none of denoise:SIGMA (0 to 255), inpaint:SHARE (of the pixels "
             "missing, 0 to 1), superres:2|3|4|6|8")
    if args.mask and name != "inpaint":
        fail("--mask: it goes with --task inpaint; add that, or leave out the mask")
    image, scale = load_image(path), int(value) if name == "superres" else 1
    image = F.avg_pool2d(image, 2, ceil_mode=True) if args.halve else image
    unit = 1 if args.observed else scale
    h, w = (min(n, args.size or n) // unit * unit for n in image.shape[2:])
    if min(h, w) == 0:
        fail(f"--image: {path} is too small for --task {text}: it needs {unit} pixels a side")
    top, left = (image.shape[2] - h) // 2, (image.shape[3] - w) // 2
    image = image[..., top:top + h, left:left + w].contiguous().to(args.device)
    if name == "denoise" and value is None:
        value = estimate_sigma(image) * 127.5 if args.observed else 0.0
        if value < 0.01:
            fail("--task: the noise level is not known; give it in 8-bit units, as in denoise:25")
        text = f"denoise:{value:.3g}"
    mask = known_pixels(args, value, image) if name == "inpaint" else None
    task = Task(text, from_8bit(value) if name == "denoise" else 0.0, scale, mask)
    if args.observed:
        return None, image if mask is None else image * mask, task
    y = task.forward(image)
    n = torch.randn(y.shape, generator=stream(args.seed, OBSERVE)).to(y)
    return image, y + task.sigma * n, task


def known_pixels(args: Namespace, share: float | None, image: Tensor) -> Tensor:
    """The mask of inpaint, 1 x 1 x h x w: from --mask, or random with `share` missing."""
    if args.mask:
        mask = (load_image(args.mask, "--mask").mean(1, keepdim=True) > 0).float()
        if mask.shape[2:] != image.shape[2:]:
            fail(f"--mask: {args.mask} is {mask.shape[3]}x{mask.shape[2]}, the image "
                 f"{image.shape[3]}x{image.shape[2]}; make them of one size (white = known)")
    elif share is None or args.observed:
        fail("--mask: inpaint needs a picture of the known pixels (white), or --task inpaint:0.8")
    else:
        u = torch.rand((1, 1, *image.shape[2:]), generator=stream(args.seed, OBSERVE))
        mask = (u >= share).float()
    return mask.to(image) if mask.any() else fail("--task, --mask: no pixel is known; leave some")


# ---- 11. The commands -------------------------------------------------------------------------
def run_fit(args: Namespace, y: Tensor, task: Task, x: Tensor | None) -> tuple:
    """fit_dip as the flags say: (last FitStep, log rows, seconds, interrupted). Ctrl-C keeps the
    best so far. Only the log reads the clean x."""
    iters, lr = (ADAPT_ITERS, 5e-4) if args.method == "adapt" else (
        BRIEF_ITERS if args.init else DIP_ITERS[task.sigma > 0], 0.01)
    options = dict(method=args.method, stop=args.stop, iters=args.iters or iters, lr=args.lr or lr,
                   width=args.width or 32, depth=args.depth, seed=args.seed)
    rows, net = [], load_prior(args, "dip", y.shape[1]) if args.method == "adapt" else None
    steps = Progress("DIP", fit_dip(y, task, net, **options))
    try:
        for last in steps:
            if last.k % 20 == 0 or last.k <= 1:
                p, q = quality(last.average, x)
                rows.append(dict(iter=last.k, seconds=round(steps.seconds, 2), s=last.s * 127.5,
                                 loss=last.loss, risk=last.risk, psnr=p, ssim=q))
                steps.show(last.k, last.iters, f"noise {last.s * 127.5:.0f}/255" + (
                    f", PSNR {p:.2f}" if x is not None else ""))
    except FloatingPointError as e:
        fail(f"--lr: {e}; lower it")
    return last, rows, steps.seconds, steps.stopped


def restore(args: Namespace, x: Tensor | None, y: Tensor, task: Task, prior: Prior | None) -> dict:
    """fit-dip (init None) or sample on one observation: a DIP, reverse diffusion, or both.
    Returns the answer `image`, all `samples`, the DIP's output or None, log rows and metrics."""
    begin, seen, dip, risk, stopped = time.monotonic(), task.interpolate(y), None, None, False
    more = dict(iters=0, stop_iter=0, seconds_dip=0.0)
    if args.init in (None, "dip"):
        last, rows, seconds, stopped = run_fit(args, y, task, x)
        more = dict(iters=last.k, stop_iter=last.best_k, seconds_dip=seconds)
        dip, risk = last.best, None if math.isnan(last.risk) else last.risk
    image, samples, middle = dip, dip, time.monotonic()
    if args.init:
        channels = prior.model.channels
        guess = max(task.sigma, from_8bit(25)) ** 2 if risk is None else risk
        t0 = prior.schedule.T if args.init == "noise" else args.start
        t0 = t0 or prior.schedule.start_t(guess, 1.0 if risk is None else 0.5)
        if t0 > prior.t_max:
            print(f"--start: t0 {t0} lowered to {prior.t_max}, the most that this prior knows")
            t0 = prior.t_max
        told = task.sigma > 0 and args.init != "noise"         # noisy y speaks through the start
        start = 0 * seen if args.init == "noise" else seen if dip is None else dip
        wide = [v if v is None else v.expand(-1, channels, -1, -1)              # grey to colour
                for v in (None if told else y, start, None if args.no_guide else dip)]
        bar = Progress("DDPM", ())
        samples = reverse(prior, wide[0], task, wide[1], t0, guide=wide[2], risk=guess,
                          sigma=task.sigma if args.init == "observed" else 0.0, steps=args.steps,
                          eta=args.eta, samples=args.samples, seed=args.seed, wrap=bar.over)
        samples = samples.mean(1, keepdim=True) if y.shape[1] < channels else samples
        image, each = samples.mean(0, keepdim=True), [quality(v[None], x) for v in samples]
        rows = [dict(seed=args.seed + i, psnr=p, ssim=q) for i, (p, q) in enumerate(each)]
        more |= dict(psnr_dip=quality(dip, x)[0], psnr_mean=quality(image, x)[0], t0=t0,
                     psnr_sample=None if x is None else sum(p for p, _ in each) / len(each),
                     nfe=min(args.steps, t0), seconds_ddpm=time.monotonic() - middle)
    p, q = quality(image, x)
    metrics = dict(psnr=p, ssim=q, psnr_observed=quality(seen, x)[0],
                   seconds=time.monotonic() - begin, risk=risk, sigma=task.sigma * 127.5,
                   task=task.name, init=args.init, method=args.method, stop=args.stop,
                   seed=args.seed) | more
    return dict(image=image, samples=samples, dip=dip, rows=rows, metrics=metrics,
                stopped=stopped or bool(args.init and bar.stopped))


def prepare(args: Namespace) -> tuple:
    """(clean x or None, y, Task, Prior or None) for fit-dip or sample; fills in unset flags. The
    unconditional grid is the restoration of an image of which no pixel was observed."""
    kind = "none" if args.init == "noise" else "dip"
    if args.image is None and (args.observed or args.mask):
        fail("--image: --observed and --mask need the photo; name it with --image FILE")
    grid = kind == "none" and args.image is None and args.task is None
    args.samples = args.samples or (16 if grid else 4)
    args.steps = args.steps or (100 if kind == "none" else 20)
    args.size = args.size or (64 if grid else 128 if args.image is None else None)
    args.image = args.image or os.path.join(PHOTOS, "test", "astronaut.png")
    if grid:
        prior = load_prior(args, kind, 1)
        y = torch.zeros(1, prior.model.channels, args.size, args.size, device=args.device)
        return None, y, Task("grid", mask=torch.zeros_like(y[:, :1])), prior
    default = "superres:4" if args.init else "denoise:25"
    x, y, task = observe(args, args.image, args.task or default)
    return x, y, task, load_prior(args, kind, y.shape[1]) if args.init else None


def cmd_restore(args: Namespace) -> int:
    """fit-dip and sample."""
    x, y, task, prior = prepare(args)
    how = f"{args.method}, stop {args.stop}" if not args.init else (
        f"init {args.init}, {args.steps} steps, {args.samples} samples")
    what = "" if task.name == "grid" else os.path.basename(args.image)
    banner(args, f"{what} {y.shape[3]}x{y.shape[2]} {task.name}, {how}", prior)
    r = restore(args, x, y, task, prior)
    panels = [("observed", task.interpolate(y)), ("DIP", r["dip"])]
    panels += [("DDPM, one sample", r["samples"][:1]),
               (f"mean of {args.samples}", r["image"])] if args.init else []
    panels = [(title, v) for title, v in panels + [("clean", x)] if v is not None]
    if task.name == "grid":
        panels = [(f"seed {args.seed + i}", v[None]) for i, v in enumerate(r["samples"])]
        columns = r["samples"].chunk(4 if args.samples % 4 == 0 else 1)
        r["image"] = torch.cat([torch.cat(list(column), 1) for column in columns], 2)[None]
    for name, data in (("result.png", to_image(r["image"])), ("sample.png", to_image(r["samples"])),
                       ("figure.png", figure(panels, x)), ("log.csv", r["rows"]),
                       ("metrics.json", r["metrics"])):
        if args.init or name != "sample.png":
            save(os.path.join(args.out, name), data)
    numbers = [f"{k} {v:.2f}" for k, v in r["metrics"].items()
               if isinstance(v, float) and k.startswith(("psnr", "ssim", "seconds"))]
    print(", ".join(numbers), f"-> {os.path.join(args.out, 'result.png')}, figure.png", flush=True)
    return 130 if r["stopped"] else 0


def load_data(path: str, patch: int) -> tuple:
    """(list of uint8 C x H x W, patch): a folder of pictures, or an .npz/.npy array of them."""
    if os.path.isdir(path):
        images = [to_image(load_image(f, "--data")) for f in photos(path, "--data")]
        mode = "L" if all(i.mode == "L" for i in images) else "RGB"
        arrays = [np.atleast_3d(np.asarray(i.convert(mode))) for i in images]
    else:
        try:
            data = np.load(path, allow_pickle=False)
            data = data if isinstance(data, np.ndarray) else data[data.files[0]]
            arrays = data[..., None] if data.ndim == 3 else data
            whole = data.size and data.dtype == np.uint8 and arrays.ndim == 4
            if not whole or arrays.shape[3] not in (1, 3):
                raise ValueError(f"it holds {data.dtype} of shape {data.shape}")
        except Exception as e:                          # numpy raises many kinds for bad files
            fail(f"--data: {path}: {e}; give a folder of pictures or uint8 N x H x W (x C) .npz")
    patch = min(patch, max(min(a.shape[:2]) for a in arrays))
    return [torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in arrays
            if min(a.shape[:2]) >= patch], patch


def load_state(path: str, flag: str) -> dict:
    """Read a checkpoint (see cmd_train), or fail naming the flag."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        UNet(**state["config"]["unet"]).load_state_dict(state["ema"])
        return state
    except Exception as e:                              # torch raises many kinds for bad files
        fail(f"{flag}: {path} is no whole checkpoint ({str(e).strip()[:80]}); train one")


def load_prior(args: Namespace, kind: str, channels: int) -> Prior:
    """The Prior in --ckpt, or the default one of this kind, trained on the spot when missing."""
    path = args.ckpt or os.path.join("runs", "train", f"{kind}.pt")
    if not args.ckpt and not os.path.exists(path):
        print(f"no prior yet: training {path} on images/train, once, {TRAIN_TIME} on two cores")
        part = os.path.join("runs", "train", "part")        # a prior only when it is whole
        more = ["--resume"] * os.path.exists(os.path.join(part, f"{kind}.pt"))
        if main(["train", "--prior", kind, "--device", args.device.type, "--out", part] + more):
            raise KeyboardInterrupt
        os.replace(os.path.join(part, f"{kind}.pt"), path)
    state = load_state(path, "--ckpt")
    c, model = state["config"], UNet(**state["config"]["unet"]).to(args.device)
    model.load_state_dict(state["ema"])
    if model.channels < channels:
        fail(f"--ckpt: {path} is a prior for grey images; train one on colour photos")
    if kind == "none" and c["t_max"] < c["T"]:
        fail(f"--ckpt: {path} knows only t <= {c['t_max']}; train --prior none, or use --init dip")
    return Prior(model, NoiseSchedule(c["T"], c["schedule"]), c["t_max"], state["eps_loss"])


def new_state(args: Namespace, channels: int, patch: int) -> dict:
    """A checkpoint before its first step: a plain dict that weights_only=True can read."""
    schedule = NoiseSchedule(1000, args.schedule)
    t_max = args.t_max or (
        schedule.start_t(from_8bit(50) ** 2) if args.prior == "dip" else schedule.T)
    unet = dict(channels=channels, width=(args.width or 48) // 8 * 8, attention=args.attention)
    config = dict(unet=unet, T=schedule.T, schedule=args.schedule, prior=args.prior, patch=patch,
                  t_max=t_max, batch=args.batch, lr=args.lr or 1e-3, seed=args.seed)
    torch.manual_seed(stream(args.seed, INIT).initial_seed())
    weights = UNet(**unet).state_dict()
    return dict(config=config, step=0, model=weights, ema=weights, optimiser={}, rng=None, log=[],
                eps_loss=torch.ones(schedule.T + 1))


def cmd_train(args: Namespace) -> int:
    path = os.path.join(args.out, f"{args.prior}.pt")
    state = load_state(path, "--resume") if args.resume else None
    images, patch = load_data(args.data, state["config"]["patch"] if state else args.patch)
    state = state or new_state(args, len(images[0]), patch)
    c, (net, ema) = state["config"], (UNet(**state["config"]["unet"]).to(args.device)
                                      for _ in range(2))
    net.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    if (net.channels, c["patch"]) != (len(images[0]), patch):
        fail(f"--data: the checkpoint is for {net.channels} channels, {c['patch']} pixels a side")
    if state["step"] >= args.steps:
        fail(f"--steps: {path} has {state['step']} steps already; ask for more")
    banner(args, f"{len(images)} images, prior {c['prior']}, t <= {c['t_max']}, "
                 f"{c['patch']}x{c['patch']}, steps {state['step']} to {args.steps}", net)
    rows, steps = state["log"], Progress("DDPM", train_ddpm(
        state, net, ema, NoiseSchedule(c["T"], c["schedule"]), images, args.steps))
    for loss in steps:
        step, running = state["step"], state["eps_loss"][1:c["t_max"] + 1]
        quarters = {f"loss_quarter{i}": v.mean().item() for i, v in enumerate(running.chunk(4), 1)}
        steps.show(step, args.steps, " ".join(f"{k} {v:.3f}" for k, v in quarters.items()))
        if not math.isfinite(loss):
            fail(f"--lr: the loss is not finite at step {step}; lower it and train again")
        if step % 50 == 0 or step == args.steps:
            rows.append(dict(step=step, seconds=steps.seconds, loss=loss) | quarters)
        if step % 500 == 0:
            save(path, state | dict(model=net.state_dict(), ema=ema.state_dict()))
    save(path, state | dict(model=net.state_dict(), ema=ema.state_dict()))
    save(os.path.join(args.out, "log.csv"), rows)
    save(os.path.join(args.out, "metrics.json"), dict(
        psnr=None, ssim=None, psnr_observed=None, seconds=steps.seconds, step=step,
        t_max=c["t_max"], eps_loss=running.mean().item()))
    print(f"{step} steps in {steps.seconds:.0f} s -> {path}", flush=True)
    return 130 if steps.stopped else 0


def banner(args: Namespace, text: str, net: nn.Module | None = None):
    """What was chosen, in one line."""
    size = f", {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters" if net else ""
    print(f"{args.command}: {text}{size} | {args.device}, {torch.get_num_threads()} threads, "
          f"seed {args.seed} -> {args.out}", flush=True)


# ---- 12. Evaluation: the tables of README.md and report.md ------------------------------------
SUITES = {      # tasks, and the arms: what stands in the table is what the command does
    "stopping": (("denoise:25", "inpaint:0.8", "superres:4"), {
        "staged, holdout": "fit-dip",
        "classic DIP, fixed 1800": "fit-dip --method dip --stop fixed --iters 1800",
        "classic DIP, ES-WMV": "fit-dip --method dip --stop wmv --iters 1800"}),
    "init": (("superres:4", "inpaint:0.8"), {
        "DIP -> DDPM, 20 steps": "sample --init dip",
        "DIP alone": f"fit-dip --iters {BRIEF_ITERS}",
        "DIP alone, 1.5 x": f"fit-dip --iters {BRIEF_ITERS * 3 // 2}",
        "DIP alone, 3 x": f"fit-dip --iters {BRIEF_ITERS * 3}",
        "observed-init, 20 steps": "sample --init observed",
        "noise-init, 20 steps": "sample --init noise --steps 20",
        "noise-init, 200 steps": "sample --init noise --steps 200"})}


def evaluate_photo(args: Namespace, arms: dict, flags: list) -> list:
    """Run every arm on one photo and task; a dict for each, and a figure. oracle: the best PSNR
    that the fit's average passed through; equal: its PSNR at the first arm's seconds."""
    rows, panels = [], []
    for arm, line in arms.items():
        given = make_parser().parse_args(line.split() + flags)
        given.device = args.device
        x, y, task, prior = prepare(given)
        r = restore(given, x, y, task, prior)
        if r["stopped"]:
            raise KeyboardInterrupt
        panels.append((arm, r["image"]))
        m, log = r["metrics"], [] if given.init else r["rows"]
        limit = rows[0]["seconds"] if rows else math.inf
        photo = os.path.splitext(os.path.basename(given.image))[0]
        rows.append(dict(
            task=given.task, photo=photo, seed=given.seed, arm=arm, psnr=m["psnr"],
            ssim=m["ssim"], seconds=m["seconds"],
            oracle=max([v["psnr"] for v in log], default=math.nan),
            equal=([v["psnr"] for v in log if v["seconds"] <= limit] or [math.nan])[-1],
            sample=m.get("psnr_sample") or math.nan, calls=m.get("nfe", 0), t0=m.get("t0", 0),
            stop=m["stop_iter"], observed=m["psnr_observed"]))
    panels = [("observed", task.interpolate(y)), *panels, ("clean", x)]
    name = f"{args.suite}-{photo}-{given.task.replace(':', '-')}-seed{given.seed}.png"
    save(os.path.join(args.out, name), figure(panels, x))
    return rows


def markdown(rows: list) -> str:
    """Means over photos and seeds by (task, arm); std is that of the seeds' means."""
    columns = ("psnr", "ssim", "seconds", "oracle", "equal", "sample", "calls")
    groups, table = {}, ["| task | arm | PSNR | SSIM | seconds | oracle | at equal seconds | one "
                         "sample | calls | std of seeds | photos x seeds |", "|---" * 11 + "|"]
    for r in rows:
        groups.setdefault((r["task"], r["arm"]), []).append(r)
    for (task, arm), group in groups.items():
        means = [np.mean([r[c] for r in group]) for c in columns]
        cells = ["" if math.isnan(v) else f"{v:.{3 if c == 'ssim' else 2}f}"
                 for c, v in zip(columns, means)]
        seeds = [np.mean([r["psnr"] for r in group if r["seed"] == s]) for s in {
            r["seed"] for r in group}]
        cells += [f"{np.std(seeds, ddof=1):.2f}" if len(seeds) > 1 else "", str(len(group))]
        table.append(f"| {task} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(table) + "\n"


def cmd_evaluate(args: Namespace) -> int:
    files = photos(args.images, "--images")[:1 if args.quick else None]
    shared = ["--size", str(args.size or 128)] + ["--halve"] * args.halve
    shared += ["--size", "32", "--iters", "20"] if args.quick else []
    for name in SUITES if args.suite == "all" else [args.suite]:
        (tasks, arms), rows, args.suite = SUITES[name], [], name
        tasks = [args.task] if args.task else tasks
        banner(args, f"{name}: {len(files)} photos x {', '.join(tasks)} x {args.seeds} seeds")
        jobs = [(s, f, t) for s in range(args.seeds) for f in files for t in tasks]
        for seed, path, task in jobs:
            rows += evaluate_photo(args, arms, shared + [
                "--image", path, "--task", task, "--seed", str(args.seed + 100 * seed)])
            save(os.path.join(args.out, f"{name}.csv"), rows)
            save(os.path.join(args.out, f"{name}.md"), markdown(rows))
            print(rows[-1]["photo"], task, " | ".join(
                f"{r['arm']} {r['psnr']:.2f}" for r in rows[-len(arms):]), flush=True)
        print(markdown(rows))
    return 0


# ---- 13. The command line ---------------------------------------------------------------------
BOTH = "fit-dip sample"
FLAGS = (       # commands, flag, default, kind: (type, lowest, highest), choices, True or None
    ("evaluate", "suite", "all", [*SUITES, "all"], "which tables"),
    (BOTH, "--image", None, None, "a photo: clean, unless --observed (a shipped one)"),
    (BOTH + " evaluate", "--task", None, None, "denoise:SIGMA (of 255), inpaint:SHARE missing, "
     "superres:SCALE (denoise:25; sample superres:4; evaluate all)"),
    (BOTH, "--observed", False, True, "--image is degraded already; denoise estimates the noise"),
    (BOTH, "--mask", None, None, "for inpaint: picture of the image's size, white = known"),
    (BOTH, "--iters", None, (int, 2, 10 ** 7), "of the DIP (1000 with noise, 400, or 200 to 250)"),
    (BOTH, "--depth", 4, (int, 1, 8), "levels of the DIP's hourglass"),
    (BOTH, "--ckpt", None, None, "prior (runs/train/*.pt, trained if missing)"),
    (BOTH, "--method", "staged", [*METHODS], "of the DIP: network input and target"),
    (BOTH, "--stop", "holdout", ["holdout", "wmv", "emv", "fixed"], "of the DIP (fixed: --iters)"),
    ("sample", "--init", "noise", ["noise", "observed", "dip"], "what the DDPM starts from"),
    ("sample", "--start", None, (int, 1, 1000), "t0, or auto: the start rule (auto)"),
    ("sample", "--steps", None, (int, 1, 1000), "reverse steps (20; from noise 100)"),
    ("sample", "--samples", None, (int, 1, 1024), "samples K (4; grid 16)"),
    ("sample", "--no-guide", False, True, "no precision guidance by the DIP"),
    ("sample", "--eta", 0.0, (float, 0, 1), "0 DDIM .. 1 ancestral noise"),
    ("train", "--data", os.path.join(PHOTOS, "train"), None, "folder of pictures, or an .npz"),
    ("train", "--prior", "none", ["none", "dip"], "none: all t; dip: only t <= --t-max"),
    ("train", "--t-max", None, (int, 1, 1000), "largest t (none: 1000; dip: by the start rule)"),
    ("train", "--schedule", "linear", ["linear", "cosine"], "noise schedule"),
    ("train", "--steps", TRAIN_STEPS, (int, 1, 10 ** 8), "training steps"),
    ("train", "--batch", 16, (int, 1, 4096), "patches a step"),
    ("train", "--patch", 48, (int, 4, 1024), "side of the patches, pixels"),
    ("train", "--attention", False, True, "self-attention, for data sets of whole small images"),
    ("train", "--resume", False, True, "go on from the checkpoint in --out"),
    ("evaluate", "--images", os.path.join(PHOTOS, "test"), None, "folder of photos"),
    ("evaluate", "--seeds", 1, (int, 1, 99), "how many seeds: --seed, --seed + 100, .."),
    ("evaluate", "--quick", False, True, "one photo, 32x32, 20 iterations: a check"),
    (BOTH + " train", "--width", None, (int, 8, 1024), "channels (DIP 32; DDPM 48, in eights)"),
    (BOTH + " train", "--lr", None, (float, 1e-9, 10), "Adam's (DIP 0.01, adapt 5e-4, DDPM 1e-3)"),
    (BOTH + " evaluate", "--halve", False, True, "first average 2x2 pixels of the photo"),
    (BOTH + " evaluate", "--size", None, (int, 1, 10 ** 5), "centre crop, pixels a side (all of "
     "--image; 128 for shipped photos and tables, 64 for grids)"),
    (BOTH + " train evaluate", "--seed", 0, (int, 0, 10 ** 9), "of all that is random"),
    (BOTH + " train evaluate", "--device", "auto", ["auto", "cpu", "cuda", "mps"], "where to run"),
    (BOTH + " train evaluate", "--out", None, None, "folder for what is written (runs/COMMAND)"),
)


def in_range(default, kind, low, high, text: str):
    """An argparse type: int or float within low..high, or auto, the flag's default."""
    try:
        value = default if text == "auto" else kind(text)
    except ValueError:
        value = math.nan
    if value is None or low <= value <= high:
        return value
    raise ArgumentTypeError(f"{text!r} is no {kind.__name__} in {low}..{high}")


def make_parser() -> ArgumentParser:
    """The four commands with their FLAGS."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in (
        ("fit-dip", "fit a Deep Image Prior to one photo; it stops by itself"),
        ("train", "train a DDPM prior on a folder of photos or an array"),
        ("sample", "reverse diffusion from noise, from the observation, or from a DIP"),
        ("evaluate", "the tables of README.md and report.md"))}
    for names, flag, default, kind, text in FLAGS:
        options = dict(default=default, help=text)
        if kind is True:
            options["action"] = "store_true"
        elif isinstance(kind, list):
            options |= dict(choices=kind) if flag[0] == "-" else dict(choices=kind, nargs="?")
        elif kind:
            options["type"] = functools.partial(in_range, default, *kind)
        options["help"] += f" ({default})" if kind is not True and default is not None else ""
        for name in names.split():
            parsers[name].add_argument(flag, **options)
    parsers["fit-dip"].set_defaults(init=None, no_guide=False, samples=None, steps=None)
    for p in (parser, *parsers.values()):
        p.error = fail                                                      # one line
    return parser


def main(argv: list | None = None) -> int:
    """Run one command (argv without the program's name); returns the exit code."""
    args = make_parser().parse_args(argv)
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d in have if have[d]) if args.device == "auto" else args.device
    if not have[name]:
        fail(f"--device: there is no {name} here; use --device auto")
    args.device, args.out = torch.device(name), args.out or os.path.join("runs", args.command)
    save(os.path.join(args.out, ".writable"), "")
    os.remove(os.path.join(args.out, ".writable"))
    command = dict(train=cmd_train, evaluate=cmd_evaluate).get(args.command, cmd_restore)
    try:
        return command(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
