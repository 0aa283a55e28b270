"""Applies mmsegmentation's rules of inference without regard to memory: every tensor is formed, pass by pass."""

import torch
import torch.nn.functional as F


def resized(logits, size, align_corners):
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def slid(model, images, crop, stride):
    """Applies the window rule, window by window over a whole image of sums."""
    (height, width), total, hits = images.shape[2:], 0, torch.zeros(1, 1, *images.shape[2:])
    for i in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(i * stride[0] + crop[0], height), min(j * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            window = images[:, :, top:bottom, left:right]
            logits = resized(model(window), window.shape[2:], model.align_corners)
            around = (left, width - right, top, height - bottom)
            total, hits = total + F.pad(logits, around), hits + F.pad(torch.ones_like(logits[:1, :1]), around)
    assert hits.min() > 0
    return total / hits


def at_the_input(model, images, window=None):
    """Computes logits at the size of the images, after the first resize."""
    if window:
        return slid(model, images, *window)
    return resized(model(images), images.shape[2:], model.align_corners)


def averaged(model, views, size, flip, window=None):
    """Averages the softmax of every view and its mirror image, each resized twice."""
    scores = []
    for view in views:
        for mirrored in (False, True)[: 1 + flip]:
            logits = at_the_input(model, view.flip(3) if mirrored else view, window)
            probabilities = resized(logits, size, model.align_corners).softmax(1)
            scores.append(probabilities.flip(3) if mirrored else probabilities)
    return torch.stack(scores).mean(0)
