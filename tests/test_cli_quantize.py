"""`metal-moe quantize`: what it writes, reports and draws."""

import json
from xml.etree import ElementTree

import pytest
import torch
from metal_moe import cli
from metal_moe.cli.plot import log_chart
from metal_moe.formats import ExpertReader, QuantizedExperts
from safetensors.torch import save_file
from test_formats_mxfp4 import gpt_oss


def dense_checkpoint(folder, layers=(0, 3), experts=3, hidden=64, intermediate=32):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, shape in (
                ("gate", (intermediate, hidden)),
                ("up", (intermediate, hidden)),
                ("down", (hidden, intermediate)),
            ):
                tensors[f"{prefix}.{name}_proj.weight"] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden, "moe_intermediate_size": intermediate}))
    return tensors


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments) -> dict:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def relative_mse(got, dense) -> float:
    return float((got.double() - dense.double()).square().sum() / dense.double().square().sum())


def test_affine_of_a_dense_checkpoint(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    output, plot = tmp_path / "out", tmp_path / "errors.svg"
    bits = ["--bits", "3", "--gate-bits", "6", "--up-bits", "2", "--expert-bits", "1=8"]
    result = run_json(
        capsys,
        "quantize",
        tmp_path / "dense",
        "--output",
        output,
        "--format",
        "affine",
        "--group-size",
        32,
        *bits,
        "--plot",
        plot,
    )
    assert [layer["layer"] for layer in result["layers"]] == [0, 3]
    with ExpertReader(tmp_path / "dense") as before, ExpertReader(output) as after:
        assert after.layers == [0, 3] and after.source(0) == "metal-moe"
        for layer in result["layers"]:
            exact, made = before.read(layer["layer"]), after.read(layer["layer"])
            parts = [*made.w1.gate_up(), made.w2.parts["weight"]]
            assert [[s.bits for s in part.settings] for part in parts] == [[6, 8, 6], [2, 8, 2], [3, 8, 3]]
            halves = [exact.w1[:, :32], exact.w1[:, 32:], exact.w2]
            for errors, part, dense in zip(layer["projections"], parts, halves, strict=True):
                got = part.dequantize(None, torch.float32)
                assert errors["bits"] == [s.bits for s in part.settings]
                expected = [relative_mse(got[expert], dense[expert]) for expert in range(3)]
                assert errors["relative_mse"] == pytest.approx(expected, rel=1e-5)
                assert errors["relative_output_mse"] is None
                same = QuantizedExperts.quantize(dense, format="affine", bits=errors["bits"], group_size=32)
                assert torch.equal(got, same.dequantize())
    assert json.loads((output / "quantization_report.json").read_text()) == result
    assert json.loads((output / "config.json").read_text())["hidden_size"] == 64
    drawing = ElementTree.fromstring(plot.read_text())
    words = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"gate", "up", "down", "0", "3"} <= set(words)
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 6


def test_text_and_progress(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    status, out, err = run(
        capsys, "quantize", tmp_path / "dense", "--output", tmp_path / "out", "--format", "mxfp4", "--layers", "3"
    )
    assert status == 0
    assert "relative MSE" in out and "1 layer," in out
    assert [line.split()[:3] for line in out.splitlines()[2:5]] == [["3", name, "4"] for name in ("gate", "up", "down")]
    assert "layer 3 (1 of 1) down [########################] 100%" in err


def test_trellis_with_calibration(capsys, tmp_path):
    """Outputs err less than weights do; down is calibrated on what gate and up make of the inputs."""
    dense_checkpoint(tmp_path / "dense", layers=(2,), experts=1, hidden=128, intermediate=128)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    inputs += 0.1 * torch.randn(256, 128, generator=generator)
    save_file({"model.layers.2.mlp.hidden_states": inputs}, tmp_path / "calibration.safetensors")
    arguments = ["--bits", "6", "--codebook", "mcg", "--calibration", tmp_path / "calibration.safetensors"]
    result = run_json(capsys, "quantize", tmp_path / "dense", "--output", tmp_path / "out", *arguments)
    assert result["calibrated"] is True
    with ExpertReader(tmp_path / "dense") as before, ExpertReader(tmp_path / "out") as after:
        exact, made = before.read(2), after.read(2)
    assert made.w2.parts["weight"].settings[0].codebook == "mcg"
    gate, up = exact.w1[0].float().split(128)
    hidden = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    got = [*made.w1.dequantize()[0].split(128), made.w2.dequantize()[0]]
    cases = zip((inputs, inputs, hidden), (gate, up, exact.w2[0].float()), got, strict=True)
    for errors, (x, weights, quantised) in zip(result["layers"][0]["projections"], cases, strict=True):
        output_mse = relative_mse(x @ quantised.T, x @ weights.T)
        assert errors["relative_output_mse"] == [pytest.approx(output_mse, rel=1e-3)]
        # Without calibration outputs err as weights do.
        assert output_mse < 0.6 * errors["relative_mse"][0]


def test_gpt_oss_is_taken_apart(capsys, tmp_path):
    """Rows that are interleaved come out as gate rows, then up rows, biases with them."""
    tensors = {}
    for projection, shape in (("gate_up_proj", (64, 96)), ("down_proj", (96, 32))):
        blocks, scales, bias = gpt_oss(2, *shape)
        prefix = f"model.layers.0.mlp.experts.{projection}"
        tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales, f"{prefix}_bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = ["--format", "affine", "--bits", "8", "--group-size", "32"]
    run_json(capsys, "quantize", tmp_path / "model.safetensors", "--output", tmp_path / "out", *arguments)
    before, after = ExpertReader(tmp_path / "model.safetensors").read(0), ExpertReader(tmp_path / "out").read(0)
    assert before.interleaved and not after.interleaved
    assert {settings.scale_type for settings in after.w2.parts["weight"].settings} == {"bfloat16"}
    dense = before.w1.dequantize()
    expected = torch.cat([dense[:, 0::2], dense[:, 1::2]], 1)
    assert relative_mse(after.w1.dequantize(), expected) < 1e-4
    assert torch.equal(after.w1.bias, torch.cat([before.w1.bias[:, 0::2], before.w1.bias[:, 1::2]], 1))
    assert torch.equal(after.w2.bias, before.w2.bias)


WRONG = [
    (["--format", "mxfp4", "--bits", "3"], "bits is 3; mxfp4 has 4"),
    (["--format", "affine", "--layers", "7"], "--layers names 7; layers with experts are 0 to 3"),
    (["--format", "affine", "--calibration", "x"], "--calibration is given; affine makes no use of it"),
    (["--format", "affine", "--bits", "4", "--expert-bits", "3=8"], "--expert-bits names expert 3; the layer has 3"),
    (["--format", "affine", "--expert-bits", "1=8"], "--expert-bits is given without --bits"),
    (["--format", "affine", "--codebook", "mcg"], "--codebook is given; affine has none"),
    (["--format", "mxfp4", "--scale-dtype", "fp16"], "--scale-dtype is given; mxfp4 has none"),
    (["--device", "mps"], "--device is mps; it must be cpu"),
    (["--calibration", "nowhere.safetensors"], "nowhere.safetensors: there is no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_errors(arguments, message, capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    status, out, err = run(capsys, "quantize", tmp_path / "dense", "--output", tmp_path / "out", *arguments)
    assert (status, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_inputs_that_do_not_fit(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    save_file({"model.layers.0.mlp.hidden_states": torch.zeros(5, 63)}, tmp_path / "c.safetensors")
    arguments = [
        "quantize",
        tmp_path / "dense",
        "--output",
        tmp_path / "out",
        "--calibration",
        tmp_path / "c.safetensors",
    ]
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "it must be float [T, 64]" in err
    status, _, err = run(capsys, *arguments, "--layers", "3")
    assert status == 1 and "there is no tensor model.layers.3.mlp.hidden_states" in err


def test_nothing_is_overwritten(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    arguments = ["quantize", tmp_path / "dense", "--output", tmp_path / "out", "--format", "mxfp4", "--layers", "0"]
    assert run(capsys, *arguments)[0] == 0
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "is there already" in err


@pytest.mark.parametrize("arguments", [["--layers", "3-1"], ["--layers", "x"], ["--expert-bits", "7"]])
def test_wrong_usage(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        cli.main(["quantize", "x", "--output", "y", *arguments])
    assert exit.value.code == 2


def test_charts_of_little():
    """One layer; errors of zero."""
    ElementTree.fromstring(log_chart("a < b", "x", "y", [5], {"gate": [(0.0, 0.0, 0.0)]}))
