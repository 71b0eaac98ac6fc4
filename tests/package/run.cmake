# Installs circlet into a prefix of its own, builds examples/mlp.cc against it with find_package, and runs it.
set(work ${BUILD}/package_test)
file(REMOVE_RECURSE ${work})
function(must)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}\n${output}")
  endif()
endfunction()
must(${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/prefix)
must(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE}/tests/package -B ${work}/build -DCMAKE_PREFIX_PATH=${work}/prefix
  -DCMAKE_BUILD_TYPE=Release -DEXAMPLE=${SOURCE}/examples/mlp.cc)
must(${CMAKE_COMMAND} --build ${work}/build)
must(${work}/build/consumer ${work}/mlp.circle)
