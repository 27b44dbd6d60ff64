"""Prints the folders of this Python that hold pip packages of NVIDIA, as a list of CMake."""

import os
import sys

folders = [path for path in sys.path if os.path.isdir(os.path.join(path, "nvidia"))]
print(";".join(folders), end="")
