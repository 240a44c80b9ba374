#include "experts_call.h"

#include "run.h"

#include <bit>
#include <string>
#include <string_view>
#include <unordered_map>

namespace metal_moe::bindings {

namespace {

/// Everything that checks and packing look at, as bytes; no addresses of tensors, so that nothing is wrong when memory
/// is freed and used again.
class Signature {
public:
  explicit Signature(const ExpertsCall& call) {
    add(reinterpret_cast<uintptr_t>(call.engine)); // engines live for ever, as do their tuning tables
    add(reinterpret_cast<uintptr_t>(call.engine->tuning_table()));
    const ExpertsLayer& layer = call.layer;
    add(uint64_t(call.routed) | uint64_t(layer.interleaved) << 1 | uint64_t(layer.fp32_accumulation) << 2 |
        uint64_t(layer.trellis_gate_up) << 3 | uint64_t(layer.trellis_down) << 4 | uint64_t(layer.activation) << 8 |
        uint64_t(layer.intermediate) << 32);
    add(uint64_t(std::bit_cast<uint32_t>(layer.alpha)) | uint64_t(std::bit_cast<uint32_t>(layer.limit)) << 32);
    add(call.x);
    add(layer.w1);
    add(layer.w2);
    add(layer.bias1);
    add(layer.bias2);
    add(layer.shared_w1);
    add(layer.shared_w2);
    add(layer.shared_weights);
    for (const QuantizedPart* part :
         {&layer.gate, &layer.up, &layer.down, &layer.shared_gate, &layer.shared_up, &layer.shared_down})
      add(*part);
    add(uint64_t(layer.shared_intermediate));
    if (call.routed) {
      add(call.logits);
      add(call.correction_bias);
      const RoutingOptions& routing = call.routing;
      add(uint64_t(call.top_k) | uint64_t(routing.scoring) << 32 | uint64_t(routing.group_score) << 40 |
          uint64_t(routing.renormalize) << 48);
      add(uint64_t(routing.groups) | uint64_t(routing.topk_groups) << 32);
      add(uint64_t(std::bit_cast<uint32_t>(routing.renormalize_epsilon)) |
          uint64_t(std::bit_cast<uint32_t>(routing.scale)) << 32);
    } else {
      add(call.weights);
      add(call.ids);
    }
    // The only part of any length, and so the last.
    if (layer.family && layer.family->size() <= MAX_FAMILY_BYTES) {
      layer.family->copy(reinterpret_cast<char*>(&words_[count_]), layer.family->size());
      bytes_ = count_ * sizeof(uint64_t) + layer.family->size();
    } else {
      bytes_ = count_ * sizeof(uint64_t);
      valid_ = !layer.family;
    }
  }

  /// Whether it says everything: not for names that no family can have.
  bool valid() const { return valid_; }
  std::string_view bytes() const { return {reinterpret_cast<const char*>(words_), bytes_}; }

private:
  static constexpr uint32_t MAX_FAMILY_BYTES = 64;
  static constexpr uint32_t TENSORS = 10, PARTS = 6, TENSOR_WORDS = 1 + 2 * TensorView::MAX_RANK;
  static constexpr uint32_t MAX_WORDS = 8 + (TENSORS + 4 * PARTS) * TENSOR_WORDS + MAX_FAMILY_BYTES / sizeof(uint64_t);

  void add(uint64_t word) { words_[count_++] = word; }
  void add(const TensorView& tensor) {
    // An absent tensor has item size 0.
    add(uint64_t(tensor.rank) | uint64_t(tensor.dtype) << 8 | uint64_t(tensor.item_size) << 16);
    for (uint32_t i = 0; i < tensor.rank; ++i) {
      add(static_cast<uint64_t>(tensor.shape[i]));
      add(static_cast<uint64_t>(tensor.strides[i]));
    }
  }
  void add(const QuantizedPart& part) {
    if (part.table.rank == 0)
      return add(uint64_t(0));
    for (const TensorView* buffer : {&part.codes, &part.scales, &part.biases, &part.table})
      add(*buffer);
  }

  uint64_t words_[MAX_WORDS]; // only the first count_ are set
  uint32_t count_ = 0;
  size_t bytes_ = 0;
  bool valid_ = true;
};

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view bytes) const { return std::hash<std::string_view>()(bytes); }
};

using Packings = std::unordered_map<std::string, std::shared_ptr<const ExpertsPacking>, Hash, std::equal_to<>>;

/// Under the interpreter's lock. Never freed: the interpreter may end before the module.
Packings& packings() {
  static auto* made = new Packings;
  return *made;
}

} // namespace

std::shared_ptr<const ExpertsPacking> find_packing(const ExpertsCall& call) {
  const Signature signature(call);
  if (!signature.valid())
    return nullptr;
  const auto found = packings().find(signature.bytes());
  return found == packings().end() ? nullptr : found->second;
}

std::shared_ptr<const ExpertsPacking> packing_of(const ExpertsCall& call) {
  const Signature signature(call);
  if (signature.valid())
    if (const auto found = packings().find(signature.bytes());
        found != packings().end() && found->second->codes == call.layer.codes())
      return found->second;
  auto packing = std::make_shared<const ExpertsPacking>(
      call.routed ? pack_routed_experts(*call.engine, call.x, call.layer, call.top_k)
                  : pack_experts(*call.engine, call.x, call.layer, ids_view(call.ids), weights_view(call.weights),
                                 size_argument("top_k of topk_ids", call.ids.shape[1])));
  if (signature.valid()) {
    // Prompts of all lengths have signatures of their own. Those in use are back after one call each.
    if (packings().size() >= MAX_PACKINGS)
      packings().clear();
    packings().insert_or_assign(std::string(signature.bytes()), packing);
  }
  return packing;
}

size_t packing_count() { return packings().size(); }

namespace {

void encode(CommandStream& stream, const ExpertsCall& call, const ExpertsPacking& packing, const TensorView& out) {
  MoeEngine& engine = *call.engine;
  if (call.routed)
    return encode_fused_moe(stream, engine, call.x, call.layer, call.logits, call.correction_bias, call.top_k,
                            call.routing, out, &packing);
  encode_experts(stream, engine, packing, call.x, call.layer, ids_view(call.ids), weights_view(call.weights), out);
}

} // namespace

void run_experts(const ExpertsCall& call, const ExpertsPacking& packing, std::span<PyObject* const> arguments,
                 pybind11::handle out) {
  const TensorView out_view = read_tensor(call.engine->context(), out, "out", 2);
  run(
      *call.engine, call.operation(), [&] { return keep_alive(arguments, out.ptr()); },
      [&](CommandStream& stream) { encode(stream, call, packing, out_view); }, true);
}

} // namespace metal_moe::bindings
