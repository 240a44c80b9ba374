"""Every wrong argument gives an error that names the operation, the argument, what it was and what it must be."""

import re

import metal_moe
import pytest
import torch
from metal_moe._validate import choices
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICES = re.escape(choices(metal_moe.SUPPORTED_DEVICES))

T, E, K, H, INNER, N, INNER_SHARED = 5, 8, 2, 64, 48, 2, 32


def experts_arguments(**changes) -> dict:
    """Correct arguments of `fused_experts`, every optional tensor included."""
    return {
        "hidden_states": torch.randn(T, H),
        "w1": torch.randn(E, 2 * INNER, H),
        "w2": torch.randn(E, H, INNER),
        "topk_weights": torch.rand(T, K),
        "topk_ids": torch.randint(0, E, (T, K)),
        "w1_bias": torch.randn(E, 2 * INNER),
        "w2_bias": torch.randn(E, H),
        "shared_w1": torch.randn(N, 2 * INNER_SHARED, H),
        "shared_w2": torch.randn(N, H, INNER_SHARED),
        "shared_weights": torch.rand(T, N),
        **changes,
    }


def moe_arguments(**changes) -> dict:
    """Correct arguments of `fused_moe`."""
    arguments = experts_arguments()
    del arguments["topk_weights"], arguments["topk_ids"]
    return {**arguments, "router_logits": torch.randn(T, E), "top_k": K, "correction_bias": torch.randn(E), **changes}


def topk_arguments(**changes) -> dict:
    return {"router_logits": torch.randn(T, E), "top_k": K, "correction_bias": torch.randn(E), **changes}


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of `shape` that is not contiguous: every second element of a larger one."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def test_correct_arguments_pass():
    assert metal_moe.fused_experts(**experts_arguments()).shape == (T, H)
    assert metal_moe.fused_moe(**moe_arguments()).shape == (T, H)
    weights, ids = metal_moe.fused_topk(**topk_arguments())
    assert weights.shape == ids.shape == (T, K)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


WRONG_EXPERTS = [
    # (argument, value, exception, what the message says)
    ("hidden_states", [[1.0]], TypeError, "hidden_states is of type list; it must be a torch.Tensor [T, H]"),
    ("hidden_states", None, TypeError, "hidden_states is of type NoneType"),
    ("hidden_states", torch.zeros(T, H, dtype=torch.float64), TypeError, "torch.float64; it must be torch.bfloat16"),
    ("hidden_states", torch.zeros(T, H, dtype=torch.int32), TypeError, "hidden_states is torch.int32"),
    ("hidden_states", torch.zeros(T, 2, H), ValueError, r"hidden_states has shape (5, 2, 64); it must be [T, H]"),
    ("hidden_states", torch.zeros(T, 0), ValueError, "H at least 1"),
    ("hidden_states", torch.zeros(H, T).T, ValueError, "contiguous in its last dimension"),
    ("hidden_states", torch.zeros(T, H).to_sparse(), ValueError, "a torch.sparse_coo tensor"),
    ("w1", "weights", TypeError, "w1 is of type str"),
    (
        "w1",
        torch.zeros(E, 2 * INNER, H, dtype=torch.bfloat16),
        TypeError,
        "w1 is torch.bfloat16; it must be torch.float32",
    ),
    ("w1", torch.zeros(2 * INNER, H), ValueError, "w1 has shape (96, 64); it must be [E, 2I, H] (3 dimensions)"),
    ("w1", torch.zeros(E, 2 * INNER, H + 1), ValueError, "with H = 64 as in hidden_states"),
    ("w1", torch.zeros(E, 2 * INNER + 1, H), ValueError, "an even number of rows"),
    ("w1", torch.zeros(0, 2 * INNER, H), ValueError, "w1 has shape (0, 96, 64)"),
    ("w1", strided(E, 2 * INNER, H), ValueError, "w1 is strided (12288, 128, 2); it must be contiguous"),
    ("w1", torch.zeros(E, H, 2 * INNER).transpose(1, 2), ValueError, "w1 is strided"),
    ("w2", torch.zeros(E, H, INNER, dtype=torch.float16), TypeError, "w2 is torch.float16"),
    ("w2", torch.zeros(E, INNER, H), ValueError, "w2 has shape (8, 48, 64); it must be [E, H, I] = (8, 64, 48)"),
    ("w2", torch.zeros(E + 1, H, INNER), ValueError, "w2 has shape (9, 64, 48)"),
    ("w2", strided(E, H, INNER), ValueError, "w2 is strided"),
    ("topk_weights", torch.zeros(T, K, dtype=torch.int32), TypeError, "topk_weights is torch.int32"),
    ("topk_weights", torch.zeros(T, K + 1), ValueError, "topk_weights has shape (5, 3); it must be [T, k] = (5, 2)"),
    ("topk_weights", torch.zeros(T), ValueError, "topk_weights has shape (5,)"),
    ("topk_ids", torch.zeros(T, K), TypeError, "topk_ids is torch.float32; it must be torch.int32 or torch.int64"),
    ("topk_ids", torch.zeros(T, K, dtype=torch.int16), TypeError, "topk_ids is torch.int16"),
    ("topk_ids", torch.zeros(T + 1, K, dtype=torch.int32), ValueError, "with T = 5 as in hidden_states"),
    ("topk_ids", torch.zeros(T, dtype=torch.int64), ValueError, "topk_ids has shape (5,)"),
    ("activation", "swish", ValueError, """activation is 'swish'; it must be "silu", "gelu","""),
    ("activation", 0, TypeError, "activation is 0 of type int"),
    ("w1_bias", torch.zeros(E, INNER), ValueError, "w1_bias has shape (8, 48); it must be [E, 2I] = (8, 96)"),
    ("w1_bias", torch.zeros(E, 2 * INNER, dtype=torch.float16), TypeError, "w1_bias is torch.float16"),
    ("w1_bias", strided(E, 2 * INNER), ValueError, "w1_bias is strided"),
    ("w2_bias", torch.zeros(H), ValueError, "w2_bias has shape (64,); it must be [E, H] = (8, 64)"),
    ("w2_bias", 0.5, TypeError, "w2_bias is of type float"),
    ("interleaved", 1, TypeError, "interleaved is 1 of type int; it must be True or False"),
    ("alpha", "1", TypeError, "alpha is '1' of type str"),
    ("alpha", float("nan"), ValueError, "alpha is nan; it must be a finite number"),
    ("alpha", float("inf"), ValueError, "alpha is inf"),
    ("limit", "7", TypeError, "limit is '7' of type str"),
    ("limit", float("nan"), ValueError, "limit is nan"),
    ("limit", 0.0, ValueError, "limit is 0.0; it must be above 0"),
    ("shared_w1", None, TypeError, "shared_w1 is None; it must be a torch.Tensor where shared_w2 is given"),
    ("shared_w2", None, TypeError, "shared_w2 is None; it must be a torch.Tensor where shared_w1 is given"),
    ("shared_w1", torch.zeros(N, 2 * INNER_SHARED, H - 1), ValueError, "shared_w1 has shape (2, 64, 63)"),
    ("shared_w2", torch.zeros(N + 1, H, INNER_SHARED), ValueError, "shared_w2 has shape (3, 64, 32)"),
    ("shared_w1", strided(N, 2 * INNER_SHARED, H), ValueError, "shared_w1 is strided"),
    ("shared_w2", torch.zeros(N, H, INNER_SHARED, dtype=torch.float16), TypeError, "shared_w2 is torch.float16"),
    (
        "shared_weights",
        torch.zeros(T, N + 1),
        ValueError,
        "shared_weights has shape (5, 3); it must be [T, N] = (5, 2)",
    ),
    ("shared_weights", torch.zeros(T, N, dtype=torch.int64), TypeError, "shared_weights is torch.int64"),
    ("use_fp32_acc", None, TypeError, "use_fp32_acc is None"),
    ("kernel", 4, TypeError, "kernel is 4 of type int"),
    ("kernel", "moe_fast", ValueError, "moe_fast"),
]


@pytest.mark.parametrize(("argument", "value", "exception", "message"), WRONG_EXPERTS)
def test_experts(argument, value, exception, message):
    with pytest.raises(exception, match=re.escape(message)) as raised:
        metal_moe.fused_experts(**experts_arguments(**{argument: value}))
    assert argument in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "value", "exception", "message"),
    [case for case in WRONG_EXPERTS if not case[0].startswith("topk_")],
)
def test_moe_checks_experts(argument, value, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.fused_moe(**moe_arguments(**{argument: value}))


WRONG_ROUTING = [
    ("router_logits", None, TypeError, "router_logits is of type NoneType; it must be a torch.Tensor [T, E]"),
    ("router_logits", torch.zeros(T, E, dtype=torch.int32), TypeError, "router_logits is torch.int32"),
    ("router_logits", torch.zeros(T, E, dtype=torch.float64), TypeError, "router_logits is torch.float64"),
    ("router_logits", torch.zeros(E), ValueError, "router_logits has shape (8,)"),
    ("router_logits", torch.zeros(T, 0), ValueError, "with E from 1 to 1024"),
    ("router_logits", torch.zeros(T, 1025), ValueError, "with E from 1 to 1024"),
    ("top_k", 0, ValueError, "top_k is 0; it must be from 1 to 8"),
    ("top_k", 9, ValueError, "top_k is 9; it must be from 1 to 8 (E is 8"),
    ("top_k", 2.0, TypeError, "top_k is 2.0 of type float; it must be an int"),
    ("top_k", True, TypeError, "top_k is True of type bool"),
    ("scoring", "tanh", ValueError, "scoring is 'tanh'; it must be"),
    ("scoring", None, TypeError, "scoring is None"),
    ("group_score", "mean", ValueError, """group_score is 'mean'; it must be "max" or "top2_sum\""""),
    ("correction_bias", torch.zeros(E + 1), ValueError, "correction_bias has shape (9,); it must be [E] = (8,)"),
    ("correction_bias", torch.zeros(E, dtype=torch.int64), TypeError, "correction_bias is torch.int64"),
    ("correction_bias", strided(E), ValueError, "correction_bias is strided (2,)"),
    ("num_expert_group", 3, ValueError, "num_expert_group is 3; it must be a divisor of the number of experts, 8"),
    ("num_expert_group", 0, ValueError, "num_expert_group is 0"),
    ("num_expert_group", 2.0, TypeError, "num_expert_group is 2.0 of type float"),
    ("topk_group", 2, ValueError, "topk_group is 2; it must be from 1 to 1"),
    ("renormalize", 1, TypeError, "renormalize is 1 of type int"),
    ("renormalize_epsilon", -1.0, ValueError, "renormalize_epsilon is -1.0"),
    ("renormalize_epsilon", "0", TypeError, "renormalize_epsilon is '0' of type str"),
    ("routed_scaling_factor", None, TypeError, "routed_scaling_factor is None"),
    ("routed_scaling_factor", float("nan"), ValueError, "routed_scaling_factor is nan"),
    ("routed_scaling_factor", 1e39, ValueError, "routed_scaling_factor is 1e+39"),
    ("routed_scaling_factor", 10**400, ValueError, "a finite number, at most 3.403e+38 in size"),
]


@pytest.mark.parametrize(("argument", "value", "exception", "message"), WRONG_ROUTING)
def test_topk(argument, value, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.fused_topk(**topk_arguments(**{argument: value}))


@pytest.mark.parametrize(("argument", "value", "exception", "message"), WRONG_ROUTING)
def test_moe_checks_routing(argument, value, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.fused_moe(**moe_arguments(**{argument: value}))


def test_top_k_fits_the_chosen_groups():
    with pytest.raises(ValueError, match=r"top_k is 3; it must be at most 2: the 1 chosen groups hold 2 experts"):
        metal_moe.fused_topk(torch.randn(T, E), 3, num_expert_group=4, topk_group=1)
    with pytest.raises(ValueError, match=r"group_score .* where a group is one expert"):
        metal_moe.fused_topk(torch.randn(T, E), 2, num_expert_group=8, topk_group=4, group_score="top2_sum")


def test_top_k_has_a_limit():
    with pytest.raises(ValueError, match="top_k is 17; it must be from 1 to 16"):
        metal_moe.fused_topk(torch.randn(T, 64), 17)


def test_given_routes_have_at_most_as_many_slots_as_experts():
    arguments = experts_arguments(topk_ids=torch.zeros(T, E + 1, dtype=torch.int32), topk_weights=torch.zeros(T, E + 1))
    with pytest.raises(ValueError, match=r"topk_ids has shape \(5, 9\); .* k from 1 to the number of experts, 8"):
        metal_moe.fused_experts(**arguments)
    arguments = experts_arguments(topk_ids=torch.zeros(T, 0, dtype=torch.int32), topk_weights=torch.zeros(T, 0))
    with pytest.raises(ValueError, match="topk_ids"):
        metal_moe.fused_experts(**arguments)


@pytest.mark.parametrize("shape", [(T + 1, E), (T, E - 1)])
def test_logits_fit_the_layer(shape):
    with pytest.raises(ValueError, match=r"router_logits has shape .* = \(5, 8\), to fit hidden_states and w1"):
        metal_moe.fused_moe(**moe_arguments(router_logits=torch.randn(shape), correction_bias=None))


def test_relu2_has_no_gate():
    arguments = experts_arguments(
        activation="relu2",
        w1=torch.randn(E, INNER, H),
        w1_bias=torch.randn(E, INNER),
        shared_w1=torch.randn(N, INNER_SHARED, H),
    )
    assert metal_moe.fused_experts(**arguments).shape == (T, H)
    with pytest.raises(ValueError, match=r"w2 has shape \(8, 64, 48\); it must be \[E, H, I\] = \(8, 64, 96\)"):
        metal_moe.fused_experts(**{**arguments, "w1": torch.randn(E, 2 * INNER, H)})
    with pytest.raises(ValueError, match="interleaved is True; it must be False"):
        metal_moe.fused_experts(**arguments, interleaved=True)


def test_shared_weights_need_shared_experts():
    with pytest.raises(TypeError, match="shared_w1 is None; it must be a torch.Tensor where shared_weights is given"):
        metal_moe.fused_experts(**experts_arguments(shared_w1=None, shared_w2=None))


def test_fp16_accumulation_is_not_what_an_fp32_kernel_name_says():
    half = {name: value.half() if value.is_floating_point() else value for name, value in experts_arguments().items()}
    metal_moe.fused_experts(**half, kernel="moe_base", use_fp32_acc=False)
    with pytest.raises(ValueError, match="kernel is 'moe_base_fp32acc', .* use_fp32_acc is False"):
        metal_moe.fused_experts(**half, kernel="moe_base_fp32acc", use_fp32_acc=False)


def test_number_of_experts_is_limited():
    arguments = {
        "hidden_states": torch.zeros(1, 1),
        "w1": torch.zeros(1024, 2, 1),
        "w2": torch.zeros(1024, 1, 1),
        "topk_weights": torch.zeros(1, 1),
        "topk_ids": torch.zeros(1, 1, dtype=torch.int32),
    }
    metal_moe.fused_experts(**arguments)
    with pytest.raises(ValueError, match="at most 1024 experts in all"):
        metal_moe.fused_experts(**arguments, shared_w1=torch.zeros(1, 2, 1), shared_w2=torch.zeros(1, 1, 1))


def test_number_of_assignments_is_limited():
    tokens = 2**21 + 1
    with pytest.raises(ValueError, match=r"hidden_states has shape .* at most 2097152 tokens"):
        metal_moe.fused_experts(
            torch.zeros(1, 1).expand(tokens, 1),
            torch.zeros(2, 2, 1),
            torch.zeros(2, 1, 1),
            torch.zeros(1, 1).expand(tokens, 2),
            torch.zeros(1, 1, dtype=torch.int32).expand(tokens, 2),
        )


@pytest.mark.parametrize("call", ["experts", "moe", "topk"])
def test_tensors_are_on_one_device(call):
    function, arguments = {
        "experts": (metal_moe.fused_experts, experts_arguments()),
        "moe": (metal_moe.fused_moe, moe_arguments()),
        "topk": (metal_moe.fused_topk, topk_arguments()),
    }[call]
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in names[1:]:
        with pytest.raises(ValueError, match=f"{name} is on device meta; it must be on cpu, the device of {names[0]}"):
            function(**{**arguments, name: arguments[name].to("meta")})


def test_unsupported_device_names_the_supported_ones():
    with FakeTensorMode(), torch.device("vulkan"):
        with pytest.raises(
            Exception, match="hidden_states is on device vulkan.*; it must be on a supported device: " + DEVICES
        ):
            metal_moe.fused_experts(**experts_arguments())
        with pytest.raises(
            Exception, match="router_logits is on device vulkan.*; it must be on a supported device: " + DEVICES
        ):
            metal_moe.fused_topk(**topk_arguments())


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        (([[0]], E), TypeError, "topk_ids is of type list"),
        ((torch.zeros(T, K), E), TypeError, "topk_ids is torch.float32"),
        ((torch.zeros(T, dtype=torch.int32), E), ValueError, "topk_ids has shape (5,)"),
        ((torch.zeros(T, 0, dtype=torch.int32), E), ValueError, "k at least 1"),
        ((torch.zeros(T, K, dtype=torch.int32), 0), ValueError, "num_experts is 0; it must be from 1 to 1024"),
        ((torch.zeros(T, K, dtype=torch.int32), 8.0), TypeError, "num_experts is 8.0 of type float"),
        ((torch.zeros(1, 1, dtype=torch.int32).expand(2**21 + 1, 2), E), ValueError, "at most 4194304 assignments"),
    ],
)
def test_group_tokens(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.group_tokens(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_tile": 0}, "row_tile is 0"),
        ({"shared_experts": -1}, "shared_experts is -1"),
        ({"shared_experts": 1017}, "shared_experts is 1017; it must be from 0 to 1016"),
        ({"capacity": 0}, "capacity is 0"),
    ],
)
def test_group_tokens_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        metal_moe.group_tokens(torch.zeros(T, K, dtype=torch.int32), E, **options)


@pytest.mark.parametrize(
    ("weights", "ids", "exception", "message"),
    [
        ([1.0], torch.zeros(T, dtype=torch.int32), TypeError, "weights is of type list"),
        (torch.zeros(()), torch.zeros(T, dtype=torch.int32), ValueError, "weights has shape ()"),
        (torch.zeros(0, H), torch.zeros(T, dtype=torch.int32), ValueError, "E at least 1"),
        (strided(E, H), torch.zeros(T, dtype=torch.int32), ValueError, "weights is strided (128, 2)"),
        (torch.zeros(E, H), torch.zeros(T), TypeError, "expert_ids is torch.float32"),
        (torch.zeros(E, H), torch.zeros(T, 1, dtype=torch.int32), ValueError, "expert_ids has shape (5, 1)"),
    ],
)
def test_gather_experts(weights, ids, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.gather_experts(weights, ids)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((-1, True), ValueError, "batch_size is -1"),
        ((1.0, True), TypeError, "batch_size is 1.0 of type float"),
        ((1, 1), TypeError, "use_fp32_acc is 1 of type int"),
        ((1, True, 12), ValueError, "gate_bits is 12"),
        ((1, True, 4, 2.25), ValueError, "up_bits is 2.25: must be None, 16 or 32 (dense) or 1 to 8 in halves"),
        ((1, True, None, "16"), TypeError, "up_bits is '16' of type str"),
        ((1, True, 16, 16, 9), ValueError, "down_bits is 9"),
    ],
)
def test_select_moe_kernel(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        metal_moe.select_moe_kernel(*arguments)


def test_device_functions():
    for function in (metal_moe.kernels, metal_moe.device_info, metal_moe.pool_stats, metal_moe.pool_trim):
        with pytest.raises(ValueError, match='device is "meta"; it must be ' + DEVICES):
            function("meta")
    with pytest.raises(ValueError, match="threads is 0"):
        metal_moe.set_num_threads(0)
    with pytest.raises(ValueError, match="seed is -1"):
        metal_moe.set_exact_seed(-1)


# "null" runs nothing: it is the benchmarks'.
@pytest.mark.parametrize("name", ["metal", "null"])
def test_engine_of_cpu_tensors(monkeypatch, use_engine, name):
    use_engine("native")
    monkeypatch.setenv("METAL_MOE_CPU_ENGINE", name)
    with pytest.raises(ValueError, match=f'METAL_MOE_CPU_ENGINE is "{name}"; it must be "native" or "exact"'):
        metal_moe.fused_topk(torch.randn(T, E), K)


def test_gradients_are_refused_not_dropped():
    for name in ("hidden_states", "w1", "w2", "topk_weights", "shared_w1", "shared_weights"):
        arguments = experts_arguments()
        arguments[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"fused_experts: {name} requires grad, but metal_moe is for inference"):
            metal_moe.fused_experts(**arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not metal_moe.fused_experts(**arguments).requires_grad
    with pytest.raises(RuntimeError, match="router_logits requires grad"):
        metal_moe.fused_topk(torch.randn(T, E, requires_grad=True), K)


def test_operators_check_as_well():
    """A caller of `torch.ops.metal_moe` gets the same errors."""
    arguments = experts_arguments(w2=torch.zeros(E, INNER, H))
    with pytest.raises(ValueError, match="w2 has shape"):
        torch.ops.metal_moe.fused_experts(**arguments)


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        assert metal_moe.fused_moe(**moe_arguments()).shape == (T, H)
        with pytest.raises(ValueError, match="w2 has shape"):
            metal_moe.fused_moe(**moe_arguments(w2=torch.empty(E, INNER, H)))
