"""Which kernels run: selection, families by name, and how many dispatches and commits a layer takes."""

import metal_moe
import pytest
import torch
from cases import COMMITS, DTYPES, ENGINES, FAMILIES, PRECISIONS, TOKEN_EDGES, default_family, dispatches, make_layer


def route_options(tokens, experts):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("use_fp32_acc", [False, True])
@pytest.mark.parametrize(
    ("batch", "family", "tile_n"),
    [
        (1, "moe_decode", 64),
        (2, "moe_prefill4", 64),
        (4, "moe_prefill4", 64),
        (16, "moe_prefill4", 64),
        (17, "moe_base", 64),
        (32, "moe_base", 64),
        (33, "moe_large_batch", 128),
        (128, "moe_large_batch", 128),
        (100_000, "moe_large_batch", 128),
    ],
)
def test_selection_table(batch, family, tile_n, use_fp32_acc):
    name = family + ("_fp32acc" if use_fp32_acc else "")
    for bits in (None, 16, 32):
        assert metal_moe.select_moe_kernel(batch, use_fp32_acc, bits, bits, bits) == (name, tile_n)
    assert metal_moe.select_moe_kernel(batch, use_fp32_acc) == (name, tile_n)


@pytest.mark.parametrize("bits", [0, 9, 15, 17, 64, -16, -1])
@pytest.mark.parametrize("argument", ["gate_bits", "up_bits", "down_bits"])
def test_selection_rejects_bits_without_kernels(argument, bits):
    with pytest.raises(ValueError, match=f"{argument}.*{bits}|{bits}.*{argument}"):
        metal_moe.select_moe_kernel(4, True, **{argument: bits})


@pytest.mark.parametrize("engine", ENGINES)
def test_every_selectable_name_exists(use_engine, engine):
    """For every batch size: the family has kernels for every dtype and stage, compiled into the library."""
    use_engine(engine)
    table = metal_moe.kernels()
    have = {(k["family"], k["stage"], k["dtype"], k["accumulation"]) for k in table}
    for batch in range(1, 200):
        for use_fp32_acc in (False, True):
            name, tile_n = metal_moe.select_moe_kernel(batch, use_fp32_acc)
            family = name.removesuffix("_fp32acc")
            for stage in ("gate_up", "up", "down"):
                for dtype in DTYPES if use_fp32_acc else ["fp16"]:
                    assert (family, stage, dtype, "fp32" if use_fp32_acc else "fp16") in have
                    assert any(k["tile_n"] == tile_n for k in table if (k["family"], k["stage"]) == (family, stage))


@pytest.mark.parametrize("engine", ENGINES)
def test_kernel_table(use_engine, engine):
    use_engine(engine)
    table = metal_moe.kernels()
    names = [k["name"] for k in table]
    assert len(names) == len(set(names))
    assert {"route", "group", "pad_groups", "gather_experts"} <= set(names)
    assert {f"combine_{dtype}" for dtype in DTYPES} <= set(names)
    for dtype, acc in PRECISIONS:
        accumulation = "_fp32acc" if acc else ""
        for family, tiles in {
            "decode": [""],
            "prefill4": [""],
            "base": [""],
            "large_batch": ["_m16", "_m32"],
            "simd": ["_m8", "_m16", "_m32"],
        }.items():
            for tile in tiles:
                for stage in ("gate_up", "up", "down"):
                    assert f"{stage}_{family}{accumulation}{tile}_{dtype}" in names
                    if acc and family != "simd" and tile != "_m32":
                        assert f"{stage}_quantized_{family}{accumulation}{tile}_{dtype}" in names


def test_engines_have_the_same_kernels(use_engine):
    tables = []
    for engine in ENGINES:
        use_engine(engine)
        tables.append(metal_moe.kernels())
    assert all(table == tables[0] for table in tables)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [t for t in TOKEN_EDGES if t] + [4, 5, 128, 300])
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_family_and_count_by_tokens(use_engine, engine, tokens, dtype, acc):
    """The published table, except where an engine has one of its own that was measured."""
    use_engine(engine)
    hidden, intermediate = (64, 48) if engine == "native" else (8, 8)
    layer = make_layer(tokens, hidden, intermediate, 8, 2, DTYPES[dtype], use_fp32_acc=acc)
    layer.run()
    ran = metal_moe.last_dispatch()
    family = default_family(tokens, engine)
    of_same_family = {"moe_decode": 1, "moe_prefill4": 2, "moe_base": 17, "moe_large_batch": 33}[family]
    name, tile_n = metal_moe.select_moe_kernel(of_same_family, acc)
    assert name.removesuffix("_fp32acc") == family
    assert (ran["family"], ran["tile_n"], ran["engine"]) == (name, tile_n, engine)
    assert ran["commits"] == COMMITS.get(ran["engine"], 1)
    assert ran["dispatches"] == len(ran["kernels"]) == dispatches(engine, ran["family"], 2 * tokens, ran["row_tile"])
    check_stages(ran["kernels"], ran, dtype, acc)


def check_stages(kernels, ran, dtype, acc):
    """Decode is gate_up, down; the grouped families are group, where it runs, gate_up, down, combine; of the right
    type."""
    table = {k["name"]: k for k in metal_moe.kernels()}
    expert_kernels = [table[name] for name in kernels if table[name]["stage"] in ("gate_up", "up", "down")]
    assert len(expert_kernels) == 2
    for kernel in expert_kernels:
        assert kernel["family"] + ("_fp32acc" if acc else "") == ran["family"]
        assert (kernel["dtype"], kernel["accumulation"]) == (dtype, "fp32" if acc else "fp16")
        assert kernel["tile_n"] == ran["tile_n"]
        if kernel["family"] == "moe_prefill4":  # the kernel's rows in registers; a tile may have more
            assert ran["row_tile"] == (64 if ran["engine"] == "native" else kernel["row_tile"])
        else:
            assert kernel["row_tile"] == ran["row_tile"]
    if len(kernels) > 2:
        assert kernels[-1] == f"combine_{dtype}"
    if len(kernels) > 3:
        assert kernels[0] == "group"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("acc", [False, True])
def test_forced_family(use_engine, engine, family, acc):
    """`kernel=` runs that family at any number of tokens, by its name with or without `_fp32acc`."""
    use_engine(engine)
    for tokens in (1, 3) if engine == "exact" else (1, 3, 20, 65):
        layer = make_layer(tokens, 16, 8, 3, 2, torch.float16, use_fp32_acc=acc)
        layer.run(kernel=family)
        ran = metal_moe.last_dispatch()
        assert ran["family"] == family + ("_fp32acc" if acc else "")
        assert ran["engine"] == engine and ran["commits"] == COMMITS.get(ran["engine"], 1)
        assert ran["dispatches"] == dispatches(engine, family, 2 * tokens, ran["row_tile"])
        check_stages(ran["kernels"], ran, "fp16", acc)


@pytest.mark.parametrize("tokens", [t for t in TOKEN_EDGES if t])
@pytest.mark.parametrize("shared", [0, 1])
def test_whole_layer_is_one_command_buffer(tokens, shared):
    layer = make_layer(tokens, 64, 48, 8, 2, torch.bfloat16, shared=shared)
    logits = route_options(tokens, 8)
    metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 2, **layer.options)
    ran = metal_moe.last_dispatch()
    assert ran["commits"] == COMMITS.get(ran["engine"], 1)
    assert ran["kernels"][0] == "route"
    after_route = dispatches(ran["engine"], ran["family"], (2 + shared) * tokens, ran["row_tile"])
    assert ran["dispatches"] == len(ran["kernels"]) == 1 + after_route
    check_stages(ran["kernels"][1:], ran, "bf16", True)


@pytest.mark.parametrize("tokens", [1, 9, 20, 40])
def test_relu2_runs_the_kernels_without_gate(tokens):
    make_layer(tokens, 32, 24, 4, 2, activation="relu2").run()
    kernels = metal_moe.last_dispatch()["kernels"]
    assert sum(name.startswith("up_") for name in kernels) == 1
    assert not any(name.startswith("gate_up_") for name in kernels)


def test_other_operations():
    logits = route_options(9, 8)
    _, ids = metal_moe.fused_topk(logits, 2)
    assert metal_moe.last_dispatch()["kernels"] == ["route"]
    metal_moe.group_tokens(ids, 8)
    assert metal_moe.last_dispatch()["kernels"] == ["group"]
    metal_moe.group_tokens(ids, 8, capacity=9)
    assert metal_moe.last_dispatch()["kernels"] == ["pad_groups"]
    metal_moe.gather_experts(torch.randn(8, 3, 4), ids[:, 0])
    assert metal_moe.last_dispatch()["kernels"] == ["gather_experts"]


def test_zero_tokens_dispatch_nothing():
    make_layer(3, 16, 8, 3, 2).run()
    make_layer(0, 16, 8, 3, 2).run()
    ran = metal_moe.last_dispatch()
    assert ran["dispatches"] == 0 and ran["kernels"] == []


def test_vectorized_says_whether_rows_are_aligned():
    make_layer(5, 64, 32, 3, 2).run()
    assert metal_moe.last_dispatch()["vectorized"]
    make_layer(5, 63, 32, 3, 2).run()
    assert not metal_moe.last_dispatch()["vectorized"]
    layer = make_layer(5, 64, 32, 3, 2, torch.bfloat16)
    storage = torch.empty(layer.w1.numel() + 1, dtype=torch.bfloat16)
    layer.w1 = storage[1:].view(layer.w1.shape).copy_(layer.w1)
    layer.run()
    assert not metal_moe.last_dispatch()["vectorized"]


def test_simd_refuses_rows_that_are_not_aligned():
    """By name: no other family runs in its place."""
    for hidden, intermediate in [(63, 32), (64, 33), (68, 32)]:
        with pytest.raises(ValueError, match="moe_simd"):
            make_layer(5, hidden, intermediate, 3, 2, torch.float16).run(kernel="moe_simd")
    layer = make_layer(5, 64, 32, 3, 2, torch.bfloat16)
    layer.hidden_states = torch.randn(5, 65).bfloat16()[:, 1:]
    with pytest.raises(ValueError, match="moe_simd"):
        layer.run(kernel="moe_simd")


@pytest.mark.parametrize("family", ["moe_large_batch", "moe_simd"])
def test_row_tile_follows_rows_per_expert(family):
    """Many rows of one expert take a tile at least as high as few rows do."""
    tiles = []
    for experts in (64, 16, 4, 1):
        make_layer(64, 16, 16, experts, 1, torch.bfloat16).run(kernel=family)
        tiles.append(metal_moe.last_dispatch()["row_tile"])
    assert tiles == sorted(tiles) and tiles[-1] > tiles[0]
