"""Tests the upsample_* operations as operators: the dispatcher's contract, and the errors for wrong input."""

import pytest
import torch
from accuracy import same_bits
from cases import channels_last, sliced
from places import CPU, places_without_cuda
from upsample_cases import UpsampleCase, draw_upsample, loss_and_gradient

import apc_kernels
from apc_kernels import labels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
OTHER = UpsampleCase(3, 13, (16, 7), (40, 21))
two_layouts = pytest.mark.parametrize("layout", [channels_last, sliced], ids=lambda layout: layout.__name__)


# The dispatcher


@places_without_cuda
@two_layouts
def test_opcheck(device, backend, layout):
    t = draw_upsample(ODD, layout, device=device)
    logits, target, weight = t["logits"], t["target"], t["weight"]
    operators, leaf = torch.ops.apc_kernels, logits.detach().requires_grad_()
    with apc_kernels.backend(backend):
        normalizer = operators.upsample_cross_entropy(logits, target, weight, 255, 0.1, 0.0, False, "none", None, None)[
            0
        ]
        options = (target, weight, 255, 0.1, 0.0, False, "none"), (target, None, 255, 0.0, 2.0, True, "mean")
        for arguments in (
            (leaf, *options[0], None, None),
            (leaf, *options[1], None, 7.0),
            (leaf, *options[1], None, None),
        ):
            torch.library.opcheck(operators.upsample_cross_entropy.default, arguments)
        for grad in t["grad"], t["grad"].flatten()[:1]:
            arguments = (grad, logits, target, weight, 255, 0.1, 0.0, False, normalizer)
            torch.library.opcheck(operators.upsample_cross_entropy_backward.default, arguments)
        torch.library.opcheck(operators.upsample_argmax.default, (logits, list(ODD.size), True))
        torch.library.opcheck(operators.upsample_confusion.default, (logits, target, 255, True))
        for add in False, True:
            out = layout(torch.zeros(2, 13, *ODD.size, device=device))
            torch.library.opcheck(operators.upsample_softmax.default, (logits, True, False, add, out))


@places_without_cuda
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "weight": True, "label_smoothing": 0.1}, {"focal": 2.0}], ids=str
)
def test_compile(device, backend, options):
    """One graph, and no second one for other sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(apc_kernels.upsample_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in ODD, OTHER:
            t = draw_upsample(case, channels_last, device=device)
            expected = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, case, **options)
            actual = loss_and_gradient(compiled, t, case, **options)
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


def evaluate(logits, target):
    size = target.shape[1:]
    out = torch.zeros(*logits.shape[:2], *size, device=logits.device)
    apc_kernels.upsample_softmax(logits, size, flip=True, out=out)
    probabilities = apc_kernels.upsample_softmax(logits, size, out=out)
    return probabilities, apc_kernels.upsample_argmax(logits, size), apc_kernels.upsample_confusion(logits, target)


@places_without_cuda
def test_compile_of_evaluation(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(evaluate, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in ODD, OTHER:
            t = draw_upsample(case, channels_last, device=device)
            for a, b in zip(compiled(t["logits"], t["target"]), evaluate(t["logits"], t["target"]), strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype


class Training(torch.nn.Module):
    def forward(self, logits, target):
        given = {"label_smoothing": 0.1, "return_correct": True}
        loss, correct = apc_kernels.upsample_cross_entropy(logits, target, **given)
        losses = apc_kernels.upsample_cross_entropy(logits, target, reduction="none", denominator=None)
        return loss, correct, losses, apc_kernels.upsample_cross_entropy(logits, target, focal=2.0)


class Evaluation(torch.nn.Module):
    def forward(self, logits, target):
        return evaluate(logits, target)


@pytest.mark.parametrize("module", [Training, Evaluation])
def test_export_holds_stock_operators_only(module):
    """Exports with sizes of logits and result that are independent of each other."""
    sizes = {
        name: {i: torch.export.Dim(f"{name}{i}", min=2, max=512) for i in axes}
        for name, axes in (("logits", (2, 3)), ("target", (1, 2)))
    }
    given = draw_upsample(ODD)
    program = torch.export.export(module(), (given["logits"], given["target"]), dynamic_shapes=sizes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = [c for c in calls if getattr(c, "namespace", "aten") != "aten" or "apc_kernels" in str(c)]
    assert not foreign and len(calls) > 5, calls
    t = draw_upsample(UpsampleCase(2, 13, (16, 7), (40, 21)))
    with apc_kernels.backend("reference"):
        expected = module()(t["logits"], t["target"])
    for a, b in zip(program.module()(t["logits"], t["target"]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_meta_tensors():
    t = {name: tensor.to("meta") for name, tensor in draw_upsample(ODD, channels_last).items()}
    loss, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, weight=True)
    assert loss.shape == () and loss.dtype == torch.float32 and grad.stride() == t["logits"].stride()
    losses, _ = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, reduction="none")
    assert losses.shape == (2, *ODD.size)
    result = apc_kernels.upsample_softmax(t["logits"].bfloat16(), ODD.size)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    assert apc_kernels.upsample_argmax(t["logits"], ODD.size).dtype == torch.uint8
    assert apc_kernels.upsample_confusion(t["logits"], t["target"]).shape == (13, 13)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_autocast_leaves_the_dtype_alone(backend, dtype):
    """Autocast changes no bit of the results; a weight that it has rounded is widened."""
    t = draw_upsample(ODD, dtype=dtype)
    given = {"reduction": "none", "weight": True, "label_smoothing": 0.1}
    with apc_kernels.backend(backend):
        expected = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, **given)
        probabilities = apc_kernels.upsample_softmax(t["logits"], ODD.size)
        narrow = apc_kernels.upsample_cross_entropy(
            t["logits"], t["target"], weight=t["weight"].bfloat16().to(t["weight"])
        )
        with torch.autocast("cpu", torch.bfloat16):
            actual = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, **given)
            assert same_bits(apc_kernels.upsample_softmax(t["logits"], ODD.size), probabilities)
            widened = apc_kernels.upsample_cross_entropy(t["logits"], t["target"], weight=t["weight"].bfloat16())
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)) and same_bits(widened, narrow)


# The switch that has labels checked on a GPU too


def test_checked_labels():
    on_cpu, elsewhere = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, device="meta")
    assert labels.are_checked(on_cpu) and not labels.are_checked(elsewhere)
    with apc_kernels.checked_labels():
        with apc_kernels.checked_labels():
            assert labels.are_checked(elsewhere)
        assert labels.are_checked(elsewhere) and labels.are_checked(on_cpu)
    assert not labels.are_checked(elsewhere)
    with pytest.raises(KeyError), apc_kernels.checked_labels():
        raise KeyError
    assert not labels.are_checked(elsewhere)
    with apc_kernels.checked_labels(), pytest.raises(ValueError, match="target: expected labels of 0 to 2"):
        apc_kernels.upsample_cross_entropy(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3))


# Wrong input

LOGITS, TARGET = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)

WRONG_LOGITS = [
    (torch.zeros(3, 4, 5), ValueError, r"logits: expected 4 dimensions \(B, K, h, w\), got 3: \(3, 4, 5\)"),
    (torch.zeros(2, 3, 4, 5).int(), ValueError, "logits: expected float32, .* got int32"),
    (torch.zeros(2, 0, 4, 5), ValueError, r"logits: expected 1 to \d+ classes, got \(2, 0, 4, 5\)"),
    (torch.zeros(2, 3, 0, 5), ValueError, r"logits: expected a height and width of 1 to \d+, got"),
    (torch.zeros(2, 3, 4, 0), ValueError, r"logits: expected a height and width of 1 to \d+, got"),
    ([[1.0]], TypeError, "logits: expected a tensor, got list"),
]
WRONG_TARGETS = [
    (torch.zeros(2, 1, 8, 10).long(), ValueError, r"target: expected 3 dimensions \(B, H, W\), got 4: \(2, 1, 8, 10\)"),
    (torch.zeros(2, 8, 10), ValueError, "target: expected labels in uint8, int16, int32 or int64, got float32"),
    (torch.zeros(2, 8, 10).bool(), ValueError, "target: expected labels in uint8, .* got bool"),
    (torch.zeros(3, 8, 10).long(), ValueError, r"target: expected a batch of 2, as the logits', got \(3, 8, 10\)"),
    (torch.zeros(2, 0, 10).long(), ValueError, r"target: expected a height and width of 1 to \d+, got \(2, 0, 10\)"),
    (torch.zeros(2, 8, 0).long(), ValueError, r"target: expected a height and width of 1 to \d+"),
    (TARGET.to("meta"), ValueError, "target: expected a tensor on the logits' device, cpu, got meta"),
    (None, TypeError, "target: expected a tensor, got NoneType"),
]
WRONG_SIZES = [
    ((0, 4), ValueError, r"size: expected a height and width of 1 to \d+, got \(0, 4\)"),
    ((2**31, 2), ValueError, r"size: expected a height and width of 1 to 1073741823, got \(2147483648, 2\)"),
    ((4, -1), ValueError, r"size: expected a height and width of 1 to \d+, got \(4, -1\)"),
    (8, TypeError, r"size: expected two integers \(H, W\), got 8"),
    ((8,), TypeError, "size: expected two integers"),
    ((8, 8, 8), TypeError, "size: expected two integers"),
    ((8.0, 8), TypeError, "size: expected two integers"),
    (None, TypeError, "size: expected two integers"),
]


@pytest.mark.parametrize(("logits", "error", "message"), WRONG_LOGITS)
def test_wrong_logits(logits, error, message):
    calls = [
        lambda: apc_kernels.upsample_cross_entropy(logits, TARGET),
        lambda: apc_kernels.upsample_argmax(logits, (8, 10)),
        lambda: apc_kernels.upsample_confusion(logits, TARGET),
        lambda: apc_kernels.upsample_softmax(logits, (8, 10)),
    ]
    operators = torch.ops.apc_kernels
    if error is ValueError:
        calls += [
            lambda: operators.upsample_cross_entropy(logits, TARGET, None, 255, 0.0, 0.0, False, "mean", None, None),
            lambda: operators.upsample_argmax(logits, [8, 10], False),
            lambda: operators.upsample_confusion(logits, TARGET, 255, False),
            lambda: operators.upsample_softmax(logits, False, False, False, torch.zeros(2, 3, 8, 10)),
        ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(("target", "error", "message"), WRONG_TARGETS)
def test_wrong_targets(target, error, message):
    for function in apc_kernels.upsample_cross_entropy, apc_kernels.upsample_confusion:
        with pytest.raises(error, match=message):
            function(LOGITS, target)
    if error is ValueError and target.device == LOGITS.device:  # torch itself refuses two devices
        with pytest.raises(error, match=message):
            torch.ops.apc_kernels.upsample_cross_entropy(LOGITS, target, None, 255, 0.0, 0.0, False, "mean", None, None)
        with pytest.raises(error, match=message):
            torch.ops.apc_kernels.upsample_confusion(LOGITS, target, 255, False)


@pytest.mark.parametrize(("size", "error", "message"), WRONG_SIZES)
def test_wrong_sizes(size, error, message):
    for function in apc_kernels.upsample_argmax, apc_kernels.upsample_softmax:
        with pytest.raises(error, match=message):
            function(LOGITS, size)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected \(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight: expected \(3,\), got \(3, 1\)"),
        ({"weight": torch.ones(3).double()}, ValueError, "weight: expected float32 for a map in float32, got float64"),
        ({"weight": torch.ones(3).bfloat16()}, ValueError, "weight: expected float32 .* got bfloat16"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight: expected a tensor on .* cpu, got one on meta"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight: expected a tensor without gradient"),
        ({"ignore_index": 255.0}, TypeError, "ignore_index: expected an integer, got 255.0"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got None"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected 0 to 1, got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing: expected 0 to 1, got 1.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: expected 0 to 1, got nan"),
        ({"label_smoothing": "much"}, TypeError, "label_smoothing: expected a number, got 'much'"),
        ({"focal": -0.5}, ValueError, "focal: expected 0 to 1e\\+06, got -0.5"),
        ({"focal": float("nan")}, ValueError, "focal: expected 0 to 1e\\+06, got nan"),
        ({"focal": 2e6}, ValueError, "focal: expected 0 to 1e\\+06, got 2000000.0"),
        ({"focal": "much"}, TypeError, "focal: expected a number, got 'much'"),
        ({"focal": 2, "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 with focal=2, got 0.1"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of mean, mean_all, sum, none; got 'average'"),
        ({"reduction": None}, ValueError, "reduction: expected one of mean, mean_all, sum, none; got None"),
        ({"denominator": 5, "reduction": "sum"}, ValueError, "denominator: expected None for reduction='sum'"),
        ({"denominator": 5, "reduction": "none"}, ValueError, "denominator: expected None for reduction='none'"),
        ({"denominator": -1.0}, ValueError, "denominator: expected a number that is not negative, got -1.0"),
        ({"denominator": float("nan")}, ValueError, "denominator: expected a number .* got nan"),
        ({"denominator": float("inf")}, ValueError, "denominator: expected a number .* got inf"),
        ({"denominator": "all"}, TypeError, "denominator: expected a number or a tensor, got 'all'"),
        (
            {"denominator": torch.ones(2)},
            ValueError,
            r"denominator: expected one real element .* got \(2,\) in float32 on cpu",
        ),
        (
            {"denominator": torch.ones((), device="meta")},
            ValueError,
            r"denominator: expected .* got \(\) in float32 on meta",
        ),
        ({"denominator": torch.ones((), requires_grad=True)}, ValueError, "denominator: .* requires_grad=True"),
        ({"denominator": torch.ones((), dtype=torch.complex64)}, ValueError, "denominator: .* got .* in complex64"),
        ({"denominator": 10**400}, TypeError, "denominator: expected a number or a tensor, got 1000"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an integer of 64 bits, got 9223372036854775808"),
    ],
)
def test_wrong_options_of_the_loss(options, error, message):
    with pytest.raises(error, match=message):
        apc_kernels.upsample_cross_entropy(LOGITS, TARGET, **options)


def test_wrong_options_of_confusion():
    with pytest.raises(TypeError, match="ignore_index: expected an integer, got '255'"):
        apc_kernels.upsample_confusion(LOGITS, TARGET, ignore_index="255")


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(2, 3, 10, 8), ValueError, r"out: expected \(2, 3, 8, 10\) in float32 .* got \(2, 3, 10, 8\)"),
        (torch.zeros(2, 4, 8, 10), ValueError, r"out: expected \(2, 3, 8, 10\) in float32 .* got \(2, 4, 8, 10\)"),
        (torch.zeros(3, 8, 10), ValueError, r"out: expected \(2, 3, 8, 10\) in float32 .* got \(3, 8, 10\)"),
        (torch.zeros(2, 3, 8, 10).half(), ValueError, r"out: expected .* in float32 on cpu, got .* in float16"),
        (torch.zeros(2, 3, 8, 10).double(), ValueError, r"out: expected .* in float32 on cpu, got .* in float64"),
        (torch.zeros(2, 3, 8, 10, device="meta"), ValueError, r"out: expected .* on cpu, got .* on meta"),
        ([0.0], TypeError, "out: expected a tensor, got list"),
        (
            torch.zeros(1, 3, 8, 10).expand(2, -1, -1, -1),
            ValueError,
            r"out: expected elements that do not overlap .* strides \(0, ",
        ),
        (torch.zeros(600).as_strided((2, 3, 8, 10), (240, 80, 9, 1)), ValueError, "out: .* do not overlap"),
    ],
)
def test_wrong_buffers(out, error, message):
    with pytest.raises(error, match=message):
        apc_kernels.upsample_softmax(LOGITS, (8, 10), out=out)


def test_low_precision_logits_have_wide_buffers():
    with pytest.raises(ValueError, match=r"out: expected \(2, 3, 8, 10\) in float32 on cpu, got .* in bfloat16"):
        apc_kernels.upsample_softmax(LOGITS.bfloat16(), (8, 10), out=torch.zeros(2, 3, 8, 10).bfloat16())
    with pytest.raises(ValueError, match=r"out: expected .* in float64 on cpu, got .* in float32"):
        apc_kernels.upsample_softmax(LOGITS.double(), (8, 10), out=torch.zeros(2, 3, 8, 10))


def test_limits_of_the_gpu_kernels(monkeypatch):
    """`auto` passes over what cannot take a call; forcing it says why."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    logits = torch.zeros(1, 1, 1, 2**15)
    assert not apc_kernels.upsample_argmax(logits, (1, 2**14)).any()
    with (
        apc_kernels.backend("triton"),
        pytest.raises(RuntimeError, match=r"the kernels take axes .* less than 536870912"),
    ):
        apc_kernels.upsample_argmax(logits, (1, 2**14))


LOSS, REST = (LOGITS, TARGET), (255, 0.0, 0.0, False)
PIXELS, NONE, SUMS = torch.zeros(2, 8, 10), torch.zeros(0), torch.zeros(4).double()


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("upsample_argmax", (LOGITS, [8, 10], False, torch.zeros(2, 8, 9).byte()), "labels: expected size 10"),
        ("upsample_argmax", (LOGITS, [8, 10], False, torch.zeros(2, 10, 8).byte().mT), "labels: expected a contiguous"),
        ("upsample_argmax", (LOGITS.mT, [8, 10], False, torch.zeros(2, 8, 10).byte()), "logits: expected columns or"),
        (
            "upsample_argmax",
            (torch.zeros(1, 257, 2, 2), [2, 2], False, torch.zeros(1, 2, 2).byte()),
            "labels: too narrow for the classes",
        ),
        (
            "upsample_confusion",
            (LOGITS, TARGET, 255, False, torch.zeros(2, 3).long(), torch.zeros(1).long()),
            "counts: expected size 3",
        ),
        ("upsample_softmax", (LOGITS, False, False, False, torch.zeros(2, 3, 8, 10).half()), "out: expected float32"),
        ("upsample_softmax", (LOGITS, False, False, False, torch.zeros(2, 4, 8, 10)), "out: expected size 3"),
        ("upsample_cross_entropy", (*LOSS, None, *REST, True, PIXELS, PIXELS[..., 1:], SUMS), "losses: .* size 10"),
        ("upsample_cross_entropy", (*LOSS, torch.ones(2), *REST, False, PIXELS, NONE, SUMS), "weight: .* size 3"),
        ("upsample_cross_entropy", (*LOSS, None, *REST, False, PIXELS, NONE, SUMS[1:]), "sums: expected size 4"),
        (
            "upsample_cross_entropy_backward",
            (
                torch.zeros(2),
                LOGITS,
                TARGET,
                None,
                255,
                0.0,
                0.0,
                False,
                torch.zeros(2, 8, 10),
                torch.zeros(2, 3, 4, 5),
            ),
            "grad: expected size 1",
        ),
        (
            "upsample_cross_entropy_backward",
            (
                torch.zeros(1),
                LOGITS,
                TARGET,
                None,
                255,
                0.0,
                0.0,
                False,
                torch.zeros(2, 8, 10),
                torch.zeros(2, 3, 5, 4),
            ),
            "grad_logits: expected size 4",
        ),
    ],
)
def test_raw_operators_never_leave_their_memory(operator, arguments, message):
    with apc_kernels.backend("cpp"):
        apc_kernels.upsample_argmax(torch.zeros(1, 1, 1, 1), (1, 1))  # loads the library
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.apc_kernels_cpp, operator)(*arguments)
