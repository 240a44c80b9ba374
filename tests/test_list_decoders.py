"""cmake/list_decoders.py: the decoders of weight formats are listed by their headers alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORMATS = ROOT / "kernels" / "formats"
NEW = """// A format that nobody has.
//
// Decoders: NewRun<FORMAT_NEW, 3>, NewRun<FORMAT_NEW, WORD_BITS / 4>
#pragma once
#include "quantized.h"
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "cmake" / "list_decoders.py"), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(FORMATS, tmp_path / "formats"))


def test_the_list_is_that_of_the_headers():
    done = run(FORMATS, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_new_header_is_all_that_a_format_needs(folder):
    (folder / "new.h").write_text(NEW)
    before = (folder / "decoders.h").read_text()
    done = run(folder, "--check")
    assert done.returncode == 1 and "decoders.h is not what cmake/list_decoders.py makes" in done.stderr
    assert (folder / "decoders.h").read_text() == before
    assert run(folder).returncode == 0
    text = (folder / "decoders.h").read_text()
    assert '#include "new.h"\n' in text
    assert "  case NewRun<FORMAT_NEW, 3>::FORMAT * 64 + NewRun<FORMAT_NEW, 3>::BITS:\n" in text
    assert text.count("visit.template run<") == before.count("visit.template run<") + 2
    assert text.count("default:") == 1
    assert run(folder, "--check").returncode == 0


def test_nothing_is_written_where_nothing_changed(folder):
    (folder / "decoders.h").chmod(0o444)
    time = (folder / "decoders.h").stat().st_mtime_ns
    assert run(folder).returncode == 0
    assert (folder / "decoders.h").stat().st_mtime_ns == time


WRONG = {
    "twice": ("// Decoders: AffineRun<2>\n", "AffineRun<2> is listed twice"),
    "no type": ("// Decoders: NewRun<, 3\n", "new.h: '// Decoders: NewRun<, 3' has no decoder's type at 'NewRun<, 3'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_lines_that_are_wrong(case, folder):
    text, message = WRONG[case]
    (folder / "new.h").write_text(text)
    done = run(folder)
    assert done.returncode == 1 and message in done.stderr


def test_a_folder_without_decoders(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and "no header has a line '// Decoders: ...'" in done.stderr
