// Python bindings of the CPU plan.
#include "bindings.h"
#include "cpu.h"

namespace py = pybind11;

namespace ctld {

namespace {

const TileKernels* kernels_named(const std::string& name) {
  for (const auto* kernels : supported_kernels())
    if (name == kernels->name) return kernels;
  throw py::value_error("instruction set '" + name + "' is not available");
}

class BoundCpuPlan {
 public:
  BoundCpuPlan(const std::vector<Info>& tensors, int64_t chains, const Numbers& constants,
               const Addresses& state, uint64_t seed, bool stochastic,
               const std::vector<double>& group_elements, bool partial, const std::string& isa)
      : kinetic_(kinetic_quanta(constants_from(constants, chains))),
        plan_(infos_from(tensors), chains, constants_from(constants, chains), state_from(state), seed,
              stochastic, group_elements, partial, kernels_named(isa)),
        pointers_(tensors.size()) {}

  void explore(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups, bool baoab,
               uintptr_t loss, double unscale, int threads) {
    refresh(addresses);
    const auto integrator = baoab ? Integrator::kBaoab : Integrator::kEuler;
    const auto coefficients = all_coefficients(groups, kinetic_);
    py::gil_scoped_release release;
    plan_.explore(pointers_, coefficients, integrator, pointer<const double>(loss), unscale, threads);
  }

  void finetune(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups, double unscale,
                int threads) {
    refresh(addresses);
    const auto coefficients = all_coefficients(groups, 0.0);
    py::gil_scoped_release release;
    plan_.finetune(pointers_, coefficients, unscale, threads);
  }

  void reduce_prior_energy(const std::vector<uintptr_t>& addresses, const std::vector<Group>& groups,
                           int threads) {
    refresh(addresses);
    const auto coefficients = all_coefficients(groups, 0.0);
    py::gil_scoped_release release;
    plan_.reduce_prior_energy(pointers_, coefficients, threads);
  }

 private:
  static std::vector<GroupCoefficients> all_coefficients(const std::vector<Group>& groups, double kinetic) {
    std::vector<GroupCoefficients> out;
    for (const Group& group : groups) out.push_back(coefficients_from(group, kinetic));
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
  CpuPlan plan_;
  std::vector<TensorPointers> pointers_;
};

// `groups` * 4 normals from noise group `first_group` on
void normal(uint64_t seed, uint64_t step, uint32_t stream, uint32_t index, uint32_t first_group,
            int64_t groups, uintptr_t to, const std::string& isa) {
  const auto* kernels = kernels_named(isa);
  const auto keys = round_keys(seed);
  const auto counter = make_counter(step, stream, index);
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

void bind_cpu(py::module_& module) {
  py::class_<BoundCpuPlan>(module, "CpuPlan", py::module_local())
      .def(py::init<const std::vector<Info>&, int64_t, const Numbers&, const Addresses&, uint64_t, bool,
                    const std::vector<double>&, bool, const std::string&>())
      .def("explore", &BoundCpuPlan::explore)
      .def("finetune", &BoundCpuPlan::finetune)
      .def("reduce_prior_energy", &BoundCpuPlan::reduce_prior_energy);
  module.def("normal", &normal);
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* kernels : supported_kernels()) names.emplace_back(kernels->name);
    return names;
  });
}

}  // namespace ctld
