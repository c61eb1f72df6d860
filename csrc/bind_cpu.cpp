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

// (address, its Number), 0 for none
using BoundLoss = std::tuple<uintptr_t, int32_t>;

class BoundCpuPlan {
 public:
  BoundCpuPlan(const std::vector<Info>& tensors, int64_t chains, const Numbers& constants,
               const Addresses& state, uint64_t seed, bool stochastic,
               const std::vector<double>& group_elements, bool partial, int64_t history_rows,
               double kinetic_unit, const std::string& isa)
      : kinetic_(kinetic_quanta(constants_from(constants, chains))),
        plan_(infos_from(tensors), chains, constants_from(constants, chains), state_from(state), seed,
              stochastic, group_elements, partial, {history_rows, kinetic_unit}, kernels_named(isa)),
        pointers_(tensors.size()),
        loss_(static_cast<std::size_t>(chains)) {}

  // Parameters and momenta until further notice; 0 leaves a parameter out.
  void place(const std::vector<uintptr_t>& parameters, const std::vector<uintptr_t>& momenta) {
    check_length(parameters.size());
    check_length(momenta.size());
    for (std::size_t i = 0; i < pointers_.size(); ++i)
      pointers_[i] = {pointer<void>(parameters[i]), pointer<void>(momenta[i]), nullptr};
  }

  void explore(const std::vector<uintptr_t>& gradients, const std::vector<Group>& groups, bool baoab,
               const BoundLoss& loss, double unscale, int threads) {
    refresh(gradients);
    const auto integrator = baoab ? Integrator::kBaoab : Integrator::kEuler;
    const auto coefficients = all_coefficients(groups, kinetic_);
    const double* const losses = widen(loss);
    py::gil_scoped_release release;
    plan_.explore(pointers_, coefficients, integrator, losses, unscale, threads);
  }

  void finetune(const std::vector<uintptr_t>& gradients, const std::vector<Group>& groups,
                const BoundLoss& loss, double unscale, int threads) {
    refresh(gradients);
    const auto coefficients = all_coefficients(groups, 0.0);
    const double* const losses = widen(loss);
    py::gil_scoped_release release;
    plan_.finetune(pointers_, coefficients, losses, unscale, threads);
  }

  void reduce_prior_energy(const std::vector<Group>& groups, int threads) {
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

  void check_length(std::size_t given) const {
    if (given != pointers_.size()) throw py::value_error("one address per tensor expected");
  }

  void refresh(const std::vector<uintptr_t>& gradients) {
    check_length(gradients.size());
    for (std::size_t i = 0; i < pointers_.size(); ++i)
      pointers_[i].gradient = pointer<const void>(gradients[i]);
  }

  // The losses of all chains in float64, or null.
  const double* widen(const BoundLoss& loss) {
    const auto [address, type] = loss;
    if (address == 0) return nullptr;
    for (std::size_t i = 0; i < loss_.size(); ++i)
      loss_[i] =
          read_number(pointer<const void>(address), static_cast<Number>(type), static_cast<int64_t>(i));
    return loss_.data();
  }

  double kinetic_;
  CpuPlan plan_;
  std::vector<TensorPointers> pointers_;
  std::vector<double> loss_;
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
                    const std::vector<double>&, bool, int64_t, double, const std::string&>())
      .def("place", &BoundCpuPlan::place)
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
