// Encodes the experts of a layer: group, gate_up, down and combine (no group for few assignments), or gate_up and down
// for decode.
#pragma once

#include "engine.h"
#include "plan.h"

#include "../core/trace.h"

#include <array>
#include <optional>

namespace metal_moe {

/// One projection of all experts, quantised: buffers and table of docs/formats.md. Without a table: absent.
struct QuantizedPart {
  TensorView codes;
  TensorView scales;
  TensorView biases;
  TensorView table;  // int32 [E, 16]
  uint32_t code = 0; // of its matrices (kernels/formats/matrix_code.h), where they have one that kernels may know

  explicit operator bool() const { return bool(table); }
};

/// Weights and options of the experts, shapes as fused_experts of the Python package documents them. Absent tensors are
/// empty views.
struct ExpertsLayer {
  TensorView w1;                // [E, 2I, H], relu2: [E, I, H]
  TensorView w2;                // [E, H, I]
  QuantizedPart gate;           // in place of w1; relu2: its one matrix
  QuantizedPart up;             // absent where there is no gate
  QuantizedPart down;           // in place of w2
  uint32_t intermediate = 0;    // I, where `down` is given: records are not read here
  bool trellis_gate_up = false; // gate and up are trellis codes, as no expert or all of them are
  bool trellis_down = false;    // so is down; without shared experts where either is
  TensorView bias1;             // [E, 2I] or [E, I]
  TensorView bias2;             // [E, H]
  TensorView shared_w1;         // [N, 2Is, H] or [N, Is, H]
  TensorView shared_w2;         // [N, H, Is]
  QuantizedPart shared_gate;    // in place of shared_w1, where `gate` is given
  QuantizedPart shared_up;
  QuantizedPart shared_down;        // in place of shared_w2, where `down` is given
  uint32_t shared_intermediate = 0; // Is, where `shared_down` is given
  TensorView shared_weights;        // [T, N]; absent: 1
  Activation activation = ACTIVATION_SILU;
  bool interleaved = false;
  float alpha = 1.702f;
  float limit = 7.0f;
  bool fp32_accumulation = true;
  std::optional<std::string_view> family; // by name; none: chosen by the number of tokens

  /// Whether both products have trellis weights.
  bool trellis() const { return trellis_gate_up && trellis_down; }
  /// What the kernels of gate, up and down may be compiled for.
  std::array<uint32_t, 3> codes() const { return {gate.code, up.code, down.code}; }
};

/// Kernels read codes, scales and biases in vectors: std::invalid_argument naming `argument` where one of the part's
/// buffers does not begin at a multiple of VECTOR_BYTES.
void check_alignment(const char* argument, const QuantizedPart& part);

/// Sizes of a layer for hidden states x [T, H] and top_k experts per token.
LayerShape layer_shape(const TensorView& x, const ExpertsLayer& layer, int64_t top_k);

/// out [T, H], contiguous, = sum over slots of weight * expert(x). `ids` and `weights` are [T, top_k]. Records the
/// family in last_dispatch(). std::invalid_argument naming the argument where the layer asks for a family that cannot
/// run it. No dispatch for T = 0.
void encode_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                    const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out);

/// What of a layer's encoding does not depend on where its tensors lie: only on their shapes, strides and dtypes, on
/// the layer's options, on which tensors are absent, and on the engine. Made once and used by every call of which all
/// of these are the same.
struct ExpertsPacking {
  ExpertsPlan plan; // of 0 tokens: nothing to encode
  ExpertsArgs args; // without what differs between the dispatches
  /// ExpertsLayer::codes, which decide about grids: a layer with others has a packing of its own.
  std::array<uint32_t, 3> codes;
  FamilyChoice choice; // of the plan's family
};

/// std::invalid_argument as encode_experts.
ExpertsPacking pack_experts(const MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k);

/// encode_experts of a layer with its `packing`.
void encode_experts(CommandStream& stream, MoeEngine& engine, const ExpertsPacking& packing, const TensorView& x,
                    const ExpertsLayer& layer, const SlotsView& ids, const SlotsView& weights, const TensorView& out);

} // namespace metal_moe
