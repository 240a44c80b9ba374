"""The translator of Metal Shading Language: what it reads, what it refuses and where it says so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIM = ROOT / "csrc" / "sim"
TRANSLATOR = SIM / "translate.py"
COMPILERS = [name for name in ("g++", "clang++", "clang++-19", "clang++-18") if shutil.which(name)]

pytestmark = pytest.mark.skipif(not SIM.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(SIM))
msl_reader = pytest.importorskip("msl_reader")

SIGNATURE = "device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]"


def read(text, engine="native", gcc=True):
    return msl_reader.read(text, "test.metal", msl_reader.Target(engine, gcc))


def names(text):
    return [(instance.host_name, instance.function) for instance in read(text).instances]


def test_plain_kernel():
    source = read(f"kernel void copy({SIGNATURE}) {{ out[i] = 1; }}")
    (instance,) = source.instances
    assert (instance.host_name, instance.function) == ("copy", "copy")
    assert [(p.name, p.attribute.name, p.attribute.value) for p in instance.kernel.parameters] == [
        ("out", "buffer", "0"),
        ("i", "thread_position_in_grid", ""),
    ]
    assert instance.kernel.max_threads == "1024"
    assert "[[" not in source.body
    assert "out[i] = 1;" in source.body


@pytest.mark.parametrize(
    "head",
    [
        "[[kernel]] void copy",
        "[[kernel, max_total_threads_per_threadgroup(64)]] void copy",
        "[[max_total_threads_per_threadgroup(64)]] kernel void copy",
        "kernel [[max_total_threads_per_threadgroup(64)]] void copy",
    ],
)
def test_spellings_of_a_kernel(head):
    (instance,) = read(f"{head}({SIGNATURE}) {{}}").instances
    assert instance.host_name == "copy"
    assert instance.kernel.max_threads == ("64" if "64" in head else "1024")


def test_host_name_of_a_plain_kernel():
    assert names(f'[[host_name("other")]] kernel void copy({SIGNATURE}) {{}}') == [("other", "copy")]


TEMPLATE = f"template <typename T, int N = 2> [[kernel]] void scale({SIGNATURE}) {{ out[i] = T(N); }}\n"


@pytest.mark.parametrize(
    "instantiation",
    [
        'template [[host_name("scale_fp32")]] [[kernel]] decltype(scale<float, (3 > 2)>) scale<float, (3 > 2)>;',
        f'template [[host_name("scale" "_fp32")]] kernel void scale<float, (3 > 2)>({SIGNATURE});',
    ],
)
def test_instantiations(instantiation):
    source = read(TEMPLATE + instantiation)
    assert [(i.host_name, i.function) for i in source.instances] == [("scale_fp32", "scale<float, (3>2)>")]
    assert "decltype" not in source.body
    assert source.body.count("scale") == 1


def test_template_that_nothing_instantiates_is_no_kernel():
    assert names(TEMPLATE) == []


def test_nested_template_arguments():
    text = TEMPLATE + 'template [[host_name("a")]] [[kernel]] decltype(scale<vec<T<int>, 2>>) scale<vec<T<int>, 2>>;'
    assert names(text) == [("a", "scale<vec<T<int>, 2>>")]


def test_parameters_over_several_lines_keep_line_numbers():
    parameters = "\n  device float* out\n  [[buffer(\n0)]],\n uint i [[thread_position_in_grid]]"
    text = f"struct A {{ int x; }};\nkernel void copy({parameters})\n{{ x; }}\n{TEMPLATE}"
    assert [line for line, s in enumerate(read(text).body.split("\n")) if "{ x; }" in s] == [6]


def test_line_markers_are_followed():
    with pytest.raises(msl_reader.TranslationError, match=r"^kernels/moe/a\.h:12: error: kernel 'f'"):
        read('# 1 "test.metal"\n# 10 "kernels/moe/a.h" 1 3\n\n\nkernel void f(device float* x) {}\n')


def test_attributes_that_mean_the_same_in_cpp_stay():
    body = read("void f([[maybe_unused]] int x) { switch (x) { case 0: [[fallthrough]]; default:; } }").body
    assert "[[maybe_unused]]" in body
    assert "[[fallthrough]]" in body


def test_literals_and_swizzles():
    body = read(
        "half f(float4 v, float4* p) { return 1.5h + 2h + 1e-3h + 1.0bf + v.xyz.x + p->wx.y + v.x + s.half_xy; }"
    ).body
    assert "half(1.5f) + half(2.0f) + half(1e-3f) + bfloat(1.0f)" in body
    assert "v.template swizzle<0, 1, 2>().x + p->template swizzle<3, 0>().y + v.x + s.half_xy" in body


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2.5", "2.5f"),
        ("1e3", "1e3f"),
        (".5", ".5f"),
        ("2.", "2.f"),
        ("3", "3"),
        ("0x1E", "0x1E"),
        ("2.5f", "2.5f"),
        ("7u", "7u"),
    ],
)
def test_literals_without_suffix_are_float(written, meant):
    assert read(f"float x = {written};").body.strip() == f"float x = {meant};"


@pytest.mark.parametrize(
    ("pragma", "engine", "gcc", "expected"),
    [
        ("unroll", "native", True, "#pragma GCC unroll 16"),
        ("unroll", "native", False, "#pragma unroll"),
        ("unroll", "exact", True, ""),
        ("unroll(4)", "native", True, "#pragma GCC unroll 4"),
        ("clang loop unroll(full)", "native", True, "#pragma GCC unroll 16"),
        ("clang loop vectorize(enable)", "native", True, ""),
        ("clang loop vectorize(enable)", "native", False, "#pragma clang loop vectorize(enable)"),
        ("GCC unroll 4", "native", True, "#pragma GCC unroll 4"),
        ("METAL internals : enable", "native", False, ""),
    ],
)
def test_pragmas(pragma, engine, gcc, expected):
    assert read(f"#pragma {pragma}\nint x;", engine, gcc).body.strip().removesuffix("int x;").strip() == expected


CONSTANT = "constant uint WIDTH [[function_constant(4)]];\n"
GUARDED = "constant uint COLUMNS = is_function_constant_defined(WIDTH) ? WIDTH : 8;\n"


@pytest.mark.parametrize(
    ("uses", "required"),
    [
        ("", False),
        (GUARDED, False),
        (GUARDED + "uint f() { return COLUMNS; }", False),
        ("bool f() { return is_function_constant_defined(WIDTH); }", False),
        (GUARDED + "uint f() { return WIDTH; }", True),
        ("constant uint COLUMNS = WIDTH + 1;\n", True),
        ("constant uint COLUMNS = is_function_constant_defined(WIDTH) ? 2 * WIDTH : 8;\n", True),
        (f"kernel void f({SIGNATURE}) {{ out[i] = WIDTH; }}", True),
    ],
)
def test_function_constants_are_required_where_nothing_guards_them(uses, required):
    source = read(CONSTANT + uses)
    assert source.constants == [msl_reader.FunctionConstant("WIDTH", "uint", 4, required)]


def test_function_constants_become_macros_in_their_lines():
    body = read(f"constant int N = 3;\n{CONSTANT}{GUARDED}constant bool WIDE\n = COLUMNS > 16;\n").body.split("\n")
    assert body[0] == "constant int N = 3;"
    assert "".join(body[1].split()) == "METAL_SIM_FUNCTION_CONSTANT(uint,WIDTH,0,4)"
    expected = "METAL_SIM_DERIVED_CONSTANT(uint,COLUMNS,is_function_constant_defined(WIDTH)?WIDTH:8)"
    assert "".join(body[2].split()) == expected
    assert "".join(body[3].split()) == "METAL_SIM_DERIVED_CONSTANT(bool,WIDE"
    assert "".join(body[4].split()) == ",COLUMNS>16)"


def test_function_constants_of_the_cuda_engine(tmp_path):
    cuda_source = pytest.importorskip("cuda_source")
    source = read(f"{CONSTANT}{GUARDED}kernel void f({SIGNATURE}) {{ out[i] = COLUMNS; }}", "cuda")
    text = cuda_source.emit(source, "test.metal")
    assert text.startswith("//! constant 4 33 optional WIDTH\n//! kernel f\n//! buffer 0 write out\n")
    assert "#define METAL_SIM_CONSTANT_4_IS_DEFINED false" in text


@pytest.mark.parametrize(
    ("body", "before", "after"),
    [
        ("out[i] = 1;", True, False),
        ("early(i); out[i] = 1;", True, False),  # what a function does that the kernel calls is not looked at
        ("if (i > 3) { early(i); } wait_for_previous_kernel(); if (i > 4) return; out[i] = 1;", False, False),
        ("wait_for_previous_kernel();", False, False),
        ("if (i > 3) return; wait_for_previous_kernel(); out[i] = 1;", False, True),
        ("if (i > 3) wait_for_previous_kernel();", False, True),
        ("if (i > 3) early(i); else wait_for_previous_kernel();", False, True),
        ("if (i > 3) { wait_for_previous_kernel(); }", False, True),
        ("if (i > 3) { wait_for_previous_kernel(); } wait_for_previous_kernel(); out[i] = 1;", False, False),
    ],
)
def test_kernels_wait_for_the_one_before(body, before, after):
    """Entry points of the cuda engine: at once, unless the kernel does so; and at the end where it may not have."""
    cuda_source = pytest.importorskip("cuda_source")
    text = f"void early(uint i) {{ wait_for_previous_kernel(); }}\nkernel void f({SIGNATURE}) {{ {body} }}"
    source = read(text, "cuda")
    entry = cuda_source.entry_point(0, source.instances[0], source.body)
    wait, call = "metal_sim::wait_for_previous_kernel();", "\n  f("
    first, last = entry.split(call)
    assert (wait in first, wait in last) == (before, after)


def test_least_threadgroups():
    """A constant (template) named after a kernel tells NVRTC how many of its threadgroups run at a time."""
    cuda_source = pytest.importorskip("cuda_source")
    text = f"""
template <uint N> constexpr uint g_least_threadgroups = N / 2;
kernel void f({SIGNATURE}) {{ out[i] = 1; }}
template <uint N> [[kernel, max_total_threads_per_threadgroup(64)]] void g({SIGNATURE}) {{ out[i] = N; }}
template [[host_name("g4")]] [[kernel]] decltype(g<4>) g<4>;
"""
    source = read(text, "cuda")
    bounds = {one.host_name: cuda_source.launch_bounds(one, source.body) for one in source.instances}
    assert bounds == {"f": "1024", "g4": "64, g_least_threadgroups<4>"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel void f(device float* x) {}", "kernel 'f': parameter 'x' needs one attribute, has 0"),
        ("kernel void f(device float* x [[buffer(31)]]) {}", "the index of 'x' .* must be 0..30"),
        ("kernel void f(device float* x [[buffer(N)]]) {}", "the index of 'x' .* must be 0..30"),
        (
            "kernel void f(device float* x [[buffer(0)]], device float* y [[buffer(0)]]) {}",
            r"buffer\(0\) is both 'x' and 'y'",
        ),
        ("kernel void f(texture2d<float> t [[texture(0)]]) {}", "attribute 'texture' of 't' is not supported"),
        (
            "kernel void f(float* x [[buffer(0)]]) {}",
            "'x' .* must be a pointer or reference to device or constant memory",
        ),
        ("kernel void f(device float x [[buffer(0)]]) {}", "'x' .* must be a pointer or reference"),
        ("kernel void f(device float* x [[threadgroup(0)]]) {}", "'x' .* to threadgroup memory"),
        ("kernel void f(device uint* i [[thread_position_in_grid]]) {}", "'i' .* must be a value"),
        ("kernel int f(device float* x [[buffer(0)]]) {}", "kernel 'f' must return void"),
        (f"kernel void f({SIGNATURE}) {{}}\nkernel void f({SIGNATURE}) {{}}", "2: error: kernel 'f' is defined twice"),
        (f"namespace n {{ kernel void f({SIGNATURE}) {{}} }}", "outside of any namespace"),
        (
            f"[[early_return]] kernel void f({SIGNATURE}) {{}}",
            "attribute 'early_return' of kernel 'f' is not supported",
        ),
        ("constant float4 b [[function_constant(0)]];", "expected 'constant TYPE name .* one of the types float, int"),
        ("constant uint b [[function_constant(0)]] = 1;", "expected 'constant TYPE name"),
        ("device uint b [[function_constant(0)]];", "expected 'constant TYPE name"),
        ("struct S { uint b [[function_constant(0)]]; };", "expected 'constant TYPE name"),
        ("constant uint b [[function_constant(65536)]];", "index of function constant 'b' is '65536'.* 0..65535"),
        ("constant uint b [[function_constant(N)]];", "index of function constant 'b' is 'N'"),
        (f"{CONSTANT}constant int o [[function_constant(4)]];", r"function_constant\(4\) is both 'WIDTH' and 'o'"),
        (f"{CONSTANT}constant float2 o = float2(WIDTH, 0);", "a constant made of function constants must be declared"),
        ("struct S { float4 p [[position]]; };", "attribute 'position' is not supported here"),
        (f"kernel void f({SIGNATURE}) {{\n threadgroup float s[4];\n}}", "2: error: a threadgroup variable inside"),
        (f"kernel void f({SIGNATURE}) {{", "'{' is never closed"),
        (
            TEMPLATE + 'template [[host_name("a b")]] [[kernel]] decltype(scale<int>) scale<int>;',
            "2: error: host_name 'a b' must be an identifier",
        ),
        (
            TEMPLATE + "template [[kernel]] decltype(scale<int>) scale<int>;",
            "the instantiation of kernel 'scale' needs one host_name",
        ),
        (
            'template [[host_name("a")]] [[kernel]] decltype(other<int>) other<int>;',
            "'other' is not a kernel template of this source",
        ),
        (
            TEMPLATE + 2 * 'template [[host_name("a")]] [[kernel]] decltype(scale<int>) scale<int>;\n',
            "3: error: two kernels are named 'a'",
        ),
    ],
)
def test_refusals(text, message):
    with pytest.raises(msl_reader.TranslationError, match=rf"^test\.metal:\d+: error: .*|{message}") as error:
        read(text)
    assert error.match(message)


def run(*arguments):
    return subprocess.run([sys.executable, str(TRANSLATOR), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler")
def test_error_ends_the_command_with_status_1(tmp_path):
    source = tmp_path / "bad.metal"
    source.write_text("#include <metal_stdlib>\n\nkernel void f(device float* x) {}\n")
    result = run("--engine", "native", "--compiler", COMPILERS[0], source, "-o", tmp_path / "out.cpp")
    assert result.returncode == 1
    assert f"{source}:3: error: kernel 'f': parameter 'x'" in result.stderr
    assert not (tmp_path / "out.cpp").exists()


@pytest.mark.parametrize("engine", ["native", "exact"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_result_compiles_without_warnings(tmp_path, compiler, engine):
    """Also: the compiler's messages name the .metal file, and headers are listed as dependencies."""
    (tmp_path / "part.h").write_text(
        "inline float twice(float x) { return 2.0f * x; }\nconstant float UNUSED = 1.0f;\n"
    )
    source = tmp_path / "kernels.metal"
    source.write_text(
        '#include <metal_stdlib>\nusing namespace metal;\n#include "part.h"\n'
        f"kernel void copy({SIGNATURE}) {{\n  out[i] = twice(simd_sum(float4(out[i]).xy.x));\n}}\n"
    )
    out, depfile = tmp_path / "out.cpp", tmp_path / "out.d"
    result = run("--engine", engine, "--compiler", compiler, "-I", tmp_path, "--depfile", depfile, source, "-o", out)
    assert result.returncode == 0, result.stderr
    assert "part.h" in depfile.read_text()
    flags = run("--engine", engine, "--compiler", compiler, "--print-flags").stdout.split()
    command = [compiler, *flags, "-I", str(SIM / "msl"), "-S", "-o", str(tmp_path / "out.s"), str(out)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0 and not compiled.stderr, compiled.stderr
    assert "metal_sim_kernel_copy" in (tmp_path / "out.s").read_text()
    out.write_text(out.read_text().replace("twice(simd_sum", "thrice(simd_sum"))
    broken = subprocess.run(command, capture_output=True, text=True)
    assert f"{source}:5:" in broken.stderr
