"""What goes wrong while work is under way: it is said clearly, it is said once, and nothing else is harmed."""

import gc
import os
import shutil
import weakref
from pathlib import Path

import cases
import metal_moe
import pytest
import torch
from cases import make_layer, python

OWN_DEVICE = True
pytestmark = pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="faults of the engines that compute CPU tensors")

LIBRARY = Path(os.environ.get("METAL_MOE_LIBRARY") or Path(metal_moe.__file__).parent / "metal_moe.metallib")


# ---------------------------------------------------------------------------------------------- a stream that goes away


@pytest.mark.parametrize("engine", ["native", "exact"])
def test_a_stream_destroyed_with_work_in_flight(use_engine, engine):
    """Its committed work is waited for; nothing that it reads or writes goes away before."""
    use_engine(engine)
    layer = make_layer(9, 64, 48, 8, 2)
    expected = layer.run()
    for _ in range(20):
        stream = metal_moe.CommandStream(max_in_flight=8)
        with stream:
            results = [layer.run() for _ in range(5)]
            stream.commit()
        watched = weakref.ref(stream)
        del stream
        gc.collect()
        assert watched() is None
        assert all(torch.equal(y, expected) for y in results)
    assert metal_moe.pool_stats()["buffers_in_use"] == 0


def test_a_stream_destroyed_before_it_committed():
    layer = make_layer(9, 64, 48, 8, 2)
    stream = metal_moe.CommandStream()
    with stream:
        x = layer.hidden_states.clone()
        watched = weakref.ref(x)
        layer.hidden_states = x
        layer.run()
        stream.cancel()
    layer.hidden_states = x = None
    del stream
    gc.collect()
    assert watched() is None, "what was dropped is let go"
    assert metal_moe.pool_stats()["buffers_in_use"] == 0


def test_a_handler_lets_go_of_the_last_reference_to_its_stream():
    layer = make_layer(3, 32, 24, 4, 2)
    expected = layer.run()
    held = [metal_moe.CommandStream()]
    with held[0]:
        y = layer.run()
        held[0].on_completed(lambda _: held.clear())
    for _ in range(10_000):
        if not held:
            break
        torch.randn(100).sum()
    assert not held
    assert torch.equal(y, expected)
    assert torch.equal(layer.run(), expected)


def test_a_batch_that_nobody_leaves():
    """A thread that ends inside a batch takes nothing with it."""
    ran = python("""
        import threading
        layer = make_layer(3, 32, 24, 4, 2)
        expected = layer.run()

        def work():
            metal_moe.LayerBatch(100).__enter__()
            for _ in range(50):
                layer.run()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
        print(torch.equal(layer.run(), expected))
        """)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "True\n"


# -------------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("within", ["a call", "a batch"])
def test_out_of_memory_in_the_pool(within):
    """The call that does not fit says what it asked for; those before it and after it are not harmed."""
    ran = python(
        """
        def limit(extra):
            pages = int(open("/proc/self/statm").read().split()[0])
            soft = pages * resource.getpagesize() + extra
            resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))

        metal_moe.set_num_threads(1)
        small, large = make_layer(3, 32, 24, 4, 2), make_layer(4096, 16, 16384, 2, 2)
        expected = small.run()
        with metal_moe.LayerBatch():
            small.run()
        limit(64 << 20)

        def calls():
            before = small.run()
            try:
                large.run()
                print("no error")
            except RuntimeError as error:
                print(error)
            return before, small.run()

        if WITHIN == "a batch":
            with metal_moe.LayerBatch() as batch:
                results = calls()
        else:
            results = calls()
        print([torch.equal(y, expected) for y in results], metal_moe.pool_stats()["buffers_in_use"])
        """.replace("WITHIN", repr(within))
    )
    assert ran.returncode == 0, ran.stderr
    message, results = ran.stdout.splitlines()
    assert message.startswith("the device has no memory for a scratch buffer of 536870912 bytes"), message
    assert results == "[True, True] 0"


# ---------------------------------------------------------------------------- kernels that cannot be had, broken files


def test_a_library_without_a_kernel(tmp_path):
    """Found out when the library is loaded, before anything runs, and said with the kernel's name."""
    ran = python(f"""
        layer = make_layer(3, 32, 24, 4, 2)
        for path in ({str(tmp_path / "none.metallib")!r}, {str(tmp_path)!r}):
            metal_moe._core.set_library_path(path)
            for _ in range(2):  # a later call tries again
                try:
                    layer.run()
                    print("no error")
                except RuntimeError as error:
                    print(path in str(error))
        metal_moe._core.set_library_path({str(LIBRARY)!r})
        print(torch.isfinite(layer.run()).all().item())
        """)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["True"] * 5


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_kernel_library(tmp_path, damage):
    broken = tmp_path / "metal_moe.metallib"
    shutil.copytree(LIBRARY, broken)
    files = [file for file in broken.iterdir() if file.is_file()]
    assert files
    for file in files:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 3], "text": b"no kernels\n", "empty": b""}[damage])
    ran = python(
        """
        layer = make_layer(3, 32, 24, 4, 2)
        try:
            layer.run()
        except RuntimeError as error:
            print(error)
        """,
        METAL_MOE_LIBRARY=str(broken),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"kernel library '{broken}' cannot be loaded: "), ran.stdout
