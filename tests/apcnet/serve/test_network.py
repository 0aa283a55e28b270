"""Tests that images in a batch get the labels of `apcnet.predict`, which sees them alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from serving import SIZES, photo, small_model

import apcnet
from apcnet.config import Protocol
from apcnet.data.augment import view
from apcnet.data.files import levels_of
from apcnet.serve import Served
from apcnet.serve.images import ImageError

PROTOCOLS = {
    "whole": Protocol(),
    "resized": Protocol(test_scale=(80, 60)),
    "one resize": Protocol(test_scale=(80, 60), single_resize=True),
    "windows": Protocol(window=(40, 40), stride=(30, 30)),
    "averaged": Protocol(ratios=(0.75, 1.0), flip=True),
}
TIE = 1e-5  # of the largest logit


def levels(size, seed):
    return levels_of(photo(size, seed))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", SIZES)
def test_batched_labels_are_those_of_predict(size, protocol):
    model, protocol = small_model(), PROTOCOLS[protocol]
    served, images = Served(model, protocol), [levels(size, seed) for seed in range(3)]
    for confidence in (False, True):
        for seen, image in zip(served.predict(images, protocol, confidence), images, strict=True):
            alone = apcnet.predict(model, image, protocol, confidence=True)
            differ = seen.labels != alone.labels
            assert differ.float().mean() <= 1e-3  # ties within rounding
            assert len(alone.labels.unique()) > 1  # a test that compares one label everywhere shows little
            assert (seen.classes, seen.palette) == (alone.classes, alone.palette)
            assert torch.equal(seen.image, image)
            if confidence:
                torch.testing.assert_close(seen.confidence, alone.confidence, rtol=0, atol=3e-5)  # logits are about 10
            else:
                assert seen.confidence is None


def test_labels_differ_at_ties_only():
    model = small_model(9)
    images = [levels((64, 96), seed) for seed in range(6)]
    served = Served(model)
    for seen, image in zip(served.predict(images, Protocol(), False), images, strict=True):
        with torch.no_grad():
            logits = apcnet.inference.whole_logits(model, view(image, (64, 96), model.mean, model.std)[None])
        won = logits[0].gather(0, seen.labels[None].long())[0]
        assert (logits[0].amax(0) - won).max() <= TIE * logits.abs().max()


def test_one_image_is_what_predict_gives_to_the_bit():
    model, image = small_model(), levels(SIZES[2], 0)
    served = Served(model)
    (seen,) = served.predict([image], Protocol(), True)
    alone = apcnet.predict(served.prepared, image, confidence=True)
    assert torch.equal(seen.labels, alone.labels) and torch.equal(seen.confidence, alone.confidence)


def test_a_model_of_other_images_is_refused():
    model = apcnet.create("fcn", "tiny", 3, in_channels=5, width=8, channels=8)
    model.mean = model.std = (1.0,) * 5
    with pytest.raises(ValueError, match="model: expected one of 8-bit RGB images, got one of 5 channels"):
        Served(model)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_model_cannot_take_is_told_without_its_path(count):
    """An exported file may take images of one size only, and its errors name the file."""
    model = small_model()
    model.path = Path("/home/somebody/model.onnx")

    def forward(images):
        raise ValueError(f"images: expected 512 × 512, the only size that {model.path} takes")

    model.forward = forward
    served = Served(model)
    served.prepared = model
    with pytest.raises(ImageError, match=r"expected 512 × 512, the only size that the model takes$") as error:
        served.predict([levels(SIZES[0], 0)] * count, Protocol(), False)
    assert error.value.status == 422 and "somebody" not in str(error.value)


def test_memory_bounds_the_batch():
    served = Served(small_model())
    assert served.most((1000, 1100), Protocol()) == 2
    assert served.most((2000, 2000), Protocol()) == 1
    assert served.most((2000, 2000), Protocol(test_scale=(100, 100))) == 1  # the labels have the size of the image
    assert served.most((100, 110), Protocol(ratios=(1.0, 10.0))) == 2


def test_names_and_colours_are_made_up_where_a_model_has_none():
    model = small_model()
    model.classes = None
    served, image = Served(model), levels(SIZES[0], 0)
    alone = apcnet.predict(model, np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    assert (served.classes, served.palette) == (alone.classes, alone.palette)
