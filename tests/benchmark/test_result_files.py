"""Reports as dated files, which never replace others."""

import json
import math
import os
import stat

import pytest

from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.benchmark.result_files import as_json, check_results_folder, result_name, slug, write_results


def report(*labels: str, device: str = "NVIDIA H100 80GB HBM3") -> dict:
    setting = {"date": "2026-11-26T20:52:06+00:00", "size": "cpu-reference", "device": device}
    return {"setting": setting, "labels": list(labels), "command": "longlive bench", "results": {}}


@pytest.fixture(autouse=True)
def short_tables(monkeypatch):
    monkeypatch.setattr("longlive_diffusers.benchmark.result_files.as_markdown", lambda report: "# a table\n")


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (["float32"], "2026-11-26_cpu-reference_nvidia-h100-80gb-hbm3_float32"),
        (
            ["bfloat16 kv-cache-dtype fp8"],
            "2026-11-26_cpu-reference_nvidia-h100-80gb-hbm3_bfloat16-kv-cache-dtype-fp8",
        ),
        (["float32", "--dtype bfloat16"], "2026-11-26_cpu-reference_nvidia-h100-80gb-hbm3_float32_vs_dtype-bfloat16"),
    ],
)
def test_the_name_says_what_was_measured(labels, name):
    assert result_name(report(*labels)) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-64-core-processor"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-r-xeon-r-cpu-2.20ghz"),
        ("../../etc", "etc"),
        ("a/b\\c:d*e?", "a-b-c-d-e"),
        ("grüße", "gr-e"),
    ],
)
def test_a_name_is_one_on_every_system(text, expected):
    assert slug(text) == expected


def test_nothing_is_overwritten(tmp_path):
    paths = [write_results(tmp_path, report("float32") | {"results": {"run": run}}) for run in range(3)]
    stem = result_name(report("float32"))
    assert [path.name for path in paths] == [f"{stem}.json", f"{stem}-2.json", f"{stem}-3.json"]
    assert [json.loads(path.read_text())["results"]["run"] for path in paths] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for path in paths for name in (path.name, f"{path.name.removesuffix('.json')}.md")
    )


def test_a_table_that_is_there_is_kept(tmp_path):
    stem = result_name(report("float32"))
    (tmp_path / f"{stem}.md").write_text("of another run, whose numbers were moved away")
    assert write_results(tmp_path, report("float32")).name == f"{stem}-2.json"
    assert (tmp_path / f"{stem}.md").read_text().startswith("of another run")


def test_a_long_name_is_cut(tmp_path):
    path = write_results(tmp_path, report("float32 " + "window " * 100))
    assert len(os.fsencode(path.name)) <= 255 and path.with_suffix(".md").is_file()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longlive_diffusers.benchmark.result_files.write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, report("float32"))
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_kept_where_their_table_cannot_be_written(tmp_path, monkeypatch):
    def fail(path, text):
        if path.suffix == ".md":
            raise OSError(28, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr("longlive_diffusers.benchmark.result_files.write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, report("float32") | {"results": {"run": 1}})
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json" and json.loads(path.read_text())["results"] == {"run": 1}


def test_numbers_that_are_not_finite_are_null():
    results = {"forward": {"seconds": 4.0, "rest": math.nan}, "pairs": [(1.0, math.inf)], "waits": None, "steps": 2}
    text = as_json(report("float32") | {"results": results})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["results"] == {
        "forward": {"seconds": 4.0, "rest": None},
        "pairs": [[1.0, None]],
        "waits": None,
        "steps": 2,
    }


def test_the_folder_is_checked_first(tmp_path):
    assert check_results_folder(tmp_path) == tmp_path and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is not a folder"):
        check_results_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        check_results_folder(tmp_path / "missing")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match=r"(?i)permission denied"):
        check_results_folder(tmp_path)
