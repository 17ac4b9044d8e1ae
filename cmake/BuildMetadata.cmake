# What fastvit_kernels._extension and `fastvit-kernels info` report about the compiled parts.
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
string(JOIN " " cxx_flags -std=c++${CMAKE_CXX_STANDARD} ${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}} ${FASTVIT_CXX_FLAGS})
string(JOIN " " cpu_isas ${FASTVIT_CPU_ISAS})
string(JOIN " " cuda_architectures ${CMAKE_CUDA_ARCHITECTURES})

set(metadata "{}")
foreach(entry
    "compiler=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    "flags=${cxx_flags}"
    "platform=${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}"
    "torch=${TORCH_VERSION}"
    "cpu_isas=${cpu_isas}"
    "cuda_compiler=${FASTVIT_CUDA_COMPILER}"
    "cuda_architectures=${cuda_architectures}"
    "cuda_left_out=${FASTVIT_CUDA_PROBLEM}")
  string(REGEX MATCH "^([^=]+)=(.*)$" entry "${entry}")
  set(key "${CMAKE_MATCH_1}")
  string(REPLACE "\\" "\\\\" value "${CMAKE_MATCH_2}")
  string(REPLACE "\"" "\\\"" value "${value}")
  string(JSON metadata SET "${metadata}" "${key}" "\"${value}\"")
endforeach()

file(WRITE ${PROJECT_BINARY_DIR}/_build.json "${metadata}\n")
install(FILES ${PROJECT_BINARY_DIR}/_build.json DESTINATION fastvit_kernels)
