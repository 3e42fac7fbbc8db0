"""Deep Image Prior x DDPM: one file, from the equations to restored photos.

A Deep Image Prior (DIP) is an untrained CNN fitted to one image; a DDPM is a denoiser trained on
many. The held-out risk R joins them: the DIP's squared error, estimated without the clean image.

Notation (pixels in [-1, 1], N x C x H x W; t = 0..T, t = 0 is the clean image):
    x, xhat, y       clean image, estimate, observation  y = A x + sigma n
    A, A^+           task operator (mask and/or s x s mean) and its pseudo-inverse
    xt               x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, abar_t = prod (1 - beta_s)
    sigma_t          sqrt((1 - abar_t) / abar_t), the noise level of x_t / sqrt(abar_t)
    s, z1, z2        a rung of the ladder, and its conjugate pair  y + s w,  y - (sigma^2 / s) w
    R, r_t^2         variance of the DIP's error (held-out risk), of the DDPM's x0-prediction
"""
import contextlib
import copy
import ctypes
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import abc, deque, namedtuple
from dataclasses import dataclass, make_dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Image.MAX_IMAGE_PIXELS = 4 * 10 ** 7        # Pillow refuses pictures of twice as many, as a bomb
os.environ.setdefault("MKL_CBWR", "AUTO" if "speed" in sys.argv else "COMPATIBLE")   # same bytes
PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
DIP_ITERS = (400, 1000)                                 # of fit-dip: without noise, with noise
BRIEF_ITERS, ADAPT_ITERS, TRAIN_STEPS = 250, 100, 3000  # before a DDPM; from a DDPM; of a prior
OBSERVE, INIT, FIT, SAMPLE, TRAIN = range(5)            # what a random stream is for

def stream(seed: int, purpose: int) -> torch.Generator:
    """One generator for each purpose: the fit must never redraw the observation's own noise."""
    return torch.Generator().manual_seed(5 * seed + purpose)

def ranks() -> tuple:                       # (this process, how many there are), says torchrun
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- 1. The diffusion process (Ho et al. 2020, sections 2 and 3) ------------------------------
class NoiseSchedule:
    """betas, abar, sigma: float64 of length T+1. kind: 'linear' (Ho et al. 2020: beta 1e-4..0.02,
    rescaled by 1000/T) or 'cosine' (Nichol & Dhariwal 2021, eq. 17), else ValueError."""
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

def column(values: Tensor, like: Tensor) -> Tensor:     # float64 (N) to float32 N x 1 x 1 x 1
    return values.to(like.device, torch.float32).view(-1, 1, 1, 1)

def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0) (Ho et al. eq. 4): x0, eps N x C x H x W; t int64 of length N."""
    abar = schedule.abar[t.cpu()]
    return column(abar.sqrt(), x0) * x0 + column((1 - abar).sqrt(), x0) * eps

def predict_x0(schedule: NoiseSchedule, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x0 that x_t and eps imply (Ho et al. eq. 15); inverts q_sample."""
    abar = schedule.abar[t.cpu()]
    return column(abar.rsqrt(), xt) * xt - column((1 / abar - 1).sqrt(), xt) * eps

# ---- 2. The two networks ----------------------------------------------------------------------
def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom to a multiple, at least two of them: reflect, or repeat if tiny."""
    h, w = x.shape[-2:]
    ph, pw = (max(-n % multiple, 2 * multiple - n) for n in (h, w))
    if ph == pw == 0:
        return x
    return F.pad(x, (0, pw, 0, ph), mode="reflect" if ph < h and pw < w else "replicate")

@torch.no_grad()
def tiled(f, x: Tensor, *args, side: int = 768, margin: int = 96) -> Tensor:
    """f(x, *args) in tiles, for bounded memory: with `margin`, as far as the networks look."""
    out = torch.empty_like(x)
    for i, j in itertools.product(*(range(0, n, side) for n in x.shape[2:])):
        a, b = max(i - margin, 0), max(j - margin, 0)
        tile = f(x[..., a:i + side + margin, b:j + side + margin], *args)[..., i - a:, j - b:]
        out[..., i:i + side, j:j + side] = tile[..., :side, :side]
    return out

def conv_block(cin: int, cout: int, kernel: int, stride: int = 1, norm: str = "batch"):
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
    bn = nn.BatchNorm2d(cout) if norm == "batch" else nn.GroupNorm(math.gcd(8, cout), cout)
    return nn.Sequential(conv, bn, nn.LeakyReLU(0.2, inplace=True))

class SkipNet(nn.Module):
    """The DIP's hourglass with skip connections (Ulyanov et al. 2018); 128k parameters.
    forward(x): N x cin x H x W of any size to N x cout x H x W in [-1, 1]; sigma is not used."""
    def __init__(self, cin: int = 3, cout: int = 3, width: int = 32, depth: int = 4,
                 skip: int = 16, norm: str = "batch", upsample: str = "nearest"):
        super().__init__()
        self.skip, self.down, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.upsample, block = upsample, functools.partial(conv_block, norm=norm)
        for c in [cin] + [width] * (depth - 1):
            self.skip.append(block(c, skip, 1))
            self.down.append(nn.Sequential(block(c, width, 3, 2), block(width, width, 3)))
            self.up.append(nn.Sequential(block(width + skip, width, 3), block(width, width, 1)))
        self.out = nn.Conv2d(width, cout, 1)

    def forward(self, x: Tensor, sigma: float | None = None) -> Tensor:
        h, w = x.shape[-2:]
        x, skips = pad_to(x, 2 ** len(self.down)), []
        for skip, down in zip(self.skip, self.down):
            skips.append(skip(x))
            x = down(x)                                                      # H, W halved
        for up in self.up[::-1]:
            x = F.interpolate(x, scale_factor=2.0, mode=self.upsample)
            x = up(torch.cat([skips.pop(), x], 1))
        return torch.tanh(self.out(x).float())[..., :h, :w]

def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t (N) to N x dim, dim even (Vaswani et al. 2017, section 3.5)."""
    args = t.float()[:, None] * 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([args.cos(), args.sin()], 1)

class ResBlock(nn.Module):
    """Residual block without normalisation (EDSR, Lim et al. 2017): t sets a scale and a shift."""
    def __init__(self, cin: int, cout: int, emb: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, 1, 1), nn.Conv2d(cout, cout, 3, 1, 1)
        nn.init.zeros_(self.conv2.weight)           # starts near the identity
        self.emb = nn.Linear(emb, 2 * cout)
        self.short = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        return self.short(x) + self.conv2(F.relu(self.conv1(x) * (1 + scale) + shift))

class UNet(nn.Module):
    """Residual U-Net eps_theta(x_t, t) (Ho et al. 2020, appendix B), on fold x fold blocks for
    speed. forward: x N x channels x H x W of any size, t int64 (N), to the shape of x."""
    def __init__(self, channels: int = 3, width: int = 32, mults: tuple = (1, 2, 3), fold: int = 2):
        super().__init__()
        self.channels, self.fold = channels, fold
        widths, emb, self.width = [m * width for m in mults], 4 * width, width
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem, up = nn.Conv2d(channels * fold ** 2, width, 3, 1, 1), widths[::-1]
        self.enc = nn.ModuleList(ResBlock(c, w, emb) for c, w in zip([width] + widths, widths))
        self.mid = ResBlock(up[0], up[0], emb)
        self.dec = nn.ModuleList(ResBlock(c + w, w, emb) for c, w in zip(up[:1] + up, up))
        self.out = nn.Conv2d(up[-1], channels * fold ** 2, 3, 1, 1)
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
        for block in self.dec:
            x = block(torch.cat([x, skips.pop()], 1), emb)
            x = F.interpolate(x, scale_factor=2.0) if skips else x           # H, W doubled
        return F.pixel_shuffle(self.out(x).float(), self.fold)[..., :h, :w]

class Prior(nn.Module):
    """A trained DDPM, from a checkpoint. r2: r_t^2 = sigma_t^2 L_t, mean squared error of its x0
    (x0_pred - x0 = -sigma_t (eps_pred - eps)); the eps-loss L is smoothed over 31 t."""
    def __init__(self, state: dict):
        super().__init__()
        c, self.model = state["config"], UNet(**state["config"]["unet"])
        self.model.load_state_dict(state["ema"])
        self.schedule, self.t_max = NoiseSchedule(c["T"], c["schedule"]), c["t_max"]
        self.channels = self.model.channels
        self.shift, self.trained = c["prior"] == "shift", max(
            [v["seconds"] for v in state["log"]], default=0.0)
        loss = F.avg_pool1d(state["eps_loss"][None, 1:self.t_max + 1], 31, 1, 15,
                            count_include_pad=False)
        self.r2 = self.schedule.sigma ** 2 * F.pad(loss[0], (1, c["T"] - self.t_max), value=1.0)

    def forward(self, z: Tensor, sigma: float) -> Tensor:                # denoises z = x + noise
        t = torch.full((len(z),), min(self.schedule.start_t(sigma ** 2), self.t_max)).to(z.device)
        xt = column(self.schedule.abar[t.cpu()].sqrt(), z) * z.expand(-1, self.channels, -1, -1)
        x0 = predict_x0(self.schedule, xt, t, self.model(xt, t))
        return x0.unflatten(1, (-1, z.shape[1])).mean(1)

# ---- 3. Training the DDPM (Ho et al. Algorithm 1) ---------------------------------------------
def random_patches(images, batch: int, patch: int, gen: torch.Generator) -> Tensor:
    """Random flipped crops of some C x H x W images: batch x C x patch x patch, or smaller."""
    out, patch = [], min(patch, *images[0].shape[1:])
    for i in torch.randint(len(images), (batch,), generator=gen).tolist():
        u, (h, w) = torch.rand(3, generator=gen), images[i].shape[1:]
        top, left = int(u[0] * (h - patch + 1)), int(u[1] * (w - patch + 1))
        crop = images[i][:, top:top + patch, left:left + patch]
        out.append(crop.flip(2) if u[2] < 0.5 else crop)
    return torch.stack(out)

def train_ddpm(state: dict, model, ema, schedule, images, steps: int) -> abc.Iterator[float]:
    """Algorithm 1, t ~ U{1..t_max}: yields each loss, updates state; any run may be prolonged."""
    c, device, (rank, world) = state["config"], next(model.parameters()).device, ranks()
    opt = torch.optim.Adam(model.parameters(), lr=c["lr"], betas=(0.9, 0.99))
    gen = stream(c["seed"], TRAIN)
    if state["step"]:
        opt.load_state_dict(state["optimiser"])
        gen.set_state(state["rng"])
    for step in range(state["step"] + 1, steps + 1):
        x0, u = random_patches(images, c["batch"], c["patch"], gen).to(device) / 127.5 - 1, 0.0
        if c["prior"] == "shift":           # x_t = sqrt(abar) x0 + (1 - sqrt(abar)) u + ..: the
            x0, u = x0.chunk(2, 1)          # DDPM of x0 - u (ShiftDDPMs, Zhang et al. 2022)
        t = torch.randint(1, c["t_max"] + 1, (c["batch"],), generator=gen)
        eps = torch.randn(x0.shape, generator=gen).to(device)
        xt = u + q_sample(schedule, x0 - u, t, eps)
        xt, t, eps = (v[rank::world] for v in (xt, t, eps))         # this process's share
        error = (model(xt, t.to(device)) - eps) ** 2                         # Ho eq. 14
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

def p_sample_loop(model, schedule: NoiseSchedule, xt: Tensor, t: int, gens: list, refine=None):
    """Ancestral sampling (Ho et al. Algorithm 2), t calls: DDIM with eta 1 (report.md, Prop. 1)."""
    return ddim_sample(model, schedule, xt, t, t, gens, 1.0, refine)

@torch.no_grad()
def ddim_sample(model: nn.Module, schedule: NoiseSchedule, xt: Tensor, t: int, steps: int,
                gens: list, eta: float = 0.0, refine=None, wrap=iter) -> Tensor:
    """Reverse diffusion from x_t in at most `steps` network calls (Song et al. 2021, eq. 12).
    model(x_t, t) -> eps; xt N x C x H x W; t in 1..T; gens: one an image; eta 0 is deterministic;
    refine(x0, t) corrects the predicted x0 (section 7); wrap may watch, or cut short, the steps."""
    path = torch.linspace(t, 0, min(steps, t) + 1).round().long().tolist()   # t > ... > 0
    for s, r in wrap(list(zip(path[:-1], path[1:]))):
        abar, prev = schedule.abar[s].item(), schedule.abar[r].item()
        ts = torch.full((len(xt),), s, device=xt.device)
        x0 = predict_x0(schedule, xt, ts, model(xt, ts))
        x0 = refine(x0, s) if refine else x0
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
        """A^+ y, the least-norm x with A x = y: known pixels, repeated s x s times; = s^2 A' y."""
        y = y if self.mask is None else y * self.mask
        return F.interpolate(y, scale_factor=float(self.scale)) if self.scale > 1 else y

    def project(self, x: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
        """x - gain A^+ (A x - y): data consistency (DDNM, Wang et al. 2023, eq. 13)."""
        return x - gain * self.pinv(self.forward(x) - y)

    def mse(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of (A x - y)^2 over the known pixels."""
        error = ((self.forward(x) - y) ** 2).mean()
        return error if self.mask is None else error / self.mask.mean().clamp(min=1e-9)

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
    """Noise level of y: median |finest diagonal Haar band| / 0.6745 (Donoho & Johnstone 1994)."""
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
    "guide": ("fixed", "plain"),           # as dip, drawn to a trained DDPM's denoised outputs
}
SETTINGS = (     # settings of a fit, each a flag: name, default, choices or (type, low, high), what
    ("method", "staged", [*METHODS], "of the DIP: network input and target"),
    ("stop", "holdout", ["holdout", "wmv", "emv", "fixed"], "when to stop (fixed: --iters)"),
    ("nets", None, (int, 1, 99), "networks to fit and average (staged 2; else, and in sample, 1)"),
    ("iters", None, (int, 2, 10 ** 7), "steps (noise 1000, none 400; large 5000, 1000; brief 250)"),
    ("lr", None, (float, 1e-9, 10), "Adam's (0.01; large 0.003; adapt 5e-4, small noisy 1e-4)"),
    ("width", 32, (int, 1, 1024), "channels of the hourglass"),
    ("depth", 4, (int, 1, 8), "levels of the hourglass"),
    ("skip", None, (int, 1, 1024), "channels of its skip connections (16; from fixed z 4)"),
    ("norm", "batch", ["batch", "group"], "its normalisation"),
    ("upsample", "nearest", ["nearest", "bilinear"], "its upsampling"),
    ("input", None, ["observed", "fixed", "estimate"], "instead of the method's own input"),
    ("target", None, ["conjugate", "plain", "noisy"], "instead of the method's own target"),
    ("high", None, (float, 1e-3, 100), "first rung of noise / sigma (3), or / 0.2 (3; adapt 1)"),
    ("low", 0.4, (float, 1e-3, 100), "last rung of noise, in the same units"),
    ("shape", "geometric", ["geometric", "linear", "cosine"], "how the rungs fall"),
    ("rungs", 30, (int, 2, 10 ** 7), "how many rungs"),
    ("fresh", 1, (int, 0, 1), "new noise each step (1) or each rung (0)"),
    ("flips", 1, (int, 0, 1), "turn and flip the conjugate pair (1) or not (0)"),
    ("loss", "squares", ["squares", "gradient"], "gradient: and edges at three scales"),
    ("hold", 0.25, (float, 1e-3, 10), "a of the held-out pair, if there is noise"),
    ("tail", None, (float, 0, 0.9), "share of steps that see all of y again (staged 0.25, else 0)"),
    ("patience", 1000, (int, 1, 10 ** 7), "steps without a better score before the stop"),
)
Settings = make_dataclass("Settings", [(name, object, value) for name, value, *_ in SETTINGS])

def hole_side(mask: Tensor) -> int:         # of a square as deep as the holes, 1: scattered ones
    far, steps = mask, 0.0
    while 0 < far.mean() < 1:
        steps, far = steps + (1 - far).sum().item(), F.max_pool2d(far, 3, 1, 1)
    return max(1, 6 * int(steps / max((1 - mask).sum().item(), 1)) - 5)

class HeldOut:
    """Split an observation before the fit: (task, y) to see, (val_task, val_y) to score. Noisy:
    y + a sigma w, y - sigma/a w (Pang, Oliveira et al. 2021); else squares as large as holes."""
    def __init__(self, y: Tensor, task: Task, gen: torch.Generator, a=0.25, share=0.1):
        if task.sigma > 0:
            w = torch.randn(y.shape, generator=gen).to(y)
            self.task, self.val_task = replace(task, sigma=task.sigma * math.hypot(1, a)), task
            self.y, self.val_y = y + a * task.sigma * w, y - task.sigma / a * w
            self.bias = task.sigma ** 2 * (1 + (w ** 2).mean().item() / a ** 2)
            return
        known = torch.ones_like(y[:, :1]) if task.mask is None else task.mask
        side = max(1, min(hole_side(known), int((share * known.sum().item()) ** 0.5)))
        u = torch.rand([1, 1, *(-(-n // side) for n in y.shape[2:])], generator=gen).to(y)
        u = F.interpolate(u, scale_factor=float(side))[..., :y.shape[2], :y.shape[3]] * known
        out = u >= u.flatten().topk(max(1, round(share * known.sum().item()))).values[-1]
        self.task, self.val_task = (replace(task, mask=known * part) for part in (~out, out))
        self.y, self.val_y, self.bias = y * self.task.mask, y * self.val_task.mask, 0.0

    def risk(self, xhat: Tensor) -> float:
        """R: unbiased for the mean of (A_val (xhat - x))^2, for any xhat made without val_y."""
        return self.val_task.mse(xhat, self.val_y).item() - self.bias

class StopRule:
    """A score to be minimised, with patience: the held-out risk (holdout), the outputs' variance in
    a window or exponential (wmv, emv: Wang et al. 2023, Algorithms 1, 2), or newest is best."""
    def __init__(self, kind: str, patience: int = 1000, window: int = 100, alpha: float = 0.1):
        self.kind, self.patience, self.window, self.alpha = kind, patience, window, alpha
        self.best, self.best_k, self.done = math.inf, 0, False
        self.outputs, self.mean, self.square = deque(), 0.0, 0.0

    def update(self, k: int, output: Tensor, risk: float) -> bool:
        """True when `output` of iteration k is the best so far; sets done: patience has run out."""
        self.score = (self.moving_variance(output.cpu().double()) if "mv" in self.kind else
                      risk if self.kind == "holdout" else -float(k))
        if better := self.score < self.best or self.best == math.inf:
            self.best, self.best_k = self.score, k
        self.done = k - self.best_k >= self.patience
        return better

    def moving_variance(self, x: Tensor) -> float:      # E[x^2] - E[x]^2, mean over pixels
        old, rate = (self.mean, self.square), self.alpha
        if self.kind == "wmv":
            self.outputs.append(x)
            out = self.outputs.popleft() if len(self.outputs) > self.window else 0 * x
            old, rate = (out, out ** 2), 1 / self.window
        self.mean = self.mean + rate * (x - old[0])
        self.square = self.square + rate * (x ** 2 - old[1])
        few = self.kind == "wmv" and len(self.outputs) < self.window
        return math.inf if few else (self.square - self.mean ** 2).mean().item()

# Step k of iters; rung s, does it end; of the network; of the average output; the answer; net.
FitStep = namedtuple("FitStep", "k iters s ends mse input output target average risk best best_k "
                     "best_risk net")

def turned(x: Tensor, g: int) -> Tensor:    # g in 0..7: g > 3 undoes itself, -g % 4 undoes g < 4
    x = torch.rot90(x, g, (2, 3))
    return x.flip(3) if g > 3 else x

def ladder(o: Namespace, sigma: float, steps: int) -> list:
    """The level s of every step: stairs from o.high to o.low, in units of sigma (or 0.2, if 0)."""
    high, low = (o.high or (1.0 if o.method == "adapt" and sigma == 0 else 3.0), o.low)
    high, low = high * (sigma or 0.2), low * (sigma or 0.2)
    stairs = [k * o.rungs // steps / (o.rungs - 1) for k in range(steps)]           # 0 .. 1
    if o.shape == "geometric":
        return [high * (low / high) ** u for u in stairs]
    bent = o.shape == "cosine"
    return [high + (low - high) * ((1 - math.cos(math.pi * u)) / 2 if bent else u) for u in stairs]

def network_io(source, aim, y, task: Task, estimate, fixed, s: float, w: Tensor, gen) -> tuple:
    """(network input, its noise level, target in the domain of y) for a draw w of the noise."""
    if source == "fixed":
        z, level = fixed + torch.randn(fixed.shape, generator=gen).to(y) / 30, 1 / 30
    elif source == "observed":
        z, level = task.interpolate(y) + s * w, math.hypot(s, task.sigma)                    # z1
    else:
        z, level = estimate + s * w, s
    if aim == "conjugate" and task.sigma > 0:
        return z, level, y - task.sigma ** 2 / s * task.forward(w)                           # z2
    return z, level, y + s * task.forward(w) if aim == "noisy" else y

def descend(net, opt, o, y, task: Task, levels: list, k: int, average, gen, fixed, prior):
    """Down the ladder, a step of Adam a level, after k steps; yields FitStep's first fields."""
    source, aim = (own or usual for own, usual in zip((o.input, o.target), METHODS[o.method]))
    source = "estimate" if source == "observed" and not (task.sigma or o.input) else source
    rung, turns = None, 8 if aim == "conjugate" and task.sigma > 0 and o.flips else 1
    for k, (s, ahead) in enumerate(zip(levels, levels[1:] + [None]), k + 1):
        if s != rung or o.fresh:
            w = torch.randn(average.shape, generator=gen).to(y)
        if s != rung:
            rung, estimate = s, average
        z, level, target = network_io(source, aim, y, task, estimate, fixed, s, w, gen)
        g = int(torch.randint(turns, (), generator=gen))
        x = turned(z, g).contiguous(memory_format=torch.channels_last)
        output = turned(net(x, level), g if g > 3 else -g % 4)
        loss = mse = task.mse(output, target)
        for scale in (1, 2, 4) if o.loss == "gradient" else ():         # perceptual: edges count
            error = F.avg_pool2d(task.forward(output) - target, scale, ceil_mode=True)
            loss = loss + sum((error.diff(dim=d) ** 2).sum() for d in (2, 3)) / error.numel()
        if o.method == "guide":             # RED-diff, Mardani et al. 2024: a denoiser as a prior
            with torch.no_grad():
                denoised = prior(output + s * torch.randn(w.shape, generator=gen).to(y), s)
            loss = loss + ((output - denoised) ** 2).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite at iteration {k}")
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = o.lr * min(1, k / 50)
        opt.step()
        average = average.lerp(output.detach(), max(0.01, min(1, 5 / k)))    # of k / 5, at most 100
        average = task.project(average, y) if task.sigma == 0 else average
        yield k, s, s != ahead, mse.item(), z, output.detach(), target, average

def fit_dip(y: Tensor, task: Task, prior=None, *, seed=0, **settings) -> abc.Iterator[FitStep]:
    """Fit networks to y (N x C x h x w, y = A x + sigma n); the last `best` is their mean answer.
    With 'holdout' each sees its part of the split until 1 - tail of the steps or `patience` are at
    an end, then, from its best weights, all of y. FloatingPointError: a loss that is not finite."""
    o = Settings(**settings)
    adapt, lr, nets = o.method == "adapt", o.lr, o.nets or 1 + (o.method == "staged")
    iters = o.iters or (ADAPT_ITERS if adapt else DIP_ITERS[task.sigma > 0])
    gen, channels, aim = stream(seed, FIT), y.shape[1], o.target or METHODS[o.method][1]
    o.tail = 0.25 * (aim == "conjugate") if o.tail is None else o.tail      # others overfit then
    torch.manual_seed(stream(seed, INIT).initial_seed())
    held = HeldOut(y, task, gen, o.hold) if o.stop == "holdout" else None
    total = blind = 0.0             # of the nets before: sum of answers, of those blind to val_y
    for n in range(nets):
        cin, skip = (32, 4) if "fixed" == (o.input or METHODS[o.method][0]) else (channels, 16)
        o.lr = lr or ((1e-4 if task.sigma > 0 else 5e-4) if adapt and n == 0 else 0.01)
        net = copy.deepcopy(prior) if adapt and n == 0 else SkipNet(    # adapt: a DDPM, then DIPs
            cin, channels, o.width, o.depth, o.skip or skip, o.norm, o.upsample)
        net = net.to(y.device, memory_format=torch.channels_last)
        opt = torch.optim.Adam(net.parameters(), lr=o.lr, fused=True)
        rule, weights = StopRule(o.stop, o.patience), None
        best = held.task.interpolate(held.y) if held else task.interpolate(y)
        fixed = torch.rand((1, 32, *best.shape[2:]), generator=gen).to(y) / 10       # the DIP's z
        for again in (False, True) if held else (False,):   # again: with all of y, from the best on
            seen, seen_task = (held.y, held.task) if held and not again else (y, task)
            first, last = 0, max(1, round((1 - o.tail) * iters)) if held else iters
            if again:
                net.load_state_dict(weights)
                blind = blind + best
                first, last = rule.best_k, round(rule.best_k / (1 - o.tail))
            levels = ladder(o, seen_task.sigma, iters)[first:last]
            for k, *step, average in descend(net, opt, o, seen, seen_task, levels, first, best,
                                             gen, fixed, prior):
                mixed, fair = ((v + average) / (n + 1) for v in (total, blind))
                risk = held.risk(fair) if held and not again else math.nan
                if again or rule.update(k, step[4] if "mv" in o.stop else mixed, risk):
                    best = average
                    if held and not again:
                        weights = {name: p.clone() for name, p in net.state_dict().items()}
                done = n and not again and 2 * k < iters        # too early to count the new net in
                yield FitStep(n * iters + k, nets * iters, *step, mixed, risk,
                              total / n if done else (total + best) / (n + 1),
                              n * iters + rule.best_k, rule.best if held else math.nan, net)
                if rule.done and not again:
                    break
        total = total + best

def in_tiles(net, y: Tensor, task: Task, turns: int = 1) -> Tensor:     # the answer of fit_crops
    z = task.interpolate(y)
    x = sum(turned(tiled(net, turned(z, g), task.sigma), -g % 4) for g in range(turns)) / turns
    return x if task.sigma > 0 else task.project(x, y)

def fit_crops(y: Tensor, task: Task, prior=None, *, seed=0, **settings) -> abc.Iterator[FitStep]:
    """fit_dip of a large y at a cost that hardly grows with it: each step sees 16 new crops;
    averaged weights run over y in tiles, eight times: `average`, `risk` and so `best`."""
    o, gen, best, ema = Settings(**settings), stream(seed, TRAIN), task.interpolate(y), None
    held = HeldOut(y, task, gen, o.hold) if o.stop == "holdout" else None
    rule, seen, its = StopRule(o.stop), *((held.y, held.task) if held else (y, task))
    iters, lr = (500, 5e-4) if o.method == "adapt" else (5000 if task.sigma > 0 else 1000, 3e-3)
    settings |= dict(iters=o.iters or iters, lr=o.lr or lr, stop="fixed", nets=1, input="observed")
    both = seen if its.mask is None else torch.cat([seen, its.mask], 1)     # are cropped together
    draw = functools.partial(random_patches, both, 16, 64 // task.scale, gen)
    part, mask = (crops := draw()).split([y.shape[1], both.shape[1] - y.shape[1]], 1)
    part_task = replace(its, mask=None if its.mask is None else mask)
    for step in fit_dip(part, part_task, prior, seed=seed, **settings):
        ema, last = ema or copy.deepcopy(step.net).eval(), step.k == step.iters
        for p, q in zip(ema.state_dict().values(), step.net.state_dict().values()):
            p.copy_(p + max(0.01, min(1, 5 / step.k)) * (q - p))
        step.net.train(step.k < 50)     # then BatchNorm no longer removes a crop's own contrast
        if step.k % max(1, step.iters // 8) == 0 or last:
            step = step._replace(average=in_tiles(ema, y, task, 4 if last else 1), risk=held.risk(
                in_tiles(ema, held.y, its)) if held else math.nan)
            best = step.average if rule.update(step.k, step.average, step.risk) else best
        risk = rule.best if held else math.nan
        yield step._replace(best=best, best_k=rule.best_k, best_risk=risk)
        crops.copy_(draw())

# ---- 7. Joining the two -----------------------------------------------------------------------
def refine_x0(x0: Tensor, t: int, *, r2: Tensor, xhat, risk: float, y, task: Task) -> Tensor:
    """The DDPM's x0 at t, joined with the DIP: the mean of N(x0, r_t^2) N(xhat, R), then a proximal
    step towards A x = y, exact where y is noise-free. xhat, y: None to leave out."""
    x0, var, risk = x0.clamp(-1, 1), r2[t].item(), max(risk, 1e-8)
    if xhat is not None:
        x0, var = (x0 * risk + xhat * var) / (risk + var), var * risk / (var + risk)
    return x0 if y is None else task.project(x0, y, var / (var + task.sigma ** 2))

def reverse(prior: Prior, y: Tensor | None, task: Task, start: Tensor, t0: int, *, sigma=0.0,
            guide=None, risk=0.0, steps=20, eta=0.0, samples=4, seed=0, wrap=iter) -> Tensor:
    """Noise `start` (1 x C x H x W, with noise sigma already) to t0, then go back to t = 0. guide:
    the DIP's output or None, risk: its error's variance; sample i depends on seed + i alone."""
    gens, grey = [stream(seed + i, SAMPLE) for i in range(samples)], start.shape[1] == 1
    y, start, guide = (v if v is None or not grey else v.expand(-1, prior.channels, -1, -1)
                       for v in (y, start, guide))
    added = math.sqrt(max(prior.schedule.sigma[t0].item() ** 2 - sigma ** 2, 0))
    z = start + added * noise(torch.Size([samples, *start.shape[1:]]), gens).to(start)
    u = guide if prior.shift and guide is not None else 0 * start      # x - u diffuses; usually x
    xt = (z - u) * prior.schedule.abar[t0].sqrt().item()             # x_t0 ~ q(x_t0 | x) or xhat
    join = functools.partial(refine_x0, r2=prior.r2, xhat=guide, risk=risk, y=y, task=task)
    out = u + ddim_sample(lambda x, t: tiled(prior.model, u + x, t), prior.schedule,
                          xt, t0, steps, gens, eta, lambda x0, t: join(u + x0, t) - u, wrap)
    return out.mean(1, keepdim=True) if grey else out

# ---- 8. Metrics -------------------------------------------------------------------------------
def in_db(mse: float, data_range: float = 2.0) -> float | None:     # None: an estimate below 0
    return 10 * math.log10(data_range ** 2 / mse) if mse > 0 else math.inf if mse == 0 else None

def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB; inf for equal images."""
    return in_db(((a.cpu().double() - b.cpu().double()) ** 2).mean().item(), data_range)

def ssim(a: Tensor, b: Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004) of N x C x H x W, H and W >= 11 (else ValueError):
    Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, population covariance, no padding."""
    if min(a.shape[-2:]) < 11:
        raise ValueError("ssim needs images of at least 11 x 11 pixels")
    a, b = (v.cpu().double().flatten(0, 1)[:, None] for v in (a, b))
    g = torch.exp(-torch.arange(-5, 6, dtype=a.dtype) ** 2 / (2 * 1.5 ** 2))
    maps = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), (g / g.sum()).view(1, 1, 11, 1))
    ma, mb, aa, bb, ab = F.conv2d(maps, (g / g.sum()).view(1, 1, 1, 11)).chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    num = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    den = (ma ** 2 + mb ** 2 + c1) * (aa - ma ** 2 + bb - mb ** 2 + c2)
    return (num / den).mean().item()

def quality(xhat: Tensor, x: Tensor | None, both: bool = True) -> tuple:    # (psnr, ssim) or None
    if x is None or xhat is None or x.shape != xhat.shape:
        return None, None
    xhat = xhat.clamp(-1, 1)
    return psnr(xhat, x, 2.0), ssim(xhat, x, 2.0) if both and min(x.shape[-2:]) > 10 else None

@torch.no_grad()
def features(x: Tensor, inception: nn.Module | None = None) -> Tensor:
    """N x C x H x W to N x D features: of a fixed random network, or of FID's Inception."""
    x, gen = x.expand(-1, 3, -1, -1), stream(0, INIT)
    if inception:
        return inception((x + 1) * 127.5, return_features=True).flatten(1).double()
    for cin, cout in ((3, 32), (32, 64), (64, 64)):
        weight = torch.randn(cout, cin, 3, 3, generator=gen) * math.sqrt(2 / (9 * cin))
        x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
    return F.adaptive_avg_pool2d(x, 2).flatten(1).double()

def frechet(a: Tensor, b: Tensor) -> float:
    """Distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6)."""
    (ma, ca), (mb, cb) = ((v.mean(0), v.T.cov(correction=int(len(v) > 1))) for v in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return (((ma - mb) ** 2).sum() + ca.trace() + cb.trace() - 2 * cross).item()

def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> dict:
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020)."""
    balls = [torch.cdist(v, v).sort(1).values[:, :k + 1][:, -1] for v in (real, fake)]
    d = torch.cdist(real, fake)
    inside = d < balls[0][:, None]
    shares = inside.any(0), (d < balls[1]).any(1), inside.sum(0) / k, inside.any(1)
    names = "precision recall density coverage".split()
    return dict(zip(names, (v.double().mean().item() for v in shares)))

# ---- 9. Files, figures, progress --------------------------------------------------------------
def fail(message: str):
    """One line on stderr, exit code 2. Every message names the flag and the remedy."""
    print(f"error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)

def save(path: str, data):
    """Write all of a file or nothing: an image, rows (.csv), a checkpoint (.pt), JSON or text."""
    buffer = io.BytesIO()
    if isinstance(data, Image.Image):
        data.save(buffer, "PNG")
    elif path.endswith(".pt"):
        torch.save(data, buffer)
    elif path.endswith(".csv"):
        names = dict.fromkeys(name for row in data for name in row)
        for line in [names, *([row.get(name) for name in names] for row in data)]:
            buffer.write((",".join("" if v is None else f'"{v}"' for v in line) + "\n").encode())
    else:
        text = data if isinstance(data, str) else json.dumps(data, indent=1, default=str)
        buffer.write(text.replace("Infinity", "null").encode())
    part = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as f:
            f.write(buffer.getbuffer())
            os.fsync(f.fileno())                        # on the disk before it takes the name
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(part)
        fail(f"--out: cannot write {path} ({e.strerror}); name a folder you may write to")

def to_tensor(path: str) -> Tensor:
    """Any picture to 1 x C x H x W in [-1, 1]: upright, C = 1 or 3, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(path))
    deep = image.mode.startswith(("I", "F"))                            # 16 bits a pixel
    if image.has_transparency_data and not deep:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if deep else image.convert("L" if image.mode in ("L", "1") else "RGB")
    pixels = np.asarray(image, np.float32) / (257 if deep else 1)
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1) / 127.5 - 1)[None]

def to_image(x: Tensor) -> Image.Image:     # 1 x C x H x W in [-1, 1] to 8 bits: rounded, clipped
    pixels = ((x[0].detach().cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))

def read(path: str, flag: str, reader, what: str):  # libraries raise many kinds of errors
    try:
        return reader(path)
    except Exception as e:
        fail(f"{flag}: cannot read {path} ({str(e).strip()[:80]}); {what}")

def load_image(path: str, flag: str = "--image") -> Tensor:
    return read(path, flag, to_tensor, "give a whole PNG, JPEG or other picture")

def photos(folder: str, flag: str) -> list:     # the pictures in a folder and below it
    files = sorted(f for f in glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
                   if re.search(r"\.(png|jpe?g|bmp|webp|tiff?)$", f, re.I) and os.path.isfile(f))
    return files or fail(f"{flag}: no pictures in {folder}; name a folder of PNG or JPEG files")

def figure(panels: list, x: Tensor | None = None) -> Image.Image:
    """Pictures (title, 1 x C x H x W, notes ..), 6 a row; below: PSNR to the clean x, notes."""
    h, w = panels[0][1].shape[-2:]
    zoom, columns = max(round(256 / max(h, w)), min(1, 1024 / max(h, w))), min(len(panels), 6)
    w, h, gap, bar = max(1, round(w * zoom)), max(1, round(h * zoom)), 8, 26
    size = columns * (w + gap) + gap, -(-len(panels) // columns) * (h + 2 * bar) + gap
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=max(9, min(17, w // 13)))
    for i, (title, image, *notes) in enumerate(panels):
        left, top = gap + i % columns * (w + gap), gap + i // columns * (h + 2 * bar)
        page.paste(to_image(image).convert("RGB").resize((w, h), Image.BOX), (left, top + bar))
        draw.text((left + w / 2, top + bar / 2), title, "black", font, "mm")
        notes = notes if x is None or image is x else [f"{quality(image, x)[0]:.2f} dB", *notes]
        draw.text((left + w / 2, top + h + bar * 1.5), ", ".join(notes), "dimgrey", font, "mm")
    return page

class Progress:
    """Runs over n steps, shows the time left. Ctrl-C: stop after the step in hand; twice: kill."""
    def __init__(self, what: str, n: int = 0):
        self.what, self.n, self.text, self.stopped = what, n, "", False
        self.count, self.seconds, self.idle = 0, 0.0, 0.0       # idle: seconds not to be counted

    def over(self, steps) -> abc.Iterator:
        before, start, shown = signal.signal(signal.SIGINT, self.stop), time.monotonic(), 0.0
        try:
            for k, step in enumerate(steps, 1):
                self.seconds, self.count = time.monotonic() - start - self.idle, self.count + 1
                yield step
                n, rate = self.n or len(steps), k / max(self.seconds, 1e-9)
                if sys.stdout.isatty() and (self.seconds - shown > 0.5 or k >= n):
                    line = f"{self.what} {k}/{n}  {rate:.1f}/s  {(n - k) / rate:.0f} s left  "
                    shown, end = self.seconds, "\n" if k >= n else ""
                    print("\r" + (line + self.text)[:110].ljust(110), end=end, flush=True)
                if self.stopped:
                    break
        finally:
            signal.signal(signal.SIGINT, before)

    def stop(self, *_):
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

# ---- 10. The observation: a photo degraded here, or one that the user already has -------------
def observe(args: Namespace, path: str, text: str) -> tuple:
    """(clean x or None, observation y, Task) of one photo; tensors 1 x C x h x w, args.device."""
    name, _, number = text.partition(":")
    value = float(number) if re.fullmatch(r"\d*\.?\d+", number) else math.nan if number else None
    if not {"denoise": value is None or 0 < value <= 255, "inpaint": not value or 0 < value <= 1,
            "superres": value in (2, 3, 4, 6, 8)}.get(name):
        fail(f"--task: {text!r} is none of denoise:0..255, inpaint:0..1, superres:2|3|4|6|8")
    image, scale = load_image(path), int(value) if name == "superres" else 1
    image, unit = F.avg_pool2d(image, 1 + args.halve, ceil_mode=True), 1 if args.observed else scale
    h, w = (min(n, args.size or n) // unit * unit for n in image.shape[2:])
    if min(h, w) == 0:
        fail(f"--image: {path} is too small for --task {text}: it needs {unit} pixels a side")
    top, left = (image.shape[2] - h) // 2, (image.shape[3] - w) // 2
    image, mask = image[..., top:top + h, left:left + w].contiguous().to(args.device), None
    if args.mask:
        mask = load_image(args.mask, "--mask").mean(1, keepdim=True) > 0
    elif name == "inpaint" and value and not args.observed:
        mask = torch.rand((1, 1, h, w), generator=stream(args.seed, OBSERVE)) >= value
    few = mask is None or mask.shape[2:] != (h, w) or not mask.any() and args.init != "noise"
    if few if name == "inpaint" else args.mask:
        fail("--mask: give --task inpaint and a picture of the image's size, white = known pixels")
    task = Task(text, 0.0, scale, mask if mask is None else mask.to(image))
    x, y = None if args.observed else image, image if unit < scale else task.forward(image)
    if name == "denoise":                       # what is told, or known, or estimated
        told = value if args.told is None else args.told
        n = torch.randn(y.shape, generator=stream(args.seed, OBSERVE)).to(y)
        y = y + (value or 0) / 127.5 * (x is not None) * n       # 25 of 255 in [-1, 1]
        task.sigma = told / 127.5 if told else estimate_sigma(y)
        if not task.sigma >= 1e-4 or (value is None and x is not None):
            fail("--task: the noise level is not known; give it in 8-bit units, as in denoise:25")
        task.name = f"denoise:{value or task.sigma * 127.5:.3g}"
    return x, y, task

# ---- 11. The commands -------------------------------------------------------------------------
def run_fit(args: Namespace, y: Tensor, task: Task, x: Tensor | None, fits: dict | None) -> tuple:
    """fit_dip; only the log sees x. fits: of evaluate, all to this y; then other rules look on."""
    large = (y[0, 0].numel() * task.scale ** 2 > (400 if task.sigma > 0 else 800) ** 2
             and args.method in ("staged", "adapt") and "mv" not in args.stop and not args.input)
    if args.input == "fixed" and args.method == "adapt":
        fail("--input: a trained DDPM cannot denoise the fixed z; adapt needs observed or estimate")
    settings = {name: getattr(args, name) for name, *_ in SETTINGS} | dict(seed=args.seed)
    if args.init and args.method != "adapt" and not large:
        settings |= dict(iters=args.iters or BRIEF_ITERS, nets=args.nets or 1)
    if (key := tuple(settings.items())) in (fits or ()):
        return fits[key]
    prior = load_prior(args, "dip", y.shape[1]) if args.method in ("adapt", "guide") else None
    rows, stages, bar = [], {}, Progress("DIP")
    rules = [StopRule(r) for r in ("wmv", "emv", args.stop)] * (fits is not None and not large)
    for last in bar.over((fit_crops if large else fit_dip)(y, task, prior, **settings)):
        before, bar.n, bar.text = time.monotonic(), last.iters, f"noise {last.s * 127.5:.0f}/255"
        for rule in rules:
            if not rule.done and rule.update(last.k, last.output, last.risk):
                rule.answer = last
        if last.ends or last.k % 10 == 0:
            level, (p, q) = last.s * 127.5, quality(last.average, x, last.ends)
            aim = None if large else quality(task.forward(last.output), last.target, last.ends)[1]
            rows.append(dict(iter=last.k, seconds=bar.seconds, noise=level, risk=last.risk, psnr=p,
                             ssim=q, newest=quality(last.output, x, False)[0], ssim_target=aim,
                             psnr_risk=in_db(last.risk), psnr_target=in_db(last.mse)))
        if last.ends and fits is None and not large and last.input.shape == last.average.shape:
            stages.setdefault(f"noise {level:.0f}", (last.input, last.average))
        bar.idle += time.monotonic() - before                   # the clock is for the fit alone
    m = dict(iters=last.k, stop_iter=last.best_k, seconds_dip=bar.seconds)
    for rule in rules * (not bar.stopped):
        best = max(v["psnr"] for v in rows if rule.kind != "holdout" or v["risk"] == v["risk"])
        m[f"gap_{rule.kind}"] = best - quality(rule.answer.average, x, False)[0]
    if rules and not bar.stopped:
        best, newest = (max(v[c] for v in rows) for c in ("psnr", "newest"))
        m |= dict(oracle=best, newest_oracle=newest, gap=best - quality(last.best, x, False)[0])
        fits[key] = last, rows, stages, m, bar.stopped
    return last, rows, stages, m, bar.stopped

def prepare(args: Namespace) -> tuple:
    """(clean x or None, y, Task, Prior or None); a grid restores an image with no known pixel."""
    kind = "none" if args.init == "noise" else "dip"
    if args.image is None and (args.observed or args.mask):
        fail("--image: --observed and --mask need the photo; name it with --image FILE")
    grid = kind == "none" and args.image is None and args.task is None
    args.samples = args.samples or (16 if grid else 4)
    args.steps = args.steps or (100 if kind == "none" else 20)
    args.eta = args.eta if args.eta is not None else 1.0 - grid
    args.size = args.size or (64 if grid else 128 if args.image is None else None)
    if grid:
        prior = load_prior(args, kind, 1)
        y = torch.zeros(1, prior.channels, args.size, args.size, device=args.device)
        return None, y, Task("grid", mask=torch.zeros_like(y[:, :1])), prior
    args.image = args.image or os.path.join(PHOTOS, "test", "astronaut.png")
    args.task = args.task or ("superres:4" if args.init else "denoise:25")
    x, y, task = observe(args, args.image, args.task)
    return x, y, task, load_prior(args, kind, y.shape[1]) if args.init else None

def restore(args: Namespace, fits: dict | None = None, arm: str | None = None) -> tuple:
    """One photo by fit-dip (init None), sample or an arm of evaluate: (metrics, panels), files."""
    x, y, task, prior = prepare(args)
    how = f"init {args.init}, {args.steps} steps" if args.init else args.method
    banner(args, f"{task.name}, {args.image or 'grid'} {y.shape[3]}x{y.shape[2]}, {how}", prior)
    seen, dip, risk, stages, bar = task.interpolate(y), None, None, {}, Progress("DDPM")
    more, panels = dict(iters=0, stop_iter=0, seconds_dip=0.0), [("observed", seen)]
    if args.init in (None, "dip"):
        last, rows, stages, more, bar.stopped = run_fit(args, y, task, x, fits)
        dip, risk = last.best, None if math.isnan(last.best_risk) else last.best_risk
        panels.append(("DIP", dip))
    image, samples, middle, seconds = dip, dip, time.monotonic(), 0.0
    if args.init:
        how = dict(eta=args.eta, samples=args.samples, seed=args.seed, wrap=bar.over)
        guess = max(task.sigma, 25 / 127.5) ** 2 if risk is None else risk
        start = seen if dip is None else dip
        t0 = prior.schedule.T if args.init == "noise" else args.start
        t0 = min(t0 or prior.schedule.start_t(guess), prior.t_max)
        samples = reverse(
            prior, y if task.sigma == 0 or args.init == "noise" else None,  # or: the start tells
            task, start * (args.init != "noise"), t0, sigma=task.sigma * (args.init == "observed"),
            guide=None if args.no_guide else dip, risk=guess, steps=args.steps, **how)
        seconds = time.monotonic() - middle
        image, each = samples.mean(0, keepdim=True), [quality(v[None], x) for v in samples]
        rows = [dict(seed=args.seed + i, psnr=p, ssim=q) for i, (p, q) in enumerate(each)]
        more = more | dict(
            psnr_dip=quality(dip, x)[0], psnr_mean=quality(image, x)[0], t0=t0, nfe=bar.count,
            psnr_sample=x if x is None else np.mean([p for p, _ in each]).item(),
            spread=127.5 * samples.std(0, correction=0).square().mean().sqrt().item(),
            seconds_ddpm=seconds, trained=prior.trained)
        panels += [("DDPM, one sample", samples[:1]), (f"mean of {args.samples}", image)]
    metrics = more | dict(
        zip(("psnr", "ssim"), quality(image, x)), psnr_observed=quality(seen, x)[0], risk=risk,
        seconds=more["seconds_dip"] + seconds, sigma=task.sigma * 127.5, task=task.name, arm=arm)
    grid = [(f"seed {args.seed + i}", v[None]) for i, v in enumerate(samples)]
    panels = grid if task.name == "grid" else panels + [("clean", x)] * (x is not None)
    page = figure(panels, x)
    files = {"result.png": page if task.name == "grid" else to_image(image), "figure.png": page,
             "log.csv": rows} | ({"sample.png": to_image(samples)} if args.init else {})
    if stages:
        rungs = [list(stages)[i] for i in np.linspace(0, len(stages) - 1, 6).astype(int)]
        files["stages.png"] = figure([(rung, stages[rung][i]) for i in (0, 1) for rung in rungs], x)
    if not (arm and bar.stopped):                           # of evaluate: nothing by halves
        for name, data in (files | {"metrics.json": vars(args) | metrics}).items():
            save(os.path.join(args.out, name), data)
    print(", ".join(f"{k} {v:.2f}" for k, v in metrics.items() if isinstance(v, float)),
          f"-> {os.path.join(args.out, 'result.png')}, figure.png", flush=True)
    if bar.stopped:
        raise KeyboardInterrupt
    return metrics, panels

def cmd_restore(args: Namespace):
    """fit-dip and sample; of a folder, which torchrun shares, each photo into its own folder."""
    folder, (rank, world) = os.path.isdir(args.image or ""), ranks()
    for image in (photos(args.image, "--image") if folder else [args.image])[rank::world]:
        out = os.path.join(args.out, os.path.relpath(image, args.image)) if folder else args.out
        restore(Namespace(**vars(args) | dict(image=image, out=out)))

def load_data(path: str, patch: int) -> tuple:
    """(list of uint8 C x H x W, patch): a folder of pictures, or an .npz/.npy array of them."""
    if os.path.isdir(path):
        files = photos(path, "--data")
        images = [((load_image(f, "--data")[0] + 1) * 127.5).round().byte() for f in files]
        images = [i.expand(max(map(len, images)), -1, -1) for i in images]      # grey to colour
    else:
        images = read(path, "--data", load_array, "give a folder, or uint8 N x H x W (x 3) .npz")
    patch = min(patch, max(min(i.shape[1:]) for i in images))
    return [i for i in images if min(i.shape[1:]) >= patch], patch

def load_array(path: str) -> list:          # the first array of an .npz or .npy, as C x H x W
    data = data if isinstance(data := np.load(path), np.ndarray) else data[data.files[0]]
    if data.dtype != np.uint8 or data.shape[3:] not in ((), (1,), (3,)) or not data.size:
        raise ValueError(f"it holds {data.dtype} of shape {data.shape}")
    return list(torch.from_numpy(data.reshape(*data.shape[:3], -1)).permute(0, 3, 1, 2))

def load_state(path: str) -> dict:          # an error if it is no checkpoint, or not whole
    return Prior(state := torch.load(path, map_location="cpu", weights_only=True)) and state

def load_prior(args: Namespace, kind: str, channels: int) -> Prior:
    """The Prior in --ckpt, or the default one of this kind, trained on the spot when missing."""
    path = args.ckpt or os.path.join("runs", "train", f"{kind}.pt")
    if not args.ckpt and not os.path.exists(path) and ranks()[1] == 1:
        print(f"no prior yet: training {path} on images/train, once, about 4 minutes on two cores")
        part = os.path.join("runs", "train", "part")        # a prior only when it is whole
        more = ["--resume"] * os.path.exists(os.path.join(part, f"{kind}.pt"))
        more += ["--device", args.device.type, "--out", part] + ["--bf16"] * args.bf16
        if main(["train", "--prior", kind, *more]):
            raise KeyboardInterrupt
        os.replace(os.path.join(part, f"{kind}.pt"), path)
    prior = Prior(read(path, "--ckpt", load_state, "train a prior"))
    if prior.channels < channels or kind == "none" and prior.t_max < prior.schedule.T:
        fail(f"--ckpt: {path} knows {prior.channels} channels, t <= {prior.t_max}; train another")
    return prior.to(args.device, memory_format=torch.channels_last)

def new_state(args: Namespace, channels: int, patch: int) -> dict:
    """A checkpoint before its first step: a plain dict that weights_only=True can read."""
    config = {c: getattr(args, c) for c in ("schedule", "prior", "batch", "lr", "seed")}
    config |= dict(unet=dict(channels=channels, width=args.width // 8 * 8), T=1000, patch=patch)
    first_rung = NoiseSchedule(1000, args.schedule).start_t(0.6 ** 2)
    config["t_max"] = args.t_max or (first_rung if args.prior == "dip" else 1000)
    torch.manual_seed(stream(args.seed, INIT).initial_seed())
    weights = UNet(**config["unet"]).state_dict()
    return dict(config=config, step=0, model=weights, ema=weights, optimiser={}, rng=None, log=[],
                eps_loss=torch.ones(1001))

def cmd_train(args: Namespace) -> int:
    path, (rank, world) = os.path.join(args.out, f"{args.prior}.pt"), ranks()
    state = read(path, "--resume", load_state, "train anew") if args.resume else None
    images, patch = load_data(args.data, state["config"]["patch"] if state else args.patch)
    images += [F.avg_pool2d(i[None].float(), 2)[0].round().byte() for i in images * args.halve
               if min(i.shape[1:]) >= 2 * patch]
    state = state or new_state(args, len(images[0]), patch)
    c, rows, step = state["config"], state["log"], state["step"]
    net = UNet(**c["unet"]).to(args.device, memory_format=torch.channels_last)
    net.load_state_dict(state["model"])
    (ema := copy.deepcopy(net)).load_state_dict(state["ema"])
    state.update(model=net.state_dict(), ema=ema.state_dict())          # from now on, always live
    if (net.channels, c["patch"]) != (len(images[0]), patch):
        fail(f"--data: the checkpoint is for {net.channels} channels, {c['patch']} pixels a side")
    banner(args, f"{len(images)} images, prior {c['prior']}, t <= {c['t_max']}, "
                 f"{c['patch']}x{c['patch']}, steps {step} to {args.steps}", net)
    keep = save if rank == 0 else lambda *_: None                       # the first writes alone
    if world > 1:
        torch.distributed.init_process_group()
        net = nn.parallel.DistributedDataParallel(net)                  # averages the gradients
    bar, dips = Progress("DDPM", args.steps - step), Progress("DIP")
    for n, image in enumerate(dips.over(images) if c["prior"] == "shift" else ()):
        *_, last = fit_dip(image[None].to(args.device) / 127.5 - 1, Task("shift"), method="dip",
                           stop="fixed", iters=50)              # u, a classic DIP, barely fitted
        images[n] = torch.cat([image, ((last.output[0].cpu() + 1) * 127.5).round().byte()])
    before = rows[-1]["seconds"] if rows else dips.seconds
    for loss in bar.over(() if dips.stopped else train_ddpm(
            state, net, ema, NoiseSchedule(c["T"], c["schedule"]), images, args.steps)):
        step, bar.text = state["step"], f"{loss:.3f}"
        if not math.isfinite(loss):
            fail(f"--lr: the loss is not finite at step {step}; lower it and train again")
        if step % 50 == 0 or step == args.steps:
            rows.append(dict(step=step, seconds=before + bar.seconds, loss=loss))
        if step % 500 == 0:
            keep(path, state)
        if args.keep and step % args.keep == 0:
            keep(f"{path[:-3]}-{step:06d}.pt", state | dict(model=state["ema"], optimiser={}))
    keep(path, state)
    keep(os.path.join(args.out, "log.csv"), rows)
    keep(os.path.join(args.out, "metrics.json"), dict(
        psnr=None, seconds=before + bar.seconds, step=step, eps_loss=state["eps_loss"].tolist()))
    print(f"{step} steps in {before + bar.seconds:.0f} s -> {path}", flush=True)
    return 130 if bar.stopped or dips.stopped else 0

def banner(args: Namespace, text: str, net: nn.Module | None = None):   # what was chosen
    text += f", {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters" if net else ""
    print(f"{args.command}: {text} | {args.device.type}, {torch.get_num_threads()} threads, seed "
          f"{args.seed} -> {args.out}", flush=True)

# ---- 12. Evaluation: the tables of README.md and report.md ------------------------------------
SUITES = {      # tasks, arms; {a|b} stands for one command line with a and one with b. Ablations:
    "stopping": ("denoise:25,inpaint:0.8,superres:4",                      # --arms in report.md
                 "fit-dip{| --nets 1};fit-dip --method {adapt|targets|selfdiff|guide|"
                 "dip --iters 1800 --stop fixed}"),
    "init": ("superres:4,inpaint:0.8",
             "sample --init dip --iters {100|200|400|800}{| --no-guide};fit-dip --method adapt;"
             "sample --init {observed|observed --start 90|noise --steps 20|noise --steps 100|"
             "noise --steps 200};fit-dip --nets 1 --iters {300|500}"),
    "training": ("denoise:15,denoise:25,denoise:50",                       # what train --keep left
                 "sample --init observed --steps 1 --samples 1 --ckpt {"
                 + "|".join(sorted(glob.glob("runs/train/*.pt")) or ["runs/train/none.pt"]) + "}"),
    "generation": ("denoise:10",                                    # --images TARGETS --held OTHERS
                   "sample --samples 1 --init noise --task inpaint:1 --steps {10|20|50|100|200};"
                   "sample --samples 1 --init dip --no-guide --iters 100 --start {200|400|600}"),
    "ablation": ("denoise:25",
                 "fit-dip --nets 1{| --high 6| --low 0.2| --rungs 5| --fresh 0| --input fixed|"
                 " --target plain| --flips 0| --width 64| --depth 2| --loss gradient| --told 0}")}
COLUMNS = ("psnr ssim seconds stop_iter oracle newest_oracle gap gap_holdout gap_wmv gap_emv "
           "psnr_dip psnr_sample spread seconds_dip nfe t0 trained").split()
slug = functools.partial(re.sub, r"[^\w.]+", "-")           # a text to the name of a file

def expand(text: str) -> list:              # the command lines that `text` stands for
    parts = [p.split("|") if i % 2 else [p] for i, p in enumerate(re.split(r"[{}]", text))]
    return ["".join(choice) for choice in itertools.product(*parts)]

def markdown(rows: list) -> str:
    """Means over photos and seeds; std: of the seeds' means; gap: mean / worst / over 1 dB."""
    table = [["task", "arm", "n", *COLUMNS, "std"]]
    for key in dict.fromkeys((r["task"], r["arm"]) for r in rows):
        group = [r for r in rows if (r["task"], r["arm"]) == key]
        table.append([*key, str(len(group))])
        for c in COLUMNS:
            v = [r[c] for r in group if r.get(c) is not None]
            worst = f" / {max(v):.2f} / {sum(g > 1 for g in v)}" if v and c[:3] == "gap" else ""
            table[-1].append(f"{np.mean(v):.{3 if c == 'ssim' else 2}f}{worst}" if v else "")
        seeds = {r["seed"] for r in group}
        means = [np.mean([r["psnr"] for r in group if r["seed"] == s]) for s in seeds]
        table[-1].append(f"{np.std(means, ddof=1):.2f}" if len(means) > 1 else "")
    names, *lines = zip(*(c for c in zip(*table) if any(c[1:])))
    return "".join(f"| {' | '.join(v)} |\n" for v in (names, ["---"] * len(names), *lines))

def compare_sets(args: Namespace, files: list, arms: list, folder: str):       # with --held
    def of(paths: list) -> Tensor:
        return torch.cat([features(load_image(p, "--held"), net) for p in paths])
    net = args.inception and read(args.inception, "--inception", torch.jit.load, "no TorchScript")
    real, rows, name = of(photos(args.held, "--held")), [], "FID" if net else "rFD"
    for arm in ["the targets", *arms]:
        found = glob.glob(os.path.join(glob.escape(folder), "*", slug(arm), "result.png"))
        fake = of(found if rows else files)
        numbers = {name: frechet(real, fake)} | precision_recall(real, fake)
        rows.append(dict(arm=arm, n=len(fake)) | numbers)
        print(arm, len(fake), *(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)
    save(os.path.join(args.out, "sets.csv"), rows)

def measure_speed(args: Namespace):
    """A step of each command: ms (median of 20), GFLOP/s, by a matrix product's, peak MB so far."""
    x, mac = torch.randn(1024, 1024).to(args.device), sys.platform == "darwin"
    state, schedule = new_state(make_parser().parse_args(["train"]), 3, 48), NoiseSchedule()
    net = UNet(**state["config"]["unet"]).to(args.device, memory_format=torch.channels_last)
    jobs = {"1024 x 1024 matrix product": ((x @ x).sum().item() for _ in itertools.count())}
    for side, width in itertools.product((32, 64) if args.quick else (128, 256), (32, 64)):
        jobs[f"fit-dip --width {width}, {side} x {side}"] = fit_dip(
            torch.rand(1, 3, side, side).to(x), Task("denoise", 0.2), nets=1, width=width)
    xt, rows = torch.randn(4, 3, 128, 128).to(x), []
    jobs["train, 16 x 48 x 48"] = train_ddpm(state, net, copy.deepcopy(net), schedule, xt, 99)
    jobs["sample, 4 x 128 x 128"] = (ddim_sample(net, schedule, xt, 9, 1, []).sum().item()
                                     for _ in itertools.count())
    for name, steps in jobs.items():
        with FlopCounterMode(display=False) as counter:
            next(steps)
        clock = [time.perf_counter() for _ in itertools.islice(steps, 23)]
        ms = 1e3 * np.median(np.diff(clock[2:]))
        rows.append({"step": name, "ms": ms, "GFLOP/s": counter.get_total_flops() / ms / 1e6})
        rows[-1]["ratio"] = rows[-1]["GFLOP/s"] / rows[0]["GFLOP/s"]
        with contextlib.suppress(ImportError):                              # Windows has none
            from resource import RUSAGE_SELF, getrusage                     # a Mac counts bytes
            rows[-1]["peak MB"] = getrusage(RUSAGE_SELF).ru_maxrss / 2 ** (20 if mac else 10)
        print(*(f"{k} {v:.4g}" if k != "step" else v for k, v in rows[-1].items()), flush=True)
    save(os.path.join(args.out, "speed.csv"), rows)

def cmd_evaluate(args: Namespace):
    """Run the suites, every arm on every photo, unless its folder has a metrics.json already."""
    files, (rank, world) = photos(args.images, "--images")[:1 if args.quick else None], ranks()
    shared = ["--size", str(args.size or 128)] + ["--halve"] * args.halve + ["--bf16"] * args.bf16
    quick = ["--size", "32", "--iters", "20"] * args.quick
    if args.suite in ("speed", "all"):
        measure_speed(args)
    for name in SUITES if args.suite == "all" else {args.suite} - {"speed"}:
        tasks, text = (a or b for a, b in zip((args.task, args.arms), SUITES[name]))
        arms = list(dict.fromkeys(" ".join(a.split()) for p in text.split(";") for a in expand(p)))
        for arm in arms:                                    # a bad one ends it now
            if arm.split(" ")[0] not in BOTH.split() or not make_parser().parse_args(arm.split()):
                fail(f"--arms: {arm!r} is no command line of fit-dip or sample")
        banner(args, f"{name}: {len(files)} photos x {tasks} x {args.seeds} seeds")
        folder = os.path.join(args.out, name + "".join(shared))
        own = args.seeds * (name == "generation")           # a seed for each photo: other noise
        jobs = [*itertools.product(range(args.seeds), enumerate(files), tasks.split(","))]
        for k, (n, file), task in jobs[rank::world]:
            seed = args.seed + 100 * (k + n * own)
            flags = shared + ["--image", file, "--task", task, "--seed", str(seed)]
            where = slug(f"{os.path.relpath(file, args.images)} {task} {seed}")
            panels, fits = [], {}
            for arm in arms:
                words, out = arm.split(), os.path.join(folder, where, slug(arm))
                given = make_parser().parse_args(words[:1] + flags + words[1:] + quick)
                given.device, given.out = args.device, out
                if not os.path.exists(os.path.join(out, "metrics.json")):
                    m, ends = restore(given, fits, arm)
                    note = f"{m.get('nfe', 0)} calls, {m['seconds']:.1f} s"
                    panels.append((arm[-30:], ends[-2][1], note))
            if panels:
                page = figure([ends[0], *panels, ends[-1]], ends[-1][1])
                save(os.path.join(folder, where, "figure.png"), page)
        found = glob.glob(os.path.join(glob.escape(folder), "*", "*", "metrics.json"))
        rows = sorted((json.loads(open(f).read()) for f in sorted(found)), key=lambda r: (
            r["task"], arms.index(r["arm"]) if r["arm"] in arms else len(arms)))
        save(os.path.join(args.out, f"{name}.csv"), rows)
        save(os.path.join(args.out, f"{name}.md"), markdown(rows))
        print(markdown(rows))
        if args.held and rank == 0:
            compare_sets(args, files, arms, folder)

# ---- 13. The command line ---------------------------------------------------------------------
BOTH, ALL = "fit-dip sample", "fit-dip sample train evaluate"
FLAGS = (       # commands, flag, default, kind: (type, lowest, highest), choices, True or None
    ("evaluate", "suite", "all", [*SUITES, "speed", "all"], "which tables"),
    (BOTH, "--image", None, None, "a photo: clean, unless --observed (a shipped one)"),
    (BOTH + " evaluate", "--task", None, None, "denoise:SIGMA, inpaint:SHARE missing, superres:S"),
    (BOTH, "--observed", False, True, "--image is degraded already; denoise estimates the noise"),
    (BOTH, "--mask", None, None, "for inpaint: picture of the image's size, white = known"),
    (BOTH, "--told", None, (float, 0, 255), "denoise: sigma told to the method, 0 = estimated"),
    (BOTH, "--ckpt", None, None, "prior (runs/train/*.pt, trained if missing)"),
    ("sample", "--init", "noise", ["noise", "observed", "dip"], "what the DDPM starts from"),
    ("sample", "--start", None, (int, 1, 1000), "t0 <= train --t-max, or auto: start rule (auto)"),
    ("sample", "--steps", None, (int, 1, 1000), "reverse steps (20; from noise 100)"),
    ("sample", "--samples", None, (int, 1, 1024), "samples K (4; grid 16)"),
    ("sample", "--no-guide", False, True, "no precision guidance by the DIP"),
    ("sample", "--eta", None, (float, 0, 1), "0 DDIM .. 1 ancestral noise (1; grid 0)"),
    ("train", "--data", os.path.join(PHOTOS, "train"), None, "folder of pictures, or an .npz"),
    ("train", "--prior", "none", ["none", "dip", "shift"], "none: all t; dip: t <= --t-max"),
    ("train", "--t-max", None, (int, 1, 1000), "largest t (none: 1000; dip: by the start rule)"),
    ("train", "--schedule", "linear", ["linear", "cosine"], "noise schedule"),
    ("train", "--steps", TRAIN_STEPS, (int, 1, 10 ** 8), "training steps"),
    ("train", "--batch", 16, (int, 1, 4096), "patches a step"),
    ("train", "--patch", 48, (int, 4, 1024), "side of the patches, pixels"),
    ("train", "--keep", 0, (int, 0, 10 ** 8), "also keep the weights of each so many steps"),
    ("train", "--resume", False, True, "go on from the checkpoint in --out"),
    ("evaluate", "--images", os.path.join(PHOTOS, "test"), None, "folder of photos"),
    ("evaluate", "--arms", "", None, "command lines of fit-dip and sample, with ; between"),
    ("evaluate", "--held", None, None, "generation: folder of held-out pictures to compare with"),
    ("evaluate", "--inception", None, None, "TorchScript Inception: FID instead of rFD"),
    ("evaluate", "--seeds", 1, (int, 1, 99), "how many seeds: --seed, --seed + 100, .."),
    ("evaluate", "--quick", False, True, "one photo, 32x32, 20 iterations: a check"),
    ("train", "--width", 48, (int, 8, 1024), "channels, in eights"),
    ("train", "--lr", 1e-3, (float, 1e-9, 10), "learning rate of Adam"),
    (ALL, "--halve", False, True, "average 2x2 pixels of the photo (train: of copies)"),
    (BOTH + " evaluate", "--size", None, (int, 1, 10 ** 5), "centre crop (128; of --image all)"),
    (ALL, "--seed", 0, (int, 0, 10 ** 9), "of all that is random"),
    (ALL, "--device", "auto", ["auto", "cpu", "cuda", "mps"], "where to run"),
    (ALL, "--bf16", False, True, "networks in bfloat16: faster where the machine has it"),
    (ALL, "--out", None, None, "folder for what is written (runs/COMMAND)"),
) + tuple((BOTH, "--" + name, default, kind, text) for name, default, kind, text in SETTINGS)

def in_range(default, kind, low, high, text: str):     # an argparse type; auto: the default
    with contextlib.suppress(ValueError):
        value = default if text == "auto" else kind(text)
        if value is None or low <= value <= high:
            return value
    raise ArgumentTypeError(f"{text!r} is no {kind.__name__} in {low}..{high}")

def make_parser() -> ArgumentParser:
    parser, parsers = ArgumentParser(description=__doc__.split("\n")[0]), {}
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("fit-dip", "fit a Deep Image Prior to one photo; it stops by itself"),
                       ("train", "train a DDPM prior on a folder of photos or an array"),
                       ("sample", "reverse diffusion from noise, the observation, or a DIP"),
                       ("evaluate", "the tables of README.md and report.md")):
        parsers[name] = commands.add_parser(name, help=text, description=text)
    for names, flag, default, kind, text in FLAGS:
        text += f" ({default})" if kind is not True and default is not None else ""
        options = dict(action="store_true") if kind is True else dict(default=default)
        if isinstance(kind, list):
            options |= dict(choices=kind) | ({} if flag[0] == "-" else dict(nargs="?"))
        elif isinstance(kind, tuple):
            options["type"] = functools.partial(in_range, default, *kind)
        for name in names.split():
            parsers[name].add_argument(flag, help=text, **options)
    parsers["fit-dip"].set_defaults(init=None, no_guide=False, samples=None, steps=None, eta=None)
    for p in (parser, *parsers.values()):
        p.error = fail                                                      # one line
    return parser

def main(argv: list | None = None) -> int:
    """Run one command (argv without the program's name); returns the exit code."""
    args = make_parser().parse_args(argv)
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = max(have, key=have.get) if args.device == "auto" else args.device    # the first there is
    if not have[name]:
        fail(f"--device: there is no {name} here; use --device auto")
    args.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) * (name == "cuda"))
    args.out = args.out or os.path.join("runs", args.command)
    save(probe := os.path.join(args.out, f".writable{os.getpid()}"), "")
    os.remove(probe)
    if sys.platform == "linux":     # M_MMAP_, M_TRIM_THRESHOLD: keep freed memory, else page faults
        ctypes.CDLL(None).mallopt(-3, 2 ** 30), ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)
    command = dict(train=cmd_train, evaluate=cmd_evaluate).get(args.command, cmd_restore)
    try:
        with torch.autocast(name, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            return command(args) or 0
    except FloatingPointError as e:
        fail(f"--lr: {e}; lower it")
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
