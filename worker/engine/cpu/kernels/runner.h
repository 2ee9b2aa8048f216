// What the library offers, as plain structures: those of `worker/engine/cpu/library.py`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sample.h"

namespace nightherd {

struct Layer {
    const float *input_norm, *qkv_bias, *q_norm, *k_norm, *o_bias, *post_norm, *gate_up_bias, *down_bias;
    const void *qkv, *o, *gate_up, *down;  // packed
    void* cache;                           // of keys and values
};

struct Model {
    const Layer* layer;
    const float *final_norm, *cosines, *sines;  // angles: [context][head_dim / 2]
    const void* embedding;  // [vocab_rows][hidden], or null: `output` holds it, packed
    const void* output;     // packed
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, vocab_rows;
    int32_t bfloat16, max_rows, max_chosen, threads;
    float norm_eps;
};

struct Step {
    const int32_t *token_ids, *positions, *table_rows;  // [rows]; rows of `tables`
    const int32_t *lasts;   // [rows]: 1 where the sequence has no later position in this step
    const int32_t* tables;  // [spans][table_width], block numbers
    const int32_t *chosen_rows, *sampling_rows;  // [chosen]
    const Sampling* sampling;
    Chosen* chosen;
    int32_t rows, chosen_count, table_width;
};

class Runner {
  public:
    virtual ~Runner() = default;
    virtual void step(const Step& step) = 0;
};

// A kind of numbers: what depends on it is compiled in a file of its own.
struct Kind {
    const char* level;  // of CPUs
    int panel;          // outputs of a panel of packed weights
    int block;          // positions of a block of the cache
    int deep;           // inputs of a panel are filled up to a multiple of so many
    Runner* (*create)(const Model&);
    // A matrix [outputs, inputs] of packed numbers, into `to`, all zeros before.
    void (*pack)(const void* from, int outputs, int inputs, void* to);
    // Bytes of one KV head of one block of the cache.
    size_t (*head_bytes)(int head_dim);
};

extern const Kind FLOAT32, BFLOAT16;

}  // namespace nightherd
