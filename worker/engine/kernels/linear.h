// Rows of numbers times a matrix: the linear layers.
//
// A matrix [n outputs, k inputs] is packed in panels of 64 outputs (n filled up with zeros):
// panel[p][k / PER][64][PER]. Six rows at a time keep 24 sums of sixteen outputs in registers. The
// sum of one output goes through the inputs in order, so it does not depend on the other rows.
#pragma once

#include <algorithm>

#include "vector.h"

namespace nightherd {

constexpr int PANEL = 64;    // outputs
constexpr int TILE = 6;      // rows

// Rows of one task, at most. Two tasks with one panel both read it: as many rows as a step has by
// default, where that many rows' inputs fit into L2.
template <class E>
constexpr int CHUNK = E::PER == 2 ? 258 : 96;

// Inputs (of PER each) that are worked through before the next rows. Few rows wait for memory: what
// their first tile reads stays in L1 for the others, and what comes next is fetched into L1 as well.
// Many rows compute: they keep their sums in registers for long. Measured on Zen 5, both kinds of numbers.
static inline int depth_of(int tiles) { return tiles <= 3 ? 64 : tiles <= 8 ? 128 : 1024; }
constexpr int NEAR_DEPTH = 128;  // two slices as deep fit into L1

template <class E>
struct Matrix {
    const typename E::T* packed;
    const float* bias;  // n numbers, or null
    int panels;
    int inputs;  // k, filled up to a multiple of PER
};

// What a tile fetches from memory while it computes: of each PER inputs' cache lines `lines`, at the
// place that the thread comes to one depth later, be it in this panel or in its next one.
template <class E>
struct Ahead {
    const typename E::T *here, *there;  // from input `wrap` on it is there
    int wrap, lines;
};

template <class E, int ROWS, bool NEAR, class Emit>
static inline void tile(const Matrix<E>& matrix, int panel, const typename E::T* x, int stride,
                        int first, int begin, int end, float* partial, const Ahead<E>& ahead,
                        const Emit& emit) {
    constexpr int LINE = 64 / sizeof(typename E::T);
    constexpr int COLUMNS = PANEL / LANES;
    vec sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c)
            sums[r][c] = begin ? load(partial + r * PANEL + c * LANES) : vec{};
    const auto* w = matrix.packed + ((size_t)panel * matrix.inputs + begin) * PANEL;
    const auto* row = x + (size_t)first * stride;
    for (int i = begin; i < end; i += E::PER, w += PANEL * E::PER) {
        typename E::Packed packed[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) packed[c] = E::read(w + c * LANES * E::PER);
        const auto* to = (i < ahead.wrap ? ahead.here : ahead.there) + (ptrdiff_t)i * PANEL;
        for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(to + line * LINE, 0, NEAR ? 3 : 2);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c)
                sums[r][c] = E::add(sums[r][c], row + (size_t)r * stride + i, packed[c]);
    }
    const bool last = end == matrix.inputs;
    for (int r = 0; r < ROWS; ++r) {
        if (!last) {
            for (int c = 0; c < COLUMNS; ++c) store(partial + r * PANEL + c * LANES, sums[r][c]);
            continue;
        }
        if (matrix.bias)
            for (int c = 0; c < COLUMNS; ++c)
                sums[r][c] += load(matrix.bias + panel * PANEL + c * LANES);
        emit(first + r, panel, sums[r]);
    }
}

// Inputs [begin, end) of one panel for a tile of at most TILE rows.
template <class E, bool NEAR, class Emit>
static inline void tile_of(const Matrix<E>& matrix, int panel, const typename E::T* x, int stride, int first,
                           int rows, int begin, int end, float* partial, const Ahead<E>& ahead,
                           const Emit& emit) {
    switch (rows) {
        case 1: tile<E, 1, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit); break;
        case 2: tile<E, 2, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit); break;
        case 3: tile<E, 3, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit); break;
        case 4: tile<E, 4, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit); break;
        case 5: tile<E, 5, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit); break;
        default: tile<E, 6, NEAR>(matrix, panel, x, stride, first, begin, end, partial, ahead, emit);
    }
}

// One panel for rows [first, last), at most CHUNK of them; `emit(row, panel, vec[4])` takes the sums.
// `next` is the panel that this thread most likely comes to next.
template <class E, class Emit>
static void panel_rows(const Matrix<E>& matrix, int panel, const typename E::T* x, int stride,
                       int first, int last, int next, const Emit& emit) {
    constexpr int LINE = 64 / sizeof(typename E::T), LINES = PANEL * E::PER / LINE;
    alignas(64) float partial[CHUNK<E> * PANEL];
    const int tiles = (last - first + TILE - 1) / TILE, lines = (LINES + tiles - 1) / tiles;
    const int depth = std::min(depth_of(tiles) * E::PER, matrix.inputs);
    const bool near = depth <= NEAR_DEPTH * E::PER, more = next < matrix.panels;
    const auto* panel_at = matrix.packed + (size_t)panel * matrix.inputs * PANEL;
    const auto* next_at = matrix.packed + (size_t)next * matrix.inputs * PANEL;
    for (int begin = 0; begin < matrix.inputs; begin += depth) {
        const int end = std::min(begin + depth, matrix.inputs);
        for (int row = first; row < last; row += TILE) {
            float* mine = partial + (row - first) * PANEL;
            const int rows = std::min(last - row, TILE), line = (row - first) / TILE * lines;
            Ahead<E> ahead = {panel_at + (ptrdiff_t)depth * PANEL + line * LINE,
                              next_at + ((ptrdiff_t)depth - matrix.inputs) * PANEL + line * LINE,
                              matrix.inputs - depth, line < LINES ? std::min(lines, LINES - line) : 0};
            if (!more) ahead.there = panel_at;  // there already
            if (near)
                tile_of<E, true>(matrix, panel, x, stride, row, rows, begin, end, mine, ahead, emit);
            else
                tile_of<E, false>(matrix, panel, x, stride, row, rows, begin, end, mine, ahead, emit);
        }
    }
}

// How rows are cut for the tasks of one linear layer: few enough that panels are read seldom, many
// enough that no thread waits long for the last one.
template <class E>
static inline int chunk_of(int rows, int panels, int threads) {
    int chunks = (rows + CHUNK<E> - 1) / CHUNK<E>;
    while (threads > 1 && chunks * panels < 8 * threads && rows / (chunks + 1) >= 2 * TILE) ++chunks;
    const int chunk = (rows + chunks - 1) / chunks;
    return (chunk + TILE - 1) / TILE * TILE;
}

}  // namespace nightherd
