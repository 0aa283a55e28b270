"""Tests accelerate() on heads: mmsegmentation's head against an accelerated copy."""

import copy
import os
import pickle

import mmseg_peer as peer
import pytest
import torch
from accuracy import assert_accurate, same_bits
from torch import nn

from apc_kernels.interop.mmseg import accelerate

needs_mmseg = pytest.mark.skipif(not peer.AVAILABLE, reason="needs mmsegmentation")
pytestmark = [
    pytest.mark.filterwarnings(
        *(
            f"ignore:.*{what}"
            for what in ("avg_non_ignore", "align_corners", "binary segmentation", "deprecated", "mmcv.ops")
        )
    ),
    pytest.mark.usefixtures("one_thread"),
]

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
SYNC = {"norm_cfg": {"type": "SyncBN"}}
VARIANTS = {
    "apc": ("apc", {}),
    "apc without fusion, scales 5 and 1": ("apc", {"pool_scales": (5, 1), "fusion": False}),
    "psp": ("psp", {}),
    "psp with aligned corners": ("psp", {"align_corners": True}),
    "enc": ("enc", {}),
    "enc lateral": ("enc", {"in_channels": [16, 16], "in_index": [0, 1], "add_lateral": True}),
    "fcn": ("fcn", {}),
    "fcn auxiliary": ("fcn", {"num_convs": 1, "concat_input": False}),
    "fpn": ("fpn", {}),
    "uper": ("uper", {}),
    "uper with aligned corners and other scales": ("uper", {"align_corners": True, "pool_scales": (4, 1)}),
    "loss over valid pixels": ("fcn", {"loss_decode": peer.LOSS | {"avg_non_ignore": True, "loss_weight": 0.4}}),
    "a loss in a list, by another name": ("fcn", {"loss_decode": [peer.LOSS | {"loss_name": "loss_seg"}]}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def results(head, maps, target, training):
    """Returns outputs, losses, all gradients, and buffers."""
    head.train(training).zero_grad()
    dtype = next(head.parameters()).dtype
    maps = [x.to(dtype).requires_grad_() for x in maps]
    output = head.forward(maps)
    losses = head.loss_by_feat(output, peer.samples(target))
    sum(loss for name, loss in losses.items() if "loss" in name).backward()
    outputs = output if isinstance(output, tuple) else (output,)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {name: loss.detach() for name, loss in losses.items()}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(maps) if x.grad is not None}
    found |= {f"gradient of {name}": p.grad for name, p in head.named_parameters()}
    return found | {f"buffer {name}": b.clone() for name, b in head.named_buffers()}


def assert_same_results(theirs, ours, maps, target, training):
    """Applies the accuracy rule: float64 is the truth, mmsegmentation in float32 sets the bound."""
    exact = results(copy.deepcopy(theirs).double(), maps, target, training)
    pytorch, actual = (results(head, maps, target, training) for head in (theirs, ours))
    assert list(actual) == list(exact)
    for name, value in exact.items():
        if value.is_floating_point():
            spread = 3 * (pytorch[name] - value).abs().max()  # of sums that cancel: two roundings are only so alike
            allowed = 2e-5 * value.abs().max() + spread
            assert actual[name].dtype == pytorch[name].dtype and actual[name].shape == value.shape, name
            assert (actual[name] - value).abs().max() <= allowed, f"{name}: {(actual[name] - value).abs().max():.3g}"
        else:
            assert torch.equal(actual[name], pytorch[name]), name


def pair(variant, **changes):
    """Builds a head of mmsegmentation, its accelerated copy, and the report."""
    name, options = VARIANTS[variant]
    theirs = peer.build(peer.head_config(name, **(options | changes)))
    ours = copy.deepcopy(theirs)
    return theirs, ours, accelerate(ours)


def revert(head):
    """Replaces SyncBN as a Runner of one process does."""
    from mmengine.model import revert_sync_batchnorm

    return revert_sync_batchnorm(head)


def pickled(head):
    return pickle.loads(pickle.dumps(head))


@needs_mmseg
@MODES
@variants
def test_same_outputs_losses_gradients_and_buffers(variant, training):
    theirs, ours, report = pair(variant)
    assert report.swapped and not report.left
    assert_same_results(theirs, ours, peer.inputs(theirs), peer.labels(), training)


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn"])
def test_channels_last(variant):
    theirs, ours, _ = pair(variant)
    maps = [x.to(memory_format=torch.channels_last) for x in peer.inputs(theirs)]
    assert_same_results(theirs.to(memory_format=torch.channels_last), ours, maps, peer.labels(), True)


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "enc"])
def test_sync_batch_norm_evaluates_on_a_cpu(variant):
    theirs, ours, report = pair(variant, **SYNC)
    assert report.swapped and not report.left
    assert_same_results(theirs, ours, peer.inputs(theirs), peer.labels(), False)


@needs_mmseg
def test_sync_batch_norm_as_mmengine_replaces_it():
    """Tests SyncBN that a Runner of one process replaces by mmengine's norm, before or after accelerate()."""
    theirs, ours, _ = pair("apc", **SYNC)
    theirs, ours = revert(theirs), revert(ours)
    assert not accelerate(ours).left
    assert_same_results(theirs, ours, peer.inputs(theirs), peer.labels(), True)


@needs_mmseg
def test_sync_batch_norm_of_two_processes_is_one_batch(tmp_path):
    """Tests statistics over two processes inside the fused context modules; SyncBN itself refuses a CPU."""
    theirs, ours, _ = pair("apc", **SYNC)
    theirs = revert(theirs)
    for head in (theirs, ours):
        head.double().eval()
        for acm in head.acm_modules:
            acm.global_info.norm.train(), acm.residual_conv.norm.train()
    x = torch.randn(4, 16, 9, 12, dtype=torch.float64, requires_grad=True)
    output = theirs.forward([x])
    output.square().sum().backward()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (os.fspath(tmp_path / "store"), pickle.dumps(ours), x.detach(), results)
        torch.multiprocessing.spawn(peer.head_rank, arguments, nprocs=2)
        both = [results[0], results[1]]
    expected = {"output": output.detach(), "input": x.grad} | dict(theirs.named_buffers())
    expected |= {f"gradient of {name}": p.grad for name, p in theirs.named_parameters()}
    assert set(both[0]) == set(expected)
    for name, tensor in expected.items():
        actual = both[0][name]
        if name in ("output", "input"):
            actual = torch.stack([rank[name] for rank in both], 1).flatten(0, 1)
        elif name.startswith("gradient"):
            actual = actual + both[1][name]
        torch.testing.assert_close(actual, tensor, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@needs_mmseg
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_nothing_but_ignored_pixels(avg_non_ignore):
    theirs, ours, _ = pair("fcn", loss_decode=peer.LOSS | {"avg_non_ignore": avg_non_ignore})
    assert_same_results(theirs, ours, peer.inputs(theirs), torch.full((2, 30, 30), 255), True)


@needs_mmseg
def test_running_statistics_without_momentum_and_step_after_step():
    theirs, ours, _ = pair("apc")
    for head in (theirs, ours):
        for acm in head.acm_modules:
            acm.residual_conv.norm.momentum = None
            acm.residual_conv.norm.reset_running_stats()
    for batch in (2, 3, 4):
        assert_same_results(theirs, ours, peer.inputs(theirs, batch), peer.labels(batch), True)


@needs_mmseg
@pytest.mark.parametrize(
    ("variant", "share"), [("apc", 0.6), ("psp", 0.8), ("enc", 0.35), ("fcn", 1), ("fpn", 1), ("uper", 0.9)]
)
def test_less_is_kept_for_backward(variant, share):
    """Tests memory with the channel ratio of real heads: the input has four times the inner channels."""
    name, _ = VARIANTS[variant]
    shape = {"channels": 256, "width": 64, "classes": 19} | ({"num_codes": 32} if name == "enc" else {})
    if name in ("fpn", "uper"):
        shape |= {"channels": 64, "width": 32}
    theirs = peer.build(peer.head_config(name, **shape))
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    maps = [torch.randn(2, shape["channels"], *x.shape[2:]) for x in peer.inputs(theirs, size=(40, 40))]
    target = peer.labels(size=(320, 320), classes=19)
    assert peer.saved_bytes(ours, maps, target) < share * peer.saved_bytes(theirs, maps, target)


@needs_mmseg
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn", "fpn", "uper"])
def test_a_copy_has_weights_of_its_own(variant, copied):
    """Tests a deepcopy as an exponential moving average makes it: each copy uses its own weights."""
    theirs, ours, _ = pair(variant)
    name, options = VARIANTS[variant]
    before = copy.deepcopy(ours.state_dict())
    others = peer.build(peer.head_config(name, **options), seed=7)
    twin = copied(ours)
    assert type(twin) is type(ours)
    twin.load_state_dict(others.state_dict())
    assert_same_results(others, twin, peer.inputs(theirs), peer.labels(), True)
    assert all(same_bits(before[key], value) for key, value in ours.state_dict().items())


@needs_mmseg
@variants
def test_parameters_and_names_are_untouched(variant):
    name, options = VARIANTS[variant]
    head = peer.build(peer.head_config(name, **options))
    attributes, parameters, state = set(vars(head)), dict(head.named_parameters()), head.state_dict()
    accelerate(head)
    assert set(vars(head)) == attributes
    assert all(parameter is parameters[key] for key, parameter in head.named_parameters())
    assert list(head.state_dict()) == list(state)


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn", "fpn", "uper"])
def test_accelerating_twice_changes_nothing(variant):
    _, ours, report = pair(variant)
    twice = copy.deepcopy(ours)
    assert accelerate(twice) == report
    assert [type(module) for module in twice.modules()] == [type(module) for module in ours.modules()]


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn", "fpn", "uper"])
def test_autocast(variant):
    """Tests that bfloat16 results are as close to float64 as mmsegmentation's under the same autocast."""
    theirs, ours, _ = pair(variant)
    maps, target = peer.inputs(theirs), peer.labels()
    exact = results(copy.deepcopy(theirs).double(), maps, target, True)
    with torch.autocast("cpu", torch.bfloat16):
        pytorch, actual = (results(head, maps, target, True) for head in (theirs, ours))
    for name in exact:
        if not name.startswith("buffer"):
            assert actual[name].dtype == pytorch[name].dtype, name

    def error(found):
        """Returns the largest relative error over all results."""
        names = [name for name in exact if exact[name].is_floating_point() and name != "acc_seg"]
        return sum(float((found[n].double() - exact[n]).norm() / (exact[n].norm() + 1e-6)) for n in names) / len(names)

    assert error(actual) <= 1.1 * error(pytorch)


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn", "fpn", "uper"])
def test_a_model_in_low_precision(variant):
    theirs, ours, _ = pair(variant)
    maps = [x.bfloat16() for x in peer.inputs(theirs)]
    exact = theirs.double().eval().forward([x.double() for x in maps])
    pytorch, actual = (head.bfloat16().eval().forward(maps) for head in (theirs, ours))
    for outputs in zip(*(o if isinstance(o, tuple) else (o,) for o in (actual, exact, pytorch)), strict=True):
        assert_accurate(*(o.detach() for o in outputs), variant)
    if variant == "apc":
        assert ours.train().forward(maps)[0].isfinite().all()  # running statistics in bfloat16: mmsegmentation's way


@needs_mmseg
@MODES
@pytest.mark.parametrize("variant", ["apc", "psp", "enc", "fcn", "fpn", "uper"])
def test_compiled_as_one_graph(variant, training):
    _, ours, _ = pair(variant)
    twin, maps = copy.deepcopy(ours.train(training)), peer.inputs(ours)
    with torch.set_grad_enabled(training):
        compiled = torch.compile(twin.forward, fullgraph=True, backend="aot_eager")(maps)
        outputs = ours.forward(maps)
    for given, expected in zip(*(o if isinstance(o, tuple) else (o,) for o in (compiled, outputs)), strict=True):
        torch.testing.assert_close(given, expected)


# What is left alone.


def changed(head, change):
    """Returns the head after a change that prevents its acceleration."""
    torch.manual_seed(0)  # spectral norm draws vectors
    if change == "hook":
        head.acm_modules[1].global_info.register_forward_hook(lambda module, args, result: result * 2)
    elif change == "hook on a norm":
        head.acm_modules[0].residual_conv.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif change == "spectral norm":
        head.bottleneck.conv = nn.utils.spectral_norm(head.bottleneck.conv)
    elif change == "parametrization":
        nn.utils.parametrizations.weight_norm(head.bottleneck.conv)
    elif change == "method on the instance":
        head.acm_modules[0].forward = lambda x: torch.zeros(len(x), head.channels, *x.shape[2:])
    elif change == "forward on the instance":
        head.forward = lambda maps: head.cls_seg(maps[0][:, : head.channels])
    elif change == "activation":
        head.acm_modules[0].residual_conv.activate = nn.LeakyReLU()
    elif change == "frozen norm":
        train = head.train
        head.train = lambda mode=True: (train(mode), head.acm_modules[0].global_info.norm.eval())[0]
        head.train()
    return head


FORWARDS = {
    "hook": "has hooks",
    "hook on a norm": "has hooks",
    "spectral norm": "has hooks",
    "parametrization": "not a plain Conv2d",
    "method on the instance": "overridden",
    "forward on the instance": "overridden",
    "activation": "ReLU",
    "frozen norm": "its two inner norms differ in training mode",
}


@needs_mmseg
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", FORWARDS)
def test_what_is_altered_before_or_after_takes_effect(change, after):
    head = peer.build(peer.head_config("apc"))
    theirs, ours = changed(copy.deepcopy(head), change), copy.deepcopy(head)
    if after:
        accelerate(ours)
    changed(ours, change)
    report = accelerate(ours) if not after else accelerate(copy.deepcopy(ours))
    assert FORWARDS[change] in report.left["forward"]
    assert "loss_by_feat" in report.swapped
    maps = peer.inputs(theirs)
    theirs.train(), ours.train()
    with torch.no_grad():
        assert same_bits(ours.forward(maps), theirs.forward(maps))


LOSSES = {
    "class weights": ({"loss_decode": peer.LOSS | {"class_weight": [1.0, 2.0, 3.0, 4.0, 5.0]}}, "class weights"),
    "sigmoid": ({"loss_decode": peer.LOSS | {"use_sigmoid": True}}, "softmax"),
    "another loss": ({"loss_decode": {"type": "DiceLoss"}}, "DiceLoss"),
    "two losses": ({"loss_decode": [peer.LOSS, peer.LOSS | {"loss_name": "loss_again"}]}, "2 losses"),
    "sampler": ({"sampler": {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 50}}, "sampler"),
    "sum": ({"loss_decode": peer.LOSS | {"reduction": "sum"}}, "reduction is sum"),
}


@needs_mmseg
@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_are_left_alone(case):
    options, reason = LOSSES[case]
    theirs = peer.build(peer.head_config("psp", **options))
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert reason in report.left["loss_by_feat"] and "_forward_feature" in report.swapped
    logits, target = torch.randn(2, 5, 9, 12), peer.labels().clamp_max(4)
    given, expected = (head.loss_by_feat(logits, peer.samples(target)) for head in (ours, theirs))
    assert list(given) == list(expected)
    assert all(same_bits(given[name], expected[name]) for name in given)


@needs_mmseg
@pytest.mark.parametrize("variant", ["apc", "psp", "fcn"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_cfg": {"type": "GN", "num_groups": 2}}, "GroupNorm"),
        ({"norm_cfg": None}, "no batch norm"),
        ({"act_cfg": {"type": "GELU"}}, "ReLU"),
        ({"norm_cfg": {"type": "BN", "track_running_stats": False}}, "running statistics"),
    ],
    ids=["group norm", "no norm", "gelu", "no running statistics"],
)
def test_other_layers_are_left_alone(variant, options, reason):
    theirs, ours, report = pair(variant, **options)
    (left,) = report.left.values()
    assert reason in left
    maps = peer.inputs(theirs)
    assert same_bits(ours.eval().forward(maps), theirs.eval().forward(maps))


@needs_mmseg
def test_heads_of_other_types_are_left_alone():
    peer.imported()
    from mmseg.models.decode_heads import APCHead

    class OwnHead(APCHead):
        pass

    head = OwnHead(**{key: value for key, value in peer.head_config("apc").items() if key != "type"})
    report = accelerate(head)
    assert type(head) is OwnHead
    assert not report.swapped and report.left == {"model": "OwnHead has no fused version"}


@needs_mmseg
def test_a_wrong_label_is_an_error_that_says_so():
    _, ours, _ = pair("fcn")
    with pytest.raises(ValueError, match="target: expected labels of 0 to 4"):
        ours.loss_by_feat(torch.randn(2, 5, 4, 4), peer.samples(torch.full((2, 8, 8), 7)))
