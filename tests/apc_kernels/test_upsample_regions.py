"""Tests upsample_region_sums against float64 and PyTorch's own composition, and its contract as an operator.

Sums are float32 whatever the logits: they are held to PyTorch's on widened logits. Their gradient is held to PyTorch's
in their own dtype.
"""

import os
import subprocess
import sys

import instruction_sets
import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw, sliced
from places import CPU, dtypes, layouts, places_without_cuda
from upsample_cases import UPSAMPLES, UpsampleCase, draw_upsample

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
DOWN = UpsampleCase(2, 21, (23, 19), (8, 13), True)
TWICE = UpsampleCase(2, 5, (8, 9), (16, 18))
KINDS = ("softmax", "weighted softmax", "sigmoid", "weighted sigmoid", "masks")
kinds = pytest.mark.parametrize("kind", KINDS)


def draw(case, kind="softmax", layout=nchw, dtype=torch.float32, device="cpu", labels=torch.int64):
    """Draws logits, labels or masks of which a fifth is ignored, a gradient of the sums, and the options of a kind."""
    t = draw_upsample(case, layout, dtype, device, labels)
    generator = torch.Generator().manual_seed(case.classes)
    if kind == "masks":
        masks = torch.tensor([0, 0, 1, 1, 255])[
            torch.randint(5, (case.batch, case.classes, *case.size), generator=generator)
        ]
        t["target"] = masks.to(device, labels)
    options = {"weight": t["weight"]} if "weighted" in kind else {}
    options |= {"sigmoid": "softmax" not in kind, "align_corners": case.align_corners}
    grad = torch.randn(4, case.batch, case.classes, generator=generator)
    return {"logits": t["logits"], "target": t["target"], "grad": grad.to(t["grad"]), "options": options}


def sums_and_gradient(function, t, dtype=None, **options):
    """Computes the sums and the gradient of the logits, widened to a dtype if one is given."""
    logits = t["logits"].detach() if dtype is None else t["logits"].detach().cpu().to(dtype)
    target, options = t["target"].to(logits.device), t["options"] | options
    if options.get("weight") is not None:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        options["weight"] = options["weight"].to(logits.device, wide)
    logits.requires_grad_()
    sums = function(logits, target, **options)
    return sums.detach(), torch.autograd.grad(sums, logits, t["grad"].to(sums))[0]


def ours(t, backend, **options):
    with apc_kernels.backend(backend):
        return sums_and_gradient(apc_kernels.upsample_region_sums, t, squares=True, **options)


def check(t, backend, name, **options):
    sums, grad = ours(t, backend, **options)
    assert_matches(sums, grad, t, name, **options)
    return sums, grad


def assert_matches(sums, grad, t, name, **options):
    own = t["logits"].dtype
    exact, wide, narrow = (
        sums_and_gradient(stock.upsample_region_sums, t, dtype, **options)
        for dtype in (torch.float64, torch.float32, own)
    )
    wide_sums = exact[0] if own == torch.float64 else wide[0]
    assert_accurate(sums.cpu(), exact[0], wide_sums, f"{name} sums")
    assert_accurate(grad.cpu(), exact[1], narrow[1], f"{name} gradient")


# Sums and gradients


@places_without_cuda
@kinds
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_hard_cases(device, backend, case, kind):
    if case.classes == 1 and "softmax" in kind:
        pytest.skip("a softmax needs two classes")
    if case.classes == 1 and kind != "masks":
        pytest.skip("the labels of one class are its mask")
    check(draw(case, kind, device=device), backend, f"{case} {kind}")


@places_without_cuda
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, DOWN], ids=str)
@pytest.mark.parametrize("kind", ["weighted softmax", "masks"])
def test_layouts_and_dtypes(device, backend, layout, dtype, case, kind):
    t = draw(case, kind, layout, dtype, device)
    _, grad = check(t, backend, f"{case} {kind}")
    assert grad.stride() == torch.empty_like(t["logits"]).stride()


@places_without_cuda
@kinds
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_labels_of_every_width(device, backend, kind, labels):
    narrow, wide = (draw(ODD, kind, device=device, labels=dtype) for dtype in (labels, torch.int64))
    assert all(same_bits(a, b) for a, b in zip(ours(narrow, backend), ours(wide, backend), strict=True))


@places_without_cuda
@kinds
@pytest.mark.parametrize("ignored", [0, 1, -100, 2**31 + 5, -(2**40)])
def test_any_label_can_be_the_ignored_one(device, backend, kind, ignored):
    t = draw(ODD, kind, device=device)
    t["target"][t["target"] == 255] = ignored
    check(t, backend, f"{kind} {ignored}", ignore_index=ignored)


@places_without_cuda
def test_masks_of_labels_give_the_sums_of_labels(device, backend):
    """Tests that a mask of each class says the same as labels, and that bool masks and single classes do."""
    t = draw(ODD, "sigmoid", device=device)
    valid = t["target"] != 255
    masks = (t["target"][:, None] == torch.arange(13, device=device)[:, None, None]).long()
    by_labels, by_masks = ours(t, backend), ours(t | {"target": masks.where(valid[:, None], 255)}, backend)
    assert all(same_bits(a, b) for a, b in zip(by_labels, by_masks, strict=True))
    with apc_kernels.backend(backend):
        logits = t["logits"][:, :1]
        sums = apc_kernels.upsample_region_sums(logits, masks[:, 0], sigmoid=True)
        for target in masks[:, :1], masks[:, 0].bool(), masks[:, :1].bool():
            assert same_bits(sums, apc_kernels.upsample_region_sums(logits, target, sigmoid=True))
    assert sums.shape == (3, 2, 1) and torch.equal(sums[1, :, 0], masks[:, 0].sum((1, 2)).float())


@places_without_cuda
def test_three_sums_and_a_fourth(device, backend):
    t = draw(ODD, device=device)
    with apc_kernels.backend(backend):
        logits = t["logits"].requires_grad_()
        four = apc_kernels.upsample_region_sums(logits, t["target"], squares=True)
        three = apc_kernels.upsample_region_sums(logits, t["target"])
        p, n, overlap = three
        (grad,) = torch.autograd.grad(n.sum(), logits, retain_graph=True)
    assert four.shape == (4, 2, 13) and same_bits(three, four[:3]) and (overlap <= p).all()
    assert not grad.any()
    counts = torch.stack([labels[labels != 255].bincount(minlength=13) for labels in t["target"]])
    assert torch.equal(n, counts.float())


@places_without_cuda
def test_no_images(device, backend):
    t = draw(UpsampleCase(0, 4, (3, 3), (6, 6)), device=device)
    sums, grad = ours(t, backend)
    assert sums.shape == (4, 0, 4) and grad.shape == (0, 4, 3, 3)


@pytest.mark.parametrize("backend", CPU)
@kinds
@pytest.mark.parametrize(
    "case", [UpsampleCase(2, 3, (2, 3), (5, 4)), UpsampleCase(1, 3, (5, 2), (3, 4), True)], ids=str
)
def test_gradcheck(backend, case, kind):
    t = draw(case, kind, channels_last, torch.float64)

    def function(logits):
        return apc_kernels.upsample_region_sums(logits, t["target"], squares=True, **t["options"])

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, t["logits"].requires_grad_())


# Extremes


EXTREMES = {
    "far above 0": lambda logits: logits + 1e4,
    "far below 0": lambda logits: logits - 1e4,
    "far apart": lambda logits: logits * (80 / logits.abs().max()),
    "as large as float16 has them": lambda logits: logits * (65504 / logits.abs().max()),
    "all the same": lambda logits: torch.full_like(logits, 3.0),
    "almost the same": lambda logits: logits * 1e-6,
    "subnormal": lambda logits: logits * 1e-40,
}


@places_without_cuda
@kinds
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits(device, backend, extreme, kind):
    t = draw(ODD, kind, device=device)
    t["logits"] = EXTREMES[extreme](t["logits"])
    check(t, backend, f"{extreme} {kind}")


@places_without_cuda
@kinds
def test_many_equal_pixels(device, backend, kind):
    """Tests sums of a hundred thousand equal numbers, which rounding would bend one way."""
    t = draw(UpsampleCase(1, 3, (1, 1), (331, 307)), kind, device=device)
    check(t, backend, kind)


@places_without_cuda
@kinds
def test_ignored_pixels_count_nowhere(device, backend, kind):
    """Ignored pixels do not count, even if their logits are NaN."""
    t = draw(TWICE, kind, device=device)
    t["logits"][1], t["target"][1] = float("nan"), 255
    sums, grad = ours(t, backend)
    half = t | {name: t[name][:1] for name in ("logits", "target")} | {"grad": t["grad"][:, :1]}
    expected = ours(half, backend)
    assert same_bits(sums[:, :1], expected[0]) and same_bits(grad[:1], expected[1])
    assert not sums[:, 1].any() and not grad[1].any()


@places_without_cuda
@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(device, backend, kind, value):
    t = draw(TWICE, kind, device=device)
    t["logits"][1, 2, 4, 5] = value
    sums, grad = ours(t, backend)
    alone = 2 if "softmax" not in kind else slice(None)  # with sigmoids the other classes go on
    if value != float("inf") or "softmax" in kind:
        assert sums[0, 1, alone].isnan().all() and grad[1, alone, 4, 5].isnan().all()
    assert sums[:, 0].isfinite().all() and grad[0].isfinite().all()
    if "softmax" not in kind:
        assert sums[:, 1, [0, 1, 3, 4]].isfinite().all() and grad[1, [0, 1, 3, 4]].isfinite().all()
    if backend != "reference":  # whose products bring a NaN to all of the image
        assert grad[1, :, :3].isfinite().all() and grad[1, :, :, 7:].isfinite().all()


# Labels out of range


WRONG = [
    (13, torch.uint8),
    (-1, torch.int16),
    (2**16 + 3, torch.int32),
    (2**32 + 3, torch.int64),
    (-(2**63), torch.int64),
]
wrong_labels = pytest.mark.parametrize(("label", "dtype"), WRONG, ids=str)


@pytest.mark.parametrize("backend", CPU)
@wrong_labels
def test_a_label_out_of_range(backend, label, dtype):
    logits, target = draw(ODD)["logits"], torch.ones(2, *ODD.size, dtype=dtype)
    target[1, 5, 40] = target[1, 28, 0] = label
    masks = torch.ones(2, 13, *ODD.size, dtype=dtype)
    masks[1, 3, 28, 45] = label
    with apc_kernels.backend(backend):
        for sigmoid in False, True:
            with pytest.raises(
                ValueError, match=rf"expected labels of 0 to 12, .*; got {label} in 2 pixels, the first at"
            ):
                apc_kernels.upsample_region_sums(logits, target, sigmoid=sigmoid)
        with pytest.raises(ValueError, match=rf"labels of 0 to 1, .*; got {label} in 1 pixel, at \(1, 3, 28, 45\)$"):
            apc_kernels.upsample_region_sums(logits, masks, sigmoid=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@kinds
def test_a_label_out_of_range_on_a_gpu(backend, kind):
    """NaN in the sums of its image and in the gradient of its sources, or an error where it was asked for."""
    t = draw(ODD, kind, device="cuda")
    at = (1, 5, 40) if kind != "masks" else (1, 3, 5, 40)
    t["target"][at] = 77
    sums, grad = ours(t, backend)
    assert sums[:, 1, 3].isnan().all() and grad[1, 3, 1, 9].isnan() and sums[:, 0].isfinite().all()
    if kind == "masks":
        assert sums[:, 1, 4].isfinite().all()
    else:
        assert sums[:, 1].isnan().all()
    with apc_kernels.checked_labels(), pytest.raises(ValueError, match="got 77 in 1 pixel"):
        ours(t, backend)


# The same bits


@places_without_cuda
@kinds
def test_same_bits_every_time(device, backend, kind):
    t = draw(UpsampleCase(2, 33, (17, 20), (66, 75)), kind, channels_last, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [ours(t, backend) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


@kinds
@pytest.mark.parametrize(
    "case", [UpsampleCase(3, 19, (33, 29), (130, 117)), UpsampleCase(1, 7, (61, 40), (23, 90), True)], ids=str
)
def test_same_bits_with_any_number_of_threads(threads, kind, case):
    t, results = draw(case, kind), []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(ours(t, "cpp"))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def instructed():
    for case in ODD, UpsampleCase(1, 21, (23, 19), (8, 13), True):
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            for kind, layout in zip(KINDS, (nchw, channels_last, sliced, nchw, channels_last), strict=True):
                yield draw(case, kind, layout, dtype)


@instruction_sets.others
def test_every_instruction_set(isa, tmp_path):
    """Tests each set that the processor has, in its own process: the set is chosen once."""
    instruction_sets.skip_the_one_in_use(isa)
    file = tmp_path / "results.pt"
    program = f"""
import sys
sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}
import torch
import {__name__.rpartition(".")[2]} as tests
torch.save([tests.ours(t, "cpp") for t in tests.instructed()], {str(file)!r})
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"APC_KERNELS_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if "this processor allows" in run.stderr:
        pytest.skip(f"needs a processor with {isa}")
    assert run.returncode == 0, run.stderr
    for i, (t, results) in enumerate(zip(instructed(), torch.load(file), strict=True)):
        assert_matches(*results, t, f"{isa} {i}")


# The dispatcher


@places_without_cuda
@kinds
def test_opcheck(device, backend, kind):
    t = draw(ODD, kind, sliced, device=device)
    operators, options = torch.ops.apc_kernels, t["options"]
    settings = (t["target"], options.get("weight"), 255, options["sigmoid"], True)
    with apc_kernels.backend(backend):
        leaf = t["logits"].detach().requires_grad_()
        torch.library.opcheck(operators.upsample_region_sums.default, (leaf, *settings))
        torch.library.opcheck(operators.upsample_region_sums_backward.default, (t["grad"], t["logits"], *settings))


@places_without_cuda
@kinds
def test_compile(device, backend, kind):
    """One graph, and no second one for other sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(apc_kernels.upsample_region_sums, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in ODD, UpsampleCase(3, 13, (16, 7), (40, 21)):
            t = draw(case, kind, channels_last, device=device)
            expected = sums_and_gradient(apc_kernels.upsample_region_sums, t, squares=True)
            actual = sums_and_gradient(compiled, t, squares=True)
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


class Sums(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, logits, target):
        return apc_kernels.upsample_region_sums(logits, target, **self.options)


@kinds
def test_export_holds_stock_operators_only(kind):
    given, other = draw(ODD, kind), draw(UpsampleCase(2, 13, (16, 7), (40, 21)), kind)
    last = given["target"].dim()
    sizes = {
        name: {i: torch.export.Dim(f"{name}{i}", min=2, max=512) for i in axes}
        for name, axes in (("logits", (2, 3)), ("target", (last - 2, last - 1)))
    }
    module = Sums(given["options"])
    program = torch.export.export(module, (given["logits"], given["target"]), dynamic_shapes=sizes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = [c for c in calls if getattr(c, "namespace", "aten") != "aten" or "apc_kernels" in str(c)]
    assert not foreign and len(calls) > 5, calls
    with apc_kernels.backend("reference"):
        expected = module(other["logits"], other["target"])
    torch.testing.assert_close(program.module()(other["logits"], other["target"]), expected)


def test_meta_tensors():
    t = draw(ODD, "masks", channels_last, torch.bfloat16)
    logits = t["logits"].to("meta").requires_grad_()
    sums = apc_kernels.upsample_region_sums(logits, t["target"].to("meta"), sigmoid=True)
    (grad,) = torch.autograd.grad(sums.sum(), logits)
    assert sums.shape == (3, 2, 13) and sums.dtype == torch.float32
    assert grad.stride() == logits.stride() and grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_autocast_leaves_the_dtype_alone(backend, dtype):
    """Autocast changes no bit of the results; a weight that it has rounded is widened."""
    t = draw(ODD, "weighted softmax", dtype=dtype)
    expected, weight = ours(t, backend), t["options"]["weight"]
    narrow = ours(t, backend, weight=weight.bfloat16().to(weight))[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(t, backend)
        with apc_kernels.backend(backend):
            widened = apc_kernels.upsample_region_sums(t["logits"], t["target"], weight=weight.bfloat16(), squares=True)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)) and same_bits(widened, narrow)


@places_without_cuda
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_makes_no_copy(device, backend, layout, forbid_copies):
    if backend == "reference":
        pytest.skip("the reference is a composition")
    t = draw(ODD, layout=layout, device=device)
    with apc_kernels.backend(backend):
        forbid_copies()
        assert apc_kernels.upsample_region_sums(t["logits"], t["target"]).isfinite().all()


# Wrong input

LOGITS, TARGET = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)
MASKS = torch.zeros(2, 3, 8, 10, dtype=torch.uint8)
SUMS, COUNT = torch.zeros(4, 2, 3), torch.zeros(1).long()
PLAIN, SIGMOID = (None, 255, False, False), (None, 255, True, False)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": LOGITS[0]}, ValueError, r"logits: expected 4 dimensions \(B, K, h, w\), got 3"),
        ({"logits": LOGITS.int()}, ValueError, "logits: expected float32, .* got int32"),
        ({"logits": LOGITS[:, :1]}, ValueError, "logits: expected 2 classes or more for a softmax, got 1; one logit"),
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"target": None}, TypeError, "target: expected a tensor, got NoneType"),
        ({"target": MASKS}, ValueError, r"target: expected 3 dimensions \(B, H, W\), got 4"),
        ({"target": TARGET.float()}, ValueError, "target: expected labels in uint8, .* got float32"),
        ({"target": TARGET.bool()}, ValueError, "target: expected labels in uint8, .* got bool"),
        ({"target": TARGET[:1]}, ValueError, "target: expected a batch of 2, as the logits'"),
        ({"target": MASKS[:, :2], "sigmoid": True}, ValueError, r"target: expected masks \(2, 3, H, W\)"),
        ({"target": MASKS.half(), "sigmoid": True}, ValueError, "target: expected masks in bool, .* got float16"),
        ({"target": MASKS.to("meta"), "sigmoid": True}, ValueError, "target: .* on the logits' device, cpu, got meta"),
        ({"target": MASKS[:, :, :0], "sigmoid": True}, ValueError, r"target: expected a height and width of 1 to \d+"),
        ({"target": TARGET.bool(), "sigmoid": True}, ValueError, "target: expected labels in uint8, .* got bool"),
        ({"target": MASKS, "sigmoid": True, "weight": torch.ones(3)}, ValueError, "weight: expected None for masks"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected \(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight: expected a tensor without gradient"),
        ({"weight": [1.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got None"),
        ({"sigmoid": 1}, TypeError, "sigmoid: expected True or False, got 1"),
        ({"squares": None}, TypeError, "squares: expected True or False, got None"),
        ({"align_corners": "no"}, TypeError, "align_corners: expected True or False, got 'no'"),
    ],
)  # fmt: skip
def test_wrong_arguments(changed, error, message):
    given = {"logits": LOGITS, "target": TARGET} | changed
    with pytest.raises(error, match=message):
        apc_kernels.upsample_region_sums(**given)
    if error is ValueError and "requires" not in message and "without gradient" not in message:
        given |= {"weight": given.get("weight"), "sigmoid": given.get("sigmoid", False)}
        if given["target"].device == LOGITS.device:  # torch itself refuses two devices
            with pytest.raises(error, match=message):
                arguments = (given["logits"], given["target"], given["weight"], 255, given["sigmoid"], False)
                torch.ops.apc_kernels.upsample_region_sums(*arguments)


@pytest.mark.parametrize("grad", [torch.zeros(3, 2, 3), torch.zeros(4, 2, 3).double(), torch.zeros(4, 3, 2)])
def test_wrong_gradients(grad):
    with pytest.raises(ValueError, match=r"grad: expected \(4, 2, 3\) in float32 on cpu, got"):
        torch.ops.apc_kernels.upsample_region_sums_backward(grad, LOGITS, TARGET, None, 255, False, False)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("", (LOGITS, TARGET, *PLAIN, SUMS[1:], COUNT), "sums: expected size 4"),
        ("", (LOGITS, TARGET, *PLAIN, SUMS, COUNT.float()), "wrong: expected one int64"),
        ("", (LOGITS, MASKS, *PLAIN, SUMS, COUNT), "target: expected"),
        ("", (LOGITS, MASKS[:, :2], *SIGMOID, SUMS, COUNT), "target: expected"),
        ("_backward", (SUMS[:, :, 1:], LOGITS, TARGET, *PLAIN, LOGITS), "grad: expected size 3"),
        ("_backward", (SUMS, LOGITS, TARGET, *PLAIN, LOGITS[..., 1:]), "grad_logits: "),
    ],
)  # fmt: skip
def test_raw_operators_never_leave_their_memory(operator, arguments, message):
    with apc_kernels.backend("cpp"):
        apc_kernels.upsample_argmax(torch.zeros(1, 1, 1, 1), (1, 1))  # loads the library
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.apc_kernels_cpp, f"upsample_region_sums{operator}")(*arguments)
