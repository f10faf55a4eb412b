"""The command of this package as a process, in the environment of the tests."""

import os
import subprocess
import sys


def prefalign(*arguments) -> subprocess.Popen:
    """Start `prefalign ARGUMENTS...`; its output is one text."""
    code = "import sys; from prefalign.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
