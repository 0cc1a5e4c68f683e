// Gemma4MoE in CUDA. Compile:
//   nvcc -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -c kernel_cuda.cu
//
// Three versions of one op, from naive to fast; kernel_driver.cu compares each with the NumPy reference, then times it.
//   1. naive         one thread per element, loops as in reference.py: in this file
//   2. few tokens    decode, two launches: kernel_few_tokens.cuh, and kernel_few_int4.cuh for int4
//   3. many tokens   prefill on tensor cores: kernel_many_tokens.cuh
//
// Sums are in fp32 and weights are never rounded: codes go through the tensor cores as exact small integers and the
// scale is applied to their fp32 sums. Between the two projections activations stay in fp32 (version 3 rounds them to
// tf32, fp32's range with 11 significant bits), because gate * up overflows fp16.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "kernel.h"
#include "kernel_common.cuh"
#include "kernel_few_int4.cuh"
#include "kernel_few_tokens.cuh"
#include "kernel_many_tokens.cuh"

namespace gemma4 {
namespace {

// Version 1, naive: what every other version must equal.

template <typename Real, WeightFormat kFormat>
__device__ float weight_at(const Weights& weights, int64_t row, int64_t k) {
  const int64_t i = row * weights.k + k;
  if (kFormat == WeightFormat::kInt8) {
    return static_cast<const int8_t*>(weights.values)[i] * static_cast<const float*>(weights.scales)[row];
  }
  if (kFormat == WeightFormat::kInt4) {
    const int byte = static_cast<const uint8_t*>(weights.values)[i / 2];
    const int code = (((i & 1) ? byte >> 4 : byte & 15) ^ 8) - 8;
    return code * block_scale(weights, static_cast<const uint16_t*>(weights.scales)[i >> weights.block_shift]);
  }
  return to_float(static_cast<const Real*>(weights.values)[i]);
}

// activated[p, f] = weight of pair p * gelu(gate · x) * (up · x)
template <typename Real, WeightFormat kFormat>
__global__ void naive_gate_up(const Real* hidden_states, Weights gate_up, const int* experts, const float* pair_weights,
                              int top_k, int64_t count, float* activated) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int num_f = gate_up.rows / 2;
  const int64_t pair = i / num_f, f = i % num_f;
  const Real* x = hidden_states + pair / top_k * gate_up.k;
  const int64_t row = int64_t{experts[pair]} * gate_up.rows + f;
  float gate = 0.0f, up = 0.0f;
  for (int k = 0; k < gate_up.k; ++k) {
    gate += weight_at<Real, kFormat>(gate_up, row, k) * to_float(x[k]);
    up += weight_at<Real, kFormat>(gate_up, row + num_f, k) * to_float(x[k]);
  }
  activated[i] = pair_weights[pair] * (gelu_tanh(gate) * up);
}

// output[t, e] = sum over the token's pairs of down[expert, e] · activated[pair]
template <typename Real, WeightFormat kFormat>
__global__ void naive_down(Weights down, const int* experts, const float* activated, int top_k, int64_t count,
                           Real* output) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t token = i / down.rows, e = i % down.rows;
  float sum = 0.0f;
  for (int64_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
    const int64_t row = int64_t{experts[pair]} * down.rows + e;
    for (int f = 0; f < down.k; ++f) sum += weight_at<Real, kFormat>(down, row, f) * activated[pair * down.k + f];
  }
  store(output + i, sum);
}

// Launching.

constexpr size_t kAlignment = 256;
constexpr size_t kMaxStagedBytes = 40 * 1024;  // beside Routing, within the 48 KB every GPU gives without asking

struct Workspace {
  int* experts;
  float* pair_weights;
  float* activated;
  int* rows;
  Tile* tiles;
  int* num_tiles;
  float* partial;
  size_t bytes;
};

Workspace divide(void* start, const MoeSizes& sizes, MoePath path) {
  size_t bytes = 0;
  const auto take = [&](size_t count, size_t size) {
    char* at = start == nullptr ? nullptr : static_cast<char*>(start) + bytes;
    bytes += (count * size + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  };
  const size_t pairs = static_cast<size_t>(sizes.num_tokens * sizes.top_k);
  Workspace workspace{};
  workspace.activated = reinterpret_cast<float*>(take(pairs * sizes.intermediate_size, sizeof(float)));
  if (path != MoePath::kFewTokens) {
    workspace.experts = reinterpret_cast<int*>(take(pairs, sizeof(int)));
    workspace.pair_weights = reinterpret_cast<float*>(take(pairs, sizeof(float)));
  }
  if (path == MoePath::kManyTokens) {
    workspace.rows = reinterpret_cast<int*>(take(pairs, sizeof(int)));
    workspace.tiles = reinterpret_cast<Tile*>(take(max_tiles(sizes, kFewRows), sizeof(Tile)));
    workspace.num_tiles = reinterpret_cast<int*>(take(1, sizeof(int)));
    workspace.partial = reinterpret_cast<float*>(take(pairs * sizes.hidden_size, sizeof(float)));
  }
  workspace.bytes = bytes;
  return workspace;
}

template <WeightFormat kFormat>
size_t few_bytes(int64_t length) {
  return staged_floats<kFormat>(static_cast<int>(length)) * sizeof(float);
}

// Shared memory of the few-token kernels in the format that needs most, because the workspace is asked for before the
// weights are known.
size_t most_few_bytes(const MoeSizes& sizes) {
  const int64_t longest = std::max(sizes.hidden_size, sizes.top_k * sizes.intermediate_size);
  return std::max({few_bytes<WeightFormat::kInt8>(longest), few_bytes<WeightFormat::kFloat>(longest),
                   int4_gate_up_bytes(sizes.hidden_size), int4_down_bytes(sizes.intermediate_size, sizes.top_k)});
}

MoePath choose(const MoeSizes& sizes, MoePath path) {
  if (path != MoePath::kAuto) return path;
  const bool fits = most_few_bytes(sizes) <= kMaxStagedBytes;
  return sizes.num_tokens <= kFewTokens && fits ? MoePath::kFewTokens : MoePath::kManyTokens;
}

// Starts while its predecessor still runs, where the GPU can (see wait_for_previous_kernel).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                         Arguments... arguments) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

unsigned blocks_for(int64_t count, int per_block) { return static_cast<unsigned>((count + per_block - 1) / per_block); }

template <typename Real, WeightFormat kFormat>
cudaError_t launch(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors, MoePath path,
                   cudaStream_t stream) {
  const int top_k = static_cast<int>(sizes.top_k);
  const int E = static_cast<int>(sizes.hidden_size), F = static_cast<int>(sizes.intermediate_size);
  const int64_t pairs = sizes.num_tokens * top_k;
  int block_shift = 0;
  while (int64_t{1} << block_shift < types.block) ++block_shift;
  const Router router{tensors.router_logits, tensors.per_expert_scale, types.router,
                      static_cast<int>(sizes.num_experts), top_k};
  const Weights gate_up{tensors.gate_up_proj, tensors.gate_up_scales, 2 * F, E, block_shift, types.scales};
  const Weights down{tensors.down_proj, tensors.down_scales, E, F, block_shift, types.scales};
  const auto* hidden_states = static_cast<const Real*>(tensors.hidden_states);
  auto* output = static_cast<Real*>(tensors.output);
  const Workspace space = divide(tensors.workspace, sizes, path);

  if (path == MoePath::kFewTokens) {
    const auto tokens = static_cast<unsigned>(sizes.num_tokens);
    if constexpr (kIsInt4<kFormat>) {
      const auto is_paired = [&](int k) { return types.block == 32 && k / 32 % 2 == 0; };
      const dim3 gate_up_grid(blocks_for(F, 8 * kInt4GateUpTiles), static_cast<unsigned>(pairs));
      const cudaError_t error = launch_early(
          is_paired(E) ? few_int4_gate_up<Real, true> : few_int4_gate_up<Real, false>, gate_up_grid,
          kInt4GateUpWarps * kWarp, int4_gate_up_bytes(E), stream, hidden_states, router, gate_up, space.activated);
      if (error != cudaSuccess) return error;
      return launch_early(is_paired(F) ? few_int4_down<Real, true> : few_int4_down<Real, false>,
                          dim3(blocks_for(E, 16), tokens), kInt4DownWarps * kWarp, int4_down_bytes(F, top_k), stream,
                          router, down, space.activated, output);
    } else {
      const dim3 gate_up_grid(blocks_for(F, kGateUpWarps * 2), static_cast<unsigned>(pairs));
      const cudaError_t error =
          launch_early(few_gate_up<Real, kFormat>, gate_up_grid, kGateUpWarps * kWarp, few_bytes<kFormat>(E), stream,
                       hidden_states, router, gate_up, space.activated);
      if (error != cudaSuccess) return error;
      return launch_early(few_down<Real, kFormat>, dim3(blocks_for(E, kDownWarps * 2), tokens), kDownWarps * kWarp,
                          few_bytes<kFormat>(top_k * F), stream, router, down, space.activated, output);
    }
  }

  route_tokens<<<blocks_for(sizes.num_tokens, kRouteWarps), kRouteWarps * kWarp, 0, stream>>>(
      router, sizes.num_tokens, space.experts, space.pair_weights);
  if (path == MoePath::kNaive) {
    naive_gate_up<Real, kFormat><<<blocks_for(pairs * F, 256), 256, 0, stream>>>(
        hidden_states, gate_up, space.experts, space.pair_weights, top_k, pairs * F, space.activated);
    naive_down<Real, kFormat><<<blocks_for(sizes.num_tokens * E, 256), 256, 0, stream>>>(
        down, space.experts, space.activated, top_k, sizes.num_tokens * E, output);
    return cudaGetLastError();
  }
  const int rows = tile_rows(sizes);
  group_rows<<<1, 1024, 0, stream>>>(space.experts, static_cast<int>(pairs), router.num_experts, rows, space.rows,
                                     space.tiles, space.num_tiles);
  const unsigned tiles = static_cast<unsigned>(max_tiles(sizes, rows));
  const auto project_up = rows == kFewRows ? many_project<Real, Real, kFormat, true, kFewRows>
                                           : many_project<Real, Real, kFormat, true, kManyRows>;
  const auto project_down = rows == kFewRows ? many_project<Real, float, kFormat, false, kFewRows>
                                             : many_project<Real, float, kFormat, false, kManyRows>;
  project_up<<<dim3(blocks_for(F, kTileColumns / 2), tiles), kTileThreads, 0, stream>>>(
      hidden_states, gate_up, space.rows, space.tiles, space.num_tiles, space.pair_weights, top_k, space.activated);
  project_down<<<dim3(blocks_for(E, kTileColumns), tiles), kTileThreads, 0, stream>>>(
      space.activated, down, space.rows, space.tiles, space.num_tiles, nullptr, top_k, space.partial);
  add_experts<Real><<<blocks_for(sizes.num_tokens * E / 4, 256), 256, 0, stream>>>(space.partial, E, top_k,
                                                                                   sizes.num_tokens * E, output);
  return cudaGetLastError();
}

template <typename Real>
cudaError_t launch_format(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors, MoePath path,
                          cudaStream_t stream) {
  switch (types.weights) {
    case WeightFormat::kFloat: return launch<Real, WeightFormat::kFloat>(sizes, types, tensors, path, stream);
    case WeightFormat::kInt8: return launch<Real, WeightFormat::kInt8>(sizes, types, tensors, path, stream);
    case WeightFormat::kInt4: return launch<Real, WeightFormat::kInt4>(sizes, types, tensors, path, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t moe_workspace_bytes(const MoeSizes& sizes, MoePath path) {
  return divide(nullptr, sizes, choose(sizes, path)).bytes;
}

bool moe_check(const MoeSizes& sizes, const MoeTypes& types, char* message, size_t message_size) {
  const auto refuse = [&](const char* name, const char* expected, int64_t found) {
    std::snprintf(message, message_size, "gemma4::Gemma4MoE %s: expected %s, found %lld", name, expected,
                  static_cast<long long>(found));
    return false;
  };
  if (types.real != FloatType::kFloat16 && types.real != FloatType::kBFloat16) {
    return refuse("hidden_states", "float16 or bfloat16", static_cast<int64_t>(types.real));
  }
  if (sizes.num_tokens < 0 || sizes.num_tokens > 65535) return refuse("T", "0..65535 tokens", sizes.num_tokens);
  if (sizes.num_experts < 1 || sizes.num_experts > kMaxExperts) return refuse("X", "1..1024", sizes.num_experts);
  if (sizes.top_k < 1 || sizes.top_k > std::min<int64_t>(sizes.num_experts, kMaxTopK)) {
    return refuse("top_k", "1..min(X, 32)", sizes.top_k);
  }
  for (const auto& [name, size] : {std::pair{"E", sizes.hidden_size}, std::pair{"F", sizes.intermediate_size}}) {
    if (size < 32 || size % 32 != 0 || size > 65536) return refuse(name, "a multiple of 32 up to 65536", size);
    if (types.weights == WeightFormat::kInt4) {
      const bool known = types.block == 32 || types.block == 64 || types.block == 128;
      if (!known || size % types.block != 0) {
        char expected[64];
        std::snprintf(expected, sizeof expected, "32, 64 or 128 that divides %s = %lld", name,
                      static_cast<long long>(size));
        return refuse("block", expected, types.block);
      }
    }
  }
  if (types.weights == WeightFormat::kInt4 && types.scales == FloatType::kFloat32) {
    return refuse("scales", "float16 or bfloat16 with int4", static_cast<int64_t>(types.scales));
  }
  if (types.weights != WeightFormat::kInt4 && types.block != 0) return refuse("block", "0 without int4", types.block);
  return true;
}

int moe_launch(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors, MoePath path, void* stream) {
  char message[160];
  if (!moe_check(sizes, types, message, sizeof message)) return cudaErrorInvalidValue;
  if (sizes.num_tokens == 0) return cudaSuccess;
  const MoePath chosen = choose(sizes, path);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return types.real == FloatType::kFloat16 ? launch_format<__half>(sizes, types, tensors, chosen, cuda_stream)
                                           : launch_format<__nv_bfloat16>(sizes, types, tensors, chosen, cuda_stream);
}

}  // namespace gemma4
