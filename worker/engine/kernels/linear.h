// Rows of numbers times a matrix: the linear layers.
//
// A matrix [n outputs, k inputs] is packed in panels of PANEL outputs (n filled up with zeros):
// panel[p][k / PER][PANEL][PER]. TILE rows at a time keep the sums of a panel in registers. The sum of
// one output goes through the inputs in order, so it does not depend on the other rows.
#pragma once

#include <algorithm>

#include "vector.h"

namespace nightherd {

constexpr int PANEL = COLUMNS * LANES;  // outputs

// Rows of one task, at most. Two tasks with one panel both read it: as many rows as a step has by
// default, where that many rows' inputs fit into L2.
template <class E>
constexpr int CHUNK = sizeof(typename E::X) == 2 ? 258 : 96;

// Inputs (of PER each) that make up FETCH lines of a panel: prefetching goes by these.
constexpr int FETCH = 4;
template <class E>
constexpr int UNIT = FETCH * 64 / (PANEL * E::PER * (int)sizeof(typename E::T));

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
    int inputs;  // k, filled up to a multiple of PER
};

// A panel's sums.
static inline void add(const float* a, const float* b, float* to) {
    for (int c = 0; c < PANEL; c += LANES) store(to + c, load(a + c) + load(b + c));
}

// [outputs, inputs] as panels: what is in no row or column is zero. `to` is all zeros before.
template <class E>
static void pack(const typename E::T* from, int outputs, int inputs, typename E::T* to) {
    const int deep = (inputs + E::PER - 1) / E::PER * E::PER;
    for (int first = 0; first < outputs; first += PANEL, to += (size_t)deep * PANEL)
        for (int c = 0; c < std::min(PANEL, outputs - first); ++c) {
            const auto* row = from + (size_t)(first + c) * inputs;
            auto* place = to + E::place(c) * E::PER;
            for (int i = 0; i < inputs; ++i) place[(size_t)(i / E::PER) * PANEL * E::PER + i % E::PER] = row[i];
        }
}

// What a tile fetches from memory while it computes: of each UNIT inputs' FETCH cache lines `lines`, at
// the place that the thread comes to one depth later, be it in this panel or in its next one.
template <class E>
struct Ahead {
    const typename E::T *here, *there;  // from input `wrap` on it is there
    int wrap, lines;
};

// Inputs [begin, end) of one panel for ROWS rows at `x`; the sums so far are in `partial`, and go there.
template <class E, int ROWS, bool NEAR>
static __attribute__((noinline)) void tile(const typename E::T* panel, const typename E::X* x, int stride, int begin, int end, float* partial,
                 const Ahead<E>& ahead) {
    constexpr int LINE = 64 / sizeof(typename E::T), STEP = UNIT<E> * E::PER;
    vec sums[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = begin ? load(partial + r * PANEL + c * LANES) : vec{};
    for (int unit = begin; unit < end; unit += STEP) {
        const auto* to = (unit < ahead.wrap ? ahead.here : ahead.there) + (ptrdiff_t)unit * PANEL;
        for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(to + line * LINE, 0, NEAR ? 3 : 2);
        const int stop = std::min(unit + STEP, end);
        for (int i = unit; i < stop; i += E::PER)
            multiply<E>(sums, [&](int r) { return x + (size_t)r * stride + i; }, panel + (size_t)i * PANEL);
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) store(partial + r * PANEL + c * LANES, sums[r][c]);
}

template <class E, bool NEAR>
static void tile_of(int rows, const typename E::T* panel, const typename E::X* x, int stride, int begin, int end,
                    float* partial, const Ahead<E>& ahead) {
    switch (rows) {
        case 1: return tile<E, 1, NEAR>(panel, x, stride, begin, end, partial, ahead);
        case 2: return tile<E, 2, NEAR>(panel, x, stride, begin, end, partial, ahead);
        case 3: return tile<E, 3, NEAR>(panel, x, stride, begin, end, partial, ahead);
        case 4: return tile<E, 4, NEAR>(panel, x, stride, begin, end, partial, ahead);
        case 5: return tile<E, 5, NEAR>(panel, x, stride, begin, end, partial, ahead);
        default: return tile<E, TILE, NEAR>(panel, x, stride, begin, end, partial, ahead);
    }
}

// One panel for rows [first, last), at most CHUNK of them; `emit(row, panel, sums)` takes each row's
// PANEL sums. `next` is the panel that this thread most likely comes to next.
template <class E, class Emit>
static void panel_rows(const Matrix<E>& matrix, int panel, const typename E::X* x, int stride, int first, int last,
                       int next, const Emit& emit) {
    constexpr int LINE = 64 / sizeof(typename E::T), WIDE = PANEL * sizeof(typename E::T);
    alignas(64) float partial[CHUNK<E> * PANEL];
    const int tiles = (last - first + TILE - 1) / TILE, lines = (FETCH + tiles - 1) / tiles;
    const int slice = slice_of(tiles), depth = std::min(slice / WIDE, matrix.inputs);
    const bool near = slice <= NEAR_SLICE, more = next < matrix.panels;
    const auto* panel_at = matrix.packed + (size_t)panel * matrix.inputs * PANEL;
    const auto* next_at = matrix.packed + (size_t)next * matrix.inputs * PANEL;
    for (int begin = 0; begin < matrix.inputs; begin += depth) {
        const int end = std::min(begin + depth, matrix.inputs);
        for (int row = first; row < last; row += TILE) {
            float* mine = partial + (row - first) * PANEL;
            const auto* from = x + (size_t)row * stride;
            const int rows = std::min(last - row, TILE), line = (row - first) / TILE * lines;
            Ahead<E> ahead = {panel_at + (ptrdiff_t)depth * PANEL + line * LINE,
                              next_at + ((ptrdiff_t)depth - matrix.inputs) * PANEL + line * LINE,
                              matrix.inputs - depth, line < FETCH ? std::min(lines, FETCH - line) : 0};
            if (!more) ahead.there = panel_at;  // there already
            if (near)
                tile_of<E, true>(rows, panel_at, from, stride, begin, end, mine, ahead);
            else
                tile_of<E, false>(rows, panel_at, from, stride, begin, end, mine, ahead);
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
    int chunks = (rows + CHUNK<E> - 1) / CHUNK<E>;
    while (threads > 1 && chunks * panels < 8 * threads && rows / (chunks + 1) >= 2 * TILE) ++chunks;
    const int chunk = (rows + chunks - 1) / chunks;
    return (chunk + TILE - 1) / TILE * TILE;
}

}  // namespace nightherd
