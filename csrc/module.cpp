// Python bindings: turns integers that are addresses into pointers, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace py = pybind11;

namespace {

using Numbers = std::map<std::string, double>;
using Addresses = std::map<std::string, uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const ctld::TileKernels* kernels_named(const std::string& name) {
  for (const auto* kernels : ctld::supported_kernels())
    if (name == kernels->name) return kernels;
  throw py::value_error("instruction set '" + name + "' is not available");
}

ctld::TemperingConstants constants_from(const Numbers& n) {
  ctld::TemperingConstants c;
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
  c.coupling = static_cast<ctld::Coupling>(static_cast<int32_t>(n.at("coupling")));
  return c;
}

ctld::StatePointers state_from(const Addresses& a) {
  ctld::StatePointers s;
  s.step = pointer<int64_t>(a.at("step"));
  s.samples = pointer<int64_t>(a.at("samples"));
  s.flags = pointer<int64_t>(a.at("flags"));
  s.alpha = pointer<double>(a.at("alpha"));
  s.alpha_momentum = pointer<double>(a.at("alpha_momentum"));
  s.temperature = pointer<double>(a.at("temperature"));
  s.settled = pointer<int64_t>(a.at("settled"));
  s.kinetic = pointer<int64_t>(a.at("kinetic"));
  s.prior = pointer<int64_t>(a.at("prior"));
  s.visits = pointer<int64_t>(a.at("visits"));
  s.energy_mean = pointer<double>(a.at("energy_mean"));
  s.energy_spread = pointer<double>(a.at("energy_spread"));
  s.hills = pointer<double>(a.at("hills"));
  s.alpha_kinetic = pointer<double>(a.at("alpha_kinetic"));
  return s;
}

// (numel, index, group, dtype) per tensor
using Info = std::tuple<int64_t, uint32_t, uint32_t, int32_t>;
// (momentum, gradient, drift, noise, weight_decay, prior) per group, and the quanta per p^2
using Group = std::tuple<double, double, double, double, double, double>;

class Plan {
 public:
  Plan(const std::vector<Info>& tensors, int64_t chains, const Numbers& constants, const Addresses& state,
       uint64_t seed, const std::string& isa)
      : kinetic_(0.0),
        plan_(infos(tensors), chains, constants_from(constants), state_from(state), seed, kernels_named(isa)),
        pointers_(tensors.size()) {
    kinetic_ = ctld::power_of_two(static_cast<int32_t>(constants.at("kinetic_exponent")) - 1);
  }

  void explore(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups, bool baoab,
               uintptr_t loss, int threads) {
    refresh(addresses);
    const auto integrator = baoab ? ctld::Integrator::kBaoab : ctld::Integrator::kEuler;
    const auto coefficients = with_kinetic(groups, kinetic_);
    py::gil_scoped_release release;
    plan_.explore(pointers_, coefficients, integrator, pointer<const double>(loss), threads);
  }

  void finetune(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups, int threads) {
    refresh(addresses);
    const auto coefficients = with_kinetic(groups, 0.0);
    py::gil_scoped_release release;
    plan_.finetune(pointers_, coefficients, threads);
  }

  void reduce_prior_energy(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups,
                           int threads) {
    refresh(addresses);
    const auto coefficients = with_kinetic(groups, 0.0);
    py::gil_scoped_release release;
    plan_.reduce_prior_energy(pointers_, coefficients, threads);
  }

 private:
  static std::vector<ctld::TensorInfo> infos(const std::vector<Info>& tensors) {
    std::vector<ctld::TensorInfo> out;
    for (const auto& [numel, index, group, dtype] : tensors) {
      if (dtype < 0 || dtype >= ctld::kDTypes) throw py::value_error("unknown dtype");
      out.push_back({numel, index, group, static_cast<ctld::DType>(dtype)});
    }
    return out;
  }

  static std::vector<ctld::GroupCoefficients> with_kinetic(const std::vector<Group>& groups, double kinetic) {
    std::vector<ctld::GroupCoefficients> out;
    for (const auto& [momentum, gradient, drift, noise, weight_decay, prior] : groups)
      out.push_back({momentum, gradient, drift, noise, weight_decay, kinetic, prior});
    return out;
  }

  // three addresses per tensor: parameter, momentum, gradient
  void refresh(const std::vector<uintptr_t>& addresses) {
    if (addresses.size() != 3 * pointers_.size())
      throw py::value_error("three addresses per tensor expected");
    for (std::size_t i = 0; i < pointers_.size(); ++i) {
      pointers_[i] = {pointer<void>(addresses[3 * i]), pointer<void>(addresses[3 * i + 1]),
                      pointer<const void>(addresses[3 * i + 2])};
    }
  }

  double kinetic_;
  ctld::CpuPlan plan_;
  std::vector<ctld::TensorPointers> pointers_;
};

// `groups` * 4 normals from noise group `first_group` on
void normal(uint64_t seed, uint64_t step, uint32_t stream, uint32_t index, uint32_t first_group,
            int64_t groups, uintptr_t to, const std::string& isa) {
  const auto* kernels = kernels_named(isa);
  const auto keys = ctld::round_keys(seed);
  const auto counter = ctld::make_counter(step, stream, index);
  float* const out = pointer<float>(to);
  py::gil_scoped_release release;
  float buffer[256];
  for (int64_t done = 0; done < groups; done += 64) {
    const int64_t n = groups - done < 64 ? groups - done : 64;
    kernels->normals(first_group + static_cast<uint32_t>(done), n, counter, keys, buffer);
    memcpy(out + 4 * done, buffer, static_cast<std::size_t>(n) * 4 * sizeof(float));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::vector<Info>&, int64_t, const Numbers&, const Addresses&, uint64_t,
                    const std::string&>())
      .def("explore", &Plan::explore)
      .def("finetune", &Plan::finetune)
      .def("reduce_prior_energy", &Plan::reduce_prior_energy);
  m.def("normal", &normal);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* kernels : ctld::supported_kernels()) names.emplace_back(kernels->name);
    return names;
  });
}
