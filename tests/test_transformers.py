"""`fused_moe` against the MoE blocks of Hugging Face transformers, built from tiny configurations.

The block is the other party: its router weights give the logits, its experts the weights, and its output, in float32 on
both sides, is what `fused_moe` must give.
"""

import metal_moe
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import assert_close, default_family
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeMoE
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteConfig, Glm4MoeLiteMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

TOKENS = [1, 5, 24, 70]
HIDDEN, INTERMEDIATE = 64, 40


def randomize(block):
    """Weights ~ N(0, 1 / fan in), small biases: as modules are built they are empty or zero."""
    torch.manual_seed(0)
    for name, tensor in list(block.named_parameters()) + list(block.named_buffers()):
        with torch.no_grad():
            if "bias" in name:
                tensor.normal_(std=0.1)
            else:
                tensor.normal_(std=HIDDEN**-0.5)
    return block.eval()


def check_block(block, tokens, options, *, gate=None, transposed=False):
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    gate = block.gate if gate is None else gate
    w1, w2 = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    with torch.no_grad():
        expected = block(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        logits = F.linear(x[0], gate.weight, getattr(gate, "bias", None))
        out = metal_moe.fused_moe(x[0], w1, w2, logits, **options)
    assert_close(out, reference.to_double(expected.view(tokens, HIDDEN)), type(block).__name__)
    assert metal_moe.last_dispatch()["family"].removesuffix("_fp32acc") == default_family(
        tokens, top_k=options["top_k"]
    )


def shared_expert(mlp):
    """[1, 2I, H] and [1, H, I]: gate rows, then up rows."""
    w1 = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
    return {"shared_w1": w1[None].contiguous(), "shared_w2": mlp.down_proj.weight.detach()[None].contiguous()}


@pytest.mark.parametrize("tokens", TOKENS)
def test_mixtral(tokens):
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=8, num_experts_per_tok=2
    )
    check_block(randomize(MixtralSparseMoeBlock(config)), tokens, {"top_k": 2})


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_qwen3_moe(tokens, renormalize):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=renormalize,
    )
    check_block(randomize(Qwen3MoeSparseMoeBlock(config)), tokens, {"top_k": 4, "renormalize": renormalize})


@pytest.mark.parametrize("tokens", TOKENS)
def test_qwen2_moe(tokens):
    """A shared expert with a gate of its own: its weight differs from token to token."""
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=72,
        num_experts=16,
        num_experts_per_tok=4,
    )
    block = randomize(Qwen2MoeSparseMoeBlock(config))
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    weights = torch.sigmoid(block.shared_expert_gate(x[0])).detach()
    options = {"top_k": 4, "renormalize": config.norm_topk_prob, "shared_weights": weights}
    check_block(block, tokens, {**options, **shared_expert(block.shared_expert)})


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tokens", TOKENS)
def test_deepseek_v2(tokens, groups):
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=min(groups, 2),
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        routed_scaling_factor=1.5,
    )
    block = randomize(DeepseekV2Moe(config))
    options = {
        "top_k": 4,
        "renormalize": False,
        "num_expert_group": groups,
        "topk_group": min(groups, 2),
        "routed_scaling_factor": 1.5,
    }
    check_block(block, tokens, {**options, **shared_expert(block.shared_experts)})


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("config_type", "block_type"),
    [(DeepseekV3Config, DeepseekV3MoE), (Glm4MoeConfig, Glm4MoeMoE), (Glm4MoeLiteConfig, Glm4MoeLiteMoE)],
)
def test_deepseek_v3_and_glm(tokens, config_type, block_type, groups):
    """Sigmoid scores, a correction bias for the choice, groups ranked by their two best, renormalised and scaled."""
    config = config_type(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=min(groups, 2),
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
    )
    block = randomize(block_type(config))
    options = {
        "top_k": 4,
        "scoring": "sigmoid",
        "correction_bias": block.gate.e_score_correction_bias,
        "num_expert_group": groups,
        "topk_group": min(groups, 2),
        "group_score": "top2_sum",
        "routed_scaling_factor": 1.8,
    }
    check_block(block, tokens, {**options, **shared_expert(block.shared_experts)})


@pytest.mark.parametrize("tokens", TOKENS)
def test_gpt_oss(tokens):
    """Top-k on logits, softmax of the chosen, interleaved gate and up, biases, clamped swiglu; weights [E, in, out]."""
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=8, num_experts_per_tok=4
    )
    block = randomize(GptOssMLP(config))
    options = {
        "top_k": 4,
        "scoring": "topk_softmax",
        "activation": "swiglu_clamp",
        "interleaved": True,
        "alpha": block.experts.alpha,
        "limit": block.experts.limit,
        "w1_bias": block.experts.gate_up_proj_bias.detach(),
        "w2_bias": block.experts.down_proj_bias.detach(),
    }
    check_block(block, tokens, options, gate=block.router, transposed=True)
