// Products with weights stored input-major [inputs, outputs]: out = sum_i x_i W[i, :], reading only the rows kept.
//
// A block owns 256 or 512 outputs and one slice of the inputs. It compacts its own slice of x (which rows to read, in
// order) and gathers those rows whole; the last block of a tile to finish adds up all slices in their order, so results do
// not depend on timing. (Slices could meet in a cluster instead, whose shared memory is closer; but clusters fill the chip
// badly: of sixteen clusters of sixteen blocks only fourteen run at once.) Between the wait for the previous kernel and the
// first row, and after the last one, nothing else runs on the chip: every instruction there counts, and wide tiles mean that
// fewer blocks look at the same inputs.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 4;           // pairs of rows that a warp has under way, 512 bytes of each row
constexpr int kRing = kDepth * 64;  // 16-byte words that a warp owns
constexpr int kMaxSegments = 3;
constexpr int kRounds = 3;      // inputs that a thread looks at between two barriers
constexpr int kTurn = kRounds * kThreads;

enum Selection {
  kAll = 0,       // every live row
  kNonzero = 1,   // rows with x_i != 0, and |x_i| * score_i >= threshold where a threshold is given
};
enum Epilogue { kWrite = 0, kAdd = 1, kAtomicAdd = 2 };

// Outputs [begin, begin + length) share a threshold; a tile never crosses a segment.
struct Segment {
  int begin;
  int length;
  int first_tile;
};

struct ColumnsArgs {
  const void* weight;
  const float* x;
  const float* up;         // where given, x_i stands for act(x_i) * up_i
  const float* norm;       // RMSNorm weight, or null
  const float* squares;    // parts of the sum of x_i * x_i that the norm needs, or null to read all of x
  const float* score;      // [segments, inputs], or null for 1
  const float* threshold;  // [segments], or null
  const int* index;        // weight row of x_i, or null for row i
  const int* count;        // live inputs, or null for all
  const float* bias;       // or null
  const float* fill;       // [inputs], taken off the values that are kept, or null
  float* out;
  float* partial;          // [tiles, slices, tile]: where slices meet
  int* arrived;            // [tiles], zeros between kernels
  float* squares_out;      // one part of the sum of out * out per block, or null
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
  int ahead;               // kNonzero: pairs of rows that a warp starts to read before it knows whether they are kept
  int fresh;               // index and count are made by this step, not before it
  int invert;              // keep what is below the threshold
  Segment segment[kMaxSegments];
};

// GROUPS: tiles of 256 columns side by side in a block; UP: whether `up` is given.
template <typename T, int SELECTION, int GROUPS, bool UP>
__global__ void __launch_bounds__(kThreads, 2) columns_kernel(const __grid_constant__ ColumnsArgs a) {
  constexpr int kTile = GROUPS * kSpan, kRows = 2 * kWarps / GROUPS;  // columns of the block, rows that it reads at once
  extern __shared__ float4 shared[];
  __shared__ float sums[32];
  __shared__ int counts[kWarps];
  __shared__ bool last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first_row = 2 * (warp % (kRows / 2)), slice = blockIdx.x, slices = gridDim.x, tile = blockIdx.y;
  let_next_start();
  int owner = 0;
  while (owner + 1 < a.segments && tile >= a.segment[owner + 1].first_tile) ++owner;
  const int begin_column = a.segment[owner].begin + (tile - a.segment[owner].first_tile) * kTile;
  const int end_column = min(begin_column + kTile, a.segment[owner].begin + a.segment[owner].length);
  // A lane past the segment's end loads nothing; one that straddles it stays inside the padded row.
  const int column = begin_column + warp / (kRows / 2) * kSpan + lane * kLane;
  const bool loads = column < end_column;
  const uint4* const weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + column);
  const uint32_t step = static_cast<uint32_t>(a.stride / kLane);  // from a row to the next, in 16-byte words

  if (a.fresh) wait_for_previous();
  const unsigned live = a.count ? min(*a.count, a.inputs) : a.inputs;
  const int begin = live * slice / slices, length = live * (slice + 1) / slices - begin;
  uint4* const ring = reinterpret_cast<uint4*>(shared) + warp * kRing + lane;
  const int room = (a.inputs / slices + 4) & ~1;
  float* const value = reinterpret_cast<float*>(shared + kWarps * kRing);  // [room]
  uint32_t* const offset = reinterpret_cast<uint32_t*>(value + room);      // [room]

  int total = length;
  auto row_of = [&](int item) { return static_cast<uint32_t>(a.index ? a.index[begin + item] : begin + item); };
  auto copy = [&](int item, int stage) {
    if (item < total) {  // the second of a pair may not be there: zeros stand for it
      const uint2 from = *reinterpret_cast<const uint2*>(offset + item);
      copy_weights(ring + stage * 64, weight + from.x, loads);
      copy_weights(ring + stage * 64 + 32, weight + from.y, loads && item + 1 < total);
    }
    end_group();
  };
  // The memory would idle until x is there. The first rows of the slice are read on the chance that they are kept; those
  // that turn out not to be stay in the list with a value of zero.
  const int ahead = SELECTION == kAll ? kDepth : min(a.ahead, kDepth);
  const int head = min(ahead * kRows, length);
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage) {
    if (stage < ahead) {
      const int item = first_row + stage * kRows;
      if (item < head) {
        const bool both = item + 1 < head;
        copy_weights(ring + stage * 64, weight + row_of(item) * step, loads);
        copy_weights(ring + stage * 64 + 32, weight + row_of(both ? item + 1 : item) * step, loads && both);
      }
      end_group();
    }
  }
  const int at = begin_column + threadIdx.x;  // the output that this thread writes
  const bool writes = threadIdx.x < kTile && at < end_column;
  const float threshold = a.threshold ? a.threshold[owner] : 0.0f;
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs : nullptr;
  // A warp's inputs lie side by side, so that warps list theirs in order after one barrier.
  int rounds = min((length + kThreads - 1) / kThreads, kRounds);
  int first = warp * rounds * 32 + lane;
  float gain[kRounds];
  if (a.norm) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      if (round < rounds) gain[round] = first + round * 32 < length ? a.norm[begin + first + round * 32] : 0.0f;
  }
  wait_for_previous();

  float held[kRounds], up[kRounds];
  auto load_inputs = [&]() {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round >= rounds) break;
      const bool inside = first + round * 32 < length;
      const int from = begin + first + round * 32;
      held[round] = inside ? __ldcg(a.x + from) : 0.0f;
      if (UP) up[round] = inside ? __ldcg(a.up + from) : 0.0f;
    }
  };
  load_inputs();
  const float before = writes && a.epilogue == kAdd ? __ldcg(a.out + at) : 0.0f;
  float scale = 1.0f;
  if (a.norm) {
    float squares = 0.0f;
    if (a.squares) {  // every warp adds up all parts, which spares a barrier
      for (int base = lane; base < a.squares_count; base += 8 * 32) {
#pragma unroll
        for (int part = 0; part < 8; ++part)
          if (base + part * 32 < a.squares_count) squares += __ldcg(a.squares + base + part * 32);
      }
      squares = sum_warp(squares);
    } else {
      for (int input = threadIdx.x; input < a.inputs; input += kThreads) {
        const float x = __ldcg(a.x + input);
        squares += x * x;
      }
      squares = sum_block(squares, sums);
    }
    scale = rsqrtf(squares / a.inputs + a.epsilon);
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      if (round < rounds) held[round] *= gain[round] * scale;
  }
  int listed = 0;
  for (int base = 0;;) {
    unsigned kept[kRounds];
    int found = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round >= rounds) break;
      const int item = first + round * 32;
      float x = held[round];
      if (UP) x = activate(x, a.activation) * up[round];
      if (SELECTION == kNonzero) {
        bool keep = x != 0.0f;
        if (a.threshold) {
          float size = fabsf(x);
          if (score && item < length) size *= score[begin + item];
          keep = keep && (size >= threshold) != (a.invert != 0);
        }
        if (!keep) x = 0.0f;
        if (a.fill && keep) x -= a.fill[begin + item];
        kept[round] = __ballot_sync(kFull, keep || item < head);
        found += __popc(kept[round]);
        held[round] = x;
      } else if (item < length) {
        value[item] = x;
        offset[item] = row_of(item) * step;
      }
    }
    if (SELECTION == kNonzero) {
      if (lane == 0) counts[warp] = found;
      __syncthreads();
      const int count = counts[lane % kWarps];
      int place = listed + __reduce_add_sync(kFull, lane < warp ? count : 0);
      listed += __reduce_add_sync(kFull, lane < kWarps ? count : 0);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        if (round >= rounds) break;
        if (kept[round] >> lane & 1) {
          const int here = place + __popc(kept[round] & ((1u << lane) - 1));
          value[here] = held[round];
          offset[here] = row_of(first + round * 32) * step;
        }
        place += __popc(kept[round]);
      }
    }
    // Slices of more than `kTurn` inputs, which are rare, take several turns.
    base += kTurn;
    if (base >= length) break;
    rounds = min((length - base + kThreads - 1) / kThreads, kRounds);
    first = base + warp * rounds * 32 + lane;
    load_inputs();
    if (a.norm) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round)
        if (round < rounds && first + round * 32 < length) held[round] *= a.norm[begin + first + round * 32] * scale;
    }
    __syncthreads();  // the counts of the last turn have been read
  }
  if (SELECTION == kNonzero) total = listed;
  if (threadIdx.x == 0) value[total] = 0.0f, offset[total] = 0;
  __syncthreads();
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage)
    if (stage >= ahead) copy(first_row + stage * kRows, stage);

  float sum[kLane] = {};
  for (int row = first_row; row < total; row += kRows * kDepth) {
#pragma unroll
    for (int stage = 0; stage < kDepth; ++stage) {
      const int item = row + stage * kRows;
      if (item >= total) break;
      const float2 x = *reinterpret_cast<const float2*>(value + item);
      wait_until_pending<kDepth - 1>();
      float w[kLane], v[kLane];
      unpack<T>(ring[stage * 64], w);
      unpack<T>(ring[stage * 64 + 32], v);
#pragma unroll
      for (int e = 0; e < kLane; ++e) sum[e] += x.x * w[e] + x.y * v[e];
      copy(item + kDepth * kRows, stage);
    }
  }
  wait_until_pending<0>();
  __syncwarp();  // the ring of the whole warp has been read and now takes its sums
  float4* const sums_of_warp = reinterpret_cast<float4*>(ring - lane) + lane * 2;
  sums_of_warp[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  sums_of_warp[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  float y = 0.0f;
  if (threadIdx.x < kTile) {
    const float* const part =
        reinterpret_cast<const float*>(shared + threadIdx.x / kSpan * (kRows / 2) * kRing) + threadIdx.x % kSpan;
#pragma unroll
    for (int other = 0; other < kRows / 2; ++other) y += part[other * kRing * 4];
  }
  if (slices > 1 && a.epilogue != kAtomicAdd) {
    float* const sums_of_tile = a.partial + static_cast<int64_t>(tile) * slices * kTile;
    if (threadIdx.x < kTile) __stcg(sums_of_tile + slice * kTile + threadIdx.x, y);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();  // what the block wrote comes before its arrival
      last = atomicAdd(a.arrived + tile, 1) == slices - 1;
      if (last) a.arrived[tile] = 0;
      __threadfence();  // and what the others wrote, before what is read now
    }
    __syncthreads();
    if (!last) return;
    y = 0.0f;
    if (threadIdx.x < kTile) {
#pragma unroll 8
      for (int other = 0; other < slices; ++other) y += __ldcg(sums_of_tile + other * kTile + threadIdx.x);
    }
  }
  if (writes) {
    if (a.bias && (a.epilogue != kAtomicAdd || slice == 0)) y += a.bias[at];
    y *= a.scale;
    if (a.epilogue == kAtomicAdd) {
      atomicAdd(a.out + at, y);
    } else {
      y += before;
      a.out[at] = y;
    }
  }
  if (a.squares_out) {  // a part per warp of the tile
    const float squares = sum_warp(writes ? y * y : 0.0f);
    if (lane == 0 && warp < kTile / 32) a.squares_out[tile * (kTile / 32) + warp] = squares;
  }
}

inline size_t shared_bytes(int inputs, int slices) {
  const size_t room = (inputs / slices + 4) & ~1;
  return kWarps * kRing * sizeof(uint4) + room * (sizeof(float) + sizeof(uint32_t));
}

template <typename T, int SELECTION, int GROUPS, bool UP>
int launch_tile(const ColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  const size_t shared = shared_bytes(a.inputs, a.slices);
  if (a.squares_out && a.epilogue == kAtomicAdd) return cudaErrorInvalidValue;
  return launch(columns_kernel<T, SELECTION, GROUPS, UP>, a, dim3(a.slices, tiles), kThreads, shared, 1, dependent,
                stream);
}

template <typename T, int SELECTION>
int launch_selection(const ColumnsArgs& a, int groups, int tiles, bool dependent, cudaStream_t stream) {
  if (groups == 2)
    return a.up ? launch_tile<T, SELECTION, 2, true>(a, tiles, dependent, stream)
                : launch_tile<T, SELECTION, 2, false>(a, tiles, dependent, stream);
  return a.up ? launch_tile<T, SELECTION, 1, true>(a, tiles, dependent, stream)
              : launch_tile<T, SELECTION, 1, false>(a, tiles, dependent, stream);
}

template <typename T>
int launch_columns(const ColumnsArgs& a, int selection, int groups, int tiles, bool dependent, cudaStream_t stream) {
  return selection == kAll ? launch_selection<T, kAll>(a, groups, tiles, dependent, stream)
                           : launch_selection<T, kNonzero>(a, groups, tiles, dependent, stream);
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
