"""`with metal_moe.profile()`, and the command that profiles one layer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import metal_moe
import pytest
import torch
from cases import DEVICE, ENGINES, make_layer
from metal_moe import cli
from metal_moe.cli import profile as command

SMALL = ["--scale", "0.0625", "--tokens", "1,5"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One measurement is a test of the command, not of the machine."""
    monkeypatch.setattr(command, "BUDGET", 0.001)
    monkeypatch.setattr(command, "memory_bandwidth", lambda device: ("reads", 10e9))


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_of_a_profile(use_engine, engine):
    use_engine(engine)
    layer = make_layer(9, 64, 48, 8, 2, torch.bfloat16)
    alone = layer.run()
    before = metal_moe.counters()["dispatches"]
    with metal_moe.profile(memory_bandwidth=1e9) as p:
        results = [layer.run() for _ in range(3)]
    dispatches = metal_moe.counters()["dispatches"] - before
    assert all(torch.equal(result, alone) for result in results)
    ran = metal_moe.last_dispatch()
    assert [kernel.kernel for kernel in p.kernels] == ran["kernels"]
    assert sum(kernel.dispatches for kernel in p.kernels) == dispatches == 3 * ran["dispatches"]
    for kernel in p.kernels:
        assert (kernel.engine, kernel.family) == (engine, ran["family"])
        assert kernel.dispatches == kernel.timed == 3
        assert 0 < kernel.fastest <= kernel.seconds / 3 <= kernel.slowest <= kernel.seconds
        assert kernel.encode_seconds > 0 and kernel.bytes > 0
        assert kernel.fraction(1e9) == pytest.approx(kernel.bytes / 1e9 / kernel.seconds)
    # Bytes of weights, as the layer declares them, are those of the experts that 18 slots may choose: all 8.
    gate_up = next(kernel for kernel in p.kernels if kernel.kernel.startswith("gate_up"))
    assert gate_up.bytes >= 3 * 8 * 2 * 48 * 64 * 2
    assert p.seconds == pytest.approx(sum(kernel.seconds for kernel in p.kernels))
    assert p.bytes == sum(kernel.bytes for kernel in p.kernels)


def test_a_profile_counts_nothing_outside_of_its_block():
    layer = make_layer(1, 64, 48, 8, 2)
    layer.run()
    with metal_moe.profile(1e9) as outer:
        layer.run()
        with metal_moe.profile(1e9) as inner:
            layer.run()
        layer.run()
    layer.run()
    assert {kernel.dispatches for kernel in outer.kernels} == {3}
    assert {kernel.dispatches for kernel in inner.kernels} == {1}
    with metal_moe.profile(1e9) as nothing:
        pass
    assert nothing.kernels == [] and nothing.seconds == 0
    assert "nothing ran" in nothing.table()


def test_all_threads_count():
    layer = make_layer(1, 64, 48, 8, 2)
    with metal_moe.profile(1e9) as p:
        threads = [threading.Thread(target=lambda: [layer.run() for _ in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [kernel.timed for kernel in p.kernels] == [100, 100]


def test_an_exception_ends_the_profile():
    layer = make_layer(1, 64, 48, 8, 2)
    p = metal_moe.profile(1e9)
    with pytest.raises(ZeroDivisionError), p:
        layer.run()
        raise ZeroDivisionError
    assert len(p.kernels) == 2
    layer.run()
    assert {kernel.dispatches for kernel in p.kernels} == {1}


def test_an_operation_that_fails_leaves_no_times():
    layer = make_layer(5, 63, 32, 3, 2)
    with metal_moe.profile(1e9) as p:
        with pytest.raises(ValueError, match="moe_simd"):
            layer.run(kernel="moe_simd")
        layer.run()
    assert all(kernel.timed == 1 for kernel in p.kernels) and len(p.kernels) == metal_moe.last_dispatch()["dispatches"]


def test_results_are_refused_before_the_end():
    p = metal_moe.profile()
    for result in (lambda: p.kernels, lambda: p.seconds, p.table, p.plot):
        with pytest.raises(RuntimeError, match="the with block has not ended"):
            result()
    with p:
        pass
    with pytest.raises(RuntimeError, match="has begun already"), p:
        pass


def test_table():
    layer = make_layer(9, 64, 48, 8, 2, torch.bfloat16)
    with metal_moe.profile(memory_bandwidth=2e9) as p:
        layer.run()
    table = p.table()
    lines = table.splitlines()
    for column in ("kernel", "family", "dispatches", "ms", "MB", "GB/s", "of floor"):
        assert column in lines[0]
    slowest = max(p.kernels, key=lambda kernel: kernel.seconds)
    assert lines[2].startswith(slowest.kernel)
    assert f"{slowest.fraction(2e9):.0%}" in lines[2]
    assert all(any(line.startswith(kernel.kernel) for line in lines) for kernel in p.kernels)
    assert "2.0 GB/s" in table and "without a time" not in table


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    layer = make_layer(9, 64, 48, 8, 2, torch.bfloat16)
    with metal_moe.profile(memory_bandwidth=2e9) as p:
        layer.run()
    figure = p.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [k.kernel for k in p.kernels]
    widths = [bar.get_width() for bar in figure.axes[0].containers[0]]
    assert widths == pytest.approx([1e3 * kernel.seconds for kernel in p.kernels])
    for path in (tmp_path / "profile.doc", tmp_path / "nowhere" / "profile.png"):
        with pytest.raises(ValueError, match="profile: path"):
            p.plot(path)


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), {"native": 0}])
def test_bandwidth_must_be_positive(bandwidth):
    with pytest.raises(ValueError, match="memory_bandwidth"):
        metal_moe.profile(bandwidth)


@pytest.mark.parametrize("bandwidth", ["fast", True, {"native": "fast"}])
def test_bandwidth_must_be_a_number(bandwidth):
    with pytest.raises(TypeError, match="memory_bandwidth"):
        metal_moe.profile(bandwidth)


def test_bandwidth_is_measured_when_it_is_needed(monkeypatch):
    from metal_moe.profile import _profile

    asked = []
    monkeypatch.setattr(_profile, "_measured_bandwidth", lambda device: asked.append(device) or 5e9)
    with metal_moe.profile() as p:
        make_layer(1, 64, 48, 8, 2).run()
    assert asked == []
    assert "5.0 GB/s" in p.table()
    assert asked == [DEVICE]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["profile", "--device", str(DEVICE), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("format", [None, "affine4", "mxfp4"])
def test_command(capsys, format):
    arguments = [*SMALL, *(["--format", format] if format else [])]
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["layer"]["name"] == "GLM-4.7-Flash" and result["layer"]["format"] == (format or "dense")
    assert [row["tokens"] for row in result["results"]] == [1, 5]
    for row in result["results"]:
        few = ENGINES[0] != "native"  # five tokens have few assignments: no `group`
        decode = row["family"].startswith("moe_decode")
        assert len(row["kernels"]) == (3 if decode else 5 - few) == row["dispatches"]
        assert decode or row["tokens"] > 1
        assert row["kernels"][0]["kernel"] == "route"
        products = [kernel["kernel"] for kernel in row["kernels"] if kernel["kernel"].startswith(("gate_up", "down"))]
        assert len(products) == 2 and all(("quantized" in name) == bool(format) for name in products)
        assert row["chosen_by"] == "tokens"
        assert row["kernel_seconds"] == pytest.approx(sum(kernel["seconds"] for kernel in row["kernels"]))
        weights = [kernel["bytes"] for kernel in row["kernels"] if kernel["kernel"].startswith(("gate_up", "down"))]
        # Of the experts chosen; the buffers of quantised weights this small are half padding.
        assert 0 < 0.95 * row["bytes"] <= sum(weights) <= (2 if format else 1.3) * row["bytes"]
        assert row["tokens"] * 4 >= row["experts"] >= 4
        for kernel in row["kernels"]:
            assert kernel["timed"] == kernel["dispatches"] == row["calls"]
            fraction = kernel["bytes"] / 10e9 / kernel["seconds"]
            assert kernel["bandwidth_fraction"] == pytest.approx(fraction)
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "1 tokens: moe_decode_fp32acc, by tokens" in out and "of floor" in out


def test_command_of_every_layer(capsys):
    for name in command.LAYERS:
        status, out, _ = run(capsys, "--layer", name, "--scale", "0.01", "--tokens", "2", "--dtype", "fp32")
        assert status == 0 and name in out.lower()


def test_command_draws(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "layer.svg"
    assert run(capsys, *SMALL, "--plot", str(path))[0] == 0
    assert "<svg" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0"], "--scale is 0"),
        (["--plot", "layer.doc"], "--plot is layer.doc"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_errors_are_one_line_on_stderr(capsys, arguments, message):
    status, out, err = run(capsys, *SMALL, *arguments)
    assert status == 1 and out == ""
    assert message in err and err.startswith("metal-moe profile")


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--tokens", "1,x"], ["--layer", "gpt-2"], ["--format", "q"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["profile", *arguments])
    assert exit.value.code == 2


def test_function_and_module_share_a_name():
    """`metal_moe.profile` is the function, `python -m metal_moe.profile` the command, without a warning."""
    assert isinstance(metal_moe.profile(1e9), metal_moe.Profile)
    arguments = [sys.executable, "-W", "error::RuntimeWarning", "-m", "metal_moe.profile", "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "--layer" in result.stdout and result.stderr == ""
