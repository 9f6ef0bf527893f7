"""Linear layers by oneDNN are PyTorch's own, and step aside where they cannot be used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flsl_d2.modeling import linear as module
from flsl_d2.modeling.linear import Linear, Mlp, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture(autouse=True, scope="module")
def small_products_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MIN_TERMS", 1)
        patch.setattr(module, "_MIN_WIDTH", 30)
        yield


def operators(function) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return {event.key for event in record.key_averages()}


def uses_onednn(function) -> bool:
    return "mkldnn::_linear_pointwise" in operators(function)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_equal_to_pytorch_with_all_gradients(shape, widths, bias, transposed):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, widths[0]), torch.randn(widths[1], widths[0])]
    if transposed:  # strides that are not of a contiguous tensor
        inputs = [torch.randn(widths[0], *shape).movedim(0, -1), torch.randn(widths).T]
    if bias:
        inputs.append(torch.randn(widths[1]))
    results = []
    for function in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        gradients = torch.autograd.grad(out.sin().sum(), leaves)
        results.append([out, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    results = []
    for function in (linear, F.linear):
        (slope,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), (x, weight)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_frozen_parts_get_no_gradient():
    x, weight = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    linear(x, weight, torch.randn(3)).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert not linear(x, weight.detach()).requires_grad


@needs_onednn
def test_who_multiplies():
    x, layer = torch.randn(4, 8), Linear(8, 8)
    assert uses_onednn(lambda: layer(x))
    assert uses_onednn(lambda: layer(x.requires_grad_()).sum().backward())
    assert not uses_onednn(lambda: Linear(8, 8, onednn=False)(x))
    assert not uses_onednn(lambda: layer(x[0]))
    assert not uses_onednn(lambda: Linear(8, 8).double()(x.double()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MIN_TERMS", 4 * 8 * 8 + 1)
        assert not uses_onednn(lambda: layer(x))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(lambda: layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)])
def test_shapes_that_are_left_to_pytorch(shape):
    layer = Linear(8, 3)
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("recompute", [True, False])
def test_an_mlp_is_its_layers(recompute):
    torch.manual_seed(0)
    mlp, x = Mlp(8, 32, recompute).train(), torch.randn(2, 5, 8)
    plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    plain.load_state_dict(
        {
            key.replace("fc1", "0").replace("fc2", "2"): value
            for key, value in mlp.state_dict().items()
        }
    )
    results = []
    for layers in (mlp, plain):
        leaf = x.clone().requires_grad_()
        out = layers(leaf)
        gradients = torch.autograd.grad(out.sin().sum(), [leaf, *layers.parameters()])
        results.append([out, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_without_gradient_the_gelu_is_oneDNNs():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 32).eval(), torch.randn(2, 5, 8)
    expected = mlp(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
        assert "aten::gelu" not in operators(lambda: mlp(x))
    assert "aten::gelu" in operators(lambda: mlp(x))
    assert expected.requires_grad


def test_operations_are_counted_and_traced_as_those_of_a_linear_layer():
    layer, x = Linear(8, 16), torch.randn(2, 3, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    # Forward, and the gradient of the weight: a product each of two operations a term.
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 8 * 16)
    graph = torch.jit.trace(layer, x).inlined_graph
    assert {"aten::linear"} <= {node.kind() for node in graph.nodes()}


def test_compiled_whole():
    mlp = Mlp(8, 32).train()
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(mlp(x).sin().sum(), [*mlp.parameters()])
    actual = torch.autograd.grad(compiled(x).sin().sum(), [*mlp.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-4, atol=1e-5)
