// One generation, as in jitaccel/method/run.py: anchors, the steps of a stage, activation, and the move of new tokens.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "stages.h"

struct Manifest {
  at::Tensor levels;            // (S + 1,) float32 on the stages' device
  std::vector<int64_t> stages;  // of each step
  std::vector<int64_t> tokens;  // tokens of each stage
  std::vector<int64_t> pooling;  // of each stage: the factor by which its picture is smaller per side
  std::vector<int64_t> grid;    // height and width in tokens
  std::vector<at::Tensor> blurs;
  int64_t window = 3;
  double move_weight = 0.0;
  std::vector<double> solver_gains;  // of each step: the factor of the change of the clean estimate
  bool own_noise = false;

  int64_t num_tokens() const { return grid.at(0) * grid.at(1); }
  bool pools(int64_t stage) const { return pooling.at(stage) > 1; }
};

inline const at::Tensor& at_name(const safetensors::Tensors& tensors, const std::string& name, const std::string& in) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) {
    throw std::runtime_error(in + " must hold a tensor " + name + ", got none; write it anew");
  }
  return found->second;
}

// A file of tensors, by name, each with the dtype and number of axes that it must have.
class Fields {
 public:
  explicit Fields(std::string path) : path_(std::move(path)), tensors_(safetensors::load(path_)) {}

  const at::Tensor& get(const std::string& name, at::ScalarType dtype, int64_t dims) const {
    const auto& tensor = at_name(tensors_, name, path_);
    require(tensor.scalar_type() == dtype && tensor.dim() == dims, name,
            std::string("be ") + c10::toString(dtype) + " of " + std::to_string(dims) + " axes", kind(tensor));
    return tensor;
  }

  std::vector<int64_t> whole(const std::string& name) const {
    const auto& tensor = get(name, at::kLong, 1);
    return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
  }

  void require(bool holds, const std::string& name, const std::string& rule, const std::string& got) const {
    if (!holds) throw std::runtime_error(path_ + ": " + name + " must " + rule + ", got " + got + "; write it anew");
  }

  static std::string kind(const at::Tensor& tensor) {
    return std::string(c10::toString(tensor.scalar_type())) + " " + c10::str(tensor.sizes());
  }

 private:
  std::string path_;
  safetensors::Tensors tensors_;
};

// Checks the assumptions of sampler and operators, so that a hand-written manifest fails here and not in step 7.
inline void check(const Manifest& manifest, const Fields& fields) {
  const auto told = [](const std::vector<int64_t>& values) { return c10::str(at::IntArrayRef(values)); };
  const auto rise = [](const std::vector<int64_t>& values, int64_t least, int64_t most) {
    return !values.empty() && std::is_sorted(values.begin(), values.end()) && values.front() >= least &&
           values.back() <= most;
  };
  const auto& grid = manifest.grid;
  fields.require(grid.size() == 2 && std::min(grid[0], grid[1]) >= 1 && std::max(grid[0], grid[1]) <= 1 << 20, "grid",
                 "be height and width in tokens", told(grid));
  fields.require(rise(manifest.tokens, 1, manifest.num_tokens()), "tokens",
                 "rise from 1 at least to the grid's number at most", told(manifest.tokens));
  const auto num_stages = static_cast<int64_t>(manifest.tokens.size());
  fields.require(rise(manifest.stages, 0, num_stages - 1), "stages", "rise within the stages that tokens lists",
                 told(manifest.stages));
  const auto& pooling = manifest.pooling;
  const bool pools_first = static_cast<int64_t>(pooling.size()) == num_stages && pooling.back() == 1 &&
                           std::is_sorted(pooling.rbegin(), pooling.rend());
  fields.require(pools_first, "pooling", "fall to 1, a number for each stage", told(pooling));
  const auto steps = static_cast<int64_t>(manifest.stages.size());
  // Neighbours may be equal: levels near 1 that fall in the exporter's float64 may round to the same float32.
  const bool fall = manifest.levels.numel() == steps + 1 && manifest.levels.diff().le(0).all().item<bool>() &&
                    manifest.levels[0].item<float>() <= 1.0f && manifest.levels[steps].item<float>() == 0.0f;
  fields.require(fall, "levels", "be " + std::to_string(steps + 1) + " numbers that fall from 1 at most to 0",
                 std::to_string(manifest.levels.numel()) + " others");
  fields.require(manifest.window >= 1 && manifest.window % 2 == 1, "window", "be odd and above 0",
                 std::to_string(manifest.window));
  fields.require(manifest.move_weight >= 0.0 && manifest.move_weight <= 1.0, "move_weight", "be in [0, 1]",
                 std::to_string(manifest.move_weight));
  const bool has_gains =
      static_cast<int64_t>(manifest.solver_gains.size()) == steps && manifest.solver_gains.front() == 0.0;
  fields.require(has_gains, "solver_gains", "be " + std::to_string(steps) + " numbers, the first of them 0",
                 std::to_string(manifest.solver_gains.size()) + " others");
  // Below level 1, the first state is no longer pure noise.
  const bool may_own = num_stages == 1 || manifest.levels[0].item<float>() >= 1.0f;
  fields.require(!manifest.own_noise || may_own, "own_noise", "be 0 where the first level is below 1", "1");
  for (size_t stage = 0; stage < manifest.blurs.size(); ++stage) {
    fields.require(manifest.blurs[stage].numel() % 2 == 1, "blur_" + std::to_string(stage),
                   "have an odd number of weights", std::to_string(manifest.blurs[stage].numel()));
  }
}

inline Manifest load_manifest(const std::filesystem::path& folder, at::Device device) {
  const Fields fields((folder / "manifest.safetensors").string());
  const auto only = [&](const std::string& name, at::ScalarType dtype) {
    const auto& tensor = fields.get(name, dtype, 1);
    fields.require(tensor.numel() == 1, name, "be one number", std::to_string(tensor.numel()));
    return tensor;
  };
  Manifest manifest;
  manifest.levels = fields.get("levels", at::kFloat, 1);
  manifest.stages = fields.whole("stages");
  manifest.tokens = fields.whole("tokens");
  manifest.pooling = fields.whole("pooling");
  manifest.grid = fields.whole("grid");
  manifest.window = only("window", at::kLong).item<int64_t>();
  manifest.own_noise = only("own_noise", at::kLong).item<int64_t>() != 0;
  manifest.move_weight = only("move_weight", at::kDouble).item<double>();
  const auto& gains = fields.get("solver_gains", at::kDouble, 1);
  manifest.solver_gains = {gains.data_ptr<double>(), gains.data_ptr<double>() + gains.numel()};
  for (size_t stage = 0; stage < manifest.tokens.size(); ++stage) {
    manifest.blurs.push_back(fields.get("blur_" + std::to_string(stage), at::kFloat, 1));
  }
  check(manifest, fields);
  manifest.levels = manifest.levels.to(device);
  for (auto& blur : manifest.blurs) blur = blur.to(device);
  return manifest;
}

// The random choices of an image come from a generator seeded with the bits of its first state, as in Python.
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

// Even rows and columns and the border, (height, width) bool.
inline at::Tensor lattice(const std::vector<int64_t>& grid) {
  auto regular = at::zeros({grid.at(0), grid.at(1)}, at::kBool);
  regular.slice(0, 0, grid[0], 2).slice(1, 0, grid[1], 2).fill_(true);
  for (int64_t axis = 0; axis < 2; ++axis) {
    regular.select(axis, 0).fill_(true);
    regular.select(axis, -1).fill_(true);
  }
  return regular;
}

// The lattice, with tokens added or dropped at random to get `count`. (count,) int64, sorted.
inline at::Tensor first_anchors(const std::vector<int64_t>& grid, int64_t count, at::Generator& generator) {
  const auto regular = lattice(grid);
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
  Sampler(Manifest manifest, std::vector<std::unique_ptr<Stage>> stages, std::vector<at::Tensor> weights)
      : manifest_(std::move(manifest)), stages_(std::move(stages)), weights_(std::move(weights)) {}

  // Returns the latents (B, N, D) after denoising the noise `state`.
  at::Tensor run(at::Tensor state, const at::Tensor& text, const at::Tensor& pooled, const at::Tensor& guidance) {
    auto generators = image_generators(state);
    at::Tensor noise = manifest_.own_noise ? state.clone() : at::Tensor();  // fresh noise is drawn where it is needed
    StageInputs inputs{state, {}, {}, {}, text, pooled, guidance, {}};
    int64_t stage = manifest_.stages.at(0);
    if (!manifest_.pools(stage)) {
      inputs.blur = manifest_.blurs.at(stage);
      place(inputs, placed(manifest_.tokens.at(stage), state.device(), generators));
    }
    at::Tensor before, velocity, clean, computed;  // computed: the anchors at the step before
    for (size_t step = 0; step < manifest_.stages.size(); ++step) {
      while (stage < manifest_.stages[step]) {
        check_finite(velocity, step - 1);
        if (manifest_.pools(stage)) {
          start_after_pooled(inputs, ++stage, velocity, generators);
          continue;
        }
        if (!noise.defined()) noise = fresh_noise(state, generators);
        inputs.state = started(inputs, ++stage, before, velocity, noise, manifest_.levels.slice(0, step - 1, step + 1));
      }
      // A copy, because a compiled stage needs the start of each input aligned.
      inputs.levels = manifest_.levels.slice(0, step, step + 2).clone();
      const auto outputs = run_stage(stage, inputs);
      before = inputs.state;
      velocity = outputs.velocity;
      inputs.state = outputs.next_state;
      solve(inputs, step, before, velocity, clean, computed);
    }
    check_finite(velocity, manifest_.stages.size() - 1);
    return inputs.state;
  }

 private:
  StageOutputs run_stage(int64_t stage, const StageInputs& inputs) const {
    try {
      return stages_.at(stage)->run(weights_, inputs);
    } catch (const std::exception& error) {
      throw std::runtime_error("stage " + std::to_string(stage) + " must be given what manifest.json says it was " +
                               "made for, got: " + reason(error) + " (of its inputs the first " +
                               std::to_string(weights_.size()) + " are the weights, then state, " +
                               (inputs.anchors.defined() ? "anchors, nearest, blur, " : "") +
                               "text, pooled, guidance, levels); export for these inputs too");
    }
  }

  // Corrects the step as jitaccel/method/solver.py does. Tokens that were lifted in another stage keep Euler's result.
  void solve(StageInputs& inputs, size_t step, const at::Tensor& state, const at::Tensor& velocity, at::Tensor& clean,
             at::Tensor& computed) const {
    const auto& gains = manifest_.solver_gains;
    if (std::all_of(gains.begin(), gains.end(), [](double gain) { return gain == 0.0; })) return;
    const auto now = state.to(at::kFloat) - inputs.levels[0] * velocity.to(at::kFloat);
    if (gains[step] != 0.0) {
      auto change = (now - clean) * gains[step];
      if (manifest_.stages[step] != manifest_.stages[step - 1] && inputs.anchors.defined()) {
        // A stage that pools has an estimate of every token, so here the tokens computed now are corrected.
        const auto& which = computed.defined() ? computed : inputs.anchors;
        const auto share = at::zeros({change.size(0), change.size(1)}, change.options()).scatter_(1, which, 1.0);
        change = change * share.unsqueeze(2);
      }
      inputs.state = (inputs.state.to(at::kFloat) + change).to(state.scalar_type());
    }
    clean = now;
    computed = inputs.anchors;
  }

  static at::Tensor fresh_noise(const at::Tensor& state, std::vector<at::Generator>& generators) {
    std::vector<at::Tensor> rows;
    for (auto& generator : generators) {
      rows.push_back(at::randn(state.sizes().slice(1), generator, at::TensorOptions(at::kFloat)));
    }
    return at::stack(rows).to(state.device());
  }

  // Returns the first anchors of every image, (B, count).
  at::Tensor placed(int64_t count, at::Device device, std::vector<at::Generator>& generators) const {
    std::vector<at::Tensor> rows;
    for (auto& generator : generators) rows.push_back(first_anchors(manifest_.grid, count, generator));
    return at::stack(rows).to(device);
  }

  void place(StageInputs& inputs, const at::Tensor& anchors) const {
    inputs.anchors = anchors;
    inputs.nearest = operators::nearest_anchor(anchors, manifest_.grid);
  }

  // Starts a stage after one that pools: nothing moves; the anchors are the lattice and the most important tokens.
  void start_after_pooled(StageInputs& inputs, int64_t stage, const at::Tensor& velocity,
                          std::vector<at::Generator>& generators) const {
    if (manifest_.pools(stage)) return;
    const int64_t count = manifest_.tokens.at(stage);
    const int64_t regular = std::min(count, lattice(manifest_.grid).sum().item<int64_t>());
    const auto anchors = placed(regular, velocity.device(), generators);
    place(inputs, std::get<0>(at::cat({anchors, activated(velocity, anchors, count - regular)}, 1).sort(1)));
    inputs.blur = manifest_.blurs.at(stage);
  }

  // Returns the tokens that a stage activates, (B, count); ranked only if some but not all are.
  at::Tensor activated(const at::Tensor& velocity, const at::Tensor& anchors, int64_t count) const {
    const bool is_choice = count > 0 && count < manifest_.num_tokens() - anchors.size(1);
    const auto scores = is_choice ? operators::importance(velocity, manifest_.grid, manifest_.window)
                                  : at::zeros({velocity.size(0), velocity.size(1)}, velocity.options().dtype(at::kFloat));
    return operators::activate(scores, anchors, count);
  }

  // Returns the state at the start of a stage, with new tokens activated and moved to their targets.
  at::Tensor started(StageInputs& inputs, int64_t stage, const at::Tensor& before, const at::Tensor& velocity,
                     const at::Tensor& noise, const at::Tensor& levels) const {
    const int64_t count = manifest_.tokens.at(stage) - inputs.anchors.size(1);
    const auto tokens = activated(velocity, inputs.anchors, count);
    const auto moved = inputs.state.clone(at::MemoryFormat::Contiguous);
    if (manifest_.move_weight != 0.0) {
      operators::micro_flow_into(moved, before, velocity, noise, tokens, inputs.nearest, inputs.anchors, manifest_.grid,
                                 inputs.blur, levels.contiguous(), manifest_.move_weight);
    }
    place(inputs, std::get<0>(at::cat({inputs.anchors, tokens}, 1).sort(1)));
    inputs.blur = manifest_.blurs.at(stage);
    return moved;
  }

  static void check_finite(const at::Tensor& velocity, size_t step) {
    if (!at::isfinite(velocity).all().item<bool>()) {
      throw std::runtime_error("the velocity must be finite, got NaN or infinity up to step " + std::to_string(step) +
                               "; export in bfloat16 or float32");
    }
  }

  Manifest manifest_;
  std::vector<std::unique_ptr<Stage>> stages_;
  std::vector<at::Tensor> weights_;
};
