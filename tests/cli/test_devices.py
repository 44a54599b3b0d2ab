"""`--devices N`: what is refused, what is said once, and how the processes end."""

import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from longlive_diffusers.cli import main
from longlive_diffusers.cli.devices import check_devices, prepare
from longlive_diffusers.cli.errors import is_told_by_another
from longlive_diffusers.cli.launched import Rank, own_rank
from longlive_diffusers.parallel.stream_ranks import RanksParted
from longlive_diffusers.video.reader import read_video
from tests.support.processes import ForkedProcess, environment, forking_launcher


CPU = torch.device("cpu")
GENERATE = ["generate", "a red circle", "--no-lora", "--no-progress", "--seed", "0"]


@pytest.fixture
def launched(monkeypatch):
    """Be one of the processes that a launcher has started on this machine."""

    def launch(rank: int, count: int, local_count: int | None = None) -> None:
        local_count = count if local_count is None else local_count
        names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local_count, "LOCAL_WORLD_SIZE": local_count}
        for name, value in {**names, "TORCHELASTIC_RUN_ID": "test"}.items():
            monkeypatch.setenv(name, str(value))

    return launch


# -- what is refused ----------------------------------------------------------------------------------------------


IMPOSSIBLE = {
    "--devices 4": "4 .*6|6 .*4",  # the models have 6 heads
    "--devices 5": "5 .*6|6 .*5",
    "--devices 7": "7 .*6|6 .*7",
    "--devices 0": "--devices",
    "--devices -2": "--devices",
    "--devices two": "--devices",
    "--devices": "--devices",
    "--devices 2 --device cuda:1": "cuda:1",
}


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        *(("bench", *item) for item in IMPOSSIBLE.items()),
        *(("generate", *item) for item in IMPOSSIBLE.items()),
        ("generate", "--devices 2 --offload model", "--offload"),
        ("generate", "--devices 2 --num-frames 0", "--num-frames"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_process_is_started(
    tmp_path, monkeypatch, capsys, command, options, message
):
    monkeypatch.setattr("longlive_diffusers.cli.run_generate.start_ranks", pytest.fail)
    monkeypatch.setattr("longlive_diffusers.cli.run_bench.start_ranks", pytest.fail)
    output = tmp_path / "out.mp4"
    arguments = [*GENERATE, "--output", str(output)] if command == "generate" else [command]
    try:
        status = main([*arguments, *options.split()])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2 and not output.exists()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(lines) == 1 and re.search(message, lines[0]) and "Traceback" not in err


def test_a_number_of_devices_beside_a_launcher_is_its_number_or_left_out(launched):
    launched(rank=1, count=3)
    assert own_rank() == Rank(1, 3, 1, 3)
    check_devices(3, CPU, num_heads=6)
    check_devices(1, CPU, num_heads=6)
    with pytest.raises(ValueError, match="--devices is 2, but 3 processes were started: leave it out"):
        check_devices(2, CPU, num_heads=6)
    launched(rank=1, count=4)
    with pytest.raises(ValueError, match="4"):  # heads
        check_devices(1, CPU, num_heads=6)


@pytest.mark.parametrize(("local_count", "threads"), [(1, 12), (2, 6), (5, 2), (12, 1), (24, 1)])
def test_processes_divide_the_cores_of_their_machine(launched, monkeypatch, local_count, threads):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    launched(0, 24, local_count)
    prepare(own_rank(), CPU)
    assert chosen == [threads]


@pytest.mark.parametrize(("count", "local_count", "fits"), [(2, 2, True), (4, 2, True), (3, 3, False), (6, 3, False)])
def test_each_process_of_a_machine_needs_a_gpu_of_its_own(launched, monkeypatch, count, local_count, fits):
    monkeypatch.setattr("longlive_diffusers.cli.devices.available_devices", lambda: {"cpu": 1, "cuda": 2})
    launched(0, count, local_count)
    if fits:
        check_devices(1, torch.device("cuda"), num_heads=24)
        return
    with pytest.raises(ValueError, match="3 devices are asked for, but there are only 2 of 'cuda' here"):
        check_devices(1, torch.device("cuda"), num_heads=24)


def test_offloading_is_refused_for_processes_of_a_launcher_as_well(launched, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("longlive_diffusers.cli.generation_request.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("longlive_diffusers.cli.devices.available_devices", lambda: {"cuda": 2})
    launched(0, 2)
    assert main([*GENERATE, "--output", str(tmp_path / "out.mp4"), "--offload", "model"]) == 2
    assert "--offload is for one GPU" in capsys.readouterr().err


# -- who tells ----------------------------------------------------------------------------------------------------


def test_an_error_is_told_once(launched):
    refused, own = ValueError("no"), OSError(28, "No space left on device")
    parted, parted_by_value = (RanksParted(f"rank 1 failed with {name}: no.") for name in ("OSError", "ValueError"))
    told = {rank: [] for rank in range(4)}
    for rank in told:  # two machines with two processes each
        launched(rank, 4, 2)
        told[rank] = [not is_told_by_another(error) for error in (refused, parted, parted_by_value, own)]
    # Arguments are refused by all, once on each machine; who fails says so, and who ends with it does not. What only
    # one of the others refuses, the first tells.
    assert told == {
        0: [True, False, True, True],
        1: [False, False, False, True],
        2: [True, False, False, True],
        3: [False, False, False, True],
    }


def test_names_that_other_launchers_set_mean_nothing(launched, monkeypatch):
    launched(1, 4, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not is_told_by_another(ValueError("no"))


def test_who_was_killed_is_told_by_the_launcher(capsys):
    from longlive_diffusers.cli.devices import exit_status

    assert exit_status({1: -signal.SIGKILL, 0: 143}, 2) == 1
    assert exit_status({0: 1, 1: -signal.SIGKILL}, 2) == 1  # it ended only because the other was killed
    assert capsys.readouterr().err == "longlive: error: process 1 of 2 was ended by SIGKILL\n" * 2
    assert exit_status({1: -signal.SIGTERM}, 2) == 1
    assert capsys.readouterr().err == "longlive: error: process 1 of 2 was ended by SIGTERM\n"
    assert exit_status({0: 2, 1: -signal.SIGTERM}, 2) == 2
    assert exit_status({0: 130, 1: -signal.SIGTERM}, 2) == 130
    assert capsys.readouterr().err == ""


# -- real runs ----------------------------------------------------------------------------------------------------


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, in this order, which is that of their ranks."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == launcher:
            found.append((int(fields[19]), int(status.parent.name)))
    return [process for _, process in sorted(found)]


def end_after_a_chunk(output: Path, end: Callable, starts: Sequence[str], *options: str) -> tuple[int, str, str]:
    """Begin a long video on two devices, `end` it when it has a chunk, and return the status and what was said."""
    command = [*starts, "longlive_diffusers.cli", *GENERATE, "--steps", "1", "--stream", "--devices", "2", *options]
    process = ForkedProcess([*command, "--output", str(output)], environment())  # which starts the ranks
    next(line for line in process.lines() if line.startswith("chunk 1,"))
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    end(process, ranks)
    status = process.wait(60)
    assert [rank for rank in ranks if Path(f"/proc/{rank}").exists()] == []
    return status, process.printed, process.errors


def test_ctrl_c_ends_all_and_what_was_made_replaces_nothing(output):
    output.write_bytes(b"old")
    status, out, err = end_after_a_chunk(
        output, lambda process, ranks: process.send_signal(signal.SIGINT), ["-m"], "--num-frames", "8005"
    )
    assert status == 130 and err == ""
    written = int(re.search(r"interrupted: +after (\d+) frames of the 8005 that were asked for\n", out)[1])
    assert written == int(re.search(r"\nframes: +(\d+) ", out)[1])
    assert len(read_video(output.with_name("out.unfinished.mp4"))[0]) == written
    assert output.read_bytes() == b"old"
    assert out.count("chunk 0,") == 1  # one process prints


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all_and_what_was_made_plays(output, killed):
    status, out, err = end_after_a_chunk(
        output, lambda process, ranks: os.kill(ranks[killed], signal.SIGKILL), forking_launcher(2)
    )
    assert status == 1 and err == f"longlive: error: process {killed} of 2 was ended by SIGKILL\n"
    assert len(read_video(output)[0]) >= 12 and out.count("Endless: ") == 1
    assert (f"output:              {output}" in out) == (killed == 1)


def test_a_launcher_starts_the_ranks_and_one_reads_what_is_typed(output):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longlive_diffusers.cli"]
    process = ForkedProcess(
        [*forking_launcher(2), *launcher, *GENERATE, "--steps", "1", "--stream", "--output", output],
        environment(),
        typed="a blue square\n/zoom\n/quit\n",
    )
    status, out, err = process.wait(120), process.printed, process.errors
    assert status == 0 and "Traceback" not in err
    assert out.count("'a blue square'") == 1 and err.count("'/zoom' is not a command") == 1
    assert len(read_video(output)[0]) == int(re.search(r"frames: +(\d+) ", out)[1])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.mp4"
