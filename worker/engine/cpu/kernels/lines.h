// Arrays.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace nightherd {

// Memory that begins with a cache line: a vector that lies in two lines takes twice the time. Used for
// all arrays: C++'s own allocator needs more of the C++ library (see pool.h).
template <class T>
struct LineAllocator {
    typedef T value_type;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t{64}); }
    void deallocate(T* from, size_t) { ::operator delete(from, std::align_val_t{64}); }
    template <class U>
    bool operator==(const LineAllocator<U>&) const { return true; }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace nightherd
