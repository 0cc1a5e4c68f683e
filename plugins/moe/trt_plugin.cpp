// Gemma4MoE as a TensorRT plugin: unpack, check, launch. Serves TensorRT-RTX and TensorRT; no exception leaves it.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>

#include "../common/tensorrt_plugin.h"
#include "call.h"
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

Number number(DataType type) noexcept {
  switch (type) {
    case DataType::kFloat: return Number::kFloat32;
    case DataType::kHalf: return Number::kFloat16;
    case DataType::kBFloat16: return Number::kBFloat16;
    case DataType::kInt8: return Number::kInt8;
    case DataType::kInt4: return Number::kInt4;
    default: return Number::kOther;
  }
}

// `at` gives input i's descriptor.
template <typename At>
Call read_descs(At at, int32_t count, int64_t tokens, int32_t top_k, int32_t block) noexcept {
  Input inputs[kMostInputs] = {};
  for (int32_t i = 0; i < count && i < kMostInputs; ++i) {
    const PluginTensorDesc& desc = at(i);
    inputs[i].type = number(desc.type);
    inputs[i].rank = desc.dims.nbDims;
    std::memcpy(inputs[i].sizes, desc.dims.d, sizeof desc.dims.d);
  }
  return read_call(inputs, count, tokens, top_k, block);
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
    if (!check(call.holds, kWrongInputs)) return 1;
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
    if (pos == 0) return tensor.type == DataType::kHalf || tensor.type == DataType::kBFloat16;
    if (pos == num_in || (num_in == 5 && pos >= 3)) return tensor.type == real;
    if (pos == 1) return float_type(number(tensor.type), &type);
    if (pos == 2) return tensor.type == all[1].desc.type;
    if (pos == 3) return tensor.type == DataType::kInt4 || tensor.type == DataType::kInt8;
    if (pos == 4) return float_type(number(tensor.type), &type);
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
    const bool known = num_inputs_ == 5 || num_inputs_ == kMostInputs;
    if (!check(known, "Gemma4MoE: enqueue before onShapeChange")) return 1;
    const auto at = [&](int32_t i) -> const PluginTensorDesc& { return descs[i]; };
    const Call call = read_descs(at, num_inputs_, num_tokens(descs[0].dims), top_k_, block_);
    if (!check(call.holds, kWrongInputs)) return 1;
    const MoeTensors tensors = tensors_of(in, num_inputs_ == kMostInputs, out[0], workspace);
    return moe_launch(call.sizes, call.types, tensors, MoePath::kAuto, stream);
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    collection_ = {2, fields_};
    return &collection_;
  }

 private:
  Call read(const DynamicPluginTensorDesc* in, int32_t num_in, int64_t tokens) const noexcept {
    const auto at = [&](int32_t i) -> const PluginTensorDesc& { return in[i].desc; };
    return read_descs(at, num_in, tokens, top_k_, block_);
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
