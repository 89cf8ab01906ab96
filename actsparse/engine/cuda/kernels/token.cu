// The ends of a step: the next token and its embedding; and the gather that fills sliced buffers after prefill.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 1024;

struct TokenArgs {
  const float* best_value;  // [batch, candidates], one per block of the head
  const int* best_row;
  const int64_t* forced;    // [batch, positions]: the token to take at a position, or -1 for the best
  int64_t* tokens;          // [batch, positions]
  int* position;
  const void* embedding;    // [vocab, stride]
  float* hidden;            // [batch, width]
  float* squares;           // [batch]: the sums of hidden * hidden
  int64_t stride;
  float embed_scale;
  int candidates;
  int positions;
  int width;
  int batch;
};

// A block a sequence, in one cluster.
template <typename T>
__global__ void __launch_bounds__(kThreads) token_kernel(const __grid_constant__ TokenArgs a) {
  __shared__ float values[32];
  __shared__ int rows[32];
  __shared__ int chosen;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int sequence = blockIdx.x;
  const float* const best_value = a.best_value + sequence * a.candidates;
  const int* const best_row = a.best_row + sequence * a.candidates;
  const int64_t* const forced = a.forced + static_cast<int64_t>(sequence) * a.positions;
  float* const hidden = a.hidden + sequence * a.width;
  let_next_start();
  wait_for_previous();
  float best = -INFINITY;
  int best_at = 0x7fffffff;
  auto offer = [&](float value, int row) {
    if (value > best || (value == best && row < best_at)) best = value, best_at = row;
  };
  for (int at = threadIdx.x; at < a.candidates; at += blockDim.x) offer(__ldcg(best_value + at), __ldcg(best_row + at));
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
        if (forced[next] >= 0) token = forced[next];
        a.tokens[static_cast<int64_t>(sequence) * a.positions + next] = token;
      }
      chosen = static_cast<int>(token);
    }
  }
  if (a.batch > 1)
    cg::this_cluster().sync();  // every sequence has read the position
  else
    __syncthreads();
  if (sequence == 0 && threadIdx.x == 0 && next < a.positions) *a.position = next;
  const T* const row = static_cast<const T*>(a.embedding) + chosen * a.stride;
  float squares = 0.0f;
  for (int at = threadIdx.x; at < a.width; at += blockDim.x) {
    const float x = widen<T>(row[at]) * a.embed_scale;
    hidden[at] = x;
    squares += x * x;
  }
  squares = sum_block(squares, values);
  if (threadIdx.x == 0) a.squares[sequence] = squares;
}

struct PostNormArgs {
  void* branch;             // [batch, width], floats, or sums in fixed point, which become zero
  const float* weight;
  float* hidden;            // [batch, width] += scale * norm(branch) * weight
  float* squares;           // [batch]: the sums of hidden * hidden
  float epsilon;
  float scale;
  int width;
  int fixed;                // branch is sums in fixed point
};

// A block a sequence; E: what the branch is.
template <typename E>
__global__ void __launch_bounds__(kThreads) post_norm_kernel(const __grid_constant__ PostNormArgs a) {
  __shared__ float sums[2][32];
  E* const branch = static_cast<E*>(a.branch) + blockIdx.x * a.width;
  float* const hidden = a.hidden + blockIdx.x * a.width;
  let_next_start();
  wait_for_previous();
  const float norm = rsqrtf(sum_block(square_share(branch, a.width), sums[0]) / a.width + a.epsilon);
  const float scale = norm * a.scale;
  float squares = 0.0f;
  for (int at = threadIdx.x; at < a.width; at += blockDim.x) {
    const float x = __ldcg(hidden + at) + from_fixed(__ldcg(branch + at)) * a.weight[at] * scale;
    hidden[at] = x;
    if (sizeof(E) == sizeof(Fixed)) branch[at] = 0;
    squares += x * x;
  }
  squares = sum_block(squares, sums[1]);
  if (threadIdx.x == 0) a.squares[blockIdx.x] = squares;
}

struct NormArgs {
  const void* x;            // [batch, width], floats or sums in fixed point
  const float* weight;
  float* out;               // [batch, width]: norm(x) * weight
  float epsilon;
  int width;
  int fixed;
};

constexpr int kNormHeld = 4;  // values that a thread keeps between reading and writing

// A block a sequence; E: what x is.
template <typename E>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  __shared__ float sums[32];
  const E* const x = static_cast<const E*>(a.x) + blockIdx.x * a.width;
  float* const out = a.out + blockIdx.x * a.width;
  let_next_start();
  float gain[kNormHeld], held[kNormHeld], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormHeld; ++i) {
    const int at = threadIdx.x + i * kThreads;
    gain[i] = at < a.width ? a.weight[at] : 0.0f;
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kNormHeld; ++i) {
    const int at = threadIdx.x + i * kThreads;
    held[i] = at < a.width ? from_fixed(__ldcg(x + at)) : 0.0f;
    squares += held[i] * held[i];
  }
  for (int at = threadIdx.x + kNormHeld * kThreads; at < a.width; at += kThreads) {
    const float value = from_fixed(__ldcg(x + at));
    squares += value * value;
  }
  const float scale = rsqrtf(sum_block(squares, sums) / a.width + a.epsilon);
#pragma unroll
  for (int i = 0; i < kNormHeld; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at < a.width) out[at] = held[i] * gain[i] * scale;
  }
  for (int at = threadIdx.x + kNormHeld * kThreads; at < a.width; at += kThreads)
    out[at] = from_fixed(__ldcg(x + at)) * a.weight[at] * scale;
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
  const int batch = args->batch;
  if (batch > 8) return cudaErrorInvalidValue;  // blocks of a cluster
  return dtype == kBfloat16 ? launch(token_kernel<__nv_bfloat16>, *args, batch, kThreads, 0, batch, dependent, queue)
                            : launch(token_kernel<__half>, *args, batch, kThreads, 0, batch, dependent, queue);
}

extern "C" int actsparse_post_norm(const actsparse::PostNormArgs* args, int batch, int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return args->fixed ? launch(post_norm_kernel<Fixed>, *args, batch, kThreads, 0, 1, dependent, queue)
                     : launch(post_norm_kernel<float>, *args, batch, kThreads, 0, 1, dependent, queue);
}

extern "C" int actsparse_norm(const actsparse::NormArgs* args, int batch, int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return args->fixed ? launch(norm_kernel<Fixed>, *args, batch, kThreads, 0, 1, dependent, queue)
                     : launch(norm_kernel<float>, *args, batch, kThreads, 0, 1, dependent, queue);
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
