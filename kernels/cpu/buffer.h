// Memory of a Python object that exports the buffer protocol: an MLX array, a NumPy array.
#pragma once

#include <Python.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace flashmoe {

// A view that keeps its object alive, and its memory where it is. Made and dropped under the GIL.
class Buffer {
 public:
  explicit Buffer(PyObject* object, bool writable = false) {
    const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &view_, flags)) {
      PyErr_Clear();
      throw std::invalid_argument(std::string(Py_TYPE(object)->tp_name) +
                                  " gives no buffer in host memory");
    }
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* at() const { return static_cast<T*>(view_.buf); }
  int ndim() const { return view_.ndim; }
  int64_t shape(int axis) const { return view_.shape[axis]; }
  int64_t stride(int axis) const { return view_.strides[axis]; }
  int64_t itemsize() const { return view_.itemsize; }
  // As struct names it, without the sign of the machine's own order.
  std::string type() const {
    const std::string name = view_.format ? view_.format : "B";
    return name.size() > 1 && std::string("@=<").find(name[0]) != std::string::npos ? name.substr(1)
                                                                                  : name;
  }
  bool is_floats() const { return view_.itemsize == 4 && type() == "f"; }
  int64_t size() const {
    int64_t count = 1;
    for (int i = 0; i < view_.ndim; ++i) count *= view_.shape[i];
    return count;
  }
  // Whether the axes from `axis` on lie one after another.
  bool packed(int axis = 0) const {
    int64_t expected = view_.itemsize;
    for (int i = view_.ndim - 1; i >= axis; --i) {
      if (view_.shape[i] != 1 && view_.strides[i] != expected) return false;
      expected *= view_.shape[i];
    }
    return true;
  }

 private:
  Py_buffer view_;
};

}  // namespace flashmoe
