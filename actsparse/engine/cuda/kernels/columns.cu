// Products with weights stored input-major [inputs, outputs]: out = sum_i x_i W[i, :], reading only the rows kept.
//
// A block owns 256 to 1024 outputs and one slice of the inputs. It compacts its own slice of x (which rows to read, in
// order) and gathers those rows whole. Then it adds its part to sums in fixed point, or, where floats are wanted, the last
// block of a tile to finish adds up all slices in their order: either way results do not depend on timing. The meeting costs
// 2 us more, since a block's part has to reach the whole chip before the block can say so. (Slices could meet in a cluster instead, whose shared memory is closer; but clusters fill the chip
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
  int fixed;               // x and up are sums in fixed point
  int zeros;
  Segment segment[kMaxSegments];
};

// GROUPS: how many times 256 columns a block owns; UP: whether `up` is given; E: what x and `up` are.
template <typename T, int SELECTION, int GROUPS, bool UP, typename E>
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
  constexpr int kOutputs = (kTile + kThreads - 1) / kThreads;  // that a thread writes, `kThreads` apart
  auto writes = [&](int i) { return threadIdx.x + i * kThreads < kTile && begin_column + threadIdx.x + i * kThreads < end_column; };
  const float threshold = a.threshold ? a.threshold[owner] : 0.0f;
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs : nullptr;
  // A warp's inputs lie side by side, so that warps list theirs in order after one barrier.
  int rounds = min((length + kThreads - 1) / kThreads, kRounds);
  int first = warp * rounds * 32 + lane;
  float gain[kRounds];
  if (a.norm) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      gain[round] = round < rounds && first + round * 32 < length ? a.norm[begin + first + round * 32] : 0.0f;
  }
  wait_for_previous();

  // All loads are under way before the first value is used.
  E x_of[kRounds], up_of[kRounds];
  auto load_inputs = [&]() {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const bool inside = round < rounds && first + round * 32 < length;
      const int from = begin + first + round * 32;
      x_of[round] = inside ? __ldcg(static_cast<const E*>(a.x) + from) : E{};
      if (UP) up_of[round] = inside ? __ldcg(static_cast<const E*>(a.up) + from) : E{};
    }
  };
  load_inputs();
  float* const out = static_cast<float*>(a.out) + begin_column + threadIdx.x;
  float before[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) before[i] = a.epilogue == kAdd && writes(i) ? __ldcg(out + i * kThreads) : 0.0f;
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
      squares = sum_block(square_share(static_cast<const E*>(a.x), a.inputs), sums);
    }
    scale = rsqrtf(squares / a.inputs + a.epsilon);
  }
  for (int one = (tile * slices + slice) * kThreads + threadIdx.x; one < a.zeros; one += gridDim.y * slices * kThreads)
    a.zero[one] = 0;
  int listed = 0;
  for (int base = 0;;) {
    unsigned kept[kRounds];
    float held[kRounds];
    int found = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round >= rounds) break;
      const int item = first + round * 32;
      float x = from_fixed(x_of[round]);
      if (a.norm) x *= gain[round] * scale;
      if (UP) x = activate(x, a.activation) * from_fixed(up_of[round]);
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
        if (round < rounds && first + round * 32 < length) gain[round] = a.norm[begin + first + round * 32];
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
  float y[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int column_of = threadIdx.x + i * kThreads;
    y[i] = 0.0f;
    if (column_of >= kTile) continue;
    const float* const part =
        reinterpret_cast<const float*>(shared + column_of / kSpan * (kRows / 2) * kRing) + column_of % kSpan;
#pragma unroll
    for (int other = 0; other < kRows / 2; ++other) y[i] += part[other * kRing * 4];
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

inline size_t shared_bytes(int inputs, int slices) {
  const size_t room = (inputs / slices + 4) & ~1;
  return kWarps * kRing * sizeof(uint4) + room * (sizeof(float) + sizeof(uint32_t));
}

template <typename T, int SELECTION, int GROUPS, bool UP, typename E>
int launch_tile(const ColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  const size_t shared = shared_bytes(a.inputs, a.slices);
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
    case 4:
      return launch_up<T, SELECTION, 4, E>(a, tiles, dependent, stream);
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

// groups: 1, 2 or 4, for tiles of 256, 512 or 1024 columns; tiles: of all segments.
extern "C" int actsparse_columns(const actsparse::ColumnsArgs* args, int dtype, int selection, int groups, int tiles,
                                 int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return dtype == kBfloat16 ? launch_columns<__nv_bfloat16>(*args, selection, groups, tiles, dependent, queue)
                            : launch_columns<__half>(*args, selection, groups, tiles, dependent, queue);
}
