"""Readers of checkpoints, on files that the safetensors package wrote under the names that published ones have."""

import json
import os
from pathlib import Path

import metal_moe
import mlx.core as mx
import pytest
import torch
from metal_moe.formats import Checkpoint, ExpertReader, QuantizedExperts
from mlx_tensors import mlx_quantize, to_mlx, torch_to_mlx
from safetensors.torch import save_file
from test_formats_mxfp4 import gpt_oss
from test_formats_trellis import exl3_linear


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2, config: dict | None = None) -> None:
    """Tensors spread over files with an index, as published checkpoints are, neighbours in different files."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        some = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        save_file(some, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def others(layer: int) -> dict[str, torch.Tensor]:
    """What a layer has beside its experts."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.mlp.gate.weight": torch.randn(4, 128),
        f"{prefix}.input_layernorm.weight": torch.ones(128),
        f"{prefix}.self_attn.q_proj.weight": torch.randn(128, 128),
    }


def exl3_checkpoint(names: dict[str, str], block: str, bits: dict[str, float], sizes=(256, 128), experts=3) -> dict:
    """`sizes` are those that are stored: hidden, intermediate. One set of tensors per expert and projection."""
    hidden, intermediate = sizes
    tensors = {}
    for layer in (1, 2):
        tensors |= others(layer)
        for expert in range(experts):
            for seed, projection in enumerate(("gate", "up", "down")):
                shape = (intermediate, hidden) if projection == "down" else (hidden, intermediate)
                linear = exl3_linear(*shape, bits[projection], seed=100 * layer + 10 * expert + seed)
                name = f"model.layers.{layer}.{block}.experts.{expert}.{names[projection]}"
                tensors |= {f"{name}.{key}": tensor for key, tensor in linear.items()}
    return tensors


QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.mark.parametrize(("names", "block"), [(QWEN, "mlp"), (MIXTRAL, "block_sparse_moe")])
def test_exl3(names, block, tmp_path):
    tensors = exl3_checkpoint(names, block, {"gate": 6, "up": 2, "down": 3})
    save_sharded(tmp_path, tensors, 3, {"hidden_size": 256, "moe_intermediate_size": 128, "model_type": "qwen3_moe"})
    with ExpertReader(tmp_path) as reader:
        assert reader.layers == [1, 2]
        assert reader.source(1) == "exl3"
        experts = reader.read(2)
    assert experts.block == f"model.layers.2.{block}."
    assert (experts.w1.shape, experts.w2.shape) == ((3, 256, 256), (3, 256, 128))
    assert [part.settings[0].bits for part in experts.w1.gate_up()] == [6, 2]
    assert experts.w2.parts["weight"].settings[0].bits == 3
    assert not experts.interleaved and experts.routing_scale == 1
    for expert in range(3):
        dense = []
        for projection in ("gate", "up", "down"):
            prefix = f"model.layers.2.{block}.experts.{expert}.{names[projection]}."
            linear = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            dense.append(QuantizedExperts.from_exl3([linear]).dequantize()[0])
        assert torch.equal(experts.w1.dequantize(experts=[expert])[0], torch.cat(dense[:2]))
        assert torch.equal(experts.w2.dequantize(experts=[expert])[0], dense[2])


def test_exl3_of_padded_sizes(tmp_path):
    """gpt-oss has 2880, stored as 2944; here 200 and 120, as 256 and 128, and a bias per expert."""
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 4, "up": 4, "down": 4})
    for name in [name for name in tensors if name.endswith(".svh")]:
        tensors[name.replace(".svh", ".bias")] = torch.randn(tensors[name].shape).half()
    save_sharded(tmp_path, tensors, 2, {"hidden_size": 200, "intermediate_size": 120})
    experts = ExpertReader(tmp_path).read(1)
    assert (experts.w1.shape, experts.w2.shape) == ((3, 240, 200), (3, 200, 120))
    up_bias = tensors["model.layers.1.mlp.experts.2.up_proj.bias"]
    assert torch.equal(experts.w1.bias[2, 120:], up_bias[:120])
    assert experts.w2.bias.shape == (3, 200)


def test_exl3_experts_of_different_bits(tmp_path):
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 3, "up": 3, "down": 3})
    name = "model.layers.1.mlp.experts.1.down_proj"
    tensors |= {f"{name}.{key}": tensor for key, tensor in exl3_linear(128, 256, 5).items()}
    save_sharded(tmp_path, tensors)
    experts = ExpertReader(tmp_path).read(1)
    assert [settings.bits for settings in experts.w2.parts["weight"].settings] == [3, 5, 3]


def test_exl3_models_that_divide_up(tmp_path):
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 2, "up": 2, "down": 2}, experts=1)
    save_sharded(tmp_path, tensors, 1, {"text_config": {"model_type": "mistral4"}})
    assert ExpertReader(tmp_path).read(1).routing_scale == 128


def mlx_checkpoint(block: str, mode: str, group: int, bits: dict[str, int], bias: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = others(0)
    for projection, shape in (("gate_proj", (64, 128)), ("up_proj", (64, 128)), ("down_proj", (128, 64))):
        weights = to_mlx(torch.randn(4, *shape, generator=generator).numpy(), "bfloat16")
        parts = mlx_quantize(weights, group, bits[projection], mode)
        name = f"model.layers.0.{block}.{projection}"
        tensors |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=False))
        if bias:
            tensors[f"{name}.bias"] = torch.randn(4, shape[0], generator=generator).bfloat16()
    return tensors


def test_mlx_with_bits_by_module(tmp_path):
    bits = {"gate_proj": 6, "up_proj": 2, "down_proj": 3}
    tensors = mlx_checkpoint("mlp.switch_mlp", "affine", 32, bits, bias=False)
    own = {f"model.layers.0.mlp.switch_mlp.{name}": {"group_size": 32, "bits": b} for name, b in bits.items()}
    save_sharded(tmp_path, tensors, 2, {"quantization": {"group_size": 64, "bits": 4, **own}})
    with ExpertReader(tmp_path) as reader:
        assert reader.layers == [0] and reader.source(0) == "mlx"
        experts = reader.read(0)
    assert (experts.w1.shape, experts.w2.shape) == ((4, 128, 128), (4, 128, 64))
    expected = []
    for projection in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.switch_mlp.{projection}"
        parts = [tensors[f"{name}.{key}"] for key in ("weight", "scales", "biases")]
        expected.append(QuantizedExperts.from_mlx(*parts, group_size=32, bits=bits[projection]).dequantize())
    assert torch.equal(experts.w1.dequantize(), torch.cat(expected[:2], 1))
    assert torch.equal(experts.w2.dequantize(), expected[2])


def test_mlx_gpt_oss(tmp_path):
    tensors = mlx_checkpoint("mlp.experts", "mxfp4", 32, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4), True)
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    save_sharded(tmp_path, tensors, 2, config)
    experts = ExpertReader(tmp_path).read(0)
    assert experts.w1.parts["gate"].settings[0].format == "mxfp4"
    assert not experts.interleaved, "mlx-lm has taken the rows apart"
    gate, up = (tensors[f"model.layers.0.mlp.experts.{name}.bias"] for name in ("gate_proj", "up_proj"))
    assert torch.equal(experts.w1.bias, torch.cat([gate, up], 1))


def gpt_oss_checkpoint() -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        tensors |= {f"{prefix}.router.weight": torch.randn(4, 96), f"{prefix}.router.bias": torch.randn(4)}
        for projection, shape in (("gate_up_proj", (128, 96)), ("down_proj", (96, 64))):
            blocks, scales, bias = gpt_oss(4, *shape, seed=layer)
            for key, tensor in (("blocks", blocks), ("scales", scales), ("bias", bias)):
                tensors[f"{prefix}.experts.{projection}_{key}"] = tensor
    return tensors


def test_gpt_oss(tmp_path):
    tensors = gpt_oss_checkpoint()
    save_sharded(tmp_path, tensors, 2, {"model_type": "gpt_oss", "hidden_size": 96, "intermediate_size": 64})
    with ExpertReader(tmp_path) as reader:
        layers = list(reader)
    assert [experts.layer for experts in layers] == [0, 1]
    for experts in layers:
        prefix = f"model.layers.{experts.layer}.mlp.experts"
        assert experts.source == "gpt-oss" and experts.interleaved
        assert (experts.w1.shape, experts.w2.shape) == ((4, 128, 96), (4, 96, 64))
        for weights, projection in ((experts.w1, "gate_up_proj"), (experts.w2, "down_proj")):
            parts = [tensors[f"{prefix}.{projection}_{key}"] for key in ("blocks", "scales")]
            assert torch.equal(weights.dequantize(), QuantizedExperts.from_mxfp4(*parts).dequantize())
            assert torch.equal(weights.bias, tensors[f"{prefix}.{projection}_bias"])


def test_stacked_tensors_stay_in_the_mapped_file(tmp_path):
    save_sharded(tmp_path, gpt_oss_checkpoint(), 1)
    with ExpertReader(tmp_path) as reader:
        codes = reader.read(0).w1.parts["weight"].codes
        mapped = reader.checkpoint.get("model.layers.0.mlp.experts.gate_up_proj_blocks")
        assert codes.data_ptr() == mapped.data_ptr()
    assert int(codes.sum()) > 0, "and stay valid when the reader is closed"


def test_a_single_file_and_a_folder_without_an_index(tmp_path):
    tensors = gpt_oss_checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    assert ExpertReader(tmp_path).layers == [0, 1]
    assert ExpertReader(tmp_path / "model.safetensors").layers == [0, 1]
    save_file({"model.layers.0.mlp.router.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="router.weight stands in model.safetensors and in other.safetensors"):
        ExpertReader(tmp_path)


@pytest.mark.parametrize(("names", "block"), [(QWEN, "mlp"), (MIXTRAL, "block_sparse_moe")])
def test_dense(names, block, tmp_path):
    tensors = {}
    for expert in range(3):
        for projection, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
            name = f"model.layers.4.{block}.experts.{expert}.{names[projection]}.weight"
            tensors[name] = torch.randn(shape).bfloat16()
    save_sharded(tmp_path, tensors)
    experts = ExpertReader(tmp_path).read(4)
    assert experts.source == "dense"
    for expert in range(3):
        gate, up, down = (tensors[f"model.layers.4.{block}.experts.{expert}.{n}.weight"] for n in names.values())
        assert torch.equal(experts.w1[expert], torch.cat([gate, up]))
        assert torch.equal(experts.w2[expert], down)


def test_dense_experts_with_biases(tmp_path):
    tensors = {}
    for expert in range(2):
        for projection, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
            name = f"model.layers.4.mlp.experts.{expert}.{projection}"
            tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    save_sharded(tmp_path, tensors)
    experts = ExpertReader(tmp_path).read(4)
    of_1 = {name: tensors[f"model.layers.4.mlp.experts.1.{name}_proj.bias"] for name in ("gate", "up", "down")}
    assert torch.equal(experts.w1_bias[1], torch.cat([of_1["gate"], of_1["up"]]))
    assert torch.equal(experts.w2_bias[1], of_1["down"])


# -------------------------------------------------------------------------------------------------- dense and stacked

STACKED = "model.layers.0.mlp.experts."
# E, H, I: I and H in the ratios in which shapes alone could be taken for one another.
SIZES = [(3, 64, 32), (3, 32, 32), (3, 32, 64), (2, 32, 16)]


def fused_checkpoint(sizes: tuple, transposed: bool, bias: bool = True) -> dict[str, torch.Tensor]:
    """gate_up_proj and down_proj as transformers stacks them, as [E, 2I, H] or (gpt-oss, Llama 4) [E, H, 2I]."""
    experts, hidden, intermediate = sizes
    generator = torch.Generator().manual_seed(3)
    w1 = torch.randn(experts, 2 * intermediate, hidden, generator=generator).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate, generator=generator).bfloat16()
    tensors = {STACKED + "gate_up_proj": w1.mT.contiguous() if transposed else w1}
    tensors[STACKED + "down_proj"] = w2.mT.contiguous() if transposed else w2
    if bias:
        tensors[STACKED + "gate_up_proj_bias"] = torch.randn(w1.shape[:2], generator=generator).bfloat16()
        tensors[STACKED + "down_proj_bias"] = torch.randn(w2.shape[:2], generator=generator).bfloat16()
    return {**tensors, "model.layers.0.mlp.router.weight": torch.randn(experts, hidden)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("model", "transposed"), [("gpt_oss", True), ("llama4_text", True), ("qwen3_moe", False)])
def test_stacked_dense(sizes, model, transposed, tmp_path):
    bias = model == "gpt_oss"
    tensors = fused_checkpoint(sizes, transposed, bias)
    save_sharded(tmp_path, tensors, 3, {"text_config": {"model_type": model}})
    with ExpertReader(tmp_path) as reader:
        experts = reader.read(0)
    assert experts.source == "stacked" and experts.interleaved == (model == "gpt_oss")
    w1, w2 = tensors[STACKED + "gate_up_proj"], tensors[STACKED + "down_proj"]
    assert torch.equal(experts.w1, w1.mT if transposed else w1) and experts.w1.is_contiguous()
    assert torch.equal(experts.w2, w2.mT if transposed else w2) and experts.w2.is_contiguous()
    assert (experts.w1_bias is not None) == (experts.w2_bias is not None) == bias
    if bias:
        assert torch.equal(experts.w1_bias, tensors[STACKED + "gate_up_proj_bias"])
        assert torch.equal(experts.w2_bias, tensors[STACKED + "down_proj_bias"])


def test_stacked_dense_stays_in_the_mapped_file(tmp_path):
    save_sharded(tmp_path, fused_checkpoint((3, 64, 32), False, False), 1)
    with ExpertReader(tmp_path) as reader:
        experts = reader.read(0)
        for weights, name in ((experts.w1, "gate_up_proj"), (experts.w2, "down_proj")):
            assert weights.data_ptr() == reader.checkpoint.get(STACKED + name).data_ptr()


@pytest.mark.parametrize(("block", "suffix"), [("experts", ""), ("experts", ".weight"), ("switch_mlp", ".weight")])
def test_stacked_dense_with_gate_and_up_apart(block, suffix, tmp_path):
    shapes = {"gate_proj": (3, 32, 64), "up_proj": (3, 32, 64), "down_proj": (3, 64, 32)}
    name = f"model.layers.0.mlp.{block}."
    tensors = {f"{name}{projection}{suffix}": torch.randn(shape) for projection, shape in shapes.items()}
    save_sharded(tmp_path, tensors)
    experts = ExpertReader(tmp_path).read(0)
    gate, up, down = tensors.values()
    assert torch.equal(experts.w1, torch.cat([gate, up], 1)) and torch.equal(experts.w2, down)
    assert experts.source == "stacked" and not experts.interleaved


WRONG_STACKED = {
    "sizes that do not fit": (
        lambda t: {**t, STACKED + "down_proj": torch.zeros(3, 48, 64).bfloat16()},
        r"gate_up_proj and down_proj are \[3, 64, 64\] and \[3, 48, 64\]; they must be",
    ),
    "one of them transposed": (
        lambda t: {**t, STACKED + "gate_up_proj": torch.zeros(3, 64, 32).bfloat16()},
        r"gate_up_proj and down_proj are \[3, 64, 32\] and \[3, 32, 64\]; they must be",
    ),
    "two dimensions": (
        lambda t: {**t, STACKED + "down_proj": torch.zeros(32, 64)},
        r"has shape \(32, 64\); it must be",
    ),
    "other numbers of experts": (
        lambda t: {**t, STACKED + "down_proj": torch.zeros(2, 32, 64).bfloat16()},
        r"has shape \(2, 32, 64\); it must be \[3, any, any\]",
    ),
    "integers": (
        lambda t: {**t, STACKED + "gate_up_proj": torch.zeros(3, 64, 64).int()},
        "weight is int32; it must be",
    ),
    "two types": (lambda t: {**t, STACKED + "down_proj": torch.zeros(3, 32, 64)}, "float32; it must be bfloat16"),
    "no down": (lambda t: without(t, STACKED + "down_proj"), "a tensor is missing: .*down, weight"),
    "gate beside gate_up": (
        lambda t: {**t, STACKED + "gate_proj": torch.zeros(3, 32, 64)},
        "there are gate_up_proj and gate_proj",
    ),
    "a bias of another shape": (
        lambda t: {**t, STACKED + "gate_up_proj_bias": torch.zeros(3, 64).bfloat16()[:2].clone()},
        r"w1_bias has shape \(2, 64\); it must be \[3, 64\]",
    ),
    "a bias of another type": (
        lambda t: {**t, STACKED + "down_proj_bias": torch.zeros(3, 64)},
        "w2_bias is float32; it must be bfloat16",
    ),
    "no experts at all": (
        lambda t: {
            **t,
            STACKED + "gate_up_proj": torch.zeros(0, 64, 64),
            STACKED + "down_proj": torch.zeros(0, 32, 64),
        },
        r"the tensors have no experts, \[0, 64, 64\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_STACKED)
def test_stacked_checkpoints_that_are_wrong(case, tmp_path):
    change, message = WRONG_STACKED[case]
    config = {"model_type": "gpt_oss"}
    save_sharded(tmp_path, change(fused_checkpoint((3, 64, 32), True)), config=config)
    with pytest.raises(ValueError, match=message) as error:
        ExpertReader(tmp_path).read(0)
    assert str(tmp_path) in str(error.value)


def test_stacked_rows_of_unknown_order_are_refused(tmp_path):
    """Biases say gpt-oss, whose rows of gate and up alternate; but that stands in config.json."""
    save_sharded(tmp_path, fused_checkpoint((3, 64, 32), True))
    with pytest.raises(ValueError, match="config.json names no model_type"):
        ExpertReader(tmp_path).read(0)


# ------------------------------------------------------------------------------------------------------ shared experts


def shared_tensors(kind: str, prefix: str, hidden: int = 128, intermediate: int = 128) -> dict[str, torch.Tensor]:
    """The MLP beside the experts, as EXL3's, MLX's and dense checkpoints hold it."""
    tensors = {}
    for seed, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
        rows, columns = (hidden, intermediate) if projection == "down_proj" else (intermediate, hidden)
        if kind == "exl3":
            linear = exl3_linear(columns, rows, 4, seed=seed)
        elif kind == "mlx":
            generator = torch.Generator().manual_seed(seed)
            parts = mlx_quantize(
                to_mlx(torch.randn(rows, columns, generator=generator).numpy(), "bfloat16"), 64, 4, "affine"
            )
            linear = dict(zip(("weight", "scales", "biases"), parts, strict=True))
        else:
            linear = {"weight": torch.randn(rows, columns).bfloat16()}
        tensors |= {f"{prefix}{projection}.{key}": tensor for key, tensor in linear.items()}
    return tensors


def one(weights) -> torch.Tensor:
    return weights.dequantize() if isinstance(weights, QuantizedExperts) else weights


@pytest.mark.parametrize("kind", ["exl3", "mlx", "dense"])
@pytest.mark.parametrize("name", ["shared_experts", "shared_expert"])
def test_shared_experts(kind, name, tmp_path):
    prefix = f"model.layers.1.mlp.{name}."
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 4, "up": 4, "down": 4}, (128, 128), 2)
    tensors |= shared_tensors(kind, prefix)
    gate = torch.randn(1, 128).bfloat16()
    if name == "shared_expert":
        tensors["model.layers.1.mlp.shared_expert_gate.weight"] = gate
    save_sharded(tmp_path, tensors, 2, {"quantization": {"group_size": 64, "bits": 4}})
    with ExpertReader(tmp_path) as reader:
        experts, without_shared = reader.read(1), reader.read(2)
    assert without_shared.shared_w1 is None and without_shared.shared_w2 is None
    expected = []
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(prefix + projection)}
        if kind == "exl3":
            expected.append(QuantizedExperts.from_exl3([linear]).dequantize())
        elif kind == "mlx":
            expected.append(QuantizedExperts.from_mlx(*(t[None] for t in linear.values())).dequantize())
        else:
            expected.append(linear["weight"][None])
    assert torch.equal(one(experts.shared_w1), torch.cat(expected[:2], 1))
    assert torch.equal(one(experts.shared_w2), expected[2])
    if name == "shared_expert":
        assert torch.equal(experts.shared_gate, gate)
    else:
        assert experts.shared_gate is None


def test_exl3_shared_experts_of_a_hidden_size_that_is_rounded_up(tmp_path):
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 4, "up": 4, "down": 4}, (256, 128), 2)
    shared = shared_tensors("exl3", "", 256, 128)
    tensors |= {SHARED + name: tensor for name, tensor in shared.items()}
    save_sharded(tmp_path, tensors, 2, {"hidden_size": 200})
    with ExpertReader(tmp_path) as reader:
        experts = reader.read(1)
    assert experts.w1.shape[2] == experts.w2.shape[1] == 200
    linears = {
        p: {k.removeprefix(p + "_proj."): t for k, t in shared.items() if k.startswith(p)} for p in ("gate", "up")
    }
    expected = torch.cat([QuantizedExperts.from_exl3([linears[p]]).dequantize() for p in linears], 1)
    assert torch.equal(one(experts.shared_w1), expected[..., :200])
    down = {k.removeprefix("down_proj."): t for k, t in shared.items() if k.startswith("down")}
    assert torch.equal(one(experts.shared_w2), QuantizedExperts.from_exl3([down]).dequantize()[:, :200])


SHARED = "model.layers.1.mlp.shared_experts."
WRONG_SHARED = {
    "a projection missing": (lambda t: without(t, SHARED + "up_proj.weight"), "a tensor is missing: .*up_proj"),
    "kinds that differ": (
        lambda t: {**t, SHARED + "up_proj.scales": torch.zeros(128, 2)},
        "gate, up and down are dense and mlx",
    ),
    "sizes that differ": (
        lambda t: {**t, SHARED + "up_proj.weight": torch.zeros(64, 128).bfloat16()},
        r"gate, up and down are \[\(128, 128\), \(64, 128\), \(128, 128\)\]",
    ),
    "another hidden size": (
        lambda t: {**t, **shared_tensors("dense", SHARED, 96, 128)},
        "shared experts have a hidden size of 96; it must be 128",
    ),
    "three dimensions": (
        lambda t: {**t, SHARED + "gate_proj.weight": torch.zeros(1, 128, 128).bfloat16()},
        r"weight has shape \(1, 128, 128\)",
    ),
    "a bias": (lambda t: {**t, SHARED + "up_proj.bias": torch.zeros(128)}, "with a bias are not read"),
    "a gate of another shape": (
        lambda t: {**t, "model.layers.1.mlp.shared_expert_gate.weight": torch.zeros(2, 128)},
        r"is torch.float32 \[2, 128\]; it must be float \[1, 128\]",
    ),
    "metal-moe's beside dense ones": (
        lambda t: {**t, **own_shared()},
        "there are w1 or w2 and down_proj; they must be of one kind",
    ),
    "metal-moe's without w2": (
        lambda t: only_own_shared(t, lambda name: ".w2." not in name),
        "shared_experts.w2: no tensor 'weight.table' or 'gate.table'",
    ),
    "metal-moe's without codes": (
        lambda t: only_own_shared(t, lambda name: not name.endswith("w1.weight.codes")),
        "shared_experts.w1: the tensor 'weight.codes' is missing",
    ),
    "metal-moe's of sizes that differ": (
        lambda t: only_own_shared(t, columns=64),
        r"w1 \[1, 256, 128\] and w2 \[1, 128, 64\] do not fit; they must be \[N, 2I, H\] and \[N, H, I\]",
    ),
}


def own_shared(columns: int = 128) -> dict[str, torch.Tensor]:
    w1, w2 = (QuantizedExperts.quantize(torch.ones(1, *shape)) for shape in ((256, 128), (128, columns)))
    return {**w1.state_dict(SHARED + "w1."), **w2.state_dict(SHARED + "w2.")}


def only_own_shared(tensors, keep=lambda name: True, columns: int = 128) -> dict[str, torch.Tensor]:
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(SHARED)}
    return others | {name: tensor for name, tensor in own_shared(columns).items() if keep(name)}


@pytest.mark.parametrize("case", WRONG_SHARED)
def test_shared_experts_that_are_wrong(case, tmp_path):
    change, message = WRONG_SHARED[case]
    tensors = exl3_checkpoint(QWEN, "mlp", {"gate": 2, "up": 2, "down": 2}, (128, 128), 1)
    save_sharded(tmp_path, change({**tensors, **shared_tensors("dense", SHARED)}))
    with pytest.raises(ValueError, match=message) as error:
        ExpertReader(tmp_path).read(1)
    assert str(tmp_path) in str(error.value)


def test_what_metal_moe_wrote(tmp_path):
    w1 = QuantizedExperts.quantize(torch.randn(3, 64, 128), bits={"gate": 4, "up": 2}, group_size=64)
    w2 = QuantizedExperts.quantize(torch.randn(3, 128, 32), format="mxfp4", bias=torch.randn(3, 128))
    prefix = "model.layers.7.mlp.experts."
    save_sharded(tmp_path, {**w1.state_dict(prefix + "w1."), **w2.state_dict(prefix + "w2.")}, 2)
    experts = ExpertReader(tmp_path).read(7)
    assert torch.equal(experts.w1.dequantize(), w1.dequantize())
    assert torch.equal(experts.w2.dequantize(), w2.dequantize())
    assert torch.equal(experts.w2.bias, w2.bias)


# ------------------------------------------------------------------------------------------------ files that are wrong


def rewrite_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index = change(index) or index
    path.write_text(index if isinstance(index, str) else json.dumps(index))


BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
INDEXES = {
    "a file elsewhere": (lambda i: i["weight_map"].update({BLOCKS: "../secret.safetensors"}), "beside it"),
    "an absolute path": (lambda i: i["weight_map"].update({BLOCKS: "/etc/passwd.safetensors"}), "beside it"),
    "a folder": (lambda i: i["weight_map"].update({BLOCKS: ".."}), "beside it"),
    "another kind of file": (lambda i: i["weight_map"].update({BLOCKS: "pytorch_model.bin"}), "beside it"),
    "a device": (lambda i: i["weight_map"].update({BLOCKS: "C:x.safetensors"}), "beside it"),
    "no name": (lambda i: i["weight_map"].update({BLOCKS: 3}), "the file of .* is a int; it must be a string"),
    "a list": (lambda i: i.update({"weight_map": []}), "weight_map is a list"),
    "nothing": (lambda i: i.pop("weight_map") and None, "weight_map is a NoneType"),
    "no object": (lambda i: "[1]", "holds a list; it must be an object"),
    "no JSON": (lambda i: "{", "not a valid JSON file"),
    "endless nesting": (lambda i: "[" * 200_000, "not a valid JSON file"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_wrong(case, tmp_path):
    change, message = INDEXES[case]
    folder = tmp_path / "model"
    save_sharded(folder, gpt_oss_checkpoint())
    save_file({BLOCKS: torch.zeros(1)}, tmp_path / "secret.safetensors")
    rewrite_index(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        ExpertReader(folder).read(0)
    assert "model.safetensors.index.json" in str(error.value)


def test_shards_that_are_missing_or_other_ones(tmp_path):
    save_sharded(tmp_path, gpt_oss_checkpoint())
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors: not a valid safetensors file"):
        ExpertReader(tmp_path).read(0)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="says that model.* stands in model-00001.*, which has no such tensor"):
        ExpertReader(tmp_path).read(0)
    first.unlink()
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors: there is no such file"):
        ExpertReader(tmp_path).read(0)


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


EXPERTS = "model.layers.0.mlp.experts."
WRONG_TENSORS = {
    "no scales": (lambda t: without(t, EXPERTS + "down_proj_scales"), "a tensor is missing: .*down_proj, scales"),
    "scales of another shape": (
        lambda t: {**t, EXPERTS + "down_proj_scales": torch.zeros(4, 96, 1).byte()},
        "scales has",
    ),
    "blocks of another type": (lambda t: {**t, BLOCKS: t[BLOCKS].view(torch.int8)}, "blocks is int8; it must be uint8"),
    "blocks in three dimensions": (lambda t: {**t, BLOCKS: t[BLOCKS].flatten(2)}, "blocks has shape"),
    "bias of another shape": (lambda t: {**t, EXPERTS + "down_proj_bias": torch.zeros(4, 95)}, "bias has shape"),
    "bias of another type": (lambda t: {**t, EXPERTS + "down_proj_bias": torch.zeros(4, 96).int()}, "bias is int32"),
    "two kinds of experts": (
        lambda t: {**t, EXPERTS + "0.gate_proj.weight": torch.zeros(2, 2)},
        "layer 0 has experts of gpt-oss and dense",
    ),
    "two blocks of experts": (
        lambda t: {**t, "draft.layers.0.mlp.experts.down_proj_blocks": t[EXPERTS + "down_proj_blocks"].clone()},
        "layer 0 has experts in",
    ),
    "a name without end": (lambda t: {**t, "layers." * 1000: torch.zeros(1)}, "a tensor's name has 7000 characters"),
    "no experts": (lambda t: {"lm_head.weight": torch.zeros(2)}, "no experts are found among 1 tensors"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_gpt_oss_checkpoints_that_are_wrong(case, tmp_path):
    change, message = WRONG_TENSORS[case]
    save_sharded(tmp_path, change(gpt_oss_checkpoint()))
    with pytest.raises(ValueError, match=message) as error:
        ExpertReader(tmp_path).read(0)
    assert str(tmp_path) in str(error.value)


GATE = "model.layers.1.mlp.experts.1.gate_proj."
WRONG_EXL3 = {
    "an expert missing": (lambda t: {k: v for k, v in t.items() if "experts.1." not in k}, "expert 1 is missing, 2 is"),
    "a projection missing": (
        lambda t: {k: v for k, v in t.items() if GATE not in k},
        "a tensor is missing: .*1.gate, tr",
    ),
    "no svh": (lambda t: without(t, GATE + "svh"), r"experts.1.gate_proj.svh is missing"),
    "trellis of another type": (lambda t: {**t, GATE + "trellis": t[GATE + "trellis"].int()}, "trellis is int32"),
    "trellis of another shape": (
        lambda t: {**t, GATE + "trellis": t[GATE + "trellis"][:8].clone()},
        r"experts.1.gate_proj.trellis has \(8, 8\) tiles",
    ),
    "another multiplier": (lambda t: {**t, GATE + "mul1": torch.tensor(1, dtype=torch.int32)}, "mul1 is 0x1"),
    "a bias for one": (lambda t: {**t, GATE + "bias": torch.zeros(128).half()}, "bias is missing"),
}


@pytest.mark.parametrize("case", WRONG_EXL3)
def test_exl3_checkpoints_that_are_wrong(case, tmp_path):
    change, message = WRONG_EXL3[case]
    save_sharded(tmp_path, change(exl3_checkpoint(QWEN, "mlp", {"gate": 2, "up": 2, "down": 2})))
    with pytest.raises(ValueError, match=message) as error:
        ExpertReader(tmp_path).read(1)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json has no quantization"),
        ({"quantization": {"group_size": 64, "bits": [4]}}, r"bits is \[4\]"),
        ({"quantization": {"group_size": 64, "bits": 10**400}}, "bits is 1000"),
        ({"quantization": {"group_size": 64, "bits": "4"}}, "bits is '4'"),
        ({"quantization": {"group_size": 64, "bits": 0}}, "bits is 0"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "group_size is 0"),
        ({"quantization": {"group_size": 32, "bits": 8}}, r"w1 \[4, 128, 64\] and w2 \[4, 128, 32\] do not"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "awq"}}, "mode is 'awq'; it must be one of affine"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": 4}}, "mode is 4"),
    ],
)
def test_mlx_configs_that_are_wrong(config, message, tmp_path):
    bits = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
    save_sharded(tmp_path, mlx_checkpoint("mlp.switch_mlp", "affine", 64, bits, False), 1, config)
    with pytest.raises(ValueError, match=message):
        ExpertReader(tmp_path).read(0)


def test_layers_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors.index.json nor a safetensors file"):
        ExpertReader(tmp_path)
    with pytest.raises(ValueError, match="nowhere: there is no such file or folder"):
        ExpertReader(tmp_path / "nowhere")
    save_sharded(tmp_path, gpt_oss_checkpoint())
    with pytest.raises(ValueError, match="layer 5 has no experts; layers with experts are 0 to 1"):
        ExpertReader(tmp_path).read(5)
    with pytest.raises(ValueError, match="there is no tensor x"):
        Checkpoint(tmp_path).get("x")


def test_a_missing_file_is_no_smaller_model(tmp_path):
    """Without an index names tell how many files there are."""
    tensors = fused_checkpoint((3, 64, 32), False)
    save_sharded(tmp_path, tensors, 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert ExpertReader(tmp_path).layers == [0]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing; model-00001-of-00002"):
        ExpertReader(tmp_path)


def test_several_models_in_one_checkpoint(tmp_path):
    """Blocks of multi-token prediction have layers of their own numbers; other models are told apart by a prefix."""
    tensors = fused_checkpoint((3, 64, 32), False)
    mtp = {name.replace("model.layers", "mtp.layers"): tensor * 2 for name, tensor in tensors.items()}
    save_sharded(tmp_path / "mtp", tensors | mtp, config={"model_type": "gpt_oss"})
    with ExpertReader(tmp_path / "mtp") as reader:
        assert reader.block(0) == "model.layers.0.mlp."
        assert torch.equal(reader.read(0).w1, ExpertReader(tmp_path / "mtp", "model.").read(0).w1)
    talker = {"talker." + name: tensor * 2 for name, tensor in tensors.items()}
    save_sharded(tmp_path / "two", {"thinker." + name: tensor for name, tensor in tensors.items()} | talker)
    with pytest.raises(ValueError, match="layer 0 has experts in talker.*and in thinker.*; name one by its prefix"):
        ExpertReader(tmp_path / "two")
    assert ExpertReader(tmp_path / "two", "talker.").block(0).startswith("talker.")
    with pytest.raises(ValueError, match="no experts are found among 0 tensors whose names begin with 'x'"):
        ExpertReader(tmp_path / "two", "x")


def test_two_names_of_one_tensor_are_refused(tmp_path):
    gate = "model.layers.0.mlp.experts.0.gate_proj.weight"
    tensors = {gate.replace("gate", name): torch.zeros(shape) for name, shape in (("gate", (32, 64)), ("up", (32, 64)))}
    tensors[gate.replace("gate", "down")] = torch.zeros(64, 32)
    save_sharded(tmp_path / "a", tensors | {gate.replace("gate_proj", "w1"): torch.zeros(32, 64)})
    with pytest.raises(ValueError, match="are names of the same; there must be one"):
        ExpertReader(tmp_path / "a")
    shared = {f"model.layers.0.mlp.{s}.gate_proj.weight": torch.zeros(32, 64) for s in ("shared_expert", "shared_mlp")}
    save_sharded(tmp_path / "b", tensors | shared)
    with pytest.raises(ValueError, match="are names of the same; there must be one"):
        ExpertReader(tmp_path / "b")


@pytest.mark.parametrize("length", range(1, 17))
def test_files_that_mlx_wrote(length, tmp_path):
    """Their tensors begin anywhere: `length` shifts them."""
    bits = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
    tensors = mlx_checkpoint("mlp.switch_mlp", "affine", 64, bits, True)
    config = {"quantization": {"group_size": 64, "bits": 4}}
    save_sharded(tmp_path / "aligned", tensors, 1, config)
    (tmp_path / "mlx").mkdir()
    arrays = {name: torch_to_mlx(tensor) for name, tensor in tensors.items()}
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), arrays, {"x" * length: "y"})
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    expected, got = (ExpertReader(tmp_path / name).read(0) for name in ("aligned", "mlx"))
    x, routing = torch.randn(3, 128).bfloat16(), (torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    results = [metal_moe.fused_experts(x, e.w1.aligned(), e.w2.aligned(), *routing) for e in (expected, got)]
    assert torch.equal(*results)


def test_quantisation_by_module_inherits_nothing(tmp_path):
    """As in MLX: what a module's own entry does not say is the default of its mode, not the model's setting."""
    bits = {"gate_proj": 4, "up_proj": 4, "down_proj": 6}
    tensors = mlx_checkpoint("mlp.switch_mlp", "affine", 64, bits, False)
    down = "model.layers.0.mlp.switch_mlp.down_proj"
    config = {"group_size": 64, "bits": None, "mode": None, down: {"bits": 6}}
    save_sharded(tmp_path, tensors, 1, {"quantization": config | {"group_size": None}})
    experts = ExpertReader(tmp_path).read(0)
    assert [s.bits for s in (experts.w1.parts["gate"].settings[0], experts.w2.parts["weight"].settings[0])] == [4, 6]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"])
def test_what_is_no_file(file, tmp_path):
    """A pipe would be waited for."""
    save_sharded(tmp_path, fused_checkpoint((3, 64, 32), False), 1, {"hidden_size": 64})
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}: .*not a regular"):
        ExpertReader(tmp_path).read(0)


def test_a_config_with_a_byte_order_mark(tmp_path):
    save_sharded(tmp_path, fused_checkpoint((3, 64, 32), False), 1)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}), encoding="utf-8-sig")
    assert Checkpoint(tmp_path).config == {"hidden_size": 64}


def test_messages_name_file_and_module(tmp_path):
    bits = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = mlx_checkpoint("mlp.switch_mlp", "affine", 64, bits, False)
    save_sharded(tmp_path, tensors | {f"{name}.scales": torch.zeros(4, 3, 1)}, 1, {"quantization": {"bits": 4}})
    with pytest.raises(ValueError, match=rf"model-00001-of-00001.safetensors: {name}: .*scales has shape \(4, 3, 1\)"):
        ExpertReader(tmp_path).read(0)
