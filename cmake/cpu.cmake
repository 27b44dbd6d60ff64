# Sources of the CPU backend: one file for each instruction set, compiled with that instruction set's
# flags and only where the target processor may have it. Which one runs is decided at run time.
file(GLOB cpu_sources CONFIGURE_DEPENDS src/cpu/*.cpp)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(FILTER cpu_sources EXCLUDE REGEX "/neon\\.cpp$")
  set(avx2_flags -mavx2 -mfma -mf16c -mtune=haswell)
  # GCC 12 warns about its own intrinsics' deliberately undefined vectors.
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl
      -mprefer-vector-width=512 -Wno-maybe-uninitialized)
  set_source_files_properties(src/cpu/avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2_flags}")
  set_source_files_properties(src/cpu/avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512_flags}")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  list(FILTER cpu_sources EXCLUDE REGEX "/avx[0-9]*\\.cpp$")
else()
  list(FILTER cpu_sources EXCLUDE REGEX "/(avx[0-9]*|neon)\\.cpp$")
endif()
