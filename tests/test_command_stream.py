"""CommandStream: encoding, waiting, handlers, back-pressure, failures, the interpreter's exit and forks."""

import gc
import sys
import threading
import time
import weakref

import cases
import metal_moe
import pytest
import torch
from cases import make_layer, python

OWN_DEVICE = True
on_cpu = pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="tests of owned streams on CPU tensors")
in_a_process = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


@pytest.fixture(params=["native", "exact"])
def engine(request, use_engine):
    if cases.DEVICE.type != "cpu":
        pytest.skip("tests of owned streams on CPU tensors")
    use_engine(request.param)
    return request.param


def small(seed: int = 0) -> cases.Layer:
    return make_layer(3, 32, 24, 4, 2, seed=seed)


@on_cpu
def test_results_are_there_after_synchronize(engine):
    layer = small()
    expected = layer.run()
    stream = metal_moe.CommandStream()
    assert stream.owned and stream.no_ops == () and stream.device == torch.device("cpu")
    with stream:
        y = layer.run()
        assert stream.pending_dispatches == metal_moe.last_dispatch()["dispatches"] > 0
        assert metal_moe.last_dispatch()["commits"] == 0
    assert stream.pending_dispatches == 0, "the end of the block commits"
    stream.synchronize()
    assert stream.in_flight == 0
    assert torch.equal(y, expected)


@on_cpu
def test_commits_by_dispatches_and_by_bytes():
    layer = small()
    layer.run()
    dispatches = metal_moe.last_dispatch()["dispatches"]
    for limit in ({"max_dispatches": 3 * dispatches}, {"max_bytes": 1}):
        with metal_moe.CommandStream(**limit) as stream:
            commits = []
            for _ in range(6):
                layer.run()
                commits.append(metal_moe.last_dispatch()["commits"])
        assert commits == ([0, 0, 1, 0, 0, 1] if "max_dispatches" in limit else [1] * 6)
        stream.close()


@on_cpu
def test_several_encoders_in_one_command_buffer():
    layer = small()
    expected = layer.run()
    with metal_moe.CommandStream() as stream:
        results = []
        for _ in range(8):
            results.append(layer.run())
            stream.end_encoder()
        assert metal_moe.last_dispatch()["commits"] == 0
    stream.synchronize()
    assert all(torch.equal(one, expected) for one in results)


@on_cpu
def test_handlers_run_in_order_on_another_thread(engine):
    layer = small()
    calls = []
    stream = metal_moe.CommandStream(max_in_flight=4)
    begin = time.perf_counter()
    with stream:
        for i in range(10):
            layer.run()
            stream.on_completed(lambda completion, i=i: calls.append((i, threading.get_ident(), completion)))
            stream.commit()
    stream.synchronize()
    end = time.perf_counter()
    assert [call[0] for call in calls] == list(range(10))
    assert len({call[1] for call in calls}) == 1 and calls[0][1] != threading.get_ident()
    times = [value for call in calls for value in call[2][:2]]
    assert times == sorted(times), "one command buffer after the other"
    assert begin <= times[0] and times[-1] <= end, "on the clock of time.perf_counter"
    assert all(call[2].error is None for call in calls)


@on_cpu
def test_a_handler_is_called_without_anybody_waiting():
    layer = small()
    expected = layer.run()
    called = threading.Event()
    found = []
    stream = metal_moe.CommandStream()
    with stream:
        y = layer.run()
        stream.on_completed(lambda _: (found.append(torch.equal(y, expected)), called.set()))
    assert called.wait(60)
    assert found == [True], "a handler sees the results"
    stream.close()


@on_cpu
def test_what_a_handler_raises_comes_at_the_next_sync():
    layer = small()
    stream = metal_moe.CommandStream()

    def handler(_):
        raise KeyError("the handler's own")

    with stream:
        layer.run()
        stream.on_completed(handler)
    with pytest.raises(RuntimeError, match="completion handler: KeyError: .*the handler's own"):
        stream.synchronize()
    stream.synchronize()  # once


@on_cpu
def test_a_handler_must_not_use_its_stream():
    layer = small()
    stream = metal_moe.CommandStream()
    messages = []

    def handler(_):
        for call in (stream.synchronize, stream.commit, stream.close, lambda: stream.in_flight):
            try:
                call()
            except RuntimeError as error:
                messages.append(str(error))

    with stream:
        layer.run()
        stream.on_completed(handler)
    stream.synchronize()
    assert len(messages) == 4 and all("called by a completion handler of the same stream" in m for m in messages)


@on_cpu
def test_back_pressure():
    """commit() waits while max_in_flight command buffers have not completed."""
    layer = small()
    release = threading.Event()
    stream = metal_moe.CommandStream(max_in_flight=2)
    committed = []

    def work():
        with stream:
            for i in range(4):
                layer.run()
                stream.on_completed(lambda _: release.wait(60))
                stream.commit()
                committed.append(i)

    thread = threading.Thread(target=work)
    thread.start()
    while len(committed) < 2:
        time.sleep(0.001)
    thread.join(0.1)
    assert committed == [0, 1], "the third waits for the first"
    release.set()
    thread.join(60)
    assert committed == [0, 1, 2, 3]
    stream.synchronize()


@on_cpu
def test_tensors_live_until_their_work_is_done():
    layer = small()
    stream = metal_moe.CommandStream()
    release = threading.Event()
    x = layer.hidden_states.clone()
    watched = weakref.ref(x)
    layer.hidden_states = x
    with stream:
        layer.run()
        stream.on_completed(lambda _: release.wait(60))
    layer.hidden_states = x = None
    gc.collect()
    assert watched() is not None
    release.set()
    stream.synchronize()
    assert watched() is None


@on_cpu
def test_cancel():
    layer = small()
    expected = layer.run()
    dispatches = metal_moe.last_dispatch()["dispatches"]
    stream = metal_moe.CommandStream()
    with stream:
        y = layer.run()
        stream.commit()
        layer.run()
        assert stream.cancel() == dispatches
        assert stream.cancel() == 0
    stream.synchronize()
    assert torch.equal(y, expected), "what was committed has run"
    assert metal_moe.pool_stats()["buffers_in_use"] == 0


@on_cpu
def test_streams_of_several_threads():
    layers = [small(seed) for seed in range(4)]
    expected = [layer.run() for layer in layers]
    wrong = []

    def work(t):
        stream = metal_moe.CommandStream(max_in_flight=t + 1, max_dispatches=t + 1)
        with stream:
            results = [layers[t].run() for _ in range(100)]
        stream.synchronize()
        wrong.extend(y for y in results if not torch.equal(y, expected[t]))
        stream.close()

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_cpu
def test_one_stream_for_several_threads():
    """Calls take turns; what each thread encodes stays in its order."""
    layers = [small(seed) for seed in range(4)]
    expected = [layer.run() for layer in layers]
    results: list = [[] for _ in layers]
    stream = metal_moe.CommandStream(max_dispatches=5)

    def work(t):
        with stream:
            for _ in range(100):
                results[t].append(layers[t].run())

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.synchronize()
    for t in range(4):
        assert all(torch.equal(y, expected[t]) for y in results[t])


@on_cpu
def test_close():
    layer = small()
    expected = layer.run()
    stream = metal_moe.CommandStream()
    with stream:
        y = layer.run()
    stream.close()
    stream.close()
    assert stream.closed
    assert torch.equal(y, expected), "what was committed has been waited for"
    for call in (stream.commit, stream.synchronize, stream.check, stream.cancel, stream.end_encoder, stream.__enter__):
        with pytest.raises(RuntimeError, match="the stream is closed"):
            call()


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"device": "meta"}, ValueError, 'device is "meta"'),
        ({"max_in_flight": 0}, ValueError, "max_in_flight is 0; it must be from 1 to 64"),
        ({"max_dispatches": 0}, ValueError, "max_dispatches is 0"),
        ({"max_bytes": 0}, ValueError, "max_bytes is 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes is 1.5 of type float"),
    ],
)
def test_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        metal_moe.CommandStream(**arguments)


@on_cpu
def test_handlers_must_be_callable():
    with pytest.raises(TypeError, match="handler is of type int; it must be callable"):
        metal_moe.CommandStream().on_completed(3)


@on_cpu
@in_a_process
def test_the_interpreter_exits_with_work_under_way():
    """Committed work is waited for, handlers included; what is not committed is dropped; nothing hangs or crashes."""
    ran = python("""
        def say(text):
            os.write(1, f"{text}\\n".encode())  # whole lines, whichever thread writes

        layer = make_layer(40, 256, 256, 8, 2)
        stream = metal_moe.CommandStream(max_in_flight=8)
        for i in range(6):
            with stream:
                layer.run()
                stream.on_completed(lambda _, i=i: say(f"completed {i}"))
        batch = metal_moe.LayerBatch(1)
        batch.__enter__()
        for _ in range(3):
            layer.run()
        stream.__enter__()
        layer.run()
        stream.on_completed(lambda _: say("not committed"))
        say("end")
        """)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == sorted([f"completed {i}" for i in range(6)] + ["end"])
    assert ran.stderr == ""


@on_cpu
@in_a_process
def test_the_interpreter_exits_while_a_daemon_encodes():
    ran = python("""
        layer = make_layer(3, 32, 24, 4, 2)
        started = threading.Event()

        def work():
            with metal_moe.CommandStream(max_in_flight=2, max_dispatches=1) as stream:
                while True:
                    layer.run()
                    stream.on_completed(lambda _: None)
                    started.set()

        threading.Thread(target=work, daemon=True).start()
        started.wait(60)
        time.sleep(0.2)
        print("end", flush=True)
        """)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "end\n"


@on_cpu
@in_a_process
@pytest.mark.parametrize("kind", ["CommandStream", "LayerBatch"])
def test_the_child_of_a_fork_is_told(kind):
    """The parent's work goes on; the child gets an error instead of a wait without end, and may start its own."""
    ran = python(f"""
        layer = make_layer(3, 32, 24, 4, 2)
        expected = layer.run()
        stream = metal_moe.{kind}()
        context = stream.__enter__()
        y = layer.run()
        stream.commit()
        z = layer.run()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            failed = 0
            for call in (layer.run, stream.commit, stream.synchronize, lambda: stream.__exit__(None, None, None)):
                try:
                    call()
                    failed += 1
                except RuntimeError as error:
                    failed += "forked" not in str(error)
            failed += not torch.equal(layer.run(), expected)  # outside of the block
            with metal_moe.{kind}() as own:
                w = layer.run()
                own.synchronize()
            failed += not torch.equal(w, expected)
            sys.exit(failed)
        status = os.waitpid(child, 0)[1]
        stream.synchronize()
        stream.__exit__(None, None, None)
        print(status, torch.equal(y, expected), torch.equal(z, expected))
        """)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "0 True True\n", ran.stderr


@on_cpu
@in_a_process
def test_many_forks_while_streams_work():
    """A child finds no lock of the core taken, whatever the parent's threads were doing."""
    ran = python("""
        layer = make_layer(3, 32, 24, 4, 2)
        expected = layer.run()
        stop = threading.Event()

        def work():
            with metal_moe.CommandStream(max_in_flight=3, max_dispatches=1) as stream:
                while not stop.is_set():
                    layer.run()
            stream.close()

        thread = threading.Thread(target=work)
        thread.start()
        statuses = []
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                os._exit(0 if torch.equal(layer.run(), expected) else 1)
            statuses.append(os.waitpid(child, 0)[1])
        stop.set()
        thread.join()
        print(statuses.count(0))
        """)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "30\n", ran.stderr


@pytest.mark.skipif(cases.DEVICE.type != "cuda", reason="CUDA streams of PyTorch's")
def test_on_pytorchs_stream():
    layer = small().to(cases.DEVICE)
    expected = layer.run()
    stream = metal_moe.CommandStream(cases.DEVICE)
    assert not stream.owned and "commit" in stream.no_ops
    with stream:
        y = layer.run()
        stream.commit()
        stream.end_encoder()
    stream.synchronize()
    assert stream.cancel() == stream.in_flight == stream.pending_dispatches == 0
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match="PyTorch's stream, which has no handlers"):
        stream.on_completed(print)


@pytest.mark.skipif(cases.DEVICE.type != "mps", reason="an own queue beside PyTorch's")
def test_on_mps_tensors():
    layer = small().to(cases.DEVICE)
    expected = layer.run()
    stream = metal_moe.CommandStream(cases.DEVICE)
    assert stream.owned
    with stream:
        y = layer.run()
    stream.synchronize()
    assert torch.equal(y, expected)
