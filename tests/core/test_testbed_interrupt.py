"""Presses of Ctrl-C: what a forked child of some library is told is not one."""

import subprocess
import sys

CHILD = """
import os, signal, threading
from testbed.interrupt import Interrupt
with Interrupt() as interrupt:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)  # with our handler, which it inherited
        os._exit(0)
    os.waitpid(child, 0)
    after_child = interrupt.pressed
    heard = threading.Event()
    interrupt.listen(heard.set)
    os.kill(os.getpid(), signal.SIGTERM)
    print(after_child, heard.wait(10), interrupt.pressed, interrupt.hurried)
"""


def test_a_signal_to_a_forked_child_is_no_press_here():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]
