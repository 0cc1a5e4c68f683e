// Gemma4MoE on a CPU: plain C++, the loops of reference.py, sums in double. It is the first kernel to pass and what the
// onnxruntime shell is checked with where there is no GPU; it is not fast.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernel.h"

namespace gemma4 {
namespace {

// A 16-bit float with kMantissa bits after the point; its smallest normal exponent is kSmallest.
template <int kMantissa, int kSmallest>
struct Float16 {
  static constexpr int kInfinity = 0x7FFF >> kMantissa << kMantissa;

  static double value(uint16_t bits) {
    const int exponent = (bits & 0x7FFF) >> kMantissa, fraction = bits & ((1 << kMantissa) - 1);
    double magnitude = std::ldexp(fraction, kSmallest - kMantissa);
    if (exponent > 0) magnitude = std::ldexp(fraction + (1 << kMantissa), kSmallest - kMantissa + exponent - 1);
    if ((bits & 0x7FFF) >= kInfinity) magnitude = fraction == 0 ? INFINITY : NAN;
    return bits >> 15 ? -magnitude : magnitude;
  }

  // Nearest, ties to even. A magnitude that rounds up to the next power of two carries into the exponent by itself.
  static uint16_t bits(double x) {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return static_cast<uint16_t>(kInfinity | 1 << (kMantissa - 1));
    if (std::isinf(x)) return static_cast<uint16_t>(sign | kInfinity);
    const int exponent = x == 0.0 ? kSmallest : std::max(std::ilogb(x), kSmallest);
    const double fraction = std::nearbyint(std::ldexp(std::abs(x), kMantissa - exponent));
    if (exponent > kSmallest + 0x7FFF) return static_cast<uint16_t>(sign | kInfinity);
    const long magnitude = (static_cast<long>(exponent - kSmallest) << kMantissa) + static_cast<long>(fraction);
    return static_cast<uint16_t>(sign | std::min<long>(magnitude, kInfinity));
  }
};
using Half = Float16<10, -14>;
using BFloat16 = Float16<7, -126>;

double load(const void* values, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == FloatType::kFloat16 ? Half::value(bits) : BFloat16::value(bits);
}

void store(void* values, FloatType type, int64_t i, double x) {
  if (type == FloatType::kFloat32) {
    static_cast<float*>(values)[i] = static_cast<float>(x);
  } else {
    static_cast<uint16_t*>(values)[i] = type == FloatType::kFloat16 ? Half::bits(x) : BFloat16::bits(x);
  }
}

// One of the two stacks of matrices, [X * rows, k].
struct Matrix {
  const void* values;
  const void* scales;
  int64_t k;
};

double weight_at(const MoeTypes& types, const Matrix& matrix, int64_t row, int64_t i) {
  const int64_t at = row * matrix.k + i;
  switch (types.weights) {
    case WeightFormat::kFloat: return load(matrix.values, types.real, at);
    case WeightFormat::kInt8:
      return static_cast<const int8_t*>(matrix.values)[at] * load(matrix.scales, FloatType::kFloat32, row);
    case WeightFormat::kInt4: break;
  }
  const int byte = static_cast<const uint8_t*>(matrix.values)[at / 2];
  const int code = ((at % 2 == 0 ? byte & 15 : byte >> 4) ^ 8) - 8;
  return code * load(matrix.scales, types.scales, at / types.block);
}

double dot(const MoeTypes& types, const Matrix& matrix, int64_t row, const std::vector<double>& x) {
  double sum = 0.0;
  for (int64_t i = 0; i < matrix.k; ++i) sum += weight_at(types, matrix, row, i) * x[i];
  return sum;
}

double gelu_tanh(double x) {
  return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

struct Choice {
  std::vector<int64_t> experts;
  std::vector<double> weights;
};

// The top_k experts of one token, the strongest first and the lower index first among equals. A NaN makes all NaN.
Choice route(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors, int64_t token) {
  std::vector<double> logits(sizes.num_experts);
  bool has_nan = false;
  for (int64_t e = 0; e < sizes.num_experts; ++e) {
    logits[e] = load(tensors.router_logits, types.router, token * sizes.num_experts + e);
    has_nan = has_nan || std::isnan(logits[e]);
  }
  Choice choice{std::vector<int64_t>(sizes.num_experts), std::vector<double>(sizes.top_k)};
  std::iota(choice.experts.begin(), choice.experts.end(), 0);
  if (!has_nan) {
    std::stable_sort(choice.experts.begin(), choice.experts.end(),
                     [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  }
  choice.experts.resize(sizes.top_k);
  double sum = 0.0;
  for (const int64_t expert : choice.experts) sum += std::exp(logits[expert] - logits[choice.experts[0]]);
  for (int64_t j = 0; j < sizes.top_k; ++j) {
    const int64_t expert = choice.experts[j];
    const double scale = load(tensors.per_expert_scale, types.router, expert);
    const double probability = std::exp(logits[expert] - logits[choice.experts[0]]) / sum;
    choice.weights[j] = has_nan ? std::numeric_limits<double>::quiet_NaN() : probability * scale;
  }
  return choice;
}

}  // namespace

void moe_compute_on_cpu(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors) {
  const int64_t E = sizes.hidden_size, F = sizes.intermediate_size;
  const Matrix gate_up{tensors.gate_up_proj, tensors.gate_up_scales, E};
  const Matrix down{tensors.down_proj, tensors.down_scales, F};
  std::vector<double> x(E), activated(F), total(E);
  for (int64_t t = 0; t < sizes.num_tokens; ++t) {
    for (int64_t e = 0; e < E; ++e) x[e] = load(tensors.hidden_states, types.real, t * E + e);
    std::fill(total.begin(), total.end(), 0.0);
    const Choice choice = route(sizes, types, tensors, t);
    for (int64_t j = 0; j < sizes.top_k; ++j) {
      const int64_t first = choice.experts[j] * 2 * F;
      for (int64_t f = 0; f < F; ++f) {
        activated[f] = gelu_tanh(dot(types, gate_up, first + f, x)) * dot(types, gate_up, first + F + f, x);
      }
      for (int64_t e = 0; e < E; ++e) {
        total[e] += choice.weights[j] * dot(types, down, choice.experts[j] * E + e, activated);
      }
    }
    for (int64_t e = 0; e < E; ++e) store(tensors.output, types.real, t * E + e, total[e]);
  }
}

}  // namespace gemma4
