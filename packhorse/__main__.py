"""The command: `python -m packhorse`. Processes that packhorse starts run this file as a script.

Python puts a folder in front of sys.path: a script's own, or with -m the current one. Neither may
hide a module of the environment, so it is taken away.
"""

import os
import sys


def _leave_folder() -> None:
    package = os.path.dirname(os.path.abspath(__file__))
    parent = os.path.dirname(package)
    if __package__:  # run by -m, for which __init__.py has done it
        return
    sys.path[:] = [folder for folder in sys.path if folder != package]
    from importlib.util import find_spec

    found = find_spec("packhorse")
    own = os.path.join(package, "__init__.py")
    if not found or not found.origin or not os.path.samefile(found.origin, own):
        sys.path.insert(0, parent)  # it is not installed: a checkout


if __name__ == "__main__":  # multiprocessing imports a script again, under another name
    _leave_folder()
    from packhorse.trainer.cli.main import main

    main()
