"""The stand-in Hub, and programs that use it as a user's would; tests take it as the fixture `hub`.

`huggingface_hub` reads its endpoint and cache folder from the environment when it is imported, and copies them about.
So a test runs its client in a process of its own, which is also what a user does.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import HubServer
from tests.support.paths import ROOT


# What imports allocate would be looked through for garbage again and again: a fourth of such a program's time.
COLLECT_LITTLE = "import atexit, gc; gc.set_threshold(100_000); atexit.register(gc.freeze)\n"


class Hub(HubServer):
    """The stand-in Hub, with a folder for the caches and the outputs of the programs that use it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run_python(self, code: str, *arguments: str, cache: str = "cache", check: bool = True) -> str:
        """Run a program against this Hub, with the package importable, in this Hub's folder.

        Args:
            code: the program.
            arguments: its `sys.argv[1:]`.
            cache: programs given the same name share a cache of downloads; with a new name it is empty.
            check: whether to fail the test, showing the program's errors, if it fails.

        Returns:
            What it printed; with `check=False`, what it printed and then its errors.
        """
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        environment = {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-c", COLLECT_LITTLE + code, *arguments]
        run = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
        if not check:
            return run.stdout + run.stderr
        assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
        return run.stdout
