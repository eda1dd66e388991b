// The stages written by `jitaccel export`, and the operators used between them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <filesystem>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.h"

// The inputs of a stage besides the weights; jitaccel/artefacts/export.py describes each.
struct StageInputs {
  at::Tensor state, anchors, nearest, blur, text, pooled, guidance, levels;

  // A stage that pools the picture has no anchors.
  std::vector<at::Tensor> in_order() const {
    if (!anchors.defined()) return {state, text, pooled, guidance, levels};
    return {state, anchors, nearest, blur, text, pooled, guidance, levels};
  }
};

struct StageOutputs {
  at::Tensor velocity, next_state;
};

class Stage {
 public:
  virtual ~Stage() = default;
  virtual StageOutputs run(const std::vector<at::Tensor>& weights, const StageInputs& inputs) = 0;
};

class CompiledStage : public Stage {
 public:
  CompiledStage(const std::string& path, at::Device device)
      : loader_(path, "model", /*run_single_threaded=*/false, /*num_runners=*/1, device.index()) {}

  StageOutputs run(const std::vector<at::Tensor>& weights, const StageInputs& inputs) override {
    std::vector<at::Tensor> all = weights;
    for (auto& tensor : inputs.in_order()) all.push_back(tensor);
    const auto outputs = loader_.run(all);
    return {outputs.at(0), outputs.at(1)};
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

class TracedStage : public Stage {
 public:
  TracedStage(const std::string& path, at::Device device) : module_(torch::jit::load(path, device)) {}

  StageOutputs run(const std::vector<at::Tensor>& weights, const StageInputs& inputs) override {
    std::vector<c10::IValue> all = {c10::IValue(weights)};
    for (auto& tensor : inputs.in_order()) all.emplace_back(tensor);
    const auto outputs = module_.forward(all).toTuple();
    return {outputs->elements().at(0).toTensor(), outputs->elements().at(1).toTensor()};
  }

 private:
  torch::jit::Module module_;
};

// Returns the line of an error that contains the reason; torch adds stack traces below it, TorchScript above it.
inline std::string reason(const std::exception& error) {
  const auto* torchs = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torchs != nullptr ? torchs->what_without_backtrace() : error.what();
  const bool is_last = text.find("Traceback of TorchScript") != std::string::npos;
  std::istringstream lines(text);
  std::string found;
  for (std::string line; std::getline(lines, line) && (is_last || found.empty());) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) found = line;
  }
  return found;
}

inline std::unique_ptr<Stage> load_stage(const std::filesystem::path& folder, size_t number, at::Device device) {
  const auto path = folder / ("stage" + std::to_string(number));
  const bool is_compiled = std::filesystem::exists(path.string() + ".pt2");
  const std::string file = path.string() + (is_compiled ? ".pt2" : ".pt");
  try {
    if (is_compiled) return std::make_unique<CompiledStage>(file, device);
    if (std::filesystem::exists(file)) return std::make_unique<TracedStage>(file, device);
  } catch (const std::exception& error) {
    throw std::runtime_error(file + " must be a stage that loads here, got: " + reason(error) +
                             "; export anew, on this machine");
  }
  throw std::runtime_error(folder.string() + " must hold " + path.filename().string() +
                           ".pt2 or .pt, got neither; export anew");
}

// Operators of the library that `python -m jitaccel.build` compiles (jitaccel/ops documents them).
namespace operators {

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::Tensor nearest_anchor(const at::Tensor& anchors, at::IntArrayRef grid) {
  static const auto op = find<at::Tensor(const at::Tensor&, at::IntArrayRef, bool)>("jitaccel::nearest_anchor");
  return op.call(anchors, grid, false);
}

inline at::Tensor importance(const at::Tensor& velocity, at::IntArrayRef grid, int64_t window) {
  static const auto op = find<at::Tensor(const at::Tensor&, at::IntArrayRef, int64_t, bool)>("jitaccel::importance");
  return op.call(velocity, grid, window, false);
}

inline at::Tensor activate(const at::Tensor& scores, const at::Tensor& anchors, int64_t count) {
  static const auto op = find<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>("jitaccel::activate");
  return op.call(scores, anchors, count);
}

inline void micro_flow_into(at::Tensor state, const at::Tensor& previous, const at::Tensor& velocity,
                            const at::Tensor& noise, const at::Tensor& tokens, const at::Tensor& nearest,
                            const at::Tensor& anchors, at::IntArrayRef grid, const at::Tensor& blur,
                            const at::Tensor& levels, double weight) {
  static const auto op =
      find<void(at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&, const at::Tensor&, at::IntArrayRef, const at::Tensor&, const at::Tensor&, double,
                bool)>(
          "jitaccel::micro_flow_into");
  op.call(state, previous, velocity, noise, tokens, nearest, anchors, grid, blur, levels, weight, false);
}

}  // namespace operators
