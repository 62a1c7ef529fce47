"""BalEnt with the entropy counted twice: the error of the ICLR paper's public code.

python .github/experiments/h_twice.py --acquisition balent h_twice

This is balent_seg.py with one more acquisition function, h_twice. It takes the flags of
balent_seg.py.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import balent_seg as bs


def balent_twice(mean_BCHW, var_BCHW):
    """BalEnt, where H(m) is added to MJEnt a second time."""
    entropy_BHW = torch.special.entr(mean_BCHW).sum(1)
    balent_BHW = bs.balanced_entropy(mean_BCHW, var_BCHW)
    return balent_BHW + entropy_BHW / (entropy_BHW + math.log(2))


def h_twice(moments):
    balent_BHW = balent_twice(moments.mean_BCHW, moments.var_BCHW)
    tiny = torch.finfo(balent_BHW.dtype).tiny
    return torch.where(balent_BHW >= 0, 1 / balent_BHW.clamp(min=tiny), balent_BHW)


bs.ACQUISITIONS["h_twice"] = h_twice

if __name__ == "__main__":
    sys.exit(bs.main())
