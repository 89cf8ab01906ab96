// Products with weights stored input-major [inputs, outputs] for a batch: out_b = sum_i x_bi W[i, :] over what b keeps.
//
// The union of the batch's rows is read, each once, and counts 0 for a sequence that drops its input. Blocks, lists and rings
// are those of columns.cu; a listed row has a value for every sequence. All blocks add their parts up in fixed point.
//
// Up to four sequences are summed by plain arithmetic. For eight that would take as long as the reading: there eight rows at
// a time meet the batch on tensor cores, as in batch_rows.cu.
#include "common.cuh"

namespace actsparse {

constexpr int kMaxSegments = 3;
constexpr int kRounds = 2;      // inputs that a thread holds at once

// What depends on how many sequences a kernel has accumulators for.
template <int BATCH>
struct Batched {
  static constexpr int kThreads = BATCH > 4 ? 256 : 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGroups = BATCH > 2 ? 1 : 2;    // times 256 columns that a block owns
  static constexpr int kTile = kGroups * kSpan;
  static constexpr bool kTensor = BATCH > 4;
  static constexpr int kDepth = BATCH > 2 ? kTensor ? 16 : 8 : 4;  // rows that a warp has under way
  static constexpr int kStage = kGroups * 32 + (kTensor ? 2 : 0);  // 16-byte words from one to the next: no bank conflicts
  static constexpr int kRing = kDepth * kStage;
  static constexpr int kPitch = kTile + (kTensor ? 8 : 0);         // floats from a sequence to the next, in a warp's sums
  static_assert(BATCH * kPitch * 4 <= kRing * 16, "a warp leaves its sums in its ring");
};

constexpr int kTogether = 8;  // rows of a matrix instruction

// Room in a warp's list of rows, of which there is one in so many `readers`, each of an even share; rows that fill up the
// last eight behind it.
__host__ __device__ constexpr int room_of(int inputs, int readers) { return inputs / readers + kTogether; }

// Outputs [begin, begin + length) share a threshold; a tile never crosses a segment.
struct Segment {
  int begin;
  int length;
  int first_tile;
};

struct BatchColumnsArgs {
  const void* weight;
  const void* x;           // [batch, x_stride], floats or sums in fixed point
  const void* up;          // where given, as x is, x_i stands for act(x_i) * up_i
  const float* score;      // [segments, inputs], or null for 1
  const float* threshold;  // [segments], or null to drop zeros alone
  const int* count;        // live inputs, or null for all
  const float* bias;       // or null
  Fixed* out;              // [batch, out_stride], which gains the product
  Fixed* zero;             // [zeros]: set to zero for a later kernel, or null
  unsigned long long* read;  // [segments]: gain how many rows were read, or null
  int64_t stride;
  int64_t x_stride;
  int64_t out_stride;
  float scale;             // of the result, its bias included, before it is added
  int batch;
  int inputs;
  int outputs;
  int slices;              // blocks that share a tile
  int segments;
  int activation;
  int ahead;               // rows that a warp starts to read before it knows whether they are kept
  int fixed;               // x and up are sums in fixed point
  int zeros;
  Segment segment[kMaxSegments];
};

// BATCH: sequences that there are accumulators for; UP: whether `up` is given; E: what x and `up` are.
template <typename T, int BATCH, bool UP, typename E>
__global__ void __launch_bounds__(Batched<BATCH>::kThreads, 2)
    batch_columns_kernel(const __grid_constant__ BatchColumnsArgs a) {
  using B = Batched<BATCH>;
  constexpr int kThreads = B::kThreads, kWarps = B::kWarps, kGroups = B::kGroups, kTile = B::kTile, kRing = B::kRing;
  constexpr int kStage = B::kStage, kDepth = B::kDepth, kPitch = B::kPitch;
  extern __shared__ float4 shared[];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(kFull, threadIdx.x >> 5, 0);
  const int slice = blockIdx.x, slices = gridDim.x, tile = blockIdx.y;
  let_next_start();
  int owner = 0;
  while (owner + 1 < a.segments && tile >= a.segment[owner + 1].first_tile) ++owner;
  const int begin_column = a.segment[owner].begin + (tile - a.segment[owner].first_tile) * kTile;
  const int end_column = min(begin_column + kTile, a.segment[owner].begin + a.segment[owner].length);
  const uint4* const weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + begin_column) + lane;
  const uint32_t step = static_cast<uint32_t>(a.stride / kLane);  // from a row to the next, in 16-byte words

  const unsigned live = a.count ? min(__ldcg(a.count), a.inputs) : a.inputs;
  const unsigned reader = slice * kWarps + warp, readers = slices * kWarps;
  const int begin = live * reader / readers, length = live * (reader + 1) / readers - begin;
  uint4* const ring = reinterpret_cast<uint4*>(shared) + warp * kRing + lane;
  const int room = room_of(a.inputs, readers);
  float* const value = reinterpret_cast<float*>(shared + kWarps * kRing) + warp * room * BATCH;
  uint32_t* const offset = reinterpret_cast<uint32_t*>(shared + kWarps * kRing) + kWarps * room * BATCH + warp * room;

  auto copy_row = [&](uint32_t from, int stage, bool live_row = true) {
#pragma unroll
    for (int part = 0; part < kGroups; ++part) {
      const bool loads = live_row && begin_column + part * kSpan + lane * kLane < end_column;
      copy_weights(ring + stage * kStage + part * 32, weight + from + part * 32, loads);
    }
  };
  auto row_of = [&](int item) { return static_cast<uint32_t>(begin + item) * step; };
  const int ahead = min(a.ahead, kDepth), head = min(ahead, length);
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage) {
    if (stage >= ahead) continue;
    if (stage < head) copy_row(row_of(stage), stage);
    end_group();
  }
  const float* const score = a.score ? a.score + static_cast<int64_t>(owner) * a.inputs : nullptr;
  float weigh[kRounds];
  E x_of[kRounds][BATCH], up_of[kRounds][BATCH];
  auto load_constants = [&](int base) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * 32 + lane;
      weigh[round] = score && item < length ? score[begin + item] : 1.0f;
    }
  };
  auto load_inputs = [&](int base) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int item = base + round * 32 + lane;
#pragma unroll
      for (int one = 0; one < BATCH; ++one) {
        const bool inside = item < length && one < a.batch;
        const int64_t at = one * a.x_stride + begin + item;
        x_of[round][one] = inside ? __ldcg(static_cast<const E*>(a.x) + at) : E{};
        if (UP) up_of[round][one] = inside ? __ldcg(static_cast<const E*>(a.up) + at) : E{};
      }
    }
  };
  load_constants(0);
  wait_for_previous();

  load_inputs(0);
  const float threshold = a.threshold ? __ldcg(a.threshold + owner) : 0.0f;
  int total = 0;
  for (int base = 0; base < length; base += kRounds * 32) {
    if (base > 0) load_constants(base), load_inputs(base);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (base + round * 32 >= length) break;
      const int item = base + round * 32 + lane;
      float x[BATCH];
      bool keep = item < head;
#pragma unroll
      for (int one = 0; one < BATCH; ++one) {
        x[one] = from_fixed(x_of[round][one]);
        if (UP) x[one] = activate(x[one], a.activation) * from_fixed(up_of[round][one]);
        bool keeps = item < length && one < a.batch && x[one] != 0.0f;
        if (a.threshold) keeps = keeps && fabsf(x[one]) * weigh[round] >= threshold;
        if (!keeps) x[one] = 0.0f;
        keep = keep || keeps;
      }
      const unsigned kept = __ballot_sync(kFull, keep);
      if (keep) {
        const int here = total + __popc(kept & ((1u << lane) - 1));
#pragma unroll
        for (int one = 0; one < BATCH; ++one) value[here * BATCH + one] = x[one];
        offset[here] = row_of(item);
      }
      total += __popc(kept);
    }
  }
  // Matrix instructions take whole groups of rows: those past the last are zeros, and so are their values.
  const int rows = B::kTensor ? (total + kTogether - 1) / kTogether * kTogether : total;
  for (int place = total * BATCH + lane; place < rows * BATCH; place += 32) value[place] = 0.0f;
  __syncwarp();
  auto copy_listed = [&](int item, int stage) {
    if (item < rows) copy_row(item < total ? offset[item] : 0, stage, item < total);
    end_group();
  };
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage)
    if (stage >= ahead) copy_listed(stage, stage);
  // For a later kernel, which this moment does not wait for.
  for (int one = (tile * slices + slice) * kThreads + threadIdx.x; one < a.zeros; one += gridDim.y * slices * kThreads)
    a.zero[one] = 0;

  float* const sums = reinterpret_cast<float*>(ring - lane);  // [BATCH, kPitch], once the ring of the whole warp is read
  if constexpr (B::kTensor) {
    const int slot = lane >> 2, quarter = lane & 3;  // a sequence and eight outputs; two of eight rows
    float sum[4][kLane / 2][4] = {};                 // of every 64 outputs, by pairs of neighbours
    for (int row = 0; row < rows; row += kTogether) {
      wait_until_pending<kDepth - kTogether>();
      __syncwarp();
      const int stage = row % kDepth;
      const uint4* const low = ring - lane + (stage + quarter) * kStage + slot;
      const uint4* const high = low + kTogether / 2 * kStage;
      const float one = value[(row + quarter) * BATCH + slot];
      const float two = value[(row + quarter + kTogether / 2) * BATCH + slot];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float w_low[kLane], w_high[kLane];
        unpack<T>(low[part * 8], w_low);
        unpack<T>(high[part * 8], w_high);
#pragma unroll
        for (int pair = 0; pair < kLane / 2; ++pair) {
          const float w[4] = {w_low[2 * pair], w_low[2 * pair + 1], w_high[2 * pair], w_high[2 * pair + 1]};
          multiply(sum[part][pair], w, large_part(one), large_part(two));
          multiply(sum[part][pair], w, one - large_part(one), two - large_part(two));
        }
      }
      __syncwarp();
#pragma unroll
      for (int next = 0; next < kTogether; ++next) copy_listed(row + kDepth + next, stage + next);
    }
    wait_until_pending<0>();
    __syncwarp();
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int pair = 0; pair < kLane / 2; ++pair) {
        const float(&of)[4] = sum[part][pair];
        float* const to = sums + 2 * quarter * kPitch + (part * 8 + slot) * kLane + 2 * pair;
        *reinterpret_cast<float2*>(to) = make_float2(of[0], of[2]);
        *reinterpret_cast<float2*>(to + kPitch) = make_float2(of[1], of[3]);
      }
    }
  } else {
    float sum[BATCH][kGroups][kLane] = {};
    for (int row = 0; row < total; row += kDepth) {
#pragma unroll
      for (int stage = 0; stage < kDepth; ++stage) {
        const int item = row + stage;
        if (item >= total) break;
        float x[BATCH];
#pragma unroll
        for (int one = 0; one < BATCH; ++one) x[one] = value[item * BATCH + one];
        wait_until_pending<kDepth - 1>();
#pragma unroll
        for (int part = 0; part < kGroups; ++part) {
          float w[kLane];
          unpack<T>(ring[stage * kStage + part * 32], w);
#pragma unroll
          for (int one = 0; one < BATCH; ++one) {
#pragma unroll
            for (int e = 0; e < kLane; ++e) sum[one][part][e] += x[one] * w[e];
          }
        }
        copy_listed(item + kDepth, stage);
      }
    }
    wait_until_pending<0>();
    __syncwarp();
#pragma unroll
    for (int one = 0; one < BATCH; ++one) {
#pragma unroll
      for (int part = 0; part < kGroups; ++part) {
        float4* const to = reinterpret_cast<float4*>(sums + one * kPitch + part * kSpan + lane * kLane);
        const float(&of)[kLane] = sum[one][part];
        to[0] = make_float4(of[0], of[1], of[2], of[3]);
        to[1] = make_float4(of[4], of[5], of[6], of[7]);
      }
    }
  }
  if (a.read && tile == a.segment[owner].first_tile && lane == 0) atomicAdd(a.read + owner, static_cast<unsigned long long>(total));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile * BATCH / kThreads; ++i) {
    const int place = threadIdx.x + i * kThreads, one = place / kTile, column = place % kTile, at = begin_column + column;
    if (one >= a.batch || at >= end_column) continue;
    float y = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other)
      y += reinterpret_cast<const float*>(shared + other * kRing)[one * kPitch + column];
    if (a.bias && slice == 0) y += a.bias[at];
    add_fixed(a.out + one * a.out_stride + at, y * a.scale);
  }
}

template <typename T, int BATCH, bool UP, typename E>
int launch_batched(const BatchColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  using B = Batched<BATCH>;
  const size_t list = room_of(a.inputs, a.slices * B::kWarps) * (BATCH * sizeof(float) + sizeof(uint32_t));
  const size_t shared = B::kWarps * (B::kRing * sizeof(uint4) + list);
  return launch(batch_columns_kernel<T, BATCH, UP, E>, a, dim3(a.slices, tiles), B::kThreads, shared, 1, dependent, stream);
}

template <typename T, int BATCH>
int launch_inputs(const BatchColumnsArgs& a, int tiles, bool dependent, cudaStream_t stream) {
  if (a.up) return a.fixed ? launch_batched<T, BATCH, true, Fixed>(a, tiles, dependent, stream) : cudaErrorInvalidValue;
  return a.fixed ? cudaErrorInvalidValue : launch_batched<T, BATCH, false, float>(a, tiles, dependent, stream);
}

template <typename T>
int launch_batch_columns(const BatchColumnsArgs& a, int room, int tiles, bool dependent, cudaStream_t stream) {
  switch (room) {
    case 2:
      return launch_inputs<T, 2>(a, tiles, dependent, stream);
    case 4:
      return launch_inputs<T, 4>(a, tiles, dependent, stream);
    case 8:
      return launch_inputs<T, 8>(a, tiles, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace actsparse

// room: 2, 4 or 8 sequences, of which `batch` are there; tiles: of all segments, 512 columns for 2 sequences, else 256.
extern "C" int actsparse_batch_columns(const actsparse::BatchColumnsArgs* args, int dtype, int room, int tiles,
                                       int dependent, void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args->batch > room) return cudaErrorInvalidValue;
  return dtype == kBfloat16 ? launch_batch_columns<__nv_bfloat16>(*args, room, tiles, dependent, queue)
                            : launch_batch_columns<__half>(*args, room, tiles, dependent, queue);
}
