"""The command line: what it prints, as text and as JSON, and its exit status."""

import json
import subprocess
import sys

import metal_moe
import pytest
from cases import COMMITS, dispatches
from metal_moe import cli
from metal_moe._validate import choices
from metal_moe.cli import demo, repro

# A layer of H 128, I 128 runs in milliseconds.
SMALL = ["--scale", "0.0625"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One measurement is a test of the command, not of the machine."""
    monkeypatch.setattr(demo, "BUDGET", 0.001)
    monkeypatch.setattr(demo, "memory_bandwidth", lambda device: ("reads", 10e9))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments: str) -> dict:
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


def test_info(capsys):
    result = run_json(capsys, "info")
    assert result["versions"]["metal_moe"] == metal_moe.__version__
    engine = "mps" if sys.platform == "darwin" else "native"
    assert result["device"]["engine"] == engine
    assert result["threads"] >= (engine == "native")  # 0: no engine computes on the CPU
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert metal_moe.__version__ in out and engine in out


@pytest.mark.skipif(sys.platform == "darwin", reason="the stand-in's engines are not part of macOS builds")
def test_info_follows_the_engine(capsys, monkeypatch):
    monkeypatch.setenv("METAL_MOE_CPU_ENGINE", "exact")
    assert run_json(capsys, "info")["device"]["engine"] == "exact"


def test_kernels(capsys):
    kernels = run_json(capsys, "kernels")["kernels"]
    assert kernels == metal_moe.kernels()
    names = [kernel["name"] for kernel in kernels]
    assert len(set(names)) == len(names) > 0
    status, out, _ = run(capsys, "kernels")
    assert status == 0
    assert all(name in out for name in names)
    assert f"{len(names)} kernels" in out


def test_demo(capsys):
    arguments = ["demo", *SMALL, "--tokens", "1", "4", "40"]
    result = run_json(capsys, *arguments)
    assert result["passed"] is True
    assert result["layer"]["experts"] == 64 and result["layer"]["scoring"] == "sigmoid"
    rows, engine = result["results"], result["device"]["engine"]
    slots = result["layer"]["top_k"] + result["layer"]["shared_experts"]
    assert [(row["dtype"], row["tokens"]) for row in rows] == [(d, t) for d in ("bf16", "fp16") for t in (1, 4, 40)]
    for row in rows:
        assert row["family"].startswith("moe_decode" if row["tokens"] == 1 else "moe_")
        after_route = dispatches(engine, row["family"], row["tokens"] * slots, row["row_tile"])
        assert row["dispatches"] == len(row["kernels"]) == 1 + after_route
        assert row["commits"] == COMMITS.get(engine, 1)
        assert row["relative_error"] <= result["tolerances"][row["dtype"]]
        assert row["seconds"] > 0 and row["bytes"] > 0
        assert row["bandwidth_fraction"] == pytest.approx(row["bytes"] / row["seconds"] / 10e9)
        # The other implementations compute the same layer.
        assert {"expert loop", "naive indexing"} <= row["peers"].keys()
        assert all(peer["relative_error"] < 5e-2 for peer in row["peers"].values())
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert "GLM-4.7-Flash" in out and "every error is within tolerance" in out
    assert "fused_moe" in err, "progress goes to stderr"


def test_demo_fails_above_the_tolerance(capsys, monkeypatch):
    monkeypatch.setitem(demo.TOLERANCES, "bf16", 1e-9)
    arguments = ["demo", *SMALL, "--tokens", "2", "--dtype", "bf16", "--no-peers"]
    status, out, _ = run(capsys, *arguments)
    assert status == 1
    assert "FAILED" in out
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 1
    assert json.loads(out)["passed"] is False


def test_demo_fails_on_values_that_are_not_finite(capsys, monkeypatch):
    fused_moe = metal_moe.fused_moe
    monkeypatch.setattr(metal_moe, "fused_moe", lambda *a, **k: fused_moe(*a, **k).mul_(float("nan")))
    status, out, _ = run(capsys, "demo", *SMALL, "--tokens", "2", "--dtype", "fp16", "--no-peers", "--json")
    assert status == 1
    assert json.loads(out)["results"][0]["relative_error"] is None


def test_repro(capsys):
    arguments = ["repro", "--scale", "0.03", "--tokens", "8"]
    result = run_json(capsys, *arguments)
    names = [step["name"] for step in result["results"]]
    assert names == [
        "matmul",
        "expert loop",
        "selection by indexing",
        "selection by gather_experts",
        "layer, loop over experts",
        "layer, fused_moe",
    ]
    assert all(step["seconds"] > 0 for step in result["results"])
    assert result["scale"] == 0.03 and result["tokens"] == 8
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert all(name in out for name in names)


def test_repro_chooses_a_scale_that_fits(monkeypatch):
    from metal_moe.cli.text import DTYPES

    for gigabytes, expected in ((100, 1.0), (20, 0.5), (5, 0.25)):
        monkeypatch.setattr(repro, "available_bytes", lambda device, size=gigabytes * 10**9: size)
        assert repro.fitting_scale(128, DTYPES["bf16"], "cpu") == expected


def test_repro_refuses_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(repro, "available_bytes", lambda device: 10**9)
    status, _, err = run(capsys, "repro", "--scale", "1")
    assert status == 1
    assert "--scale 1 needs" in err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["demo", "--dtype", "int8"], ["info", "--verbose"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--device", "meta"], 'device is "meta"; it must be ' + choices(metal_moe.SUPPORTED_DEVICES)),
        (["info", "--device", "abacus"], "abacus"),
        (["demo", "--tokens", "0"], "--tokens is 0"),
        (["demo", "--scale", "-1"], "--scale is -1"),
        (["repro", "--tokens", "0"], "--tokens is 0"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert out == ""
    assert message in err and err.startswith("metal-moe ")


def test_module_runs():
    result = subprocess.run([sys.executable, "-m", "metal_moe", "info", "--json"], capture_output=True, check=True)
    assert json.loads(result.stdout)["versions"]["metal_moe"] == metal_moe.__version__


def test_a_result_that_cannot_be_printed(capfd):
    """A full disk behind stdout: one line, no traceback; progress that cannot be shown is no error."""
    command = [sys.executable, "-m", "metal_moe", "kernels"]
    with open("/dev/full", "w") as full:
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
        assert "metal-moe kernels: the result could not be printed: [Errno 28]" in failed.stderr
        demo = [sys.executable, "-m", "metal_moe", "demo", "--scale", "0.05", "--tokens", "1"]
        assert subprocess.run(demo, stderr=full, stdout=subprocess.PIPE).returncode == 0
