#!/bin/sh
# Builds and runs the C and C++ examples against the installed package, without Python.
#   tests/package/run.sh              installs the library with CMake (no kernels) and uses that
#   tests/package/run.sh CMAKE_DIR    uses this package, e.g. of a wheel: python -m anyflash --cmake-dir
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ $# -ge 1 ]; then
  package=$1
else
  cmake -S "$root" -B "$work/library" -DANYFLASH_KERNELS=OFF -DCMAKE_BUILD_TYPE=Release >"$work/log"
  cmake --build "$work/library" --parallel "${MAX_JOBS:-2}" >>"$work/log" || { cat "$work/log"; exit 1; }
  cmake --install "$work/library" --prefix "$work/installed" >>"$work/log"
  package=$work/installed/lib/cmake/anyflash
fi

for example in c cpp; do
  echo "== examples/$example against $package"
  cmake -S "$root/examples/$example" -B "$work/$example" -Danyflash_DIR="$package" >"$work/log" &&
    cmake --build "$work/$example" >>"$work/log" || { cat "$work/log"; exit 1; }
  program=$(find "$work/$example" -maxdepth 1 -type f -perm -u+x)
  "$program"
done
echo "the package works"
