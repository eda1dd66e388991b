// One generation, as jitaccel/run.py makes it: anchors, a stage's steps, activation and the move of new tokens.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "stages.h"

struct Plan {
  at::Tensor levels;            // (S + 1,) float32 on the stages' device
  std::vector<int64_t> stages;  // of each step
  std::vector<int64_t> tokens;  // anchors of each stage
  std::vector<int64_t> grid;    // height and width in tokens
  std::vector<at::Tensor> blurs;
  int64_t window = 3;
  double move_weight = 0.0;
  bool own_noise = false;

  int64_t num_tokens() const { return grid.at(0) * grid.at(1); }
};

inline const at::Tensor& at_name(const safetensors::Tensors& tensors, const std::string& name, const std::string& in) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::runtime_error(in + " must hold a tensor " + name + ", got none; write it anew");
  return found->second;
}

inline Plan load_plan(const std::filesystem::path& folder, at::Device device) {
  const std::string path = (folder / "plan.safetensors").string();
  const auto tensors = safetensors::load(path);
  const auto whole = [&](const std::string& name) {
    const auto tensor = at_name(tensors, name, path).to(at::kLong).contiguous();
    return std::vector<int64_t>(tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel());
  };
  Plan plan;
  plan.levels = at_name(tensors, "levels", path).to(device);
  plan.stages = whole("stages");
  plan.tokens = whole("tokens");
  plan.grid = whole("grid");
  plan.window = whole("window").at(0);
  plan.own_noise = whole("own_noise").at(0) != 0;
  plan.move_weight = at_name(tensors, "move_weight", path).item<double>();
  for (size_t stage = 0; stage < plan.tokens.size(); ++stage) {
    plan.blurs.push_back(at_name(tensors, "blur_" + std::to_string(stage), path).to(device));
  }
  return plan;
}

// The random choices of an image come from a generator that the bits of its first state seed, as in Python.
inline std::vector<at::Generator> image_generators(const at::Tensor& state) {
  const auto flat = state.cpu().contiguous().flatten(1);
  const auto kind = flat.element_size() == 2 ? at::kShort : flat.element_size() == 4 ? at::kInt : at::kLong;
  const auto words = flat.view(kind).to(at::kLong);
  const auto position = at::arange(words.size(1), at::kLong);
  const auto sums = (words * ((2 * position + 1) * static_cast<int64_t>(0x1E3779B97F4A7C15LL))).sum(1).contiguous();
  std::vector<at::Generator> generators;
  for (int64_t image = 0; image < sums.numel(); ++image) {
    const auto seed = static_cast<uint64_t>(sums.data_ptr<int64_t>()[image]) & ((uint64_t{1} << 63) - 1);
    generators.push_back(at::detail::createCPUGenerator(seed));
  }
  return generators;
}

inline at::Tensor drawn(const at::Tensor& from, int64_t count, at::Generator& generator) {
  if (count == from.numel()) return from;
  return from.index_select(0, at::randperm(from.numel(), generator, at::kLong).slice(0, 0, count));
}

// Even rows and columns and the border; more or fewer at random where that is not `count`. (count,) int64, sorted.
inline at::Tensor first_anchors(const std::vector<int64_t>& grid, int64_t count, at::Generator& generator) {
  auto regular = at::zeros({grid.at(0), grid.at(1)}, at::kBool);
  regular.slice(0, 0, grid[0], 2).slice(1, 0, grid[1], 2).fill_(true);
  for (int64_t axis = 0; axis < 2; ++axis) {
    regular.select(axis, 0).fill_(true);
    regular.select(axis, -1).fill_(true);
  }
  auto inside = regular.flatten().nonzero().squeeze(1);
  const int64_t missing = count - inside.numel();
  if (missing > 0) {
    const auto outside = regular.logical_not().flatten().nonzero().squeeze(1);
    inside = at::cat({inside, drawn(outside, missing, generator)});
  } else if (missing < 0) {
    inside = drawn(inside, count, generator);
  }
  return std::get<0>(inside.sort());
}

class Sampler {
 public:
  Sampler(Plan plan, std::vector<std::unique_ptr<Stage>> stages, std::vector<at::Tensor> weights)
      : plan_(std::move(plan)), stages_(std::move(stages)), weights_(std::move(weights)) {}

  // Returns the latents (B, N, D) that denoising the noise `state` ends in.
  at::Tensor run(at::Tensor state, const at::Tensor& text, const at::Tensor& pooled, const at::Tensor& guidance) {
    auto generators = image_generators(state);
    at::Tensor noise = plan_.own_noise ? state.clone() : at::Tensor();  // fresh noise is drawn where it is needed
    StageInputs inputs{state, {}, {}, {}, text, pooled, guidance, {}};
    int64_t stage = plan_.stages.at(0);
    std::vector<at::Tensor> rows;
    for (auto& generator : generators) rows.push_back(first_anchors(plan_.grid, plan_.tokens.at(stage), generator));
    inputs.blur = plan_.blurs.at(stage);
    place(inputs, at::stack(rows).to(state.device()));
    at::Tensor before, velocity;
    for (size_t step = 0; step < plan_.stages.size(); ++step) {
      while (stage < plan_.stages[step]) {
        check_finite(velocity, step - 1);
        if (!noise.defined()) noise = fresh_noise(state, generators);
        inputs.state = started(inputs, ++stage, before, velocity, noise, plan_.levels.slice(0, step - 1, step + 1));
      }
      inputs.levels = plan_.levels.slice(0, step, step + 2);
      const auto outputs = stages_.at(stage)->run(weights_, inputs);
      before = inputs.state;
      velocity = outputs.velocity;
      inputs.state = outputs.next_state;
    }
    check_finite(velocity, plan_.stages.size() - 1);
    return inputs.state;
  }

 private:
  static at::Tensor fresh_noise(const at::Tensor& state, std::vector<at::Generator>& generators) {
    std::vector<at::Tensor> rows;
    for (auto& generator : generators) {
      rows.push_back(at::randn(state.sizes().slice(1), generator, at::TensorOptions(at::kFloat)));
    }
    return at::stack(rows).to(state.device());
  }

  void place(StageInputs& inputs, const at::Tensor& anchors) const {
    inputs.anchors = anchors;
    inputs.nearest = operators::nearest_anchor(anchors, plan_.grid);
  }

  // Returns the state in which a stage starts: tokens are activated, and moved to where they belong.
  at::Tensor started(StageInputs& inputs, int64_t stage, const at::Tensor& before, const at::Tensor& velocity,
                     const at::Tensor& noise, const at::Tensor& levels) const {
    const int64_t count = plan_.tokens.at(stage) - inputs.anchors.size(1);
    const auto scores = operators::importance(velocity, plan_.grid, plan_.window);
    const auto tokens = operators::activate(scores, inputs.anchors, count);
    const auto moved = inputs.state.clone(at::MemoryFormat::Contiguous);
    if (plan_.move_weight != 0.0) {
      operators::micro_flow_into(moved, before, velocity, noise, tokens, inputs.nearest, inputs.anchors, plan_.grid,
                                 inputs.blur, levels.contiguous(), plan_.move_weight);
    }
    place(inputs, std::get<0>(at::cat({inputs.anchors, tokens}, 1).sort(1)));
    inputs.blur = plan_.blurs.at(stage);
    return moved;
  }

  static void check_finite(const at::Tensor& velocity, size_t step) {
    if (!at::isfinite(velocity).all().item<bool>()) {
      throw std::runtime_error("the velocity must be finite, got NaN or infinity up to step " + std::to_string(step) +
                               "; export in bfloat16 or float32");
    }
  }

  Plan plan_;
  std::vector<std::unique_ptr<Stage>> stages_;
  std::vector<at::Tensor> weights_;
};
