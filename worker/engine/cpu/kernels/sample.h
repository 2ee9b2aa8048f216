// From logits to a token, one row at a time, by the row's own parameters.
//
// The order is that of `worker/engine/transformers/batch_logits.py`: mask, banned ids, bias, penalties; then,
// unless greedy, temperature, top-k, top-p, min-p, Gumbel noise of (seed, position, id), argmax.
#pragma once

#include <cstdint>

#include "lines.h"

namespace nightherd {

constexpr int MAX_LOGPROBS = 20;

struct Sampling {  // `worker/engine/cpu/sampling.py` has the same fields in the same order
    uint64_t seed;
    const int32_t* seen;  // distinct ids of prompt and output, for the repetition penalty
    const int32_t* counted;  // distinct ids of the output, and how often it has each
    const int32_t* counts;
    const int32_t* bias_ids;
    const float* bias;
    const int32_t* banned;
    const int32_t* allowed;
    const uint32_t* mask;  // of a grammar; null: any
    int32_t seen_size, counted_size, bias_size, banned_size, allowed_size;
    int32_t position;  // how many tokens the output has
    int32_t top_k;     // 0: off
    int32_t logprobs;  // -1: none
    float temperature, top_p, min_p, repetition, presence, frequency;
};

struct Chosen {
    int32_t token;
    float best;
    int32_t top[1 + MAX_LOGPROBS];  // the token, then the likeliest
    float logprob[1 + MAX_LOGPROBS];
};

struct Scratch {
    Lines<float> raw;
    Lines<int32_t> ids;
    Lines<float> values;
    Lines<double> mass;
    Lines<int32_t> number;
};

// `logits`, of `size` ids, is overwritten.
void choose(float* logits, int size, const Sampling& row, Scratch& scratch, Chosen& out);

}  // namespace nightherd
