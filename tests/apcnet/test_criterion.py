"""Tests the training losses of a model by name: their parser, their values, and models with one logit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
import apcnet
from apcnet import losses
from apcnet.config import Config, Model, Optimisation, Protocol
from apcnet.data.augment import normalise
from apcnet.data.synthetic import Synthetic
from apcnet.export import export
from apcnet.inference.evaluation import evaluate
from apcnet.models import Criterion
from apcnet.terms import Term, is_binary, parse
from apcnet.training.start import initial_model

SMALL = {"width": 8, "channels": 8, "dropout": 0.0}


def small(num_classes: int = 5, name: str = "pspnet", **options) -> apcnet.models.Segmentor:
    torch.manual_seed(0)
    return apcnet.create(name, "tiny", num_classes, **SMALL, **options)


def batch(classes: int = 5, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    target = torch.randint(classes, (2, size, size), generator=generator, dtype=torch.uint8)
    target[:, :6] = 255
    return torch.randn(2, 3, size, size, generator=generator), target


# The description


def test_sums_of_losses():
    assert parse("cross_entropy") == (Term("cross_entropy"),)
    assert parse("cross_entropy+0.5*dice") == (Term("cross_entropy"), Term("dice", 0.5))
    assert parse(" 2 * ohem + 1e-1*focal_tversky ") == (Term("ohem", 2.0), Term("focal_tversky", 0.1))
    assert [is_binary(loss) for loss in ("focal+dice", "binary_focal+dice", "binary_cross_entropy")] == [False, 1, 1]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("", "expected a sum such as cross_entropy+0.5*dice, got ''"),
        ("cross_entropy+", "expected a sum such as cross_entropy+0.5*dice, got 'cross_entropy+'"),
        ("dice loss", "expected a sum such as cross_entropy+0.5*dice, got 'dice loss'"),
        ("dise", "expected one of cross_entropy, focal, .*, got 'dise'; did you mean 'dice'?"),
        ("dice*2", "expected one of cross_entropy, .*, got '2'"),
        ("two*dice", "expected a positive weight of dice, got 'two' in 'two*dice'"),
        ("0*dice", "expected a positive weight of dice, got '0' in '0*dice'"),
        ("-1*dice", "expected a positive weight of dice, got '-1' in '-1*dice'"),
        ("inf*dice", "expected a positive weight of dice, got 'inf'"),
        ("nan*dice", "expected a positive weight of dice, got 'nan'"),
        ("dice+cross_entropy+2*dice", "expected every loss once, got dice twice in"),
        ("focal+binary_cross_entropy", "expected either losses of one logit or of a softmax, got binary_cross_entropy"),
    ],
)
def test_wrong_sums(loss, message):
    with pytest.raises(ValueError, match="loss: " + message.replace("+", r"\+").replace("*dice", r"\*dice")):
        Optimisation(loss=loss)


def test_settings_that_do_not_fit_the_loss():
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 without cross_entropy or .*got focal"):
        Optimisation(loss="focal", label_smoothing=0.1)
    for name, value in ("focal_gamma", -1.0), ("ohem_threshold", 1.0), ("ohem_share", 0.0):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
            Optimisation(**{name: value})


# Values


def test_each_loss_is_the_function_of_its_name():
    model, (images, target) = small(auxiliary_channels=0), batch()
    logits = model(images).logits
    shared = {"align_corners": model.align_corners, "ignore_index": 255}
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    pixels = {**shared, "weight": weight, "reduction": "mean"}
    expected = {
        "ce": apc_kernels.upsample_cross_entropy(logits, target, label_smoothing=0.1, **pixels),
        "focal": apc_kernels.upsample_cross_entropy(logits, target, focal=3.0, **pixels),
        "ohem": losses.ohem(logits, target, threshold=0.3, share=0.4, **pixels),
        "dice": losses.dice(logits, target, **shared),
        "jaccard": losses.jaccard(logits, target, **shared),
        "tversky": losses.tversky(logits, target, **shared),
        "focal_tversky": losses.focal_tversky(logits, target, **shared),
        "generalised_dice": losses.generalised_dice(logits, target, **shared),
    }
    given = {"weight": weight, "reduction": "mean", "label_smoothing": 0.1}
    for i, (short, value) in enumerate(expected.items(), 1):
        name = {"ce": "cross_entropy"}.get(short, short)
        computed = model(images, target, loss=Criterion(f"{i}*{name}", 3.0, 0.3, 0.4), **given)
        assert list(computed) == [f"decode.loss_{short}"]
        torch.testing.assert_close(computed[f"decode.loss_{short}"], i * value)


def test_the_auxiliary_head_takes_the_same_losses():
    model, (images, target) = small(auxiliary_channels=8, auxiliary_weight=0.3), batch()
    computed = model(images, target, loss="cross_entropy+0.5*dice")
    assert list(computed) == ["decode.loss_ce", "decode.loss_dice", "aux.loss_ce", "aux.loss_dice"]
    dice = losses.dice(model(images).aux, target, align_corners=model.align_corners)
    torch.testing.assert_close(computed["aux.loss_dice"], 0.3 * 0.5 * dice)
    parts = model(images, target, loss="cross_entropy+0.5*dice", denominator=target.numel(), parts=4)
    torch.testing.assert_close(parts["aux.loss_dice"], computed["aux.loss_dice"] / 4)
    torch.testing.assert_close(parts["decode.loss_ce"], computed["decode.loss_ce"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy+0.5*dice", "focal+ohem"])
def test_a_compiled_model(loss):
    torch._dynamo.reset()
    model, (images, target) = small(auxiliary_channels=8), batch()
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(images, target, loss=Criterion(loss))
    for name, value in compiled(images, target, loss=Criterion(loss)).items():
        torch.testing.assert_close(value, expected[name])


# One logit for two classes


def test_losses_of_one_logit():
    model, (images, target) = small(1, "encnet", auxiliary_channels=8), batch(2)
    output = model(images)
    z = F.interpolate(output.logits, target.shape[1:], mode="bilinear", align_corners=model.align_corners)[:, 0]
    valid, y = target != 255, (target == 1).float()
    plain = torch.where(valid, F.binary_cross_entropy_with_logits(z, y, reduction="none"), 0.0)
    p = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    computed = model(images, target, loss=Criterion("binary_cross_entropy+dice"), reduction="mean")
    torch.testing.assert_close(computed["decode.loss_bce"], plain.sum() / valid.sum())
    focal = model(images, target, loss=Criterion("binary_focal", focal_gamma=1.5), reduction="mean_all")
    torch.testing.assert_close(focal["decode.loss_focal"], (plain * (1 - p) ** 1.5).mean())
    dice = losses.dice(output.logits, target, mode="binary", align_corners=model.align_corners)
    torch.testing.assert_close(computed["decode.loss_dice"], dice)
    presence = F.binary_cross_entropy_with_logits(output.se, torch.ones(2, 1))  # both images have the second class
    torch.testing.assert_close(computed["decode.loss_se"], 0.2 * presence)
    weighted = model(images, target, loss="binary_cross_entropy", weight=torch.tensor([1.0, 3.0]), reduction="mean")
    expected = (plain * torch.where(y == 1, 3.0, 1.0)).sum() / (valid + 2 * y * valid).sum()
    torch.testing.assert_close(weighted["decode.loss_bce"], expected)


def test_losses_that_do_not_fit_the_number_of_logits():
    images, target = batch(2)
    for loss in "cross_entropy", "focal+dice":
        with pytest.raises(ValueError, match=r"num_classes: expected 2 or more .*--loss binary_cross_entropy"):
            small(1)(images, target, loss=loss)
    with pytest.raises(ValueError, match="num_classes: expected 1, a single logit, for binary_focal, got 5"):
        small(5)(images, target, loss="dice+binary_focal")
    with pytest.raises(ValueError, match="loss: expected a dataset of two classes for binary_cross_entropy, got 9"):
        initial_model(
            Config(model=Model("pspnet", "tiny"), optimisation=Optimisation(loss="binary_cross_entropy")),
            Synthetic("train"),
        )


class Two:
    """Is a data set of two classes: the synthetic one, whose first class is the background."""

    classes, palette = ("background", "object"), ((0, 0, 0), (255, 0, 0))

    def __init__(self, split: str):
        self.scenes = Synthetic(split, size=(48, 56))
        self.names = self.scenes.names[:4]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        image, mask, name = self.scenes[index]
        return type(self.scenes[index])(image, torch.where(mask == 255, 255, (mask > 2).to(torch.uint8)), name)


PROTOCOLS = [
    Protocol(),
    Protocol(flip=True, ratios=(0.5, 1.0)),
    Protocol(window=(16, 16), stride=(8, 8)),
    Protocol(single_resize=True),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_one_logit_predicts_as_two(protocol, tmp_path):
    """Tests that every protocol, prediction and evaluation, gives the labels of the two logits 0 and z."""
    data, single = Two("val"), small(1).eval()
    single.classes, single.palette = data.classes, data.palette
    double = small(2).eval()
    scene = normalise(data[0].image, single.mean, single.std)[None]
    double.load_state_dict({k: v for k, v in single.state_dict().items() if "classifier" not in k}, strict=False)
    for head in "head", "auxiliary":
        one, two = (getattr(model, head).classifier.conv for model in (single, double))
        with torch.no_grad():
            if head == "head":  # both labels occur
                averaged = apcnet.inference.probabilities(single, scene, Protocol(flip=protocol.flip))[:, 1]
                one.bias -= averaged.logit().median()
            two.weight.copy_(torch.cat([0 * one.weight, one.weight]))
            two.bias.copy_(torch.cat([0 * one.bias, one.bias]))
    counts = [evaluate(model, data, protocol).matrix for model in (single, double)]
    assert counts[0].shape == (2, 2) and torch.equal(*counts) and (counts[0].sum(0) > 0).all()
    single.save(tmp_path / "one.safetensors")
    loaded = apcnet.load(tmp_path / "one.safetensors")
    assert (loaded.num_classes, loaded.classes, loaded.palette) == (1, data.classes, data.palette)
    ours, theirs = (apcnet.predict(model, data[0].image, protocol=protocol) for model in (loaded, double))
    assert torch.equal(ours.labels, theirs.labels) and set(ours.labels.unique().tolist()) <= {0, 1}
    assert ours.classes == data.classes
    with torch.no_grad():
        probabilities = apcnet.inference.probabilities(single, batch()[0])
    torch.testing.assert_close(probabilities[:, 1], apcnet.inference.whole_logits(single, batch()[0])[:, 0].sigmoid())


@pytest.mark.slow
def test_a_model_with_one_logit_is_exported_with_its_labels(tmp_path):
    model = small(1).eval()
    differences = export(model, tmp_path / "one.pt2", size=(48, 48), output="labels")
    assert max(differences.values()) == 0
    program = torch.export.load(tmp_path / "one.pt2").module()
    images = torch.randn(1, 3, 40, 56)
    assert torch.equal(program(images), apcnet.inference.labels(model, images))
