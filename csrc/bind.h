// Shared between the binding units.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>

#include "arena.h"

namespace kvo {

// What Python calls `Arena`. Binding functions take `const PyArena &` and keep `arena.get()` for as
// long as native threads use it; close() then never pulls the mapping from under them.
struct PyArena {
    std::shared_ptr<Arena> p;
    std::shared_ptr<Arena> get() const {
        if (!p) throw std::invalid_argument("arena is closed");
        return p;
    }
};

}  // namespace kvo

void bind_store(pybind11::module_& m);  // bind_store.cpp
