"""Tests operations with random arguments, right and wrong: each result is the reference's, or an error names the fault.

A case draws an operation, sizes from 0 to 9, a dtype and a layout, and then, in two of three cases, one fault: a wrong
size, dtype, device or type, NaN and infinities, or a number that is out of range. A battery, see
tests/support/battery.py; here its cases run in this process, so that `make sanitize` sees them.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import same_bits
from cases import channels_last, nchw, sliced, transposed
from judge import verdict
from torch import Tensor

import apc_kernels
from apc_kernels import BatchNorm

SINGLE, DOUBLE = torch.float32, torch.float64
DTYPES = (SINGLE, torch.bfloat16, torch.float16, DOUBLE)
LAYOUTS = (nchw, channels_last, sliced, transposed)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, SINGLE: 2e-5, DOUBLE: 1e-12}  # the coarsest first


class Case(NamedTuple):
    """Holds a call."""

    operation: str
    arguments: dict[str, Any]

    def call(self) -> Any:
        return getattr(apc_kernels, self.operation)(**self.arguments)


def cases(count: int, seed: int) -> Iterator[Case]:
    """Draws cases."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        operation = str(random.choice(list(DRAWS)))
        arguments = DRAWS[operation](random)
        if random.random() < 0.65:
            fault = str(random.choice(list(arguments)))
            arguments[fault] = spoiled(random, arguments[fault])
        yield Case(operation, arguments)


def judge(case: Case) -> str:
    """Runs a case, and returns "right" or "named"."""

    def right(result: Any) -> bool:
        with apc_kernels.backend("reference"):
            expected = case._replace(arguments=_in_double(case.arguments)).call()
        return all(a.is_meta or _agree(case, a, b) for a, b in zip(_tensors(result), _tensors(expected), strict=True))

    return verdict(case.call, right, *case.arguments)


# Arguments that each operation takes


def normal(random, *shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape)).to(dtype)


def size(random, most: int = 9) -> int:
    return int(random.integers(1, most + 1))


def feature_map(random, channels: int, batch: int) -> Tensor:
    dtype = DTYPES[random.choice(4, p=[0.5, 0.15, 0.1, 0.25])]
    layout = LAYOUTS[random.integers(len(LAYOUTS))]
    return layout(normal(random, batch, channels, size(random), size(random), dtype=dtype))


def small(x: Tensor) -> torch.dtype:
    return DOUBLE if x.dtype == DOUBLE else SINGLE


def drawn_scales(random) -> tuple[int, ...]:
    return tuple(int(s) for s in random.integers(1, 5, random.integers(1, 4)))


def affinities(random) -> dict[str, Any]:
    scales, channels = drawn_scales(random), size(random, 6)
    x = feature_map(random, channels * len(scales), size(random, 3))
    rows, dtype = sum(s * s for s in scales), small(x)
    return {
        "x": x,
        "weight": normal(random, rows, channels, dtype=dtype),
        "bias": normal(random, rows, dtype=dtype),
        "scales": scales,
    }


def context(random) -> dict[str, Any]:
    given = affinities(random)
    x, (rows, channels) = given["x"], given["weight"].shape
    given["regions"] = normal(random, x.shape[0], rows, channels, dtype=small(x))
    if random.random() < 0.5:
        given["shift"] = normal(random, x.shape[1], dtype=small(x))
        given["residual"] = True
    return given


def context_norm(random) -> dict[str, Any]:
    given = context(random)
    given.pop("shift", None), given.pop("residual", None)
    x = given["x"]
    channels, dtype = x.shape[1], small(x)

    def norm() -> BatchNorm:
        gamma, beta, mean, var = (normal(random, channels, dtype=dtype) for _ in range(4))
        return BatchNorm(gamma, beta, mean, var.abs() + 0.5)

    each = given["weight"].shape[1]
    given |= {"projection": normal(random, channels, each, dtype=dtype), "norm": norm(), "training": False}
    if random.random() < 0.5:
        given |= {"guide": normal(random, channels, each, dtype=dtype), "guide_norm": norm()}
    return given


def pool(random) -> dict[str, Any]:
    return {"x": feature_map(random, size(random), size(random, 3)), "scales": drawn_scales(random)}


def pyramid(random) -> dict[str, Any]:
    scales, channels = drawn_scales(random), size(random, 5)
    regions = normal(random, size(random, 3), channels, sum(s * s for s in scales))
    return {
        "regions": regions,
        "weight": normal(random, size(random), channels * len(scales), 3, 3),
        "size": (size(random), size(random)),
        "scales": scales,
        "align_corners": bool(random.random() < 0.5),
    }


def reduction(random) -> dict[str, Any]:
    scales, channels, outputs = drawn_scales(random), size(random, 5), size(random)
    regions = normal(random, size(random, 3), channels, sum(s * s for s in scales))

    def norm() -> BatchNorm:
        gamma, beta, mean, var = (normal(random, outputs) for _ in range(4))
        return BatchNorm(gamma, beta, mean, var.abs() + 0.5)

    weights = [normal(random, outputs, channels, 1, 1) for _ in scales]
    return {"regions": regions, "weights": weights, "norms": [norm() for _ in scales], "scales": scales} | {
        "training": False
    }


def code(random) -> dict[str, Any]:
    x = feature_map(random, size(random), size(random, 3))
    words = size(random, 5)
    return {
        "x": x,
        "codewords": normal(random, words, x.shape[1], dtype=small(x)),
        "scale": normal(random, words, dtype=small(x)),
    }


def convolution(random) -> dict[str, Any]:
    x = feature_map(random, size(random), size(random, 3))
    weight = normal(random, size(random), 2 * x.shape[1], 3, 3, dtype=x.dtype)
    return {"maps": [x, x.flip(0)], "weight": weight, "dilation": int(random.integers(1, 4))}


def product(random) -> dict[str, Any]:
    given = convolution(random)
    return {"maps": given["maps"], "weight": given["weight"][:, :, :1, :1]}


def logits(random) -> dict[str, Any]:
    x = feature_map(random, size(random), size(random, 3))
    return {"logits": x, "size": (size(random, 20), size(random, 20)), "align_corners": bool(random.random() < 0.5)}


def labelled(random) -> dict[str, Any]:
    given = logits(random)
    x, (height, width) = given["logits"], given.pop("size")
    labels = random.integers(0, x.shape[1], (x.shape[0], height, width))
    labels[random.random(labels.shape) < 0.1] = 255
    integers = (torch.uint8, torch.int16, torch.int32, torch.int64)[random.integers(4)]
    return given | {"target": torch.from_numpy(labels).to(integers), "ignore_index": 255}


def loss(random) -> dict[str, Any]:
    given = labelled(random)
    if random.random() < 0.5:
        given["weight"] = normal(random, given["logits"].shape[1], dtype=small(given["logits"])).abs()
    if random.random() < 0.3:
        given["focal"] = float(random.choice([0.0, 0.5, 2.0, 1e6]))
    else:
        given["label_smoothing"] = float(random.choice([0.0, 0.1, 1.0]))
    return given | {"reduction": str(random.choice(["mean", "mean_all", "sum", "none"]))}


def regions(random) -> dict[str, Any]:
    given = labelled(random) | {"sigmoid": bool(random.random() < 0.5), "squares": bool(random.random() < 0.5)}
    classes = given["logits"].shape[1]
    if given["sigmoid"] and (classes == 1 or random.random() < 0.5):
        shape = (*given["logits"].shape[:2], *given["target"].shape[1:])
        given["target"] = torch.from_numpy(random.choice([0, 1, 255], shape)).to(given["target"].dtype)
    elif random.random() < 0.5:
        given["weight"] = normal(random, classes, dtype=small(given["logits"])).abs()
    return given


DRAWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adaptive_context": context,
    "adaptive_context_norm": context_norm,
    "affinity_moments": affinities,
    "conv1x1": product,
    "conv3x3": convolution,
    "encode": code,
    "pyramid_conv": pyramid,
    "pyramid_pool": pool,
    "pyramid_reduce": reduction,
    "upsample_argmax": logits,
    "upsample_confusion": labelled,
    "upsample_cross_entropy": loss,
    "upsample_region_sums": regions,
    "upsample_softmax": logits,
}


# Faults


def spoiled(random, value: Any) -> Any:
    """Returns a wrong or strange value for an argument."""
    if isinstance(value, BatchNorm):
        at = int(random.integers(4))
        return (random.choice([0, 1]) and None) or value._replace(**{value._fields[at]: spoiled(random, value[at])})
    if isinstance(value, list):
        return [[], value[:1], [*value[:-1], spoiled(random, value[-1])], value[0], None][random.integers(5)]
    if isinstance(value, Tensor):
        return spoiled_tensor(random, value)
    others = [None, "three", -1, 0, 2**40, 2**70, 1.5, float("nan"), float("inf"), (), (0,), (-1, 2), (2**40, 1), [3]]
    others += [(1, 2, 3, 4, 5, 6), np.int64(2), np.array([2, 1]), torch.tensor(2), torch.tensor([1, 2]), True, b"x", {}]
    return others[random.integers(len(others))]


def spoiled_tensor(random, x: Tensor) -> Any:
    axis = int(random.integers(x.dim())) if x.dim() else 0
    at = tuple(int(random.integers(n)) for n in x.shape) if x.numel() else None
    match random.integers(16):
        case 0:
            return x.unsqueeze(0)
        case 1:
            return x[0] if len(x) else x
        case 2:
            return torch.cat([x, x.narrow(axis, 0, 1)], axis)
        case 3:
            return x.narrow(axis, 0, 0)
        case 4:
            return x.to(torch.complex64)
        case 5:
            return x.to(torch.bool)
        case 6:
            return x.to(torch.float16 if x.dtype != torch.float16 else torch.float32)
        case 7:
            return x.to(torch.int64)
        case 8:
            return x.to("meta")
        case 9:
            return x.tolist()
        case 10:
            return x.numpy() if x.dtype in (SINGLE, DOUBLE) else None
        case 11:
            return x.to_sparse()
        case 12:
            return x.expand(2, *x.shape)
        case 13 if at and x.is_floating_point():
            return x.index_put(tuple(map(torch.tensor, at)), torch.tensor(float("nan"), dtype=x.dtype))
        case 14 if at and x.is_floating_point():
            return x.index_put(tuple(map(torch.tensor, at)), torch.tensor(-float("inf"), dtype=x.dtype))
        case 15 if at and not x.is_floating_point():
            return x.index_put(tuple(map(torch.tensor, at)), torch.tensor(int(random.integers(99, 254)), dtype=x.dtype))
        case _:
            return [None, 3, "x"][random.integers(3)]


# Comparison


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def _in_double(value: Any) -> Any:
    """Returns arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, BatchNorm):
        return BatchNorm(*map(_in_double, value[:4]), *value[4:])
    if isinstance(value, dict):
        return {name: _in_double(v) for name, v in value.items()}
    return [_in_double(v) for v in value] if isinstance(value, list) else value


def _agree(case: Case, result: Tensor, expected: Tensor) -> bool:
    coarsest = min(
        (t.dtype for t in _tensors([*case.arguments.values()]) if t.is_floating_point()), key=list(TOLERANCE).index
    )
    allowed = TOLERANCE[coarsest]
    if result.shape != expected.shape:
        return False
    if case.operation == "upsample_argmax":
        return int((result != expected).sum()) <= _near_ties(case, allowed)
    if case.operation == "upsample_confusion":
        return int((result - expected).abs().sum()) <= 2 * _near_ties(case, allowed)
    finite = expected.isfinite()  # products spread infinities and NaN, here to zeros that others leave out
    if case.operation.startswith("upsample") and not _given_finite(case):
        finite &= result.isfinite()  # a neighbour counts with the weight 0, on one side or the other
    scale = expected[finite].abs().max().clamp_min(1) if finite.any() else 1
    return torch.allclose(
        result[finite].double() / scale, expected[finite].double() / scale, rtol=allowed, atol=allowed
    )


def _given_finite(case: Case) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors([*case.arguments.values()]))


def _near_ties(case: Case, allowed: float) -> int:
    """Counts the pixels whose two largest logits are so close that rounding may decide; with infinities, all pixels."""
    given = case.arguments
    size = given["size"] if "size" in given else given["target"].shape[-2:]
    upsampled = F.interpolate(
        given["logits"].double(), tuple(size), mode="bilinear", align_corners=bool(given["align_corners"])
    )
    if upsampled.shape[1] == 1:
        return 0
    if not _given_finite(case):
        return upsampled[:, 0].numel()
    first, second = upsampled.topk(2, 1).values.unbind(1)
    return int((first - second <= allowed * first.abs().clamp_min(1)).sum())


def random_calls(count: int, seed: int) -> Iterator[tuple[str, Callable[[Path], str]]]:
    for i, case in enumerate(cases(count, seed)):
        yield f"{i} {case.operation}", lambda _, case=case: judge(case)


KINDS = {"random calls": random_calls}


@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_random_arguments(count):
    """Tests that no call crashes, hangs or is silently wrong, and that a third of the calls or more reach a kernel."""
    verdicts = []
    for i, case in enumerate(cases(count, seed=count)):
        try:
            verdicts.append(judge(case))
        except Exception as error:
            raise AssertionError(f"case {i}: {case}") from error
    assert verdicts.count("right") > count / 3 and verdicts.count("named") > count / 3


def test_threads_compute_the_same_bits():
    """Tests calls of all operations from eight threads at once."""
    random = np.random.default_rng(0)
    drawn = [Case(operation, draw(random)) for operation, draw in DRAWS.items() for _ in range(5)]
    expected = [_tensors(case.call()) for case in drawn]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda case: _tensors(case.call()), drawn * 8))
    assert all(same_bits(a, b) for i, r in enumerate(results) for a, b in zip(r, expected[i % len(drawn)], strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same_bits():
    """Tests calls in a child that was forked after its parent had used the threads of the operations."""
    case = Case(
        "upsample_cross_entropy", {"logits": torch.randn(2, 20, 64, 64), "target": torch.zeros(2, 128, 128).long()}
    )
    expected = case.call()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (computed,) = pool.map_async(_number, [case]).get(timeout=60)
    assert computed == expected.item()


def _number(case: Case) -> float:
    torch.set_num_threads(1)  # as in a DataLoader's worker; OpenMP, and with it PyTorch, hangs with more after a fork
    return case.call().item()
