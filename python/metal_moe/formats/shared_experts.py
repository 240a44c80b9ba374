"""The shared experts of a checkpoint's layer: one MLP beside the routed experts, in any of four kinds of tensors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from . import checks
from .checkpoint import Checkpoint
from .modules import mlx_quantization
from .part import make_part
from .quantized_experts import BUFFERS, GATE_UP, QuantizedExperts
from .stacked import one_by_one
from .trellis import TILE, padded_sizes, stack_exl3

_TENSORS = ("weight", "scales", "biases", "trellis", "suh", "svh", "su", "sv", "mul1", "mcg", "bias")
_PATTERN = re.compile(
    r"(?P<block>.*\.)shared_(?:(?:experts?|mlp)\.(?P<projection>gate|up|down)_proj|expert_gate)"
    rf"\.(?P<tensor>{'|'.join(_TENSORS)})"
)
# As `metal-moe quantize` writes them.
_OWN = re.compile(
    rf"(?P<block>.*\.)shared_experts\.(?P<projection>w1|w2)\.(?P<tensor>(?:weight|gate|up)\.(?:{'|'.join(BUFFERS)}))"
)
# Of the names that `find` gives.
GATE_OF_ALL = "shared_expert_gate"


def find(name: str, found: dict[str, dict[str, dict[str, str]]]) -> None:
    """Adds a tensor of a shared expert to `found`: block -> projection or GATE_OF_ALL -> tensor -> name."""
    match = _PATTERN.fullmatch(name) or _OWN.fullmatch(name)
    if match:
        projection = match["projection"] or GATE_OF_ALL
        other = found.setdefault(match["block"], {}).setdefault(projection, {}).setdefault(match["tensor"], name)
        if other != name:
            raise ValueError(f"{other} and {name} are names of the same; there must be one")


def read(block: str, names: dict[str, dict[str, str]], checkpoint: Checkpoint, hidden: int) -> dict:
    """`shared_w1`, `shared_w2`, `shared_gate` of LayerExperts; ValueError where tensors are missing or do not fit.

    Args:
        hidden: the layer's hidden size, which exl3 stores rounded up.
    """
    where = block + "shared_expert"
    own = "w1" in names or "w2" in names
    made = _own(where, names, checkpoint) if own else _of_projections(where, names, checkpoint, hidden)
    gate, down = made["shared_w1"].shape, made["shared_w2"].shape
    if gate[0] != down[0] or gate[1] != 2 * down[2] or gate[2] != down[1]:
        raise ValueError(
            f"{where}s: w1 {list(gate)} and w2 {list(down)} do not fit; they must be [N, 2I, H] and [N, H, I]"
        )
    if GATE_OF_ALL in names:
        made["shared_gate"] = _gate(names[GATE_OF_ALL], gate[2], checkpoint)
    return made


def _of_projections(where: str, names: dict, checkpoint: Checkpoint, hidden: int) -> dict:
    for projection in ("gate", "up", "down"):
        if not names.get(projection):
            raise ValueError(f"a tensor is missing: {where}s.{projection}_proj")
        if "bias" in names[projection]:
            raise ValueError(f"{names[projection]['bias']}: shared experts with a bias are not read")
    kinds = {_kind(names[projection]) for projection in ("gate", "up", "down")}
    if len(kinds) > 1:
        raise ValueError(f"{where}s: gate, up and down are {' and '.join(sorted(kinds))}; they must be of one kind")
    if "exl3" in kinds:
        return _exl3(where, names, checkpoint, hidden)
    return {"mlx": _mlx, "dense": _dense}[kinds.pop()](where, names, checkpoint)


def _own(where: str, names: dict, checkpoint: Checkpoint) -> dict:
    others = sorted(name for name in names if name not in ("w1", "w2", GATE_OF_ALL))
    if others:
        raise ValueError(f"{where}s: there are w1 or w2 and {others[0]}_proj; they must be of one kind")
    made = {}
    for target in ("w1", "w2"):
        state = {tensor: checkpoint.get(name) for tensor, name in names.get(target, {}).items()}
        with checks.within(f"{where}s.{target}"):
            made[f"shared_{target}"] = QuantizedExperts.from_state_dict(state)
    return made


def _kind(tensors: dict[str, str]) -> str:
    return "exl3" if "trellis" in tensors else "mlx" if "scales" in tensors else "dense"


def _exl3(where: str, names: dict, checkpoint: Checkpoint, hidden: int) -> dict:
    """The intermediate size is what is stored: what was rounded up adds nothing to the layer's result."""
    parts = {}
    for projection in ("gate", "up", "down"):
        linear = {tensor: checkpoint.get(name) for tensor, name in names[projection].items()}
        what = names[projection]["trellis"].removesuffix(".trellis")
        checks.tensor(what, "trellis", linear["trellis"], (torch.int16,), (None, None, None))
        columns, rows = (TILE * n for n in linear["trellis"].shape[:2])
        if projection == "down":
            rows = hidden if padded_sizes(hidden, 1)[0] == rows else rows
        else:
            columns = hidden if padded_sizes(1, hidden)[1] == columns else columns
        stacks, _ = stack_exl3(where, [linear], (rows, columns), [what])
        parts[projection] = make_part(stacks)
    pair = {name: parts[name] for name in GATE_UP}
    return {"shared_w1": QuantizedExperts(pair), "shared_w2": QuantizedExperts({"weight": parts["down"]})}


def _from_mlx(tensors: dict[str, str], checkpoint: Checkpoint) -> QuantizedExperts:
    if "weight" not in tensors:
        raise ValueError(f"a tensor is missing: weight beside {tensors['scales']}")
    module = tensors["weight"].removesuffix(".weight")
    with checks.within(f"{checkpoint.where(tensors['weight'])}: {module}"):
        how = mlx_quantization(checkpoint.config, module)
        loaded = {
            tensor: checkpoint.get(tensors[tensor])[None]
            for tensor in ("weight", "scales", "biases")
            if tensor in tensors
        }
        return QuantizedExperts.from_mlx(**loaded, **how)


def _mlx(where: str, names: dict, checkpoint: Checkpoint) -> dict:
    gate, up, down = (_from_mlx(names[projection], checkpoint) for projection in ("gate", "up", "down"))
    pair = {"gate": gate.parts["weight"], "up": up.parts["weight"]}
    return {"shared_w1": QuantizedExperts(pair), "shared_w2": down}


def _dense(where: str, names: dict, checkpoint: Checkpoint) -> dict:
    weights = []
    for projection in ("gate", "up", "down"):
        if "weight" not in names[projection]:
            raise ValueError(f"a tensor is missing: {where}s.{projection}_proj.weight")
        weights.append([checkpoint.get(names[projection]["weight"])])
    made = one_by_one(where + "s", *weights)
    return {"shared_w1": made["w1"], "shared_w2": made["w2"]}


def _gate(tensors: dict[str, str], hidden: int, checkpoint: Checkpoint) -> Tensor:
    if _kind(tensors) == "mlx":
        gate = _from_mlx(tensors, checkpoint).dequantize()[0]
    elif "weight" in tensors:
        gate = checkpoint.get(tensors["weight"])
    else:
        raise ValueError(f"a tensor is missing: weight beside {next(iter(tensors.values()))}")
    if (
        tuple(gate.shape) != (1, hidden)
        or not gate.is_floating_point()
        or gate.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ):
        raise ValueError(
            f"{next(iter(tensors.values()))} is {gate.dtype} {list(gate.shape)}; it must be float [1, {hidden}]"
        )
    return gate
