"""METAL_MOE_TRACE: the log, and trace files that are whole however a process ends.

Each process runs this file as a script, with what to do as argument.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import metal_moe
import pytest
import torch
from cases import DEVICE, make_layer
from metal_moe import _trace

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the processes of these tests compute CPU tensors")

DECODE = ["gate_up_decode_fp32acc_bf16", "down_decode_fp32acc_bf16"]
KINDS = {"X": {"operation", "encode", "device", "wait"}, "i": {"commit", "note"}, "M": {"track"}}


def decode() -> None:
    make_layer(1, 64, 48, 8, 2, torch.bfloat16).run()


def threads() -> None:
    """Three at once, each its own layer, many times."""
    layers = [make_layer(tokens, 64, 48, 8, 2, torch.bfloat16) for tokens in (1, 5, 20)]

    def work(layer: object) -> None:
        for _ in range(200):
            layer.run()

    workers = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def exception() -> None:
    decode()
    raise ValueError("as planned")


def error_inside() -> None:
    decode()
    try:
        make_layer(5, 63, 32, 3, 2).run(kernel="moe_simd")
    except ValueError:
        decode()


def abrupt() -> None:
    """No handler of Python's or C's runs at this end."""
    for _ in range(2000):
        decode()
    os._exit(7)


def fork() -> None:
    torch.set_num_threads(1)  # a child has none of the OpenMP threads that PyTorch would wait for
    decode()
    for silent in (True, False):
        child = os.fork()
        if child == 0:
            if not silent:
                decode()
                metal_moe._core.collect()
            os._exit(0)
        os.waitpid(child, 0)
    print(child)
    decode()


def requested() -> None:
    layer = make_layer(20, 64, 48, 8, 2, torch.bfloat16)
    layer.run(kernel="moe_base")
    metal_moe.fused_topk(torch.randn(2, 8), 2)


def passed() -> None:
    """Operations of another device than the stream's, as those on PyTorch's streams are in a LayerBatch."""
    for _ in range(2):
        with metal_moe.CommandStream() as stream:
            os.environ["METAL_MOE_CPU_ENGINE"] = "exact"
            decode()
            decode()
            os.environ["METAL_MOE_CPU_ENGINE"] = "native"
            decode()
        stream.synchronize()


ACTIONS: dict[str, Callable[[], None]] = {
    action.__name__: action for action in (decode, threads, exception, error_inside, abrupt, fork, requested, passed)
}


def start(action: str, trace: str, **variables: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("METAL_MOE_") or k == "METAL_MOE_LIBRARY"}
    environment |= {"METAL_MOE_TRACE": trace, **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__, action], env=environment, stdout=pipe, stderr=pipe, text=True)


def run(action: str, trace: str, **variables: str) -> tuple[int, str, str]:
    process = start(action, trace, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read(path: Path) -> list[dict]:
    """Events of a trace file, each well-formed."""
    events = json.loads(path.read_text())
    assert events
    for event in events:
        assert event["cat"] in KINDS[event["ph"]]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] > 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    return events


def of(events: list[dict], category: str) -> list[dict]:
    return [event for event in events if event["cat"] == category]


def end(event: dict) -> float:
    return round(event["ts"] + event["dur"], 3)  # nanoseconds


def check_nesting(events: list[dict]) -> None:
    """Spans of one track lie apart or inside one another: what viewers can draw."""
    for track in {event["tid"] for event in events}:
        spans = sorted((e for e in events if e["tid"] == track and e["ph"] == "X"), key=lambda e: (e["ts"], -end(e)))
        open_spans: list[dict] = []
        for span in spans:
            while open_spans and end(open_spans[-1]) <= span["ts"]:
                open_spans.pop()
            assert not open_spans or end(span) <= end(open_spans[-1]), (open_spans[-1], span)
            open_spans.append(span)


def test_trace_of_a_decode(tmp_path):
    path = tmp_path / "trace.json"
    assert run("decode", str(path))[0] == 0
    events = read(path)
    check_nesting(events)
    (operation,) = of(events, "operation")
    assert operation["name"] == "fused_experts"
    assert operation["args"] == {
        "engine": "native",
        "family": "moe_decode_fp32acc",
        "chosen_by": "tokens",
        "dispatches": 2,
    }
    encoded, ran = of(events, "encode"), of(events, "device")
    assert [event["name"] for event in encoded] == [event["name"] for event in ran] == DECODE
    for on_host, on_device in zip(encoded, ran, strict=True):
        assert on_host["args"] == on_device["args"]
        assert on_host["args"]["bytes"] > 2 * 64 * 48 * 2 and re.fullmatch(r"\d+x\d+x\d+", on_host["args"]["grid"])
        assert on_host["tid"] == operation["tid"] != on_device["tid"]
        assert operation["ts"] <= on_host["ts"] and end(on_host) <= end(operation)
        assert end(on_host) <= on_device["ts"] and end(on_device) <= end(operation), "CPU tensors are waited for"
    assert end(ran[0]) <= ran[1]["ts"]
    assert len(of(events, "commit")) == len(of(events, "wait")) == 1
    names = {event["tid"]: event["args"]["name"] for event in of(events, "track")}
    assert "thread 1" in names[operation["tid"]] and names[ran[0]["tid"]] == "native stream 1"


def test_engines_without_timestamps_run_each_dispatch_alone(tmp_path):
    """`exact` takes none, like some virtual GPUs: times are those of whole command buffers."""
    path = tmp_path / "trace.json"
    assert run("decode", str(path), METAL_MOE_CPU_ENGINE="exact")[0] == 0
    events = read(path)
    ran = of(events, "device")
    assert [event["name"] for event in ran] == DECODE
    assert all(event["dur"] > 0 for event in ran) and end(ran[0]) <= ran[1]["ts"]


def test_threads_have_tracks_of_their_own(tmp_path):
    path = tmp_path / "trace.json"
    assert run("threads", str(path))[0] == 0
    events = read(path)
    check_nesting(events)
    operations = of(events, "operation")
    assert len(operations) == 600 and len({event["tid"] for event in operations}) == 3
    assert len(of(events, "encode")) == len(of(events, "device")) == 200 * 2 + 400 * 4
    assert len({event["tid"] for event in of(events, "device")}) <= 3


def test_an_exception_leaves_a_whole_file(tmp_path):
    path = tmp_path / "trace.json"
    status, _, err = run("exception", str(path))
    assert status == 1 and "as planned" in err
    assert len(of(read(path), "device")) == 2


def test_an_operation_that_fails_is_in_the_trace(tmp_path):
    path = tmp_path / "trace.json"
    assert run("error_inside", str(path))[0] == 0
    events = read(path)
    assert [event["args"]["dispatches"] for event in of(events, "operation")] == [2, 0, 2]
    assert len(of(events, "device")) == 4


def test_an_end_without_handlers_leaves_a_whole_file(tmp_path):
    """What was written until then."""
    path = tmp_path / "trace.json"
    assert run("abrupt", str(path))[0] == 7
    assert 100 < len(of(read(path), "operation")) <= 2000


def test_forked_processes_have_files_of_their_own(tmp_path):
    """One that runs nothing has none."""
    path = tmp_path / "trace.json"
    status, out, err = run("fork", str(path))
    assert status == 0, err
    child = tmp_path / f"trace.{out.strip()}.json"
    assert sorted(tmp_path.iterdir()) == sorted([path, child])
    events, of_child = read(path), read(child)
    assert len(of(events, "operation")) == 2 and len(of(of_child, "operation")) == 1
    assert {event["pid"] for event in events}.isdisjoint(event["pid"] for event in of_child)
    assert len(of(of_child, "device")) == 2
    assert "thread 1" in json.dumps(of(of_child, "track"))


def test_two_processes_never_share_a_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("left by an earlier run")
    processes = [start("threads", str(path)) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=300) and process.returncode == 0
    files = sorted(tmp_path.iterdir())
    assert path in files and len(files) <= 2
    assert sum(len(of(read(file), "operation")) for file in files) == 600 * len(files)
    for file in files:
        assert len({event["pid"] for event in read(file)}) == 1


def test_log(tmp_path):
    status, _, err = run("requested", "1")
    assert status == 0
    lines = [line.removeprefix("metal_moe: ") for line in err.splitlines() if line.startswith("metal_moe: ")]
    kernels = ["group", "gate_up_base_fp32acc_bf16", "down_base_fp32acc_bf16", "combine_bf16"]
    pattern = r"(\S+) on native: (\S+) grid \d+x\d+x\d+ threads \d+ bytes \d+(?: family (\S+) \(by (\w+)\))?"
    dispatches = [re.fullmatch(pattern, line) for line in lines[:4] + lines[5:6]]
    assert all(dispatches), lines
    base = ("moe_base_fp32acc", "kernel")
    assert [match.groups() for match in dispatches] == [
        *(("fused_experts", kernel, *base) for kernel in kernels),
        ("fused_topk", "route", None, None),
    ]
    assert lines[4] == "native stream 1: commit of 4 dispatches"
    assert lines[6] == "native stream 1: commit of 1 dispatches"
    assert len(lines) == 7


def test_a_batch_that_does_nothing_says_so_once(tmp_path):
    """Once for each `with` block; the trace file has it for every operation too."""
    note = "CommandStream of another device does nothing for fused_experts on exact"
    status, _, err = run("passed", "1")
    assert status == 0 and err.count("does nothing") == 2 and err.splitlines().count(f"metal_moe: {note}") == 2
    path = tmp_path / "trace.json"
    assert run("passed", str(path))[0] == 0
    events = read(path)
    assert [event["name"] for event in of(events, "note")] == [note, note]
    assert [(event["args"]["engine"], event["args"]["layer_batch"]) for event in of(events, "operation")] == [
        ("exact", "passed"),
        ("exact", "passed"),
        ("native", "encoded"),
    ] * 2


@pytest.mark.parametrize("value", ["", "0"])
def test_off(value, monkeypatch):
    for name in ("start_log", "start_trace"):
        monkeypatch.setattr(metal_moe._core, name, lambda *arguments: pytest.fail("started"))
    _trace.start_from_environment({"METAL_MOE_TRACE": value})
    _trace.start_from_environment({})


@pytest.mark.parametrize("value", ["yes", "2", "trace.txt", "nowhere/trace.json"])
def test_a_wrong_value_is_an_error(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f'METAL_MOE_TRACE is "{value}"'):
        _trace.start_from_environment({"METAL_MOE_TRACE": value})


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path):
    """Said once; the results are there."""
    (tmp_path / "full.json").symlink_to("/dev/full")
    status, _, err = run("threads", str(tmp_path / "full.json"))
    assert status == 0
    assert err.count("METAL_MOE_TRACE") == 1 and "full.json" in err


if __name__ == "__main__":
    ACTIONS[sys.argv[1]]()
