// What a call costs on the host, piece by piece, on the device that runs nothing ("null"): no kernel is in any of
// these.
//
//   pool               a scratch buffer of 4 KiB taken and given back; threads:4 is four threads on one pool
//   pipeline_lookup    a kernel's pipeline by its number
//   encode_dispatch    pipeline, three buffers, a struct, dispatch; command buffers of 64 dispatches, never committed
//   encode_experts     a decode layer on given routes: two dispatches, with what is planned for them; as above
//   encode_layer       the same with routing: three dispatches
//   commit             handing over a command buffer of one dispatch
//   round_trip         an operation of one dispatch: stream, encode, commit, wait
//   layer_round_trip   a decode layer with routing in the same way
//
// What is to stay below a limit has it beside its time.
#include "support.h"

#include "moe/gather.h"

#include <benchmark/benchmark.h>

#include <chrono>

namespace {

using namespace metal_moe;

MoeEngine& engine() { return bench::engine("null"); }

/// As many dispatches as CommandStream::Policy takes before it commits: what a command buffer costs is shared by them.
constexpr uint32_t DISPATCHES_PER_BUFFER = CommandStream::Policy{}.max_dispatches;

void pool(benchmark::State& state) {
  BufferPool& pool = engine().context().pool();
  for (auto _ : state)
    benchmark::DoNotOptimize(pool.acquire(4096).get());
  if (state.threads() == 1)
    state.SetLabel("limit 60 ns");
}

void pipeline_lookup(benchmark::State& state) {
  MoeEngine& looked_in = engine();
  KernelIndex kernel = GATHER_KERNEL;
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernel);
    benchmark::DoNotOptimize(&looked_in.pipeline(kernel));
  }
}

/// A copy of 64 bytes: the smallest of our dispatches.
struct Copy {
  std::vector<float> from = std::vector<float>(16), to = from, ids = {0};
  NS::SharedPtr<MTL::Buffer> from_buffer = engine().context().wrap(from.data(), 64),
                             to_buffer = engine().context().wrap(to.data(), 64),
                             ids_buffer = engine().context().wrap(ids.data(), 4);
  GatherArgs args{};

  Copy() {
    args.count = args.experts = args.id_words = args.unit_bytes = 1;
    args.bytes_per_expert_low = 64;
  }

  void encode(CommandStream& stream) const {
    const Pipeline& pipeline = engine().pipeline(GATHER_KERNEL);
    stream.use(pipeline);
    stream.bind(0, {from_buffer.get()});
    stream.bind(1, {ids_buffer.get()});
    stream.bind(2, {to_buffer.get()});
    stream.bind_value(3, args);
    stream.dispatch(MTL::Size(1, 1, 1), simdgroups(GATHER_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width, 128);
  }
};

/// Calls `encode(stream)` once per iteration on a stream whose command buffers are dropped when they are full.
template <class Encode>
void encode_only(benchmark::State& state, const Encode& encode) {
  const auto stream = engine().context().new_stream();
  for (auto _ : state) {
    encode(*stream);
    if (stream->pending_dispatches() >= DISPATCHES_PER_BUFFER)
      stream->discard();
  }
  stream->discard();
}

void encode_dispatch(benchmark::State& state) {
  const Copy copy;
  encode_only(state, [&](CommandStream& stream) { copy.encode(stream); });
  state.SetLabel("limit 500 ns");
}

void encode_experts_layer(benchmark::State& state) {
  bench::Layer layer(engine(), 1);
  const std::vector<float> weights = {0.5f, 0.5f};
  const std::vector<float> ids = {0, 0}; // as 32-bit words: expert 0 twice
  const TensorView weights_tensor = bench::tensor(engine().context(), weights, {1, 2});
  TensorView ids_tensor = bench::tensor(engine().context(), ids, {1, 2});
  ids_tensor.dtype = Dtype::Int32;
  encode_only(state, [&](CommandStream& stream) {
    encode_experts(stream, engine(), layer.x_view, layer.experts, ids_view(ids_tensor), weights_view(weights_tensor), 2,
                   layer.out_view);
  });
  state.SetLabel("limit 2000 ns");
}

void encode_layer(benchmark::State& state) {
  bench::Layer layer(engine(), 1);
  encode_only(state, [&](CommandStream& stream) { layer.encode(stream); });
  state.SetLabel("limit 2000 ns");
}

void commit(benchmark::State& state) {
  const Copy copy;
  const auto stream = engine().context().new_stream();
  copy.encode(*stream);
  stream->synchronize(); // the first commit starts the queue's thread
  for (auto _ : state) {
    copy.encode(*stream);
    const auto start = std::chrono::steady_clock::now();
    stream->commit();
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    stream->synchronize();
  }
}

void round_trip(benchmark::State& state) {
  const Copy copy;
  for (auto _ : state)
    run_operation(engine(), "gather_experts", [&](CommandStream& stream) { copy.encode(stream); });
}

void layer_round_trip(benchmark::State& state) {
  bench::Layer layer(engine(), 1);
  for (auto _ : state)
    layer.run();
  // Nothing may have run: with kernels in it the figure would be another one.
  if (std::any_of(layer.out.begin(), layer.out.end(), [](float value) { return value != 0; }))
    state.SkipWithError("the null device ran a kernel");
}

BENCHMARK(pool)->Threads(1)->Threads(4)->UseRealTime();
BENCHMARK(pipeline_lookup);
BENCHMARK(encode_dispatch);
BENCHMARK(encode_experts_layer)->Name("encode_experts");
BENCHMARK(encode_layer);
BENCHMARK(commit)->UseManualTime();
BENCHMARK(round_trip)->UseRealTime();
BENCHMARK(layer_round_trip)->UseRealTime();

} // namespace

BENCHMARK_MAIN();
