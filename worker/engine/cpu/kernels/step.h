// One forward pass and the choice of the next tokens, all layers in one call.
#pragma once

#include "attention.h"
#include "linear.h"
#include "lines.h"
#include "pool.h"
#include "runner.h"

namespace nightherd {

static int padded(int size, int to) { return (size + to - 1) / to * to; }

template <class E>
class TypedRunner : public Runner {
    using T = typename E::T;
    using X = typename E::X;

  public:
    explicit TypedRunner(const Model& model)
        : m(model), pool(model.threads), layers(model.layer, model.layer + model.layers),
          query_width(model.heads * model.head_dim), kv_width(model.kv_heads * model.head_dim),
          wide(padded(model.hidden, PANEL)), qkv_wide(padded(query_width + 2 * kv_width, PANEL)),
          q_wide(padded(query_width, PANEL)), inner(padded(model.intermediate, PANEL / 2)),
          vocab_wide(padded(model.vocab_rows, PANEL)),
          residual((size_t)m.max_rows * wide), ending((size_t)m.max_chosen * wide), fused((size_t)m.max_rows * qkv_wide),
          normed((size_t)m.max_rows * wide), queries((size_t)m.max_rows * q_wide),
          mixed((size_t)m.max_rows * q_wide), acted((size_t)m.max_rows * inner),
          logits((size_t)m.max_chosen * vocab_wide), scratch(m.max_chosen) {
        m.layer = layers.data();
    }

    void step(const Step& step) override {
        s = &step;
        pool.run([this] { run(); });
    }

  private:
    static constexpr int GROUP = 4;  // rows of one task where rows are worked on one by one

    // All threads go through this together: what is called between two `each` must be pure.
    void run() {
        rows_each(s->rows, [this](int row) { embed(row); });
        for (int i = 0; i < m.layers; ++i) {
            fill_cache(layers[i]);
            if (i + 1 < m.layers) {
                attention(layers[i], nullptr, s->rows);
                finish(layers[i], nullptr, s->rows, residual.data());
            }
        }
        // After the last layer's keys and values only the rows that choose a token matter.
        const Layer& last = layers[m.layers - 1];
        attention(last, s->chosen_rows, s->chosen_count);
        finish(last, s->chosen_rows, s->chosen_count, ending.data());
        rows_each(s->chosen_count, [this](int i) { norm(&ending[(size_t)i * wide], m.final_norm, i); });
        linear(matrix(m.output, nullptr, vocab_wide, m.hidden), normed.data(), wide, s->chosen_count,
               [this](int row, int panel, const float* sums) {
                   memcpy(&logits[(size_t)row * vocab_wide + panel * PANEL], sums, PANEL * sizeof *sums);
               });
        pool.each(s->chosen_count, [this](int i) {
            choose(&logits[(size_t)i * vocab_wide], m.vocab_size, s->sampling[s->sampling_rows[i]],
                   scratch[i], s->chosen[i]);
        });
    }

    // A layer up to its attention, for all rows: queries, and keys and values into the cache.
    void fill_cache(const Layer& layer) {
        rows_each(s->rows, [&](int row) { norm(&residual[(size_t)row * wide], layer.input_norm, row); });
        linear(matrix(layer.qkv, layer.qkv_bias, qkv_wide, m.hidden), normed.data(), wide, s->rows,
               [this](int row, int panel, const float* sums) {
                   memcpy(&fused[(size_t)row * qkv_wide + panel * PANEL], sums, PANEL * sizeof *sums);
               });
        rows_each(s->rows, [&](int row) {
            // What this thread most likely comes to next.
            if (row + GROUP * m.threads < s->rows) fetch_cache(layer, row + GROUP * m.threads);
            rotate(layer, row);
        });
    }

    // A layer from its attention on, for `count` rows: those at `picked`, or the first ones. Their
    // residual stream goes on in rows [0, count) of `stream`.
    void finish(const Layer& layer, const int32_t* picked, int count, float* stream) {
        linear(matrix(layer.o, layer.o_bias, wide, query_width), mixed.data(), q_wide, count,
               [&](int row, int panel, const float* sums) {
                   const float* from = &residual[(size_t)(picked ? picked[row] : row) * wide];
                   add(from + panel * PANEL, sums, stream + (size_t)row * wide + panel * PANEL);
               });
        rows_each(count, [&](int row) { norm(stream + (size_t)row * wide, layer.post_norm, row); });
        linear(matrix(layer.gate_up, layer.gate_up_bias, 2 * inner, m.hidden), normed.data(), wide, count,
               [this](int row, int panel, const float* sums) {
                   X* to = &acted[(size_t)row * inner + panel * (PANEL / 2)];
                   for (int i = 0; i < PANEL / 2; i += LANES) {
                       const vec gate = load(sums + i), up = load(sums + PANEL / 2 + i);
                       E::write(to + i, gate / (exponential(-gate) + 1.0f) * up);
                   }
               });
        linear(matrix(layer.down, layer.down_bias, wide, m.intermediate), acted.data(), inner, count,
               [&](int row, int panel, const float* sums) {
                   float* to = stream + (size_t)row * wide + panel * PANEL;
                   add(to, sums, to);
               });
    }

    template <class Work>
    void rows_each(int rows, const Work& work) {
        pool.each((rows + GROUP - 1) / GROUP, [&](int group) {
            const int end = std::min(rows, (group + 1) * GROUP);
            for (int row = group * GROUP; row < end; ++row) work(row);
        });
    }

    Matrix<E> matrix(const void* packed, const float* bias, int outputs, int inputs) const {
        return {(const T*)packed, bias, outputs / PANEL, padded(inputs, E::DEEP)};
    }

    template <class Emit>
    void linear(const Matrix<E>& matrix, const X* x, int stride, int rows, const Emit& emit) {
        if (rows == 0) return;
        const int chunk = chunk_of<E>(rows, matrix.panels, m.threads);
        const int chunks = (rows + chunk - 1) / chunk;
        pool.each(matrix.panels * chunks, [&](int task) {
            const int first = task % chunks * chunk, panel = task / chunks;
            const int next = panel + std::max(1, m.threads / chunks);
            panel_rows(matrix, panel, x, stride, first, std::min(rows, first + chunk), next, emit);
        });
    }

    void embed(int row) {
        const int id = s->token_ids[row];
        float* to = &residual[(size_t)row * wide];
        if (m.embedding) {
            const T* from = (const T*)m.embedding + (size_t)id * m.hidden;
            for (int i = 0; i < m.hidden; ++i) to[i] = E::number(from[i]);
            return;
        }
        const int inputs = padded(m.hidden, E::DEEP);
        const T* from = (const T*)m.output + (size_t)(id / PANEL) * inputs * PANEL + E::column_index(id % PANEL) * E::PER;
        for (int i = 0; i < m.hidden; i += E::PER, from += PANEL * E::PER)
            for (int j = 0; j < E::PER; ++j) to[i + j] = E::number(from[j]);
    }

    static float scale_of(const float* x, int size, float eps) {
        vec total = {};
        for (int i = 0; i < size; i += LANES) total = fma(load(x + i), load(x + i), total);
        return 1.0f / sqrtf(sum(total) / (float)size + eps);
    }

    // RMSNorm of a row of the residual stream, into row `to` of `normed`.
    void norm(const float* x, const float* weight, int to) {
        X* out = &normed[(size_t)to * wide];
        const float scale = scale_of(x, m.hidden, m.norm_eps);
        for (int i = 0; i < m.hidden; i += LANES)
            E::write(out + i, load(x + i) * scale * load(weight + i));
    }

    // Turns one head by its position's angles, after its norm if it has one.
    void turn(float* head, const float* weight, int position, float by) const {
        const int half = m.head_dim / 2;
        if (weight) {
            const float scale = scale_of(head, m.head_dim, m.norm_eps);
            for (int i = 0; i < m.head_dim; i += LANES)
                store(head + i, load(head + i) * scale * load(weight + i));
        }
        const float* cosine = m.cosines + (size_t)position * half;
        const float* sine = m.sines + (size_t)position * half;
        int i = 0;
        for (; i + LANES <= half; i += LANES) {
            const vec x = load(head + i) * by, y = load(head + i + half) * by;
            const vec c = load(cosine + i), s = load(sine + i);
            store(head + i, x * c - y * s);
            store(head + i + half, y * c + x * s);
        }
        for (; i < half; ++i) {
            const float x = head[i] * by, y = head[i + half] * by;
            head[i] = x * cosine[i] - y * sine[i];
            head[i + half] = y * cosine[i] + x * sine[i];
        }
    }

    // Where a row's keys and values will be written: many cache lines, far apart.
    void fetch_cache(const Layer& layer, int row) const {
        const int size = m.head_dim, offset = s->positions[row] % BLOCK, key = E::column_index(offset) * E::PER;
        const T* keys = cache_of(layer, row);
        for (int h = 0; h < m.kv_heads; ++h, keys += head_of<E>(size)) {
            for (int i = 0; i < size; i += E::PER) __builtin_prefetch(keys + i * BLOCK + key, 1);
            const T* values = keys + BLOCK * size + (size_t)(offset / E::PER) * width_of<E>(size) * E::PER;
            for (size_t i = 0; i < (size_t)size * E::PER; i += 64 / sizeof(T)) __builtin_prefetch(values + i, 1);
        }
    }

    // The block of the cache that a row's position is in.
    T* cache_of(const Layer& layer, int row) const {
        const int block = table_of(row)[s->positions[row] / BLOCK];
        return (T*)layer.cache + (size_t)block * m.kv_heads * head_of<E>(m.head_dim);
    }

    // A row's queries, turned and scaled; its keys and values, into the cache.
    void rotate(const Layer& layer, int row) {
        const int size = m.head_dim, position = s->positions[row];
        float* from = &fused[(size_t)row * qkv_wide];
        const float by = 1.0f / sqrtf((float)size);
        for (int h = 0; h < m.heads; ++h) {
            turn(from + h * size, layer.q_norm, position, by);
            X* to = &queries[(size_t)row * q_wide + h * size];
            for (int i = 0; i < size; i += LANES) E::write(to + i, load(from + h * size + i));
        }
        const int offset = position % BLOCK, column = E::column_index(offset) * E::PER;
        // A pair of values is read whole: what stands beside the last one must be a number.
        const bool clear = E::PER == 2 && offset % 2 == 0 && s->lasts[row];
        T* keys = cache_of(layer, row);
        for (int h = 0; h < m.kv_heads; ++h, keys += head_of<E>(size)) {
            float* key = from + query_width + h * size;
            const float* value = from + query_width + kv_width + h * size;
            turn(key, layer.k_norm, position, 1.0f);
            T* values = keys + BLOCK * size + (size_t)(offset / E::PER) * width_of<E>(size) * E::PER;
            alignas(64) T rounded[MAX_HEAD_DIM];
            for (int i = 0; i < size; i += LANES) E::round(rounded + i, load(key + i));
            for (int i = 0; i < size; i += E::PER)
                memcpy(keys + i * BLOCK + column, rounded + i, E::PER * sizeof(T));
            for (int i = 0; i < size; i += LANES) E::round(rounded + i, load(value + i));
            put_values(values, rounded, offset % E::PER, clear);
        }
    }

    // One of the PER values that stand side by side. The others may be another thread's at this very
    // moment, so they are not read and written back.
    void put_values(T* to, const T* from, int part, bool clear) const {
        for (int i = 0; i < m.head_dim; ++i) to[E::column_index(i) * E::PER + part] = from[i];
        if (clear)
            for (int i = 0; i < m.head_dim; ++i) to[E::column_index(i) * E::PER + 1] = 0;
    }

    // Of `count` rows, those at `picked` or the first ones, into rows [0, count) of `mixed`.
    void attention(const Layer& layer, const int32_t* picked, int count) {
        const int group = m.heads / m.kv_heads;
        const int together = std::max(1, QUERIES / group);  // rows of one task
        // Several of these in a task where there are tasks enough for all threads, so that the next
        // one is known; else the heads are shared out as well.
        int batch = together, parts = 1;
        while (batch < 4 * together && count / (2 * batch) >= 8 * m.threads) batch *= 2;
        const int tasks = (count + batch - 1) / batch;
        while (parts < m.kv_heads && tasks * parts < 4 * m.threads) ++parts;
        const int heads = (m.kv_heads + parts - 1) / parts;
        pool.each(tasks * parts, [&](int task) {
            const int head = task % parts * heads, end = std::min(m.kv_heads, head + heads);
            // From the end: the last rows are prefills, whose tasks are long.
            const int from = (tasks - 1 - task / parts) * batch, to = std::min(count, from + batch);
            for (int first = from; first < to; first += together) {
                const int last = std::min(to, first + together);
                attention_of(layer, picked, first, last, last < to, head, end);
            }
        });
    }

    const int32_t* table_of(int row) const { return s->tables + (size_t)s->table_rows[row] * s->table_width; }

    // Rows [first, last) with the KV heads [from, to); `more`: row `last` is this thread's next one.
    void attention_of(const Layer& layer, const int32_t* picked, int first, int last, bool more, int from,
                      int to) {
        static thread_local Lines<float> sums;
        static thread_local Lines<Query<E>> queries_of;
        const int size = m.head_dim, group = m.heads / m.kv_heads, count = (last - first) * group;
        if (from >= to) return;
        const int width = width_of<E>(size);
        sums.resize((size_t)m.heads * std::max(1, QUERIES / group) * width);
        queries_of.resize((size_t)m.heads * std::max(1, QUERIES / group));
        int n = 0;
        for (int head = from; head < to; ++head)
            for (int i = first; i < last; ++i)
                for (int h = head * group; h < (head + 1) * group; ++h, ++n) {
                    const int row = picked ? picked[i] : i;
                    Query<E>& query = queries_of[n];
                    query.vector = &queries[(size_t)row * q_wide + h * size];
                    query.table = table_of(row);
                    query.keys = s->positions[row] + 1;
                    query.sum = &sums[(size_t)n * width];
                    query.out = &mixed[(size_t)i * q_wide + h * size];
                }
        const size_t stride = m.kv_heads * head_of<E>(size);
        const T* cache = (const T*)layer.cache + from * head_of<E>(size);
        const T* after = more ? cache + table_of(picked ? picked[last] : last)[0] * stride : nullptr;
        attend_all<E>(queries_of.data(), to - from, count, cache, stride, size, after);
    }

    Model m;
    Pool pool;
    Lines<Layer> layers;
    const int query_width, kv_width, wide, qkv_wide, q_wide, inner, vocab_wide;
    Lines<float> residual, ending, fused, logits;
    Lines<X> normed, queries, mixed, acted;
    Lines<Scratch> scratch;
    const Step* s = nullptr;
};

// What is known of a kind of numbers, for `runner.h`.
template <class E>
constexpr Kind kind_of() {
    using T = typename E::T;
    return {LEVEL, PANEL, BLOCK, E::DEEP,
            [](const Model& model) -> Runner* { return new TypedRunner<E>(model); },
            [](const void* from, int outputs, int inputs, void* to) {
                pack<E>((const T*)from, outputs, inputs, (T*)to);
            },
            [](int head_dim) { return head_of<E>(head_dim) * sizeof(T); }};
}

}  // namespace nightherd
