// What the Python bindings of all processors share: integers that are addresses become pointers, dicts
// structs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/langevin.h"
#include "core/tempering.h"
#include "plan.h"

namespace ctld {

using Numbers = std::map<std::string, double>;
using Addresses = std::map<std::string, uintptr_t>;
// (numel, first, counted, index, group, format) per tensor
using Info = std::tuple<int64_t, int64_t, bool, uint32_t, uint32_t, int32_t>;
// (momentum, gradient, drift, noise, weight_decay, prior) per group
using Group = std::tuple<double, double, double, double, double, double>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline TemperingConstants constants_from(const Numbers& n, int64_t chains) {
  TemperingConstants c = {};
  c.base_temperature = n.at("base_temperature");
  c.energy_scale = n.at("energy_scale");
  c.scale_range = n.at("scale_range");
  c.flat = n.at("flat");
  c.limit = n.at("limit");
  c.inverse_ramp = n.at("inverse_ramp");
  c.inverse_bin_width = n.at("inverse_bin_width");
  c.step_size = n.at("step_size");
  c.persistence = n.at("persistence");
  c.noise_variance = n.at("noise_variance");
  c.noise_scale = n.at("noise_scale");
  c.energy_noise = n.at("energy_noise");
  c.coupling_strength = n.at("coupling_strength");
  c.hill_height = n.at("hill_height");
  c.hill_gain = n.at("hill_gain");
  c.bins = static_cast<int32_t>(n.at("bins"));
  c.kinetic_exponent = static_cast<int32_t>(n.at("kinetic_exponent"));
  c.prior_exponent = static_cast<int32_t>(n.at("prior_exponent"));
  c.energy_exponent = static_cast<int32_t>(n.at("energy_exponent"));
  c.coupling = static_cast<Coupling>(static_cast<int32_t>(n.at("coupling")));
  derive(c, chains);
  return c;
}

inline StatePointers state_from(const Addresses& a) {
  StatePointers s;
  s.step = pointer<int64_t>(a.at("step"));
  s.samples = pointer<int64_t>(a.at("samples"));
  s.flags = pointer<int64_t>(a.at("flags"));
  s.alpha = pointer<double>(a.at("alpha"));
  s.alpha_momentum = pointer<double>(a.at("alpha_momentum"));
  s.temperature = pointer<double>(a.at("temperature"));
  s.settled = pointer<int64_t>(a.at("settled"));
  s.turns = pointer<int64_t>(a.at("turns"));
  s.kinetic = pointer<int64_t>(a.at("kinetic"));
  s.friction = pointer<double>(a.at("friction"));
  s.prior = pointer<int64_t>(a.at("prior"));
  s.visits = pointer<int64_t>(a.at("visits"));
  s.energy_mean = pointer<double>(a.at("energy_mean"));
  s.energy_spread = pointer<double>(a.at("energy_spread"));
  s.hills = pointer<double>(a.at("hills"));
  s.alpha_kinetic = pointer<double>(a.at("alpha_kinetic"));
  s.history = pointer<double>(a.at("history"));
  s.recorded = pointer<int64_t>(a.at("recorded"));
  return s;
}

inline std::vector<TensorInfo> infos_from(const std::vector<Info>& tensors) {
  std::vector<TensorInfo> out;
  for (const auto& [numel, first, counted, index, group, format] : tensors) {
    if (format < 0 || format >= kFormats) throw pybind11::value_error("unknown format");
    out.push_back({numel, first, counted, index, group, static_cast<Format>(format)});
  }
  return out;
}

// `kinetic`: quanta per p^2, 0 without noise
inline GroupCoefficients coefficients_from(const Group& group, double kinetic) {
  const auto& [momentum, gradient, drift, noise, weight_decay, prior] = group;
  return {momentum, gradient, drift, noise, weight_decay, kinetic, prior};
}

inline double kinetic_quanta(const TemperingConstants& c) { return power_of_two(c.kinetic_exponent - 1); }

void bind_cpu(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_look(pybind11::module_& module);

}  // namespace ctld
