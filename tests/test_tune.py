"""`metal-moe tune` and its table: what is measured, written, read, refused, and that results do not depend on it."""

import json
import math
import subprocess
import sys

import cases
import metal_moe
import pytest
import torch
from cases import DTYPES, FAMILIES, assert_close, default_family, make_layer
from metal_moe import _core, cli, layers, tuning
from metal_moe.cli import tune

OWN_DEVICE = True
# H 128, I 64: milliseconds for every measurement.
TINY = ["--model", "qwen3", "--scale", "0.0625", "--budget", "0.0001"]


@pytest.fixture
def table(tmp_path, monkeypatch, device):
    """The path of a table of this test's own; the engine forgets it afterwards."""
    path = tmp_path / "settings" / "tuning.json"
    monkeypatch.setenv("METAL_MOE_TUNING", str(path))
    yield path
    monkeypatch.setenv("METAL_MOE_TUNING", "")
    tuning.apply(*engine_of(device))


def engine_of(device):
    info = metal_moe.device_info(device)
    return info["engine"], info["name"]


def run(capsys, *arguments):
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, device, *arguments):
    status, out, err = run(capsys, *arguments, "--device", str(device), "--json")
    assert status == 0, err
    return json.loads(out)


def layer_record(layer=None, **thresholds):
    """A record for a layer of the tests, or for every shape."""
    shape = {"hidden": 0, "intermediate": 0, "experts": 0, "top_k": 0}
    if layer is not None:
        tokens, hidden = layer.hidden_states.shape
        shape = {"hidden": hidden, "intermediate": layer.w2.shape[2], "experts": layer.w1.shape[0]}
        shape["top_k"] = layer.topk_ids.shape[1]
    dtype = "bf16" if layer is None else next(n for n, t in DTYPES.items() if t is layer.hidden_states.dtype)
    bits = 32.0 if dtype == "fp32" else 16.0
    limits = {"decode_tokens": 1, "prefill4_tokens": 1, "base_tokens": 1, **thresholds}
    return {**shape, "dtype": dtype, "quantized": False, "weight_bits": bits, **limits}


def write(path, device, *layers, **fields):
    engine, name = engine_of(device)
    record = {"device": name, "engine": engine, "version": metal_moe.__version__, "layers": list(layers), **fields}
    tuning.write(path, [record])
    tuning.apply(engine, name)


def family(tokens, dtype=torch.bfloat16, hidden=64):
    make_layer(tokens, hidden, 48, 8, 2, dtype).to(cases.DEVICE).run()
    return metal_moe.last_dispatch()["family"].removesuffix("_fp32acc")


def test_measures_and_remembers(table, capsys, device):
    result = run_json(capsys, device, *TINY, "--tokens", "1", "2", "5", "40")
    engine, name = engine_of(device)
    (record,) = json.loads(table.read_text())["records"]
    assert (record["device"], record["engine"]) == (name, engine.partition(":")[0])
    assert record["version"] == metal_moe.__version__ and record["date"].endswith("+00:00")
    own, others = record["layers"]
    assert (own["model"], own["hidden"], own["intermediate"]) == ("Qwen3-30B-A3B", 128, 64)
    assert (own["experts"], own["top_k"], own["dtype"], own["weight_bits"]) == (128, 8, "bf16", 16.0)
    assert set(own["seconds"]) == {"1", "2", "5", "40"}
    for count, seconds in own["seconds"].items():
        expected = set(tune.FAMILIES) - (set() if "moe_decode" in seconds else {"moe_decode"})
        assert set(seconds) == expected and all(value > 0 for value in seconds.values()), count
    assert "moe_decode" in own["seconds"]["1"]
    assert 1 <= own["decode_tokens"] <= own["prefill4_tokens"] <= own["base_tokens"]
    assert (others["hidden"], others["model"]) == (0, "other shapes")
    assert [others[one] for one in tuning.THRESHOLDS] == [own[one] for one in tuning.THRESHOLDS]
    assert record["matmul"].keys() == {"bf16"} and record["matmul"]["bf16"] >= 0
    assert result["layers"] == record["layers"] and result["table"] == str(table)

    # It holds at once, and for whoever reads it later.
    assert tuning.matmul_limit(engine, torch.bfloat16) == record["matmul"]["bf16"]
    tokens = min(own["decode_tokens"], 64) + 1
    selected, _ = metal_moe.select_moe_kernel(tokens, True, device=device)
    limits = dict(zip(tune.FAMILIES, (own[one] for one in tuning.THRESHOLDS), strict=False))
    expected = next((one for one, limit in limits.items() if tokens <= limit), "moe_large_batch")
    assert selected == expected + "_fp32acc" and family(tokens) == expected
    shown = run_json(capsys, device, "--show")
    assert shown["layers"] == record["layers"] and shown["measured"] == record["date"]


def test_a_second_run_keeps_what_it_does_not_measure(table, capsys, device):
    run_json(capsys, device, *TINY, "--tokens", "1", "4", "--only", "layers")
    (first,) = json.loads(table.read_text())["records"]
    assert first["matmul"] == {} and len(first["layers"]) == 2
    arguments = ["--model", "glm", "--scale", "0.0625", "--budget", "0.0001", "--tokens", "1", "4"]
    run_json(capsys, device, *arguments, "--only", "layers")
    run_json(capsys, device, *TINY, "--only", "matmul", "--dtype", "fp32")
    (second,) = json.loads(table.read_text())["records"]
    assert [one["model"] for one in second["layers"]] == ["Qwen3-30B-A3B", "GLM-4.7-Flash", "other shapes"]
    assert second["layers"][0] == first["layers"][0] and second["matmul"].keys() == {"fp32"}
    run_json(capsys, device, *TINY, "--tokens", "1", "4", "--only", "layers")
    (third,) = json.loads(table.read_text())["records"]
    assert sorted(one["model"] for one in third["layers"]) == sorted(one["model"] for one in second["layers"])


def test_quantised_weights(table, capsys, device):
    result = run_json(capsys, device, *TINY, "--tokens", "1", "3", "--format", "dense", "affine4", "--only", "layers")
    dense, quantized, *_ = result["layers"]
    assert (dense["weights"], dense["quantized"], quantized["weights"]) == ("bf16", False, "affine4")
    assert quantized["quantized"] and quantized["weight_bits"] == pytest.approx(4.5)
    write(table, device, {**quantized, "decode_tokens": 2, "prefill4_tokens": 2, "base_tokens": 9})
    for tokens in (2, 17, 40):
        published = _core.select_moe_kernel(tokens, False, 4, 4, 4)
        assert metal_moe.select_moe_kernel(tokens, False, 4, 4, 4, device=device) == published, "of one shape alone"
    layer = make_layer(3, 128, 64, 128, 8, torch.bfloat16).to(cases.DEVICE)
    w1, w2 = (metal_moe.QuantizedExperts.quantize(one, **layers.FORMATS["affine4"]) for one in (layer.w1, layer.w2))
    metal_moe.fused_experts(layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids)
    assert metal_moe.last_dispatch()["family"].startswith("moe_base")
    layer.run()
    assert metal_moe.last_dispatch()["family"].startswith(default_family(3, top_k=8))


def test_trellis_weights(table, capsys, device):
    """They have entries of their own, which say nothing of other quantised weights."""
    result = run_json(capsys, device, *TINY, "--tokens", "1", "3", "--format", "trellis4", "--only", "layers")
    own, others = result["layers"]
    for entry in (own, others):
        assert (entry["weights"], entry["quantized"], entry["trellis"]) == ("trellis4", True, True)
    assert set(own["seconds"]["3"]) <= set(tune.FAMILIES) and own["weight_bits"] > 4
    layer = layers.make_layer(layers.LayerShape("", 128, 128, 8, 2), torch.bfloat16, cases.DEVICE)
    x, ids = layer.hidden_states(5), torch.tensor([[0, 1]] * 5, device=cases.DEVICE)
    weights = torch.full((5, 2), 0.5, device=cases.DEVICE)

    def run_family(form, tokens):
        out = metal_moe.fused_experts(x[:tokens], *quantized[form], weights[:tokens], ids[:tokens])
        return metal_moe.last_dispatch()["family"].removesuffix("_fp32acc"), out

    quantized = {form: layers.quantize(layer, form) for form in ("trellis3", "affine4")}
    tuning.write(table, [])
    tuning.apply(*engine_of(device))
    untuned = {tokens: run_family("affine4", tokens)[0] for tokens in (2, 3, 4, 5)}
    dense = [each.to("cpu").dequantize(torch.float64) for each in quantized["trellis3"]]
    expected = metal_moe.reference.experts(x.cpu(), *dense, weights.cpu(), ids.cpu()).numpy()
    limits = {"decode_tokens": 2, "prefill4_tokens": 3, "base_tokens": 4}
    write(table, device, {**layer_record(**limits), "quantized": True, "trellis": True, "weight_bits": 4.0})
    chosen = [run_family("trellis3", tokens) for tokens in (2, 3, 4, 5)]
    assert [family for family, _ in chosen] == ["moe_decode", "moe_prefill4", "moe_base", "moe_large_batch"]
    for tokens, (_, out) in zip((2, 3, 4, 5), chosen, strict=True):
        assert_close(out, expected[:tokens])
        assert run_family("affine4", tokens)[0] == untuned[tokens]


def test_layers_use_the_table(table, device):
    """The entry for the layer's own shape, then the one for all others of its dtype, then the defaults."""
    own = make_layer(4, 64, 48, 8, 2, torch.bfloat16)
    write(
        table,
        device,
        layer_record(decode_tokens=3, prefill4_tokens=3, base_tokens=6),
        layer_record(own, decode_tokens=2, prefill4_tokens=4, base_tokens=4),
    )
    families = {tokens: family(tokens) for tokens in (2, 3, 4, 5)}
    assert families == {2: "moe_decode", 3: "moe_prefill4", 4: "moe_prefill4", 5: "moe_large_batch"}
    assert [family(tokens, hidden=72) for tokens in (3, 4, 7)] == ["moe_decode", "moe_base", "moe_large_batch"]
    assert family(3, torch.float32) == default_family(3)
    names = [metal_moe.select_moe_kernel(tokens, True, device=device)[0] for tokens in (3, 4, 7)]
    assert names == ["moe_decode_fp32acc", "moe_base_fp32acc", "moe_large_batch_fp32acc"]
    assert metal_moe.select_moe_kernel(3, False, 4, 4, 4, device=device)[0] == "moe_trellis_swiglu_prefill4"
    write(table, device, {**layer_record(prefill4_tokens=2, base_tokens=2), "quantized": True, "weight_bits": 4.5})
    assert metal_moe.select_moe_kernel(3, False, 4, 4, 4, device=device)[0] == "moe_trellis_swiglu_large_batch"


def test_row_tiles_of_the_table(table, device):
    for largest, expected in ((16, 16), (64, 64)):
        write(table, device, layer_record(largest_row_tile=largest, row_tile_per_mean_rows=2.0))
        make_layer(64, 64, 48, 2, 1, torch.bfloat16).to(cases.DEVICE).run(kernel="moe_large_batch")
        assert metal_moe.last_dispatch()["row_tile"] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_no_table(table, device, dtype):
    """Whatever the thresholds and tiles: within rounding of float64."""
    for tokens in (1, 3, 21, 40):
        layer = make_layer(tokens, 64, 48, 8, 2, DTYPES[dtype], shared=1)
        moved, expected = layer.to(cases.DEVICE), layer.reference()
        for place in range(len(FAMILIES) - 1):
            limits = [1] * place + [tuning.UNLIMITED] * (3 - place)
            for largest in (8, 128):
                thresholds = dict(zip(tuning.THRESHOLDS, limits, strict=True))
                write(table, device, layer_record(layer, **thresholds, largest_row_tile=largest))
                assert_close(moved.run().cpu(), expected, (layer, thresholds, largest))
                name = metal_moe.last_dispatch()["family"].removesuffix("_fp32acc")
                assert name == ("moe_decode" if tokens == 1 else tune.FAMILIES[place])


def test_matmul_uses_the_table(table, device):
    engine, _ = engine_of(device)
    a, b = torch.ones(4, 8, device=device), torch.ones(8, 2, device=device)
    for limit, ours in ((64, True), (63, False), (0, False)):
        write(table, device, matmul={"fp32": limit})
        metal_moe.matmul(a, b)
        assert (metal_moe.last_dispatch()["family"] != "torch") == ours
    assert tuning.matmul_limit(engine, torch.bfloat16) == tuning.default_matmul_limit(engine, torch.bfloat16)


def test_other_devices_and_versions_are_not_used(table, device):
    engine, name = engine_of(device)
    layers = [layer_record(decode_tokens=30, prefill4_tokens=30, base_tokens=30)]
    right = {"device": name, "engine": engine, "version": metal_moe.__version__, "layers": layers}
    for wrong in ({"device": "another"}, {"version": "0.0.0"}):
        tuning.write(table, [{**right, **wrong}])
        tuning.apply(engine, name)
        assert family(9) == default_family(9), wrong
    tuning.write(table, [{**right, "device": "another"}, right])
    tuning.apply(engine, name)
    assert family(9) == "moe_decode"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no tuning table: Expecting value"),
        ("{", "is no tuning table: Expecting property name"),
        ("\x00\x01", "is no tuning table"),
        ("[]", "format is None; it must be 1"),
        ('{"format": 2, "records": []}', "format is 2; it must be 1"),
        ('{"format": 1}', "records is not a list of objects"),
        ('{"format": 1, "records": [3]}', "records is not a list of objects"),
    ],
)
def test_files_that_are_no_tables(table, capsys, device, text, message):
    """A warning that names the file, and the defaults; the command refuses to overwrite them."""
    write(table, device, layer_record(decode_tokens=30, prefill4_tokens=30, base_tokens=30))
    assert family(9) == "moe_decode"
    table.write_text(text)
    with pytest.warns(RuntimeWarning, match="the tuning table is not used, defaults hold") as caught:
        tuning.apply(*engine_of(device))
    assert message in str(caught[0].message) and str(table) in str(caught[0].message)
    assert family(9) == default_family(9)
    for arguments in (TINY, ["--reset"], ["--show"]):
        status, _, err = run(capsys, *arguments, "--device", str(device))
        assert status == 1 and message in err and str(table) in err
    assert table.read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_tokens": 0}, "decode_tokens is 0.*: must be at least 1"),
        ({"decode_tokens": 9}, "decode_tokens is 9.*must be at most 1.*prefill4_tokens"),
        ({"decode_tokens": "1"}, "decode_tokens is '1'; it must be of type int"),
        ({"decode_tokens": True}, "decode_tokens is True; it must be of type int"),
        ({"base_tokens": 2**32}, "base_tokens is 4294967296; it must be from 0 to 4294967295"),
        ({"hidden": -1}, "hidden is -1; it must be from 0"),
        ({"largest_row_tile": 0}, "largest_row_tile is 0"),
        ({"row_tile_per_mean_rows": math.nan}, "row_tile_per_mean_rows is nan"),
        ({"dtype": "int8"}, "dtype is 'int8': must be fp32, fp16 or bf16"),
        ({"quantized": 1}, "quantized is 1; it must be of type bool"),
    ],
)
def test_entries_that_make_no_sense(table, device, change, message):
    with pytest.warns(RuntimeWarning, match=message) as caught:
        write(table, device, {**layer_record(), **change})
    assert str(table) in str(caught[0].message)
    assert family(9) == default_family(9)


@pytest.mark.parametrize("limits", [{"bf16": -1}, {"bf16": 1.5}, {"bf16": True}, {"int8": 1}, [1]])
def test_matmul_limits_that_make_no_sense(table, device, limits):
    engine, _ = engine_of(device)
    with pytest.warns(RuntimeWarning, match="matmul"):
        write(table, device, matmul=limits)
    assert tuning.matmul_limit(engine, torch.bfloat16) == tuning.default_matmul_limit(engine, torch.bfloat16)


def test_reset(table, capsys, device):
    engine, name = engine_of(device)
    write(table, device, layer_record(decode_tokens=30, prefill4_tokens=30, base_tokens=30), matmul={"bf16": 5})
    (record,) = tuning.read(table)
    other, older = {**record, "device": "another"}, {**record, "version": "0.0.0"}
    tuning.write(table, [other, older, record])
    assert family(9) == "moe_decode"
    result = run_json(capsys, device, "--reset")
    assert result["layers"] == [] and result["measured"] is None
    assert tuning.read(table) == [other]
    assert family(9) == default_family(9)
    assert tuning.matmul_limit(engine, torch.bfloat16) == tuning.default_matmul_limit(engine, torch.bfloat16)
    status, out, _ = run(capsys, "--reset", "--device", str(device))
    assert status == 0 and "nothing is measured any more" in out


def test_show_without_a_table(table, capsys, device):
    status, out, err = run(capsys, "--show", "--device", str(device))
    assert status == 0 and "defaults" in out and str(table) in out and not table.exists()
    result = run_json(capsys, device, "--show")
    assert result["defaults"]["matmul"] == {
        name: tuning.default_matmul_limit(result["engine"], dtype) for name, dtype in DTYPES.items()
    }
    assert result["layers"] == [] and set(result["matmul"]) == set(DTYPES)


def test_text_and_progress(table, capsys, device):
    status, out, err = run(capsys, *TINY, "--tokens", "1", "2", "--device", str(device))
    assert status == 0
    for text in ("Qwen3-30B-A3B 128 x 64", "other shapes", "decode to", "all others", "multiply-adds", str(table)):
        assert text in out
    for text in ("drawing", "decode, 1 tokens", "matmul (bf16) 1 x 16 by 16 x 16", "100%", "s left"):
        assert text in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "--reset"], "--show and --reset are given"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--scale", "0"], "--scale is 0.0; it must be above 0"),
        (["--budget", "nan"], "--budget is nan; it must be above 0"),
        (["--device", "meta"], "device is"),
    ],
)
def test_refused(table, capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 1 and message in err and not table.exists()


def test_no_table(monkeypatch, capsys, device):
    monkeypatch.setenv("METAL_MOE_TUNING", "")
    assert tuning.path() is None
    status, _, err = run(capsys, *TINY, "--device", str(device))
    assert status == 1 and "METAL_MOE_TUNING is empty" in err


def test_a_table_that_cannot_be_written(table, capsys, device):
    table.parent.write_text("no folder")
    status, _, err = run(capsys, *TINY, "--tokens", "1", "--only", "matmul", "--device", str(device))
    assert status == 1 and str(table.parent) in err


def test_an_interrupted_run_leaves_nothing_behind(table, capsys, device, monkeypatch):
    """Neither a table nor a candidate that was being tried out."""
    write(table, device, layer_record(decode_tokens=30, prefill4_tokens=30, base_tokens=30))
    before = table.read_text()

    def interrupt(*_):
        _core.set_tuning_table(engine_of(device)[0], [])
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "best_thresholds", interrupt)
    assert run(capsys, *TINY, "--tokens", "1", "--device", str(device))[0] == 130
    assert table.read_text() == before and family(9) == "moe_decode"
    assert [one.name for one in table.parent.iterdir()] == [table.name]


def test_path(monkeypatch, tmp_path):
    monkeypatch.delenv("METAL_MOE_TUNING", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert tuning.path() == tmp_path / ".config" / "metal_moe" / "tuning.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    assert tuning.path() == tmp_path / "settings" / "metal_moe" / "tuning.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning.path() == tmp_path / "Library" / "Application Support" / "metal_moe" / "tuning.json"
    monkeypatch.setenv("METAL_MOE_TUNING", "/elsewhere/table.json")
    assert str(tuning.path()) == "/elsewhere/table.json"


@pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="one device is enough: every engine is announced alike")
def test_a_new_process_reads_it(table, device):
    """When the device is first used; one that cannot be read is a warning there, too."""
    write(table, device, layer_record(decode_tokens=30, prefill4_tokens=30, base_tokens=30))
    code = "import metal_moe; print(metal_moe.select_moe_kernel(9, True)[0])"
    for expected, warned in (("moe_decode_fp32acc", False), ("moe_prefill4_fp32acc", True)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.strip() == expected
        assert ("tuning table is not used" in done.stderr) == warned
        table.write_text("no table")


# --- choosing ----------------------------------------------------------------------------------------------------

DEFAULTS = {"decode_tokens": 1, "prefill4_tokens": 16, "base_tokens": 32}


def seconds(fastest, ratio=2.0):
    """Times at which `fastest` [tokens -> family] is best by `ratio`."""
    return {count: {one: 1.0 if one == best else ratio for one in tune.FAMILIES} for count, best in fastest.items()}


def test_thresholds_lie_between_what_was_measured():
    decode, prefill4, base, large = tune.FAMILIES
    measured = seconds({1: decode, 2: decode, 4: prefill4, 8: base, 16: large, 64: large})
    expected = {"decode_tokens": 2, "prefill4_tokens": 5, "base_tokens": 11}
    assert tune.best_thresholds([measured], DEFAULTS) == expected
    assert tune.best_thresholds([measured, measured], DEFAULTS) == expected


def test_families_that_are_never_best():
    decode, prefill4, *_, large = tune.FAMILIES
    measured = seconds({1: decode, 2: prefill4, 8: prefill4, 64: prefill4})
    unlimited = {"decode_tokens": 1, "prefill4_tokens": tuning.UNLIMITED, "base_tokens": tuning.UNLIMITED}
    assert tune.best_thresholds([measured], DEFAULTS) == unlimited
    measured = seconds({1: decode, 2: large, 8: large, 64: large})
    ones = {"decode_tokens": 1, "prefill4_tokens": 1, "base_tokens": 1}
    assert tune.best_thresholds([measured], DEFAULTS) == ones
    # Even where grouped families win at one token: its family is decode.
    assert tune.best_thresholds([seconds({1: large, 2: large})], DEFAULTS) == ones


def test_the_defaults_stay_where_others_are_hardly_better():
    decode, _, base, _ = tune.FAMILIES
    measured = seconds({1: decode, 2: base, 8: base, 64: base}, ratio=1.01)
    assert tune.best_thresholds([measured], DEFAULTS) == DEFAULTS
    measured = seconds({1: decode, 2: base, 8: base, 64: base}, ratio=1.2)
    assert tune.best_thresholds([measured], DEFAULTS)["prefill4_tokens"] == 1


def test_what_was_not_measured_is_not_chosen():
    decode, prefill4, *_ = tune.FAMILIES
    measured = seconds({1: decode, 2: decode, 8: prefill4})
    del measured[8][decode]
    assert tune.best_thresholds([measured], DEFAULTS)["decode_tokens"] == 4


def test_limit_of_matmul():
    works = [1, 10, 100, 1000]
    log = math.log
    assert tune.best_limit([(w, log(0.5) if w < 50 else log(2)) for w in works], 1000) == 10
    assert tune.best_limit([(w, log(2)) for w in works], 1000) == 0
    assert tune.best_limit([(w, log(0.5)) for w in works], 0) == 1000
    assert tune.best_limit([(w, log(0.999)) for w in works], 55) == 55, "hardly better"
    # One lucky product among unlucky ones does not decide.
    assert tune.best_limit([(1, log(2)), (10, log(0.9)), (100, log(2))], 1000) == 0
