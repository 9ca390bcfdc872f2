"""What `qtts env` tells, and the import of qwen_tts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qtts_compile import environment
from qtts_compile.environment import PACKAGES, STACKS, stack_problems

ROOT = Path(__file__).parent.parent
A = {"torch": "2.14.1", "torchaudio": "2.11.0", "transformers": "4.57.3", "qwen-tts": "0.1.1", "faster-qwen3-tts": "0.3.2"}
B = {"torch": "2.11.0+cu130", "torchaudio": "2.11.0", "transformers": "5.16.1", "qwen-tts-hf": "0.1.1.post1", "faster-qwen3-tts": "0.5.4"}


@pytest.mark.parametrize("versions", [A, B, A | {"faster-qwen3-tts": None}])
def test_a_fitting_stack_has_no_problems(versions):
    assert stack_problems(versions) == []


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, r"no Qwen3-TTS package.*pip install 'qtts-compile\[tts\]'"),
        (A | B, r"qwen-tts and qwen-tts-hf both install.*pip uninstall"),
        (A | {"transformers": "5.16.1"}, r"transformers 5\.16\.1 does not fit stack A.*==4\.57\.3.*qtts-compile\[tts\]"),
        (A | {"torch": "2.15.0"}, r"torch 2\.15\.0 does not fit.*<2\.15"),
        (B | {"transformers": "5.23.0"}, r"transformers 5\.23\.0 does not fit stack B.*<5\.17.*qtts-compile\[tts-hf\]"),
        (B | {"faster-qwen3-tts": "0.3.2"}, r"faster-qwen3-tts 0\.3\.2 does not fit stack B"),
    ],
)
def test_a_misfit_is_named_with_the_way_out(versions, expected):
    (problem,) = stack_problems(versions)
    assert re.search(expected, problem)


def test_the_requirements_are_those_that_the_extras_install():
    pyproject = (ROOT / "pyproject.toml").read_text()
    for requirement in (*environment.REQUIRED, *(requirement for stack in STACKS.values() for requirement in stack.requirements)):
        if requirement != "transformers==4.57.3":  # qwen-tts pins it
            assert f'"{requirement}"' in pyproject


def test_the_report_has_every_package_and_an_answer():
    text = str(environment.collect_environment())
    assert all(re.search(rf"^{package} +(\d|not installed)", text, re.MULTILINE) for package in PACKAGES)
    assert re.search(r"^GPU +(no GPU|.*capability \d+\.\d+; driver)", text, re.MULTILINE)
    assert re.search(r"^fits together +(yes|no\n  - )", text, re.MULTILINE)


def test_a_torchaudio_that_does_not_load_is_a_problem(monkeypatch):
    def import_module(name):
        raise OSError("libcudart.so.13: cannot open shared object file\ndetails")

    monkeypatch.setattr(environment, "import_module", import_module)
    (problem,) = environment._torchaudio_problems({"torchaudio": "2.11.0", "torch": "2.15.0"})
    assert re.search(r"does not load beside torch 2\.15\.0 \(libcudart\.so\.13: [^\n]*\).*install torch>=2\.11,<2\.15", problem)


IMPORT = """
import sys
sys.path.insert(0, {root!r})
import logging
from qtts_compile.environment import import_qwen_tts
logging.getLogger("sox").addHandler(logging.StreamHandler())
import_qwen_tts().Qwen3TTSModel
print("printed")
print("warned", file=sys.stderr)
import os
os.system("echo from the shell >&2")
logging.getLogger("sox").warning("SoX is still heard")
"""


def test_the_import_is_quiet_and_leaves_the_streams_as_they_were():
    result = subprocess.run([sys.executable, "-c", IMPORT.format(root=str(ROOT))], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout == "printed\n"
    assert not re.search("not found|could not be found", result.stderr)
    assert result.stderr.endswith("warned\nfrom the shell\nSoX is still heard\n")


def test_what_else_the_import_prints_comes_through(monkeypatch, capsys):
    notice = "\n********\nWarning: flash-attn is not installed. Will only run the manual PyTorch version.\n********\n \n"

    def import_module(name):
        if name == "qwen_tts":
            print("before" + notice + "after")
        return sys

    monkeypatch.delitem(sys.modules, "qwen_tts", raising=False)
    monkeypatch.setattr(environment, "import_module", import_module)
    environment.import_qwen_tts()
    assert capsys.readouterr().out == "beforeafter\n"


def test_without_a_stack_the_import_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "qwen_tts", raising=False)
    monkeypatch.setattr(environment, "_version", lambda package: None)
    with pytest.raises(ImportError, match=r"pip install 'qtts-compile\[tts\]'"):
        environment.import_qwen_tts()
