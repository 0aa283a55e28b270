"""Tests evaluation against a plain loop over the images, with several workers and processes, and its errors."""

import os
import pickle
import weakref

import pytest
import torch
from evaluation_ranks import TESTS, Network, Pictures, evaluate_rank, measure
from naive_inference import at_the_input, averaged, resized

from apcnet import data
from apcnet.config import Protocol
from apcnet.data import augment
from apcnet.data.sample import Sample, SampleError
from apcnet.inference.evaluation import Inputs, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDED = 4  # pixels, of 10,000, that rounding may give to another class


def naive(model, dataset, test):
    """Evaluates with every tensor stored: interpolation, softmax, argmax, one count after the other."""
    matrix = torch.zeros(25, dtype=torch.int64)
    window = (test.window, test.stride) if test.window else None
    for image, mask, _ in map(dataset.__getitem__, range(len(dataset))):
        views = [
            augment.normalise(augment.resize(image, size), model.mean, model.std)[None]
            for size in augment.view_sizes(mask.shape, test.ratios, test.test_scale)
        ]
        with torch.no_grad():
            if test.flip or len(views) > 1:
                scores = averaged(model, views, mask.shape, test.flip, window)
            elif test.single_resize:
                scores = resized(model(views[0]), mask.shape, model.align_corners)
            else:
                scores = resized(at_the_input(model, views[0], window), mask.shape, model.align_corners)
        for label, guess in zip(mask.flatten().tolist(), scores.argmax(1).flatten().tolist(), strict=True):
            if label != 255:
                matrix[5 * label + guess] += 1
    return matrix.view(5, 5)


def apart(matrix, expected):
    """Returns the number of pixels that two matrices count differently."""
    assert matrix.sum() == expected.sum() > 5000
    return (matrix - expected).abs().sum().item() // 2


# Tests


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "test",
    [
        Protocol(),
        Protocol(test_scale=(90, 70)),
        Protocol(test_scale=(30, 21)),
        Protocol(test_scale=(90, 70), single_resize=True),
        Protocol(ratios=(0.75,)),
        Protocol(window=(20, 24), stride=(16, 17)),
        Protocol(test_scale=(50, 40), window=(20, 24), stride=(16, 17)),
        Protocol(flip=True),
        Protocol(ratios=(0.5, 1.0, 1.25)),
        Protocol(test_scale=(50, 40), ratios=(0.5, 1.25), flip=True),
        Protocol(test_scale=(50, 40), window=(20, 24), stride=(16, 17), ratios=(0.5, 1.25), flip=True),
    ],
    ids=lambda test: ",".join(
        f"{name}={value}" for name, value in vars(test).items() if value != vars(Protocol())[name]
    ),
)
def test_like_a_plain_loop(test, align_corners):
    model, dataset = Network(align_corners=align_corners), Pictures()
    matrix = evaluate(model, dataset, test).matrix
    expected = naive(model, dataset, test)
    assert matrix.dtype == torch.int64 and apart(matrix, expected) <= ROUNDED
    if test != Protocol():
        assert apart(naive(model, dataset, Protocol()), expected) > 10 * ROUNDED
    if test.single_resize:
        twice = naive(model, dataset, Protocol(test_scale=test.test_scale))
        assert apart(twice, expected) > 2 * ROUNDED


@pytest.mark.parametrize("test", TESTS, ids=["whole", "window", "averaged"])
def test_labels_are_given_out_and_counted_alike(test):
    model, dataset, given = Network(), Pictures(), {}
    matrix = evaluate(model, dataset, test, submission=given.__setitem__)
    assert torch.equal(matrix.matrix, evaluate(model, dataset, test).matrix)
    assert list(given) == dataset.names
    samples = [dataset[i] for i in range(len(dataset))]
    assert all(given[name].shape == mask.shape and given[name].dtype == torch.uint8 for _, mask, name in samples)
    hits = sum((given[name] == mask).sum().item() for _, mask, name in samples)
    assert matrix.matrix.trace() == hits > 0


def test_generated_scenes_and_their_context_classes():
    dataset = data.open("synthetic", size=(48, 64), length=2)
    scores = evaluate(Network(9), dataset).scores()
    assert scores.iou.shape == (9,) and 0 <= scores.iou[list(dataset.context_classes)].nanmean() < 0.5


# Workers, processes, memory


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    model, dataset, names = Network(), Pictures(), []
    matrix = evaluate(model, dataset, TESTS[2], workers=workers, submission=lambda name, labels: names.append(name))
    assert names == dataset.names and torch.equal(matrix.matrix, evaluate(model, dataset, TESTS[2]).matrix)


def test_workers_may_be_spawned():
    inputs = Inputs(Pictures(), TESTS[2], Network.mean, Network.std)
    (views, mask, _), (again, same, _) = inputs[1], pickle.loads(pickle.dumps(inputs))[1]
    assert all(torch.equal(*pair) for pair in zip([*views, mask], [*again, same], strict=True))


def test_processes_change_nothing(tmp_path):
    """Tests that one, two and three processes all return the matrix of all images, of five and then of two."""
    arguments = (os.fspath(tmp_path), (2, 3))
    others = torch.multiprocessing.spawn(evaluate_rank, arguments, nprocs=2, join=False)
    evaluate_rank(2, *arguments)
    others.join()
    tests = (*((5, test) for test in TESTS), (2, TESTS[0]))
    expected = torch.stack([evaluate(Network(), Pictures(n), test).matrix for n, test in tests])
    results = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert results.keys() == {"0 of 2", "1 of 2", "0 of 3", "1 of 3", "2 of 3"}
    assert all(torch.equal(matrices, expected) for matrices, _, _ in results.values())
    assert all(measured == measure() for _, _, measured in results.values())
    assert [results[f"{rank} of 3"][1] for rank in range(3)] == [[(0, 1), (1, 1)], [(0, 1), (1, 1)], [(0, 0)]]


def test_no_more_than_two_images_exist():
    """Tests that only the current and the next image are in memory."""
    model, alive, most = Network(), weakref.WeakSet(), []

    class Watched(Pictures):
        def __getitem__(self, i):
            most.append(len(alive))
            sample = super().__getitem__(i)
            alive.update((sample.image, sample.mask))
            return sample

    def submission(name, labels):
        alive.add(labels)

    evaluate(model, Watched(20), TESTS[0])
    evaluate(model, Watched(20), TESTS[2], submission=submission)
    assert len(most) == 40 and max(most) <= 3


def test_progress():
    states = []
    evaluate(Network(), Pictures(3), progress=lambda *state: states.append(state))
    assert states == [(0, 3), (1, 3), (2, 3), (3, 3)]


# Precision, layout, mode


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision(precision):
    class Watched(Network):
        def forward(self, images):
            logits = super().forward(images)
            seen.append((images.dtype, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
            return logits

    seen, expected = [], evaluate(Network(), Pictures()).matrix
    matrix = evaluate(Watched(), Pictures(), precision=precision).matrix
    assert set(seen) == {(torch.float32, getattr(torch, precision), True)}
    assert not torch.is_autocast_enabled("cpu")
    assert 0 < apart(matrix, expected) < 0.02 * expected.sum()


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_of_the_images(channels_last):
    model = Network()
    matrix = evaluate(model, Pictures(), channels_last=channels_last)
    assert [is_so for _, is_so in model.calls] == [channels_last] * 5
    assert apart(matrix.matrix, evaluate(model, Pictures()).matrix) <= ROUNDED


@pytest.mark.parametrize("broken", [None, 1])
def test_every_part_of_the_model_is_left_in_its_mode(broken):
    model = Network().train()
    frozen = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).eval()
    model.add_module("frozen", frozen)
    expected = evaluate(Network(), Pictures(3)).matrix  # its dropout of 0.9 would show
    if broken is None:
        assert torch.equal(evaluate(model, Pictures(3)).matrix, expected)
    else:
        with pytest.raises(SampleError):
            evaluate(model, Pictures(3, broken))
    assert model.training and model.dropout.training and not frozen.training and not frozen[0].training


@pytest.mark.gpu
@pytest.mark.parametrize("test", TESTS, ids=["whole", "window", "averaged"])
def test_on_a_gpu(test):
    expected = evaluate(Network(), Pictures(), test).matrix
    matrix = evaluate(Network().cuda(), Pictures(), test, workers=2).matrix
    assert matrix.device.type == "cuda" and apart(matrix.cpu(), expected) < 0.01 * expected.sum()  # TF32


# Errors


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(workers):
    with pytest.raises(SampleError) as raised:
        evaluate(Network(), Pictures(4, broken=2), workers=workers)
    assert str(raised.value) == "sample 'street 2/picture' (number 2 of 4): OSError: image file is truncated"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((6, 8), 5).byte(), "'x'.*ValueError: expected labels of 0 to 4 and 255, got 5"),
        (
            torch.zeros(8, 6).byte(),
            r"'x'.*ValueError: image, mask: expected one size for both, got \(6, 8\) and \(8, 6\)",
        ),
        (torch.zeros(6, 8), "'x'.*TypeError: mask: expected a uint8 tensor on the CPU, got torch.float32"),
    ],
)
def test_a_wrong_mask_is_named(mask, message):
    class Wrong(list):
        classes, names = Pictures.classes, ["x"]

    with pytest.raises(SampleError, match=message):
        evaluate(Network(), Wrong([Sample(torch.zeros(3, 6, 8).byte(), mask, "x")]))


@pytest.mark.parametrize(
    ("model", "dataset", "test", "options", "message"),
    [
        (Network(4), Pictures(), Protocol(), {}, "dataset: expected 4 classes, as the model has, got 5"),
        (Network(), Pictures(0), Protocol(), {}, "dataset: expected at least one sample, got none"),
        (Network(), Pictures(), Protocol(), {"precision": "bf16"}, "precision: .*; did you mean 'bfloat16'"),
        (Network(), Pictures(), Protocol(), {"workers": -1}, "workers: expected 0 or more, got -1"),
    ],
)
def test_wrong_arguments(model, dataset, test, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, dataset, test, **options)
