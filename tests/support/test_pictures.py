"""Pictures: what they leave of matplotlib to whoever draws others."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_notebook_keeps_its_window() -> None:
    code = """if True:
        import os
        from micrograd_gpt.support.pictures import drawing
        with drawing("a.png"):
            from matplotlib.figure import Figure
        import matplotlib
        print(matplotlib.rcParams["backend"], os.environ["MPLBACKEND"])
    """
    for window, found in (("svg", "svg"), ("missing", "agg")):
        environment = os.environ | {"MPLBACKEND": window}
        run = [sys.executable, "-c", code]
        said = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
        assert said.stdout.split() == [found, window]
