"""The layer benchmark on tiny layers: what it writes, what it refuses, and that a wrong result fails it."""

import json
import math
import sys
from pathlib import Path

import metal_moe
import pytest
import torch
from metal_moe import baselines, layers, memory_bandwidth, reference
from metal_moe.cli.demo import TOLERANCES

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import call_overhead  # noqa: E402
import moe_layer  # noqa: E402 (found through the path above)
from layer_bench import ceilings, clock, environment, kernels, measure, report, verdict  # noqa: E402
from layer_bench.cases import INPUTS, make_case, make_layer  # noqa: E402
from layer_bench.ceilings import Ceilings  # noqa: E402

OWN_DEVICE = True
CEILINGS = Ceilings(bandwidth=10e9, bandwidth_of="reads", matmul=1e12)
# H 128, I from 64 to 448.
TINY = ["--scale", "0.03125", "--tokens", "1", "5", "--rounds", "3", "--budget", "0.001"]


@pytest.fixture
def quick(monkeypatch):
    """The machine's ceilings are not what is tested here."""
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda dtype, device: CEILINGS)


def run(device: torch.device, *arguments: object) -> int:
    return moe_layer.main(["--device", str(device), *TINY, *map(str, arguments)])


@pytest.fixture
def result(quick, tmp_path, device) -> dict:
    path = tmp_path / "result.json"
    assert run(device, "--model", "glm", "gptoss", "--json", path) == 0
    return json.loads(path.read_text())


def test_json(result, device):
    """Everything that says what was measured, on what, and with what."""
    assert result["format"] == 1
    assert result["device"]["engine"] == ("cuda" if device.type == "cuda" else "native")
    assert "library" not in result["device"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["metal_moe"] == metal_moe.__version__
    assert ("nvrtc" in result["versions"]) == (device.type == "cuda")
    assert result["date"].endswith("+00:00")
    assert result["ceilings"] == {"bandwidth": 10e9, "bandwidth_of": "reads", "matmul": 1e12}
    places = [(row["model"], row["tokens"]) for row in result["results"]]
    assert places == [(model, tokens) for model in ("GLM-4.7-Flash", "gpt-oss-20b") for tokens in (1, 5)]


def test_row(result, device):
    """Floors, fractions and ratios follow from bytes, operations and medians."""
    names = {"metal_moe", "loop", "naive_indexing", "grouped_mm"}
    if device.type == "cuda":
        names |= {"metal_moe_graph", "grouped_mm_graph"}
    for row in result["results"]:
        shape = next(one for one in layers.MODELS.values() if one.name == row["model"]).scaled(1 / 32)
        expert = 3 * shape.hidden * shape.intermediate
        assert shape.top_k <= row["experts_hit"] <= min(shape.experts, row["tokens"] * shape.top_k)
        assert row["bytes"] == pytest.approx(2 * (row["experts_hit"] * expert + 2 * row["tokens"] * shape.hidden))
        assert row["operations"] == 2 * row["tokens"] * shape.top_k * expert
        assert row["floor_seconds"] == pytest.approx(row["bytes"] / 10e9)
        assert row["floor_bound"] == "memory"
        assert set(row["seconds"]) == set(row["timings"]) == set(row["relative_error"]) == names
        for name, seconds in row["seconds"].items():
            timing = row["timings"][name]
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
            assert timing["median"] == seconds and timing["samples"] >= 3
        for name, fraction in row["floor_fraction"].items():
            assert fraction == pytest.approx(row["floor_seconds"] / row["seconds"][name])
        assert set(row["ratios"]) == names - {"metal_moe", "metal_moe_graph"}
        assert row["ratios"]["loop"] == pytest.approx(row["seconds"]["loop"] / row["seconds"]["metal_moe"])
        assert row["relative_error"]["metal_moe"] <= result["tolerance"]
        assert row["family"].startswith("moe_decode" if row["tokens"] == 1 else "moe_")
        assert len(row["kernels"]) == row["dispatches"] >= 2


def test_arithmetic_floor():
    assert Ceilings(10.0, "reads", 5.0).floor_seconds(moved=20, operations=5) == 2
    assert Ceilings(10.0, "reads", 5.0).floor_seconds(moved=20, operations=50) == 10


def test_text(quick, capsys, device):
    assert run(device, "--model", "deepseek", "qwen3") == 0
    out = capsys.readouterr().out
    for text in ("DeepSeek-V3", "Qwen3-30B-A3B", "memory reads 10.0 GB/s", "of floor", "naive indexing", "ratio"):
        assert text in out


def test_quantised_weights_are_measured_with_the_generic_kernels_too(quick, capsys, tmp_path, device):
    path = tmp_path / "result.json"
    assert run(device, "--model", "mixtral", "--format", "affine4", "--json", path) == 0
    assert "metal moe generic" in capsys.readouterr().out
    result = json.loads(path.read_text())
    for row in result["results"]:
        family = row["family"].removeprefix("moe_").removeprefix("base_")
        family = "decode" if row["tokens"] == 1 or family.startswith("decode") else family
        assert row["specialization"] == f"moe_affine_swiglu_{family}_4_4_4"
        ours, generic = row["seconds"]["metal_moe"], row["seconds"]["metal_moe_generic"]
        assert row["ratios"]["metal_moe_generic"] == pytest.approx(generic / ours)
        assert row["relative_error"]["metal_moe_generic"] == row["relative_error"]["metal_moe"]
        assert ("metal_moe_generic_graph" in row["seconds"]) == (device.type == "cuda")
    result["results"][0]["relative_error"]["metal_moe_generic"] = 1.0
    assert any("error of metal_moe_generic is 1.0e+00; the limit is 0.015" in line for line in verdict.failures(result))


@pytest.mark.parametrize(("name", "bits"), [("affine4", 4.5), ("trellis3", 3.08)])
def test_quantised_weights(quick, tmp_path, device, name, bits):
    """Our weights are of the format, checked against what they decode to; the floor has their bytes."""
    path = tmp_path / "result.json"
    arguments = ["--scale", "0.0625", "--model", "mixtral", "--tokens", "1", "--format", name, "--json", path]
    assert run(device, *arguments) == 0
    result = json.loads(path.read_text())
    (row,) = result["results"]
    hidden, intermediate = 256, 896
    assert result["weights"] == name
    weights = 3 * hidden * intermediate * row["experts_hit"]
    assert row["bytes"] == pytest.approx(weights * bits / 8 + 4 * hidden, rel=0.02)


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_wrong_result_fails(quick, capsys, monkeypatch, tmp_path, device, factor):
    """A result that is not the layer's ends the run with status 1; what was measured is kept all the same."""
    right = metal_moe.fused_experts
    monkeypatch.setattr(metal_moe, "fused_experts", lambda *args, **kwargs: right(*args, **kwargs) * factor)
    path = tmp_path / "result.json"
    assert run(device, "--model", "glm", "--json", path) == 1
    assert "FAILED: GLM-4.7-Flash, 1 tokens: error of metal_moe is" in capsys.readouterr().err
    error = json.loads(path.read_text())["results"][0]["relative_error"]["metal_moe"]
    assert error is None if math.isnan(factor) else error == pytest.approx(0.1, rel=0.1)


def test_wrong_peer_fails(quick, capsys, monkeypatch, device):
    right = baselines.expert_loop
    monkeypatch.setattr(baselines, "expert_loop", lambda *call: right(*call) * 1.1)
    assert run(device, "--model", "glm") == 1
    assert "error of loop is 1.0e-01; the limit is 0.06" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["affine4", "mxfp4"])
def test_quantised_weights_beside_mlx(quick, capsys, tmp_path, device, format):
    """MLX computes with our weights: its error is judged by them, and its ratio stands in the table."""
    path = tmp_path / "quantised.json"
    assert run(device, "--model", "glm", "--format", format, "--json", path) == 0
    rows = json.loads(path.read_text())["results"]
    if device.type != "cpu":
        assert all("mlx_gather_qmm" not in row["seconds"] for row in rows)
        return
    for row in rows:
        assert row["ratios"]["mlx_gather_qmm"] == row["seconds"]["mlx_gather_qmm"] / row["seconds"]["metal_moe"]
        assert row["relative_error"]["mlx_gather_qmm"] < verdict.PEER_TOLERANCE_FACTOR * TOLERANCES["bf16"]
    assert "mlx gather qmm ms" in capsys.readouterr().out


def test_wrong_engine_fails(result):
    result["results"][1]["engine"] = "exact"
    (line,) = verdict.failures(result)
    assert line.startswith("GLM-4.7-Flash, 5 tokens: ran on engine exact")


def test_naive_indexing_has_a_limit(quick, capsys, monkeypatch, device):
    """Where its copies are too large it is left out, and the table says so."""
    monkeypatch.setitem(moe_layer.measure.__globals__["NAIVE_LIMIT_BYTES"], device.type, 200_000)
    assert run(device, "--model", "glm") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("GLM")]
    peers = lines[2:]
    assert peers[0][4] != "-" and peers[1][4:6] == ["-", "-"]


def test_compare(quick, capsys, tmp_path, device, result):
    earlier = tmp_path / "result.json"
    for row in result["results"]:
        row["seconds"]["metal_moe"] *= 3
    changed = tmp_path / "slower.json"
    changed.write_text(json.dumps(result))
    assert moe_layer.main(["--load", str(earlier), "--compare", str(changed)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " eager " in line and "floor" not in line]
    assert len(lines) == 4 and all("3.00x" in line for line in lines)


def test_compare_wants_the_same_device(capsys, tmp_path, result):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**result, "device": {"name": "another", "engine": "native"}}))
    assert moe_layer.main(["--load", str(tmp_path / "result.json"), "--compare", str(other)]) == 1
    assert "--compare: the earlier result has device another" in capsys.readouterr().err


def test_files_of_another_format_are_refused(capsys, tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"results": []}')
    assert moe_layer.main(["--load", str(path)]) == 1
    assert "has format None; this benchmark reads format 1" in capsys.readouterr().err


def test_plot(result, tmp_path):
    pytest.importorskip("matplotlib", reason="optional: --plot alone needs it")
    picture = tmp_path / "result.png"
    assert moe_layer.main(["--load", str(tmp_path / "result.json"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_is_refused_beforehand(capsys, monkeypatch, tmp_path, device):
    """Before minutes of measuring, not after them."""
    monkeypatch.setattr(moe_layer, "run", lambda *_: pytest.fail("it has begun to measure"))
    for name in ("matplotlib", "matplotlib.backends"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(device, "--plot", tmp_path / "a.png") == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels"], "--kernels with --device cpu"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--rounds", "2"], "--rounds is 2; it must be at least 3"),
        (["--scale", "0"], "--scale is 0.0; it must be above 0"),
        (["--budget", "nan"], "--budget is nan; it must be above 0"),
        (["--device", "meta"], "--device is meta; it must be cpu or cuda"),
        (["--json", "/nowhere/at/all.json"], "--json is /nowhere/at/all.json; there is no folder"),
    ],
)
def test_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        moe_layer.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_inputs_differ(device):
    """The inputs choose different experts: one call's weights are not those of the call before."""
    case = make_case(make_layer("qwen3", 1 / 32, torch.bfloat16, device), 1)
    chosen = {tuple(ids.flatten().tolist()) for *_, ids in case.calls}
    assert len(case.calls) == len(chosen) == INPUTS


def test_every_input_in_turn(device):
    """Within a round the implementations take different inputs, and over the rounds each takes all of them."""
    seen: dict[str, list[int]] = {"a": [], "b": []}
    runs = {name: (lambda call, name=name: seen[name].append(call)) for name in seen}
    clock.time_in_turn(runs, list(range(8)), device, rounds=8, budget=1.0)
    assert all(a != b for a, b in zip(seen["a"], seen["b"], strict=True))
    assert all(set(calls) == set(range(8)) and len(calls) == 9 for calls in seen.values())


def test_budget(device):
    """What has used its time sits out; the others go on."""
    calls = {"slow": 0, "fast": 0}

    def slow(_):
        calls["slow"] += 1
        clock.time.sleep(0.01)

    def fast(_):
        calls["fast"] += 1

    times = clock.time_in_turn({"slow": slow, "fast": fast}, [None] * 2, device, rounds=20, budget=0.005)
    assert (calls["slow"], times["slow"].samples) == (4, 3)  # one warms up
    assert (calls["fast"], times["fast"].samples) == (21, 20)


@pytest.mark.parametrize("tokens", [1, 6])
def test_kernel_times(device, tokens):
    """What a trace of the profiler comes to: per kernel the time of a call, its share, and the bytes it must move."""
    layer = make_layer("mixtral", 1 / 32, torch.bfloat16, device)
    case = make_case(layer, tokens)
    metal_moe.fused_moe(*case.calls[0][:3], case.logits[0], 2)
    names = metal_moe.last_dispatch()["kernels"]
    events = [(name, 1e-6 * (place + 1)) for _ in case.calls for place, name in enumerate(names)] + [("memset", 8e-6)]
    entries = kernels.summarise(events, case, CEILINGS)
    table = {kernel["name"]: kernel["stage"] for kernel in metal_moe.kernels(device)}
    stages = [table[name] for name in names]
    assert [one["stage"] for one in entries] == [*stages, "other"]
    assert {"route", "gate_up", "down"} <= set(stages) and ("combine" in stages) == (tokens > 1)
    assert [one["seconds"] for one in entries] == pytest.approx([*(1e-6 * (i + 1) for i in range(len(names))), 1e-6])
    assert sum(one["share"] for one in entries) == pytest.approx(1)
    assert [one["launches"] for one in entries] == [1] * len(names) + [1 / INPUTS]
    by_stage = {one["stage"]: one for one in entries}
    shape, hit = layer.shape, case.experts_hit()
    matrix, rows = 2 * shape.hidden * shape.intermediate, 2 * tokens
    gate_up = hit * 2 * matrix + 2 * tokens * shape.hidden + 2 * rows * shape.intermediate
    assert by_stage["gate_up"]["bytes"] == pytest.approx(gate_up)
    assert by_stage["gate_up"]["bandwidth_fraction"] == pytest.approx(
        gate_up / by_stage["gate_up"]["seconds"] / CEILINGS.bandwidth
    )
    # One row per token where down adds up itself, else one in fp32 per assignment.
    out = 2 * tokens * shape.hidden + 8 * rows if tokens == 1 else 4 * rows * shape.hidden
    assert by_stage["down"]["bytes"] == pytest.approx(hit * matrix + 2 * rows * shape.intermediate + out)
    assert by_stage["other"]["bytes"] is None and by_stage["other"]["bandwidth_fraction"] is None


def test_kernels(quick, capsys, tmp_path, device, monkeypatch):
    """The profiler's times of every kernel on a GPU; nothing measures them on a CPU, which is said at once."""
    path = tmp_path / "result.json"
    arguments = ["--kernels", "--model", "glm", "--json", path]
    if device.type == "cpu":
        with pytest.raises(SystemExit):
            run(device, *arguments)
        assert "--kernels with --device cpu: PyTorch's profiler times each kernel" in capsys.readouterr().err
        return
    # Else PyTorch fills every result, which is a kernel of its own.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    assert run(device, *arguments) == 0
    entries = json.loads(path.read_text())["kernels"]
    for tokens in (1, 5):
        stages = [one["stage"] for one in entries if one["tokens"] == tokens]
        assert {"route", "gate_up", "down"} <= set(stages) and "other" not in stages
    assert all(one["seconds"] > 0 and one["launches"] >= 1 for one in entries)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_every_device_has_defaults(monkeypatch, kind):
    monkeypatch.setattr(metal_moe, "SUPPORTED_DEVICES", (kind,))
    options = moe_layer.parse([])
    assert options.device.type == kind, "the build's first device"
    assert options.model and options.tokens[0] == 1 and options.budget > 0
    assert kind in measure.NAIVE_LIMIT_BYTES


def test_a_gpu_without_graphs(result):
    """MPS: microseconds, as for CUDA devices, and no columns of CUDA graphs."""
    engine, graph = result["device"]["engine"], {measure.OURS_GRAPH, measure.GROUPED_GRAPH}
    on_mps = {**result, "device": {**result["device"], "engine": "mps"}}
    on_mps["results"] = [
        {**row, "seconds": {name: time for name, time in row["seconds"].items() if name not in graph}}
        for row in result["results"]
    ]
    text = report.render(on_mps)
    assert "eager us" in text and "graph" not in text and "threads" not in text
    assert ("eager us" in report.render(result)) == (engine == "cuda")


def test_kernel_table(result):
    entry = {"model": "m", "tokens": 1, "kernel": "some_kernel", "stage": "other", "launches": 1.0, "seconds": 1e-3}
    entry |= {"share": 1.0, "bytes": None, "bandwidth_fraction": None, "operations_per_second": 0.0}
    text = report.kernels({**result, "kernels": [entry, {**entry, "stage": "route"}]})
    assert "some_kernel" in text
    # Milliseconds on a CPU, microseconds on a GPU.
    twice, once = ("2000", "1000") if report.on_gpu(result) else ("2.00", "1.00")
    assert text.splitlines()[-1].split()[2:4] == ["all", twice] and f"without route {once}" in text


def test_commit(monkeypatch):
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "v9-of-a-copy")
    assert environment.commit() == "v9-of-a-copy"


def test_commit_outside_of_a_checkout(monkeypatch):
    monkeypatch.delenv(environment.COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None


def test_bandwidth_says_what_it_is(monkeypatch, device):
    """Reads on a CPU, copies on a GPU: the bytes of all buffers over the time."""
    monkeypatch.setattr(memory_bandwidth, "read_bandwidth", lambda passes: 5e9)
    monkeypatch.setattr(memory_bandwidth, "copy_bandwidth", lambda device, passes: 7e9)
    expected = ("reads", 5e9) if device.type == "cpu" else ("copies", 7e9)
    assert memory_bandwidth.memory_bandwidth(device) == expected


@pytest.mark.parametrize("model", layers.MODELS)
@pytest.mark.parametrize("peer", [baselines.expert_loop, baselines.grouped_matmul, baselines.naive_indexing])
def test_peers_compute_the_layer(device, model, peer):
    """Each model's routing, on experts some of which have no tokens."""
    case = make_case(make_layer(model, 1 / 32, torch.float32, device), 7)
    call = case.calls[0]
    assert case.experts_hit() < case.shape.experts or model == "mixtral"
    if peer is baselines.grouped_matmul and not baselines.grouped_matmul_runs(device, torch.float32):
        call = tuple(part.bfloat16() if part.dtype == torch.float32 else part for part in call)
    tolerance = 1e-5 if call[0].dtype == torch.float32 else 2e-2
    assert reference.relative_error(peer(*call), reference.experts(*call)) < tolerance


def test_deepseek_routes_within_groups(device):
    """8 experts of at most 4 of its 8 groups."""
    case = make_case(make_layer("deepseek", 1 / 32, torch.bfloat16, device), 16)
    assert layers.DEEPSEEK_V3.routing["topk_group"] == 4
    for *_, ids in case.calls:
        assert all(len({int(one) // 32 for one in row}) <= 4 for row in ids)


@pytest.fixture
def quick_calls(device):
    if device.type == "mps":
        pytest.skip("there is no device that runs nothing on macOS")
    return ["--rounds", "3"]


def test_call_overhead(quick_calls, capsys):
    before = metal_moe.counters()["dispatches"]
    assert call_overhead.main([*quick_calls, "--limit", "1000000"]) == 0
    # Two dispatches in each of 50 calls in 3 rounds, five times.
    assert metal_moe.counters()["dispatches"] - before >= 5 * 3 * 50 * 2
    out = capsys.readouterr().out
    names = ["kernels left out", "Python function", "empty_like", "extension", "kernels,", "checked", "torch.ops"]
    assert len(out.splitlines()) == len(names)
    for name, line in zip(names, out.splitlines(), strict=True):
        assert name in line and line.endswith(" us")


def test_call_overhead_measures_what_it_says(quick_calls):
    """The parts are parts of the whole, and kernels run again afterwards."""
    times = call_overhead.measure(200)
    assert 0 < times["loop"] < times["output"] < times["extension"]
    assert times["extension"] < times["checked"] < times["dispatcher"]
    arguments = call_overhead.make_arguments()
    error = reference.relative_error(metal_moe.fused_experts(*arguments), reference.experts(*arguments))
    assert error < 1e-5


def test_call_overhead_of_quantised_weights(quick_calls, capsys):
    before = metal_moe.counters()["dispatches"]
    assert call_overhead.main([*quick_calls, "--format", "affine4"]) == 0
    assert metal_moe.counters()["dispatches"] - before >= 4 * 3 * 50 * 2
    assert "torch.ops" not in capsys.readouterr().out, "their operator takes their buffers"


def test_call_overhead_limit(quick_calls, capsys):
    assert call_overhead.main([*quick_calls, "--limit", "0"]) == 1
    assert "the limit is 0" in capsys.readouterr().err


def test_flame_graph_without_its_tool(quick_calls, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(call_overhead.shutil, "which", lambda *args, **kwargs: None)
    assert call_overhead.main([*quick_calls, "--flame", str(tmp_path / "calls.svg")]) == 2
    assert "pip install py-spy" in capsys.readouterr().err
    assert not (tmp_path / "calls.svg").exists()
