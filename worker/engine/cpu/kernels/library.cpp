// The plain C ABI that `worker/engine/cpu/library.py` calls.
#include "runner.h"

namespace nightherd {

static const Kind& kind(int bfloat16) { return bfloat16 ? BFLOAT16 : FLOAT32; }

}  // namespace nightherd

#pragma GCC visibility push(default)
extern "C" {

// For which CPUs it was compiled: `amx`, `avx512bf16`, `avx512`, `avx2` or `plain`.
const char* nightherd_level() { return nightherd::FLOAT32.level; }

// So that the Python side can check that both see the same structures.
int nightherd_sizes(int which) {
    const int sizes[] = {sizeof(nightherd::Layer), sizeof(nightherd::Model), sizeof(nightherd::Step),
                         sizeof(nightherd::Sampling), sizeof(nightherd::Chosen), nightherd::FLOAT32.block};
    return sizes[which];
}

// Outputs of a panel of packed weights.
int nightherd_panel() { return nightherd::FLOAT32.panel; }

// What the inputs of a panel are filled up to a multiple of.
int nightherd_deep(int bfloat16) { return nightherd::kind(bfloat16).deep; }

// A matrix [outputs, inputs], without gaps, as panels; `to` is all zeros before.
void nightherd_pack(const void* from, int outputs, int inputs, int bfloat16, void* to) {
    nightherd::kind(bfloat16).pack(from, outputs, inputs, to);
}

// Bytes of one KV head in one block of one layer's cache.
size_t nightherd_head_bytes(int head_dim, int bfloat16) { return nightherd::kind(bfloat16).head_bytes(head_dim); }

void* nightherd_create(const nightherd::Model* model) {
    try {
        return nightherd::kind(model->bfloat16).create(*model);
    } catch (...) {
        return nullptr;  // no memory, or no threads
    }
}

// 0 if all went well, 1 if memory ran out.
int nightherd_step(void* runner, const nightherd::Step* step) {
    try {
        ((nightherd::Runner*)runner)->step(*step);
        return 0;
    } catch (...) {
        return 1;
    }
}

// Chooses from one row of logits, as a step does with what it computed; 1 if memory ran out.
int nightherd_choose(float* logits, int size, const nightherd::Sampling* row, nightherd::Chosen* out) {
    try {
        nightherd::Scratch scratch;
        nightherd::choose(logits, size, *row, scratch, *out);
        return 0;
    } catch (...) {
        return 1;
    }
}

void nightherd_destroy(void* runner) { delete (nightherd::Runner*)runner; }
}
#pragma GCC visibility pop
