file(GLOB cpu_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp)
if(NOT cpu_sources)
  message(FATAL_ERROR "csrc/cpu holds no sources: the source tree is incomplete.")
endif()

set(FASTVIT_CXX_FLAGS -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-tree-loop-distribute-patterns
    -Wall -Wextra)

# One source per instruction set; everything else is compiled for the baseline, since it runs before the choice is made.
set(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma)
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_avx512 ${avx512})
set(isa_flags_avx512bf16 ${avx512} -mavx512bf16)
set(isa_flags_amx ${isa_flags_avx512bf16} -mamx-tile -mamx-bf16)

set(FASTVIT_CPU_ISAS generic)
set(cpu_definitions)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("${isa_flags_amx}" FASTVIT_KNOWS_EVERY_ISA)
  if(NOT FASTVIT_KNOWS_EVERY_ISA)
    message(FATAL_ERROR
      "${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) does not know AMX; "
      "GCC 11 and Clang 11 are the oldest that do. Name a newer compiler with CXX=/path/to/compiler.")
  endif()
  foreach(isa avx2 avx512 avx512bf16 amx)
    list(APPEND FASTVIT_CPU_ISAS ${isa})
    set_source_files_properties(${PROJECT_SOURCE_DIR}/csrc/cpu/isa_${isa}.cpp
                                PROPERTIES COMPILE_OPTIONS "${isa_flags_${isa}}")
  endforeach()
else()
  list(FILTER cpu_sources EXCLUDE REGEX "/isa_(avx|amx)[^/]*\\.cpp$")
  list(APPEND cpu_definitions FK_ONLY_GENERIC)
endif()

fastvit_library(_fk_cpu ${cpu_sources})
target_compile_options(_fk_cpu PRIVATE ${FASTVIT_CXX_FLAGS})
target_compile_definitions(_fk_cpu PRIVATE ${cpu_definitions})
