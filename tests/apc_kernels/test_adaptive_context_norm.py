"""Tests adaptive_context_norm: the module as PyTorch writes it, the composition that specifies it, and its one node."""

import os

import calls
import pytest
import ranks
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import CONTEXTS, ContextCase, channels_last, draw_norm, nchw, sliced
from places import CPU, dtypes, places

import apc_kernels
from apc_kernels import BatchNorm
from apc_kernels.ops.affinities import algebra, composition

ODD = ContextCase(3, 13, (9, 23), (1, 2, 6))
CASES = [case for case in CONTEXTS if case.batch > 1]
TENSORS = ("x", "regions", "weight", "bias", "projection", "guide")
NORMS = ("norm", "guide_norm")
PARAMETERS = TENSORS + tuple(f"{norm}.{field}" for norm in NORMS for field in ("weight", "bias"))


def ours(t, scales, training=True, group="", guided=True):
    norms = {name: BatchNorm(*(t[f"{name}.{field}"] for field in BatchNorm._fields[:4])) for name in NORMS}
    guide = {"guide": t["guide"], "guide_norm": norms["guide_norm"]} if guided else {}
    given = (t["x"], t["regions"], t["weight"], t["bias"], scales, t["projection"], norms["norm"])
    return apc_kernels.adaptive_context_norm(*given, **guide, training=training, group=group)


def specification(t, scales, training=True, guided=True):
    norms = [BatchNorm(*(t[f"{name}.{field}"] for field in BatchNorm._fields[:4])) for name in NORMS]
    given = (t["x"], t["regions"], t["weight"], t["bias"], scales, t["projection"], norms[0])
    of_guide = (t["guide"], norms[1]) if guided else (None, None)
    return composition.adaptive_context_norm(*given, *of_guide, training, "")[0]


def modules(t, scales, training=True, guided=True, function=stock.adaptive_context_norm):
    norms = [(*(t[f"{name}.{field}"] for field in BatchNorm._fields[:4]), 0.1, 1e-5) for name in NORMS]
    given = (t["x"].chunk(len(scales), 1), t["regions"], t["weight"], t["bias"], scales, t["projection"], norms[0])
    of_guide = (t["guide"], norms[1]) if guided else ()
    options = {} if training else {"training": False}
    return torch.cat(function(*given, *of_guide, **options), 1)


def run(function, t, scales, **options):
    """Returns z, the gradients of all parameters, and the running statistics afterwards."""
    t = {name: tensor.detach().clone(memory_format=torch.preserve_format) for name, tensor in t.items()}
    names = [name for name in PARAMETERS if options.get("guided", True) or not name.startswith("guide")]
    leaves = [t[name].requires_grad_() for name in names]
    z = function(t, scales, **options)
    grads = torch.autograd.grad(z, leaves, t["grad"])
    running = {name: tensor for name, tensor in t.items() if "running" in name}
    return {"z": z.detach(), **dict(zip(names, grads, strict=True)), **running}


def without_kink(t, scales, training=True):
    """Removes the gradient where a ReLU's input is so near to 0 that rounding decides."""
    wide = {name: tensor.double() for name, tensor in t.items()}
    raised = wide | {"norm.bias": wide["norm.bias"] + 1e-3}
    lowered = wide | {"norm.bias": wide["norm.bias"] - 1e-3}
    moved = (modules(raised, scales, training) - wide["x"] > 0) != (modules(lowered, scales, training) - wide["x"] > 0)
    return t | {"grad": t["grad"].masked_fill(moved, 0)}


# Against PyTorch's modules


@places
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_cases(case, training, device, backend):
    """Results are exact in float64 if the backend has it; otherwise the accuracy rule holds."""
    wide = draw_norm(case, dtype=torch.float64, device=device)
    exact = run(modules, wide, case.scales, training=training)
    if backend in ("reference", "cpp"):
        with apc_kernels.backend(backend):
            actual = run(ours, wide, case.scales, training=training)
        for name, expected in exact.items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    t = without_kink(draw_norm(case, device=device), case.scales, training)
    exact = run(modules, {name: tensor.double() for name, tensor in t.items()}, case.scales, training=training)
    own = run(modules, t, case.scales, training=training)
    with apc_kernels.backend(backend):
        actual = run(ours, t, case.scales, training=training)
    for name in ("z", "x", "norm.running_mean", "norm.running_var"):
        assert_accurate(actual[name], exact[name], own[name], f"{case} {name}")


@places
@dtypes
@pytest.mark.parametrize("layout", [nchw, channels_last, sliced], ids=lambda layout: layout.__name__)
def test_layouts_and_dtypes(device, backend, layout, dtype):
    """Beside the float64 module on the same numbers; low precision is held to its own last places."""
    t = draw_norm(ODD, layout, dtype, device)
    wide = {name: tensor.double() for name, tensor in t.items()}
    exact = run(modules, wide, ODD.scales)
    with apc_kernels.backend(backend):
        actual = run(ours, t, ODD.scales)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert actual["z"].dtype == actual["x"].dtype == dtype
    assert actual["z"].stride() == actual["x"].stride() == torch.empty_like(t["x"]).stride()
    for name in ("z", "norm.running_mean", "norm.running_var", "guide_norm.running_var"):
        error = (actual[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


# Against its specification: the composition under autograd


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("guided", [True, False])
def test_the_node_is_the_composition(backend, guided):
    t = draw_norm(ODD, dtype=torch.float64)
    with apc_kernels.backend(backend):
        actual, expected = (run(function, t, ODD.scales, guided=guided) for function in (ours, specification))
    for name in (name for name in expected if "running" not in name):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


@places
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation_without_gradients_is_the_composition(case, guided, device, backend):
    """Nothing of the graph is made then, and the small products are kernels."""
    for dtype in (torch.float32, torch.float64)[: 1 if backend in ("triton", "cuda") else 2]:
        t = draw_norm(case, dtype=dtype, device=device)
        with apc_kernels.backend(backend):
            actual = ours(t, case.scales, training=False, guided=guided)
            expected = specification(t, case.scales, training=False, guided=guided)
        torch.testing.assert_close(actual, expected, rtol=2e-6 if dtype == torch.float32 else 1e-11, atol=1e-6)


def test_evaluation_in_forward_mode_is_not_silent():
    """Kernels know nothing of tangents: the composition serves, whose operator refuses them."""
    t = draw_norm(ODD)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t["x"], torch.ones_like(t["x"]))
        with pytest.raises(NotImplementedError, match="adaptive_context has no forward-mode derivative"):
            ours(t | {"x": dual}, ODD.scales, training=False)


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend):
    case = ContextCase(2, 2, (3, 4), (2, 1))
    t = draw_norm(case, dtype=torch.float64)
    frozen = {name: tensor for name, tensor in t.items() if name not in PARAMETERS}

    def function(*leaves):
        fresh = {name: tensor.clone() for name, tensor in frozen.items()}
        return ours(dict(zip(PARAMETERS, leaves, strict=True)) | fresh, case.scales)

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in PARAMETERS])


def test_identities_in_plain_pytorch_are_the_module():
    """The baseline that benchmarks quote computes the same thing."""
    t = draw_norm(ODD, dtype=torch.float64)
    actual = run(lambda *given: modules(*given, function=stock.adaptive_context_norm_by_identities), t, ODD.scales)
    expected = run(modules, t, ODD.scales)
    for name in ("z", *PARAMETERS):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", CPU)
def test_more_regions_than_channels(backend):
    """Products are formed and their statistics taken; batches and gradients are the module's all the same."""
    case = ContextCase(2, 5, (6, 7), (9, 1))
    t = draw_norm(case, dtype=torch.float64)
    with apc_kernels.backend(backend):
        actual, expected = run(ours, t, case.scales), run(modules, t, case.scales)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-9)


# The variance that batch norm sees


def hard_affinities():
    """x, weight, bias, regions of one scale: where the variance is hard to keep."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 24, 24, generator=generator).relu()
    weight = torch.randn(36, 64, generator=generator) / 4
    bias, regions = torch.randn(36, generator=generator), torch.randn(2, 36, 64, generator=generator)
    balanced = regions - regions.mean(1, keepdim=True)
    correlated = (weight[:1] + 1e-3 * weight).contiguous()
    return {
        "plain": (x, weight, bias, regions),
        "saturated": (x, weight, 30 * bias.sign(), regions),
        "saturated by the map": (x, 40 * weight, bias, regions),
        "near-constant": (x, 1e-4 * weight, bias, regions),
        "correlated": (x, correlated, 0 * bias, regions),
        "correlated, mixed signs": (x, correlated, 0 * bias, balanced),
    }


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("name", hard_affinities())
def test_variance_is_as_accurate_as_the_unfused_path(backend, name):
    x, weight, bias, regions = hard_affinities()[name]
    projection = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    count = x.shape[0] * x.shape[2] * x.shape[3]

    def unfused(dtype):
        affinity = stock.affinities(x.to(dtype), weight.to(dtype), bias.to(dtype), (6,))[0]
        return (affinity @ regions.to(dtype) @ projection.to(dtype).mT).flatten(0, 1)

    exact = unfused(torch.float64).var(0, correction=0)
    seen = torch.zeros(64)
    torch.nn.functional.batch_norm(unfused(torch.float32), torch.zeros(64), seen, training=True, momentum=1.0)
    own = seen.double() * (count - 1) / count
    norm = BatchNorm(torch.ones(64), torch.zeros(64), torch.zeros(64), torch.zeros(64), momentum=1.0)
    with apc_kernels.backend(backend):
        apc_kernels.adaptive_context_norm(x, regions, weight, bias, (6,), projection, norm)
    actual = norm.running_var.double() * (count - 1) / count
    error, allowed = (((variance - exact).abs() / exact).max().item() for variance in (actual, own))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps, f"{error:.1e}, the unfused path {allowed:.1e}"


# Calls, memory, bits, processes


def test_a_training_step_takes_few_calls():
    """Counts 26 calls on a CPU: five work on maps, nine are phases, ten move running statistics, two add up."""
    t = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in draw_norm(ODD).items()}
    leaves = [t[name] for name in PARAMETERS]
    with apc_kernels.backend("cpp"):
        counted = calls.count(lambda: torch.autograd.grad(ours(t, ODD.scales), leaves, t["grad"]))
    assert counted["guide_gradients"] == counted["adaptive_context_backward_x"] == 1, counted
    assert counted.total() <= 26, counted


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU")
def test_a_training_step_takes_few_launches():
    """Counts 45 calls around Triton kernels, 18 launches of these among them, and computes the module's gradients."""
    pytest.importorskip("triton", reason="needs triton")
    case = ContextCase(2, 3, (3, 5), (2, 1))
    t = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in draw_norm(case).items()}
    leaves, results = [t[name] for name in PARAMETERS], []
    with apc_kernels.backend("triton"):
        counted = calls.count(lambda: results.extend(torch.autograd.grad(ours(t, case.scales), leaves, t["grad"])))
    assert counted["constant_kernel"] == counted["map_kernel"] == 1, counted
    assert sum(n for name, n in counted.items() if name.endswith("_kernel")) == 18, counted
    assert counted.total() <= 45, counted
    with apc_kernels.backend("reference"):
        expected = torch.autograd.grad(ours(t, case.scales), leaves, t["grad"])
    for name, actual, wanted in zip(PARAMETERS, results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, msg=lambda m, n=name: f"{n}: {m}")


def saved_bytes(function) -> int:
    saved = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        keep = function()
    assert keep.requires_grad
    return sum(saved.values())


def test_one_map_is_saved():
    """Backward keeps x and small tensors of float32 maps (2, 4·512, 64, 128); the modules save five maps."""
    case = ContextCase(2, 512, (64, 128))
    t = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in draw_norm(case).items()}
    parameters = sum(t[name].nbytes for name in PARAMETERS if name != "x")
    maps = (saved_bytes(lambda: ours(t, case.scales)) - parameters) / t["x"].nbytes
    assert 1 <= maps < 1.1, f"{maps:.3f} maps"
    modules_maps = (saved_bytes(lambda: modules(t, case.scales)) - parameters) / t["x"].nbytes
    assert modules_maps > 5, f"{modules_maps:.3f} maps: README says five"


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_same_bits_with_any_number_of_threads(threads, layout):
    case, results = ContextCase(2, 9, (41, 27), (1, 3)), []
    for count in (1, 2, 3, 5):
        threads(count)
        with apc_kernels.backend("cpp"):
            results.append(run(ours, draw_norm(case, layout), case.scales))
    for name in ("z", "x", "norm.running_var", "guide_norm.running_var"):
        assert all(same_bits(other[name], results[0][name]) for other in results), name


@places
def test_same_bits_every_time(device, backend):
    t = draw_norm(ODD, channels_last, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        with apc_kernels.backend(backend):
            first, *others = [run(ours, t, ODD.scales) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(other[name], first[name]) for other in others for name in first)


def test_two_processes_are_one_batch(tmp_path):
    """Statistics over a process group, forward and backward: gradients add up to those of the whole batch."""
    case = ContextCase(4, 6, (5, 7), (2, 3))
    t = draw_norm(case, dtype=torch.float64)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (os.fspath(tmp_path / "store"), t, PARAMETERS, case.scales, results)
        torch.multiprocessing.spawn(ranks.norm_rank, arguments, nprocs=2)
        both = [results[0], results[1]]
    expected = run(ours, t, case.scales)
    for name, tensor in expected.items():
        if name in ("z", "x", "regions"):
            actual = torch.stack([rank[name] for rank in both], 1).flatten(0, 1)
        else:
            actual = both[0][name] if "running" in name else both[0][name] + both[1][name]
        torch.testing.assert_close(actual, tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


# As an operator


@places
@pytest.mark.parametrize("guided", [True, False])
def test_opcheck(device, backend, guided):
    dtype = torch.float64 if device == "cpu" else torch.float32
    t = draw_norm(ODD, dtype=dtype, device=device)
    t = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in t.items()}
    of_guide = (t["guide"], t["guide_norm.weight"], t["guide_norm.bias"]) if guided else (None, None, None)
    arguments = (t["x"], t["regions"], t["weight"], t["bias"], list(ODD.scales), t["projection"])
    arguments += (t["norm.weight"], t["norm.bias"], 1e-5, *of_guide, 1e-5, "")
    with apc_kernels.backend(backend):
        torch.library.opcheck(torch.ops.apc_kernels.adaptive_context_norm.default, arguments)


@places
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(device, backend, training):
    def function(t, scales):
        return ours(t, scales, training)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    t = draw_norm(ODD, channels_last, device=device)
    with apc_kernels.backend(backend):
        expected, actual = run(function, t, ODD.scales), run(compiled, t, ODD.scales)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor)


def test_export_holds_stock_operators_only():
    t = draw_norm(ODD)

    class Module(torch.nn.Module):
        def forward(self, x, regions):
            return ours(t | {"x": x, "regions": regions}, ODD.scales, training=False)

    b, h, w = (torch.export.Dim(name, min=2, max=512) for name in "bhw")
    sizes = {"x": {0: b, 2: h, 3: w}, "regions": {0: b}}
    program = torch.export.export(Module(), (t["x"], t["regions"]), dynamic_shapes=sizes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls
    other = torch.rand(41, 39, 7, 12), torch.rand(41, 41, 13)  # as many images as regions
    torch.testing.assert_close(program.module()(*other), Module()(*other))


def test_training_exports_with_any_size_of_map():
    t = draw_norm(ODD)

    class Module(torch.nn.Module):
        def forward(self, x, regions):
            return ours(t | {"x": x, "regions": regions}, ODD.scales)

    sizes = {"x": {2: torch.export.Dim("h", max=512), 3: torch.export.Dim("w", max=512)}, "regions": None}
    program = torch.export.export(Module(), (t["x"], t["regions"]), dynamic_shapes=sizes)
    other = torch.rand(3, 39, 7, 12), t["regions"]
    torch.testing.assert_close(program.module()(*other), Module()(*other))


@pytest.mark.parametrize("backend", CPU)
def test_backward_inside_autocast_rounds_nothing(backend):
    t = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in draw_norm(ODD).items()}
    with apc_kernels.backend(backend):
        z = ours(t, ODD.scales)
        leaves = [t[name] for name in PARAMETERS]
        expected = torch.autograd.grad(z, leaves, t["grad"], retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = torch.autograd.grad(z, leaves, t["grad"])
    for name, a, b in zip(PARAMETERS, actual, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_widens_what_comes_out_of_convolutions():
    t = draw_norm(ODD, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z = ours(t | {"regions": t["regions"].bfloat16()}, ODD.scales)
    expected = ours(t | {"regions": t["regions"].bfloat16().float()}, ODD.scales)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projection": torch.zeros(13, 13)}, r"projection: expected \(39, 13\), got \(13, 13\)"),
        ({"guide": torch.zeros(39, 12)}, r"guide: expected \(39, 13\), got \(39, 12\)"),
        ({"norm.bias": torch.zeros(13)}, r"norm.bias: expected \(39,\), got \(13,\)"),
        ({"guide_norm.running_var": torch.ones(39).double()}, "guide_norm.running_var: expected float32"),
        ({"bias": torch.zeros(3, 41)}, r"bias: expected \(41,\), got \(3, 41\)"),
        ({"regions": torch.zeros(3, 40, 13)}, r"regions: expected \(3, 41, 13\), got \(3, 40, 13\)"),
    ],
)
def test_wrong_input(changed, message):
    with pytest.raises(ValueError, match=message):
        ours(draw_norm(ODD) | changed, ODD.scales)


def test_a_batch_of_one_value_has_no_statistics():
    t = draw_norm(ContextCase(1, 13, (9, 23), ODD.scales))
    with pytest.raises(
        ValueError, match=r"guide_norm: expected more than one value per channel in training, got a map"
    ):
        ours(t, ODD.scales)
    assert ours(t, ODD.scales, guided=False).shape == ours(t, ODD.scales, training=False).shape == t["x"].shape
    t = draw_norm(ContextCase(1, 13, (1, 1), ODD.scales))
    with pytest.raises(ValueError, match="norm: expected more than one value per channel"):
        ours(t, ODD.scales, guided=False)
    given = (t["x"], t["regions"], t["weight"], t["bias"], ODD.scales, t["projection"])
    with pytest.raises(TypeError, match=r"norm: expected an apc_kernels.BatchNorm, got Tensor"):
        apc_kernels.adaptive_context_norm(*given, t["norm.weight"])
    norm = BatchNorm(*(t[f"norm.{field}"] for field in BatchNorm._fields[:4]))
    with pytest.raises(TypeError, match=r"norm.momentum: expected a number, got None"):
        apc_kernels.adaptive_context_norm(*given, norm._replace(momentum=None), training=False)
    with pytest.raises(TypeError, match=r"group: expected the name of a process group \(its group_name\), got object"):
        apc_kernels.adaptive_context_norm(*given, norm, group=object())
    with pytest.raises(ValueError, match="guide: expected guide and guide_norm, or neither"):
        apc_kernels.adaptive_context_norm(*given, norm, guide=t["guide"])


def test_statistics_of_images_and_positions():
    """Tests the algebra alone: moments of groups merge into those of all."""
    values = torch.randn(5, 3, dtype=torch.float64)
    mean, variance, count = algebra.image_statistics(values, "")
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0, correction=0))
    assert count == 5
