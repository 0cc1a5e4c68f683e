// What both shells read from a node's inputs: sizes, types and where each tensor is.
//
// Inputs: hidden_states [B,T,E], router_logits [B,T,X], per_expert_scale [X], then the two weights. A quantised weight is
// two inputs, codes [X,N,K] and scales ([X,N,K/block] for int4, [X,N] or [X,N,1] for int8), else one. Attributes: top_k;
// block, 0 unless the weights are int4.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernel.h"

namespace gemma4 {

inline constexpr int kMostInputs = 7;
inline constexpr char kWrongInputs[] =
    "Gemma4MoE: types or shapes of its inputs are not those of plugins/moe/README.md";

enum class Number : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4, kOther = 5 };

struct Input {
  Number type;
  int32_t rank;
  int64_t sizes[8];
};

// `holds` is false where the inputs are no Gemma4MoE.
struct Call {
  MoeSizes sizes;
  MoeTypes types;
  bool holds;
};

inline bool float_type(Number type, FloatType* found) noexcept {
  if (type > Number::kBFloat16) return false;
  *found = static_cast<FloatType>(type);
  return true;
}

inline bool has_shape(const Input& input, std::initializer_list<int64_t> expected) noexcept {
  if (input.rank != static_cast<int32_t>(expected.size())) return false;
  const int64_t* found = input.sizes;
  for (const int64_t size : expected) {
    if (*found++ != size) return false;
  }
  return true;
}

// Scales per row of a weight [X, N, K], or 0 where the scales have other shapes than [X, N, per_row] and [X, N].
inline int64_t scales_per_row(const Input& scales, const Input& weight) noexcept {
  if (has_shape(scales, {weight.sizes[0], weight.sizes[1]})) return 1;
  const bool is_cube = scales.rank == 3 && scales.sizes[0] == weight.sizes[0] && scales.sizes[1] == weight.sizes[1];
  return is_cube ? scales.sizes[2] : 0;
}

inline Call read_call(const Input* inputs, int32_t num_inputs, int64_t num_tokens, int64_t top_k,
                      int64_t block) noexcept {
  const bool quantised = num_inputs == kMostInputs;
  Call call{{}, {}, false};
  if (num_inputs != 5 && num_inputs != kMostInputs) return call;
  const Input& gate_up = inputs[3];
  const Input& down = inputs[quantised ? 5 : 4];
  if (inputs[0].rank != 3 || gate_up.rank != 3 || down.rank != 3) return call;
  const int64_t E = inputs[0].sizes[2], X = gate_up.sizes[0], F = down.sizes[2];
  call.sizes = {num_tokens, E, X, F, top_k};
  const bool types_hold = float_type(inputs[0].type, &call.types.real) &&
                          float_type(inputs[1].type, &call.types.router) && inputs[2].type == inputs[1].type;
  call.types.block = block;
  call.holds = types_hold && inputs[1].rank == 3 && inputs[1].sizes[2] == X && has_shape(inputs[2], {X}) &&
               has_shape(gate_up, {X, 2 * F, E}) && has_shape(down, {X, E, F});
  const Number stored = gate_up.type;
  if (!quantised) {
    call.types.weights = WeightFormat::kFloat;
    call.holds = call.holds && stored == inputs[0].type && down.type == stored;
    return call;
  }
  const bool is_int4 = stored == Number::kInt4;
  call.types.weights = is_int4 ? WeightFormat::kInt4 : WeightFormat::kInt8;
  call.holds = call.holds && (is_int4 || stored == Number::kInt8) && down.type == stored &&
               float_type(inputs[4].type, &call.types.scales) && inputs[6].type == inputs[4].type &&
               is_int4 != (call.types.scales == FloatType::kFloat32) &&
               scales_per_row(inputs[4], gate_up) == (block > 0 ? E / block : 1) &&
               scales_per_row(inputs[6], down) == (block > 0 ? F / block : 1);
  return call;
}

// The kernel's view of the node's tensors, in the order of its inputs.
inline MoeTensors tensors_of(const void* const* in, bool quantised, void* output, void* workspace) noexcept {
  return {in[0], in[1], in[2], in[3], quantised ? in[4] : nullptr, in[quantised ? 5 : 4],
          quantised ? in[6] : nullptr, output, workspace};
}

}  // namespace gemma4
