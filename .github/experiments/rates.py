"""BalEnt where the draws drop channels at another rate than training does.

python .github/experiments/rates.py --rate 0.1 --out runs-0.1

The other flags are those of balent_seg.py, with the network lite0 of lite0.py. At the end
it prints, for the picks of each round, on which share of the pixels BalEnt was at least 0
(for a run of one function, from its first round to its last).
"""

import sys

import lite0  # noqa: F401, adds --arch lite0
from _runs import bs, make_parser


def draw_at(rate, shares):
    """Make the draws at `rate`; shares[network][seed] is that of BalEnt >= 0."""
    mc_moments = bs.MCDropoutFCN.mc_moments

    def mc_moments_at_rate(model, x_B3HW, samples=50, seed=0):
        trained = model.dropout.p
        model.dropout.p = rate
        moments = mc_moments(model, x_B3HW, samples, seed)
        model.dropout.p = trained
        balent_BHW = bs.balanced_entropy(moments.mean_BCHW, moments.var_BCHW)
        # The seed is another one for each image, and the same when it is drawn again.
        share = (balent_BHW >= 0).float().mean().item()
        shares.setdefault(model, {})[seed] = share
        return moments

    bs.MCDropoutFCN.mc_moments = mc_moments_at_rate


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rate", type=float, required=True, help="of the draws")
    args, flags = parser.parse_known_args()
    shares = {}
    draw_at(args.rate, shares)
    code = bs.main(flags)
    for r, of_image in enumerate(shares.values(), 1):
        share = sum(of_image.values()) / len(of_image)
        print(
            f"rate {args.rate}, picks of round {r}: BalEnt >= 0 on {share:.2%} of the "
            f"pixels of {len(of_image)} images"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
