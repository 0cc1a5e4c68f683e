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
};

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

// Routing of one token by one block. An expert's rank is the number of experts that beat it: a larger logit, or the
// same logit and a lower index. That needs no sort, decides ties, and every expert is ranked independently.
// p[i] / sum of the chosen p = exp(l[i] - max) / sum of the chosen exp(l - max): the softmax's denominator cancels.
// A NaN beats nobody and nobody beats it, so it is looked for: all weights are NaN then, the experts any valid ones.

struct Routing {
  bool has_nan;
  float logits[kMaxExperts];
  float chosen[kMaxTopK];
  int experts[kMaxTopK];
  float weights[kMaxTopK];
};

__device__ void route(const Router& router, int64_t token, Routing* shared) {
  if (threadIdx.x == 0) shared->has_nan = false;
  for (int j = threadIdx.x; j < router.top_k; j += blockDim.x) {
    shared->experts[j] = j;
    shared->chosen[j] = 0.0f;
  }
  for (int e = threadIdx.x; e < router.num_experts; e += blockDim.x) {
    shared->logits[e] = load_float(router.logits, router.type, token * router.num_experts + e);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < router.num_experts; e += blockDim.x) {
    const float logit = shared->logits[e];
    int rank = 0;
    for (int other = 0; other < router.num_experts; ++other) {
      const float rival = shared->logits[other];
      rank += rival > logit || (rival == logit && other < e);
    }
    if (isnan(logit)) {
      shared->has_nan = true;
    } else if (rank < router.top_k) {
      shared->experts[rank] = e;
      shared->chosen[rank] = logit;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < router.top_k; j += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < router.top_k; ++i) sum += expf(shared->chosen[i] - shared->chosen[0]);
    const float scale = load_float(router.per_expert_scale, router.type, shared->experts[j]);
    const float weight = expf(shared->chosen[j] - shared->chosen[0]) / sum * scale;
    shared->weights[j] = shared->has_nan ? nanf("") : weight;
  }
  __syncthreads();
}

// Pair p = token * top_k + j: experts[p], weights[p].
__global__ void route_tokens(Router router, int* experts, float* weights) {
  __shared__ Routing routing;
  const int64_t token = blockIdx.x;
  route(router, token, &routing);
  for (int j = threadIdx.x; j < router.top_k; j += blockDim.x) {
    experts[token * router.top_k + j] = routing.experts[j];
    weights[token * router.top_k + j] = routing.weights[j];
  }
}

}  // namespace
}  // namespace gemma4
