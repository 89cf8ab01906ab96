// Choices among units: the threshold between the largest and the rest, routers' scores, and the lists that they come to.
//
// One block decides, since it has to see all units; what it decides is exact and the same each time.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRules = 3;
constexpr int kMostBits = 12;  // of a digit

// Sums [kWarps] of the warps before and after this one, once every warp has left its own in `parts`.
struct Around {
  int before;
  int after;
};

__device__ __forceinline__ Around around(int mine, int* parts) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
  if (lane == 0) parts[warp] = mine;
  __syncthreads();
  const int part = parts[lane];
  return {__reduce_add_sync(kFull, lane < warp ? part : 0), __reduce_add_sync(kFull, lane > warp ? part : 0)};
}

struct Scratch {
  int bins[1 << kMostBits];
  int parts[kWarps];
  int found[2];
};

// Of the keys [size] whose bits above the digit are `prefix`, finds the digit of the `wanted`-th largest and appends it;
// `wanted` becomes its place among the keys that have it.
template <int SHIFT, int BITS>
__device__ __forceinline__ void append_digit(const uint32_t* keys, int size, uint32_t& prefix, int& wanted, Scratch& scratch) {
  constexpr int kDigits = 1 << BITS, kEach = kDigits / kThreads;  // neighbouring digits of a thread
  static_assert(kEach >= 1 && BITS <= kMostBits, "every thread has a digit");
  int* const bins = scratch.bins;
  const int lane = threadIdx.x & 31;
  for (int i = threadIdx.x; i < kDigits; i += kThreads) bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const uint32_t key = keys[i];
    if (SHIFT + BITS == 32 || key >> ((SHIFT + BITS) & 31) == prefix) atomicAdd(bins + (key >> SHIFT & (kDigits - 1)), 1);
  }
  __syncthreads();
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += bins[threadIdx.x * kEach + i];
  int larger = mine;  // how many have this thread's digits or those of later lanes
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int next = __shfl_down_sync(kFull, larger, step);
    if (lane + step < 32) larger += next;
  }
  larger += around(__shfl_sync(kFull, larger, 0), scratch.parts).after - mine;
  if (larger < wanted && larger + mine >= wanted) {
    int digit = threadIdx.x * kEach + kEach - 1, left = wanted - larger;
    while (bins[digit] < left) left -= bins[digit--];
    scratch.found[0] = digit;
    scratch.found[1] = left;
  }
  __syncthreads();
  prefix = prefix << BITS | static_cast<uint32_t>(scratch.found[0]);
  wanted = scratch.found[1];
}

// The `wanted`-th largest of keys [size]; `wanted` becomes how many of the keys equal to it are among the largest.
// Every thread calls it and gets the same.
__device__ __forceinline__ uint32_t nth_largest(const uint32_t* keys, int size, int& wanted) {
  __shared__ Scratch scratch;
  uint32_t prefix = 0;
  append_digit<20, 12>(keys, size, prefix, wanted, scratch);  // the widest first, where most keys meet in few digits
  append_digit<10, 10>(keys, size, prefix, wanted, scratch);
  append_digit<0, 10>(keys, size, prefix, wanted, scratch);
  return prefix;
}

// Halfway between the least of the `top` largest of |x_i| * score_i and the largest that is smaller, so that equals are all
// kept; for each of up to three rules over the same x.
struct TopArgs {
  const void* x;           // floats, or sums in fixed point
  const void* up;          // where given, as x is, x_i stands for act(x_i) * up_i
  const float* norm;       // RMSNorm weight, or null
  const float* score;      // [rules, inputs], or null for 1
  float* threshold;        // [rules]
  float epsilon;
  int inputs;
  int activation;
  int fixed;
  int rules;
  int top[kMaxRules];      // less than `inputs`
};

constexpr int kTopBlocks = 8;  // the cluster of a rule: all compute keys, the first of them chooses

template <typename E, bool UP>
__global__ void __launch_bounds__(kThreads) top_kernel(const __grid_constant__ TopArgs a) {
  extern __shared__ uint32_t keys[];
  __shared__ float sums[32], squares_of[kTopBlocks];
  __shared__ uint32_t next;
  cg::cluster_group cluster = cg::this_cluster();
  const int block = cluster.block_rank(), rule = blockIdx.x / kTopBlocks;
  uint32_t* const keys_of_first = cluster.map_shared_rank(keys, 0);
  const float* const score = a.score ? a.score + static_cast<int64_t>(rule) * a.inputs : nullptr;
  let_next_start();
  if (threadIdx.x == 0) next = 0;
  cluster.sync();  // all have started
  wait_for_previous();
  float squares = 0.0f;
  constexpr int kHeld = 2, kApart = kTopBlocks * kThreads;  // inputs that a thread has under way
  for (int base = block * kThreads + threadIdx.x; base < a.inputs; base += kHeld * kApart) {
    E x_of[kHeld], up_of[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = base + i * kApart;
      x_of[i] = at < a.inputs ? __ldcg(static_cast<const E*>(a.x) + at) : E{};
      if (UP) up_of[i] = at < a.inputs ? __ldcg(static_cast<const E*>(a.up) + at) : E{};
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = base + i * kApart;
      if (at >= a.inputs) break;
      float x = from_fixed(x_of[i]);
      if (UP) x = activate(x, a.activation) * from_fixed(up_of[i]);
      squares += x * x;
      const float size = fabsf(x * (a.norm ? a.norm[at] : 1.0f)) * (score ? score[at] : 1.0f);
      keys_of_first[at] = __float_as_uint(size) << 1;  // the sign's bit is empty
    }
  }
  squares = sum_block(squares, sums);
  if (threadIdx.x == 0) cluster.map_shared_rank(squares_of, 0)[block] = squares;
  cluster.sync();
  if (block > 0) return;
  int wanted = a.top[rule];
  const uint32_t last = nth_largest(keys, a.inputs, wanted);
  uint32_t below = 0;
  for (int i = threadIdx.x; i < a.inputs; i += kThreads)
    if (keys[i] < last) below = max(below, keys[i]);
  below = __reduce_max_sync(kFull, below);
  if ((threadIdx.x & 31) == 0) atomicMax(&next, below);
  __syncthreads();
  if (threadIdx.x > 0) return;
  squares = 0.0f;
  for (int other = 0; other < kTopBlocks; ++other) squares += squares_of[other];
  // The norm's scale, which changes no order, and halfway to the next, so that rounding elsewhere decides nothing.
  const float scale = a.norm ? rsqrtf(squares / a.inputs + a.epsilon) : 1.0f;
  a.threshold[rule] = scale * (0.5f * __uint_as_float(last >> 1) + 0.5f * __uint_as_float(next >> 1));
}

// out[r] = f(W_r norm(x)) with float32 weights: a router's layer.
struct ScoresArgs {
  const float* weight;     // [rows, width], rows of 16 bytes and more
  const void* x;           // floats, or sums in fixed point
  const float* norm;       // RMSNorm weight, or null
  float* out;
  float epsilon;
  int rows;
  int width;
  int tanh;
  int fixed;
};

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kScoreHeld = 4;   // 16-byte words that a thread has under way

// TEAM: warps that share a row, one or a block's.
template <typename E, int TEAM>
__global__ void __launch_bounds__(kScoreThreads) scores_kernel(const __grid_constant__ ScoresArgs a) {
  constexpr int kTeams = kScoreWarps / TEAM, kMembers = 32 * TEAM;
  extern __shared__ float4 shared[];
  __shared__ float sums[32], parts[kScoreWarps];
  float* const held = reinterpret_cast<float*>(shared);
  const int member = threadIdx.x % kMembers, words = a.width / 4, step = gridDim.x * kTeams;
  const int first = blockIdx.x * kTeams + threadIdx.x / kMembers;
  const bool wide = a.width % 4 == 0;
  float4 w[kScoreHeld];
  auto load = [&](int row, int base) {
#pragma unroll
    for (int i = 0; i < kScoreHeld; ++i) {
      const int at = base + i * kMembers + member;
      const float4* const from = reinterpret_cast<const float4*>(a.weight + static_cast<int64_t>(row) * a.width) + at;
      w[i] = row < a.rows && at < words ? __ldcs(from) : float4{};
    }
  };
  let_next_start();
  if (wide) load(first, 0);
  wait_for_previous();
  float squares = 0.0f;
#pragma unroll 8
  for (int i = threadIdx.x; i < a.width; i += kScoreThreads) {
    const float x = from_fixed(__ldcg(static_cast<const E*>(a.x) + i));
    squares += x * x;
    held[i] = a.norm ? x * a.norm[i] : x;
  }
  float scale = 1.0f;
  if (a.norm)
    scale = rsqrtf(sum_block(squares, sums) / a.width + a.epsilon);
  else
    __syncthreads();
  for (int row = first; row < a.rows; row += step) {
    float sum = 0.0f;
    if (wide) {
      for (int base = 0; base < words; base += kScoreHeld * kMembers) {
#pragma unroll
        for (int i = 0; i < kScoreHeld; ++i) {
          const int at = base + i * kMembers + member;
          const float4 x = at < words ? shared[at] : float4{};
          sum += w[i].x * x.x + w[i].y * x.y + w[i].z * x.z + w[i].w * x.w;
        }
        const bool more = base + kScoreHeld * kMembers < words;
        load(more ? row : row + step, more ? base + kScoreHeld * kMembers : 0);
      }
    } else {
      for (int at = member; at < a.width; at += kMembers) sum += a.weight[static_cast<int64_t>(row) * a.width + at] * held[at];
    }
    sum = sum_warp(sum);
    if (TEAM > 1) {  // a block's warps have the same rows
      __syncthreads();
      if (member % 32 == 0) parts[member / 32] = sum;
      __syncthreads();
      sum = 0.0f;
#pragma unroll
      for (int other = 0; other < TEAM; ++other) sum += parts[other];
    }
    sum *= scale;
    if (member == 0) a.out[row] = a.tanh ? tanhf(sum) : sum;
  }
}

// What a router keeps: the `top` units of largest score, or, with sizes, units until they hold `top` neurons.
struct ChooseArgs {
  const float* score;      // [units]
  const int* sizes;        // [units], or null
  const int* members;      // [units, each] neurons, -1 for none; null: a unit is a neuron
  const uint8_t* always;   // [neurons], kept beside; or null
  int* index;              // [neurons]: the kept ones, ascending
  int* count;              // [1]
  int* mask;               // [neurons]: 1 or 0 instead of a list, or null
  int units;
  int each;
  int top;
  int neurons;
};

// Larger scores have larger keys.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // no negative zero
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A warp's even share of `size` items, in order.
struct Share {
  int begin;
  int end;
};

__device__ __forceinline__ Share share_of(int size) {
  const unsigned warp = threadIdx.x >> 5;
  return {static_cast<int>(size * warp / kWarps), static_cast<int>(size * (warp + 1) / kWarps)};
}

// How many items of the warps before this one have `has(item)`; every thread calls it.
template <typename Has>
__device__ __forceinline__ int counted_before(int size, int* parts, int& total, Has has) {
  const Share mine = share_of(size);
  int count = 0;
  for (int at = mine.begin + (threadIdx.x & 31); at < mine.end; at += 32) count += has(at);
  count = __reduce_add_sync(kFull, count);
  const Around others = around(count, parts);
  total = others.before + count + others.after;
  return others.before;
}

// Calls visit(item, rank) for every item of this warp's share, rank being how many items before it have `has(item)`.
template <typename Has, typename Visit>
__device__ __forceinline__ void ranked(int size, int before, Has has, Visit visit) {
  const Share mine = share_of(size);
  const int lane = threadIdx.x & 31;
  for (int base = mine.begin; base < mine.end; base += 32) {
    const int at = base + lane;
    const unsigned found = __ballot_sync(kFull, at < mine.end && has(at));
    if (at < mine.end) visit(at, before + __popc(found & ((1u << lane) - 1)));
    before += __popc(found);
  }
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const __grid_constant__ ChooseArgs a) {
  extern __shared__ uint32_t keys[];                                    // [units]
  uint8_t* const chosen = reinterpret_cast<uint8_t*>(keys + a.units);   // [units]
  const bool grouped = a.members || a.always;
  uint8_t* const marked = grouped ? chosen + a.units : chosen;          // [neurons]
  __shared__ int parts[kWarps];
  let_next_start();
  wait_for_previous();
#pragma unroll 8
  for (int i = threadIdx.x; i < a.units; i += kThreads) keys[i] = key_of(__ldcg(a.score + i));
  if (grouped)
    for (int i = threadIdx.x; i < a.neurons; i += kThreads) marked[i] = a.always ? a.always[i] : 0;
  __syncthreads();
  int total;
  if (a.sizes) {  // few units: each looks at all that come before it
    for (int i = threadIdx.x; i < a.units; i += kThreads) {
      const uint32_t key = keys[i];
      int64_t before = 0;
      for (int other = 0; other < a.units; ++other)
        if (keys[other] > key || (keys[other] == key && other < i)) before += a.sizes[other];
      chosen[i] = before < a.top;
    }
  } else {
    int wanted = min(a.top, a.units);
    const uint32_t last = wanted > 0 ? nth_largest(keys, a.units, wanted) : ~0u;
    auto equal = [&](int unit) { return keys[unit] == last; };
    const int before = counted_before(a.units, parts, total, equal);
    ranked(a.units, before, equal,
           [&](int unit, int rank) { chosen[unit] = keys[unit] > last || (keys[unit] == last && rank < wanted); });
  }
  __syncthreads();
  if (a.members) {
    for (int i = threadIdx.x; i < a.units * a.each; i += kThreads) {
      const int neuron = a.members[i];
      if (neuron >= 0 && chosen[i / a.each]) marked[neuron] = 1;
    }
  } else if (a.always) {
    for (int i = threadIdx.x; i < a.neurons; i += kThreads) marked[i] |= chosen[i];
  }
  __syncthreads();
  if (a.mask) {
    for (int i = threadIdx.x; i < a.neurons; i += kThreads) a.mask[i] = marked[i] != 0;
    return;
  }
  auto kept = [&](int neuron) { return marked[neuron] != 0; };
  const int before = counted_before(a.neurons, parts, total, kept);
  ranked(a.neurons, before, kept, [&](int neuron, int rank) {
    if (marked[neuron]) a.index[rank] = neuron;
  });
  if (threadIdx.x == 0) *a.count = total;
}

// out = act(gate) * up, where no product's epilogue can do it.
struct MergeArgs {
  const float* gate;
  const float* up;
  float* out;
  int activation;
  int size;
};

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs a) {
  let_next_start();
  wait_for_previous();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < a.size) a.out[at] = activate(__ldcg(a.gate + at), a.activation) * __ldcg(a.up + at);
}

}  // namespace actsparse

extern "C" int actsparse_top(const actsparse::TopArgs* args, int dependent, void* stream) {
  using namespace actsparse;
  const size_t shared = args->inputs * sizeof(uint32_t);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto start = [&](auto kernel) { return launch(kernel, *args, args->rules * kTopBlocks, kThreads, shared, kTopBlocks, dependent, queue); };
  if (args->up) return args->fixed ? start(top_kernel<Fixed, true>) : start(top_kernel<float, true>);
  return args->fixed ? start(top_kernel<Fixed, false>) : start(top_kernel<float, false>);
}

// whole: a block shares a row; else each of its warps has one.
extern "C" int actsparse_scores(const actsparse::ScoresArgs* args, int blocks, int whole, int dependent, void* stream) {
  using namespace actsparse;
  const size_t shared = (args->width + 3) / 4 * sizeof(float4);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto start = [&](auto kernel) { return launch(kernel, *args, blocks, kScoreThreads, shared, 1, dependent, queue); };
  if (whole) return args->fixed ? start(scores_kernel<Fixed, kScoreWarps>) : start(scores_kernel<float, kScoreWarps>);
  return args->fixed ? start(scores_kernel<Fixed, 1>) : start(scores_kernel<float, 1>);
}

extern "C" int actsparse_choose(const actsparse::ChooseArgs* args, int dependent, void* stream) {
  using namespace actsparse;
  const bool grouped = args->members || args->always;
  const size_t shared = args->units * (sizeof(uint32_t) + 1) + (grouped ? args->neurons : 0);
  return launch(choose_kernel, *args, 1, kThreads, shared, 1, dependent, static_cast<cudaStream_t>(stream));
}

extern "C" int actsparse_merge(const actsparse::MergeArgs* args, int dependent, void* stream) {
  using namespace actsparse;
  const int blocks = (args->size + kThreads - 1) / kThreads;
  return launch(merge_kernel, *args, blocks, kThreads, 0, 1, dependent, static_cast<cudaStream_t>(stream));
}
