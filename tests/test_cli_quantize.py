"""`metal-moe quantize`: what it writes, reports and draws."""

import itertools
import json
import math
from xml.etree import ElementTree

import metal_moe
import pytest
import torch
from metal_moe import cli
from metal_moe.cli.plot import log_chart
from metal_moe.formats import ExpertReader, QuantizedExperts
from metal_moe.formats.safetensors_file import save_safetensors
from mlx_tensors import mlx_quantize, to_mlx
from safetensors.torch import save_file
from test_formats_mxfp4 import gpt_oss
from test_formats_trellis import exl3_linear


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
    with metal_moe.profile() as profile:
        result = run_json(capsys, "quantize", tmp_path / "dense", "--output", tmp_path / "out", *arguments)
    assert result["calibrated"] is True
    assert any(ran.kernel.startswith("viterbi") for ran in profile.kernels), "the search is a kernel"
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
    (["--seed", str(10**30)], "--seed is 1000000000000000000000000000000; it must be from 0 to"),
    (["--plot", "nowhere/errors.svg"], "--plot: there is no folder"),
    (["--format", "mxfp4", "--shared-bits", "4"], "--shared-bits is given; there are no shared experts"),
    (["--prefix", "thinker."], "no experts are found among 0 tensors whose names begin with 'thinker.'"),
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
    assert status == 1 and "there is no tensor model.layers.3.mlp.hidden_states" in err
    status, _, err = run(capsys, *arguments, "--layers", "0")
    assert status == 1 and "it must be float [T, 64]" in err
    for value in (0.0, math.nan):
        save_file({"model.layers.0.mlp.hidden_states": torch.full((5, 64), value)}, tmp_path / "c.safetensors")
        status, _, err = run(capsys, *arguments, "--layers", "0")
        assert status == 1 and "hidden_states has infinite or NaN values, or zeros alone" in err
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense")
    arguments = ["quantize", tmp_path / "dense", "--format", "mxfp4", "--layers", "0", "--output"]
    assert run(capsys, *arguments, tmp_path / "out")[0] == 0
    before = {file: file.read_bytes() for file in tmp_path.glob("*/*")}
    for output in (tmp_path / "out", tmp_path / "dense", tmp_path, tmp_path / "dense" / "config.json"):
        status, _, err = run(capsys, *arguments, output)
        assert status == 1 and "is there already" in err
    assert {file: file.read_bytes() for file in tmp_path.glob("*/*")} == before
    (tmp_path / "empty").mkdir()
    assert run(capsys, *arguments, tmp_path / "empty")[0] == 0


def stopped_after(count: int, error: BaseException):
    """`save_safetensors` that fails beyond so many files."""
    left = iter(range(count))

    def save(*arguments):
        if next(left, None) is None:
            raise error
        save_safetensors(*arguments)

    return save


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device", "x")])
def test_a_stopped_run_goes_on(error, capsys, tmp_path, monkeypatch):
    dense_checkpoint(tmp_path / "dense", layers=(0, 3, 5))
    arguments = ["quantize", tmp_path / "dense", "--format", "affine", "--group-size", "32", "--output"]
    expected = run_json(capsys, *arguments, tmp_path / "whole")
    monkeypatch.setattr(cli.quantize, "save_safetensors", stopped_after(0, error))
    status, _, err = run(capsys, *arguments, tmp_path / "out")
    assert status != 0 and not list(tmp_path.glob("out*")), "nothing was done"
    monkeypatch.setattr(cli.quantize, "save_safetensors", stopped_after(2, error))
    status, _, err = run(capsys, *arguments, tmp_path / "out")
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert f"2 of 3 layers are in {tmp_path / 'out'}.unfinished; the same command goes on from there" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="model-00003-of-00003.safetensors is missing"):
        ExpertReader(tmp_path / "out.unfinished")
    status, _, err = run(capsys, *arguments, tmp_path / "out", "--bits", "8")
    assert status == 1 and "is of a run whose bits was null, not 8.0; delete it, or name another folder" in err
    monkeypatch.setattr(cli.quantize, "save_safetensors", stopped_after(1, error))
    result = run_json(capsys, *arguments, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()
    errors = [[layer["projections"] for layer in each["layers"]] for each in (result, expected)]
    assert errors[0] == errors[1]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in (tmp_path / "whole").iterdir()
    )
    for one, other in zip(ExpertReader(tmp_path / "out"), ExpertReader(tmp_path / "whole"), strict=True):
        assert torch.equal(one.w1.dequantize(), other.w1.dequantize())


@pytest.mark.parametrize("arguments", [["--layers", "3-1"], ["--layers", "x"], ["--expert-bits", "7"]])
def test_wrong_usage(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        cli.main(["quantize", "x", "--output", "y", *arguments])
    assert exit.value.code == 2


def test_charts_of_little():
    """One layer; errors of zero."""
    ElementTree.fromstring(log_chart("a < b", "x", "y", [5], {"gate": [(0.0, 0.0, 0.0)]}))


def checkpoint_of(kind: str, folder) -> dict:
    """A small checkpoint of every kind that is read, of two layers, 128 by 128."""
    if kind == "dense":
        return dense_checkpoint(folder, (1, 2), 2, 128, 128)
    tensors, config = (
        {},
        {"hidden_size": 128, "moe_intermediate_size": 128, "quantization": {"group_size": 64, "bits": 4}},
    )
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp."
        if kind == "gpt-oss":
            for projection, rows in (("gate_up_proj", 256), ("down_proj", 128)):
                parts = dict(zip(("blocks", "scales", "bias"), gpt_oss(2, rows, 128, seed=layer), strict=True))
                tensors |= {f"{prefix}experts.{projection}_{key}": tensor for key, tensor in parts.items()}
        elif kind == "stacked":
            tensors |= {f"{prefix}experts.gate_up_proj": torch.randn(2, 128, 256).bfloat16()}
            tensors |= {f"{prefix}experts.gate_up_proj_bias": torch.randn(2, 256).bfloat16()}
            tensors |= {f"{prefix}experts.down_proj": torch.randn(2, 128, 128).bfloat16()}
            tensors |= {f"{prefix}experts.down_proj_bias": torch.randn(2, 128).bfloat16()}
            config |= {"model_type": "gpt_oss"}
        elif kind == "exl3":
            for expert, projection in itertools.product(range(2), ("gate_proj", "up_proj", "down_proj")):
                linear = exl3_linear(128, 128, 4, seed=10 * layer + expert)
                tensors |= {f"{prefix}experts.{expert}.{projection}.{key}": tensor for key, tensor in linear.items()}
            config |= {"model_type": "mistral4"}
        else:
            for projection in ("gate_proj", "up_proj", "down_proj"):
                weights = to_mlx(torch.randn(2, 128, 128).numpy(), "bfloat16")
                parts = dict(zip(("weight", "scales", "biases"), mlx_quantize(weights, 64, 4, "affine"), strict=True))
                tensors |= {f"{prefix}switch_mlp.{projection}.{key}": tensor for key, tensor in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("kind", ["dense", "stacked", "mlx", "gpt-oss", "exl3"])
def test_every_kind_of_checkpoint(kind, capsys, tmp_path):
    """What is written computes the layer that was read, as far as 8 bits go: rows in order, biases and scales kept."""
    checkpoint_of(kind, tmp_path / "in")
    plot = tmp_path / "errors.svg"
    arguments = ["--output", tmp_path / "out", "--format", "affine", "--bits", "8", "--plot", plot]
    status, out, err = run(capsys, "quantize", tmp_path / "in", *arguments)
    assert status == 0, err
    assert "layer 2 (2 of 2) down [########################] 100%" in err and "2 layers" in out
    assert len(list(ElementTree.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}circle"))) == 6
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    ids, weights = torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.full((3, 2), 0.5)
    results = []
    for folder in ("in", "out"):
        with ExpertReader(tmp_path / folder) as reader:
            assert reader.layers == [1, 2]
            layer = reader.read(2)
        w1, w2 = (w.dequantize() if isinstance(w, QuantizedExperts) else w.float() for w in (layer.w1, layer.w2))
        biases = [
            w.bias if isinstance(w, QuantizedExperts) else own
            for w, own in ((layer.w1, layer.w1_bias), (layer.w2, layer.w2_bias))
        ]
        assert all((bias is not None) == (kind in ("gpt-oss", "stacked")) for bias in biases)
        options = {"interleaved": layer.interleaved} | {
            name: bias.float() for name, bias in zip(("w1_bias", "w2_bias"), biases, strict=True) if bias is not None
        }
        scaled = weights * layer.routing_scale
        results.append(metal_moe.fused_experts(x, w1, w2, scaled, ids, **options))
    assert results[0].isfinite().all()
    assert relative_mse(results[1], results[0]) < 1e-3


def with_shared(folder, layers=(1,), hidden=64, intermediate=96) -> None:
    """Dense shared experts, and what weighs them, beside a dense checkpoint's routed ones."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in layers:
        block = f"model.layers.{layer}.mlp."
        for name, shape in (
            ("gate", (intermediate, hidden)),
            ("up", (intermediate, hidden)),
            ("down", (hidden, intermediate)),
        ):
            tensors[f"{block}shared_expert.{name}_proj.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{block}shared_expert_gate.weight"] = torch.randn(1, hidden, generator=generator)
    save_file(tensors, folder / "more.safetensors")


def test_shared_experts(capsys, tmp_path):
    """Quantised, reported and drawn as routed ones are; a layer has none."""
    dense_checkpoint(tmp_path / "dense", (1, 2), 2)
    with_shared(tmp_path / "dense")
    plot = tmp_path / "errors.svg"
    arguments = ["--format", "affine", "--group-size", "32", "--bits", "3", "--down-bits", "4", "--expert-bits", "1=8"]
    arguments = ["quantize", tmp_path / "dense", *arguments]
    result = run_json(capsys, *arguments, "--output", tmp_path / "out", "--plot", plot)
    with ExpertReader(tmp_path / "dense") as before, ExpertReader(tmp_path / "out") as after:
        exact, made = before.read(1), after.read(1)
        assert after.read(2).shared_w1 is None
    assert torch.equal(made.shared_gate, exact.shared_gate)
    halves = [exact.shared_w1[:, :96], exact.shared_w1[:, 96:], exact.shared_w2]
    got = [*made.shared_w1.dequantize().split(96, 1), made.shared_w2.dequantize()]
    first, second = result["layers"]
    assert [errors["projection"] for errors in first["projections"]] == [
        *("gate", "up", "down"),
        *("shared gate", "shared up", "shared down"),
    ]
    assert (first["shared_experts"], second["shared_experts"], len(second["projections"])) == (1, 0, 3)
    assert first["weights"] == 2 * 3 * 64 * 32 + 3 * 64 * 96
    for errors, quantised, dense, bits in zip(first["projections"][3:], got, halves, (3, 3, 4), strict=True):
        assert errors["bits"] == [bits]
        assert errors["relative_mse"] == [pytest.approx(relative_mse(quantised, dense), rel=1e-5)]
        same = QuantizedExperts.quantize(dense, format="affine", bits=bits, group_size=32)
        assert torch.equal(quantised, same.dequantize())
    drawing = ElementTree.fromstring(plot.read_text())
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"shared gate", "shared up", "shared down"} <= words
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * 3 + 3
    status, out, err = run(capsys, *arguments, "--output", tmp_path / "more", "--shared-bits", "6", "--layers", "1")
    assert status == 0 and "layer 1 (1 of 1) shared down [########################] 100%" in err
    assert [line.split()[1:4] for line in out.splitlines()[5:8]] == [["shared", p, "6"] for p in ("gate", "up", "down")]


def test_shared_experts_with_calibration(capsys, tmp_path):
    """They see the inputs that routed ones see; down is calibrated on what their own gate and up make of them."""
    dense_checkpoint(tmp_path / "dense", (1,), 1, hidden=128, intermediate=128)
    with_shared(tmp_path / "dense", hidden=128, intermediate=128)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    inputs += 0.1 * torch.randn(256, 128, generator=generator)
    save_file({"model.layers.1.mlp.hidden_states": inputs}, tmp_path / "calibration.safetensors")
    arguments = ["--bits", "6", "--calibration", tmp_path / "calibration.safetensors"]
    result = run_json(capsys, "quantize", tmp_path / "dense", "--output", tmp_path / "out", *arguments)
    with ExpertReader(tmp_path / "dense") as before, ExpertReader(tmp_path / "out") as after:
        exact, made = before.read(1), after.read(1)
    gate, up = exact.shared_w1[0].split(128)
    hidden = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    got = [*made.shared_w1.dequantize()[0].split(128), made.shared_w2.dequantize()[0]]
    cases = zip((inputs, inputs, hidden), (gate, up, exact.shared_w2[0]), got, strict=True)
    for errors, (x, weights, quantised) in zip(result["layers"][0]["projections"][3:], cases, strict=True):
        output_mse = relative_mse(x @ quantised.T, x @ weights.T)
        assert errors["relative_output_mse"] == [pytest.approx(output_mse, rel=1e-3)]
        assert output_mse < 0.6 * errors["relative_mse"][0]


def test_shared_experts_that_are_kept(capsys, tmp_path):
    dense_checkpoint(tmp_path / "dense", (1,), 2)
    with_shared(tmp_path / "dense", intermediate=72)
    arguments = ["quantize", tmp_path / "dense", "--output", tmp_path / "out", "--format", "mxfp4"]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "layer 1, shared down: QuantizedExperts.quantize: the matrix has 72 columns" in err
    assert "--keep-shared leaves them" in err
    result = run_json(capsys, *arguments, "--keep-shared")
    assert result["layers"][0]["shared_experts"] == 0 and len(result["layers"][0]["projections"]) == 3
    with ExpertReader(tmp_path / "dense") as before, ExpertReader(tmp_path / "out") as after:
        exact, kept = before.read(1), after.read(1)
    for name in ("shared_w1", "shared_w2", "shared_gate"):
        assert torch.equal(getattr(kept, name), getattr(exact, name))
    assert kept.shared_w1.shape == (1, 144, 64)
