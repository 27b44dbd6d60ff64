# anyflash-build, and the target that runs it: every row of variants.def for the wanted GPU
# generations, into the archives beside the library.
file(GLOB build_sources CONFIGURE_DEPENDS tools/build_kernels/*.cpp)
add_executable(anyflash-build ${build_sources})
target_compile_options(anyflash-build PRIVATE -Wall -Wextra -Wpedantic)
target_link_libraries(anyflash-build PRIVATE anyflash_objects)

# The compiler may be a pip package of the Python that runs this build.
find_package(Python3 QUIET COMPONENTS Interpreter)
set(compiler_folders)
if(Python3_Interpreter_FOUND)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/compiler_folders.py
    OUTPUT_VARIABLE compiler_folders ERROR_QUIET)
endif()
list(TRANSFORM compiler_folders PREPEND "--site-packages;" OUTPUT_VARIABLE compiler_options)

option(ANYFLASH_CHECK_KERNELS "Fail when anyflash-build complains of a kernel" OFF)
if(ANYFLASH_CHECK_KERNELS)
  list(APPEND compiler_options --check)
endif()

if(ANYFLASH_KERNELS)
  # Runs in every build; kernels that are up to date take no time.
  add_custom_target(
    anyflash_kernels ALL
    COMMAND anyflash-build --output ${PROJECT_BINARY_DIR}/kernels ${compiler_options}
    USES_TERMINAL VERBATIM COMMAND_EXPAND_LISTS
    COMMENT "Compiling the kernels")
endif()
