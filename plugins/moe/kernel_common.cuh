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

__device__ float sum_over_warp(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
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

__device__ void route_with_warp(const Router& router, int64_t token, Routing* shared) {
  static_assert(kMaxTopK <= kWarp, "lane j holds the j-th chosen expert");
  const int lane = threadIdx.x % kWarp;
  const int64_t first = token * router.num_experts;
  for (int e = lane; e < router.num_experts; e += kWarp) {
    shared->keys[e] = sort_key(load_float(router.logits, router.type, first + e));
  }
  __syncwarp();
  for (int j = 0; j < router.top_k; ++j) {
    uint32_t best = 0, expert = 0xffffffffu;
    for (int e = lane; e < router.num_experts; e += kWarp) {
      const uint32_t key = shared->keys[e];
      if (key > best) {
        best = key;
        expert = e;
      }
    }
    const uint32_t winner = __reduce_max_sync(kAllLanes, best);
    expert = __reduce_min_sync(kAllLanes, best == winner ? expert : 0xffffffffu);
    if (lane == 0) {
      shared->experts[j] = static_cast<int>(expert);
      shared->keys[expert] = 0;
    }
    __syncwarp();
  }
  const int expert = lane < router.top_k ? shared->experts[lane] : shared->experts[0];
  const float logit = load_float(router.logits, router.type, first + expert);
  const float largest = __shfl_sync(kAllLanes, logit, 0);
  const float power = lane < router.top_k ? expf(logit - largest) : 0.0f;
  const float sum = sum_over_warp(power);
  if (lane < router.top_k) {
    shared->weights[lane] = power / sum * load_float(router.per_expert_scale, router.type, expert);
  }
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
  __syncwarp();
  const int j = threadIdx.x % kWarp;
  if (j < router.top_k) {
    experts[token * router.top_k + j] = routing.experts[j];
    weights[token * router.top_k + j] = routing.weights[j];
  }
}

}  // namespace
}  // namespace gemma4
