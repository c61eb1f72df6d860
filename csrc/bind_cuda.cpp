// Python bindings of the CUDA plan.
#include <stdexcept>

#include "bindings.h"
#include "cuda_plan.h"

namespace py = pybind11;

namespace ctld {

namespace {

// (address of lr, its Number, address of the last positive lr, of the momentum unit); 0 for a rate of the
// host
using BoundRate = std::tuple<uintptr_t, int32_t, uintptr_t, uintptr_t>;
// (loss, its Number, grad_scale, found_inf); addresses, 0 for none
using BoundScalars = std::tuple<uintptr_t, int32_t, uintptr_t, uintptr_t>;
// (device, stream)
using BoundQueue = std::tuple<int, uintptr_t>;

class BoundCudaPlan {
 public:
  BoundCudaPlan(const std::vector<Info>& tensors, int64_t chains, const Numbers& constants,
                const Addresses& state, uint64_t seed, bool stochastic,
                const std::vector<double>& group_elements, bool partial, int64_t history_rows,
                double kinetic_unit, double num_data, uint32_t max_blocks)
      : kinetic_(kinetic_quanta(constants_from(constants, chains))),
        tensors_(tensors.size()),
        plan_(infos_from(tensors), chains, constants_from(constants, chains), state_from(state), seed,
              stochastic, group_elements, partial, {history_rows, kinetic_unit}, num_data, max_blocks) {}

  std::size_t scratch_bytes() const { return plan_.scratch_bytes(); }
  void use_scratch(uintptr_t address) { plan_.use_scratch(pointer<void>(address)); }

  py::bytes table_of(const std::vector<uintptr_t>& parameters, const std::vector<uintptr_t>& momenta) {
    check_length(parameters.size());
    check_length(momenta.size());
    std::vector<TensorPointers> pointers;
    for (std::size_t i = 0; i < parameters.size(); ++i)
      pointers.push_back({pointer<void>(parameters[i]), pointer<void>(momenta[i]), nullptr});
    const std::vector<unsigned char> image = plan_.table_of(pointers);
    return py::bytes(reinterpret_cast<const char*>(image.data()), image.size());
  }
  void use_table(uintptr_t address) { plan_.use_table(pointer<const void>(address)); }

  void explore(const std::vector<uintptr_t>& gradients, const std::vector<Group>& groups,
               const std::vector<BoundRate>& rates, const BoundScalars& scalars, bool baoab,
               const BoundQueue& queue) {
    const auto integrator = baoab ? Integrator::kBaoab : Integrator::kEuler;
    plan_.explore(pointers_from(gradients), step_from(groups, rates, scalars, kinetic_), integrator,
                  queue_from(queue));
  }

  void finetune(const std::vector<uintptr_t>& gradients, const std::vector<Group>& groups,
                const std::vector<BoundRate>& rates, const BoundScalars& scalars, const BoundQueue& queue) {
    plan_.finetune(pointers_from(gradients), step_from(groups, rates, scalars, 0.0), queue_from(queue));
  }

  void reduce_prior_energy(const std::vector<Group>& groups, const BoundQueue& queue) {
    const std::vector<BoundRate> none(groups.size(), BoundRate{0, 0, 0, 0});
    plan_.reduce_prior_energy(step_from(groups, none, {0, 0, 0, 0}, 0.0), queue_from(queue));
  }

 private:
  void check_length(std::size_t given) const {
    if (given != tensors_) throw py::value_error("one address per tensor expected");
  }

  std::vector<const void*> pointers_from(const std::vector<uintptr_t>& gradients) const {
    check_length(gradients.size());
    std::vector<const void*> out;
    out.reserve(gradients.size());
    for (const uintptr_t address : gradients) out.push_back(pointer<const void>(address));
    return out;
  }

  static CudaStep step_from(const std::vector<Group>& groups, const std::vector<BoundRate>& rates,
                            const BoundScalars& scalars, double kinetic) {
    if (groups.size() != rates.size()) throw py::value_error("one rate per group expected");
    CudaStep step;
    for (const Group& group : groups) step.groups.push_back(coefficients_from(group, kinetic));
    for (const auto& [lr, type, last, unit] : rates)
      step.rates.push_back(
          {pointer<const void>(lr), pointer<double>(last), pointer<double>(unit), static_cast<Number>(type)});
    const auto& [loss, loss_type, grad_scale, found_inf] = scalars;
    step.loss = pointer<const void>(loss);
    step.loss_type = static_cast<Number>(loss_type);
    step.grad_scale = pointer<const float>(grad_scale);
    step.found_inf = pointer<const float>(found_inf);
    return step;
  }

  static CudaQueue queue_from(const BoundQueue& queue) { return {std::get<0>(queue), std::get<1>(queue)}; }

  double kinetic_;
  std::size_t tensors_;
  CudaPlan plan_;
};

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<BoundCudaPlan>(module, "CudaPlan", py::module_local())
      .def(py::init<const std::vector<Info>&, int64_t, const Numbers&, const Addresses&, uint64_t, bool,
                    const std::vector<double>&, bool, int64_t, double, double, uint32_t>())
      .def("scratch_bytes", &BoundCudaPlan::scratch_bytes)
      .def("use_scratch", &BoundCudaPlan::use_scratch)
      .def("table_of", &BoundCudaPlan::table_of)
      .def("use_table", &BoundCudaPlan::use_table)
      .def("explore", &BoundCudaPlan::explore)
      .def("finetune", &BoundCudaPlan::finetune)
      .def("reduce_prior_energy", &BoundCudaPlan::reduce_prior_energy);
  module.def("cuda_problem", &device_problem);
  module.def("resident_blocks", &resident_blocks);
}

}  // namespace ctld
