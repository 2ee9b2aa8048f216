// Attention over the paged KV cache, for any mix of rows: prefill, decode, recompute.
//
// A row's result is a function of its query and of the keys and values before it alone: one online
// softmax over blocks of BLOCK keys from position 0 on (Milakov and Gimelshein 2018), the same
// operations in the same order whatever other rows are in the step. Queries that read the same
// block (rows of one sequence, heads of one group, sequences with a common beginning) read it
// together.
//
// The cache of one layer is [blocks][kv heads] of keys as [head_dim / PER][BLOCK][PER], then values as
// [BLOCK / PER][head_dim][PER], columns in the order of `column_index`. A task goes through a
// block with all its heads before the next block: that is one stretch of memory. Waiting for memory
// is most of the time: while a block is worked on the next one is fetched, a few lines at a time, as
// a core can wait for few lines at once.
#pragma once

#include <algorithm>

#include "vector.h"

namespace nightherd {

constexpr int BLOCK = 32;
constexpr int QUERIES = 6;  // that are worked on together
constexpr int MAX_HEAD_DIM = 256;

template <class E>
struct Query {
    const typename E::X* vector;
    const int32_t* table;  // blocks of its sequence
    int keys;              // that it may look at
    float highest;
    vec total;  // of the shares so far, in LANES parts
    float* sum;  // [width_of<E>(head_dim)]
    typename E::X* out;  // [head_dim]
};

// Numbers of a row of values: whole groups, what is too many is zero.
template <class E>
static inline int width_of(int head_dim) {
    return (head_dim + E::GROUP - 1) / E::GROUP * E::GROUP;
}

// Numbers of one KV head in one block.
template <class E>
static inline size_t head_of(int head_dim) {
    return (size_t)BLOCK * (head_dim + width_of<E>(head_dim));
}

static inline void fetch(const void* from, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 0, FETCH_INTO);
}

// The products of N queries with C vectors of keys, from number `first` on, into `scores`.
template <class E, int N, int C>
static inline void score(const Query<E>* queries, const typename E::T* keys, int size, int first,
                         const typename E::T* next, float (&scores)[N][BLOCK]) {
    vec sums[N][C];
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[n][c] = vec{};
    for (int i = 0; i < size; i += E::PER) {
        if (next) fetch(next + i * BLOCK, BLOCK * E::PER * sizeof(typename E::T));
        multiply<E>(sums, [&](int n) { return queries[n].vector + i; }, keys + i * BLOCK, first);
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(&scores[n][(first + c) * LANES], sums[n][c]);
}

// Adds C vectors of values from column `first` on, each by its share.
template <class E, int N, int C>
static inline void gather(Query<E>* queries, const typename E::T* values, int width, int first, int used,
                          const typename E::X (&shares)[N][BLOCK], const float (&fade)[N],
                          const typename E::T* next) {
    constexpr int WIDE = C * LANES * E::PER * sizeof(typename E::T);
    vec sums[N][C];
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[n][c] = load(queries[n].sum + first + c * LANES) * fade[n];
    const auto* row = values + first * E::PER;
    if (first * E::PER * sizeof(typename E::T) % 64) next = nullptr;  // it has the line already
    for (int j = 0; j < used; j += E::PER, row += width * E::PER) {
        if (next) fetch(next + (row - values), WIDE);
        multiply<E>(sums, [&](int n) { return shares[n] + j; }, row);
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(queries[n].sum + first + c * LANES, sums[n][c]);
}

template <class E, int N>
static void attend(Query<E>* queries, const typename E::T* keys, const typename E::T* values, int start, int size,
                   const typename E::T* next) {
    constexpr int VECTORS = BLOCK / LANES, C = N <= 3 ? 4 : COLUMNS;
    constexpr int S = std::min(C, VECTORS);  // of keys
    alignas(64) float scores[N][BLOCK];
    for (int first = 0; first < VECTORS; first += S)
        score<E, N, S>(queries, keys, size, first, first ? nullptr : next, scores);
    alignas(64) typename E::X shares[N][BLOCK];
    float fade[N];
    int used = 0;
    for (int n = 0; n < N; ++n) {
        Query<E>& query = queries[n];
        const int valid = query.keys - start < BLOCK ? query.keys - start : BLOCK;
        if (valid > used) used = valid;
        vec most = splat(-INFINITY), total = {};
        for (int v = 0; v < BLOCK; v += LANES) {
            const vec here = lane_numbers() + v < valid ? load(&scores[n][v]) : splat(-INFINITY);
            store(&scores[n][v], here);
            most = larger(most, here);
        }
        const float here = largest(most);
        fade[n] = 1;
        if (here > query.highest) {
            fade[n] = exponential(query.highest - here);
            query.highest = here;
        }
        for (int v = 0; v < BLOCK; v += LANES) {
            const vec share = exponential(load(&scores[n][v]) - query.highest);
            total += share;
            E::write(shares[n] + v, share);
        }
        query.total = query.total * fade[n] + total;
    }
    const int width = width_of<E>(size);
    const auto* after = next ? next + BLOCK * size : nullptr;
    int d = 0;
    for (; d + C * LANES <= width; d += C * LANES)
        gather<E, N, C>(queries, values, width, d, used, shares, fade, after);
    if constexpr (C > 2)
        for (; d + 2 * LANES <= width; d += 2 * LANES)
            gather<E, N, 2>(queries, values, width, d, used, shares, fade, after);
    if constexpr (E::GROUP % (2 * LANES))
        if (d < width) gather<E, N, 1>(queries, values, width, d, used, shares, fade, after);
}

// The queries of one KV head on block number `start / BLOCK` of their sequences; `cache` is at this
// head of block 0, `stride` the numbers from one block to the next; `after` is what to fetch when a
// sequence has no further block, or null.
template <class E>
static inline void attend_head(Query<E>* queries, int count, const typename E::T* cache,
                               size_t stride, int start, int size, const typename E::T* after) {
    for (int n = 0; n < count;) {
        if (queries[n].keys <= start) {
            ++n;
            continue;
        }
        const int block = queries[n].table[start / BLOCK];
        int end = n + 1;
        while (end < count && end - n < QUERIES && queries[end].keys > start &&
               queries[end].table[start / BLOCK] == block)
            ++end;
        const auto* k = cache + block * stride;
        const auto* v = k + BLOCK * size;
        const typename E::T* next = after;
        if (start + BLOCK < queries[n].keys) next = cache + queries[n].table[start / BLOCK + 1] * stride;
        switch (end - n) {
            case 1: attend<E, 1>(queries + n, k, v, start, size, next); break;
            case 2: attend<E, 2>(queries + n, k, v, start, size, next); break;
            case 3: attend<E, 3>(queries + n, k, v, start, size, next); break;
            case 4: attend<E, 4>(queries + n, k, v, start, size, next); break;
            case 5: attend<E, 5>(queries + n, k, v, start, size, next); break;
            default: attend<E, 6>(queries + n, k, v, start, size, next);
        }
        n = end;
    }
}

// `heads` KV heads with `count` queries each, over all their keys. Ends with the weighted mean in
// each query's `out`. `after` is the block that is worked on next, or null.
template <class E>
static void attend_all(Query<E>* queries, int heads, int count, const typename E::T* cache,
                       size_t stride, int size, const typename E::T* after) {
    int most = 0;
    for (int n = 0; n < heads * count; ++n) {
        queries[n].highest = -INFINITY;
        queries[n].total = vec{};
        for (int d = 0; d < width_of<E>(size); d += LANES) store(queries[n].sum + d, vec{});
        if (queries[n].keys > most) most = queries[n].keys;
    }
    for (int start = 0; start < most; start += BLOCK)
        for (int h = 0; h < heads; ++h) {
            const size_t head = h * head_of<E>(size);
            attend_head(queries + h * count, count, cache + head, stride, start, size,
                        after ? after + head : nullptr);
        }
    for (int n = 0; n < heads * count; ++n) {
        const vec total = splat(sum(queries[n].total));
        for (int d = 0; d < size; d += LANES) E::write(queries[n].out + d, load(queries[n].sum + d) / total);
    }
}

}  // namespace nightherd
