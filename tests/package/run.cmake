# Installs circlet into a prefix of its own, builds examples/mlp.cc against it with find_package and no flags, runs it,
# and runs the installed program on the installed example with an installed recipe.
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
  -DEXAMPLE=${SOURCE}/examples/mlp.cc)
must(${CMAKE_COMMAND} --build ${work}/build)
must(${work}/build/consumer ${work}/mlp.circle)
set(share ${work}/prefix/share/circlet)
must(${work}/prefix/bin/circlet evaluate ${share}/examples/tiny-gemma4 --random-samples 1x8
  --recipe ${share}/recipes/w4a16.yaml)
foreach(page README.md docs/architecture.md)
  if(NOT EXISTS ${work}/prefix/share/doc/circlet/${page})
    message(FATAL_ERROR "${page} is not installed")
  endif()
endforeach()
