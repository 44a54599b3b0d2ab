"""The stand-in Hub, and programs that use it as a user's would, each in a process of its own; tests take it as the
fixture `hub`."""

from pathlib import Path

from tests.support.hub_server import HubServer
from tests.support.processes import HUB_CACHE, ForkedProcess, hub_environment


class Hub(HubServer):
    """The stand-in Hub, with a folder for the caches and the outputs of the programs that use it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run_python(self, code: str, *arguments: str, cache: str = "cache", check: bool = True) -> str:
        """Run a program against this Hub, in which the package is imported already, in this Hub's folder.

        Args:
            code: the program.
            arguments: its `sys.argv[1:]`.
            cache: programs given the same name share a cache of downloads; with a new name it is empty.
            check: whether to fail the test, showing the program's errors, if it fails.

        Returns:
            What it printed; with `check=False`, what it printed and then its errors.
        """
        (self.folder / cache).mkdir(exist_ok=True)
        (self.folder / HUB_CACHE).unlink(missing_ok=True)
        (self.folder / HUB_CACHE).symlink_to(cache)
        process = ForkedProcess(["-c", code, *arguments], self.environment(), self.folder)
        status, printed, errors = process.wait(), process.printed, process.errors
        if not check:
            return printed + errors
        assert status == 0, f"exit status {status}\n{printed}\n{errors}"
        return printed

    def environment(self) -> dict[str, str]:
        """The variables of a program for which this is the Hub."""
        return hub_environment(HTTP_PROXY=self.url, http_proxy=self.url, NO_PROXY="", no_proxy="")
