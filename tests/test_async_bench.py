"""The benchmark of asynchronous dispatch on a tiny layer: its patterns and verdict; a wrong result fails it."""

import json
import sys
from pathlib import Path

import cases
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import async_dispatch  # noqa: E402 (found through the path above)
from async_bench import patterns, verdict  # noqa: E402

OWN_DEVICE = True
TINY = ["--scale", "0.03125", "--tokens", "1", "5", "--rounds", "3", "--operations", "5"]
OWNED = cases.DEVICE.type != "cuda"


def run(device: torch.device, *arguments: object) -> int:
    return async_dispatch.main(["--device", str(device), *TINY, *map(str, arguments)])


@pytest.fixture
def result(tmp_path, device) -> dict:
    path = tmp_path / "result.json"
    assert run(device, "--json", path) == 0
    return json.loads(path.read_text())


def test_every_pattern_is_measured(result):
    assert result["benchmark"] == "async_dispatch" and result["operations"] == 5
    assert [row["tokens"] for row in result["results"]] == [1, 5]
    names = {patterns.PLAIN, patterns.SYNCHRONOUS, patterns.AT_END}
    if OWNED:
        names |= {patterns.HANDLER}
        for count in (2, 4, 8):
            names |= {patterns.in_flight(count), patterns.encoders(count), patterns.one_encoder(count)}
    if cases.DEVICE.type == "cpu":
        names |= {patterns.BATCH}
    for row in result["results"]:
        assert set(row["seconds"]) == set(row["timings"]) == names
        for name, timing in row["timings"].items():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"] and timing["samples"] == 3
            assert row["seconds"][name] == timing["median"]
        assert row["different"] == []
        assert row["relative_error"] <= result["tolerance"]
        assert (row["handlers"] is not None) == row["owned_stream"] == OWNED
        assert (row["no_ops"] == []) == OWNED
        if OWNED:
            assert all(value >= 0 for value in row["handlers"].values()) and row["handlers"]["commit"] > 0
        layer = row["layer"]
        assert layer["router_and_experts"]["median"] >= max(layer["router"]["low"], layer["experts"]["low"])
        assert row["verdict"]["best"] in patterns.ASYNCHRONOUS
        assert 0 < row["verdict"]["router_share"] < 1


def timing(median: float, spread: float = 0.01) -> dict:
    return {"low": median * (1 - spread), "median": median, "high": median * (1 + spread), "samples": 7}


def row(**seconds: float) -> dict:
    return {
        "timings": {
            patterns.PLAIN: timing(seconds.get("plain", 1.0)),
            patterns.SYNCHRONOUS: timing(seconds.get("synchronous", 1.0)),
            patterns.in_flight(2): timing(seconds.get("flying", 1.0)),
            patterns.AT_END: timing(seconds.get("at_end", 1.0)),
            patterns.HANDLER: timing(0.1),
        },
        "layer": {
            "router": timing(seconds.get("router", 0.05)),
            "experts": timing(0.95),
            "router_and_experts": timing(0.95 + seconds.get("router", 0.05)),
        },
    }


@pytest.mark.parametrize(
    "seconds, question, gain, answer",
    [
        ({"flying": 1 / 1.077}, "dispatch", 0.077, verdict.NOT_WORTH_IT),
        ({"flying": 1 / 1.16}, "dispatch", 0.16, verdict.WORTH_IT),
        ({"flying": 2.0, "at_end": 2.0}, "dispatch", -0.5, verdict.NOT_WORTH_IT),
        ({"synchronous": 291.47, "at_end": 270.64}, "sync", 0.077, verdict.NOT_WORTH_IT),
        ({"router": 0.05}, "overlap", 1 / 0.95 - 1, verdict.NOT_WORTH_IT),
        ({"router": 0.5}, "overlap", 0.5 / 0.95, verdict.WORTH_IT),
    ],
)
def test_the_rule(seconds, question, gain, answer):
    found = verdict.of(row(**seconds))[question]
    assert found["gain"] == pytest.approx(gain, abs=5e-4)
    assert found["verdict"] == answer


def test_the_rule_needs_samples_that_are_apart():
    assert verdict.judge(timing(1.2, 0.2), timing(1.0, 0.2))["verdict"] == verdict.UNDECIDED
    assert verdict.of(row(flying=0.5, at_end=0.9))["best"] == patterns.in_flight(2), "a handler each is no alternative"


def test_text_json_and_plot_of_an_earlier_result(result, tmp_path, capsys):
    saved, picture = tmp_path / "saved.json", tmp_path / "saved.png"
    saved.write_text(json.dumps(result))
    capsys.readouterr()
    assert async_dispatch.main(["--load", str(saved), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    for part in ("plain calls", "completion handlers", "router's share", "Verdict", "GLM-4.7-Flash, 5 tokens:"):
        assert part in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_pattern_with_other_bits_fails(monkeypatch, device, capsys):
    original = patterns.Patterns.waiting

    def wrong(self, stream):
        pattern = original(self, stream)
        return lambda: [y + 1 for y in pattern()]

    monkeypatch.setattr(patterns.Patterns, "waiting", wrong)
    assert run(device) == 1
    assert "5 tokens: a wait after each does not give the bits of plain calls" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--rounds", "2"], "--rounds is 2; it must be at least 3"),
        (["--operations", "0"], "--operations is 0"),
        (["--scale", "-1"], "--scale is -1.0; it must be above 0"),
        (["--device", "meta"], "--device is meta; it must be one of"),
        (["--json", "nowhere/a.json"], "there is no folder"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        async_dispatch.main(arguments)
    assert message in capsys.readouterr().err


def test_a_file_of_another_benchmark_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"format": 1}')
    assert async_dispatch.main(["--load", str(path)]) == 1
    assert "is not a result of async_dispatch" in capsys.readouterr().err
