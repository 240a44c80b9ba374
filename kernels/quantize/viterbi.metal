// viterbi: for each tile of 256 values the closed walk of states whose codebook values are near.
//
//   states = arg min over walks of sum over t of (table[state_t] - value_t)^2, state_t = state_(t - 1) << bits_t |
//   new_t
//
// Layouts: see viterbi.h. The search is that of python/metal_moe/formats/viterbi.py, which explains it, with the same
// sums and products in the same order and the first of equals: it finds the same walks. A *node* is what two steps
// share, the low 16 - bits of a state and the high ones of the next; a step finds for each node the least cost of a way
// to it,
//
//   cost'[node] = min over the next step's `bits` old bits: cost[state >> new bits] + (table[state] - value)^2,
//   state = old bits, node
//
// A threadgroup makes tile after tile: one walk around the ring with free ends from the middle on, which tells the node
// between the last value and the first, then one that starts and ends there. Threads share the nodes of a step. Costs
// of all steps are kept in device memory (`history`), where ways are traced back by one simdgroup: which state was
// taken is found again from costs, so that the many steps forward need not keep it.
//
// Operations: 3 * 2 * 256 * 65536 per tile. Bytes: per tile 2 * 256 * 4 * viterbi_nodes written, and read once from a
// cache; the table (256 KiB) for each step from a cache.
#include "viterbi.h"

constexpr constant uint SIMDGROUPS = simdgroups(VITERBI_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
/// Nodes of a thread at a time. One thread's are vectors of its processor.
constexpr constant uint NODES = SIMD_WIDTH == 1 ? 64 : 1;

/// The search in one tile; steps of even t have EVEN new bits, the others ODD.
template <uint EVEN, uint ODD>
struct TileSearch {
  device const float* values;
  device const float* table;
  device int* states;
  device float* history;
  threadgroup uint* seam;
  uint thread_index;
  uint simdgroup;
  uint lane;

  static constexpr constant uint ROW = VITERBI_STATES >> EVEN; // EVEN <= ODD

  /// One step to NODES nodes from `node` on.
  template <uint NEW, uint OLD>
  void step_to(device const float* costs, device float* result, float value, uint node) thread const {
    float best[NODES];
    UNROLL
    for (uint i = 0; i < NODES; ++i)
      best[i] = INFINITY;
    for (uint old = 0; old < 1u << OLD; ++old) {
      const uint state = old << (TRELLIS_STATE_BITS - OLD) | node;
      device const float* cost = costs + (state >> NEW);
      UNROLL
      for (uint i = 0; i < NODES; ++i) {
        const float difference = table[state + i] - value;
        best[i] = min(best[i], fma(difference, difference, cost[i >> NEW]));
      }
    }
    UNROLL
    for (uint i = 0; i < NODES; ++i)
      result[node + i] = best[i];
  }

  template <uint NEW, uint OLD>
  void step(uint place, uint t) thread const {
    device const float* costs = history + place * ROW;
    device float* result = history + (place + 1) * ROW;
    for (uint node = thread_index * NODES; node < VITERBI_STATES >> OLD; node += THREADS * NODES)
      step_to<NEW, OLD>(costs, result, values[t], node);
    threadgroup_barrier(mem_flags::mem_device);
  }

  /// Costs of all steps, from t = `first` on once around; history's first row is that before the first step.
  void forward(uint first) thread const {
    for (uint place = 0; place < VITERBI_STEPS; ++place) {
      const uint t = (first + place) % VITERBI_STEPS;
      if (EVEN == ODD || t % 2 == 0)
        step<EVEN, ODD>(place, t);
      else
        step<ODD, EVEN>(place, t);
    }
  }

  /// The place of the least cost among `count`, the first of equals: cost(i) of `candidate`. For one simdgroup.
  template <typename Costs>
  uint least(thread const Costs& costs, uint count) thread const {
    float cost = INFINITY;
    uint place = 0;
    for (uint i = lane; i < count; i += SIMD_WIDTH) {
      const float one = costs.at(i);
      place = one < cost ? i : place;
      cost = min(one, cost);
    }
    const float lowest = simd_min(cost);
    // A lane that found nothing below infinity must not say that place 0 has it.
    return min(simd_min(cost == lowest && cost < INFINITY ? place : count), count - 1);
  }

  struct EndCosts {
    device const float* costs;
    float at(uint node) thread const { return costs[node]; }
  };

  struct StepCosts {
    device const float* costs;
    device const float* table;
    float value;
    uint node, old, fresh; // bits that differ among candidates, and of the value's own

    uint state(uint i) thread const { return i << (TRELLIS_STATE_BITS - old) | node; }
    float at(uint i) thread const {
      const float difference = table[state(i)] - value;
      return fma(difference, difference, costs[state(i) >> fresh]);
    }
  };

  /// The node before the steps `begin` to `end` of a walk (places in history, t = `first` + place) that ends in `node`;
  /// its states are written where `keep` says so.
  uint trace(uint first, uint begin, uint end, uint node, bool keep) thread const {
    for (uint place = end; place > begin;) {
      --place;
      const uint t = (first + place) % VITERBI_STEPS;
      StepCosts costs;
      costs.costs = history + place * ROW;
      costs.table = table;
      costs.value = values[t];
      costs.node = node;
      costs.fresh = t % 2 == 0 ? EVEN : ODD;
      costs.old = t % 2 == 0 ? ODD : EVEN;
      const uint state = costs.state(least(costs, 1u << costs.old));
      if (keep && lane == 0)
        states[t] = int(state);
      node = state >> costs.fresh;
    }
    return node;
  }

  void start(uint node_or_all) thread const {
    for (uint node = thread_index; node < ROW; node += THREADS)
      history[node] = node_or_all == VITERBI_STATES || node == node_or_all ? 0.0f : INFINITY;
    threadgroup_barrier(mem_flags::mem_device);
  }

  void search() thread const {
    constexpr uint MIDDLE = VITERBI_STEPS / 2;
    start(VITERBI_STATES);
    forward(MIDDLE);
    if (simdgroup == 0) {
      // The step before an even one has left costs by the even one's nodes.
      EndCosts ends;
      ends.costs = history + VITERBI_STEPS * ROW;
      const uint node = trace(MIDDLE, MIDDLE, VITERBI_STEPS, least(ends, ROW), false);
      if (lane == 0)
        *seam = node;
    }
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    const uint closing = *seam;
    start(closing);
    forward(0);
    if (simdgroup == 0)
      trace(0, 0, VITERBI_STEPS, closing, true);
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  }
};

struct Search {
  device const float* values;
  device const float* table;
  device int* states;
  device float* history;
  threadgroup uint* seam;
  uint tiles, first, step;
  uint thread_index, simdgroup, lane;

  template <uint EVEN, uint ODD>
  void run() thread const {
    for (uint tile = first; tile < tiles; tile += step) {
      TileSearch<EVEN, ODD> search;
      search.values = values + ulong(tile) * VITERBI_STEPS;
      search.table = table;
      search.states = states + ulong(tile) * VITERBI_STEPS;
      search.history = history;
      search.seam = seam;
      search.thread_index = thread_index;
      search.simdgroup = simdgroup;
      search.lane = lane;
      search.search();
    }
  }

  template <uint WHOLE>
  void run_rate(bool half_more) thread const {
    if (half_more)
      run<WHOLE, WHOLE + 1>();
    else
      run<WHOLE, WHOLE>();
  }
};

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void viterbi(device const float* values [[buffer(0)]], device const float* table [[buffer(1)]],
             device int* states [[buffer(2)]], device float* history [[buffer(3)]],
             constant ViterbiArgs& args [[buffer(4)]], threadgroup uint* seam [[threadgroup(0)]],
             uint threadgroup_position [[threadgroup_position_in_grid]], uint threadgroups [[threadgroups_per_grid]],
             uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
             uint lane [[thread_index_in_simdgroup]]) {
  Search search;
  search.values = values;
  search.table = table;
  search.states = states;
  search.history = history + ulong(threadgroup_position) * viterbi_history(args.half_bits);
  search.seam = seam;
  search.tiles = args.tiles;
  search.first = threadgroup_position;
  search.step = threadgroups;
  search.thread_index = thread_index;
  search.simdgroup = simdgroup;
  search.lane = lane;
  const bool half_more = args.half_bits % 2 != 0;
  switch (args.half_bits / 2) {
  case 1:
    return search.run_rate<1>(half_more);
  case 2:
    return search.run_rate<2>(half_more);
  case 3:
    return search.run_rate<3>(half_more);
  case 4:
    return search.run_rate<4>(half_more);
  case 5:
    return search.run_rate<5>(half_more);
  case 6:
    return search.run_rate<6>(half_more);
  case 7:
    return search.run_rate<7>(half_more);
  default:
    return search.run<8, 8>();
  }
}
