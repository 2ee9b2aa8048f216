// Attention over the paged KV cache, for any mix of rows: prefill, decode, recompute.
//
// A row's result is a function of its query and of the keys and values before it alone: one online
// softmax over blocks of BLOCK keys from position 0 on (Milakov and Gimelshein 2018), the same
// operations in the same order whatever other rows are in the step. Queries that read the same
// block (rows of one sequence, heads of one group, sequences with a common beginning) read it
// together.
//
// The cache of one layer is [blocks][kv heads][2][BLOCK * head_dim]: keys as
// [head_dim / PER][BLOCK][PER], then values as [BLOCK / PER][head_dim][PER]. A task goes through a
// block with all its heads before the next block: that is one stretch of memory. Waiting for memory
// is most of the time: while a block is worked on the next one is fetched, a few lines at a time, as
// a core can wait for few lines at once.
#pragma once

#include "vector.h"

namespace nightherd {

constexpr int BLOCK = 32;
constexpr int QUERIES = 6;  // that are worked on together
constexpr int MAX_HEAD_DIM = 256;

template <class E>
struct Query {
    const typename E::T* vector;
    const int32_t* table;  // blocks of its sequence
    int keys;              // that it may look at
    float highest;
    vec total;  // of the shares so far, in sixteen parts
    float* sum;  // [head_dim]
    typename E::T* out;  // [head_dim]
};

static inline void fetch(const void* from, int lines) {
    for (int l = 0; l < lines; ++l) __builtin_prefetch((const char*)from + 64 * l);
}

template <class E, int N>
static inline void attend(Query<E>* queries, const typename E::T* keys, const typename E::T* values,
                          int start, int size, const typename E::T* next) {
    using T = typename E::T;
    vec scores[N][2];
    for (int n = 0; n < N; ++n) scores[n][0] = scores[n][1] = vec{};
    for (int i = 0; i < size; i += E::PER) {
        const auto low = E::read(keys + i * BLOCK);
        const auto high = E::read(keys + i * BLOCK + LANES * E::PER);
        if (next) fetch(next + i * BLOCK, 2);
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) {
            scores[n][0] = E::add(scores[n][0], queries[n].vector + i, low);
            scores[n][1] = E::add(scores[n][1], queries[n].vector + i, high);
        }
    }
    const int_vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) T shares[N][BLOCK];
    float fade[N];
    int used = 0;
    for (int n = 0; n < N; ++n) {
        Query<E>& query = queries[n];
        const int valid = query.keys - start < BLOCK ? query.keys - start : BLOCK;
        if (valid > used) used = valid;
        const vec none = splat(-INFINITY);
        const vec low = lane < valid ? scores[n][0] : none;
        const vec high = lane + LANES < valid ? scores[n][1] : none;
        const float here = largest(larger(low, high));
        fade[n] = 1;
        if (here > query.highest) {
            fade[n] = exponential(query.highest - here);
            query.highest = here;
        }
        const vec first = exponential(low - query.highest);
        const vec second = exponential(high - query.highest);
        query.total = query.total * fade[n] + (first + second);
        E::write(shares[n], first);
        E::write(shares[n] + LANES, second);
    }
    for (int d = 0; d < size; d += 4 * LANES) {
        const int width = (size - d) / LANES < 4 ? (size - d) / LANES : 4;
        vec sums[N][4];
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < 4; ++c)
                sums[n][c] = c < width ? load(queries[n].sum + d + c * LANES) * fade[n] : vec{};
        if (width == 4) {
            for (int j = 0; j < used; j += E::PER) {
                const T* row = values + (size_t)j * size + d * E::PER;
                if (next) fetch(next + BLOCK * size + (row - values), 4);
                typename E::Packed packed[4];
                for (int c = 0; c < 4; ++c) packed[c] = E::read(row + c * LANES * E::PER);
#pragma GCC unroll 6
                for (int n = 0; n < N; ++n)
                    for (int c = 0; c < 4; ++c)
                        sums[n][c] = E::add(sums[n][c], shares[n] + j, packed[c]);
            }
        } else {
            for (int j = 0; j < used; j += E::PER) {
                if (next) fetch(next + BLOCK * size + (size_t)j * size + d * E::PER, width);
                for (int c = 0; c < width; ++c) {
                    const auto packed =
                        E::read(values + (size_t)j * size + (d + c * LANES) * E::PER);
                    for (int n = 0; n < N; ++n)
                        sums[n][c] = E::add(sums[n][c], shares[n] + j, packed);
                }
            }
        }
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < width; ++c) store(queries[n].sum + d + c * LANES, sums[n][c]);
    }
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
        for (int d = 0; d < size; d += LANES) store(queries[n].sum + d, vec{});
        if (queries[n].keys > most) most = queries[n].keys;
    }
    for (int start = 0; start < most; start += BLOCK)
        for (int h = 0; h < heads; ++h) {
            const size_t head = (size_t)h * 2 * BLOCK * size;
            attend_head(queries + h * count, count, cache + head, stride, start, size,
                        after ? after + head : nullptr);
        }
    for (int n = 0; n < heads * count; ++n) {
        const vec total = splat(sum(queries[n].total));
        for (int d = 0; d < size; d += LANES) E::write(queries[n].out + d, load(queries[n].sum + d) / total);
    }
}

}  // namespace nightherd
