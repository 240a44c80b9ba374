#include "access_map.h"

#include <algorithm>
#include <link.h>

namespace metal_sim {
namespace {

// Farther than this from every argument, an address is not described as beside one.
constexpr uintptr_t NEAR = uintptr_t(1) << 30;

const char* verb(Access access) {
  switch (access) {
  case Access::Read:
    return "read";
  case Access::Write:
    return "wrote";
  case Access::Atomic:
    return "atomically updated";
  }
  return "accessed";
}

struct ImageQuery {
  uintptr_t code;
  std::vector<std::pair<uintptr_t, size_t>> segments;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
  auto& query = *static_cast<ImageQuery*>(data);
  bool holds = false;
  query.segments.clear();
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD)
      continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    holds |= query.code - begin < header.p_memsz;
    query.segments.emplace_back(begin, header.p_memsz);
  }
  return holds; // 1 ends the search
}

} // namespace

void AccessMap::build(const Dispatch& dispatch, void* const* threadgroup) {
  bounds_.clear();
  const Kernel& kernel = *dispatch.kernel;
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const KernelArgument& argument = kernel.arguments[i];
    const bool device = argument.kind == ArgumentKind::Buffer;
    const auto begin =
        reinterpret_cast<uintptr_t>(device ? dispatch.arguments.buffers[argument.index] : threadgroup[argument.index]);
    const size_t bytes = device ? dispatch.buffer_bytes[argument.index] : dispatch.threadgroup_bytes[argument.index];
    bounds_.push_back({begin, begin + bytes, !device || argument.writable, true,
                       device ? MemoryKind::Device : MemoryKind::Threadgroup, &argument});
  }
}

void AccessMap::add_readable(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  bounds_.push_back({address, address + bytes, false, false, MemoryKind::Device, nullptr});
}

void AccessMap::add_image(const void* code) {
  ImageQuery query{reinterpret_cast<uintptr_t>(code), {}};
  if (!dl_iterate_phdr(find_image, &query))
    return;
  for (const auto& [begin, bytes] : query.segments)
    add_readable(reinterpret_cast<const void*>(begin), bytes);
}

void AccessMap::finish() {
  // Buffers may be bound twice or overlap: cut all ranges at all ends, then join neighbours that allow the same.
  std::vector<uintptr_t> cuts;
  for (const Bound& bound : bounds_) {
    cuts.push_back(bound.begin);
    cuts.push_back(bound.end);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

  struct Piece {
    uintptr_t begin, end;
    bool writable, raceable;
    MemoryKind kind;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    Piece piece{cuts[i], cuts[i + 1], false, false, MemoryKind::Device};
    bool covered = false;
    for (const Bound& bound : bounds_) {
      if (bound.begin > piece.begin || bound.end < piece.end)
        continue;
      covered = true;
      piece.writable |= bound.writable;
      piece.raceable |= bound.raceable && bound.writable;
      if (bound.kind == MemoryKind::Threadgroup)
        piece.kind = MemoryKind::Threadgroup;
    }
    if (!covered)
      continue;
    if (!pieces.empty() && pieces.back().end == piece.begin && pieces.back().writable == piece.writable &&
        pieces.back().raceable == piece.raceable && pieces.back().kind == piece.kind)
      pieces.back().end = piece.end;
    else
      pieces.push_back(piece);
  }

  shadows_.clear();
  shadows_.reserve(pieces.size()); // regions point into it
  regions_.clear();
  for (const Piece& piece : pieces) {
    Shadow* shadow = nullptr;
    if (piece.raceable)
      shadow = &shadows_.emplace_back(piece.begin, piece.end - piece.begin, piece.kind, spare_);
    regions_.push_back({piece.begin, piece.end, piece.writable, shadow});
  }
  recent_.fill(UINT16_MAX);
}

const AccessMap::Region* AccessMap::search(uintptr_t address, size_t bytes, uint16_t& slot) {
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](uintptr_t value, const Region& region) { return value < region.begin; });
  if (after == regions_.begin())
    return nullptr;
  const Region& region = *(after - 1);
  if (address >= region.end || bytes > region.end - address)
    return nullptr;
  slot = uint16_t(after - 1 - regions_.begin());
  return &region;
}

std::string AccessMap::describe(uintptr_t address, size_t bytes, Access access) const {
  const Bound* nearest = nullptr;
  uintptr_t least = NEAR;
  for (const Bound& bound : bounds_) {
    if (!bound.argument)
      continue;
    const uintptr_t distance = address < bound.begin ? bound.begin - address
                               : address < bound.end ? 0
                                                     : address - bound.end + 1;
    if (distance < least) {
      nearest = &bound;
      least = distance;
    }
  }
  std::string text = std::string(verb(access)) + " " + std::to_string(bytes) + " bytes at ";
  if (!nearest) {
    char hexadecimal[32];
    std::snprintf(hexadecimal, sizeof hexadecimal, "%#zx", size_t(address));
    return text + "address " + hexadecimal + ", near no argument";
  }
  const KernelArgument& argument = *nearest->argument;
  return text + "offset " + std::to_string(intptr_t(address - nearest->begin)) + " of argument '" + argument.name +
         "' (" + (argument.kind == ArgumentKind::Buffer ? "buffer " : "threadgroup ") + std::to_string(argument.index) +
         ", " + std::to_string(nearest->end - nearest->begin) + " bytes" + (nearest->writable ? "" : ", read-only") +
         ")";
}

} // namespace metal_sim
