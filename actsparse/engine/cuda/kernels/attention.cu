// Decode attention over the live length only: rotates q and k, appends k and v to the cache, and returns the mix.
//
// The cached positions of a head are split over the blocks of a cluster; each lane group keeps its own running softmax
// (maximum, sum, mix), and groups, warps and blocks merge at the end: a block pushes its part of every dimension into the
// shared memory of the block that owns it.
#include "common.cuh"

namespace actsparse {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSplits = 8;
constexpr int kDepth = 8;           // positions per lane group whose keys and values are under way
constexpr int kBatch = 4;           // of them, taken at once
constexpr int kStage = 64;          // 16-byte words of a warp's stage: keys, then values
constexpr float kLowest = -1e30f;   // a maximum that survives subtraction from itself

struct AttendArgs {
  const void* qkv;      // [batch, heads + 2 * kv_heads, head_dim], floats or sums in fixed point
  const float* cosine;  // [positions, head_dim / 2]
  const float* sine;
  void* keys;           // [batch, kv_heads, positions, head_dim]
  void* values;
  const int* position;
  const int64_t* padding;  // [batch]: positions before a sequence's first token, seen by none and not counted; or null
  float* out;           // [batch, heads, head_dim]
  const float* q_norm;  // [head_dim], or null
  const float* k_norm;
  const int* groups;    // [kv_heads]: 0 for groups whose heads return zeros and read no cache, or null
  float scale;          // of scores, which are kept in base 2: log2(e) is in it, or in `cap`
  float cap;            // log2(e) times what scores are capped at; 0: no cap
  float inverse_cap;
  float epsilon;        // of the norms
  int half;             // dimensions (i, half + i) turn together, those from 2 * half on do not
  int window;           // positions that a token sees, itself among them; 0: all
  int heads;
  int kv_heads;
  int positions;
  int splits;
  int batch;
  int fixed;            // qkv is sums in fixed point
};

struct alignas(8) Running {
  float maximum;
  float sum;
};

// Eight neighbours; zeros where `inside` is false.
__device__ __forceinline__ void load_floats(const float* from, bool inside, float (&to)[kLane]) {
  const float4* const quads = reinterpret_cast<const float4*>(from);
  const float4 low = inside ? __ldcg(quads) : float4{}, high = inside ? __ldcg(quads + 1) : float4{};
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// E: what qkv is.
template <typename T, int HEAD_DIM, typename E>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(const __grid_constant__ AttendArgs a) {
  constexpr int kLanes = HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;  // that share a position
  constexpr int kGroups = 32 / kLanes;  // positions that a warp reads at once
  extern __shared__ uint4 rings[];
  __shared__ Running warp_state[kWarps];
  __shared__ float warp_mix[kWarps][HEAD_DIM];
  __shared__ Running states[kMaxSplits];  // of every split
  __shared__ float mixes[HEAD_DIM];       // [splits, head_dim / splits], the dimensions of this block
  __shared__ alignas(16) float token[3 * HEAD_DIM];  // this position's query, key and value
  __shared__ uint64_t mailbox;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane / kLanes, dim = lane % kLanes * kLane;
  const bool used = dim < HEAD_DIM;  // false for the last lanes of a head_dim that is no power of two
  const int head = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
  const int shared_by = a.heads / a.kv_heads, kv_head = head / shared_by;
  const int sequence = blockIdx.y;
  const int64_t plane = (static_cast<int64_t>(sequence) * a.kv_heads + kv_head) * a.positions * HEAD_DIM;
  T* const keys = static_cast<T*>(a.keys) + plane;
  T* const values = static_cast<T*>(a.values) + plane;
  let_next_start();
  const int share_of = HEAD_DIM / a.splits;  // dimensions of a block
  if (a.splits > 1) open_mailbox(&mailbox, a.splits * static_cast<int>(share_of * sizeof(float) + sizeof(Running)));

  // The position and the cache below it are older than the step, whose first kernel waited for all before it: their
  // loads need not wait for the projection.
  const int position = __ldcg(a.position), padding = a.padding ? static_cast<int>(__ldcg(a.padding + sequence)) : 0;
  if (a.groups) wait_for_previous();
  const bool masked = a.groups && __ldcg(a.groups + kv_head) == 0;
  const int first = a.window ? max(padding, position + 1 - a.window) : padding;
  const int size = masked ? 0 : (position - first + a.splits - 1) / a.splits;
  const int begin = masked ? 0 : first + split * size, end = masked ? 0 : min(begin + size, position);
  uint4* const ring = rings + warp * kDepth * kStage + lane;
  int next = begin + warp * kGroups + group;
  auto copy_next = [&](int stage) {
    const bool inside = used && next < end;
    const int64_t at = inside ? static_cast<int64_t>(next) * HEAD_DIM + dim : 0;
    copy_weights(ring + stage * kStage, keys + at, inside);
    copy_weights(ring + stage * kStage + 32, values + at, inside);
    end_group();
    next += kWarps * kGroups;
  };
#pragma unroll
  for (int stage = 0; stage < kDepth; ++stage) copy_next(stage);
  const bool turns = dim < 2 * a.half;
  const int partner = !turns ? dim : dim < a.half ? dim + a.half : dim - a.half;
  const float sign = dim < a.half ? -1.0f : 1.0f;
  const int64_t angle = static_cast<int64_t>(position - padding) * a.half + min(dim, partner);
  float cosine[kLane], sine[kLane], query[kLane];
  load_floats(a.cosine + angle, turns, cosine);
  load_floats(a.sine + angle, turns, sine);
  if (!turns) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) cosine[e] = 1.0f;
  }
  wait_for_previous();

  // The token's query (and key and value, in the block that appends them) come through shared memory: a value a thread, so
  // that each is converted once.
  const bool appends = split == a.splits - 1 && warp == 0;
  {
    constexpr int kLoads = (3 * HEAD_DIM + kThreads - 1) / kThreads;
    const int wanted = split == a.splits - 1 ? 3 * HEAD_DIM : HEAD_DIM;
    const E* const qkv = static_cast<const E*>(a.qkv) + sequence * (a.heads + 2 * a.kv_heads) * HEAD_DIM;
    E held[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = threadIdx.x + i * kThreads, part = at / HEAD_DIM;
      const int row = part == 0 ? head : a.heads + kv_head + (part == 1 ? 0 : a.kv_heads);
      held[i] = at < wanted ? __ldcg(qkv + row * HEAD_DIM + at % HEAD_DIM) : E{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (threadIdx.x + i * kThreads < wanted) token[threadIdx.x + i * kThreads] = from_fixed(held[i]);
    __syncthreads();
  }
  auto take = [&](int part, float (&to)[kLane]) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) to[e] = used ? token[part * HEAD_DIM + dim + e] : 0.0f;
  };
  float new_key[kLane], new_value[kLane];
  take(0, query);
  if (appends) {
    take(1, new_key);
    take(2, new_value);
  }
  auto sum_group = [&](float value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step >>= 1) value += __shfl_xor_sync(kFull, value, step);
    return value;
  };
  auto norm_head = [&](const float* weight, float (&own)[kLane]) {
    float squares = 0.0f, gain[kLane];
#pragma unroll
    for (int e = 0; e < kLane; ++e) squares += own[e] * own[e];
    const float scale = rsqrtf(sum_group(squares) / HEAD_DIM + a.epsilon);
    load_floats(weight + dim, used, gain);
#pragma unroll
    for (int e = 0; e < kLane; ++e) own[e] *= scale * gain[e];
  };
  if (a.q_norm) {
    norm_head(a.q_norm, query);
    if (appends) norm_head(a.k_norm, new_key);
  }
  const int partner_lane = lane + (partner - dim) / kLane;  // that holds what these dimensions turn with
  auto rotate = [&](float (&own)[kLane], float scale) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      const float other = __shfl_sync(kFull, own[e], partner_lane);
      own[e] = (own[e] * cosine[e] + other * sine[e]) * scale;
    }
  };
#pragma unroll
  for (int e = 0; e < kLane; ++e) sine[e] *= sign;
  rotate(query, a.scale);
  if (appends) rotate(new_key, 1.0f);

  auto score_of = [&](float dot) { return a.cap > 0.0f ? a.cap * tanhf(dot * a.inverse_cap) : dot; };
  Running state = {kLowest, 0.0f};
  float mix[kLane] = {};
  int stage = 0;
  for (int base = begin + warp * kGroups; base < end; base += kBatch * kWarps * kGroups) {
    wait_until_pending<kDepth - kBatch>();
    float score[kBatch];
    float maximum = state.maximum;
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) {
      float k[kLane], dot = 0.0f;
      unpack<T>(ring[(stage + slot) * kStage], k);
#pragma unroll
      for (int e = 0; e < kLane; ++e) dot += k[e] * query[e];
      dot = score_of(sum_group(dot));
      score[slot] = base + slot * kWarps * kGroups + group < end ? dot : -INFINITY;
      maximum = fmaxf(maximum, score[slot]);
    }
    const float correction = exp2f(state.maximum - maximum);
    state.maximum = maximum;
    state.sum *= correction;
#pragma unroll
    for (int e = 0; e < kLane; ++e) mix[e] *= correction;
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) {
      const float weight = exp2f(score[slot] - maximum);
      float v[kLane];
      unpack<T>(ring[(stage + slot) * kStage + 32], v);
      state.sum += weight;
#pragma unroll
      for (int e = 0; e < kLane; ++e) mix[e] += weight * v[e];
    }
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) copy_next(stage + slot);
    stage ^= kBatch;
  }
  wait_until_pending<0>();

  if (appends) {
    // The new position, rounded as the cache rounds it, straight from the projection: no block waits for the write.
    alignas(16) T key[kLane], value[kLane];
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      key[e] = round_to<T>(new_key[e]);
      value[e] = round_to<T>(new_value[e]);
      dot += widen<T>(key[e]) * query[e];
    }
    dot = score_of(sum_group(dot));
    if (group == 0 && used) {
      const float maximum = fmaxf(state.maximum, dot);
      const float correction = exp2f(state.maximum - maximum), weight = exp2f(dot - maximum);
      state.maximum = maximum;
      state.sum = state.sum * correction + weight;
#pragma unroll
      for (int e = 0; e < kLane; ++e) mix[e] = mix[e] * correction + weight * widen<T>(value[e]);
      if (head % shared_by == 0) {
        const int64_t to = static_cast<int64_t>(position) * HEAD_DIM + dim;
        *reinterpret_cast<uint4*>(keys + to) = *reinterpret_cast<const uint4*>(key);
        *reinterpret_cast<uint4*>(values + to) = *reinterpret_cast<const uint4*>(value);
      }
    }
  }

#pragma unroll
  for (int step = kLanes; step < 32; step <<= 1) {
    const float other = __shfl_xor_sync(kFull, state.maximum, step), maximum = fmaxf(state.maximum, other);
    const float here = exp2f(state.maximum - maximum), there = exp2f(other - maximum);
    state.sum = state.sum * here + __shfl_xor_sync(kFull, state.sum, step) * there;
#pragma unroll
    for (int e = 0; e < kLane; ++e) mix[e] = mix[e] * here + __shfl_xor_sync(kFull, mix[e], step) * there;
    state.maximum = maximum;
  }
  if (group == 0 && used) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) warp_mix[warp][dim + e] = mix[e];
  }
  if (lane == 0) warp_state[warp] = state;
  __syncthreads();
  if (a.splits > 1) await_blocks();
  if (threadIdx.x < HEAD_DIM) {
    Running block = {kLowest, 0.0f};
    float y = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) block.maximum = fmaxf(block.maximum, warp_state[other].maximum);
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const float share = exp2f(warp_state[other].maximum - block.maximum);
      block.sum += warp_state[other].sum * share;
      y += warp_mix[other][threadIdx.x] * share;
    }
    const int owner = threadIdx.x / share_of, place = split * share_of + threadIdx.x % share_of;
    if (a.splits > 1) {
      push(y, mixes + place, &mailbox, owner);
      if (threadIdx.x < a.splits)
        push(make_float2(block.maximum, block.sum), reinterpret_cast<float2*>(states + split), &mailbox, threadIdx.x);
    } else {
      mixes[place] = y;
      states[0] = block;
    }
  }
  if (a.splits > 1)
    await_mail(&mailbox);
  else
    __syncthreads();
  if (threadIdx.x < share_of) {
    float maximum = kLowest, sum = 0.0f, y = 0.0f;
    for (int other = 0; other < a.splits; ++other) maximum = fmaxf(maximum, states[other].maximum);
    for (int other = 0; other < a.splits; ++other) {
      const float share = exp2f(states[other].maximum - maximum);
      sum += states[other].sum * share;
      y += mixes[other * share_of + threadIdx.x] * share;
    }
    a.out[(sequence * a.heads + head) * HEAD_DIM + split * share_of + threadIdx.x] = masked ? 0.0f : y / sum;
  }
}

template <typename T, int HEAD_DIM>
int launch_head_dim(const AttendArgs& a, bool dependent, cudaStream_t stream) {
  constexpr size_t kShared = kWarps * kDepth * kStage * sizeof(uint4);
  const dim3 blocks(a.heads * a.splits, a.batch);
  return a.fixed ? launch(attend_kernel<T, HEAD_DIM, Fixed>, a, blocks, kThreads, kShared, a.splits, dependent, stream)
                 : launch(attend_kernel<T, HEAD_DIM, float>, a, blocks, kThreads, kShared, a.splits, dependent, stream);
}

template <typename T>
int launch_attend(const AttendArgs& a, int head_dim, bool dependent, cudaStream_t stream) {
  if (a.splits > kMaxSplits) return cudaErrorInvalidValue;
  switch (head_dim) {
    case 32:
      return launch_head_dim<T, 32>(a, dependent, stream);
    case 64:
      return launch_head_dim<T, 64>(a, dependent, stream);
    case 96:
      return launch_head_dim<T, 96>(a, dependent, stream);
    case 128:
      return launch_head_dim<T, 128>(a, dependent, stream);
    case 256:
      return launch_head_dim<T, 256>(a, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace actsparse

extern "C" int actsparse_attend(const actsparse::AttendArgs* args, int dtype, int head_dim, int dependent,
                                void* stream) {
  using namespace actsparse;
  const auto queue = static_cast<cudaStream_t>(stream);
  return dtype == kBfloat16 ? launch_attend<__nv_bfloat16>(*args, head_dim, dependent, queue)
                            : launch_attend<__half>(*args, head_dim, dependent, queue);
}
