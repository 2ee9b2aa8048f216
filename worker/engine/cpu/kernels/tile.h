// The sums of a few rows with one panel of a matrix: the inside of a linear layer.
//
// Whatever their number, the sum of one output of one row goes through the inputs in the same order.
#pragma once

#include <algorithm>

#include "vector.h"

namespace nightherd {

constexpr int PANEL = COLUMNS * LANES;  // outputs

// Inputs (of PER each) that make up FETCH lines of a panel: prefetching goes by these.
constexpr int FETCH = 4;
template <class E>
constexpr int UNIT = FETCH * 64 / (PANEL * E::PER * (int)sizeof(typename E::T));

// What a tile fetches from memory while it computes: of each UNIT inputs' FETCH cache lines `lines`, at
// the place that the thread comes to one depth later, be it in this panel or in its next one.
template <class E>
struct Ahead {
    const typename E::T *here, *there;  // from input `wrap` on it is there
    int wrap, lines;

    template <bool NEAR>
    inline void fetch(int input) const {
        constexpr int LINE = 64 / sizeof(typename E::T);
        const auto* to = (input < wrap ? here : there) + (ptrdiff_t)input * PANEL;
        for (int line = 0; line < lines; ++line) __builtin_prefetch(to + line * LINE, 0, NEAR ? 3 : 2);
    }
};

// Inputs [begin, end) of one panel for ROWS rows at `x`; the sums so far are in `partial`, and go there.
template <class E, int ROWS, bool NEAR>
static __attribute__((noinline)) void tile(const typename E::T* panel, const typename E::X* x, int stride, int begin,
                                           int end, float* partial, const Ahead<E>& ahead) {
    constexpr int STEP = UNIT<E> * E::PER;
    vec sums[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = begin ? load(partial + r * PANEL + c * LANES) : vec{};
    for (int unit = begin; unit < end; unit += STEP) {
        ahead.template fetch<NEAR>(unit);
        const int stop = std::min(unit + STEP, end);
        for (int i = unit; i < stop; i += E::PER)
            multiply<E>(sums, [&](int r) { return x + (size_t)r * stride + i; }, panel + (size_t)i * PANEL);
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) store(partial + r * PANEL + c * LANES, sums[r][c]);
}

// Tiles of up to ROWS rows. A thread has one of these for all tiles of a panel; with fewer
// than LEAST rows too much of the time goes into reading the panel.
template <class E>
struct Tiles {
    static constexpr int ROWS = TILE, LEAST = 2 * TILE;

    template <bool NEAR>
    void sum(int rows, const typename E::T* panel, const typename E::X* x, int stride, int begin, int end,
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
};

#if defined(NIGHTHERD_AMX)
// AMX has eight registers of 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 inputs with 32
// inputs of 16 outputs, pair by pair in their order, and adds to 16 x 16 sums. Four registers of sums are
// two halves of the rows by two vectors of outputs; or four vectors, where there are 16 rows or fewer.
template <>
struct Tiles<BFloat16> {
    static constexpr int HALF = 16, ROWS = 2 * HALF, LEAST = ROWS;
    using T = uint16_t;

    ~Tiles() { _tile_release(); }

    template <bool NEAR>
    void sum(int rows, const T* panel, const T* x, int stride, int begin, int end, float* partial,
             const Ahead<BFloat16>& ahead) {
        configure(rows);
        if (rows <= HALF)
            low<NEAR>(panel, x, stride, begin, end, partial, ahead);
        else
            high<NEAR>(panel, x, stride, begin, end, partial, ahead);
    }

  private:
    static constexpr int DEEP = BFloat16::DEEP;
    static constexpr int WIDE = PANEL * 4;    // bytes of a row of sums, and of two inputs of a panel
    static constexpr int VECTOR = LANES * 2;  // numbers of a vector of pairs
    int configured = 0;

    // Registers 0 to 3: sums, 4 and 5: rows, 6 and 7: a panel.
    void configure(int rows) {
        if (rows == configured) return;
        struct alignas(64) {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shapes = {};
        shapes.palette = 1;
        const int upper = std::min(rows, HALF), lower = rows > HALF ? rows - HALF : upper;
        const int of[8] = {upper, upper, lower, lower, upper, lower, HALF, HALF};
        for (int i = 0; i < 8; ++i) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = (uint8_t)of[i];
        }
        // GCC 11 and 12 take the first eight bytes for all that the instruction reads.
        __asm__ volatile("" : : "r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
        configured = rows;
    }

    template <bool NEAR>
    static void fetch(const Ahead<BFloat16>& ahead, int from, int count) {
        constexpr int STEP = UNIT<BFloat16> * BFloat16::PER;
        for (int i = from; i < from + count; i += STEP) ahead.fetch<NEAR>(i);
    }

    template <bool NEAR>
    static __attribute__((noinline)) void low(const T* panel, const T* x, int stride, int begin, int end,
                                              float* partial, const Ahead<BFloat16>& ahead) {
        start(begin, partial, partial + 2 * LANES);
        for (int i = begin; i < end; i += DEEP) {
            const T* w = panel + (size_t)i * PANEL;
            _tile_loadd(4, x + i, stride * 2);
            _tile_loadd(6, w, WIDE);
            fetch<NEAR>(ahead, i, DEEP / 2);
            _tile_loadd(7, w + VECTOR, WIDE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(6, w + 2 * VECTOR, WIDE);
            _tile_dpbf16ps(1, 4, 7);
            fetch<NEAR>(ahead, i + DEEP / 2, DEEP / 2);
            _tile_loadd(7, w + 3 * VECTOR, WIDE);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 4, 7);
        }
        finish(partial, partial + 2 * LANES);
    }

    template <bool NEAR>
    static __attribute__((noinline)) void high(const T* panel, const T* x, int stride, int begin, int end,
                                               float* partial, const Ahead<BFloat16>& ahead) {
        for (int part = 0; part < 2; ++part, panel += 2 * VECTOR, partial += 2 * LANES) {
            float* lower = partial + HALF * PANEL;
            start(begin, partial, lower);
            for (int i = begin; i < end; i += DEEP) {
                const T* w = panel + (size_t)i * PANEL;
                _tile_loadd(4, x + i, stride * 2);
                _tile_loadd(6, w, WIDE);
                _tile_loadd(7, w + VECTOR, WIDE);
                _tile_loadd(5, x + (size_t)HALF * stride + i, stride * 2);
                fetch<NEAR>(ahead, i + part * (DEEP / 2), DEEP / 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            finish(partial, lower);
        }
    }

    // The sums so far: two vectors of outputs at each of two places.
    static inline void start(int begin, const float* first, const float* second) {
        if (begin) {
            _tile_loadd(0, first, WIDE);
            _tile_loadd(1, first + LANES, WIDE);
            _tile_loadd(2, second, WIDE);
            _tile_loadd(3, second + LANES, WIDE);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
    }

    static inline void finish(float* first, float* second) {
        _tile_stored(0, first, WIDE);
        _tile_stored(1, first + LANES, WIDE);
        _tile_stored(2, second, WIDE);
        _tile_stored(3, second + LANES, WIDE);
    }
};
#endif

}  // namespace nightherd
