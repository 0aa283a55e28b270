"""Tests that `model.context_maps` returns the affinities, regions and assignments that the heads work with."""

import pytest
import torch
import torch.nn.functional as F

import apc_kernels
import apcnet
from apc_kernels.ops.affinities.reference import affinities, blocks
from apcnet.data.synthetic import Synthetic
from apcnet.inference import prepare
from apcnet.models.context import ContextMaps

PYRAMIDS = [{}, {"plain": True}, {"guide": False}, {"scales": (1, 2)}, {"fusion": False, "align_corners": True}]


def tiny(name: str, **options) -> apcnet.models.Segmentor:
    """Returns a small model in evaluation, with statistics as after some training."""
    torch.manual_seed(0)
    model = apcnet.create(name, "tiny", 9, width=8, channels=8, auxiliary_channels=0, **options).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    scenes = Synthetic("val", size=(48, 56))
    return torch.stack([apcnet.data.augment.normalise(scenes[i].image) for i in range(2)])


@torch.no_grad()
def head_input(model, images):
    return model.backbone(images)


@pytest.mark.parametrize("options", PYRAMIDS, ids=str)
def test_affinities_times_regions_are_the_context(options, images):
    """Tests that affinities·regions, through the rest of the module, is what the fused operation gives."""
    model = tiny("apcnet", **options)
    head, maps, features = model.head, model.context_maps(images), head_input(model, images)
    assert maps.size == (12, 14) and maps.scales == head.scales and maps.align_corners == head.align_corners
    assert [tuple(a.shape) for a in maps.affinities] == [(2, s * s, 12, 14) for s in head.scales]
    with torch.no_grad():
        x, regions = head.reduction(features[head.index]), head.regions(features[head.index]).mT
        torch.testing.assert_close(torch.cat(maps.regions, 1), regions)
        pairs = zip(maps.affinities, maps.regions, strict=True)
        z = torch.cat([torch.einsum("bjhw,bjc->bchw", a, r) for a, r in pairs], 1)
        z = x + (z if head.residual is None else head.residual(z))
        torch.testing.assert_close(z, head.context(x, regions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", PYRAMIDS, ids=str)
def test_affinities_are_those_of_the_specification(options, images):
    """Tests σ(x·wᵀ + b), with the guide as a bias of every image, beside the specification in float64."""
    model = tiny("apcnet", **options).double()
    head, features = model.head, head_input(model, images.double())
    with torch.no_grad():
        x = head.reduction(features[head.index])
        guided = x if head.guide is None else x + head.guide(x.mean((2, 3), keepdim=True))
        weight, bias = head.affinity.weight.flatten(1), head.affinity.bias.expand(2, -1)
        found = model.context_maps(images.double()).affinities
        for block, affinity in zip(blocks(head.scales, weight.shape[1]), found, strict=True):
            expected = affinities(guided.flatten(2), weight, bias, block)
            torch.testing.assert_close(affinity.flatten(2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, index", [("pspnet", 3), ("upernet", 3)])
def test_similarities_are_cosines_with_the_pooled_regions(name, index, images):
    """Tests them beside PyTorch's pooling and cosine; a map that is one region's all over has cosine 1 with it."""
    model = tiny(name)
    maps, features = model.context_maps(images), head_input(model, images)[index]
    start = 0
    for scale, cosine, vectors in zip(maps.scales, maps.similarities, maps.regions, strict=True):
        pooled = F.adaptive_avg_pool2d(features, scale).flatten(2)  # (B, C, s²)
        expected = F.cosine_similarity(features[:, :, None], pooled[..., None, None], dim=1)
        torch.testing.assert_close(cosine, expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            reduced = model.head.regions(features)[:, :, start : start + scale**2]
        torch.testing.assert_close(vectors, reduced.mT)
        start += scale**2


@pytest.mark.parametrize("lateral", [False, True])
def test_assignments_make_the_encoding(lateral, images):
    """Tests that Σᵢ aᵢₖ(xᵢ − cₖ) is what the fused operation gives, and that codewords share every position."""
    model = tiny("encnet", lateral=lateral)
    head, maps = model.head, model.context_maps(images)
    assert maps.assignments.shape == (2, 32, 12, 14) and maps.scales == ()
    torch.testing.assert_close(maps.assignments.sum(1), torch.ones(2, 12, 14))
    with torch.no_grad():
        x, seen = None, []
        hook = head.project.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        model(images)
        hook.remove()
        x = seen[0].flatten(2)
        weights = maps.assignments.flatten(2)  # (B, K, N)
        encoding = weights @ x.mT - weights.sum(2)[..., None] * head.codewords
        torch.testing.assert_close(encoding, apc_kernels.encode(x, head.codewords, head.scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["apcnet", "pspnet", "encnet", "upernet"])
def test_a_prepared_model_has_the_same_maps(name, images):
    model = tiny(name)
    fast, maps = prepare(model).context_maps(images), model.context_maps(images)
    for kind in ("affinities", "similarities", "regions"):
        for ours, theirs in zip(getattr(fast, kind), getattr(maps, kind), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    if maps.assignments is not None:
        torch.testing.assert_close(fast.assignments, maps.assignments, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size, scale", [((12, 14), 1), ((12, 14), 3), ((13, 17), 6), ((4, 5), 6)])
def test_boxes_are_the_bins_of_adaptive_pooling(size, scale):
    """Tests each box by the mean over it."""
    x = torch.randn(1, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    boxes = ContextMaps(size, False).boxes(scale)
    means = torch.stack([x[0, 0, top:bottom, left:right].mean() for top, left, bottom, right in boxes])
    torch.testing.assert_close(means, F.adaptive_avg_pool2d(x, scale).flatten())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "size, image", [((12, 14), (96, 111)), ((13, 7), (97, 50)), ((1, 1), (8, 9)), ((5, 5), (5, 5))]
)
def test_places_are_nearest(align_corners, size, image):
    """Tests that no position's centre, where the resize puts it, is closer to a pixel than the one named."""
    for places, pixels, positions in zip(ContextMaps(size, align_corners).places(image), image, size, strict=True):
        index = torch.arange(positions, dtype=torch.float64)
        if align_corners:
            centers = index * (pixels - 1) / max(positions - 1, 1)
        else:
            centers = (index + 0.5) * pixels / positions - 0.5
        distances = (torch.arange(pixels)[:, None] - centers).abs()
        chosen = distances.gather(1, places[:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.min(1).values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, kind", [("apcnet", "affinities"), ("pspnet", "similarities")])
def test_maps_of_a_model_in_bfloat16(name, kind, images):
    """Tests that they are float32, and off by no more than the features are."""
    expected = getattr(tiny(name).context_maps(images), kind)
    found = getattr(tiny(name).bfloat16().context_maps(images.bfloat16()), kind)
    for low, full in zip(found, expected, strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


def test_wrong_use(images):
    with pytest.raises(ValueError, match=r"model: expected the head of APCNet.* got FCNHead"):
        tiny("fcn").context_maps(images)
    with pytest.raises(ValueError, match=r"evaluation mode.*call model.eval\(\)"):
        tiny("apcnet").train().context_maps(images)
    with pytest.raises(ValueError, match=r"images: expected normalised .* \(B, 3, H, W\)"):
        tiny("apcnet").context_maps(images[0])


def test_gradients_are_not_kept(images):
    assert not any(a.requires_grad for a in tiny("apcnet").context_maps(images).affinities)
