"""How long `jobs/scaling_sweep.py --help` takes.

python benchmarks/help.py [--json FILE]

It is the median of five runs. One run before them fills the disk cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from options import writable
from steps import spread

JOB = Path(__file__).parents[1] / "jobs" / "scaling_sweep.py"
TIMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args()
    times = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        subprocess.run([sys.executable, str(JOB), "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    found = spread(times[1:])
    print("--help: {median:.2f} s ({least:.2f} to {greatest:.2f})".format(**found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
