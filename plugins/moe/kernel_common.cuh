// What all versions of the Gemma4MoE kernel share: how numbers lie in memory, and the routing of one token.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernel.h"

namespace gemma4 {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <WeightFormat kFormat>
constexpr bool kIsInt4 = kFormat == WeightFormat::kInt4;

// Weights per 16 bytes, the unit of every weight load.
template <WeightFormat kFormat>
constexpr int kPerChunk = kFormat == WeightFormat::kInt4 ? 32 : kFormat == WeightFormat::kInt8 ? 16 : 8;

struct Router {
  const void* logits;            // [T, X]
  const void* per_expert_scale;  // [X]
  FloatType type;
  int num_experts;
  int top_k;
};

// One of the two stacks of matrices, [X, rows, K].
struct Weights {
  const void* values;
  const void* scales;
  int rows;
  int k;
  int block_shift;  // int4: log2 of the codes per scale
  FloatType scale_type;  // int4: fp16 or bf16
};

// The value of an int4 scale's 16 bits. Both branches are a few instructions, and every thread takes the same one.
__device__ float block_scale(const Weights& weights, uint16_t bits) {
  if (weights.scale_type == FloatType::kBFloat16) return __uint_as_float(uint32_t{bits} << 16);
  return __half2float(__ushort_as_half(bits));
}

__device__ float load_float(const void* values, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(values)[i];
  if (type == FloatType::kFloat16) return __half2float(static_cast<const __half*>(values)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i]);
}

__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

__device__ float gelu_tanh(float x) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  return 0.5f * x * (1.0f + tanhf(kSqrt2OverPi * (x + 0.044715f * x * x * x)));
}

// Programmatic dependent launch: the next kernel may start its prologue early, and waits before it reads our results.
__device__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ float2 unpack_pair(uint32_t pair, const __nv_bfloat16*) {
  return make_float2(bf16_low(pair), bf16_high(pair));
}
__device__ float2 unpack_pair(uint32_t pair, const __half*) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// A signed byte of `word` as fp32: as the low bits of 2^23 + 128 + code, from which the constant is taken exactly.
template <int kByte>
__device__ float int8_code(uint32_t word) {
  const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440 + kByte);
  return __uint_as_float(bits) - 8388736.0f;
}

// n / divisor, cheaper than an integer division; exact far beyond the few thousand chunks that fit into shared memory.
__device__ int quotient(int n, int divisor) {
  return __float2int_rd((n + 0.5f) * __frcp_rn(static_cast<float>(divisor)));
}

__device__ float sum_over_warp(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// sums[16 x 8] += a[16 x 8 words] * b[8 words x 8]; a word is two 16-bit numbers or one tf32.
template <typename Element>
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define GEMMA4_MMA(kind)                                                                                       \
  asm volatile("mma.sync.aligned." kind " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"               \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<Element, __half>) {
    GEMMA4_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    GEMMA4_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    GEMMA4_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef GEMMA4_MMA
}

// Routing of one token by one warp: top_k times the largest logit that is left, the lowest index among equals.
// p[i] / sum of the chosen p = exp(l[i] - max) / sum of the chosen exp(l - max): the softmax's denominator cancels.

struct Routing {
  uint32_t keys[kMaxExperts];
  int experts[kMaxTopK];
  float weights[kMaxTopK];
};

// Unsigned numbers in the order of floats. NaN comes first, so it is chosen and makes every weight NaN; 0 comes after
// -inf and stands for an expert already taken.
__device__ uint32_t sort_key(float x) {
  if (isnan(x)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes +0: equal logits have equal keys
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float logit_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// The j-th chosen expert and its logit, in lane j.
struct Choice {
  int expert;
  float logit;
};

// Each lane looks after a run of experts and knows the best that is left of them; `take` strikes it off and finds the
// next, in the lane that won.
template <typename Take>
__device__ Choice choose(int top_k, const uint32_t& best, const uint32_t& best_expert, int* experts, Take take) {
  const int lane = threadIdx.x % kWarp;
  Choice choice{0, 0.0f};
#pragma unroll 1
  for (int j = 0; j < top_k; ++j) {
    const uint32_t winner = __reduce_max_sync(kAllLanes, best);
    const uint32_t expert = __reduce_min_sync(kAllLanes, best == winner ? best_expert : 0xffffffffu);
    if (lane == j) choice = Choice{static_cast<int>(expert), logit_of(winner)};
    if (best_expert == expert) take();
  }
  if (lane < top_k) experts[lane] = choice.expert;
  return choice;
}

// Up to kFewExperts a lane keeps its keys in registers, sorted; beyond, in shared memory.
constexpr int kKeysPerLane = 4;
constexpr int kFewExperts = kKeysPerLane * kWarp;

__device__ Choice choose_of_few(const Router& router, int64_t row, int* experts) {
  const int first = static_cast<int>(threadIdx.x % kWarp) * kKeysPerLane;
  float logits[kKeysPerLane];
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) {  // all in flight at once
    logits[i] = load_float(router.logits, router.type, row + min(first + i, router.num_experts - 1));
  }
  uint32_t keys[kKeysPerLane], ids[kKeysPerLane];
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) {
    ids[i] = first + i;
    keys[i] = first + i < router.num_experts ? sort_key(logits[i]) : 0;
  }
#pragma unroll
  for (int last = kKeysPerLane - 1; last > 0; --last) {
#pragma unroll
    for (int i = 0; i < last; ++i) {  // neighbours only: equal keys keep their order
      const bool swap = keys[i + 1] > keys[i];
      const uint32_t key = keys[i], id = ids[i];
      keys[i] = swap ? keys[i + 1] : key;
      ids[i] = swap ? ids[i + 1] : id;
      keys[i + 1] = swap ? key : keys[i + 1];
      ids[i + 1] = swap ? id : ids[i + 1];
    }
  }
  return choose(router.top_k, keys[0], ids[0], experts, [&] {
#pragma unroll
    for (int i = 0; i + 1 < kKeysPerLane; ++i) {
      keys[i] = keys[i + 1];
      ids[i] = ids[i + 1];
    }
    keys[kKeysPerLane - 1] = 0;
    ids[kKeysPerLane - 1] = 0xffffffffu;
  });
}

__device__ Choice choose_with_warp(const Router& router, int64_t token, Routing* shared) {
  static_assert(kMaxTopK <= kWarp, "lane j holds the j-th chosen expert");
  const int lane = threadIdx.x % kWarp, num_experts = router.num_experts;
  const int64_t row = token * num_experts;
  if (num_experts <= kFewExperts) return choose_of_few(router, row, shared->experts);
  const int per_lane = (num_experts + kWarp - 1) / kWarp;
  const int first = min(lane * per_lane, num_experts), last = min(first + per_lane, num_experts);
  uint32_t best = 0, best_expert = 0xffffffffu;
  const auto find = [&] {
    best = 0;
#pragma unroll 1
    for (int e = first; e < last; ++e) {
      const uint32_t key = shared->keys[e];
      if (key > best) {
        best = key;
        best_expert = e;
      }
    }
  };
#pragma unroll 1
  for (int e = first; e < last; ++e) shared->keys[e] = sort_key(load_float(router.logits, router.type, row + e));
  find();
  return choose(router.top_k, best, best_expert, shared->experts, [&] {
    shared->keys[best_expert] = 0;
    find();
  });
}

// The weights of the chosen experts: apart, because few tokens' kernels load weights before they need it.
__device__ void weigh_with_warp(const Router& router, const Choice& choice, Routing* shared) {
  const int lane = threadIdx.x % kWarp;
  const float largest = __shfl_sync(kAllLanes, choice.logit, 0);
  const float power = lane < router.top_k ? expf(choice.logit - largest) : 0.0f;
  const float sum = sum_over_warp(power);
  if (lane < router.top_k) {
    // 1 <= sum <= 32, where the quick division is off by two roundings at most.
    shared->weights[lane] = __fdividef(power, sum) * load_float(router.per_expert_scale, router.type, choice.expert);
  }
}

__device__ void route_with_warp(const Router& router, int64_t token, Routing* shared) {
  weigh_with_warp(router, choose_with_warp(router, token, shared), shared);
  __syncwarp();
}

// Pair p = token * top_k + j: experts[p], weights[p]. A warp per token.
constexpr int kRouteWarps = 4;
__global__ void __launch_bounds__(kRouteWarps* kWarp)
    route_tokens(Router router, int64_t num_tokens, int* experts, float* weights) {
  __shared__ Routing routings[kRouteWarps];
  Routing& routing = routings[threadIdx.x / kWarp];
  const int64_t token = int64_t{blockIdx.x} * kRouteWarps + threadIdx.x / kWarp;
  if (token >= num_tokens) return;
  route_with_warp(router, token, &routing);
  const int j = threadIdx.x % kWarp;
  if (j < router.top_k) {
    experts[token * router.top_k + j] = routing.experts[j];
    weights[token * router.top_k + j] = routing.weights[j];
  }
}

}  // namespace
}  // namespace gemma4
