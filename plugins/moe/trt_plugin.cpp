// Gemma4MoE as a TensorRT plugin: unpack, check, launch. Serves TensorRT-RTX and TensorRT; no exception leaves it.
//
// Inputs: hidden_states [B,T,E], router_logits [B,T,X], per_expert_scale [X], then the two weights. A quantised weight is
// two inputs, codes [X,N,K] and scales ([X,N,K/block] for int4, [X,N] or [X,N,1] for int8), else one. Attributes: top_k;
// block, 0 unless the weights are int4.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <new>

#include "../common/tensorrt_plugin.h"
#include "kernel.h"

namespace gemma4 {
namespace {

using namespace tensorrt;

constexpr char kName[] = "Gemma4MoE";
constexpr char kVersion[] = "1";  // of contract.py
constexpr char kNamespace[] = "";

ILoggerFinder* logger_finder = nullptr;

// Says what is wrong where the builder's or runtime's user will read it; true if `holds`.
bool check(bool holds, const char* message) noexcept {
  if (holds) return true;
  ILogger* logger = logger_finder == nullptr ? nullptr : logger_finder->findLogger();
  if (logger != nullptr) {
    logger->log(Severity::kError, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
  return false;
}

bool float_type(DataType type, FloatType* found) noexcept {
  switch (type) {
    case DataType::kFloat: *found = FloatType::kFloat32; return true;
    case DataType::kHalf: *found = FloatType::kFloat16; return true;
    case DataType::kBFloat16: *found = FloatType::kBFloat16; return true;
    default: return false;
  }
}

// What one call has, read from its descriptors; `holds` is false where they are no Gemma4MoE.
struct Call {
  MoeSizes sizes;
  MoeTypes types;
  bool holds;
};

bool has_shape(const Dims& dims, std::initializer_list<int64_t> expected) noexcept {
  if (dims.nbDims != static_cast<int32_t>(expected.size())) return false;
  const int64_t* found = dims.d;
  for (const int64_t size : expected) {
    if (*found++ != size) return false;
  }
  return true;
}

// Scales per row of a weight [X, N, K], or 0 where the scales have other shapes than [X, N, per_row] and [X, N].
int64_t scales_per_row(const Dims& scales, const Dims& weight) noexcept {
  if (has_shape(scales, {weight.d[0], weight.d[1]})) return 1;
  const bool is_cube = scales.nbDims == 3 && scales.d[0] == weight.d[0] && scales.d[1] == weight.d[1];
  return is_cube ? scales.d[2] : 0;
}

Call read_call(const PluginTensorDesc* const* inputs, int32_t num_inputs, int64_t num_tokens, int64_t top_k,
               int64_t block) noexcept {
  const bool quantised = num_inputs == 7;
  Call call{{}, {}, false};
  if (num_inputs != 5 && num_inputs != 7) return call;
  const Dims& gate_up = inputs[3]->dims;
  const Dims& down = inputs[quantised ? 5 : 4]->dims;
  if (inputs[0]->dims.nbDims != 3 || gate_up.nbDims != 3 || down.nbDims != 3) return call;
  const int64_t E = inputs[0]->dims.d[2], X = gate_up.d[0], F = down.d[2];
  call.sizes = {num_tokens, E, X, F, top_k};
  const bool types_hold = float_type(inputs[0]->type, &call.types.real) &&
                          float_type(inputs[1]->type, &call.types.router) && inputs[2]->type == inputs[1]->type;
  call.types.block = block;
  call.holds = types_hold && inputs[1]->dims.nbDims == 3 && inputs[1]->dims.d[2] == X &&
               has_shape(inputs[2]->dims, {X}) && has_shape(gate_up, {X, 2 * F, E}) && has_shape(down, {X, E, F});
  const DataType stored = inputs[3]->type;
  if (!quantised) {
    call.types.weights = WeightFormat::kFloat;
    call.holds = call.holds && stored == inputs[0]->type && inputs[4]->type == stored;
    return call;
  }
  const bool is_int4 = stored == DataType::kInt4;
  call.types.weights = is_int4 ? WeightFormat::kInt4 : WeightFormat::kInt8;
  call.holds = call.holds && (is_int4 || stored == DataType::kInt8) && inputs[5]->type == stored &&
               float_type(inputs[4]->type, &call.types.scales) && inputs[6]->type == inputs[4]->type &&
               is_int4 != (call.types.scales == FloatType::kFloat32) &&
               scales_per_row(inputs[4]->dims, gate_up) == (block > 0 ? E / block : 1) &&
               scales_per_row(inputs[6]->dims, down) == (block > 0 ? F / block : 1);
  return call;
}

int64_t num_tokens(const Dims& hidden_states) noexcept { return hidden_states.d[0] * hidden_states.d[1]; }

class MoePlugin final : public IPluginV3,
                        public IPluginV3OneCore,
                        public IPluginV3OneBuild,
                        public IPluginV3OneRuntime {
 public:
  MoePlugin(int32_t top_k, int32_t block) noexcept : top_k_(top_k), block_(block) {
    fields_[0] = {"top_k", &top_k_, PluginFieldType::kInt32, 1};
    fields_[1] = {"block", &block_, PluginFieldType::kInt32, 1};
  }
  MoePlugin(const MoePlugin&) = delete;
  MoePlugin& operator=(const MoePlugin&) = delete;

  IPluginCapability* getCapabilityInterface(Capability type) noexcept override {
    switch (type) {
      case Capability::kCore: return static_cast<IPluginV3OneCore*>(this);
      case Capability::kBuild: return static_cast<IPluginV3OneBuild*>(this);
      case Capability::kRuntime: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  MoePlugin* clone() noexcept override { return new (std::nothrow) MoePlugin(top_k_, block_); }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_in, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    const Call call = read(in, num_in, num_tokens(in[0].max));
    if (!check(call.holds, "Gemma4MoE: types or shapes of its inputs are not those of plugins/moe/README.md")) return 1;
    char message[160];
    return check(moe_check(call.sizes, call.types, message, sizeof message), message) ? 0 : 1;
  }
  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = in[0];
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder&) noexcept override {
    out[0] = in[0];
    return 0;
  }
  bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* all, int32_t num_in,
                                 int32_t) noexcept override {
    const PluginTensorDesc& tensor = all[pos].desc;
    if (tensor.format != TensorFormat::kLinear) return false;
    const DataType real = all[0].desc.type;
    FloatType type;
    if (pos == 0) return float_type(tensor.type, &type) && type != FloatType::kFloat32;
    if (pos == num_in || (num_in == 5 && pos >= 3)) return tensor.type == real;
    if (pos == 1) return float_type(tensor.type, &type);
    if (pos == 2) return tensor.type == all[1].desc.type;
    if (pos == 3) return tensor.type == DataType::kInt4 || tensor.type == DataType::kInt8;
    if (pos == 4) return float_type(tensor.type, &type);
    return tensor.type == all[pos - 2].desc.type;
  }
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t num_in, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    Call call = read(in, num_in, num_tokens(in[0].max));
    const size_t most = moe_workspace_bytes(call.sizes, MoePath::kAuto);
    // A short call takes the other kernels, which may need more than a long one.
    call.sizes.num_tokens = call.sizes.num_tokens < kFewTokens ? call.sizes.num_tokens : kFewTokens;
    const size_t few = moe_workspace_bytes(call.sizes, MoePath::kAuto);
    return most > few ? most : few;
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t num_in, const PluginTensorDesc*,
                        int32_t) noexcept override {
    num_inputs_ = num_in;
    return 0;
  }
  int32_t enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* in, void* const* out,
                  void* workspace, void* stream) noexcept override {
    const PluginTensorDesc* inputs[7];
    if (!check(num_inputs_ == 5 || num_inputs_ == 7, "Gemma4MoE: enqueue before onShapeChange")) return 1;
    for (int32_t i = 0; i < num_inputs_; ++i) inputs[i] = &descs[i];
    const Call call = read_call(inputs, num_inputs_, num_tokens(descs[0].dims), top_k_, block_);
    if (!check(call.holds, "Gemma4MoE: types or shapes of its inputs are not those of plugins/moe/README.md")) return 1;
    const bool quantised = num_inputs_ == 7;
    const MoeTensors tensors{in[0], in[1], in[2], in[3], quantised ? in[4] : nullptr, in[quantised ? 5 : 4],
                             quantised ? in[6] : nullptr, out[0], workspace};
    return moe_launch(call.sizes, call.types, tensors, MoePath::kAuto, stream);
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    collection_ = {2, fields_};
    return &collection_;
  }

 private:
  Call read(const DynamicPluginTensorDesc* in, int32_t num_in, int64_t tokens) const noexcept {
    const PluginTensorDesc* inputs[7] = {};
    for (int32_t i = 0; i < num_in && i < 7; ++i) inputs[i] = &in[i].desc;
    return read_call(inputs, num_in, tokens, top_k_, block_);
  }

  int32_t top_k_, block_;
  int32_t num_inputs_ = 0;
  PluginField fields_[2];
  PluginFieldCollection collection_{};
};

class MoeCreator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, Phase) noexcept override {
    int32_t top_k = 0, block = 0;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      if (std::strcmp(field.name, "top_k") == 0) top_k = value(field);
      if (std::strcmp(field.name, "block") == 0) block = value(field);
    }
    if (!check(top_k > 0, "Gemma4MoE: attribute top_k is missing")) return nullptr;
    return new (std::nothrow) MoePlugin(top_k, block);
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static int32_t value(const PluginField& field) noexcept {
    if (field.data == nullptr || field.length < 1) return 0;
    if (field.type == PluginFieldType::kInt64) return static_cast<int32_t>(*static_cast<const int64_t*>(field.data));
    return field.type == PluginFieldType::kInt32 ? *static_cast<const int32_t*>(field.data) : 0;
  }

  PluginField fields_[2] = {{"top_k", nullptr, PluginFieldType::kInt32, 1},
                            {"block", nullptr, PluginFieldType::kInt32, 1}};
  PluginFieldCollection collection_{2, fields_};
};

}  // namespace
}  // namespace gemma4

extern "C" {

// What IPluginRegistry::loadLibrary looks for.
__attribute__((visibility("default"))) void setLoggerFinder(gemma4::tensorrt::ILoggerFinder* finder) {
  gemma4::logger_finder = finder;
}

__attribute__((visibility("default"))) gemma4::tensorrt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static gemma4::MoeCreator moe;
  static gemma4::tensorrt::IPluginCreatorInterface* const creators[] = {&moe};
  count = 1;
  return creators;
}

// op=contract version, by spaces: what runtime/engine/plugins.py compares with the contracts.
__attribute__((visibility("default"))) const char* gemma4_plugin_contracts() { return "Gemma4MoE=1"; }

}  // extern "C"
