"""Tests every operation under torch.func, in forward mode and differentiated twice: right, or refused by name."""

import pytest
import torch
from arguments import arguments
from torch import Tensor
from torch.autograd import forward_ad

import apc_kernels
from apc_kernels import info

OPERATIONS = sorted(set(info.SERVED_BY) - {"augment"})  # its images are integers
NOT_DIFFERENTIABLE = {"upsample_argmax", "upsample_confusion", "upsample_softmax"}
COMPOSED = {
    "conv1x1",
    "conv3x3",
    "pyramid_conv",
    "pyramid_reduce",
}  # at this size convolutions are PyTorch's; none has derivatives of its own
IN_EAGER_USE = {"pyramid_conv", "pyramid_reduce"}  # alone have kernels
UPDATES = {"adaptive_context_norm", "upsample_softmax"}  # in place: running statistics, and `out`


def function_of_tensors(operation: str):
    """Returns a function of the operation's differentiable arguments that returns a number, and the arguments."""
    given = arguments(operation)
    if operation in ("adaptive_context_norm", "pyramid_reduce"):
        given["training"] = False
    names = [
        n for n, v in given.items() if isinstance(v, Tensor) and v.is_floating_point() and n not in ("out", "target")
    ]
    if operation.startswith("upsample"):
        names = [n for n in names if n not in ("weight", "pos_weight")]
    if operation in ("conv1x1", "conv3x3"):
        first, second = given.pop("maps")
        tensors = (first, second, given.pop("weight"))
        return lambda a, b, w: squares(getattr(apc_kernels, operation)([a, b], w, **given)), tensors
    if operation == "pyramid_reduce":
        regions, weights = given.pop("regions"), given.pop("weights")
        return lambda x, *w: squares(apc_kernels.pyramid_reduce(x, w, **given)), (regions, *weights)
    tensors = tuple(given.pop(n) for n in names)
    return lambda *t: squares(getattr(apc_kernels, operation)(**dict(zip(names, t, strict=True)), **given)), tensors


def squares(results) -> Tensor:
    return results.double().square().sum() if isinstance(results, Tensor) else sum(map(squares, results))


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - NOT_DIFFERENTIABLE))
def test_grad(operation):
    """Tests that torch.func.grad returns the bits of backward(), in the reference where that alone serves it."""
    function, tensors = function_of_tensors(operation)
    everything = tuple(range(len(tensors)))
    computed = torch.func.grad(function, argnums=everything)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with apc_kernels.backend("reference" if operation in IN_EAGER_USE else "auto"):
        expected = torch.autograd.grad(function(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(computed, expected, strict=True))


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - UPDATES))
def test_vmap(operation):
    """Tests that a mapped call computes what a loop does; each operation is mapped over all of its tensors."""
    function, tensors = function_of_tensors(operation)
    batches = [torch.stack([t, t.flip(0), t.roll(1, -1)], 1) for t in tensors]
    computed = torch.func.vmap(function, in_dims=1)(*batches)
    expected = torch.stack([function(*(b[:, i] for b in batches)) for i in range(3)])
    torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - NOT_DIFFERENTIABLE - UPDATES))
def test_gradients_of_every_sample(operation):
    function, tensors = function_of_tensors(operation)
    batches = [torch.stack([t, t.flip(0)]) for t in tensors]
    computed = torch.func.vmap(torch.func.grad(function))(*batches)
    expected = torch.stack([torch.func.grad(function)(*(b[i] for b in batches)) for i in range(2)])
    torch.testing.assert_close(computed, expected)


def test_vmap_over_labels():
    logits, targets = torch.randn(2, 4, 5, 6), torch.randint(4, (3, 2, 11, 9))
    computed = torch.func.vmap(apc_kernels.upsample_cross_entropy, in_dims=(None, 0))(logits, targets)
    expected = torch.stack([apc_kernels.upsample_cross_entropy(logits, target) for target in targets])
    assert torch.equal(computed, expected)


def test_what_updates_in_place_is_not_mapped():
    given = arguments("upsample_softmax")
    logits = torch.stack([given.pop("logits")] * 2)
    with pytest.raises(NotImplementedError, match="upsample_softmax writes to an argument"):
        torch.func.vmap(lambda x: apc_kernels.upsample_softmax(x, **given))(logits)
    given = arguments("adaptive_context_norm")
    x = given.pop("x")
    with pytest.raises(RuntimeError, match="adaptive_context_norm: training updates running statistics"):
        torch.func.grad(lambda x: apc_kernels.adaptive_context_norm(x, **given).sum())(x)


@pytest.mark.parametrize("how", ["jvp", "dual", "dual with gradient"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward_mode(operation, how):
    """Tests that a forward-mode derivative is refused by name, or is the right one where PyTorch has it."""
    function, tensors = function_of_tensors(operation)
    tangents = tuple(torch.ones_like(t) for t in tensors)

    def derivative():
        if how == "jvp":
            return torch.func.jvp(function, tensors, tangents)[1]
        with forward_ad.dual_level():
            leaves = [t.clone().requires_grad_(how == "dual with gradient") for t in tensors]
            duals = [forward_ad.make_dual(t, u) for t, u in zip(leaves, tangents, strict=True)]
            return forward_ad.unpack_dual(function(*duals)).tangent

    if operation in COMPOSED:
        leaves = [t.clone().requires_grad_() for t in tensors]
        expected = sum(g.sum() for g in torch.autograd.grad(function(*leaves), leaves))
        torch.testing.assert_close(derivative(), expected)
    elif operation == "upsample_softmax" and how == "dual with gradient":
        with pytest.raises(ValueError, match="upsample_softmax is for inference only"):
            derivative()
    else:
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative: use reverse mode"):
            derivative()


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - NOT_DIFFERENTIABLE))
def test_second_derivative(operation):
    """Tests that it is refused by name, or is the right one where the operation is composed or linear."""
    function, tensors = function_of_tensors(operation)
    leaves = [t.clone().requires_grad_() for t in tensors]
    (grad, *_) = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    if operation in COMPOSED or operation == "pyramid_pool":
        assert torch.autograd.gradgradcheck(function, leaves)
    else:
        names = "adaptive_context|encode|upsample_cross_entropy|upsample_region_sums"
        with pytest.raises(RuntimeError, match=rf"({names}) is differentiable once: expected no derivative"):
            grad.sum().backward()


# Changes of what is copied do not matter.
COPIED = {"upsample_binary_cross_entropy"}


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - NOT_DIFFERENTIABLE - {"pyramid_pool"} - COPIED))
def test_a_change_between_forward_and_backward_is_noticed(operation):
    function, tensors = function_of_tensors(operation)
    leaves = [t.clone().requires_grad_() for t in tensors]
    moved = [t.clone() for t in leaves]
    loss = function(*moved)
    with torch.no_grad():
        moved[0].add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
        loss.backward()
