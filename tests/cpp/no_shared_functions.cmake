# Fails if an object compiled for an instruction set beyond the baseline defines a function that the
# linker may choose for the whole library (weak symbols: inline functions, templates). Weak objects
# (V, u: tables, the unwinder's references) hold no instructions.
list(FILTER OBJECTS INCLUDE REGEX "/avx[0-9]+\\.cpp\\.o(bj)?$")
if(NOT OBJECTS)
  message(FATAL_ERROR "no objects to look at")
endif()
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* W [^\n]*" shared "${symbols}")
  if(shared)
    list(JOIN shared "\n" shared)
    message(FATAL_ERROR "${object} shares functions:\n${shared}")
  endif()
endforeach()
