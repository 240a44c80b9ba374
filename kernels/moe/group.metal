// group: expert ids of every (token, slot) -> rows sorted by expert, their inverse, and a table of row tiles.
//
//   rank      assignments a = token * (top_k + shared) + slot in order of (expert, a): a stable counting sort
//   tiles     expert e's rows offsets[e] .. offsets[e + 1] - 1 in pieces of row_tile, experts in order
//
// Layouts: see group.h. The shared experts need no sort: row `token` of shared expert i is that token's slot
// top_k + i.
//
// One threadgroup, because every stage needs all of the one before. The assignments are cut into one consecutive run
// per simdgroup that takes part, and no more of those than there are SIMD_WIDTH assignments each; a run is read
// SIMD_WIDTH at a time, in order, so ranks need no atomics and no schedule can change them:
//   1. count    simdgroup p: counters[p][e] = how many of its assignments name expert e
//   2. scan     an expert per thread: first_place[e], first_tile[e], counters[p][e] = first place of (e, p)
//   3. tiles    a tile per thread: its expert is the last whose first tile is not beyond it
//   4. place    simdgroup p: lane's place = counters[p][e] + lower lanes with the same expert
// 3 and 4 follow 2 together. With one-lane simdgroups this is the plain serial counting sort.
//
// Bytes: S ids read twice (4 or 8 bytes), 2 * 4 * S written, 16 per tile.
#include "assignment.h"
#include "group.h"

constexpr constant uint MAX_THREADS = simdgroups(GROUP_MAX_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;
constexpr constant uint PAD_THREADS = simdgroups(PAD_SIMDGROUPS, SIMD_WIDTH) * SIMD_WIDTH;

/// The (token, slot) pairs of every SIMD_WIDTH-th routed assignment, without a division per step.
struct RoutedSlots {
  uint token;
  uint slot;
  uint token_step;
  uint slot_step;

  void start(uint first, uint top_k) {
    token = first / top_k;
    slot = first % top_k;
    token_step = SIMD_WIDTH / top_k;
    slot_step = SIMD_WIDTH % top_k;
  }
  void next(uint top_k) {
    token += token_step;
    slot += slot_step;
    if (slot >= top_k) {
      slot -= top_k;
      ++token;
    }
  }
};

inline uint routed_expert(device const int* ids, constant GroupArgs& args, thread const RoutedSlots& at) {
  const ulong index = ulong(at.token) * args.ids_token_stride + ulong(at.slot) * args.ids_slot_stride;
  return load_id(ids, index, args.id_words, args.experts);
}

[[kernel, max_total_threads_per_threadgroup(MAX_THREADS)]]
void group(device const int* ids [[buffer(0)]], device uint* offsets [[buffer(1)]],
           device uint* sorted_rows [[buffer(2)]], device uint* inverse [[buffer(3)]],
           device RowTile* tiles [[buffer(4)]], constant GroupArgs& args [[buffer(5)]],
           threadgroup uint* memory [[threadgroup(0)]], uint simdgroup [[simdgroup_index_in_threadgroup]],
           uint lane [[thread_index_in_simdgroup]], uint simdgroup_count [[simdgroups_per_threadgroup]]) {
  const uint threads = simdgroup_count * SIMD_WIDTH;
  const uint thread_index = simdgroup * SIMD_WIDTH + lane;
  const uint experts = args.experts;
  const uint top_k = max(args.top_k, 1u); // a divisor; without routed slots `routed` is 0
  const uint slots = args.top_k + args.shared;
  const uint routed = args.tokens * args.top_k;

  // Threadgroup memory: first place and first tile of each expert, and past the last; rows and tiles of the experts
  // that each simdgroup scans; then the counters.
  threadgroup uint* first_place = memory;
  threadgroup uint* first_tile = memory + experts + 1;
  threadgroup uint* scanned_rows = first_tile + experts + 1;
  threadgroup uint* scanned_tiles = scanned_rows + simdgroup_count;
  threadgroup uint* counters = scanned_tiles + simdgroup_count;
  const uint room = (GROUP_COUNTERS - 2 * (experts + 1 + simdgroup_count)) / max(experts, 1u);
  const uint parts = max(1u, min(min(simdgroup_count, room), divide_up(routed, SIMD_WIDTH)));
  threadgroup uint* own = counters + simdgroup * experts;
  const uint run = divide_up(divide_up(routed, SIMD_WIDTH), parts) * SIMD_WIDTH;
  const uint run_first = min(simdgroup * run, routed);
  const uint run_last = simdgroup < parts ? min(run_first + run, routed) : run_first;

  // The first ids are on their way while the counters are cleared.
  RoutedSlots at;
  at.start(run_first + lane, top_k);
  const uint first_expert = run_first + lane < run_last ? routed_expert(ids, args, at) : NO_EXPERT;
  for (uint i = thread_index; i < parts * experts; i += threads)
    counters[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 1. count. All lanes of a simdgroup make the same number of steps.
  RoutedSlots step = at;
  ulong first_same = 0;
  for (uint a = run_first; a < run_last; a += SIMD_WIDTH) {
    uint expert = first_expert;
    if (a != run_first)
      expert = a + lane < run_last ? routed_expert(ids, args, step) : NO_EXPERT;
    const ulong same = lanes_of_expert(expert, experts);
    if (a == run_first)
      first_same = same;
    const bool lowest = (same & lanes_before(lane)) == 0;
    if (expert != NO_EXPERT && lowest)
      own[expert] += uint(popcount(same));
    simdgroup_barrier(mem_flags::mem_threadgroup); // the next step's lowest lane may be another one
    step.next(top_k);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. scan, an expert per thread
  uint place = 0, tile_count = 0; // of the experts before
  for (uint first = 0; first < experts; first += threads) {
    const uint expert = first + thread_index;
    uint rows = 0;
    if (expert < experts)
      for (uint p = 0; p < parts; ++p)
        rows += counters[p * experts + expert];
    const uint expert_tiles = divide_up(rows, args.row_tile);
    uint next = place + simd_prefix_exclusive_sum(rows);
    uint next_tile = tile_count + simd_prefix_exclusive_sum(expert_tiles);
    if (lane == SIMD_WIDTH - 1) {
      scanned_rows[simdgroup] = next + rows - place;
      scanned_tiles[simdgroup] = next_tile + expert_tiles - tile_count;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 0; s < min(simdgroup_count, divide_up(experts - first, SIMD_WIDTH)); ++s) {
      const uint before_rows = scanned_rows[s], before_tiles = scanned_tiles[s];
      next += s < simdgroup ? before_rows : 0;
      next_tile += s < simdgroup ? before_tiles : 0;
      place += before_rows;
      tile_count += before_tiles;
    }
    if (expert < experts) {
      offsets[expert] = next;
      first_place[expert] = next;
      first_tile[expert] = next_tile;
      for (uint p = 0; p < parts; ++p) {
        const uint count = counters[p * experts + expert];
        counters[p * experts + expert] = next;
        next += count;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  const uint routed_rows = place;
  const uint routed_tiles = tile_count;
  const uint shared_tiles = divide_up(args.tokens, args.row_tile); // of one shared expert
  const uint used_tiles = routed_tiles + args.shared * shared_tiles;

  // 3. tiles, from the last thread on: the first simdgroups have the most to place.
  for (uint t = threads - 1 - thread_index; t < args.max_tiles; t += threads) {
    uint expert = 0, first_row = 0, rows = 0;
    if (t < routed_tiles) {
      for (uint last = experts; last - expert > 1;) { // first_tile[expert] <= t < first_tile[last]
        const uint middle = (expert + last) / 2;
        const bool beyond = first_tile[middle] > t;
        last = beyond ? middle : last;
        expert = beyond ? expert : middle;
      }
      const uint end = expert + 1 < experts ? first_place[expert + 1] : routed_rows;
      first_row = first_place[expert] + (t - first_tile[expert]) * args.row_tile;
      rows = min(args.row_tile, end - first_row);
    } else if (t < used_tiles) {
      const uint index = (t - routed_tiles) / shared_tiles;
      const uint row = (t - routed_tiles) % shared_tiles * args.row_tile;
      expert = experts + index;
      first_row = routed_rows + index * args.tokens + row;
      rows = min(args.row_tile, args.tokens - row);
    }
    device RowTile& tile = tiles[t];
    tile.expert = expert;
    tile.first_row = first_row;
    tile.rows = rows;
    tile.reserved = 0;
  }

  // 4. place
  for (uint a = run_first; a < run_last; a += SIMD_WIDTH) {
    const bool in_run = a + lane < run_last;
    uint expert = first_expert;
    ulong same = first_same;
    if (a != run_first) {
      expert = in_run ? routed_expert(ids, args, at) : NO_EXPERT;
      same = lanes_of_expert(expert, experts);
    }
    const uint rank = uint(popcount(same & lanes_before(lane)));
    const uint first = expert != NO_EXPERT ? own[expert] : 0;
    simdgroup_barrier(mem_flags::mem_threadgroup); // every lane has read before one advances
    if (expert != NO_EXPERT && rank == 0)
      own[expert] = first + uint(popcount(same));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (in_run) {
      const uint assignment = at.token * slots + at.slot;
      const uint own_place = expert != NO_EXPERT ? first + rank : GROUP_NONE;
      inverse[assignment] = own_place;
      if (own_place != GROUP_NONE)
        sorted_rows[own_place] = assignment;
    }
    at.next(top_k);
  }

  // Shared experts, and the places that dropped assignments left over.
  for (uint i = thread_index; i <= args.shared; i += threads)
    offsets[experts + i] = routed_rows + i * args.tokens;
  for (uint i = 0; i < args.shared; ++i) {
    for (uint token = thread_index; token < args.tokens; token += threads) {
      const uint assignment = token * slots + args.top_k + i;
      const uint place = routed_rows + i * args.tokens + token;
      sorted_rows[place] = assignment;
      inverse[assignment] = place;
    }
  }
  for (uint p = routed_rows + args.shared * args.tokens + thread_index; p < args.tokens * slots; p += threads)
    sorted_rows[p] = GROUP_NONE;
}

// pad_groups: sorted rows -> one run of `capacity` places per expert, for uniform batches.
//
//   padded[e][c] = sorted_rows[offsets[e] + c] where the expert has that many, else -1
//
// A threadgroup takes a piece of one expert's row; the loops make any grid right (group.h names the intended one).
// Bytes: 4 * E * capacity written, at most as many read.
[[kernel, max_total_threads_per_threadgroup(PAD_THREADS)]]
void pad_groups(device const uint* offsets [[buffer(0)]], device const uint* sorted_rows [[buffer(1)]],
                device int* padded [[buffer(2)]], constant PadArgs& args [[buffer(3)]],
                uint2 threadgroup_position [[threadgroup_position_in_grid]],
                uint2 threadgroups [[threadgroups_per_grid]], uint thread_index [[thread_index_in_threadgroup]],
                uint2 threads [[threads_per_threadgroup]]) {
  const uint stride = threadgroups.x * threads.x;
  const uint column = threadgroup_position.x * threads.x + thread_index;
  for (uint expert = threadgroup_position.y; expert < args.experts; expert += threadgroups.y) {
    device const uint* rows = sorted_rows + offsets[expert];
    const uint count = min(offsets[expert + 1] - offsets[expert], args.capacity);
    device int* out = padded + ulong(expert) * args.capacity;
    for (uint c = column; c < args.capacity; c += stride)
      out[c] = c < count ? int(rows[c]) : -1;
  }
}
