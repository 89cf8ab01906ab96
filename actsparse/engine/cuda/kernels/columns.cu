// Products with weights stored input-major [inputs, outputs]: out = sum_i x_i W[i, :], reading only the rows kept.
//
// A block owns 256 outputs and one slice of the inputs. It compacts its own slice of x (which rows to read, in order),
// gathers those rows whole, and the slices of a tile meet in a cluster: every block pushes its partial sums into the
// shared memory of the block that owns their columns, which adds them in slice order. Results do not depend on timing, and
// no scratch has to be cleared. Between the wait for the previous kernel and the first row every instruction counts:
// nothing else runs on the chip then.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = kSpan;  // a thread per output of the tile
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSegments = 3;
constexpr int kMaxSlices = 16;  // of a cluster
constexpr int kRounds = 4;      // inputs that a thread looks at between two barriers
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
  int ahead;               // kNonzero: rows that a warp starts to read before it knows whether they are kept
  int fresh;               // index and count are made by this step, not before it
  int invert;              // keep what is below the threshold
  Segment segment[kMaxSegments];
};

// DEPTH: rows that a warp has under way, 512 bytes of each.
template <typename T, int SELECTION, int DEPTH>
__global__ void __launch_bounds__(kThreads, 5) columns_kernel(const __grid_constant__ ColumnsArgs a) {
  extern __shared__ float4 shared[];
  __shared__ float sums[32];
  __shared__ int counts[kWarps];
  __shared__ float inbox[kSpan + kMaxSlices];
  __shared__ uint64_t mailbox;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  int owner = 0;
  while (owner + 1 < a.segments && tile >= a.segment[owner + 1].first_tile) ++owner;
  const Segment segment = a.segment[owner];
  const int begin_column = segment.begin + (tile - segment.first_tile) * kSpan;
  const int end_column = min(begin_column + kSpan, segment.begin + segment.length);
  const int column = begin_column + lane * kLane;
  // A lane past the segment's end loads nothing; one that straddles it stays inside the padded row.
  const bool loads = column < end_column;
  const uint4* const weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + column);
  const uint32_t step = static_cast<uint32_t>(a.stride / kLane);  // from a row to the next, in 16-byte words
  let_next_start();
  const bool meets = a.slices > 1 && a.epilogue != kAtomicAdd;
  const int from = meets ? kSpan * slice / a.slices : 0, to = meets ? kSpan * (slice + 1) / a.slices : kSpan;
  if (meets) open_mailbox(&mailbox, (to - from) * a.slices * static_cast<int>(sizeof(float)));

  if (a.fresh) wait_for_previous();
  const int live = a.count ? min(*a.count, a.inputs) : a.inputs;
  const int begin = static_cast<int64_t>(live) * slice / a.slices;
  const int length = static_cast<int>(static_cast<int64_t>(live) * (slice + 1) / a.slices) - begin;
  constexpr int kRing = DEPTH * 32;  // 16-byte words that a warp owns
  uint4* const ring = reinterpret_cast<uint4*>(shared) + warp * kRing + lane;
  float* const value = reinterpret_cast<float*>(shared + kWarps * kRing);                  // [slice]
  uint32_t* const offset = reinterpret_cast<uint32_t*>(value + (a.inputs / a.slices + 1));  // [slice]

  int total = length;
  auto row_of = [&](int item) { return static_cast<uint32_t>(a.index ? a.index[begin + item] : begin + item); };
  auto copy = [&](int item, int stage) {
    if (item < total) {
      const uint32_t at = SELECTION == kNonzero || a.index ? offset[item] : (begin + item) * step;
      copy_weights(ring + stage * 32, weight + at, loads);
    }
    end_group();
  };
  if (SELECTION == kAll) {
    if (a.index) {
      for (int item = threadIdx.x; item < length; item += kThreads) offset[item] = row_of(item) * step;
      __syncthreads();
    }
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) copy(warp + stage * kWarps, stage);
  }
  // The memory would idle until x is there. The first rows of the slice are read on the chance that they are kept; those
  // that turn out not to be stay in the list with a value of zero.
  const int ahead = SELECTION == kNonzero ? min(a.ahead, DEPTH) : 0;
  const int head = min(ahead * kWarps, length);
  if (SELECTION == kNonzero) {
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) {
      if (stage >= ahead) break;
      const int item = warp + stage * kWarps;
      if (item < length) copy_weights(ring + stage * 32, weight + row_of(item) * step, loads);
      end_group();
    }
  }
  const int at = begin_column + from + threadIdx.x;  // the output that this thread writes
  const bool writes = threadIdx.x < to - from && at < end_column;
  const float bias = writes && a.bias && (a.epilogue != kAtomicAdd || slice == 0) ? a.bias[at] : 0.0f;
  const float threshold = a.threshold ? a.threshold[owner] : 0.0f;
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs + begin : nullptr;

  // Inputs in turns of `kRounds` a thread: a warp's lie side by side, so that warps list theirs after one barrier.
  float gain[kRounds], weighs[kRounds];
  auto first_of = [&](int base) { return base + warp * ((min(length - base, kTurn) + kThreads - 1) / kThreads * 32) + lane; };
  auto rounds_of = [&](int base) { return (min(length - base, kTurn) + kThreads - 1) / kThreads; };
  auto load_weights_of_inputs = [&](int base) {
    const int first = first_of(base), rounds = rounds_of(base);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = first + round * 32;
      const bool inside = round < rounds && item < length;
      gain[round] = a.norm && inside ? a.norm[begin + item] : 1.0f;
      if (SELECTION == kNonzero) weighs[round] = score && inside ? score[item] : 1.0f;
    }
  };
  load_weights_of_inputs(0);
  wait_for_previous();

  const float before = writes && a.epilogue == kAdd ? __ldcg(a.out + at) : 0.0f;
  float held[kRounds], up[kRounds];
  auto load_inputs = [&](int base) {
    const int first = first_of(base), rounds = rounds_of(base);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = first + round * 32;
      const bool inside = round < rounds && item < length;
      held[round] = inside ? __ldcg(a.x + begin + item) : 0.0f;
      up[round] = inside && a.up ? __ldcg(a.up + begin + item) : 0.0f;
    }
  };
  load_inputs(0);
  float scale = 1.0f;
  if (a.norm) {
    float squares = 0.0f;
    if (a.squares) {  // every warp adds up all parts, which spares a barrier
      for (int base = lane; base < a.squares_count; base += 8 * 32) {
#pragma unroll
        for (int part = 0; part < 8; ++part)
          squares += base + part * 32 < a.squares_count ? __ldcg(a.squares + base + part * 32) : 0.0f;
      }
      squares = sum_warp(squares);
    } else {
      const int quads = a.inputs / 4;
      for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(a.x) + quad);
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
      }
      for (int left = quads * 4 + threadIdx.x; left < a.inputs; left += kThreads) {
        const float x = __ldcg(a.x + left);
        squares += x * x;
      }
      squares = sum_block(squares, sums);
    }
    scale = rsqrtf(squares / a.inputs + a.epsilon);
  }
  int listed = 0;
  for (int base = 0; base < length; base += kTurn) {
    if (base > 0) {
      load_weights_of_inputs(base);
      load_inputs(base);
    }
    const int first = first_of(base), rounds = rounds_of(base);
    unsigned kept[kRounds];
    int found = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round >= rounds) break;
      const int item = first + round * 32;
      float x = held[round];
      if (a.up) x = activate(x, a.activation) * up[round];
      x *= gain[round] * scale;
      if (SELECTION == kAll) {
        if (item < length) value[item] = x;
        continue;
      }
      bool keep = item < length && x != 0.0f;
      if (keep && a.threshold) keep = (fabsf(x) * weighs[round] >= threshold) != (a.invert != 0);
      held[round] = keep ? (a.fill ? x - a.fill[begin + item] : x) : 0.0f;
      kept[round] = __ballot_sync(kFull, keep || item < head);
      found += __popc(kept[round]);
    }
    if (SELECTION == kAll) continue;
    if (base > 0) __syncthreads();  // the counts of the last turn have been read
    if (lane == 0) counts[warp] = found;
    __syncthreads();
    int place = listed;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const int count = counts[other];
      if (other < warp) place += count;
      listed += count;
    }
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
  if (SELECTION == kNonzero) total = listed;
  __syncthreads();
  if (SELECTION == kNonzero) {
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage)
      if (stage >= ahead) copy(warp + stage * kWarps, stage);
  }

  float sum[kLane] = {};
  for (int first = warp; first < total; first += kWarps * DEPTH) {
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) {
      const int item = first + stage * kWarps;
      if (item >= total) break;
      const float x = value[item];
      wait_until_pending<DEPTH - 1>();
      float w[kLane];
      unpack<T>(ring[stage * 32], w);
#pragma unroll
      for (int e = 0; e < kLane; ++e) sum[e] += x * w[e];
      copy(item + DEPTH * kWarps, stage);
    }
  }
  wait_until_pending<0>();
  __syncwarp();  // the ring of the whole warp has been read and now takes its sums
  float4* const mine = reinterpret_cast<float4*>(ring - lane) + lane * 2;
  mine[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  mine[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  float y = 0.0f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other)
    y += reinterpret_cast<const float*>(shared + other * kRing)[threadIdx.x];
  if (meets) {
    const int most = kSpan / a.slices + 1;
    const int owner_slice = ((threadIdx.x + 1) * a.slices - 1) / kSpan;
    const int place = threadIdx.x - kSpan * owner_slice / a.slices;
    await_blocks();
    push(y, inbox + slice * most + place, &mailbox, owner_slice);
    await_mail(&mailbox);
    y = 0.0f;
    if (threadIdx.x < to - from) {
#pragma unroll 4
      for (int other = 0; other < a.slices; ++other) y += inbox[other * most + threadIdx.x];
    }
  }
  if (writes) {
    y = (y + bias) * a.scale;
    if (a.epilogue == kAtomicAdd) {
      atomicAdd(a.out + at, y);
    } else {
      y += before;
      a.out[at] = y;
    }
  }
  if (a.squares_out) {
    float squares = writes ? y * y : 0.0f;
    if (to - from > 32)
      squares = sum_block(squares, sums);
    else if (warp == 0)
      squares = sum_warp(squares);
    if (threadIdx.x == 0) a.squares_out[blockIdx.x] = squares;
  }
}

template <typename T, int SELECTION, int DEPTH>
int launch_depth(const ColumnsArgs& a, bool dependent, cudaStream_t stream) {
  int tiles = 0;
  for (int s = 0; s < a.segments; ++s) tiles += (a.segment[s].length + kSpan - 1) / kSpan;
  const size_t slice = a.inputs / a.slices + 1;
  const size_t shared = kWarps * DEPTH * 32 * sizeof(uint4) + slice * (sizeof(float) + sizeof(int));
  const int cluster = a.epilogue == kAtomicAdd ? 1 : a.slices;
  if (cluster > kMaxSlices || (a.squares_out && a.epilogue == kAtomicAdd)) return cudaErrorInvalidValue;
  return launch(columns_kernel<T, SELECTION, DEPTH>, a, tiles * a.slices, kThreads, shared, cluster, dependent, stream);
}

template <typename T, int SELECTION>
int launch_selection(const ColumnsArgs& a, int depth, bool dependent, cudaStream_t stream) {
  switch (depth) {
    case 8:
      return launch_depth<T, SELECTION, 8>(a, dependent, stream);
    case 12:
      return launch_depth<T, SELECTION, 12>(a, dependent, stream);
    case 16:
      return launch_depth<T, SELECTION, 16>(a, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
int launch_columns(const ColumnsArgs& a, int selection, int depth, bool dependent, cudaStream_t stream) {
  return selection == kAll ? launch_selection<T, kAll>(a, depth, dependent, stream)
                           : launch_selection<T, kNonzero>(a, depth, dependent, stream);
}

}  // namespace actsparse

extern "C" int actsparse_columns(const actsparse::ColumnsArgs* args, int dtype, int selection, int depth, int dependent,
                                 void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return dtype == kBfloat16 ? launch_columns<__nv_bfloat16>(*args, selection, depth, dependent, queue)
                            : launch_columns<__half>(*args, selection, depth, dependent, queue);
}
