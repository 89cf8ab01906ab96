// Products with weight ROWS [rows, width]: out = W x, a warp per row, x in shared memory as float32.
//
// A warp streams one row at a time, its halves side by side (or a gate row beside its up row), through a ring that never
// drains between rows, and fills it before the dependency wait, which hides the start of the kernel behind the end of the
// previous one.
#include "common.cuh"

namespace actsparse {

constexpr int kStage = 64;           // 16-byte words in a stage of the ring: both streams
constexpr int kMaxThreads = 512;

enum RowsMode {
  kStore = 0,      // out[r] = W_r x + bias_r
  kResidual = 1,   // out[r] += scale * (W_r x + bias_r)
  kGated = 2,      // out[i] = act(W_i x + bias_i) * (W_{second + i} x + bias_{second + i})
  kThreshold = 3,  // v = act(W_r x + bias_r); out[r] = |v| >= threshold ? v : 0
  kKept = 4,       // out[r] = factor_r * act(W_r x + bias_r) where factor_r != 0, else 0; other rows are not read
  kBest = 5,       // out[r] = cap * tanh(scale * W_r x / cap), and the block's largest value with its row
};

struct RowsArgs {
  const void* weight;
  const void* x;           // floats, or sums in fixed point
  const float* norm;       // RMSNorm weight, or null
  const float* bias;       // or null
  const float* factor;     // kKept
  const float* fill;       // kGated, kKept: taken off the results by row, or null
  const float* threshold;  // kThreshold
  const int* index;        // kGated: neurons to read; kStore: rows to compute, the others stay; null for all
  const int* count;        // how many of them are live, or null for all
  void* out;               // floats; for kResidual floats, or sums in fixed point
  float* best_value;       // kBest: one per block
  int* best_row;
  unsigned long long* read;  // kKept: gains how many rows were read, or null
  int64_t stride;          // elements from one row to the next
  float epsilon;
  float scale;
  float cap;               // 0: none
  int second;
  int rows;
  int width;
  int activation;
  int threshold_step;      // 0: one threshold; 1: one per row
  int fresh;               // index and count are made by this step, not before it
  int fixed_x;
  int fixed_out;
};

// DEPTH: pairs of 512-byte copies that a warp has under way.
template <typename T, int MODE, int DEPTH>
__global__ void __launch_bounds__(kMaxThreads, 2) rows_kernel(const __grid_constant__ RowsArgs a) {
  extern __shared__ float4 shared[];
  __shared__ float sums[32];
  __shared__ int counts[64];
  __shared__ float top_value[32];
  __shared__ int top_row[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int all_chunks = (a.width + kSpan - 1) / kSpan;
  const int chunks = MODE == kGated ? all_chunks : (all_chunks + 1) / 2;  // of one stream
  const int offset = MODE == kGated ? 0 : chunks;                         // of the second stream in x
  const int staged = chunks + offset;
  // x lies in two planes of quads, so that a warp's 16-byte reads have no bank conflicts.
  float4* const low = shared;
  float4* const high = shared + staged * 32;
  uint4* const ring = reinterpret_cast<uint4*>(shared + staged * 64) + warp * DEPTH * kStage + lane;
  int* const kept = reinterpret_cast<int*>(shared + staged * 64 + warps * DEPTH * kStage);
  const T* const weight = static_cast<const T*>(a.weight);
  float* const out = static_cast<float*>(a.out);
  let_next_start();

  const int per_block = (a.rows + gridDim.x - 1) / gridDim.x;
  int live = a.rows;
  constexpr bool kLists = MODE == kGated || MODE == kStore;
  if (kLists && a.fresh) wait_for_previous();
  if (kLists && a.count) live = min(__ldcg(a.count), a.rows);
  if (MODE == kKept) {
    wait_for_previous();
    const int begin = blockIdx.x * per_block, end = min(begin + per_block, a.rows);
    int total = 0, round = 0;
    for (int base = begin; base < end; base += blockDim.x, ++round) {
      const int row = base + threadIdx.x;
      const bool inside = row < end;
      const bool keep = inside && __ldcg(a.factor + row) != 0.0f;
      const int place = compact_round(keep, round, total, counts);
      if (keep) kept[place] = row;
      if (inside && !keep) out[row] = 0.0f;
    }
    __syncthreads();
    live = total;
    if (a.read && threadIdx.x == 0) atomicAdd(a.read, static_cast<unsigned long long>(total));
  }
  const int first = MODE == kKept ? warp : warp * gridDim.x + blockIdx.x;
  const int step = MODE == kKept ? warps : warps * gridDim.x;

  auto row_of = [&](int task) {
    if (kLists) return a.index ? __ldcg(a.index + task) : task;
    return MODE == kKept ? kept[task] : task;
  };

  // The row after the one being copied is known ahead, so that an index list costs no stall.
  const int64_t apart = MODE == kGated ? a.second * a.stride : offset * kSpan;  // the streams, in elements
  const T* from = weight;
  int next_task = first, next_chunk = 0, ahead = 0;
  auto aim = [&]() {
    from = weight + ahead * a.stride + lane * kLane;
    if (next_task + step < live) ahead = row_of(next_task + step);
  };
  auto copy_next = [&](int stage) {
    if (next_task < live) {
      const int at = next_chunk * kSpan + lane * kLane;
      copy_weights(ring + stage * kStage, from, at < a.width);
      copy_weights(ring + stage * kStage + 32, from + apart, at + offset * kSpan < a.width);
      from += kSpan;
      if (++next_chunk == chunks) {
        next_chunk = 0;
        next_task += step;
        aim();
      }
    }
    end_group();
  };
  if (first < live) ahead = row_of(first);
  aim();
#pragma unroll
  for (int stage = 0; stage < DEPTH; ++stage) copy_next(stage);
  if (MODE != kKept) wait_for_previous();

  // The norm's scale is applied to the results: one barrier instead of two.
  float squares = 0.0f;
  const bool aligned = reinterpret_cast<uintptr_t>(a.norm) % sizeof(float4) == 0;
  const float* const x = static_cast<const float*>(a.x);
  const Fixed* const sums_of_x = static_cast<const Fixed*>(a.x);
  constexpr int kHeld = 2;  // quads of x, with their gains, that a thread has under way
  for (int base = threadIdx.x; base < staged * 64; base += kHeld * blockDim.x) {
    float4 value[kHeld], gain[kHeld];
    auto inside = [&](int i) { return 4 * (base + i * static_cast<int>(blockDim.x)) + 3 < a.width; };
    auto place = [&](int i) { return 4 * (base + i * static_cast<int>(blockDim.x)); };
    if (a.fixed_x) {
      longlong2 one[kHeld], two[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        one[i] = inside(i) ? __ldcg(reinterpret_cast<const longlong2*>(sums_of_x + place(i))) : longlong2{};
        two[i] = inside(i) ? __ldcg(reinterpret_cast<const longlong2*>(sums_of_x + place(i)) + 1) : longlong2{};
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        gain[i] = a.norm && aligned && inside(i) ? __ldg(reinterpret_cast<const float4*>(a.norm + place(i))) : float4{};
        value[i] = make_float4(from_fixed(one[i].x), from_fixed(one[i].y), from_fixed(two[i].x), from_fixed(two[i].y));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) value[i] = inside(i) ? __ldcg(reinterpret_cast<const float4*>(x + place(i))) : float4{};
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        gain[i] = a.norm && aligned && inside(i) ? __ldg(reinterpret_cast<const float4*>(a.norm + place(i))) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int quad = base + i * blockDim.x, at = 4 * quad;
      if (quad >= staged * 64) break;
      float* const of = &value[i].x;
      float* const by = &gain[i].x;
      if (!inside(i) && at < a.width) {
        for (int e = 0; e < 3; ++e)
          if (at + e < a.width) of[e] = a.fixed_x ? from_fixed(__ldcg(sums_of_x + at + e)) : __ldcg(x + at + e);
      }
      if (a.norm) {
        squares += square_of(value[i]);
        if (!aligned || !inside(i)) {
          for (int e = 0; e < 4; ++e) by[e] = at + e < a.width ? a.norm[at + e] : 0.0f;
        }
        value[i].x *= gain[i].x, value[i].y *= gain[i].y, value[i].z *= gain[i].z, value[i].w *= gain[i].w;
      }
      const int lane_quad = quad & 63;
      (lane_quad & 1 ? high : low)[(quad >> 6) * 32 + (lane_quad >> 1)] = value[i];
    }
  }
  float scale = 1.0f;
  if (a.norm)
    scale = rsqrtf(sum_block(squares, sums) / a.width + a.epsilon);
  else
    __syncthreads();

  float best = -INFINITY;
  int best_at = 0x7fffffff;
  auto finish = [&](int task, float one, float two) {
    if (MODE == kGated) {
      one = sum_warp(one) * scale;
      two = sum_warp(two) * scale;
      if (lane != 0) return;
      const int row = row_of(task);
      if (a.bias) {
        one += a.bias[row];
        two += a.bias[a.second + row];
      }
      out[task] = activate(one, a.activation) * two - (a.fill ? a.fill[row] : 0.0f);
      return;
    }
    const int row = row_of(task);
    float y = sum_warp(one + two) * scale;
    if (lane != 0) return;
    if (a.bias) y += a.bias[row];
    if (MODE == kResidual) {
      y *= a.scale;
      if (a.fixed_out) {  // no other block has this row
        Fixed* const sum = static_cast<Fixed*>(a.out) + row;
        const Fixed part = to_fixed(y);
        *sum = part == kInvalid ? kInvalid : __ldcg(sum) + part;
        return;
      }
      y += __ldcg(out + row);
    }
    if (MODE == kKept) y = __ldcg(a.factor + row) * activate(y, a.activation) - (a.fill ? a.fill[row] : 0.0f);
    if (MODE == kThreshold) {
      y = activate(y, a.activation);
      if (!(fabsf(y) >= a.threshold[row * a.threshold_step])) y = 0.0f;
    }
    if (MODE == kBest) {
      y *= a.scale;
      if (a.cap > 0.0f) y = a.cap * tanhf(y / a.cap);
    }
    out[row] = y;
    if (MODE == kBest && y > best) best = y, best_at = row;
  };

  int stage = 0;
  for (int task = first; task < live; task += step) {
    float one = 0.0f, two = 0.0f;
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float4 x_low = low[chunk * 32 + lane], x_high = high[chunk * 32 + lane];
      wait_until_pending<DEPTH - 1>();
      float w[kLane];
      unpack<T>(ring[stage * kStage], w);
      one += w[0] * x_low.x + w[1] * x_low.y + w[2] * x_low.z + w[3] * x_low.w;
      one += w[4] * x_high.x + w[5] * x_high.y + w[6] * x_high.z + w[7] * x_high.w;
      unpack<T>(ring[stage * kStage + 32], w);
      if (MODE != kGated) {
        x_low = low[(chunk + offset) * 32 + lane];
        x_high = high[(chunk + offset) * 32 + lane];
      }
      two += w[0] * x_low.x + w[1] * x_low.y + w[2] * x_low.z + w[3] * x_low.w;
      two += w[4] * x_high.x + w[5] * x_high.y + w[6] * x_high.z + w[7] * x_high.w;
      copy_next(stage);
      stage = stage + 1 == DEPTH ? 0 : stage + 1;
    }
    finish(task, one, two);
  }

  if (MODE == kBest) {
    if (lane == 0) {
      top_value[warp] = best;
      top_row[warp] = best_at;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < warps; ++other)
        if (top_value[other] > best || (top_value[other] == best && top_row[other] < best_at))
          best = top_value[other], best_at = top_row[other];
      a.best_value[blockIdx.x] = best;
      a.best_row[blockIdx.x] = best_at;
    }
  }
}

template <typename T, int MODE, int DEPTH>
int launch_mode(const RowsArgs& a, int blocks, int threads, bool dependent, cudaStream_t stream) {
  const size_t chunks = (a.width + kSpan - 1) / kSpan, staged = MODE == kGated ? chunks : (chunks + 1) / 2 * 2;
  const size_t list = MODE == kKept ? (a.rows + blocks - 1) / blocks * sizeof(int) : 0;
  const size_t shared = staged * kSpan * sizeof(float) + threads / 32 * DEPTH * kStage * sizeof(uint4) + list;
  return launch(rows_kernel<T, MODE, DEPTH>, a, blocks, threads, shared, 1, dependent, stream);
}

template <typename T, int MODE>
int launch_depth(const RowsArgs& a, int blocks, int threads, bool deep, bool dependent, cudaStream_t stream) {
  // Two blocks share a multiprocessor, and the down projection's x leaves less room for rings.
  if (a.width > 12 * 1024) return launch_mode<T, MODE, 3>(a, blocks, threads, dependent, stream);
  return deep ? launch_mode<T, MODE, 6>(a, blocks, threads, dependent, stream)
              : launch_mode<T, MODE, 4>(a, blocks, threads, dependent, stream);
}

template <typename T>
int launch_rows(const RowsArgs& a, int mode, int blocks, int threads, bool deep, bool dependent, cudaStream_t stream) {
  switch (mode) {
    case kStore:
      return launch_depth<T, kStore>(a, blocks, threads, deep, dependent, stream);
    case kResidual:
      return launch_depth<T, kResidual>(a, blocks, threads, deep, dependent, stream);
    case kGated:
      return launch_depth<T, kGated>(a, blocks, threads, deep, dependent, stream);
    case kThreshold:
      return launch_mode<T, kThreshold, 4>(a, blocks, threads, dependent, stream);
    case kKept:
      return launch_mode<T, kKept, 4>(a, blocks, threads, dependent, stream);
    case kBest:
      return launch_mode<T, kBest, 4>(a, blocks, threads, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace actsparse

extern "C" int actsparse_rows(const actsparse::RowsArgs* args, int dtype, int mode, int blocks, int threads, int deep,
                              int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (threads > kMaxThreads || threads % 32) return cudaErrorInvalidValue;
  return dtype == kBfloat16 ? launch_rows<__nv_bfloat16>(*args, mode, blocks, threads, deep, dependent, queue)
                            : launch_rows<__half>(*args, mode, blocks, threads, deep, dependent, queue);
}
