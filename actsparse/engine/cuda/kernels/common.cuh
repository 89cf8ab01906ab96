// Shared by the decode kernels: wide loads, dependent launch, compaction and reductions.
//
// Activations travel between kernels as float32 (a few kilobytes beside megabytes of weights), so that a kernel's only
// rounding is that of its weights and of the cache. Inside a step every kernel but the first starts while its predecessor
// still runs (programmatic dependent launch). Before `wait_for_previous` it may read only what is older than the step:
// weights, thresholds, lists, the position and the cache below it.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace actsparse {

namespace cg = cooperative_groups;

constexpr int kLane = 8;                // elements of 16 bits in one 16-byte load
constexpr int kSpan = 32 * kLane;       // elements that a warp loads at once
constexpr unsigned kFull = 0xffffffffu;

enum Dtype { kBfloat16 = 0, kHalf = 1 };
enum Activation { kSilu = 0, kGeluTanh = 1, kRelu = 2, kIdentity = 3, kGelu = 4 };

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Starts copying 16 bytes of weights into shared memory, or zeros where `inside` is false. Weights wait for their turn in
// rings in shared memory rather than in registers: asynchronous copies complete in groups, in order, while the compiler
// ties all the loads of a register ring to one scoreboard and so waits for the newest of them at every step.
__device__ __forceinline__ void copy_weights(void* shared, const void* address, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(address), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_until_pending() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Blocks of a cluster meet twice. First they tell each other that they have started, which orders nothing and so needs no
// fence. At the end they push their results into each other's shared memory, and every push counts down a barrier of its
// receiver: the cluster's own barrier would have to flush all of a block's writes to the whole chip first.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t address_in(uint32_t address, int block) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

// Announces this block, whose `mailbox` awaits `bytes`; every thread calls it.
__device__ __forceinline__ void open_mailbox(uint64_t* mailbox, int bytes) {
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(mailbox)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(bytes)
                 : "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Before the first push: every block of the cluster has opened its mailbox. Every thread calls it.
__device__ __forceinline__ void await_blocks() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

__device__ __forceinline__ void push(float value, const float* place, const uint64_t* mailbox, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in(shared_address(place), block)),
               "r"(__float_as_uint(value)), "r"(address_in(shared_address(mailbox), block))
               : "memory");
}

__device__ __forceinline__ void push(float2 value, const float2* place, const uint64_t* mailbox, int block) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   address_in(shared_address(place), block)),
               "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)),
               "r"(address_in(shared_address(mailbox), block))
               : "memory");
}

// Waits for all that was pushed into this block.
__device__ __forceinline__ void await_mail(const uint64_t* mailbox) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      " @done bra finished;\n bra again;\nfinished:\n}" ::"r"(shared_address(mailbox))
      : "memory");
}

template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t word, float& low, float& high);

template <>
__device__ __forceinline__ void unpack_pair<__nv_bfloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack_pair<__half>(uint32_t word, float& low, float& high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x;
  high = both.y;
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& words, float (&out)[kLane]) {
  unpack_pair<T>(words.x, out[0], out[1]);
  unpack_pair<T>(words.y, out[2], out[3]);
  unpack_pair<T>(words.z, out[4], out[5]);
  unpack_pair<T>(words.w, out[6], out[7]);
}

// sum += W x for sixteen rows, eight columns and eight sequences, in tf32.
__device__ __forceinline__ void multiply(float (&sum)[4], const float (&w)[4], float x_low, float x_high) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(w[0])), "r"(__float_as_uint(w[1])), "r"(__float_as_uint(w[2])), "r"(__float_as_uint(w[3])),
        "r"(__float_as_uint(x_low)), "r"(__float_as_uint(x_high)));
}

// The first 11 bits of a float, which tf32 holds.
__device__ __forceinline__ float large_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half round_to<__half>(float value) { return __float2half_rn(value); }

template <typename T>
__device__ __forceinline__ float widen(T value);
template <>
__device__ __forceinline__ float widen<__nv_bfloat16>(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ __forceinline__ float widen<__half>(__half value) { return __half2float(value); }

__device__ __forceinline__ float activate(float value, int activation) {
  switch (activation) {
    case kSilu:
      return value / (1.0f + __expf(-value));
    case kGeluTanh:
      return 0.5f * value * (1.0f + tanhf(0.7978845608028654f * (value + 0.044715f * value * value * value)));
    case kRelu:
      return fmaxf(value, 0.0f);
    case kGelu:
      return 0.5f * value * (1.0f + erff(value * 0.7071067811865476f));
    default:
      return value;
  }
}

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(kFull, value, step);
  return value;
}

// Every thread's share of a sum over the block, in a fixed order. `scratch` holds one float per warp; the caller's next
// __syncthreads separates uses.
__device__ __forceinline__ float sum_block(float value, float* scratch) {
  value = sum_warp(value);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  return sum_warp((threadIdx.x & 31) < (blockDim.x >> 5) ? scratch[threadIdx.x & 31] : 0.0f);
}

// Appends this round's kept elements in thread order. Returns where this thread's element goes and raises `total`.
// `counts` holds two rounds of one int per warp, so one barrier a round is enough.
__device__ __forceinline__ int compact_round(bool keep, int round, int& total, int* counts) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  int* mine = counts + (round & 1) * 32;
  const unsigned kept = __ballot_sync(kFull, keep);
  if (lane == 0) mine[warp] = __popc(kept);
  __syncthreads();
  const int count = lane < warps ? mine[lane] : 0;
  int before = count;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int left = __shfl_up_sync(kFull, before, step);
    if (lane >= step) before += left;
  }
  const int sum = __shfl_sync(kFull, before, 31);
  const int start = total + __shfl_sync(kFull, before - count, warp);
  total += sum;
  return start + __popc(kept & ((1u << lane) - 1));
}

// Sums that blocks share are held in fixed point: integers add up to the same bits in any order, so every block adds its
// part and none waits for the others. A part that is no number, or two million and more, makes the sum NaN.
using Fixed = long long;
constexpr float kOne = 4294967296.0f;          // 2^32: 32 bits behind the point
constexpr float kMost = 2097152.0f;            // 2^21
constexpr int kLimit = 1 << 25;                // sums from here on are NaN
constexpr Fixed kInvalid = Fixed{1} << 62;     // the adding of valid parts does not bring it back

__device__ __forceinline__ Fixed to_fixed(float value) {
  return fabsf(value) < kMost ? __float2ll_rn(value * kOne) : kInvalid;
}

// In two halves, since conversions of 64 bits are slow: the nearest whole number, and what is left of it.
__device__ __forceinline__ float from_fixed(Fixed sum) {
  const int rest = static_cast<int>(sum), whole = static_cast<int>(sum >> 32) + (rest < 0);
  const float value = fmaf(static_cast<float>(rest), 1.0f / kOne, static_cast<float>(whole));
  return whole < kLimit && whole > -kLimit ? value : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ void add_fixed(Fixed* sum, float value) {
  unsigned long long* const bits = reinterpret_cast<unsigned long long*>(sum);
  const Fixed part = to_fixed(value);
  if (part != kInvalid)
    atomicAdd(bits, static_cast<unsigned long long>(part));
  else
    atomicExch(bits, static_cast<unsigned long long>(kInvalid));
}

__device__ __forceinline__ float from_fixed(float value) { return value; }

// 16 bytes of activations, held as they are until all loads of a thread are under way.
template <typename E>
struct Held;
template <>
struct Held<float> {
  using Word = float4;
  static constexpr int kSize = 4;
};
template <>
struct Held<Fixed> {
  using Word = longlong2;
  static constexpr int kSize = 2;
};

__device__ __forceinline__ float square_of(const float4& x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }
__device__ __forceinline__ float square_of(const longlong2& x) {
  const float one = from_fixed(x.x), two = from_fixed(x.y);
  return one * one + two * two;
}

// This thread's share of the sum of squares of x [size], which is aligned.
template <typename E>
__device__ __forceinline__ float square_share(const E* x, int size) {
  using Word = typename Held<E>::Word;
  constexpr int kSize = Held<E>::kSize, kWords = 4;
  const int words = size / kSize;
  float squares = 0.0f;
  for (int base = threadIdx.x; base < words; base += kWords * blockDim.x) {
    Word held[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = base + i * blockDim.x;
      held[i] = word < words ? __ldcg(reinterpret_cast<const Word*>(x) + word) : Word{};
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) squares += square_of(held[i]);
  }
  const int tail = words * kSize + threadIdx.x;
  if (tail < size) {
    const float one = from_fixed(__ldcg(x + tail));
    squares += one * one;
  }
  return squares;
}

// Lets `kernel` have that much shared memory and such clusters.
template <typename Kernel>
inline cudaError_t allow(Kernel kernel, size_t shared, int cluster) {
  // All kernels ask for the same split of L1 and shared memory: a multiprocessor has to run empty to change it, and then
  // no kernel could start beside its predecessor.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && shared > 0)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// Launches with dependent start and, when `cluster` > 1, in clusters of that many blocks.
template <typename Kernel, typename Args>
inline int launch(Kernel kernel, const Args& args, dim3 blocks, int threads, size_t shared, int cluster, bool dependent,
                  cudaStream_t stream) {
  cudaError_t error = allow(kernel, shared, cluster);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  int used = 0;
  if (dependent) {
    attributes[used].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[used++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[used].id = cudaLaunchAttributeClusterDimension;
    attributes[used].val.clusterDim.x = cluster;
    attributes[used].val.clusterDim.y = 1;
    attributes[used++].val.clusterDim.z = 1;
  }
  config.attrs = attributes;
  config.numAttrs = used;
  error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error;
}

}  // namespace actsparse
