"""Defines a small model, a data set and a process that evaluates, in a module that spawned processes can import."""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from apcnet.config import Protocol
from apcnet.data.sample import Sample
from apcnet.inference.evaluation import evaluate
from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage

SIZES = ((40, 61), (32, 32), (57, 33), (61, 40), (24, 70))


class Network(torch.nn.Module):
    """Computes logits at a quarter of the resolution from the surroundings of a pixel, and notes its inputs."""

    mean, std = (120.0, 110.0, 100.0), (60.0, 58.0, 56.0)

    def __init__(self, num_classes: int = 5, align_corners: bool = False):
        super().__init__()
        self.num_classes, self.align_corners = num_classes, align_corners
        generator = torch.Generator().manual_seed(num_classes)
        self.near = torch.nn.Parameter(torch.randn(num_classes, 3, 5, 5, generator=generator))
        self.everywhere = torch.nn.Parameter(torch.randn(num_classes, 3, generator=generator))
        self.dropout = torch.nn.Dropout(0.9)
        self.eval()
        self.calls = []

    def forward(self, images):
        self.calls.append((tuple(images.shape), images.is_contiguous(memory_format=torch.channels_last)))
        context = (images.mean((2, 3)) @ self.everywhere.mT)[:, :, None, None]
        return self.dropout(F.conv2d(images, self.near, stride=4, padding=2).tanh() + context)


class Pictures:
    """Makes smooth noise of several sizes with blocks of labels, some ignored; the picture `broken` is unreadable.

    A picture is made when it is asked for, and is the same each time.
    """

    classes = ("a", "b", "c", "d", "e")

    def __init__(self, n: int = 5, broken: int | None = None):
        self.n, self.broken = n, broken
        self.names = [f"street {i}/picture" for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError("image file is truncated")
        generator = torch.Generator().manual_seed(i)
        size = SIZES[i % len(SIZES)]
        coarse = torch.randint(256, (1, 3, 7, 9), generator=generator).float()
        image = F.interpolate(coarse, size, mode="bilinear")[0].round().byte()
        blocks = torch.randint(6, (1, 1, 6, 8), generator=generator).float()
        mask = F.interpolate(blocks, size, mode="nearest")[0, 0].byte()
        mask[mask == 5] = 255
        return Sample(image, mask, self.names[i])


TESTS = (
    Protocol(),
    Protocol(test_scale=(50, 40), window=(20, 24), stride=(16, 17)),
    Protocol(test_scale=(50, 40), ratios=(0.5, 1.25), flip=True),
)


def evaluate_rank(rank: int, folder: str, worlds: tuple[int, ...]) -> None:
    """Evaluates as one process of groups of several sizes, one after the other, and writes "0 of 2.pt", ….

    All tests on five pictures, and the first one on two, which is less than there may be processes.
    """
    torch.set_num_threads(1)
    for world in worlds:
        if rank < world:
            group = {"init_method": f"file://{folder}/{world}", "rank": rank, "world_size": world}
            dist.init_process_group("gloo", timeout=timedelta(seconds=120), **group)
            progress = []
            matrices = [evaluate(Network(), Pictures(), test).matrix for test in TESTS]
            few = evaluate(Network(), Pictures(2), TESTS[0], progress=lambda *state, to=progress: to.append(state))
            measured = measure()
            dist.destroy_process_group()
            torch.save((torch.stack([*matrices, few.matrix]), progress, measured), f"{folder}/{rank} of {world}.pt")


def measure() -> list:
    """Takes every measure, and returns its results: floats, integers and strings."""
    images, loss, edges, calibration = PerImage(Pictures.classes), MeanLoss(), BoundaryIoU(5), Calibration()
    measures = {"images": images, "loss": loss, "boundary": edges, "calibration": calibration}
    evaluate(Network(), Pictures(), TESTS[0], **measures)
    scores = [tuple(score)[:-1] for score in images.scores]
    return [scores, loss.mean, edges.counts.tolist(), calibration.counts.tolist()]
