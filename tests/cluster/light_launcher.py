"""Starts light ranks, as DeepSpeed's launcher starts heavy ones: COUNT COMMAND ..."""

import os
import subprocess
import sys
import time


def main() -> int:
    count, *words = sys.argv[1:]
    ranks = [
        subprocess.Popen(words, env={**os.environ, "RANK": str(i), "WORLD_SIZE": count})
        for i in range(int(count))
    ]
    if os.environ.get("LAUNCHER_LEAVES"):
        time.sleep(1)
        os._exit(0)  # as `deepspeed` does whose pdsh was killed
    for rank in ranks:
        rank.wait()
    return 0  # which is not what one may rely on


if __name__ == "__main__":
    sys.exit(main())
