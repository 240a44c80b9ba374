#include "compute_encoder.h"

namespace metal_sim {
namespace {

EncoderObject* impl(MTL::CommandEncoder* encoder) { return static_cast<EncoderObject*>(encoder); }
const EncoderObject* impl(const MTL::CommandEncoder* encoder) { return static_cast<const EncoderObject*>(encoder); }

std::string text(uint64_t value) { return std::to_string(value); }

std::string text(MTL::Size size) {
  std::string result("(");
  result += text(size.width);
  result += ", ";
  result += text(size.height);
  result += ", ";
  result += text(size.depth);
  return result += ")";
}

std::string describe(const Kernel& kernel, const KernelArgument& argument) {
  const char* kind = argument.kind == ArgumentKind::Buffer ? "buffer " : "threadgroup ";
  return std::string("kernel '") + kernel.name + "': argument '" + argument.name + "' (" + kind + text(argument.index) +
         ")";
}

void check_index(const char* call, NS::UInteger index, uint32_t limit) {
  if (index >= limit)
    misuse(call, "index " + text(index) + " is not below " + text(limit));
}

/// Overflows no 64-bit product: each factor is limited first.
uint64_t checked_volume(const char* call, const char* name, MTL::Size size, uint64_t limit) {
  if (size.width == 0 || size.height == 0 || size.depth == 0)
    misuse(call, std::string(name) + " " + text(size) + " has a zero");
  if (size.width <= limit && size.height <= limit && size.depth <= limit) {
    const unsigned __int128 volume = static_cast<unsigned __int128>(size.width) * size.height * size.depth;
    if (volume <= limit)
      return uint64_t(volume);
  }
  misuse(call, std::string(name) + " " + text(size) + " has more than " + text(limit) + " elements");
}

void bind_buffer(const char* call, Dispatch& dispatch, const KernelArgument& argument, const Binding& binding) {
  if (!binding.address)
    misuse(call, describe(*dispatch.kernel, argument) + " is not bound");
  if (reinterpret_cast<uintptr_t>(binding.address) % argument.alignment != 0)
    misuse(call, describe(*dispatch.kernel, argument) + " is bound at an address that is not a multiple of its " +
                     text(argument.alignment) + "-byte alignment");
  if (!binding.buffer && argument.writable)
    misuse(call, describe(*dispatch.kernel, argument) + " is written, but bound to constants by setBytes");
  dispatch.arguments.buffers[argument.index] = binding.address;
  dispatch.buffer_bytes[argument.index] = binding.bytes;
  if (!binding.buffer)
    dispatch.constants |= 1u << argument.index;
}

void bind_arguments(const char* call, Dispatch& dispatch, const EncoderState& state, uint32_t max_threadgroup_bytes) {
  uint32_t threadgroup_bytes = 0;
  for (uint32_t i = 0; i < dispatch.kernel->argument_count; ++i) {
    const KernelArgument& argument = dispatch.kernel->arguments[i];
    if (argument.kind == ArgumentKind::Buffer) {
      bind_buffer(call, dispatch, argument, state.buffers[argument.index]);
      continue;
    }
    const uint32_t bytes = state.threadgroup_bytes[argument.index];
    if (bytes == 0)
      misuse(call, describe(*dispatch.kernel, argument) + " has no length: setThreadgroupMemoryLength");
    dispatch.threadgroup_bytes[argument.index] = bytes;
    threadgroup_bytes += bytes;
  }
  if (threadgroup_bytes > max_threadgroup_bytes)
    misuse(call, std::string("kernel '") + dispatch.kernel->name + "' is given " + text(threadgroup_bytes) +
                     " bytes of threadgroup memory, more than " + text(max_threadgroup_bytes));
}

} // namespace

EncoderObject::EncoderObject(NS::SharedPtr<CommandBufferObject> command_buffer, MTL::DispatchType type)
    : buffer(std::move(command_buffer)), type(type) {
  buffer->recording->state = {};
  buffer->encoder = this;
}

EncoderState& EncoderObject::state(const char* call) {
  if (ended_)
    misuse(call, "encoding has ended");
  return buffer->recording->state;
}

void EncoderObject::end() {
  state("CommandEncoder::endEncoding");
  ended_ = true;
  buffer->encoder = nullptr;
  if (samples_)
    mark(end_sample_);
}

void EncoderObject::sample(NS::SharedPtr<SamplesObject> samples, NS::UInteger start, NS::UInteger end) {
  samples_ = std::move(samples);
  end_sample_ = end;
  mark(start);
}

void EncoderObject::mark(NS::UInteger index) {
  if (index == MTL::CounterDontSample)
    return;
  Recording& recording = *buffer->recording;
  recording.retain(samples_.get());
  recording.marks.push_back({uint32_t(recording.dispatches.size()), Mark::Sample, nullptr, index, samples_.get()});
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

Device* CommandEncoder::device() const { return impl(this)->buffer->queue->device; }
NS::String* CommandEncoder::label() const { return impl(this)->label.get(); }
void CommandEncoder::setLabel(const NS::String* label) { impl(this)->label.set(label); }
void CommandEncoder::endEncoding() { impl(this)->end(); }
DispatchType ComputeCommandEncoder::dispatchType() const { return impl(this)->type; }

void ComputeCommandEncoder::setComputePipelineState(const ComputePipelineState* state) {
  constexpr char call[] = "ComputeCommandEncoder::setComputePipelineState";
  EncoderState& encoder = impl(this)->state(call);
  if (!state)
    misuse(call, "the pipeline is null");
  const auto* pipeline = static_cast<const PipelineObject*>(state);
  if (pipeline->library->device != device())
    misuse(call, std::string("the pipeline of kernel '") + pipeline->kernel->name + "' belongs to another device");
  if (encoder.pipeline != pipeline && impl(this)->buffer->retains)
    impl(this)->buffer->recording->retain(const_cast<PipelineObject*>(pipeline));
  encoder.pipeline = pipeline;
}

void ComputeCommandEncoder::setBuffer(const Buffer* buffer, NS::UInteger offset, NS::UInteger index) {
  constexpr char call[] = "ComputeCommandEncoder::setBuffer";
  EncoderState& encoder = impl(this)->state(call);
  check_index(call, index, MAX_BUFFERS);
  Binding& binding = encoder.buffers[index];
  if (!buffer) {
    binding = {};
    return;
  }
  const auto* object = static_cast<const BufferObject*>(buffer);
  if (object->device != device())
    misuse(call, "the buffer for index " + text(index) + " belongs to another device");
  if (offset > object->length)
    misuse(call, "offset " + text(offset) + " at index " + text(index) + " is beyond the buffer's " +
                     text(object->length) + " bytes");
  if (binding.buffer != object && impl(this)->buffer->retains)
    impl(this)->buffer->recording->retain(const_cast<BufferObject*>(object));
  binding = {static_cast<std::byte*>(object->contents) + offset, object->length - offset, object};
}

void ComputeCommandEncoder::setBufferOffset(NS::UInteger offset, NS::UInteger index) {
  constexpr char call[] = "ComputeCommandEncoder::setBufferOffset";
  const EncoderState& encoder = impl(this)->state(call);
  check_index(call, index, MAX_BUFFERS);
  if (!encoder.buffers[index].buffer)
    misuse(call, "no buffer is bound at index " + text(index));
  setBuffer(encoder.buffers[index].buffer, offset, index);
}

void ComputeCommandEncoder::setBytes(const void* bytes, NS::UInteger length, NS::UInteger index) {
  constexpr char call[] = "ComputeCommandEncoder::setBytes";
  EncoderState& encoder = impl(this)->state(call);
  check_index(call, index, MAX_BUFFERS);
  if (!bytes || length == 0 || length > MAX_SET_BYTES)
    misuse(call, bytes ? "length " + text(length) + " at index " + text(index) + " is not in 1.." + text(MAX_SET_BYTES)
                       : "bytes for index " + text(index) + " are null");
  encoder.buffers[index] = {impl(this)->buffer->recording->copy(bytes, length), length, nullptr};
}

void ComputeCommandEncoder::setThreadgroupMemoryLength(NS::UInteger length, NS::UInteger index) {
  constexpr char call[] = "ComputeCommandEncoder::setThreadgroupMemoryLength";
  EncoderState& encoder = impl(this)->state(call);
  check_index(call, index, MAX_THREADGROUP_ARGUMENTS);
  if (length % THREADGROUP_MEMORY_UNIT != 0)
    misuse(call, "length " + text(length) + " at index " + text(index) + " is not a multiple of " +
                     text(THREADGROUP_MEMORY_UNIT));
  const NS::UInteger limit = device()->maxThreadgroupMemoryLength();
  if (length > limit)
    misuse(call, "length " + text(length) + " at index " + text(index) + " is more than " + text(limit));
  encoder.threadgroup_bytes[index] = uint32_t(length);
}

void ComputeCommandEncoder::dispatchThreadgroups(Size threadgroupsPerGrid, Size threadsPerThreadgroup) {
  constexpr char call[] = "ComputeCommandEncoder::dispatchThreadgroups";
  const EncoderState& encoder = impl(this)->state(call);
  if (!encoder.pipeline)
    misuse(call, "no pipeline is set");
  checked_volume(call, "threadgroupsPerGrid", threadgroupsPerGrid, MAX_THREADGROUPS);
  checked_volume(call, "threadsPerThreadgroup", threadsPerThreadgroup,
                 encoder.pipeline->maxTotalThreadsPerThreadgroup());
  auto& dispatches = impl(this)->buffer->recording->dispatches;
  Dispatch& dispatch = dispatches.emplace_back();
  dispatch.kernel = encoder.pipeline->kernel;
  dispatch.library = encoder.pipeline->library->kernels;
  dispatch.cost = &encoder.pipeline->cost;
  dispatch.arguments.constants = encoder.pipeline->constants.data();
  const auto narrow = [](Size size) -> Size3 {
    return {uint32_t(size.width), uint32_t(size.height), uint32_t(size.depth)};
  };
  dispatch.grid = narrow(threadgroupsPerGrid);
  dispatch.group = narrow(threadsPerThreadgroup);
  try {
    bind_arguments(call, dispatch, encoder, uint32_t(device()->maxThreadgroupMemoryLength()));
  } catch (...) {
    dispatches.pop_back();
    throw;
  }
}

// Dispatches run one after another, each seeing what those before it wrote.
void ComputeCommandEncoder::memoryBarrier(BarrierScope) { impl(this)->state("ComputeCommandEncoder::memoryBarrier"); }

} // namespace MTL
