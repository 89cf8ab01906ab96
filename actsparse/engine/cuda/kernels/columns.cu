// Products with weights stored input-major [inputs, outputs]: out = sum_i x_i W[i, :], reading only the rows kept.
//
// A block owns 256 or 512 outputs and one slice of the inputs, of which every warp lists those of its own share that are
// kept, in order, and gathers their rows whole. No barrier but the norm's lies between the inputs and the first row: until
// then nothing else runs on the chip, and every instruction counts. Warps whose share is large read on while others are done; their
// rings are deep enough to keep the memory busy meanwhile. Then the block adds its part to sums in fixed point, or, where
// floats are wanted, the last block of a tile to finish adds up all slices in their order: either way results do not depend
// on timing. The meeting costs 2 us more, since a block's part has to reach the whole chip before the block can say so.
// (Slices could meet in a cluster instead, whose shared memory is closer; but clusters fill the chip badly: of sixteen
// clusters of sixteen blocks only fourteen run at once.)
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRing = 256;      // 16-byte words that a warp has under way, at most
constexpr int kMaxSegments = 3;
constexpr int kRounds = 4;      // inputs that a thread holds at once

// Room in a warp's list of rows, of which there is one in so many `readers`, each of an even share.
__host__ __device__ constexpr int room_of(int inputs, int readers) { return inputs / readers + 1; }

enum Selection {
  kAll = 0,       // every live row
  kNonzero = 1,   // rows with x_i != 0, and |x_i| * score_i >= threshold where a threshold is given
};
enum Epilogue {
  kWrite = 0,
  kAdd = 1,
  kAtomicAdd = 2,  // floats, in any order
  kFixedAdd = 3,   // every block adds its part to sums in fixed point
};

// Outputs [begin, begin + length) share a threshold; a tile never crosses a segment.
struct Segment {
  int begin;
  int length;
  int first_tile;
};

struct ColumnsArgs {
  const void* weight;
  const void* x;           // floats, or sums in fixed point
  const void* up;          // where given, as x is, x_i stands for act(x_i) * up_i
  const float* norm;       // RMSNorm weight, or null
  const float* squares;    // parts of the sum of x_i * x_i that the norm needs, or null to read all of x
  const float* score;      // [segments, inputs], or null for 1
  const float* threshold;  // [segments], or null
  const int* index;        // weight row of x_i, or null for row i
  const int* count;        // live inputs, or null for all
  const float* bias;       // or null
  const float* fill;       // [inputs], taken off the values that are kept, or null
  void* out;               // floats; sums under kFixedAdd
  float* partial;          // [tiles, slices, tile]: where slices meet
  int* arrived;            // [tiles], zeros between kernels
  Fixed* zero;             // [zeros]: set to zero for a later kernel, or null
  unsigned long long* read;  // [segments]: gain how many rows were read, or null
  int64_t stride;
  float epsilon;
  int inputs;
  int outputs;
  int slices;              // blocks that share a tile
  int segments;
  int activation;
  int epilogue;
  int squares_count;
  float scale;             // of the result, its bias included, before it is written or added
  int ahead;               // kNonzero: rows that a warp starts to read before it knows whether they are kept,
  int later;               // and under a norm so many more, once the inputs are on their way
  int fresh;               // index and count are made by this step, not before it
  int invert;              // keep what is below the threshold
  int keeps_nan;           // what is no number is among the largest: dropped is only what is below the threshold
  int fixed;               // x and up are sums in fixed point
  int zeros;
  Segment segment[kMaxSegments];
};

// GROUPS: how many times 256 columns a block owns; UP: whether `up` is given; E: what x and `up` are.
template <typename T, int SELECTION, int GROUPS, bool UP, typename E>
__global__ void __launch_bounds__(kThreads, 2) columns_kernel(const __grid_constant__ ColumnsArgs a) {
  constexpr int kTile = GROUPS * kSpan, kStage = GROUPS * 32, kDepth = kRing / kStage;  // kDepth: rows under way
  extern __shared__ float4 shared[];
  __shared__ float sums[32];
  __shared__ bool last;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(kFull, threadIdx.x >> 5, 0);  // known to be the warp's
  const int slice = blockIdx.x, slices = gridDim.x, tile = blockIdx.y;
  let_next_start();
  int owner = 0;
  while (owner + 1 < a.segments && tile >= a.segment[owner + 1].first_tile) ++owner;
  const int begin_column = a.segment[owner].begin + (tile - a.segment[owner].first_tile) * kTile;
  const int end_column = min(begin_column + kTile, a.segment[owner].begin + a.segment[owner].length);
  const uint4* const weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + begin_column) + lane;
  const uint32_t step = static_cast<uint32_t>(a.stride / kLane);  // from a row to the next, in 16-byte words

  if (a.fresh) wait_for_previous();
  const unsigned live = a.count ? min(__ldcg(a.count), a.inputs) : a.inputs;
  const unsigned reader = slice * kWarps + warp, readers = slices * kWarps;
  const int begin = live * reader / readers, length = live * (reader + 1) / readers - begin;
  uint4* const ring = reinterpret_cast<uint4*>(shared) + warp * kRing + lane;
  const int room = room_of(a.inputs, readers);
  float* const value = reinterpret_cast<float*>(shared + kWarps * kRing) + warp * room;
  uint32_t* const offset = reinterpret_cast<uint32_t*>(shared + kWarps * kRing) + (kWarps + warp) * room;

  auto row_of = [&](int item) { return static_cast<uint32_t>(a.index ? __ldcg(a.index + begin + item) : begin + item) * step; };
  auto copy_row = [&](uint32_t from, int stage) {
#pragma unroll
    for (int part = 0; part < GROUPS; ++part) {
      // A lane past the segment's end loads nothing; one that straddles it stays inside the padded row.
      const bool loads = begin_column + part * kSpan + lane * kLane < end_column;
      copy_weights(ring + stage * kStage + part * 32, weight + from + part * 32, loads);
    }
  };
  // The memory would idle until x is there. The first rows of a warp are read on the chance that they are kept; those
  // that turn out not to be stay in its list with a value of zero.
  const int early = SELECTION == kAll ? kDepth : min(a.ahead, kDepth);
  const int ahead = a.norm && !a.squares ? min(early + a.later, kDepth) : early, head = min(ahead, length);
  auto read_ahead = [&](int first, int end) {
#pragma unroll
    for (int stage = 0; stage < kDepth; ++stage) {
      if (stage < first || stage >= end) continue;
      if (stage < head) copy_row(row_of(stage), stage);
      end_group();
    }
  };
  read_ahead(0, early);
  constexpr int kOutputs = (kTile + kThreads - 1) / kThreads;  // that a thread writes, `kThreads` apart
  auto writes = [&](int i) { return threadIdx.x + i * kThreads < kTile && begin_column + threadIdx.x + i * kThreads < end_column; };
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs : nullptr;
  E x_of[kRounds], up_of[kRounds];
  float gain[kRounds], weigh[kRounds];
  auto load_constants = [&](int base) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * 32 + lane;
      gain[round] = a.norm && item < length ? a.norm[begin + item] : 0.0f;
      weigh[round] = score && item < length ? score[begin + item] : 1.0f;
    }
  };
  auto load_inputs = [&](int base) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * 32 + lane;
      x_of[round] = item < length ? __ldcg(static_cast<const E*>(a.x) + begin + item) : E{};
      if (UP) up_of[round] = item < length ? __ldcg(static_cast<const E*>(a.up) + begin + item) : E{};
    }
  };
  load_constants(0);
  wait_for_previous();

  // All loads are under way before the first value is used.
  load_inputs(0);
  const float threshold = a.threshold ? __ldcg(a.threshold + owner) : 0.0f;
  float* const out = static_cast<float*>(a.out) + begin_column + threadIdx.x;
  float before[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) before[i] = a.epilogue == kAdd && writes(i) ? __ldcg(out + i * kThreads) : 0.0f;
  float scale = 1.0f;
  if (a.norm) {
    float squares = 0.0f;
    if (a.squares) {  // every warp adds up all parts, which spares a barrier
      for (int base = lane; base < a.squares_count; base += 32) squares += __ldcg(a.squares + base);
      squares = sum_warp(squares);
    } else {
      squares = square_share(static_cast<const E*>(a.x), a.inputs);
      read_ahead(early, ahead);
      squares = sum_block(squares, sums);
    }
    scale = rsqrtf(squares / a.inputs + a.epsilon);
  }
  int total = 0;
  for (int base = 0; base < length; base += kRounds * 32) {
    if (base > 0) load_constants(base), load_inputs(base);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (base + round * 32 >= length) break;
      const int item = base + round * 32 + lane;
      float x = from_fixed(x_of[round]);
      if (a.norm) x *= gain[round] * scale;
      if (UP) x = activate(x, a.activation) * from_fixed(up_of[round]);
      bool keep = item < length;
      if (SELECTION == kNonzero) {
        keep = keep && x != 0.0f;
        if (a.threshold) {
          const float size = fabsf(x) * weigh[round];
          keep = keep && (size >= threshold || (a.keeps_nan && !(size < threshold))) != (a.invert != 0);
        }
        if (!keep) x = 0.0f;
        if (a.fill && keep) x -= a.fill[begin + item];
        keep = keep || item < head;
      }
      const unsigned kept = __ballot_sync(kFull, keep);
      if (keep) {
        const int here = total + __popc(kept & ((1u << lane) - 1));
        value[here] = x;
        offset[here] = row_of(item);
      }
      total += __popc(kept);
    }
  }
  __syncwarp();
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage) {
    if (stage < ahead) continue;
    if (stage < total) copy_row(offset[stage], stage);
    end_group();
  }
  // For a later kernel, which this moment does not wait for.
  for (int one = (tile * slices + slice) * kThreads + threadIdx.x; one < a.zeros; one += gridDim.y * slices * kThreads)
    a.zero[one] = 0;

  float sum[GROUPS][kLane] = {};
  for (int row = 0; row < total; row += kDepth) {
#pragma unroll
    for (int stage = 0; stage < kDepth; ++stage) {
      const int item = row + stage;
      if (item >= total) break;
      const float x = value[item];
      wait_until_pending<kDepth - 1>();
#pragma unroll
      for (int part = 0; part < GROUPS; ++part) {
        float w[kLane];
        unpack<T>(ring[stage * kStage + part * 32], w);
#pragma unroll
        for (int e = 0; e < kLane; ++e) sum[part][e] += x * w[e];
      }
      if (item + kDepth < total) copy_row(offset[item + kDepth], stage);
      end_group();
    }
  }
  if (a.read && tile == a.segment[owner].first_tile && lane == 0) atomicAdd(a.read + owner, static_cast<unsigned long long>(total));
  wait_until_pending<0>();
  __syncwarp();  // the ring of the whole warp has been read and now takes its sums
#pragma unroll
  for (int part = 0; part < GROUPS; ++part) {
    float4* const to = reinterpret_cast<float4*>(ring - lane) + part * 64 + lane * 2;
    to[0] = make_float4(sum[part][0], sum[part][1], sum[part][2], sum[part][3]);
    to[1] = make_float4(sum[part][4], sum[part][5], sum[part][6], sum[part][7]);
  }
  __syncthreads();
  float y[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int column_of = threadIdx.x + i * kThreads;
    y[i] = 0.0f;
    if (column_of >= kTile) continue;
#pragma unroll
    for (int other = 0; other < kWarps; ++other)
      y[i] += reinterpret_cast<const float*>(shared + other * kRing)[column_of];
  }
  const bool shares = a.epilogue == kAtomicAdd || a.epilogue == kFixedAdd;
  if (slices > 1 && !shares) {
    float* const sums_of_tile = a.partial + static_cast<int64_t>(tile) * slices * kTile + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      if (writes(i)) __stcg(sums_of_tile + slice * kTile + i * kThreads, y[i]);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();  // what the block wrote comes before its arrival
      last = atomicAdd(a.arrived + tile, 1) == slices - 1;
      if (last) a.arrived[tile] = 0;
      __threadfence();  // and what the others wrote, before what is read now
    }
    __syncthreads();
    if (!last) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      y[i] = 0.0f;
      if (!writes(i)) continue;
#pragma unroll 8
      for (int other = 0; other < slices; ++other) y[i] += __ldcg(sums_of_tile + other * kTile + i * kThreads);
    }
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    if (!writes(i)) continue;
    const int at = begin_column + threadIdx.x + i * kThreads;
    if (a.bias && (!shares || slice == 0)) y[i] += a.bias[at];
    y[i] *= a.scale;
    if (a.epilogue == kFixedAdd)
      add_fixed(static_cast<Fixed*>(a.out) + at, y[i]);
    else if (a.epilogue == kAtomicAdd)
      atomicAdd(out + i * kThreads, y[i]);
    else
      out[i * kThreads] = y[i] + before[i];
  }
}

inline size_t shared_bytes(int inputs, int readers) {
  return kWarps * (kRing * sizeof(uint4) + room_of(inputs, readers) * (sizeof(float) + sizeof(uint32_t)));
}

template <typename T, int SELECTION, int GROUPS, bool UP, typename E>
int launch_tile(const ColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  const size_t shared = shared_bytes(a.inputs, a.slices * kWarps);
  return launch(columns_kernel<T, SELECTION, GROUPS, UP, E>, a, dim3(a.slices, tiles), kThreads, shared, 1, dependent,
                stream);
}

template <typename T, int SELECTION, int GROUPS, typename E>
int launch_up(const ColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  return a.up ? launch_tile<T, SELECTION, GROUPS, true, E>(a, tiles, dependent, stream)
              : launch_tile<T, SELECTION, GROUPS, false, E>(a, tiles, dependent, stream);
}

template <typename T, int SELECTION, typename E>
int launch_selection(const ColumnsArgs& a, int groups, int tiles, bool dependent, cudaStream_t stream) {
  switch (groups) {
    case 1:
      return launch_up<T, SELECTION, 1, E>(a, tiles, dependent, stream);
    case 2:
      return launch_up<T, SELECTION, 2, E>(a, tiles, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
int launch_columns(const ColumnsArgs& a, int selection, int groups, int tiles, bool dependent, cudaStream_t stream) {
  if (selection == kAll && a.fixed) return cudaErrorInvalidValue;
  if (selection == kAll) return launch_selection<T, kAll, float>(a, groups, tiles, dependent, stream);
  return a.fixed ? launch_selection<T, kNonzero, Fixed>(a, groups, tiles, dependent, stream)
                 : launch_selection<T, kNonzero, float>(a, groups, tiles, dependent, stream);
}

}  // namespace actsparse

// groups: 1 or 2, for tiles of 256 or 512 columns; tiles: of all segments.
extern "C" int actsparse_columns(const actsparse::ColumnsArgs* args, int dtype, int selection, int groups, int tiles,
                                 int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return dtype == kBfloat16 ? launch_columns<__nv_bfloat16>(*args, selection, groups, tiles, dependent, queue)
                            : launch_columns<__half>(*args, selection, groups, tiles, dependent, queue);
}
