"""The float64 reference against plain PyTorch in float64: two people reading the same formulas."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, make_layer

TORCH_ACTIVATIONS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu2": lambda gate, up: F.relu(up).square(),
    "swiglu_clamp": lambda gate, up: (
        gate.clamp(max=1.25) * torch.sigmoid(1.702 * gate.clamp(max=1.25)) * (up.clamp(-1.25, 1.25) + 1)
    ),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts(activation, interleaved):
    layer = make_layer(
        7, 12, 9, 5, 3, activation=activation, interleaved=interleaved, bias=True, shared=2, routing="dropped"
    )
    x = layer.hidden_states.double()

    def mlp(row, w1, w2, b1, b2):
        first = w1.double() @ row + b1
        if activation == "relu2":
            gate, up = None, first
        else:
            gate, up = (first[0::2], first[1::2]) if interleaved else first.chunk(2)
        return w2.double() @ TORCH_ACTIVATIONS[activation](gate, up) + b2

    expected = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(layer.topk_ids[token].tolist()):
            if 0 <= expert < 5:
                b1, b2 = layer.options["w1_bias"][expert].double(), layer.options["w2_bias"][expert].double()
                row = mlp(x[token], layer.w1[expert], layer.w2[expert], b1, b2)
                expected[token] += layer.topk_weights[token, slot].double() * row
        for w1, w2 in zip(layer.options["shared_w1"], layer.options["shared_w2"], strict=True):
            expected[token] += mlp(x[token], w1, w2, 0, 0)
    np.testing.assert_allclose(layer.reference(), expected.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("scoring", "score"),
    [
        ("softmax", lambda x: x.softmax(dim=1)),
        ("sigmoid", torch.sigmoid),
        ("sqrt_softplus", lambda x: F.softplus(x).sqrt()),
    ],
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing(scoring, score, renormalize):
    logits = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scores = score(logits)
    groups = (scores + bias).view(50, 6, 4).topk(2, dim=2).values.sum(dim=2)
    allowed = torch.zeros(50, 6, dtype=torch.bool).scatter(1, groups.topk(3, dim=1).indices, True)
    choice = (scores + bias).masked_fill(~allowed.repeat_interleave(4, dim=1), -torch.inf)
    ids = choice.topk(5, dim=1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    routing = reference.route(
        logits,
        5,
        scoring=scoring,
        correction_bias=bias,
        num_expert_group=6,
        topk_group=3,
        group_score="top2_sum",
        renormalize=renormalize,
        routed_scaling_factor=2.5,
    )
    np.testing.assert_array_equal(routing.ids, ids.numpy())
    np.testing.assert_allclose(routing.weights, (weights * 2.5).numpy(), rtol=1e-12)


def test_routing_on_logits():
    logits = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, ids = logits.topk(4, dim=1)
    routing = reference.route(logits, 4, scoring="topk_softmax")
    np.testing.assert_array_equal(routing.ids, ids.numpy())
    np.testing.assert_allclose(routing.weights, values.softmax(dim=1).numpy(), rtol=1e-12)


def test_grouping_is_a_stable_sort():
    ids = torch.tensor([[2, 0], [-1, 2], [0, 2], [3, 9]])
    grouping = reference.group(ids, 4, row_tile=2, shared=1)
    assert grouping.offsets.tolist() == [0, 2, 2, 5, 6, 10]
    assert grouping.sorted_rows.tolist() == [1, 6, 0, 4, 7, 9, 2, 5, 8, 11, -1, -1]
    assert grouping.inverse.tolist() == [2, 0, 6, -1, 3, 7, 1, 4, 8, 5, -1, 9]
    assert grouping.tiles == [(0, 0, 2), (2, 2, 2), (2, 4, 1), (3, 5, 1), (4, 6, 2), (4, 8, 2)]
    assert reference.pad(grouping, 2).tolist() == [[1, 6], [-1, -1], [0, 4], [9, -1], [2, 5]]
