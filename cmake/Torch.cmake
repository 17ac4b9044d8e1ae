# The stable ABI needs torch's headers and two of its libraries; find_package(Torch) would also ask for a CUDA toolkit.
# -I hides the environment variables with which pip isolates a build, so that the torch of the environment being
# installed into is found and need not be a build requirement (which would download a second, larger one).
find_package(Python REQUIRED COMPONENTS Interpreter)

execute_process(
  COMMAND ${Python_EXECUTABLE} -I -c
          "import importlib.metadata as m, importlib.util as u; print(list(u.find_spec('torch').submodule_search_locations)[0], m.version('torch'), sep=';', end='')"
  OUTPUT_VARIABLE torch_found
  RESULT_VARIABLE torch_missing
  ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR
    "No torch beside ${Python_EXECUTABLE}. Install torch >= 2.11 in that environment first, then install "
    "fastvit-kernels with `pip install --no-build-isolation`.")
endif()
list(GET torch_found 0 TORCH_DIR)
list(GET torch_found 1 TORCH_VERSION)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}")
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch 2.11 or newer is needed, ${TORCH_DIR} is ${TORCH_VERSION}.")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_DIR}/include)
# The oldest ABI that has all we use: a library built against a newer torch then also loads in the older ones.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
# libtorch.so itself resolves nothing here, but through it the CUDA libraries are reached where torch has them.
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE ${TORCH_DIR}/lib/libtorch.so ${TORCH_DIR}/lib/libtorch_cpu.so)

# A library that torch.ops.load_library opens: fastvit_kernels/<name>.so, no "lib" in front.
function(fastvit_library name)
  add_library(${name} MODULE ${ARGN})
  set_target_properties(${name} PROPERTIES PREFIX "")
  target_link_libraries(${name} PRIVATE torch_stable)
  target_link_options(${name} PRIVATE -Wl,--exclude-libs,ALL)
  install(TARGETS ${name} LIBRARY DESTINATION fastvit_kernels)
endfunction()
