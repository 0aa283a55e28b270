"""What has been published of the runs that `apcnet.presets` names: accuracy, memory, speed, and by whom.

mmsegmentation's figures are those of the READMEs beside its configs. A page with results of the five models that is
often met shows PSPNet's rows under APCNet's name, down to their links; nothing here is from it.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Figures of one run; None: not published."""

    miou: float | None
    """Percent on the val split, at a single scale."""
    multi_scale: float | None
    """The same, averaged over six scales and their mirror images."""
    memory: float | None
    """GB on each of four GPUs in training."""
    fps: float | None
    """Images a second on a V100, one at a time, up to labels of their own size."""
    source: str


# Source: a preset a line, with its figures in the order above.
TABLES = {
    "mmsegmentation, configs/apcnet": """
        apcnet-r50-cityscapes-40k        78.02 79.26 7.7  3.57
        apcnet-r101-cityscapes-40k       79.08 80.34 11.2 2.15
        apcnet-r50-cityscapes-80k        78.96 79.94 -    -
        apcnet-r101-cityscapes-80k       79.64 80.61 -    -
        apcnet-r50-cityscapes-769-40k    77.89 79.75 8.7  1.52
        apcnet-r101-cityscapes-769-40k   77.96 79.24 12.7 1.03
        apcnet-r50-cityscapes-769-80k    78.79 80.35 -    -
        apcnet-r101-cityscapes-769-80k   78.45 79.91 -    -
        apcnet-r50-ade20k-80k            42.20 43.30 10.1 19.61
        apcnet-r101-ade20k-80k           45.54 46.65 13.6 13.10
        apcnet-r50-ade20k-160k           43.40 43.94 -    -
        apcnet-r101-ade20k-160k          45.41 46.63 -    -
    """,
    "mmsegmentation, configs/pspnet": """
        pspnet-r50-cityscapes-40k        77.85 79.18 6.1  4.07
        pspnet-r101-cityscapes-40k       78.34 79.74 9.6  2.68
        pspnet-r18-cityscapes-80k        74.87 76.04 1.7  15.71
        pspnet-r50-cityscapes-80k        78.55 79.79 -    -
        pspnet-r101-cityscapes-80k       79.76 81.01 -    -
        pspnet-r101-cityscapes-80k-fp16  79.46 -     5.34 8.77
        pspnet-r50-cityscapes-769-40k    78.26 79.88 6.9  1.76
        pspnet-r101-cityscapes-769-40k   79.08 80.28 10.9 1.15
        pspnet-r18-cityscapes-769-80k    75.90 77.86 1.9  6.20
        pspnet-r50-cityscapes-769-80k    79.59 80.69 -    -
        pspnet-r101-cityscapes-769-80k   79.77 81.06 -    -
        pspnet-r50-ade20k-80k            41.13 41.94 8.5  23.53
        pspnet-r101-ade20k-80k           43.57 44.35 12   15.30
        pspnet-r50-ade20k-160k           42.48 43.44 -    -
        pspnet-r101-ade20k-160k          44.39 45.35 -    -
        pspnet-r50-voc2012-20k           76.78 77.61 6.1  23.59
        pspnet-r101-voc2012-20k          78.47 79.25 9.6  15.02
        pspnet-r50-voc2012-40k           77.29 78.48 -    -
        pspnet-r101-voc2012-40k          78.52 79.57 -    -
        pspnet-r101-context-40k          46.60 47.78 8.8  9.68
        pspnet-r101-context-80k          46.03 47.15 -    -
        pspnet-r101-context59-40k        52.02 53.54 -    -
        pspnet-r101-context59-80k        52.47 53.99 -    -
    """,
    "mmsegmentation, configs/encnet": """
        encnet-r50-cityscapes-40k        75.67 77.08 8.6  4.58
        encnet-r101-cityscapes-40k       75.81 77.21 12.1 2.66
        encnet-r50-cityscapes-80k        77.94 79.13 -    -
        encnet-r101-cityscapes-80k       78.55 79.47 -    -
        encnet-r50-cityscapes-769-40k    76.24 77.85 9.8  1.82
        encnet-r101-cityscapes-769-40k   74.25 76.25 13.7 1.26
        encnet-r50-cityscapes-769-80k    77.44 78.72 -    -
        encnet-r101-cityscapes-769-80k   76.10 76.97 -    -
        encnet-r50-ade20k-80k            39.53 41.17 10.1 22.81
        encnet-r101-ade20k-80k           42.11 43.61 13.6 14.87
        encnet-r50-ade20k-160k           40.10 41.71 -    -
        encnet-r101-ade20k-160k          42.61 44.01 -    -
    """,
    "mmsegmentation, configs/fcn": """
        fcn-r50-cityscapes-40k           72.25 73.36 5.7  4.17
        fcn-r101-cityscapes-40k          75.45 76.58 9.2  2.66
        fcn-r18-cityscapes-80k           71.11 72.91 1.7  14.65
        fcn-r50-cityscapes-80k           73.61 74.24 -    -
        fcn-r101-cityscapes-80k          75.13 75.94 -    -
        fcn-r101-cityscapes-80k-fp16     76.80 -     5.37 8.64
        fcn-r50-cityscapes-769-40k       71.47 72.54 6.5  1.80
        fcn-r101-cityscapes-769-40k      73.93 75.14 10.4 1.19
        fcn-r18-cityscapes-769-80k       70.80 73.16 1.9  6.40
        fcn-r50-cityscapes-769-80k       72.64 73.32 -    -
        fcn-r101-cityscapes-769-80k      75.52 76.61 -    -
        fcn-r50-ade20k-80k               35.94 37.94 8.5  23.49
        fcn-r101-ade20k-80k              39.61 40.83 12   14.78
        fcn-r50-ade20k-160k              36.10 38.08 -    -
        fcn-r101-ade20k-160k             39.91 41.40 -    -
        fcn-r50-voc2012-20k              67.08 69.94 5.7  23.28
        fcn-r101-voc2012-20k             71.16 73.57 9.2  14.81
        fcn-r50-voc2012-40k              66.97 69.04 -    -
        fcn-r101-voc2012-40k             69.91 72.38 -    -
        fcn-r101-context-40k             44.43 45.63 -    9.93
        fcn-r101-context-80k             44.13 45.26 -    -
        fcn-r101-context59-40k           48.42 50.4  -    -
        fcn-r101-context59-80k           49.35 51.38 -    -
    """,
    "mmsegmentation, configs/sem_fpn": """
        semantic-fpn-r50-cityscapes-80k  74.52 76.08 2.8  13.54
        semantic-fpn-r101-cityscapes-80k 75.80 77.40 3.9  10.29
        semantic-fpn-r50-ade20k-160k     37.49 39.09 4.9  55.77
        semantic-fpn-r101-ade20k-160k    39.35 40.72 5.9  40.58
    """,
    "sssegmentation, docs/modelzoo/semanticfpn": """
        ssseg-semantic-fpn-r50-voc2012     70.88 - - -
        ssseg-semantic-fpn-r101-voc2012    72.51 - - -
        ssseg-semantic-fpn-r50-ade20k      38.16 - - -
        ssseg-semantic-fpn-r101-ade20k     39.85 - - -
        ssseg-semantic-fpn-r50-cityscapes  76.09 - - -
        ssseg-semantic-fpn-r101-cityscapes 76.39 - - -
    """,
    "the paper, its ablation without deep supervision": """
        paper-apcnet-r50-voc2012 78.20 - - -
    """,
    "the paper": """
        paper-apcnet-r101-voc2012 80.93 81.93 - -
        paper-apcnet-r101-context -     54.7  - -
        paper-apcnet-r101-ade20k  -     45.38 - -
    """,
}


def _figure(word: str) -> float | None:
    return None if word == "-" else float(word)


PUBLISHED = {
    name: Published(*map(_figure, figures), source)
    for source, rows in TABLES.items()
    for name, *figures in (row.split() for row in rows.strip().splitlines())
}
