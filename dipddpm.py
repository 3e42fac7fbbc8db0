"""Deep Image Prior x DDPM in one file: from the equations to restored photos.

A Deep Image Prior (DIP) is an untrained network fitted to one image; a DDPM is a denoiser trained
on many images and run backwards from noise. Three lessons, to be read from the top:

    1  a DDPM (sections 1, 2, 4)                       python dipddpm.py train
    2  a DIP that learns from falling noise, as a DDPM
       does, and knows when to stop (3, 5)             python dipddpm.py fit-dip
    3  the two joined: DDPM, DIP, DDPM (6)             python dipddpm.py sample --init dip
       the evidence for all three (10)                 python dipddpm.py evaluate stopping

Notation (pixels lie in [-1, 1]; tensors are N x C x H x W; time t = 0..T, where t = 0 is clean):
    x, xhat, y     the clean image, an estimate of it, the observation y = A x + sigma n
    A, A^+         what the observation kept of the image, and its pseudo-inverse
    abar_t         the signal's share: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    sigma_t        sqrt((1 - abar_t) / abar_t), the noise level of x_t / sqrt(abar_t)
    eps, n; w      white noise of level 1; w: fresh noise of the level of y's (0.2 if it has none)
    a              a rung's noise, in units of that of y: its pair is y + a w and y - w / a
    R; r_t^2       estimated mean squared error of the DIP (held-out risk); of the DDPM's x_0 at t
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial

# Set before torch is loaded: waiting threads spin for a moment, then sleep, so that a busy machine
# does not stall a fit; and MKL adds up in one order, so that the same seed gives the same bytes.
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

def seed_weights(seed: int):
    """New networks, and all noise that has no stream of its own, depend on the seed alone."""
    torch.manual_seed(stream(seed, INIT).initial_seed())

# ---- 1. The diffusion process (Ho et al. 2020, sections 2 and 3) --------------------------------
# Noise is added to an image in T small steps. Their sum has a closed form, so x_t is drawn in one.
# x_t / sqrt(abar_t) is x_0 + sigma_t eps, which is what a photo with white noise is: one with noise
# of level sigma belongs to the t where sigma_t = sigma. That is the hinge between the two methods.

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
        """The start rule: the smallest t >= 1 with sigma_t^2 >= mse, whose noise hides it."""
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

    forward(x): N x cin x H x W of any size to N x cout x H x W in [-1, 1]. It takes a noise level
    only so that it can be called as a Prior is, and does not use it.
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

GREY_SPREAD = 0.5               # how far the pixels of photos are from 0
GUESS_SPREAD = 0.15             # how far an interpolation is off, about; a DIP, too

def says_something(clue: Tensor) -> Tensor:
    """Whether each of N clues tells anything, N x 1 x 1 x 1: a clue of zeros does not."""
    return clue.abs().amax(dim=(1, 2, 3), keepdim=True) > 0

def guess_spread(clue: Tensor) -> Tensor:
    """The level of the error of a clue's guess, N x 1 x 1 x 1. If nothing is told, the guess is 0,
    which is grey."""
    return torch.where(says_something(clue), GUESS_SPREAD, GREY_SPREAD)

class UNet(nn.Module):
    """The DDPM's network eps_theta(x_t, t) (Ho et al. 2020, appendix B), on 2 x 2 blocks of pixels;
    told of y it is eps_theta(x_t, t, y) (Saharia et al. 2022).

    forward(x, t) gives the noise eps in x_t, in the shape of x_t. x holds x_t, N x channels x H x W
    of any size; t: N of int64. If it is told of y, a clue follows, in further channels: a guess of
    x, and in one channel the share of each pixel that y knows, 0 to 1 (section 3, Task.clue).
    """
    def __init__(self, channels=3, width=48, mults=(1, 2, 3), schedule="linear"):
        super().__init__()
        self.channels = channels
        self.width = width
        self.schedule = NoiseSchedule(1000, schedule)
        widths = [mult * width for mult in mults]
        top = widths[-1]
        emb = 4 * width
        widen = nn.Linear(width, emb)
        mix = nn.Linear(emb, emb)
        self.time = nn.Sequential(widen, nn.SiLU(), mix, nn.SiLU())
        self.stem = nn.Conv2d(4 * (2 * channels + 1), width, 3, padding=1)
        pairs = zip([width] + widths, widths)
        self.enc = nn.ModuleList([ResBlock(cin, cout, emb) for cin, cout in pairs])
        self.mid = ResBlock(top, top, emb)
        pairs = zip([top] + widths[::-1], widths[::-1])
        self.dec = nn.ModuleList([ResBlock(below + cout, cout, emb) for below, cout in pairs])
        self.out = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps, by way of x_0, which is a line plus a correction (Karras et al. 2022, eq. 7).

        Two estimates of x_0 are at hand: z = x_t / sqrt(abar_t), with an error of level sigma_t,
        and the guess (a DIP, or the interpolation), with one of about its spread. Their mean by
        precision is the line, and `error` is the level of the line's error. The network only says
        how many times `error` is to be added. Where nothing is told, the guess is 0, and line =
        c_skip z and error = c_out of eq. 7, with sigma_data = GREY_SPREAD.
        """
        if x.shape[1] == self.channels:                                       # no clue: zeros
            x = F.pad(x, (0, 0, 0, 0, 0, self.channels + 1))
        xt, guess, share = x.split([self.channels, self.channels, 1], dim=1)
        sigma2 = per_image(self.schedule.sigma[t.cpu()] ** 2, x)
        spread2 = guess_spread(x[:, self.channels:]) ** 2 * (1 - share)       # known: no error
        z = xt / per_image(self.schedule.abar[t.cpu()].sqrt(), x)
        line = (z * spread2 + guess * sigma2) / (spread2 + sigma2)
        error = (spread2 * sigma2 / (spread2 + sigma2)).sqrt()
        x0 = line + error * self.correction(torch.cat([line, guess, share], dim=1), t)
        return (z - x0) / sigma2.sqrt()

    def correction(self, x: Tensor, t: Tensor) -> Tensor:
        """The hourglass itself: what that line gets wrong, in units of its expected error."""
        height, width = x.shape[-2:]
        emb = self.time(timestep_embedding(t, self.width))
        x = pad_to(x, 2 ** len(self.enc))
        x = self.stem(F.pixel_unshuffle(x, 2))                                # H/2 x W/2
        skips = []
        for level, block in enumerate(self.enc):
            if level > 0:
                x = F.avg_pool2d(x, 2)                                        # H/4 x W/4, ...
            x = block(x, emb)
            skips.append(x)
        x = self.mid(x, emb)
        for level, block in enumerate(self.dec):
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0)                        # ..., H/2 x W/2
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.out(x).float(), 2)[..., :height, :width]

@torch.no_grad()
def tiled(network, x: Tensor, *more, side: int = 768, margin: int = 160) -> Tensor:
    """network(x, *more) tile by tile, in bounded memory. No network looks beyond the margin."""
    rows = []
    for top in range(0, x.shape[2], side):
        row = []
        for left in range(0, x.shape[3], side):
            above = min(top, margin)
            before = min(left, margin)
            seen = x[..., top - above:top + side + margin, left - before:left + side + margin]
            made = network(seen, *more)
            row.append(made[..., above:above + side, before:before + side])
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)

# ---- 3. The observation: y = A x + sigma n ------------------------------------------------------
# A hides pixels of the clean image x, or averages them; there may be noise, too. An observation can
# be split in two parts: one is fitted, and the other judges the fit. What the judge says, R, is all
# that is known of the error of a fit. From `Noise` on the section is about the noise of a photo. No
# lesson needs more of it than white noise: at a first reading go on with section 4.

@dataclass
class Task:
    """What an observation kept of the image: A averages s x s pixels, then hides where mask is 0.

    Either there is noise (denoise: sigma > 0, scale 1, no mask), or there is none (inpaint: a mask;
    superres: scale > 1).
    """
    name: str
    sigma: float = 0.0              # standard deviation of the noise, in units of [-1, 1]
    scale: int = 1                  # s, the side of the blocks that are averaged
    mask: Tensor = torch.tensor(1.0)    # 1 known, 0 missing: 1 x 1 x h x w, or 1.0 for all
    noise: "Noise | None" = None    # as a photo has it; None: white noise of level sigma

    def kind(self) -> str:
        """What y has: noise, or else holes, or means of blocks."""
        if self.sigma > 0:
            return "noise"
        return "blocks" if self.scale > 1 else "holes"

    def noise_of_y(self) -> "Noise":
        """The noise as it was found in the photo, or else white noise of level sigma."""
        return self.noise or Noise(self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        """A x: N x C x H x W to N x C x H/s x W/s."""
        return F.avg_pool2d(x, self.scale) * self.mask

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, the smallest x with A x = y: each known pixel repeated s x s times."""
        return F.interpolate(y * self.mask, scale_factor=float(self.scale))

    def clue(self, y: Tensor, channels: int, guess: Tensor | None = None) -> Tensor:
        """What a DDPM is told of y: a guess of x, the interpolation if none is given, and the share
        of each pixel that y knows, the diagonal of A^+ A. N x (channels + 1) x H x W."""
        if guess is None:
            guess = self.interpolate(y)
        share = self.pinv(self.known(y)) / self.scale ** 2
        return torch.cat([guess.expand(-1, channels, -1, -1), share], dim=1)

    def project(self, x: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
        """Data consistency, x - gain A^+ (A x - y) (DDNM, Wang et al. 2023, eq. 13; a gain below 1,
        for a y with noise, is their DDNM+)."""
        return x - gain * self.pinv(self.forward(x) - y)

    def known(self, y: Tensor) -> Tensor:
        """The mask for all of y: N x 1 x h x w."""
        return self.mask.to(y).expand(len(y), 1, *y.shape[2:])

    def keep_known(self, x: Tensor, y: Tensor) -> Tensor:
        """x with what y knows of it put back, as y gives it; or x itself, if y is noisy."""
        return x if self.sigma > 0 else self.project(x, y)

    def mse(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of (A x - y)^2 over the known pixels; y must be 0 elsewhere, as A x is."""
        error = (self.forward(x) - y) ** 2
        return error.mean() / self.mask.mean().clamp(min=1e-9)

    def interpolate(self, y: Tensor) -> Tensor:
        """A plain first guess of x: of a noisy photo y itself; else holes filled from coarse to
        fine, then bicubic enlargement, in which the means of blocks are set to those that were
        given (worth 0.2 dB)."""
        filled = fill_holes(y, self.mask)
        if self.scale == 1:
            return filled
        enlarged = F.interpolate(filled, scale_factor=float(self.scale), mode="bicubic")
        return self.project(enlarged, y)

def fill_holes(y: Tensor, mask: Tensor) -> Tensor:
    """The missing pixels from the mean of the known ones around them, coarse to fine."""
    if mask.all() or max(y.shape[-2:]) == 1:
        return y
    weight = F.avg_pool2d(mask, 2, ceil_mode=True)
    coarse = F.avg_pool2d(y * mask, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill_holes(coarse, (weight > 0).float())
    return torch.where(mask > 0, y, F.interpolate(coarse, y.shape[-2:], mode="bilinear"))

def hold_out(y: Tensor, task: Task, gen: torch.Generator, a: float = 0.25) -> tuple:
    """Split y before the fit: (what the fit sees, its task, and the judge of a fit, xhat -> R).

    With noise, y + a w is fitted and y - w / a judges. Given x the two are uncorrelated, if w has
    the covariance of y's noise, whatever that is (Pang et al. 2021; Oliveira et al. 2021). Without
    noise a tenth of the known pixels judges, in squares that are as deep as the holes.
    """
    if task.sigma > 0:
        noise = task.noise_of_y()
        w = noise.draw(y, gen)
        y_fit = y + a * w
        y_val = y - w / a
        variance = noise.level ** 2 + (w ** 2).mean().item() / a ** 2       # of the noise of y_val
        noisier = replace(task, sigma=task.sigma * math.hypot(1, a))
        return y_fit, noisier, partial(held_out_risk, task, y_val, variance)
    known = task.known(y)
    count = max(1, round(0.1 * known.sum().item()))
    side = min(hole_side(known), int(count ** 0.5))
    lots = draw_lots(known, side, gen)          # the known pixels with the lowest are the judges
    judges = (lots <= lots.flatten().kthvalue(count).values).float()
    seen = known - judges
    judge = partial(held_out_risk, replace(task, mask=judges), y * judges, 0.0)
    return y * seen, replace(task, mask=seen), judge

def draw_lots(known: Tensor, side: int, gen: torch.Generator) -> Tensor:
    """Lots for N x 1 x H x W pixels: a random number in 0..1 for each square; 2 where unknown."""
    count, _, height, width = known.shape
    squares = torch.rand((count, 1, height // side + 1, width // side + 1), generator=gen)
    lots = F.interpolate(squares.to(known), scale_factor=float(side))[..., :height, :width]
    return torch.where(known > 0, lots, 2.0)

def split_pixels(y: Tensor, task: Task, a: float, side: int, gen: torch.Generator) -> tuple:
    """The pair where y has holes: (the task of the seen pixels, the task of the hidden ones).

    A known pixel is hidden with probability a^2 / (1 + a^2): with noise, z2 = y - w / a has this
    share of what y knows. The hidden pixels form squares that are as deep as the holes.
    """
    mask = task.known(y)
    hidden = (draw_lots(mask, side, gen) < a ** 2 / (1 + a ** 2)).float()
    return replace(task, mask=mask - hidden), replace(task, mask=hidden)

def held_out_risk(task: Task, y_val: Tensor, variance: float, xhat: Tensor) -> float:
    """R: the mean of (A (xhat - x))^2 over the held-out part y_val, whose noise has this variance,
    estimated without bias.

    xhat may be any image that was made without that part (Theorem 4 of report.md). If R itself was
    used to choose it, as the best stage or by a share, R comes out too low, but only by little.
    """
    return task.mse(xhat, y_val).item() - variance

def hole_side(mask: Tensor) -> int:
    """The side of a square that is about as deep as the mask's holes. It is 1 where the holes are
    scattered pixels, as long as these are no more than some 90 % of all."""
    depth = 0.0
    reached = mask
    # Known pixels grow by one ring at a time; the mean number of rings is the depth.
    while reached.any() and not reached.all():
        depth += ((1 - reached).sum() / (1 - mask).sum()).item()
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
    # A square of side S has the depth S / 6 + 1 / 2. This is solved for S, with the depth rounded
    # down and then lowered by 1 / 3, so that scattered pixels give 1.
    return max(1, 6 * int(depth) - 5)

@dataclass
class Noise:
    """A photo's noise, found in it, or white if told; levels are standard deviations."""
    level: float                    # of all, if white; else where it is flattest; in [-1, 1]
    thirds: tuple = ()              # the same for the photo's dark, middle and bright third
    brightness: tuple = ()          # of these places, in [-1, 1]
    neighbour: float = 0.0          # correlation of a pixel's noise with its neighbour's
    white: bool = True              # whether its level alone describes it
    patches: Tensor | None = None   # the flattest places, minus mean and slope: K x C x side x side
    floor: float = 0.0              # of a JPEG's own error, which flat places do not show

    def strength(self) -> float:
        """The level that a fit has to reckon with."""
        return max(self.level, self.floor)

    def level_at(self, image: Tensor) -> Tensor:
        """The level for each pixel of an image, by its brightness. A third that has no flat places
        looks too noisy: it counts as twice the level at most."""
        if self.white:
            return torch.tensor(self.strength())
        levels = np.clip(self.thirds, self.strength(), 2 * self.strength())
        light = image.mean(dim=1, keepdim=True).cpu()
        return torch.from_numpy(np.interp(light, self.brightness, levels)).to(image)

    def draw(self, like: Tensor, gen: torch.Generator) -> Tensor:
        """Noise of this level that is correlated as the patches are; like: 1 x C x H x W.

        White noise that is convolved with an image has that image's autocovariance (Galerne et al.
        2011): the sum over the patches has the mean of theirs.
        """
        if self.white:
            return self.level * torch.randn(like.shape, generator=gen).to(like)
        count, _, side, _ = self.patches.shape
        height, width = like.shape[2:]
        eps = torch.randn((1, count, height + side - 1, width + side - 1), generator=gen)
        w = F.conv2d(eps, self.patches.movedim(0, 1))
        energy = (self.patches ** 2).sum() / self.patches.shape[1]          # the variance of w
        return self.level / math.sqrt(max(energy.item(), 1e-20)) * w.to(like)

def find_noise(y: Tensor, floor: float = 0.0) -> Noise:
    """Look for the noise of a photo, 1 x C x H x W, where it is flat.

    The flattest twentieth of all squares, each minus its mean and slope, is taken for noise. That
    gives the level only roughly. estimate_sigma is exact to some percent, but only for white noise;
    so it is asked about every second pixel as well: white noise has the same level there, other
    noise more.
    """
    squares = cut_squares(y, min(16, *y.shape[2:]))
    whole = (squares.abs() > 0.98).float().mean(dim=(1, 2, 3)) < 0.05       # hardly clipped
    if whole.sum() > 100:
        squares = squares[whole]
    side = squares.shape[-1]
    line = torch.linspace(-1, 1, side)
    slopes = torch.stack([torch.ones(side, side), line.expand(side, side),
                          line[:, None].expand(side, side)])
    plane, _ = torch.linalg.qr(slopes.view(3, -1).T)
    pixels = squares.flatten(2)
    pixels = pixels - pixels @ plane @ plane.T
    energy = (pixels ** 2).mean(dim=(1, 2))
    brightness = squares.mean(dim=(1, 2, 3))
    level, flattest = flat_level(energy)
    order = brightness.argsort()
    thirds = []
    places = []
    parts = order.tensor_split(3) if len(order) > 2 else [order] * 3
    for third in parts:
        third_level, flat = flat_level(energy[third])
        thirds.append(third_level)
        places.append(brightness[third][flat].mean().item())
    sixteen = flattest[::max(1, len(flattest) // 16)][:16]          # from first to last
    patches = pixels[sixteen].view(-1, y.shape[1], side, side)
    products = patches[..., 1:] * patches[..., :-1]
    neighbour = products.mean() / (patches ** 2).mean().clamp(min=1e-20)
    sigma = estimate_sigma(y)
    apart = estimate_sigma(y[..., ::2, ::2])
    both_agree = level / 3 < sigma < 1.25 * level
    alike_apart = apart < 1.4 * sigma
    white = both_agree and alike_apart and sigma > floor
    if white:
        level = sigma
    return Noise(level, tuple(thirds), tuple(places), neighbour.item(), white, patches, floor)

def cut_squares(y: Tensor, side: int) -> Tensor:
    """The squares of a photo as a batch; of a large photo 20,000 to 80,000, from all over."""
    step = max(1, int((y.shape[2] * y.shape[3] / 20000) ** 0.5))
    squares = y[0].cpu().unfold(1, side, step).unfold(2, side, step)
    return squares.permute(1, 2, 0, 3, 4).flatten(0, 1)

def flat_level(energy: Tensor) -> tuple[float, Tensor]:
    """The root mean square of the flattest twentieth of some squares, 8 at least, and which these
    are."""
    flattest = energy.argsort()[:max(8, len(energy) // 20)]
    return energy[flattest].mean().sqrt().item(), flattest

def estimate_sigma(y: Tensor) -> float:
    """The level of white noise in y, 1 x C x H x W, to some 3 % (Chen, Zhu and Heng 2015).

    Patches of a photo fill few dimensions, white noise fills all: the eigenvalues of the patches'
    covariance that have no share in the photo spread evenly around sigma^2. The largest are left
    out until mean and median of the rest agree.
    """
    patches = cut_squares(y, min(5, *y.shape[2:])).flatten(1).double()
    if len(patches) < 2:
        return 0.0
    cov = torch.atleast_2d(patches.T.cov())
    values = torch.linalg.eigvalsh(cov).clamp(min=0)                        # the smallest first
    for count in range(len(values), 0, -1):
        rest = values[:count]
        if rest.mean() <= rest.median():
            break
    return rest.mean().sqrt().item()

def give_back(xhat: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Put back what a fit removed where that is stronger than the noise: it was detail.

    In a window of 11 x 11 the removed part y - xhat is noise of variance level^2 plus the detail
    that xhat lacks. If these two are independent, the Wiener filter keeps 1 - level^2 / mean square
    of it as detail. So xhat is mixed with y, by their estimated errors, from place to place.
    """
    removed = y - xhat
    energy = (removed ** 2).mean(dim=1, keepdim=True)
    energy = F.pad(energy, (5, 5, 5, 5), mode="replicate")
    energy = F.avg_pool2d(energy, 11, stride=1)
    # The energy of the noise alone differs from window to window: by a third, to be safe.
    detail = 1 - 1.3 * noise.level_at(xhat) ** 2 / energy.clamp(min=1e-12)
    return xhat + detail.clamp(min=0) * removed

# ---- 4. The DDPM: training and sampling ---------------------------------------------------------
# Lesson 1. Training asks the network for the noise in x_t; sampling takes that noise away, a little
# at a time. For half of the training images the network is told something, too: some of the pixels,
# or the means of blocks. So one network draws pictures from nothing, and completes those known in
# part. With `--dips` a quarter of a batch is told a DIP (section 6), and half of the rest nothing.
# With `--task` it learns a single task, and that one better: section 6 takes such a one by default.
# To run it: `dipddpm.py train`, then `sample --task inpaint:1`, or `sample --task superres:4`.

def random_place(image: Tensor, side: int, gen: torch.Generator) -> tuple:
    """The index of a random square of an image; of all of it, where it is smaller."""
    height, width = image.shape[-2:]
    top = int(torch.randint(max(1, height - side + 1), (), generator=gen))
    left = int(torch.randint(max(1, width - side + 1), (), generator=gen))
    return Ellipsis, slice(top, top + side), slice(left, left + side)

def random_patches(images: list, count: int, side: int, gen: torch.Generator) -> Tensor:
    """Random squares of some C x H x W images: count x C x side x side."""
    picked = torch.randint(len(images), (count,), generator=gen).tolist()
    return torch.stack([images[i][random_place(images[i], side, gen)] for i in picked])

def random_holes(side: int, hole: int, gen: torch.Generator) -> Task:
    """A task in which any share of the pixels is missing, in squares of a given side."""
    lots = draw_lots(torch.ones(1, 1, side, side), hole, gen)
    return Task("holes", mask=(lots > torch.rand((), generator=gen)).float())

def random_task(name: str, side: int, gen: torch.Generator) -> Task:
    """'superres:4', or 'inpaint:0.8' with another mask each time, for squares of a given side."""
    kind, _, number = name.partition(":")
    if kind == "superres":
        return Task(name, scale=int(float(number)))
    lots = torch.rand((1, 1, side, side), generator=gen)
    return Task(name, mask=(lots >= float(number)).float())

def random_clues(x0: Tensor, gen: torch.Generator, name: str | None = None) -> Tensor:
    """What observations of images, N x C x H x W, would tell of them: N x (C + 1) x H x W. Of half
    of them nothing; of the others the means of blocks, or what is around small or large holes. If
    one task is named, then what that one tells, of all of them."""
    count, channels, _, side = x0.shape
    if name is not None:
        tasks = [random_task(name, side, gen) for _ in range(6)]
    else:
        scales = [scale for scale in (2, 3, 4, 6, 8) if side % scale == 0] or [1]
        scale = scales[int(torch.randint(len(scales), (), generator=gen))]
        hole = int(torch.randint(1, 2 + side // 6, (), generator=gen))
        nothing = Task("nothing", mask=torch.zeros(1, 1, side, side))
        tasks = [nothing, nothing, nothing, Task("blocks", scale=scale),
                 random_holes(side, 1, gen), random_holes(side, hole, gen)]
    order = torch.randperm(6, generator=gen).tolist()       # a small batch has fewer parts
    clues = []
    for k, part in zip(order, x0.split(math.ceil(count / 6))):
        y = tasks[k].forward(part)
        clues.append(tasks[k].clue(y, channels))
    return torch.cat(clues)

def draw_batch(images: list, dips: list, config: dict, gen: torch.Generator) -> tuple:
    """(x_0, eps, clues) of a step of training. Where there are DIPs of training images, a quarter
    of the batch are squares of these, and their clues hold the DIP."""
    count = config["batch"]
    with_dip = count // 4 if dips else 0
    x0 = random_patches(images, count - with_dip, config["patch"], gen) / 127.5 - 1
    eps = torch.randn(x0.shape, generator=gen)
    clues = random_clues(x0, gen, config.get("task"))
    if with_dip > 0:
        channels = x0.shape[1]
        examples = random_patches(dips, with_dip, config["patch"], gen)
        x0 = torch.cat([x0, examples[:, :channels]])
        clues = torch.cat([clues, examples[:, channels:]])
        eps = torch.cat([eps, torch.randn(x0[-with_dip:].shape, generator=gen)])
    return x0, eps, clues

@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, rate: float):
    """Move averaged weights, and the statistics of BatchNorm, towards the model's."""
    for averaged, newest in zip(ema.state_dict().values(), model.state_dict().values()):
        averaged.copy_(averaged + rate * (newest - averaged))

def update_loss(eps_loss: Tensor, told: Tensor, t: Tensor, losses: Tensor, clues: Tensor):
    """Move the running means eps_loss[told, t] towards the newest losses, per value that is not
    known: a known pixel has no error, and the known mean of a block has little."""
    unknown = 1 - clues[:, -1].mean(dim=(1, 2)).cpu()
    newest = losses / unknown.clamp(min=0.01)
    before = eps_loss[told, t]
    eps_loss[told, t] = torch.where(before.isnan(), newest, before.lerp(newest, 0.2))

def train_ddpm(state: dict, model, ema, images: list, steps: int, rank=0, world=1) -> Iterator:
    """Ho et al. Algorithm 1, told what observations know; yields the loss at every step.

    t is uniform on 1..t_max. For an image of which something is told, t is the larger of two such
    draws, since the clue matters more where there is more noise.

    images: uint8 C x H x W. state holds all that a step changes, so a resumed run goes on bit for
    bit. Of `world` processes, this one takes patches rank, rank + world, and so on, of each batch.
    """
    config = state["config"]
    device = next(model.parameters()).device
    schedule = NoiseSchedule(1000, config["schedule"])
    batch = config["batch"]
    optimisers = make_optimisers(model, config["lr"], config["lr"] / 20)
    gen = stream(config["seed"], TRAIN)
    if state["step"] > 0:
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        gen.set_state(state["rng"])
    while state["step"] < steps:
        state["step"] += 1
        x0, eps, clues = draw_batch(images, state["dips"], config, gen)
        spread = guess_spread(clues).flatten()
        told = says_something(clues).flatten().long()
        draws = torch.randint(1, config["t_max"] + 1, (2, batch), generator=gen)
        t = torch.where(told == 1, draws.amax(dim=0), draws[0])
        mine = slice(rank, None, world)
        t, told, spread = t[mine], told[mine], spread[mine]
        eps, clues = eps[mine].to(device), clues[mine].to(device)
        xt = q_sample(schedule, x0[mine].to(device), t, eps)
        predicted = model(torch.cat([xt, clues], dim=1), t.to(device))
        losses = ((predicted - eps) ** 2).mean(dim=(1, 2, 3)).cpu()         # Ho et al. eq. 14
        # The error of eps is that of the correction, times error / sigma_t (UNet.forward). The
        # weight is (sigma_t / error)^2 = 1 + (sigma_t / spread)^2, as of a missing pixel: so an
        # error of the correction counts the same at every t (Karras et al. 2022, eq. 8).
        weights = 1 + (schedule.sigma[t] / spread) ** 2
        model.zero_grad()
        # Processes average their gradients; the factor world / batch makes all patches count alike.
        ((weights * losses).sum() * world / batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_all(optimisers, min(1, state["step"] / 50))
        update_ema(ema, model, 1 - (1 - 1 / state["step"]) ** 8)    # about the last eighth of steps
        update_loss(state["eps_loss"], told, t, losses.detach(), clues)
        state["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
        state["rng"] = gen.get_state()
        yield losses.mean().item()

def noise_like(x: Tensor, gens: list) -> Tensor:
    """N(0, I) in the shape of x. Image i takes gens[i] alone: it is the same in any batch."""
    images = [torch.randn(x.shape[1:], generator=gen) for gen in gens]
    return torch.stack(images).to(x)

def p_sample_loop(model, schedule: NoiseSchedule, xt: Tensor, t: int, gens: list) -> Tensor:
    """Ho et al. Algorithm 2 from time t, with the posterior's variance: DDIM with all steps and eta
    1 (Prop. 1 of report.md). The commands skip steps, and call ddim_sample."""
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
        abar = schedule.abar[now].item()
        abar_then = schedule.abar[then].item()
        ts = torch.full((len(xt),), now, device=xt.device)
        x0 = predict_x0(schedule, xt, ts, model(xt, ts))
        if refine is not None:
            x0 = refine(x0, now)
        eps = (xt - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        # Song et al.: eq. 16 gives v, the level of fresh noise (0 at the end); eq. 12 is the step.
        v = eta * math.sqrt((1 - abar_then) / (1 - abar) * (1 - abar / abar_then))
        xt = math.sqrt(abar_then) * x0 + math.sqrt(max(0, 1 - abar_then - v ** 2)) * eps
        if v > 0:
            xt = xt + v * noise_like(xt, gens)
    return x0

class Prior(nn.Module):
    """A trained DDPM as a denoiser, from a checkpoint: a plain dict, see `checkpoint`.

    r2[k, t] = sigma_t^2 L_t is the mean squared error of its x_0, since
    x0_pred - x0 = -sigma_t (eps_pred - eps). L_t is the training loss at t, smoothed over 31 t, of
    images of which nothing (k = 0) or something (k = 1) is told, per value that is not known.
    """
    def __init__(self, state: dict):
        super().__init__()
        config = state["config"]
        self.model = UNet(config["channels"], config["width"], schedule=config["schedule"])
        self.model.load_state_dict(state["ema"])
        self.channels = self.model.channels
        self.knows_dips = config["dips"] > 0
        self.t_max = config["t_max"]
        self.task = config.get("task")      # the only one that it has learned; None: any
        self.schedule = self.model.schedule
        # Far from any trained t the loss is taken to be 1, that of a guess without any knowledge.
        seen = (~state["eps_loss"].isnan()).float()
        total = F.avg_pool1d(state["eps_loss"].nan_to_num(0.0), 31, stride=1, padding=15)
        share = F.avg_pool1d(seen, 31, stride=1, padding=15)
        loss = torch.where(share > 0, total / share, 1.0)
        self.r2 = self.schedule.sigma ** 2 * loss

    def forward(self, z: Tensor, sigma: float) -> Tensor:
        """Denoise z = x + sigma n in one call: z is x_t / sqrt(abar_t) at the t of this sigma. Or z
        is a clue (Task.clue), and its guess is drowned in noise of this level here."""
        t = min(self.schedule.start_t(sigma ** 2), self.t_max)
        ts = torch.full((len(z),), t, device=z.device)
        told = z.shape[1] in (2, 4)         # a clue has a channel more than a picture
        image = z[:, :-1] if told else z
        noisy = image.expand(-1, self.channels, -1, -1)     # grey is three equal channels
        clue = []
        if told:
            clue = [noisy, z[:, -1:]]
            noisy = noisy + self.schedule.sigma[t].item() * torch.randn_like(noisy)
        xt = self.schedule.abar[t].sqrt().item() * noisy
        eps = self.model(torch.cat([xt, *clue], dim=1), ts)
        x0 = predict_x0(self.schedule, xt, ts, eps)
        return like_channels(x0, image)

def like_channels(x: Tensor, given: Tensor) -> Tensor:
    """x, or, if `given` is grey, the mean of its channels: a grey question has a grey answer."""
    return x.mean(dim=1, keepdim=True) if given.shape[1] == 1 else x

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for filters that are seen as matrices of c_out x rest (Jordan et
    al. 2024).

    torch.optim.Muon multiplies in bfloat16: processors without such products, which are many, would
    take ten times as long for a step of training. Filters of one shape are one batch of products.
    """
    def __init__(self, filters: list, lr: float, momentum: float = 0.9):
        super().__init__(filters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Move each filter against its momentum, looking ahead as Nesterov does."""
        group = self.param_groups[0]
        by_shape = {}
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(momentum, group["momentum"]).flatten(1)
            by_shape.setdefault(ahead.shape, []).append((p, ahead))
        for (rows, columns), pairs in by_shape.items():
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            with torch.autocast(pairs[0][0].device.type, enabled=False):    # not in bfloat16
                directions = orthogonalise(torch.stack([ahead for _, ahead in pairs]))
            for (p, _), direction in zip(pairs, directions):
                p.sub_(rate * direction.view(p.shape))

def orthogonalise(matrices: Tensor) -> Tensor:
    """K matrices U S V^T to about U V^T, by Newton-Schulz steps X <- (a + b G + c G^2) X where
    G = X X^T.

    All factors of X are polynomials of the first G, so only small squares are multiplied until the
    end. Three steps in place of five are as good.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT).mT
    unit = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = unit @ unit.mT
    one = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    product = one
    for _ in range(3):
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ unit

def make_optimisers(net: nn.Module, muon_lr: float | None, adam_lr: float) -> list:
    """Muon for the filters, Adam for all else; without muon_lr, Adam for all."""
    if muon_lr is None:
        return [torch.optim.Adam(net.parameters(), lr=adam_lr)]
    filters = [p for p in net.parameters() if p.ndim == 4]
    others = [p for p in net.parameters() if p.ndim != 4]
    return [Muon(filters, muon_lr), torch.optim.Adam(others, lr=adam_lr)]

def step_all(optimisers: list, factor: float):
    """A step at a share of the learning rates."""
    for optimiser in optimisers:
        optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * factor
        optimiser.step()

# ---- 5. The staged fit: a DIP with DDPM-like supervision ----------------------------------------
# Lesson 2. Each step draws noise w and makes two images of the noisy photo: z1 = y + a w for the
# network to see, z2 = y - w / a to compare with. Given x their errors are independent (Lemma 2), so
# a network cannot learn the noise of one from the other: on the average it learns x. The ladder
# lowers a from rung to rung, from the most corrupted image to the least, as a DDPM's sampling does.
# Where pixels are missing, and there is no noise, the pair is a part of the known pixels and the
# rest: the network sees one and is compared with the other. At first most are hidden, then few.
# What remains of overfitting, R sees. Where only means of blocks are known there is no pair, and by
# default no R: the network sees its own estimate and falling noise, for a fixed number of steps,
# each time shifted by less than a block.
# To run it: `dipddpm.py fit-dip`.
#
# A camera's noise is not white, but w is. At frequencies where w is stronger than all of y, the
# best linear network would flip the picture's sign: its gain is (S - W^2) / (S + a^2 W^2), where S
# is the power of y and W^2 that of w. The gain is never below -1 / a^2, so a large a makes this
# harmless: for a camera's noise the ladder ends at a = 2.

METHODS = {     # what the network sees, and what its output is compared with
    "staged": ("observed", "conjugate"),    # ours: z1 = y + a w and z2 = y - w / a, while a falls
    "dip": ("fixed", "plain"),              # Ulyanov et al. 2018: a fixed z, and y
    "targets": ("fixed", "noisy"),          # the ladder taken literally: y plus less and less noise
    "selfdiff": ("estimate", "plain"),      # Self-Diffusion, Luo and Huang 2025
    "adapt": ("observed", "conjugate"),     # from a trained DDPM's weights; see told_pair, in_turn
    "primed": ("first", "plain"),           # what a trained DDPM made of y, in falling noise: else
                                            # it would copy that, which is y where y is known
    "guide": ("fixed", "plain"),            # as dip, drawn towards what a trained DDPM denoises
}
WITH_DDPM = {"adapt", "primed", "guide"}        # methods that need a trained DDPM
EDGES = 4                       # the weight of the edges in the loss, if they count
FREE_UNIT = 0.2                 # the ladder's unit where the observation has no noise of its own
TOLD_START = 2.0                # the noise where a told DDPM starts; `--prior dip` trains up to it
TWO_NETS_PIXELS = 192 ** 2      # of larger photos staged fits one network in place of two
FITTED_PIXELS = 16 ** 2         # to fewer known pixels sample fits no DDPM: digits would lose 3 dB
WHOLE_PIXELS = 800 ** 2         # of larger photos a step sees only windows, in bounded memory
WINDOW = 64                     # the side in pixels of each of the 16 windows of a step
PATIENCE = 1000                 # a fit ends after so many steps without a better score
# The turns of the photo in which a DDPM answers; 0 leaves the photo as it is, and each answer is to
# new noise. With adapt the DDPM is fitted to all turns of the photo; else it may know upright ones
# only: enlarging digits, eight turns lose 1.4 dB.
FIRST_TURNS = {"primed": [0, 0, 0, 0], "adapt": range(8)}

def setting(default, help: str, allowed):
    """A field that is a flag, too: one of a list, or a number from low to high."""
    return field(default=default, metadata=dict(help=help, allowed=allowed))

@dataclass
class Settings:
    """How a DIP is fitted; each field is a flag. What is None here is set by `complete`."""
    method: str = setting("staged", "staged: pairs, falling noise; dip: the classic one; targets, "
                          "selfdiff: rivals; adapt, primed, guide: with a DDPM; in sample, "
                          "where y is told: adapt (below 256 known pixels primed)", list(METHODS))
    stop: str = setting(None, "what picks the answer (holdout; superres and told: fixed)",
                        ["holdout", "wmv", "emv", "fixed"])
    input: str = setting(None, "what the net sees (by method)", ["observed", "estimate", "fixed"])
    target: str = setting(None, "what the net aims at (by method)", ["conjugate", "plain", "noisy"])
    iters: int = setting(None, "steps of each network (staged: noise 250, holes 200, superres "
                         "320; adapt: 100, 40, 60; primed 160; else 1000); a DIP after adapt makes "
                         "four times as many, up to 160", (2, 10 ** 7))
    nets: int = setting(None, "networks, fitted in turn, then averaged (adapt without noise: 2; "
                        "staged with noise or holes: 2, but in sample, or above 192 x 192 "
                        "pixels, 1; else 1)",
                        (1, 99))
    optimiser: str = setting(None, "of the network (staged, primed: muon)", ["muon", "adam"])
    lr: float = setting(None, "learning rate (muon 0.05, adam 0.01; adapt less)", (1e-9, 10))
    width: int = setting(32, "channels of the hourglass", (1, 1024))
    depth: int = setting(4, "levels of the hourglass", (1, 5))
    high: float = setting(None, "noise of the first rung in units of sigma, or of 0.2 (staged: "
                          "noise 2, holes 1.5; else by method)", (1e-3, 100))
    low: float = setting(None, "noise of the last rung, in the same units (staged 0.4; else by "
                         "method)", (1e-3, 100))
    rungs: int = setting(None, "stages of each network (staged 30; else by method)", (1, 10 ** 7))
    fresh: int = setting(1, "1: draw new noise in each step; 0: only in each rung", (0, 1))
    turns: int = setting(1, "1: turn and mirror the conjugate pair (superres: shift what is seen "
                         "by less than a block); 0: do not", (0, 1))
    loss: str = setting(None, "gradient: edges count (squares; superres with staged, "
                        "adapt or primed: gradient)", ["squares", "gradient"])
    weight: float = setting(1.0, "factor of the term that method guide adds to the loss", (0, 1e6))
    hold: float = setting(0.25, "a of the pair that is split off before the fit", (1e-3, 10))
    tail: float = setting(None, "share of the rungs that see all of y, at last (1/4 with R and "
                          "pairs, else 0)", (0, 0.9))

def is_told(o: Settings, kind: str) -> bool:
    """Whether the network that is fitted is told y: it is a DDPM, and y has no noise."""
    return o.method == "adapt" and kind != "noise"

def splits(o: Settings, task: Task) -> bool:
    """Whether the pair is made of pixels: those that are seen, and those that are hidden."""
    return o.target == "conjugate" and task.kind() == "holes"

def shifts(o: Settings, kind: str) -> bool:
    """Whether a network sees shifted photos, if turns are on: for superres, where it could else see
    where the blocks begin, and draw in them what their means do not show."""
    return kind == "blocks" and o.method in ("staged", "primed")

def with_roles(o: Settings, kind: str) -> Settings:
    """What the network sees and aims at, and what picks the answer, where o leaves these open.

    For superres y has no pair, and no blocks are held out: R would not see what is finer than
    blocks, and those that a fit has not seen stay visible in its answer (0.1 to 0.5 dB lost;
    CBSD68). A DDPM that is told y gains from every pixel, and hardly overfits: there nothing
    is held out either (0.1 dB; BSDS), nor from a DIP that sees its answer.
    """
    source, aim = METHODS[o.method]
    if is_told(o, kind) or o.method == "primed":
        return replace(o, input="first", target=aim, stop="fixed")
    stop = "holdout"
    if kind == "blocks":
        stop = "fixed"
        if aim == "conjugate":
            source, aim = "estimate", "plain"
    return replace(o, input=o.input or source, target=o.target or aim, stop=o.stop or stop)

# What a fit takes by default. BY_TASK holds what differs for some methods and tasks.
DEFAULTS = dict(iters=1000, nets=1, rungs=30, high=3.0, low=0.4, tail=0.0, optimiser="adam",
                lr=0.01, loss="squares")
MUON = dict(optimiser="muon", lr=0.05)
PRIMED = dict(iters=160, rungs=20, high=6.0, low=1.5, **MUON)
BY_TASK = {         # the method, and what the observation has: noise, holes, or means of blocks
    ("staged", "noise"): dict(iters=250, nets=2, high=2.0, tail=0.25, **MUON),
    ("staged", "holes"): dict(iters=200, nets=2, high=1.5, tail=0.25, **MUON),
    # A brief fit draws edges late, unless they count more (4.8 of report.md).
    ("staged", "blocks"): dict(iters=320, loss="gradient", **MUON),
    ("adapt", "noise"): dict(iters=100, tail=0.25, lr=1e-4),
    # a of 0.65: three in ten of the known pixels are hidden.
    ("adapt", "holes"): dict(iters=40, nets=2, rungs=5, high=0.65, low=0.65, lr=1e-3),
    ("adapt", "blocks"): dict(iters=60, nets=2, rungs=5, lr=3e-4, loss="gradient"),
    ("primed", "holes"): PRIMED,
    ("primed", "blocks"): PRIMED | dict(loss="gradient"),
}

def complete(o: Settings, task: Task, y: Tensor, brief: bool = False) -> Settings:
    """Every default of a fit that depends on the task. brief: a DDPM will go on from there."""
    kind = task.kind()
    o = with_roles(o, kind)
    values = DEFAULTS | BY_TASK.get((o.method, kind), {})
    if not task.noise_of_y().white:
        values.update(high=6.0, low=2.0)        # w is white, and the noise is not
    if o.input != "first":      # adapt, where y is told, and primed keep their networks and steps
        if brief:
            values["iters"] = values["iters"] * 5 // 8
        if brief or pixels_of(y, task) > TWO_NETS_PIXELS:
            values["nets"] = 1
    if in_windows(o, y, task) and not is_told(o, kind):
        values.update(iters=1000, rungs=8, tail=0.0)
    if o.stop != "holdout" or o.target != "conjugate":
        values["tail"] = 0.0            # it needs a judge and a pair: else it would learn the noise
    if o.optimiser not in (None, values["optimiser"]):
        values["lr"] = {"muon": MUON, "adam": DEFAULTS}[o.optimiser]["lr"]
    o = replace(o, **{name: v for name, v in values.items() if getattr(o, name) is None})
    if o.stop in ("wmv", "emv"):        # these rules look at every step
        return replace(o, rungs=o.iters)
    return replace(o, rungs=min(o.rungs, o.iters))

def in_turn(o: Settings, task: Task, y: Tensor) -> list[Settings]:
    """The settings of each network of a fit; o are those of the first."""
    later = o
    if is_told(o, task.kind()):
        # The DDPM is followed by a DIP that is primed with the DDPM's answer. It is drowned in less
        # noise than the answer of a DDPM that is not fitted, since it is a better one.
        steps, rungs = min(4 * o.iters, 160), 4 * o.rungs
        if in_windows(o, y, task):
            steps, rungs = 6 * steps, 8     # a step sees a part of the photo, a rung looks at all
        later = replace(o, method="primed", target="plain", iters=steps,
                        rungs=min(rungs, steps), high=4.0, low=1.0, **MUON)
    elif splits(o, task):
        # The first network learned from pairs; the next one sees all that is not held out. It
        # keeps the tail, though its target is plain: y has no noise that it could learn.
        later = replace(o, input="estimate", target="plain", high=2 * o.high)
    return [o] + [later] * (o.nets - 1)

def pixels_of(y: Tensor, task: Task) -> int:
    """How many pixels x has."""
    return y.shape[2] * y.shape[3] * task.scale ** 2

def in_windows(o: Settings, y: Tensor, task: Task) -> bool:
    """Whether a step of the fit sees windows: of a photo that is too large to be seen whole."""
    possible = o.input != "fixed" and o.stop in ("holdout", "fixed")
    return possible and pixels_of(y, task) > WHOLE_PIXELS

def ladder(o: Settings) -> list[tuple[float, int]]:
    """The rungs, from the most noise to the least: (a, how many steps it lasts)."""
    levels = np.geomspace(o.high, o.low, o.rungs)
    ends = np.arange(o.rungs + 1) * o.iters // o.rungs
    return list(zip(levels.tolist(), np.diff(ends).tolist()))

def turned(x: Tensor, g: int) -> Tensor:
    """One of the 8 symmetries of the square, g in 0..7."""
    x = torch.rot90(x, g, (2, 3))
    return x.flip(3) if g > 3 else x

def turned_back(x: Tensor, g: int) -> Tensor:
    """The inverse of turned(., g)."""
    x = x.flip(3) if g > 3 else x
    return torch.rot90(x, -g, (2, 3))

def noisy_input(o: Settings, base: Tensor, a: float, w: Tensor, sigma: float) -> tuple:
    """What the network sees, z1 or the fixed z, and the level of the noise in it."""
    if o.input == "fixed":
        return base + torch.randn_like(base) / 30, 1 / 30                     # Ulyanov et al.
    level = a * (sigma or FREE_UNIT)
    if o.input == "observed":
        level = math.hypot(level, sigma)
    return base + a * w, level

def noisy_target(o: Settings, y: Tensor, a: float, w: Tensor, task: Task) -> Tensor:
    """What the output is compared with, in the domain of y: z2, a noisier y, or y."""
    if o.target == "conjugate" and task.sigma > 0:
        return y - w / a                                    # given x, independent of z1
    if o.target == "noisy":
        return y + a * task.forward(w)
    return y

def fit_loss(o: Settings, output: Tensor, target: Tensor, task: Task, level: float, prior):
    """The mean square of A output - target over known pixels, and what loss and guide add."""
    loss = task.mse(output, target)
    if o.loss == "gradient":                                # perceptual: edges at three scales
        for scale in (1, 2, 4):
            error = F.avg_pool2d(task.forward(output) - target, scale, ceil_mode=True)
            for dim in (2, 3):
                loss = loss + EDGES * (error.diff(dim=dim) ** 2).sum() / error.numel()
    if o.method == "guide":     # RED-diff (Mardani et al. 2024), but always at the input's level
        with torch.no_grad():
            denoised = prior(output + level * torch.randn_like(output), level)
        loss = loss + o.weight * ((output - denoised) ** 2).mean()
    if not torch.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    return loss

def cut(image: Tensor, places: list, scale: int = 1) -> Tensor:
    """The windows of an image as a batch; scale = s for an image on the grid of x, not of y."""
    if scale > 1:
        return F.pixel_shuffle(cut(F.pixel_unshuffle(image, scale), places), scale)
    return torch.cat([image[place] for place in places])

@dataclass
class Stage:
    """What a rung of the ladder leaves behind. Images are N x C x H x W, in [-1, 1]."""
    step: int                       # steps made by the network; as fit_dip gives it, by all of them
    level: float                    # the noise in the network's input, in units of [-1, 1]
    input: Tensor                   # what the network saw in the last step of the rung, or a clue
    output: Tensor                  # what it made of that
    target: Tensor                  # what this was compared with: as y is, or as told_pair says
    mse: float                      # of the output to the target
    average: Tensor                 # the running mean of the outputs, or Fit.look's: the estimate
    # What fit_dip adds to it:
    number: int = 0                 # of the network
    scores: dict = field(default_factory=dict)      # by stop rule; the smallest is the best
    answer: Tensor | None = None    # the mean of the networks done; until then, the first's best;
                                    # in the last Stage that of the whole fit, see fit_dip
    risk: float = math.nan          # R of the answer as it was before it saw what was held out
    stop_step: int = 0              # the step at which the newest network was best
    # In the last Stage, for a DDPM that goes on from there:
    first: Tensor | None = None     # what the last network began with: of primed, the DDPM's answer
    prior: Prior | None = None      # the DDPM; with adapt, where a DIP follows, as it was fitted

def mean_image(images: list[Tensor]) -> Tensor:
    """The mean of estimates: their errors differ, and partly cancel."""
    return sum(images) / len(images)

def best_share(judge, first: Tensor, second: Tensor) -> float:
    """The weight, 0..1, of the second estimate in that mean of both which has the least R; R is a
    parabola in it.

    It is 1 where there is no judge, and where that mean lowers R by less than a fifth: R has an
    error, and the second estimate may yet learn from what is held out.
    """
    if judge is None:
        return 1.0
    r0 = judge(first)
    r1 = judge(second)
    # R(s) = (1 - s) r0 + s r1 - s (1 - s) apart; R(1/2) gives `apart`, the mean square of their
    # difference. R is least where its slope, r1 - r0 - (1 - 2 s) apart, is 0.
    apart = 2 * (r0 + r1) - 4 * judge((first + second) / 2)
    share = 0.5 + (r0 - r1) / max(2 * apart, 1e-12)
    share = min(max(share, 0.0), 1.0)
    least = (1 - share) * r0 + share * r1 - share * (1 - share) * apart
    if least > 0.8 * r1:
        return 1.0
    return share

def mean_of_turns(network, image: Tensor, level: float, turns) -> Tensor:
    """The mean of what a network makes of some turns of an image. level: of the noise in it; a clue
    has none yet, and the Prior drowns its guess in noise of this level, each time anew."""
    views = [turned_back(tiled(network, turned(image, g), level), g) for g in turns]
    return mean_image(views)

def told_answer(prior, y: Tensor, task: Task, turns) -> Tensor:
    """What a DDPM that is told y makes of it: an estimate of x that keeps what y knows."""
    answer = mean_of_turns(prior, task.clue(y, y.shape[1]), TOLD_START, turns)
    return task.keep_known(answer, y)

class MovingVariance:
    """The variance of the newest outputs, averaged over pixels: within a window (ES-WMV), and with
    exponential weights (ES-EMV). Wang et al. 2023, Algorithms 1 and 2."""
    def __init__(self, window: int = 100, alpha: float = 0.1):
        self.outputs = deque(maxlen=window)
        self.powers = deque(maxlen=window)      # their mean squares
        self.total = 0.0                        # the sum of the outputs
        self.alpha = alpha
        self.mean = self.emv = 0.0

    def update(self, output: Tensor) -> dict:
        """Both scores after this output; wmv is inf until its window is full."""
        distance = ((output - self.mean) ** 2).mean().item()
        self.emv = (1 - self.alpha) * (self.emv + self.alpha * distance)
        self.mean = self.mean + self.alpha * (output - self.mean)
        if len(self.outputs) == self.outputs.maxlen:
            self.total = self.total - self.outputs[0].double()      # the oldest leaves the window
        self.outputs.append(output.cpu())
        newest = self.outputs[-1].double()
        self.total = self.total + newest
        self.powers.append((newest ** 2).mean().item())
        wmv = math.inf
        if len(self.outputs) == self.outputs.maxlen:
            mean = self.total / len(self.outputs)
            wmv = np.mean(self.powers) - (mean ** 2).mean().item()
        return {"wmv": wmv, "emv": self.emv}

def stop_at(scores: list[float], patience: int = PATIENCE) -> tuple[int, bool]:
    """(Index of the smallest score, whether the fit has ended): it ends after `patience` scores
    without a smaller one. Every stop rule works by this, during a fit and after it."""
    best = 0
    for k, score in enumerate(scores):
        if score < scores[best] or math.isinf(scores[best]):    # wmv's are inf at first
            best = k
        elif k - best >= patience:
            return best, True
    return best, False

class Fit:
    """One network on its way down the ladder, and all that changes as it learns."""
    def __init__(self, o: Settings, y: Tensor, task: Task, gen: torch.Generator, prior, tick):
        self.o = o
        self.gen = gen
        self.prior = prior
        self.tick = tick
        self.step = 0
        self.z = None                   # the fixed input, if there is one
        self.w = None                   # the noise of the newest step; without fresh, of the rung
        self.first = None               # the estimate of x from before the fit
        self.rise = 0.0                 # of the score, from the best stage to the newest
        self.rungs = ladder(o)
        self.watched = max(1, round((1 - o.tail) * o.rungs))    # of these; the rest is the tail
        channels = y.shape[1]
        if o.input == "fixed":
            z = torch.rand((1, 32, *task.pinv(y).shape[2:]), generator=gen)
            self.z = z.to(y) / 10
            net = SkipNet(32, channels, o.width, o.depth, skip=4)
        elif o.method == "adapt":
            net = copy.deepcopy(prior)
        else:
            net = SkipNet(channels, channels, o.width, o.depth)
        self.net = net.to(y.device, memory_format=torch.channels_last)
        self.told = is_told(o, task.kind())
        self.shifts = o.turns and shifts(o, task.kind())
        self.mixes = task.scale > 1 and o.method == "staged"
        # The estimate is the mean of the outputs. But of a large photo, and from a network that is
        # told a part of y, it is what a network of averaged weights makes of all of y.
        self.windowed = in_windows(o, y, task)
        self.looks = self.windowed or self.told
        self.judged = self.net
        if self.looks:
            self.judged = copy.deepcopy(self.net).eval()
        rates = (o.lr, 0.01) if o.optimiser == "muon" else (None, o.lr)
        self.optimisers = make_optimisers(self.net, *rates)

    def descend(self, y: Tensor, task: Task, rungs: list, average: Tensor) -> Iterator[Stage]:
        """Down the ladder from a first guess of the image; yields what each rung leaves behind."""
        o = self.o
        turning = o.turns and o.target == "conjugate"       # Theorem 3 of report.md
        side = hole_side(task.known(y))         # of the squares of pixels that are hidden
        g = 0
        for a, steps in rungs:                                  # the most noise first
            base = self.source(y, task, average)
            self.w = None
            for _ in range(steps):
                z1, level, z2, z2_task = self.draw_pair(y, task, base, a, side)
                if turning:
                    g = int(torch.randint(8, (), generator=self.gen))
                if self.shifts:
                    output = self.shifted_output(z1, level, task.scale)
                else:
                    output = turned_back(self.net(turned(z1, g), level), g)
                self.learn(fit_loss(o, output, z2, z2_task, level, self.prior))
                if not self.looks:
                    average = average.lerp(output.detach(), self.newest_weight())
                if self.tick:
                    self.tick()
            if self.looks:
                average = self.look(y, task, average, turns=[0])
            average = task.keep_known(average, y)
            mse = z2_task.mse(output, z2).item()
            noiseless = self.told or (splits(o, task) and o.input == "observed")
            noise = 0.0 if noiseless else level         # z1 is then a clue, or an interpolation
            yield Stage(self.step, noise, z1, output.detach(), z2, mse, average)

    def source(self, y: Tensor, task: Task, average: Tensor) -> Tensor:
        """What the network sees, before any noise is added to it."""
        if self.o.input == "observed":
            return task.interpolate(y)
        return {"fixed": self.z, "estimate": average, "first": self.first}[self.o.input]

    def shifted_output(self, z1: Tensor, level: float, scale: int) -> Tensor:
        """The output for z1, which the network sees shifted by less than a block (4.8, report.md):
        turns map blocks to blocks, but a shift moves what is seen against their borders."""
        down, right = torch.randint(scale, (2,), generator=self.gen).tolist()
        output = self.net(torch.roll(z1, (down, right), (2, 3)), level)
        return torch.roll(output, (-down, -right), (2, 3))

    def draw_pair(self, y: Tensor, task: Task, base: Tensor, a: float, side: int) -> tuple:
        """A step's pair, of all the photo or of windows: (z1, its noise level, z2, z2's task)."""
        o = self.o
        if self.windowed:
            places = [random_place(y, WINDOW // task.scale, self.gen) for _ in range(16)]
            task = replace(task, mask=cut(task.known(y), places))
            base = cut(base, places, task.scale)
            y = cut(y, places)
        if self.told:
            return self.told_pair(y, task, base, a, side)
        if o.fresh or self.w is None:
            white = Noise(task.sigma or FREE_UNIT)
            self.w = white.draw(task.pinv(y), self.gen)
        z, level = noisy_input(o, base, a, self.w, task.sigma)              # z1 = y + a w
        if not splits(o, task):
            return z, level, noisy_target(o, y, a, self.w, task), task      # z2 = y - w / a
        seen, hidden = split_pixels(y, task, a, side, self.gen)
        if o.input == "observed":
            z = seen.interpolate(y)     # The seen pixels stand in place of y + a w.
        return z, level, y * hidden.mask, hidden

    def told_pair(self, y: Tensor, task: Task, first: Tensor, a: float, side: int) -> tuple:
        """A step's pair for a DDPM that is told y, as in its training: (a clue, the level of the
        noise that drowns the clue's guess, an image, the task of those of its pixels that count).

        Where pixels are missing the clue is a part of the known ones, and the rest counts. Where
        blocks are known the DDPM's own answer at half its size stands for an image that is known
        whole, since photos are alike at many sizes (Glasner et al. 2009). Of that a random square
        is taken, so that its blocks lie elsewhere in each step.
        """
        if task.scale == 1:
            seen, hidden = split_pixels(y, task, a, side, self.gen)
            return seen.clue(y, y.shape[1]), TOLD_START, y * hidden.mask, hidden
        blocks = Task("blocks", scale=task.scale)
        half = [max(1, n // 2) * task.scale for n in y.shape[2:]]
        even = first[..., :2 * half[0], :2 * half[1]]
        image = F.interpolate(even, half, mode="area")
        length = max(1, min(half) // task.scale - 1) * task.scale       # a block less than it has
        image = image[random_place(image, length, self.gen)]
        return blocks.clue(blocks.forward(image), y.shape[1]), TOLD_START, image, Task("all")

    def newest_weight(self) -> float:
        """The weight of the newest step in a running mean: 5 / step, which averages about the last
        fifth of the steps; and 0.01 from step 500 on, which averages about the last 100."""
        return max(0.01, min(1, 5 / self.step))

    def look(self, y: Tensor, task: Task, average: Tensor, turns) -> Tensor:
        """The averaged network's estimate, in tiles, from the whole of the y that is given, and not
        from windows: the mean of some turns."""
        if self.told:
            return told_answer(self.judged, y, task, turns)
        return mean_of_turns(self.judged, self.source(y, task, average), task.sigma, turns)

    def last_look(self, y: Tensor, task: Task, average: Tensor) -> Tensor:
        """The best estimate. If a look made it, one more does: at all of y, whereas in the search a
        part may have been held out, and in more turns."""
        if not self.looks:
            return average
        turns = range(4)
        if self.told:
            turns = FIRST_TURNS["adapt" if self.o.turns else "primed"]
        return self.look(y, task, average, turns)

    def learn(self, loss: Tensor):
        """A step of the optimisers. Rates rise over 50 steps; with Muon they end at a tenth."""
        self.step += 1
        self.net.zero_grad()
        loss.backward()
        rate = min(1, self.step / 50)
        if self.o.optimiser == "muon":
            rate *= 1 - 0.9 * min(1, self.step / self.o.iters)
        step_all(self.optimisers, rate)
        if self.looks:
            update_ema(self.judged, self.net, self.newest_weight())
        if self.windowed and self.step == 50:
            self.net.eval()         # BatchNorm would go on removing each window's own contrast

    def search(self, y: Tensor, task: Task, start: Tensor, judge) -> Iterator[tuple]:
        """A descent that a stop rule watches; yields (the newest stage, the best so far). At its
        end the network has the weights of the best."""
        o = self.o
        variance, scores = MovingVariance(), []
        self.first = start
        for stage in self.descend(y, task, self.rungs[:self.watched], start):
            stage.scores["fixed"] = -stage.step
            if judge is not None:
                stage.scores["holdout"] = judge(stage.average)
            if o.rungs == o.iters and not self.looks:   # each step is a stage of all of y
                stage.scores.update(variance.update(stage.output))
            scores.append(stage.scores[o.stop])
            best_rung, ended = stop_at(scores, max(1, PATIENCE * o.rungs // o.iters))
            if best_rung == len(scores) - 1:
                best = stage
                weights = {name: v.clone() for name, v in self.judged.state_dict().items()}
            yield stage, best
            if ended:
                break
        self.rise = scores[-1] - scores[best_rung]
        for network in (self.net, self.judged):
            network.load_state_dict(weights)

    def mixed(self, image: Tensor) -> Tensor:
        """An estimate as it counts in the answer: for superres, with staged, its mean with `first`,
        the interpolation. Their errors differ, and R sees too little to choose a share."""
        if self.mixes:
            return self.first.lerp(image, 0.5)
        return image

    def tail_rungs(self, task: Task) -> list:
        """The rungs that see all of y. None if y is noisy and R has risen since its best by more
        than sigma^2 / 200 (chosen on BSDS photos, such that no default fit of CBSD68 changes): such
        a fit learns the noise that it sees, and would learn that of all of y, unseen by R."""
        if task.sigma > 0 and self.rise > task.sigma ** 2 / 200:
            return []
        return self.rungs[self.watched:]

def fit_dip(y: Tensor, task: Task, prior=None, *, seed=0, brief=False, tick=None,
            **settings) -> Iterator[Stage]:
    """Fit networks to y (1 x C x h x w, y = A x + sigma n); yields Stages: the last answer counts.

    settings: the fields of Settings, of the first network; `in_turn` has those of the others. The
    answer is the mean of theirs, but a network that raises R is left out where it saw all pixels.
    A DDPM's answer that primed DIPs saw joins the mean, with half the weight of a DIP. A fit of
    pairs of pixels is mixed with the interpolation, if R says so (`best_share`); for superres, with
    staged, it always is (`Fit.mixed`). If a photo's own noise was found, detail is put back
    (`give_back`).
    brief: a DDPM goes on from there. The answer is then that of the primed DIPs alone; without
    such there is by default one network, and it makes fewer steps.
    tick() is called after each step. With stop 'holdout' each network first sees the part of y that
    is not held out; then, from the weights of its best stage on, all of y (`Fit.tail_rungs`).
    prior: a trained DDPM, for adapt, guide and primed. FloatingPointError is raised if the loss is
    not finite.
    """
    o = complete(Settings(**settings), task, y, brief)
    gen = stream(seed, FIT)
    seed_weights(seed)
    seen, seen_task, judge = y, task, None
    if o.stop == "holdout":
        seen, seen_task, judge = hold_out(y, task, gen, o.hold)
    guess = start = seen_task.interpolate(seen)
    paired = splits(o, task)
    answers, blind = [], []             # of each network, and before it saw what was held out
    if o.input == "first":              # of primed; of adapt, if it is told y
        start = told_answer(prior, y, task, FIRST_TURNS[o.method])
    steps = 0
    for number, own in enumerate(in_turn(o, task, y)):
        if number == 1 and fit.told:
            prior = fit.judged          # the DDPM, fitted
            start = answers[0]
        elif number == 1 and paired:
            start = best.average
        fit = Fit(own, y, task, gen, prior, tick)
        for stage, best in fit.search(seen, seen_task, start, judge):
            found = dict(number=number, stop_step=steps + best.step)
            if judge:
                found["risk"] = judge(mean_image(blind or [best.average]))
            found["answer"] = mean_image(answers or [task.keep_known(best.average, y)])
            yield replace(stage, step=steps + stage.step, **found)
        answer = fit.last_look(y, task, best.average)
        for stage in fit.descend(y, task, fit.tail_rungs(task), answer):
            answer = stage.average
            yield replace(stage, step=steps + stage.step, **found)
        steps += fit.step
        longer = [*blind, fit.mixed(best.average)]
        # After pairs of pixels a network sees all, and no theorem protects it: it must not raise R.
        if number > 0 and paired and judge and judge(mean_image(longer)) > judge(mean_image(blind)):
            continue
        answers.append(task.keep_known(fit.mixed(answer), y))
        blind = longer
    unseen = mean_image(blind)
    answer = mean_image(answers)
    if own.method == "primed":      # A DIP counts twice, and the DDPM's answer that it saw once.
        dips = [image for image in answers if image is not start]
        answer = mean_image(dips if brief else [start, *dips, *dips])
    if paired:
        share = best_share(judge, guess, unseen)
        answer = task.interpolate(y).lerp(answer, share)
        unseen = guess.lerp(unseen, share)
    if judge:
        found["risk"] = judge(unseen)
    if task.noise is not None and o.target == "conjugate":
        answer = give_back(answer, y, task.noise)
    found["answer"] = found["average"] = answer
    yield replace(stage, step=steps, scores={}, first=start, prior=prior, **found)

# ---- 6. Joining the two -------------------------------------------------------------------------
# Lesson 3. Where y has no noise the DDPM is told y, and answers in one call. But it knows photos in
# general, not this one. So it learns from the one photo, too, as a DIP does: its training goes on,
# on parts of what y knows (method "adapt" of section 5; not where fewer than 256 pixels are known).
# Its answer then is the first of three estimates. The second is a DIP of y that sees this answer,
# drowned in falling noise, in place of a random z ("primed"). For the third the DDPM is called once
# more: it begins at the DIP, drowned in so much noise that the start hardly counts, and is averaged
# with the DIP by precision (the DIP has no R: its error is taken to be START_ERROR). The errors of
# the three differ, and partly cancel in the mean, in which the DIP counts three times (chosen on
# BSDS photos).
# A DDPM that was trained on DIPs knows how far to trust them: it is told the DIP as its guess, in
# place of the weighted mean. Where pixels are missing, so is one that has learned many tasks.
#
# Where y is noisy the DIP is that of lesson 2. The DDPM is told nothing, begins where the noise
# just hides the DIP's error, and is averaged with the DIP by precision at each call.
# To run lesson 3: `dipddpm.py sample --init dip`.

def brief_dips(images: list, config: dict, device) -> Iterator[Tensor]:
    """The DIP in the training: brief DIPs of squares of training images. 50 to 95 % of the pixels
    are missing, or only means of blocks are known; or each square has the training's one task.

    Yields x_0 and, in further channels, what the DDPM is told: (2C + 1) x side x side. The side is
    twice that of a patch, if all images are as large. images: uint8 C x H x W.
    """
    name = config.get("task")
    seed = config["seed"]
    side = config["patch"]
    if min(min(image.shape[1:]) for image in images) >= 2 * side:
        side = 2 * side
    gen = stream(seed, OBSERVE)
    for k in range(config["dips"]):
        x0 = random_patches(images, 1, side, gen).to(device) / 127.5 - 1
        share = 0.5 + 0.45 * torch.rand((), generator=gen)
        holes = random_task(f"inpaint:{share.item()}", side, gen)
        task = (holes, Task("blocks", scale=4), holes, Task("blocks", scale=2))[k % 4]
        if name is not None:
            task = random_task(name, side, gen)
        task.mask = task.mask.to(x0)
        iters = int(torch.randint(40, 126, (), generator=gen))
        y = task.forward(x0)
        *_, stage = fit_dip(y, task, seed=seed + k, brief=True, iters=iters)
        clue = task.clue(y, x0.shape[1], stage.answer)
        yield torch.cat([x0, clue], dim=1)[0].cpu()

def noised(schedule: NoiseSchedule, start: Tensor, t0: int, gens: list, sigma=0.0) -> Tensor:
    """x_t0 ~ q(x_t0 | start), one for each stream. An image with noise sigma gets only the rest."""
    missing = math.sqrt(max(0.0, schedule.sigma[t0].item() ** 2 - sigma ** 2))
    start = start.expand(len(gens), -1, -1, -1)
    return schedule.abar[t0].sqrt().item() * (start + missing * noise_like(start, gens))

def refine_x0(x0: Tensor, t: int, *, r2: Tensor, xhat, risk: float, y, task: Task, watch=None):
    """The DDPM's x_0 at time t joined with the DIP's xhat, then with the observation y.

    Each estimate has a Gaussian error, x ~ N(x0, r_t^2) and x ~ N(xhat, R): they are averaged by
    precision. A proximal step towards A x = y follows, exact if y is. None leaves out xhat, or y.
    """
    x0 = x0.clamp(-1, 1)
    variance = r2[t].item()
    risk = max(risk, 1e-8)
    if xhat is not None:
        x0 = (x0 / variance + xhat / risk) / (1 / variance + 1 / risk)
        variance = 1 / (1 / variance + 1 / risk)
    if y is not None:
        x0 = task.project(x0, y, gain=variance / (variance + task.sigma ** 2))
    if watch is not None:
        watch(x0)
    return x0

def eps_with_clue(model, clue: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """eps_theta(x_t, t, y): the clue goes in beside x_t."""
    return tiled(model, torch.cat([xt, clue], dim=1), t)

def reverse(prior: Prior, task: Task, xt: Tensor, t0: int, gens: list, *, steps: int, eta=1.0,
            y=None, clue=None, xhat=None, risk=0.0, watch=None) -> Tensor:
    """The reverse process from x_t0 on, told the clue, and joined at each step with y and xhat.

    xt: N x prior.channels x H x W, each channel with noise of its own, also where the image is
    grey. Sample i depends on gens[i] alone. clue: of Task.clue, or None: the network is told
    nothing. watch(x0), if given, sees every step.
    """
    if clue is None:
        r2 = prior.r2[0]                # of images of which nothing is told
        model = partial(tiled, prior.model)
    else:
        r2 = prior.r2[1]
        model = partial(eps_with_clue, prior.model, clue.expand(len(xt), -1, -1, -1))
    join = partial(refine_x0, r2=r2, xhat=xhat, risk=risk, y=y, task=task, watch=watch)
    return ddim_sample(model, prior.schedule, xt, t0, steps, gens, eta, join)

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
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-offsets ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    u = a.cpu().double().flatten(0, 1)[:, None]             # each channel for itself
    v = b.cpu().double().flatten(0, 1)[:, None]
    maps = torch.cat([u, v, u * u, v * v, u * v])
    maps = F.conv2d(maps, window.view(1, 1, 11, 1))
    mean_u, mean_v, uu, vv, uv = F.conv2d(maps, window.view(1, 1, 1, 11)).chunk(5)
    likeness = (2 * mean_u * mean_v + c1) * (2 * (uv - mean_u * mean_v) + c2)
    spread = (mean_u ** 2 + mean_v ** 2 + c1) * (uu - mean_u ** 2 + vv - mean_v ** 2 + c2)
    return (likeness / spread).mean().item()

def clipped_psnr(xhat: Tensor, x: Tensor | None) -> float | None:
    """PSNR of an estimate to the clean image; None where it cannot be known."""
    if x is None or xhat.shape[2:] != x.shape[2:]:
        return None
    return psnr(xhat.clamp(-1, 1), x, 2.0)

def quality(xhat: Tensor, x: Tensor | None) -> tuple:
    """(PSNR, SSIM) of an estimate to the clean image, each None where it cannot be known."""
    value = clipped_psnr(xhat, x)
    if value is None or min(x.shape[-2:]) < 11:
        return value, None
    return value, ssim(xhat.clamp(-1, 1), x, 2.0)

def frechet(a: Tensor, b: Tensor) -> float:
    """Distance of the Gaussians fitted to two sets of features, N x D (Heusel et al. 2017)."""
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # The trace of the root of cov_a cov_b is that of the root of a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def recall_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Recall (Kynkaanniemi et al. 2019): the share of real in balls of fake. Coverage (Naeem et al.
    2020): the share of real balls that hold a fake. A ball reaches to a point's k-th neighbour."""
    radius_real = torch.cdist(real, real).kthvalue(min(k + 1, len(real)), dim=1).values
    radius_fake = torch.cdist(fake, fake).kthvalue(min(k + 1, len(fake)), dim=1).values
    distance = torch.cdist(real, fake)
    recall = (distance < radius_fake).any(dim=1)
    coverage = (distance < radius_real[:, None]).any(dim=1)
    return recall.double().mean().item(), coverage.double().mean().item()

# ---- 8. Files, pictures, plots, progress --------------------------------------------------------
# Here the lecture ends, and the program around it begins.

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

def say(text: str, to: str = "stdout"):
    """Print at once. If the reader has gone, the work goes on, unheard."""
    try:
        print(text, file=getattr(sys, to), flush=True)
    except OSError:
        setattr(sys, to, open(os.devnull, "w"))

def fail(message: str):
    """One line on stderr, exit code 2. Every message names the flag and the remedy."""
    say("error: " + " ".join(message.split()), to="stderr")
    raise SystemExit(2)

def attempt(flag: str, path: str, remedy: str, read):
    """read(path); whatever goes wrong in it becomes one line that names the flag."""
    try:
        return read(path)
    except Exception as error:          # Pillow, numpy and torch raise errors of many kinds.
        return fail(f"{flag}: cannot use {path} ({str(error).strip()[:100]}); {remedy}")

def make_folder(path: str):
    """A folder, and those above it, where they are missing."""
    os.makedirs(path, exist_ok=True)

def save(path: str, value):
    """Write all of a file or nothing: a checkpoint, a picture, frames (.gif), rows (.csv), JSON."""
    part = path + ".tmp"
    try:
        make_folder(os.path.dirname(path))
        if path.endswith(".pt"):
            torch.save(value, part)
        elif path.endswith(".png"):
            value.save(part, "PNG")
        elif path.endswith(".gif"):
            times = [150] * (len(value) - 1) + [1500]
            first, *rest = [frame.quantize(64, dither=0) for frame in value]
            first.save(part, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
        else:
            # NaN and inf, which JSON does not know, become null, in CSV an empty cell.
            value = json.loads(json.dumps(value), parse_constant=lambda name: None)
            with open(part, "w", encoding="utf-8", newline="") as file:
                if path.endswith(".csv"):
                    columns = dict.fromkeys(name for row in value for name in row)
                    table = csv.DictWriter(file, list(columns))
                    table.writeheader()
                    table.writerows(value)
                else:
                    json.dump(value, file, indent=1)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save makes one of the other
        fail(f"--out: cannot write {path} ({error}); name a folder you may write to")
    finally:
        if os.path.exists(part):
            os.remove(part)

def load_image(path: str, flag: str = "--image") -> Tensor:
    """A picture as 1 x C x H x W in [-1, 1]; C is 1 where the three channels are equal: a grey
    picture has one noise, not three. Ends in an error where there is no picture."""
    pixels = attempt(flag, path, "give a whole PNG, JPEG or such, of 8 bits a channel", read_pixels)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    if torch.equal(x, x[:, :1].expand_as(x)):
        return x[:, :1]
    return x

def read_pixels(path: str) -> np.ndarray:
    """H x W x 3 in 0..255 of a picture: upright, in sRGB, what is transparent on white."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}, more than 8 bits a channel")
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        if image.mode not in ("L", "RGB", "CMYK") or "transparency" in image.info:
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image.convert("RGBA"))
            image = page.convert("RGB")
        if profile:
            with contextlib.suppress(ImageCms.PyCMSError, OSError):     # a broken profile
                srgb = ImageCms.createProfile("sRGB")
                profile = ImageCms.getOpenProfile(io.BytesIO(profile))
                image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        return np.asarray(image.convert("RGB"), np.float32)

def to_image(x: Tensor) -> Image.Image:
    """1 x C x H x W in [-1, 1] as a picture of 8 bits: rounded, then clamped."""
    pixels = (x[0].detach().cpu().float() + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())

def find_photos(folder: str, flag: str) -> list:
    """Sorted paths of the pictures in a folder and below it, but not of what this file wrote."""
    found = []
    for place, folders, files in os.walk(folder):       # It follows no links, hence no circles.
        if not {"metrics.json", "arms.png"} & set(files):
            found += [os.path.join(place, name) for name in files if name.lower().endswith(ENDINGS)]
        folders[:] = [name for name in folders if name != "runs" and name[0] != "."]
    if not found:
        fail(f"{flag}: no pictures in {folder}; name a folder of PNG or JPEG files")
    return sorted(found)

def figure(panels: list, columns: int = 6) -> Image.Image:
    """A page of panels (title, 1 x C x H x W, note): the title stands above, the note below."""
    images = [to_image(x).convert("RGB") for _, x, _ in panels]
    largest = max(max(image.size) for image in images)
    side = min(max(1, round(256 / largest)) * largest, 512)         # enlarged, or reduced
    images = [ImageOps.contain(image, (side, side), Image.BOX) for image in images]
    width, height = max(side, 190) + 12, max(image.height for image in images) + 64
    rows = math.ceil(len(panels) / columns)
    page = Image.new("RGB", (min(columns, len(panels)) * width, rows * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for index, ((title, _, note), image) in enumerate(zip(panels, images)):
        middle, top = index % columns * width + width // 2, index // columns * height + 32
        page.paste(image, (middle - image.width // 2, top))
        draw.text((middle, top - 6), title, "black", font, "md")
        draw.text((middle, top + image.height + 4), note, "dimgrey", font, "ma")
    return page

def on_axis(values: list, log: bool) -> np.ndarray:
    """Numbers as an axis places them: NaN where there is none, log10 on a logarithmic one."""
    values = np.array(values, float)
    if log:
        values = np.log10(np.where(values > 0, values, np.nan))
    return np.where(np.isfinite(values), values, np.nan)

def round_numbers(low: float, high: float) -> list:
    """Three to eight numbers between low and high, in steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    factors = [factor for factor in (1, 2, 5) if (high - low) / (factor * step) >= 3]
    step *= max(factors, default=1)         # rounding may leave none
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]

def axis_ticks(values: np.ndarray, log: bool) -> tuple:
    """((low, high), the places of the ticks, their labels) of an axis that holds all values."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        values = np.zeros(1)
    room = 0.04 * np.ptp(values) or 0.5
    low, high = values.min() - room, values.max() + room
    if not log:
        numbers = round_numbers(low, high)
    elif high - low < 0.7:
        numbers = round_numbers(10 ** low, 10 ** high)
    else:
        factors = (1, 2, 5) if high - low < 3 else (1,)         # of each power of ten
        powers = range(math.floor(low), math.ceil(high))
        numbers = [factor * 10.0 ** power for power in powers for factor in factors]
        numbers = [number for number in numbers if low <= math.log10(number) <= high]
    return (low, high), on_axis(numbers, log), [f"{round(number, 9):.6g}" for number in numbers]

def plot(curves: list, title: str, xlabel: str, ylabel: str, xlog=False, ylog=False, mark=None):
    """Curves (name, xs, ys), or dots where the name begins with a dot, as a picture of 900 pixels.

    None and NaN are gaps. mark: (x, text), a vertical line with its text above.
    """
    xs = [on_axis(x, xlog) for _, x, _ in curves]
    ys = [on_axis(y, ylog) for _, _, y in curves]
    x_span, x_ticks, x_labels = axis_ticks(np.concatenate(xs), xlog)
    y_span, y_ticks, y_labels = axis_ticks(np.concatenate(ys), ylog)
    page = Image.new("RGB", (1800, 1020 + 44 * len(curves)), "white")       # drawn twice as large
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(28)
    left, right, top, bottom = 160, 1740, 150, 900
    across, down = (left, right), (bottom, top)
    draw.text((30, 20), title, "black", font)
    draw.text((30, 80), ylabel, "dimgrey", font)
    draw.text((900, 954), xlabel, "dimgrey", font, "ma")
    for x, label in zip(np.interp(x_ticks, x_span, across), x_labels):
        draw.line((x, top, x, bottom), "#d8d8d8", 2)
        draw.text((x, bottom + 12), label, "black", font, "ma")
    for y, label in zip(np.interp(y_ticks, y_span, down), y_labels):
        draw.line((left, y, right, y), "#d8d8d8", 2)
        draw.text((left - 12, y), label, "black", font, "rm")
    if mark:
        x = np.interp(on_axis(mark[0], xlog), x_span, across)
        draw.line((x, top, x, bottom), "dimgrey", 3)
        draw.text((x, top - 8), mark[1], "dimgrey", font, "md")
    for index, (name, _, _) in enumerate(curves):
        places = np.interp(xs[index], x_span, across), np.interp(ys[index], y_span, down)
        draw_curve(draw, font, index, name, np.stack(places, axis=1).tolist())
    return page.reduce(2)

def draw_curve(draw, font, index: int, name: str, places: list):
    """A line from each place to the next, or dots where the name begins with a dot, and the name
    below. NaN is a gap. A single dot gets a number: there are more dots than colours."""
    color = COLORS[index % len(COLORS)]
    below = 1026 + 44 * index
    dots = name[0] == "."
    label = name.lstrip(".")
    for before, place in zip(places[:1] + places, places):
        if dots and not np.isnan(place).any():
            draw.circle(place, 8, color)
        elif not np.isnan(before + place).any():
            draw.line(before + place, color, 6)
    if dots and len(places) == 1 and not np.isnan(places).any():
        x, y = places[0]
        draw.text((x + 10, y - 10), str(index + 1), "black", font, "lb")
        label = f"{label}  ({index + 1})"
    if dots:
        draw.circle((105, below), 8, color)
    else:
        draw.line((60, below, 150, below), color, 8)
    draw.text((170, below), label, "black", font, "lm")

def dot_plot(title: str, xlabel: str, rows: list) -> Image.Image:
    """Rows (label, mean, low, high) as dots with their intervals, below each other, as a picture of
    1,000 pixels; (label,) alone is a heading."""
    numbers = [number for row in rows for number in row[1:]]
    span, ticks, labels = axis_ticks(on_axis([0, *numbers], False), False)
    right, top, bottom = 1940, 110, 150 + 44 * len(rows)
    page = Image.new("RGB", (2000, bottom + 110), "white")                  # drawn twice as large
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(26), ImageFont.load_default(21)
    left = 70 + max(small.getlength(label) for label, *places in rows if places)
    draw.text((30, 24), title, "black", ImageFont.load_default(30))
    for x, label in zip(np.interp(ticks, span, (left, right)), labels):
        color = "dimgrey" if label == "0" else "#d8d8d8"
        draw.line((x, top, x, bottom), color, 2)
        draw.text((x, bottom + 8), label, "black", font, "ma")
    draw.text(((left + right) / 2, bottom + 50), xlabel, "dimgrey", font, "ma")
    for index, (label, *places) in enumerate(rows):
        y = top + 40 + 44 * index
        draw.text((30, y), label, "black" if places else COLORS[0], small, "lm")
        if places:
            mean, low, high = np.interp(places, span, (left, right))
            if low < high:
                draw.line((low, y, high, y), COLORS[0], 5)
            draw.circle((mean, y), 9, COLORS[0])
    return page.reduce(2)

def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))

class Progress:
    """How far a loop is: a line now and then, in a terminal and in a log."""
    def __init__(self, total: int, what: str):
        self.total = total
        self.what = what
        self.text = ""
        self.count = 0
        self.begin = time.monotonic()
        self.seconds = 0.0
        self.next = 5.0

    def step(self):
        """To be called after each step of the loop."""
        self.count += 1
        self.seconds = time.monotonic() - self.begin
        if self.seconds >= self.next:
            self.next = self.seconds + min(60, self.seconds)
            left = clock((self.total - self.count) * self.seconds / self.count)
            say(f"{self.what} {self.count}/{self.total}, {left} left {self.text}")

# ---- 9. The commands ----------------------------------------------------------------------------

PHOTOS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
TASKS = "denoise:SIGMA (at most 255), inpaint:SHARE (missing, at most 1), superres:2|3|4|6|8"
START_ERROR = 25 / 127.5        # the level of a start's error where that is not known
SAVE_EVERY = 100                # steps of a training
PRIORS = "runs/train"           # the folder of the priors that are trained where they are missing
CONFIG = "prior task t_max dips schedule batch patch width lr seed".split()

def given(args) -> dict:
    """Those settings of a fit that the command line gives."""
    values = {f.name: getattr(args, f.name) for f in fields(Settings)}
    return {name: value for name, value in values.items() if value is not None}

def parse_task(text: str) -> tuple:
    """'denoise:25' as ('denoise', 25.0); None stands for a number that is left out."""
    name, colon, number = text.partition(":")
    if name in ("denoise", "inpaint") and not colon:
        return name, None
    with contextlib.suppress(ValueError):
        value = float(number)
        limits = dict(denoise=value <= 255, inpaint=value <= 1, superres=value in (2, 3, 4, 6, 8))
        if value > 0 and limits.get(name):
            return name, value
    return fail(f"--task: {text!r} is none of {TASKS}")

def jpeg_level(path: str) -> float:
    """Half the error of rounding every coefficient of a JPEG, in units of [-1, 1]; 0 if it is none.

    Rounding to multiples of q makes an error of variance q^2 / 12, but less where the coefficient
    becomes 0, as most do: hence half (chosen on photos of PolyU).
    """
    with Image.open(path) as image:
        steps = getattr(image, "quantization", {}).get(0, [0])
    return np.sqrt(np.mean(np.square(steps, dtype=float)) / 12).item() / 2 / 127.5

def look_for_noise(args, y: Tensor, stated: float | None) -> tuple:
    """(sigma, Noise) of a photo whose noise is not known, or is to be checked: (sigma, None) if it
    is white and as stated. Says what is found."""
    floor = jpeg_level(args.image) if args.observed else 0.0
    noise = find_noise(y, floor)
    if args.noise == "white":
        noise = replace(noise, white=True)
    dark, middle, bright = [f"{level * 127.5:.1f}" for level in noise.thirds]
    kind = "white" if noise.white else "not white"
    say(f"noise found: level {noise.level * 127.5:.1f} (in flat places: dark {dark}, "
        f"middle {middle}, bright {bright}; a JPEG's own: {floor * 127.5:.1f}), "
        f"neighbours correlated by {noise.neighbour:.2f}: {kind}")
    if noise.strength() < 0.5 / 127.5:
        noise = replace(noise, level=0.0, floor=0.0)
    elif (y.abs() > 0.999).float().mean() > 0.2:
        say("a fifth of the photo is clipped: there the noise is cut off, and less is found")
    if stated is not None:
        if noise.white and 0.8 * stated < noise.level * 127.5 < 1.25 * stated:
            return stated / 127.5, None
        flag = "--task" if args.told is None else "--told"
        say(f"{flag}: this is not white noise of level {stated:g}; what is found is removed "
            "instead; to insist add --noise white")
    return noise.strength(), noise

def centre(x: Tensor, size: list) -> Tensor:
    """The centre of a picture, of a given height and width."""
    top = (x.shape[2] - size[0]) // 2
    left = (x.shape[3] - size[1]) // 2
    return x[..., top:top + size[0], left:left + size[1]].contiguous()

def observe(args) -> tuple:
    """(clean x or None, observation y, Task) of args.image; tensors are 1 x C x h x w."""
    name, value = parse_task(args.task)
    image = load_image(args.image).to(args.device)
    gen = stream(args.seed, OBSERVE)
    task = Task(args.task)
    if name == "superres":
        task.scale = int(value)
    block = 1 if args.observed else task.scale
    size = [min(n, args.size or n) // block * block for n in image.shape[2:]]
    if min(size) == 0:
        fail(f"--image: {args.image} is too small for {args.task}: it needs {block} pixels a side")
    x = centre(image, size)
    if args.mask:
        mask = load_image(args.mask, "--mask").to(image)
        if mask.shape[2:] != image.shape[2:]:
            fail("--mask: its size differs from the photo's; give a mask of the same size")
        task.mask = (centre(mask, size).mean(dim=1, keepdim=True) > 0).float()
        if task.mask.all() or not task.mask.any():
            fail("--mask: all is known, or nothing; paint known pixels white, missing ones black")
    elif name == "inpaint":
        if value is None or args.observed:
            fail("--mask: inpaint needs a picture of the photo's size, white = known pixels; or, "
                 "for a clean photo, a share, as in inpaint:0.8; to enlarge one say superres:4")
        task.mask = (torch.rand((1, 1, *size), generator=gen) >= value).to(image)
        if not task.mask.any() and args.init != "noise":
            fail("--task: no pixel is known; give a smaller share, as in inpaint:0.8")
    if args.observed:
        x, y = None, x * task.mask
    else:
        y = task.forward(x)
    if name == "denoise":
        if x is not None and value is None:
            fail("--task: say how much noise to add, as denoise:25; or --observed, if it is noisy")
        if x is not None:               # noise that is neither clipped nor rounded
            y = y + value / 127.5 * torch.randn(y.shape, generator=gen).to(y)
        stated = value if args.told is None else args.told
        task.sigma = (stated or 0.0) / 127.5
        if not stated or (args.observed and args.noise != "white"):
            task.sigma, task.noise = look_for_noise(args, y, stated or None)
    say(f"{args.command}: {args.task}, {args.image} {y.shape[3]} x {y.shape[2]} | "
        f"{args.device.type}, {torch.get_num_threads()} threads, seed {args.seed} -> {args.out}")
    return x, y, task

def fingerprint(args) -> dict:
    """The contents of the files that decide a result: of the photo, the mask, and the prior."""
    digests = {}
    for path in (args.image, args.mask, prior_path(args)):
        if path and os.path.isfile(path):
            with open(path, "rb") as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests

def describe(noise: Noise) -> dict:
    """What was found of the noise, in 8-bit units, for metrics.json."""
    dark, middle, bright = [level * 127.5 for level in noise.thirds]
    return dict(level=noise.level * 127.5, neighbour=noise.neighbour, white=noise.white,
                jpeg=noise.floor * 127.5, dark=dark, middle=middle, bright=bright)

def noise_figure(removed: Tensor, noise: Noise) -> Image.Image:
    """What was removed beside a draw of the noise that was found: are they alike?"""
    removed = centre(removed, [min(128, n) for n in removed.shape[2:]])
    drawn = noise.draw(removed, stream(0, FIT))
    reach = 4 * max(noise.strength(), 0.5 / 127.5)
    return figure([("given minus restored", removed / reach, "grey: nothing"),
                   ("the noise found, drawn", drawn / reach, f"level {noise.level * 127.5:.1f}")])

def nothing_to_remove(args, x, y: Tensor, task: Task) -> bool:
    """Where no noise is found the photo itself is the answer. Returns whether it was so."""
    if task.sigma > 0 or not args.task.startswith("denoise"):
        return False
    say("nothing is found to remove: the photo comes back as it was given")
    chart = plot([("no stages", [], [])], "PSNR at the end of each stage", "steps", "dB")
    metrics = dict(iters=0, stop_iter=0, risk=None, seconds=0.0, interrupted=False)
    finish(args, x, y, task, [("as given", y)], [], chart, metrics)
    return True

def finish(args, x, y: Tensor, task: Task, panels: list, rows: list, chart, metrics: dict):
    """Write what fit-dip and sample both write, and say what came out; the last panel is the
    answer. What an earlier run wrote, and this one perhaps does not, is removed."""
    for name in ("noise.png", "sample.png", "stages.png", "ladder.gif"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{args.out}/{name}")
    answer = panels[-1][1]
    if task.noise is not None:
        metrics["noise"] = describe(task.noise)
        save(f"{args.out}/noise.png", noise_figure(y - answer, task.noise))
    metrics["psnr"], metrics["ssim"] = quality(answer, x)
    metrics["psnr_observed"] = clipped_psnr(task.interpolate(y), x)
    metrics.update(task=args.task, sigma=task.sigma * 127.5, image=args.image, seed=args.seed,
                   command=args.argv, files=fingerprint(args))
    holes_black = torch.where(task.mask > 0, y, -1.0)
    given_image = F.interpolate(holes_black, scale_factor=float(task.scale))
    text = f"restored in {clock(metrics['seconds'])}"
    if x is None:
        page = [(title, image, "") for title, image in [("given", given_image), *panels]]
    else:
        note = "" if task.sigma > 0 else "interpolated: "
        page = [("given", given_image, f"{note}{metrics['psnr_observed']:.2f} dB")]
        page += [(title, image, f"{clipped_psnr(image, x):.2f} dB") for title, image in panels]
        page.append(("clean", x, ""))
        text += f": {metrics['psnr_observed']:.2f} dB given, {metrics['psnr']:.2f} dB restored"
    save(f"{args.out}/result.png", to_image(answer))
    columns = min(len(page), 6)
    largest = max(answer.shape[2:])
    if largest >= 128:                      # what differs is small: the centres, enlarged
        side = min(96, 3 * largest // 8)
        part = [max(1, side * n // largest) for n in answer.shape[2:]]
        page += [(f"{title}, enlarged", centre(v, part), "") for title, v, _ in page]
    save(f"{args.out}/figure.png", figure(page, columns))
    save(f"{args.out}/curves.png", chart)
    save(f"{args.out}/log.csv", rows)
    save(f"{args.out}/metrics.json", metrics)
    say(f"{text} -> {args.out}/figure.png")
    if metrics["interrupted"]:
        say("interrupted: this is the best so far")
        raise KeyboardInterrupt

def run_fit(args, y: Tensor, task: Task, x: Tensor | None, prior=None) -> tuple:
    """Fit a DIP: (its last Stage, rows of log.csv, frames of the animation, metrics).

    Only the log and the metrics see the clean x. Ctrl-C leaves the best so far, if there is one.
    """
    brief = args.command == "sample"
    if args.default_join and task.known(y).sum() < FITTED_PIXELS:
        say(f"y has fewer than {FITTED_PIXELS} known pixels: the DDPM is not fitted to it, unless"
            " you say --method adapt")
        args.method = "primed"
    o = complete(Settings(**given(args)), task, y, brief)
    torch.optim.Adam([torch.zeros(1)])          # loads much of torch: that is not in the clock
    bar = Progress(sum(own.iters for own in in_turn(o, task, y)), "DIP")
    looking = 0.0
    rows, frames = [], []
    interrupted = False
    try:
        for stage in fit_dip(y, task, prior, seed=args.seed, brief=brief, tick=bar.step,
                             **given(args)):
            begin = time.monotonic()
            seconds = begin - bar.begin - looking
            noise = stage.level * 127.5
            bar.text = f"noise {noise:.0f}"
            row = dict(network=stage.number, step=stage.step, seconds=seconds, noise=noise)
            row["psnr"], row["ssim"] = quality(stage.average, x)
            row["psnr_target"] = in_db(stage.mse)
            row["psnr_risk"] = in_db(stage.scores.get("holdout", math.nan))
            rows.append(row | stage.scores)
            if stage.number == 0 and stage.input.shape == stage.average.shape:
                title = f"seen: noise {noise:.0f}" if noise > 0 else "seen"
                frames.append([(title, shrink(stage.input), ""),
                               ("estimate", shrink(stage.average), "")])
            looking += time.monotonic() - begin
    except FloatingPointError as error:
        fail(f"--lr: {error}; lower it")
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
    metrics = dict(iters=stage.step, stop_iter=stage.stop_step, risk=stage.risk, seconds=seconds,
                   interrupted=interrupted)
    variance = task.noise_of_y().level ** 2
    spread = variance * (1 + 1 / o.hold ** 2) * (2 / y.numel()) ** 0.5
    if stage.risk < -2 * spread:
        say("R is below zero by more than its spread: the noise is not what it was taken for; "
            "for a noisy photo of your own use --observed --task denoise, without a number")
    # What each rule takes from the path of the first network; the oracle sees the clean image.
    path = [row for row in rows if row["network"] == 0 and "fixed" in row]
    if x is not None:
        metrics["psnr_oracle"] = max(row["psnr"] for row in path)
        for rule in ("holdout", "wmv", "emv"):
            if rule in path[0]:
                index, _ = stop_at([row[rule] for row in path])
                metrics[f"psnr_{rule}"] = path[index]["psnr"]
    return stage, rows, frames, metrics

def cmd_fit_dip(args):
    """fit-dip: a DIP of one photo."""
    x, y, task = observe(args)
    if nothing_to_remove(args, x, y, task):
        return
    prior = load_prior(args, y.shape[1]) if prior_path(args) else None
    stage, rows, frames, metrics = run_fit(args, y, task, x, prior)
    names = {"psnr": "to the clean photo", "psnr_risk": "estimated from R, without it",
             "psnr_target": "to the target of the stage"}
    stages = rows if metrics["interrupted"] else rows[:-1]      # at last comes the answer
    steps = [row["step"] for row in stages]
    curves = []
    for name, label in names.items():
        values = [row[name] for row in stages]
        if np.isfinite(on_axis(values, False)).any():
            curves.append((label, steps, values))
    mark = (stage.stop_step, "stop")
    chart = plot(curves, "PSNR at the end of each stage", "steps", "dB", mark=mark)
    if x is not None:
        curve = ("to the clean photo", steps, [row["ssim"] for row in stages])
        ssims = plot([curve], "SSIM at the end of each stage", "steps", "SSIM", mark=mark)
        chart = Image.fromarray(np.vstack([chart, ssims]))
    finish(args, x, y, task, [("restored", stage.answer)], rows, chart, metrics)
    if frames:
        six = [frames[i * (len(frames) - 1) // 5] for i in range(6)]
        page = figure([seen for seen, _ in six] + [estimate for _, estimate in six])
        save(f"{args.out}/stages.png", page)
        save(f"{args.out}/ladder.gif", [figure(frame) for frame in frames])

def shrink(x: Tensor) -> Tensor:
    """A picture at the size of a panel, so that those of large photos can be kept."""
    return F.avg_pool2d(x, math.ceil(max(x.shape[2:]) / 512), ceil_mode=True)

def watch_call(bar: Progress, rows: list, x: Tensor | None, x0: Tensor):
    """A row of log.csv after each call of the DDPM's network."""
    bar.step()
    mean = like_channels(x0.mean(dim=0, keepdim=True), x0 if x is None else x)
    rows.append(dict(call=bar.count, seconds=bar.seconds, psnr=clipped_psnr(mean, x)))

def start_and_calls(args, prior: Prior, risk: float, told: bool) -> tuple[int, int]:
    """(t0, network calls) of a sampling, as the command line says, or else by default.

    The start rule hides the error of the start. A network that is told y starts with more noise,
    since it needs less of the start. From a start one call gives the answer, the mean of all that x
    may be; from noise twenty calls draw samples.
    """
    t0 = min(prior.schedule.start_t(TOLD_START ** 2 if told else risk), prior.t_max)
    steps = 1
    if args.init == "noise":
        t0 = prior.schedule.T
        steps = 20
    return args.start or t0, args.steps or steps

def draw_samples(args, prior: Prior, start: Tensor, noise: float, t0: int, steps: int, task: Task,
                 **join) -> Tensor:
    """Samples that begin at a start, which has some noise and is noised to t0; or at noise."""
    gens = [stream(args.seed + i, SAMPLE) for i in range(args.samples)]
    channels = start.expand(-1, prior.channels, -1, -1)         # grey is three equal channels
    xt = noised(prior.schedule, channels, t0, gens, noise)
    if args.init == "noise":            # There is no start: only the shape of x_t0 is used.
        xt = noise_like(xt, gens)
    eta = 1.0 if args.eta is None else args.eta
    samples = reverse(prior, task, xt, t0, gens, steps=steps, eta=eta, **join)
    return like_channels(samples, start)

def ddpm_alone(args, prior: Prior, y: Tensor, t0: int, steps: int, task: Task) -> Tensor:
    """What a DDPM that is told y makes of it without a DIP, in as many calls and with the same
    noise: the answer of `--init observed`. It is the control of a join."""
    start, clue = task.interpolate(y), task.clue(y, prior.channels)
    samples = draw_samples(args, prior, start, 0.0, t0, steps, task, y=y, clue=clue)
    return samples.mean(dim=0, keepdim=True)

def trusts_dips(prior: Prior, task: Task) -> bool:
    """Whether the DDPM may be told a DIP as its guess: it has learned from DIPs; or pixels are
    missing, and it has learned more than one task, and so guesses of many kinds."""
    return prior.knows_dips or (task.scale == 1 and prior.task is None)

def cmd_sample(args):
    """sample: a DDPM run backwards, from noise, from the observation, or from a DIP of it."""
    x, y, task = observe(args)
    if nothing_to_remove(args, x, y, task):
        return
    trained = prior = load_prior(args, y.shape[1])
    start = task.interpolate(y)
    # Noise that is not white counts as white noise twice as strong. To add white noise to it, as a
    # fit does, would lose 1.3 dB (ten photos of PolyU).
    start_noise = task.sigma if task.noise_of_y().white else 2 * task.sigma
    risk = (start_noise or START_ERROR) ** 2
    join, panels = {}, []
    metrics = dict(psnr_dip=None, psnr_ddpm=None, seconds=0.0, interrupted=False)
    if task.sigma == 0 or args.init == "noise":
        join["y"] = y                   # elsewhere a noisy y is in the start: not used twice
    told = task.sigma == 0 and not args.no_clue
    guess = None
    if args.init == "dip":
        stage, _, _, found = run_fit(args, y, task, x, prior)
        metrics |= found
        start = stage.answer
        start_noise = 0.0
        prior = stage.prior or trained      # fitted to the photo, after adapt without noise
        panels.append(("DIP", start))
        metrics["psnr_dip"] = clipped_psnr(start, x)
        if not math.isnan(stage.risk):
            risk = stage.risk
        if told and trusts_dips(prior, task) and not args.no_guide:
            guess = start               # the DDPM sees it: it need not be weighed in as well
        elif not args.no_guide:
            join.update(xhat=start, risk=risk)
    if told:
        join["clue"] = task.clue(y, prior.channels, guess)
    t0, steps = start_and_calls(args, prior, risk, told)
    bar = Progress(min(steps, t0), "DDPM")
    rows = []
    join["watch"] = partial(watch_call, bar, rows, x)
    try:
        if metrics["interrupted"]:      # in the fit: the DDPM is left out
            raise KeyboardInterrupt
        if told and args.init == "dip":
            alone = ddpm_alone(args, trained, y, t0, steps, task)
            panels.insert(0, ("DDPM alone", alone))
            metrics["psnr_ddpm"] = clipped_psnr(alone, x)
        samples = draw_samples(args, prior, start, start_noise, t0, steps, task, **join)
        mean = samples.mean(dim=0, keepdim=True)
        if told and args.method in ("adapt", "primed"):
            mean = mean_image([stage.first, start, start, start, mean])     # the DIP: three times
    except KeyboardInterrupt:
        samples = mean = start
        panels = [("so far", start)]
        metrics["interrupted"] = True
    if task.noise is not None:
        mean = give_back(mean, y, task.noise)
    if not metrics["interrupted"]:
        panels += sample_panels(args, task, samples, mean, steps)
    metrics |= compare_samples(samples, x)
    metrics.update(t0=t0, nfe=bar.count, seconds_dip=metrics["seconds"], seconds_ddpm=bar.seconds)
    metrics["seconds"] += bar.seconds
    finish(args, x, y, task, panels, rows, sampling_curve(rows), metrics)
    save(f"{args.out}/sample.png", to_image(samples[:1]))

def sample_panels(args, task: Task, samples: Tensor, mean: Tensor, steps: int) -> list:
    """What a figure shows of samples: one, after several calls, and their mean; or each, where
    nothing is known: of --seed at last, since the last panel is the answer."""
    if not task.mask.any():
        return [(f"seed {args.seed + i}", v[None]) for i, v in enumerate(samples)][::-1]
    name = "joined" if args.init == "dip" else "DDPM"
    if steps == 1:
        return [(name, mean)]
    return [("one sample", samples[:1]), (f"{name}, mean of {args.samples}", mean)]

def sampling_curve(rows: list) -> Image.Image:
    """PSNR of the predicted x_0 against network calls."""
    curve = ("mean of the samples", [row["call"] for row in rows], [row["psnr"] for row in rows])
    return plot([curve], "PSNR of the predicted x_0", "network calls", "dB")

def compare_samples(samples: Tensor, x: Tensor | None) -> dict:
    """How far samples are from the clean image, as a mean and alone, and from each other."""
    mean = clipped_psnr(samples.mean(dim=0, keepdim=True), x)
    alone = clipped_psnr(samples, x)        # of their mean error
    spread = samples.var(dim=0, correction=0).mean().sqrt().item()
    return dict(psnr_mean=mean, psnr_sample=alone, spread=spread * 127.5)

def told_task(args) -> str | None:
    """The --task, as 'inpaint:0.8' or 'superres:4', where a DDPM of it alone will do: one that is
    told y in every call (guide asks it untold, too). None elsewhere; a --mask is no such task."""
    name, number = parse_task(args.task)
    if name == "denoise" or number in (None, 1):
        return None
    told = args.command == "sample" and not args.no_clue and args.method != "guide"
    if told or args.method in ("adapt", "primed"):
        return f"{name}:{number:.15g}"
    return None

def default_prior(args) -> str:
    """The path of the prior that is taken where none is named: from noise one of all t; else one
    that has learned the task alone, if it is told y of it, or else many tasks."""
    task = told_task(args)
    if args.init == "noise":
        return f"{PRIORS}/none.pt"
    if task is not None:
        return f"{PRIORS}/{task.replace(':', '-')}.pt"
    return f"{PRIORS}/dip.pt"

def prior_path(args) -> str | None:
    """Where the prior lies, if one is asked for."""
    if args.command == "fit-dip" and args.method not in WITH_DDPM:
        return None
    return args.ckpt or default_prior(args)

def load_prior(args, channels: int) -> Prior:
    """The Prior in --ckpt, or the default one, which is trained where it is missing."""
    path = prior_path(args)
    trainable = (default_prior(args), f"{PRIORS}/none.pt", f"{PRIORS}/dip.pt")
    if path in trainable and not os.path.exists(path):
        train_default_prior(path, args.device.type)
    remedy = "train another: train --prior dip, or none, to start from noise"
    _, prior = attempt("--ckpt", path, remedy, read_checkpoint)
    if prior.channels < channels:
        fail(f"--ckpt: {path} knows grey photos only; train another on colour photos")
    if args.init == "noise" and prior.t_max < prior.schedule.T:
        fail(f"--ckpt: {path} knows t <= {prior.t_max} only; train one with --prior none")
    task = told_task(args)
    if prior.task and (task is None or parse_task(task) != parse_task(prior.task)):
        fail(f"--ckpt: {path} can only be told y of --task {prior.task}; leave --ckpt out")
    if (args.start or 0) > prior.t_max:
        fail(f"--start: {path} knows t <= {prior.t_max} only; give a smaller one")
    return prior.to(args.device, memory_format=torch.channels_last)

def read_checkpoint(path: str) -> tuple[dict, Prior]:
    """A checkpoint, and the Prior that is made from it."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state, Prior(state)

def train_default_prior(path: str, device: str):
    """Train in a folder of its own, which two processes cannot enter at once; it can be resumed."""
    say(f"there is no prior yet: {path} is trained on images/train, once")
    name = os.path.basename(path)[:-3]
    kind = "none" if name == "none" else "dip"
    folder = path[:-3] + "-unfinished"
    unfinished = f"{folder}/{kind}.pt"
    lock = f"{folder}/busy"
    command = ["train", "--prior", kind, "--out", folder, "--device", device]
    if name not in ("none", "dip"):
        command += ["--task", name.replace("-", ":", 1)]
    if os.path.exists(unfinished):
        command.append("--resume")
    attempt("--ckpt", folder, "name a prior with --ckpt", make_folder)
    try:
        os.mkdir(lock)
    except FileExistsError:
        fail(f"--ckpt: another process trains {path}; wait for it, or, if none does, remove {lock}")
    try:
        run(parse(command))
        os.replace(unfinished, path)
    finally:
        os.rmdir(lock)

def load_data(path: str) -> list:
    """uint8 images C x H x W, with one C: from a folder of pictures, or an array, .npy or .npz."""
    if not os.path.isdir(path):
        remedy = "give a folder of pictures, or uint8 of N x H x W or N x H x W x 3"
        return attempt("--data", path, remedy, read_array)
    images = [load_image(file, "--data")[0] for file in find_photos(path, "--data")]
    channels = max(len(image) for image in images)
    images = [((image + 1) * 127.5).round().byte() for image in images]
    return [image.expand(channels, -1, -1) for image in images]

def read_array(path: str) -> list:
    """The images of a .npy file, or of the first array in an .npz."""
    data = np.load(path)
    if not isinstance(data, np.ndarray):
        data = data[data.files[0]]
    images = torch.from_numpy(data).reshape(*data.shape[:3], -1)
    if images.dtype != torch.uint8 or images.shape[3] not in (1, 3):
        raise ValueError(f"it holds {data.dtype} of {data.shape}")
    return list(images.permute(0, 3, 1, 2))

def checkpoint(args, path: str, channels: int) -> dict:
    """A plain dict that weights_only=True can read: of a new run, or of one to go on with."""
    config = {name: getattr(args, name) for name in CONFIG} | dict(channels=channels)
    if args.t_max is None:
        config["t_max"] = 1000
        if args.prior == "dip":
            config["t_max"] = NoiseSchedule(1000, args.schedule).start_t(TOLD_START ** 2)
    if args.task is not None:
        name, number = parse_task(args.task)
        if name == "denoise" or number in (None, 1):
            fail("--task: give inpaint:SHARE, below 1, or superres:S; or leave it out")
        if args.out == PRIORS:
            fail(f"--out: give a DDPM of one task its own folder; {PRIORS} holds the default ones")
        if name == "superres" and args.patch % number > 0:
            fail(f"--patch: give a multiple of {number:g}, the side of the blocks of {args.task}")
    if args.dips > 0 and args.batch < 4:
        fail("--batch: a quarter of it is told DIPs; give 4 or more, or --dips 0")
    if args.dips > 0 and args.task is None and args.patch % 4 > 0:
        fail("--patch: some DIPs are told blocks of 4 pixels; give a multiple of 4")
    if args.resume:
        state, _ = attempt("--resume", path, "begin without --resume", read_checkpoint)
        for name, value in config.items():
            began = state["config"].get(name)
            if value != began:
                flag = dict(t_max="t-max", channels="data").get(name, name)
                fail(f"--{flag}: the run began with {name} {began}; keep that, or train anew")
        return state
    seed_weights(args.seed)
    weights = UNet(channels, args.width).state_dict()
    return dict(config=config, step=0, model=weights, ema=weights, optimisers=[], rng=None, log=[],
                dips=[], eps_loss=torch.full((2, 1001), math.nan))

def cmd_train(args):
    """train: Algorithm 1 on a folder of photos, or on an array; with checkpoints."""
    rank, world = 0, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:         # under torchrun
        torch.distributed.init_process_group()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if args.width % 2:
        fail("--width: the embedding of t needs an even one")
    if args.batch < world:
        fail(f"--batch: {world} processes share a batch; give {world} or more")
    images = [image for image in load_data(args.data) if min(image.shape[1:]) >= args.patch]
    if not images:
        fail("--patch: no picture is so large; give a smaller side")
    path = f"{args.out}/{args.prior}.pt"
    state = checkpoint(args, path, len(images[0]))
    if args.steps < state["step"]:
        fail(f"--steps: the run has made {state['step']} already; give more")
    rows, t_max = state["log"], state["config"]["t_max"]
    net = UNet(len(images[0]), args.width, schedule=args.schedule)
    net = net.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net)
    net.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    state.update(model=net.state_dict(), ema=ema.state_dict())      # from now on the newest
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net)              # averages the gradients
    say(f"train: {len(images)} images, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M "
        f"parameters, t <= {t_max}, steps {state['step']} to {args.steps} -> {path}")
    before = rows[-1]["seconds"] if rows else 0.0
    if args.dips > 0 and not args.resume:
        bar = Progress(args.dips, "brief DIPs")
        for example in brief_dips(images, state["config"], args.device):
            state["dips"].append(example)
            bar.step()
        before = bar.seconds
        if rank == 0:
            save(path, state)
    bar = Progress(args.steps - state["step"], "DDPM")
    for loss in train_ddpm(state, net, ema, images, args.steps, rank, world):
        bar.text = f"loss {loss:.3f}"
        bar.step()
        if not math.isfinite(loss):
            fail(f"--lr: the loss is not finite at step {state['step']}; lower it, train anew")
        last = state["step"] == args.steps
        if last or state["step"] % 20 == 0:
            rows.append(dict(step=state["step"], seconds=before + bar.seconds, loss=loss))
        if rank == 0 and (last or state["step"] % SAVE_EVERY == 0):
            save(path, state)
    if rank > 0:
        return
    loss = state["eps_loss"][:, 1:t_max + 1].tolist()
    metrics = dict(seconds=rows[-1]["seconds"], step=state["step"], eps_loss=loss)
    save(f"{args.out}/curves.png", training_curves(rows, loss))
    save(f"{args.out}/log.csv", rows)
    save(f"{args.out}/metrics.json", metrics | dict(command=args.argv))

def training_curves(rows: list, loss: list) -> Image.Image:
    """The loss against time, and below it by t = 1, 2, ..."""
    label = "mean of (eps_theta - eps)^2"
    by_time = ("loss of a step", [row["seconds"] for row in rows], [row["loss"] for row in rows])
    ts = list(range(1, len(loss[0]) + 1))
    by_t = [("nothing told", ts, loss[0]), ("told, by value that is not known", ts, loss[1])]
    charts = [plot([by_time], "Loss against time", "seconds", label, ylog=True),
              plot(by_t, "Loss by t, running mean", "t", label, ylog=True)]
    return Image.fromarray(np.vstack(charts))

# ---- 10. Evaluation: tables in which every row is a command line --------------------------------

FREE = ("--task inpaint:0.8", "--task superres:4")
CLASSIC = "--method dip --stop wmv --iters 1800"
FITS = ("", "--nets 1 --rungs 250", CLASSIC, CLASSIC + " --optimiser muon", "--method targets",
        "--method selfdiff", "--method adapt", "--method guide")
JOINS = ("sample --init dip", "sample --init dip --iters 20", "sample --init dip --nets 3",
         "sample --init dip --method primed", "sample --init dip --method staged",
         "sample --init dip --no-guide", "sample --init dip --no-clue", "sample --init observed",
         "sample --init observed --no-clue", "sample", "sample --no-clue --steps 100",
         "fit-dip --nets 1", "fit-dip --method adapt")
CHANGES = ("", "--optimiser adam --iters 1000", "--high 6", "--low 0.2", "--rungs 5", "--fresh 0",
           "--turns 0", "--input fixed", "--target plain", "--width 64", "--depth 2",
           "--loss gradient", "--hold 0.1", "--tail 0", "--told 20")
ONE_CALL = "sample --init observed --steps 1 --samples 1 --ckpt runs/train"
SUITES = {
    "stopping": [f"fit-dip {task} {fit}" for task in ("--task denoise:25", *FREE) for fit in FITS],
    "init": [f"{join} {task}" for task in FREE for join in JOINS],
    "training": [f"{ONE_CALL}/{kind}.pt --task denoise:{sigma}"
                 for sigma in (15, 25, 50) for kind in ("none", "dip")],
    "generation": ["sample --samples 1 --task inpaint:1 --steps 100",
                   "sample --samples 1 --task denoise:10 --init dip --no-guide --start 100"],
    "ablation": [f"fit-dip --task denoise:25 --nets 1 {change}" for change in CHANGES],
}
COLUMNS = ("psnr ssim seconds stop_iter psnr_oracle psnr_holdout psnr_wmv psnr_emv psnr_dip "
           "psnr_ddpm psnr_sample spread nfe t0").split()

def folder_name(text: str) -> str:
    """A text as the name of a folder; two texts never share one."""
    words = re.sub(r"[^\w.]+", "-", text)[-60:]
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

def run_arm(argv: list, out: str) -> dict:
    """The metrics of a command line: of an earlier run, if it had the same flags, and files of the
    same content; else of a new one. SystemExit: it ended in an error, which it has said."""
    args = parse([*argv, "--out", out])
    path = f"{out}/metrics.json"
    if os.path.exists(path):
        metrics = json.loads(read_text(path))
        same = metrics["command"] == args.argv and metrics["files"] == fingerprint(args)
        if same and not metrics["interrupted"]:
            return metrics
    run(args)
    return json.loads(read_text(path))

def interval(differences: list) -> list:
    """The mean of some differences, one for each photo, and its 95 % interval over photos, by
    drawing them again and again (bootstrap)."""
    differences = np.array(differences)
    if len(differences) < 2:
        return [differences.mean(), math.nan, math.nan]
    draws = np.random.default_rng(0).integers(len(differences), size=(20000, len(differences)))
    means = differences[draws].mean(axis=1)
    return [differences.mean(), *np.percentile(means, [2.5, 97.5])]

def group_by(rows: list, name: str) -> dict:
    """Rows by what stands in one of their columns, in order of appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups

def psnr_by_photo(rows: list) -> dict:
    """The PSNR on each photo, the mean over seeds, where the clean photo is known."""
    rows = [row for row in rows if row["psnr"] is not None]
    photos = group_by(rows, "photo")
    return {photo: np.mean([row["psnr"] for row in own]) for photo, own in photos.items()}

def over_first(rows: list) -> dict:
    """What each arm has over the first of the same task: [mean, low, high] in dB."""
    found = {}
    for group in group_by(rows, "task").values():
        arms = {arm: psnr_by_photo(own) for arm, own in group_by(group, "arm").items()}
        first = arms[group[0]["arm"]]
        for arm, other in arms.items():
            differences = [other[photo] - first[photo] for photo in other if photo in first]
            if differences:
                found[arm] = interval(differences)
    return found

def curves_of(rows: list, column: str) -> list:
    """PSNR against a column, means over photos and seeds. Arms that differ in numbers only are one
    curve, a single arm is a dot."""
    rows = [row for row in rows if row.get(column) and row["psnr"] is not None]
    families = {}
    for arm, group in group_by(rows, "arm").items():
        place = [np.mean([row[name] for row in group]) for name in (column, "psnr")]
        family = re.sub(r"(?<=[ :])[\d.]+(?= |$)", "N", arm)
        families.setdefault(family, []).append(place)
    curves = []
    for name, places in families.items():
        dot = "." if len(places) == 1 else ""
        curves.append((dot + name, *zip(*sorted(places))))
    return curves

def draw_arms(args, rows: list, gains: dict):
    """What arms have over the first of their task, as dots; PSNR against seconds, calls and t0."""
    dots = []
    for task, group in group_by(rows, "task").items():
        dots.append((f"{task}: over {group[0]['arm']}"[:92],))
        for arm in group_by(group, "arm"):
            if arm in gains:
                dots.append((arm.replace(f" --task {task}", "")[-92:], *gains[arm]))
        group = [row | dict(arm=row["arm"].replace(f" --task {task}", "")) for row in group]
        for column, label in dict(seconds="seconds", nfe="calls of the DDPM", t0="t0").items():
            curves = curves_of(group, column)
            if len({x for _, xs, _ in curves for x in xs}) > 1:
                chart = plot(curves, f"{task}: PSNR, mean over photos", label, "dB", xlog=True)
                save(f"{args.out}/{column}-{folder_name(task)}.png", chart)
    if gains:
        chart = dot_plot("PSNR, with 95 % intervals over photos", "dB", dots)
        save(f"{args.out}/arms.png", chart)

def markdown(rows: list, gains: dict) -> str:
    """A table of the means of each arm over photos and seeds, and what it has over the first of
    its task, in dB, with its interval."""
    lines = [["arm", "n", "over the first", *COLUMNS]]
    for arm, group in group_by(rows, "arm").items():
        line = [arm, str(len(group)), ""]
        if arm in gains:
            mean, low, high = gains[arm]
            line[2] = f"{mean:.2f}"
            if low < high:
                line[2] += f" ({low:.2f} to {high:.2f})"
        for column in COLUMNS:
            values = [row[column] for row in group if row.get(column) is not None]
            line.append(f"{np.mean(values):.3f}" if values else "")
        lines.append(line)
    used = [column for column in zip(*lines) if any(column[1:])]
    lines = [f"| {' | '.join(line)} |" for line in zip(*used)]
    return "\n".join([lines[0], "|" + " --- |" * len(used), *lines[1:]])

def read_text(path: str) -> str:
    """All of a text file."""
    with open(path, encoding="utf-8") as file:
        return file.read()

def find_arms(args, photo: str) -> list:
    """The command lines of a suite, or of --arms; each is checked before the first fit."""
    names = list(SUITES) if args.suite == "all" else [args.suite]
    arms = [arm for name in names for arm in SUITES[name]]
    if args.arms:
        text = attempt("--arms", args.arms, "name a file of command lines", read_text)
        arms = [line.strip() for line in text.splitlines() if line.strip()]
    if not arms:
        fail(f"--arms: {args.arms} is empty; name a file of command lines")
    for arm in arms:
        if arm.split()[0] not in ("fit-dip", "sample"):
            fail(f"--arms: {arm!r} is no command line of fit-dip or sample")
        named = {word.partition("=")[0] for word in arm.split()}
        for flag in ("--image", "--out"):
            if flag in named:
                fail(f"--arms: {arm!r} cannot name {flag}; evaluate does")
        if "--seed" in named and args.seeds > 1:
            fail(f"--seeds: {arm!r} has a seed of its own; leave one of them out")
        parse([*arm.split(), "--image", photo])
    return list(dict.fromkeys(arms))

def compare_sets(args, network, held: list, results: dict):
    """How the results of each arm differ, as a set, from the pictures in --held: sets.csv."""
    found, rows = {}, []
    results = {arm: paths for arm, paths in results.items() if len(paths) > 1}
    for arm, paths in ({"held": held} | results).items():
        images = [load_image(path, "--held").expand(-1, 3, -1, -1) for path in paths]
        with torch.no_grad():
            found[arm] = torch.cat([network(image).flatten(1).double() for image in images])
        recall, coverage = recall_coverage(found["held"], found[arm])
        distance = frechet(found["held"], found[arm])
        rows.append(dict(arm=arm, n=len(paths), frechet=distance, recall=recall, coverage=coverage))
    save(f"{args.out}/sets.csv", rows)

def cmd_evaluate(args):
    """evaluate: every arm on every photo with every seed, each in a folder of its own; a table."""
    photos = find_photos(args.images, "--images")
    arms = find_arms(args, photos[0])
    size = 64 if args.quick else args.size or 128
    machine = ["--device", args.device.type]
    if args.bf16:
        machine.append("--bf16")
    if args.quick:
        photos = photos[:1]
        prior = f"{args.out}/prior"
        run(parse(["train", "--steps", "2", "--width", "8", "--out", prior, *machine]))
    if args.held:
        network = attempt("--features", args.features, "give a TorchScript network", torch.jit.load)
        held = find_photos(args.held, "--held")
        if min(len(held), len(photos)) < 2:
            fail("--held: a set has two pictures or more, and so has --images")
    say(f"evaluate: {len(arms)} arms x {len(photos)} photos (crops of {size} x {size}) x "
        f"{args.seeds} seeds -> {args.out}")
    rows, results, bad = [], {}, []
    for k, photo, arm in itertools.product(range(args.seeds), photos, arms):
        name = os.path.relpath(photo, args.images)
        seed = args.seed + 100 * k
        if args.held:                   # a set of samples needs other noise for each photo
            seed += 100 * args.seeds * photos.index(photo)
        command, *flags = arm.split()
        argv = [command, "--size", str(size), *machine, "--seed", str(seed), *flags]
        argv += ["--image", photo]
        if args.quick:                  # few steps, and a prior of two steps
            if command == "fit-dip" or "--init dip" in arm:
                argv += ["--iters", "6"]
            if command == "sample" or WITH_DDPM & set(flags):
                argv += ["--ckpt", f"{prior}/none.pt"]
        out = f"{args.out}/{folder_name(f'{name} {seed}')}/{folder_name(arm)}"
        try:
            rows.append(dict(photo=name, arm=arm) | run_arm(argv, out))
            results.setdefault(arm, []).append(f"{out}/result.png")
        except SystemExit:
            bad.append(f"{name}: {arm}")
    if rows:
        save(f"{args.out}/{args.suite}.csv", rows)
        gains = over_first(rows)
        say(markdown(rows, gains))
        draw_arms(args, rows, gains)
    if args.held and rows:
        compare_sets(args, network, held, results)
    if bad:
        fail(f"--arms: not run, see above: {'; '.join(bad)}")

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

def start_time(text: str) -> int | None:
    """An argparse type: a time, or None for 'auto'."""
    return None if text == "auto" else in_range(int, 1, 1000, text)

def add_settings(parser):
    """A flag for each setting of a fit. None, the default, means: not given."""
    for f in fields(Settings):
        allowed, text = f.metadata["allowed"], f.metadata["help"]
        if f.default is not None:
            text += f" ({f.default})"
        if isinstance(allowed, list):
            parser.add_argument(f"--{f.name}", choices=allowed, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=partial(in_range, f.type, *allowed), help=text)

def make_parser() -> argparse.ArgumentParser:
    """The four commands and their flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    new = partial(commands.add_parser, allow_abbrev=False)
    fit = new("fit-dip", help="fit a DIP to a photo; it stops by itself")
    sample = new("sample", help="a DDPM from noise, a photo, or a DIP of it")
    train = new("train", help="train a DDPM on photos or an array")
    evaluate = new("evaluate", help="tables; every row is a command line")
    real, whole = partial(in_range, float, 0), partial(in_range, int, 1)      # up to a maximum
    fit.set_defaults(init=None, start=None, steps=None, no_clue=False, no_guide=False)
    for command, task in ((fit, "denoise:25"), (sample, "inpaint:0.8")):
        add = command.add_argument
        add("--image", help="a photo: clean, and degraded here (astronaut)")
        add("--task", default=task, help=f"{TASKS} ({task})")
        add("--observed", action="store_true", help="--image is degraded; denoise finds its noise")
        add("--mask", help="for inpaint: a picture of the photo's size, white = known")
        add("--told", type=partial(real, 255), help="level told to the fit; 0: estimated (SIGMA)")
        add("--noise", choices=["auto", "white"], help="auto: as found; white: assumed (auto)")
        add("--size", type=partial(whole, 10 ** 5), help="centre crop (all of --image; else 128)")
        add("--ckpt", help="prior (in runs/train, by task; trained where missing)")
        add_settings(command.add_argument_group("how the DIP is fitted"))
    add = sample.add_argument
    add("--init", choices=["noise", "observed", "dip"], default="noise", help="start (noise)")
    add("--start", type=start_time, help="t0, 1..1000; auto: by R; if told y, at noise 2 (auto)")
    add("--steps", type=partial(whole, 1000), help="network calls, at most (1; from noise 20)")
    add("--samples", type=partial(whole, 1024), default=4, help="how many to average (4)")
    add("--eta", type=partial(real, 1), help="0 DDIM .. 1 ancestral; needs several calls (1)")
    add("--no-guide", action="store_true", help="only start from the DIP: neither tell nor join it")
    add("--no-clue", action="store_true", help="do not tell the DDPM what the observation knows")
    add = train.add_argument
    add("--data", default=f"{PHOTOS}/train", help="folder, .npz, .npy (images/train)")
    add("--prior", choices=["none", "dip"], default="none", help="dip: t up to 397 only (none)")
    add("--task", help="learn inpaint:SHARE or superres:S only (these, and to denoise)")
    add("--t-max", type=partial(whole, 1000), help="largest t (none 1000; dip 397, cosine 703)")
    add("--dips", type=partial(in_range, int, 0, 10 ** 5), default=0,
        help="fit so many brief DIPs of training images, and tell the DDPM of them (0)")
    add("--schedule", choices=["linear", "cosine"], default="linear", help="of the noise (linear)")
    add("--steps", type=partial(whole, 10 ** 8), default=1000, help="in all (1000)")
    add("--batch", type=partial(whole, 4096), default=16, help="patches a step (16)")
    add("--patch", type=partial(whole, 1024), default=48, help="their side in pixels (48)")
    add("--width", type=partial(whole, 1024), default=48, help="channels of the network, even (48)")
    add("--lr", type=partial(in_range, float, 1e-9, 10), default=0.02, help="of Muon (0.02)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add = evaluate.add_argument
    add("suite", nargs="?", default="all", choices=[*SUITES, "all"], help="which table (all)")
    add("--images", default=f"{PHOTOS}/test", help="a folder of photos (images/test)")
    add("--arms", help="a file of command lines, one a line, in place of the suite's")
    add("--seeds", type=partial(whole, 99), default=1, help="--seed, --seed + 100, and so on (1)")
    add("--size", type=partial(whole, 10 ** 5), help="centre crop of each photo (128)")
    add("--held", help="a folder of pictures to compare the arms' results with, as a set")
    add("--features", help="for --held: a TorchScript network, N x 3 x H x W to N x D")
    add("--quick", action="store_true", help="one photo of 64 x 64, 6 steps: does it run?")
    for name, command in commands.choices.items():
        add = command.add_argument
        command.epilog = "Brackets hold what is taken by default."
        add("--seed", type=partial(in_range, int, 0, 10 ** 9), default=0, help="of all chance (0)")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto)")
        add("--bf16", action="store_true", help="bfloat16: faster where the machine has it")
        add("--out", default=f"runs/{name}", help=f"a folder (runs/{name})")
        command.error = fail
    parser.error = fail
    return parser

def refuse_idle_flags(args):
    """A flag that would change nothing is an error, not a silence."""
    name, number = parse_task(args.task)
    kind = dict(denoise="noise", inpaint="holes", superres="blocks")[name]
    o = with_roles(Settings(**given(args)), kind)
    told = is_told(o, kind)
    answered = o.input == "first"       # by the DDPM, before a DIP is fitted: adapt and primed
    single = args.nets == 1 or (args.init == "dip" and args.nets is None)
    calls = args.steps or (20 if args.init == "noise" else 1)
    if answered and (name == "denoise" or args.no_clue):
        fail(f"--method: {o.method} needs a DDPM that is told y; say --method staged")
    if told and args.init == "dip" and args.nets == 1:
        fail("--nets: with adapt the first is the DDPM, and no DIP follows; give 2 or more, or "
             "say --method primed")
    idle = [
        (name != "inpaint", ["mask"], "without --task inpaint"),
        (args.mask and number is not None, ["mask"], "with inpaint:SHARE; say --task inpaint"),
        (args.observed and number is not None, ["told"], "with --observed and denoise:SIGMA"),
        (name != "denoise", ["told", "hold", "noise"], "without noise"),
        (name == "denoise" or number == 1, ["no_clue"], "where nothing is told"),
        (not args.observed and args.told != 0, ["noise"], "without --observed"),
        (o.target != "conjugate" and not shifts(o, kind), ["turns"],
         "without the conjugate target"),
        (answered, ["input", "target", "stop", "tail"],
         f"with {o.method} where y has no noise (say --method staged)"),
        (told and args.nets == 1, ["fresh"], "with adapt where no DIP follows"),
        (single and (kind, o.input, o.target) == ("holes", "observed", "conjugate"), ["fresh"],
         "where a single network sees known pixels, not noise"),
        (answered, ["no_guide"], f"with --method {o.method}"),
        (told and kind == "blocks", ["high", "low"], "with adapt and superres"),
        (name == "superres" and args.target == "conjugate", ["target"], "with superres: no pair"),
        (o.input == "fixed" and o.target == "plain", ["high", "low", "fresh"], "without a ladder"),
        (o.input == "fixed" and o.method == "adapt", ["input"], "as fixed: z is no photo"),
        (args.stop in ("wmv", "emv"), ["rungs"], "with a rule that looks at every step"),
        (o.stop != "holdout", ["hold", "tail"], "without --stop holdout"),
        (o.method == "adapt" and (args.nets == 1 or not told), ["width", "depth"],
         "with adapt where no DIP follows"),
        (o.method != "guide", ["weight"], "without --method guide"),
        (prior_path(args) is None, ["ckpt"], "without --method adapt, primed or guide"),
        (args.init in ("noise", "observed"), [*given(args), "no_guide"], "without --init dip"),
        (args.init == "noise", ["start"], "with --init noise, which starts at t = 1000"),
        (calls == 1, ["eta"], "with one call (or say --steps 2)"),
    ]
    for useless, flags, reason in idle:
        for flag in flags:
            value = getattr(args, flag, None)
            if useless and value is not None and value is not False:
                fail(f"--{flag.replace('_', '-')}: it has no effect {reason}; leave it out")

def parse(argv: list) -> argparse.Namespace:
    """A command line with its defaults; ends in an error where it makes no sense."""
    args = make_parser().parse_args(argv)
    args.argv = argv
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if args.device == "auto":
        args.device = next(name for name in have if have[name])
    if not have[args.device]:
        fail(f"--device: there is no {args.device} here; use --device auto")
    number = int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else 0     # torchrun's
    args.device = torch.device(args.device, number)
    if args.command in ("fit-dip", "sample"):
        if args.image is None:
            if args.observed or args.mask:
                fail("--image: --observed and --mask need the photo; name it with --image FILE")
            args.image = f"{PHOTOS}/test/astronaut.png"
            args.size = args.size or 128
        plain = args.no_clue or args.no_guide or args.task.startswith("denoise")
        args.default_join = args.init == "dip" and args.method is None and not plain
        if args.init == "dip" and args.method is None:
            args.method = "staged" if plain else "adapt"        # see run_fit: or primed
        refuse_idle_flags(args)
    if args.command == "evaluate":
        if args.arms and args.suite != "all":
            fail("--arms: it stands in place of a suite; leave one of them out")
        if bool(args.held) != bool(args.features):
            fail("--features: it goes with --held; give both, or neither")
        if args.quick and args.size:
            fail("--size: it has no effect with --quick; leave it out")
    return args

def run(args):
    """Run a parsed command."""
    commands = {"fit-dip": cmd_fit_dip, "sample": cmd_sample, "train": cmd_train,
                "evaluate": cmd_evaluate}
    attempt("--out", args.out, "name a folder you may write to", make_folder)
    # With --bf16 products are bfloat16, in networks and in the look for noise; sums never are.
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        commands[args.command](args)

def main(argv: list | None = None) -> int:
    """Run one command (argv without the program's name); returns 0, or 130 after Ctrl-C."""
    for file in (sys.stdout, sys.stderr):       # A code page may lack a letter of a file's name.
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="backslashreplace")
    if sys.platform == "linux":     # glibc: keep freed memory; new pages cost a third of a step
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1)):    # M_MMAP_, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    try:
        run(parse(sys.argv[1:] if argv is None else list(argv)))
        return 0
    except KeyboardInterrupt:
        say("interrupted; train goes on with --resume; evaluate, and the training that sample "
            "begins, with the same command")
        return 130

if __name__ == "__main__":
    sys.exit(main())
