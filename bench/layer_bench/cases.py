"""The models, and a layer's inputs in turn."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import metal_moe
import torch
from metal_moe import QuantizedExperts, layers
from torch import Tensor

# Distinct inputs in turn: they choose different experts, whose weights then come from memory, not from the last call's
# cache (as far as the experts of all of them exceed it).
INPUTS = 8

Quantized = tuple[QuantizedExperts, QuantizedExperts]
"""w1 and w2"""

Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""hidden_states, w1, w2, topk_weights, topk_ids"""


@dataclass
class Case:
    """One layer at one number of tokens."""

    layer: layers.Layer
    tokens: int
    calls: list[Call]
    logits: list[Tensor]
    """The router logits that the routes of `calls` come from."""
    quantized: Quantized | None = None
    """What we compute with in place of the weights of `calls`, which the peers take."""

    @property
    def shape(self) -> layers.LayerShape:
        return self.layer.shape

    @property
    def device(self) -> torch.device:
        return self.layer.w1.device

    def mean(self, quantity: Callable[[Tensor], float]) -> float:
        """Mean over the inputs of a function of their expert ids."""
        return sum(quantity(ids) for *_, ids in self.calls) / len(self.calls)

    def expert_bytes(self) -> tuple[float, float]:
        """Of one expert: the bytes of its w1 and of its w2, as we read them."""
        if self.quantized:
            w1, w2 = (weights.bits_per_weight / 8 * weights.shape[1:].numel() for weights in self.quantized)
            return w1, w2
        matrix = self.shape.hidden * self.shape.intermediate * self.layer.dtype.itemsize
        return 2 * matrix, matrix

    def moved_bytes(self, topk_ids: Tensor) -> float:
        """Bytes that the layer must read and write at least: LayerShape.moved_bytes with our weights."""
        tokens = 2 * topk_ids.shape[0] * self.shape.hidden * self.layer.dtype.itemsize
        return topk_ids.unique().numel() * sum(self.expert_bytes()) + tokens

    def experts_hit(self) -> float:
        """Experts in use, the mean over the inputs."""
        return self.mean(lambda ids: ids.unique().numel())


def make_layer(model: str, scale: float, dtype: torch.dtype, device: torch.device) -> layers.Layer:
    """The routed experts of a model, without the shared ones, H and I times `scale`."""
    shape = replace(layers.MODELS[model], shared_experts=0)
    return layers.make_layer(shape if scale == 1 else shape.scaled(scale), dtype, device)


def make_case(layer: layers.Layer, tokens: int, quantized: Quantized | None = None) -> Case:
    case = Case(layer, tokens, [], [], quantized)
    for seed in range(INPUTS):
        x = layer.hidden_states(tokens, seed)
        logits = layer.router_logits(x)
        weights, ids = metal_moe.fused_topk(logits, layer.shape.top_k, **layer.routing())
        case.calls.append((x, layer.w1, layer.w2, weights, ids))
        case.logits.append(logits)
    return case
