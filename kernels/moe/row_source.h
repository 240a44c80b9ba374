// Where the rows of a tile come from: row r of one expert, in expert order.
#pragma once
#include "../tiles/simd.h"

/// Rows of hidden states, through the sorted assignments of the tile.
template <typename T>
struct GatheredRows {
  device const T* x;
  device const uint* assignments;
  uint slots;
  uint stride;

  device const T* at(uint row) thread const { return x + ulong(assignments[row] / slots) * stride; }
};

/// Rows that already stand in expert order.
template <typename T>
struct SortedRows {
  device const T* first;
  uint stride;

  device const T* at(uint row) thread const { return first + ulong(row) * stride; }
};
