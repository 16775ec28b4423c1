// Shared between the binding units.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <span>
#include <stdexcept>
#include <string_view>

#include "arena.h"
#include "store_format.h"

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

// The keys in `b`, where they lie: valid as long as the bytes object is.
inline std::span<const store::Key> keys_in(const pybind11::bytes& b) {
    static_assert(sizeof(store::Key) == 16 && alignof(store::Key) == 1);
    std::string_view v = b;
    if (v.size() % 16) throw std::invalid_argument("keys must be a multiple of 16 bytes");
    return {reinterpret_cast<const store::Key*>(v.data()), v.size() / 16};
}

}  // namespace kvo

void bind_index(pybind11::module_& m);  // bind_index.cpp
void bind_store(pybind11::module_& m);  // bind_store.cpp
