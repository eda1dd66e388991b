// Denoises with exported stages, without Python: generate DIR INPUTS OUT LIBRARY... [--device cpu|cuda]
//
// DIR      folder written by `jitaccel export`
// INPUTS   safetensors: state (B, N, D), the noise; text (B, L, E); pooled (B, P); guidance (B,) float32
// OUT      safetensors to write: state (B, N, D), the latents
// LIBRARY  the operators: jitaccel/_C_cpu.so, and on CUDA jitaccel/_C_cuda.so
#include <dlfcn.h>

#include <cstdlib>
#include <iostream>

#include "sampler.h"

namespace {

constexpr const char* kUsage = "usage: generate DIR INPUTS OUT LIBRARY... [--device cpu|cuda]";

struct Arguments {
  std::filesystem::path folder;
  std::string inputs, out;
  std::vector<std::string> libraries;
  at::Device device = at::kCPU;
};

at::Device device_of(const std::string& name) {
  if (name.rfind("cpu", 0) != 0 && name.rfind("cuda", 0) != 0) {
    throw std::runtime_error("--device must be cpu or cuda, got " + name + "; leave it out for cpu");
  }
  const at::Device device(name);
  if (device.is_cuda() && !torch::cuda::is_available()) {
    throw std::runtime_error("--device must be here, got " + name + " and no CUDA device; leave it out for cpu");
  }
  return device;
}

Arguments parse(int argc, char** argv) {
  std::vector<std::string> words;
  Arguments arguments;
  for (int k = 1; k < argc; ++k) {
    const std::string word = argv[k];
    if (word.rfind("--", 0) != 0) {
      words.push_back(word);
    } else if (word == "--device" && ++k < argc) {
      arguments.device = device_of(argv[k]);
    } else {
      throw std::runtime_error(kUsage);
    }
  }
  if (words.size() < 4) throw std::runtime_error(kUsage);
  arguments.folder = words[0];
  arguments.inputs = words[1];
  arguments.out = words[2];
  arguments.libraries.assign(words.begin() + 3, words.end());
  return arguments;
}

// The library registers its operators when it is loaded, and stays loaded.
void load_operators(const std::vector<std::string>& libraries) {
  for (const auto& path : libraries) {
    const auto whole = std::filesystem::absolute(path).string();
    if (dlopen(whole.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
      const char* reason = dlerror();
      throw std::runtime_error("LIBRARY must be an operator library that loads, got " + path + " (" +
                               (reason == nullptr ? "no reason" : reason) + "); python -m jitaccel.build makes it");
    }
  }
  // The CPU library defines the operators, to which the CUDA library adds kernels.
  if (!c10::Dispatcher::singleton().findSchema({"jitaccel::nearest_anchor", ""})) {
    throw std::runtime_error(
        "LIBRARY must define the operators jitaccel::*, got none that does; give jitaccel/_C_cpu.so");
  }
}

at::Tensor input(const safetensors::Tensors& tensors, const std::string& name, int64_t dims, const Arguments& given) {
  const auto tensor = at_name(tensors, name, given.inputs);
  if (tensor.dim() != dims) {
    throw std::runtime_error(given.inputs + ": " + name + " must have " + std::to_string(dims) + " axes, got " +
                             std::to_string(tensor.dim()) + "; see the head of generate.cpp");
  }
  return tensor.to(given.device);
}

// Checks what can be checked without the model; a compiled stage checks the rest itself (see main).
void check(const StageInputs& inputs, const Manifest& manifest, const std::string& path) {
  const auto& state = inputs.state;
  const auto require = [&](bool holds, const std::string& name, const std::string& rule, const at::Tensor& got) {
    if (holds) return;
    throw std::runtime_error(path + ": " + name + " must " + rule + ", got " + Fields::kind(got) + "; write it anew");
  };
  require(state.is_floating_point() && state.size(0) >= 1 && state.size(1) == manifest.num_tokens(), "state",
          "be floating (B, " + std::to_string(manifest.num_tokens()) + ", D), B above 0", state);
  const std::string like = "have the batch and dtype of state, " + Fields::kind(state);
  for (const auto& [name, tensor] : {std::pair{"text", inputs.text}, {"pooled", inputs.pooled}}) {
    require(tensor.size(0) == state.size(0) && tensor.scalar_type() == state.scalar_type(), name, like, tensor);
  }
  require(inputs.guidance.size(0) == state.size(0) && inputs.guidance.scalar_type() == at::kFloat, "guidance",
          "be Float [" + std::to_string(state.size(0)) + "]", inputs.guidance);
}

void generate(const Arguments& arguments) {
  load_operators(arguments.libraries);
  const auto inputs = safetensors::load(arguments.inputs);
  StageInputs given;
  given.state = input(inputs, "state", 3, arguments);
  given.text = input(inputs, "text", 3, arguments);
  given.pooled = input(inputs, "pooled", 2, arguments);
  given.guidance = input(inputs, "guidance", 1, arguments);
  auto manifest = load_manifest(arguments.folder, arguments.device);
  check(given, manifest, arguments.inputs);
  std::vector<at::Tensor> weights;  // in the order of their names
  for (const auto& [name, weight] : safetensors::load((arguments.folder / "weights.safetensors").string())) {
    weights.push_back(weight.to(arguments.device));
  }
  std::vector<std::unique_ptr<Stage>> stages;
  for (size_t stage = 0; stage < manifest.tokens.size(); ++stage) {
    stages.push_back(load_stage(arguments.folder, stage, arguments.device));
  }
  Sampler sampler(std::move(manifest), std::move(stages), std::move(weights));
  const auto latents = sampler.run(given.state, given.text, given.pooled, given.guidance);
  safetensors::save(arguments.out, {{"state", latents}});
}

}  // namespace

int main(int argc, char** argv) {
  // Without it, a compiled stage does not check shapes and dtypes, and may read past the end of inputs of another size.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/1);
  const c10::InferenceMode no_gradients;
  try {
    generate(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << "generate: " << reason(error) << "\n";
    return 2;
  }
  return 0;
}
