// The vocabulary is never sorted: a histogram finds the bin in which a threshold lies, and that bin
// alone is sorted.
#include "sample.h"

#include <algorithm>
#include <cfloat>

#include "vector.h"

namespace nightherd {

static inline uint64_t mixed(uint64_t value) {  // splitmix64's finaliser
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

static inline uint64_t noise_key(uint64_t seed, int position) {
    return mixed(mixed(seed + GOLDEN) + (uint64_t)(position + 1) * GOLDEN);
}

// 40 bits: the uniform number is (bits + 1) * 2^-40.
static inline uint64_t noise_bits(uint64_t key, int id) {
    return mixed(key + (uint64_t)(id + 1) * GOLDEN) >> 24;
}

static inline float gumbel(uint64_t bits) {
    const float uniform = std::min((float)(bits + 1) * 0x1p-40f, 1.0f - 0x1p-24f);
    return -logf(-log1pf(-uniform));
}

static inline float maximum(const float* values, int size) {
    vec most = splat(-INFINITY);
    int i = 0;
    for (; i + LANES <= size; i += LANES) most = larger(load(values + i), most);
    float out = largest(most);
    for (; i < size; ++i) out = values[i] > out ? values[i] : out;
    return out;
}

static inline bool finite(const float* values, int size) {
    int_vec bad = {};
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vec v = load(values + i);
        bad |= ~(v < splat(INFINITY));
    }
    if (any(bad)) return false;
    for (; i < size; ++i)
        if (!(values[i] < INFINITY)) return false;
    return true;
}

static void report_logprobs(const float* raw, int size, int wanted, Chosen& out) {
    const float most = maximum(raw, size);
    vec total = {};
    int i = 0;
    for (; i + LANES <= size; i += LANES) total += exponential(load(raw + i) - most);
    double all = sum(total);
    for (; i < size; ++i) all += exponential(raw[i] - most);
    const float base = most + (float)log(all);
    out.top[0] = out.token;
    out.logprob[0] = raw[out.token] - base;
    int have = 0;
    for (int id = 0; id < size && wanted > 0; ++id) {
        if (have == wanted && raw[id] <= out.logprob[have]) continue;
        int rank = have < wanted ? ++have : have;
        for (; rank > 1 && raw[id] > out.logprob[rank - 1]; --rank) {
            out.logprob[rank] = out.logprob[rank - 1];
            out.top[rank] = out.top[rank - 1];
        }
        out.logprob[rank] = raw[id];
        out.top[rank] = id;
    }
    for (int rank = 1; rank <= have; ++rank) out.logprob[rank] -= base;
    for (int rank = have + 1; rank <= MAX_LOGPROBS; ++rank) out.top[rank] = -1;
}

static void edit(float* logits, int size, const Sampling& row, Scratch& scratch) {
    if (row.mask)
        for (int id = 0; id < size; ++id)
            if (!(row.mask[id / 32] >> (id % 32) & 1)) logits[id] = -INFINITY;
    if (row.allowed_size) {
        scratch.values.resize(row.allowed_size);
        for (int i = 0; i < row.allowed_size; ++i) scratch.values[i] = logits[row.allowed[i]];
        std::fill(logits, logits + size, -INFINITY);
        for (int i = 0; i < row.allowed_size; ++i) logits[row.allowed[i]] = scratch.values[i];
    }
    for (int i = 0; i < row.bias_size; ++i) logits[row.bias_ids[i]] += row.bias[i];
    for (int i = 0; i < row.banned_size; ++i) logits[row.banned[i]] = -INFINITY;
    for (int i = 0; i < row.seen_size; ++i) {
        float& logit = logits[row.seen[i]];
        logit = logit < 0 ? logit * row.repetition : logit / row.repetition;
    }
    for (int i = 0; i < row.counted_size; ++i)
        logits[row.counted[i]] -= row.frequency * (float)row.counts[i] + row.presence;
}

constexpr int BINS = 2048, BINS_PER_UNIT = 64;  // of how far a logit is below the greatest

static inline int bin_of(float below) {
    const float bin = below * BINS_PER_UNIT;
    return bin < BINS - 1 ? (int)bin : BINS - 1;
}

// The values of one bin that are at least `least`, greatest first.
static void sorted_bin(const float* logits, int size, float most, float least, int bin,
                       Lines<float>& out) {
    out.clear();
    // Many at a time that may be in the bin; which are, `bin_of` says.
    const float slack = 2.0f / BINS_PER_UNIT;
    const vec high = splat(most - (float)bin / BINS_PER_UNIT + slack);
    const vec low = splat(bin < BINS - 1 ? most - (float)(bin + 1) / BINS_PER_UNIT - slack : -INFINITY);
    for (int first = 0; first < size; first += LANES) {
        if (first + LANES <= size) {
            const vec v = load(logits + first);
            if (!any((v >= low) & (v <= high))) continue;
        }
        for (int id = first; id < std::min(size, first + LANES); ++id)
            if (logits[id] >= least && bin_of(most - logits[id]) == bin) out.push_back(logits[id]);
    }
    std::sort(out.begin(), out.end(), [](float a, float b) { return a > b; });
}

// The least logit that top-k, top-p and min-p leave.
static float threshold(const float* logits, int size, float most, const Sampling& row,
                       Scratch& scratch) {
    float least = -INFINITY;
    const bool by_number = row.top_k > 0 && row.top_k < size;
    if (by_number) {
        scratch.number.assign(BINS, 0);
        for (int id = 0; id < size; ++id)
            if (logits[id] > -INFINITY) ++scratch.number[bin_of(most - logits[id])];
        int bin = 0, before = 0;
        while (bin < BINS - 1 && before + scratch.number[bin] < row.top_k)
            before += scratch.number[bin++];
        sorted_bin(logits, size, most, -FLT_MAX, bin, scratch.values);
        if (!scratch.values.empty())
            least = scratch.values[std::min<size_t>(row.top_k - before, scratch.values.size()) - 1];
    }
    if (row.top_p < 1) {
        scratch.mass.assign(BINS, 0);
        double all = 0;
        for (int id = 0; id < size; id += LANES) {
            const int width = std::min(LANES, size - id);
            float part[LANES];
            for (int i = 0; i < LANES; ++i) part[i] = i < width ? logits[id + i] - most : -INFINITY;
            store(part, exponential(load(part)));
            for (int i = 0; i < width; ++i) {
                const float logit = logits[id + i];
                if (!(logit >= least) || part[i] == 0) continue;
                scratch.mass[bin_of(most - logit)] += part[i];
            }
        }
        for (double mass : scratch.mass) all += mass;
        const double wanted = (double)row.top_p * all;
        int bin = 0;
        double before = 0;
        while (bin < BINS - 1 && before + scratch.mass[bin] < wanted) before += scratch.mass[bin++];
        sorted_bin(logits, size, most, std::max(least, -FLT_MAX), bin, scratch.values);
        for (size_t i = 0; i < scratch.values.size() && (i == 0 || before < wanted); ++i) {
            // The last bin has no mass where even its greatest is too unlikely.
            before += exponential(scratch.values[i] - most);
            least = scratch.values[i];
        }
    }
    if (row.min_p > 0) least = std::max(least, most + logf(row.min_p));
    return least;
}

// Of LANES / 2 ids.
static inline long_vec many_noise_bits(uint64_t key, int first) {
    long_vec value = {};
    for (int i = 0; i < LANES / 2; ++i) value[i] = i + 1;
    value = (value + (uint64_t)first) * GOLDEN + key;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return (value ^ (value >> 31)) >> 24;
}

// argmax(logit + noise) over the ids from `least` on; of equals the first.
//
// Noise that cannot win is not computed. An id exceeds `reach` where its uniform number is below
// 1 - exp(-exp(logit - reach)), which is at most exp(logit - reach). Noise is never below -2.82, so
// that the greatest logit alone gets that far.
static int draw(const float* logits, int size, float most, float least, const Sampling& row) {
    const uint64_t key = noise_key(row.seed, row.position);
    int token = -1;
    float best = -INFINITY, reach = most - 2.9f;
    const auto look_at = [&](int id) {
        if (!(logits[id] >= least) || logits[id] == -INFINITY) return;
        const float value = logits[id] + gumbel(noise_bits(key, id));
        if (value > best) {
            best = value;
            token = id;
            reach = std::max(reach, best);
        }
    };
    int first = 0;
    for (; first + LANES <= size; first += LANES) {
        const vec v = load(logits + first);
        if (!any(v >= splat(least))) continue;
        const int_vec bits = narrowed(many_noise_bits(key, first) >> 9,
                                      many_noise_bits(key, first + LANES / 2) >> 9);
        const vec uniform = __builtin_convertvector(bits, vec) * 0x1p-31f;  // or a little less
        const int_vec near = uniform < exponential(v - reach) * 1.001f;
        if (!any(near)) continue;
        for (int i = 0; i < LANES; ++i)
            if (near[i]) look_at(first + i);
    }
    for (; first < size; ++first) look_at(first);
    return token;
}

// Whether top-p leaves the token: the likelier ones must not make up its share already.
static bool in_nucleus(const float* logits, int size, float most, float top_p, int token) {
    const float own = logits[token];
    double all = 0, likelier = 0;
    for (int first = 0; first < size;) {
        const int end = std::min(size, first + 64 * LANES);  // few enough for a float's sum
        vec part = {}, above = {};
        for (; first + LANES <= end; first += LANES) {
            const vec v = load(logits + first), mass = exponential(v - most);
            part += mass;
            above += v > splat(own) ? mass : vec{};
        }
        all += sum(part);
        likelier += sum(above);
        if (first + LANES > size) {
            for (; first < size; ++first) {
                const float mass = exponential(logits[first] - most);
                all += mass;
                if (logits[first] > own) likelier += mass;
            }
        }
    }
    return likelier < top_p * all;
}

static int sampled(const float* logits, int size, float most, const Sampling& row, Scratch& scratch) {
    if (row.top_p < 1 && row.top_k <= 0) {
        // The winner among all is the winner among those that top-p leaves, if it is one of them:
        // mostly it is, and to ask that of one token is cheaper than to find where the others end.
        const float least = row.min_p > 0 ? most + logf(row.min_p) : -INFINITY;
        const int token = draw(logits, size, most, least, row);
        if (in_nucleus(logits, size, most, row.top_p, token)) return token;
    }
    return draw(logits, size, most, threshold(logits, size, most, row, scratch), row);
}

void choose(float* logits, int size, const Sampling& row, Scratch& scratch, Chosen& out) {
    out.token = 0;
    out.best = NAN;
    if (!finite(logits, size)) return;
    if (row.logprobs >= 0) scratch.raw.assign(logits, logits + size);
    edit(logits, size, row, scratch);
    float most = maximum(logits, size);
    out.best = most;
    if (!(most > -INFINITY) || !(most < INFINITY)) return;
    if (row.temperature < 1e-5f) {
        out.token = (int32_t)(std::find(logits, logits + size, most) - logits);
    } else {
        if (row.temperature != 1) {
            int i = 0;
            for (; i + LANES <= size; i += LANES) store(logits + i, load(logits + i) / row.temperature);
            for (; i < size; ++i) logits[i] /= row.temperature;
            most /= row.temperature;
        }
        out.token = sampled(logits, size, most, row, scratch);
    }
    if (row.logprobs >= 0) report_logprobs(scratch.raw.data(), size, row.logprobs, out);
}

}  // namespace nightherd
