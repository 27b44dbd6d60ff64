# The package: lib/libanyflash.so, the kernels beside it, headers, and find_package(anyflash).
include(CMakePackageConfigHelpers)

set(package_folder lib/cmake/anyflash)
install(TARGETS anyflash EXPORT anyflash_targets LIBRARY DESTINATION lib RUNTIME DESTINATION lib
        ARCHIVE DESTINATION lib)
install(DIRECTORY include/anyflash DESTINATION include)
install(EXPORT anyflash_targets NAMESPACE anyflash:: DESTINATION ${package_folder})

set(config ${PROJECT_BINARY_DIR}/anyflash-config.cmake)
set(config_version ${PROJECT_BINARY_DIR}/anyflash-config-version.cmake)
configure_package_config_file(cmake/anyflash-config.cmake.in ${config}
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${config_version} COMPATIBILITY SameMajorVersion)
install(FILES ${config} ${config_version} DESTINATION ${package_folder})

if(ANYFLASH_KERNELS)
  install(DIRECTORY ${PROJECT_BINARY_DIR}/kernels DESTINATION lib
          FILES_MATCHING PATTERN "*.bin" PATTERN "*.json" PATTERN ".jobs*" EXCLUDE)
endif()
if(SKBUILD AND TARGET anyflash_fast)
  install(TARGETS anyflash_fast LIBRARY DESTINATION . RUNTIME DESTINATION .)
endif()
