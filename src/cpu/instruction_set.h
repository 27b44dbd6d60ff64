// Everything of an instruction set, from its Simd type. Mind the note in simd.h.
#pragma once

#include "cpu/block.h"
#include "cpu/flash.h"
#include "cpu/flash_backward.h"

namespace anyflash::cpu {
namespace {

template <class Simd, class T>
constexpr Kernels kernels = {forward<Simd, T>, backward<Simd, T>, merge_gradients<Simd, T>};

template <class Simd>
constexpr InstructionSet instruction_set(const char* name, bool (*available)()) {
  return {name,
          available,
          kernels<Simd, Float16>,
          kernels<Simd, BFloat16>,
          kernels<Simd, float>,
          forward_scratch<Simd>,
          backward_scratch<Simd>};
}

} // namespace
} // namespace anyflash::cpu
