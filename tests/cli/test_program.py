"""How a command ends when it is a program of its own."""

import subprocess
import sys

from tests.jobs import REPOSITORY

ENDS = """
import atexit, sys, threading, time
from megagrow.cli.program import run_program
if {joined}:
    import megagrow.engine.comm
atexit.register(lambda: print("last words", flush=True))
threading.Thread(target=lambda: (time.sleep(0.3), print("awaited", flush=True))).start()
def main():
    print("unflushed", end=" ")
    return 7
run_program(main)
"""


def test_nothing_is_lost_at_the_end():
    for joined in (False, True):
        command = [sys.executable, "-c", ENDS.format(joined=joined)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (7, "")
        assert done.stdout == "unflushed awaited\nlast words\n"


def test_a_closed_pipe_is_no_traceback():
    for options, status in ((["grow.py", "--list"], 141), (["inspect.py", "--help"], 0)):
        command = [sys.executable, str(REPOSITORY / "launch" / options[0]), *options[1:]]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
        )
        process.stdout.close()
        assert process.wait(timeout=100) == status
        assert process.stderr.read() == b""


def test_ctrl_c_is_no_traceback():
    code = "from megagrow.cli.program import run_program\ndef main(): raise KeyboardInterrupt\n"
    command = [sys.executable, "-c", f"{code}run_program(main)"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
