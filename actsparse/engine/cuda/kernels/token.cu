// The ends of a step: the next token and its embedding; and the gather that fills sliced buffers after prefill.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 1024;

struct TokenArgs {
  const float* best_value;  // [candidates], one per block of the head
  const int* best_row;
  const int64_t* forced;    // [positions]: the token to take at a position, or -1 for the best
  int64_t* tokens;          // [positions]
  int* position;
  const void* embedding;    // [vocab, stride]
  float* hidden;            // [width]
  float* squares;           // the sum of hidden * hidden
  int64_t stride;
  float embed_scale;
  int candidates;
  int positions;
  int width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) token_kernel(const __grid_constant__ TokenArgs a) {
  __shared__ float values[32];
  __shared__ int rows[32];
  __shared__ int chosen;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  let_next_start();
  wait_for_previous();
  float best = -INFINITY;
  int best_at = 0x7fffffff;
  auto offer = [&](float value, int row) {
    if (value > best || (value == best && row < best_at)) best = value, best_at = row;
  };
  for (int at = threadIdx.x; at < a.candidates; at += blockDim.x) offer(__ldcg(a.best_value + at), __ldcg(a.best_row + at));
  auto offer_lanes = [&]() {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      const float value = __shfl_xor_sync(kFull, best, step);
      const int row = __shfl_xor_sync(kFull, best_at, step);
      offer(value, row);
    }
  };
  offer_lanes();
  if (lane == 0) values[warp] = best, rows[warp] = best_at;
  __syncthreads();
  const int position = __ldcg(a.position);
  const int next = position + 1;
  if (warp == 0) {
    best = lane < warps ? values[lane] : -INFINITY;
    best_at = lane < warps ? rows[lane] : 0x7fffffff;
    offer_lanes();
    if (lane == 0) {
      int64_t token = best_at == 0x7fffffff ? 0 : best_at;
      if (next < a.positions) {
        if (a.forced[next] >= 0) token = a.forced[next];
        a.tokens[next] = token;
      }
      chosen = static_cast<int>(token);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && next < a.positions) *a.position = next;
  const T* const row = static_cast<const T*>(a.embedding) + chosen * a.stride;
  float squares = 0.0f;
  for (int at = threadIdx.x; at < a.width; at += blockDim.x) {
    const float x = widen<T>(row[at]) * a.embed_scale;
    a.hidden[at] = x;
    squares += x * x;
  }
  squares = sum_block(squares, values);
  if (threadIdx.x == 0) *a.squares = squares;
}

struct PostNormArgs {
  const float* branch;
  const float* weight;
  float* hidden;            // += scale * norm(branch) * weight
  float* squares;           // the sum of hidden * hidden
  float epsilon;
  float scale;
  int width;
};

__global__ void __launch_bounds__(kThreads) post_norm_kernel(const __grid_constant__ PostNormArgs a) {
  __shared__ float sums[2][32];
  let_next_start();
  wait_for_previous();
  float squares = 0.0f;
  for (int at = threadIdx.x; at < a.width; at += blockDim.x) {
    const float x = __ldcg(a.branch + at);
    squares += x * x;
  }
  const float scale = rsqrtf(sum_block(squares, sums[0]) / a.width + a.epsilon) * a.scale;
  squares = 0.0f;
  for (int at = threadIdx.x; at < a.width; at += blockDim.x) {
    const float x = __ldcg(a.hidden + at) + __ldcg(a.branch + at) * a.weight[at] * scale;
    a.hidden[at] = x;
    squares += x * x;
  }
  squares = sum_block(squares, sums[1]);
  if (threadIdx.x == 0) *a.squares = squares;
}

struct FixArgs {
  const float* values;
  Fixed* sums;             // become the values
  int size;
};

__global__ void __launch_bounds__(kThreads) fix_kernel(const __grid_constant__ FixArgs a) {
  let_next_start();
  wait_for_previous();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < a.size) a.sums[at] = to_fixed(__ldcg(a.values + at));
}

struct GatherArgs {
  const uint4* source;     // [layers, parts, rows, quads]
  uint4* target;           // [layers, parts, capacity, quads]
  const int* index;        // [layers, capacity]
  const int* count;        // [layers]: rows from here on become zero
  int64_t rows;
  int capacity;
  int parts;
  int quads;               // 16-byte words in a row
};

__global__ void __launch_bounds__(256) gather_kernel(const __grid_constant__ GatherArgs a) {
  constexpr int kRows = 4;  // rows of a block, 64 threads each
  const int to = blockIdx.x * kRows + threadIdx.x / 64, part = blockIdx.y, layer = blockIdx.z;
  if (to >= a.capacity) return;
  const int64_t plane = static_cast<int64_t>(layer) * a.parts + part;
  uint4* const target = a.target + (plane * a.capacity + to) * a.quads;
  const bool live = to < a.count[layer];
  const int64_t from = live ? a.index[static_cast<int64_t>(layer) * a.capacity + to] : 0;
  const uint4* const source = a.source + (plane * a.rows + from) * a.quads;
  constexpr int kHeld = 8;
  for (int word = threadIdx.x & 63; word < a.quads; word += 64 * kHeld) {
    uint4 held[kHeld];
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const int at = word + slot * 64;
      held[slot] = live && at < a.quads ? __ldcs(source + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const int at = word + slot * 64;
      if (at < a.quads) __stcs(target + at, held[slot]);
    }
  }
}

}  // namespace actsparse

extern "C" int actsparse_token(const actsparse::TokenArgs* args, int dtype, int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return dtype == kBfloat16 ? launch(token_kernel<__nv_bfloat16>, *args, 1, kThreads, 0, 1, dependent, queue)
                            : launch(token_kernel<__half>, *args, 1, kThreads, 0, 1, dependent, queue);
}

extern "C" int actsparse_post_norm(const actsparse::PostNormArgs* args, int dependent, void* stream) {
  using namespace actsparse;
  return launch(post_norm_kernel, *args, 1, kThreads, 0, 1, dependent, static_cast<cudaStream_t>(stream));
}

extern "C" int actsparse_fix(const actsparse::FixArgs* args, int dependent, void* stream) {
  using namespace actsparse;
  const int blocks = (args->size + kThreads - 1) / kThreads;
  return launch(fix_kernel, *args, blocks, kThreads, 0, 1, dependent, static_cast<cudaStream_t>(stream));
}

extern "C" int actsparse_gather(const actsparse::GatherArgs* args, int layers, void* stream) {
  const dim3 grid((args->capacity + 3) / 4, args->parts, layers);
  actsparse::gather_kernel<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return cudaGetLastError();
}

extern "C" const char* actsparse_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
