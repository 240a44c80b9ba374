// Where the rows of a tile come from, and where what is computed of them goes.
#pragma once
#include "tile_rows.h"

/// Rows of hidden states, through the assignments of the tile.
template <typename T, uint ROW_TILE>
struct GatheredRows {
  device const T* x;
  device const uint* assignments; // of the tile's rows; not read with tiles_from_ids
  uint slots;
  uint stride;
  TileRows<ROW_TILE> tile;

  device const T* at(uint row) thread const {
    const uint assignment = tile.from_ids() ? tile.offset(row) : assignments[row];
    return x + ulong(assignment / slots) * stride;
  }
  uint offset(uint row) thread const { return tile.offset(row); }
};

/// Rows of the intermediate.
template <typename T, uint ROW_TILE>
struct PlacedRows {
  device const T* first;
  uint stride;
  TileRows<ROW_TILE> tile;

  device const T* at(uint row) thread const { return first + ulong(tile.offset(row)) * stride; }
  uint offset(uint row) thread const { return tile.offset(row); }
};

/// One row.
template <typename T>
struct OneRow {
  device const T* row;

  device const T* at(uint) thread const { return row; }
  uint offset(uint) thread const { return 0; }
};

/// Rows that stand one after the other.
template <typename T>
struct SortedRows {
  device const T* first;
  uint stride;

  device const T* at(uint row) thread const { return first + ulong(row) * stride; }
};
