// Looks at parameters and gradients before a step, without torch's headers: DLPack says where a tensor is and
// how it is laid out, Python the rest. One pass over all, so that each tensor is fetched into the cache once.
#include "bindings.h"
#include "dlpack_exchange.h"

namespace py = pybind11;

namespace ctld {

namespace {

const DLPackExchangeAPI& exchange_of(const py::object& tensor_type) {
  const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kExchangeName));
  if (!api) throw py::error_already_set();
  while (api && api->major > kDLPackMajor) api = api->previous;
  if (!api || api->major != kDLPackMajor || !api->dltensor_from_py_object_no_sync)
    throw py::value_error("tensors cannot be looked at: another version of DLPack");
  return *api;
}

// Parameters, and what is expected of them and their gradients in the next step if it is like the last.
class Usual {
 public:
  Usual(py::list parameters, py::object tensor_type)
      : api_(exchange_of(tensor_type)),
        parameters_(std::move(parameters)),
        tensor_type_(std::move(tensor_type)),
        grad_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("grad"))),
        requires_grad_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("requires_grad"))) {
    for (const py::handle parameter : parameters_) {
      DLTensor tensor;
      if (api_.dltensor_from_py_object_no_sync(parameter.ptr(), &tensor)) throw py::error_already_set();
      expected_.push_back(tensor);
      for (int32_t d = 0; d < tensor.ndim; ++d) {
        sizes_.push_back(tensor.shape[d]);
        sizes_.push_back(tensor.strides[d]);
      }
    }
  }

  // (gradients, their addresses), or None if anything is not as expected.
  py::object gradients() const {
    const auto count = static_cast<Py_ssize_t>(expected_.size());
    py::list gradients(count), addresses(count);
    const int64_t* sizes = sizes_.data();
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const parameter = PyList_GET_ITEM(parameters_.ptr(), i);
      auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad_.ptr()));
      const DLTensor& expected = expected_[static_cast<std::size_t>(i)];
      DLTensor own, found;
      // another type of gradient, or None, is for somebody else to look at
      if (!gradient || reinterpret_cast<PyObject*>(Py_TYPE(gradient.ptr())) != tensor_type_.ptr() ||
          !look(parameter, own) || !look(gradient.ptr(), found) || start(own) != start(expected) ||
          !alike(own, expected, sizes) || !alike(found, expected, sizes) || !trained(parameter)) {
        PyErr_Clear();
        return py::none();
      }
      sizes += 2 * expected.ndim;
      PyList_SET_ITEM(addresses.ptr(), i, PyLong_FromSize_t(start(found)));
      PyList_SET_ITEM(gradients.ptr(), i, gradient.release().ptr());
    }
    return py::make_tuple(std::move(gradients), std::move(addresses));
  }

 private:
  bool look(PyObject* tensor, DLTensor& out) const {
    return api_.dltensor_from_py_object_no_sync(tensor, &out) == 0;
  }

  bool trained(PyObject* parameter) const {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, requires_grad_.ptr()));
    return answer.ptr() == Py_True;
  }

  static uintptr_t start(const DLTensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  }

  // Whether elements are of the same type and at the same places; strides of dimensions of size 1 are free.
  static bool alike(const DLTensor& tensor, const DLTensor& expected, const int64_t* sizes) {
    if (tensor.device_type != expected.device_type || tensor.device_id != expected.device_id ||
        tensor.dtype_code != expected.dtype_code || tensor.dtype_bits != expected.dtype_bits ||
        tensor.dtype_lanes != expected.dtype_lanes || tensor.ndim != expected.ndim)
      return false;
    for (int32_t d = 0; d < tensor.ndim; ++d) {
      if (tensor.shape[d] != sizes[2 * d]) return false;
      if (tensor.shape[d] != 1 && tensor.strides[d] != sizes[2 * d + 1]) return false;
    }
    return true;
  }

  const DLPackExchangeAPI& api_;
  py::list parameters_;
  py::object tensor_type_, grad_, requires_grad_;
  // shape and strides in them are not ours: they are kept in sizes_, alternating
  std::vector<DLTensor> expected_;
  std::vector<int64_t> sizes_;
};

}  // namespace

void bind_look(py::module_& module) {
  py::class_<Usual>(module, "Usual")
      .def(py::init<py::list, py::object>())
      .def("gradients", &Usual::gradients);
}

}  // namespace ctld
