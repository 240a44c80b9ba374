"""The benchmark of small operations at tiny sizes: what it writes and refuses, and that a wrong result fails it."""

import json
import sys
from pathlib import Path

import metal_moe
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import linear  # noqa: E402 (found through the path above)

OWN_DEVICE = True
TINY = ["--size", "3x8", "--tokens", "2", "--rank", "4", "--budget", "0.0001"]


def run(device, *arguments):
    return linear.main(["--device", str(device), *TINY, *map(str, arguments)])


def test_json(device, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run(device, "--json", path, "--dtype", "bf16", "fp16") == 0
    result = json.loads(path.read_text())
    assert result["device"]["name"] == metal_moe.device_info(device)["name"]
    places = [(one["operation"], one["case"], one["dtype"]) for one in result["results"]]
    expected = [("matmul", "3x8 nn"), ("matmul", "3x8 nt"), ("lora", "2x8 r4"), ("lora by token", "2x8 r4")]
    assert places == [(*one, dtype) for dtype in ("bf16", "fp16") for one in expected]
    for one in result["results"]:
        ours, theirs = one["microseconds"]["metal_moe"], one["microseconds"]["torch"]
        assert all(ours[kind] > 0 and theirs[kind] > 0 for kind in ("wait", "row"))
        assert one["ratio"] == {kind: pytest.approx(theirs[kind] / ours[kind]) for kind in ("wait", "row")}
        assert one["family"] in ("gemv", "tile") and one["runs"] in ("gemv", "tile", "torch")
        assert len(one["kernels"]) == (1 if one["operation"] == "matmul" else 2)
        assert one["relative_error"]["metal_moe"] <= result["tolerances"][one["dtype"]]
    out = capsys.readouterr().out
    for text in ("microseconds per operation", "PyTorch us", "lora by token", "3x8 nt"):
        assert text in out


def test_wrong_result_fails(device, monkeypatch, capsys):
    right = metal_moe.matmul
    monkeypatch.setattr(metal_moe, "matmul", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert run(device, "--dtype", "fp32") == 1
    assert "FAILED: matmul 3x8 nn fp32: error of metal_moe is 1.0e-01" in capsys.readouterr().err


def test_another_kernel_fails(device, monkeypatch, capsys):
    right = metal_moe.matmul
    monkeypatch.setattr(metal_moe, "matmul", lambda a, b, kernel=None: right(a, b, kernel="torch"))
    assert run(device, "--dtype", "fp32") == 1
    assert "torch ran; it must be one of our kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3"], "--size is 3; it must be of the form 64x256"),
        (["--rank", "257"], "--rank is 257; it must be from 1 to 256"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--budget", "0"], "--budget is 0.0; it must be above 0"),
        (["--device", "meta"], "--device is meta; it must be"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        linear.main([*TINY, *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
