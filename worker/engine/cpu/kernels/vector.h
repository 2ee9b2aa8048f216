// As many floats at a time as the target's registers hold: GCC's vector types, with intrinsics where
// they gain much. Whatever depends on the CPU's level is in this file.
//
// Every operation on an element is the same whatever its neighbours are, and nothing is contracted
// or reordered by the compiler (-ffp-contract=off, no -ffast-math): results depend on the CPU's level
// and on the inputs alone.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nightherd {

// LANES floats are a vector, COLUMNS vectors and TILE rows are worked on together: their sums, the
// vectors that they are multiplied with and one number of a row must fit into the registers. COLUMNS
// is even: gate and up lie side by side.
#if defined(__AVX512F__)  // 32 registers
#define NIGHTHERD_AVX512
constexpr int LANES = 16, COLUMNS = 4;
#elif defined(__AVX2__) && defined(__FMA__)  // 16 registers
#define NIGHTHERD_AVX2
constexpr int LANES = 8, COLUMNS = 2;
#else  // what every CPU has: SSE2 on x86-64
constexpr int LANES = 4, COLUMNS = 2;
#endif
constexpr int TILE = 6;

#if defined(NIGHTHERD_AVX512) && defined(__AVX512BF16__)
#define NIGHTHERD_AVX512BF16
#endif

#if defined(NIGHTHERD_AVX512BF16) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // the latter by clang up to 14
#define NIGHTHERD_AMX
constexpr const char* LEVEL = "amx";
#elif defined(NIGHTHERD_AVX512BF16)
constexpr const char* LEVEL = "avx512bf16";
#elif defined(NIGHTHERD_AVX512)
constexpr const char* LEVEL = "avx512";
#elif defined(NIGHTHERD_AVX2)
constexpr const char* LEVEL = "avx2";
#else
constexpr const char* LEVEL = "plain";
#endif

// Where `fetch` brings what is wanted soon, as `__builtin_prefetch` counts: into L1 on AMD's CPUs with
// AVX-512, which use up a line at a time. Intel's wait longer for memory than L1 has places for what is
// awaited, and for narrower vectors that costs more than reading from L2.
#if defined(NIGHTHERD_AVX512BF16) && !defined(NIGHTHERD_AMX)
constexpr int FETCH_INTO = 3;
#else
constexpr int FETCH_INTO = 2;
#endif

constexpr int BYTES = 4 * LANES;
typedef float vec __attribute__((vector_size(BYTES)));
typedef float loose_vec __attribute__((vector_size(BYTES), aligned(4)));
typedef int32_t int_vec __attribute__((vector_size(BYTES)));
typedef uint32_t word_vec __attribute__((vector_size(BYTES)));
typedef uint64_t long_vec __attribute__((vector_size(BYTES)));
typedef uint16_t half_vec __attribute__((vector_size(BYTES / 2)));
typedef uint16_t loose_half_vec __attribute__((vector_size(BYTES / 2), aligned(2)));

static inline vec load(const float* from) { return (vec) * (const loose_vec*)from; }
static inline void store(float* to, vec value) { *(loose_vec*)to = (loose_vec)value; }

static inline vec splat(float value) {  // not vec{} + value: that is an addition
#if defined(NIGHTHERD_AVX512)
    return (vec)_mm512_set1_ps(value);
#elif defined(NIGHTHERD_AVX2)
    return (vec)_mm256_set1_ps(value);
#else
    return vec{value, value, value, value};
#endif
}

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline vec fma(vec a, vec b, vec c) {
#if defined(NIGHTHERD_AVX512)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(NIGHTHERD_AVX2)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;  // rounded twice
#endif
}

static inline bool any(int_vec lanes) {
#if defined(NIGHTHERD_AVX512)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#elif defined(NIGHTHERD_AVX2)
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found |= lanes[i];
    return found;
#endif
}

// 0, 1, 2, ...
static inline int_vec lane_numbers() {
    int_vec out = {};
    for (int i = 0; i < LANES; ++i) out[i] = i;
    return out;
}

// The lower halves of LANES long words.
static inline int_vec narrowed(long_vec first, long_vec second) {
#if defined(NIGHTHERD_AVX512)
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32((__m512i)first));
    return (int_vec)_mm512_inserti64x4(low, _mm512_cvtepi64_epi32((__m512i)second), 1);
#elif defined(NIGHTHERD_AVX2)
    const __m256 mixed = _mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
    return (int_vec)_mm256_permute4x64_epi64((__m256i)mixed, 0xd8);
#else
    int_vec out = {};
    for (int i = 0; i < LANES / 2; ++i) {
        out[i] = (int32_t)first[i];
        out[i + LANES / 2] = (int32_t)second[i];
    }
    return out;
#endif
}

// In a fixed order: pairs, pairs of pairs, ...
static inline float sum(vec value) {
    float part[LANES];
    store(part, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

static inline float largest(vec value) {
#if defined(NIGHTHERD_AVX512)
    return _mm512_reduce_max_ps((__m512)value);
#elif defined(NIGHTHERD_AVX2)
    const __m256 all = (__m256)value;
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#endif
    float part[LANES];
    store(part, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

// e^x to about one unit in the last place; 0 below -87 (minus infinity included).
static inline vec exponential(vec x) {
    const vec low = splat(-87.0f);
    const int_vec tiny = x < low;
    x = larger(x, low);
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vec n = fma(x, splat(1.44269504088896341f), magic);
    const int_vec exponent = ((int_vec)n - (int_vec)magic) << 23;
    n = n - magic;
    vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    p = (vec)((int_vec)p + exponent);
    return tiny ? vec{} : p;
}

static inline float exponential(float x) { return exponential(splat(x))[0]; }

// The two kinds of numbers that matrices and the KV cache are made of: `T` as they lie in memory, `X`
// what they are multiplied with. Memory holds columns in groups of GROUP: of each column PER
// consecutive numbers, column c at `column_index(c)`. `read` takes vector number `vector` of the columns at
// `from`; `add` adds the products of its PER numbers with PER ones at `x`, which `spread` has put into
// each lane. The inputs of a matrix are filled up to a multiple of DEEP.
struct Float32 {
    using T = float;
    using X = float;
    static constexpr int PER = 1, GROUP = LANES, DEEP = PER;
    static int column_index(int column) { return column; }
    static inline vec read(const T* from, int vector) { return load(from + vector * LANES); }
    static inline vec spread(const X* x) { return splat(*x); }
    static inline vec add(vec to, vec x, vec w) { return fma(x, w, to); }
    static inline void write(X* to, vec value) { store(to, value); }
    static inline void round(T* to, vec value) { store(to, value); }
    static inline float number(T value) { return value; }
};

struct BFloat16 {
    using T = uint16_t;
    static inline float number(T value) {
        const uint32_t bits = (uint32_t)value << 16;
        float out;
        memcpy(&out, &bits, 4);
        return out;
    }
    static inline void round(T* to, vec value) {
#if defined(NIGHTHERD_AVX512BF16)
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
        memcpy(to, &rounded, sizeof rounded);
#else
        const word_vec bits = (word_vec)value;
        const word_vec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const word_vec nan = (bits >> 16) | 0x40;
        const word_vec out = value != value ? nan : rounded;
        *(loose_half_vec*)to = (loose_half_vec)__builtin_convertvector(out, half_vec);
#endif
    }

#if defined(NIGHTHERD_AVX512BF16)
    // Pairs are multiplied and added by one instruction.
    using X = uint16_t;
#if defined(NIGHTHERD_AMX)
    static constexpr int PER = 2, GROUP = LANES, DEEP = 32;
#else
    static constexpr int PER = 2, GROUP = LANES, DEEP = PER;
#endif
    static int column_index(int column) { return column; }
    static inline __m512i read(const T* from, int vector) {
        return _mm512_loadu_si512(from + vector * LANES * PER);
    }
    static inline __m512i spread(const X* x) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return _mm512_set1_epi32(pair);
    }
    static inline vec add(vec to, __m512i x, __m512i w) {
        return (vec)_mm512_dpbf16_ps((__m512)to, (__m512bh)w, (__m512bh)x);
    }
    static inline void write(X* to, vec value) { round(to, value); }
#else
    // Widened in registers: what they are multiplied with is in float32, and so is all arithmetic.
    //
    // Two vectors are unpacked from one register, each by one instruction that does not compete with
    // FMAs; within each 128 bits it takes the lower, then the upper half, and `column_index` allows for that.
    using X = float;
    static constexpr int PER = 1, GROUP = 2 * LANES, DEEP = PER;
    static int column_index(int column) {
        const int lane = column % LANES, group = column / GROUP;
        return group * GROUP + lane / 4 * 8 + column / LANES % 2 * 4 + lane % 4;
    }
    static inline vec read(const T* from, int vector) {
#if defined(NIGHTHERD_AVX512)
        const __m512i both = _mm512_loadu_si512(from + vector / 2 * GROUP), zero = {};
        return (vec)(vector % 2 ? _mm512_unpackhi_epi16(zero, both) : _mm512_unpacklo_epi16(zero, both));
#elif defined(NIGHTHERD_AVX2)
        const __m256i both = _mm256_loadu_si256((const __m256i*)(from + vector / 2 * GROUP)), zero = {};
        return (vec)(vector % 2 ? _mm256_unpackhi_epi16(zero, both) : _mm256_unpacklo_epi16(zero, both));
#else
        const half_vec halves = (half_vec) * (const loose_half_vec*)(from + vector * LANES);
        return (vec)(__builtin_convertvector(halves, word_vec) << 16);
#endif
    }
    static inline vec spread(const X* x) { return splat(*x); }
    static inline vec add(vec to, vec x, vec w) { return fma(x, w, to); }
    static inline void write(X* to, vec value) { store(to, value); }
#endif
};

// sums[n][c] += the products of PER numbers of each of N rows with vectors `first` + c of the columns
// at `w`. The sum of one column goes through the numbers in order, whatever N and C are.
template <class E, int N, int C, class Row>
static inline __attribute__((always_inline)) void multiply(vec (&sums)[N][C], const Row& row,
                                                           const typename E::T* w, int first = 0) {
    if constexpr (N < C) {  // few rows: their numbers stay in registers
        decltype(E::spread(row(0))) x[N];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) x[n] = E::spread(row(n));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const auto column = E::read(w, first + c);
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) sums[n][c] = E::add(sums[n][c], x[n], column);
        }
    } else {
        decltype(E::read(w, 0)) columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = E::read(w, first + c);
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) {
            const auto x = E::spread(row(n));
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[n][c] = E::add(sums[n][c], x, columns[c]);
        }
    }
}

}  // namespace nightherd
