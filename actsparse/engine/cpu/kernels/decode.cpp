// The operators of a decode step on the CPU, and the loop that runs a list of them.
//
// A step is bound by the bytes of its weights, so every product streams whole rows, several in flight, and asks for the
// rows that follow while it works on these: a row is too short for the processor to see where the next one starts.
// Each thread owns a slice of the output, or of the inputs in pieces that do not depend on their number, hence no
// atomics and the same result with any number of threads. The structures mirror the dataclasses of ops.py field by
// field: pointers, int64 and double, eight bytes each.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int DEEP = 8;          // rows in flight
constexpr i64 AHEAD = 4096;      // bytes of each that are asked for before they are needed
constexpr i64 WIDE = 4096;       // sums that stay in the first cache while rows are added to them
constexpr i64 CHUNK = 256;       // neurons that are decided before the second matrix is read
constexpr i64 GRAIN = 1 << 15;   // bytes of weights below which a second thread does not pay
constexpr i64 MAX_HEAD = 512;
constexpr int MAX_BATCH = 8;
constexpr i64 MAX_CHUNKS = 32;   // pieces of a product that skips inputs

struct Norm {
  const float *x, *weight;
  float* out;
  i64 batch, width;
  double epsilon, scale;
  i64 add;
};

struct Rows {
  const void* weight;
  const float *x, *bias;
  const int32_t* index;
  const int32_t* count;
  float* out;
  i64 bfloat, batch, rows, width, stride, out_stride;
  double scale;
  i64 add;
  double softcap;
};

struct Gated {
  const void *gate, *up;
  const float *x, *gate_bias, *up_bias, *fill;
  const int32_t* index;
  const int32_t* count;
  const uint8_t* mask;
  float* out;
  i64 bfloat, batch, rows, width, stride, activation;
};

struct NeuronSparse {
  const void *first, *second;
  const float *x, *first_bias, *second_bias, *threshold, *fill;
  float* out;
  i64* read;
  i64 bfloat, batch, rows, width, stride, step, activation, gate_first;
};

struct Columns {
  const void* weight;
  const float *x, *score, *threshold, *base, *fill;
  const int32_t* index;
  const int32_t* count;
  float *out, *dropped, *scratch;
  int32_t* list;
  i64* read;
  i64 bfloat, batch, inputs, outputs, stride, chunks, keep, top, out_stride, add;
  double scale;
};

struct Multiply {
  const float* halves;
  const uint8_t* mask;
  const float* fill;
  float* out;
  i64 batch, neurons, activation;
};

struct Decide {
  const float *value, *threshold;
  int32_t* index;
  int32_t* count;
  uint8_t* mask;
  i64* read;
  i64 batch, neurons, stride, step, activation;
};

struct Top {
  const float* score;
  const int32_t *members, *sizes;
  const uint8_t* always;
  int32_t* index;
  int32_t* count;
  uint8_t* mask;
  i64* read;
  i64 batch, units, top, members_each, neurons;
};

struct Attend {
  float* qkv;
  const float *q_norm, *k_norm, *cosine, *sine;
  void *keys, *values;
  const int32_t* position;
  const i64* left;
  const uint8_t* active;
  float *out, *scores;
  i64 bfloat, batch, heads, kv_heads, head_dim, length, rotary, window;
  double scale, softcap, epsilon;
};

struct Embed {
  const void* embedding;
  const i64* token;
  float* out;
  i64 bfloat, batch, width;
  double scale;
};

struct Next {
  const float* logits;
  const i64* forced;
  i64 *token, *tokens;
  int32_t* position;
  i64 batch, vocab, length;
};

constexpr int rows_in_flight(int batch) { return batch <= 2 ? DEEP : batch <= 4 ? DEEP / 2 : DEEP / 4; }

// Ask for the line of `p`, into the second cache: eight rows of a group would push each other out of the first.
template <class T>
inline void ask(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// The products of R rows with every sequence; `next` are the rows that follow. One sum a lane for any R, so a row's
// result does not depend on the group that it falls into; fma where a compiler could choose otherwise for another R.
template <class T, int R, int B>
inline void dots(const T* const* rows, const T* const* next, const float* x, i64 step, i64 n, float (*out)[B]) {
  V acc[R][B] = {};
  i64 i = 0;
  auto stretch = [&](i64 end, const T* const* later, i64 shift) {
    for (; i + LANES <= end; i += LANES) {
      V w[R];
      for (int r = 0; r < R; ++r) {
        ask(later[r] + i + shift);
        w[r] = load(rows[r] + i);
      }
      for (int b = 0; b < B; ++b) {
        V xv = load(x + b * step + i);
        for (int r = 0; r < R; ++r) acc[r][b] = fused(w[r], xv, acc[r][b]);
      }
    }
  };
  i64 lead = std::min<i64>(n, AHEAD / sizeof(T));
  stretch(n - lead, rows, lead);
  stretch(n, next, lead - n);
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      float rest = sum(acc[r][b]);
      for (i64 j = i; j < n; ++j) rest = std::fma(one(rows[r][j]), x[b * step + j], rest);
      out[r][b] = rest;
    }
}

template <class T, int B, int R, class Row, class Use>
inline void groups(i64 i, i64 end, i64 last, const float* x, i64 width, Row row, Use use) {
  float out[R][B];
  const T *rows[R], *next[R];
  for (; i + R <= end; i += R) {
    for (int r = 0; r < R; ++r) rows[r] = row(i + r), next[r] = row(std::min(i + R + r, last - 1));
    dots<T, R, B>(rows, next, x, width, width, out);
    for (int r = 0; r < R; ++r) use(i + r, out[r]);
  }
  if constexpr (R > 1) groups<T, B, R / 2>(i, end, last, x, width, row, use);
}

// `row(i)` is the address of row i, `use(i, values)` takes its products with every sequence; rows up to `last` follow.
template <class T, int B, class Row, class Use>
inline void products(i64 begin, i64 end, i64 last, const float* x, i64 width, Row row, Use use) {
  groups<T, B, rows_in_flight(B)>(begin, end, last, x, width, row, use);
}

i64 grain(i64 row_bytes) { return std::max<i64>(1, GRAIN / std::max<i64>(1, row_bytes)); }

template <class F>
void over(i64 count, i64 row_bytes, const F& body) {
  at::parallel_for(0, count, grain(row_bytes), body);
}

void run(const Norm& a) {
  for (i64 b = 0; b < a.batch; ++b) {
    const float* x = a.x + b * a.width;
    float* out = a.out + b * a.width;
    V acc = {};
    i64 i = 0;
    for (; i + LANES <= a.width; i += LANES) acc += load(x + i) * load(x + i);
    float total = sum(acc);
    for (; i < a.width; ++i) total += x[i] * x[i];
    float size = float(a.scale) / std::sqrt(total / float(a.width) + float(a.epsilon));
    if (a.add)
      for (i = 0; i < a.width; ++i) out[i] += x[i] * size * a.weight[i];
    else
      for (i = 0; i < a.width; ++i) out[i] = x[i] * size * a.weight[i];
  }
}

template <class T, int B>
void run(const Rows& a) {
  const T* weight = static_cast<const T*>(a.weight);
  float scale = float(a.scale), cap = float(a.softcap);
  auto at = [&](i64 i) { return a.index ? i64(a.index[i]) : i; };
  over(a.index ? *a.count : a.rows, a.width * sizeof(T), [&](i64 begin, i64 end) {
    products<T, B>(begin, end, end, a.x, a.width, [&](i64 i) { return weight + at(i) * a.stride; },
                   [&](i64 place, const float* y) {
                     i64 i = at(place);
                     for (int b = 0; b < B; ++b) {
                       float value = y[b] + (a.bias ? a.bias[i] : 0.0f), size = scale;
                       if (cap > 0) value = std::tanh(scale * value / cap), size = cap;
                       float& out = a.out[b * a.out_stride + i];
                       out = a.add ? std::fma(size, value, out) : size * value;
                     }
                   });
  });
}

template <class T, int B>
void run(const Gated& a) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  i64 count = a.index ? *a.count : a.rows;
  over(count, 2 * a.width * sizeof(T), [&](i64 begin, i64 end) {
    constexpr int R = rows_in_flight(B), PAIRS = R / 2;  // rows of gate and up take turns
    float out[R][B], g[B][CHUNK], u[B][CHUNK];
    const T *rows[R], *next[R];
    auto neuron = [&](i64 i) { return a.index ? i64(a.index[i]) : i; };
    auto pair = [&](const T** place, int p, i64 i) {
      place[2 * p] = gate + neuron(i) * a.stride, place[2 * p + 1] = up + neuron(i) * a.stride;
    };
    for (i64 at = begin; at < end; at += CHUNK) {
      i64 stop = std::min(end, at + CHUNK);
      for (i64 i = at; i < stop;) {
        int pairs = stop - i < PAIRS ? 1 : PAIRS;
        for (int p = 0; p < pairs; ++p) pair(rows, p, i + p), pair(next, p, std::min(i + p + pairs, end - 1));
        if (pairs == PAIRS)
          dots<T, R, B>(rows, next, a.x, a.width, a.width, out);
        else
          dots<T, 2, B>(rows, next, a.x, a.width, a.width, out);
        for (int p = 0; p < pairs; ++p)
          for (int b = 0; b < B; ++b) {
            i64 n = neuron(i + p);
            g[b][i + p - at] = out[2 * p][b] + (a.gate_bias ? a.gate_bias[n] : 0.0f);
            u[b][i + p - at] = out[2 * p + 1][b] + (a.up_bias ? a.up_bias[n] : 0.0f);
          }
        i += pairs;
      }
      for (int b = 0; b < B; ++b) {
        activate_all(g[b], stop - at, a.activation);
        for (i64 i = at; i < stop; ++i) {
          float value = filled(g[b][i - at], u[b][i - at], a.fill ? a.fill[neuron(i)] : 0.0f);
          if (a.mask && !a.mask[b * a.rows + neuron(i)]) value = 0;
          a.out[b * a.rows + i] = value;
        }
      }
    }
  });
}

template <class T, int B>
void run(const NeuronSparse& a) {
  const T *first = static_cast<const T*>(a.first), *second = static_cast<const T*>(a.second);
  std::atomic<i64> total{0};
  over(a.rows, 2 * a.width * sizeof(T), [&](i64 begin, i64 end) {
    i64 list[CHUNK], read = 0;
    float z[B][CHUNK];
    for (i64 at = begin; at < end; at += CHUNK) {
      i64 stop = std::min(end, at + CHUNK), kept = 0;
      products<T, B>(at, stop, end, a.x, a.width, [&](i64 i) { return first + i * a.stride; },
                     [&](i64 i, const float* y) {
                       for (int b = 0; b < B; ++b) z[b][i - at] = y[b] + (a.first_bias ? a.first_bias[i] : 0.0f);
                     });
      if (a.gate_first)
        for (int b = 0; b < B; ++b) activate_all(z[b], stop - at, a.activation);
      for (i64 i = at; i < stop; ++i) {
        bool any = false;
        for (int b = 0; b < B; ++b) {
          bool keep = std::fabs(z[b][i - at]) >= a.threshold[i * a.step];
          a.out[b * a.rows + i] = keep ? z[b][i - at] : 0.0f;
          any |= keep;
        }
        list[kept] = i;
        kept += any;
      }
      read += kept;
      for (i64 j = 0; j < std::min<i64>(kept, DEEP); ++j)
        for (i64 k = 0; k < a.width; k += 64 / sizeof(T)) ask(second + list[j] * a.stride + k);
      products<T, B>(0, kept, kept, a.x, a.width, [&](i64 j) { return second + list[j] * a.stride; },
                     [&](i64 j, const float* y) {
                       for (int b = 0; b < B; ++b) z[b][j] = y[b] + (a.second_bias ? a.second_bias[list[j]] : 0.0f);
                     });
      for (int b = 0; b < B; ++b) {
        if (!a.gate_first) activate_all(z[b], kept, a.activation);
        for (i64 j = 0; j < kept; ++j) {
          i64 i = list[j];
          float& out = a.out[b * a.rows + i];
          // a sequence that drops the neuron holds 0 here, unless its kept value was 0 too
          bool keep = out != 0.0f || a.threshold[i * a.step] <= 0.0f;
          out = filled(out, z[b][j], keep && a.fill ? a.fill[i] : 0.0f);
        }
      }
    }
    total += read;
  });
  *a.read += total;
}

// What decides on an input of each sequence, known before any thread looks: sizes under `least` are dropped, and of
// those equal to it the ones behind `last`.
template <int B>
struct Cut {
  float least[B];
  i64 last[B];
};

inline float size_of(const Columns& a, i64 b, i64 i) {
  return std::fabs(a.x[b * a.inputs + i]) * (a.score ? a.score[i] : 1.0f);
}

template <int B>
Cut<B> cut_of(const Columns& a, i64 count) {
  Cut<B> cut;
  std::vector<float> sizes;
  for (int b = 0; b < B; ++b) {
    cut.least[b] = a.threshold && a.top <= 0 ? *a.threshold : 0.0f;
    cut.last[b] = count;
    if (a.top <= 0 || a.top >= count) continue;
    sizes.resize(count);
    for (i64 i = 0; i < count; ++i) sizes[i] = size_of(a, b, i);
    std::nth_element(sizes.begin(), sizes.begin() + (a.top - 1), sizes.end(), std::greater<float>());
    float least = cut.least[b] = sizes[a.top - 1];
    i64 ties = a.top - std::count_if(sizes.begin(), sizes.begin() + a.top, [&](float size) { return size > least; });
    for (i64 i = 0; i < count && ties > 0; ++i)
      if (size_of(a, b, i) == least) --ties, cut.last[b] = i;
  }
  return cut;
}

// The inputs [begin, end) that are kept, in order, with a coefficient per sequence; sequences that drop one get 0.
template <int B>
i64 compact(const Columns& a, const Cut<B>& cut, i64 begin, i64 end, float* coefficient, int32_t* list) {
  i64 kept = 0;
  for (i64 i = begin; i < end; ++i) {
    bool any = false;
    i64 row = a.index ? a.index[i] : i;
    for (int b = 0; b < B; ++b) {
      float x = a.x[b * a.inputs + i], size = size_of(a, b, i);
      bool keep = a.keep ? x != 0.0f : !(size < cut.least[b]);  // NaN is kept, and seen
      if (!a.keep && size == cut.least[b]) keep = i <= cut.last[b];
      coefficient[kept * B + b] = keep ? x - (a.fill ? a.fill[row] : 0.0f) : 0.0f;
      if (a.dropped) a.dropped[b * a.inputs + i] = keep ? 0.0f : x;
      any |= keep;
    }
    list[kept] = int32_t(row);
    kept += any;
  }
  return kept;
}

// out [batch, .] += coefficient [D, batch] x rows, over columns [begin, end); `next` are the rows that follow.
template <class T, int B, int D>
inline void add_rows(const T* const* rows, const T* const* next, const float* coefficient, i64 begin, i64 end,
                     float* out, i64 step) {
  V c[B][D];
  for (int b = 0; b < B; ++b)
    for (int d = 0; d < D; ++d) c[b][d] = spread(coefficient[d * B + b]);
  i64 j = begin;
  for (; j + LANES <= end; j += LANES) {
    V w[D];
    for (int d = 0; d < D; ++d) {
      ask(next[d] + j);
      w[d] = load(rows[d] + j);
    }
    for (int b = 0; b < B; ++b) {
      V even = load(out + b * step + j), odd = {};
      for (int d = 0; d < D; d += 2) {
        even += c[b][d] * w[d];
        if (d + 1 < D) odd += c[b][d + 1] * w[d + 1];
      }
      store(out + b * step + j, even + odd);
    }
  }
  for (; j < end; ++j)
    for (int b = 0; b < B; ++b) {
      float value = out[b * step + j];
      for (int d = 0; d < D; ++d) value += coefficient[d * B + b] * one(rows[d][j]);
      out[b * step + j] = value;
    }
}

template <class T, int B, int D, class Row>
inline void add_groups(i64 i, i64 end, i64 last, const float* coefficient, i64 from, i64 to, float* out, i64 step,
                       Row row) {
  const T *rows[D], *next[D];
  for (; i + D <= end; i += D) {
    for (int d = 0; d < D; ++d) rows[d] = row(i + d), next[d] = row(std::min(i + D + d, last - 1));
    add_rows<T, B, D>(rows, next, coefficient + i * B, from, to, out, step);
  }
  if constexpr (D > 1) add_groups<T, B, D / 2>(i, end, last, coefficient, from, to, out, step, row);
}

// out [batch, width] += coefficient [., batch] x rows [begin, end), `row(i)` being the address of row i; rows up to
// `last` follow.
template <class T, int B, class Row>
inline void add_all(i64 begin, i64 end, i64 last, const float* coefficient, i64 width, float* out, Row row) {
  for (i64 from = 0; from < width; from += WIDE / B) {
    i64 to = std::min(width, from + WIDE / B);
    add_groups<T, B, DEEP>(begin, end, last, coefficient, from, to, out, width, row);
  }
}

// out = scale * (the sum of `chunks` sums [batch, width] + base), or out += that.
void gather(float* sums, i64 chunks, i64 batch, i64 width, const float* base, float scale, i64 add, float* out,
            i64 out_stride) {
  const i64 total = batch * width;
  over(total, chunks * sizeof(float), [&](i64 begin, i64 end) {
    for (i64 c = 1; c < chunks; ++c)
      for (i64 i = begin; i < end; ++i) sums[i] += sums[c * total + i];
    for (i64 i = begin; i < end; ++i) {
      i64 b = i / width, j = i - b * width;
      float value = sums[i] + (base ? base[j] : 0.0f);
      float& place = out[b * out_stride + j];
      place = add ? std::fma(scale, value, place) : scale * value;
    }
  });
}

template <class T, int B>
void run(const Columns& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const i64 count = a.index ? *a.count : a.inputs;
  const Cut<B> cut = cut_of<B>(a, count);
  float* sums = a.scratch + B * a.inputs;  // [chunks, batch, outputs], behind the coefficients
  std::atomic<i64> total{0};
  over(a.chunks, (count / a.chunks + 1) * a.outputs * sizeof(T), [&](i64 from, i64 to) {
    auto start = [&](i64 chunk) { return count * chunk / a.chunks; };
    float* coefficient = a.scratch + start(from) * B;
    int32_t* list = a.list + start(from);
    std::array<i64, MAX_CHUNKS + 1> ends;  // of each chunk's kept inputs, in the thread's own list
    i64 kept = 0;
    for (i64 c = from; c < to; ++c) {
      ends[c - from] = kept;
      kept += compact<B>(a, cut, start(c), start(c + 1), coefficient + kept * B, list + kept);
    }
    ends[to - from] = kept;
    for (i64 c = from; c < to; ++c) {
      float* out = sums + c * B * a.outputs;
      std::fill(out, out + B * a.outputs, 0.0f);
      add_all<T, B>(ends[c - from], ends[c - from + 1], kept, coefficient, a.outputs, out,
                    [&](i64 i) { return weight + list[i] * a.stride; });
    }
    total += kept;
  });
  gather(sums, a.chunks, B, a.outputs, a.base, float(a.scale), a.add, a.out, a.out_stride);
  *a.read += total;
}

void run(const Multiply& a) {
  at::parallel_for(0, a.batch * a.neurons, 1024, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const float* gate = a.halves + (i / a.neurons) * 2 * a.neurons + i % a.neurons;
      if (a.mask && !a.mask[i]) {
        a.out[i] = 0.0f;  // its other half may not have been computed
        continue;
      }
      a.out[i] = filled(activate(*gate, a.activation), gate[a.neurons], a.fill ? a.fill[i % a.neurons] : 0.0f);
    }
  });
}

// The neurons of a mask's union over the sequences, in order.
i64 list_union(const uint8_t* mask, i64 batch, i64 neurons, int32_t* index) {
  i64 kept = 0;
  for (i64 i = 0; i < neurons; ++i) {
    uint8_t any = 0;
    for (i64 b = 0; b < batch; ++b) any |= mask[b * neurons + i];
    index[kept] = int32_t(i);
    kept += any;
  }
  return kept;
}

void run(const Decide& a) {
  for (i64 b = 0; b < a.batch; ++b)
    for (i64 i = 0; i < a.neurons; ++i)
      a.mask[b * a.neurons + i] =
          std::fabs(activate(a.value[b * a.stride + i], a.activation)) >= a.threshold[i * a.step];
  i64 kept = list_union(a.mask, a.batch, a.neurons, a.index);
  *a.count = int32_t(kept);
  *a.read += kept;
}

void run(const Top& a) {
  // the `top` units of highest score of every sequence; the union is listed, each sequence's own marked in `mask`
  std::vector<int32_t> order(a.units);
  for (i64 b = 0; b < a.batch; ++b) {
    const float* score = a.score + b * a.units;
    for (i64 i = 0; i < a.units; ++i) order[i] = int32_t(i);
    auto better = [&](int32_t p, int32_t q) { return score[p] != score[q] ? score[p] > score[q] : p < q; };
    i64 top = std::min(a.top, a.units);
    if (a.sizes) {  // whole units until they hold `top` neurons
      std::sort(order.begin(), order.end(), better);
      i64 held = 0;
      for (top = 0; top < a.units && held < a.top; ++top) held += a.sizes[order[top]];
    } else if (top < a.units) {
      std::nth_element(order.begin(), order.begin() + top, order.end(), better);
    }
    uint8_t* mask = a.mask + b * a.neurons;
    for (i64 i = 0; i < a.neurons; ++i) mask[i] = a.always ? a.always[i] : 0;
    for (i64 i = 0; i < top; ++i)
      for (i64 m = 0; m < a.members_each; ++m) {
        i64 neuron = a.members ? a.members[order[i] * a.members_each + m] : order[i];
        if (neuron >= 0) mask[neuron] = 1;
      }
  }
  i64 kept = list_union(a.mask, a.batch, a.neurons, a.index);
  *a.count = int32_t(kept);
  *a.read += kept;
}

// One head's vector, normed and rotated (half-split pairs over the first `rotary` channels).
inline void turn(const float* x, const float* norm, const Attend& a, i64 position, float* out) {
  float size = 1.0f;
  if (norm) {
    float total = 0;
    for (i64 i = 0; i < a.head_dim; ++i) total += x[i] * x[i];
    size = 1.0f / std::sqrt(total / float(a.head_dim) + float(a.epsilon));
  }
  for (i64 i = 0; i < a.head_dim; ++i) out[i] = norm ? x[i] * size * norm[i] : x[i];
  if (!a.cosine) return;
  i64 half = a.rotary / 2;
  const float *cosine = a.cosine + position * half, *sine = a.sine + position * half;
  for (i64 i = 0; i < half; ++i) {
    float low = out[i], high = out[i + half];
    out[i] = low * cosine[i] - high * sine[i];
    out[i + half] = high * cosine[i] + low * sine[i];
  }
}

template <class T>
inline void weigh(const T* value, const float* share, i64 first, i64 last, i64 head_dim, float* out) {
  std::fill(out, out + head_dim, 0.0f);
  add_all<T, 1>(first, last, last, share, head_dim, out, [&](i64 t) { return value + t * head_dim; });
}

template <class T>
void run(const Attend& a) {
  T *keys = static_cast<T*>(a.keys), *values = static_cast<T*>(a.values);
  const i64 at = *a.position, group = a.heads / a.kv_heads;
  const i64 query = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim, total = query + 2 * kv;
  float turned[MAX_HEAD];
  for (i64 b = 0; b < a.batch; ++b)
    for (i64 h = 0; h < a.kv_heads; ++h) {
      const float* key = a.qkv + b * total + query + h * a.head_dim;
      T* k = keys + ((b * a.kv_heads + h) * a.length + at) * a.head_dim;
      T* v = values + ((b * a.kv_heads + h) * a.length + at) * a.head_dim;
      turn(key, a.k_norm, a, at - a.left[b], turned);
      for (i64 i = 0; i < a.head_dim; ++i) put(k + i, turned[i]), put(v + i, key[kv + i]);
    }
  i64 bytes = 2 * at * a.head_dim * sizeof(T);
  at::parallel_for(0, a.batch * a.heads, std::max<i64>(1, GRAIN / std::max<i64>(1, bytes)), [&](i64 from, i64 to) {
    float q[MAX_HEAD];
    for (i64 unit = from; unit < to; ++unit) {
      i64 b = unit / a.heads, head = unit % a.heads, h = head / group;
      float* out = a.out + unit * a.head_dim;
      if (a.active && !a.active[b * a.kv_heads + h]) {
        std::fill(out, out + a.head_dim, 0.0f);
        continue;
      }
      i64 first = a.left[b];
      if (a.window > 0) first = std::max(first, at - a.window + 1);
      turn(a.qkv + b * total + head * a.head_dim, a.q_norm, a, at - a.left[b], q);
      for (i64 i = 0; i < a.head_dim; ++i) q[i] *= float(a.scale);
      const T* key = keys + (b * a.kv_heads + h) * a.length * a.head_dim;
      float* score = a.scores + unit * a.length;
      float cap = float(a.softcap), best = -std::numeric_limits<float>::infinity();
      products<T, 1>(first, at + 1, at + 1, q, a.head_dim, [&](i64 t) { return key + t * a.head_dim; },
                     [&](i64 t, const float* y) {
                       score[t] = cap > 0 ? cap * std::tanh(y[0] / cap) : y[0];
                       best = std::max(best, score[t]);
                     });
      V acc = {};
      i64 t = first;
      for (; t + LANES <= at + 1; t += LANES) {
        V share = exponential(load(score + t) - best);
        store(score + t, share);
        acc += share;
      }
      float mass = sum(acc);
      for (; t <= at; ++t) mass += score[t] = std::exp(score[t] - best);
      weigh(values + (b * a.kv_heads + h) * a.length * a.head_dim, score, first, at + 1, a.head_dim, out);
      for (i64 i = 0; i < a.head_dim; ++i) out[i] /= mass;
    }
  });
}

template <class T>
void run(const Embed& a) {
  for (i64 b = 0; b < a.batch; ++b) {
    const T* row = static_cast<const T*>(a.embedding) + a.token[b] * a.width;
    for (i64 i = 0; i < a.width; ++i) a.out[b * a.width + i] = float(a.scale) * one(row[i]);
  }
}

void run(const Next& a) {
  i64 following = std::min<i64>(*a.position + 1, a.length - 1);
  for (i64 b = 0; b < a.batch; ++b) {
    i64 token = a.forced[b * a.length + following];
    if (token < 0) {
      const float* logits = a.logits + b * a.vocab;
      token = 0;
      for (i64 i = 1; i < a.vocab; ++i) token = logits[i] > logits[token] ? i : token;
    }
    a.token[b] = a.tokens[b * a.length + following] = token;
  }
  *a.position = int32_t(following);
}

template <class T, class A>
void by_batch(const A& a) {
  switch (a.batch) {
    case 1: return run<T, 1>(a);
    case 2: return run<T, 2>(a);
    case 3: return run<T, 3>(a);
    case 4: return run<T, 4>(a);
    case 5: return run<T, 5>(a);
    case 6: return run<T, 6>(a);
    case 7: return run<T, 7>(a);
    case 8: return run<T, 8>(a);
  }
}

template <class A>
void by_type(const A& a) {
  if (a.bfloat)
    by_batch<bf16>(a);
  else
    by_batch<float>(a);
}

struct Step {
  i64 kind;
  const void* arguments;
};

void run(const Step& step) {
  const void* a = step.arguments;
  switch (step.kind) {
    case 0: return run(*static_cast<const Norm*>(a));
    case 1: return by_type(*static_cast<const Rows*>(a));
    case 2: return by_type(*static_cast<const Gated*>(a));
    case 3: return by_type(*static_cast<const NeuronSparse*>(a));
    case 4: return by_type(*static_cast<const Columns*>(a));
    case 5: return run(*static_cast<const Top*>(a));
    case 6: {
      const Attend& attend = *static_cast<const Attend*>(a);
      return attend.bfloat ? run<bf16>(attend) : run<float>(attend);
    }
    case 7: {
      const Embed& embed = *static_cast<const Embed*>(a);
      return embed.bfloat ? run<bf16>(embed) : run<float>(embed);
    }
    case 8: return run(*static_cast<const Next*>(a));
    case 9: return run(*static_cast<const Multiply*>(a));
    case 10: return run(*static_cast<const Decide*>(a));
  }
}

}  // namespace

extern "C" {

int actsparse_max_batch() { return MAX_BATCH; }

void actsparse_run(const Step* steps, i64 count, i64 times) {
  for (i64 t = 0; t < times; ++t)
    for (i64 i = 0; i < count; ++i) run(steps[i]);
}

// Bytes [0, size) read once by all threads: the ceiling of anything that streams weights.
double actsparse_read(const float* data, i64 count) {
  std::vector<double> partial(at::get_num_threads() + 1, 0.0);
  at::parallel_for(0, count / (4 * LANES), 1 << 12, [&](i64 begin, i64 end) {
    V acc[4] = {};
    for (i64 i = begin; i < end; ++i)
      for (int u = 0; u < 4; ++u) acc[u] += load(data + (i * 4 + u) * LANES);
    partial[at::get_thread_num()] += sum(acc[0] + acc[1] + acc[2] + acc[3]);
  });
  double total = 0;
  for (double one_thread : partial) total += one_thread;
  return total;
}

}  // extern "C"
