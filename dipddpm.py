"""Deep Image Prior x DDPM in one file: from the equations to restored photos.

A Deep Image Prior (DIP) is an untrained network fitted to one image; a DDPM is a denoiser trained
on many images and run backwards from noise. Three lessons, to be read from the top:

    1  a DDPM (sections 1, 2, 4)                       python dipddpm.py train
    2  a DIP that learns from falling noise, as a DDPM
       does, and knows when to stop (3, 5)             python dipddpm.py fit-dip
    3  the two joined: a DDPM started by a DIP (6)     python dipddpm.py sample --init dip
       the evidence for all three (10)                 python dipddpm.py evaluate stopping

Notation (pixels lie in [-1, 1]; tensors are N x C x H x W; time t = 0..T, where t = 0 is clean):
    x, xhat, y     the clean image, an estimate of it, the observation y = A x + sigma n
    A, A^+         what the observation kept of the image, and its pseudo-inverse
    abar_t         the signal's share: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    sigma_t        sqrt((1 - abar_t) / abar_t), the noise level of x_t / sqrt(abar_t)
    a              a rung of the ladder; z1 = y + a w and z2 = y - w / a are its conjugate pair
    R, r_t^2       mean squared error of the DIP (held-out risk) and of the DDPM's x_0 at time t
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

# Before torch is loaded: a waiting thread spins for a moment and then sleeps, so that a busy
# machine does not stall a fit; and sums are taken in one order: the same seed, the same bytes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

OBSERVE, INIT, FIT, SAMPLE, TRAIN = range(5)        # what a stream of random numbers is for

def stream(seed: int, purpose: int) -> torch.Generator:
    """A random stream for each purpose: a fit never draws the observation's own noise again."""
    return torch.Generator().manual_seed(5 * seed + purpose)

def setting(default, help: str, allowed):
    """A field of a dataclass of settings that is a flag, too: one of a list, or low to high."""
    return field(default=default, metadata=dict(help=help, allowed=allowed))

# ---- 1. The diffusion process (Ho et al. 2020, sections 2 and 3) --------------------------------
# Noise is added to an image in T small steps; their sum has a closed form, so that x_t is drawn in
# one. Divided by sqrt(abar_t) it is x_0 + sigma_t eps: a photo with white noise of level sigma is
# itself such an x_t, at the t where sigma_t = sigma. That is the hinge between the two methods.

class NoiseSchedule:
    """betas, abar and sigma for t = 0..T: float64, T + 1 of each; at t = 0 there is no noise.

    kind: 'linear' (Ho et al. 2020: 1e-4 to 0.02, times 1000 / T) or 'cosine' (Nichol and Dhariwal
    2021, eq. 17); any other is a ValueError.
    """
    def __init__(self, T: int = 1000, kind: str = "linear"):
        self.T = T
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        elif kind == "cosine":
            share = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008
            f = torch.cos(share * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule must be 'linear' or 'cosine', not {kind!r}")
        # beta_0 = 0 is put in front, so that index t is time t and abar[0] = 1 is the clean image.
        self.betas = F.pad(betas.clamp(max=0.999), (1, 0))
        self.abar = torch.cumprod(1 - self.betas, 0)
        self.sigma = ((1 - self.abar) / self.abar).sqrt()

    def start_t(self, mse: float) -> int:
        """The start rule: the smallest t >= 1 whose noise hides an error of this mean square."""
        t = int(torch.searchsorted(self.sigma, math.sqrt(max(mse, 0.0))))
        return min(max(t, 1), self.T)

def per_image(values: Tensor, like: Tensor) -> Tensor:
    """N numbers as N x 1 x 1 x 1: each is a factor of one image of `like`."""
    return values.to(like.device, torch.float32).view(-1, 1, 1, 1)

def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) (Ho et al. eq. 4). x0, eps: N x C x H x W; t: N of int64."""
    abar = schedule.abar[t.cpu()]
    return per_image(abar.sqrt(), x0) * x0 + per_image((1 - abar).sqrt(), x0) * eps

def predict_x0(schedule: NoiseSchedule, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x_0 that x_t and eps imply (Ho et al. eq. 15): q_sample solved for x_0."""
    abar = schedule.abar[t.cpu()]
    return (xt - per_image((1 - abar).sqrt(), xt) * eps) / per_image(abar.sqrt(), xt)

# ---- 2. The two networks ------------------------------------------------------------------------
# Both are hourglasses with skip connections. The DIP's sees one image and no other: what it can
# draw quickly is all that it knows. The DDPM's is told the time t, and sees many images.

def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad the right and the bottom to a multiple, and to two multiples at least."""
    height, width = x.shape[-2:]
    below = max(-height % multiple, 2 * multiple - height)
    right = max(-width % multiple, 2 * multiple - width)
    mode = "reflect" if below < height and right < width else "replicate"
    return F.pad(x, (0, right, 0, below), mode=mode)

def conv_block(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution, BatchNorm, LeakyReLU: the brick of the DIP's network."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.LeakyReLU(0.2, inplace=True))

class SkipNet(nn.Module):
    """The DIP's hourglass with skip connections (Ulyanov et al. 2018); 128k parameters.

    forward(x): N x cin x H x W of any size to N x cout x H x W in [-1, 1]. A noise level may be
    given, as to the DDPM; it is not used.
    """
    def __init__(self, cin=3, cout=3, width=32, depth=4, skip=16):
        super().__init__()
        self.skip = nn.ModuleList()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for channels in [cin] + [width] * (depth - 1):
            self.skip.append(conv_block(channels, skip, 1))
            halve = conv_block(channels, width, 3, stride=2)
            self.down.append(nn.Sequential(halve, conv_block(width, width, 3)))
            merge = conv_block(width + skip, width, 3)
            self.up.append(nn.Sequential(merge, conv_block(width, width, 1)))
        self.out = nn.Conv2d(width, cout, 1)

    def forward(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Down to a sixteenth of the size, at depth 4, and up again past the skip connections."""
        height, width = x.shape[-2:]
        x = pad_to(x, 2 ** len(self.down))
        skips = []
        for skip, down in zip(self.skip, self.down):
            skips.append(skip(x))
            x = down(x)                                                       # H/2 x W/2
        for up in reversed(self.up):
            x = F.interpolate(x, scale_factor=2.0)                            # 2H x 2W
            x = up(torch.cat([skips.pop(), x], dim=1))
        return torch.tanh(self.out(x).float())[..., :height, :width]

def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (N) as N x dim, dim even (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)

class ResBlock(nn.Module):
    """A residual block without normalisation (EDSR, Lim et al. 2017); t scales and shifts it."""
    def __init__(self, cin: int, cout: int, emb: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)           # The block begins near the identity.
        self.emb = nn.Linear(emb, 2 * cout)
        self.short = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: N x cin x H x W, emb: N x emb, to N x cout x H x W."""
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        hidden = F.relu(self.conv1(x) * (1 + scale) + shift)
        return self.short(x) + self.conv2(hidden)

class UNet(nn.Module):
    """The DDPM's network eps_theta(x_t, t) (Ho et al. 2020, appendix B), on fold x fold blocks.

    forward(x, t): N x channels x H x W of any size and int64 t of length N, to the shape of x.
    """
    def __init__(self, channels=3, width=48, mults=(1, 2, 3), fold=2):
        super().__init__()
        self.channels, self.width, self.fold = channels, width, fold
        widths = [mult * width for mult in mults]
        top, emb = widths[-1], 4 * width
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(channels * fold ** 2, width, 3, padding=1)
        self.enc = nn.ModuleList()
        for cin, cout in zip([width] + widths, widths):
            self.enc.append(ResBlock(cin, cout, emb))
        self.mid = ResBlock(top, top, emb)
        self.dec = nn.ModuleList()
        for below, cout in zip([top] + widths[::-1], widths[::-1]):
            self.dec.append(ResBlock(below + cout, cout, emb))
        self.out = nn.Conv2d(widths[0], channels * fold ** 2, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise eps in x = x_t, as the network sees it."""
        height, width = x.shape[-2:]
        emb = self.time(timestep_embedding(t, self.width))
        x = pad_to(x, self.fold * 2 ** (len(self.enc) - 1))
        x = self.stem(F.pixel_unshuffle(x, self.fold))                        # H/2 x W/2
        skips = []
        for block in self.enc:
            x = F.avg_pool2d(x, 2) if skips else x                            # halved again
            x = block(x, emb)
            skips.append(x)
        x = self.mid(x, emb)
        for block in self.dec:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
            x = F.interpolate(x, scale_factor=2.0) if skips else x            # doubled
        return F.pixel_shuffle(self.out(x).float(), self.fold)[..., :height, :width]

@torch.no_grad()
def tiled(network, x: Tensor, *more, side: int = 768, margin: int = 96) -> Tensor:
    """network(x, *more) tile by tile, in bounded memory; the margin is as far as networks look."""
    out = torch.empty_like(x)
    for top in range(0, x.shape[2], side):
        for left in range(0, x.shape[3], side):
            above, before = min(top, margin), min(left, margin)
            tile = x[..., top - above:top + side + margin, left - before:left + side + margin]
            tile = network(tile, *more)[..., above:above + side, before:before + side]
            out[..., top:top + side, left:left + side] = tile
    return out

# ---- 3. The observation: y = A x + sigma n ------------------------------------------------------
# The clean image x is seen through A, which hides pixels or averages them, and through noise. The
# end of the section splits an observation in two: one part to fit, one to judge the fit by. That
# judgement, R, is the only thing that the rest of the file knows of the error of an estimate.

@dataclass
class Task:
    """What an observation kept of the image: A averages s x s pixels and hides those of the mask.

    Either there is noise (denoise: sigma > 0, scale 1, no mask), or there is none (inpaint: a mask;
    superres: scale > 1).
    """
    name: str
    sigma: float = 0.0              # standard deviation of the noise, in units of [-1, 1]
    scale: int = 1                  # s, the side of the blocks that are averaged
    mask: Tensor = torch.tensor(1.0)    # 1 known, 0 missing: 1 x 1 x h x w, or 1.0 for all

    def forward(self, x: Tensor) -> Tensor:
        """A x: N x C x H x W to N x C x H/s x W/s."""
        return F.avg_pool2d(x, self.scale) * self.mask

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, the smallest x with A x = y: each known pixel repeated s x s times."""
        return F.interpolate(y * self.mask, scale_factor=float(self.scale))

    def project(self, x: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
        """Data consistency, x - gain A^+ (A x - y) (DDNM, Wang et al. 2023, eq. 13)."""
        return x - gain * self.pinv(self.forward(x) - y)

    def keep_known(self, x: Tensor, y: Tensor) -> Tensor:
        """What was given without noise comes back as it was given."""
        if self.sigma > 0:
            return x
        return self.project(x, y)

    def mse(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of (A x - y)^2 over the known pixels."""
        return ((self.forward(x) - y) ** 2).mean() / self.mask.mean().clamp(min=1e-9)

    def interpolate(self, y: Tensor) -> Tensor:
        """A plain first guess of x: holes filled from coarse to fine, then bicubic enlargement."""
        y = fill_holes(y, self.mask)
        return F.interpolate(y, scale_factor=float(self.scale), mode="bicubic")

def fill_holes(y: Tensor, mask: Tensor) -> Tensor:
    """The missing pixels from the mean of the known ones around them, coarse to fine."""
    if mask.all() or max(y.shape[-2:]) == 1:
        return y
    weight = F.avg_pool2d(mask, 2, ceil_mode=True)
    coarse = F.avg_pool2d(y * mask, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill_holes(coarse, (weight > 0).float())
    return torch.where(mask > 0, y, F.interpolate(coarse, y.shape[-2:], mode="bilinear"))

def estimate_sigma(y: Tensor) -> float:
    """The level of white noise in y: its finest diagonal Haar band (Donoho, Johnstone 1994)."""
    y = y[..., :y.shape[-2] // 2 * 2, :y.shape[-1] // 2 * 2]
    rows = y[..., ::2, :] - y[..., 1::2, :]
    band = (rows[..., ::2] - rows[..., 1::2]) / 2
    return band.abs().median().item() / 0.6745

def hold_out(y: Tensor, task: Task, gen: torch.Generator, a: float = 0.25) -> tuple:
    """Split y before the fit: (what the fit sees, its task, and the judge of a fit, xhat -> R).

    With noise y + a w is fitted, and y - w / a judges; given x the two are independent (Pang et
    al. 2021; Oliveira et al. 2021). Without, a tenth of the known pixels judge, in squares as deep
    as the holes.
    """
    if task.sigma > 0:
        w = task.sigma * torch.randn(y.shape, generator=gen).to(y)
        floor = task.sigma ** 2 + (w ** 2).mean().item() / a ** 2
        noisier = replace(task, sigma=task.sigma * math.hypot(1, a))
        return y + a * w, noisier, partial(held_out_risk, task, y - w / a, floor)
    known = task.mask.to(y).expand(1, 1, *y.shape[2:])
    count = max(1, round(0.1 * known.sum().item()))
    side = max(1, min(hole_side(known), int(count ** 0.5)))
    rows, columns = math.ceil(y.shape[2] / side), math.ceil(y.shape[3] / side)
    # Each square draws a lot; the known pixels with the highest lots are the judges.
    squares = torch.rand((1, 1, rows, columns), generator=gen).to(y)
    lots = F.interpolate(squares, scale_factor=float(side))
    lots = (lots[..., :y.shape[2], :y.shape[3]] + 1e-3) * known
    judges = (lots >= lots.flatten().topk(count).values[-1]).to(y)
    seen = known - judges
    judge = partial(held_out_risk, replace(task, mask=judges), y * judges, 0.0)
    return y * seen, replace(task, mask=seen), judge

def held_out_risk(task: Task, y: Tensor, floor: float, xhat: Tensor) -> float:
    """R: the mean of (A (xhat - x))^2 over the held-out part, estimated without bias.

    xhat may be any image that was made without that part (Theorem 4 of report.md).
    """
    return task.mse(xhat, y).item() - floor

def hole_side(mask: Tensor) -> int:
    """The side of a square that is as deep as the mask's holes; 1 if these are scattered pixels."""
    depth = 0.0
    reached = mask
    # Known pixels grow by one ring at a time; the mean number of rings is the depth.
    while 0 < reached.mean() < 1:
        depth += ((1 - reached).sum() / (1 - mask).sum()).item()
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
    return max(1, 6 * int(depth) - 5)

# ---- 4. The DDPM: training and sampling ---------------------------------------------------------
# Lesson 1. Training asks the network for the noise in x_t; sampling takes that noise away, a little
# at a time. To run it: `dipddpm.py train`, then `dipddpm.py sample` for pictures from noise alone.

class Prior(nn.Module):
    """A trained DDPM as a denoiser, from a checkpoint: a plain dict, see `new_checkpoint`.

    r2[t] = sigma_t^2 L_t is the mean squared error of its x_0, as x0_pred - x0 = -sigma_t (eps_pred
    - eps); L_t is the training loss at t, smoothed over 31 t.
    """
    def __init__(self, state: dict):
        super().__init__()
        config = state["config"]
        self.model = UNet(**config["unet"])
        self.model.load_state_dict(state["ema"])
        self.channels, self.t_max = self.model.channels, config["t_max"]
        self.schedule = NoiseSchedule(config["T"], config["schedule"])
        loss = state["eps_loss"][None, 1:self.t_max + 1]
        loss = F.avg_pool1d(loss, 31, stride=1, padding=15, count_include_pad=False)
        # Times that were not trained count as unknown: an eps of no information has loss 1.
        loss = F.pad(loss[0], (1, config["T"] - self.t_max), value=1.0)
        self.r2 = self.schedule.sigma ** 2 * loss

    def forward(self, z: Tensor, sigma: float) -> Tensor:
        """Denoise z = x + sigma n in one call: z is x_t / sqrt(abar_t) at the t of this sigma."""
        t = min(self.schedule.start_t(sigma ** 2), self.t_max)
        ts = torch.full((len(z),), t, device=z.device)
        z3 = z.expand(-1, self.channels, -1, -1)            # grey is three equal channels
        xt = self.schedule.abar[t].sqrt().item() * z3
        x0 = predict_x0(self.schedule, xt, ts, self.model(xt, ts))
        if z.shape[1] == 1:
            return x0.mean(dim=1, keepdim=True)
        return x0

def orthogonalise(g: Tensor) -> Tensor:
    """A batch of matrices g = U S V' to about U V', by five Newton-Schulz steps x -> p x.

    The steps need x x' = p g g' p alone, a small matrix, and so the product p is all they carry.
    """
    if g.shape[1] > g.shape[2]:
        return orthogonalise(g.mT).mT
    g = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = g @ g.mT
    p = torch.eye(g.shape[1], device=g.device).expand_as(gram)
    for _ in range(5):
        a = p @ gram @ p
        p = 3.4445 * p + (2.0315 * a @ a - 4.7750 * a) @ p
    return p @ g

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: Jordan et al. 2024, for filters seen as matrices.

    torch.optim.Muon does the same, to rounding, matrix by matrix: a step of the small networks of
    this file would take half as long again. Here filters of one shape go together.
    """
    def __init__(self, filters, lr: float, momentum: float = 0.9):
        super().__init__(filters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One step along the orthogonalised momentum of each filter."""
        group = self.param_groups[0]
        by_shape = {}
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"]).flatten(1)      # Nesterov's
            by_shape.setdefault(update.shape, []).append((p, update))
        for (rows, columns), pairs in by_shape.items():
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            directions = orthogonalise(torch.stack([update for _, update in pairs]))
            for (p, _), direction in zip(pairs, directions):
                p.sub_(rate * direction.view(p.shape))

def make_optimisers(net: nn.Module, muon_lr: float, adam_lr: float) -> list:
    """Muon for the filters of a network, Adam for its other parameters; or Adam for all."""
    if muon_lr is None:
        return [torch.optim.Adam(net.parameters(), lr=adam_lr)]
    filters = [p for p in net.parameters() if p.ndim == 4]
    others = [p for p in net.parameters() if p.ndim != 4]
    return [Muon(filters, lr=muon_lr), torch.optim.Adam(others, lr=adam_lr)]

def step_all(optimisers: list, factor: float):
    """A step at a share of the learning rates."""
    for optimiser in optimisers:
        optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * factor
        optimiser.step()

def random_patches(images, count: int, side: int, gen: torch.Generator) -> Tensor:
    """Random crops of some C x H x W images: count x C x side x side."""
    patches = []
    for i in torch.randint(len(images), (count,), generator=gen).tolist():
        top = int(torch.randint(images[i].shape[1] - side + 1, (), generator=gen))
        left = int(torch.randint(images[i].shape[2] - side + 1, (), generator=gen))
        patches.append(images[i][:, top:top + side, left:left + side])
    return torch.stack(patches)

@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, rate: float):
    """Move averaged weights, and the statistics of BatchNorm, towards the model's."""
    for averaged, newest in zip(ema.state_dict().values(), model.state_dict().values()):
        averaged.copy_(averaged + rate * (newest - averaged))

class Uninterrupted:
    """A block that Ctrl-C cannot leave half done: it waits for the end of the block."""
    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        """What Ctrl-C does in the block."""
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)
        if self.asked:
            raise KeyboardInterrupt

def train_ddpm(state: dict, model, ema, images: list, steps: int, rank=0, world=1) -> Iterator:
    """Ho et al. Algorithm 1 with t uniform on 1..t_max; yields (t, the loss of each) at every step.

    images: uint8 C x H x W. state holds all that a step changes, so that a run goes on bit for bit.
    Of `world` processes, this one takes patches rank, rank + world, and so on, of each batch.
    """
    config, device = state["config"], next(model.parameters()).device
    schedule = NoiseSchedule(config["T"], config["schedule"])
    optimisers = make_optimisers(model, config["lr"], config["lr"] / 20)
    gen = stream(config["seed"], TRAIN)
    if state["step"] > 0:
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        gen.set_state(state["rng"])
    side = min(config["patch"], *(min(image.shape[1:]) for image in images))
    for step in range(state["step"] + 1, steps + 1):
        x0 = random_patches(images, config["batch"], side, gen).to(device) / 127.5 - 1
        t = torch.randint(1, config["t_max"] + 1, (config["batch"],), generator=gen)
        eps = torch.randn(x0.shape, generator=gen).to(device)
        x0, t, eps = x0[rank::world], t[rank::world], eps[rank::world]
        xt = q_sample(schedule, x0, t, eps)
        losses = ((model(xt, t.to(device)) - eps) ** 2).mean(dim=(1, 2, 3))   # Ho et al. eq. 14
        model.zero_grad()
        # Processes average their gradients: this weight makes unequal shares count by patches.
        (losses.sum() * world / config["batch"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses = losses.detach().cpu()
        with Uninterrupted():
            step_all(optimisers, min(1, step / 50))
            update_ema(ema, model, 1 - (1 - 1 / step) ** 8)     # of about the last eighth of steps
            state["eps_loss"][t] = state["eps_loss"][t].lerp(losses, 0.2)
            saved = [optimiser.state_dict() for optimiser in optimisers]
            state.update(step=step, optimisers=saved, rng=gen.get_state())
        yield t, losses

def noise_like(x: Tensor, gens: list) -> Tensor:
    """N(0, I) in the shape of x. Image i takes gens[i] alone: it is the same in any batch."""
    images = [torch.randn(x.shape[1:], generator=gen) for gen in gens]
    return torch.stack(images).to(x)

def p_sample_loop(model, schedule: NoiseSchedule, xt: Tensor, t: int, gens: list) -> Tensor:
    """Ho et al. Algorithm 2, from time t: DDIM with all steps and eta 1 (Prop. 1 of report.md)."""
    return ddim_sample(model, schedule, xt, t, t, gens, eta=1.0)

@torch.no_grad()
def ddim_sample(model, schedule: NoiseSchedule, xt: Tensor, t: int, steps: int, gens: list,
                eta: float = 0.0, refine=None) -> Tensor:
    """Reverse diffusion from x_t to t = 0 in at most `steps` network calls (Song et al. 2021).

    model(x_t, t) -> eps. xt: N x C x H x W; gens: a random stream for each image. eta: 0 for DDIM,
    1 for ancestral noise. refine(x0, t), if given, corrects each predicted x_0 (section 6).
    """
    path = torch.linspace(t, 0, min(steps, t) + 1).round().long().tolist()    # t > ... > 0
    for now, then in zip(path[:-1], path[1:]):
        abar, abar_then = schedule.abar[now].item(), schedule.abar[then].item()
        ts = torch.full((len(xt),), now, device=xt.device)
        x0 = predict_x0(schedule, xt, ts, model(xt, ts))
        x0 = x0 if refine is None else refine(x0, now)
        eps = (xt - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        # Song et al.: eq. 16 gives the fresh noise, 0 at the last step, and eq. 12 the step.
        fresh = eta * math.sqrt((1 - abar_then) / (1 - abar) * (1 - abar / abar_then))
        xt = math.sqrt(abar_then) * x0 + math.sqrt(max(0, 1 - abar_then - fresh ** 2)) * eps
        if fresh > 0:
            xt = xt + fresh * noise_like(xt, gens)
    return x0

# ---- 5. The staged fit: a DIP with DDPM-like supervision ----------------------------------------
# Lesson 2. Each step draws noise w and makes two images of the noisy photo: z1 = y + a w for the
# network to see, z2 = y - w / a to compare with. Given x their errors are independent (Lemma 2), so
# a network cannot learn the noise of one from the other: on the average it learns x. The ladder
# lowers a from rung to rung, from the most corrupted image to the least, as a DDPM's sampling does.
# What remains of overfitting, R sees. To run it: `dipddpm.py fit-dip`.

METHODS = {     # what the network sees, and what its output is compared with
    "staged": ("observed", "conjugate"),    # ours: z1 = y + a w and z2 = y - w / a, while a falls
    "dip": ("fixed", "plain"),              # Ulyanov et al. 2018: a fixed z, and y
    "targets": ("fixed", "noisy"),          # the ladder taken literally: y plus less and less noise
    "selfdiff": ("estimate", "plain"),      # Self-Diffusion, Luo and Huang 2025
    "adapt": ("observed", "conjugate"),     # as staged, but from a trained DDPM's weights
    "guide": ("fixed", "plain"),            # as dip, drawn towards what a trained DDPM denoises
}
FREE_UNIT = 0.2                 # the ladder's unit where the observation has no noise of its own
TWO_NETS_PIXELS = 256 ** 2      # for larger photos one network is enough, to save time
WHOLE_PIXELS = 800 ** 2         # those larger still are fitted on crops, in bounded memory
PATIENCE = 1000                 # steps without a better score that end a fit

@dataclass
class Settings:
    """How a DIP is fitted; each field is a flag. What is None here is set by `complete`."""
    method: str = setting("staged", "what the network sees and aims at", list(METHODS))
    stop: str = setting("holdout", "the score that picks the answer; fixed: the last stage",
                        ["holdout", "wmv", "emv", "fixed"])
    input: str = setting(None, "of the network", ["observed", "estimate", "fixed"])
    target: str = setting(None, "of the loss", ["conjugate", "plain", "noisy"])
    iters: int = setting(None, "steps of each network", (2, 10 ** 7))
    nets: int = setting(None, "networks, fitted in turn; their answers are averaged", (1, 99))
    optimiser: str = setting(None, "of the hourglass", ["muon", "adam"])
    lr: float = setting(None, "learning rate", (1e-9, 10))
    width: int = setting(32, "channels of the hourglass", (1, 1024))
    depth: int = setting(4, "levels of the hourglass", (1, 8))
    high: float = setting(None, "first rung of noise, in units of sigma, or of 0.2", (1e-3, 100))
    low: float = setting(0.4, "last rung of noise, in the same units", (1e-3, 100))
    shape: str = setting("geometric", "how the rungs fall", ["geometric", "linear", "cosine"])
    rungs: int = setting(None, "stages of each network", (1, 10 ** 7))
    fresh: int = setting(1, "draw new noise in each step (1) or in each rung (0)", (0, 1))
    turns: int = setting(1, "turn and mirror the conjugate pair (1) or not (0)", (0, 1))
    loss: str = setting("squares", "gradient: edges count, too", ["squares", "gradient"])
    hold: float = setting(0.25, "a of the pair that is split off before the fit", (1e-3, 10))
    tail: float = setting(None, "share of the rungs that see all of y, at last", (0, 0.9))
    crop: int = setting(None, "0: a step sees the whole photo; else 16 crops, so large", (0, 4096))

def complete(o: Settings, task: Task, y: Tensor, brief: bool = False) -> Settings:
    """Every default of a fit that depends on the task. brief: a DDPM will go on from there."""
    noisy = task.sigma > 0
    values = dict(nets=1, rungs=30, high=3.0, tail=0.0, crop=0, optimiser="adam", lr=0.01)
    values["input"], values["target"] = METHODS[o.method]
    if o.method == "staged" and noisy:
        values.update(iters=250, nets=2, optimiser="muon", lr=0.05, tail=0.25)
    elif o.method == "staged" and task.scale == 1:
        values.update(iters=200, nets=2, optimiser="muon", lr=0.05, input="estimate")
    elif o.method == "staged":          # here Muon was 0.7 dB below Adam (BSDS, superres:4)
        values.update(iters=400, nets=2, input="estimate")
    elif o.method == "adapt" and noisy:
        values.update(iters=100, lr=1e-4, tail=0.25)
    elif o.method == "adapt":
        values.update(iters=100, lr=5e-4, high=1.0, input="estimate")
    else:
        values.update(iters=1000)
    if brief:
        values.update(iters=values["iters"] * 5 // 8, nets=1)
    pixels = y.shape[2] * y.shape[3] * task.scale ** 2
    if pixels > TWO_NETS_PIXELS:
        values.update(nets=1)
    cropped = o.method in ("staged", "adapt") and o.stop in ("holdout", "fixed")
    if pixels > WHOLE_PIXELS and cropped and o.input != "fixed":
        values.update(iters=1000, rungs=8, crop=64, tail=0.0)
    if o.stop != "holdout" or o.target in ("plain", "noisy"):
        values.update(tail=0.0)                                 # other targets overfit in a tail
    if o.optimiser not in (None, values["optimiser"]):
        values.update(lr=0.05 if o.optimiser == "muon" else 0.01)
    o = replace(o, **{name: v for name, v in values.items() if getattr(o, name) is None})
    if o.stop in ("wmv", "emv"):        # these rules look at every step of the whole photo
        return replace(o, rungs=o.iters, crop=0)
    return replace(o, rungs=min(o.rungs, o.iters))

def ladder(o: Settings) -> list[tuple[float, int]]:
    """The rungs, from the most noise to the least: (a, how many steps it lasts)."""
    rungs = []
    for k in range(o.rungs):
        down = k / max(1, o.rungs - 1)                                        # 0 .. 1
        if o.shape == "cosine":
            down = (1 - math.cos(math.pi * down)) / 2
        a = o.high + (o.low - o.high) * down
        if o.shape == "geometric":
            a = o.high * (o.low / o.high) ** down
        rungs.append((a, o.iters * (k + 1) // o.rungs - o.iters * k // o.rungs))
    return rungs

def turned(x: Tensor, g: int) -> Tensor:
    """One of the 8 symmetries of the square, g in 0..7; g > 3 undoes itself."""
    x = torch.rot90(x, g, (2, 3))
    return x.flip(3) if g > 3 else x

def turned_back(x: Tensor, g: int) -> Tensor:
    """The inverse of turned(., g)."""
    return turned(x, g if g > 3 else -g % 4)

def noisy_input(o: Settings, base: Tensor, a: float, w: Tensor, sigma: float) -> tuple:
    """(z1, the level of the noise in it): what the network sees."""
    if o.input == "fixed":
        return base + torch.randn_like(base) / 30, 1 / 30                     # Ulyanov et al.
    level = a * (sigma or FREE_UNIT)
    return base + a * w, math.hypot(level, sigma) if o.input == "observed" else level

def noisy_target(o: Settings, y: Tensor, a: float, w: Tensor, task: Task) -> Tensor:
    """z2, in the domain of y: what the output is compared with."""
    if o.target == "conjugate" and task.sigma > 0:
        return y - w / a                                    # given x, independent of z1
    return y + a * task.forward(w) if o.target == "noisy" else y

def fit_loss(o: Settings, output: Tensor, target: Tensor, task: Task, level: float, prior):
    """The mean square of A output - target over known pixels, and what loss and guide add."""
    loss = task.mse(output, target)
    if o.loss == "gradient":                                # perceptual: edges at three scales
        for scale in (1, 2, 4):
            error = F.avg_pool2d(task.forward(output) - target, scale, ceil_mode=True)
            for dim in (2, 3):
                loss = loss + (error.diff(dim=dim) ** 2).sum() / error.numel()
    if o.method == "guide":                                 # RED-diff, Mardani et al. 2024
        with torch.no_grad():
            denoised = prior(output + level * torch.randn_like(output), level)
        loss = loss + ((output - denoised) ** 2).mean()
    if not torch.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    return loss

def on_one_grid(base: Tensor, y: Tensor, task: Task) -> Tensor:
    """y, the mask, and the block of base that lies on each pixel of y, as channels of one image."""
    blocks = F.pixel_unshuffle(base, task.scale)
    return torch.cat([y, task.mask.to(y).expand(1, 1, *y.shape[2:]), blocks], dim=1)

def random_crops(layers: Tensor, task: Task, side: int, gen: torch.Generator) -> tuple:
    """16 crops at the same places: of base (side x side), of y, and of the mask in the task."""
    side = min(max(1, side // task.scale), *layers.shape[2:])
    crops = random_patches(layers, 16, side, gen)
    channels = (layers.shape[1] - 1) // (1 + task.scale ** 2)
    y, mask, blocks = crops.split([channels, 1, channels * task.scale ** 2], dim=1)
    return F.pixel_shuffle(blocks, task.scale), y, replace(task, mask=mask)

@dataclass
class Stage:
    """What a rung of the ladder leaves behind. Images are N x C x H x W, in [-1, 1]."""
    number: int                     # of the network, from 0
    step: int                       # of all networks so far
    level: float                    # the noise in the network's input, in units of [-1, 1]
    input: Tensor                   # what the network saw, gave, and was compared with at last
    output: Tensor
    target: Tensor                  # in the domain of y
    mse: float                      # of the output to the target
    average: Tensor                 # the running mean of the outputs: the estimate
    seconds: float                  # that all networks so far have taken
    scores: dict = field(default_factory=dict)      # by stop rule; the smallest is the best
    answer: Tensor | None = None    # the best estimate so far, meaned with the networks before
    stop_step: int = 0              # the step at which it was found, and its held-out risk R
    risk: float = math.nan

class Fit:
    """One network on its way down the ladder, and all that changes as it learns."""
    def __init__(self, o: Settings, y: Tensor, task: Task, gen: torch.Generator, prior, tick, done):
        self.o, self.gen, self.prior, self.tick = o, gen, prior, tick
        self.step = 0
        self.number, self.steps_before, self.seconds = done     # networks before, their steps
        channels = y.shape[1]
        size = task.pinv(y).shape[2:]
        self.z = None
        if not o.crop:              # the fixed input; methods that have none draw it all the same
            self.z = torch.rand((1, 32, *size), generator=gen).to(y) / 10
        if o.method == "adapt":
            net = copy.deepcopy(prior)
        elif o.input == "fixed":
            net = SkipNet(32, channels, o.width, o.depth, skip=4)
        else:
            net = SkipNet(channels, channels, o.width, o.depth)
        self.net = net.to(y.device, memory_format=torch.channels_last)
        # The weights that are judged: on crops their average, else those of the newest step.
        self.judged = copy.deepcopy(self.net).eval() if o.crop else self.net
        if o.optimiser == "muon":
            self.optimisers = make_optimisers(self.net, o.lr, 0.01)
        else:
            self.optimisers = make_optimisers(self.net, None, o.lr)

    def descend(self, y: Tensor, task: Task, rungs: list, average: Tensor) -> Iterator[Stage]:
        """Down the ladder from a first guess of the image; yields what each rung leaves behind."""
        o = self.o
        for a, steps in rungs:                                          # the most noise first
            begin = time.monotonic()
            base = {"fixed": self.z, "observed": task.interpolate(y), "estimate": average}[o.input]
            part, seen, view = base, y, task
            if o.crop:
                layers = on_one_grid(base, y, task)
            for step in range(steps):
                if o.crop:
                    part, seen, view = random_crops(layers, task, o.crop, self.gen)
                if o.fresh or step == 0:
                    w = torch.randn(view.pinv(seen).shape, generator=self.gen).to(y)
                    w = w * (task.sigma or FREE_UNIT)
                z, level = noisy_input(o, part, a, w, task.sigma)       # z1 = y + a w
                target = noisy_target(o, seen, a, w, view)              # z2 = y - w / a
                g = self.random_turn(task)
                output = turned_back(self.net(turned(z, g), level), g)
                self.learn(fit_loss(o, output, target, view, level, self.prior))
                rate = max(0.01, min(1, 5 / self.step))                 # of the last fifth, or 100
                if o.crop:
                    update_ema(self.judged, self.net, rate)
                else:
                    average = average.lerp(output.detach(), rate)
                self.tick()
            self.seconds += time.monotonic() - begin
            if o.crop:
                average = self.look(y, task, average)
            average = task.keep_known(average, y)
            mse = view.mse(output, target).item()
            output = output.detach()
            step = self.steps_before + self.step
            yield Stage(self.number, step, level, z, output, target, mse, average, self.seconds)

    def watch(self, stages: Iterator[Stage], judge) -> Iterator[Stage]:
        """Score each stage, and keep the best one, its rung and its weights, until patience ends.

        judge(average) -> R, or None: then nothing is held out.
        """
        o = self.o
        variance, scores = MovingVariance(), []
        for stage in stages:
            stage.scores = {"fixed": -stage.step}
            if judge is not None:
                stage.scores["holdout"] = judge(stage.average)
            if o.rungs == o.iters and not o.crop:       # these rules look at every step
                stage.scores.update(variance.update(stage.output))
            scores.append(stage.scores[o.stop])
            self.best_rung, ended = stop_at(scores, max(1, PATIENCE * o.rungs // o.iters))
            if self.best_rung == len(scores) - 1:
                self.best = stage
                self.weights = copy.deepcopy(self.judged.state_dict())
            stage.stop_step = self.best.step
            stage.risk = self.best.scores.get("holdout", math.nan)
            yield stage
            if ended:
                break

    def random_turn(self, task: Task) -> int:
        """Theorem 3 holds for every turn of the conjugate pair; other targets are not turned."""
        if self.o.turns and self.o.target == "conjugate" and task.sigma > 0:
            return int(torch.randint(8, (), generator=self.gen))
        return 0

    def learn(self, loss: Tensor):
        """A step of the optimisers; rates rise over the first 50, Muon's then fall to a tenth."""
        self.step += 1
        self.net.zero_grad()
        loss.backward()
        fall = 0.9 * min(1, self.step / self.o.iters) if self.o.optimiser == "muon" else 0.0
        step_all(self.optimisers, min(1, self.step / 50) * (1 - fall))
        if self.o.crop and self.step == 50:
            self.net.eval()         # BatchNorm would go on removing each crop's own contrast

    def look(self, y: Tensor, task: Task, average: Tensor, turns: int = 1) -> Tensor:
        """The averaged network's estimate of a large photo, tile by tile, in 1 or 4 turns."""
        begin = time.monotonic()
        if self.o.input == "observed":
            average = task.interpolate(y)
        level = task.sigma or self.o.low * FREE_UNIT
        views = []
        for g in range(turns):
            views.append(turned_back(tiled(self.judged, turned(average, g), level), g))
        self.seconds += time.monotonic() - begin
        return task.keep_known(mean_image(views), y)

class MovingVariance:
    """The variance of the newest outputs, meaned over pixels: in a window (ES-WMV), and with
    exponential weights (ES-EMV). Wang et al. 2023, Algorithms 1 and 2."""
    def __init__(self, window: int = 100, alpha: float = 0.1):
        self.outputs = deque(maxlen=window)
        self.alpha = alpha
        self.mean = self.emv = 0.0

    def update(self, output: Tensor) -> dict:
        """Both scores after this output; wmv is inf until its window is full."""
        self.outputs.append(output)
        distance = ((output - self.mean) ** 2).mean().item()
        self.emv = (1 - self.alpha) * (self.emv + self.alpha * distance)
        self.mean = self.mean + self.alpha * (output - self.mean)
        wmv = math.inf
        if len(self.outputs) == self.outputs.maxlen:
            wmv = torch.cat(list(self.outputs)).var(dim=0, correction=0).mean().item()
        return {"wmv": wmv, "emv": self.emv}

def stop_at(scores: list[float], patience: int) -> tuple[int, bool]:
    """Where the smallest score stands, for a fit that ends after `patience` scores without a
    smaller one, and whether it has ended. Every stop rule, live or after the fit, is this."""
    best = 0
    for k, score in enumerate(scores):
        if score < scores[best] or math.isinf(scores[best]):
            best = k
        elif k - best >= patience:
            return best, True
    return best, False

def mean_image(images: list[Tensor]) -> Tensor:
    """The mean of estimates: their errors differ, and partly cancel."""
    return sum(images) / len(images)

def no_tick():
    """What is called after each step when nobody watches."""

def fit_dip(y: Tensor, task: Task, prior=None, *, seed=0, brief=False, tick=no_tick,
            **settings) -> Iterator[Stage]:
    """Fit networks to y (N x C x h x w, y = A x + sigma n); yields Stages: the last answer counts.

    settings: the fields of Settings. With stop 'holdout' each network first sees its part of the
    split; then, from the weights of its best stage on, the rungs that are left with all of y.
    prior: a trained DDPM, for adapt and guide. FloatingPointError: a loss that is not finite.
    """
    given = Settings(**settings)
    o = complete(given, task, y, brief)
    gen = stream(seed, FIT)
    torch.manual_seed(stream(seed, INIT).initial_seed())
    seen, seen_task, judge = y, task, None
    if o.stop == "holdout":
        seen, seen_task, judge = hold_out(y, task, gen, o.hold)
    first_guess = seen_task.interpolate(seen)
    answers, blind = [], []     # of each network: its answer, and its estimate before the tail
    done = (0, 0, 0.0)          # networks, their steps and seconds
    for n in range(o.nets):
        if o.method == "adapt" and n > 0:
            o = complete(replace(given, method="staged"), task, y, brief)   # now hourglasses
        fit = Fit(o, y, task, gen, prior, tick, done)
        rungs = ladder(o)
        watched = rungs[:max(1, round((1 - o.tail) * len(rungs)))]
        for stage in fit.watch(fit.descend(seen, seen_task, watched, first_guess), judge):
            stage.answer = mean_image(answers or [task.keep_known(fit.best.average, y)])
            yield stage
        # The tail, from the best stage on, sees all of y. On crops it is a look in four turns.
        fit.judged.load_state_dict(fit.weights)
        answer = fit.best.average
        if o.crop:
            answer = fit.look(y, task, answer, turns=4)
        end = math.ceil((fit.best_rung + 1) / (1 - o.tail))
        for tail in fit.descend(y, task, rungs[fit.best_rung + 1:end], answer):
            answer = tail.average
            yield replace(tail, stop_step=stage.stop_step, risk=stage.risk, answer=stage.answer)
        answers.append(task.keep_known(answer, y))
        blind.append(fit.best.average)
        done = (n + 1, fit.steps_before + fit.step, fit.seconds)
        if judge is not None:
            stage.risk = judge(mean_image(blind))
        stage = replace(stage, step=done[1], seconds=done[2], average=answers[-1])
        yield replace(stage, answer=mean_image(answers), scores={}, mse=math.nan)

# ---- 6. Joining the two -------------------------------------------------------------------------
# Lesson 3. The DDPM begins at the DIP's estimate, at the t0 whose noise hides the error of that
# estimate, and needs some ten calls in place of hundreds. At each the two are averaged by
# precision. A DIP that underfits is wrong where it knows least, and there no t0 helps: the gain
# over the same seconds of DIP alone is small. To run it: `dipddpm.py sample --init dip`.

def noised(schedule: NoiseSchedule, start: Tensor, t0: int, gens: list, sigma=0.0) -> Tensor:
    """x_t0 ~ q(x_t0 | start), one for each stream. An image with noise sigma gets only the rest."""
    missing = math.sqrt(max(0.0, schedule.sigma[t0].item() ** 2 - sigma ** 2))
    start = start.expand(len(gens), -1, -1, -1)
    return schedule.abar[t0].sqrt().item() * (start + missing * noise_like(start, gens))

def refine_x0(x0: Tensor, t: int, *, r2: Tensor, xhat, risk: float, y, task: Task, watch=None):
    """The DDPM's x_0 at time t joined with the DIP's xhat, then with the observation y.

    Each knows x up to an error, x ~ N(x0, r_t^2) and x ~ N(xhat, R): the mean by precision. Then a
    proximal step towards A x = y, exact where y is. xhat or y may be None: left out.
    """
    x0, variance, risk = x0.clamp(-1, 1), r2[t].item(), max(risk, 1e-8)
    if xhat is not None:
        x0 = (x0 / variance + xhat / risk) / (1 / variance + 1 / risk)
        variance = 1 / (1 / variance + 1 / risk)
    if y is not None:
        x0 = task.project(x0, y, gain=variance / (variance + task.sigma ** 2))
    if watch is not None:
        watch(x0)
    return x0

def reverse(prior: Prior, task: Task, xt: Tensor, t0: int, gens: list, *, steps=20, eta=1.0, y=None,
            xhat=None, risk=0.0, watch=None) -> Tensor:
    """The reverse process from x_t0 on, joined at each step with y and with the DIP's xhat.

    A grey image goes through a colour prior as three equal channels. Sample i depends on gens[i]
    alone. watch(x0), if given, sees every step.
    """
    join = partial(refine_x0, r2=prior.r2, xhat=xhat, risk=risk, y=y, task=task, watch=watch)
    start = xt.expand(-1, prior.channels, -1, -1)
    x0 = ddim_sample(partial(tiled, prior.model), prior.schedule, start, t0, steps, gens, eta, join)
    return x0.mean(dim=1, keepdim=True) if xt.shape[1] == 1 else x0

# ---- 7. Metrics ---------------------------------------------------------------------------------

def in_db(mse: float, data_range: float = 2.0) -> float:
    """A mean squared error as PSNR; nan for an estimate that is below 0."""
    if mse <= 0:
        return math.inf if mse == 0 else math.nan
    return 10 * math.log10(data_range ** 2 / mse)

def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB; inf for equal images."""
    error = a.cpu().double() - b.cpu().double()
    return in_db((error ** 2).mean().item(), data_range)

def ssim(a: Tensor, b: Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004) of N x C x H x W, H and W >= 11 (else ValueError).

    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, population covariance, no padding.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError("ssim needs images of at least 11 x 11 pixels")
    rows = a.shape[-2] - 10
    total = 0.0
    for top in range(0, rows, 256):             # in bands, for bounded memory
        band = slice(top, min(top + 256, rows) + 10)
        similar = similarity(a[..., band, :], b[..., band, :], data_range)
        total += similar.mean().item() * similar.shape[-2] / rows
    return total

def similarity(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """The map of which SSIM is the mean, in float64: (N C) x 1 x (H - 10) x (W - 10)."""
    a = a.cpu().double().flatten(0, 1)[:, None]
    b = b.cpu().double().flatten(0, 1)[:, None]
    offsets = torch.arange(-5, 6, dtype=a.dtype)
    window = torch.exp(-offsets ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()
    maps = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), window.view(1, 1, 11, 1))
    mean_a, mean_b, aa, bb, ab = F.conv2d(maps, window.view(1, 1, 1, 11)).chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    spread = (mean_a ** 2 + mean_b ** 2 + c1) * (aa - mean_a ** 2 + bb - mean_b ** 2 + c2)
    return likeness / spread

def quality(xhat: Tensor | None, x: Tensor | None) -> tuple:
    """(PSNR, SSIM) of an estimate to the clean image, each None where it cannot be known."""
    if x is None or xhat is None or x.shape != xhat.shape:
        return None, None
    xhat = xhat.clamp(-1, 1)
    if min(x.shape[-2:]) < 11:
        return psnr(xhat, x, 2.0), None
    return psnr(xhat, x, 2.0), ssim(xhat, x, 2.0)

@torch.no_grad()
def features(x: Tensor, network=None) -> Tensor:
    """N x C x H x W to N x D features: of FID's Inception as TorchScript, or, where there is none,
    of a random network: always the same, it tells sets of pictures apart, but gives no FID."""
    x = x.expand(-1, 3, -1, -1)
    if network is not None:
        return network((x + 1) * 127.5, return_features=True).flatten(1).double()
    gen = stream(0, INIT)
    for cin, cout in ((3, 32), (32, 64), (64, 64)):
        weight = torch.randn(cout, cin, 3, 3, generator=gen) * math.sqrt(2 / (9 * cin))
        x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
    return F.adaptive_avg_pool2d(x, 2).flatten(1).double()

def frechet(a: Tensor, b: Tensor) -> float:
    """Distance of the Gaussians fitted to two sets of features, N x D (Heusel et al. 2017)."""
    # The trace of the root of cov_a cov_b is that of the root of a symmetric matrix.
    cov_a = a.T.cov(correction=min(1, len(a) - 1))
    cov_b = b.T.cov(correction=min(1, len(b) - 1))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def recall_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Recall (Kynkaanniemi et al. 2019): the share of real within the k-th neighbours' balls of
    fake. Coverage (Naeem et al. 2020): the share of real balls that hold a fake."""
    radius_real = torch.cdist(real, real).sort(dim=1).values[:, :k + 1][:, -1]
    radius_fake = torch.cdist(fake, fake).sort(dim=1).values[:, :k + 1][:, -1]
    distance = torch.cdist(real, fake)
    recall = (distance < radius_fake).any(dim=1)
    coverage = (distance < radius_real[:, None]).any(dim=1)
    return recall.double().mean().item(), coverage.double().mean().item()

# ---- 8. Files, pictures, plots, progress --------------------------------------------------------
# Here the lecture ends, and the program around it begins.

NO_PHOTOS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}      # drawings, films, data
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

def say(text: str, end: str = "\n", to: str = "stdout"):
    """Print at once. A closed pipe, or a code page that lacks a letter, does no harm."""
    file = getattr(sys, to)
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(text, end=end, file=file, flush=True)
    except OSError:                     # The reader has gone: the work goes on, unheard.
        setattr(sys, to, open(os.devnull, "w"))

def fail(message: str):
    """One line on stderr, exit code 2. Every message names the flag and the remedy."""
    say("error: " + " ".join(message.split()), to="stderr")
    raise SystemExit(2)

def strict(value):
    """value as JSON and CSV take it: tensors as lists, NaN and inf as None."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

def save(path: str, value):
    """Write all of a file or nothing: a picture, bytes, a checkpoint, rows (.csv), or JSON."""
    data, text = io.BytesIO(), io.StringIO()
    if isinstance(value, Image.Image):
        value.save(data, "PNG")
    elif isinstance(value, bytes):
        data.write(value)
    elif path.endswith(".pt"):
        torch.save(value, data)
    elif path.endswith(".csv"):
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in value for name in row)))
        table.writeheader()
        table.writerows(strict(value))
    else:
        json.dump(strict(value), text, indent=1, allow_nan=False)
    part = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as file:
            file.write(data.getvalue() + text.getvalue().encode("utf-8", "backslashreplace"))
            os.fsync(file.fileno())     # It is on the disk before it takes the name.
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        fail(f"--out: cannot write {path} ({error.strerror}); name a folder you may write to")

def to_pixels(image: Image.Image) -> np.ndarray:
    """H x W x C in [0, 1] of a picture of any mode: upright, in sRGB, transparency on white."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):       # 16 bits, 32 bits, or floats
        pixels = np.asarray(image, np.float64)[..., None]
        # Such a file does not say how much of it is used: the smallest scale that holds it all is.
        for scale in (1, 255) if image.mode == "F" else (255, 4095, 65535):
            if 0 <= pixels.min() and pixels.max() <= scale:
                return pixels / scale
        raise ValueError(f"values beyond 0..{scale}, or none: save it as 8- or 16-bit PNG")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("P", "RGBA"):
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError):          # A broken profile changes nothing.
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return np.asarray(image.convert("RGB"), np.float64) / 255

def load_image(path: str, flag: str = "--image") -> Tensor:
    """Any picture as 1 x C x H x W in [-1, 1]; ends in an error where there is none.

    C is 1 where the three channels are equal: a grey picture has one noise, not three.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = to_pixels(image)
    except Exception as error:          # Pillow's many readers raise errors of many kinds.
        reason = str(error).strip()[:100]
        fail(f"{flag}: cannot read {path} ({reason}); give a whole PNG, JPEG or other picture")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() * 2 - 1
    if torch.equal(x, x[:, :1].expand_as(x)):
        return x[:, :1]
    return x

def to_image(x: Tensor) -> Image.Image:
    """1 x C x H x W in [-1, 1] as a picture of 8 bits: rounded, then clamped."""
    pixels = (x[0].detach().cpu().float() + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())

def find_photos(folder: str, flag: str) -> list:
    """Sorted paths of the pictures in a folder and below it, but not of what this file wrote."""
    kinds = Image.registered_extensions().items()
    endings = tuple(end for end, kind in kinds if kind in Image.OPEN and kind not in NO_PHOTOS)
    found = []
    for place, folders, files in os.walk(folder):       # It follows no links, hence no circles.
        if "metrics.json" not in files:
            found += [os.path.join(place, name) for name in files if name.lower().endswith(endings)]
        folders[:] = [name for name in folders if name != "runs" and name[0] != "."]
    if not found:
        fail(f"{flag}: no pictures in {folder}; name a folder of PNG or JPEG files")
    return sorted(found)

def figure(panels: list, columns: int = 6) -> Image.Image:
    """A page of panels (title, 1 x C x H x W, note): the title stands above, the note below."""
    columns = min(columns, len(panels))
    images = [to_image(x).convert("RGB") for _, x, _ in panels]
    side = max(max(image.size) for image in images)
    side = min(max(1, round(256 / side)) * side, 3000 // columns)       # enlarged, or reduced
    images = [ImageOps.contain(image, (side, side), Image.BOX) for image in images]
    width = max(190, max(image.width for image in images)) + 12
    height = max(image.height for image in images) + 64
    font = ImageFont.load_default(15)
    page = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for index, ((title, _, note), image) in enumerate(zip(panels, images)):
        middle, top = index % columns * width + width // 2, index // columns * height + 32
        page.paste(image, (middle - image.width // 2, top))
        draw.text((middle, top - 6), title, "black", font, "md")
        draw.text((middle, top + image.height + 4), note, "dimgrey", font, "ma")
    return page

def save_gif(path: str, frames: list, milliseconds: int):
    """An animation of pictures of one size; the last one stays longer."""
    times = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    first, *rest = [frame.quantize(64, dither=0) for frame in frames]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    save(path, data.getvalue())

@dataclass
class Curve:
    """One curve of a plot, and its name in the legend."""
    label: str
    x: list
    y: list                             # None and NaN are gaps
    points: bool = False                # dots, in place of a line

def on_axis(values: list, log: bool) -> np.ndarray:
    """Numbers as an axis places them: NaN where there is none, log10 on a logarithmic one."""
    values = np.array(values, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log10(values) if log else values
    return np.where(np.isfinite(values), values, np.nan)

def round_numbers(low: float, high: float) -> np.ndarray:
    """Three to eight numbers between low and high, in steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if (high - low) / (factor * step) >= 3)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step

def axis_ticks(arrays: list, log: bool) -> tuple:
    """((low, high), the places of the ticks, their labels) of an axis that holds all of arrays."""
    values = np.concatenate([[], *arrays])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        values = np.array([0.0, 1.0])
    room = 0.04 * np.ptp(values) or 0.5
    low, high = values.min() - room, values.max() + room
    if not log:
        places = round_numbers(low, high)
        return (low, high), places, [f"{round(place, 9):.6g}" for place in places]
    factors = (1, 2, 5) if high - low < 3 else (1,)     # of each power of ten
    powers = range(math.floor(low), math.ceil(high))
    places = [power + math.log10(factor) for power in powers for factor in factors]
    places = [place for place in places if low <= place <= high]
    if len(places) < 2:
        places = np.log10(round_numbers(10 ** low, 10 ** high))
    return (low, high), places, [f"{10 ** place:.4g}" for place in places]

def draw_axes(draw, x_axis: tuple, y_axis: tuple, font):
    """The grid of a plot and its labels; x_axis, y_axis: (places in pixels, labels, ends)."""
    xs, x_names, (left, right) = x_axis
    ys, y_names, (bottom, top) = y_axis
    for x, name in zip(xs, x_names):
        draw.line((x, top, x, bottom), "#d8d8d8", 2)
        draw.text((x, bottom + 12), name, "black", font, "ma")
    for y, name in zip(ys, y_names):
        draw.line((left, y, right, y), "#d8d8d8", 2)
        draw.text((left - 12, y), name, "black", font, "rm")

def plot(curves: list, title: str, xlabel: str, ylabel: str, xlog=False, ylog=False, marks=()):
    """Curves as a picture of 900 pixels, the legend below; it is drawn twice as large.

    marks: pairs (x, text), each a vertical line with its text above.
    """
    xs = [on_axis(curve.x, xlog) for curve in curves]
    ys = [on_axis(curve.y, ylog) for curve in curves]
    lines = on_axis([x for x, _ in marks], xlog)
    x_span, x_ticks, x_names = axis_ticks([*xs, lines], xlog)
    y_span, y_ticks, y_names = axis_ticks(ys, ylog)
    font = ImageFont.load_default(28)
    page = Image.new("RGB", (1800, 1020 + 44 * len(curves)), "white")
    draw = ImageDraw.Draw(page)
    across = (60 + max(font.getlength(name) for name in y_names), 1740)
    down = (900, 150)
    draw.text((30, 20), title, "black", ImageFont.load_default(34))
    draw.text((30, 90), ylabel, "dimgrey", font)
    draw.text((900, 954), xlabel, "dimgrey", font, "ma")
    x_axis = (np.interp(x_ticks, x_span, across), x_names, across)
    draw_axes(draw, x_axis, (np.interp(y_ticks, y_span, down), y_names, down), font)
    for x, (_, text) in zip(np.interp(lines, x_span, across), marks):
        draw.line((x, down[1], x, down[0]), "dimgrey", 3)
        draw.text((x, down[1] - 8), text, "dimgrey", font, "md")
    for index, curve in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        x_places = np.interp(xs[index], x_span, across)
        places = list(zip(x_places, np.interp(ys[index], y_span, down)))
        for before, place in zip(places[:1] + places, places):
            if curve.points and not np.isnan(place).any():
                draw.circle(place, 9, color)
            elif not np.isnan([before, place]).any():
                draw.line((*before, *place), color, 6)
                draw.circle(place, 3, color)
        y = 1026 + 44 * index
        draw.line((60, y, 150, y), color, 8)
        draw.text((170, y), curve.label, "black", font, "lm")
    return page.reduce(2)

def clock(seconds: float) -> str:
    """8 s, 1:05 (minutes) or 2:03:11 (hours)."""
    minutes, second = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
    if minutes:
        return f"{minutes}:{second:02d}"
    return f"{second} s"

class Progress:
    """How far a loop is: one line that is rewritten in a terminal, a line now and then in a log."""
    def __init__(self, total: int, what: str):
        self.total, self.what, self.text = total, what, ""
        self.count, self.seconds, self.shown = 0, 0.0, 0.0
        self.begin = time.monotonic()
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.closed = False

    def step(self):
        """To be called after each step of the loop."""
        self.count += 1
        self.seconds = time.monotonic() - self.begin
        if self.count == 1:
            self.first = self.seconds       # The first step loads parts of torch: no rate is in it.
        wait = 0.3 if self.terminal else 10 + self.shown / 2
        if self.terminal and self.count == self.total:
            self.close()
        elif self.count > 1 and self.seconds >= self.shown + wait:
            self.show()

    def show(self):
        """Print where the loop stands, how fast it is, and the time that is left."""
        self.shown = self.seconds
        rate = max(self.count - 1, 1) / max(self.seconds - self.first, 1e-9)
        left = clock((self.total - self.count) / rate)
        line = f"{self.what} {self.count}/{self.total}  {rate:.1f}/s  {left} left  {self.text}"
        if self.terminal:
            columns = shutil.get_terminal_size().columns - 1
            say("\r" + line[:columns].ljust(columns), end="")
        else:
            say(line)

    def close(self):
        """End the line, so that what follows begins one."""
        if self.terminal and self.count > 0 and not self.closed:
            self.show()
            say("")
            self.closed = True

# ---- 9. The commands ----------------------------------------------------------------------------

PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
TASKS = "denoise:SIGMA (0..255), inpaint:SHARE (0..1, missing) or superres:2|3|4|6|8"
GUESS = 25 / 127.5              # the error of a start whose error nobody knows

def ranks() -> tuple[int, int]:
    """(the number of this process, how many there are) under torchrun, else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def given(args, kind) -> dict:
    """Those fields of a dataclass of settings that the command line gives."""
    values = {f.name: getattr(args, f.name, None) for f in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}

def banner(args, text: str, net: nn.Module | None = None):
    """Say what was chosen, before the work begins."""
    if net is not None:
        text += f", {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"
    say(f"{args.command}: {text} | {args.device.type}, {torch.get_num_threads()} threads, "
        f"seed {args.seed} -> {args.out}")

def parse_task(text: str) -> tuple:
    """'denoise:25' as ('denoise', 25.0); None stands for a number that is left out."""
    found = re.fullmatch(r"(denoise|inpaint|superres)(?::(\d*\.?\d+))?", text)
    if found:
        name, number = found.groups()
        if number is None and name != "superres":
            return name, None
        value = float(number or 0)
        limits = {"denoise": 0 < value <= 255, "inpaint": 0 < value <= 1,
                  "superres": value in (2, 3, 4, 6, 8)}
        if limits[name]:
            return name, value
    return fail(f"--task: {text!r} is none of {TASKS}")

def centre(x: Tensor, size: list) -> Tensor:
    """The centre of a picture, of a given height and width."""
    top = (x.shape[2] - size[0]) // 2
    left = (x.shape[3] - size[1]) // 2
    return x[..., top:top + size[0], left:left + size[1]].contiguous()

def observe(args) -> tuple:
    """(clean x or None, observation y, Task) of args.image; tensors are 1 x C x h x w."""
    name, value = parse_task(args.task)
    image = load_image(args.image).to(args.device)
    task = Task(args.task)
    if name == "superres":
        task.scale = int(value)
    unit = 1 if args.observed else task.scale
    size = [min(n, args.size or n) // unit * unit for n in image.shape[2:]]
    if min(size) == 0:
        fail(f"--image: {args.image} is too small for {args.task}: it needs {unit} pixels a side")
    x = centre(image, size)
    if args.mask:
        mask = load_image(args.mask, "--mask").to(image)
        if mask.shape[2:] != image.shape[2:]:
            fail("--mask: it has another size than the photo; white = known pixels")
        task.mask = (centre(mask, size).mean(dim=1, keepdim=True) > 0).float()
        if task.mask.mean() in (0, 1):
            fail("--mask: all is known, or nothing; white = known pixels, black = missing")
    elif name == "inpaint":
        if value is None or args.observed:
            fail("--mask: inpaint needs a picture of the photo's size, white = known pixels")
        lots = torch.rand((1, 1, *size), generator=stream(args.seed, OBSERVE))
        task.mask = (lots >= value).to(image)
        if not task.mask.any() and args.init != "noise":
            fail("--task: no pixel is known; give a smaller share, as in inpaint:0.8")
    if args.observed:
        y, x = x, None
    else:
        y = task.forward(x)
    if name == "denoise":
        if x is not None and value is None:
            fail("--task: say how much noise, as in denoise:25; or --observed, for a noisy photo")
        if x is not None:               # noise that is neither clipped nor rounded
            n = torch.randn(y.shape, generator=stream(args.seed, OBSERVE)).to(y)
            y = y + value / 127.5 * n
        told = value if args.told is None else args.told
        task.sigma = told / 127.5 if told else estimate_sigma(y)
        if not task.sigma >= 1e-4:
            fail("--task: no noise is found; give its level in 8-bit units, as in denoise:25")
    return x, y, task

def fingerprint(args) -> dict:
    """The contents of the files that decide a result: of the photo, the mask, and the prior."""
    paths = [args.image, args.mask]
    if args.command == "sample" or args.method in ("adapt", "guide"):
        paths.append(prior_path(args))
    digests = {}
    for path in paths:
        if path and os.path.isfile(path):
            with open(path, "rb") as file:
                digests[path] = hashlib.sha256(file.read()).hexdigest()
    return digests

def finish(args, x, y: Tensor, task: Task, image: Tensor, panels: list, chart, metrics: dict):
    """Write what fit-dip and sample write, and say in words what came out."""
    holes_black = torch.where(task.mask > 0, y, -1.0)
    panels = [("given", F.interpolate(holes_black, scale_factor=float(task.scale))), *panels]
    metrics["psnr"], metrics["ssim"] = quality(image, x)
    metrics["psnr_observed"], _ = quality(task.interpolate(y), x)
    text = f"restored in {clock(metrics['seconds'])}"
    notes = [""] * len(panels)
    if x is not None:
        notes = [f"{psnr(v.clamp(-1, 1), x, 2.0):.2f} dB" for _, v in panels] + [""]
        if task.sigma == 0:
            notes[0] = f"interpolated {metrics['psnr_observed']:.2f} dB"
        panels.append(("clean", x))
        text += f": {metrics['psnr_observed']:.2f} dB given, {metrics['psnr']:.2f} dB restored"
    page = figure([(title, v, note) for (title, v), note in zip(panels, notes)])
    metrics.update(task=task.name, sigma=task.sigma * 127.5, image=args.image, seed=args.seed,
                   command=args.argv, files=fingerprint(args))
    save(os.path.join(args.out, "result.png"), to_image(image))
    save(os.path.join(args.out, "figure.png"), page)
    save(os.path.join(args.out, "curves.png"), chart)
    save(os.path.join(args.out, "metrics.json"), metrics)
    say(f"{text} -> {os.path.join(args.out, 'figure.png')}")
    if metrics["interrupted"]:
        say("interrupted: this is the best so far; the same command begins anew")
        raise KeyboardInterrupt

def run_fit(args, y: Tensor, task: Task, x: Tensor | None, prior=None) -> tuple:
    """Fit a DIP: (its last Stage, rows of log.csv, frames of the first network, metrics).

    Only the log sees the clean x. Ctrl-C leaves the best so far, if there is one.
    """
    settings = given(args, Settings)
    brief = args.command == "sample"
    o = complete(Settings(**settings), task, y, brief)
    bar = Progress(o.iters * o.nets, "DIP")
    rows, frames, interrupted = [], [], False
    try:
        settings.update(seed=args.seed, brief=brief, tick=bar.step)
        for stage in fit_dip(y, task, prior, **settings):
            noise = stage.level * 127.5
            bar.text = f"noise {noise:.0f}"
            row = dict(network=stage.number, step=stage.step, seconds=stage.seconds, noise=noise)
            row.update(stage.scores)
            row["psnr"], row["ssim"] = quality(stage.average, x)
            row["psnr_newest"], _ = quality(stage.output, x)
            row["psnr_target"] = in_db(stage.mse)
            row["psnr_risk"] = in_db(stage.scores.get("holdout", -1.0))
            rows.append(row)
            if stage.number == 0 and stage.input.shape == stage.average.shape:
                frames.append([(f"seen: noise {noise:.0f}", stage.input, ""),
                               ("estimate", stage.average, "")])
    except FloatingPointError as error:
        fail(f"--lr: {error}; lower it")
    except KeyboardInterrupt:
        if not rows:
            say("interrupted before the first stage: there is nothing to keep")
            raise
        interrupted = True
    finally:
        bar.close()
    metrics = dict(iters=stage.step, stop_iter=stage.stop_step, risk=stage.risk,
                   seconds=stage.seconds, interrupted=interrupted)
    # What each rule takes from the path of the first network; the oracle sees the clean image.
    path = [row for row in rows if "fixed" in row and row["network"] == 0]
    # Only the numbers below need the clean photo; none of them goes back into a fit.
    if x is not None:
        metrics["psnr_oracle"] = max(row["psnr"] for row in path)
        for rule in ("holdout", "wmv", "emv"):
            if rule in path[-1]:
                index, _ = stop_at([row[rule] for row in path], PATIENCE)
                metrics[f"psnr_{rule}"] = path[index]["psnr"]
    return stage, rows, frames, metrics

def fit_one(args):
    """fit-dip of one photo."""
    x, y, task = observe(args)
    prior = None
    if args.method in ("adapt", "guide"):
        prior = load_prior(args, y.shape[1])
    method = args.method or "staged"
    banner(args, f"{task.name}, {args.image} {y.shape[3]} x {y.shape[2]}, {method}", prior)
    stage, rows, frames, metrics = run_fit(args, y, task, x, prior)
    curves = []
    labels = {"psnr": "to the clean photo", "psnr_risk": "estimated from R, without it",
              "psnr_target": "to the target of the stage"}
    for name, label in labels.items():
        curves.append(Curve(label, [row["step"] for row in rows], [row[name] for row in rows]))
    chart = plot(curves, "PSNR at the end of each stage", "steps", "dB",
                 marks=[(stage.stop_step, "stop")])
    save(os.path.join(args.out, "log.csv"), rows)
    if frames:
        six = [frames[i * (len(frames) - 1) // 5] for i in range(6)]
        page = figure([seen for seen, _ in six] + [estimate for _, estimate in six])
        save(os.path.join(args.out, "stages.png"), page)
        save_gif(os.path.join(args.out, "ladder.gif"), [figure(frame) for frame in frames], 150)
    finish(args, x, y, task, stage.answer, [("restored", stage.answer)], chart, metrics)

class ReversePath:
    """What the reverse process passes through: the newest x_0, and a row for each call."""
    def __init__(self, x: Tensor | None, steps: int):
        self.x, self.x0, self.rows = x, None, []
        self.bar = Progress(steps, "DDPM")

    def watch(self, x0: Tensor):
        """To be called with each x_0, after the join."""
        self.bar.step()
        self.x0 = x0
        row = dict(call=self.bar.count, seconds=self.bar.seconds, mean=None)
        if self.x is not None:
            mean = x0.mean(dim=0, keepdim=True).clamp(-1, 1)
            row["mean"] = psnr(mean, self.x.expand_as(mean), 2.0)
        self.rows.append(row)

@dataclass
class Start:
    """Where the reverse process begins, and what joins it on the way."""
    xt: Tensor
    t0: int
    join: dict                      # of y, xhat and risk, what `reverse` is to use
    panels: list                    # of figure.png
    metrics: dict

def make_start(args, x, y: Tensor, task: Task, prior: Prior, gens: list) -> Start:
    """x_t0 from noise, from the observation, or from a DIP of it; t0 by the start rule."""
    known = task.interpolate(y)
    schedule = prior.schedule
    metrics = dict(psnr_dip=None, seconds=0.0, interrupted=False)
    if args.init == "noise":
        xt = noise_like(known.expand(args.samples, -1, -1, -1), gens)
        return Start(xt, schedule.T, dict(y=y), [], metrics)
    join = {}
    if task.sigma == 0:
        join = dict(y=y)                # a noisy y is the start, or the DIP's: not used twice
    risk = max(task.sigma, GUESS) ** 2
    if args.init == "observed":
        t0 = args.start or min(schedule.start_t(risk), prior.t_max)
        return Start(noised(schedule, known, t0, gens, task.sigma), t0, join, [], metrics)
    stage, _, _, metrics = run_fit(args, y, task, x, prior)
    metrics["psnr_dip"], _ = quality(stage.answer, x)
    if not math.isnan(stage.risk):
        risk = stage.risk
    if not args.no_guide:
        join.update(xhat=stage.answer, risk=risk)
    t0 = args.start or min(schedule.start_t(risk), prior.t_max)
    xt = noised(schedule, stage.answer, t0, gens)
    return Start(xt, t0, join, [("DIP", stage.answer)], metrics)

def sample_one(args):
    """sample: reverse diffusion of one photo, or of a page of pictures from noise alone."""
    if args.image is None:              # nothing is known of the picture
        prior = load_prior(args, 1)
        x, y = None, torch.zeros(1, prior.channels, args.size, args.size, device=args.device)
        task = Task("none", mask=torch.zeros_like(y[:, :1]))
    else:
        x, y, task = observe(args)
        prior = load_prior(args, y.shape[1])
    banner(args, f"{task.name}, {args.image} {y.shape[3]} x {y.shape[2]}, from {args.init}", prior)
    gens = [stream(args.seed + i, SAMPLE) for i in range(args.samples)]
    start = make_start(args, x, y, task, prior, gens)
    metrics, panels = start.metrics, start.panels
    path = ReversePath(x, min(args.steps, start.t0))
    try:
        samples = reverse(prior, task, start.xt, start.t0, gens, steps=args.steps, eta=args.eta,
                          watch=path.watch, **start.join)
    except KeyboardInterrupt:
        if path.x0 is None:
            raise
        samples = path.x0
        if y.shape[1] == 1:
            samples = samples.mean(dim=1, keepdim=True)
        metrics["interrupted"] = True
    finally:
        path.bar.close()
    image = samples.mean(dim=0, keepdim=True)
    panels += [("DDPM, one sample", samples[:1]), (f"mean of {args.samples}", image)]
    if args.image is None:
        image = samples[:1]
        panels = [(f"seed {args.seed + i}", sample[None]) for i, sample in enumerate(samples)]
    scores = [quality(sample[None], x)[0] for sample in samples]
    spread = samples.std(dim=0, correction=0).square().mean().sqrt()
    metrics.update(
        psnr_mean=quality(image, x)[0], psnr_sample=None if x is None else np.mean(scores),
        spread=spread.item() * 127.5, t0=start.t0, nfe=path.bar.count,
        seconds_dip=metrics["seconds"], seconds_ddpm=path.bar.seconds)
    metrics["seconds"] += path.bar.seconds
    calls = [row["call"] for row in path.rows]
    curve = Curve("mean of the samples", calls, [row["mean"] for row in path.rows])
    chart = plot([curve], "PSNR of the predicted x_0", "network calls", "dB")
    save(os.path.join(args.out, "log.csv"), path.rows)
    save(os.path.join(args.out, "sample.png"), to_image(samples[:1]))
    finish(args, x, y, task, image, panels, chart, metrics)

def each_photo(args, one) -> int:
    """A command on its photo, or on each photo of a folder, which torchrun shares out."""
    if not os.path.isdir(args.image or ""):
        one(args)
        return 0
    rank, world = ranks()
    bad = []
    for path in find_photos(args.image, "--image")[rank::world]:
        out = os.path.join(args.out, os.path.relpath(path, args.image))
        try:
            one(argparse.Namespace(**{**vars(args), "image": path, "out": out}))
        except SystemExit:
            bad.append(path)
    if bad:
        fail(f"--image: not restored, see above: {', '.join(bad)}")
    return 0

# The prior: where it comes from, and how it is trained.

def prior_path(args) -> str:
    """A start from noise needs a prior of all t, all else one of t <= t_max."""
    kind = "none" if args.init == "noise" else "dip"
    return args.ckpt or os.path.join("runs", "train", f"{kind}.pt")

def read_checkpoint(path: str, flag: str) -> dict:
    """A checkpoint from which a Prior can be made; ends in an error where it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        Prior(state)
    except Exception as error:                  # torch raises errors of many kinds
        fail(f"{flag}: cannot use {path} ({str(error).strip()[:80]}); train a prior with train")
    return state

def load_prior(args, channels: int) -> Prior:
    """The Prior in --ckpt, or the default one, which is trained where it is missing."""
    path = prior_path(args)
    if not args.ckpt and not os.path.exists(path):
        train_default_prior(args, path)
    prior = Prior(read_checkpoint(path, "--ckpt"))
    if prior.channels < channels:
        fail(f"--ckpt: {path} knows grey photos only; train another on colour photos")
    if args.init == "noise" and prior.t_max < prior.schedule.T:
        fail(f"--ckpt: {path} knows t <= {prior.t_max} only; train one with --prior none")
    if args.start is not None and args.start > prior.t_max:
        fail(f"--start: {path} knows t <= {prior.t_max} only; give a smaller one")
    return prior.to(args.device, memory_format=torch.channels_last)

def train_default_prior(args, path: str):
    """Train in a folder of its own, which two processes cannot enter at once; it can be resumed."""
    folder, name = path[:-3] + "-unfinished", os.path.basename(path)
    command = ["train", "--prior", name[:-3], "--out", folder, "--device", args.device.type]
    if ranks()[1] > 1:
        fail(f"--ckpt: there is no {path}; train it first: dipddpm.py train --prior {name[:-3]}")
    say(f"there is no prior yet: {path} is trained on images/train, once")
    if os.path.exists(os.path.join(folder, name)):
        command.append("--resume")
    lock = os.path.join(folder, "busy")
    try:
        os.makedirs(lock)
    except FileExistsError:
        fail(f"--ckpt: another process trains {path}; wait for it, or, if none does, remove {lock}")
    try:
        if main(command) != 0:
            raise KeyboardInterrupt
        os.replace(os.path.join(folder, name), path)
    finally:
        os.rmdir(lock)

def load_data(path: str) -> list:
    """uint8 images C x H x W, with one C: from a folder of pictures, or an array, .npy or .npz."""
    if os.path.isdir(path):
        images = [load_image(file, "--data")[0] for file in find_photos(path, "--data")]
        channels = max(len(image) for image in images)
        images = [image.expand(channels, -1, -1) for image in images]
        return [((image + 1) * 127.5).round().byte() for image in images]
    try:
        data = np.load(path)
        if not isinstance(data, np.ndarray):
            data = data[data.files[0]]
        if data.dtype != np.uint8 or data.shape[3:] not in ((), (1,), (3,)) or data.size == 0:
            raise ValueError(f"it holds {data.dtype} of {data.shape}")
    except Exception as error:                  # numpy, too
        fail(f"--data: cannot use {path} ({str(error).strip()[:80]}); give a folder of pictures, "
             "or uint8 of N x H x W or N x H x W x 3")
    data = torch.from_numpy(data).reshape(*data.shape[:3], -1)
    return list(data.permute(0, 3, 1, 2))

@dataclass
class Training:
    """How a DDPM is trained; each field is a flag, and stands in the checkpoint."""
    prior: str = setting("none", "none: all t; dip: t <= --t-max", ["none", "dip"])
    t_max: int = setting(None, "largest t (none 1000; dip 172, the first rung)", (1, 1000))
    schedule: str = setting("linear", "of the noise", ["linear", "cosine"])
    batch: int = setting(16, "patches a step", (1, 4096))
    patch: int = setting(48, "their side in pixels", (4, 1024))
    width: int = setting(48, "channels of the network, in eights", (8, 1024))
    lr: float = setting(0.02, "learning rate of Muon; Adam has a twentieth", (1e-9, 10))

def new_checkpoint(args, images: list) -> dict:
    """A checkpoint before its first step: a plain dict that weights_only=True can read."""
    config = asdict(Training(**given(args, Training))) | dict(T=1000, seed=args.seed)
    config["unet"] = dict(channels=len(images[0]), width=config["width"] // 8 * 8)
    if config["t_max"] is None:
        config["t_max"] = 1000
        if config["prior"] == "dip":            # the first rung at noise 25: a = 3, sigma = 0.2
            config["t_max"] = NoiseSchedule(1000, config["schedule"]).start_t(0.6 ** 2)
    torch.manual_seed(stream(args.seed, INIT).initial_seed())
    weights = UNet(**config["unet"]).state_dict()
    return dict(config=config, step=0, model=weights, ema=weights, optimisers=[], rng=None, log=[],
                eps_loss=torch.ones(1001))

def resumed(args, path: str, images: list) -> dict:
    """The checkpoint of a run to go on with; what it began with cannot be changed."""
    state = read_checkpoint(path, "--resume")
    began = state["config"]
    wanted = given(args, Training) | dict(seed=args.seed)
    for name, value in wanted.items():
        if value != began[name]:
            flag = name.replace("_", "-")
            fail(f"--{flag}: the run began with {began[name]}; give that, or train anew")
    if len(images[0]) != began["unet"]["channels"]:
        fail("--data: the run began with another number of channels; give such pictures")
    return state

def cmd_train(args) -> int:
    """train: Algorithm 1 on a folder of photos, or on an array, with checkpoints."""
    rank, world = ranks()
    images = load_data(args.data)
    path = os.path.join(args.out, f"{args.prior or 'none'}.pt")
    state = resumed(args, path, images) if args.resume else new_checkpoint(args, images)
    config, rows = state["config"], state["log"]
    side = min(config["patch"], max(min(image.shape[1:]) for image in images))
    images = [image for image in images if min(image.shape[1:]) >= side]
    if config["batch"] < world:
        fail(f"--batch: {world} processes share a batch; give {world} or more")
    net = UNet(**config["unet"]).to(args.device, memory_format=torch.channels_last)
    net.load_state_dict(state["model"])
    ema = copy.deepcopy(net)
    ema.load_state_dict(state["ema"])
    state.update(model=net.state_dict(), ema=ema.state_dict())      # from now on the newest
    banner(args, f"{len(images)} images, prior {config['prior']}, t <= {config['t_max']}, steps "
           f"{state['step']} to {args.steps}", net)
    if world > 1:
        torch.distributed.init_process_group()
        net = nn.parallel.DistributedDataParallel(net)              # averages the gradients
    before = rows[-1]["seconds"] if rows else 0.0
    bar = Progress(args.steps - state["step"], "DDPM")
    code = 0
    try:
        for t, losses in train_ddpm(state, net, ema, images, args.steps, rank, world):
            bar.step()
            loss = losses.mean().item()
            bar.text = f"loss {loss:.3f}"
            if not math.isfinite(loss):
                fail(f"--lr: the loss is not finite at step {state['step']}; lower it, train anew")
            if state["step"] % 20 == 0 or state["step"] == args.steps:
                rows.append(dict(step=state["step"], seconds=before + bar.seconds, loss=loss))
            if state["step"] % 200 == 0 and rank == 0:
                save(path, state)
    except KeyboardInterrupt:
        code = 130
    finally:
        bar.close()
    if rank == 0:
        save(path, state)
        save_training(args, state, before + bar.seconds)
        say(f"{state['step']} steps in {clock(before + bar.seconds)} -> {path}")
        if code:
            say("interrupted: the same command with --resume goes on")
    return code

def save_training(args, state: dict, seconds: float):
    """log.csv, metrics.json, and curves.png: the loss against time, and by t."""
    rows = state["log"]
    loss = state["eps_loss"][1:state["config"]["t_max"] + 1].tolist()
    seconds_of = [row["seconds"] for row in rows]
    by_time = Curve("loss of a step", seconds_of, [row["loss"] for row in rows])
    by_t = Curve("running mean", list(range(1, len(loss) + 1)), loss)
    label = "mean of (eps_theta - eps)^2"
    above = plot([by_time], "Loss against time", "seconds", label, ylog=True)
    below = plot([by_t], "Loss by t", "t", label, ylog=True)
    page = Image.new("RGB", (900, 2 * above.height), "white")
    page.paste(above, (0, 0))
    page.paste(below, (0, above.height))
    save(os.path.join(args.out, "curves.png"), page)
    save(os.path.join(args.out, "log.csv"), rows)
    save(os.path.join(args.out, "metrics.json"), dict(
        psnr=None, seconds=seconds, step=state["step"], command=args.argv,
        eps_loss=state["eps_loss"]))

# ---- 10. Evaluation: tables in which every row is a command line --------------------------------

FREE = ("--task inpaint:0.8", "--task superres:4")
CLASSIC = "--method dip --stop wmv --iters 1800"
FITS = ("", "--nets 1", "--nets 1 --rungs 250", CLASSIC, CLASSIC + " --optimiser muon",
        "--method targets", "--method selfdiff", "--method adapt", "--method guide")
JOINS = ("sample --init dip", "sample --init dip --iters 60", "sample --init dip --no-guide",
         "sample --init observed", "sample --init noise --steps 20", "sample --init noise",
         "fit-dip --nets 1", "fit-dip --method adapt")
ONE_CHANGE = ("", "--optimiser adam --iters 1000", "--high 6", "--low 0.2", "--rungs 5",
              "--shape linear", "--fresh 0", "--turns 0", "--input fixed", "--target plain",
              "--width 64", "--depth 2", "--loss gradient", "--hold 0.1", "--tail 0", "--told 20",
              "--told 0")
ONE_CALL = "sample --init observed --steps 1 --samples 1 --ckpt runs/train"
UNKNOWN = "sample --samples 1 --task inpaint:1 --init noise"
NEAR = "sample --samples 1 --task denoise:10 --init dip --no-guide"
SUITES = {
    "stopping": [f"fit-dip {task} {fit}" for task in ("--task denoise:25", *FREE) for fit in FITS],
    "init": [f"{join} {task}" for task in FREE for join in JOINS],
    "training": [f"{ONE_CALL}/{kind}.pt --task denoise:{sigma}"
                 for sigma in (15, 25, 50) for kind in ("none", "dip")],
    "generation": [f"{UNKNOWN} --steps 10", f"{UNKNOWN} --steps 50", f"{NEAR} --start 50",
                   f"{NEAR} --start 150"],
    "ablation": [f"fit-dip --task denoise:25 --nets 1 {change}" for change in ONE_CHANGE],
}
COLUMNS = ("psnr ssim seconds stop_iter psnr_oracle psnr_holdout psnr_wmv psnr_emv psnr_dip "
           "psnr_sample spread nfe t0").split()

def folder_name(text: str) -> str:
    """A text as the name of a folder; two texts never share one."""
    words = re.sub(r"[^\w.]+", "-", text).strip("-")[-60:]
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

def run_arm(argv: list, out: str) -> dict:
    """The metrics of a command line: of an earlier run, if it had the same flags, and files of the
    same content; else of a new one. SystemExit: it ended in an error, which it has said."""
    path = os.path.join(out, "metrics.json")
    args = parse(argv)
    args.out = out
    for fresh in (False, True):
        if fresh and run(args) != 0:
            raise KeyboardInterrupt
        if os.path.exists(path):
            with open(path) as file:
                metrics = json.load(file)
            same = metrics["command"] == argv and metrics["files"] == fingerprint(args)
            if same and not metrics["interrupted"]:
                return metrics
    return fail(f"--out: {path} is not what was just written; leave the folder to one process")

def mean_of(values: list, digits: int) -> str:
    """The mean of what is known, as text; empty if nothing is."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{np.mean(values):.{digits}f}"

def markdown(rows: list) -> str:
    """The means of each arm over photos and seeds, and its PSNR seed by seed."""
    table = [["arm", "n", *COLUMNS, "psnr of each seed"]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        group = [row for row in rows if row["arm"] == arm]
        line = [arm, str(len(group))]
        for column in COLUMNS:
            digits = 3 if column == "ssim" else 2
            line.append(mean_of([row.get(column) for row in group], digits))
        seeds = dict.fromkeys(row["seed"] for row in group)
        of_seeds = [[row["psnr"] for row in group if row["seed"] == seed] for seed in seeds]
        table.append(line + [" ".join(mean_of(values, 2) for values in of_seeds)])
    used = [column for column in zip(*table) if any(column[1:])]
    lines = [f"| {' | '.join(line)} |" for line in zip(*used)]
    return "\n".join([lines[0], "|" + " --- |" * len(used), *lines[1:]]) + "\n"

def suite_arms(args, photo: str) -> list:
    """The command lines of a suite, or of --arms; each is checked before the first fit."""
    names = list(SUITES) if args.suite == "all" else [args.suite]
    arms = [arm for name in names for arm in SUITES[name]]
    if args.arms:
        try:
            with open(args.arms, encoding="utf-8") as file:
                arms = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--arms: cannot read {args.arms} ({error}); name a file of command lines")
    for arm in arms:
        if arm.split()[0] not in ("fit-dip", "sample"):
            fail(f"--arms: {arm!r} is no command line of fit-dip or sample")
        parse([*arm.split(), "--image", photo])
    return list(dict.fromkeys(arms))

def compare_sets(args, paths: dict):
    """How the pictures of each arm differ, as a set, from those in --held: sets.csv."""
    network = None
    if args.features:
        try:
            network = torch.jit.load(args.features)
        except Exception as error:              # torch, once more
            fail(f"--features: {args.features} is no TorchScript ({str(error)[:80]}); give one")
    held = find_photos(args.held, "--held")
    real = torch.cat([features(load_image(path, "--held"), network) for path in held])
    rows = []
    for arm, results in paths.items():
        fake = torch.cat([features(load_image(path), network) for path in results])
        recall, coverage = recall_coverage(real, fake)
        rows.append(dict(arm=arm, n=len(fake), frechet=frechet(real, fake), recall=recall,
                         coverage=coverage))
        say(str(rows[-1]))
    save(os.path.join(args.out, "sets.csv"), rows)

def quick_flags(args, arm: str) -> list:
    """What makes an arm quick: few pixels, few steps, and a prior of two steps."""
    flags = ["--size", "32"]
    if arm.startswith("fit-dip") or "--init dip" in arm:
        flags += ["--iters", "6"]
    if arm.startswith("sample") or "adapt" in arm or "guide" in arm:
        kind = "none" if "--init noise" in arm else "dip"
        folder = os.path.join(args.out, "prior")
        flags += ["--ckpt", os.path.join(folder, f"{kind}.pt")]
        if not os.path.exists(flags[-1]):
            train = ["train", "--prior", kind, "--steps", "2", "--width", "8", "--batch", "2"]
            main([*train, "--out", folder])
    return flags

def cmd_evaluate(args) -> int:
    """evaluate: every arm on every photo with every seed, each in a folder of its own; a table."""
    if args.features and not args.held:
        fail("--features: it has no effect without --held; leave it out")
    if args.quick and args.size:
        fail("--size: it has no effect with --quick; leave it out")
    photos = find_photos(args.images, "--images")
    # A bad arm is found here, before the first fit; a bad photo, or a fit that diverges, later.
    arms = suite_arms(args, photos[0])
    shared = ["--size", str(args.size or 128), "--device", args.device.type]
    if args.bf16:
        shared.append("--bf16")
    if args.quick:
        photos = photos[:1]
    (rank, world), bad, rows, paths = ranks(), [], [], {}
    banner(args, f"{len(arms)} arms x {len(photos)} photos x {args.seeds} seeds")
    jobs = [(photo, args.seed + 100 * k) for k in range(args.seeds) for photo in photos]
    if args.held:                       # a set of samples needs other noise for each photo
        jobs = [(photo, seed + 100 * args.seeds * n) for n, (photo, seed) in enumerate(jobs)]
    for photo, seed in jobs[rank::world]:
        name = os.path.relpath(photo, args.images)
        for arm in arms:
            argv = [*arm.split(), *shared, "--image", photo, "--seed", str(seed)]
            if args.quick:
                argv += quick_flags(args, arm)
            out = os.path.join(args.out, folder_name(f"{name} {seed}"), folder_name(arm))
            try:
                rows.append(dict(photo=name, arm=arm) | run_arm(argv, out))
                paths.setdefault(arm, []).append(os.path.join(out, "result.png"))
            except SystemExit:
                bad.append(f"{name}: {arm}")
    table = os.path.join(args.out, args.suite if rank == 0 else f"{args.suite}-{rank}")
    if rows:
        save(table + ".csv", rows)
        save(table + ".md", markdown(rows).encode())
        say(markdown(rows))
    if args.held and paths:
        compare_sets(args, paths)
    if bad:
        fail(f"--arms: not run, see above: {'; '.join(bad)}")
    return 0

# ---- 11. The command line -----------------------------------------------------------------------

def in_range(kind, low: float, high: float, text: str):
    """An argparse type: a number within the limits, low <= number <= high."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not within {low}..{high}")
    return value

def number_or_auto(low: int, high: int, text: str):
    """An argparse type: a whole number within the limits, or None for 'auto'."""
    if text == "auto":
        return None
    return in_range(int, low, high, text)

def add_settings(parser, kind):
    """A flag for each field of a dataclass of settings. None, the default, means: not given."""
    for f in fields(kind):
        allowed = f.metadata["allowed"]
        text = f.metadata["help"]
        if f.default is not None:
            text += f" ({f.default})"
        flag = "--" + f.name.replace("_", "-")
        if isinstance(allowed, list):
            parser.add_argument(flag, choices=allowed, help=text)
        else:
            parser.add_argument(flag, type=partial(in_range, f.type, *allowed), help=text)

def make_parser() -> argparse.ArgumentParser:
    """The four commands and their flags. In the help, brackets hold what is taken by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit-dip", help="fit a DIP to a photo; it stops by itself")
    sample = commands.add_parser("sample", help="a DDPM from noise, a photo, or a DIP of it")
    train = commands.add_parser("train", help="train a DDPM on photos or an array")
    evaluate = commands.add_parser("evaluate", help="tables; every row is a command line")
    share, whole = partial(in_range, float, 0), partial(in_range, int, 1)
    add = sample.add_argument
    add("--init", choices=["noise", "observed", "dip"], default="noise", help="start (noise)")
    add("--start", type=partial(number_or_auto, 1, 1000), help="t0, or auto: the start rule (auto)")
    add("--steps", type=partial(whole, 1000), help="network calls (20; from noise 100)")
    add("--samples", type=partial(whole, 1024), help="how many; their mean counts (4; grid 16)")
    add("--eta", type=partial(share, 1), help="0 DDIM .. 1 ancestral (1; grid 0)")
    add("--no-guide", action="store_true", help="start from the DIP, but do not join it on the way")
    for parser_ in (fit, sample):
        add = parser_.add_argument
        add("--image", help="a photo, or a folder of them: clean, and degraded here (astronaut)")
        add("--task", help=f"{TASKS} (fit-dip denoise:25, sample superres:4)")
        add("--observed", action="store_true", help="--image is degraded; denoise finds its level")
        add("--mask", help="for inpaint: a picture of the photo's size, white = known")
        add("--told", type=partial(share, 255), help="SIGMA told to the fit; 0: estimated (SIGMA)")
        add("--size", type=partial(whole, 10 ** 5), help="centre crop (all of --image; else 128)")
        add("--ckpt", help="prior (runs/train/dip.pt or none.pt, trained where missing)")
        add_settings(parser_, Settings)
    add = train.add_argument
    add("--data", default=os.path.join(PHOTOS, "train"), help="folder, .npz, .npy (images/train)")
    add("--steps", type=partial(whole, 10 ** 8), default=600, help="in all (600)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add_settings(train, Training)
    add = evaluate.add_argument
    add("suite", nargs="?", default="all", choices=[*SUITES, "all"], help="which table (all)")
    add("--images", default=os.path.join(PHOTOS, "test"), help="a folder of photos (images/test)")
    add("--arms", help="a file of command lines, one a line, in place of the suite's")
    add("--seeds", type=partial(whole, 99), default=1, help="--seed, --seed + 100, and so on (1)")
    add("--size", type=partial(whole, 10 ** 5), help="centre crop of each photo (128)")
    add("--quick", action="store_true", help="one photo of 32 x 32, 6 steps: does it run?")
    add("--held", help="a folder of pictures to compare the arms' results with, as a set")
    add("--features", help="TorchScript network for --held, in place of a random one")
    for name, command in commands.choices.items():
        add = command.add_argument
        add("--seed", type=partial(in_range, int, 0, 10 ** 9), default=0, help="(0)")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto)")
        add("--bf16", action="store_true", help="bfloat16: faster where the machine has it")
        add("--out", default=os.path.join("runs", name), help=f"a folder (runs/{name})")
        command.error = fail
    parser.error = fail
    return parser

def fill_defaults(args):
    """Every default of fit-dip and sample that depends on other flags."""
    if args.command == "fit-dip":
        args.init = args.start = None
        args.task = args.task or "denoise:25"
    else:
        given_any = args.image or args.task or args.observed or args.mask
        grid = args.init == "noise" and not given_any
        args.samples = args.samples or (16 if grid else 4)
        args.steps = args.steps or (100 if args.init == "noise" else 20)
        if args.eta is None:
            args.eta = 0.0 if grid else 1.0
        if grid:
            args.size = args.size or 64
            return
    args.task = args.task or "superres:4"
    if args.image is None:
        if args.observed or args.mask:
            fail("--image: --observed and --mask need the photo; name it with --image FILE")
        args.image = os.path.join(PHOTOS, "test", "astronaut.png")
        args.size = args.size or 128

def refuse_idle_flags(args):
    """A flag that would change nothing is an error, not a silence."""
    idle = {}
    name, value = parse_task(args.task) if args.task else (None, None)
    method = args.method or "staged"
    source = args.input or METHODS[method][0]
    aim = args.target or METHODS[method][1]
    if name != "inpaint":
        idle["mask"] = "without --task inpaint"
    elif args.mask and value is not None:
        idle["task"] = "as inpaint:SHARE where --mask says what is missing: give inpaint alone"
    if name != "denoise":
        idle.update(dict.fromkeys(("told", "turns", "hold"), "without noise"))
    if aim != "conjugate":
        idle["turns"] = "without the conjugate target"
    if source == "fixed" and aim == "plain":
        idle.update(dict.fromkeys(("high", "low", "shape", "fresh"), "without a ladder"))
    if source == "fixed" and method == "adapt":
        idle["input"] = "as fixed: a trained DDPM cannot denoise the fixed z"
    if method not in ("staged", "adapt") or source == "fixed" or args.stop in ("wmv", "emv"):
        idle["crop"] = "with this method, input or stop"
    if args.stop in ("wmv", "emv"):
        idle["rungs"] = "with --stop wmv or emv, which look at every step"
    if method == "adapt" and args.nets in (None, 1):
        idle.update(dict.fromkeys(("width", "depth"), "with --method adapt"))
    if args.command == "fit-dip" and method not in ("adapt", "guide"):
        idle["ckpt"] = "without --method adapt or guide"
    if args.stop not in (None, "holdout"):
        idle.update(dict.fromkeys(("hold", "tail"), "without --stop holdout"))
    if args.command == "sample" and args.init != "dip":
        idle.update({name: "without --init dip" for name in given(args, Settings)})
        idle["no_guide"] = "without --init dip"
    if args.init == "noise":
        idle["start"] = "with --init noise, which starts at t = 1000"
    for name, reason in idle.items():
        value = getattr(args, name, None)
        if value is not None and value is not False:
            fail(f"--{name.replace('_', '-')}: it has no effect {reason}; leave it out")

def parse(argv: list) -> argparse.Namespace:
    """A command line with its defaults; ends in an error where it makes no sense."""
    args = make_parser().parse_args(argv)
    args.argv = argv
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = max(have, key=have.get) if args.device == "auto" else args.device    # the first there is
    if not have[kind]:
        fail(f"--device: there is no {kind} here; use --device auto")
    number = int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
    args.device = torch.device(kind, number)
    if args.command in ("fit-dip", "sample"):
        fill_defaults(args)
        refuse_idle_flags(args)
    return args

def run(args) -> int:
    """Run a parsed command; returns the exit code."""
    save(os.path.join(args.out, ".writable"), b"")
    os.remove(os.path.join(args.out, ".writable"))
    # The folder can be written to. In bfloat16, only the networks' products are.
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        if args.command in ("fit-dip", "sample"):
            return each_photo(args, fit_one if args.command == "fit-dip" else sample_one)
        return cmd_train(args) if args.command == "train" else cmd_evaluate(args)

def main(argv: list | None = None) -> int:
    """Run one command (argv without the program's name); returns the exit code."""
    if sys.platform == "linux":     # glibc keeps what was freed: new pages are a third of a step
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1)):    # M_MMAP_, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    try:
        return run(parse(sys.argv[1:] if argv is None else list(argv)))
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
