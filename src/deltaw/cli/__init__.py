"""The command line: one file per noun, commands of a few lines over the library."""

import os

# OpenMP's threads wait for one another a few microseconds by spinning and then sleep, instead of milliseconds: spinning
# keeps a processor from the thread that is waited for, once anything else runs (docs/log.md). To be set before torch is
# loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
