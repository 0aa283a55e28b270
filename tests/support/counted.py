"""Defines a data set of numbered pictures and an augmentation, in a module that spawned workers can import."""

import torch

from apcnet.data.sample import Sample


class Counted:
    """Holds pictures whose pixels all equal their index; the picture `broken` is unreadable."""

    def __init__(self, n=10, broken=None):
        self.n, self.broken = n, broken
        self.names = [f"picture {i}" for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError("image file is truncated")
        return Sample(torch.full((3, 2, 2), i, dtype=torch.uint8), torch.zeros(2, 2).byte(), self.names[i])


def shifted(sample, generator):
    """Augments at random, from the generator alone."""
    return sample.image + 100, sample.mask + torch.randint(0, 100, sample.mask.shape, generator=generator).byte()
