// Products with weight ROWS [rows, width] for a batch of up to eight sequences: out_b = W x_b, each row read once.
//
// A tile is sixteen rows, or eight gate rows beside their up rows. The warps of a block share its width, 64 columns each in
// turn, so that what they read at once is a kilobyte of every row; their rings never drain between tiles. The tile meets
// the batch on tensor cores, whose eight columns are the sequences: plain arithmetic would read the activations of every
// sequence from shared memory for each pair of rows, and that, not the weights, would set the pace from four on. Weights
// of 16 bits are exact in tf32, and x is taken as a large and a small part of 11 bits each, so that products keep 22 bits.
// Then the warps' parts meet in shared memory, with one barrier a tile.
//
// Where results are added up, blocks may share the width too: sums in fixed point are the same in any order.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;                          // of a tile
constexpr int kChunk = 64;                         // columns that a warp takes at once
constexpr int kStage = kRows * kChunk / kLane;     // 16-byte words of them
constexpr int kSequences = 8;                      // columns of a matrix instruction
constexpr int kPad = 4;                            // floats behind a sequence's x, so that reads have no bank conflicts
constexpr size_t kMostShared = 226 * 1024;

enum BatchMode {  // as in rows.cu
  kStore = 0,
  kAdd = 1,        // to sums in fixed point
  kGated = 2,
  kThreshold = 3,
  kKept = 4,       // rows that no sequence keeps are not read
  kBest = 5,
};

struct BatchRowsArgs {
  const void* weight;
  const float* x;          // [batch, x_stride], rows of 16 bytes and more
  const float* bias;       // or null
  const float* factor;     // kKept: [batch, factor_stride]
  const float* threshold;  // kThreshold
  const float* mask;       // kGated: [batch, mask_stride], multiplied, or null
  const int* count;        // kGated: how many rows are live, or null for all
  void* out;               // [batch, out_stride], floats or sums in fixed point
  float* best_value;       // kBest: [batch, blocks]
  int* best_row;
  unsigned long long* read;  // kKept: gains how many rows were read, or null
  int64_t stride;          // elements from one row to the next
  int64_t x_stride;
  int64_t out_stride;
  int64_t factor_stride;
  int64_t mask_stride;
  float scale;
  float cap;               // 0: none
  int batch;
  int second;
  int rows;
  int width;
  int activation;
  int threshold_step;      // 0: one threshold; 1: one per row
};

// Starts copying up to 16 bytes, zeros behind them.
__device__ __forceinline__ void copy_floats(float* to, const float* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// DEPTH: stages that a warp has under way.
template <typename T, int MODE, int DEPTH>
__global__ void __launch_bounds__(kThreads, 2) batch_rows_kernel(const __grid_constant__ BatchRowsArgs a) {
  constexpr int kUnits = MODE == kGated ? kRows / 2 : kRows;  // results of a tile, for each sequence
  extern __shared__ uint4 shared[];
  __shared__ int counts[64];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(kFull, threadIdx.x >> 5, 0);
  const int slot = lane >> 2, quarter = lane & 3;  // of the tile's rows, and of 32 columns
  const int all_chunks = (a.width + kChunk - 1) / kChunk;
  const int first_chunk = all_chunks * blockIdx.y / gridDim.y;
  const int chunks = all_chunks * (blockIdx.y + 1) / gridDim.y - first_chunk;
  const int pitch = chunks * kChunk + kPad;
  uint4* const ring = shared + warp * DEPTH * kStage + lane;
  float* const parts = reinterpret_cast<float*>(shared + kWarps * DEPTH * kStage);  // [2, warps, 32 lanes, 4]
  constexpr int kParts = kWarps * 32 * 4;
  float* const x = parts + 2 * kParts;
  int* const kept = reinterpret_cast<int*>(x + a.batch * pitch);
  const T* const weight = static_cast<const T*>(a.weight) + first_chunk * kChunk + quarter * kLane;
  let_next_start();

  int live = a.rows;
  if (MODE == kGated && a.count) live = min(__ldcg(a.count), a.rows);
  if (MODE == kKept) {
    wait_for_previous();
    const int per_block = (a.rows + gridDim.x - 1) / gridDim.x;
    const int begin = min(static_cast<int>(blockIdx.x) * per_block, a.rows), end = min(begin + per_block, a.rows);
    int total = 0, round = 0;
    for (int base = begin; base < end; base += kThreads, ++round) {
      const int row = base + threadIdx.x;
      const bool inside = row < end;
      bool keep = false;
      for (int sequence = 0; sequence < a.batch; ++sequence)
        keep = keep || (inside && __ldcg(a.factor + sequence * a.factor_stride + row) != 0.0f);
      const int place = compact_round(keep, round, total, counts);
      if (keep) kept[place] = row;
      if (inside && !keep)
        for (int sequence = 0; sequence < a.batch; ++sequence) static_cast<float*>(a.out)[sequence * a.out_stride + row] = 0.0f;
    }
    __syncthreads();
    live = total;
    if (a.read && threadIdx.x == 0) atomicAdd(a.read, static_cast<unsigned long long>(total));
  }
  const int tiles = (live + kUnits - 1) / kUnits;
  const int first = MODE == kKept ? 0 : blockIdx.x, step = MODE == kKept ? 1 : gridDim.x;
  auto row_of = [&](int unit) { return MODE == kKept ? kept[unit] : unit; };

  // The two rows of a thread in the tile that is being copied; null past the last.
  const T *low = nullptr, *high = nullptr;
  int next_tile = warp < chunks ? first : tiles, next_chunk = warp;
  auto aim = [&]() {
    if (next_tile >= tiles) return;
    const int unit = next_tile * kUnits + slot, other = MODE == kGated ? unit : unit + 8;
    low = unit < live ? weight + row_of(unit) * a.stride : nullptr;
    high = other < live ? weight + (row_of(other) + (MODE == kGated ? a.second : 0)) * a.stride : nullptr;
  };
  auto copy_next = [&](int stage) {
    if (next_tile < tiles) {
      const int at = next_chunk * kChunk;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = (first_chunk + next_chunk) * kChunk + half * 32 + quarter * kLane < a.width;
        uint4* const to = ring + stage * kStage + half * 64;
        copy_weights(to, low ? low + at + half * 32 : weight, inside && low);
        copy_weights(to + 32, high ? high + at + half * 32 : weight, inside && high);
      }
      next_chunk += kWarps;
      if (next_chunk >= chunks) {
        next_chunk = warp;
        next_tile += step;
        aim();
      }
    }
    end_group();
  };
  aim();
#pragma unroll
  for (int stage = 0; stage < DEPTH; ++stage) copy_next(stage);
  if (MODE != kKept) wait_for_previous();

  // A warp reads the x of its own columns only: no barrier.
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    for (int item = lane; item < a.batch * (kChunk / 4); item += 32) {
      const int sequence = item / (kChunk / 4), column = chunk * kChunk + item % (kChunk / 4) * 4;
      const int at = first_chunk * kChunk + column;
      copy_floats(x + sequence * pitch + column, a.x + sequence * a.x_stride + min(at, a.width - 4),
                  max(0, min(16, (a.width - at) * 4)));
    }
  }
  end_group();
  wait_until_pending<0>();
  __syncwarp();

  float best = -INFINITY;
  int best_at = 0x7fffffff;
  auto finish = [&](int tile, const float* part_of) {
    constexpr int kEach = MODE == kGated ? 2 : 4;  // results of a lane
    if (threadIdx.x >= 32 * kEach) return;
    const int from = threadIdx.x / kEach, part = threadIdx.x % kEach;
    const int sequence = 2 * (from & 3) + (part & 1), unit = tile * kUnits + (from >> 2) + 8 * (part >> 1);
    if (sequence >= a.batch || unit >= live) return;
    auto sum_of = [&](int place) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += part_of[other * 128 + place];
      return sum;
    };
    const int row = row_of(unit);
    float y = sum_of(from * 4 + part);
    if (a.bias && (MODE != kAdd || blockIdx.y == 0)) y += a.bias[row];
    if (MODE == kAdd) {
      add_fixed(static_cast<Fixed*>(a.out) + sequence * a.out_stride + row, y * a.scale);
      return;
    }
    if (MODE == kGated) {
      float up = sum_of(from * 4 + 2 + part);
      if (a.bias) up += a.bias[a.second + row];
      y = activate(y, a.activation) * up;
      if (a.mask) y *= __ldcg(a.mask + sequence * a.mask_stride + row);
    }
    if (MODE == kKept) {
      const float factor = __ldcg(a.factor + sequence * a.factor_stride + row);
      y = factor != 0.0f ? factor * activate(y, a.activation) : 0.0f;
    }
    if (MODE == kThreshold) {
      y = activate(y, a.activation);
      if (!(fabsf(y) >= a.threshold[row * a.threshold_step])) y = 0.0f;
    }
    if (MODE == kBest) {
      y *= a.scale;
      if (a.cap > 0.0f) y = a.cap * tanhf(y / a.cap);
      if (y > best) best = y, best_at = row;
    }
    static_cast<float*>(a.out)[sequence * a.out_stride + row] = y;
  };

  const float* const x_of = x + min(slot, a.batch - 1) * pitch + quarter * kLane;  // columns past the batch are not used
  int stage = 0, turn = 0;
  for (int tile = first; tile < tiles; tile += step, turn ^= 1) {
    float sum[4][4] = {};  // the large parts of x and the small ones, each in two chains
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      wait_until_pending<DEPTH - 1>();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float w_low[kLane], w_high[kLane], value[kLane];
        unpack<T>(ring[stage * kStage + half * 64], w_low);
        unpack<T>(ring[stage * kStage + half * 64 + 32], w_high);
        *reinterpret_cast<float4*>(value) = *reinterpret_cast<const float4*>(x_of + chunk * kChunk + half * 32);
        *reinterpret_cast<float4*>(value + 4) = *reinterpret_cast<const float4*>(x_of + chunk * kChunk + half * 32 + 4);
        // Which column is which of the eight makes no difference to a sum, as long as W and x agree.
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float w[4] = {w_low[2 * pair], w_high[2 * pair], w_low[2 * pair + 1], w_high[2 * pair + 1]};
          const float one = value[2 * pair], two = value[2 * pair + 1];
          multiply(sum[pair & 1], w, large_part(one), large_part(two));
          multiply(sum[2 + (pair & 1)], w, one - large_part(one), two - large_part(two));
        }
      }
      copy_next(stage);
      stage = stage + 1 == DEPTH ? 0 : stage + 1;
    }
    float* const part_of = parts + turn * kParts;
    reinterpret_cast<float4*>(part_of)[warp * 32 + lane] =
        make_float4((sum[0][0] + sum[1][0]) + (sum[2][0] + sum[3][0]), (sum[0][1] + sum[1][1]) + (sum[2][1] + sum[3][1]),
                    (sum[0][2] + sum[1][2]) + (sum[2][2] + sum[3][2]), (sum[0][3] + sum[1][3]) + (sum[2][3] + sum[3][3]));
    __syncthreads();
    finish(tile, part_of);
  }

  if (MODE == kBest) {
    float* const values = parts;
    int* const rows = reinterpret_cast<int*>(parts + 128);
    __syncthreads();
    if (threadIdx.x < 128) values[threadIdx.x] = best, rows[threadIdx.x] = best_at;
    __syncthreads();
    if (threadIdx.x < a.batch) {
      best = -INFINITY, best_at = 0x7fffffff;
      for (int of = 0; of < kRows; ++of) {  // the threads that had this sequence
        const int at = ((of & 7) * 4 + threadIdx.x / 2) * 4 + (of >> 3) * 2 + threadIdx.x % 2;
        if (values[at] > best || (values[at] == best && rows[at] < best_at)) best = values[at], best_at = rows[at];
      }
      a.best_value[threadIdx.x * gridDim.x + blockIdx.x] = best;
      a.best_row[threadIdx.x * gridDim.x + blockIdx.x] = best_at;
    }
  }
}

template <typename T, int MODE, int DEPTH>
int launch_depth(const BatchRowsArgs& a, int blocks, int slices, size_t rest, bool dependent, cudaStream_t stream) {
  const size_t shared = kWarps * DEPTH * kStage * sizeof(uint4) + rest;
  return launch(batch_rows_kernel<T, MODE, DEPTH>, a, dim3(blocks, slices), kThreads, shared, 1, dependent, stream);
}

template <typename T, int MODE>
int launch_mode(const BatchRowsArgs& a, int blocks, int slices, int depth, bool dependent, cudaStream_t stream) {
  const size_t chunks = ((a.width + kChunk - 1) / kChunk + slices - 1) / slices;
  const size_t list = MODE == kKept ? (a.rows + blocks - 1) / blocks * sizeof(int) : 0;
  const size_t rest = (a.batch * (chunks * kChunk + kPad) + 2 * kWarps * 128) * sizeof(float) + list;
  const size_t stage = kWarps * kStage * sizeof(uint4);
  if (depth >= 8 && 8 * stage + rest <= kMostShared) return launch_depth<T, MODE, 8>(a, blocks, slices, rest, dependent, stream);
  if (depth >= 4 && 4 * stage + rest <= kMostShared) return launch_depth<T, MODE, 4>(a, blocks, slices, rest, dependent, stream);
  return launch_depth<T, MODE, 2>(a, blocks, slices, rest, dependent, stream);
}

template <typename T>
int launch_batch_rows(const BatchRowsArgs& a, int mode, int blocks, int slices, int depth, bool dependent, cudaStream_t stream) {
  switch (mode) {
    case kStore:
      return launch_mode<T, kStore>(a, blocks, slices, depth, dependent, stream);
    case kAdd:
      return launch_mode<T, kAdd>(a, blocks, slices, depth, dependent, stream);
    case kGated:
      return launch_mode<T, kGated>(a, blocks, slices, depth, dependent, stream);
    case kThreshold:
      return launch_mode<T, kThreshold>(a, blocks, slices, depth, dependent, stream);
    case kKept:
      return launch_mode<T, kKept>(a, blocks, slices, depth, dependent, stream);
    case kBest:
      return launch_mode<T, kBest>(a, blocks, slices, depth, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace actsparse

// blocks: that share the rows; slices: that share the width, one but for kAdd; depth: stages of a ring where they fit.
extern "C" int actsparse_batch_rows(const actsparse::BatchRowsArgs* args, int dtype, int mode, int blocks, int slices,
                                    int depth, int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool fits = args->batch >= 1 && args->batch <= kSequences && args->x_stride % 4 == 0 && args->width % 4 == 0;
  if (!fits || (slices > 1 && mode != kAdd)) return cudaErrorInvalidValue;
  return dtype == kBfloat16 ? launch_batch_rows<__nv_bfloat16>(*args, mode, blocks, slices, depth, dependent, queue)
                            : launch_batch_rows<__half>(*args, mode, blocks, slices, depth, dependent, queue);
}
