"""The experts of published checkpoints, layer by layer: EXL3, MLX, gpt-oss, `metal-moe quantize`'s own, and dense ones.

Which tensors make up a layer is told by their names alone. L is the layer, E the expert, P anything (most often
"model.layers.L.mlp" or "model.layers.L.block_sparse_moe"):

| source | tensors |
| --- | --- |
| exl3 | `P.experts.E.{gate,up,down}_proj.{trellis,suh,svh,mul1,mcg,su,sv,bias}`, or w1, w3, w2 for gate, up, down |
| mlx | `P.switch_mlp.{gate,up,down}_proj.{weight,scales,biases,bias}`; gpt-oss: `experts` for `switch_mlp` |
| gpt-oss | `P.experts.{gate_up_proj,down_proj}_{blocks,scales,bias}` |
| dense | `P.experts.E.{gate,up,down}_proj.{weight,bias}`, or w1, w3, w2 |
| stacked | dense: `P.experts.{gate_up,down}_proj`, and `_bias`, [E, 2I, H] and [E, H, I] or both transposed; or \
`P.experts.{gate,up,down}_proj`, also with `switch_mlp` for `experts` and with `.weight`, `.bias` |
| metal-moe | `P.experts.{w1,w2}.{weight,gate,up}.{codes,scales,biases,table}`, `P.experts.{w1,w2}.bias` |

Shared experts are `P.shared_experts.{gate,up,down}_proj`, `P.shared_expert...` or `P.shared_mlp...`, with tensors as
for exl3, mlx or dense experts, whatever the routed ones are, or as metal-moe's; `P.shared_expert_gate` weighs them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import checks, shared_experts, stacked
from .checkpoint import Checkpoint
from .hadamard import BLOCK
from .layout import round_up
from .modules import mlx_quantization
from .part import make_part
from .quantized_experts import BUFFERS, GATE_UP, QuantizedExperts
from .trellis import stack_exl3

PROJECTIONS = {
    "gate_up_proj": "gate_up",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
EXL3_TENSORS = ("trellis", "suh", "svh", "su", "sv", "mul1", "mcg", "bias", "scale")

# Models whose EXL3 files hold `up` divided by this; the routing weights must be multiplied by it (after normalisation).
EXL3_UP_DIVISORS = {"mistral4": 128.0, "laguna": 128.0}

_NUMBER = "(?:0|[1-9][0-9]{0,5})"
_LAYER = rf"(?P<block>(?:.*\.)?layers\.(?P<layer>{_NUMBER})\.(?:[^.]+\.)*?)"
_ONE_BY_ONE = _LAYER + rf"experts\.(?P<expert>{_NUMBER})\.(?P<projection>(?:gate|up|down)_proj|w[123])\."
_STACKED = _LAYER + r"(?:switch_mlp|experts)\.(?P<projection>(?:gate|up|down)_proj)\."
_PATTERNS = {
    "exl3": re.compile(_ONE_BY_ONE + rf"(?P<tensor>{'|'.join(EXL3_TENSORS)})"),
    "dense": re.compile(_ONE_BY_ONE + r"(?P<tensor>weight|bias)"),
    "mlx": re.compile(_STACKED + r"(?P<tensor>weight|scales|biases|bias)"),
    "stacked": re.compile(
        _LAYER
        + r"(?:switch_mlp|experts)\.(?P<projection>(?:gate_up|gate|up|down)_proj)(?:[._](?P<tensor>weight|bias))?"
    ),
    "gpt-oss": re.compile(_LAYER + r"experts\.(?P<projection>gate_up_proj|down_proj)_(?P<tensor>blocks|scales|bias)"),
    "metal-moe": re.compile(
        _LAYER + rf"experts\.(?P<projection>w1|w2)\.(?P<tensor>(?:weight|gate|up)\.(?:{'|'.join(BUFFERS)})|bias)"
    ),
}
# Layers for multi-token prediction, numbered anew beside the model's.
_MTP = re.compile(r"(?:^|\.)mtp\.")
# Longer names are no model's, and matching takes time that grows faster than they do.
_MAX_NAME = 512
# Of these a layer must have at least one tensor to be of the kind ("bias" alone says nothing).
_TELLING = {
    "exl3": ("trellis",),
    "dense": ("weight",),
    "stacked": ("weight",),
    "mlx": ("scales",),
    "gpt-oss": ("blocks",),
    "metal-moe": ("weight.table", "gate.table"),
}


@dataclass(frozen=True)
class LayerExperts:
    """What `fused_moe` needs of a layer's experts."""

    layer: int
    source: str
    """"exl3", "mlx", "gpt-oss", "dense", "stacked" or "metal-moe"."""
    block: str
    """The name in front of "experts", for instance "model.layers.3.mlp."."""
    w1: QuantizedExperts | Tensor
    w2: QuantizedExperts | Tensor
    w1_bias: Tensor | None = None
    """Of a dense w1; a quantised one has its own."""
    w2_bias: Tensor | None = None
    shared_w1: QuantizedExperts | Tensor | None = None
    """The shared experts, [N, 2Is, H]: models that have several store them as one."""
    shared_w2: QuantizedExperts | Tensor | None = None
    shared_gate: Tensor | None = None
    """[1, H]: shared_weights are sigmoid(x @ shared_gate.T)."""
    interleaved: bool = False
    """Rows of w1 and of w1_bias are gate 0, up 0, gate 1, ...: pass it on."""
    routing_scale: float = 1.0
    """Multiply routing weights by this, after normalisation."""


class ExpertReader:
    """Experts of a checkpoint, by layer.

    Example:
        with ExpertReader("gpt-oss-20b") as reader:
            for layer in reader.layers:
                experts = reader.read(layer)

    Args:
        path: a safetensors file, or a folder of them.
        prefix: tensors of other names are left out: of a checkpoint with several models, "thinker." for one. Blocks of
            multi-token prediction ("mtp.") are left out where there are others.
    """

    def __init__(self, path: str | os.PathLike, prefix: str = "") -> None:
        self.checkpoint = Checkpoint(path)
        try:
            self._found = _find_layers(self.checkpoint, prefix)
        except BaseException:
            self.checkpoint.close()
            raise

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        return sorted(self._found)

    def source(self, layer: int) -> str:
        return self._layer(layer).source

    def block(self, layer: int) -> str:
        """The name in front of "experts"."""
        return self._layer(layer).block

    def read(self, layer: int) -> LayerExperts:
        """The experts of one layer. Stacked tensors stay where the file is mapped.

        Copied are EXL3's and dense ones, stacked dense ones where rows and columns are exchanged or gate and up are
        apart, and tensors that begin at no multiple of their type's size (MLX writes such files). Kernels want
        multiples of 16 bytes: `QuantizedExperts.aligned`.
        """
        return self._layer(layer).read(self.checkpoint)

    def shared_tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's shared experts by name, as they are stored."""
        names = self._layer(layer).shared
        return {name: self.checkpoint.get(name) for tensors in names.values() for name in tensors.values()}

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._found:
            known = f"{self.layers[0]} to {self.layers[-1]}"
            raise ValueError(f"{self.checkpoint.path}: layer {layer} has no experts; layers with experts are {known}")
        return self._found[layer]

    def __iter__(self) -> Iterator[LayerExperts]:
        return (self.read(layer) for layer in self.layers)

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()


@dataclass
class _Layer:
    """Names of one layer's tensors: (expert or None, projection) -> last part of the name -> whole name."""

    layer: int
    source: str
    block: str
    names: dict[tuple[int | None, str], dict[str, str]]
    shared: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of shared experts: projection, or "gate" of "shared_expert_gate" -> last part of the name -> whole name."""

    def read(self, checkpoint: Checkpoint) -> LayerExperts:
        read = {
            "exl3": self._exl3,
            "mlx": self._mlx,
            "gpt-oss": self._gpt_oss,
            "dense": self._dense,
            "stacked": self._stacked,
            "metal-moe": self._own,
        }[self.source]
        with checks.within(str(checkpoint.path)):
            made = read(checkpoint)
            experts, rows, hidden = made["w1"].shape
            if tuple(made["w2"].shape) != (experts, hidden, rows // 2) or rows % 2 or not rows:
                shapes = f"w1 [{experts}, {rows}, {hidden}] and w2 {list(made['w2'].shape)}"
                raise ValueError(f"{self.block}experts: {shapes} do not fit; they must be [E, 2I, H] and [E, H, I]")
            if self.shared:
                made |= shared_experts.read(self.block, self.shared, checkpoint, hidden)
                shared_hidden = made["shared_w1"].shape[2]
                if shared_hidden != hidden:
                    raise ValueError(
                        f"{self.block}: shared experts have a hidden size of {shared_hidden}; it must be {hidden}"
                    )
            return LayerExperts(self.layer, self.source, self.block, **made)

    def _need(self, projection: str, tensor: str, expert: int | None = None) -> str:
        name = self.names.get((expert, projection), {}).get(tensor)
        if name is None:
            of = "" if expert is None else f"{expert}."
            raise ValueError(f"a tensor is missing: {self.block}experts.{of}{projection}, {tensor}")
        return name

    def _experts(self) -> int:
        found = {expert for expert, _ in self.names}
        missing = next((expert for expert in range(len(found)) if expert not in found), None)
        if missing is not None:
            raise ValueError(f"{self.block}experts: expert {missing} is missing, {max(found)} is there")
        return len(found)

    def _exl3(self, checkpoint: Checkpoint) -> dict:
        count = self._experts()
        parts, biases = {}, {}
        for projection in ("gate", "up", "down"):
            whats, linears = [], []
            for expert in range(count):
                whole = self._need(projection, "trellis", expert)
                whats.append(whole.removesuffix(".trellis"))
                linears.append({t: checkpoint.get(n) for t, n in self.names[expert, projection].items()})
            checks.tensor(whats[0], "trellis", linears[0]["trellis"], (torch.int16,), (None, None, None))
            tiles = linears[0]["trellis"].shape
            sizes = ("hidden", "intermediate") if projection == "down" else ("intermediate", "hidden")
            shape = tuple(
                _size(checkpoint.config, kind, 16 * n) for kind, n in zip(sizes, (tiles[1], tiles[0]), strict=True)
            )
            stacks, biases[projection] = stack_exl3(self.block + "experts", linears, shape, whats)
            parts[projection] = make_part(stacks)
        model = _text_config(checkpoint.config).get("model_type")
        return {
            "w1": QuantizedExperts({name: parts[name] for name in GATE_UP}, _cat_bias(biases["gate"], biases["up"])),
            "w2": QuantizedExperts({"weight": parts["down"]}, biases["down"]),
            "routing_scale": EXL3_UP_DIVISORS.get(model, 1.0) if isinstance(model, str) else 1.0,
        }

    def _mlx(self, checkpoint: Checkpoint) -> dict:
        sides = {}
        for projection in ("gate", "up", "down"):
            weight = self._need(projection, "weight")
            self._need(projection, "scales")
            module = weight.removesuffix(".weight")
            with checks.within(f"{checkpoint.where(weight)}: {module}"):
                how = mlx_quantization(checkpoint.config, module)
                tensors = {t: checkpoint.get(name) for t, name in self.names[None, projection].items()}
                sides[projection] = QuantizedExperts.from_mlx(**tensors, **how)
        bias = _cat_bias(sides["gate"].bias, sides["up"].bias)
        pair = {name: sides[name].parts["weight"] for name in GATE_UP}
        return {"w1": QuantizedExperts(pair, bias), "w2": sides["down"]}

    def _gpt_oss(self, checkpoint: Checkpoint) -> dict:
        made = {}
        for target, projection in (("w1", "gate_up_proj"), ("w2", "down_proj")):
            name = self._need(projection, "blocks")
            self._need(projection, "scales")
            with checks.within(f"{checkpoint.where(name)}: {self.block}experts.{projection}"):
                tensors = {t: checkpoint.get(name) for t, name in self.names[None, projection].items()}
                made[target] = QuantizedExperts.from_mxfp4(**tensors)
        return {**made, "interleaved": True}

    def _dense(self, checkpoint: Checkpoint) -> dict:
        count = self._experts()
        weights = {
            projection: [checkpoint.get(self._need(projection, "weight", expert)) for expert in range(count)]
            for projection in ("gate", "up", "down")
        }
        made = stacked.one_by_one(self.block + "experts", **weights)

        def bias(projection: str) -> Tensor | None:
            names = [self.names.get((expert, projection), {}).get("bias") for expert in range(count)]
            if all(name is None for name in names):
                return None
            if any(name is None for name in names):
                raise ValueError(f"{self.block}experts: some of the experts have a bias of {projection}, some none")
            return torch.stack([checkpoint.get(name) for name in names])

        return made | stacked.biases(self.block + "experts", made["w1"], made["w2"], bias)

    def _stacked(self, checkpoint: Checkpoint) -> dict:
        name = self.block + "experts"
        model = _text_config(checkpoint.config).get("model_type")
        fused = (None, "gate_up") in self.names
        if fused and (None, "gate") in self.names:
            raise ValueError(f"{name}: there are gate_up_proj and gate_proj; there must be one of them")
        projections = ("gate_up", "down") if fused else ("gate", "up", "down")
        weights = [checkpoint.get(self._need(projection, "weight")) for projection in projections]
        made = stacked.fused(name, *weights) if fused else stacked.stacked(name, *weights)

        def bias(projection: str) -> Tensor | None:
            found = self.names.get((None, projection), {}).get("bias")
            return None if found is None else checkpoint.get(found)

        made |= stacked.biases(name, made["w1"], made["w2"], bias)
        if fused and model is None and "w1_bias" in made:
            raise ValueError(f"{name}: config.json names no model_type: it tells the order of gate and up rows")
        return {**made, "interleaved": fused and model in stacked.INTERLEAVED_MODELS}

    def _own(self, checkpoint: Checkpoint) -> dict:
        made = {}
        for target in ("w1", "w2"):
            state = {t: checkpoint.get(name) for t, name in self.names.get((None, target), {}).items()}
            with checks.within(f"{self.block}experts.{target}"):
                made[target] = QuantizedExperts.from_state_dict(state)
        return made


def _find_layers(checkpoint: Checkpoint, prefix: str) -> dict[int, _Layer]:
    found: dict[int, dict[tuple[str, str], _Layer]] = {}
    shared: dict[str, dict[str, dict[str, str]]] = {}
    names = [name for name in checkpoint.names() if name.startswith(prefix)]
    for name in names:
        if len(name) > _MAX_NAME:
            raise ValueError(
                f"{checkpoint.path}: a tensor's name has {len(name)} characters; at most {_MAX_NAME} are read"
            )
        with checks.within(str(checkpoint.path)):
            shared_experts.find(name, shared)
        for source, pattern in _PATTERNS.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            groups = match.groupdict()
            number, block = int(groups["layer"]), groups["block"]
            layer = found.setdefault(number, {}).setdefault((source, block), _Layer(number, source, block, {}))
            expert = None if groups.get("expert") is None else int(groups["expert"])
            projection = groups["projection"]
            if source in ("exl3", "dense", "mlx", "stacked"):
                projection = PROJECTIONS[projection]
            tensors = layer.names.setdefault((expert, projection), {})
            other = tensors.setdefault(groups["tensor"] or "weight", name)
            if other != name:
                raise ValueError(f"{checkpoint.path}: {other} and {name} are names of the same; there must be one")
    layers = {}
    for number, kinds in found.items():
        known = [
            kind
            for (source, _), kind in kinds.items()
            if any(tensor in names for names in kind.names.values() for tensor in _TELLING[source])
        ]
        known = [kind for kind in known if not _MTP.search(kind.block)] or known
        blocks = sorted({kind.block for kind in known})
        if len(blocks) > 1:
            raise ValueError(
                f"{checkpoint.path}: layer {number} has experts in {' and in '.join(blocks)}; name one by its prefix"
            )
        if any(kind.source == "mlx" for kind in known):  # whose weights have the names of stacked ones
            known = [kind for kind in known if kind.source != "stacked"]
        if len(known) > 1:
            raise ValueError(
                f"{checkpoint.path}: layer {number} has experts of {' and '.join(k.source for k in known)}"
            )
        if known:
            layers[number] = known[0]
            known[0].shared = shared.get(known[0].block, {})
    if not layers:
        of = f" whose names begin with {prefix!r}" if prefix else ""
        raise ValueError(f"{checkpoint.path}: no experts are found among {len(names)} tensors{of}")
    return layers


def _cat_bias(gate: Tensor | None, up: Tensor | None) -> Tensor | None:
    if (gate is None) != (up is None):
        raise ValueError("one of gate and up has a bias; both must have one or neither")
    return None if gate is None else torch.cat([gate, up], -1)


def _text_config(config: dict) -> dict:
    """Of a model of text and images the part about text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _size(config: dict, kind: str, stored: int) -> int:
    """A size of the model, which is stored rounded up to a multiple of 128; as stored where the config has none fit."""
    keys = ("hidden_size",) if kind == "hidden" else ("moe_intermediate_size", "intermediate_size")
    for key in keys:
        size = _text_config(config).get(key)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0 and round_up(size, BLOCK) == stored:
            return size
    return stored
