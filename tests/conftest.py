"""Shared by all tests: the repository on the path, and small UNets whose every layer does something."""
import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unet import UNet  # noqa: E402


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def small_unet(seed=0, **config):
    """Two levels, 32 and 64 channels, attention at 16x16. Zero-initialised layers are filled, or nothing would show."""
    torch.manual_seed(seed)
    unet = UNet(**dict(channels=32, mults=(1, 2), blocks=1) | config)
    for p in unet.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return unet.eval().to(memory_format=torch.channels_last)


tiny_unet = functools.partial(small_unet, mults=(1, 1), attention=())       # half the work; attention in the middle


@pytest.fixture
def unet():
    return small_unet()
