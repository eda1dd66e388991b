// Denoises with exported stages, without Python: generate DIR INPUTS OUT LIBRARY... [--device cpu|cuda]
//
// DIR      what `jitaccel export` wrote
// INPUTS   safetensors: state (B, N, D), the noise; text (B, L, E); pooled (B, P); guidance (B,) float32
// OUT      safetensors to write: state (B, N, D), the latents
// LIBRARY  the operators: jitaccel/_C_cpu.so, and on CUDA jitaccel/_C_cuda.so
#include <dlfcn.h>

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

Arguments parse(int argc, char** argv) {
  std::vector<std::string> words;
  Arguments arguments;
  for (int k = 1; k < argc; ++k) {
    const std::string word = argv[k];
    if (word != "--device") {
      words.push_back(word);
    } else if (++k < argc) {
      arguments.device = at::Device(argv[k]);
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
}

at::Tensor input(const safetensors::Tensors& tensors, const std::string& name, int64_t dims, const Arguments& given) {
  const auto tensor = at_name(tensors, name, given.inputs);
  if (tensor.dim() != dims) {
    throw std::runtime_error(given.inputs + ": " + name + " must have " + std::to_string(dims) + " axes, got " +
                             std::to_string(tensor.dim()) + "; see the head of generate.cpp");
  }
  return tensor.to(given.device);
}

void generate(const Arguments& arguments) {
  load_operators(arguments.libraries);
  const auto inputs = safetensors::load(arguments.inputs);
  const auto state = input(inputs, "state", 3, arguments);
  auto plan = load_plan(arguments.folder, arguments.device);
  if (state.size(1) != plan.num_tokens()) {
    throw std::runtime_error(arguments.inputs + ": state must have " + std::to_string(plan.num_tokens()) +
                             " tokens, which the stages were made for, got " + std::to_string(state.size(1)));
  }
  std::vector<at::Tensor> weights;  // in the order of their names
  for (const auto& [name, weight] : safetensors::load((arguments.folder / "weights.safetensors").string())) {
    weights.push_back(weight.to(arguments.device));
  }
  std::vector<std::unique_ptr<Stage>> stages;
  for (size_t stage = 0; stage < plan.tokens.size(); ++stage) {
    stages.push_back(load_stage(arguments.folder, stage, arguments.device));
  }
  Sampler sampler(std::move(plan), std::move(stages), std::move(weights));
  const auto latents = sampler.run(state, input(inputs, "text", 3, arguments), input(inputs, "pooled", 2, arguments),
                                   input(inputs, "guidance", 1, arguments));
  safetensors::save(arguments.out, {{"state", latents}});
}

}  // namespace

int main(int argc, char** argv) {
  const c10::InferenceMode no_gradients;
  try {
    generate(parse(argc, argv));
  } catch (const c10::Error& error) {  // torch's own errors carry a stack trace after the first line
    std::cerr << "generate: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
