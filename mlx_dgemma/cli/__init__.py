"""The commands. Each one's module is imported when it runs."""

import signal
import sys
from pathlib import Path

if sys.argv[0] == "-m" or Path(sys.argv[0]).name.startswith("mlx_dgemma"):
    # until a command runs, Ctrl-C ends it without the traceback of an import
    signal.signal(signal.SIGINT, signal.SIG_DFL)
