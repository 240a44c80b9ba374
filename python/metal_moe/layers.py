"""Layers of published models, with random weights: what the command line and the benchmarks measure."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .formats import QuantizedExperts

# Arguments of QuantizedExperts.quantize.
FORMATS = {f"affine{bits}": {"format": "affine", "bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)}
FORMATS |= {name: {"format": name} for name in ("mxfp4", "mxfp8", "nvfp4")}
FORMATS |= {f"trellis{bits}": {"format": "trellis", "bits": bits} for bits in range(1, 9)}


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one MoE layer and how it routes."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared_experts: int = 0
    """Shared experts, of the same intermediate size as the routed ones."""
    correction_bias: bool = False
    routing: dict = field(default_factory=dict)
    """Keyword arguments of `fused_topk`, without the correction bias."""

    def expert_parameters(self) -> int:
        """Parameters of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all expert weights."""
        return (self.experts + self.shared_experts) * self.expert_parameters() * dtype.itemsize

    def moved_bytes(self, topk_ids: Tensor, dtype: torch.dtype) -> int:
        """Bytes that a layer must read and write at least: the weights of every expert in use, once, and its tokens."""
        tokens = topk_ids.shape[0]
        used = topk_ids.unique().numel() + self.shared_experts
        return (used * self.expert_parameters() + 2 * tokens * self.hidden) * dtype.itemsize

    def operations(self, tokens: int) -> int:
        """Floating-point operations of the matrix products, a multiply-add counted as two."""
        return 2 * tokens * (self.top_k + self.shared_experts) * self.expert_parameters()

    def scaled(self, scale: float) -> "LayerShape":
        """Hidden and intermediate size times `scale`, rounded to multiples of 64."""

        def size(full: int) -> int:
            return max(64, round(full * scale / 64) * 64)

        return replace(self, hidden=size(self.hidden), intermediate=size(self.intermediate))


GLM_4_7_FLASH = LayerShape(
    "GLM-4.7-Flash",
    hidden=2048,
    intermediate=1536,
    experts=64,
    top_k=4,
    shared_experts=1,
    correction_bias=True,
    routing={"scoring": "sigmoid", "routed_scaling_factor": 1.8},
)
QWEN3_30B_A3B = LayerShape("Qwen3-30B-A3B", hidden=2048, intermediate=768, experts=128, top_k=8)
MIXTRAL_8X7B = LayerShape("Mixtral-8x7B", hidden=4096, intermediate=14336, experts=8, top_k=2)
# Without gpt-oss's biases and clamped activation, which neither move bytes nor count operations to speak of.
GPT_OSS_20B = LayerShape(
    "gpt-oss-20b", hidden=2880, intermediate=2880, experts=32, top_k=4, routing={"scoring": "topk_softmax"}
)
DEEPSEEK_V3 = LayerShape(
    "DeepSeek-V3",
    hidden=7168,
    intermediate=2048,
    experts=256,
    top_k=8,
    shared_experts=1,
    correction_bias=True,
    routing={
        "scoring": "sigmoid",
        "num_expert_group": 8,
        "topk_group": 4,
        "group_score": "top2_sum",
        "routed_scaling_factor": 2.5,
    },
)
# By the names that the command line and the benchmarks take.
MODELS = {
    "mixtral": MIXTRAL_8X7B,
    "qwen3": QWEN3_30B_A3B,
    "glm": GLM_4_7_FLASH,
    "gptoss": GPT_OSS_20B,
    "deepseek": DEEPSEEK_V3,
}


@dataclass
class Layer:
    """Weights of one layer, shaped as `fused_moe` takes them."""

    shape: LayerShape
    w1: Tensor
    w2: Tensor
    router: Tensor
    """[E, H] float32."""
    correction_bias: Tensor | None
    """[E] float32."""
    shared_w1: Tensor | None
    shared_w2: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.w1.dtype

    def hidden_states(self, tokens: int, seed: int = 0) -> Tensor:
        """[tokens, H] of unit variance, in the weights' dtype."""
        device = self.w1.device
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(tokens, self.shape.hidden, generator=generator, device=device).to(self.dtype)

    def router_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, E] float32."""
        return hidden_states.float() @ self.router.T

    def routing(self) -> dict:
        """Keyword arguments of `fused_topk`."""
        return {**self.shape.routing, "correction_bias": self.correction_bias}

    def to(self, dtype: torch.dtype) -> "Layer":
        """The same layer in another dtype."""

        def convert(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return replace(
            self,
            w1=self.w1.to(dtype),
            w2=self.w2.to(dtype),
            shared_w1=convert(self.shared_w1),
            shared_w2=convert(self.shared_w2),
        )


def make_layer(shape: LayerShape, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Layer:
    """Random normal weights, scaled so that every matrix product keeps its input's variance.

    Each expert has a seed of its own, so that experts differ and one layer of a seed is always the same on one kind of
    device. They are drawn on that device: on the CPU by all threads that PyTorch uses.
    """
    total = shape.experts + shape.shared_experts
    w1 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
    w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=dtype, device=device)
    shared_w1 = w1.new_empty(shape.shared_experts, *w1.shape[1:]) if shape.shared_experts else None
    shared_w2 = w2.new_empty(shape.shared_experts, *w2.shape[1:]) if shape.shared_experts else None

    def draw(expert: int) -> None:
        generator = torch.Generator(device).manual_seed(seed * total + expert)
        of_routed = expert < shape.experts
        index = expert if of_routed else expert - shape.experts
        for weights in (w1, w2) if of_routed else (shared_w1, shared_w2):
            weights[index].normal_(0.0, weights.shape[2] ** -0.5, generator=generator)

    # A GPU has one stream for all threads.
    with ThreadPoolExecutor(torch.get_num_threads() if w1.is_cpu else 1) as pool:
        list(pool.map(draw, range(total)))
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(shape.experts, shape.hidden, generator=generator) * shape.hidden**-0.5
    bias = torch.randn(shape.experts, generator=generator) * 0.1 if shape.correction_bias else None
    return Layer(shape, w1, w2, router.to(device), None if bias is None else bias.to(device), shared_w1, shared_w2)


def quantize(layer: Layer, format: str) -> tuple[QuantizedExperts, QuantizedExperts]:
    """w1 and w2 of a layer in one of FORMATS: as `QuantizedExperts.quantize` makes them, but for trellis codes, which
    are random ones."""
    settings = FORMATS[format]
    if settings["format"] == "trellis":
        gate, up = (random_trellis(weights, settings["bits"]) for weights in layer.w1.chunk(2, 1))
        w1 = QuantizedExperts({"gate": gate.parts["weight"], "up": up.parts["weight"]})
        return w1, random_trellis(layer.w2, settings["bits"])
    w1, w2 = (QuantizedExperts.quantize(weights, **settings) for weights in (layer.w1, layer.w2))
    return w1, w2


def random_trellis(weights: Tensor, bits: int) -> QuantizedExperts:
    """Trellis weights with random codes, of the size and spread of `weights` [E, rows, columns].

    The search for the best codes takes too long for a whole layer, and a layer's time does not depend on them.
    """
    count, *shape = weights.shape
    rows, columns = (-(-size // 128) * 128 for size in shape)
    generator = torch.Generator(weights.device).manual_seed(count * rows + columns)

    def signs(size: int, scale: float) -> Tensor:
        drawn = torch.randint(0, 2, (size,), generator=generator, device=weights.device)
        return ((2 * drawn - 1) * scale).half()

    def expert() -> dict[str, Tensor]:
        words = (columns // 16, rows // 16, 16 * bits)
        codes = torch.randint(-(2**15), 2**15, words, generator=generator, device=weights.device)
        mul1 = torch.tensor(0x83DCD12D).to(torch.uint32).view(torch.int32)
        return {"trellis": codes.to(torch.int16), "suh": signs(columns, 1.0), "svh": signs(rows, spread), "mul1": mul1}

    spread = float(weights[0].float().std())
    return QuantizedExperts.from_exl3([expert() for _ in range(count)], shape=tuple(shape))
