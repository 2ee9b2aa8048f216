// Sixteen floats at a time, on any CPU: GCC's vector types, with intrinsics where they gain much.
//
// Every operation on an element is the same whatever its neighbours are, and nothing is contracted
// or reordered by the compiler (-ffp-contract=off, no -ffast-math): results depend on the CPU's kind
// and on the inputs alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nightherd {

constexpr int LANES = 16;

typedef float vec __attribute__((vector_size(64)));
typedef float loose_vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t int_vec __attribute__((vector_size(64)));
typedef uint32_t word_vec __attribute__((vector_size(64)));
typedef uint32_t loose_word_vec __attribute__((vector_size(64), aligned(2)));
typedef uint64_t eight_words __attribute__((vector_size(64)));
typedef uint16_t half_vec __attribute__((vector_size(32)));
typedef uint16_t loose_half_vec __attribute__((vector_size(32), aligned(2)));

// Memory that begins with a cache line: sixteen floats that lie in two lines take twice the time.
template <class T>
struct LineAllocator {
    typedef T value_type;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t{64}); }
    void deallocate(T* from, size_t) { ::operator delete(from, std::align_val_t{64}); }
    template <class U>
    bool operator==(const LineAllocator<U>&) const { return true; }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

static inline vec load(const float* from) { return (vec) * (const loose_vec*)from; }
static inline void store(float* to, vec value) { *(loose_vec*)to = (loose_vec)value; }
static inline vec splat(float value) { return vec{} + value; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    vec out;
    for (int i = 0; i < LANES; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
#endif
}

static inline bool any(int_vec lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
    int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found |= lanes[i];
    return found;
#endif
}

// The lower halves of sixteen words.
static inline int_vec narrowed(eight_words first, eight_words second) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32((__m512i)first));
    return (int_vec)_mm512_inserti64x4(low, _mm512_cvtepi64_epi32((__m512i)second), 1);
#else
    int_vec out;
    for (int i = 0; i < 8; ++i) {
        out[i] = (int32_t)first[i];
        out[i + 8] = (int32_t)second[i];
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
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
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

// The two kinds of numbers that matrices and the KV cache are made of. A `Packed` is what sixteen
// columns hold of PER consecutive rows; `add` adds their products with PER numbers at `x`.
struct Float32 {
    using T = float;
    using Packed = vec;
    static constexpr int PER = 1;
    static inline Packed read(const T* from) { return load(from); }
    static inline vec add(vec to, const T* x, Packed w) { return fma(splat(*x), w, to); }
    static inline void write(T* to, vec value) { store(to, value); }
    static inline T one(float value) { return value; }
    static inline float number(T value) { return value; }
};

struct BFloat16 {
    using T = uint16_t;
    static constexpr int PER = 2;
    static inline float number(T value) {
        const uint32_t bits = (uint32_t)value << 16;
        float out;
        memcpy(&out, &bits, 4);
        return out;
    }
    static inline T one(float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (value != value) return (T)((bits >> 16) | 0x40);
        return (T)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    static inline void write(T* to, vec value) {
#if defined(__AVX512BF16__)
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
#if defined(__AVX512BF16__)
    using Packed = __m512i;
    static inline Packed read(const T* from) { return _mm512_loadu_si512(from); }
    static inline vec add(vec to, const T* x, Packed w) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return (vec)_mm512_dpbf16_ps((__m512)to, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
    }
#else
    using Packed = word_vec;
    static inline Packed read(const T* from) { return (Packed) * (const loose_word_vec*)from; }
    static inline vec add(vec to, const T* x, Packed w) {
        const vec even = (vec)(w << 16), odd = (vec)(w & 0xffff0000u);
        return fma(splat(number(x[1])), odd, fma(splat(number(x[0])), even, to));
    }
#endif
};

}  // namespace nightherd
