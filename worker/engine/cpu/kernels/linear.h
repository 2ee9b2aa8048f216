// Rows of numbers times a matrix: the linear layers.
//
// A matrix [n outputs, k inputs] is packed in panels of PANEL outputs (n and k filled up with zeros):
// panel[p][k / PER][PANEL][PER]. A few rows at a time keep the sums of a panel in registers. The sum of
// one output goes through the inputs in order, so it does not depend on the other rows.
#pragma once

#include "tile.h"

namespace nightherd {

// Rows of one task, at most. Two tasks with one panel both read it: as many rows as a step has by
// default, where that many rows' inputs fit into L2.
template <class E>
constexpr int CHUNK = (sizeof(typename E::X) == 2 ? 258 : 96) / Tiles<E>::ROWS * Tiles<E>::ROWS;

// Bytes of a panel that are worked through before the next rows. Few rows wait for memory: what their
// first tile reads stays in L1 for the others, and what comes next is fetched into L1 as well. Many
// rows compute: they keep their sums in registers for long. Measured on Zen 5, both kinds of numbers.
static inline int slice_of(int tiles) { return tiles <= 3 ? 16 << 10 : tiles <= 8 ? 32 << 10 : 256 << 10; }
constexpr int NEAR_SLICE = 32 << 10;  // two as large fit into L1

template <class E>
struct Matrix {
    const typename E::T* packed;
    const float* bias;  // n numbers, or null
    int panels;
    int inputs;  // k, filled up to a multiple of DEEP
};

// A panel's sums.
static inline void add(const float* a, const float* b, float* to) {
    for (int c = 0; c < PANEL; c += LANES) store(to + c, load(a + c) + load(b + c));
}

// [outputs, inputs] as panels: what is in no row or column is zero. `to` is all zeros before.
template <class E>
static void pack(const typename E::T* from, int outputs, int inputs, typename E::T* to) {
    const int deep = (inputs + E::DEEP - 1) / E::DEEP * E::DEEP;
    for (int first = 0; first < outputs; first += PANEL, to += (size_t)deep * PANEL)
        for (int c = 0; c < std::min(PANEL, outputs - first); ++c) {
            const auto* row = from + (size_t)(first + c) * inputs;
            auto* column = to + E::column_index(c) * E::PER;
            for (int i = 0; i < inputs; ++i) column[(size_t)(i / E::PER) * PANEL * E::PER + i % E::PER] = row[i];
        }
}

// One panel for rows [first, last), at most CHUNK of them; `emit(row, panel, sums)` takes each row's
// PANEL sums. `next` is the panel that this thread most likely comes to next.
template <class E, class Emit>
static void panel_rows(const Matrix<E>& matrix, int panel, const typename E::X* x, int stride, int first, int last,
                       int next, const Emit& emit) {
    constexpr int LINE = 64 / sizeof(typename E::T), WIDE = PANEL * sizeof(typename E::T);
    alignas(64) float partial[CHUNK<E> * PANEL];
    constexpr int ROWS = Tiles<E>::ROWS;
    Tiles<E> tile;
    const int tiles = (last - first + ROWS - 1) / ROWS, lines = (FETCH + tiles - 1) / tiles;
    const int slice = slice_of(tiles), depth = std::min(slice / WIDE, matrix.inputs);
    const bool near = slice <= NEAR_SLICE, more = next < matrix.panels;
    const auto* panel_at = matrix.packed + (size_t)panel * matrix.inputs * PANEL;
    const auto* next_at = matrix.packed + (size_t)next * matrix.inputs * PANEL;
    for (int begin = 0; begin < matrix.inputs; begin += depth) {
        const int end = std::min(begin + depth, matrix.inputs);
        for (int row = first; row < last; row += ROWS) {
            float* mine = partial + (row - first) * PANEL;
            const auto* from = x + (size_t)row * stride;
            const int rows = std::min(last - row, ROWS), line = (row - first) / ROWS * lines;
            Ahead<E> ahead = {panel_at + (ptrdiff_t)depth * PANEL + line * LINE,
                              next_at + ((ptrdiff_t)depth - matrix.inputs) * PANEL + line * LINE,
                              matrix.inputs - depth, line < FETCH ? std::min(lines, FETCH - line) : 0};
            if (!more) ahead.there = panel_at;  // there already
            if (near)
                tile.template sum<true>(rows, panel_at, from, stride, begin, end, mine, ahead);
            else
                tile.template sum<false>(rows, panel_at, from, stride, begin, end, mine, ahead);
            if (end < matrix.inputs) continue;
            for (int r = 0; r < rows; ++r, mine += PANEL) {
                if (matrix.bias) add(mine, matrix.bias + panel * PANEL, mine);
                emit(row + r, panel, mine);
            }
        }
    }
}

// How rows are cut for the tasks of one linear layer: few enough that panels are read seldom, many
// enough that no thread waits long for the last one.
template <class E>
static inline int chunk_of(int rows, int panels, int threads) {
    constexpr int ROWS = Tiles<E>::ROWS;
    int chunks = (rows + CHUNK<E> - 1) / CHUNK<E>;
    while (threads > 1 && chunks * panels < 8 * threads && rows / (chunks + 1) >= Tiles<E>::LEAST) ++chunks;
    const int chunk = (rows + chunks - 1) / chunks;
    return (chunk + ROWS - 1) / ROWS * ROWS;
}

}  // namespace nightherd
