"""Lowest versions of what the library and its tests require, as constraints: `python .ci/lowest.py`."""

import re
import sys
from importlib.metadata import requires

for requirement in requires("circuitvit") or ():
    needed, _, condition = requirement.partition(";")
    bound = re.match(r"([\w.-]+).*>=([\d.]+)", needed)
    if bound and (not condition or "test" in condition):
        sys.stdout.write(f"{bound[1]}=={bound[2]}\n")
