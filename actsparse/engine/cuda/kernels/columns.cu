// Products with weights stored input-major [inputs, outputs]: out = sum_i x_i W[i, :], reading only the rows kept.
//
// A block owns 256 outputs and one slice of the inputs. It compacts its own slice of x (which rows to read, in order),
// gathers those rows whole, and the slices of a tile meet in a cluster: every block pushes its partial sums into the
// shared memory of the block that owns their columns, which adds them in slice order. Results do not depend on timing, and
// no scratch has to be cleared.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = kSpan;  // a thread per output of the tile
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSegments = 3;
constexpr int kMaxSlices = 16;  // of a cluster
constexpr int kRounds = 4;      // inputs that a thread looks at between two barriers

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
  Segment segment[kMaxSegments];
};

// DEPTH: rows that a warp has under way, 512 bytes of each.
template <typename T, int SELECTION, int DEPTH>
__global__ void __launch_bounds__(kThreads, 5) columns_kernel(const __grid_constant__ ColumnsArgs a) {
  extern __shared__ float4 shared[];
  __shared__ float sums[32];
  __shared__ int counts[kRounds][kWarps];
  __shared__ float inbox[kSpan + kMaxSlices];
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
  const T* const weight = static_cast<const T*>(a.weight) + column;
  let_next_start();
  cg::cluster_group cluster = cg::this_cluster();
  const bool meets = a.slices > 1 && a.epilogue != kAtomicAdd;
  if (meets) cluster.barrier_arrive();  // waited for before the first push: every block must have started

  if (a.fresh) wait_for_previous();
  const int live = a.count ? min(*a.count, a.inputs) : a.inputs;
  const int begin = static_cast<int64_t>(live) * slice / a.slices;
  const int length = static_cast<int>(static_cast<int64_t>(live) * (slice + 1) / a.slices) - begin;
  constexpr int kRing = DEPTH * 32;  // 16-byte words that a warp owns
  uint4* const ring = reinterpret_cast<uint4*>(shared) + warp * kRing;
  float* const value = reinterpret_cast<float*>(shared + kWarps * kRing);       // [slice]
  int* const row = reinterpret_cast<int*>(value + (a.inputs / a.slices + 1));  // [slice]

  int total = length;
  auto place_of = [&](int item) -> int64_t {
    return SELECTION == kNonzero || a.index ? row[item] : begin + item;
  };
  auto copy = [&](int item, int stage) {
    if (item < total) copy_weights(ring + stage * 32 + lane, weight + place_of(item) * a.stride, loads);
    end_group();
  };
  if (SELECTION == kAll) {
    if (a.index) {
      for (int item = threadIdx.x; item < length; item += kThreads) row[item] = a.index[begin + item];
      __syncthreads();
    }
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) copy(warp + stage * kWarps, stage);
  }
  // The memory would idle until x is there. The first rows of the slice are read on the chance that they are kept; those
  // that turn out not to be stay in the list with a value of zero and are passed over.
  const int ahead = SELECTION == kNonzero ? min(a.ahead, DEPTH) : 0;
  const int head = min(ahead * kWarps, length);
  if (SELECTION == kNonzero) {
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) {
      if (stage >= ahead) break;
      const int item = warp + stage * kWarps;
      const int64_t from = item < length ? (a.index ? a.index[begin + item] : begin + item) : 0;
      if (item < length) copy_weights(ring + stage * 32 + lane, weight + from * a.stride, loads);
      end_group();
    }
  }
  const float threshold = a.threshold ? a.threshold[owner] : 0.0f;
  float gain[kRounds];
  auto load_gains = [&](int base) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * kThreads + threadIdx.x;
      gain[round] = a.norm && item < length ? a.norm[begin + item] : 1.0f;
    }
  };
  load_gains(0);
  wait_for_previous();

  float held[kRounds];  // all loads of a few rounds are under way before one is used
  auto load_inputs = [&](int base) {
    float up[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * kThreads + threadIdx.x;
      held[round] = up[round] = 0.0f;
      if (item < length) {
        held[round] = __ldcg(a.x + begin + item);
        if (a.up) up[round] = __ldcg(a.up + begin + item);
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (a.up) held[round] = activate(held[round], a.activation) * up[round];
      held[round] *= gain[round];
    }
  };
  load_inputs(0);
  float scale = 1.0f;
  if (a.norm) {
    float squares = 0.0f;
    if (a.squares) {
      for (int at = threadIdx.x; at < a.squares_count; at += kThreads) squares += __ldcg(a.squares + at);
    } else {
      const int quads = a.inputs / 4;
      for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(a.x) + quad);
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
      }
      for (int at = quads * 4 + threadIdx.x; at < a.inputs; at += kThreads) {
        const float x = __ldcg(a.x + at);
        squares += x * x;
      }
    }
    scale = rsqrtf(sum_block(squares, sums) / a.inputs + a.epsilon);
  }
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs + begin : nullptr;
  int listed = 0;
  for (int base = 0; base < length; base += kRounds * kThreads) {
    if (base > 0) {
      __syncthreads();
      load_gains(base);
      load_inputs(base);
    }
    unsigned kept[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * kThreads + threadIdx.x;
      held[round] *= scale;
      if (SELECTION == kAll) {
        if (item < length) value[item] = held[round];
        continue;
      }
      bool keep = item < length && held[round] != 0.0f;
      if (keep && a.threshold) keep = fabsf(held[round]) * (score ? score[item] : 1.0f) >= threshold;
      if (!keep) held[round] = 0.0f;
      kept[round] = __ballot_sync(kFull, keep || item < head);
      if (lane == 0) counts[round][warp] = __popc(kept[round]);
    }
    if (SELECTION == kAll) continue;
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int count = lane < kWarps ? counts[round][lane] : 0;
      int before = count;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const int left = __shfl_up_sync(kFull, before, step);
        if (lane >= step) before += left;
      }
      const int place = listed + __shfl_sync(kFull, before - count, warp) + __popc(kept[round] & ((1u << lane) - 1));
      listed += __shfl_sync(kFull, before, 31);
      if (kept[round] >> lane & 1) {
        const int item = base + round * kThreads + threadIdx.x;
        value[place] = held[round];
        row[place] = a.index ? a.index[begin + item] : begin + item;
      }
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
  int stage = 0;
#pragma unroll 4
  for (int item = warp; item < total; item += kWarps) {
    const float x = value[item];
    wait_until_pending<DEPTH - 1>();
    if (SELECTION == kAll || x != 0.0f) {
      float w[kLane];
      unpack<T>(ring[stage * 32 + lane], w);
#pragma unroll
      for (int e = 0; e < kLane; ++e) sum[e] += x * w[e];
    }
    copy(item + DEPTH * kWarps, stage);
    stage = stage + 1 == DEPTH ? 0 : stage + 1;
  }
  __syncwarp();  // the ring of the whole warp has been read and now takes its sums
  float4* const mine = reinterpret_cast<float4*>(ring) + lane * 2;
  mine[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  mine[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  float y = 0.0f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other)
    y += reinterpret_cast<const float*>(shared + other * kRing)[threadIdx.x];
  int from = 0, to = kSpan;
  if (meets) {
    const int most = kSpan / a.slices + 1;
    cluster.barrier_wait();
    const int owner_slice = ((threadIdx.x + 1) * a.slices - 1) / kSpan;
    const int place = threadIdx.x - kSpan * owner_slice / a.slices;
    cluster.map_shared_rank(inbox, owner_slice)[slice * most + place] = y;
    cluster.sync();
    from = kSpan * slice / a.slices, to = kSpan * (slice + 1) / a.slices;
    y = 0.0f;
    if (threadIdx.x < to - from) {
#pragma unroll 4
      for (int other = 0; other < a.slices; ++other) y += inbox[other * most + threadIdx.x];
    }
  }
  const int at = begin_column + from + threadIdx.x;
  const bool writes = threadIdx.x < to - from && at < end_column;
  if (writes) {
    if (a.bias && (a.epilogue != kAtomicAdd || slice == 0)) y += a.bias[at];
    y *= a.scale;
    if (a.epilogue == kAtomicAdd) {
      atomicAdd(a.out + at, y);
    } else {
      if (a.epilogue == kAdd) y += __ldcg(a.out + at);
      a.out[at] = y;
    }
  }
  if (a.squares_out) {
    const float squares = sum_block(writes ? y * y : 0.0f, sums);
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
